//! Domains that are off, whose disks are volumes in a volume group of this machine: what the method `lvm` is tried on.
//!
//! The volumes are small and bear names of their own; what is made beside them counts as left over, so nothing else may
//! be made in the group meanwhile.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use disksnap_conformance::{Fixture, InactiveConnector, Setting, read_file};
use disksnap_core::{
    Access, Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, DomainId, Driver, Error,
    ErrorKind, MethodChoice, Options, Result, Snapshot, Sockets, Source,
};
use rustix::fs::{FallocateFlags, fallocate};
use tempfile::TempDir;
use uuid::Uuid;

/// What the names of all volumes here begin with.
const PREFIX: &str = "disksnap-conform-";
/// A disk has more than this many bytes, and then as few extents as can be.
const AT_LEAST: u64 = 2 << 20;
/// A disk may not be larger: the suite reads and overwrites it whole, many times.
const AT_MOST: u64 = 64 << 20;
/// Where `lvm` is looked for, and what names another.
const PLACES: [&str; 4] = ["/usr/sbin/lvm", "/sbin/lvm", "/usr/bin/lvm", "/bin/lvm"];
const ELSEWHERE: &str = "DISKSNAP_LVM";

/// Makes domains on volumes of one group: plain volumes, or thin ones in a pool.
pub struct LogicalVolumes {
    place: Arc<Place>,
    make: Arc<dyn Fn() -> Arc<dyn DiskSnapshot> + Send + Sync>,
    capabilities: Vec<Capability>,
}

/// Where volumes are made.
#[derive(Debug)]
struct Place {
    lvm: PathBuf,
    group: String,
    pool: Option<String>,
    /// The size of a disk in bytes.
    size: u64,
    not_removed: Mutex<Vec<String>>,
}

impl fmt::Debug for LogicalVolumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogicalVolumes")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl LogicalVolumes {
    /// Plain volumes in this group, or thin ones where a pool of the group is named; `make` gives a new provider at each
    /// call. Makes nothing yet.
    ///
    /// # Errors
    /// `Unavailable` where lvm2 is not installed; `NotFound` where there is no such group or pool; `Invalid` for a name
    /// that cannot be one, a pool that is none, or a group whose extents are too large for small disks.
    pub fn new(
        group: &str,
        pool: Option<&str>,
        capabilities: impl IntoIterator<Item = Capability>,
        make: impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut place = Place {
            lvm: find_lvm()?,
            group: group.to_owned(),
            pool: pool.map(str::to_owned),
            size: 0,
            not_removed: Mutex::default(),
        };
        for name in std::iter::once(group).chain(pool) {
            let plain = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
            if name.is_empty() || name.starts_with('-') || !name.chars().all(plain) {
                let what = format!("{name:?} is no name of a volume group or of a pool in it");
                return Err(Error::new(ErrorKind::Invalid, what).hint("`vgs` and `lvs` list the names."));
            }
        }
        place.size = place.size_of_disks()?;
        place.must_be_pool()?;
        Ok(Self {
            place: Arc::new(place),
            make: Arc::new(make),
            capabilities: capabilities.into_iter().collect(),
        })
    }

    /// What could not be removed after a case, and why: it is still there.
    #[must_use]
    pub fn not_removed(&self) -> Vec<String> {
        self.place.not_removed().clone()
    }
}

fn find_lvm() -> Result<PathBuf> {
    let named = std::env::var_os(ELSEWHERE).map(PathBuf::from);
    let mut places = named.into_iter().chain(PLACES.map(PathBuf::from));
    places.find(|path| path.is_file()).ok_or_else(|| {
        Error::new(ErrorKind::Unavailable, "lvm2 is not installed").hint(format!(
            "Install lvm2, or name its program `lvm` by absolute path in {ELSEWHERE}."
        ))
    })
}

