//! Where a point is served: who may reach it, and the socket's file.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use disksnap::{ClientName, Error, ErrorKind, Listen, Result, Tls, faults};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{ServeRequest, utf8};

/// The longest path of a unix socket, in bytes (unix(7)).
const LONGEST_SOCKET: usize = 107;
/// The ids of the TLS credentials, and of the list of clients that are let in, in the daemon.
const CREDENTIALS: &str = "tls";
const CLIENTS: &str = "clients";
/// Held from the look for sockets that nobody serves any more until our own is served, so that none is taken for one.
const LOCK: &str = "serve.lock";
const PREFIX: &str = "serve-";
const SUFFIX: &str = ".sock";

/// Where a server listens, and to whom.
#[derive(Debug)]
pub(super) struct Place {
    listen: Listen,
    tls: Option<Tls>,
    /// In which directory stale sockets are ours, where the socket is one of ours.
    run: Option<PathBuf>,
    /// Which file the socket is, once it is there.
    socket: Option<Which>,
}

/// A place that is being taken.
#[derive(Debug)]
pub(super) struct Claimed {
    place: Place,
    _lock: Option<File>,
}

/// One file: an inode's number may be another's as soon as it is removed, so that the time counts too.
#[derive(Debug, PartialEq, Eq)]
struct Which(u64, u64, i64, i64);

impl Place {
    /// The place that is asked for; nothing is done yet.
    ///
    /// # Errors
    /// `Denied`, `Invalid` as [`serve`](super::serve) says.
    pub(super) fn wanted(request: &ServeRequest) -> Result<Self> {
        let (listen, run) = if let Some(listen) = &request.listen {
            (listen.clone(), None)
        } else {
            let name = Uuid::new_v4().simple().to_string();
            let socket = request.run.join(format!("{PREFIX}{}{SUFFIX}", &name[..8]));
            (Listen::Unix(socket), Some(request.run.clone()))
        };
        refuse_careless(&listen, request)?;
        if let Listen::Unix(path) = &listen
            && path.as_os_str().len() > LONGEST_SOCKET
        {
            let why = format!("the path of a unix socket has at most {LONGEST_SOCKET} bytes");
            return Err(Error::new(ErrorKind::Invalid, why)
                .with("socket", path.display())
                .hint("Choose a shorter one, or a shorter state directory."));
        }
        Ok(Self {
            listen,
            tls: request.tls.clone(),
            run,
            socket: None,
        })
    }

    pub(super) fn listen(&self) -> &Listen {
        &self.listen
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The daemon's arguments: QAPI's `tls-creds-x509`, `authz-list` and `NbdServerOptions`.
    pub(super) fn arguments(&self) -> Result<Vec<String>> {
        let mut arguments = Vec::new();
        let mut server = json!({ "addr": match &self.listen {
            Listen::Unix(path) => json!({"type": "unix", "path": utf8(path.clone())?}),
            Listen::Tcp { address, port } => {
                json!({"type": "inet", "host": address.to_string(), "port": port.to_string(), "numeric": true})
            }
        }});
        if let Some(tls) = &self.tls {
            let credentials = json!({"qom-type": "tls-creds-x509", "id": CREDENTIALS, "endpoint": "server",
                "dir": utf8(tls.credentials.clone())?, "verify-peer": tls.verify_client});
            arguments.extend(["--object".to_owned(), credentials.to_string()]);
            server["tls-creds"] = CREDENTIALS.into();
            if !tls.allowed.is_empty() {
                let rule = |name: &ClientName| json!({"match": name, "policy": "allow", "format": "exact"});
                let rules: Vec<Value> = tls.allowed.iter().map(rule).collect();
                let list = json!({"qom-type": "authz-list", "id": CLIENTS, "policy": "deny", "rules": rules});
                arguments.extend(["--object".to_owned(), list.to_string()]);
                server["tls-authz"] = CLIENTS.into();
            }
        }
        arguments.extend(["--nbd-server".to_owned(), server.to_string()]);
        Ok(arguments)
    }

    /// Makes sure that nothing is in the way: QEMU would remove it.
    pub(super) async fn claim(self) -> Result<Claimed> {
        let done = tokio::task::spawn_blocking(move || {
            let lock = self.run.as_deref().map(swept).transpose()?;
            if let Listen::Unix(path) = &self.listen {
                clear(path)?;
            }
            Ok(Claimed {
                place: self,
                _lock: lock,
            })
        });
        done.await
            .map_err(|e| Error::new(ErrorKind::Internal, "the look at the socket did not end").because(e))?
    }
}

/// The socket goes with the server; it, and nothing that has its name by now.
impl Drop for Place {
    fn drop(&mut self) {
        if let (Listen::Unix(path), Some(socket)) = (&self.listen, &self.socket)
            && which(path).as_ref() == Some(socket)
        {
            // One that stays is in nobody's way: the next server here removes it.
            let _ = faults::around("file", "remove socket", || fs::remove_file(path));
        }
    }
}

impl Claimed {
    /// The server listens.
    pub(super) fn taken(mut self) -> Place {
        if let Listen::Unix(path) = &self.place.listen {
            if let Err(error) = fs::set_permissions(path, Permissions::from_mode(0o600)) {
                tracing::debug!(socket = %path.display(), %error, "the socket keeps its mode");
            }
            self.place.socket = which(path);
        }
        self.place
    }

