//! `disksnap backup list`: the domains of a repository and their points.

use std::fmt::Write as _;

use disksnap_backup::{Level, Manifest};
use serde::Serialize;

use crate::backup::args::Repo;
use crate::backup::create::no_xml;
use crate::backup::show::{consistency, instant};
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, size, table};

pub(crate) async fn run(context: &Context, repo: &Repo) -> Outcome {
    let repository = repository(repo).await?;
    let folders = match context.global.domain {
        Some(_) => vec![folder(context, &repository).await?],
        None => repository.domains().await?,
    };
    let mut domains = Vec::new();
    for folder in folders {
        let mut points = Vec::new();
        for point in repository.points(&folder).await? {
            points.push(match point.manifest {
                Ok(manifest) => Row::of(&manifest),
                Err(error) => Row::broken(point.name, &error),
            });
        }
        domains.push(DomainRows {
            name: folder.id.name.clone(),
            uuid: folder.id.uuid.to_string(),
            unfinished: repository.unfinished(&folder).await?,
            points,
        });
    }
    context.out.show(&List { domains }, no_xml)
}

#[derive(Debug, Serialize)]
struct List {
    domains: Vec<DomainRows>,
}

#[derive(Debug, Serialize)]
struct DomainRows {
    name: String,
    uuid: String,
    points: Vec<Row>,
    /// Points that have not come to be: a backup is under way, or was interrupted.
    unfinished: Vec<String>,
}

#[derive(Debug, Serialize, Default)]
#[serde(rename_all = "camelCase")]
struct Row {
    point: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    level: &'static str,
    disks: Vec<String>,
    /// Bytes that its images take up.
    stored: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    consistency: Option<String>,
    /// What is wrong with its manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<String>,
}

impl Row {
    fn of(manifest: &Manifest) -> Self {
        Self {
            point: manifest.point.clone(),
            created: Some(instant(manifest.created)),
            level: level(manifest),
            disks: manifest.disks.iter().map(|disk| disk.target.clone()).collect(),
            stored: manifest.disks.iter().map(|disk| disk.image_bytes).sum(),
            consistency: Some(consistency(&manifest.consistency)),
            broken: None,
        }
    }

    fn broken(point: String, error: &disksnap::Error) -> Self {
        Self {
            point,
            level: "-",
            broken: Some(error.message().to_owned()),
            ..Self::default()
        }
    }
}

/// One word for all disks.
fn level(manifest: &Manifest) -> &'static str {
    let full = manifest
        .disks
        .iter()
        .filter(|disk| disk.level == Level::Full)
        .count();
    match full {
        0 => "incremental",
        n if n == manifest.disks.len() => "full",
        _ => "mixed",
    }
}

impl Text for List {
    fn text(&self) -> String {
        let mut out = String::new();
        for domain in &self.domains {
            if !out.is_empty() {
                out.push('\n');
            }
            let _ = writeln!(out, "{} ({})", domain.name, domain.uuid);
            let mut rows = vec![
                ["POINT", "LEVEL", "DISKS", "STORED", "STATE"]
                    .map(str::to_owned)
                    .to_vec(),
            ];
            for row in &domain.points {
                rows.push(vec![
                    row.point.clone(),
                    row.level.to_owned(),
                    if row.disks.is_empty() {
                        "-".to_owned()
                    } else {
                        row.disks.join(",")
                    },
                    size(row.stored),
                    row.broken.as_ref().map_or_else(
                        || row.consistency.clone().unwrap_or_default(),
                        |why| format!("broken: {why}"),
                    ),
                ]);
            }
            for point in &domain.unfinished {
                let cells = [
                    point.as_str(),
                    "-",
                    "-",
                    "-",
                    "unfinished: under way, or interrupted",
                ];
                rows.push(cells.map(str::to_owned).to_vec());
            }
            out.push_str(&table(&rows));
        }
        if out.is_empty() {
            out.push_str("the repository has no domain yet\n");
        }
        out
    }
}
