//! How a snapshot looks: in full, and on one line of a list.

use std::collections::BTreeMap;
use std::time::SystemTime;

use disksnap::xml::SnapshotView;
use disksnap::{
    Access, Consistency, DiskSnapshotRecord, DomainDocument, Health, Inspected, Result, Source, WindowReport,
    xml,
};
use serde::Serialize;

use crate::inside_view::InsideView;
use crate::output::{Text, fields, size, table};
use crate::plan::{SkippedView, skipped_text, why_word};
use crate::source_view::{SourceView, line};

/// A snapshot in full.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    #[serde(flatten)]
    brief: Brief,
    window: WindowView,
    disks: Vec<DiskView>,
    skipped: Vec<SkippedView>,
    warnings: Vec<String>,
}

/// A snapshot on one line.
#[derive(Debug, Serialize)]
pub(crate) struct Brief {
    name: String,
    id: String,
    domain: String,
    created: String,
    state: &'static str,
    /// Why it is not active.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    consistency: ConsistencyView,
    targets: Vec<String>,
    /// The checkpoint that began with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<String>,
}

/// All snapshots of a domain.
#[derive(Debug, Serialize)]
pub(crate) struct List {
    snapshots: Vec<Brief>,
}

#[derive(Debug, Serialize)]
struct ConsistencyView {
    level: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filesystems: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mountpoints: Vec<String>,
}

/// How long the guest stood still.
#[derive(Debug, Serialize)]
struct WindowView {
    /// Microseconds.
    unit: &'static str,
    frozen: u64,
    paused: u64,
    taken: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DiskView {
    target: String,
    alias: String,
    method: String,
    why: &'static str,
    #[serde(skip)]
    why_text: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Bytes.
    size: Option<u64>,
    modified_disk: Option<ModifiedView>,
    /// Where the bytes are; null where nothing on this host gives them.
    backup_source: Option<SourceView>,
    #[serde(skip)]
    backup_line: String,
    /// In which device the image is, where it is only there.
    #[serde(skip_serializing_if = "Option::is_none")]
    inside: Option<InsideView>,
    details: BTreeMap<String, String>,
}

/// The disk as the domain now uses it.
#[derive(Debug, Serialize)]
struct ModifiedView {
    source: Option<SourceView>,
    /// The `<disk>` element.
    xml: String,
    #[serde(skip)]
    line: String,
}

fn state(health: &Health) -> (&'static str, Option<String>) {
    match health {
        Health::Active => ("active", None),
        Health::Endangered(why) => ("active", Some(why.clone())),
        Health::Broken(why) => ("broken", Some(why.clone())),
        Health::Gone(why) => ("gone", Some(why.clone())),
    }
}

/// UTC, as RFC 3339 has it.
fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Snapshots as XML tells them.
pub(crate) fn views(all: &[Inspected]) -> Vec<SnapshotView<'_>> {
    all.iter()
        .map(|found| SnapshotView {
            health: &found.health,
            ..SnapshotView::new(&found.snapshot)
        })
        .collect()
}

impl Brief {
    pub(crate) fn new(found: &Inspected) -> Self {
        let (state, reason) = state(found.overall());
        let snapshot = &found.snapshot;
        Self {
            name: snapshot.name.to_string(),
            id: snapshot.id.to_string(),
            domain: snapshot.domain.name.clone(),
            created: time(snapshot.created),
            state,
            reason,
            consistency: ConsistencyView::new(&snapshot.consistency),
            targets: snapshot.disks.iter().map(|disk| disk.target.clone()).collect(),
            checkpoint: snapshot.checkpoint.as_ref().map(ToString::to_string),
        }
    }
}

impl ConsistencyView {
    fn new(consistency: &Consistency) -> Self {
        let (level, reason, filesystems) = match consistency {
            Consistency::Crash => ("crash", None, None),
            Consistency::Unquiesced { reason } => ("unquiesced", Some(reason.clone()), None),
            Consistency::Filesystem { filesystems, .. } => ("filesystem", None, Some(*filesystems)),
            Consistency::Inactive => ("inactive", None, None),
        };
        let mountpoints = match consistency {
            Consistency::Filesystem { mountpoints, .. } => mountpoints.clone(),
            _ => Vec::new(),
        };
        Self {
            level,
            reason,
            filesystems,
            mountpoints,
        }
    }

    fn text(&self) -> String {
        match (&self.reason, self.filesystems) {
            (Some(reason), _) => format!("crash-consistent: not quiesced: {reason}"),
            (_, Some(n)) if self.mountpoints.is_empty() => format!("{n} file systems frozen"),
            (_, Some(n)) => format!("{n} file systems frozen: {}", self.mountpoints.join(", ")),
            _ if self.level == "inactive" => "the domain was off".to_owned(),
            _ => "crash-consistent: as after a power cut".to_owned(),
        }
    }
}

impl WindowView {
    fn new(window: WindowReport) -> Self {
        Self {
            unit: "us",
            frozen: window.frozen_us,
            paused: window.paused_us,
            taken: window.taken_us,
        }
    }

