//! Exports: a snapshot's disks served over NBD by the domain's one server. The nouns; the acts are the dispatcher's.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{
    Alias, Attached, CheckpointName, Error, ErrorKind, Image, NetworkHost, Result, ServeNode, SnapshotId,
    Source, Union,
};

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Listen {
    /// A unix socket, by absolute path.
    Unix(PathBuf),
    /// A TCP address and port. Never a wildcard unless the caller wrote it.
    Tcp {
        /// The address.
        address: IpAddr,
        /// The port; never 0.
        port: u16,
    },
}

impl Listen {
    /// Whether only this host can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { address, .. } => address.is_loopback(),
        }
    }

    /// The same place as the `<host>` of a network source.
    #[must_use]
    pub fn host(&self) -> NetworkHost {
        match self {
            Self::Unix(socket) => NetworkHost::Unix {
                socket: socket.clone(),
            },
            Self::Tcp { address, port } => NetworkHost::Tcp {
                name: address.to_string(),
                port: Some(*port),
            },
        }
    }

    /// Where a client finds the export of this name on a server that listens here, with TLS or without.
    #[must_use]
    pub fn source(&self, name: &str, tls: bool) -> Source {
        Source::Network {
            protocol: "nbd".to_owned(),
            name: Some(name.to_owned()),
            hosts: vec![self.host()],
            tls,
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host().fmt(f)
    }
}

impl FromStr for Listen {
    type Err = Error;

    /// Reads `unix:PATH`, `ADDRESS:PORT` or `[ADDRESS]:PORT`.
    fn from_str(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("cannot listen on {text:?}: {why}"))
                .hint("Write unix:/absolute/path, 127.0.0.1:10809 or [::1]:10809.")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(invalid("the path is not absolute"))
            };
        }
        let (address, port) = text.rsplit_once(':').ok_or_else(|| invalid("it has no port"))?;
        let address = address
            .strip_prefix('[')
            .and_then(|a| a.strip_suffix(']'))
            .unwrap_or(address);
        let address = address
            .parse()
            .map_err(|_| invalid("the host is not an IP address"))?;
        match port.parse() {
            Ok(port) if port != 0 => Ok(Self::Tcp { address, port }),
            _ => Err(invalid("the port is not a number from 1 to 65535")),
        }
    }
}

/// TLS for an NBD server on TCP (QEMU's `tls-creds-x509`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// The directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, as the hypervisor sees it.
    pub credentials: PathBuf,
    /// Whether clients must show a certificate that the CA signed.
    pub verify_client: bool,
    /// Who of those may connect, by their certificates' distinguished names; everyone where it is empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<ClientName>,
}

/// The distinguished name in a client's certificate, as QEMU compares it: to the letter, its parts in the
/// certificate's order (`C=GB,O=Example,CN=backup`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClientName(String);

impl ClientName {
    /// The longest name, in bytes; a certificate's are far shorter.
    pub const MAX: usize = 1024;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClientName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let why = if name.len() > Self::MAX {
            "it is too long"
        } else if name.chars().any(char::is_control) {
            "it has control characters"
        } else if name
            .split_once('=')
            .is_none_or(|(kind, _)| kind.trim().is_empty())
        {
            "it has no parts such as CN=backup"
        } else if name.trim() != name {
            "it begins or ends with a space"
        } else {
            return Ok(Self(name.to_owned()));
        };
        let shown: String = name.chars().take(80).collect();
        Err(
            Error::new(ErrorKind::Invalid, format!("{shown:?} is no distinguished name: {why}")).hint(
                "Write it as `openssl x509 -noout -subject -nameopt RFC2253,-dn_rev` prints it, for example CN=backup,O=Example.",
            ),
        )
    }
}

impl TryFrom<String> for ClientName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<ClientName> for String {
    fn from(name: ClientName) -> Self {
        name.0
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An NBD server of a domain. There are at most two, one of each [`ServedBy`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdServer {
    /// Where it listens.
    pub listen: Listen,
    /// TLS, when it speaks it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Started by itself, and so not stopped with the last export.
    #[serde(default)]
    pub explicit: bool,
    /// Which run of the hypervisor started it, as [`Control::instance`](crate::Control::instance) tells; another run has no server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

impl NbdServer {
    /// Where a client finds the export of this name.
    #[must_use]
    pub fn source(&self, name: &str) -> Source {
        self.listen.source(name, self.tls.is_some())
    }
}

/// Which of the two that can serve a domain's snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServedBy {
    /// The hypervisor that runs the domain: what is a node of its block graph.
    Hypervisor,
    /// The [`ImageServer`](crate::ImageServer): what lies on this host, as an image or a device.
    ImageServer,
}

/// A disk of a snapshot, being served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The alias of the disk in its snapshot; names the export within the domain.
    pub alias: Alias,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The disk's target.
    pub target: String,
    /// What is served, under which export name.
    pub node: ServeNode,
    /// The lease of the reader that it was made for; `None` for one that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<uuid::Uuid>,
    /// What the image server serves; `None` for a node of the hypervisor's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// The guest's disk that it was made for, in another domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<Box<Attached>>,
    /// What changed since a checkpoint, as the bitmap that is served beside the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Box<Changes>>,
}

/// What changed since a checkpoint, in an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The checkpoint.
    pub since: CheckpointName,
    /// Where it is known from.
    pub told: Told,
    /// Why more is told than was written, where it is; never less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excess: Option<String>,
}

/// What knows what changed since a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// Bitmaps.
    Bitmaps(Box<Union>),
    /// The method, by comparing the snapshot with this one, which the checkpoint is.
    Compared(SnapshotId),
}

impl Export {
    /// Who serves it.
    #[must_use]
    pub fn served_by(&self) -> ServedBy {
        match self.image {
            Some(_) => ServedBy::ImageServer,
            None => ServedBy::Hypervisor,
        }
    }
}

/// What is to be exported, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest {
    /// Where to listen; `None` for the running server, or else the domain's default unix socket.
    pub listen: Option<Listen>,
    /// TLS, on TCP.
    pub tls: Option<Tls>,
    /// Whether a place that other hosts can reach is meant so although there is no TLS.
    pub allow_remote: bool,
    /// Which disks of which snapshots.
    pub disks: Vec<ExportDisk>,
}

/// One disk to be exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportDisk {
    /// Its alias.
    pub alias: Alias,
    /// The export name; the alias where none is given.
    pub name: Option<String>,
    /// The checkpoint since which the changed blocks are told beside the data, as the meta context
    /// `qemu:dirty-bitmap:CHECKPOINT`.
    pub checkpoint: Option<CheckpointName>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_client_s_name_has_parts_and_no_control_characters() {
        for good in ["CN=backup", "C=GB,O=Example\\, Inc.,CN=back up", "CN=é"] {
            let name: ClientName = good.parse().unwrap();
            let json = serde_json::to_string(&name).unwrap();
            assert_eq!(serde_json::from_str::<ClientName>(&json).unwrap(), name);
            assert_eq!(name.as_str(), good);
        }
        let long = format!("CN={}", "x".repeat(ClientName::MAX));
        for bad in ["", "*", "backup", "=x", " CN=x", "CN=x\n", "CN=\u{1b}[2J", &long] {
            let error = bad.parse::<ClientName>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
            assert!(
                error.to_string().len() < 300 && !error.to_string().contains(char::is_control),
                "{error}"
            );
            assert!(
                serde_json::from_value::<ClientName>(bad.into()).is_err(),
                "{bad:?}"
            );
        }
    }
}
