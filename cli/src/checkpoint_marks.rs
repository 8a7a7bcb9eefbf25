//! `disksnap checkpoint`: what touches the disks. Validate, drop-broken, remove.

use disksnap::xml::Element;
use disksnap::{
    CheckedMark, CheckpointName, DeviceKind, Disk, Domain, Dropped, Error, ErrorKind, MarkVerdict, Result,
    UnknownBitmap, Validation,
};
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{Text, table};
use crate::signals::Stop;

/// Tells what of each checkpoint can be trusted; anything wrong makes the exit code that of `broken`.
pub(crate) async fn validate(context: &Context) -> Outcome {
    let target = context.target().await?;
    let found = target.disksnap.dispatcher().validate(&target.domain).await?;
    let view = ValidationView::new(&found, &target.domain);
    context.out.show(&view, || view.document())?;
    if found.is_sound() {
        return Ok(());
    }
    let message = "not all checkpoints are as they should be";
    Err(Error::new(ErrorKind::Broken, message)
        .during("validate")
        .with("domain", &target.domain.id)
        .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted, and nothing else.")
        .into())
}

pub(crate) async fn drop_broken(context: &Context, unknown: bool) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let dropped = target
        .disksnap
        .dispatcher()
        .drop_broken(&target.domain, unknown)
        .await?;
    let view = DroppedView::new(&dropped, &target.domain);
    context.out.show(&view, || view.document())?;
    stop.check()
}

/// Removes as many as can be removed; what cannot be is told at the end.
pub(crate) async fn remove(context: &Context, names: Vec<CheckpointName>) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for name in names {
        if stop.heard().is_some() {
            break;
        }
        let dispatcher = target.disksnap.dispatcher();
        match dispatcher.remove_checkpoint(&target.domain, &name).await {
            Ok(()) => removed.push(name),
            Err(error) => failed.push(error),
        }
    }
    let view = Removed { removed };
    context.out.show(&view, || {
        let each = view.removed.iter();
        let each = each.map(|name| Element::new("checkpoint").attr("name", name));
        Element::new("removed").children(each).to_document()
    })?;
    if failed.is_empty() {
        stop.check()
    } else {
        Err(Failure::Several(failed))
    }
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<CheckpointName>,
}

impl Text for Removed {
    fn text(&self) -> String {
        let lines: Vec<String> = self
            .removed
            .iter()
            .map(|name| format!("removed {name}\n"))
            .collect();
        lines.concat()
    }
}

#[derive(Debug, Serialize)]
struct MarkView {
    checkpoint: String,
    disk: String,
    verdict: MarkVerdict,
}

impl MarkView {
    fn new(mark: &CheckedMark) -> Self {
        Self {
            checkpoint: mark.checkpoint.to_string(),
            disk: mark.target.clone(),
            verdict: mark.verdict,
        }
    }

    fn element(&self) -> Element {
        Element::new("mark")
            .attr("checkpoint", &self.checkpoint)
            .attr("disk", &self.disk)
            .attr("verdict", self.verdict.as_str())
    }
}

#[derive(Debug, Serialize)]
struct BitmapView {
    disk: String,
    name: String,
}

impl BitmapView {
    fn all(found: &[UnknownBitmap]) -> Vec<Self> {
        let view = |bitmap: &UnknownBitmap| Self {
            disk: bitmap.target.clone(),
            name: bitmap.name.clone(),
        };
        found.iter().map(view).collect()
    }

    fn element(&self) -> Element {
        Element::new("unknown")
            .attr("disk", &self.disk)
            .attr("bitmap", &self.name)
    }
}

/// Why the next backup of a disk must be a full one.
#[derive(Debug, Serialize)]
struct FullReason {
    disk: String,
    /// A word for programs: what [`MarkVerdict`] says of the disk's last checkpoint, or one of the two below.
    reason: &'static str,
}

/// The domain does not have the disk any more.
const GONE: &str = "disk-gone";
/// No checkpoint covers the disk: it came later, or is called otherwise now.
const UNCOVERED: &str = "no-checkpoint";

impl FullReason {
    /// Of these disks, whose marks were found so; and, where all marks were looked at, of those that no checkpoint covers.
    fn all(domain: &Domain, full: &[String], marks: &[CheckedMark], every: bool) -> Vec<Self> {
        let has = |target: &str| domain.disks.iter().any(|disk| disk.target == target);
        let last = |target: &str| marks.iter().rfind(|mark| mark.target == target);
        let known = full.iter().filter_map(|target| {
            let reason = if has(target) {
                code(last(target)?.verdict)
            } else {
                GONE
            };
            Some((target, reason))
        });
        let written = |disk: &&Disk| {
            let kept = disk.device == DeviceKind::Disk && !disk.read_only && !disk.shareable;
            every && kept && disk.source.is_some() && last(&disk.target).is_none()
        };
        let uncovered = domain
            .disks
            .iter()
            .filter(written)
            .map(|disk| (&disk.target, UNCOVERED));
        let all = known.chain(uncovered);
        all.map(|(disk, reason)| Self {
            disk: disk.clone(),
            reason,
        })
        .collect()
    }

