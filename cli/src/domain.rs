//! `disksnap domain`: domains made known by name, and the active document of one.

use disksnap::xml::Element;
use disksnap::{
    AddedChain, BackingStore, Checkpoint, CheckpointName, Definition, Disk, Domain, DomainDocument, DomainId,
    Inspected, Result, Serving, Source, read_document,
};
use serde::Serialize;

use crate::args::DomainCommand;
use crate::context::Context;
use crate::export_view::{ServingView, names};
use crate::failure::Outcome;
use crate::output::{Text, table};
use crate::snapshot_view::{Brief, views};
use crate::source_view::SourceView;

pub(crate) async fn run(context: &Context, command: DomainCommand) -> Outcome {
    match command {
        DomainCommand::Define { file } => {
            let document = DomainDocument::parse_named(read_document(&file)?, file.display())?;
            document.warnings().iter().for_each(|w| context.out.warn(w));
            let id = context.disksnap().await?.define(&document).await?;
            context
                .out
                .show(&IdView::new(&id, "defined"), || element(&id).to_document())
        }
        DomainCommand::Undefine { known } => {
            let id = context.disksnap().await?.undefine(&known).await?;
            context
                .out
                .show(&IdView::new(&id, "undefined"), || element(&id).to_document())
        }
        DomainCommand::List => list(context).await,
        DomainCommand::Update { chain } => update(context, chain).await,
        DomainCommand::Show => show(context).await,
    }
}

/// The catalog knows what the document does not: a kill between the two, or `--keep-document`, left it behind.
///
/// With `chain`, what the headers of the images name is written too.
async fn update(context: &Context, chain: bool) -> Outcome {
    let target = context.target().await?;
    let disks = target.disksnap.dispatcher().outdated(&target.domain).await?;
    let mut document = target.disksnap.update(&target.given, &disks).await?;
    let mut added = Vec::new();
    if chain {
        (document, added) = target.disksnap.add_chains(&target.given).await?;
    }
    let view = Updated {
        targets: disks.into_iter().map(|disk| disk.target).collect(),
        added: added.iter().map(AddedView::new).collect(),
    };
    context.out.show(&view, || Ok(document.text().to_owned()))
}

async fn list(context: &Context) -> Outcome {
    let all = context
        .disksnap()
        .await?
        .dispatcher()
        .catalog()
        .definitions()
        .await?;
    let domains = all.iter().map(|d| IdView::new(&d.id, "known")).collect();
    context.out.show(&Domains { domains }, || list_document(&all))
}

fn list_document(all: &[Definition]) -> Result<String> {
    let domains = all.iter().map(|d| element(&d.id));
    Element::new("domains").children(domains).to_document()
}

fn element(id: &DomainId) -> Element {
    Element::new("domain")
        .attr("name", &id.name)
        .attr("uuid", id.uuid)
}

/// The document is what people want to see too: text and XML are the same here.
async fn show(context: &Context) -> Outcome {
    let target = context.target().await?;
    let dispatcher = target.disksnap.dispatcher();
    let serving = dispatcher.serving(&target.domain).await?;
    let snapshots = dispatcher.list(&target.domain).await?;
    let checkpoints = dispatcher.catalog().checkpoints(&target.domain.id).await?;
    let document = active_document(&target.document, &serving, &snapshots, &checkpoints)?;
    let names = names(&snapshots);
    let view = DomainView {
        name: target.domain.id.name.clone(),
        uuid: target.domain.id.uuid.to_string(),
        monitor: target
            .domain
            .sockets
            .monitor
            .as_ref()
            .map(|p| p.display().to_string()),
        agent: target
            .domain
            .sockets
            .agent
            .as_ref()
            .map(|p| p.display().to_string()),
        disks: disks(&target.domain),
        serving: ServingView::new(&serving, &names),
        snapshots: snapshots.iter().map(Brief::new).collect(),
        document: document.text().to_owned(),
    };
    context.out.show(&view, || Ok(document.text().to_owned()))
}

/// The document with what is served and what there is of snapshots in it (F6).
fn active_document(
    document: &DomainDocument,
    serving: &Serving,
    snapshots: &[Inspected],
    checkpoints: &[Checkpoint],
) -> Result<DomainDocument> {
    let mut document = document
        .with_serving(serving)?
        .with_snapshots(&views(snapshots))?;
    for disk in document.domain().disks.clone() {
        let covering = checkpoints.iter().filter(|c| c.disk(&disk.target).is_some());
        let names: Vec<CheckpointName> = covering.map(|c| c.name.clone()).collect();
        document = document.with_checkpoints(&disk.target, &names)?;
    }
    Ok(document)
}

