//! Writing a disk to where it is to be: a new image or file, a block device, an NBD export.
//!
//! A new file appears under its name when it is complete and on the disk, or not at all. Devices and exports are there before
//! and are overwritten; one whose restoration fails is said to be unfinished. Whatever is written has been compared with the digest that
//! was taken of the snapshot, chunk by chunk, and the whole with the manifest's.

mod content;
mod device;
mod disks;
mod file;
mod into;
mod nbd;
mod point;
mod qcow2;
mod worker;

use std::fmt;
use std::path::PathBuf;

use async_trait::async_trait;
use disksnap::{Effect, Error, ErrorKind, Piece, Result};
use serde::Serialize;

use self::content::Content;
use self::device::Device;
use self::file::{RawFile, must_not_be_a_device};
use self::nbd::{Export, Rest};
use self::qcow2::Qcow2File;
use self::worker::{Worker, joined};
use crate::progress::Progress;
use crate::{
    ChainReader, Compression, Digest, DiskEntry, DomainFolder, Manifest, Phase, Repository, Watcher, stopped,
};

pub use self::disks::restore_disks;
pub use self::into::{IntoRequest, RestoredInto, restore_into};
pub use self::point::{Form, PointRequest, RestoredPoint, restore_point};

/// Where a disk is restored to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A new qcow2 image that stands alone. What is zero is not in it.
    Qcow2 {
        /// Its path; nothing may be there.
        path: PathBuf,
        /// How its data is stored.
        compression: Compression,
    },
    /// A new raw image.
    Raw {
        /// Its path; nothing may be there.
        path: PathBuf,
        /// Zeroes become holes; else all of its room is taken at once.
        sparse: bool,
    },
    /// A block device, which is overwritten.
    Device {
        /// Its path.
        path: PathBuf,
    },
    /// An NBD export, which is overwritten.
    Nbd {
        /// Its URI (the NBD project's `doc/uri.md`).
        uri: String,
        /// The directory of the credentials for TLS, laid out as QEMU's `tls-creds-x509` wants it.
        tls: Option<PathBuf>,
    },
}

impl Target {
    /// Whether it is there before and is overwritten.
    #[must_use]
    pub fn is_overwritten(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Nbd { .. })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qcow2 { path, .. } | Self::Raw { path, .. } | Self::Device { path } => {
                write!(f, "{}", path.display())
            }
            Self::Nbd { uri, .. } => f.write_str(uri),
        }
    }
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Restored {
    /// The disk's size, in bytes.
    pub bytes: u64,
    /// How much of it is zero, as far as the backup holds it as that, in bytes.
    pub zero: u64,
    /// The digest of its content, which is that of the manifest; see [`content_digest`](crate::content_digest).
    pub digest: Digest,
    /// What the operator should know: that the target is larger than the disk.
    pub notes: Vec<String>,
}

/// A disk of a point that was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoredDisk {
    /// The disk.
    pub target: String,
    /// Where it is now, for people: a path, a URI, a domain.
    pub place: String,
    /// What was written.
    #[serde(flatten)]
    pub restored: Restored,
}

/// Writes a disk to a target. `disk` is what the manifest says of it, and `chain` reads it.
///
/// A device or an export is only overwritten where `overwrite` says so; a file never is.
///
/// # Errors
/// - `AlreadyExists`: the target is there, and is as it was.
/// - `NotFound`: a new file would be made among the devices, in `/dev`.
/// - `NoSpace`: no room for a new file, under whose name there is nothing; a device or export that is smaller than the disk, and as it
///   was.
/// - `Busy`: a device that is mounted, part of a volume, or open in a hypervisor.
/// - `Broken`: what is in the repository is not what was saved, by its digests.
/// - `Unavailable`: stopped by the watcher; an NBD server that went away.
///
/// Once a device or an export has been written to, an error says that it is unfinished, and its effect is
/// [`Effect::Unknown`]. To restore again overwrites all of it.
pub async fn restore_disk(
    chain: ChainReader,
    disk: &DiskEntry,
    target: &Target,
    overwrite: bool,
    watcher: &dyn Watcher,
) -> Result<Restored> {
    let size = check_size(&chain, disk)?;
    let sink = open(target, size, overwrite)
        .await
        .map_err(|e| of_disk(e, disk))?;
    let task = Task {
        disk,
        target: &target.to_string(),
        overwritten: target.is_overwritten(),
        watcher,
    };
    task.run(chain, sink).await
}

fn check_size(chain: &ChainReader, disk: &DiskEntry) -> Result<u64> {
    if chain.size() == disk.size {
        return Ok(disk.size);
    }
    let why = format!(
        "its image has {} bytes, the manifest says {}",
        chain.size(),
        disk.size
    );
    Err(of_disk(Error::new(ErrorKind::Broken, why), disk))
}

/// What a point's manifest says now that its domain is locked: since it was looked up, a merge or a prune may have given it other
/// images, or dropped it.
async fn as_locked(repository: &Repository, folder: &DomainFolder, point: &Manifest) -> Result<Manifest> {
    let now = repository.manifest(folder, &point.point).await;
    now.map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::NotFound, "the point was dropped meanwhile")
            .hint("Nothing was written. `disksnap backup list` tells the points that are left."),
        _ => e,
    })
}

