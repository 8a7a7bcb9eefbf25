//! `disksnap backup create`, `pull` and `abandon`.

use std::time::SystemTime;

use disksnap::{Disks, Error, ErrorKind, Quiesce};
use disksnap_backup::{BackupRequest, LocalStore, RemoteRequest, Repository, Subject};
use serde::Serialize;
use std::sync::Arc;

use crate::backup::args::{Create, Pull, Repo};
use crate::backup::progress::Teller;
use crate::backup::show::PointView;
use crate::backup::{made, repository};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::Text;
use crate::signals::Stop;

pub(crate) async fn create(context: &Context, create: Create) -> Outcome {
    let target = context.target().await?;
    let repository = repository_or_new(&create.repo, create.pulling.init).await?;
    let mut request = BackupRequest {
        level: create.pulling.level.into(),
        quiesce: create.quiesce.map_or(Quiesce::None, Into::into),
        mountpoints: create.mountpoints,
        compression: create.pulling.compress.unwrap_or_default(),
        rate_limit: create.pulling.rate_limit,
        resume: !create.no_resume,
        allow_missing_machine: create.allow_missing,
        ..BackupRequest::default()
    };
    request.deadline = create.deadline.unwrap_or(request.deadline);
    if !create.disks.is_empty() {
        request.disks = Disks::Named(create.disks);
    }
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let subject = Subject {
        disksnap: &target.disksnap,
        given: &target.given,
        document: &target.document,
        domain: &target.domain,
    };
    let began = SystemTime::now();
    let made = disksnap_backup::create(subject, &repository, &request, &teller).await;
    teller.end();
    let made = made.map_err(|error| stopped(error, &stop))?;
    let view = PointView::made(&made, began);
    context.out.show(&view, no_xml)
}

pub(crate) async fn pull(context: &Context, pull: Pull) -> Outcome {
    let target = context.target().await?;
    let repository = repository_or_new(&pull.repo, pull.pulling.init).await?;
    let request = RemoteRequest {
        document: target.document.clone(),
        exports: pull.exports,
        tls: pull.tls_credentials,
        snapshot: pull.snapshot,
        taken: pull.taken.unwrap_or_else(SystemTime::now),
        checkpoint: pull.checkpoint,
        since: pull.since,
        level: pull.pulling.level.into(),
        compression: pull.pulling.compress.unwrap_or_default(),
        rate_limit: pull.pulling.rate_limit,
        resume: pull.resume,
    };
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let began = SystemTime::now();
    let made = disksnap_backup::pull(&repository, &request, &teller).await;
    teller.end();
    let made = made.map_err(|error| stopped(error, &stop))?;
    let view = PointView::made(&made, began);
    context.out.show(&view, no_xml)
}

pub(crate) async fn abandon(context: &Context, repo: &Repo) -> Outcome {
    let target = context.target().await?;
    let repository = repository(repo).await?;
    let stop = Stop::listen(true)?;
    let teller = Teller::new(context.out, &stop);
    let subject = Subject {
        disksnap: &target.disksnap,
        given: &target.given,
        document: &target.document,
        domain: &target.domain,
    };
    let given_up = disksnap_backup::abandon(subject, &repository, &teller).await?;
    context.out.show(&Abandoned { given_up }, no_xml)?;
    stop.check()
}

async fn repository_or_new(repo: &Repo, init: bool) -> Outcome<Repository> {
    made(&repo.repo, init).await?;
    let store = Arc::new(LocalStore::at(&repo.repo));
    Ok(Repository::open_or_init(store).await?)
}

/// What was asked for with a signal is told with what is to be known of it, and ends as signals end.
pub(crate) fn stopped(error: Error, stop: &Stop) -> Failure {
    match stop.heard() {
        Some(signal) => {
            // The hint says how to go on.
            Failure::Error(error).conclude(crate::args::Form::Text);
            Failure::Stopped(signal)
        }
        None => Failure::Error(error),
    }
}

pub(crate) fn no_xml() -> disksnap::Result<String> {
    Err(Error::new(ErrorKind::Unsupported, "backups have no XML form").hint("Ask for --output json."))
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Abandoned {
    given_up: Vec<String>,
}

impl Text for Abandoned {
    fn text(&self) -> String {
        match self.given_up.as_slice() {
            [] => "nothing was left of any backup\n".to_owned(),
            points => format!("gave up {}\n", points.join(", ")),
        }
    }
}
