//! An object of a point that is read: what goes wrong with it names point, object and offset.

use std::sync::Arc;

use bytes::Bytes;
use disksnap::{Error, ErrorKind, Result};

use crate::{Blob, Store};

/// An open object.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    point: Arc<str>,
    key: Arc<str>,
    blob: Arc<dyn Blob>,
}

impl Object {
    /// Opens it.
    ///
    /// # Errors
    /// `Broken` where it is missing: the caller was told that it is there.
    pub(crate) async fn open(store: &dyn Store, point: &str, key: &str) -> Result<Self> {
        let blob = store.open(key).await.map_err(|error| {
            let error = match error.kind() {
                ErrorKind::NotFound => Error::new(ErrorKind::Broken, "it is missing").because(error),
                _ => error,
            };
            error.with("point", point).with("object", key)
        })?;
        Ok(Self {
            point: point.into(),
            key: key.into(),
            blob,
        })
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.blob.length()
    }

    /// Its key.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// `length` bytes at `offset`.
    pub(crate) async fn read(&self, offset: u64, length: usize) -> Result<Bytes> {
        if offset
            .checked_add(length as u64)
            .is_none_or(|end| end > self.length())
        {
            return Err(self.broken(
                offset,
                format!("it ends at {}, before what it should hold", self.length()),
            ));
        }
        let read = self.blob.read_at(offset, length).await;
        let bytes = read.map_err(|error| self.place(error, offset))?;
        if bytes.len() != length {
            return Err(self.broken(offset, format!("of {length} bytes {} could be read", bytes.len())));
        }
        Ok(bytes)
    }

    /// It is not what it should be there.
    pub(crate) fn broken(&self, offset: u64, what: impl Into<String>) -> Error {
        self.place(Error::new(ErrorKind::Broken, what), offset)
    }

    fn place(&self, error: Error, offset: u64) -> Error {
        error
            .with("point", &self.point)
            .with("object", &self.key)
            .with("offset", offset)
    }
}