impl Place {
    /// Runs one command of lvm2, and gives what it printed.
    fn run<S: AsRef<OsStr>>(&self, command: &str, arguments: &[S]) -> Result<String> {
        let output = Command::new(&self.lvm)
            .arg(command)
            .args(arguments)
            // Its messages are told apart by their English words.
            .env("LC_ALL", "C")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .output()
            .map_err(|e| Error::io(format!("cannot run {}", self.lvm.display()), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.lines().map(str::trim).collect();
        let said = said.join("; ");
        let kind = if said.contains("not found") || said.contains("Failed to find") {
            ErrorKind::NotFound
        } else if said.contains("nsufficient free space") {
            ErrorKind::NoSpace
        } else {
            ErrorKind::Refused
        };
        Err(Error::new(kind, format!("{command} failed: {said}")))
    }

    fn not_removed(&self) -> MutexGuard<'_, Vec<String>> {
        self.not_removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size_of_disks(&self) -> Result<u64> {
        let asked = [
            "--noheadings",
            "--units",
            "b",
            "--nosuffix",
            "-o",
            "vg_extent_size",
            &self.group,
        ];
        let told = self.run("vgs", &asked)?;
        let extent: u64 = told.trim().parse().map_err(|e| {
            Error::new(ErrorKind::Protocol, format!("vgs calls an extent {told:?}")).because(e)
        })?;
        let size = (AT_LEAST / extent.max(1) + 1) * extent;
        if size <= AT_MOST {
            return Ok(size);
        }
        let what = format!(
            "the extents of the volume group {} have {} MiB, too large for small disks",
            self.group,
            extent >> 20
        );
        Err(Error::new(ErrorKind::Invalid, what)
            .hint("Give a group whose extents have at most 64 MiB (`vgcreate -s`)."))
    }

    fn must_be_pool(&self) -> Result<()> {
        let Some(pool) = &self.pool else {
            return Ok(());
        };
        let pool = format!("{}/{pool}", self.group);
        let told = self.run("lvs", &["--noheadings", "-o", "lv_attr", &pool])?;
        if told.trim().starts_with('t') {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Invalid, format!("{pool} is not a thin pool"))
                .hint("`lvs -S lv_layout=pool` lists the pools; `lvcreate --type thin-pool` makes one."),
        )
    }

    /// All volumes of the group, hidden ones too.
    fn volumes(&self) -> Result<Vec<Volume>> {
        let fields = [
            "-a",
            "--noheadings",
            "--separator",
            ":",
            "-o",
            "lv_uuid,lv_name,origin",
        ];
        let told = self.run("lvs", &[&fields[..], &[&self.group]].concat())?;
        let plain = |name: &str| name.trim_start_matches('[').trim_end_matches(']').to_owned();
        let volume = |line: &str| {
            let mut parts = line.trim().split(':');
            Some(Volume {
                uuid: parts.next()?.replace('-', ""),
                name: plain(parts.next()?),
                origin: plain(parts.next()?),
            })
        };
        Ok(told.lines().filter_map(volume).collect())
    }

    fn make(&self, name: &str) -> Result<PathBuf> {
        let bytes = format!("{}b", self.size);
        match &self.pool {
            Some(pool) => {
                let pool = format!("{}/{pool}", self.group);
                self.run("lvcreate", &["-y", "-V", &bytes, "--thinpool", &pool, "-n", name])?;
            }
            // What an earlier volume left there is written over, below.
            None => {
                self.run("lvcreate", &["-y", "-Wn", "-L", &bytes, "-n", name, &self.group])?;
            }
        }
        let device = Path::new("/dev").join(&self.group).join(name);
        write(
            &device,
            0,
            &vec![0; usize::try_from(self.size).unwrap_or_default()],
        )?;
        Ok(device)
    }
}

/// A volume, as far as it matters whose it is.
#[derive(Debug)]
struct Volume {
    /// Without dashes.
    uuid: String,
    name: String,
    origin: String,
}

#[async_trait]
impl Fixture for LogicalVolumes {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        (self.make)()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let before = self.place.volumes()?;
        let mut setting = OnVolumes {
            place: Arc::clone(&self.place),
            method: self.provider().method().name,
            dir: TempDir::new().map_err(|e| Error::io("cannot make a directory", e))?,
            before: before.into_iter().map(|volume| volume.uuid).collect(),
            names: Vec::new(),
            uuids: Mutex::default(),
            domain: Domain {
                id: DomainId::new("conform", Some(Uuid::new_v4())),
                disks: Vec::new(),
                sockets: Sockets::default(),
            },
        };
        let unique = Uuid::new_v4().simple().to_string();
        for letter in ('a'..='z').take(disks) {
            let name = format!("{PREFIX}{}.{letter}", &unique[..8]);
            setting.names.push(name.clone());
            let disk = Disk::new(
                format!("vd{letter}"),
                Source::Block {
                    dev: self.place.make(&name)?,
                },
            );
            setting.domain.disks.push(Disk {
                driver: Driver {
                    name: Some("qemu".to_owned()),
                    format: Some("raw".to_owned()),
                },
                ..disk
            });
        }
        Ok(Box::new(setting))
    }
}

#[derive(Debug)]
struct OnVolumes {
    place: Arc<Place>,
    method: String,
    dir: TempDir,
    before: BTreeSet<String>,
    names: Vec<String>,
    /// Of all volumes that have borne one of the names: a revert may put another in the place of the first.
    uuids: Mutex<BTreeSet<String>>,
    domain: Domain,
}

