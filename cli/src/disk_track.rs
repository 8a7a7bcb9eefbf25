//! `disksnap disk track` and `untrack`: the bitmaps of a raw disk made durable, and given up again.

use std::path::{Path, PathBuf};

use disksnap::xml;
use disksnap::{Crossed, Error, Result};
use serde::Serialize;

use crate::args::Keep;
use crate::bring::follow;
use crate::context::{Context, Follows, Target};
use crate::failure::Outcome;
use crate::output::Text;
use crate::signals::Stop;
use crate::source_view::{SourceView, line};

pub(crate) async fn track(context: &Context, disk: &str, metadata: &Path, keep: Keep) -> Outcome {
    let metadata: PathBuf =
        std::path::absolute(metadata).map_err(|e| Error::io("cannot find the qcow2's place", e))?;
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let dispatcher = target.disksnap.dispatcher();
    let note = target.followed(keep).await?;
    let crossed = match dispatcher.track(&target.domain, disk, &metadata).await {
        Ok(crossed) => crossed,
        Err(error) => return Err(note.given_up(error).into()),
    };
    tell(context, &target, "tracked", &crossed, note).await?;
    stop.check()
}

pub(crate) async fn untrack(context: &Context, disk: &str, drop_checkpoints: bool, keep: Keep) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let dispatcher = target.disksnap.dispatcher();
    let note = target.followed(keep).await?;
    let crossed = match dispatcher.untrack(&target.domain, disk, drop_checkpoints).await {
        Ok(crossed) => crossed,
        Err(error) => return Err(note.given_up(error).into()),
    };
    tell(context, &target, "untracked", &crossed, note).await?;
    stop.check()
}

async fn tell(
    context: &Context,
    target: &Target,
    what: &'static str,
    crossed: &Crossed,
    note: Follows,
) -> Outcome {
    crossed.warnings.iter().for_each(|w| context.out.warn(w));
    let view = CrossedView::new(what, crossed, target)?;
    context.out.show(&view, || Ok(view.document()))?;
    let disks = std::slice::from_ref(&crossed.disk);
    let said = target.domain.disk(&crossed.disk.target)?;
    follow(
        context,
        target,
        note,
        if *said == crossed.disk { &[] } else { disks },
    )
    .await
}

/// A disk and what it has become.
#[derive(Debug, Serialize)]
struct CrossedView {
    target: String,
    /// `tracked`, `untracked`
    what: &'static str,
    /// `now` or `before`
    when: &'static str,
    source: Option<SourceView>,
    data: Option<SourceView>,
    /// The checkpoints that do not cover the disk any more.
    dropped: Vec<String>,
    /// For how long the guest stood still, in microseconds.
    paused: Option<u64>,
    /// The `<disk>` element.
    xml: String,
    warnings: Vec<String>,
    #[serde(skip)]
    line: String,
    #[serde(skip)]
    data_line: Option<String>,
}

impl CrossedView {
    fn new(what: &'static str, crossed: &Crossed, target: &Target) -> Result<Self> {
        let disk = &crossed.disk;
        let format = disk.driver.format.as_deref();
        let data = disk.data_store.as_ref();
        Ok(Self {
            target: disk.target.clone(),
            what,
            when: if crossed.now { "now" } else { "before" },
            source: disk.source.as_ref().map(|s| SourceView::new(s, format)),
            data: data.map(|d| SourceView::new(&d.source, d.format.as_deref())),
            dropped: crossed.dropped.iter().map(ToString::to_string).collect(),
            paused: crossed
                .paused
                .map(|p| u64::try_from(p.as_micros()).unwrap_or(u64::MAX)),
            xml: xml::disk_element(&target.document, &disk.target, disk)?,
            warnings: crossed.warnings.clone(),
            line: disk.source.as_ref().map(line).unwrap_or_default(),
            data_line: data.map(|d| line(&d.source)),
        })
    }

    /// The `<disk>` as it is from now on.
    fn document(&self) -> String {
        format!("{}\n", self.xml)
    }
}

impl Text for CrossedView {
    fn text(&self) -> String {
        let before = if self.when == "before" { ", as before" } else { "" };
        let mut lines = vec![match &self.data_line {
            Some(data) => format!(
                "{}: the disk is now {}, with the data in {data}{before}",
                self.target, self.line
            ),
            None => format!("{}: the disk is now {}{before}", self.target, self.line),
        }];
        if !self.dropped.is_empty() {
            lines.push(format!(
                "{}: not covered any more by {}; its next backup must be a full one",
                self.target,
                self.dropped.join(", ")
            ));
        }
        lines.extend(self.paused.map(|us| {
            let (ms, tenths) = (us / 1000, us % 1000 / 100);
            format!("the guest was paused for {ms}.{tenths} ms")
        }));
        lines.join("\n") + "\n"
    }
}
