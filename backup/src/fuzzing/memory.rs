//! A store in memory. What was never put into one that is endless is there all the same, as long as anybody may want it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use disksnap::{Error, ErrorKind, Result};

use crate::{Blob, BlobWriter, Store, StoreLock};

type Objects = BTreeMap<String, Bytes>;

/// The store.
#[derive(Debug, Default)]
pub(super) struct Memory {
    objects: Arc<Mutex<Objects>>,
    endless: bool,
}

impl Memory {
    /// One in which every unfinished object can be gone on with.
    pub(super) fn endless() -> Self {
        Self {
            endless: true,
            ..Self::default()
        }
    }

    /// Puts an object there.
    pub(super) fn hold(&self, key: &str, bytes: &[u8]) {
        self.objects()
            .insert(key.to_owned(), Bytes::copy_from_slice(bytes));
    }

    /// All objects, by their keys.
    pub(super) fn all(&self) -> Vec<(String, Vec<u8>)> {
        let objects = self.objects();
        objects
            .iter()
            .map(|(key, bytes)| (key.clone(), bytes.to_vec()))
            .collect()
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self, key: &str) -> Result<Bytes> {
        let found = self.objects().get(key).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, "it is not there"))
    }
}

#[async_trait]
impl Store for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let below = |key: &String| {
            let rest = if prefix.is_empty() {
                Some(key.as_str())
            } else {
                key.strip_prefix(prefix)?.strip_prefix('/')
            };
            rest?.split('/').next().map(str::to_owned)
        };
        let mut names: Vec<String> = self.objects().keys().filter_map(below).collect();
        names.dedup();
        Ok(names)
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.found(key)?;
        if bytes.len() as u64 > limit {
            return Err(Error::new(ErrorKind::Broken, "it is too long"));
        }
        Ok(bytes.to_vec())
    }

    async fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.hold(key, bytes);
        Ok(())
    }

    async fn open(&self, key: &str) -> Result<Arc<dyn Blob>> {
        Ok(Arc::new(Held(self.found(key)?)))
    }

    async fn write(&self, key: &str, resume: Option<u64>) -> Result<Box<dyn BlobWriter>> {
        if resume.is_some() && !self.endless {
            return Err(Error::new(ErrorKind::Broken, "there is nothing to go on with"));
        }
        Ok(Box::new(Writer {
            key: key.to_owned(),
            before: resume.unwrap_or(0),
            bytes: Vec::new(),
            to: Arc::clone(&self.objects),
        }))
    }

    async fn discard(&self, _key: &str) -> Result<()> {
        Ok(())
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let folder = format!("{key}/");
        self.objects()
            .retain(|known, _| known != key && !known.starts_with(&folder));
        Ok(())
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let bytes = self.found(from)?;
        let mut objects = self.objects();
        objects.remove(from);
        objects.insert(to.to_owned(), bytes);
        Ok(())
    }

    async fn lock(&self, _key: &str, _shared: bool) -> Result<Box<dyn StoreLock>> {
        Ok(Box::new(Unlocked))
    }

    fn file(&self, _key: &str) -> Option<PathBuf> {
        None
    }
}

/// Nobody else is there.
#[derive(Debug)]
struct Unlocked;

impl StoreLock for Unlocked {}

#[derive(Debug)]
struct Held(Bytes);

#[async_trait]
impl Blob for Held {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(length);
        if end > self.0.len() {
            return Err(Error::new(ErrorKind::Broken, "it ends before"));
        }
        Ok(self.0.slice(start..end))
    }
}

#[derive(Debug)]
struct Writer {
    key: String,
    /// How much of it an earlier one has written, which nobody keeps.
    before: u64,
    bytes: Vec<u8>,
    to: Arc<Mutex<Objects>>,
}

#[async_trait]
impl BlobWriter for Writer {
    fn length(&self) -> u64 {
        self.before.saturating_add(self.bytes.len() as u64)
    }

    async fn append(&mut self, bytes: Bytes) -> Result<()> {
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn sync(&mut self) -> Result<u64> {
        Ok(self.length())
    }

    async fn finish(mut self: Box<Self>, head: Bytes) -> Result<()> {
        if self.before == 0
            && let Some(beginning) = self.bytes.get_mut(..head.len())
        {
            beginning.copy_from_slice(&head);
        }
        let mut objects = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        objects.insert(self.key.clone(), Bytes::from(std::mem::take(&mut self.bytes)));
        Ok(())
    }
}
