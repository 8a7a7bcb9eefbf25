//! A repository: domains, their points in time, and the chains between them.

use std::sync::Arc;
use std::time::SystemTime;

use disksnap::{DomainId, Result};
use uuid::Uuid;

use crate::{Layer, Manifest, Store, StoreLock};

/// A repository of backups.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    id: Uuid,
}

/// The folder of one domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainFolder {
    /// Its key: `web1-7c3f9d52`.
    pub key: String,
    /// Whose it is.
    pub id: DomainId,
}

/// A point, or what is wrong with its manifest.
#[derive(Debug)]
pub struct ListedPoint {
    /// Its name.
    pub name: String,
    /// What its manifest says.
    pub manifest: Result<Manifest>,
}

/// Which point is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointSpec {
    /// The last one.
    Latest,
    /// The one of this name.
    Named(String),
    /// The last one at or before this instant.
    At(SystemTime),
}

impl Repository {
    /// Opens a repository.
    ///
    /// # Errors
    /// `NotFound` when there is none; `Unsupported` when a newer disksnap made it; `Broken` when its description is damaged.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self> {
        let _ = store;
        Err(crate::chain::unbuilt())
    }

    /// Opens a repository, and makes it in an empty place.
    ///
    /// # Errors
    /// As [`Repository::open`]; `AlreadyExists` where there is something else.
    pub async fn open_or_init(store: Arc<dyn Store>) -> Result<Self> {
        let _ = store;
        Err(crate::chain::unbuilt())
    }

    /// Where its objects are.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Tells it from every other repository.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The folders of its domains, sorted.
    pub async fn domains(&self) -> Result<Vec<DomainFolder>> {
        Err(crate::chain::unbuilt())
    }

    /// The folder of a domain, by its UUID; `None` where it has none yet.
    pub async fn folder(&self, domain: &DomainId) -> Result<Option<DomainFolder>> {
        let _ = domain;
        Err(crate::chain::unbuilt())
    }

    /// The folder that a domain has or gets.
    pub async fn folder_or_new(&self, domain: &DomainId) -> Result<DomainFolder> {
        let _ = domain;
        Err(crate::chain::unbuilt())
    }

    /// Locks a domain's folder.
    ///
    /// # Errors
    /// `Busy` when a backup, a prune or a reader of it is under way.
    pub async fn lock(&self, folder: &DomainFolder, shared: bool) -> Result<Box<dyn StoreLock>> {
        let _ = (folder, shared);
        Err(crate::chain::unbuilt())
    }

    /// The points of a domain, oldest first.
    pub async fn points(&self, folder: &DomainFolder) -> Result<Vec<ListedPoint>> {
        let _ = folder;
        Err(crate::chain::unbuilt())
    }

    /// The one point that is meant.
    ///
    /// # Errors
    /// `NotFound`, with the names that come near; what is wrong with its manifest.
    pub async fn point(&self, folder: &DomainFolder, which: &PointSpec) -> Result<Manifest> {
        let _ = (folder, which);
        Err(crate::chain::unbuilt())
    }

    /// The chain of a disk at a point, the newest image first.
    ///
    /// # Errors
    /// `NotFound` for a disk that is not in the point; `Broken`, naming what is missing, where the chain is not whole.
    pub async fn chain(&self, folder: &DomainFolder, point: &Manifest, target: &str) -> Result<Vec<Layer>> {
        let _ = (folder, point, target);
        Err(crate::chain::unbuilt())
    }

    /// Makes a point exist: its manifest is written, durably.
    ///
    /// # Errors
    /// `AlreadyExists` for a name that is there.
    pub async fn publish(&self, folder: &DomainFolder, manifest: &Manifest) -> Result<()> {
        let _ = (folder, manifest);
        Err(crate::chain::unbuilt())
    }

    /// The folders that have no manifest: points that never came to be, or were being removed.
    pub async fn unfinished(&self, folder: &DomainFolder) -> Result<Vec<String>> {
        let _ = folder;
        Err(crate::chain::unbuilt())
    }

    /// The key of a file of a point.
    #[must_use]
    pub fn key(&self, folder: &DomainFolder, point: &str, file: &str) -> String {
        format!("{}/{point}/{file}", folder.key)
    }
}
