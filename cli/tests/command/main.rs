//! The command as people use it, on real storage daemons and real QEMUs.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod attach;
mod backup_restore;
mod backup_serve;
mod backups;
mod bad_input;
mod bring;
mod catalog_fire;
mod changes;
mod checkpoint_kills;
mod checkpoints;
mod conform;
mod daemons;
mod disk_life;
mod every_method;
mod exports;
mod filling;
mod guardian;
mod help;
mod hostile;
mod image_exports;
mod kept;
mod kills;
mod methods;
mod moving;
mod programs;
mod raw_nbd;
mod reading;
mod remote;
mod signals;
mod site;
mod snapshots;
mod storage_faults;
mod strike;
mod tap;
mod tracking;
