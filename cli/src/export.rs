//! `disksnap export`: serving snapshots over NBD.

use std::path::{Path, PathBuf};

use disksnap::xml::{self, Element};
use disksnap::{
    Alias, CheckpointName, Error, ErrorKind, Export, ExportDisk, ExportRequest, Result, ServedBy, Serving,
    Snapshot, StopExports, Tls, read_document,
};
use serde::Serialize;

use crate::args::{ExportCommand, ExportStart, Place, ServerCommand, ServerStart, WhichServer};
use crate::context::{Context, Target};
use crate::export_view::{ServerView, ServingView, names_of};
use crate::failure::Outcome;
use crate::output::{Text, table};
use crate::signals::Stop;

pub(crate) async fn run(context: &Context, command: ExportCommand) -> Outcome {
    match command {
        ExportCommand::Start(start) => self::start(context, start).await,
        ExportCommand::List => list(context).await,
        ExportCommand::Stop { which, all } => self::stop(context, which, all).await,
        ExportCommand::Server(ServerCommand::Start(start)) => start_server(context, start).await,
        ExportCommand::Server(ServerCommand::Stop { which }) => stop_server(context, which).await,
    }
}

async fn start(context: &Context, start: ExportStart) -> Outcome {
    let document = start.xml.as_deref().map(request_of).transpose()?;
    let target = context.target().await?;
    let request = match document {
        Some(request) => ExportRequest {
            allow_remote: start.place.allow_remote,
            ..request
        },
        None => request(&target, start).await?,
    };
    let dispatcher = target.disksnap.dispatcher();
    let stop = Stop::listen(true)?;
    let exports = dispatcher.start_exports(&target.domain, &request).await?;
    let serving = dispatcher.serving(&target.domain).await?;
    tell(context, &target, only(serving, exports)).await?;
    stop.check()
}

fn request_of(path: &Path) -> Result<ExportRequest> {
    xml::export_request(&read_document(path)?).map_err(|e| e.with("document", path.display()))
}

/// The request that the options make: these disks of that snapshot, or all.
async fn request(target: &Target, start: ExportStart) -> Result<ExportRequest> {
    let name = start
        .name
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "no snapshot is named"))?;
    let found = target.disksnap.dispatcher().show(&target.domain, &name).await?;
    let place = start.place;
    Ok(ExportRequest {
        disks: disks(&found.snapshot, &start.disks, start.checkpoint.as_ref())?,
        tls: tls(&place)?,
        listen: place.listen,
        allow_remote: place.allow_remote,
    })
}

fn disks(
    snapshot: &Snapshot,
    targets: &[String],
    checkpoint: Option<&CheckpointName>,
) -> Result<Vec<ExportDisk>> {
    let wanted = |alias: &Alias| ExportDisk {
        alias: alias.clone(),
        name: None,
        checkpoint: checkpoint.cloned(),
    };
    if targets.is_empty() {
        return Ok(snapshot.disks.iter().map(|disk| wanted(&disk.alias)).collect());
    }
    let unknown = |target: &String| {
        let known: Vec<&str> = snapshot.disks.iter().map(|disk| disk.target.as_str()).collect();
        Error::new(
            ErrorKind::NotFound,
            format!("the snapshot has no disk '{target}'"),
        )
        .with("snapshot", &snapshot.name)
        .hint(format!("Its disks: {}.", known.join(", ")))
    };
    let find = |target: &String| snapshot.disk(target).ok_or_else(|| unknown(target));
    targets
        .iter()
        .map(|target| Ok(wanted(&find(target)?.alias)))
        .collect()
}

pub(crate) fn tls(place: &Place) -> Result<Option<Tls>> {
    let Some(directory) = &place.tls_credentials else {
        return Ok(None);
    };
    Ok(Some(Tls {
        credentials: credentials(directory)?,
        verify_client: !place.no_verify_client,
        allowed: place.allow_client.clone(),
    }))
}

/// A directory as a hypervisor, which stands elsewhere, finds it.
pub(crate) fn credentials(directory: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io("cannot find the TLS credentials", e).with("path", directory.display());
    directory.canonicalize().map_err(failed)
}

async fn list(context: &Context) -> Outcome {
    let target = context.target().await?;
    let serving = target.disksnap.dispatcher().serving(&target.domain).await?;
    tell(context, &target, serving).await
}

