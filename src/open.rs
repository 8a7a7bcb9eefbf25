//! The one constructor: from a state directory to a dispatcher that can be used.

use std::path::Path;
use std::sync::Arc;

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{CheckpointName, Connector, Dispatcher, Domain, Registry, Result, SnapshotName};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_hypervisor::{Paths, QemuConnector};
use disksnap_storage_daemon::StorageDaemons;

use crate::SnapshotReader;

/// The methods of the providers that are linked into this program. Needs no state directory.
///
/// # Errors
/// `AlreadyExists` when two providers register one name; `Invalid` for a name that is not one.
pub fn methods() -> Result<Registry> {
    Registry::linked()
}

/// A dispatcher over all linked methods, the catalog in a state directory, and the QEMUs of this host.
///
/// Cheap to clone. Any number of them, in any number of processes, may use one state directory.
#[derive(Debug, Clone)]
pub struct Disksnap {
    dispatcher: Dispatcher,
    state_dir: StateDir,
}

impl Disksnap {
    /// Opens a state directory, and makes it if it does not exist; without one the user's own
    /// ([`StateDir::default_path`]).
    ///
    /// # Errors
    /// `Denied` when the directory is not the user's alone; `Invalid`, `NoSpace`, `Io` as
    /// [`StateDir::open`] says; `Broken` when the catalog in it cannot be read.
    pub async fn open(state_dir: Option<&Path>) -> Result<Self> {
        Self::with_registry(state_dir, methods()?).await
    }

    /// [`Disksnap::open`] with methods of the caller's choice, such as one registered at run time.
    ///
    /// # Errors
    /// The same.
    pub async fn with_registry(state_dir: Option<&Path>, registry: Registry) -> Result<Self> {
        let state_dir = StateDir::open(state_dir)?;
        let connector = QemuConnector::new(Paths {
            images: state_dir.images(),
            run: state_dir.run(),
        })
        .images(Arc::new(StorageDaemons::new(state_dir.run())));
        let catalog = SqliteCatalog::open(state_dir.clone()).await?;
        let connector: Arc<dyn Connector> = Arc::new(connector);
        Ok(Self {
            dispatcher: Dispatcher::new(registry, Arc::new(catalog), connector)
                .tracked_by(Arc::new(DirtyBitmaps)),
            state_dir,
        })
    }

    /// What plans, creates, lists, exports and deletes.
    #[must_use]
    pub fn dispatcher(&self) -> &Dispatcher {
        &self.dispatcher
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> &StateDir {
        &self.state_dir
    }

    /// Opens one disk of a snapshot for reading; see [`SnapshotReader`].
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or disk; `Broken` for a snapshot that must not be read;
    /// `Unsupported` for data in a place or format that cannot be read here; what the export meets.
    pub async fn read(&self, domain: &Domain, name: &SnapshotName, target: &str) -> Result<SnapshotReader> {
        SnapshotReader::open(&self.dispatcher, domain, name, target, None).await
    }

    /// The same, for reading what has changed since a checkpoint: [`DiskReader::changes`](crate::DiskReader::changes) tells
    /// where, [`DiskReader::changed_pieces`](crate::DiskReader::changed_pieces) what.
    ///
    /// # Errors
    /// Those of [`Disksnap::read`]; `NotFound` for an unknown checkpoint; `Invalid` when it does not cover the disk or
    /// is not before the snapshot; `Broken` when what has changed is not known; `Unsupported` where the method cannot tell.
    pub async fn read_since(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        since: &CheckpointName,
    ) -> Result<SnapshotReader> {
        SnapshotReader::open(&self.dispatcher, domain, name, target, Some(since)).await
    }
}
