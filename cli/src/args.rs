//! What can be said on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use disksnap::{
    CheckpointName, ClientName, DiskChoice, Listen, MergeInto, NewCheckpoint, Quiesce, SnapshotName,
};

use crate::backup::args::BackupCommand;
use crate::checkpoint_args::CheckpointCommand;
use crate::fill::FillCommand;
use crate::values::{
    parse_checkpoint, parse_disk, parse_name, parse_new_checkpoint, parse_option, parse_seconds, parse_size,
};

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  internal, io: a defect, or a system call that failed
   2  invalid: the request, the document or the command line is wrong
   3  not-found           4  already-exists      5  unsupported
   6  busy                7  denied              8  unavailable
   9  timeout            10  no-space           11  broken
  12  protocol           13  refused
 130, 143  stopped by SIGINT, SIGTERM, in an orderly way
 141  standard output was closed early";

const DISK_HELP: &str = "\
A disk by its target, and how to snapshot it: TARGET[,method=METHOD][,KEY=VALUE]…

May be given several times. Without --disk and --xml all disks are meant but CD-ROMs, floppies, \
read-only and shareable disks and empty drives. The method is the one given here, else the disk's \
own <diskSnapshot>, else the default for the disk. KEY is one of the method's options: see \
`disksnap methods METHOD`. A comma in a value is written twice: \
--disk vda,fleece.file=/srv/a,,b.raw";