async fn tell(context: &Context, target: &Target, serving: Serving) -> Outcome {
    let catalog = target.disksnap.dispatcher().catalog();
    let names = names_of(&catalog.snapshots(&target.domain.id).await?);
    let view = ServingView::new(&serving, &names);
    context.out.show(&view, || xml::serving_document(&serving))
}

/// These exports, and the servers that serve them.
fn only(serving: Serving, exports: Vec<Export>) -> Serving {
    let used = |by: ServedBy| exports.iter().any(|export| export.served_by() == by);
    Serving {
        server: serving.server.filter(|_| used(ServedBy::Hypervisor)),
        image_server: serving.image_server.filter(|_| used(ServedBy::ImageServer)),
        exports,
    }
}

fn served_by(which: WhichServer) -> ServedBy {
    if which.images {
        ServedBy::ImageServer
    } else {
        ServedBy::Hypervisor
    }
}

async fn stop(context: &Context, which: Vec<String>, all: bool) -> Outcome {
    let target = context.target().await?;
    let which = if all {
        StopExports::All
    } else {
        StopExports::Aliases(aliases(&target, &which).await?)
    };
    let stop = Stop::listen(true)?;
    let stopped = target
        .disksnap
        .dispatcher()
        .stop_exports(&target.domain, &which)
        .await?;
    let stopped: Vec<String> = stopped.into_iter().map(|alias| alias.0).collect();
    context.out.show(&StoppedView { stopped: &stopped }, || {
        let each = stopped
            .iter()
            .map(|alias| Element::new("disk").attr("name", alias));
        Element::new("stopped").children(each).to_document()
    })?;
    stop.check()
}

/// What the arguments mean: an export's alias if there is one, else a snapshot's name.
async fn aliases(target: &Target, which: &[String]) -> Result<Vec<Alias>> {
    let catalog = target.disksnap.dispatcher().catalog();
    let snapshots = catalog.snapshots(&target.domain.id).await?;
    let exports = catalog.exports(&target.domain.id).await?;
    let mut aliases = Vec::new();
    for given in which {
        let exported = exports.iter().any(|export| export.alias.0 == *given);
        let of_disk = snapshots
            .iter()
            .flat_map(|s| &s.disks)
            .any(|disk| disk.alias.0 == *given);
        let named = snapshots.iter().find(|s| s.name.as_str() == given);
        match named {
            _ if exported || of_disk => aliases.push(Alias(given.clone())),
            Some(snapshot) => aliases.extend(snapshot.disks.iter().map(|disk| disk.alias.clone())),
            None => return Err(unknown(target, given)),
        }
    }
    Ok(aliases)
}

fn unknown(target: &Target, given: &str) -> Error {
    let what = format!("'{given}' is neither an export's alias nor a snapshot's name");
    Error::new(ErrorKind::NotFound, what)
        .during("export stop")
        .with("domain", &target.domain.id)
        .hint("See `disksnap export list` and `disksnap snapshot list`.")
}

async fn start_server(context: &Context, start: ServerStart) -> Outcome {
    let (by, place) = (served_by(start.which), start.place);
    let tls = tls(&place)?;
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let dispatcher = target.disksnap.dispatcher();
    let server = dispatcher
        .start_server(&target.domain, by, place.listen, tls, place.allow_remote)
        .await?;
    context
        .out
        .show(&ServerView::new(&server), || xml::export_document(&server, &[]))?;
    stop.check()
}

async fn stop_server(context: &Context, which: WhichServer) -> Outcome {
    let target = context.target().await?;
    let stop = Stop::listen(true)?;
    let dispatcher = target.disksnap.dispatcher();
    dispatcher.stop_server(&target.domain, served_by(which)).await?;
    context.out.show(&ServerStopped { server: None }, || {
        Element::new("blockexports").to_document()
    })?;
    stop.check()
}

#[derive(Debug, Serialize)]
struct ServerStopped {
    server: Option<()>,
}

impl Text for ServerStopped {
    fn text(&self) -> String {
        "The NBD server does not run.\n".to_owned()
    }
}

#[derive(Debug, Serialize)]
struct StoppedView<'a> {
    stopped: &'a [String],
}

impl Text for StoppedView<'_> {
    fn text(&self) -> String {
        if self.stopped.is_empty() {
            return "Nothing was being served.\n".to_owned();
        }
        let line = |alias: &String| vec!["stopped".to_owned(), alias.clone()];
        table(&self.stopped.iter().map(line).collect::<Vec<_>>())
    }
}
