//! `disksnap snapshot merge` and `revert`, and the domain's document, which follows its disks.

use std::io::IsTerminal;
use std::ops::ControlFlow;

use disksnap::{Altered, DEADLINE, Disk, Error, JobUnit, MergeInto, MergeOptions, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::altered_view::{AlteredView, document};
use crate::args::Bring;
use crate::context::{Context, Follows, Target};
use crate::failure::{Failure, Outcome};
use crate::signals::Stop;

pub(crate) async fn merge(context: &Context, merge: Bring, into: MergeInto) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(false)?;
    let bar = bar(context.out.quiet);
    let mut watcher = |units: &[JobUnit]| {
        let (done, total) = so_far(units);
        bar.set_length(total);
        bar.set_position(done);
        match stop.heard() {
            None => ControlFlow::Continue(()),
            Some(_) => ControlFlow::Break(()),
        }
    };
    let options = MergeOptions {
        targets: merge.disks.clone(),
        into,
        deadline: merge.deadline.unwrap_or(DEADLINE),
    };
    let note = target.followed(merge.document).await?;
    let merged = target
        .disksnap
        .dispatcher()
        .merge(&target.domain, &merge.name, &options, &mut watcher)
        .await;
    bar.finish_and_clear();
    match merged {
        Ok(altered) => tell(context, &target, "merged", &merge, &altered, note).await,
        // What was asked for was done: it is cancelled.
        Err(error) => {
            let error = note.given_up(error);
            Err(stop.heard().map_or(Failure::Error(error), Failure::Stopped))
        }
    }
}

pub(crate) async fn revert(context: &Context, revert: Bring) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let note = target.followed(revert.document).await?;
    let dispatcher = target.disksnap.dispatcher();
    let reverted = dispatcher
        .revert(&target.domain, &revert.name, &revert.disks)
        .await;
    let altered = match reverted {
        Ok(altered) => altered,
        Err(error) => return Err(note.given_up(error).into()),
    };
    tell(context, &target, "reverted", &revert, &altered, note).await?;
    stop.check()
}

async fn tell(
    context: &Context,
    target: &Target,
    what: &'static str,
    asked: &Bring,
    altered: &Altered,
    note: Follows,
) -> Outcome {
    altered.warnings.iter().for_each(|w| context.out.warn(w));
    let view = AlteredView::new(what, &asked.name, altered, &target.document)?;
    context
        .out
        .show(&view, || document(what, &asked.name, altered, &target.document))?;
    follow(context, target, note, &altered.disks).await
}

/// Brings the domain's document up to date where its disks have become others, unless it is to be left alone.
pub(crate) async fn follow(context: &Context, target: &Target, note: Follows, disks: &[Disk]) -> Outcome {
    if matches!(note, Follows::LeftAlone) {
        if !disks.is_empty() {
            context
                .out
                .warn("the domain's document was left as it is, and is out of date now");
        }
        return Ok(());
    }
    let updated = async {
        if !disks.is_empty() {
            target.disksnap.update(&target.given, disks).await?;
        }
        match note {
            Follows::Noted(note) => note.over(),
            Follows::LeftAlone | Follows::Unnoted => Ok(()),
        }
    };
    updated.await.map_err(|error: Error| {
        Failure::Error(error.leaving(disksnap::Effect::Unknown).hint(
            "All else was done. Do not start the domain from its document as it is; bring it up to date with \
             `disksnap domain update`.",
        ))
    })
}

/// The bytes done, and in all, of all units together.
fn so_far(units: &[JobUnit]) -> (u64, u64) {
    units
        .iter()
        .fold((0, 0), |(done, total), unit| match unit.progress {
            Progress::Running { done: d, total: t } => (done + d, total + t),
            _ => (done, total),
        })
}

fn bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "merging {wide_bar} {percent:>3} %  {binary_bytes} of {binary_total_bytes}",
    );
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
