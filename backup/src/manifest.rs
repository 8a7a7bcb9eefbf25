//! What is written down of a point in time: `manifest.json`, schema 1 (`docs/backup-format.md`).

use std::collections::BTreeSet;
use std::time::SystemTime;

use disksnap::{CheckpointName, Consistency, DomainId, Error, ErrorKind, Result, SnapshotName};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::{Compression, Digest};

/// One point in time of a domain. Its file is written last: a point without one does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The repository's id.
    pub repository: Uuid,
    /// The point's name: its instant, `20261122T021500Z`; `-2` and so on for a second one of that second.
    pub point: String,
    /// Whose.
    pub domain: DomainId,
    /// The instant of the snapshot, by the clock of the domain's host.
    #[serde(with = "crate::manifest::instant")]
    pub created: SystemTime,
    /// How consistent the guest's file systems are in it.
    pub consistency: Consistency,
    /// The snapshot that it was pulled from.
    pub snapshot: SnapshotName,
    /// The checkpoint that began at the instant, on the disks that say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointName>,
    /// The disks, in the domain's order.
    pub disks: Vec<DiskEntry>,
    /// The domain's document and what belongs to its firmware.
    pub machine: MachineEntry,
    /// What the operator was told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What wrote it: `disksnap 0.1.0`.
    pub tool: String,
}

/// Whether an image stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It holds the whole disk.
    Full,
    /// It holds what changed since an earlier point.
    Incremental,
}

/// One disk at a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskEntry {
    /// Its target.
    pub target: String,
    /// Its size in bytes.
    pub size: u64,
    /// The method that took the snapshot.
    pub method: String,
    /// Whether the image stands alone.
    pub level: Level,
    /// Why it is a full one although an increment was wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_full: Option<String>,
    /// Why more may be in it than was written since the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excess: Option<String>,
    /// The point whose image this one is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The image's file in the point's folder.
    pub image: String,
    /// Its length as a file, in bytes.
    pub image_bytes: u64,
    /// How its data is stored.
    pub compression: Compression,
    /// How much of the disk it holds as data, in bytes.
    pub data: u64,
    /// How much of the disk it holds as zeroes, in bytes.
    pub zero: u64,
    /// The file of its chunks' digests.
    pub chunks: String,
    /// That file's digest.
    pub chunks_digest: Digest,
    /// The digest of the disk's whole content at this point; see [`content_digest`](crate::content_digest).
    pub content: Digest,
    /// Whether the point's checkpoint covers this disk: the next backup of it can be an increment.
    #[serde(default)]
    pub tracked: bool,
}

/// A small file that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Its name in the point's folder.
    pub file: String,
    /// Where it was on the host, if it was a file there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its digest.
    pub digest: Digest,
}

/// What makes a machine of the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineEntry {
    /// The domain's document.
    pub domain_xml: FileEntry,
    /// The EFI variables, where the domain has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<FileEntry>,
    /// The files of the TPM's state, where the domain has an emulated one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tpm: Vec<FileEntry>,
}

/// What a manifest says that it is.
const FORMAT: &str = "disksnap-backup";

/// The schema that is written, and the newest that is read.
const VERSION: u64 = 1;

impl Manifest {
    /// Its file's name in the point's folder.
    pub const FILE: &'static str = "manifest.json";

    /// The largest file that is read as one, in bytes.
    pub(crate) const LIMIT: u64 = 16 << 20;

