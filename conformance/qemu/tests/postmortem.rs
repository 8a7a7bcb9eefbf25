//! A QEMU that ends under the suite is told of, with its last words.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use disksnap_conformance::Fixture as _;
use disksnap_conformance_qemu::{Process, QemuFixture};
use disksnap_core::Command;
use disksnap_qemu_fleece::QemuFleece;

#[tokio::test]
async fn a_qemu_that_ended_by_itself_says_how() {
    let fixture = QemuFixture::new(Process::Machine, [], || Arc::new(QemuFleece));
    let setting = fixture.setting(1).await.unwrap();
    drop(setting);
    assert_eq!(fixture.postmortem(), None);

    let setting = fixture.setting(1).await.unwrap();
    let control = setting.connector().control(setting.domain()).await.unwrap();
    control.monitor(Command::bare("quit")).await.unwrap();
    drop(setting);
    let told = fixture.postmortem().unwrap();
    assert!(
        told.contains("qemu-system ended by itself: exit status: 0"),
        "{told}"
    );
    assert!(told.contains("--- stderr"), "{told}");
    assert_eq!(fixture.postmortem(), None);
}
