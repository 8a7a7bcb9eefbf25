//! A fixture whose settings do not follow the domain to other disks.

use std::sync::Arc;

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting};
use disksnap_core::{
    Capability, Connector, Disk, DiskChoice, DiskSnapshot, Domain, Result, Snapshot, Source,
};

/// Another fixture, without its `adopt`.
#[derive(Debug)]
pub(crate) struct Unmoved(pub(crate) Arc<dyn Fixture>);

#[async_trait]
impl Fixture for Unmoved {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        self.0.provider()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.0.expected_capabilities()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        Ok(Box::new(Stays(self.0.setting(disks).await?)))
    }
}

#[derive(Debug)]
struct Stays(Box<dyn Setting>);

#[async_trait]
impl Setting for Stays {
    fn domain(&self) -> &Domain {
        self.0.domain()
    }

    fn connector(&self) -> Arc<dyn Connector> {
        self.0.connector()
    }

    fn choice(&self, target: &str) -> DiskChoice {
        self.0.choice(target)
    }

    fn unfit_disk(&self) -> Disk {
        self.0.unfit_disk()
    }

    fn size(&self, target: &str) -> u64 {
        self.0.size(target)
    }

    async fn fill(&self, target: &str, offset: u64, len: u64, byte: u8) -> Result<()> {
        self.0.fill(target, offset, len, byte).await
    }

    async fn zero(&self, target: &str, offset: u64, len: u64) -> Result<()> {
        self.0.zero(target, offset, len).await
    }

    async fn read_disk(&self, target: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.0.read_disk(target, offset, len).await
    }

    async fn read_snapshot(&self, source: &Source, format: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.0.read_snapshot(source, format, offset, len).await
    }

    async fn damage(&self, snapshot: &Snapshot) -> Result<()> {
        self.0.damage(snapshot).await
    }

    async fn leftovers(&self) -> Result<Vec<String>> {
        self.0.leftovers().await
    }
}
