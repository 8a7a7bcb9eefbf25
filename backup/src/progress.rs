//! What long acts tell while they run, and how they are asked to stop.

use std::fmt;

use disksnap::{Error, ErrorKind, Result};
use serde::Serialize;

/// What a long act is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Pulling a disk of a snapshot into an image.
    Pull,
    /// Reading a disk back and comparing it with its digests.
    Verify,
    /// Writing a disk to where it is to be.
    Restore,
    /// Writing several images of a disk into one.
    Merge,
}

/// What a long act tells. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// A phase begins with a disk.
    #[serde(rename_all = "camelCase")]
    Begun {
        /// The phase.
        phase: Phase,
        /// The disk, by its target.
        disk: &'a str,
        /// What there is to go through: the disk's size, or what of it has changed as far as that is known.
        total: u64,
    },
    /// So much is done.
    #[serde(rename_all = "camelCase")]
    Done {
        /// The phase.
        phase: Phase,
        /// The disk.
        disk: &'a str,
        /// How much of the total has been gone through.
        done: u64,
        /// The total, which may have become better known.
        total: u64,
        /// How much data was moved for that: what is zero is not.
        moved: u64,
    },
    /// The phase has ended with this disk.
    #[serde(rename_all = "camelCase")]
    Ended {
        /// The phase.
        phase: Phase,
        /// The disk.
        disk: &'a str,
    },
    /// Something that the operator should know.
    Warning {
        /// What.
        message: &'a str,
    },
    /// Something that was done, in words.
    Note {
        /// What.
        message: &'a str,
    },
}

/// Is told how far an act is, and says whether it is to stop. Called often: must not block.
pub trait Watcher: fmt::Debug + Send + Sync {
    /// Something was done.
    fn event(&self, event: &Event<'_>);

    /// Whether the act is to stop at the next place where it can.
    fn stop(&self) -> bool;
}

/// Hears nothing and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Watcher for Silent {
    fn event(&self, _: &Event<'_>) {}

    fn stop(&self) -> bool {
        false
    }
}

/// Tells how far an act is with a disk.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    watcher: &'a dyn Watcher,
    phase: Phase,
    disk: &'a str,
    total: u64,
}

impl<'a> Progress<'a> {
    pub(crate) fn begin(watcher: &'a dyn Watcher, phase: Phase, disk: &'a str, total: u64) -> Self {
        watcher.event(&Event::Begun { phase, disk, total });
        Self {
            watcher,
            phase,
            disk,
            total,
        }
    }

    /// So much has been gone through, and so much data moved for that.
    pub(crate) fn at(&self, done: u64, moved: u64) {
        let Self {
            phase, disk, total, ..
        } = *self;
        self.watcher.event(&Event::Done {
            phase,
            disk,
            done: done.min(total),
            total,
            moved,
        });
    }

    pub(crate) fn end(self) {
        self.watcher.event(&Event::Ended {
            phase: self.phase,
            disk: self.disk,
        });
    }
}

/// `Err` when the act is to stop.
///
/// # Errors
/// `Unavailable`, saying that it was stopped as asked.
pub fn stopped(watcher: &dyn Watcher) -> Result<()> {
    if watcher.stop() {
        return Err(Error::new(ErrorKind::Unavailable, "stopped, as asked"));
    }
    Ok(())
}
