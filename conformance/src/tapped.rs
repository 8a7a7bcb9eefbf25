//! The control and the catalog, with a [`Points`] before and after every call.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Catalog, Change, Checkpoint, Command, Connector, Control, Definition, Disk, DiskNode, Domain, DomainId,
    DomainLock, Error, Export, Freeze, Guard, Host, Hotplug, ImageServer, Intent, Lend, Moved, NbdServer,
    Owner, Result, RunState, ServeNode, Snapshot, SnapshotId, SnapshotName, Verdict, Watch,
};
use serde_json::Value;
use uuid::Uuid;

use crate::points::{Points, When, Whose, disconnected};

/// Makes tapped controls.
#[derive(Debug)]
pub(crate) struct TappedConnector {
    pub(crate) inner: Arc<dyn Connector>,
    pub(crate) points: Arc<Points>,
}

#[async_trait]
impl Connector for TappedConnector {
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>> {
        Ok(Arc::new(TappedControl {
            inner: self.inner.control(domain).await?,
            points: Arc::clone(&self.points),
            dead: AtomicBool::new(false),
        }))
    }

    fn image_server(&self) -> Option<&dyn ImageServer> {
        self.inner.image_server()
    }
}

/// One connection; a disconnect ends it, not the next one.
#[derive(Debug)]
struct TappedControl {
    inner: Arc<dyn Control>,
    points: Arc<Points>,
    dead: AtomicBool,
}

impl TappedControl {
    async fn tap<T>(&self, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        if self.dead.load(Ordering::Relaxed) {
            return Err(disconnected());
        }
        self.pass(what, When::Before).await?;
        let answer = call.await?;
        self.pass(what, When::After).await?;
        Ok(answer)
    }

    async fn pass(&self, what: &str, when: When) -> Result<()> {
        let passed = self.points.pass(Whose::Control, what, when).await;
        if passed
            .as_ref()
            .is_err_and(|e: &Error| e.kind() == disconnected().kind())
        {
            self.dead.store(true, Ordering::Relaxed);
        }
        passed
    }
}

#[async_trait]
impl Host for TappedControl {
    fn domain(&self) -> &Domain {
        self.inner.domain()
    }

    async fn state(&self) -> Result<RunState> {
        self.tap("state", self.inner.state()).await
    }

    async fn monitor(&self, command: Command) -> Result<Value> {
        let what = format!("monitor {}", command.execute);
        self.tap(&what, self.inner.monitor(command)).await
    }

