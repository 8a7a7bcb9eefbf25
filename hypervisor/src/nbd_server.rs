//! QEMU's one NBD server: started, stopped, and given nodes to serve (`nbd-server-start`, `block-export-add`, …).

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use disksnap_core::{
    ClientName, Command, Error, ErrorKind, Listen, NbdServer, Result, ServeNode, Tls, faults,
};
use serde_json::{Value, json};

use crate::connector::check_socket_path;
use crate::qmp::{Event, Events, Heard, Session};

/// The id of the one TLS credentials object that disksnap makes in a QEMU.
const CREDENTIALS: &str = "disksnap-nbd-tls";

/// How the ids of lists of clients that are let in begin (QAPI `authz-list`). Each start has one of its own, because QEMU looks
/// the list up with every client: one that is made anew would be that of the server that runs already.
const CLIENTS: &str = "disksnap-nbd-clients-";

/// How often the exports are asked for while one is being taken down and no event tells.
const POLL: Duration = Duration::from_millis(100);

/// The NBD server of the QEMU or storage daemon at the other end of a session.
#[derive(Debug, Clone, Copy)]
pub struct NbdServerControl<'a> {
    session: &'a Session,
    run: &'a Path,
    patience: Duration,
}

impl<'a> NbdServerControl<'a> {
    /// `run` is the directory whose stale sockets are ours to remove; `patience` is for an export to end.
    #[must_use]
    pub fn new(session: &'a Session, run: &'a Path, patience: Duration) -> Self {
        Self {
            session,
            run,
            patience,
        }
    }

    /// Starts it. Sockets and credentials that this made are taken back when it fails.
    pub async fn start(&self, server: &NbdServer) -> Result<()> {
        if let Listen::Unix(path) = &server.listen {
            self.clear_the_way(path)?;
        }
        let mut arguments = json!({ "addr": address(&server.listen)? });
        if let Some(tls) = &server.tls {
            if matches!(server.listen, Listen::Unix(_)) {
                let why = "TLS is for TCP: a unix socket does not leave the host";
                return Err(Error::new(ErrorKind::Invalid, why)
                    .with("listen", &server.listen)
                    .hint("Listen on an address and port, or leave TLS out."));
            }
            arguments["tls-creds"] = CREDENTIALS.into();
            if let Some(list) = self.add_tls(tls).await? {
                arguments["tls-authz"] = list.into();
            }
        }
        let list = arguments["tls-authz"].as_str().map(str::to_owned);
        let started = self
            .session
            .execute(Command::new("nbd-server-start", arguments))
            .await;
        if let Err(error) = started {
            let error = cannot_start(error, &server.listen);
            // Where another server runs, its credentials are in use and this is refused, as it should be.
            if server.tls.is_some() && error.effect() == disksnap_core::Effect::None {
                self.drop_object(CREDENTIALS).await;
                if let Some(list) = list {
                    self.drop_object(&list).await;
                }
            }
            return Err(error);
        }
        if let Listen::Tcp { address, port } = &server.listen {
            self.session.bound_on_tcp(*address, *port).await;
        }
        if let Listen::Unix(path) = &server.listen {
            // Not ours to change where the hypervisor runs as somebody else; then the directory is what protects it.
            if let Err(error) = fs::set_permissions(path, fs::Permissions::from_mode(0o600)) {
                tracing::debug!(socket = %path.display(), %error, "the export socket keeps its mode");
            }
        }
        Ok(())
    }

