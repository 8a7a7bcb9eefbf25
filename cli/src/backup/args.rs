//! What can be said of backups on the command line.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use disksnap::{CheckpointName, DiskChoice, SnapshotName};
use disksnap_backup::{Compression, PointSpec, RemoteExport, WantedLevel};

use crate::args::Freeze;
use crate::values::{parse_checkpoint, parse_disk, parse_name, parse_seconds, parse_size};

/// The level that zstd has by default.
const ZSTD: i32 = 3;

/// Every subcommand's repository.
#[derive(Debug, Clone, Args)]
pub(crate) struct Repo {
    /// The repository: a directory
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, env = "DISKSNAP_REPO")]
    pub(crate) repo: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// Back up a domain: a snapshot, pulled into the repository as a full image or an increment per disk
    ///
    /// The snapshot is deleted when all is in the repository, and only then does the next backup begin at this one. Where it is
    /// interrupted, by whatever, the same command goes on with the same snapshot; where that is not good any more, it begins
    /// anew from the point before. The repository is made if it does not exist.
    Create(Create),
    /// Back up a snapshot that another host serves over NBD
    ///
    /// -d is the domain's XML. The snapshot and its checkpoints stay the other host's: delete and remove them there.
    Pull(Pull),
    /// List the domains and points of a repository
    List {
        #[command(flatten)]
        repo: Repo,
    },
    /// Show a point: its chain, sizes, and what changed
    Show {
        #[command(flatten)]
        repo: Repo,
        #[command(flatten)]
        point: Point,
    },
    /// Read points back, all of every image, and compare them with the digests that were taken of the snapshots
    Verify(Verify),
    /// Restore a point: as new images, onto devices or NBD exports, as a whole machine, or into a paused domain
    ///
    /// All that is written has been compared with the digests that were taken of the snapshot. A new file appears under its name
    /// when it is complete and on the disk, or not at all.
    Restore(super::restore::Restore),
    /// Make a point stand alone, or drop some, by merging what later points need into them
    ///
    /// Every point that is left keeps its content; the last point of each disk is left in any case. Killed at any moment, every one of them can be restored.
    Merge(Merge),
    /// Drop the points that no rule keeps, merging what later ones need into them
    ///
    /// A rule keeps the last point of each of its periods (UTC); a point is kept that any rule keeps, and the last one always.
    Prune(Prune),
    /// Serve the disks of a point over NBD, read-only, until Ctrl-C
    ///
    /// For libguestfs, nbdfuse, qemu-img or another machine: the disks are there at once, whatever their size. What is in the
    /// images is not compared with its digests: `disksnap backup verify` does that. No backup, merge or prune of the domain
    /// can run meanwhile.
    Serve(super::serve::Serve),
    /// Give up what an interrupted backup has left: its snapshot, its checkpoint, and what was pulled
    Abandon {
        #[command(flatten)]
        repo: Repo,
    },
}

/// Which point.
#[derive(Debug, Clone, Args)]
pub(crate) struct Point {
    /// The point: its name or the beginning of it, `latest`, or an instant such as 2026-11-22T02:15, which means the last one
    /// before
    #[arg(default_value = "latest", value_parser = parse_point)]
    pub(crate) point: PointSpec,
}

/// [`WantedLevel`], as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LevelArg {
    /// An increment of the disks of which it is known what has changed, and all of the others
    #[default]
    Auto,
    /// All of every disk
    Full,
    /// An increment of every disk, or no backup
    Incremental,
}

impl From<LevelArg> for WantedLevel {
    fn from(level: LevelArg) -> Self {
        match level {
            LevelArg::Auto => Self::Auto,
            LevelArg::Full => Self::Full,
            LevelArg::Incremental => Self::Incremental,
        }
    }
}

