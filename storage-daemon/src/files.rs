//! What is in the run directory of one storage daemon: its lock, its record, its number, its sockets, its log, and for a
//! moment what changed in an image that it is to serve.
//!
//! The lock file is the daemon's standard input, so that it is locked for exactly as long as the daemon lives,
//! from before its first instruction on and however it ends; it holds the domain's id. The record says where it
//! listens, and which run of which process it is; it is there once the daemon serves.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_core::{DomainId, Error, ErrorKind, Listen, NbdServer, Result, faults};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The longest path of a unix socket, in bytes (unix(7)).
const LONGEST_SOCKET: usize = 107;
const LOCK: &str = ".images.lock";
/// Before the name of the node.
const CHANGED: &str = ".changed.";
/// Somebody who asks whether the daemon lives holds the lock for a moment.
const MOMENT: Duration = Duration::from_secs(5);
/// For how long a process that is ending may hold the lock.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// The files of one domain's daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    run: PathBuf,
    stem: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    server: NbdServer,
    /// Which file its socket is: where the caller chose the path, another one may be there later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<Which>,
}

/// One socket. Its inode's number may be another's as soon as it is removed, so that the time counts too; nothing changes
/// that of a socket.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Which {
    device: u64,
    inode: u64,
    made: (i64, i64),
}

impl Files {
    pub(crate) fn of(run: &Path, domain: &DomainId) -> Self {
        let uuid = domain.uuid.simple().to_string();
        Self {
            run: run.to_owned(),
            stem: uuid[..12].to_owned(),
        }
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.run.join(format!("{}{suffix}", self.stem))
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.path(LOCK)
    }

    fn record(&self) -> PathBuf {
        self.path(".images.json")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path(".images.log")
    }

    /// The daemon writes its number there once it is all set up.
    pub(crate) fn pid(&self) -> PathBuf {
        self.path(".images.pid")
    }

    pub(crate) fn monitor(&self) -> PathBuf {
        self.path(".img.qmp")
    }

    /// Where it listens when nobody says otherwise.
    pub(crate) fn socket(&self) -> Result<PathBuf> {
        let socket = self.path(".img.sock");
        if socket.as_os_str().len() <= LONGEST_SOCKET {
            return Ok(socket);
        }
        let what = format!("the path of a unix socket has at most {LONGEST_SOCKET} bytes");
        Err(Error::new(ErrorKind::Invalid, what)
            .with("socket", socket.display())
            .hint("Choose a shorter state directory."))
    }

    /// Where it is written down what changed in the image of this node, until the daemon has taken it over.
    pub(crate) fn changed(&self, node: &str) -> PathBuf {
        self.path(&format!("{CHANGED}{node}"))
    }

    /// Idempotent.
    pub(crate) fn forget_changed(&self, node: &str) -> Result<()> {
        remove(&self.changed(node))
    }

