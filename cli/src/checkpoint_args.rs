//! What can be said of checkpoints on the command line.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use disksnap::CheckpointName;
use disksnap::checkpoint_set::ovirt::Table;
use uuid::Uuid;

use crate::values::{parse_checkpoint, parse_disk_id};

const LIST_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint list -d web1
  disksnap checkpoint list -d web1 --tree
  disksnap checkpoint list -d web1 --topological --output json";

const DUMP_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint dump -d web1 > web1.checkpoints.xml
  disksnap checkpoint dump -d web1 --format json > web1.checkpoints.json
  disksnap checkpoint dump -d web1 --format ovirt-csv --table checkpoints > vm_checkpoints.csv
  disksnap checkpoint dump -d web1 --format ovirt-csv --table disks > vm_checkpoint_disk_map.csv";

const REDEFINE_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint redefine -d web1 web1.checkpoints.xml
  ssh host-a disksnap checkpoint dump -d web1 --format json | disksnap checkpoint redefine -d web1 -
  disksnap checkpoint redefine -d web1 --format ovirt-csv vm_checkpoints.csv \\
      --disk-map vm_checkpoint_disk_map.csv --disk-id vdb=8a7ad2ae-0b8e-4d5c-9d6c-63b5b4ad2a11";

const FORGET_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint forget -d web1 --all";

const VALIDATE_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint validate -d web1
  disksnap checkpoint validate -d web1 --output json";

const DROP_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint drop-broken -d web1";

const REMOVE_EXAMPLES: &str = "\
Examples:
  disksnap checkpoint remove -d web1 monday tuesday";

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// List the domain's checkpoints, oldest first
    #[command(after_help = LIST_EXAMPLES)]
    List {
        #[command(flatten)]
        order: Order,
    },
    /// Write the whole set down, for another host or another program
    ///
    /// All of it is in the JSON. libvirt's XML has no place for the ids of disks, for fractions of a second and for checkpoints
    /// that are kept snapshots, and oVirt's tables none for sizes.
    #[command(after_help = DUMP_EXAMPLES)]
    Dump(Dump),
    /// Make a whole set of checkpoints known, in one step: all of it or none
    ///
    /// In whatever order it comes. The disks and their bitmaps are not touched. What is known already must be in the set, unless
    /// --replace is said; said again, the same set changes nothing.
    #[command(after_help = REDEFINE_EXAMPLES)]
    Redefine(Redefine),
    /// Tell of each checkpoint and disk whether what has changed since can be told; changes nothing
    ///
    /// ok; missing, lost, inconsistent, not recording: what has changed since is not known; recording: more is told than has
    /// changed, and nothing less; unreachable: the disk cannot be looked at now. Where anything is wrong the exit code is that of broken.
    #[command(after_help = VALIDATE_EXAMPLES)]
    Validate,
    /// Drop what cannot be trusted, and nothing else: only those disks need a full backup next
    ///
    /// On each disk the marks that are missing, lost, inconsistent or not recording, and those before them, which nothing can be
    /// told since. Bitmaps that no checkpoint knows stay, unless --unknown is said.
    #[command(after_help = DROP_EXAMPLES)]
    DropBroken {
        /// Remove the bitmaps that no checkpoint knows, too: another program may have made them
        #[arg(long)]
        unknown: bool,
    },
    /// Remove checkpoints; what has changed since any other can still be told
    ///
    /// On each disk the checkpoint before takes over what the removed one knows, and goes on recording where that was the last.
    #[command(after_help = REMOVE_EXAMPLES)]
    Remove {
        /// Their names
        #[arg(value_parser = parse_checkpoint, required = true)]
        names: Vec<CheckpointName>,
    },
    /// Forget the domain's checkpoints; the bitmaps in its disks stay
    ///
    /// For a domain that has gone to another host with its disks.
    #[command(after_help = FORGET_EXAMPLES)]
    Forget {
        /// All of them
        #[arg(long, required = true)]
        all: bool,
    },
}

/// In which order.
#[derive(Debug, Clone, Copy, Args)]
#[group(multiple = false)]
pub(crate) struct Order {
    /// As a tree: what comes from one goes on below it, side lines are indented
    #[arg(long)]
    pub(crate) tree: bool,
    /// Parents before their children, whatever their clocks said
    #[arg(long)]
    pub(crate) topological: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Dump {
    /// The form of the set; if nothing is said json with --output json, else xml
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) format: Option<SetFormat>,
    /// Which of oVirt's tables, with ovirt-csv
    #[arg(long, value_name = "TABLE", value_enum, required_if_eq("format", "ovirt-csv"))]
    pub(crate) table: Option<WhichTable>,
    #[command(flatten)]
    pub(crate) disks: ToldIds,
}

#[derive(Debug, Args)]
pub(crate) struct Redefine {
    /// The set; - for standard input
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// The form of the set; if nothing is said xml or json, as it begins
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) format: Option<SetFormat>,
    /// oVirt's table `vm_checkpoint_disk_map`, with ovirt-csv
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_if_eq("format", "ovirt-csv"))]
    pub(crate) disk_map: Option<PathBuf>,
    /// Let the set take the place of what is known: what is not in it is forgotten
    #[arg(long)]
    pub(crate) replace: bool,
    /// Fail where any mark is not as it should be on the disks; nothing is made known then
    #[arg(long)]
    pub(crate) validate: bool,
    /// Leave out the disks that the domain does not have any more
    #[arg(long)]
    pub(crate) leave_out_missing_disks: bool,
    #[command(flatten)]
    pub(crate) disks: ToldIds,
}

/// Ids of disks that the domain's document does not tell.
#[derive(Debug, Args)]
pub(crate) struct ToldIds {
    /// A disk's id in oVirt, where neither its <serial> nor the path of its image tells; may be given several times
    #[arg(long = "disk-id", value_name = "TARGET=UUID", value_parser = parse_disk_id)]
    pub(crate) told: Vec<(String, Uuid)>,
}

/// The form of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SetFormat {
    /// <domaincheckpoints>: each <domaincheckpoint> in it as libvirt has it
    Xml,
    /// All there is to know, see docs/checkpoint-sets.md
    Json,
    /// oVirt's tables as one JSON object
    OvirtJson,
    /// oVirt's tables as CSV
    OvirtCsv,
}

/// [`Table`], as the command line spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WhichTable {
    /// `vm_checkpoints`
    Checkpoints,
    /// `vm_checkpoint_disk_map`
    Disks,
}

impl From<WhichTable> for Table {
    fn from(which: WhichTable) -> Self {
        match which {
            WhichTable::Checkpoints => Self::Checkpoints,
            WhichTable::Disks => Self::Disks,
        }
    }
}
