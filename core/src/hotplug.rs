//! What attaching a snapshot's disk to another running domain needs of the place where that one runs.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Domain, Listen, Result, Source};

/// A disk over NBD, to be seen read-only by a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlugDisk {
    /// The id of the device in the hypervisor.
    pub device: String,
    /// The node below it.
    pub node: String,
    /// Where the NBD server listens.
    pub listen: Listen,
    /// The export name.
    pub name: String,
    /// The serial number that the guest sees, at most 20 characters.
    pub serial: String,
    /// How to speak TLS to the server; `None` where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<PlugTls>,
}

impl PlugDisk {
    /// Where its bytes come from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.listen.source(&self.name, self.tls.is_some())
    }
}

/// How a hypervisor speaks TLS as a client of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlugTls {
    /// A directory that this hypervisor can read: `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` where the
    /// server verifies its clients.
    pub credentials: PathBuf,
    /// The name in the server's certificate; `None` for the address that it is reached at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// The domain that a snapshot's disk is attached to, and as what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The domain, with what is needed to reach it again; without its disks.
    pub to: Domain,
    /// The disk there.
    pub disk: PlugDisk,
}

/// Puts disks into a running guest, and takes them out again.
#[async_trait]
pub trait Hotplug: fmt::Debug + Send + Sync {
    /// Adds a disk, read-only. Idempotent: one that is there stays.
    ///
    /// # Errors
    /// `NoSpace` when the machine has no free place that can be plugged into; `Denied` when the hypervisor may not
    /// connect to the server, or is turned away by it; what is wrong with the TLS credentials. Nothing of it is left then.
    async fn plug(&self, disk: &PlugDisk) -> Result<()>;

    /// Takes a disk out, and returns when the guest has let it go, or after `patience`. Idempotent.
    ///
    /// # Errors
    /// `Timeout` when the guest does not let it go in time, `Refused` when it says that it will not: the
    /// disk stays.
    async fn unplug(&self, disk: &PlugDisk, patience: Duration) -> Result<()>;

    /// Whether the disk's device is there; `false` where the domain is off.
    async fn plugged(&self, disk: &PlugDisk) -> Result<bool>;
}
