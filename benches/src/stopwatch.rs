//! Where the time of a create goes: the dispatcher's control, catalog and provider, each with a stopwatch in front.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use disksnap_core::{
    Catalog, Change, Checkpoint, Command, Compare, Connector, Control, Definition, Disk, DiskNode,
    DiskRequest, DiskSnapshot, Domain, DomainId, DomainLock, Export, Freeze, Guard, Health, Host, Hotplug,
    ImageServer, Intent, Lend, Merge, Method, Moved, NbdServer, Owner, Prepared, Probe, Result, Revert,
    RunState, ServeNode, Snapshot, SnapshotId, SnapshotName, TakePlan, Taken, Unit, Verdict, Watch,
};
use serde_json::Value;
use uuid::Uuid;

/// What has been spent on what since the last [`Stopwatch::take`].
#[derive(Debug, Default)]
pub(crate) struct Stopwatch(Mutex<BTreeMap<&'static str, (u64, Duration)>>);

impl Stopwatch {
    async fn time<T>(&self, what: &'static str, call: impl Future<Output = T>) -> T {
        let since = Instant::now();
        let answer = call.await;
        self.add(what, since.elapsed());
        answer
    }

    fn add(&self, what: &'static str, spent: Duration) {
        let mut laps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lap = laps.entry(what).or_default();
        lap.0 += 1;
        lap.1 += spent;
    }

    /// How often and how long, by name; begins anew.
    pub(crate) fn take(&self) -> BTreeMap<&'static str, (u64, Duration)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A connector whose controls are timed.
#[derive(Debug)]
pub(crate) struct TimedConnector {
    pub(crate) inner: Arc<dyn Connector>,
    pub(crate) watch: Arc<Stopwatch>,
}

#[async_trait]
impl Connector for TimedConnector {
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>> {
        Ok(Arc::new(TimedControl {
            inner: self.inner.control(domain).await?,
            watch: Arc::clone(&self.watch),
        }))
    }

    fn image_server(&self) -> Option<&dyn ImageServer> {
        self.inner.image_server()
    }
}

#[derive(Debug)]
struct TimedControl {
    inner: Arc<dyn Control>,
    watch: Arc<Stopwatch>,
}

/// The name that the time of these commands goes under.
fn label(commands: &[Command]) -> &'static str {
    match commands.first().map(|command| command.execute.as_str()) {
        Some("query-qmp-schema") => "monitor: schema",
        Some("query-named-block-nodes") => "monitor: graph",
        Some("blockdev-add") => "monitor: add nodes",
        Some("blockdev-del") => "monitor: delete nodes",
        Some("qom-set" | "blockdev-reopen" | "transaction") => "monitor: take",
        _ => "monitor: other",
    }
}

#[async_trait]
impl Host for TimedControl {
    fn domain(&self) -> &Domain {
        self.inner.domain()
    }

    async fn state(&self) -> Result<RunState> {
        self.watch.time("monitor: state", self.inner.state()).await
    }

    async fn monitor(&self, command: Command) -> Result<Value> {
        let label = label(std::slice::from_ref(&command));
        self.watch.time(label, self.inner.monitor(command)).await
    }

    async fn monitor_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let label = label(&commands);
        self.watch.time(label, self.inner.monitor_each(commands)).await
    }

    fn image_dir(&self) -> &Path {
        self.inner.image_dir()
    }

    async fn image_owner(&self) -> Result<Option<Owner>> {
        self.inner.image_owner().await
    }
}

#[async_trait]
impl Control for TimedControl {
    async fn guard(&self, watch: Watch) -> Result<Box<dyn Guard>> {
        let inner = self.watch.time("guardian", self.inner.guard(watch)).await?;
        let watch = Arc::clone(&self.watch);
        Ok(Box::new(TimedGuard { inner, watch }))
    }

    async fn freeze(&self, mountpoints: &[String], deadline: Duration) -> Result<Freeze> {
        self.inner.freeze(mountpoints, deadline).await
    }

    async fn thaw(&self) -> Result<()> {
        self.inner.thaw().await
    }

    async fn pause(&self) -> Result<()> {
        self.watch.time("monitor: stop", self.inner.pause()).await
    }

    async fn resume(&self) -> Result<()> {
        self.watch.time("monitor: cont", self.inner.resume()).await
    }

    async fn let_go(&self) -> Result<()> {
        self.inner.let_go().await
    }

    async fn come_to_rest(&self) -> Result<()> {
        self.inner.come_to_rest().await
    }

    async fn flush_nodes(&self, disks: &[&Disk]) -> Result<Vec<DiskNode>> {
        self.watch
            .time("monitor: flush nodes", self.inner.flush_nodes(disks))
            .await
    }

    async fn flush(&self, nodes: &[DiskNode]) -> Result<()> {
        self.watch.time("monitor: flush", self.inner.flush(nodes)).await
    }

    async fn instance(&self) -> Result<Option<String>> {
        self.inner.instance().await
    }

