//! Where a repository's objects lie. Small on purpose, and without anything that only a file system can do: an object store
//! can stand in for a directory.
//!
//! A key is a relative path: parts of letters, digits and `._-%`, separated by `/`; no part is `.` or `..`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use disksnap::Result;

/// A place for a repository's objects.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// Where it is, for people.
    fn describe(&self) -> String;

    /// The next parts of the keys below `prefix` (a key, or empty for the root), sorted; objects and folders alike. None where
    /// there is nothing.
    async fn list(&self, prefix: &str) -> Result<Vec<String>>;

    /// A small object as a whole.
    ///
    /// # Errors
    /// `NotFound`; `Broken` for one of more than `limit` bytes; `Io`.
    async fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>>;

    /// Puts a small object as a whole in the place of what is there, durably: after a crash it is the old one or the new one.
    async fn put(&self, key: &str, bytes: &[u8]) -> Result<()>;

    /// Opens an object for reading at any place.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Io`.
    async fn open(&self, key: &str) -> Result<Arc<dyn Blob>>;

    /// Begins a large object, which is written from its start to its end but for its head. It appears under its key when it
    /// is finished, in the place of what is there, or not at all.
    ///
    /// `resume`: goes on with what an earlier writer of this key had made durable, at the length that its
    /// [`BlobWriter::sync`] gave; what it wrote after that is dropped. `None` begins anew.
    ///
    /// # Errors
    /// `Broken` when there is less than that to go on with.
    async fn write(&self, key: &str, resume: Option<u64>) -> Result<Box<dyn BlobWriter>>;

    /// Drops what an unfinished writer of this key has left, if there is any.
    async fn discard(&self, key: &str) -> Result<()>;

    /// Removes what calls of [`Store::put`] that were cut short have left directly below `prefix`. For who holds a lock that keeps all
    /// others from putting there. Idempotent. A store that keeps nothing of such calls leaves this out.
    async fn sweep(&self, prefix: &str) -> Result<()> {
        let _ = prefix;
        Ok(())
    }

    /// Removes an object, or a folder with all that is below it. Idempotent. Durable on return.
    async fn remove(&self, key: &str) -> Result<()>;

    /// Moves an object to another key, in the place of what is there; durable on return. After a crash it is at one of both.
    async fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Locks a key for this process: for oneself, or with others who read. It ends with the value or the process.
    ///
    /// # Errors
    /// `Busy` when somebody else holds it.
    async fn lock(&self, key: &str, shared: bool) -> Result<Box<dyn StoreLock>>;

    /// The file of an object, where objects are files of this host: for programs that open files.
    fn file(&self, key: &str) -> Option<PathBuf>;
}

/// An object that is read.
#[async_trait]
pub trait Blob: fmt::Debug + Send + Sync {
    /// Its length in bytes.
    fn length(&self) -> u64;

    /// `length` bytes at `offset`.
    ///
    /// # Errors
    /// `Broken` where the object ends before; `Io`.
    async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes>;
}

/// An object that is written.
#[async_trait]
pub trait BlobWriter: fmt::Debug + Send {
    /// How long it is so far.
    fn length(&self) -> u64;

    /// Writes at the end.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: nothing more can be written then.
    async fn append(&mut self, bytes: Bytes) -> Result<()>;

    /// Reads back what was written at `offset` and compares it. A store that cannot read what is not finished yet leaves this
    /// out, and says nothing.
    ///
    /// # Errors
    /// `Broken` where it is not `bytes`; `Io`.
    async fn read_back(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        let _ = (offset, bytes);
        Ok(())
    }

    /// Makes durable what was written, and tells how long that is: a later writer can go on there.
    async fn sync(&mut self) -> Result<u64>;

    /// Puts `head` over the first bytes, makes it all durable and gives it its key.
    async fn finish(self: Box<Self>, head: Bytes) -> Result<()>;
}

/// A held lock.
pub trait StoreLock: fmt::Debug + Send + Sync {}
