//! The tables of an image that is read, a window of them at a time.

use bytes::Bytes;
use disksnap::Result;

use super::entry::plain_offset;
use super::header::virtual_size;
use super::{CLUSTER, Entry, Header, L2_ENTRIES, l1_entries};
use crate::digests::{CHUNK_BYTES, to_usize};
use crate::object::Object;

/// How much of the L1 table is read at once, in entries: for 4 TiB.
const WINDOW: u64 = CLUSTER / 8;

/// The tables of an image.
#[derive(Debug)]
pub(crate) struct Tables {
    object: Object,
    header: Header,
    /// The part of the L1 table that was read: its first entry, and its bytes.
    l1: (u64, Bytes),
    /// The L2 table that was read: which one it is, where it is in the file, and its bytes; `None` where there is none.
    l2: Option<(u64, Option<L2>)>,
}

/// An L2 table.
#[derive(Debug, Clone)]
pub(crate) struct L2 {
    host: u64,
    bytes: Bytes,
}

impl Tables {
    /// Reads the header of the image of a disk of this size.
    ///
    /// # Errors
    /// `Broken` for what is no image of such a disk.
    pub(crate) async fn open(object: Object, size: u64) -> Result<Self> {
        let length = to_usize(object.length().min(CLUSTER));
        let head = object.read(0, length).await?;
        let header = Header::decode(&head).map_err(|what| object.broken(0, what))?;
        if header.size != virtual_size(size) {
            let what = format!("it is an image of {} bytes, and the disk had {size}", header.size);
            return Err(object.broken(0, what));
        }
        let refcounts_end = header.refcounts + u64::from(header.refcount_clusters) * CLUSTER;
        if refcounts_end > object.length() {
            return Err(object.broken(header.refcounts, "it ends before its refcount table does"));
        }
        Ok(Self {
            object,
            header,
            l1: (0, Bytes::new()),
            l2: None,
        })
    }

    /// The image.
    pub(crate) fn object(&self) -> &Object {
        &self.object
    }

    /// What its header says.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// An L2 table; `None` where there is none, and everything it would tell of is absent.
    ///
    /// # Errors
    /// `Broken` where it is not in the file.
    pub(crate) async fn l2(&mut self, index: u64) -> Result<Option<L2>> {
        if let Some((known, table)) = &self.l2
            && *known == index
        {
            return Ok(table.clone());
        }
        let table = match self.l1_entry(index).await? {
            None => None,
            Some(host) => {
                let bytes = self.object.read(host, CHUNK_BYTES).await?;
                Some(L2 { host, bytes })
            }
        };
        self.l2 = Some((index, table.clone()));
        Ok(table)
    }

    /// Where an L2 table is.
    async fn l1_entry(&mut self, index: u64) -> Result<Option<u64>> {
        let (first, window) = &self.l1;
        let known = index.checked_sub(*first).filter(|n| *n < window.len() as u64 / 8);
        let n = if let Some(n) = known {
            n
        } else {
            let first = index / WINDOW * WINDOW;
            let entries = l1_entries(self.header.size).saturating_sub(first).min(WINDOW);
            let length = to_usize(entries * 8);
            self.l1 = (first, self.object.read(self.header.l1 + first * 8, length).await?);
            index - first
        };
        let raw = number(&self.l1.1, n);
        if raw == 0 {
            return Ok(None);
        }
        let at = self.header.l1 + index * 8;
        let host = plain_offset(raw).filter(|host| host + CLUSTER <= self.object.length());
        host.map(Some).ok_or_else(|| {
            self.object
                .broken(at, format!("entry {index} of its L1 table is {raw:#x}"))
        })
    }

    /// What the image has of a chunk, by that table.
    ///
    /// # Errors
    /// `Broken` where the table's entry is none, or is of something that is not in the file.
    pub(crate) fn entry(&self, table: &L2, chunk: u64) -> Result<Entry> {
        let index = chunk % L2_ENTRIES;
        let raw = number(&table.bytes, index);
        let entry = Entry::decode(raw).filter(|entry| self.is_in_file(*entry));
        let at = table.host + index * 8;
        entry.ok_or_else(|| {
            self.object.broken(
                at,
                format!("the entry of chunk {chunk} in an L2 table is {raw:#x}"),
            )
        })
    }

    fn is_in_file(&self, entry: Entry) -> bool {
        let is_known = self.header.zstd || !matches!(entry, Entry::Compressed { .. });
        is_known && entry.extent().is_none_or(|(_, end)| end <= self.object.length())
    }
}

impl L2 {
    /// Where the entry of this chunk stands in the file.
    pub(crate) fn place(&self, chunk: u64) -> u64 {
        self.host + chunk % L2_ENTRIES * 8
    }
}

/// One big-endian number of a table.
fn number(table: &[u8], index: u64) -> u64 {
    let at = to_usize(index);
    table
        .as_chunks()
        .0
        .get(at)
        .map_or(0, |number| u64::from_be_bytes(*number))
}