    /// The server does not listen after all: what it said, by kind. What it may have left of the socket goes.
    pub(super) fn given_up(self, error: Error) -> Error {
        let error = self.explained(error);
        drop(self.taken());
        error
    }

    fn explained(&self, error: Error) -> Error {
        let listen = &self.place.listen;
        let fits = |text: &str| error.message().contains(text);
        let (kind, what, hint) = if fits("Address already in use") {
            (
                ErrorKind::Busy,
                format!("{listen} is in use"),
                "Choose another port, or stop what listens there.",
            )
        } else if fits("Cannot assign requested address") {
            (
                ErrorKind::Invalid,
                format!("this host does not have the address of {listen}"),
                "Choose an address of this host.",
            )
        } else if self.place.tls.is_some() && (fits("credentials") || fits(".pem") || fits("certificate")) {
            (
                ErrorKind::Invalid,
                error.message().to_owned(),
                "The directory must hold ca-cert.pem, server-cert.pem and server-key.pem.",
            )
        } else {
            return error.with("listen", listen);
        };
        Error::new(kind, what).hint(hint)
    }
}

/// The rule that `export start` has.
fn refuse_careless(listen: &Listen, request: &ServeRequest) -> Result<()> {
    if request.tls.is_some() && matches!(listen, Listen::Unix(_)) {
        return Err(Error::new(
            ErrorKind::Invalid,
            "TLS is for TCP; a unix socket is guarded by its permissions",
        ));
    }
    let verified = request.tls.as_ref().is_some_and(|tls| tls.verify_client);
    if listen.is_local() || request.allow_remote || verified {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Denied,
        format!("anyone who reaches {listen} could read the disks"),
    )
    .hint("Use TLS with client verification, or say --allow-remote if the network is trusted."))
}

/// Removes the sockets of servers that were killed; nobody else looks or begins until the lock is dropped.
fn swept(run: &Path) -> Result<File> {
    let failed = |e: io::Error| Error::io("cannot look for old sockets", e).with("path", run.display());
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(run.join(LOCK))
        .map_err(failed)?;
    lock.lock().map_err(failed)?;
    for entry in fs::read_dir(run).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // To connect to a plain file is refused as well.
        let socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        let path = entry.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let ours = socket && name.starts_with(PREFIX) && name.ends_with(SUFFIX);
        if ours && UnixStream::connect(&path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            let _ = faults::around("file", "remove socket", || fs::remove_file(&path));
        }
    }
    Ok(lock)
}