    /// The disk of this target.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&DiskEntry> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// The files of the point, by their names in its folder; without the manifest itself.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let disks = self
            .disks
            .iter()
            .flat_map(|disk| [disk.image.as_str(), disk.chunks.as_str()]);
        disks.chain(self.machine.files().map(|entry| entry.file.as_str()))
    }

    /// The file that says this: the fields, what format it is, and a digest of all of it.
    ///
    /// # Errors
    /// `Internal` for one that contradicts itself: such a one is never written.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        self.check().map_err(|fault| {
            Error::new(
                ErrorKind::Internal,
                format!("the manifest of a point would be wrong: {fault}"),
            )
            .with("point", &self.point)
        })?;
        let written =
            |e: serde_json::Error| Error::new(ErrorKind::Internal, "cannot write a manifest").because(e);
        let mut value = serde_json::to_value(self).map_err(written)?;
        value["format"] = FORMAT.into();
        value["version"] = VERSION.into();
        let mut text = serde_json::to_vec_pretty(&seal(value)).map_err(written)?;
        text.push(b'\n');
        Ok(text)
    }

    /// What such a file says.
    ///
    /// # Errors
    /// `Broken` for one that is damaged or contradicts itself; `Unsupported` for one of a newer schema.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let broken = |what: &str| Error::new(ErrorKind::Broken, format!("the manifest is damaged: {what}"));
        let mut value: Value =
            serde_json::from_slice(text).map_err(|e| broken("it is no JSON, or ends early").because(e))?;
        if value["format"] != FORMAT {
            return Err(broken(&format!("it does not say that its format is '{FORMAT}'")));
        }
        match value["version"].as_u64() {
            Some(VERSION) => {}
            Some(newer) if newer > VERSION => return Err(newer_version("manifest", newer)),
            _ => return Err(broken("it tells no version")),
        }
        let told = value.as_object_mut().and_then(|fields| fields.remove("digest"));
        if told != Some(digest_of(&mut value).to_string().into()) {
            return Err(broken("what it says is not what was written, by its digest"));
        }
        let manifest: Self =
            serde_json::from_value(value).map_err(|e| broken("a field is missing or wrong").because(e))?;
        manifest.check().map_err(|fault| broken(&fault))?;
        Ok(manifest)
    }

    /// What in it contradicts the rest.
    fn check(&self) -> std::result::Result<(), String> {
        let mut files = BTreeSet::from([Self::FILE]);
        for file in self.files() {
            if !is_file_name(file) {
                return Err(format!("{file:?} is no name of a file"));
            }
            if !files.insert(file) {
                return Err(format!("it names the file {file} twice"));
            }
        }
        let mut targets = BTreeSet::new();
        for disk in &self.disks {
            let target = &disk.target;
            if !targets.insert(target) {
                return Err(format!("it names the disk {target} twice"));
            }
            match (disk.level, &disk.parent) {
                (Level::Full, None) => {}
                (Level::Incremental, Some(parent)) if is_before(parent, &self.point) => {}
                (Level::Incremental, Some(parent)) => {
                    return Err(format!(
                        "the disk {target} is said to be over the point {parent:?}, which is no earlier one"
                    ));
                }
                _ => {
                    return Err(format!(
                        "the disk {target} is neither a full image nor an increment"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl MachineEntry {
    /// All of its files.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        std::iter::once(&self.domain_xml)
            .chain(&self.nvram)
            .chain(&self.tpm)
    }
}

pub(crate) fn newer_version(what: &str, version: u64) -> Error {
    let text = format!("the {what} is of version {version}, and this disksnap knows {VERSION}");
    Error::new(ErrorKind::Unsupported, text).hint("Use the disksnap that wrote it, or a newer one.")
}

/// The digest of what a file says: of its compact JSON, keys sorted, without the digest itself.
fn digest_of(value: &mut Value) -> Digest {
    // Sorted by itself, unless somebody in the build asks serde_json to keep the order.
    value.sort_all_objects();
    Digest::of(value.to_string().as_bytes())
}

/// With the digest of what it says, whatever that is.
pub(crate) fn seal(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        fields.remove("digest");
        let digest = digest_of(&mut value).to_string();
        value["digest"] = digest.into();
    }
    value
}

/// A relative path of ordinary parts: what may follow a point's folder in a key.
fn is_file_name(file: &str) -> bool {
    let ordinary = |part: &str| !matches!(part, "" | "." | "..");
    file.split('/').all(ordinary)
        && file
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-%/".contains(&b))
}

/// When a point was, as its name tells: its instant, and the number among those of one second.
pub(crate) fn point_order(name: &str) -> Option<(&str, u32)> {
    let (instant, number) = match name.split_once('-') {
        None => (name, 1),
        Some((instant, number)) => (instant, number.parse().ok().filter(|n| *n > 1)?),
    };
    let numbered = number == 1 || !name.contains("-0");
    let shape = instant.bytes().enumerate().all(|(n, b)| match n {
        8 => b == b'T',
        15 => b == b'Z',
        _ => b.is_ascii_digit(),
    });
    (instant.len() == 16 && shape && numbered).then_some((instant, number))
}

fn is_before(one: &str, other: &str) -> bool {
    matches!((point_order(one), point_order(other)), (Some(one), Some(other)) if one < other)
}

/// Instants as RFC 3339 in UTC.
pub(crate) mod instant {
    use std::time::SystemTime;

    use jiff::Timestamp;
    use serde::{Deserialize, Deserializer, Serializer, de, ser};

    pub(crate) fn serialize<S: Serializer>(at: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        let at = Timestamp::try_from(*at).map_err(ser::Error::custom)?;
        to.collect_str(&at)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(from)?;
        let at: Timestamp = text.parse().map_err(de::Error::custom)?;
        Ok(at.into())
    }
}
