//! `disksnap backup merge` and `prune`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use disksnap::{Error, ErrorKind};
use disksnap_backup::{
    ListedPoint, MergePlan, Merged, MergedImage, PointSpec, Pruned, Retention, merge_plan,
};
use serde::Serialize;

use crate::backup::args::{Merge, Prune};
use crate::backup::create::{no_xml, stopped};
use crate::backup::progress::Teller;
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, fields, size, table};
use crate::signals::Stop;

pub(crate) async fn merge(context: &Context, merge: Merge) -> Outcome {
    let repository = repository(&merge.repo).await?;
    let folder = folder(context, &repository).await?;
    let points = repository.points(&folder).await?;
    let mut drop = BTreeSet::new();
    if let Some(point) = &merge.point {
        let alone = repository.point(&folder, point).await?.point;
        let before = points.iter().take_while(|point| point.name != alone);
        drop.extend(before.map(|point| point.name.clone()));
        for (point, disk) in lasts(&points) {
            if drop.remove(&point) {
                context
                    .out
                    .warn(&format!("{point} stays: it is the last point of {disk}"));
            }
        }
    }
    for spec in &merge.drop {
        drop.insert(match spec {
            // One whose manifest is damaged can be dropped too.
            PointSpec::Named(name) if points.iter().any(|point| point.name == *name) => name.clone(),
            spec => repository.point(&folder, spec).await?.point,
        });
    }
    let last = lasts(&points).into_iter().find(|(point, _)| drop.contains(point));
    if let Some((point, disk)) = last.filter(|_| !merge.even_last) {
        let error = Error::new(ErrorKind::Invalid, format!("{point} is the last point of {disk}"));
        return Err(error
            .during("backup merge")
            .hint("Nothing was dropped. --even-last drops it all the same.")
            .into());
    }
    if merge.dry_run {
        let plan = merge_plan(&repository, &folder, &drop).await?;
        return context.out.show(&PlanView(plan), no_xml);
    }
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let merged = disksnap_backup::merge(&repository, &folder, &drop, &teller).await;
    teller.end();
    let merged = merged.map_err(|error| stopped(error, &stop))?;
    context.out.show(&MergedView(merged), no_xml)
}

/// The last point of each disk.
fn lasts(points: &[ListedPoint]) -> Vec<(String, String)> {
    let (mut seen, mut lasts) = (BTreeSet::new(), Vec::new());
    for manifest in points
        .iter()
        .rev()
        .filter_map(|point| point.manifest.as_ref().ok())
    {
        for disk in &manifest.disks {
            if seen.insert(&disk.target) {
                lasts.push((manifest.point.clone(), disk.target.clone()));
            }
        }
    }
    lasts
}

pub(crate) async fn prune(context: &Context, prune: Prune) -> Outcome {
    let repository = repository(&prune.repo).await?;
    let folder = folder(context, &repository).await?;
    let rules = Retention {
        last: prune.keep_last,
        hourly: prune.keep_hourly,
        daily: prune.keep_daily,
        weekly: prune.keep_weekly,
        monthly: prune.keep_monthly,
        yearly: prune.keep_yearly,
    };
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let pruned = disksnap_backup::prune(&repository, &folder, &rules, prune.dry_run, &teller).await;
    teller.end();
    let pruned = pruned.map_err(|error| stopped(error, &stop))?;
    let held = held_back(&pruned);
    context.out.show(&PrunedView(pruned), no_xml)?;
    match held {
        None => Ok(()),
        Some(error) => Err(error.with("domain", &folder.id).into()),
    }
}

/// What to say, with an error's exit code, of points that are in the way of others' going: else they would stay for ever, unnoticed.
fn held_back(pruned: &Pruned) -> Option<Error> {
    // The oldest one is held by all that hold any.
    let oldest = pruned.held.first()?;
    let why = format!(
        "not all that no rule keeps could be dropped: it is not known what {} is built on",
        oldest.by.join(", ")
    );
    let hint = format!(
        "Put the manifest back from a copy of the repository; or give the point up: `disksnap backup merge --drop {}`. Then prune again.",
        oldest.by.join(" --drop ")
    );
    Some(
        Error::new(ErrorKind::Broken, why)
            .during("backup prune")
            .hint(hint),
    )
}

/// What is said of a merge that is done already, as when it is asked for again.
const NOTHING: &str = "there is nothing to merge: no point is before it\n";

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct PlanView(MergePlan);

impl Text for PlanView {
    fn text(&self) -> String {
        let plan = &self.0;
        if plan.dropped.is_empty() {
            return NOTHING.to_owned();
        }
        let mut out = String::new();
        for point in &plan.dropped {
            let _ = writeln!(out, "would drop {point}");
        }
        for image in &plan.images {
            let parent = image.parent.as_ref();
            let _ = writeln!(
                out,
                "would write {} of {} anew, {}",
                image.disk,
                image.point,
                over(parent)
            );
        }
        let rows = [("needs meanwhile", size(plan.room)), ("frees", freed(plan.freed))];
        out + &fields("", rows)
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct MergedView(Merged);

impl Text for MergedView {
    fn text(&self) -> String {
        let merged = &self.0;
        if merged.dropped.is_empty() && merged.images.is_empty() {
            return NOTHING.to_owned();
        }
        let mut out = String::new();
        for point in &merged.dropped {
            let _ = writeln!(out, "dropped {point}");
        }
        for MergedImage {
            point, disk, parent, ..
        } in &merged.images
        {
            let _ = writeln!(out, "{disk} of {point} is {} now", over(parent.as_ref()));
        }
        out + &fields("", [("freed", freed(merged.freed))])
    }
}

fn over(parent: Option<&String>) -> String {
    parent.map_or_else(
        || "a full image".to_owned(),
        |point| format!("an increment over {point}"),
    )
}

fn freed(bytes: i64) -> String {
    let told = size(bytes.unsigned_abs());
    if bytes < 0 { format!("-{told}") } else { told }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct PrunedView(Pruned);

impl Text for PrunedView {
    fn text(&self) -> String {
        let pruned = &self.0;
        let (drops, frees) = if pruned.dry_run {
            ("would drop", "would free")
        } else {
            ("dropped", "freed")
        };
        let mut rows = Vec::new();
        for kept in &pruned.kept {
            let why: Vec<String> = kept.reasons.iter().map(ToString::to_string).collect();
            rows.push(vec!["keep".to_owned(), kept.point.clone(), why.join(", ")]);
        }
        for point in &pruned.dropped {
            rows.push(vec![drops.to_owned(), point.clone()]);
        }
        for held in &pruned.held {
            let why = format!("{} may be built on it", held.by.join(", "));
            rows.push(vec!["held".to_owned(), held.point.clone(), why]);
        }
        for doubtful in &pruned.doubtful {
            rows.push(vec![
                "left alone".to_owned(),
                doubtful.point.clone(),
                doubtful.what.clone(),
            ]);
        }
        table(&rows) + &fields("", [(frees, freed(pruned.freed))])
    }
}