/// How what is pulled is stored, and how fast.
#[derive(Debug, Clone, Args)]
pub(crate) struct Pulling {
    /// Which level
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t)]
    pub(crate) level: LevelArg,
    /// Compress the images' clusters: zstd, or zstd:LEVEL with 1 to 19
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "zstd")]
    #[arg(value_parser = parse_compression)]
    pub(crate) compress: Option<Compression>,
    /// Pull no more than so many bytes in a second; K, M, G stand for their powers of 1024
    #[arg(long, value_name = "BYTES", value_parser = parse_rate)]
    pub(crate) rate_limit: Option<u64>,
    /// Make a new repository also in an empty directory that is there already
    #[arg(long)]
    pub(crate) init: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) repo: Repo,
    /// A disk by its target, and how to snapshot it, as for `snapshot create`; may be given several times
    #[arg(long = "disk", value_name = "DISK", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskChoice>,
    /// Whether the guest's file systems are frozen around the instant
    #[arg(long, value_enum, value_name = "WHETHER")]
    pub(crate) quiesce: Option<Freeze>,
    /// A file system to freeze, by its mount point in the guest; may be given several times; all if none is given
    #[arg(long = "freeze", value_name = "MOUNTPOINT", requires = "quiesce")]
    pub(crate) mountpoints: Vec<String>,
    /// How long the guest may stand still, at most; 8 if nothing is said
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) deadline: Option<Duration>,
    #[command(flatten)]
    pub(crate) pulling: Pulling,
    /// Do not go on with what an interrupted backup had begun: give it up
    #[arg(long)]
    pub(crate) no_resume: bool,
    /// Back up although EFI variables or TPM state that the domain has cannot be read
    #[arg(long)]
    pub(crate) allow_missing: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    #[command(flatten)]
    pub(crate) repo: Repo,
    /// A disk, and the export that serves it: TARGET=URI[,bitmap=NAME]; may be given several times
    ///
    /// NAME is the dirty bitmap in it that tells what has changed, where that is not called as --since says.
    #[arg(long = "disk", value_name = "TARGET=URI", required = true, value_parser = parse_export)]
    pub(crate) exports: Vec<RemoteExport>,
    /// The snapshot's name there
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub(crate) snapshot: SnapshotName,
    /// Its instant, such as 2026-11-22T02:15:00Z; now if nothing is said
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub(crate) taken: Option<SystemTime>,
    /// The checkpoint that began with it: the next increment can be since there
    #[arg(long, value_name = "NAME", value_parser = parse_checkpoint)]
    pub(crate) checkpoint: Option<CheckpointName>,
    /// The checkpoint that the exports tell the changes since
    #[arg(long, value_name = "NAME", value_parser = parse_checkpoint)]
    pub(crate) since: Option<CheckpointName>,
    /// The ca-cert.pem, and client-cert.pem and client-key.pem, for servers that speak TLS
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub(crate) tls_credentials: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) pulling: Pulling,
    /// Go on with what an interrupted pull had begun: the very same snapshot is served
    #[arg(long, requires = "taken")]
    pub(crate) resume: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) repo: Repo,
    /// The points; all of the domain if none is named
    #[arg(value_parser = parse_point)]
    pub(crate) points: Vec<PointSpec>,
    /// A disk, by its target; may be given several times; all if none is given
    #[arg(long = "disk", value_name = "TARGET")]
    pub(crate) disks: Vec<String>,
    /// Read no data: only whether all that is needed is there and belongs together
    #[arg(long)]
    pub(crate) quick: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Merge {
    #[command(flatten)]
    pub(crate) repo: Repo,
    /// The point that is to stand alone: the points before it are merged into it, and are gone
    ///
    /// One that is the last of a disk which the point does not have stays.
    #[arg(value_parser = parse_point, required_unless_present = "drop")]
    pub(crate) point: Option<PointSpec>,
    /// Drop these points and no others; what later points need of them is merged into the next
    #[arg(long, value_name = "POINT", value_parser = parse_point, conflicts_with = "point", num_args = 1..)]
    pub(crate) drop: Vec<PointSpec>,
    /// Drop them even where one is the last point of a disk: nothing of that disk is left then but what earlier points have
    #[arg(long, requires = "drop")]
    pub(crate) even_last: bool,
    /// Only tell what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    #[command(flatten)]
    pub(crate) repo: Repo,
    /// Keep the last N points
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_last: u32,
    /// Keep the last point of each of the last N hours that have one
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_hourly: u32,
    /// … of each of the last N days
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_daily: u32,
    /// … of each of the last N weeks, which begin on Monday
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_weekly: u32,
    /// … of each of the last N months
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_monthly: u32,
    /// … of each of the last N years
    #[arg(long, value_name = "N", default_value_t, hide_default_value = true)]
    pub(crate) keep_yearly: u32,
    /// Only tell what would be kept and dropped
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What leads to a point.
pub(crate) fn parse_point(text: &str) -> Result<PointSpec, String> {
    text.parse()
        .map_err(|error: disksnap::Error| error.message().to_owned())
}

pub(crate) fn parse_compression(text: &str) -> Result<Compression, String> {
    let level = match text.split_once(':') {
        None if text == "zstd" => Some(ZSTD),
        Some(("zstd", level)) => level.parse().ok().filter(|level| (1..=19).contains(level)),
        _ => None,
    };
    level
        .map(Compression::Zstd)
        .ok_or_else(|| "expected zstd, or zstd:LEVEL with 1 to 19".to_owned())
}

fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("expected more than 0".to_owned()),
        rate => Ok(rate),
    }
}

fn parse_instant(text: &str) -> Result<SystemTime, String> {
    humantime::parse_rfc3339_weak(text)
        .map_err(|_| "expected an instant such as 2026-11-22T02:15:00Z".to_owned())
}

/// `TARGET=URI[,bitmap=NAME]`; a bitmap's name has no comma.
fn parse_export(text: &str) -> Result<RemoteExport, String> {
    let (rest, bitmap) = match text.rsplit_once(",bitmap=") {
        Some((rest, bitmap)) => (rest, Some(bitmap.to_owned())),
        None => (text, None),
    };
    match rest.split_once('=') {
        Some((target, uri)) if !target.is_empty() && uri.contains("://") => Ok(RemoteExport {
            target: target.to_owned(),
            uri: uri.to_owned(),
            bitmap,
        }),
        _ => Err("expected TARGET=URI, such as vda=nbds://host/virtio-disk0-backup".to_owned()),
    }
}
