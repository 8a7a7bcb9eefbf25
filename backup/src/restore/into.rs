//! Restoring into a paused domain: its hypervisor lends its disks out, they are filled, and the guest has them again.

use std::sync::Arc;

use disksnap::{
    Disksnap, Domain, Error, ErrorKind, FillDisk, FillEnd, FillHealth, FillRequest, Filling, Result, nbd_uri,
};
use serde::Serialize;

use super::nbd::{Export, Rest};
use super::{Restored, RestoredDisk, Sink, Task, as_locked, check_size, of_disk, too_small, with_complete};
use crate::{ChainReader, DiskEntry, DomainFolder, Event, Manifest, Repository, Watcher};

/// What is asked of a restoration into a paused domain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IntoRequest {
    /// Only these disks; all of the point's where none is named.
    pub disks: Vec<String>,
    /// The guest runs afterwards, on the restored data; else it stays paused.
    pub resume: bool,
}

/// What was restored into a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoredInto {
    /// The disks, in the domain's order.
    pub disks: Vec<RestoredDisk>,
    /// Whether the guest was let run.
    pub resumed: bool,
    /// What the operator should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Overwrites disks of a paused domain with what they were at a point, through the domain's own hypervisor: a snapshot or
/// checkpoint that the domain has stays true.
///
/// What a disk has beyond the end of what was saved becomes zero. Disks that the point does not have keep what they hold, and so do
/// EFI variables and TPM. When it is killed, the disks stay lent out: the same again goes on from the start, and
/// `disksnap fill end` gives them back as they are.
///
/// # Errors
/// Before anything is written: `NotFound` for a disk that point or domain does not have, or a point that is dropped by now; `NoSpace` for a disk that is smaller
/// than what was saved; those of [`Dispatcher::fill_start`](disksnap::Dispatcher::fill_start). Then those of
/// [`restore_disk`](crate::restore_disk): the guest has its disks again and stays paused, and the error says which of them is unfinished.
pub async fn restore_into(
    disksnap: &Disksnap,
    domain: &Domain,
    (repository, folder, point): (&Repository, &DomainFolder, &Manifest),
    request: &IntoRequest,
    watcher: &dyn Watcher,
) -> Result<RestoredInto> {
    let told = |error: Error| {
        let error = error.during("restore").with("domain", &domain.id);
        error.with("point", &point.point)
    };
    let _lock = repository.lock(folder, true).await.map_err(told)?;
    let point = &as_locked(repository, folder, point).await.map_err(told)?;
    let act = IntoAct {
        disksnap,
        domain,
        repository,
        folder,
        point,
        watcher,
    };
    act.run(request).await.map_err(told)
}

struct IntoAct<'a> {
    disksnap: &'a Disksnap,
    domain: &'a Domain,
    repository: &'a Repository,
    folder: &'a DomainFolder,
    point: &'a Manifest,
    watcher: &'a dyn Watcher,
}

