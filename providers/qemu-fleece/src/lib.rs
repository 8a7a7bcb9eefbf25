//! The method `qemu-fleece`: image fleecing inside QEMU, without changing the disk that the guest writes to.
//!
//! Before the guest overwrites a block for the first time, QEMU copies the old content to a fleece
//! image; the snapshot is the fleece image over the disk, read through a node of QEMU's block graph
//! that is exported over NBD. Sources: `seeds/fleecing-pull-backup-rfc.txt`; QEMU's QAPI commands
//! `blockdev-add` (`copy-before-write`, `snapshot-access`), `blockdev-reopen`, `blockdev-backup`.
//!
//! Three ways, the safest for the guest first, chosen by what the QEMU at hand offers:
//!
//! | way | instant | a full fleece image |
//! | --- | --- | --- |
//! | `filter` | a filter put below the guest's device, all disks while the guest is paused | breaks the snapshot |
//! | `job` | one `transaction` of `blockdev-backup` jobs, raw images | fails the guest's writes before QEMU 10.1 |
//! | `classic` | the same, qcow2 images that back onto the disk | fails the guest's writes before QEMU 10.1 |

mod build;
mod choice;
mod encrypted;
mod image;
mod inspect;
mod names;
mod offers;
mod settings;
mod teardown;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use disksnap_core::{
    Access, Capability, Compare, DiskRequest, DiskResult, DiskSnapshot, Error, ErrorKind, Fit, Health, Host,
    Merge, Method, Prepared, Probe, Result, Revert, SnapshotId, TakePlan, Taken, Unit,
};
use serde_json::{Value, json};

use crate::build::Fleece;
use crate::choice::Choice;
use crate::image::{CALLED, locate};
use crate::names::Names;
use crate::offers::Sparing;
use crate::settings::Settings;

disksnap_core::register!(|| Arc::new(QemuFleece));

/// The provider.
#[derive(Debug, Clone, Copy)]
pub struct QemuFleece;

#[async_trait]
impl DiskSnapshot for QemuFleece {
    fn method(&self) -> Method {
        Method {
            name: "qemu-fleece".to_owned(),
            aliases: Vec::new(),
            summary:
                "copy-before-write inside QEMU; the domain keeps its disk, the snapshot is read over NBD"
                    .to_owned(),
            options: Settings::docs(),
            capabilities: vec![Capability::Active, Capability::Export, Capability::GuestSafe],
        }
    }

    async fn probe(&self, host: &dyn Host, disks: &[DiskRequest]) -> Result<Vec<Probe>> {
        // No snapshot has this id: where an image would go is all that it is for.
        let nobody = SnapshotId(uuid::Uuid::nil());
        let choices = choice::choose(host, nobody, disks).await?;
        Ok(disks
            .iter()
            .zip(choices)
            .map(|(request, choice)| probe(request, choice))
            .collect())
    }

    async fn prepare(&self, host: &dyn Host, id: SnapshotId, disks: &[DiskRequest]) -> Result<Vec<Prepared>> {
        // What a killed attempt at the same request left would be in the way.
        self.abort(host, id, disks, None).await?;
        let mut fleeces = Vec::with_capacity(disks.len());
        for (request, choice) in disks.iter().zip(choice::choose(host, id, disks).await?) {
            let target = request.disk.target.clone();
            let choice = choice.map_err(|e| e.with("disk", &target))?;
            choice
                .image
                .check_space(CALLED, choice.size)
                .map_err(|e| e.with("disk", &target))?;
            fleeces.push(Fleece { id, target, choice });
        }
        build::build(host, &fleeces).await?;
        fleeces.iter().map(prepared).collect()
    }

    fn take_plan(&self, prepared: &Prepared) -> Result<TakePlan> {
        Ok(build::take(&remembered(&prepared.data)?))
    }

    async fn take(&self, _: &dyn Host, _: &Prepared) -> Result<Taken> {
        Err(Error::new(
            ErrorKind::Internal,
            "a fleece is taken by monitor commands, never by the provider",
        ))
    }

    async fn complete(&self, host: &dyn Host, _: SnapshotId, prepared: &Prepared, _: &Taken) -> Result<Unit> {
        let fleece: Fleece = remembered(&prepared.data)?;
        build::open_access(host, &fleece).await?;
        let disk = DiskResult {
            target: fleece.target.clone(),
            modified: None,
            access: Access::Node(build::access_node(&fleece)),
            size: Some(fleece.choice.size),
            details: details(&fleece.choice),
        };
        Ok(Unit {
            unit: prepared.unit.clone(),
            disks: vec![disk],
            data: prepared.data.clone(),
        })
    }