/// Gets a target ready for a disk of `size` bytes. Nothing is written to it yet.
async fn open(target: &Target, size: u64, overwrite: bool) -> Result<Box<dyn Sink>> {
    if target.is_overwritten() && !overwrite {
        let why = format!("what is on {target} would be overwritten");
        return Err(Error::new(ErrorKind::AlreadyExists, why)
            .hint("Nothing was written. Ask for it to be overwritten if nothing on it is needed any more."));
    }
    if let Target::Qcow2 { path, .. } | Target::Raw { path, .. } = target {
        must_not_be_a_device(path)?;
    }
    Ok(match target.clone() {
        Target::Qcow2 { path, compression } => Box::new(Qcow2File::create(&path, size, compression).await?),
        Target::Raw { path, sparse } => {
            let file = tokio::task::spawn_blocking(move || RawFile::create(&path, size, sparse));
            Box::new(Worker::start(joined(file.await)??))
        }
        Target::Device { path } => {
            let device = tokio::task::spawn_blocking(move || Device::open(&path, size));
            Box::new(Worker::start(joined(device.await)??))
        }
        Target::Nbd { uri, tls } => Box::new(Export::open(&uri, tls.as_deref(), size, Rest::Kept).await?),
    })
}

/// What takes the pieces of a disk in order.
#[async_trait]
trait Sink: Send {
    /// Takes the next piece. It may be on its way only, when this returns.
    async fn write(&mut self, piece: Piece) -> Result<()>;

    /// Puts it all on stable storage, and gives a new file its name; what the operator should know.
    async fn finish(&mut self) -> Result<Vec<String>>;

    /// Ends it after a failure: nothing is written any more on return, and nothing is left of a new file.
    async fn abandon(&mut self);
}

/// One disk on its way.
struct Task<'a> {
    disk: &'a DiskEntry,
    target: &'a str,
    overwritten: bool,
    watcher: &'a dyn Watcher,
}

impl Task<'_> {
    async fn run(&self, chain: ChainReader, mut sink: Box<dyn Sink>) -> Result<Restored> {
        let mut begun = false;
        match self.copy(chain, &mut *sink, &mut begun).await {
            Ok(restored) => Ok(restored),
            Err(error) => {
                sink.abandon().await;
                let error = if self.overwritten && begun {
                    unfinished(self.target, error)
                } else {
                    error
                };
                Err(of_disk(error, self.disk))
            }
        }
    }

    async fn copy(&self, mut chain: ChainReader, sink: &mut dyn Sink, begun: &mut bool) -> Result<Restored> {
        let (disk, total) = (self.disk.target.as_str(), self.disk.size);
        let progress = Progress::begin(self.watcher, Phase::Restore, disk, total);
        let mut content = Content::new(total);
        let (mut done, mut zero) = (0, 0);
        loop {
            stopped(self.watcher)?;
            let Some(piece) = chain.next().await? else {
                break;
            };
            done += piece.length();
            if let Piece::Zero { length, .. } = &piece {
                zero += length;
            }
            let (added, piece) = hashed(content, piece).await?;
            content = added;
            *begun = true;
            sink.write(piece).await?;
            progress.at(done, done - zero);
        }
        let digest = content.finish()?;
        self.check(digest)?;
        let notes = sink.finish().await?;
        progress.end();
        Ok(Restored {
            bytes: total,
            zero,
            digest,
            notes,
        })
    }

    /// Compares before a new file gets its name.
    fn check(&self, digest: Digest) -> Result<()> {
        if digest == self.disk.content {
            return Ok(());
        }
        let why = format!(
            "the content's digest is {digest}, the manifest says {}",
            self.disk.content
        );
        Err(Error::new(ErrorKind::Broken, why)
            .hint("Verify the repository: `disksnap backup verify`. Restore another point in time."))
    }
}

async fn hashed(mut content: Content, piece: Piece) -> Result<(Content, Piece)> {
    let work = tokio::task::spawn_blocking(move || content.add(&piece).map(|()| (content, piece)));
    joined(work.await)?
}

/// What a failure left of a target that was being overwritten.
fn unfinished(target: &str, error: Error) -> Error {
    let why =
        format!("{target} is unfinished: part of it is the restored disk, part is what was there before");
    Error::new(error.kind(), why)
        .retryable(error.is_retryable())
        .leaving(Effect::Unknown)
        .hint("Do not use it. Restore again, which overwrites all of it.")
        .because(error)
}

fn of_disk(error: Error, disk: &DiskEntry) -> Error {
    error.during("restore").with("disk", &disk.target)
}

/// Names the disks that were complete before it failed.
fn with_complete(error: Error, disks: &[RestoredDisk]) -> Error {
    if disks.is_empty() {
        return error;
    }
    let places: Vec<String> = disks
        .iter()
        .map(|done| format!("{} in {}", done.target, done.place))
        .collect();
    error.with("complete", places.join(", "))
}

fn too_small(target: &dyn fmt::Display, length: u64, size: u64) -> Error {
    let why = format!("{target} has {length} bytes, and the disk has {size}");
    Error::new(ErrorKind::NoSpace, why).hint("Nothing was written. Make it as large as the disk.")
}