    /// Makes sure that QEMU, which removes whatever has the socket's name, removes nothing of anybody's.
    fn clear_the_way(&self, path: &Path) -> Result<()> {
        check_socket_path(path)?;
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.parent_exists(path),
            Err(error) => {
                return Err(
                    Error::io("cannot look at the export socket", error).with("socket", path.display())
                );
            }
        };
        let refuse = |kind, why: &str, hint: &str| {
            Err(Error::new(kind, why).with("socket", path.display()).hint(hint))
        };
        if !found.file_type().is_socket() {
            let why = "cannot listen there: the path exists and is not a socket";
            return refuse(
                ErrorKind::AlreadyExists,
                why,
                "Choose another path; nothing is ever overwritten.",
            );
        }
        if UnixStream::connect(path).is_ok() {
            let why = "cannot listen there: somebody already does";
            return refuse(
                ErrorKind::Busy,
                why,
                "Choose another path, or stop the server that listens on it.",
            );
        }
        if path.parent() != Some(self.run) {
            let why = "cannot listen there: a socket that nobody listens on is in the way";
            return refuse(
                ErrorKind::AlreadyExists,
                why,
                "Remove the stale socket, or choose another path.",
            );
        }
        faults::around("file", "remove socket", || fs::remove_file(path))
            .map_err(|error| Error::io("cannot remove a stale socket", error).with("socket", path.display()))
    }

    #[expect(clippy::unused_self, reason = "reads as a step of clear_the_way")]
    fn parent_exists(&self, path: &Path) -> Result<()> {
        match path.parent() {
            Some(parent) if parent.is_dir() => Ok(()),
            _ => Err(Error::new(
                ErrorKind::NotFound,
                "cannot listen there: the directory does not exist",
            )
            .with("socket", path.display())
            .hint("Make the directory first.")),
        }
    }

    /// Makes the objects that TLS needs: the credentials and, where there is one, the list of clients, whose id it returns. Neither is
    /// left when it fails.
    async fn add_tls(&self, tls: &Tls) -> Result<Option<String>> {
        self.add_credentials(tls).await?;
        if tls.allowed.is_empty() {
            return Ok(None);
        }
        match self.let_in_only(tls).await {
            Ok(list) => Ok(Some(list)),
            Err(error) => {
                self.drop_object(CREDENTIALS).await;
                Err(error)
            }
        }
    }

    /// Makes the credentials object. Without `dh-params.pem` in the directory QEMU computes its own parameters, and its
    /// main loop stands still for up to a second or two.
    async fn add_credentials(&self, tls: &Tls) -> Result<()> {
        if !tls.credentials.join("dh-params.pem").exists() {
            let directory = tls.credentials.display();
            tracing::info!(%directory, "no dh-params.pem: QEMU computes parameters, and the guest may stall meanwhile");
        }
        let make = || {
            let dir = tls.credentials.display().to_string();
            let arguments = json!({"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": dir,
                "endpoint": "server", "verify-peer": tls.verify_client});
            self.session.execute(Command::new("object-add", arguments))
        };
        let explain = |error: Error| {
            error.with("credentials", tls.credentials.display()).hint(
                "The directory must hold ca-cert.pem, server-cert.pem and server-key.pem that the hypervisor can read.",
            )
        };
        match make().await {
            Ok(_) => Ok(()),
            Err(error) if !error.message().contains("duplicate property") => Err(explain(error)),
            // Left behind by a run that was killed.
            Err(_) if self.drop_object(CREDENTIALS).await => make().await.map(drop).map_err(explain),
            // What cannot be deleted is in use: by the server that runs.
            Err(error) => Err(already_running(error)),
        }
    }

    /// Makes the list of the clients that are let in; its id.
    async fn let_in_only(&self, tls: &Tls) -> Result<String> {
        if !tls.verify_client {
            let why = "clients that show no certificate have no name that a list could allow";
            return Err(Error::new(ErrorKind::Invalid, why));
        }
        let id = format!("{CLIENTS}{}", uuid::Uuid::new_v4().simple());
        let rule = |name: &ClientName| json!({"match": name, "policy": "allow", "format": "exact"});
        let rules: Vec<Value> = tls.allowed.iter().map(rule).collect();
        let list = json!({"qom-type": "authz-list", "id": id, "policy": "deny", "rules": rules});
        let made = self.session.execute(Command::new("object-add", list)).await;
        made.map_err(|error| {
            error.hint("This hypervisor cannot tell clients apart by their names: leave the list out.")
        })?;
        Ok(id)
    }

    /// Deletes the credentials and every list of clients, as far as they are there.
    async fn drop_tls(&self) {
        self.drop_object(CREDENTIALS).await;
        let list = Command::new("qom-list", json!({ "path": "/objects" }));
        // Where it cannot be asked, no server names them any more: they are in nobody's way.
        let Ok(Value::Array(objects)) = self.session.execute(list).await else {
            return;
        };
        for name in objects.iter().filter_map(|object| object["name"].as_str()) {
            if name.starts_with(CLIENTS) {
                self.drop_object(name).await;
            }
        }
    }

    /// Deletes an object; whether there was one to delete.
    async fn drop_object(&self, id: &str) -> bool {
        let command = Command::new("object-del", json!({ "id": id }));
        self.session.execute(command).await.is_ok()
    }

    /// Stops it with all its exports. Idempotent.
    pub async fn stop(&self) -> Result<()> {
        match self.session.execute(Command::bare("nbd-server-stop")).await {
            Ok(_) => {}
            Err(error) if error.message().contains("not running") => {}
            Err(error) => return Err(error),
        }
        self.drop_tls().await;
        Ok(())
    }

    /// Serves a node, read-only.
    pub async fn serve(&self, node: &ServeNode) -> Result<()> {
        self.serve_as(node, false).await
    }

    /// Serves a node that nobody else writes to, writable.
    pub async fn serve_writable(&self, node: &ServeNode) -> Result<()> {
        self.serve_as(node, true).await
    }

    async fn serve_as(&self, node: &ServeNode, writable: bool) -> Result<()> {
        let mut arguments = json!({"type": "nbd", "id": node.id, "node-name": node.node, "name": node.name,
            "writable": writable});
        if let Some(bitmap) = &node.bitmap {
            // By its name alone where that is enough, as every QEMU that exports bitmaps takes it.
            arguments["bitmaps"] = if bitmap.node == node.node {
                json!([bitmap.name])
            } else {
                json!([{ "node": bitmap.node, "name": bitmap.name }])
            };
        }
        let result = self
            .session
            .execute(Command::new("block-export-add", arguments))
            .await;
        result.map(drop).map_err(|error| {
            let words = error.message().to_owned();
            let known = |kind, hint: &str| {
                Error::new(kind, words.clone())
                    .hint(hint.to_owned())
                    .with("command", "block-export-add")
            };
            if words.contains("already in use") || words.contains("already has") {
                known(
                    ErrorKind::AlreadyExists,
                    "Stop the other export first, or export under another name.",
                )
            } else if words.contains("not running") {
                known(ErrorKind::Unavailable, "Start the domain's NBD server first.")
            } else {
                error
            }
            .with("export", &node.name)
            .with("node", &node.node)
        })
    }

    /// Stops serving and waits until the node is free. Idempotent.
    pub async fn unserve(&self, id: &str) -> Result<()> {
        let mut events = self.session.subscribe();
        let arguments = json!({"id": id, "mode": "hard"});
        let deleted = self
            .session
            .execute(Command::new("block-export-del", arguments))
            .await;
        let refused = match deleted {
            Ok(_) => None,
            // It may be gone, or on its way out: the list tells.
            Err(error) if error.kind() == ErrorKind::Refused => Some(error),
            Err(error) => return Err(error.with("export", id)),
        };
        let gone = self.session.wait(self.until_gone(id, refused, &mut events));
        let gone = tokio::time::timeout(self.patience, gone).await;
        let gone = gone.unwrap_or_else(|_| {
            let why = "the export is being stopped and does not end";
            Err(Error::new(ErrorKind::Timeout, why)
                .leaving(disksnap_core::Effect::Unknown)
                .hint("A client's request may be stuck in slow storage; try again."))
        });
        gone.map_err(|error| error.with("export", id))
    }

    /// Looks again with every sign of life until the export is gone; a refusal counts if it is there and stays.
    async fn until_gone(&self, id: &str, mut refused: Option<Error>, events: &mut Events) -> Result<()> {
        loop {
            let Some(export) = self.exports().await?.into_iter().find(|e| e["id"] == id) else {
                return Ok(());
            };
            if export["shutting-down"] != true
                && let Some(refused) = refused.take()
            {
                return Err(refused);
            }
            let is_it = |e: &Event| e.name == "BLOCK_EXPORT_DELETED" && e.data["id"] == id;
            let sign = async { while matches!(events.next().await, Heard::Event(e) if !is_it(&e)) {} };
            // An event may be missed: then the time is the sign.
            let _ = tokio::time::timeout(POLL, sign).await;
        }
    }

    /// The ids of the NBD exports that are served now.
    pub async fn served(&self) -> Result<Vec<String>> {
        let nbd = |export: &Value| export["type"] == "nbd" && export["shutting-down"] != true;
        let id = |export: &Value| export["id"].as_str().map(str::to_owned);
        let exports = self.exports().await?;
        Ok(exports.iter().filter(|e| nbd(e)).filter_map(id).collect())
    }

    async fn exports(&self) -> Result<Vec<Value>> {
        match self.session.execute(Command::bare("query-block-exports")).await? {
            Value::Array(exports) => Ok(exports),
            _ => Err(
                Error::new(ErrorKind::Protocol, "the monitor's list of exports is not a list")
                    .with("command", "query-block-exports"),
            ),
        }
    }
}

