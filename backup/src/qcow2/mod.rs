//! The images as files: qcow2 version 3 as QEMU's `docs/interop/qcow2.txt` describes it, cut down to what this crate writes.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `header` | the first cluster |
//! | `entry` | what an L2 table says of one cluster |
//! | `layout` | where what goes while an image is written as a stream, and the tables that say so |
//! | `tables` | the tables of an image that is read |
//!
//! Fixed: clusters of 64 KiB, refcounts of 16 bits, no snapshots, no bitmaps, no encryption, no external data.

mod entry;
mod header;
mod layout;
mod tables;

pub(crate) use entry::Entry;
pub(crate) use header::{Header, MAX_BACKING};
pub(crate) use layout::{Layout, LayoutState, Stored};
pub(crate) use tables::{L2, Tables};

use crate::CHUNK;

/// A cluster, in bytes. A chunk of the disk is one cluster of its image.
pub(crate) const CLUSTER: u64 = CHUNK;
/// How many clusters of the disk an L2 table tells of: 512 MiB.
pub(crate) const L2_ENTRIES: u64 = CLUSTER / 8;
/// The longest L1 table that QEMU opens (`QCOW_MAX_L1_SIZE`), in entries: for a disk of 2 PiB.
pub(crate) const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
/// What the L1 table's and a plain L2 entry's bit 63 says: the refcount is exactly one.
const COPIED: u64 = 1 << 63;

/// How many entries the L1 table of a disk of this size has.
pub(crate) fn l1_entries(size: u64) -> u64 {
    size.div_ceil(CLUSTER * L2_ENTRIES)
}
