//! Names in QEMU, derived from the snapshot's id and the disk's target, so that what a killed run made is found again.

use disksnap_core::SnapshotId;

/// What the names of everything that this method makes in QEMU begin with.
pub(crate) const OURS: &str = "dsx-";
/// What the names of fleecing snapshots begin with.
pub(crate) const FLEECES: &str = "ds-";

/// The names of what is made in QEMU for one disk of one snapshot.
///
/// A node's name has at most 31 characters and begins with a letter: a prefix of 25 and a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    pub(crate) fn new(id: SnapshotId, target: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let label = if target.len() <= 8 && !target.is_empty() && target.chars().all(plain) {
            target.to_owned()
        } else {
            format!("{:08x}", fnv1a(target.as_bytes()))
        };
        Self {
            prefix: format!("{OURS}{}-{label}", id.short()),
        }
    }

    /// The overlay's format node.
    pub(crate) fn overlay(&self) -> String {
        format!("{}-ov", self.prefix)
    }

    /// The node of the overlay's file.
    pub(crate) fn file(&self) -> String {
        format!("{}-img", self.prefix)
    }

    /// The job that merges the snapshot.
    pub(crate) fn merge(&self) -> String {
        format!("{}-mrg", self.prefix)
    }

    /// The job that frees the disk of the snapshot.
    pub(crate) fn stream(&self) -> String {
        format!("{}-str", self.prefix)
    }

    /// The job that takes a snapshot back that did not come to be.
    pub(crate) fn undo(&self) -> String {
        format!("{}-un", self.prefix)
    }
}

/// A label for targets too long or too strange for a node's name (FNV-1a, 32 bits).
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_fits_what_qemu_takes() {
        let id = SnapshotId::random();
        for target in ["vda", "nvme0n1p1-very-long", "x:y", "", "sdaaa", "12345678"] {
            let names = Names::new(id, target);
            for name in [
                names.overlay(),
                names.file(),
                names.merge(),
                names.stream(),
                names.undo(),
            ] {
                assert!(name.len() <= 31, "{name}");
                assert!(name.starts_with(OURS) && !name.starts_with(FLEECES), "{name}");
                assert!(
                    name.chars()
                        .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn names_follow_from_the_request_and_tell_disks_apart() {
        let id = SnapshotId::random();
        assert_eq!(Names::new(id, "vda"), Names::new(id, "vda"));
        assert_ne!(
            Names::new(id, "a-long-target-1"),
            Names::new(id, "a-long-target-2")
        );
        assert_ne!(Names::new(id, "vda"), Names::new(SnapshotId::random(), "vda"));
    }
}