    fn default_socket(&self) -> PathBuf {
        self.inner.default_socket()
    }

    async fn start_server(&self, server: &NbdServer) -> Result<()> {
        self.inner.start_server(server).await
    }

    async fn stop_server(&self) -> Result<()> {
        self.inner.stop_server().await
    }

    async fn serve(&self, node: &ServeNode) -> Result<()> {
        self.inner.serve(node).await
    }

    async fn unserve(&self, id: &str) -> Result<()> {
        self.inner.unserve(id).await
    }

    async fn served(&self) -> Result<Vec<String>> {
        self.inner.served().await
    }

    fn hotplug(&self) -> Option<&dyn Hotplug> {
        self.inner.hotplug()
    }

    fn lends(&self) -> Option<&dyn Lend> {
        self.inner.lends()
    }
}

#[derive(Debug)]
struct TimedGuard {
    inner: Box<dyn Guard>,
    watch: Arc<Stopwatch>,
}

#[async_trait]
impl Guard for TimedGuard {
    async fn disarm(self: Box<Self>) -> Result<Verdict> {
        self.watch.time("guardian", self.inner.disarm()).await
    }
}

/// A provider that is timed, phase by phase.
#[derive(Debug)]
pub(crate) struct TimedProvider {
    pub(crate) inner: Arc<dyn DiskSnapshot>,
    pub(crate) watch: Arc<Stopwatch>,
}

#[async_trait]
impl DiskSnapshot for TimedProvider {
    fn method(&self) -> Method {
        self.inner.method()
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        self.watch.time("probe", self.inner.probe(host, disks)).await
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        self.watch
            .time("prepare", self.inner.prepare(host, id, disks))
            .await
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        self.inner.take_plan(prepared)
    }

    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        self.inner.take(host, prepared).await
    }

    async fn complete(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit> {
        let complete = self.inner.complete(host, id, prepared, taken);
        self.watch.time("complete", complete).await
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        self.inner.abort(host, id, disks, prepared).await
    }

    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health> {
        self.inner.inspect(host, id, unit).await
    }

    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        self.watch.time("delete", self.inner.delete(host, id, unit)).await
    }

    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>> {
        self.inner.revert(unit)
    }

    fn merge(&self, unit: &Unit) -> Option<Arc<dyn Merge>> {
        self.inner.merge(unit)
    }

    fn compare(&self, unit: &Unit) -> Option<Arc<dyn Compare>> {
        self.inner.compare(unit)
    }
}

/// A catalog that is timed.
#[derive(Debug)]
pub(crate) struct TimedCatalog {
    pub(crate) inner: Arc<dyn Catalog>,
    pub(crate) watch: Arc<Stopwatch>,
}

impl TimedCatalog {
    async fn time<T>(&self, call: impl Future<Output = T>) -> T {
        self.watch.time("catalog", call).await
    }
}

#[async_trait]
impl Catalog for TimedCatalog {
    async fn lock(&self, domain: &DomainId) -> Result<Box<dyn DomainLock>> {
        self.time(self.inner.lock(domain)).await
    }

    async fn define(&self, definition: &Definition) -> Result<()> {
        self.time(self.inner.define(definition)).await
    }

    async fn undefine(&self, domain: &DomainId) -> Result<()> {
        self.time(self.inner.undefine(domain)).await
    }

    async fn definitions(&self) -> Result<Vec<Definition>> {
        self.time(self.inner.definitions()).await
    }

    async fn intend(&self, intent: &Intent) -> Result<()> {
        self.time(self.inner.intend(intent)).await
    }

    async fn intents(&self, domain: Option<&DomainId>) -> Result<Vec<Intent>> {
        self.time(self.inner.intents(domain)).await
    }

    async fn settle(&self, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Result<()> {
        self.time(self.inner.settle(intent, domain, changes)).await
    }

    async fn snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        self.time(self.inner.snapshots(domain)).await
    }

    async fn pinned(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        self.time(self.inner.pinned(domain)).await
    }

    async fn deleted(&self, domain: &DomainId, name: &SnapshotName) -> Result<Option<SnapshotId>> {
        self.time(self.inner.deleted(domain, name)).await
    }

    async fn checkpoints(&self, domain: &DomainId) -> Result<Vec<Checkpoint>> {
        self.time(self.inner.checkpoints(domain)).await
    }

    async fn moves(&self, domain: &DomainId) -> Result<Vec<Moved>> {
        self.time(self.inner.moves(domain)).await
    }

    async fn lease(&self) -> Result<(Uuid, Box<dyn DomainLock>)> {
        self.time(self.inner.lease()).await
    }

    async fn lease_lives(&self, lease: Uuid) -> Result<bool> {
        self.time(self.inner.lease_lives(lease)).await
    }

    async fn server(&self, domain: &DomainId) -> Result<Option<NbdServer>> {
        self.time(self.inner.server(domain)).await
    }

    async fn exports(&self, domain: &DomainId) -> Result<Vec<Export>> {
        self.time(self.inner.exports(domain)).await
    }
}
