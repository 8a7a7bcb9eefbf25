//! `disksnap snapshot`: create, list, show, delete.

use std::collections::BTreeMap;

use disksnap::xml::{self, Element, SnapshotView};
use disksnap::{
    CheckpointName, Deleted, Deletion, Disk, Error, Health, Inspected, Result, Snapshot, SnapshotName, Source,
};
use serde::Serialize;

use crate::args::{Create, Keep, SnapshotCommand};
use crate::bring::{self, follow};
use crate::context::{Context, Target};
use crate::failure::{Failure, Outcome};
use crate::output::Text;
use crate::plan;
use crate::signals::Stop;
use crate::snapshot_view::{List, Shown, views};

pub(crate) async fn run(context: &Context, command: SnapshotCommand) -> Outcome {
    match command {
        SnapshotCommand::Create(create) => self::create(context, create).await,
        SnapshotCommand::List => list(context).await,
        SnapshotCommand::Show { name } => show(context, &name).await,
        SnapshotCommand::Merge(merge) => bring::merge(context, merge.bring, merge.into.into()).await,
        SnapshotCommand::Revert(revert) => bring::revert(context, revert).await,
        SnapshotCommand::Delete { names, all, document } => delete(context, names, all, document).await,
    }
}

async fn create(context: &Context, create: Create) -> Outcome {
    let mut request = plan::request(create.wanted)?;
    request.name = create.name.or(request.name);
    request.quiesce = create.quiesce.map_or(request.quiesce, Into::into);
    if !create.mountpoints.is_empty() {
        request.mountpoints = create.mountpoints;
    }
    request.checkpoint = create.checkpoint.or(request.checkpoint);
    request.deadline = create.deadline.unwrap_or(request.deadline);
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let note = target.followed(create.document).await?;
    let dispatcher = target.disksnap.dispatcher();
    let snapshot = match dispatcher.create(&target.domain, &request).await {
        Ok(snapshot) => snapshot,
        Err(error) => return Err(note.given_up(error).into()),
    };
    let disks: Vec<Disk> = snapshot
        .disks
        .iter()
        .filter_map(|d| d.modified_disk.clone())
        .collect();
    let health = vec![Health::Active; snapshot.disks.len()];
    tell(context, &target, &Inspected { snapshot, health }).await?;
    follow(context, &target, note, &disks).await?;
    stop.check()
}

async fn show(context: &Context, name: &SnapshotName) -> Outcome {
    let target = context.target().await?;
    let found = target.disksnap.dispatcher().show(&target.domain, name).await?;
    tell(context, &target, &found).await
}

/// Prints one snapshot with all there is to know of it.
async fn tell(context: &Context, target: &Target, found: &Inspected) -> Outcome {
    let sources = backup_sources(target, &found.snapshot).await?;
    for warning in &found.snapshot.warnings {
        context.out.warn(warning);
    }
    let view = Shown::new(found, &sources, &target.document)?;
    context.out.show(&view, || {
        xml::snapshot_document(&SnapshotView {
            snapshot: &found.snapshot,
            health: &found.health,
            backup_sources: sources.clone(),
            document: Some(&target.document),
        })
    })
}

async fn backup_sources(target: &Target, snapshot: &Snapshot) -> Result<BTreeMap<String, Source>> {
    let mut sources = BTreeMap::new();
    for disk in &snapshot.disks {
        let dispatcher = target.disksnap.dispatcher();
        let source = dispatcher
            .backup_source(&target.domain, snapshot, &disk.target)
            .await?;
        sources.extend(source.map(|source| (disk.target.clone(), source)));
    }
    Ok(sources)
}

async fn list(context: &Context) -> Outcome {
    let target = context.target().await?;
    let all = target.disksnap.dispatcher().list(&target.domain).await?;
    context
        .out
        .show(&List::new(&all), || xml::snapshots_document(&views(&all)))
}

/// Deletes as many as can be deleted; what cannot be is told at the end.
async fn delete(context: &Context, names: Vec<SnapshotName>, all: bool, document: Keep) -> Outcome {
    let target = context.target().await?;
    let dispatcher = target.disksnap.dispatcher();
    let names = if all {
        let recorded = dispatcher.catalog().snapshots(&target.domain.id).await?;
        recorded.into_iter().map(|snapshot| snapshot.name).collect()
    } else {
        names
    };
    let stop = Stop::listen(true)?;
    let (mut deleted, mut failed): (Vec<DeletedView>, Vec<Error>) = (Vec::new(), Vec::new());
    let note = target.followed(document).await?;
    let (mut domain, mut disks) = (target.domain.clone(), Vec::new());
    for name in names {
        if stop.heard().is_some() {
            break;
        }
        match dispatcher.delete(&domain, &name).await {
            Ok(Deletion {
                deleted: how,
                altered,
                kept_for,
            }) => {
                deleted.push(DeletedView::new(&name, how, kept_for));
                altered.warnings.iter().for_each(|w| context.out.warn(w));
                for disk in altered.disks {
                    domain.replace_disk(disk.clone());
                    disks.push(disk);
                }
            }
            Err(error) => failed.push(error),
        }
    }
    context
        .out
        .show(&DeletedList { deleted: &deleted }, || delete_document(&deleted))?;
    follow(context, &target, note, &disks).await?;
    if failed.is_empty() {
        stop.check()
    } else {
        Err(Failure::Several(failed))
    }
}

fn delete_document(deleted: &[DeletedView]) -> Result<String> {
    let each = deleted.iter().map(|d| {
        Element::new("snapshot")
            .attr("name", &d.name)
            .attr("deleted", d.when)
            .children(
                d.kept_for
                    .iter()
                    .map(|name| Element::new("keptFor").attr("checkpoint", name)),
            )
    });
    Element::new("deleted").children(each).to_document()
}

#[derive(Debug, Serialize)]
struct DeletedList<'a> {
    deleted: &'a [DeletedView],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeletedView {
    name: String,
    when: &'static str,
    /// The checkpoints that its data is kept for; without its name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kept_for: Vec<CheckpointName>,
}

impl DeletedView {
    fn new(name: &SnapshotName, how: Deleted, kept_for: Vec<CheckpointName>) -> Self {
        let when = match how {
            Deleted::Now => "now",
            Deleted::Before => "before",
        };
        Self {
            name: name.to_string(),
            when,
            kept_for,
        }
    }
}

impl Text for DeletedList<'_> {
    fn text(&self) -> String {
        let line = |d: &DeletedView| match (d.when, d.kept_for.as_slice()) {
            ("now", []) => format!("deleted {}\n", d.name),
            ("now", kept_for) => {
                let names: Vec<&str> = kept_for.iter().map(CheckpointName::as_str).collect();
                format!(
                    "deleted {}; its data is kept for the checkpoint {}\n",
                    d.name,
                    names.join(", ")
                )
            }
            _ => format!("{} had been deleted before\n", d.name),
        };
        self.deleted.iter().map(line).collect()
    }
}
