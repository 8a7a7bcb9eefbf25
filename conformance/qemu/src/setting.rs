//! One domain in a QEMU of its own.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use disksnap_conformance::{Setting, read_file};
use disksnap_core::{
    Access, Connector, Disk, DiskChoice, Domain, Error, ErrorKind, MethodChoice, NetworkHost, Result,
    Snapshot, SnapshotId, Source,
};
use disksnap_hypervisor::{Paths, QemuConnector};
use disksnap_nbd::{Client, ConnectOptions, Uri};
use disksnap_storage_daemon::StorageDaemons;
use disksnap_test_support::tools;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::QemuFixture;
use crate::domain::{Running, SIZE};

/// Above this a read through the guest's side takes longer than a copy of the whole disk.
pub(crate) const SHORT_READ: u64 = 16 << 10;

/// What every name that disksnap gives inside QEMU begins with.
const OURS: &str = "ds-";

pub(crate) struct QemuSetting {
    running: Running,
    domain: Domain,
    choice: MethodChoice,
    connector: QemuConnector,
    last_words: Arc<Mutex<Vec<String>>>,
    /// Removed last: QEMU must be gone first.
    dirs: Dirs,
}

impl Drop for QemuSetting {
    /// Nothing here ends a QEMU before this: one that has ended is why the case fails.
    fn drop(&mut self) {
        let mut all = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(self.running.last_words());
    }
}

struct Dirs {
    state: TempDir,
    /// Where the disks' raw images are, when they are in a place of their own.
    raw: Option<TempDir>,
}

impl fmt::Debug for QemuSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuSetting")
            .field("domain", &self.domain.id)
            .field("choice", &self.choice)
            .finish_non_exhaustive()
    }
}

impl QemuSetting {
    pub(crate) fn new(fixture: &QemuFixture, disks: usize, choice: MethodChoice) -> Result<Self> {
        let temporary = |e| Error::io("cannot make a temporary directory", e);
        let mut named = tempfile::Builder::new();
        let dirs = Dirs {
            // Sockets go into it, and their paths must be short.
            state: named.prefix("dsnap-").tempdir().map_err(temporary)?,
            raw: match &fixture.images {
                Some(parent) => Some(named.tempdir_in(parent).map_err(temporary)?),
                None => None,
            },
        };
        let paths = Paths {
            images: dirs.state.path().join("images"),
            run: dirs.state.path().join("run"),
        };
        for dir in [&paths.images, &paths.run] {
            std::fs::create_dir(dir).map_err(temporary)?;
        }
        let images = StorageDaemons::new(paths.run.clone());
        let running = Running::start(fixture, disks, dirs.raw.as_ref().map(TempDir::path))?;
        Ok(Self {
            domain: running.domain()?,
            running,
            choice,
            connector: QemuConnector::new(paths)
                .guardian(fixture.guardian.clone())
                .images(Arc::new(images.program(tools::program("qemu-storage-daemon")))),
            last_words: Arc::clone(&fixture.last_words),
            dirs,
        })
    }

    pub(crate) fn names(&self, command: &str, key: &str) -> Result<Vec<String>> {
        let answer = self.running.monitor(command, &json!({}))?;
        let names = answer.as_array().into_iter().flatten();
        Ok(names.filter_map(|x| x[key].as_str()).map(str::to_owned).collect())
    }

    /// One command on the fixture's own monitor.
    pub(crate) fn monitor(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.running.monitor(command, arguments)
    }

    /// Where the guest's side of an exported storage daemon is.
    pub(crate) fn guest_socket(&self) -> PathBuf {
        self.running.guest_socket()
    }

    /// A directory for copies.
    pub(crate) fn state_dir(&self) -> &Path {
        self.dirs.state.path()
    }

    /// Flushes what the guest wrote.
    pub(crate) fn flush(&self, target: &str) {
        self.running.disk(target).flush();
    }

    /// All files in the directories of ours that are no disks.
    fn files(&self) -> Result<Vec<String>> {
        let mut dirs = vec![self.dirs.state.path().join("images")];
        dirs.extend(self.dirs.raw.as_ref().map(|raw| raw.path().to_owned()));
        let mut files = Vec::new();
        for dir in dirs {
            let failed = |e| Error::io(format!("cannot list {}", dir.display()), e);
            for entry in std::fs::read_dir(&dir).map_err(failed)? {
                files.push(entry.map_err(failed)?.path());
            }
        }
        let disks: Vec<&Path> = self
            .domain
            .disks
            .iter()
            .filter_map(|d| d.source.as_ref()?.path())
            .collect();
        files.retain(|file: &PathBuf| !disks.contains(&file.as_path()));
        Ok(files.iter().map(|file| file.display().to_string()).collect())
    }