fn disks(domain: &Domain) -> Vec<DiskView> {
    domain.disks.iter().map(DiskView::new).collect()
}

#[derive(Debug, Serialize)]
struct IdView {
    name: String,
    uuid: String,
    #[serde(skip)]
    what: &'static str,
}

impl IdView {
    fn new(id: &DomainId, what: &'static str) -> Self {
        Self {
            name: id.name.clone(),
            uuid: id.uuid.to_string(),
            what,
        }
    }
}

/// The disks that were brought up to date.
#[derive(Debug, Serialize)]
struct Updated {
    targets: Vec<String>,
    /// The images that the document did not name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    added: Vec<AddedView>,
}

impl Text for Updated {
    fn text(&self) -> String {
        let mut text = String::new();
        if !self.targets.is_empty() {
            text = format!("brought up to date: {}\n", self.targets.join(", "));
        }
        self.added.iter().for_each(|added| text += &added.text);
        if text.is_empty() {
            "The document is up to date.\n".clone_into(&mut text);
        }
        text
    }
}

/// What was added to one disk.
#[derive(Debug, Serialize)]
struct AddedView {
    disk: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<SourceView>,
    layers: Vec<SourceView>,
    #[serde(skip)]
    text: String,
}

impl AddedView {
    fn new(added: &AddedChain) -> Self {
        let mut lines = vec![format!("{}: the document names these images now:", added.target)];
        let mut line = |what: &str, source: &Source, format: Option<&String>| {
            let format = format.map_or_else(String::new, |format| format!(" ({format})"));
            lines.push(format!("  {what}{source}{format}"));
        };
        if let Some(data) = &added.data_store {
            line("data in ", &data.source, None);
        }
        for layer in &added.layers {
            line("", &layer.source, layer.format.as_ref());
            if let Some(data) = &layer.data_store {
                line("  its data in ", &data.source, None);
            }
        }
        let view = |layer: &BackingStore| SourceView::new(&layer.source, layer.format.as_deref());
        Self {
            disk: added.target.clone(),
            data: added
                .data_store
                .as_ref()
                .map(|data| SourceView::new(&data.source, Some("raw"))),
            layers: added.layers.iter().map(view).collect(),
            text: lines.join("\n") + "\n",
        }
    }
}

impl Text for IdView {
    fn text(&self) -> String {
        format!("{} {} ({})\n", self.what, self.name, self.uuid)
    }
}

#[derive(Debug, Serialize)]
struct Domains {
    domains: Vec<IdView>,
}

impl Text for Domains {
    fn text(&self) -> String {
        if self.domains.is_empty() {
            return "No domain is known. Make one known: disksnap domain define FILE\n".to_owned();
        }
        let mut rows = vec![vec!["NAME".to_owned(), "UUID".to_owned()]];
        rows.extend(self.domains.iter().map(|d| vec![d.name.clone(), d.uuid.clone()]));
        table(&rows)
    }
}

#[derive(Debug, Serialize)]
struct DomainView {
    name: String,
    uuid: String,
    monitor: Option<String>,
    agent: Option<String>,
    disks: Vec<DiskView>,
    #[serde(flatten)]
    serving: ServingView,
    snapshots: Vec<Brief>,
    #[serde(skip)]
    document: String,
}

impl Text for DomainView {
    fn text(&self) -> String {
        self.document.clone()
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DiskView {
    target: String,
    device: String,
    alias: Option<String>,
    serial: Option<String>,
    read_only: bool,
    shareable: bool,
    encrypted: bool,
    method: Option<String>,
    source: Option<SourceView>,
}

impl DiskView {
    fn new(disk: &Disk) -> Self {
        let format = disk.driver.format.as_deref();
        Self {
            target: disk.target.clone(),
            device: disk.device.to_string(),
            alias: disk.alias.clone(),
            serial: disk.serial.clone(),
            read_only: disk.read_only,
            shareable: disk.shareable,
            encrypted: disk.encrypted,
            method: disk.method.as_ref().map(|m| m.method.clone()),
            source: disk.source.as_ref().map(|s| SourceView::new(s, format)),
        }
    }
}
