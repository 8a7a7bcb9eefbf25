//! [`SqliteCatalog`]: core's `Catalog` over the database and the lock files.

use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Act, Catalog, Change, Checkpoint, Definition, DomainId, DomainLock, Error, ErrorKind, Export, FillStage,
    Intent, Moved, NbdServer, Result, Snapshot, SnapshotId, SnapshotName,
};
use rusqlite::{Connection, OptionalExtension, Params, Transaction, params};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::database::{self, Database, Space};
use crate::fault::Outcome;
use crate::{StateDir, changes, lock, record};

/// The durable catalog in a state directory. Clones share the connection.
///
/// Any number of processes and of `SqliteCatalog`s may have the same directory open. Needs a tokio
/// runtime with its clock enabled. A step that has begun goes on to its end when its future is dropped.
#[derive(Debug, Clone)]
pub struct SqliteCatalog {
    dir: StateDir,
    database: Database,
    patience: Duration,
}

impl SqliteCatalog {
    /// How long [`Catalog::lock`] waits when nobody says otherwise.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// Opens the catalog in the state directory; makes or upgrades it when needed.
    ///
    /// # Errors
    /// `Broken` when the file is damaged, not a database, or lost; `Unsupported` when a newer disksnap
    /// upgraded it; `Invalid` when it is another program's; `Denied` when it may not be written, also on
    /// a read-only file system; `NoSpace`, `Busy`, `Io`. A file that is refused is left as it is.
    pub async fn open(dir: StateDir) -> Result<Self> {
        let database = Database::open(dir.clone()).await?;
        let patience = Self::PATIENCE;
        Ok(Self {
            dir,
            database,
            patience,
        })
    }

    /// Sets how long [`Catalog::lock`] waits for whoever has the domain; zero asks once.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> &StateDir {
        &self.dir
    }

    /// Reads the whole catalog, every page and every record. Changes nothing.
    ///
    /// # Errors
    /// `Broken` when something in it is damaged, `Unsupported` for a record of a newer version.
    pub async fn check(&self) -> Result<()> {
        self.database
            .read("cannot check the catalog", |connection| {
                database::integrity(connection)?;
                let all = |table| format!("SELECT version, record FROM {table}");
                records::<Definition>("definition", connection, &all("definitions"), ())?;
                records::<Snapshot>("snapshot", connection, &all("snapshots"), ())?;
                records::<Checkpoint>("checkpoint", connection, &all("checkpoints"), ())?;
                records::<Intent>("intent", connection, &all("intents"), ())?;
                records::<NbdServer>("server", connection, &all("servers"), ())?;
                records::<Export>("export", connection, &all("exports"), ())?;
                Ok(())
            })
            .await
    }
}

/// The records that a query finds: its columns are `version, record`.
fn records<T: DeserializeOwned>(
    what: &str,
    connection: &Connection,
    query: &str,
    params: impl Params,
) -> Outcome<Vec<T>> {
    let mut query = connection.prepare_cached(query)?;
    let mut rows = query.query(params)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let text = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
        found.push(record::read(what, row.get(0)?, text)?);
    }
    Ok(found)
}

fn define(to: &Transaction<'_>, definition: &Definition) -> Outcome<()> {
    let (id, uuid) = (&definition.id, definition.id.uuid.to_string());
    let holder: Option<String> = to
        .prepare_cached("SELECT domain FROM definitions WHERE name = ?1 AND domain <> ?2")?
        .query_row(params![id.name, uuid], |row| row.get(0))
        .optional()?;
    if let Some(holder) = holder {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("another domain, {holder}, is known by this name; it was left as it is"),
        )
        .with("domain", id)
        .with("uuid", &uuid)
        .hint("Give this domain another <name>, or undefine the other one first.")
        .into());
    }
    to.prepare_cached(
        "INSERT INTO definitions (domain, name, version, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (domain) DO UPDATE SET name = excluded.name, version = excluded.version, record = excluded.record",
    )?
    .execute(params![uuid, id.name, record::VERSION, record::write("definition", definition)?])?;
    Ok(())
}

