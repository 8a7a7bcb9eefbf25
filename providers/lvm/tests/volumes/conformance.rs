//! The method passes the suite, on plain and on thin volumes of a domain that is off.
//!
//! A command of lvm2 takes a third of a second in the guest, and the cases in which something goes wrong at every
//! point run hundreds: they are shared out among the two kinds of volumes, which differ in one command.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use disksnap_conformance::{Fixture, InactiveConnector, Setting, assert_cases, read_file};
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, DomainId, Error, MethodChoice,
    Options, Result, Snapshot, Sockets, Source,
};
use disksnap_lvm::LogicalVolume;
use tempfile::TempDir;

use crate::support::{Group, block, device, fill, run};

/// 33 extents of 64 KiB: no multiple of a chunk of a thin pool, nor of a MiB.
const SIZE: u64 = 33 << 16;

/// The cases that strike at every point.
fn strikes(case: &str) -> bool {
    ["-fails", "-killed", "-disconnected"]
        .iter()
        .any(|end| case.ends_with(end))
}

#[test]
#[ignore = "runs in the guest"]
fn classic() {
    let group = Arc::new(Group::new("vg", "-s 64k"));
    let capabilities = vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::Revert,
        Capability::GuestSafe,
    ];
    let here = ["create-call-fails", "delete-killed"];
    assert_cases(Volumes::new(group, capabilities, false), |case| {
        !strikes(case) || here.contains(&case)
    });
}

#[test]
#[ignore = "runs in the guest"]
fn thin() {
    let group = Arc::new(Group::new("vg", "-s 64k"));
    group.pool("pool", 256);
    let capabilities = vec![
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::Revert,
    ];
    let here = ["create-killed", "delete-call-fails"];
    assert_cases(Volumes::new(group, capabilities, true), |case| {
        !strikes(case) || here.contains(&case)
    });
}

/// Makes settings in one volume group.
#[derive(Debug)]
struct Volumes {
    group: Arc<Group>,
    capabilities: Vec<Capability>,
    thin: bool,
    made: AtomicUsize,
}

impl Volumes {
    fn new(group: Arc<Group>, capabilities: Vec<Capability>, thin: bool) -> Self {
        Self {
            group,
            capabilities,
            thin,
            made: AtomicUsize::new(0),
        }
    }
}

#[async_trait]
impl Fixture for Volumes {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        Arc::new(LogicalVolume)
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let mut setting = OnVolumes {
            group: Arc::clone(&self.group),
            dir: TempDir::new().unwrap(),
            names: Vec::new(),
            thin: self.thin,
            domain: Domain {
                id: DomainId::new("conform", Some(uuid::Uuid::new_v4())),
                disks: Vec::new(),
                sockets: Sockets::default(),
            },
        };
        for letter in ('a'..='z').take(disks) {
            let name = format!("disk-{number}.{letter}");
            let line = if self.thin {
                format!("lvcreate -y -V {SIZE}b --thinpool vg/pool -n {name}")
            } else {
                format!("lvcreate -y -Wn -L {SIZE}b -n {name} vg")
            };
            run(&line);
            let path = self.group.path(&name);
            // What an earlier volume left there is none of this one's.
            fill(&path, 0, usize::try_from(SIZE).unwrap(), 0);
            setting.domain.disks.push(block(&format!("vd{letter}"), &path));
            setting.names.push(name);
        }
        Ok(Box::new(setting))
    }
}

#[derive(Debug)]
struct OnVolumes {
    group: Arc<Group>,
    dir: TempDir,
    names: Vec<String>,
    thin: bool,
    domain: Domain,
}

impl OnVolumes {
    fn device(&self, target: &str) -> Result<PathBuf> {
        let disk = self.domain.disk(target)?;
        Ok(disk.source.as_ref().and_then(Source::path).unwrap().to_owned())
    }
}

impl Drop for OnVolumes {
    fn drop(&mut self) {
        let names: Vec<String> = self.names.iter().map(|name| format!("vg/{name}")).collect();
        run(&format!("lvremove -y -f {}", names.join(" ")));
    }
}

#[async_trait]
impl Setting for OnVolumes {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(InactiveConnector::new(self.dir.path()))
    }

    fn choice(&self, target: &str) -> DiskChoice {
        // As much room as a whole overwritten disk needs.
        let whole = [("snapshot.size", "100%ORIGIN")];
        let options: Options = whole.into_iter().filter(|_| !self.thin).collect();
        DiskChoice {
            method: Some(MethodChoice {
                method: "lvm".to_owned(),
                options,
            }),
            ..DiskChoice::new(target)
        }
    }

    fn unfit_disk(&self) -> Disk {
        block("vdz", "/dev/vdb".as_ref())
    }

    fn size(&self, _: &str) -> u64 {
        SIZE
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        fill(&self.device(target)?, offset, usize::try_from(len).unwrap(), byte);
        Ok(())
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        let device = self.device(target)?;
        run(&format!(
            "blkdiscard -z -o {offset} -l {len} {}",
            device.display()
        ));
        Ok(())
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        let dev = self.device(target)?;
        read_file(&Source::Block { dev }, "raw", offset, len)
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        read_file(source, format, offset, len)
    }

    /// Removes the snapshot's volumes.
    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.disks {
            assert!(matches!(disk.access, Access::Source { .. }));
            run(&format!(
                "lvremove -y {}",
                device(snapshot, &disk.target).display()
            ));
        }
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let own = |name: &String| self.names.contains(name) || name == "pool";
        let mut left: Vec<String> = self
            .group
            .volumes()
            .into_iter()
            .filter(|name| !own(name))
            .collect();
        let failed = |e| Error::io("cannot list the directory", e);
        for entry in std::fs::read_dir(self.dir.path()).map_err(failed)? {
            left.push(entry.map_err(failed)?.path().display().to_string());
        }
        Ok(left)
    }
}