/// Snapshots of the disks of virtual machines.
///
/// Takes a consistent snapshot of the disks of a domain, each disk by its own method, serves it over
/// NBD, reads it, and deletes it.
#[derive(Debug, Parser)]
#[command(name = "disksnap", version, after_help = EXIT_CODES, max_term_width = 100)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    propagate_version = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every subcommand takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The domain: the path of its XML, or the name or UUID of one made known with `domain define`
    ///
    /// A path holds a '/', or ends in .xml, or is a file in the current directory.
    #[arg(short, long, global = true, value_name = "DOMAIN", value_hint = ValueHint::FilePath)]
    pub(crate) domain: Option<String>,
    /// Where disksnap keeps its records, its images and its sockets
    ///
    /// Else `/var/lib/disksnap` for root, and `$XDG_STATE_HOME/disksnap` or `~/.local/state/disksnap` for others.
    #[arg(long, global = true, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,
    /// The socket of the domain's QMP monitor, in place of the one in its XML
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) monitor: Option<PathBuf>,
    /// The socket of the domain's guest agent, in place of the one in its XML
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) agent: Option<PathBuf>,
    /// The form of what is printed
    #[arg(long, global = true, value_name = "FORM", value_enum, default_value_t)]
    pub(crate) output: Form,
    /// Tell more of what is done, on standard error; twice for still more
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// No warnings and no progress
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Form {
    /// For people
    #[default]
    Text,
    /// For programs: the shapes are stable; errors are JSON too
    Json,
    /// The documents of docs/xml.md
    Xml,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the snapshot methods, or tell all about one
    Methods {
        /// The method to tell about
        method: Option<String>,
    },
    /// Make domains known by name, and show them
    #[command(subcommand)]
    Domain(DomainCommand),
    /// Tell per disk which method would be used, why, and what would happen; changes nothing
    Plan(Wanted),
    /// Say how a domain's disk is snapshotted, or let a raw disk's bitmaps outlive QEMU
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Take, list, show, merge, revert and delete snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// List, move, check and remove checkpoints
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// See and cancel merges that are under way
    #[command(subcommand)]
    Job(JobCommand),
    /// Serve snapshots over NBD
    #[command(subcommand)]
    Export(ExportCommand),
    /// Read a disk of a snapshot, or a part of it
    Read(Read),
    /// List the ranges of a disk that have changed between a checkpoint and a snapshot
    Changes(Changes),
    /// Give a disk of a snapshot to another domain's running guest, read-only, or print the <disk> for it
    Attach(Attach),
    /// Take a disk of a snapshot out of the guests that it was attached to
    Detach(Detach),
    /// Back up domains: full and incremental, verified, restored, merged and pruned
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Restore into a paused domain: serve its disks writable over NBD, and give them back to its guest
    #[command(subcommand)]
    Fill(FillCommand),
    /// Finish or undo what a killed run left behind; safe at any time
    Recover,
    /// Try a method's provider against the conformance suite
    Conform(Conform),
    /// Print a shell's completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// The directory; made if it does not exist
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DomainCommand {
    /// Make a domain known by its name and UUID, or replace what is known of it
    Define {
        /// The domain's XML; - for standard input
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Forget a domain; its XML and its disks are not touched
    Undefine {
        /// Its name or UUID
        #[arg(value_name = "DOMAIN")]
        known: String,
    },
    /// List the domains that are known
    List,
    /// Bring the domain's document up to date, where a snapshot, merge or revert has given it other disks
    Update {
        /// Write into it too which images the disks stand on, as the images' own headers say: they are trusted by this, so look first
        #[arg(long)]
        chain: bool,
    },
    /// Print the domain's XML as it is now, with its exports and snapshots in it
    Show,
}

/// What the suite is run on.
#[derive(Debug, Args)]
pub(crate) struct Conform {
    /// The method
    pub(crate) method: String,
    /// Only the cases whose name holds this, besides the control
    #[arg(long, value_name = "TEXT")]
    pub(crate) case: Option<String>,
    /// Only the places whose name holds this, such as "domain off" or "thin"
    #[arg(long, value_name = "TEXT")]
    pub(crate) place: Option<String>,
    /// lvm: the volume group to make small volumes in
    ///
    /// Their names begin with disksnap-conform-, and they are removed after each case. Nothing else may be made in the group
    /// meanwhile: the suite would take it for left over.
    #[arg(long, value_name = "VG")]
    pub(crate) volume_group: Option<String>,
    /// lvm: a thin pool of that group, for thin volumes too
    #[arg(long, value_name = "POOL", requires = "volume_group")]
    pub(crate) thin_pool: Option<String>,
}

/// Which disks, and by which methods.
#[derive(Debug, Args)]
pub(crate) struct Wanted {
    /// A <domainblocksnapshot> that says what to snapshot; - for standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) xml: Option<PathBuf>,
    /// A disk by its target, and how to snapshot it: TARGET[,method=METHOD][,KEY=VALUE]…
    #[arg(long = "disk", value_name = "DISK", long_help = DISK_HELP, value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskChoice>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot: all its disks at one instant, or none
    Create(Create),
    /// List the domain's snapshots, oldest first
    List,
    /// Show one snapshot
    Show {
        /// Its name
        #[arg(value_parser = parse_name)]
        name: SnapshotName,
    },
    /// Merge a snapshot that the domain's disk stands on; the disk keeps its content, and the guest goes on
    ///
    /// For methods that put an image of the snapshot below the disk (qemu-external-qcow2). A long merge shows how far it
    /// is; Ctrl-C cancels it, and the disk goes on as before. After a kill, the same command takes it up again.
    Merge(Merge),
    /// Put a snapshot's content back into its disks: what was written since is lost
    ///
    /// The domain must be off, unless the method says otherwise.
    Revert(Bring),
    /// Delete snapshots, with their exports and all that was made for them; the disks keep their content
    ///
    /// A snapshot that the domain's disk stands on is merged for it.
    Delete {
        /// Their names
        #[arg(value_parser = parse_name, required_unless_present = "all")]
        names: Vec<SnapshotName>,
        /// All snapshots of the domain
        #[arg(long, conflicts_with = "names")]
        all: bool,
        #[command(flatten)]
        document: Keep,
    },
}

/// Whether the domain's document follows its disks.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Keep {
    /// Leave the domain's document as it is, where its disks become others
    ///
    /// Else it is brought up to date, in its file or where it was defined. The new `<disk>` is printed in any case.
    #[arg(long)]
    pub(crate) keep_document: bool,
}

/// What is to be merged, and which way.
#[derive(Debug, Args)]
pub(crate) struct Merge {
    #[command(flatten)]
    pub(crate) bring: Bring,
    /// Which image goes into the other
    #[arg(long, value_enum, value_name = "IMAGE", default_value_t)]
    pub(crate) into: IntoImage,
}

/// Which image goes into the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum IntoImage {
    /// What was written since goes down into the snapshot's image, which is given up; cancelled, the snapshot is good for
    /// nothing but to be merged again
    #[default]
    Base,
    /// The snapshot's data goes up into the overlay: the disk needs the snapshot's image no longer, and the snapshot remains;
    /// cancelled, all is as before
    Overlay,
}

impl From<IntoImage> for MergeInto {
    fn from(into: IntoImage) -> Self {
        match into {
            IntoImage::Base => Self::Base,
            IntoImage::Overlay => Self::Overlay,
        }
    }
}