    /// All of these that a kill has left.
    fn all_changed(&self) -> Result<Vec<PathBuf>> {
        let failed =
            |e| Error::io("cannot look for what the image server left", e).with("path", self.run.display());
        let ours = format!("{}{CHANGED}", self.stem);
        let mut all = Vec::new();
        let entries = match std::fs::read_dir(&self.run) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(all),
            other => other.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().as_encoded_bytes().starts_with(ours.as_bytes()) {
                all.push(entry.path());
            }
        }
        Ok(all)
    }

    /// Makes the lock file anew, and takes the lock.
    pub(crate) fn take_lock(&self, domain: &DomainId) -> Result<File> {
        let failed = |e: io::Error| {
            Error::io("cannot make the image server's lock", e).with("path", self.lock().display())
        };
        write_whole(&self.lock(), domain).map_err(failed)?;
        let lock = OpenOptions::new().read(true).write(true).open(self.lock());
        let lock = lock.map_err(failed)?;
        let since = Instant::now();
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(lock),
                Err(Errno::WOULDBLOCK | Errno::INTR) if since.elapsed() < MOMENT => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    /// Whether the daemon lives.
    pub(crate) fn is_held(&self) -> Result<bool> {
        let failed = |e: io::Error| {
            Error::io("cannot look at the image server's lock", e).with("path", self.lock().display())
        };
        let lock = match File::open(self.lock()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed)?,
        };
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Whether the daemon lives and is not about to be gone: one that was killed serves nothing any more, and may hold the
    /// lock for another moment.
    pub(crate) async fn lives(&self) -> Result<bool> {
        let since = Instant::now();
        while self.is_held()? {
            // Where its process cannot be seen it is taken at the lock's word.
            if self.holder().is_some() || since.elapsed() > LAST_MOMENT {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(false)
    }

    /// The process that lives by this lock: the one whose standard input it is.
    pub(crate) fn holder(&self) -> Option<i32> {
        let lock = std::fs::metadata(self.lock()).ok()?;
        let processes = std::fs::read_dir("/proc").ok()?;
        let pid = |name: std::ffi::OsString| name.to_str()?.parse::<i32>().ok();
        let mut pids = processes.flatten().filter_map(|entry| pid(entry.file_name()));
        pids.find(|pid| holds(*pid, (lock.dev(), lock.ino())))
    }

    /// Whether this process still is the one.
    pub(crate) fn is_holder(&self, pid: i32) -> bool {
        std::fs::metadata(self.lock()).is_ok_and(|lock| holds(pid, (lock.dev(), lock.ino())))
    }

    pub(crate) fn remember(&self, server: &NbdServer) -> Result<()> {
        let record = Record {
            server: server.clone(),
            socket: socket_of(server).and_then(which_socket),
        };
        write_whole(&self.record(), &record)
            .map_err(|e| Error::io("cannot record the image server", e).with("path", self.record().display()))
    }

    /// `None` where it was never wholly started.
    pub(crate) fn remembered(&self) -> Result<Option<NbdServer>> {
        Ok(self.record_there()?.map(|record| record.server))
    }

    fn record_there(&self) -> Result<Option<Record>> {
        let path = self.record();
        let failed = |e| Error::io("cannot read the image server's record", e).with("path", path.display());
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let record: std::result::Result<Record, _> = serde_json::from_slice(&text);
        Ok(record.ok())
    }

    /// Removes all files of a daemon that is no more; idempotent. The lock goes last: it is how they are found.
    pub(crate) fn remove(&self) -> Result<()> {
        self.remove_socket()?;
        let socket = self.path(".img.sock");
        let halves = [unfinished(&self.record()), unfinished(&self.lock())];
        let whole = [
            self.record(),
            self.monitor(),
            socket,
            self.pid(),
            self.log(),
            self.lock(),
        ];
        let changed = self.all_changed()?;
        for path in halves.into_iter().chain(changed).chain(whole) {
            remove(&path)?;
        }
        Ok(())
    }

    /// Removes the socket that a daemon which was killed left where the caller had it: the very one, and only if nobody
    /// listens on it.
    fn remove_socket(&self) -> Result<()> {
        let Some(record) = self.record_there()? else {
            return Ok(());
        };
        let Some(path) = socket_of(&record.server) else {
            return Ok(());
        };
        let is_it = record.socket.is_some() && which_socket(path) == record.socket;
        if !is_it || UnixStream::connect(path).is_ok() {
            return Ok(());
        }
        match faults::around("file", "remove socket", || std::fs::remove_file(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(
                "cannot remove the socket that the image server left",
                error,
            )
            .with("socket", path.display())),
            _ => Ok(()),
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    // Most of them are not there; those are no points to be killed at.
    if path
        .symlink_metadata()
        .is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    {
        return Ok(());
    }
    match faults::around("file", "remove server's", || std::fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("cannot remove what the image server left", error).with("path", path.display()))
        }
        _ => Ok(()),
    }
}

fn socket_of(server: &NbdServer) -> Option<&Path> {
    match &server.listen {
        Listen::Unix(path) => Some(path),
        Listen::Tcp { .. } => None,
    }
}

/// Which file is there, where it is a socket.
fn which_socket(path: &Path) -> Option<Which> {
    let found = std::fs::symlink_metadata(path).ok()?;
    found.file_type().is_socket().then(|| Which {
        device: found.dev(),
        inode: found.ino(),
        made: (found.mtime(), found.mtime_nsec()),
    })
}

fn holds(pid: i32, lock: (u64, u64)) -> bool {
    std::fs::metadata(format!("/proc/{pid}/fd/0")).is_ok_and(|found| (found.dev(), found.ino()) == lock)
}

/// The domains that have a lock file here.
pub(crate) fn domains(run: &Path) -> Result<Vec<DomainId>> {
    let failed = |e| Error::io("cannot look for image servers", e).with("path", run.display());
    let mut domains = Vec::new();
    for entry in std::fs::read_dir(run).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_lock = path.to_str().is_some_and(|path| path.ends_with(LOCK));
        // One that has just been removed is none.
        if let Some(text) = is_lock.then(|| std::fs::read(&path).ok()).flatten() {
            domains.extend(serde_json::from_slice::<DomainId>(&text).ok());
        }
    }
    Ok(domains)
}

/// What a file is called while it is being written.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Writes a file whole or not at all.
fn write_whole(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let new = unfinished(path);
    let text = serde_json::to_vec(value)?;
    let mut made = OpenOptions::new();
    made.write(true).create(true).truncate(true).mode(0o600);
    faults::around("file", "write server's", || made.open(&new)?.write_all(&text))?;
    faults::around("file", "rename server's", || std::fs::rename(&new, path))
}
