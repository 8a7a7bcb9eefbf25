//! An asynchronous NBD client: pipelined reads and writes, block status and dirty-bitmap contexts, TLS.
//!
//! It speaks the NBD project's `doc/proto.md` (fixed newstyle handshake, structured replies) to any
//! server: QEMU, qemu-nbd, qemu-storage-daemon, nbdkit, nbd-server.
//!
//! ```no_run
//! use disksnap_nbd::{BASE_ALLOCATION, Client, ConnectOptions, Uri};
//!
//! # async fn example() -> disksnap_nbd::Result<()> {
//! let uri: Uri = "nbd+unix:///vda?socket=/run/export.sock".parse()?;
//! let contexts = vec![BASE_ALLOCATION.to_owned()];
//! let options = ConnectOptions { meta_contexts: contexts, ..ConnectOptions::default() };
//! let client = Client::connect(&uri, &options).await?;
//!
//! // Requests made together are in flight together.
//! let (boot, last) = tokio::try_join!(client.read(0, 512), client.read(client.size() - 512, 512))?;
//!
//! let mut extents = client.extents(BASE_ALLOCATION, 0..client.size())?;
//! while let Some(extent) = extents.next().await? {
//!     println!("{} +{} zero: {}", extent.offset, extent.length, extent.is_zero());
//! }
//! client.disconnect().await;
//! # drop((boot, last)); Ok(()) }
//! ```
//!
//! [`BulkReader`] reads whole disks, or what changed of them. A server is not trusted: it can make
//! requests fail, but neither make this client hang, nor take memory beyond what was asked for, nor
//! pass off less than what was asked for.

mod assembly;
mod client;
mod connect;
mod connection;
mod copy;
mod error;
mod extents;
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod selection;
mod tls;
mod uri;
mod wire;

pub use client::Client;
pub use connect::{ConnectOptions, list_exports, list_meta_contexts};
pub use copy::{BulkOptions, BulkReader, Chunk};
pub use error::{Errno, Error, Refusal, Result};
pub use extents::{BASE_ALLOCATION, Extent, ExtentStream, dirty_bitmap_context};
pub use tls::TlsCredentials;
pub use uri::{Address, DEFAULT_PORT, Uri};
pub use wire::{BlockSizes, Command, CommandFlags, ListedExport, TransmissionFlags};