/// Which snapshot, and which of its disks.
#[derive(Debug, Args)]
pub(crate) struct Bring {
    /// The snapshot
    #[arg(value_parser = parse_name)]
    pub(crate) name: SnapshotName,
    /// A disk of it, by its target; may be given several times; all its disks if none is given
    #[arg(long = "disk", value_name = "TARGET")]
    pub(crate) disks: Vec<String>,
    /// How long a running guest's disk may stand still at the end of a merge, at most; 8 if nothing is said
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) deadline: Option<Duration>,
    #[command(flatten)]
    pub(crate) document: Keep,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// List the merges that are under way, of the domain or of all
    List,
    /// Show how far one is
    Show {
        /// Its id
        id: uuid::Uuid,
    },
    /// Cancel one: its disks go on as before; a snapshot that was merged into its base may be good for nothing but to be
    /// merged again
    Cancel {
        /// Its id
        id: uuid::Uuid,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Say in the domain's document by which method a disk is to be snapshotted
    ///
    /// Changes the disk's <diskSnapshot> where it is, or puts one in.
    SetMethod {
        /// The disk, by its target
        target: String,
        /// The method
        #[arg(required_unless_present = "none")]
        method: Option<String>,
        /// What the method is told: its options, see `disksnap methods METHOD`
        #[arg(value_name = "KEY=VALUE", value_parser = parse_option)]
        options: Vec<(String, String)>,
        /// No method of its own any more
        #[arg(long, conflicts_with_all = ["method", "options"])]
        none: bool,
    },
    /// Let the dirty bitmaps of a raw disk outlive QEMU: a new qcow2 keeps them, and the raw disk stays its data
    ///
    /// The disk keeps every byte, and goes on being the raw file or device that it was. From then on the domain uses
    /// the qcow2, also in its document: what is written to the raw disk past the qcow2 is in no bitmap. A running guest
    /// is paused for a moment.
    Track {
        /// The disk, by its target
        target: String,
        /// The qcow2 that is made; best beside the raw disk
        #[arg(long = "in", value_name = "PATH", value_hint = ValueHint::FilePath)]
        metadata: PathBuf,
        #[command(flatten)]
        document: Keep,
    },
    /// Take that qcow2 away again: the domain uses the raw disk itself, with all that is on it
    ///
    /// Its bitmaps end with the qcow2, and with them what checkpoints know of this disk.
    Untrack {
        /// The disk, by its target
        target: String,
        /// Give up what checkpoints know of the disk; its next backup is a full one
        #[arg(long)]
        drop_checkpoints: bool,
        #[command(flatten)]
        document: Keep,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) wanted: Wanted,
    /// The snapshot's name; a UUID if none is given
    #[arg(long, value_parser = parse_name)]
    pub(crate) name: Option<SnapshotName>,
    /// Whether the guest's file systems are frozen around the instant
    #[arg(long, value_enum, value_name = "WHETHER")]
    pub(crate) quiesce: Option<Freeze>,
    /// A file system to freeze, by its mount point in the guest; may be given several times; all if none is given
    #[arg(long = "freeze", value_name = "MOUNTPOINT", requires = "quiesce")]
    pub(crate) mountpoints: Vec<String>,
    /// How long the guest may stand still, at most; 8 if nothing is said
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) deadline: Option<Duration>,
    /// Begin a checkpoint at the instant, called as the snapshot is or so: later backups can ask what has changed since
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    #[arg(value_parser = parse_new_checkpoint)]
    pub(crate) checkpoint: Option<NewCheckpoint>,
    #[command(flatten)]
    pub(crate) document: Keep,
}

/// [`Quiesce`], as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Freeze {
    /// No: the snapshot is as after a power cut
    None,
    /// If the guest agent answers; the result says whether it did
    Try,
    /// Yes, or no snapshot is taken
    Require,
}