    async fn abort(
        &self,
        host: &dyn Host,
        id: SnapshotId,
        disks: &[DiskRequest],
        _: Option<&[Prepared]>,
    ) -> Result<()> {
        let names: Vec<Names> = disks
            .iter()
            .map(|request| Names::new(id, &request.disk.target))
            .collect();
        teardown::take_apart(host, &names).await?;
        for request in disks {
            let settings = Settings::read(request)?;
            locate(host, id, &request.disk.target, &settings).remove_if_ours()?;
        }
        Ok(())
    }

    async fn inspect(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<Health> {
        inspect::inspect(host, &remembered(&unit.data)?).await
    }

    async fn delete(&self, host: &dyn Host, _: SnapshotId, unit: &Unit) -> Result<()> {
        let fleece: Fleece = remembered(&unit.data)?;
        teardown::take_apart(host, &[fleece.names()]).await?;
        fleece.choice.image.remove()
    }

    fn revert(&self, _: &Unit) -> Option<Arc<dyn Revert>> {
        None
    }

    fn merge(&self, _: &Unit) -> Option<Arc<dyn Merge>> {
        None
    }

    fn compare(&self, _: &Unit) -> Option<Arc<dyn Compare>> {
        None
    }
}

fn prepared(fleece: &Fleece) -> Result<Prepared> {
    let data = serde_json::to_value(fleece).map_err(|e| {
        Error::new(ErrorKind::Internal, "the record of a fleece cannot be written").because(e)
    })?;
    Ok(Prepared {
        unit: fleece.choice.source.clone(),
        targets: vec![fleece.target.clone()],
        data,
        tops: BTreeMap::new(),
        warnings: Vec::new(),
    })
}

fn remembered(data: &Value) -> Result<Fleece> {
    serde_json::from_value(data.clone())
        .map_err(|e| Error::new(ErrorKind::Internal, "the record of a fleece is damaged").because(e))
}

fn probe(request: &DiskRequest, choice: Result<Choice>) -> Probe {
    let choice = match choice {
        Ok(choice) => choice,
        Err(error) => return Probe::refused(error.kind(), reason(&error)),
    };
    // These may change until it is done for good; prepare refuses them then.
    let mut warnings: Vec<String> = match choice.image.check_space(CALLED, choice.size) {
        Ok(low) => low.into_iter().collect(),
        Err(error) => vec![format!("would be refused: {}", reason(&error))],
    };
    if choice.image.mark.is_some() && choice.image.path.symlink_metadata().is_ok() {
        let path = choice.image.path.display();
        warnings.push(format!(
            "would be refused: {path} exists, and is never overwritten"
        ));
    }
    let mut capabilities = vec![Capability::Active, Capability::Export];
    let spared = choice.sparing != Sparing::Nothing;
    if spared {
        capabilities.push(Capability::GuestSafe);
    } else {
        warnings.push(
            "the guest's writes fail when the fleece image fails, and wait for as long as it is slow: room for all of it is reserved \
             beforehand"
                .to_owned(),
        );
        if request.options.get(settings::TIMEOUT).is_some() {
            warnings.push(format!(
                "{} has no effect: this QEMU cannot give the snapshot up by way of '{}'",
                settings::TIMEOUT,
                choice.way.as_str()
            ));
        }
    }
    let full = if spared {
        "a full fleece image breaks the snapshot, never the guest"
    } else {
        "room for all of the disk is reserved for it"
    };
    Probe {
        fit: Fit::Natural,
        unit: choice.source.clone(),
        capabilities,
        effect: format!(
            "The domain keeps its disk. What the guest overwrites is copied first, by way of '{}'; {full}.",
            choice.way.as_str()
        ),
        details: request_details(request, &choice),
        warnings,
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

fn request_details(request: &DiskRequest, choice: &Choice) -> BTreeMap<String, String> {
    let mut details = details(choice);
    if Settings::read(request).is_ok_and(|settings| settings.file.is_none()) {
        // The image's name holds the snapshot's id, which is not known yet.
        let dir = choice.image.path.parent().unwrap_or(&choice.image.path);
        details.insert(
            "fleece.file".to_owned(),
            dir.join("ID-DISK.fleece").display().to_string(),
        );
    }
    details
}

fn details(choice: &Choice) -> BTreeMap<String, String> {
    let word = |word: &str| json!(word).as_str().unwrap_or_default().to_owned();
    let mut details = BTreeMap::from([
        ("fleece.way".to_owned(), word(choice.way.as_str())),
        ("fleece.file".to_owned(), choice.image.path.display().to_string()),
        ("node".to_owned(), choice.source.clone()),
        (
            "guest-safe".to_owned(),
            word(if choice.sparing == Sparing::Nothing {
                "no"
            } else {
                "yes"
            }),
        ),
    ]);
    if choice.encrypted {
        details.insert("fleece.encrypted".to_owned(), word("yes"));
    }
    if choice.sparing != Sparing::Nothing {
        details.insert("fleece.timeout".to_owned(), choice.timeout.to_string());
    }
    details
}
