//! `disksnap fill`: restoring into a paused domain.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueHint};
use disksnap::xml::{self, Element};
use disksnap::{
    Alias, Disk, Domain, Error, ErrorKind, ExportDisk, ExportRequest, FillDisk, FillEnd, FillEnded,
    FillHealth, FillRequest, Filling, Result, nbd_uri, read_document,
};
use serde::Serialize;

use crate::args::Place;
use crate::context::{Context, Target};
use crate::export::tls;
use crate::export_view::ServerView;
use crate::failure::Outcome;
use crate::output::{Text, fields, size, table};
use crate::plan::{SkippedView, skipped_text};
use crate::signals::Stop;

#[derive(Debug, Subcommand)]
pub(crate) enum FillCommand {
    /// Take disks of a paused domain from its guest, and serve them writable over NBD
    ///
    /// The domain is started paused (`virsh start --paused`, QEMU's -S), and stays so. Whatever writes to NBD fills the
    /// disks: nbdcopy, qemu-img convert, a backup program. What nobody writes stays as it was. Every other act on the
    /// domain waits until `disksnap fill end`.
    Start(FillStart),
    /// List what is being filled
    List,
    /// Give the guest its disks again, flushed
    End {
        /// Let the guest run, on what the disks hold now
        #[arg(long)]
        resume: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct FillStart {
    /// A disk of the domain, by its target; may be given several times
    ///
    /// If none is given all disks are meant but CD-ROMs, floppies, read-only and shareable disks and empty drives.
    #[arg(long = "disk", value_name = "TARGET")]
    disks: Vec<String>,
    /// A <blockexport> that names the disks, by target or alias, and says where to serve them; - for standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    #[arg(conflicts_with_all = ["disks", "listen", "tls_credentials"])]
    xml: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

pub(crate) async fn run(context: &Context, command: FillCommand) -> Outcome {
    match command {
        FillCommand::Start(start) => self::start(context, start).await,
        FillCommand::List => list(context).await,
        FillCommand::End { resume } => end(context, resume).await,
    }
}

async fn start(context: &Context, start: FillStart) -> Outcome {
    let document = start.xml.as_deref().map(document).transpose()?;
    let tls = tls(&start.place)?;
    let target = context.target().await?;
    let request = match document {
        Some(document) => asked(&target.domain, document, start.place.allow_remote)?,
        None => FillRequest {
            targets: start.disks,
            listen: start.place.listen,
            tls,
            allow_remote: start.place.allow_remote,
            lease: None,
        },
    };
    let stop = Stop::listen(true)?;
    let filling = target
        .disksnap
        .dispatcher()
        .fill_start(&target.domain, &request)
        .await?;
    for warning in &filling.warnings {
        context.out.warn(warning);
    }
    tell(context, Some(&filling))?;
    stop.check()
}

fn document(path: &Path) -> Result<ExportRequest> {
    xml::export_request(&read_document(path)?).map_err(|e| e.with("document", path.display()))
}

/// What a `<blockexport>` asks for; it calls disks by their targets or aliases.
fn asked(domain: &Domain, document: ExportRequest, allow_remote: bool) -> Result<FillRequest> {
    let target = |wanted: &ExportDisk| {
        if wanted.checkpoint.is_some() || wanted.name.is_some() {
            let why = "a disk that is filled has no checkpoint, and its target is the export's name";
            return Err(Error::new(ErrorKind::Invalid, why).with("disk", &wanted.alias));
        }
        let named = |disk: &&Disk| disk.alias.as_deref() == Some(wanted.alias.0.as_str());
        match domain.disks.iter().find(named) {
            Some(disk) => Ok(disk.target.clone()),
            None => domain.disk(&wanted.alias.0).map(|disk| disk.target.clone()),
        }
    };
    Ok(FillRequest {
        targets: document.disks.iter().map(target).collect::<Result<_>>()?,
        listen: document.listen,
        tls: document.tls,
        allow_remote,
        lease: None,
    })
}

async fn list(context: &Context) -> Outcome {
    let target = context.target().await?;
    let filling = target.disksnap.dispatcher().filling(&target.domain).await?;
    tell(context, filling.as_ref())
}

fn tell(context: &Context, filling: Option<&Filling>) -> Outcome {
    let view = FillingView {
        filling: filling.map(Details::new),
    };
    context.out.show(&view, || match filling {
        Some(filling) => xml::export_request_document(&blockexport(filling)),
        None => Element::new("blockexports").to_document(),
    })
}

/// A filling as the document that would ask for it.
fn blockexport(filling: &Filling) -> ExportRequest {
    let disk = |disk: &FillDisk| ExportDisk {
        alias: Alias(disk.target.clone()),
        name: None,
        checkpoint: None,
    };
    ExportRequest {
        listen: Some(filling.server.listen.clone()),
        tls: filling.server.tls.clone(),
        allow_remote: false,
        disks: filling.disks.iter().map(disk).collect(),
    }
}

async fn end(context: &Context, resume: bool) -> Outcome {
    let target: Target = context.target().await?;
    let how = if resume {
        FillEnd::Resume
    } else {
        FillEnd::StayPaused
    };
    let stop = Stop::listen(true)?;
    let ended = target.disksnap.dispatcher().fill_end(&target.domain, how).await?;
    context.out.show(&EndedView { ended: &ended }, || {
        let disks = ended
            .disks
            .iter()
            .map(|disk| Element::new("disk").attr("name", disk));
        let resumed = if ended.resumed { "yes" } else { "no" };
        let root = Element::new("filled").attr("resumed", resumed);
        root.children(disks).to_document()
    })?;
    stop.check()
}

#[derive(Debug, Serialize)]
struct FillingView<'a> {
    filling: Option<Details<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Details<'a> {
    /// `open`, `interrupted` or `over`.
    state: &'static str,
    /// Why it is not open.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    since: String,
    server: ServerView,
    disks: Vec<DiskView<'a>>,
    skipped: Vec<SkippedView>,
    warnings: &'a [String],
}

#[derive(Debug, Serialize)]
struct DiskView<'a> {
    target: &'a str,
    size: u64,
    /// The export name that NBD clients ask for.
    name: &'a str,
    uri: Option<String>,
}

impl<'a> Details<'a> {
    fn new(filling: &'a Filling) -> Self {
        let (state, reason) = match &filling.health {
            FillHealth::Open => ("open", None),
            FillHealth::Interrupted(why) => ("interrupted", Some(why.as_str())),
            FillHealth::Over => (
                "over",
                Some("the domain's hypervisor has ended since: the disks hold what was written by then"),
            ),
        };
        let disk = |disk: &'a FillDisk| DiskView {
            target: &disk.target,
            size: disk.size,
            name: &disk.name,
            uri: nbd_uri(&disk.source),
        };
        Self {
            state,
            reason,
            since: humantime::format_rfc3339_seconds(filling.since).to_string(),
            server: ServerView::new(&filling.server),
            disks: filling.disks.iter().map(disk).collect(),
            skipped: SkippedView::all(&filling.skipped),
            warnings: &filling.warnings,
        }
    }
}

