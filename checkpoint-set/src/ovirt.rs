//! oVirt's tables `vm_checkpoints` and `vm_checkpoint_disk_map`, as JSON and as CSV, and what they mean here.
//!
//! Source: `seeds/bulk-checkpoint-redefine.txt`, and oVirt's page on incremental backup ("Engine database changes").
//! The columns are called as there; those that its database has now (`parent_id`, `_create_date`) are read too.
//!
//! A checkpoint's name is its id, and its bitmaps are called so too, as oVirt has it. So a checkpoint of another name cannot
//! be told in these tables, nor one whose mark is a kept snapshot. What the tables have no place for is not in them: a
//! disk's size, and whether a bitmap is in memory alone.

mod disks;
mod meaning;
mod tables;

pub use disks::DiskIds;
pub use tables::{CheckpointRow, DiskRow, Table, Tables};
