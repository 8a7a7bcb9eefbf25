//! A catalog that lives in memory: for the suite, and for tests that want the dispatcher without a disk.
//!
//! It outlives a dropped future as a file outlives a killed process; a lock or lease ends with its holder.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Alias, Catalog, Change, Checkpoint, Definition, DomainId, DomainLock, Error, ErrorKind, Export, Intent,
    Moved, NbdServer, Result, Snapshot, SnapshotId, SnapshotName,
};
use uuid::Uuid;

/// How long a lock is waited for when nobody says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// The catalog. A clone is the same catalog, as another process that opens the same file would have it.
#[derive(Debug, Clone)]
pub struct MemoryCatalog {
    records: Arc<Mutex<Records>>,
    patience: Duration,
}

#[derive(Debug, Default)]
struct Records {
    definitions: BTreeMap<String, Definition>,
    intents: Vec<Intent>,
    domains: HashMap<Uuid, OfDomain>,
    locks: HashMap<Uuid, Arc<tokio::sync::Mutex<()>>>,
    leases: HashSet<Uuid>,
}

#[derive(Debug, Clone, Default)]
struct OfDomain {
    moves: Vec<Moved>,
    snapshots: Vec<Snapshot>,
    pinned: Vec<Snapshot>,
    deleted: Vec<(SnapshotName, SnapshotId)>,
    checkpoints: Vec<Checkpoint>,
    server: Option<NbdServer>,
    exports: BTreeMap<Alias, Export>,
}

impl Default for MemoryCatalog {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryCatalog {
    /// An empty catalog.
    #[must_use]
    pub fn new() -> Self {
        Self {
            records: Arc::default(),
            patience: PATIENCE,
        }
    }

    /// Gives up waiting for a lock after this time.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// A panic elsewhere leaves the records whole: each change is applied to a copy first.
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of<T>(&self, domain: &DomainId, read: impl FnOnce(&OfDomain) -> T) -> T {
        read(self.records().domains.entry(domain.uuid).or_default())
    }
}

#[derive(Debug)]
struct Held {
    _guard: tokio::sync::OwnedMutexGuard<()>,
}

impl DomainLock for Held {}

#[derive(Debug)]
struct Lease {
    id: Uuid,
    catalog: MemoryCatalog,
}

impl DomainLock for Lease {}

impl Drop for Lease {
    fn drop(&mut self) {
        self.catalog.records().leases.remove(&self.id);
    }
}

#[async_trait]
impl Catalog for MemoryCatalog {
    async fn lock(&self, domain: &DomainId) -> Result<Box<dyn DomainLock>> {
        let lock = Arc::clone(self.records().locks.entry(domain.uuid).or_default());
        match tokio::time::timeout(self.patience, lock.lock_owned()).await {
            Ok(guard) => Ok(Box::new(Held { _guard: guard })),
            Err(_) => Err(Error::new(ErrorKind::Busy, "the domain is locked").with("domain", domain)),
        }
    }

    async fn define(&self, definition: &Definition) -> Result<()> {
        let mut records = self.records();
        if let Some(other) = records.definitions.get(&definition.id.name)
            && other.id.uuid != definition.id.uuid
        {
            return Err(
                Error::new(ErrorKind::AlreadyExists, "another domain has this name")
                    .with("domain", &definition.id),
            );
        }
        records.definitions.retain(|_, d| d.id.uuid != definition.id.uuid);
        records
            .definitions
            .insert(definition.id.name.clone(), definition.clone());
        Ok(())
    }

    async fn undefine(&self, domain: &DomainId) -> Result<()> {
        let mut records = self.records();
        let of = records.domains.get(&domain.uuid);
        let held = |d: &OfDomain| (d.snapshots.len() + d.pinned.len(), d.checkpoints.len());
        let (snapshots, checkpoints) = of.map_or((0, 0), held);
        if snapshots + checkpoints > 0 {
            let why = format!("the domain has {snapshots} snapshots and {checkpoints} checkpoints");
            return Err(Error::new(ErrorKind::Busy, why).with("domain", domain));
        }
        let known = records.definitions.len();
        records.definitions.retain(|_, d| d.id.uuid != domain.uuid);
        if records.definitions.len() == known {
            return Err(Error::new(ErrorKind::NotFound, "the domain is not defined").with("domain", domain));
        }
        Ok(())
    }

    async fn definitions(&self) -> Result<Vec<Definition>> {
        Ok(self.records().definitions.values().cloned().collect())
    }

    async fn intend(&self, intent: &Intent) -> Result<()> {
        let intents = &mut self.records().intents;
        match intents.iter_mut().find(|i| i.id == intent.id) {
            Some(known) => *known = intent.clone(),
            None => intents.push(intent.clone()),
        }
        Ok(())
    }

