//! What core and its providers need of the place where a domain runs. Another crate implements it.
//!
//! [`Host`] is what a provider sees; [`Control`] is what the dispatcher needs besides: the guest's
//! run state, its file systems, the guard over both, and the NBD server.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Disk, Domain, Hotplug, ImageServer, Lend, NbdServer, Result};

/// A command for the hypervisor's monitor, as its protocol spells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The name of the command (`blockdev-add`).
    pub execute: String,
    /// Its arguments, an object; null for none.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub arguments: Value,
}

impl Command {
    /// A command with arguments.
    pub fn new(execute: impl Into<String>, arguments: Value) -> Self {
        Self {
            execute: execute.into(),
            arguments,
        }
    }

    /// A command without arguments.
    pub fn bare(execute: impl Into<String>) -> Self {
        Self::new(execute, Value::Null)
    }
}

/// Whether the domain runs, as far as a snapshot is concerned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// No hypervisor process answers for it.
    Off,
    /// The guest executes.
    Running,
    /// A hypervisor process holds the disks but the guest stands still: paused by the user, not yet
    /// started, stopped by an I/O error, … in the hypervisor's own word.
    Stopped(String),
    /// It is arriving or leaving, in the hypervisor's own word.
    Migrating(String),
    /// A storage daemon: it holds the disks, and has no guest to pause or freeze.
    Storage,
}

impl RunState {
    /// Whether a hypervisor process holds the disks.
    #[must_use]
    pub fn is_active(&self) -> bool {
        *self != Self::Off
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Running => f.write_str("running"),
            Self::Stopped(word) => write!(f, "stopped ({word})"),
            Self::Migrating(word) => write!(f, "migrating ({word})"),
            Self::Storage => f.write_str("storage daemon"),
        }
    }
}

/// The user and group that the hypervisor's process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Numeric user id.
    pub uid: u32,
    /// Numeric group id.
    pub gid: u32,
}

/// The place where one domain runs, as a provider sees it.
///
/// The wrapper guarantees that the domain is locked against other disksnap processes while a
/// provider works; a provider must not keep a reference beyond the call.
#[async_trait]
pub trait Host: fmt::Debug + Send + Sync {
    /// The domain.
    fn domain(&self) -> &Domain;

    /// Whether it runs. Asked anew at each call.
    async fn state(&self) -> Result<RunState>;

    /// Sends one command to the hypervisor's monitor and returns what it answers.
    ///
    /// # Errors
    /// `Unavailable` when no monitor answers, `Denied` when it may not be reached, `Timeout` when it
    /// is silent, `Protocol` when it speaks nonsense; `Unsupported` for a command that it does not
    /// know, and `Refused` with the monitor's own words when it refuses one.
    async fn monitor(&self, command: Command) -> Result<Value>;

    /// Sends commands back to back without waiting for each answer, and returns what each answered.
    ///
    /// A command that is refused does not keep the later ones from being executed. The outer error
    /// is the connection's.
    async fn monitor_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>>;

    /// The directory, private to disksnap, for images that the caller named no place for.
    fn image_dir(&self) -> &Path;

    /// Whose files the hypervisor can open, or `None` where it runs as we do (or nothing runs).
    async fn image_owner(&self) -> Result<Option<Owner>>;
}

/// What the guard must undo if this process dies, hangs or outlives the deadline.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Watch {
    /// What lets a disk go that a merge is holding still; sent first, each once, and a refusal counts as done.
    pub release: Vec<Command>,
    /// The guest is going to be paused, and was running.
    pub resume: bool,
    /// The guest's file systems are going to be frozen.
    pub thaw: bool,
    /// How long the window may stay open.
    pub deadline: Duration,
}

/// What a guard says when it is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It had nothing to do.
    Quiet,
    /// It has thawed or resumed the guest: what was done in the window is not one instant.
    Fired,
}

/// A guardian outside this process; dropping it without [`Guard::disarm`] makes it act.
#[async_trait]
pub trait Guard: fmt::Debug + Send {
    /// Lets the guardian go after the guest runs again.
    async fn disarm(self: Box<Self>) -> Result<Verdict>;
}

/// What a freeze reached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Freeze {
    /// How many file systems are frozen.
    pub filesystems: u64,
    /// Where the guest has them mounted; empty where its agent does not tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mountpoints: Vec<String>,
}

