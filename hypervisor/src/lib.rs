//! What a running domain answers to: the QMP monitor, the guest agent, the NBD server, and the guardian.
//!
//! [`QemuConnector`] finds a domain by the unix sockets in its [`Sockets`](disksnap_core::Sockets) and answers
//! [`QemuControl`]s, which implement core's `Host` and `Control` for a `qemu-system-*` or `qemu-storage-daemon`.
//! Providers, which see only `&dyn Host`, ask [`Schema`] what this QEMU can do and [`Graph`] which node serves a disk,
//! and follow their [`jobs`] by name.

mod agent;
mod clients;
mod connector;
mod control;
mod errors;
mod filling;
mod flush;
#[doc(hidden)]
pub mod fuzzing;
pub mod graph;
mod guard;
pub mod guardian;
mod hotplug;
pub mod jobs;
mod lines;
mod nbd_server;
mod order;
mod peer;
mod qmp;
mod schema;
mod still;

pub use connector::{Paths, QemuConnector};
pub use control::QemuControl;
pub use flush::verify as flush;
pub use graph::{DiskNodes, Graph};
pub use guard::GuardianProgram;
pub use nbd_server::NbdServerControl;
pub use qmp::{Event, Events, Heard, Session, Timeouts};
pub use schema::Schema;