impl IntoAct<'_> {
    async fn run(&self, request: &IntoRequest) -> Result<RestoredInto> {
        let disks = super::point::wanted(self.point, &request.disks)?;
        let targets = disks.iter().map(|disk| disk.target.clone());
        let dispatcher = self.disksnap.dispatcher();
        let (lease, _lives) = dispatcher.catalog().lease().await?;
        let wanted = FillRequest {
            targets: targets.collect(),
            lease: Some(lease),
            ..FillRequest::default()
        };
        for target in &wanted.targets {
            self.domain.disk(target)?;
        }
        let filling = dispatcher.fill_start(self.domain, &wanted).await?;
        let mut restored = RestoredInto {
            disks: Vec::new(),
            resumed: false,
            warnings: Vec::new(),
        };
        if request.resume && !filling.warnings.is_empty() {
            let ended = dispatcher.fill_end(self.domain, FillEnd::StayPaused).await;
            let what = "the guest has run: what it has of its disks in memory is not what they would hold";
            return Err(Error::new(ErrorKind::Refused, what)
                .rollback_failed(ended.err().into_iter().collect())
                .hint(
                    "Nothing was written. Start it paused (`virsh start --paused`, QEMU's -S); or restore without --resume, and \
                     reset the guest before it goes on.",
                ));
        }
        self.warn(&filling.warnings, &mut restored);
        self.warn(&self.left_alone(&disks), &mut restored);
        if let Err(error) = self.fill(&filling, &disks, &mut restored).await {
            let ended = dispatcher.fill_end(self.domain, FillEnd::StayPaused).await;
            return Err(error.rollback_failed(ended.err().into_iter().collect()));
        }
        let end = if request.resume {
            FillEnd::Resume
        } else {
            FillEnd::StayPaused
        };
        restored.resumed = dispatcher.fill_end(self.domain, end).await?.resumed;
        Ok(restored)
    }

    fn warn(&self, warnings: &[String], restored: &mut RestoredInto) {
        for message in warnings {
            self.watcher.event(&Event::Warning { message });
            restored.warnings.push(message.clone());
        }
    }

    /// What the guest will find as it is now, not as it was.
    fn left_alone(&self, disks: &[&DiskEntry]) -> Vec<String> {
        let filled = |target: &str| disks.iter().any(|disk| disk.target == target);
        let writable = self.domain.disks.iter().filter(|disk| {
            !disk.read_only && !disk.shareable && disk.source.is_some() && !filled(&disk.target)
        });
        let mut told: Vec<String> = writable
            .map(|disk| {
                format!(
                    "the disk '{}' is not restored: it keeps what it holds",
                    disk.target
                )
            })
            .collect();
        let machine = &self.point.machine;
        if machine.nvram.is_some() || !machine.tpm.is_empty() {
            let what = "EFI variables and TPM state are not restored into a domain that is there: they stay what they are";
            told.push(what.to_owned());
        }
        told
    }

    async fn fill(&self, filling: &Filling, disks: &[&DiskEntry], restored: &mut RestoredInto) -> Result<()> {
        if let FillHealth::Interrupted(why) = &filling.health {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("the disks cannot be written: {why}"),
            ));
        }
        // All of them before the first byte is written.
        let mut open = Vec::new();
        for lent in &filling.disks {
            let Some(disk) = disks.iter().find(|disk| disk.target == lent.target) else {
                let why = format!("the disk '{}' was lent out, and nobody asked for it", lent.target);
                return Err(Error::new(ErrorKind::Internal, why));
            };
            let ready = self.open(filling, lent, disk).await;
            open.push((*disk, ready.map_err(|e| of_disk(e, disk))?));
        }
        for (disk, (chain, export)) in open {
            let done = self.disk(disk, chain, export).await;
            let done = done.map_err(|e| with_complete(e, &restored.disks))?;
            self.warn(&done.notes, restored);
            restored.disks.push(RestoredDisk {
                target: disk.target.clone(),
                place: format!("the domain {}", self.domain.id),
                restored: done,
            });
        }
        Ok(())
    }

    async fn open(
        &self,
        filling: &Filling,
        lent: &FillDisk,
        disk: &DiskEntry,
    ) -> Result<(ChainReader, Export)> {
        if lent.size < disk.size {
            return Err(too_small(&"the domain's disk", lent.size, disk.size));
        }
        let layers = self
            .repository
            .chain(self.folder, self.point, &disk.target)
            .await?;
        let store = Arc::clone(self.repository.store());
        let chain = ChainReader::open(store, &layers).await?;
        let size = check_size(&chain, disk)?;
        let uri = nbd_uri(&lent.source)
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a disk was lent out otherwise than over NBD"))?;
        let tls = filling.server.tls.as_ref().map(|tls| tls.credentials.as_path());
        let export = Export::open(&uri, tls, size, Rest::Zeroed).await?;
        Ok((chain, export))
    }

    async fn disk(&self, disk: &DiskEntry, chain: ChainReader, export: Export) -> Result<Restored> {
        let task = Task {
            disk,
            target: &format!("the disk '{}' of the paused domain", disk.target),
            overwritten: true,
            watcher: self.watcher,
        };
        task.run(chain, Box::new(export) as Box<dyn Sink>).await
    }
}
