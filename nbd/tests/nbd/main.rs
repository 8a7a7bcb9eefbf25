//! The client against real servers (qemu-nbd, qemu-storage-daemon), and against servers that lie.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod bulk;
mod contexts;
mod hostile;
mod requests;
mod server;
mod tls;
