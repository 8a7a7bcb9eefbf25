//! A method that writes down what it is asked for, and does as it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use disksnap_core::{
    Access, Batch, Capability, Changed, Command, Compare, DiskRequest, DiskResult, DiskSnapshot, ErrorKind,
    Fit, Health, Host, Merge, Method, OptionDoc, Peer, Precision, Prepared, Probe, Result, Revert,
    SnapshotId, Source, Step, TakePlan, Taken, Unit,
};
use serde_json::{Value, json};

use super::Log;
use super::standing::{Merges, Standing, stood_on};

/// What fixes the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    Host,
    /// One command for each disk, with an undo.
    Paused,
    /// One item for each disk in one command, with an undo.
    Atomic,
}

#[derive(Debug)]
pub(crate) struct FakeMethod {
    name: &'static str,
    plan: Plan,
    fit: Fit,
    hangs: bool,
    merges: Option<Merges>,
    on_this_host: bool,
    compares: bool,
    health: Arc<Mutex<Health>>,
    log: Arc<Log>,
}

impl FakeMethod {
    /// A method that works when asked for; has the options `size` and `colour`.
    pub(crate) fn new(name: &'static str, plan: Plan) -> Self {
        Self {
            name,
            plan,
            fit: Fit::Possible,
            hangs: false,
            merges: None,
            on_this_host: false,
            compares: false,
            health: Arc::new(Mutex::new(Health::Active)),
            log: Arc::default(),
        }
    }

    pub(crate) fn natural(mut self) -> Self {
        self.fit = Fit::Natural;
        self
    }

    pub(crate) fn unfit(mut self) -> Self {
        self.fit = Fit::Unfit {
            kind: ErrorKind::Unsupported,
            why: "it does not suit".to_owned(),
        };
        self
    }

    /// Its take never ends.
    pub(crate) fn hanging(mut self) -> Self {
        self.hangs = true;
        self
    }

    /// Its snapshots are images on this host, and not nodes of the hypervisor's.
    pub(crate) fn on_this_host(mut self) -> Self {
        self.on_this_host = true;
        self
    }

    /// Its snapshots are images on this host, and can be compared with each other.
    pub(crate) fn comparing(mut self) -> Self {
        self.compares = true;
        self.on_this_host()
    }

    /// The disks stand on its snapshots.
    pub(crate) fn stood_on(mut self, merges: &Merges) -> Self {
        self.merges = Some(Arc::clone(merges));
        self
    }

    /// All snapshots are in this health.
    pub(crate) fn health(&self) -> Arc<Mutex<Health>> {
        Arc::clone(&self.health)
    }

    pub(crate) fn writing_to(mut self, log: &Arc<Log>) -> Self {
        self.log = Arc::clone(log);
        self
    }

    fn standing(&self) -> Option<Standing> {
        let merges = Arc::clone(self.merges.as_ref()?);
        Some(Standing {
            name: self.name,
            merges,
            log: Arc::clone(&self.log),
        })
    }

    fn note(&self, event: &str) -> Result<()> {
        self.log.note(format!("{}.{event}", self.name))
    }
}

/// Where the snapshot of a disk with this alias is.
fn image_of(alias: &str) -> Access {
    Access::Source {
        source: Source::File {
            file: format!("/images/{alias}.raw").into(),
        },
        format: "raw".to_owned(),
        backing: None,
    }
}

#[async_trait]
impl DiskSnapshot for FakeMethod {
    fn method(&self) -> Method {
        let option = |key: &str| OptionDoc {
            key: key.to_owned(),
            help: "for tests".to_owned(),
        };
        Method {
            name: self.name.to_owned(),
            aliases: Vec::new(),
            summary: "for tests".to_owned(),
            options: vec![option("size"), option("colour")],
            capabilities: [Capability::Active, Capability::Inactive, Capability::Export]
                .into_iter()
                .chain(self.compares.then_some(Capability::Compare))
                .collect(),
        }
    }

