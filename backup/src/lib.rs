//! disksnap's backup client: `disksnap backup`.
//!
//! It pulls snapshots into a **repository**: per domain a row of **points** in time, per point and disk one qcow2 image, full
//! or an increment over the image of an earlier point, beside the digests of what is in it and a manifest. The images are
//! standard ones: QEMU opens any of them as it is. It is built on disksnap's public interface alone.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `store`, `local` | where a repository's objects lie: the trait, and a directory of this host |
//! | `repository`, `manifest` | domains, points and their chains; what is written down of a point |
//! | `image`, `qcow2` | writing an image and its digests in one pass, so that it can be taken up again |
//! | `machine` | the domain's document, EFI variables and TPM state beside the disks |
//! | `digests` | the digests of an image's chunks as a file, and what they come to over a chain |
//! | `chain` | reading a disk as it was at a point, each chunk checked |
//! | `create`, `remote` | a backup of a domain of this host; of a snapshot that another host serves |
//! | `levels`, `spot` | whether an image is full or an increment; whether what is told unchanged is |
//! | `source`, `pull` | where a disk is read from; pulling one |
//! | `journal`, `tidy` | what lets an interrupted backup be gone on with; what backups leave with the domain, and its end |
//! | `restore` | writing a disk to a file, a device or an NBD export; a point into a directory or a paused domain |
//! | `serve` | the disks of a point over NBD, read-only, as long as somebody looks |
//! | `verify` | reading everything back |
//! | `merging`, `retention` | dropping points, and which |
//! | `fuzzing` | doors for fuzz targets |
//! | `progress` | what long acts tell, and how they are stopped |
//!
//! The formats are described in `docs/backup-format.md`.

mod chain;
mod create;
mod digests;
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod journal;
mod levels;
mod local;
mod machine;
mod manifest;
mod merging;
mod names;
mod object;
mod progress;
mod pull;
mod qcow2;
mod remote;
mod repository;
mod restore;
mod retention;
mod serve;
mod source;
mod spot;
mod store;
mod tidy;
mod verify;

pub use chain::{ChainReader, Layer, content_digest};
pub use create::{Backup, BackupRequest, Subject, create};
pub use digests::Digest;
pub use disksnap::{Error, ErrorKind, Piece, Result};
pub use image::{Compression, ImageKeys, ImageSpec, ImageState, ImageSummary, ImageWriter};
pub use journal::WantedLevel;
pub use local::LocalStore;
pub use machine::{MachineOptions, SavedMachine, load_machine, save_machine, verify_machine};
pub use manifest::{DiskEntry, FileEntry, Level, MachineEntry, Manifest};
pub use merging::{MergePlan, Merged, MergedImage, PlannedImage, merge, merge_plan};
pub use progress::{Event, Phase, Silent, Watcher, stopped};
pub use remote::{RemoteExport, RemoteRequest, pull};
pub use repository::{DomainFolder, ListedPoint, PointSpec, Repository};
pub use restore::{
    Form, IntoRequest, PointRequest, Restored, RestoredDisk, RestoredInto, RestoredPoint, Target,
    restore_disk, restore_disks, restore_into, restore_point,
};
pub use retention::{Doubtful, Held, Kept, Pruned, Reason, Retention, prune};
pub use serve::{PointServer, ServeRequest, ServedDisk, run_if_asked, serve};
pub use store::{Blob, BlobWriter, Store, StoreLock};
pub use tidy::abandon;
pub use verify::{Fault, Stray, Verification, VerifiedDisk, VerifiedPoint, VerifyOptions, verify};

/// The unit that images are written and checked in, in bytes: a cluster of the images, and what one digest is of. What
/// lies between two multiples of it is one chunk; a disk's last chunk may be shorter.
pub const CHUNK: u64 = 64 << 10;