impl OnVolumes {
    fn device(&self, target: &str) -> Result<PathBuf> {
        let disk = self.domain.disk(target)?;
        let path = disk.source.as_ref().and_then(Source::path).map(Path::to_owned);
        path.ok_or_else(|| Error::new(ErrorKind::Internal, "the fixture's disk has no path"))
    }

    /// What was not there before, the disks too.
    fn new_volumes(&self) -> Result<Vec<Volume>> {
        let mut volumes = self.place.volumes()?;
        volumes.retain(|volume| !self.before.contains(&volume.uuid));
        let disks = volumes.iter().filter(|volume| self.names.contains(&volume.name));
        let mut uuids = self.uuids.lock().unwrap_or_else(PoisonError::into_inner);
        uuids.extend(disks.map(|volume| volume.uuid.clone()));
        Ok(volumes)
    }

    /// The disks and all that hangs on them, what hangs on another first. A volume that somebody else made meanwhile is not
    /// among them.
    fn ours(&self) -> Result<Vec<Volume>> {
        let mut rest = self.new_volumes()?;
        let uuids = self.uuids.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ours: Vec<Volume> = Vec::new();
        loop {
            let is_ours = |volume: &Volume| {
                // The method names what it makes after the volume's id.
                let named_after = |uuid: &String| volume.name.ends_with(&uuid[..uuid.len().min(10)]);
                uuids.contains(&volume.uuid)
                    || uuids.iter().any(named_after)
                    || self.names.contains(&volume.origin)
                    || ours.iter().any(|of| of.name == volume.origin)
            };
            let (found, others): (Vec<Volume>, Vec<Volume>) = rest.into_iter().partition(is_ours);
            if found.is_empty() {
                break;
            }
            ours.extend(found);
            rest = others;
        }
        ours.sort_by_key(|volume| volume.origin.is_empty());
        Ok(ours)
    }

    fn remove(&self) -> Result<()> {
        let ours = self.ours()?;
        if ours.is_empty() {
            return Ok(());
        }
        let names = ours
            .iter()
            .map(|volume| format!("{}/{}", self.place.group, volume.name));
        let arguments: Vec<String> = ["-y", "-f"].map(str::to_owned).into_iter().chain(names).collect();
        match self.place.run("lvremove", &arguments) {
            // One may have gone with another.
            Err(error) if !self.ours()?.is_empty() => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for OnVolumes {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            let left = format!("{} of {}: {error}", self.names.join(", "), self.place.group);
            self.place.not_removed().push(left);
        }
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
        // As much room as a whole overwritten disk needs; a thin one takes it from the pool.
        let whole = [("snapshot.size", "100%ORIGIN")];
        let options: Options = whole.into_iter().filter(|_| self.place.pool.is_none()).collect();
        DiskChoice {
            method: Some(MethodChoice {
                method: self.method.clone(),
                options,
            }),
            ..DiskChoice::new(target)
        }
    }

    fn unfit_disk(&self) -> Disk {
        let source = Source::Network {
            protocol: "nbd".to_owned(),
            name: None,
            hosts: Vec::new(),
            tls: false,
        };
        Disk::new("vdz", source)
    }

    fn size(&self, _: &str) -> u64 {
        self.place.size
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        let bytes = vec![byte; usize::try_from(len).unwrap_or_default()];
        write(&self.device(target)?, offset, &bytes)
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        let device = self.device(target)?;
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let zeroed = OpenOptions::new()
            .write(true)
            .open(&device)
            .and_then(|file| Ok(fallocate(&file, flags, offset, len)?));
        zeroed.map_err(|e| Error::io(format!("cannot zero {}", device.display()), e))
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
            let Access::Source { source, .. } = &disk.access else {
                continue;
            };
            if let Some(path) = source.path() {
                self.place
                    .run("lvremove", &[OsStr::new("-y"), path.as_os_str()])?;
            }
        }
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let mut left: Vec<String> = self
            .new_volumes()?
            .into_iter()
            .map(|volume| volume.name)
            .collect();
        left.retain(|name| !self.names.contains(name));
        let failed = |e| Error::io("cannot list the directory", e);
        for entry in std::fs::read_dir(self.dir.path()).map_err(failed)? {
            left.push(entry.map_err(failed)?.path().display().to_string());
        }
        Ok(left)
    }
}

/// On to the disk itself.
fn write(device: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .open(device)
        .and_then(|file: File| {
            file.write_all_at(bytes, offset)?;
            file.sync_all()
        });
    written.map_err(|e| Error::io(format!("cannot write {}", device.display()), e))
}