    fn element(&self) -> Element {
        Element::new("full")
            .attr("disk", &self.disk)
            .attr("reason", self.reason)
    }
}

/// A verdict as programs read it.
fn code(verdict: MarkVerdict) -> &'static str {
    match verdict {
        MarkVerdict::NotRecording => "not-recording",
        MarkVerdict::CutOff => "cut-off",
        other => other.as_str(),
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ValidationView {
    sound: bool,
    marks: Vec<MarkView>,
    unknown: Vec<BitmapView>,
    /// The disks whose next backup must be a full one.
    full: Vec<String>,
    full_reasons: Vec<FullReason>,
}

impl ValidationView {
    fn new(found: &Validation, domain: &Domain) -> Self {
        Self {
            sound: found.is_sound(),
            marks: found.marks.iter().map(MarkView::new).collect(),
            unknown: BitmapView::all(&found.unknown),
            full: found.full.clone(),
            full_reasons: FullReason::all(domain, &found.full, &found.marks, true),
        }
    }

    fn document(&self) -> Result<String> {
        let sound = if self.sound { "yes" } else { "no" };
        Element::new("validation")
            .attr("sound", sound)
            .children(self.marks.iter().map(MarkView::element))
            .children(self.unknown.iter().map(BitmapView::element))
            .children(self.full_reasons.iter().map(FullReason::element))
            .to_document()
    }
}

impl Text for ValidationView {
    /// What is wrong, and how much is right: of thousands nobody reads each.
    fn text(&self) -> String {
        let wrong: Vec<&MarkView> = self
            .marks
            .iter()
            .filter(|mark| mark.verdict != MarkVerdict::Ok)
            .collect();
        let mut rows = vec![["CHECKPOINT", "DISK", "VERDICT"].map(str::to_owned).to_vec()];
        rows.extend(wrong.iter().map(|mark| {
            vec![
                mark.checkpoint.clone(),
                mark.disk.clone(),
                mark.verdict.as_str().to_owned(),
            ]
        }));
        rows.extend(self.unknown.iter().map(|bitmap| {
            vec![
                "-".to_owned(),
                bitmap.disk.clone(),
                format!("unknown bitmap '{}'", bitmap.name),
            ]
        }));
        let mut text = String::new();
        if rows.len() > 1 {
            text += &table(&rows);
            text.push('\n');
        }
        let good = self.marks.len() - wrong.len();
        let summary = format!("{good} of {} marks are ok\n", self.marks.len());
        text + &summary + &full_text(&self.full)
    }
}

fn full_text(full: &[String]) -> String {
    if full.is_empty() {
        return String::new();
    }
    format!("the next backup must be a full one of: {}\n", full.join(", "))
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DroppedView {
    marks: Vec<MarkView>,
    /// Those of which nothing is left.
    checkpoints: Vec<CheckpointName>,
    unknown: Vec<BitmapView>,
    full: Vec<String>,
    full_reasons: Vec<FullReason>,
}

impl DroppedView {
    fn new(dropped: &Dropped, domain: &Domain) -> Self {
        Self {
            marks: dropped.marks.iter().map(MarkView::new).collect(),
            checkpoints: dropped.checkpoints.clone(),
            unknown: BitmapView::all(&dropped.unknown),
            full: dropped.full.clone(),
            full_reasons: FullReason::all(domain, &dropped.full, &dropped.marks, false),
        }
    }

    fn document(&self) -> Result<String> {
        Element::new("dropped")
            .children(self.marks.iter().map(MarkView::element))
            .children(
                self.checkpoints
                    .iter()
                    .map(|name| Element::new("checkpoint").attr("name", name)),
            )
            .children(self.unknown.iter().map(BitmapView::element))
            .children(self.full_reasons.iter().map(FullReason::element))
            .to_document()
    }
}

impl Text for DroppedView {
    fn text(&self) -> String {
        if self.marks.is_empty() && self.unknown.is_empty() {
            return "nothing is broken\n".to_owned();
        }
        let marks = self.marks.iter();
        let marks = marks.map(|m| {
            format!(
                "dropped {} of {} ({})\n",
                m.disk,
                m.checkpoint,
                m.verdict.as_str()
            )
        });
        let gone = self.checkpoints.iter();
        let gone = gone.map(|name| format!("nothing is left of {name}: it is removed\n"));
        let unknown = self.unknown.iter();
        let unknown = unknown.map(|b| format!("removed the unknown bitmap '{}' of {}\n", b.name, b.disk));
        let lines: Vec<String> = marks.chain(gone).chain(unknown).collect();
        lines.concat() + &full_text(&self.full)
    }
}
