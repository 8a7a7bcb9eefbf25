//! The nouns and the contract of disksnap: domains, disks, snapshots, the provider trait, the dispatcher.
