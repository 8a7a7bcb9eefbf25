//! `disksnap plan`, and from what is said on the command line to a request.

use disksnap::{
    DiskChoice, Disks, Domain, Error, Fit, Plan, PlannedDisk, Result, Skipped, SnapshotRequest, Why,
    read_document, xml,
};
use serde::Serialize;
use std::collections::BTreeMap;

use crate::args::Wanted;
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, fields};

pub(crate) async fn run(context: &Context, wanted: Wanted) -> Outcome {
    let request = request(wanted)?;
    let target = context.target().await?;
    let plan = target
        .disksnap
        .dispatcher()
        .plan(&target.domain, &request)
        .await?;
    let view = PlanView::new(&target.domain, &plan);
    for (target, warning) in view.warnings() {
        context.out.warn(&format!("{target}: {warning}"));
    }
    context
        .out
        .show(&view, || xml::plan_document(&target.domain, &plan))
}

/// The request of a document, of `--disk` options, or of both: an option says more of a disk than the document.
pub(crate) fn request(wanted: Wanted) -> Result<SnapshotRequest> {
    let mut request = match &wanted.xml {
        None => SnapshotRequest::default(),
        Some(path) => {
            let named = |error: Error| error.with("document", path.display());
            xml::snapshot_request(&read_document(path)?).map_err(named)?
        }
    };
    if !wanted.disks.is_empty() {
        request.disks = Disks::Named(match request.disks {
            Disks::Writable => wanted.disks,
            Disks::Named(choices) => overridden(choices, wanted.disks),
        });
    }
    Ok(request)
}

fn overridden(mut choices: Vec<DiskChoice>, over: Vec<DiskChoice>) -> Vec<DiskChoice> {
    choices.retain(|choice| !over.iter().any(|o| o.target == choice.target));
    choices.extend(over);
    choices
}

#[derive(Debug, Serialize)]
struct PlanView {
    domain: String,
    /// Whether a create of the same would be tried at all.
    possible: bool,
    disks: Vec<PlannedView>,
    skipped: Vec<SkippedView>,
}

#[derive(Debug, Serialize)]
struct PlannedView {
    target: String,
    alias: String,
    method: Option<String>,
    why: &'static str,
    fit: &'static str,
    reason: Option<String>,
    effect: String,
    capabilities: Vec<String>,
    options: Vec<(String, String)>,
    details: BTreeMap<String, String>,
    warnings: Vec<String>,
}

/// A disk that is left out.
#[derive(Debug, Serialize)]
pub(crate) struct SkippedView {
    target: String,
    reason: String,
}

impl SkippedView {
    pub(crate) fn all(skipped: &[Skipped]) -> Vec<Self> {
        let view = |s: &Skipped| Self {
            target: s.target.clone(),
            reason: s.reason.clone(),
        };
        skipped.iter().map(view).collect()
    }
}

/// The lines about disks that are left out, and a blank one before them.
pub(crate) fn skipped_text(skipped: &[SkippedView]) -> String {
    if skipped.is_empty() {
        return String::new();
    }
    let rows = skipped.iter().map(|s| (s.target.as_str(), s.reason.clone()));
    format!("\nskipped\n{}", fields("  ", rows))
}

/// The word for [`Why`] in JSON.
pub(crate) fn why_word(why: Why) -> &'static str {
    match why {
        Why::Override => "override",
        Why::Disk => "disk",
        Why::Default => "default",
    }
}

impl PlanView {
    fn new(domain: &Domain, plan: &Plan) -> Self {
        let disks: Vec<PlannedView> = plan.disks.iter().map(PlannedView::new).collect();
        Self {
            domain: domain.id.name.clone(),
            possible: disks.iter().all(|disk| disk.reason.is_none()),
            disks,
            skipped: SkippedView::all(&plan.skipped),
        }
    }

    fn warnings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.disks
            .iter()
            .flat_map(|disk| disk.warnings.iter().map(|w| (disk.target.as_str(), w.as_str())))
    }
}

impl PlannedView {
    fn new(disk: &PlannedDisk) -> Self {
        let (fit, reason) = match &disk.probe.fit {
            Fit::Natural => ("natural", None),
            Fit::Possible => ("possible", None),
            Fit::Unfit { why, .. } => ("unfit", Some(why.clone())),
        };
        let options = disk.request.options.iter();
        Self {
            target: disk.request.disk.target.clone(),
            alias: disk.request.alias.to_string(),
            method: disk.method.clone(),
            why: why_word(disk.why),
            fit,
            reason,
            effect: disk.probe.effect.clone(),
            capabilities: disk.probe.capabilities.iter().map(ToString::to_string).collect(),
            options: options.map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            details: disk.probe.details.clone(),
            warnings: disk.probe.warnings.clone(),
        }
    }

    fn text(&self) -> String {
        let why = match self.why {
            "override" => "asked for",
            "disk" => "the disk's own",
            _ => "default for this disk",
        };
        let method = match &self.method {
            Some(method) => format!("{method} ({why})"),
            None => "none".to_owned(),
        };
        let mut lines = vec![("method", method), ("alias", self.alias.clone())];
        if let Some(reason) = &self.reason {
            lines.push(("not possible", reason.clone()));
        } else {
            lines.push(("effect", self.effect.clone()));
            lines.push(("offers", self.capabilities.join(", ")));
        }
        lines.extend(self.options.iter().map(|(k, v)| (k.as_str(), v.clone())));
        lines.extend(self.details.iter().map(|(k, v)| (k.as_str(), v.clone())));
        format!("{}\n{}", self.target, fields("  ", lines))
    }
}

impl Text for PlanView {
    fn text(&self) -> String {
        let disks: Vec<String> = self.disks.iter().map(PlannedView::text).collect();
        let text = disks.join("\n") + &skipped_text(&self.skipped);
        if self.possible {
            return text;
        }
        let bad = self
            .disks
            .iter()
            .filter(|d| d.reason.is_some())
            .map(|d| d.target.as_str());
        let bad: Vec<&str> = bad.collect();
        format!(
            "{text}\nThis snapshot cannot be taken as it is: {}.\n",
            bad.join(", ")
        )
    }
}
