//! A source as JSON and as a line of text.

use disksnap::{NetworkHost, Source, nbd_uri};
use serde::Serialize;

/// A `<source>`; which fields there are depends on the type.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SourceView {
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hosts: Vec<HostView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<String>,
    /// What NBD clients take.
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "transport", rename_all = "lowercase")]
enum HostView {
    Unix { socket: String },
    Tcp { address: String, port: Option<u16> },
}

impl SourceView {
    pub(crate) fn new(source: &Source, format: Option<&str>) -> Self {
        let mut view = Self {
            kind: source.kind().to_owned(),
            format: format.map(str::to_owned),
            path: source.path().map(|path| path.display().to_string()),
            uri: nbd_uri(source),
            ..Self::default()
        };
        match source {
            Source::Network {
                protocol,
                name,
                hosts,
                tls,
            } => {
                view.protocol = Some(protocol.clone());
                view.name.clone_from(name);
                view.hosts = hosts.iter().map(HostView::new).collect();
                view.tls = Some(*tls);
            }
            Source::Volume { pool, volume } => {
                view.pool = Some(pool.clone());
                view.volume = Some(volume.clone());
            }
            _ => {}
        }
        view
    }
}

impl HostView {
    pub(crate) fn new(host: &NetworkHost) -> Self {
        match host {
            NetworkHost::Unix { socket } => Self::Unix {
                socket: socket.display().to_string(),
            },
            NetworkHost::Tcp { name, port } => Self::Tcp {
                address: name.clone(),
                port: *port,
            },
        }
    }
}

/// A source on one line: what a program that opens it takes.
pub(crate) fn line(source: &Source) -> String {
    nbd_uri(source).unwrap_or_else(|| source.to_string())
}
