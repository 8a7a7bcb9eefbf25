//! Who is at the other end of a unix socket: its process, its user, and which run of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use disksnap_core::{Error, ErrorKind, Owner, Result};
use tokio::net::UnixStream;

/// The process that listens on the other end, as the kernel tells (`SO_PEERCRED`, unix(7)).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    /// Absent when it lives in another process namespace.
    pub(crate) pid: Option<i32>,
    credentials: Option<Owner>,
}

impl Peer {
    pub(crate) fn of(stream: &UnixStream) -> Self {
        let credentials = stream.peer_cred().ok();
        Self {
            pid: credentials.and_then(|c| c.pid()).filter(|pid| *pid > 0),
            credentials: credentials.map(|c| Owner {
                uid: c.uid(),
                gid: c.gid(),
            }),
        }
    }

    /// Refuses a peer that anybody could be: one of another user than root and ourselves, in a directory that everyone can write, as
    /// `/tmp` is. Elsewhere whoever owns the directory, or let a group write it, has said who may listen there.
    ///
    /// # Errors
    /// `Denied`.
    pub(crate) fn must_be_meant(self, what: &'static str, path: &Path) -> Result<()> {
        let Some(owner) = self.credentials else {
            return Ok(());
        };
        let ours = rustix::process::geteuid().as_raw();
        if owner.uid == 0 || owner.uid == ours || !everyone_can_write(path) {
            return Ok(());
        }
        let message = format!(
            "user {} listens on the {what}'s socket, in a directory where everyone could have made it",
            owner.uid
        );
        Err(Error::new(ErrorKind::Denied, message)
            .with("socket", path.display())
            .hint("Have the hypervisor listen in a directory that only it, or root, can write."))
    }

    /// The user that it runs as now: it may have dropped privileges since it began to listen.
    pub(crate) fn owner(self) -> Option<Owner> {
        let now = self.pid.and_then(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            // Real, effective, saved and file system id (proc(5)).
            let id = |key: &str| -> Option<u32> {
                let line = status.lines().find_map(|line| line.strip_prefix(key))?;
                line.split_whitespace().nth(3)?.parse().ok()
            };
            Some(Owner {
                uid: id("Uid:")?,
                gid: id("Gid:")?,
            })
        });
        now.or(self.credentials)
    }

    /// One run of one process on one boot of the host; `None` when it cannot be seen.
    pub(crate) fn instance(self) -> Option<String> {
        let pid = self.pid?;
        let started = stat(pid)?.nth(19)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(format!("{}/{pid}/{started}", boot.trim()))
    }

    /// Whether a signal has stopped it.
    pub(crate) fn is_stopped(self) -> bool {
        let state = self.pid.and_then(stat).and_then(|mut fields| fields.next());
        state.is_some_and(|state| state == "T" || state == "t")
    }
}

/// Whether everyone can make files beside this one, wherever a symbolic link leads.
fn everyone_can_write(path: &Path) -> bool {
    let directory = fs::canonicalize(path).ok();
    let directory = directory.as_deref().and_then(Path::parent);
    let found = directory.and_then(|directory| directory.metadata().ok());
    // One that cannot be looked at is not known to be safe.
    found.is_none_or(|found| found.mode() & 0o002 != 0)
}

/// The fields of `/proc/PID/stat` from the third (the state) on; the second is a name that may hold anything.
fn stat(pid: i32) -> Option<impl Iterator<Item = String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_whitespace().map(str::to_owned).collect();
    Some(fields.into_iter())
}
