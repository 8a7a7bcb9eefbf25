//! What is tried over and over: the command killed at every point of every act, and whatever else comes to somebody's mind
//! in an hour. A few rounds are tests like any others; all of them are run by `./x faults` and `./x soak`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../command/daemons.rs"]
mod daemons;
#[path = "../command/programs.rs"]
mod programs;
#[path = "../command/site.rs"]
#[allow(dead_code, reason = "the tests of the command use all of it")]
mod site;

mod acts;
mod faults;
mod invariants;
mod lvm;
mod scene;
mod soak;
mod table;
mod world;
