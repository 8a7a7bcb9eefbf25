//! What is restored is what was saved, wherever to; and what goes wrong leaves nothing that looks whole.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod devices;
mod exports;
mod files;
mod into;
mod machine;
mod points;
mod rig;
