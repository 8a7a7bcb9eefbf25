//! Snapshots of virtual machines disks.
