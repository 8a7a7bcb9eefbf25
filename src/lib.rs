//! disksnap: snapshots of the disks of virtual machines, one method per disk, behind one dispatcher.
//!
//! This is the crate that programs depend on. It links the providers that its features name, and
//! gives the nouns of `disksnap-core` and the documents of `disksnap-xml` under one name.
//!
//! [`Disksnap::open`] opens a state directory and gives a ready [`Dispatcher`]; [`Disksnap::load`]
//! reads a domain's document; [`Disksnap::read`] opens a disk of a snapshot for reading.
//! `examples/embed.rs` takes a snapshot, reads it and deletes it.
//!
//! A program calls [`run_if_asked`] first of all: while a guest stands still, a second process of the
//! same program watches over it.

mod chain;
mod changed;
mod disk;
mod domain;
mod following;
mod onto;
mod open;
mod reader;
mod remote;
mod save;
mod sparse;
mod unfinished;
mod update;

pub use chain::AddedChain;
pub use changed::{ChangeStream, ChangedExtent};
pub use disk::{DiskReader, Piece, Pieces};
pub use disksnap_catalog::{SqliteCatalog, StateDir};
pub use disksnap_checkpoint_set as checkpoint_set;
pub use disksnap_core::*;
pub use disksnap_hypervisor::guardian::run_if_asked;
pub use disksnap_hypervisor::{Paths, QemuConnector};
pub use disksnap_storage_daemon::find_program as storage_daemon_program;
pub use disksnap_xml as xml;
pub use disksnap_xml::DomainDocument;
pub use domain::read_document;
pub use following::Following;
pub use open::{Disksnap, methods};
pub use reader::{SnapshotReader, nbd_uri};
pub use remote::RemoteDisk;
pub use sparse::write_sparse;
pub use unfinished::{UnfinishedFolder, unfinished_file};

// A dependency that nothing names is not linked, and then registers nothing, silently.
#[cfg(feature = "btrfs")]
use disksnap_btrfs as _;
#[cfg(feature = "lvm")]
use disksnap_lvm as _;
#[cfg(feature = "memory")]
use disksnap_memory as _;
#[cfg(feature = "qemu-external-qcow2")]
use disksnap_qemu_external_qcow2 as _;
#[cfg(feature = "qemu-fleece")]
use disksnap_qemu_fleece as _;
#[cfg(feature = "reflink")]
use disksnap_reflink as _;
