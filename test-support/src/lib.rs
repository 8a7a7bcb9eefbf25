//! Starts real QEMUs, storage daemons and guests for disksnap's tests.
//!
//! It knows nothing of disksnap's other crates. Everything here panics with a message that helps:
//! it is called from tests, and a test that lacks what it needs must not pass.
//!
//! - [`tools`]: where the programs are that `./x tools` gets
//! - [`need!`], [`skip!`]: tests that not every machine can run
//! - [`StorageDaemon`]: block nodes and jobs with no guest; the test is the guest
//! - [`Qemu`]: a whole machine, idle, with the test guest ([`GuestSetup`]) or with a writer that needs no guest kernel
//! - [`LvmGuest`]: a guest in which tests run that need LVM; [`SavedLvmGuest`]: one as it was at a moment
//! - [`GuestDisk`], [`Writer`]: the guest's side of the disks
//! - [`small_fs()`]: a file system that fills up; [`loop_fs()`]: btrfs or XFS
//! - [`pattern`]: bytes, digests, repeatable random numbers

#![allow(
    clippy::missing_panics_doc,
    reason = "everything here panics: only tests call it"
)]

mod disk;
mod domain_xml;
mod firmware_writer;
mod guest;
mod loop_fs;
mod lvm_guest;
pub mod pattern;
mod process;
mod qemu;
mod qmp;
pub mod require;
mod saved_guest;
mod small_fs;
mod storage_daemon;
pub mod tools;
mod writer;

pub use disk::{Bus, DiskSpec, Format, GuestDisk};
pub use firmware_writer::{firmware_writer_round, firmware_writer_round_over};
pub use guest::GuestSetup;
pub use loop_fs::{LoopFs, LoopFsKind, loop_fs, loop_fs_in, replay_journal};
pub use lvm_guest::{GuestOutput, LvmGuest};
pub use pattern::{GIB, KIB, MIB};
pub use qemu::{Qemu, QemuBuilder};
pub use qmp::Monitor;
pub use saved_guest::SavedLvmGuest;
pub use small_fs::{SmallFs, small_fs};
pub use storage_daemon::{StorageDaemon, StorageDaemonBuilder};
pub use tools::QemuVersion;
pub use writer::Writer;

/// A directory of a short name, since a socket's path holds at most 107 bytes.
pub(crate) fn temp_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("dsnap-").tempdir();
    dir.expect("a temporary directory can be made")
}