    async fn intents(&self, domain: Option<&DomainId>) -> Result<Vec<Intent>> {
        let mut intents = self.records().intents.clone();
        intents.retain(|i| domain.is_none_or(|d| d.uuid == i.domain.id.uuid));
        Ok(intents)
    }

    async fn settle(&self, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Result<()> {
        let mut records = self.records();
        let mut changed = records.domains.get(&domain.uuid).cloned().unwrap_or_default();
        for change in changes {
            changed.apply(change)?;
        }
        records.domains.insert(domain.uuid, changed);
        records.intents.retain(|i| i.id != intent);
        Ok(())
    }

    async fn snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        Ok(self.of(domain, |d| d.snapshots.clone()))
    }

    async fn pinned(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        Ok(self.of(domain, |d| d.pinned.clone()))
    }

    async fn deleted(&self, domain: &DomainId, name: &SnapshotName) -> Result<Option<SnapshotId>> {
        Ok(self.of(domain, |d| {
            d.deleted.iter().rfind(|(n, _)| n == name).map(|(_, id)| *id)
        }))
    }

    async fn checkpoints(&self, domain: &DomainId) -> Result<Vec<Checkpoint>> {
        let mut checkpoints = self.of(domain, |d| d.checkpoints.clone());
        checkpoints.sort_by_key(|checkpoint| checkpoint.created);
        Ok(checkpoints)
    }

    async fn moves(&self, domain: &DomainId) -> Result<Vec<Moved>> {
        Ok(self.of(domain, |d| d.moves.clone()))
    }

    async fn lease(&self) -> Result<(Uuid, Box<dyn DomainLock>)> {
        let id = Uuid::new_v4();
        self.records().leases.insert(id);
        let catalog = self.clone();
        Ok((id, Box::new(Lease { id, catalog })))
    }

    async fn lease_lives(&self, lease: Uuid) -> Result<bool> {
        Ok(self.records().leases.contains(&lease))
    }

    async fn server(&self, domain: &DomainId) -> Result<Option<NbdServer>> {
        Ok(self.of(domain, |d| d.server.clone()))
    }

    async fn exports(&self, domain: &DomainId) -> Result<Vec<Export>> {
        Ok(self.of(domain, |d| d.exports.values().cloned().collect()))
    }
}

impl OfDomain {
    /// Takes a snapshot out of those that have a name, and remembers the name.
    fn bury(&mut self, id: SnapshotId) {
        let gone = self.snapshots.extract_if(.., |s| s.id == id);
        self.deleted.extend(gone.map(|s| (s.name, s.id)));
    }

    fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::AddSnapshot(snapshot) if snapshot.pinned => {
                self.bury(snapshot.id);
                self.pinned.retain(|s| s.id != snapshot.id);
                self.pinned.push((**snapshot).clone());
                self.pinned.sort_by_key(|s| s.created);
            }
            Change::AddSnapshot(snapshot) => {
                if let Some(known) = self.snapshots.iter_mut().find(|s| s.id == snapshot.id) {
                    known.clone_from(snapshot);
                    return Ok(());
                }
                if self.snapshots.iter().any(|s| s.name == snapshot.name) {
                    return Err(
                        Error::new(ErrorKind::AlreadyExists, "the snapshot exists already")
                            .with("snapshot", &snapshot.name),
                    );
                }
                self.snapshots.push((**snapshot).clone());
            }
            Change::RemoveSnapshot(id) => {
                self.bury(*id);
                self.pinned.retain(|s| s.id != *id);
            }
            Change::SetCheckpoints(set) => self.checkpoints.clone_from(set),
            Change::AddCheckpoint(new) => {
                match self.checkpoints.iter_mut().find(|known| known.name == new.name) {
                    Some(known) => known.clone_from(new),
                    None => self.checkpoints.push((**new).clone()),
                }
            }
            Change::RemoveCheckpoint(name) => self.checkpoints.retain(|known| known.name != *name),
            Change::Move(moved) => {
                let now = &moved.disk;
                self.moves.retain(|known| {
                    known.disk.target != now.target
                        || (known.from != moved.from && Some(&known.from) != now.source.as_ref())
                });
                self.moves.push((**moved).clone());
            }
            Change::SetServer(server) => self.server = Some(server.clone()),
            Change::ClearServer => self.server = None,
            Change::AddExport(export) => {
                self.exports.insert(export.alias.clone(), export.clone());
            }
            Change::RemoveExport(alias) => {
                self.exports.remove(alias);
            }
        }
        Ok(())
    }
}