    /// One by one, so that each command is a point of its own: what is refused keeps no later one back,
    /// and a connection that ends is the error of all.
    async fn monitor_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let mut answers = Vec::with_capacity(commands.len());
        for command in commands {
            let answer = self.monitor(command).await;
            if self.dead.load(Ordering::Relaxed) {
                return Err(disconnected());
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    fn image_dir(&self) -> &Path {
        self.inner.image_dir()
    }

    async fn image_owner(&self) -> Result<Option<Owner>> {
        self.tap("image_owner", self.inner.image_owner()).await
    }
}

#[async_trait]
impl Control for TappedControl {
    async fn guard(&self, watch: Watch) -> Result<Box<dyn Guard>> {
        let inner = self.tap("guard", self.inner.guard(watch)).await?;
        let points = Arc::clone(&self.points);
        Ok(Box::new(TappedGuard { inner, points }))
    }

    async fn freeze(&self, mountpoints: &[String], deadline: Duration) -> Result<Freeze> {
        self.tap("freeze", self.inner.freeze(mountpoints, deadline)).await
    }

    async fn thaw(&self) -> Result<()> {
        self.tap("thaw", self.inner.thaw()).await
    }

    async fn pause(&self) -> Result<()> {
        self.tap("pause", self.inner.pause()).await
    }

    async fn resume(&self) -> Result<()> {
        self.tap("resume", self.inner.resume()).await
    }

    async fn let_go(&self) -> Result<()> {
        self.inner.let_go().await
    }

    async fn come_to_rest(&self) -> Result<()> {
        self.inner.come_to_rest().await
    }

    async fn flush_nodes(&self, disks: &[&Disk]) -> Result<Vec<DiskNode>> {
        self.tap("flush_nodes", self.inner.flush_nodes(disks)).await
    }

    async fn flush(&self, nodes: &[DiskNode]) -> Result<()> {
        self.tap("flush", self.inner.flush(nodes)).await
    }

    async fn instance(&self) -> Result<Option<String>> {
        self.tap("instance", self.inner.instance()).await
    }

    fn default_socket(&self) -> PathBuf {
        self.inner.default_socket()
    }

    async fn start_server(&self, server: &NbdServer) -> Result<()> {
        self.tap("start_server", self.inner.start_server(server)).await
    }

    async fn stop_server(&self) -> Result<()> {
        self.tap("stop_server", self.inner.stop_server()).await
    }

    async fn serve(&self, node: &ServeNode) -> Result<()> {
        self.tap("serve", self.inner.serve(node)).await
    }

    async fn unserve(&self, id: &str) -> Result<()> {
        self.tap("unserve", self.inner.unserve(id)).await
    }

    async fn served(&self) -> Result<Vec<String>> {
        self.tap("served", self.inner.served()).await
    }

    fn hotplug(&self) -> Option<&dyn Hotplug> {
        self.inner.hotplug()
    }

    fn lends(&self) -> Option<&dyn Lend> {
        self.inner.lends()
    }
}

/// A guard; the connection may be dead and it still answers, for it is a process of its own.
#[derive(Debug)]
struct TappedGuard {
    inner: Box<dyn Guard>,
    points: Arc<Points>,
}

#[async_trait]
impl Guard for TappedGuard {
    async fn disarm(self: Box<Self>) -> Result<Verdict> {
        let Self { inner, points } = *self;
        points.pass(Whose::Control, "disarm", When::Before).await?;
        let verdict = inner.disarm().await?;
        points.pass(Whose::Control, "disarm", When::After).await?;
        Ok(verdict)
    }
}

/// The catalog, as a process that can be killed at any point sees it.
#[derive(Debug)]
pub(crate) struct TappedCatalog<C> {
    pub(crate) inner: C,
    pub(crate) points: Arc<Points>,
}

impl<C: Catalog> TappedCatalog<C> {
    async fn tap<T>(&self, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.points.pass(Whose::Catalog, what, When::Before).await?;
        let answer = call.await?;
        self.points.pass(Whose::Catalog, what, When::After).await?;
        Ok(answer)
    }
}

/// Only what writes is a point: a kill beside a mere look is a kill at the point before.
#[async_trait]
impl<C: Catalog> Catalog for TappedCatalog<C> {
    async fn lock(&self, domain: &DomainId) -> Result<Box<dyn DomainLock>> {
        self.tap("lock", self.inner.lock(domain)).await
    }

    async fn define(&self, definition: &Definition) -> Result<()> {
        self.inner.define(definition).await
    }

    async fn undefine(&self, domain: &DomainId) -> Result<()> {
        self.inner.undefine(domain).await
    }

    async fn definitions(&self) -> Result<Vec<Definition>> {
        self.inner.definitions().await
    }

    async fn intend(&self, intent: &Intent) -> Result<()> {
        self.tap("intend", self.inner.intend(intent)).await
    }

    async fn intents(&self, domain: Option<&DomainId>) -> Result<Vec<Intent>> {
        self.inner.intents(domain).await
    }

    async fn settle(&self, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Result<()> {
        self.tap("settle", self.inner.settle(intent, domain, changes))
            .await
    }

    async fn snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        self.inner.snapshots(domain).await
    }

    async fn pinned(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        self.inner.pinned(domain).await
    }

    async fn deleted(&self, domain: &DomainId, name: &SnapshotName) -> Result<Option<SnapshotId>> {
        self.inner.deleted(domain, name).await
    }

    async fn checkpoints(&self, domain: &DomainId) -> Result<Vec<Checkpoint>> {
        self.inner.checkpoints(domain).await
    }

    async fn moves(&self, domain: &DomainId) -> Result<Vec<Moved>> {
        self.inner.moves(domain).await
    }

    async fn lease(&self) -> Result<(Uuid, Box<dyn DomainLock>)> {
        self.inner.lease().await
    }

    async fn lease_lives(&self, lease: Uuid) -> Result<bool> {
        self.inner.lease_lives(lease).await
    }

    async fn server(&self, domain: &DomainId) -> Result<Option<NbdServer>> {
        self.inner.server(domain).await
    }

    async fn exports(&self, domain: &DomainId) -> Result<Vec<Export>> {
        self.inner.exports(domain).await
    }
}
