//! The method `qemu-external-qcow2`, which documents call `qemu`: external snapshots.
//!
//! An empty qcow2 overlay is put on top of the disk's image. From that instant on the domain writes to the overlay, and
//! what was its image is the snapshot: any program can read it. The price is that the domain's disk is another one
//! from then on (`modifiedDisk`), and that giving the snapshot up means merging. Sources:
//! `seeds/live-disk-snapshot-rfc.txt`; QEMU's QAPI commands `blockdev-snapshot`, `block-commit`, `transaction`.
//!
//! | | domain runs | domain off |
//! | --- | --- | --- |
//! | create | `blockdev-add`, then one `transaction` for all disks | the overlay is written; the document names it |
//! | merge into the base | `block-commit`, finished with the bitmaps | `qemu-img commit`, `rebase` |
//! | merge into the overlay | `block-stream`; the snapshot stands by itself then | `qemu-img rebase` |
//! | revert | not possible | a fresh overlay in the place of the present one |
//!
//! The bitmaps that record what changes go on on the overlay, under the same names, from the snapshot's instant; a
//! merge brings them together again.

mod bitmaps;
mod create;
mod image;
mod inspect;
mod layer;
mod merge;
mod names;
mod off_bitmaps;
mod place;
mod qemu_img;
mod record;
mod remote;
mod revert;
mod settings;
mod stream;
mod touched;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Capability, Compare, DiskRequest, DiskSnapshot, Error, ErrorKind, Fit, Health, Host, Merge, Method,
    Prepared, Probe, Result, Revert, SnapshotId, Source, TakePlan, Taken, Unit,
};

use crate::create::Choice;
use crate::merge::ExternalMerge;
use crate::record::{Record, remembered, written};
use crate::revert::ExternalRevert;
use crate::settings::Settings;

disksnap_core::register!(|| Arc::new(QemuExternalQcow2));

/// What every disk that suits it can do, running or not.
const CAPABILITIES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
    Capability::Merge,
];

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct QemuExternalQcow2;

