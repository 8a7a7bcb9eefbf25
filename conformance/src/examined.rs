//! The provider under examination: a new instance for every call, every record through JSON, and a
//! point before and after each call.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Command, Compare, DiskRequest, DiskSnapshot, Error, ErrorKind, Health, Host, Merge, Method,
    Peer, Prepared, Probe, Progress, Result, Revert, SnapshotId, TakePlan, Taken, Unit,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Fixture;
use crate::points::Points;

/// Which instance a call goes to.
#[derive(Debug, Clone)]
pub(crate) enum Instance {
    /// One for all calls: for the control alone.
    Same(Arc<dyn DiskSnapshot>),
    /// A new one for each call.
    Fresh(Arc<dyn Fixture>),
}

/// The provider as the dispatcher gets it.
#[derive(Debug, Clone)]
pub(crate) struct Examined {
    pub(crate) instance: Instance,
    pub(crate) points: Arc<Points>,
}

impl Examined {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        match &self.instance {
            Instance::Same(provider) => Arc::clone(provider),
            Instance::Fresh(fixture) => fixture.provider(),
        }
    }

    async fn tap<T>(&self, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.points.tap(what, call).await
    }
}

/// The record as another process would read it back.
fn sent<T: Serialize + DeserializeOwned + PartialEq + Debug>(record: &T) -> Result<T> {
    let lost = |e| Error::new(ErrorKind::Internal, format!("{record:?} does not survive JSON")).because(e);
    let text = serde_json::to_string(record).map_err(lost)?;
    let back: T = serde_json::from_str(&text).map_err(lost)?;
    if back == *record {
        Ok(back)
    } else {
        Err(Error::new(
            ErrorKind::Internal,
            format!("JSON turns {record:?} into {back:?}"),
        ))
    }
}

#[async_trait]
impl DiskSnapshot for Examined {
    fn method(&self) -> Method {
        self.provider().method()
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        sent(&self.provider().probe(host, &sent(&disks.to_vec())?).await?)
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        let (provider, disks) = (self.provider(), sent(&disks.to_vec())?);
        sent(&self.tap("prepare", provider.prepare(host, id, &disks)).await?)
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        sent(&self.provider().take_plan(&sent(prepared)?)?)
    }

    async fn take(&self, host: &dyn Host, prepared: &Prepared) -> Result<Taken> {
        let (provider, prepared) = (self.provider(), sent(prepared)?);
        sent(&self.tap("take", provider.take(host, &prepared)).await?)
    }

    async fn complete(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit> {
        let (provider, prepared, taken) = (self.provider(), sent(prepared)?, sent(taken)?);
        let complete = provider.complete(host, id, &prepared, &taken);
        sent(&self.tap("complete", complete).await?)
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        let (provider, disks) = (self.provider(), sent(&disks.to_vec())?);
        let prepared = prepared.map(|p| sent(&p.to_vec())).transpose()?;
        self.tap("abort", provider.abort(host, id, &disks, prepared.as_deref()))
            .await
    }

    async fn inspect(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Health> {
        sent(&self.provider().inspect(host, id, &sent(unit)?).await?)
    }

    async fn delete(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        let (provider, unit) = (self.provider(), sent(unit)?);
        self.tap("delete", provider.delete(host, id, &unit)).await
    }

    fn revert(&self, unit: &Unit) -> Option<Arc<dyn Revert>> {
        let inner = self.provider().revert(unit)?;
        let points = Arc::clone(&self.points);
        Some(Arc::new(ExaminedRevert { inner, points }))
    }

    fn merge(&self, unit: &Unit) -> Option<Arc<dyn Merge>> {
        let inner = self.provider().merge(unit)?;
        let points = Arc::clone(&self.points);
        Some(Arc::new(ExaminedMerge { inner, points }))
    }

    fn compare(&self, unit: &Unit) -> Option<Arc<dyn Compare>> {
        self.provider().compare(unit)
    }
}

/// What puts a unit back, with a point before and after.
#[derive(Debug)]
struct ExaminedRevert {
    inner: Arc<dyn Revert>,
    points: Arc<Points>,
}

#[async_trait]
impl Revert for ExaminedRevert {
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        let (unit, peers) = (sent(unit)?, sent(&peers.to_vec())?);
        let call = self.inner.revert(host, id, &unit, &peers);
        sent(&self.points.tap("revert", call).await?)
    }
}

/// What merges a unit, with a point before and after each call that changes something.
#[derive(Debug)]
struct ExaminedMerge {
    inner: Arc<dyn Merge>,
    points: Arc<Points>,
}

#[async_trait]
impl Merge for ExaminedMerge {
    fn stream(&self) -> Option<Arc<dyn Merge>> {
        let inner = self.inner.stream()?;
        let points = Arc::clone(&self.points);
        Some(Arc::new(Self { inner, points }))
    }

    async fn check(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()> {
        let (unit, peers) = (sent(unit)?, sent(&peers.to_vec())?);
        self.inner.check(host, id, &unit, &peers).await
    }

    async fn start(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<()> {
        let (unit, peers) = (sent(unit)?, sent(&peers.to_vec())?);
        let call = self.inner.start(host, id, &unit, &peers);
        self.points.tap("start", call).await
    }

    async fn progress(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<Progress> {
        sent(&self.inner.progress(host, id, &sent(unit)?).await?)
    }

    async fn finish(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        let unit = sent(unit)?;
        self.points
            .tap("finish", self.inner.finish(host, id, &unit))
            .await
    }

    fn release(&self, id: SnapshotId, unit: &Unit) -> Vec<Command> {
        self.inner.release(id, unit)
    }

    async fn cancel(&self, host: &dyn Host, id: SnapshotId, unit: &Unit) -> Result<()> {
        let unit = sent(unit)?;
        self.points
            .tap("cancel", self.inner.cancel(host, id, &unit))
            .await
    }

    async fn conclude(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        unit: &Unit,
        peers: &[Peer],
    ) -> Result<Affected> {
        let (unit, peers) = (sent(unit)?, sent(&peers.to_vec())?);
        let call = self.inner.conclude(host, id, &unit, &peers);
        sent(&self.points.tap("conclude", call).await?)
    }
}