impl From<Freeze> for Quiesce {
    fn from(freeze: Freeze) -> Self {
        match freeze {
            Freeze::None => Self::None,
            Freeze::Try => Self::Try,
            Freeze::Require => Self::Require,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// Serve disks of snapshots; the first export starts the domain's NBD server
    Start(ExportStart),
    /// List what is served
    List,
    /// Stop serving; the last export stops the server
    Stop {
        /// What to stop: an export's alias, or a snapshot's name for all its exports
        #[arg(value_name = "ALIAS|NAME", required_unless_present = "all")]
        which: Vec<String>,
        /// All exports of the domain
        #[arg(long, conflicts_with = "which")]
        all: bool,
    },
    /// Start or stop the NBD server by itself
    #[command(subcommand)]
    Server(ServerCommand),
}

#[derive(Debug, Args)]
pub(crate) struct ExportStart {
    /// The snapshot
    #[arg(value_parser = parse_name, required_unless_present = "xml")]
    pub(crate) name: Option<SnapshotName>,
    /// A <blockexport> that says what to serve and where; - for standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(conflicts_with_all = ["name", "disks", "listen", "tls_credentials"])]
    pub(crate) xml: Option<PathBuf>,
    /// A disk of the snapshot, by its target; may be given several times; all disks if none is given
    #[arg(long = "disk", value_name = "TARGET")]
    pub(crate) disks: Vec<String>,
    /// Tell beside the data what has changed since this checkpoint, as the meta context qemu:dirty-bitmap:NAME
    #[arg(long, value_name = "NAME", value_parser = parse_checkpoint, conflicts_with = "xml")]
    pub(crate) checkpoint: Option<CheckpointName>,
    #[command(flatten)]
    pub(crate) place: Place,
}

/// Where an NBD server listens, and to whom.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Where to listen: ADDRESS:PORT or unix:PATH; a socket in the state directory if nothing is said
    #[arg(long, value_name = "WHERE")]
    pub(crate) listen: Option<Listen>,
    /// Speak TLS, with the ca-cert.pem, server-cert.pem and server-key.pem of this directory
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath)]
    pub(crate) tls_credentials: Option<PathBuf>,
    /// Let in no other client than this one, by its certificate's distinguished name, for example CN=backup,O=Example; may
    /// be given several times
    #[arg(
        long,
        value_name = "NAME",
        requires = "tls_credentials",
        conflicts_with = "no_verify_client"
    )]
    pub(crate) allow_client: Vec<ClientName>,
    /// Do not ask clients for a certificate
    #[arg(long, requires = "tls_credentials")]
    pub(crate) no_verify_client: bool,
    /// Listen where other hosts can connect although clients are not verified
    #[arg(long)]
    pub(crate) allow_remote: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Start the NBD server; it then stays when the last export stops
    Start(ServerStart),
    /// Stop the NBD server
    Stop {
        #[command(flatten)]
        which: WhichServer,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ServerStart {
    #[command(flatten)]
    pub(crate) which: WhichServer,
    #[command(flatten)]
    pub(crate) place: Place,
}

/// Which of a domain's two servers.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WhichServer {
    /// The server for snapshots that lie on this host (btrfs, reflink, …), not the hypervisor's; needs no running domain
    #[arg(long)]
    pub(crate) images: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// The checkpoint
    #[arg(long, value_name = "CHECKPOINT", value_parser = parse_checkpoint)]
    pub(crate) from: CheckpointName,
    /// The snapshot; the latest if none is named
    #[arg(long, value_name = "SNAPSHOT", value_parser = parse_name)]
    pub(crate) to: Option<SnapshotName>,
    /// A disk, by its target; may be given several times; all that both have if none is given
    #[arg(long = "disk", value_name = "TARGET")]
    pub(crate) disks: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Read {
    /// The snapshot
    #[arg(value_parser = parse_name)]
    pub(crate) name: SnapshotName,
    /// The disk, by its target
    pub(crate) target: String,
    /// Where to begin, in bytes; K, M, G and T stand for their powers of 1024
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "0")]
    pub(crate) offset: u64,
    /// How much to read; to the end of the disk if nothing is said
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub(crate) length: Option<u64>,
    /// A new file for it, mode 0600, in which zeroes take no room; else standard output
    ///
    /// Never overwrites: the file appears under its name when it is complete and on disk, or not at all.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) to: Option<PathBuf>,
    /// Only what has changed since this checkpoint, to a new file (--to) or onto an earlier copy (--onto)
    ///
    /// Prints the ranges that were written, as `disksnap changes` does. In a new file the rest is holes: what changed to
    /// zero is told from what did not change by these ranges alone.
    #[arg(long, value_name = "CHECKPOINT", value_parser = parse_checkpoint)]
    pub(crate) changed_since: Option<CheckpointName>,
    /// A raw file that holds the disk as it was at the checkpoint: it is brought up to date in place
    ///
    /// What changed is written, zeroes become holes, its size follows the disk's. A run that is cut short leaves it between
    /// the two states; repeating is safe, and completes it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "changed_since", conflicts_with = "to")]
    pub(crate) onto: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The snapshot
    #[arg(value_parser = parse_name)]
    pub(crate) name: SnapshotName,
    /// The disk, by its target
    pub(crate) target: String,
    /// The domain to attach it to: the path of its XML, or its name or UUID
    #[arg(long, value_name = "DOMAIN", value_hint = ValueHint::FilePath, required_unless_present = "print")]
    pub(crate) to: Option<String>,
    /// Where the NBD server speaks TLS: the ca-cert.pem, client-cert.pem and client-key.pem of that domain's hypervisor;
    /// the server's directory if nothing is said
    #[arg(long, value_name = "DIRECTORY", value_hint = ValueHint::DirPath, conflicts_with = "print")]
    pub(crate) tls_credentials: Option<PathBuf>,
    /// The name in the server's certificate, where it is not the address
    #[arg(long, value_name = "NAME", requires = "tls_credentials")]
    pub(crate) tls_hostname: Option<String>,
    /// Print the <disk> for that domain's XML, and do nothing
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Detach {
    /// The snapshot
    #[arg(value_parser = parse_name)]
    pub(crate) name: SnapshotName,
    /// The disk, by its target
    pub(crate) target: String,
    /// Only from this domain: the path of its XML, or its name or UUID
    #[arg(long, value_name = "DOMAIN", value_hint = ValueHint::FilePath)]
    pub(crate) from: Option<String>,
    /// How long a guest may take to let it go; 30 if nothing is said
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) wait: Option<Duration>,
}
