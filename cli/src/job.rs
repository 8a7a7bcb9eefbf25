//! `disksnap job`: merges that are under way.

use disksnap::xml::Element;
use disksnap::{Error, ErrorKind, Job, JobUnit, MergeInto, Progress, Result};
use serde::Serialize;
use uuid::Uuid;

use crate::args::JobCommand;
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::{Text, size, table};

pub(crate) async fn run(context: &Context, command: JobCommand) -> Outcome {
    let (disksnap, domain) = if context.global.domain.is_some() {
        let target = context.target().await?;
        (target.disksnap, Some(target.domain.id))
    } else {
        (context.disksnap().await?, None)
    };
    let dispatcher = disksnap.dispatcher();
    let jobs = match command {
        JobCommand::List => dispatcher.jobs(domain.as_ref()).await?,
        JobCommand::Show { id } => vec![one(dispatcher.jobs(domain.as_ref()).await?, id)?],
        JobCommand::Cancel { id } => {
            let job = dispatcher.cancel_job(id).await?;
            let view = Cancelled {
                cancelled: id.to_string(),
                snapshot: job.snapshot.to_string(),
            };
            return context.out.show(&view, || {
                Element::new("job")
                    .attr("id", id)
                    .attr("state", "cancelled")
                    .to_document()
            });
        }
    };
    let view = Jobs {
        jobs: jobs.iter().map(JobView::new).collect(),
    };
    context.out.show(&view, || document(&jobs))
}

fn one(jobs: Vec<Job>, id: Uuid) -> Result<Job> {
    jobs.into_iter().find(|job| job.id == id).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("no job {id} is under way"))
            .hint("`disksnap job list` tells the jobs that there are.")
    })
}

fn document(jobs: &[Job]) -> Result<String> {
    let each = jobs.iter().map(|job| {
        Element::new("job")
            .attr("id", job.id)
            .attr("domain", &job.domain.name)
            .attr("snapshot", &job.snapshot)
            .attr("into", into(job.into))
            .attr("driven", if job.driven { "yes" } else { "no" })
            .children(job.units.iter().map(|unit| {
                let element = Element::new("disks").attr("targets", unit.targets.join(" "));
                let element = element.attr("state", word(&unit.progress));
                match &unit.progress {
                    Progress::Running { done, total } => element.attr("done", done).attr("total", total),
                    Progress::Failed(why) => element.text(why),
                    _ => element,
                }
            }))
    });
    Element::new("jobs").children(each).to_document()
}

fn into(into: MergeInto) -> &'static str {
    match into {
        MergeInto::Base => "base",
        MergeInto::Overlay => "overlay",
    }
}

fn word(progress: &Progress) -> &'static str {
    match progress {
        Progress::Idle => "idle",
        Progress::Running { .. } => "running",
        Progress::Ready => "ready",
        Progress::Finished => "finished",
        Progress::Failed(_) => "failed",
    }
}

#[derive(Debug, Serialize)]
struct Cancelled {
    cancelled: String,
    snapshot: String,
}

impl Text for Cancelled {
    fn text(&self) -> String {
        format!("cancelled the merge of {}\n", self.snapshot)
    }
}

#[derive(Debug, Serialize)]
struct Jobs {
    jobs: Vec<JobView>,
}

#[derive(Debug, Serialize)]
struct JobView {
    id: String,
    domain: String,
    snapshot: String,
    into: MergeInto,
    driven: bool,
    units: Vec<UnitView>,
}

#[derive(Debug, Serialize)]
struct UnitView {
    targets: Vec<String>,
    #[serde(flatten)]
    progress: Progress,
}

impl JobView {
    fn new(job: &Job) -> Self {
        Self {
            id: job.id.to_string(),
            domain: job.domain.name.clone(),
            snapshot: job.snapshot.to_string(),
            into: job.into,
            driven: job.driven,
            units: job.units.iter().map(UnitView::new).collect(),
        }
    }
}

impl UnitView {
    fn new(unit: &JobUnit) -> Self {
        Self {
            targets: unit.targets.clone(),
            progress: unit.progress.clone(),
        }
    }

    fn text(&self) -> String {
        let state = match &self.progress {
            Progress::Running { done, total } => format!("{} of {}", size(*done), size(*total)),
            Progress::Failed(why) => format!("failed: {why}"),
            other => word(other).to_owned(),
        };
        format!("{}: {state}", self.targets.join(","))
    }
}

impl Text for Jobs {
    fn text(&self) -> String {
        if self.jobs.is_empty() {
            return "No merge is under way.\n".to_owned();
        }
        let header = ["ID", "DOMAIN", "SNAPSHOT", "INTO", "DRIVEN", "DISKS"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        rows.extend(self.jobs.iter().map(|job| {
            let units: Vec<String> = job.units.iter().map(UnitView::text).collect();
            let driven = if job.driven { "yes" } else { "no" };
            vec![
                job.id.clone(),
                job.domain.clone(),
                job.snapshot.clone(),
                into(job.into).to_owned(),
                driven.to_owned(),
                units.join("; "),
            ]
        }));
        table(&rows)
    }
}