impl Text for FillingView<'_> {
    fn text(&self) -> String {
        let Some(filling) = &self.filling else {
            return "Nothing is being filled.\n".to_owned();
        };
        let state = match filling.reason {
            None => filling.state.to_owned(),
            Some(why) => format!("{}: {why}", filling.state),
        };
        let head = fields("", [("state", state), ("since", filling.since.clone())]);
        let mut rows = vec![["DISK", "SIZE", "URI"].map(str::to_owned).to_vec()];
        rows.extend(filling.disks.iter().map(|disk| {
            let uri = disk.uri.clone().unwrap_or_default();
            vec![disk.target.to_owned(), size(disk.size), uri]
        }));
        format!(
            "{head}{}\n{}{}",
            filling.server.place(),
            table(&rows),
            skipped_text(&filling.skipped)
        )
    }
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct EndedView<'a> {
    ended: &'a FillEnded,
}

impl Text for EndedView<'_> {
    fn text(&self) -> String {
        if self.ended.disks.is_empty() {
            return "Nothing was being filled; the guest is left as it is.\n".to_owned();
        }
        let guest = if self.ended.resumed {
            "and runs"
        } else {
            "and stays paused"
        };
        format!("The guest has {} again, {guest}.\n", self.ended.disks.join(", "))
    }
}