    /// Cancels the snapshot's jobs, or removes the node it is read through.
    fn break_node(&self, id: SnapshotId, node: &str) -> Result<()> {
        let jobs = self.names("query-jobs", "id")?;
        let mine = format!("{OURS}{}", id.short());
        let mine: Vec<&String> = jobs.iter().filter(|job| job.starts_with(&mine)).collect();
        for job in &mine {
            self.running
                .monitor("block-job-cancel", &json!({"device": job, "force": true}))?;
        }
        if mine.is_empty() {
            self.running
                .monitor("blockdev-del", &json!({"node-name": node}))?;
        }
        Ok(())
    }
}

#[async_trait]
impl Setting for QemuSetting {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(self.connector.clone())
    }

    fn choice(&self, target: &str) -> DiskChoice {
        DiskChoice {
            method: Some(self.choice.clone()),
            ..DiskChoice::new(target)
        }
    }

    /// A disk that this QEMU does not have.
    fn unfit_disk(&self) -> Disk {
        let source = Source::Network {
            protocol: "nbd".to_owned(),
            name: Some("elsewhere".to_owned()),
            hosts: Vec::new(),
            tls: false,
        };
        Disk::new("vdz", source)
    }

    fn size(&self, _: &str) -> u64 {
        SIZE
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        let written = self.running.disk(target).try_fill(offset, len, byte);
        written.map_err(|why| Error::new(ErrorKind::Io, why))
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        let zeroed = self.running.disk(target).try_zero(offset, len);
        zeroed.map_err(|why| Error::new(ErrorKind::Io, why))
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        let disk = self.running.disk(target);
        if len <= SHORT_READ {
            return Ok(disk.read(offset, len));
        }
        let file = self.dirs.state.path().join("copy.raw");
        disk.copy_to(&file);
        let bytes = read_file(&Source::File { file: file.clone() }, "raw", offset, len)?;
        std::fs::remove_file(&file).map_err(|e| Error::io("cannot remove a copy", e))?;
        Ok(bytes)
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        if uri(source).is_some() {
            return read_export(source, offset, len).await;
        }
        read_file(source, format, offset, len)
    }

    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        for disk in &snapshot.disks {
            match &disk.access {
                Access::Node(node) => self.break_node(snapshot.id, node)?,
                Access::Source { source, .. } => {
                    let path = source.path().unwrap_or(Path::new(""));
                    std::fs::remove_file(path)
                        .map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))?;
                }
                Access::Inside(inside) => return Err(inside.not_here(&disk.target)),
            }
        }
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = self.files()?;
        let kinds = [
            ("node", "query-named-block-nodes", "node-name"),
            ("job", "query-jobs", "id"),
            ("export", "query-block-exports", "id"),
        ];
        for (kind, command, key) in kinds {
            let names = self.names(command, key)?.into_iter();
            left.extend(
                names
                    .filter(|name| name.starts_with(OURS))
                    .map(|name| format!("{kind} {name}")),
            );
        }
        // A storage daemon without objects has no such path.
        if let Ok(objects) = self.running.monitor("qom-list", &json!({"path": "/objects"})) {
            let names = objects.as_array().into_iter().flatten();
            let names = names
                .filter_map(|x| x["name"].as_str())
                .filter(|name| name.starts_with(OURS));
            left.extend(names.map(|name| format!("object {name}")));
        }
        Ok(left)
    }
}

/// A range of what is served as an NBD source.
pub(crate) async fn read_export(source: &Source, offset: u64, len: u64) -> Result<Vec<u8>> {
    let unknown = || Error::new(ErrorKind::Unsupported, format!("{source} is not served over NBD"));
    let uri = uri(source).ok_or_else(unknown)?;
    let client = Client::connect(&uri, &ConnectOptions::default()).await;
    let client =
        client.map_err(|e| Error::new(ErrorKind::Io, format!("cannot connect to {source}")).because(e))?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let bytes = client.read(offset, len).await;
    client.disconnect().await;
    let bytes = bytes.map_err(|e| Error::new(ErrorKind::Io, format!("cannot read {source}")).because(e))?;
    Ok(bytes.to_vec())
}

fn uri(source: &Source) -> Option<Uri> {
    let Source::Network {
        protocol,
        name,
        hosts,
        ..
    } = source
    else {
        return None;
    };
    let export = name.as_deref().filter(|_| protocol == "nbd")?;
    match hosts.first()? {
        NetworkHost::Unix { socket } => Some(Uri::unix(socket, export)),
        NetworkHost::Tcp { name, port } => Some(Uri::tcp(name, (*port)?, export)),
    }
}