    fn text(&self) -> String {
        let stood = match (self.frozen, self.paused) {
            (0, 0) => "the guest ran on".to_owned(),
            (0, paused) => format!("the guest was paused for {}", ms(paused)),
            (frozen, 0) => format!("file systems were frozen for {}", ms(frozen)),
            (frozen, paused) => format!("frozen for {}, within that paused for {}", ms(frozen), ms(paused)),
        };
        format!("{stood}; all disks taken within {}", ms(self.taken))
    }
}

fn ms(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

impl Shown {
    pub(crate) fn new(
        found: &Inspected,
        sources: &BTreeMap<String, Source>,
        document: &DomainDocument,
    ) -> Result<Self> {
        let snapshot = &found.snapshot;
        let disks = snapshot.disks.iter().zip(&found.health);
        let disks = disks.map(|(disk, health)| DiskView::new(disk, health, sources, document));
        Ok(Self {
            brief: Brief::new(found),
            window: WindowView::new(snapshot.window),
            disks: disks.collect::<Result<_>>()?,
            skipped: SkippedView::all(&snapshot.skipped),
            warnings: snapshot.warnings.clone(),
        })
    }
}

impl DiskView {
    fn new(
        disk: &DiskSnapshotRecord,
        health: &Health,
        sources: &BTreeMap<String, Source>,
        document: &DomainDocument,
    ) -> Result<Self> {
        let (state, reason) = state(health);
        let format = match &disk.access {
            Access::Node(_) | Access::Inside(_) => "raw",
            Access::Source { format, .. } => format.as_str(),
        };
        let source = sources.get(&disk.target);
        // An export gives the disk's own bytes, whatever the image's format.
        let format = match source {
            Some(disksnap::Source::Network { .. }) => "raw",
            _ => format,
        };
        Ok(Self {
            target: disk.target.clone(),
            alias: disk.alias.to_string(),
            method: disk.method.clone(),
            why: why_word(disk.why),
            why_text: disk.why.to_string(),
            state,
            reason,
            size: disk.size,
            modified_disk: ModifiedView::new(disk, document)?,
            backup_source: source.map(|s| SourceView::new(s, Some(format))),
            backup_line: source.map_or_else(|| "none on this host".to_owned(), line),
            inside: InsideView::of(&disk.access),
            details: disk.details.clone(),
        })
    }

    fn text(&self) -> String {
        let modified = self.modified_disk.as_ref().map_or("none", |m| m.line.as_str());
        let mut rows = vec![
            ("state", self.state.to_owned()),
            ("method", format!("{} ({})", self.method, self.why_text)),
            ("alias", self.alias.clone()),
        ];
        if let Some(reason) = &self.reason {
            rows[0].1 = format!("{}: {reason}", self.state);
        }
        rows.extend(self.size.map(|bytes| ("size", size(bytes))));
        rows.push(("modifiedDisk", modified.to_owned()));
        rows.push(("backupSource", self.backup_line.clone()));
        rows.extend(self.inside.iter().flat_map(InsideView::rows));
        rows.extend(self.details.iter().map(|(k, v)| (k.as_str(), v.clone())));
        format!("\n{}\n{}", self.target, fields("  ", rows))
    }
}

impl ModifiedView {
    fn new(disk: &DiskSnapshotRecord, document: &DomainDocument) -> Result<Option<Self>> {
        let Some(modified) = &disk.modified_disk else {
            return Ok(None);
        };
        let format = modified.driver.format.as_deref();
        Ok(Some(Self {
            source: modified.source.as_ref().map(|s| SourceView::new(s, format)),
            xml: xml::disk_element(document, &disk.target, modified)?,
            line: modified.source.as_ref().map(line).unwrap_or_default(),
        }))
    }
}

impl Text for Shown {
    fn text(&self) -> String {
        let brief = &self.brief;
        let mut rows = vec![
            ("snapshot", brief.name.clone()),
            ("domain", brief.domain.clone()),
            ("taken", brief.created.clone()),
            ("state", brief.state.to_owned()),
            ("consistency", brief.consistency.text()),
            ("window", self.window.text()),
        ];
        rows.extend(brief.checkpoint.iter().map(|name| ("checkpoint", name.clone())));
        if brief.id != brief.name {
            rows.insert(1, ("id", brief.id.clone()));
        }
        let disks: String = self.disks.iter().map(DiskView::text).collect();
        fields("", rows) + &disks + &skipped_text(&self.skipped)
    }
}

impl List {
    pub(crate) fn new(all: &[Inspected]) -> Self {
        Self {
            snapshots: all.iter().map(Brief::new).collect(),
        }
    }
}

impl Text for List {
    fn text(&self) -> String {
        if self.snapshots.is_empty() {
            return "The domain has no snapshots.\n".to_owned();
        }
        let header = ["NAME", "TAKEN", "DISKS", "CONSISTENCY", "STATE"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        rows.extend(self.snapshots.iter().map(|snapshot| {
            let state = match &snapshot.reason {
                Some(reason) => format!("{}: {reason}", snapshot.state),
                None => snapshot.state.to_owned(),
            };
            vec![
                snapshot.name.clone(),
                snapshot.created.clone(),
                snapshot.targets.join(","),
                snapshot.consistency.level.to_owned(),
                state,
            ]
        }));
        table(&rows)
    }
}