    async fn probe(&self, _: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        let probe = |request: &DiskRequest| Probe {
            fit: self.fit.clone(),
            unit: request.disk.target.clone(),
            capabilities: self.method().capabilities,
            effect: "nothing".to_owned(),
            details: [].into(),
            warnings: Vec::new(),
        };
        Ok(disks.iter().map(probe).collect())
    }

    async fn prepare(&self, _: &dyn Host, _: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        self.note("prepare")?;
        let prepared = |request: &DiskRequest| Prepared {
            unit: request.disk.target.clone(),
            targets: vec![request.disk.target.clone()],
            data: json!({ "alias": request.alias }),
            tops: BTreeMap::new(),
            warnings: Vec::new(),
        };
        Ok(disks.iter().map(prepared).collect())
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        let (target, method) = (&prepared.unit, self.name);
        Ok(match self.plan {
            Plan::Host => TakePlan::Host,
            Plan::Paused => TakePlan::Paused(vec![Step {
                command: Command::new("step", json!(format!("{method} {target}"))),
                undo: Some(Command::new("unstep", json!(format!("{method} {target}")))),
            }]),
            Plan::Atomic => TakePlan::Atomic(Batch {
                execute: "transaction".to_owned(),
                list: "actions".to_owned(),
                items: vec![json!(format!("{method} {target}"))],
                undo: vec![Command::new("cancel", json!(format!("{method} {target}")))],
            }),
        })
    }

    async fn take(&self, _: &dyn Host, _: &Prepared) -> Result<Taken> {
        self.note("take")?;
        if self.hangs {
            std::future::pending::<()>().await;
        }
        Ok(Taken {
            data: json!(self.name),
        })
    }

    async fn complete(
        &self,
        _: &dyn Host,
        id: SnapshotId,
        prepared: &Prepared,
        taken: &Taken,
    ) -> Result<Unit> {
        self.note("complete")?;
        let expected = if self.plan == Plan::Host {
            json!(self.name)
        } else {
            Value::Null
        };
        assert_eq!(taken.data, expected, "each unit gets back what its own take left");
        let alias = prepared.data["alias"].as_str().unwrap();
        let result = DiskResult {
            target: prepared.unit.clone(),
            modified: None,
            access: if self.on_this_host {
                image_of(alias)
            } else {
                Access::Node(format!("node-{alias}"))
            },
            size: Some(1 << 20),
            details: [].into(),
        };
        let stands = self.merges.is_some();
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: vec![if stands {
                stood_on(&prepared.unit, id)
            } else {
                result
            }],
            data: prepared.data.clone(),
        })
    }

    async fn abort(
        &self,
        _: &dyn Host,
        _: SnapshotId,
        _: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        self.note(if prepared.is_some() {
            "abort prepared"
        } else {
            "abort"
        })
    }

    async fn inspect(&self, _: &dyn Host, _: SnapshotId, _: &Unit) -> Result<Health> {
        Ok(self.health.lock().unwrap().clone())
    }

    async fn delete(&self, _: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        // Which one: a delete may leave some.
        if self.compares {
            return self.note(&format!("delete {}", unit.unit));
        }
        self.note("delete")
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        self.standing()
            .map(|standing| Arc::new(standing) as Arc<dyn Revert>)
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        self.standing()
            .map(|standing| Arc::new(standing) as Arc<dyn Merge>)
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        self.compares.then(|| Arc::new(Comparing) as Arc<dyn Compare>)
    }
}

/// Tells the aliases that it was asked about.
#[derive(Debug)]
struct Comparing;

#[async_trait]
impl Compare for Comparing {
    async fn changed(&self, _: &dyn Host, earlier: &Peer, later: &Peer, _: &str) -> Result<Changed> {
        let alias = |peer: &Peer| peer.unit.data["alias"].as_str().unwrap().to_owned();
        Ok(Changed {
            size: 1 << 20,
            precision: Precision::Superset(format!("{} to {}", alias(earlier), alias(later))),
            ranges: Box::pin(futures_util::stream::iter([Ok(0..512)])),
        })
    }
}
