//! Into a paused domain: a real QEMU that has not run yet.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use disksnap::{Disksnap, DomainDocument, Effect};
use disksnap_backup::{ErrorKind, IntoRequest, RestoredInto, Result, Silent, Watcher, restore_into};
use disksnap_test_support::{DiskSpec, Qemu, QemuVersion, need, pattern};

use crate::rig::{SIZE, Saved, StopAfter, reads_as, run, text};

/// A paused QEMU whose disk holds something else, and a repository of it.
struct Paused {
    qemu: Qemu,
    document: DomainDocument,
    disksnap: Disksnap,
    saved: Saved,
    image: PathBuf,
    _dir: tempfile::TempDir,
}

impl Paused {
    async fn new(version: QemuVersion, size: usize, more: &[DiskSpec]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("vda.img");
        std::fs::write(&image, pattern::bytes(42, size)).unwrap();
        let mut builder = Qemu::builder().version(version).prelaunch();
        builder = builder.disk(DiskSpec::new("vda", size as u64).image(&image));
        for disk in more {
            builder = builder.disk(disk.clone());
        }
        let qemu = builder.start();
        let document = DomainDocument::parse(qemu.domain_xml()).unwrap();
        let disksnap = Disksnap::open(Some(&dir.path().join("state"))).await.unwrap();
        let saved = Saved::of(&document).await;
        Self {
            qemu,
            document,
            disksnap,
            saved,
            image,
            _dir: dir,
        }
    }

    async fn restore(&self, n: usize, resume: bool, watcher: &dyn Watcher) -> Result<RestoredInto> {
        let request = IntoRequest {
            resume,
            ..IntoRequest::default()
        };
        let saved = &self.saved;
        let from = (&saved.repository, &saved.folder, &saved.points[n]);
        restore_into(&self.disksnap, self.document.domain(), from, &request, watcher).await
    }

    /// Nothing is lent out any more.
    async fn is_over(&self) {
        let domain = self.document.domain();
        let filling = self.disksnap.dispatcher().filling(domain).await.unwrap();
        assert_eq!(filling, None);
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_is_what_it_was() {
    for version in [QemuVersion::V10_0, QemuVersion::V7_2] {
        let paused = Paused::new(version, SIZE, &[]).await;
        let done = paused.restore(1, false, &Silent).await.unwrap();
        assert_eq!(done.warnings, [""; 0]);
        assert!(!done.resumed);
        assert_eq!(
            done.disks[0].restored.digest,
            paused.saved.points[1].disks[0].content
        );
        paused.is_over().await;
        assert_eq!(paused.qemu.status(), "prelaunch");
        assert!(paused.content() == paused.saved.contents[1]);
        let done = paused.restore(2, true, &Silent).await.unwrap();
        assert!(done.resumed);
        assert_eq!(paused.qemu.status(), "running");
        assert!(paused.content() == paused.saved.contents[2]);
        let running = paused.restore(0, false, &Silent).await.unwrap_err();
        assert_eq!(running.kind(), ErrorKind::Busy, "{running}");
        assert!(paused.content() == paused.saved.contents[2]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_larger_disk_is_zeroed_behind_and_another_disk_is_left_alone() {
    let other = DiskSpec::new("vdb", 1 << 20).qcow2();
    let paused = Paused::new(QemuVersion::V10_0, SIZE + (1 << 20), &[other]).await;
    let done = paused.restore(2, false, &Silent).await.unwrap();
    let content = paused.content();
    assert!(content[..SIZE] == paused.saved.contents[2]);
    assert!(content[SIZE..].iter().all(|byte| *byte == 0));
    let told = done.warnings.join("\n");
    assert!(told.contains("'vdb' is not restored"), "{told}");
    assert!(told.contains("last 1048576 bytes were zeroed"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_smaller_disk_is_refused() {
    let paused = Paused::new(QemuVersion::V10_0, SIZE - 512, &[]).await;
    let before = paused.content();
    let error = paused.restore(0, true, &Silent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(error.effect(), Effect::None, "{error:?}");
    paused.is_over().await;
    assert_eq!(paused.qemu.status(), "prelaunch");
    assert!(paused.content() == before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_leaves_the_guest_paused_and_says_what_is_unfinished() {
    let paused = Paused::new(QemuVersion::V10_0, SIZE, &[]).await;
    let watcher = StopAfter(1 << 20, AtomicU64::new(0));
    let error = paused.restore(0, true, &watcher).await.unwrap_err();
    assert_eq!(error.effect(), Effect::Unknown);
    assert!(
        error
            .to_string()
            .contains("'vda' of the paused domain is unfinished"),
        "{error}"
    );
    paused.is_over().await;
    assert_eq!(paused.qemu.status(), "prelaunch");
    paused.saved.damage();
    let error = paused.restore(2, true, &Silent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(paused.qemu.status(), "prelaunch");
    paused.is_over().await;
}

/// A qcow2 disk of a domain goes on to be a good image.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qcow2_disk() {
    need!("qemu-img");
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vda.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), &SIZE.to_string()],
    );
    run("qemu-io", &["-c", "write -q -P 90 0 6M", text(&image)]);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE as u64).qcow2().image(&image))
        .prelaunch()
        .start();
    let document = DomainDocument::parse(qemu.domain_xml()).unwrap();
    let disksnap = Disksnap::open(Some(&dir.path().join("state"))).await.unwrap();
    let saved = Saved::of(&document).await;
    let from = (&saved.repository, &saved.folder, &saved.points[2]);
    let request = IntoRequest::default();
    restore_into(&disksnap, document.domain(), from, &request, &Silent)
        .await
        .unwrap();
    assert!(qemu.quit().success());
    run("qemu-img", &["check", "-q", text(&image)]);
    reads_as(&image, "qcow2", &saved.contents[2]);
}
