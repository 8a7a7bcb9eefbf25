//! Where a disk's bytes come from: the `<source>` element of libvirt's domain format, as a value.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where bytes come from; the variants follow the `type` attribute of libvirt's `<disk>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Source {
    /// An image file (`<source file='…'/>`).
    File {
        /// Absolute path on the domain's host.
        file: PathBuf,
    },
    /// A block device (`<source dev='…'/>`).
    Block {
        /// Absolute path of the device on the domain's host.
        dev: PathBuf,
    },
    /// A directory presented as a FAT disk (`<source dir='…'/>`).
    Dir {
        /// Absolute path of the directory.
        dir: PathBuf,
    },
    /// A network disk (`<source protocol='…' name='…'><host …/></source>`).
    Network {
        /// `nbd`, `rbd`, `iscsi`, `https`, …
        protocol: String,
        /// Export, image or path on the server; absent where the protocol has none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Servers, in the document's order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        hosts: Vec<NetworkHost>,
        /// Whether the connection is encrypted.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        tls: bool,
    },
    /// A volume of a libvirt storage pool (`<source pool='…' volume='…'/>`).
    Volume {
        /// Name of the pool.
        pool: String,
        /// Name of the volume in the pool.
        volume: String,
    },
    /// A kind that disksnap does not look into (`nvme`, `vhostuser`, `vhostvdpa`, …).
    Other {
        /// The `type` attribute of the `<disk>`.
        kind: String,
    },
}

impl Source {
    /// The path on the host, where the source is a file, device or directory.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { file } => Some(file),
            Self::Block { dev } => Some(dev),
            Self::Dir { dir } => Some(dir),
            _ => None,
        }
    }

    /// The `type` attribute of a `<disk>` with this source.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::File { .. } => "file",
            Self::Block { .. } => "block",
            Self::Dir { .. } => "dir",
            Self::Network { .. } => "network",
            Self::Volume { .. } => "volume",
            Self::Other { kind } => kind,
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network {
                protocol,
                name,
                hosts,
                tls,
            } => {
                write!(f, "{protocol}{}:", if *tls { "s" } else { "" })?;
                if let Some(host) = hosts.first() {
                    write!(f, "{host}")?;
                }
                name.as_ref().map_or(Ok(()), |name| write!(f, "/{name}"))
            }
            Self::Volume { pool, volume } => write!(f, "{pool}/{volume}"),
            Self::Other { kind } => f.write_str(kind),
            Self::File { file: path } | Self::Block { dev: path } | Self::Dir { dir: path } => {
                write!(f, "{}", path.display())
            }
        }
    }
}

/// Where a qcow2 image keeps the disk's data when not in itself: `<dataStore>` in `<source>`, of libvirt 10.10 and later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataStore {
    /// The format of the data (`raw`), when the document says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Where they are.
    pub source: Source,
}

/// A server of a network disk (`<host …/>`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NetworkHost {
    /// `<host transport='unix' socket='…'/>`
    Unix {
        /// Absolute path of the socket.
        socket: PathBuf,
    },
    /// `<host name='…' port='…'/>`
    Tcp {
        /// Host name or address.
        name: String,
        /// Port; absent for the protocol's own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
    },
}

impl std::fmt::Display for NetworkHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix { socket } => write!(f, "unix:{}", socket.display()),
            Self::Tcp {
                name,
                port: Some(port),
            } if name.contains(':') => write!(f, "[{name}]:{port}"),
            Self::Tcp {
                name,
                port: Some(port),
            } => write!(f, "{name}:{port}"),
            Self::Tcp { name, port: None } => f.write_str(name),
        }
    }
}

/// One layer below the top image: the `<backingStore>` element.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingStore {
    /// The format of this layer (`raw`, `qcow2`, …), when the document says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Where the layer's bytes are.
    pub source: Source,
    /// Where a qcow2 layer keeps the data when not in itself, as far as the document says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_store: Option<DataStore>,
    /// The layer below; `None` where the chain ends or the document does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<BackingStore>>,
}
