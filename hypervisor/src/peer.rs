//! Who is at the other end of a unix socket: its process, its user, and which run of it.

use std::fs;

use disksnap_core::Owner;
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

/// The fields of `/proc/PID/stat` from the third (the state) on; the second is a name that may hold anything.
fn stat(pid: i32) -> Option<impl Iterator<Item = String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_whitespace().map(str::to_owned).collect();
    Some(fields.into_iter())
}
