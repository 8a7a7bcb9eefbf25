//! The durable catalog: SQLite in one file, with journalled intents.
//!
//! [`StateDir`] is the directory that everything durable lives in: made and checked before it is
//! used. [`SqliteCatalog`] is the catalog in it:
//!
//! ```text
//! catalog.sqlite   the records (`-wal` and `-shm` beside it belong to it: copy all three, or none)
//! reserve          space kept back, so that snapshots can be deleted when the file system is full
//! locks/           one file per domain or lease; who holds a lock says so in its file
//! images/  run/    the providers' images, the sockets
//! ```
//!
//! One act of the dispatcher costs two commits, and a commit costs one `fsync`: the intent, and
//! its outcome. `cargo run --release -p disksnap-catalog --example commit_time` measures them.

#![allow(clippy::doc_markdown, reason = "SQLite is a name, not code")]

mod catalog;
mod changes;
mod database;
mod fault;
mod lock;
mod record;
mod reserve;
mod state_dir;

pub use catalog::SqliteCatalog;
pub use state_dir::StateDir;