#[async_trait]
impl DiskSnapshot for QemuExternalQcow2 {
    fn method(&self) -> Method {
        Method {
            name: "qemu-external-qcow2".to_owned(),
            aliases: vec!["qemu".to_owned()],
            summary: "puts a qcow2 overlay on the disk; the domain goes on in it, and the former image is the snapshot"
                .to_owned(),
            options: Settings::docs(),
            capabilities: CAPABILITIES.to_vec(),
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        // No snapshot has this id: where an overlay would go is all that it is for.
        let nobody = SnapshotId(uuid::Uuid::nil());
        let choices = create::choose(host, nobody, disks).await?;
        Ok(disks
            .iter()
            .zip(choices)
            .map(|(request, choice)| probe(request, choice))
            .collect())
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        // What a killed attempt at the same request left would be in the way.
        self.abort(host, id, disks, None).await?;
        let mut choices = Vec::with_capacity(disks.len());
        for (request, choice) in disks.iter().zip(create::choose(host, id, disks).await?) {
            let target = &request.disk.target;
            let choice = choice.map_err(|e| e.with("disk", target))?;
            choice
                .image
                .check_space(image::CALLED, choice.size)
                .map_err(|e| e.with("disk", target))?;
            choices.push(choice);
        }
        create::build(host, &choices).await?;
        choices.iter().map(prepared).collect()
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        Ok(create::take(&remembered(&prepared.data)?))
    }

    async fn take(&self, host: &dyn Host, _: &Prepared) -> Result<Taken> {
        create::take_off(host).await?;
        Ok(Taken::default())
    }

    async fn complete(&self, host: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let choice: Choice = remembered(&prepared.data)?;
        create::complete(host, &choice).await?.unit(&choice.disk)
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        prepared: Option<&[Prepared]>,
    ) -> Result<()> {
        let known = prepared.unwrap_or_default().iter().map(|p| remembered(&p.data));
        let known: Vec<Choice> = known.collect::<Result<_>>()?;
        create::abort(host, id, disks, &known).await
    }

    async fn inspect(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        inspect::inspect(host, &Record::of(unit)?).await
    }

    async fn delete(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        merge::delete(host, &Record::of(unit)?).await
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        Some(Arc::new(ExternalRevert))
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        Some(Arc::new(ExternalMerge))
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

fn prepared(choice: &Choice) -> Result<Prepared> {
    let top = match choice.seat {
        Some(_) => choice.names().overlay(),
        None => choice.image.path.display().to_string(),
    };
    Ok(Prepared {
        unit: choice.target.clone(),
        targets: vec![choice.target.clone()],
        data: written(choice)?,
        tops: BTreeMap::from([(choice.target.clone(), top)]),
        warnings: Vec::new(),
    })
}

fn probe(request: &DiskRequest, choice: Result<Choice>) -> Probe {
    let (choice, base) = match choice.and_then(|choice| Ok((choice.base()?.clone(), choice))) {
        Ok((base, choice)) => (choice, base),
        Err(error) => return Probe::refused(error.kind(), reason(&error)),
    };
    // These may change until it is done for good; prepare refuses them then.
    let mut warnings: Vec<String> = match choice.image.check_space(image::CALLED, choice.size) {
        Ok(low) => low.into_iter().collect(),
        Err(error) => vec![format!("would be refused: {}", reason(&error))],
    };
    if choice.image.mark.is_some() && choice.image.path.symlink_metadata().is_ok() {
        let path = choice.image.path.display();
        warnings.push(format!(
            "would be refused: {path} exists, and is never overwritten"
        ));
    }
    if choice.stale {
        warnings.push(format!(
            "the domain's document is out of date: the disk's image is {} now",
            base.path.display()
        ));
    }
    if let Some(data) = &base.data {
        warnings.push(format!(
            "the snapshot keeps its data in {}: it can be merged and reverted, and not be read or exported here",
            data.display()
        ));
    }
    let overlay = overlay_to_be(request, &choice);
    // The document's own rule: a qcow2 file is snapshotted by QEMU.
    let natural = base.format == "qcow2" && matches!(base.source(), Source::File { .. });
    Probe {
        fit: if natural { Fit::Natural } else { Fit::Possible },
        // Each disk by itself, whatever its images are by now.
        unit: request.disk.target.clone(),
        capabilities: CAPABILITIES.to_vec(),
        effect: format!(
            "{} becomes the snapshot, and must not be written to any more; the domain goes on in the overlay {overlay}, \
             and its document must name that.",
            base.path.display()
        ),
        details: BTreeMap::from([
            ("base".to_owned(), base.path.display().to_string()),
            ("overlay".to_owned(), overlay),
            ("layers".to_owned(), choice.layers.len().to_string()),
        ]),
        warnings,
    }
}

/// The overlay's path; where its name holds the snapshot's id, that is not known yet.
fn overlay_to_be(request: &DiskRequest, choice: &Choice) -> String {
    let path = choice.image.path.display().to_string();
    match Settings::read(request) {
        Ok(Settings { file: Some(_) }) => path,
        _ => path
            .replace(&uuid::Uuid::nil().to_string(), "ID")
            .replace(&SnapshotId(uuid::Uuid::nil()).short(), "ID"),
    }
}

/// The message and the next step: why a disk does not suit, in one text.
fn reason(error: &Error) -> String {
    let cause = std::error::Error::source(error)
        .map(|s| format!(": {s}"))
        .unwrap_or_default();
    let hint = error
        .next_step()
        .map(|hint| format!(". {hint}"))
        .unwrap_or_default();
    format!("{}{cause}{hint}", error.message())
}

/// What stands against a merge or a revert, and what can be done about it.
fn busy(why: impl Into<String>, next: impl Into<String>) -> Error {
    Error::new(ErrorKind::Busy, why).hint(next)
}
