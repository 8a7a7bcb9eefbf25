//! Names and ids: what they may look like, and how a wrong one is answered.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Error, ErrorKind, Result};

/// The id of one create request and of the snapshot it makes. A repeated request carries the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub Uuid);

impl SnapshotId {
    /// A fresh random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The first 12 hexadecimal digits: for names of limited length that must be derived from the id.
    #[must_use]
    pub fn short(self) -> String {
        self.0.simple().to_string()[..12].to_owned()
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name of a snapshot, unique within its domain: 1 to 128 characters, no control characters, no `/`,
/// no leading `-` or `.`, no white space at either end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

impl SnapshotName {
    /// Longest name, in characters.
    pub const MAX: usize = 128;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        check_name("snapshot name", name)?;
        Ok(Self(name.to_owned()))
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.0
    }
}

impl From<SnapshotId> for SnapshotName {
    fn from(id: SnapshotId) -> Self {
        Self(id.to_string())
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The alias of one disk in one snapshot (`<alias name='…-backup'/>`), unique within its domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Alias(pub String);

impl Alias {
    /// The alias for a disk: its device alias, or else its target, with `-backup` and, where that is
    /// `taken` by another snapshot of the disk, a number.
    pub fn generate(base: &str, taken: impl Fn(&str) -> bool) -> Self {
        let first = format!("{base}-backup");
        if !taken(&first) {
            return Self(first);
        }
        let numbered = (2_u32..).map(|n| format!("{base}-backup{n}"));
        Self(numbered.into_iter().find(|name| !taken(name)).unwrap_or(first))
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_name(what: &str, name: &str) -> Result<()> {
    let fault = if name.is_empty() {
        "is empty"
    } else if name.chars().count() > SnapshotName::MAX {
        "is longer than 128 characters"
    } else if name.chars().any(char::is_control) {
        "has a control character"
    } else if name.contains('/') {
        "has a '/'"
    } else if name.starts_with(['-', '.']) {
        "starts with '-' or '.'"
    } else if name.trim() != name {
        "starts or ends with white space"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Invalid, format!("the {what} {name:?} {fault}"))
        .hint("Names have 1 to 128 characters, no control characters, no '/', and do not start with '-' or '.'."))
}

/// A hint that offers the known names nearest to a wrong one, or all when few.
pub(crate) fn nearest<'a>(plural: &str, wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let mut known: Vec<&str> = known.collect();
    if known.is_empty() {
        return format!("There are no {plural}.");
    }
    known.sort_by_key(|name| strsim::levenshtein(wrong, name));
    known.truncate(8);
    format!("Available {plural}, nearest first: {}.", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_hurt_are_refused() {
        for bad in [
            "",
            "a/b",
            "-rf",
            ".hidden",
            "a\nb",
            " a",
            "a\u{7f}",
            &"x".repeat(129),
        ] {
            let error = bad.parse::<SnapshotName>().expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
        }
        for good in ["nightly", "nightly 3", "tägliche", &"x".repeat(128)] {
            assert!(good.parse::<SnapshotName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn aliases_stay_unique() {
        assert_eq!(
            Alias::generate("virtio-disk0", |_| false).0,
            "virtio-disk0-backup"
        );
        let taken = ["vda-backup", "vda-backup2"];
        assert_eq!(Alias::generate("vda", |a| taken.contains(&a)).0, "vda-backup3");
    }

    #[test]
    fn near_names_come_first() {
        let hint = nearest("disks", "vdx", ["sda", "vda", "vdb"].into_iter());
        assert_eq!(hint, "Available disks, nearest first: vda, vdb, sda.");
    }
}