/// QEMU's `SocketAddressLegacy`.
fn address(listen: &Listen) -> Result<Value> {
    Ok(match listen {
        Listen::Unix(path) => {
            let path = path.to_str().ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "the path of an export socket must be UTF-8")
                    .with("socket", path.display())
            })?;
            json!({"type": "unix", "data": {"path": path}})
        }
        Listen::Tcp { address, port } => {
            json!({"type": "inet", "data": {"host": address.to_string(), "port": port.to_string(), "numeric": true}})
        }
    })
}

/// QEMU refuses with an error class for all and a text: what the text says decides the kind.
fn cannot_start(error: Error, listen: &Listen) -> Error {
    if error.kind() != ErrorKind::Refused {
        return error.with("listen", listen);
    }
    let words = error.message().to_owned();
    let fits = |text: &str| words.contains(text);
    if fits("already running") {
        return already_running(error).with("listen", listen);
    }
    let (kind, message, hint) = if fits("Address already in use") {
        let hint = "Choose another port, or stop what listens there.";
        (ErrorKind::Busy, format!("{listen} is in use"), hint)
    } else if fits("Permission denied") || fits("Operation not permitted") {
        let hint = "The hypervisor runs as its own user: choose a place where that user may listen.";
        (
            ErrorKind::Denied,
            format!("the hypervisor may not listen on {listen}"),
            hint,
        )
    } else if fits("Cannot assign requested address") {
        let hint = "Choose an address of this host.";
        (
            ErrorKind::Invalid,
            format!("this host does not have the address of {listen}"),
            hint,
        )
    } else {
        return error.with("listen", listen);
    };
    Error::new(kind, message)
        .with("command", "nbd-server-start")
        .with("listen", listen)
        .hint(hint)
        .because(error)
}

fn already_running(cause: Error) -> Error {
    Error::new(ErrorKind::Busy, "the domain's NBD server already runs")
        .with("command", "nbd-server-start")
        .hint(
            "A QEMU has one NBD server. Export on the address where it listens, or stop it first (disksnap export \
             server stop); one that another program started is that program's to stop.",
        )
        .because(cause)
}
