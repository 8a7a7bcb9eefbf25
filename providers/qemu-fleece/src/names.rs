//! Names derived from the snapshot's id and the disk's target, so that what a killed run made is found again.

use disksnap_core::SnapshotId;

/// The names of everything made for one disk of one snapshot.
///
/// QEMU's node names have at most 31 characters, begin with a letter and hold no `:`; every name here
/// is a prefix of at most 25 characters and a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    /// The names for the disk with this target.
    pub(crate) fn new(id: SnapshotId, target: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let label = if target.len() <= 8 && !target.is_empty() && target.chars().all(plain) {
            target.to_owned()
        } else {
            format!("{:08x}", fnv1a(target.as_bytes()))
        };
        Self {
            prefix: format!("ds-{}-{label}", id.short()),
        }
    }

    /// Whether a node or job of this name was made by this method, for whatever snapshot.
    pub(crate) fn is_ours(name: &str) -> bool {
        let mut parts = name.splitn(3, '-');
        let id = |part: &str| part.len() == 12 && part.chars().all(|c| c.is_ascii_hexdigit());
        parts.next() == Some("ds") && parts.next().is_some_and(id) && parts.next().is_some()
    }

    /// What all names begin with, the dash after it included.
    pub(crate) fn prefix(&self) -> String {
        format!("{}-", self.prefix)
    }

    fn role(&self, role: &str) -> String {
        format!("{}-{role}", self.prefix)
    }

    /// The copy-before-write filter.
    pub(crate) fn filter(&self) -> String {
        self.role("cbw")
    }

    /// The raw wrapper below the filter, which can be reopened when something below it goes away.
    pub(crate) fn wrapper(&self) -> String {
        self.role("raw")
    }

    /// The format node of the fleece image.
    pub(crate) fn fleece(&self) -> String {
        self.role("fl")
    }

    /// The node to read the snapshot through.
    pub(crate) fn access(&self) -> String {
        self.role("acc")
    }

    /// The backup job.
    pub(crate) fn job(&self) -> String {
        self.role("job")
    }

    /// The secret that the fleece image is encrypted with.
    pub(crate) fn secret(&self) -> String {
        self.role("key")
    }

    /// A node or job of one inspection; `kind` is one letter, `salt` tells inspections apart.
    pub(crate) fn probe(&self, kind: char, salt: u16) -> String {
        self.role(&format!("x{kind}{salt:04x}"))
    }

    /// What the names of all inspections begin with.
    pub(crate) fn prefix_of_probes(&self) -> String {
        self.role("x")
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
        for target in ["vda", "nvme0n1p1-very-long", "x:y", "", "sdaaa"] {
            let names = Names::new(id, target);
            for name in [
                names.filter(),
                names.secret(),
                names.fleece(),
                names.probe('n', u16::MAX),
            ] {
                assert!(name.len() <= 31, "{name}");
                assert!(name.starts_with(&names.prefix()), "{name}");
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
            Names::new(id, "a-very-long-target-1"),
            Names::new(id, "a-very-long-target-2")
        );
        assert_ne!(Names::new(id, "vda"), Names::new(SnapshotId::random(), "vda"));
    }
}
