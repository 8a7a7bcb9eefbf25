//! `disksnap backup show`: a point, its chain and sizes; also what is told of a backup that was just made.

use std::fmt::Write as _;
use std::time::SystemTime;

use disksnap::Consistency;
use disksnap_backup::{Backup, DiskEntry, Level, Manifest, PointSpec};
use serde::Serialize;

use crate::backup::args::Repo;
use crate::backup::create::no_xml;
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, fields, size};

pub(crate) async fn run(context: &Context, repo: &Repo, point: &PointSpec) -> Outcome {
    let repository = repository(repo).await?;
    let folder = folder(context, &repository).await?;
    let manifest = repository.point(&folder, point).await?;
    let mut chains = Vec::new();
    for disk in &manifest.disks {
        let chain = repository.chain(&folder, &manifest, &disk.target).await;
        chains.push(match chain {
            Ok(layers) => Chain::Whole(layers.into_iter().map(|layer| layer.point).collect()),
            Err(error) => Chain::Broken(error.message().to_owned()),
        });
    }
    let view = PointView {
        manifest,
        chains,
        made: None,
    };
    context.out.show(&view, no_xml)
}

/// A point in full.
#[derive(Debug, Serialize)]
pub(crate) struct PointView {
    #[serde(flatten)]
    manifest: Manifest,
    /// By disk, in the order of the disks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    chains: Vec<Chain>,
    /// Of a backup that was just made.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    made: Option<MadeView>,
}

/// The points that a disk's images are of, the newest first.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Chain {
    Whole(Vec<String>),
    Broken(String),
}

#[derive(Debug, Serialize)]
struct MadeView {
    resumed: bool,
    /// How long it took.
    seconds: f64,
}

impl PointView {
    pub(crate) fn made(backup: &Backup, began: SystemTime) -> Self {
        Self {
            manifest: backup.manifest.clone(),
            chains: Vec::new(),
            made: Some(MadeView {
                resumed: backup.resumed,
                seconds: began.elapsed().unwrap_or_default().as_secs_f64(),
            }),
        }
    }
}

impl Text for PointView {
    fn text(&self) -> String {
        let point = &self.manifest;
        let mut rows = vec![
            ("point", point.point.clone()),
            ("domain", point.domain.name.clone()),
            ("taken", instant(point.created)),
            ("consistency", consistency(&point.consistency)),
            (
                "checkpoint",
                point
                    .checkpoint
                    .as_ref()
                    .map_or_else(|| "none".to_owned(), ToString::to_string),
            ),
        ];
        let mut machine = vec!["domain XML"];
        machine.extend(point.machine.nvram.as_ref().map(|_| "EFI variables"));
        if !point.machine.tpm.is_empty() {
            machine.push("TPM state");
        }
        rows.push(("saved with it", machine.join(", ")));
        if let Some(made) = &self.made {
            let how = if made.resumed {
                ", gone on with after an interruption"
            } else {
                ""
            };
            rows.push(("took", format!("{:.1} s{how}", made.seconds)));
        }
        let mut out = fields("", rows);
        for (n, disk) in point.disks.iter().enumerate() {
            let _ = writeln!(out, "\n{}", disk.target);
            out.push_str(&fields("  ", disk_rows(disk, self.chains.get(n))));
        }
        out
    }
}

fn disk_rows(disk: &DiskEntry, chain: Option<&Chain>) -> Vec<(&'static str, String)> {
    let level = match (&disk.level, &disk.parent, &disk.why_full) {
        (Level::Incremental, Some(parent), _) => format!("incremental, over {parent}"),
        (Level::Incremental, None, _) => "incremental".to_owned(),
        (Level::Full, _, Some(why)) => format!("full: {why}"),
        (Level::Full, _, None) => "full".to_owned(),
    };
    let mut rows = vec![
        ("level", level),
        ("size", size(disk.size)),
        ("data", size(disk.data)),
        ("zeroes", size(disk.zero)),
        ("stored", format!("{} in {}", size(disk.image_bytes), disk.image)),
        ("method", disk.method.clone()),
        ("content", disk.content.to_string()),
    ];
    if let Some(why) = &disk.excess {
        rows.push(("more than changed", why.clone()));
    }
    if !disk.tracked {
        rows.push(("next", "a full one: no checkpoint began on this disk".to_owned()));
    }
    match chain {
        Some(Chain::Whole(points)) => rows.push(("chain", points.join(" > "))),
        Some(Chain::Broken(why)) => rows.push(("chain", format!("broken: {why}"))),
        None => {}
    }
    rows
}

/// UTC, as RFC 3339 has it.
pub(crate) fn instant(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

/// In words.
pub(crate) fn consistency(level: &Consistency) -> String {
    match level {
        Consistency::Crash => "crash-consistent".to_owned(),
        Consistency::Unquiesced { reason } => format!("crash-consistent: {reason}"),
        Consistency::Filesystem { filesystems, .. } => format!("{filesystems} file systems frozen"),
        Consistency::Inactive => "the domain was off".to_owned(),
    }
}