fn undefine(from: &Transaction<'_>, domain: &DomainId) -> Outcome<()> {
    let uuid = domain.uuid.to_string();
    let count = |table: &str| -> rusqlite::Result<i64> {
        let query = format!("SELECT count(*) FROM {table} WHERE domain = ?1");
        from.query_row(&query, [&uuid], |row| row.get(0))
    };
    if count("definitions")? == 0 {
        return Err(
            Error::new(ErrorKind::NotFound, "no such domain has been made known")
                .with("domain", domain)
                .hint("`disksnap domain define FILE` makes one known.")
                .into(),
        );
    }
    let busy = |why: String, hint: &str| {
        let error = Error::new(ErrorKind::Busy, why).with("domain", domain).hint(hint);
        Err(error.retryable(false).into())
    };
    let (snapshots, intents) = (count("snapshots")?, count("intents")?);
    let checkpoints = count("checkpoints")?;
    if snapshots > 0 {
        let why = format!("the domain has {snapshots} snapshots and was left as it is");
        return busy(
            why,
            "Delete its snapshots first: `disksnap snapshot delete --all`.",
        );
    }
    if checkpoints > 0 {
        let why = format!("the domain has {checkpoints} checkpoints and was left as it is");
        return busy(
            why,
            "`disksnap checkpoint dump` writes them down for another host; `disksnap checkpoint forget --all` \
             then forgets them here. The disks keep their bitmaps.",
        );
    }
    let kept = count("pinned")?;
    if kept > 0 {
        let why =
            format!("what was kept of {kept} deleted snapshots is still there; the domain was left as it is");
        return busy(
            why,
            "Any act on the domain deletes it, or tells why it cannot: `disksnap checkpoint validate`.",
        );
    }
    if intents > 0 {
        let why = format!("{intents} acts on the domain have not come to their end; it was left as it is");
        return busy(why, "Run `disksnap recover` first.");
    }
    from.execute("DELETE FROM definitions WHERE domain = ?1", [&uuid])?;
    Ok(())
}

fn intend(to: &Transaction<'_>, intent: &Intent) -> Outcome<()> {
    to.prepare_cached(
        "INSERT INTO intents (id, domain, version, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET domain = excluded.domain, version = excluded.version, record = excluded.record",
    )?
    .execute(params![
        intent.id.to_string(),
        intent.domain.id.uuid.to_string(),
        record::VERSION,
        record::write("intent", intent)?
    ])?;
    Ok(())
}

fn settle(on: &Transaction<'_>, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Outcome<()> {
    for change in changes {
        changes::apply(on, domain, change)?;
    }
    on.prepare_cached("DELETE FROM intents WHERE id = ?1")?
        .execute([intent.to_string()])?;
    Ok(())
}

/// A set of checkpoints that is written down ends nothing that was begun, and may be longer than the reserve.
fn space_of(intent: Uuid, changes: &[Change]) -> Space {
    let makes = |change: &Change| match change {
        Change::SetCheckpoints(set) => !set.is_empty(),
        Change::AddCheckpoint(_) => true,
        _ => false,
    };
    if intent.is_nil() && changes.iter().any(makes) {
        Space::Ordinary
    } else {
        Space::Reserve
    }
}

#[async_trait]
impl Catalog for SqliteCatalog {
    async fn lock(&self, domain: &DomainId) -> Result<Box<dyn DomainLock>> {
        let held = lock::domain(&self.dir.locks(), domain, self.patience).await?;
        Ok(Box::new(held))
    }

    async fn define(&self, definition: &Definition) -> Result<()> {
        let definition = definition.clone();
        let step = move |to: &Transaction<'_>| define(to, &definition);
        self.database
            .write("cannot define the domain", Space::Ordinary, step)
            .await
    }

    async fn undefine(&self, domain: &DomainId) -> Result<()> {
        let domain = domain.clone();
        let step = move |from: &Transaction<'_>| undefine(from, &domain);
        self.database
            .write("cannot undefine the domain", Space::Reserve, step)
            .await
    }

    async fn definitions(&self) -> Result<Vec<Definition>> {
        let query = "SELECT version, record FROM definitions ORDER BY name";
        self.database
            .read("cannot list the domains", move |c| {
                records("definition", c, query, ())
            })
            .await
    }