/// Refuses what exists under a socket's name.
fn clear(path: &Path) -> Result<()> {
    let refuse = |kind, why: &str, hint: &str| {
        Err(Error::new(kind, format!("cannot listen there: {why}"))
            .with("socket", path.display())
            .hint(hint))
    };
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
            Some(parent) if parent.is_dir() => return Ok(()),
            _ => {
                let why = "the directory does not exist";
                return refuse(ErrorKind::NotFound, why, "Make the directory first.");
            }
        },
        other => {
            other.map_err(|e| Error::io("cannot look at the socket", e).with("socket", path.display()))?
        }
    };
    if !found.file_type().is_socket() {
        let why = "the path exists and is not a socket";
        return refuse(
            ErrorKind::AlreadyExists,
            why,
            "Choose another path; nothing is ever overwritten.",
        );
    }
    if UnixStream::connect(path).is_ok() {
        let hint = "Choose another path, or stop the server that listens on it.";
        return refuse(ErrorKind::Busy, "somebody already does", hint);
    }
    let why = "a socket that nobody listens on is in the way";
    refuse(
        ErrorKind::AlreadyExists,
        why,
        "Remove the stale socket, or choose another path.",
    )
}

fn which(path: &Path) -> Option<Which> {
    let found = fs::symlink_metadata(path).ok()?;
    found
        .file_type()
        .is_socket()
        .then(|| Which(found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use std::os::unix::net::UnixListener;

    use super::*;

    fn request(listen: Option<&str>, run: &Path) -> ServeRequest {
        ServeRequest {
            targets: Vec::new(),
            listen: listen.map(|x| x.parse().unwrap()),
            tls: None,
            allow_remote: false,
            run: run.to_owned(),
        }
    }

    #[test]
    fn who_may_reach_it_is_as_for_exports() {
        let run = Path::new("/run/x");
        let tls = |verify_client| {
            Some(Tls {
                credentials: "/pki".into(),
                verify_client,
                allowed: Vec::new(),
            })
        };
        let kind = |request: &ServeRequest| Place::wanted(request).map_err(|e| e.kind()).map(drop);
        let anywhere = request(Some("0.0.0.0:10809"), run);
        assert_eq!(kind(&anywhere), Err(ErrorKind::Denied));
        for (tls, allow_remote, expected) in [
            (tls(true), false, Ok(())),
            (tls(false), false, Err(ErrorKind::Denied)),
            (tls(false), true, Ok(())),
            (None, true, Ok(())),
        ] {
            let asked = ServeRequest {
                tls,
                allow_remote,
                ..anywhere.clone()
            };
            assert_eq!(kind(&asked), expected, "{asked:?}");
        }
        assert_eq!(kind(&request(Some("127.0.0.1:10809"), run)), Ok(()));
        assert_eq!(kind(&request(None, run)), Ok(()));
        let mut on_unix = request(None, run);
        on_unix.tls = tls(true);
        assert_eq!(kind(&on_unix), Err(ErrorKind::Invalid));
        let long = format!("unix:/{}", "x".repeat(LONGEST_SOCKET));
        assert_eq!(kind(&request(Some(&long), run)), Err(ErrorKind::Invalid));
    }

    #[test]
    fn nothing_is_removed_but_sockets_that_killed_servers_left() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        drop(UnixListener::bind(at("serve-dead.sock")).unwrap());
        drop(UnixListener::bind(at("other.sock")).unwrap());
        let _lives = UnixListener::bind(at("serve-lives.sock")).unwrap();
        fs::write(at("serve-file.sock"), "").unwrap();
        let lock = swept(dir.path()).unwrap();
        assert!(!at("serve-dead.sock").exists());
        for kept in ["other.sock", "serve-lives.sock", "serve-file.sock"] {
            assert!(at(kept).exists(), "{kept}");
        }
        drop(lock);
        for (name, kind) in [
            ("serve-lives.sock", ErrorKind::Busy),
            ("other.sock", ErrorKind::AlreadyExists),
            ("serve-file.sock", ErrorKind::AlreadyExists),
            ("none/x.sock", ErrorKind::NotFound),
        ] {
            assert_eq!(clear(&at(name)).unwrap_err().kind(), kind, "{name}");
        }
        clear(&at("new.sock")).unwrap();
    }
}