/// A node of the hypervisor's block graph, to be served read-only over NBD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeNode {
    /// Unique within the domain; what [`Control::unserve`] takes.
    pub id: String,
    /// The node's name.
    pub node: String,
    /// The export name that NBD clients ask for.
    pub name: String,
    /// The dirty bitmap that clients can ask for, as the meta context `qemu:dirty-bitmap:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<NodeBitmap>,
}

/// A dirty bitmap on a node of the block graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeBitmap {
    /// The node's name.
    pub node: String,
    /// The bitmap's.
    pub name: String,
}

/// A disk's topmost node in the hypervisor's block graph, through which the guest writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNode {
    /// The disk's target.
    pub target: String,
    /// The node's name.
    pub node: String,
}

/// The place where one domain runs, as the dispatcher sees it.
#[async_trait]
pub trait Control: Host {
    /// Arms a guardian in a process of its own. Must come before [`Control::freeze`] and [`Control::pause`].
    async fn guard(&self, watch: Watch) -> Result<Box<dyn Guard>>;

    /// Freezes the guest's file systems through its agent: those with these mount points, or all when none is named.
    ///
    /// `NotFound` for a mount point that the guest does not have.
    ///
    /// On an error the file systems are thawed, also those that a late agent freezes afterwards,
    /// unless the error's effect says otherwise.
    async fn freeze(&self, mountpoints: &[String], deadline: Duration) -> Result<Freeze>;

    /// Thaws until the agent says that all is thawed. Idempotent.
    async fn thaw(&self) -> Result<()>;

    /// Pauses the guest; all its requests are drained and flushed on return.
    async fn pause(&self) -> Result<()>;

    /// Lets a paused guest run. Idempotent.
    async fn resume(&self) -> Result<()>;

    /// Lets the guest go that a window of a dead process left standing still, where that window's guardian died too.
    /// Called first of all by whoever settles what a process has left, with the domain locked. What somebody else has
    /// paused is left alone: only what was written down when a guardian was armed is undone. Idempotent.
    ///
    /// # Errors
    /// `Timeout` when the guest's agent is silent: it stays written down.
    async fn let_go(&self) -> Result<()>;

    /// Returns once the hypervisor is at nothing any more that a process which has died told it last. Called before
    /// whoever takes up what that process drove asks anything else.
    async fn come_to_rest(&self) -> Result<()>;

    /// What [`Control::flush`] is to be given for these disks; those that the guest cannot write to are left out.
    ///
    /// A question of its own, to be asked before the window: the answer takes longer than the flush.
    async fn flush_nodes(&self, disks: &[&Disk]) -> Result<Vec<DiskNode>>;

    /// Makes sure that all that the guest wrote is in its images; called while the guest stands still.
    ///
    /// [`Control::pause`] flushes too, and a hypervisor may hide that it failed. Without this, what is taken below
    /// the hypervisor could lack writes that the guest was told are done.
    ///
    /// # Errors
    /// `Io`, naming the disk, when a disk cannot be flushed.
    async fn flush(&self, nodes: &[DiskNode]) -> Result<()>;

    /// Tells one run of the hypervisor from the next; `None` when it is off or cannot be told.
    async fn instance(&self) -> Result<Option<String>>;

    /// The unix socket that the domain's exports listen on when nobody says otherwise.
    fn default_socket(&self) -> PathBuf;

    /// Starts the domain's NBD server; there is at most one.
    async fn start_server(&self, server: &NbdServer) -> Result<()>;

    /// Stops it, and with it all its exports. Idempotent.
    async fn stop_server(&self) -> Result<()>;

    /// Serves a node read-only on the running server.
    async fn serve(&self, node: &ServeNode) -> Result<()>;

    /// Stops serving, disconnecting clients; returns once the node is free. Idempotent.
    async fn unserve(&self, id: &str) -> Result<()>;

    /// The ids that are being served now, from the hypervisor itself.
    async fn served(&self) -> Result<Vec<String>>;

    /// What plugs disks into this domain's guest; `None` where nothing can.
    fn hotplug(&self) -> Option<&dyn Hotplug>;

    /// What lends the disks of this domain's guest to whoever fills them; `None` where nothing can.
    fn lends(&self) -> Option<&dyn Lend>;
}

/// Finds the place where a domain runs.
#[async_trait]
pub trait Connector: fmt::Debug + Send + Sync {
    /// A control for this domain. Does not fail because the domain is off.
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>>;

    /// What serves images on this host; `None` where nothing does.
    fn image_server(&self) -> Option<&dyn ImageServer>;
}
