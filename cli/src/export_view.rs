//! How exports look: what is served, where, and of which snapshot.

use std::collections::BTreeMap;

use disksnap::{Export, Inspected, NbdServer, Serving, Snapshot, SnapshotId, nbd_uri};
use serde::Serialize;

use crate::output::{Text, fields, table};

/// The names of snapshots by id.
pub(crate) type Names = BTreeMap<SnapshotId, String>;

pub(crate) fn names(snapshots: &[Inspected]) -> Names {
    names_of(snapshots.iter().map(|found| &found.snapshot))
}

pub(crate) fn names_of<'a>(snapshots: impl IntoIterator<Item = &'a Snapshot>) -> Names {
    snapshots
        .into_iter()
        .map(|s| (s.id, s.name.to_string()))
        .collect()
}

/// What a domain serves.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServingView {
    pub(crate) server: Option<ServerView>,
    /// The server for what lies on this host; left out where it does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image_server: Option<ServerView>,
    pub(crate) exports: Vec<ExportView>,
}

/// The NBD server.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServerView {
    listen: String,
    tls: Option<TlsView>,
    /// Started by itself; it stays when the last export stops.
    explicit: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TlsView {
    credentials: String,
    verify_client: bool,
    /// The only clients that are let in; left out where everyone whose certificate is verified is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allowed_clients: Vec<String>,
}

/// A disk being served.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ExportView {
    alias: String,
    /// The snapshot's name.
    snapshot: String,
    target: String,
    /// The export name that NBD clients ask for.
    name: String,
    uri: Option<String>,
    /// The domain whose guest has it as a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    attached_to: Option<String>,
    /// The checkpoint since which the changed blocks are told beside the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<String>,
    /// Why more blocks may be told than were written; left out where it is exactly those.
    #[serde(skip_serializing_if = "Option::is_none")]
    superset: Option<String>,
}

impl ServingView {
    pub(crate) fn new(serving: &Serving, names: &Names) -> Self {
        let exports = serving.exports.iter();
        Self {
            server: serving.server.as_ref().map(ServerView::new),
            image_server: serving.image_server.as_ref().map(ServerView::new),
            exports: exports
                .map(|e| ExportView::new(e, serving.server_of(e), names))
                .collect(),
        }
    }
}

impl ServerView {
    pub(crate) fn new(server: &NbdServer) -> Self {
        Self {
            listen: server.listen.to_string(),
            tls: server.tls.as_ref().map(|tls| TlsView {
                credentials: tls.credentials.display().to_string(),
                verify_client: tls.verify_client,
                allowed_clients: tls.allowed.iter().map(ToString::to_string).collect(),
            }),
            explicit: server.explicit,
        }
    }

    /// Where it listens, and how.
    pub(crate) fn place(&self) -> String {
        fields(
            "",
            [("listens on", self.listen.clone()), ("TLS", self.tls_text())],
        )
    }

    fn tls_text(&self) -> String {
        match &self.tls {
            None => "none".to_owned(),
            Some(tls) if !tls.allowed_clients.is_empty() => {
                let clients = tls.allowed_clients.join("; ");
                format!("{}, only for {clients}", tls.credentials)
            }
            Some(tls) if tls.verify_client => format!("{}, clients are verified", tls.credentials),
            Some(tls) => format!("{}, clients are not verified", tls.credentials),
        }
    }
}

impl Text for ServerView {
    fn text(&self) -> String {
        let stays = if self.explicit {
            "until it is stopped"
        } else {
            "until the last export stops"
        };
        fields(
            "",
            [
                ("listens on", self.listen.clone()),
                ("TLS", self.tls_text()),
                ("stays", stays.to_owned()),
            ],
        )
    }
}

impl ExportView {
    fn new(export: &Export, server: Option<&NbdServer>, names: &Names) -> Self {
        let changes = export.changes.as_ref();
        Self {
            checkpoint: changes.map(|changes| changes.since.to_string()),
            superset: changes.and_then(|changes| changes.excess.clone()),
            alias: export.alias.to_string(),
            snapshot: names
                .get(&export.snapshot)
                .cloned()
                .unwrap_or_else(|| export.snapshot.to_string()),
            target: export.target.clone(),
            name: export.node.name.clone(),
            uri: server.and_then(|server| nbd_uri(&server.source(&export.node.name))),
            attached_to: export
                .attached
                .as_ref()
                .map(|attached| attached.to.id.name.clone()),
        }
    }
}

impl ServingView {
    /// The servers that run. The second is told apart where there are both.
    fn servers(&self) -> String {
        match (&self.server, &self.image_server) {
            (Some(one), None) | (None, Some(one)) => one.text(),
            (Some(server), Some(images)) => {
                format!(
                    "hypervisor\n{}\nimages on this host\n{}",
                    server.text(),
                    images.text()
                )
            }
            (None, None) => String::new(),
        }
    }
}

impl Text for ServingView {
    fn text(&self) -> String {
        let servers = self.servers();
        if servers.is_empty() {
            return "Nothing is served; the NBD server does not run.\n".to_owned();
        }
        if self.exports.is_empty() {
            return servers + "\nNothing is served.\n";
        }
        let header = ["ALIAS", "SNAPSHOT", "DISK", "URI"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        rows.extend(self.exports.iter().map(|export| {
            let uri = export.uri.clone().unwrap_or_default();
            let uri = match &export.attached_to {
                Some(domain) => format!("{uri} (a disk of '{domain}')"),
                None => uri,
            };
            vec![
                export.alias.clone(),
                export.snapshot.clone(),
                export.target.clone(),
                uri,
            ]
        }));
        format!("{servers}\n{}", table(&rows))
    }
}
