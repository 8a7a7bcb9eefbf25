//! What the tests of this crate share: a domain for a real QEMU, and a connector with directories of its own.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::path::Path;
use std::time::{Duration, Instant};

use disksnap_core::{Disk, Domain, DomainId, Sockets, Source};
use disksnap_hypervisor::{GuardianProgram, Paths, QemuConnector, QemuControl};
use disksnap_test_support::{Qemu, StorageDaemon};
use tempfile::TempDir;

/// A connector and the directories it uses.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) connector: QemuConnector,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("hv-").tempdir().unwrap();
        let paths = Paths {
            images: dir.path().to_owned(),
            run: dir.path().to_owned(),
        };
        Self {
            connector: QemuConnector::new(paths),
            dir,
        }
    }

    pub(crate) fn control(&self, domain: &Domain) -> QemuControl {
        self.connector.control(domain).unwrap()
    }
}

/// A domain without disks that answers on these sockets.
pub(crate) fn domain(monitor: &Path, agent: Option<&Path>) -> Domain {
    Domain {
        id: DomainId::new("vm", None),
        disks: Vec::new(),
        sockets: Sockets {
            monitor: Some(monitor.to_owned()),
            agent: agent.map(Path::to_owned),
        },
    }
}

pub(crate) fn qemu_domain(qemu: &Qemu) -> Domain {
    domain(&qemu.qmp_path(), Some(&qemu.agent_path()))
}

pub(crate) fn daemon_domain(daemon: &StorageDaemon) -> Domain {
    domain(&daemon.qmp_path(), None)
}

/// A disk that the document knows by its file alone.
pub(crate) fn disk_of(target: &str, image: &Path) -> Disk {
    Disk::new(
        target,
        Source::File {
            file: image.to_owned(),
        },
    )
}

/// The guardian of this package.
pub(crate) fn guardian_program() -> GuardianProgram {
    GuardianProgram::Program {
        path: env!("CARGO_BIN_EXE_disksnap-guardian").into(),
        arguments: Vec::new(),
    }
}

/// Waits until something is so; far longer than it should take.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_mins(2), "still not so: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
