//! A domain that is off: what most providers outside the hypervisor need for their fixture.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Command, Connector, Control, Disk, DiskNode, Domain, Error, ErrorKind, Freeze, Guard, Host, Hotplug,
    ImageServer, Lend, NbdServer, Owner, Result, RunState, ServeNode, Watch,
};
use serde_json::Value;

/// Reaches domains that are off: they have disks and no process that answers.
#[derive(Debug, Clone)]
pub struct InactiveConnector {
    image_dir: PathBuf,
}

impl InactiveConnector {
    /// `image_dir` is what providers get from [`Host::image_dir`].
    pub fn new(image_dir: impl Into<PathBuf>) -> Self {
        Self {
            image_dir: image_dir.into(),
        }
    }
}

#[async_trait]
impl Connector for InactiveConnector {
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>> {
        Ok(Arc::new(Inactive {
            domain: domain.clone(),
            image_dir: self.image_dir.clone(),
        }))
    }

    fn image_server(&self) -> Option<&dyn ImageServer> {
        None
    }
}

#[derive(Debug)]
struct Inactive {
    domain: Domain,
    image_dir: PathBuf,
}

impl Inactive {
    fn off<T>(&self) -> Result<T> {
        Err(Error::new(ErrorKind::Unavailable, "the domain is off").with("domain", &self.domain.id))
    }
}

#[async_trait]
impl Host for Inactive {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    async fn state(&self) -> Result<RunState> {
        Ok(RunState::Off)
    }

    async fn monitor(&self, _: Command) -> Result<Value> {
        self.off()
    }

    async fn monitor_each(&self, _: Vec<Command>) -> Result<Vec<Result<Value>>> {
        self.off()
    }

    fn image_dir(&self) -> &Path {
        &self.image_dir
    }

    async fn image_owner(&self) -> Result<Option<Owner>> {
        Ok(None)
    }
}

#[async_trait]
impl Control for Inactive {
    async fn guard(&self, _: Watch) -> Result<Box<dyn Guard>> {
        self.off()
    }

    async fn freeze(&self, _: &[String], _: std::time::Duration) -> Result<Freeze> {
        self.off()
    }

    async fn thaw(&self) -> Result<()> {
        self.off()
    }

    async fn pause(&self) -> Result<()> {
        self.off()
    }

    async fn resume(&self) -> Result<()> {
        self.off()
    }

    async fn let_go(&self) -> Result<()> {
        Ok(())
    }

    async fn come_to_rest(&self) -> Result<()> {
        Ok(())
    }

    async fn flush_nodes(&self, _: &[&Disk]) -> Result<Vec<DiskNode>> {
        Ok(Vec::new())
    }

    async fn flush(&self, _: &[DiskNode]) -> Result<()> {
        Ok(())
    }

    async fn instance(&self) -> Result<Option<String>> {
        Ok(None)
    }

    fn default_socket(&self) -> PathBuf {
        self.image_dir.join("nbd.sock")
    }

    async fn start_server(&self, _: &NbdServer) -> Result<()> {
        self.off()
    }

    async fn stop_server(&self) -> Result<()> {
        Ok(())
    }

    async fn serve(&self, _: &ServeNode) -> Result<()> {
        self.off()
    }

    async fn unserve(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn served(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn hotplug(&self) -> Option<&dyn Hotplug> {
        None
    }

    fn lends(&self) -> Option<&dyn Lend> {
        None
    }
}
