//! The process that holds the disks: a machine or a storage daemon, behind one face.

use std::path::{Path, PathBuf};

use disksnap_core::{Domain, Error, ErrorKind, Result};
use disksnap_test_support::{DiskSpec, GuestDisk, Qemu, QemuBuilder, StorageDaemon, StorageDaemonBuilder};
use disksnap_xml::DomainDocument;
use serde_json::{Value, json};

use crate::{Process, QemuFixture};

/// 2 MiB and a sector: no multiple of any cluster.
pub(crate) const SIZE: u64 = (2 << 20) + 512;

pub(crate) enum Running {
    Machine(Qemu),
    StorageDaemon(StorageDaemon),
}

impl Running {
    /// Starts it with this many disks; `images` is where raw images go when all are to be raw.
    pub(crate) fn start(fixture: &QemuFixture, disks: usize, images: Option<&Path>) -> Result<Self> {
        let specs = specs(disks, images)?;
        Ok(match fixture.process {
            Process::Machine => {
                let builder = Qemu::builder().version(fixture.version);
                Self::Machine(specs.into_iter().fold(builder, QemuBuilder::disk).start())
            }
            Process::StorageDaemon => {
                let builder = StorageDaemon::builder().version(fixture.version);
                Self::StorageDaemon(
                    specs
                        .into_iter()
                        .fold(builder, StorageDaemonBuilder::disk)
                        .start(),
                )
            }
            Process::ExportedStorageDaemon => {
                let builder = StorageDaemon::builder()
                    .version(fixture.version)
                    .without_guest_side();
                let targets: Vec<String> = specs.iter().map(|spec| spec.target().to_owned()).collect();
                let builder = specs.into_iter().fold(builder, StorageDaemonBuilder::disk);
                let running = Self::StorageDaemon(builder.start());
                running.export(&targets)?;
                running
            }
        })
    }

    /// Serves each disk, writable, as the guest's side of it.
    fn export(&self, targets: &[String]) -> Result<()> {
        let addr = json!({"type": "unix", "data": {"path": self.guest_socket()}});
        self.monitor("nbd-server-start", &json!({"addr": addr, "max-connections": 0}))?;
        for target in targets {
            let export = json!({
                "type": "nbd", "id": format!("guest-{target}"), "name": target, "writable": true,
                "node-name": format!("top-{target}"),
            });
            self.monitor("block-export-add", &export)?;
        }
        Ok(())
    }

    /// Where the guest's side of an exported storage daemon is.
    pub(crate) fn guest_socket(&self) -> PathBuf {
        match self {
            Self::Machine(qemu) => qemu.dir().join("guest.sock"),
            Self::StorageDaemon(daemon) => daemon.dir().join("guest.sock"),
        }
    }

    /// The domain as its document describes it.
    pub(crate) fn domain(&self) -> Result<Domain> {
        let xml = match self {
            Self::Machine(qemu) => qemu.domain_xml(),
            Self::StorageDaemon(daemon) => daemon.domain_xml(),
        };
        let document = DomainDocument::parse(&xml);
        let document =
            document.map_err(|e| Error::new(ErrorKind::Invalid, "the fixture's document").because(e))?;
        Ok(document.domain().clone())
    }

    /// Ends it. Where it had ended by itself before: its exit status and what it printed.
    pub(crate) fn last_words(&self) -> Option<String> {
        match self {
            Self::Machine(qemu) => qemu.last_words(),
            Self::StorageDaemon(daemon) => daemon.last_words(),
        }
    }

    pub(crate) fn disk(&self, target: &str) -> GuestDisk {
        match self {
            Self::Machine(qemu) => qemu.disk(target),
            Self::StorageDaemon(daemon) => daemon.disk(target),
        }
    }

    /// One command on a monitor that is not the one under test; the error is QEMU's.
    pub(crate) fn monitor(&self, command: &str, arguments: &Value) -> Result<Value> {
        let answer = match self {
            Self::Machine(qemu) => qemu.monitor().try_execute(command, arguments),
            Self::StorageDaemon(daemon) => daemon.monitor().try_execute(command, arguments),
        };
        let answer = answer.map_err(|e| Error::io(format!("the fixture's monitor: {command}"), e))?;
        answer.map_err(|e| Error::new(ErrorKind::Refused, format!("the fixture's {command}: {e}")))
    }
}

/// Disks of every bus and format, or raw ones in `images`.
fn specs(disks: usize, images: Option<&Path>) -> Result<Vec<DiskSpec>> {
    let Some(dir) = images else {
        let all = [
            DiskSpec::new("vda", SIZE).qcow2(),
            DiskSpec::new("vdb", SIZE),
            DiskSpec::new("sda", SIZE).qcow2(),
        ];
        let short = || Error::new(ErrorKind::Internal, "the fixture has no more disks");
        return all.get(..disks).map(<[_]>::to_vec).ok_or_else(short);
    };
    let raw = |letter: char| {
        let target = format!("vd{letter}");
        let image = dir.join(format!("{target}.raw"));
        let made = std::fs::File::create(&image).and_then(|file| file.set_len(SIZE));
        made.map_err(|e| Error::io(format!("cannot create {}", image.display()), e))?;
        Ok(DiskSpec::new(&target, SIZE).image(&image))
    };
    ('a'..='z').take(disks).map(raw).collect()
}