    async fn intend(&self, intent: &Intent) -> Result<()> {
        let space = match intent.act {
            Act::Create { .. }
            | Act::Serve { .. }
            | Act::Read { .. }
            | Act::Attach { .. }
            | Act::Fill {
                stage: FillStage::Starting,
                ..
            } => Space::Ordinary,
            _ => Space::Reserve,
        };
        let intent = intent.clone();
        let step = move |to: &Transaction<'_>| intend(to, &intent);
        self.database
            .write("cannot write down what is to be done", space, step)
            .await
    }

    async fn intents(&self, domain: Option<&DomainId>) -> Result<Vec<Intent>> {
        let domain = domain.map(|domain| domain.uuid.to_string());
        self.database
            .read("cannot list what is under way", move |c| match domain {
                None => records(
                    "intent",
                    c,
                    "SELECT version, record FROM intents ORDER BY seq",
                    (),
                ),
                Some(domain) => {
                    let query = "SELECT version, record FROM intents WHERE domain = ?1 ORDER BY seq";
                    records("intent", c, query, [domain])
                }
            })
            .await
    }

    async fn settle(&self, intent: Uuid, domain: &DomainId, changes: &[Change]) -> Result<()> {
        let (domain, changes) = (domain.clone(), changes.to_vec());
        let space = space_of(intent, &changes);
        let step = move |on: &Transaction<'_>| settle(on, intent, &domain, &changes);
        self.database
            .write("cannot write down what was done", space, step)
            .await
    }

    async fn snapshots(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM snapshots WHERE domain = ?1 ORDER BY created, seq";
        self.database
            .read("cannot list the snapshots", move |c| {
                records("snapshot", c, query, [domain])
            })
            .await
    }

    async fn pinned(&self, domain: &DomainId) -> Result<Vec<Snapshot>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM pinned WHERE domain = ?1 ORDER BY created, seq";
        self.database
            .read("cannot list the kept snapshots", move |c| {
                records("snapshot", c, query, [domain])
            })
            .await
    }

    async fn deleted(&self, domain: &DomainId, name: &SnapshotName) -> Result<Option<SnapshotId>> {
        let (domain, name) = (domain.uuid.to_string(), name.to_string());
        let query = "SELECT id FROM tombstones WHERE domain = ?1 AND name = ?2 ORDER BY seq DESC LIMIT 1";
        self.database
            .read("cannot look for the deleted snapshot", move |c| {
                let mut query = c.prepare_cached(query)?;
                let id: Option<String> = query.query_row([domain, name], |row| row.get(0)).optional()?;
                Ok(id.and_then(|id| Uuid::parse_str(&id).ok()).map(SnapshotId))
            })
            .await
    }

    async fn checkpoints(&self, domain: &DomainId) -> Result<Vec<Checkpoint>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM checkpoints WHERE domain = ?1 ORDER BY created, seq";
        self.database
            .read("cannot list the checkpoints", move |c| {
                records("checkpoint", c, query, [domain])
            })
            .await
    }

    async fn moves(&self, domain: &DomainId) -> Result<Vec<Moved>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM moves WHERE domain = ?1 ORDER BY seq";
        self.database
            .read("cannot look for the domain's disks", move |c| {
                records("move", c, query, [domain])
            })
            .await
    }

    async fn lease(&self) -> Result<(Uuid, Box<dyn DomainLock>)> {
        let (id, held) = lock::lease(&self.dir.locks())?;
        Ok((id, Box::new(held)))
    }

    async fn lease_lives(&self, lease: Uuid) -> Result<bool> {
        lock::lease_lives(&self.dir.locks(), lease)
    }

    async fn server(&self, domain: &DomainId) -> Result<Option<NbdServer>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM servers WHERE domain = ?1";
        self.database
            .read("cannot look for the domain's server", move |c| {
                Ok(records("server", c, query, [domain])?.pop())
            })
            .await
    }

    async fn exports(&self, domain: &DomainId) -> Result<Vec<Export>> {
        let domain = domain.uuid.to_string();
        let query = "SELECT version, record FROM exports WHERE domain = ?1 ORDER BY seq";
        self.database
            .read("cannot list the exports", move |c| {
                records("export", c, query, [domain])
            })
            .await
    }
}
