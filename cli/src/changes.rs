//! `disksnap changes`: which ranges of a domain's disks have changed between a checkpoint and a snapshot.

use std::io::Write;

use disksnap::xml::Element;
use disksnap::{ChangedExtent, Error, ErrorKind, Lineage, Snapshot};
use serde_json::json;

use crate::args::{Changes, Form};
use crate::context::{Context, Target};
use crate::failure::{Failure, Outcome};
use crate::signals::Stop;

/// So many bytes are put together before they are printed.
const PIECE: usize = 64 << 10;

pub(crate) async fn run(context: &Context, changes: Changes) -> Outcome {
    let target = context.target().await?;
    let snapshot = snapshot_of(&target, &changes).await?;
    let targets = targets(&target, &changes, &snapshot).await?;
    let stop = Stop::listen(false)?;
    let mut listed = Listing::begin(context.out.form);
    for disk in &targets {
        let reader = target
            .disksnap
            .read_since(&target.domain, &snapshot.name, disk, &changes.from)
            .await?;
        for warning in reader.warnings() {
            context.out.warn(warning);
        }
        listed
            .superset
            .extend(reader.excess().map(|why| (disk.clone(), why.to_owned())));
        let outcome = tokio::select! {
            outcome = list(&mut listed, disk, &reader) => outcome,
            signal = stop.wait() => Err(Failure::Stopped(signal)),
        };
        let closed = reader.close().await;
        outcome?;
        closed?;
    }
    listed.end()
}

async fn list(listed: &mut Listing, disk: &str, reader: &disksnap::SnapshotReader) -> Outcome {
    let mut extents = reader.changes()?;
    while let Some(extent) = extents.next().await? {
        listed.put(disk, extent)?;
    }
    Ok(())
}

/// The snapshot that is named, or the latest.
async fn snapshot_of(target: &Target, changes: &Changes) -> Result<Snapshot, Failure> {
    let dispatcher = target.disksnap.dispatcher();
    if let Some(name) = &changes.to {
        return Ok(dispatcher.show(&target.domain, name).await?.snapshot);
    }
    let mut all = dispatcher.catalog().snapshots(&target.domain.id).await?;
    all.pop().ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "the domain has no snapshot")
            .during("changes")
            .with("domain", &target.domain.id)
            .hint("What has changed is told of a snapshot: take one first, `disksnap snapshot create`.")
            .into()
    })
}

/// The disks that are named, or else all that the snapshot has and the checkpoint covers.
async fn targets(target: &Target, changes: &Changes, snapshot: &Snapshot) -> Result<Vec<String>, Failure> {
    if !changes.disks.is_empty() {
        return Ok(changes.disks.clone());
    }
    let catalog = target.disksnap.dispatcher().catalog();
    let lineage = Lineage::new(catalog.checkpoints(&target.domain.id).await?)?;
    let checkpoint = lineage.get(&changes.from).map_err(|e| e.during("changes"))?;
    let both = snapshot.disks.iter().map(|disk| &disk.target);
    let both: Vec<String> = both
        .filter(|disk| checkpoint.disk(disk).is_some())
        .cloned()
        .collect();
    if both.is_empty() {
        let (from, to) = (&checkpoint.name, &snapshot.name);
        let message = format!("the checkpoint '{from}' covers no disk of the snapshot '{to}'");
        return Err(Error::new(ErrorKind::Invalid, message).during("changes").into());
    }
    Ok(both)
}

/// What is printed, extent by extent: a list may be longer than memory.
pub(crate) struct Listing {
    form: Form,
    buffer: Vec<u8>,
    count: u64,
    /// The disks of which more may be told than was written, and why.
    pub(crate) superset: Vec<(String, String)>,
}

impl Listing {
    pub(crate) fn begin(form: Form) -> Self {
        let head = match form {
            Form::Text => "DISK  OFFSET  LENGTH\n",
            Form::Json => "{\"changes\": [",
            Form::Xml => "<changes unit='bytes'>\n",
        };
        let buffer = head.as_bytes().to_vec();
        Self {
            form,
            buffer,
            count: 0,
            superset: Vec::new(),
        }
    }

    pub(crate) fn put(&mut self, disk: &str, extent: ChangedExtent) -> Outcome {
        let ChangedExtent { offset, length } = extent;
        let line = match self.form {
            Form::Text => format!("{disk}  {offset}  {length}\n"),
            Form::Json => {
                let comma = if self.count == 0 { "" } else { "," };
                let entry = json!({ "disk": disk, "offset": offset, "length": length });
                format!("{comma}\n  {entry}")
            }
            Form::Xml => {
                let element = Element::new("extent").attr("disk", disk);
                let element = element.attr("offset", offset).attr("length", length);
                format!("  {}", element.to_document()?)
            }
        };
        self.count += 1;
        self.buffer.extend_from_slice(line.as_bytes());
        if self.buffer.len() >= PIECE {
            self.print()?;
        }
        Ok(())
    }

    pub(crate) fn end(mut self) -> Outcome {
        let superset = self.superset.iter();
        let tail = match self.form {
            Form::Text if self.superset.is_empty() => String::new(),
            Form::Text => superset.fold(
                "\nmore than what was written may be told:\n".to_owned(),
                |text, (disk, why)| text + &format!("{disk}: {why}\n"),
            ),
            Form::Json => {
                let each: Vec<_> = superset
                    .map(|(disk, why)| json!({ "disk": disk, "why": why }))
                    .collect();
                format!("\n], \"superset\": {}}}\n", json!(each))
            }
            Form::Xml => {
                let each = superset.map(|(disk, why)| {
                    let element = Element::new("superset").attr("disk", disk).attr("why", why);
                    element.to_document().map(|line| format!("  {line}"))
                });
                each.collect::<disksnap::Result<String>>()? + "</changes>\n"
            }
        };
        self.buffer.extend_from_slice(tail.as_bytes());
        self.print()
    }

    fn print(&mut self) -> Outcome {
        let mut out = std::io::stdout().lock();
        out.write_all(&self.buffer)
            .and_then(|()| out.flush())
            .map_err(Failure::output)?;
        self.buffer.clear();
        Ok(())
    }
}
