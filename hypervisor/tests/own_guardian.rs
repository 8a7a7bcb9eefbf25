//! A program that calls `run_if_asked` first thing is its own guardian: this test binary is one.

use std::time::Duration;

use disksnap_core::{Control, Domain, DomainId, Sockets, Verdict, Watch};
use disksnap_hypervisor::{Paths, QemuConnector, guardian};
use disksnap_test_support::Qemu;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    guardian::run_if_asked();
    let tests = vec![Trial::test("the_running_program_guards", || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(the_running_program_guards())
    })];
    libtest_mimic::run(&Arguments::from_args(), tests).exit();
}

async fn the_running_program_guards() -> Result<(), Failed> {
    let qemu = Qemu::builder().start();
    let dir = qemu.dir().to_owned();
    let paths = Paths {
        images: dir.clone(),
        run: dir,
    };
    let domain = Domain {
        id: DomainId::new("vm", None),
        disks: Vec::new(),
        sockets: Sockets {
            monitor: Some(qemu.qmp_path()),
            agent: None,
        },
    };
    let control = QemuConnector::new(paths).control(&domain)?;
    let watch = |deadline| Watch {
        release: Vec::new(),
        resume: true,
        thaw: false,
        deadline,
    };
    let guard = control.guard(watch(Duration::from_mins(10))).await?;
    assert_eq!(guard.disarm().await?, Verdict::Quiet);
    let guard = control.guard(watch(Duration::from_mins(10))).await?;
    control.pause().await?;
    assert_eq!(qemu.status(), "paused");
    drop(guard);
    while qemu.status() != "running" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
