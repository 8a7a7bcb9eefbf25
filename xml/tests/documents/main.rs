//! The documents, read and written: each module is one kind of question.
#![allow(clippy::unwrap_used, reason = "a test may fail in any way")]

mod checkpoints;
mod domain;
mod edits;
mod faults;
mod limits;
mod machine;
mod outputs;
mod reference;
mod requests;
mod round_trips;
mod schema;

/// A domain as libvirt tells it while it runs.
const ACTIVE: &str = include_str!("../samples/active.xml");
/// A disk with a source of every type.
const SOURCES: &str = include_str!("../samples/sources.xml");
/// What else makes a machine than disks, and disksnap's own elements.
const MACHINE: &str = include_str!("../samples/machine.xml");
