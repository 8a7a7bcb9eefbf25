//! A backup of a snapshot that another host took and serves over NBD.

use std::path::PathBuf;
use std::time::SystemTime;

use disksnap::{
    CheckpointName, Consistency, DiskChoice, Disks, DomainDocument, Effect, Error, ErrorKind, Quiesce,
    RemoteDisk, Result, SnapshotName,
};

use crate::create::{Backup, check_chains, tool};
use crate::journal::{Asked, Journal, Planned, Served};
use crate::levels::{Opened, parent, stranger};
use crate::machine::save_document;
use crate::pull::{About, Puller};
use crate::source::Source;
use crate::{Compression, DiskEntry, DomainFolder, Event, Level, Manifest, Repository, WantedLevel, Watcher};

/// A disk of the snapshot, and where it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteExport {
    /// The disk's target.
    pub target: String,
    /// The export, as an NBD URI.
    pub uri: String,
    /// The dirty bitmap in it that tells what has changed, where that is called otherwise than the checkpoint.
    pub bitmap: Option<String>,
}

/// What is to be pulled, and what is known of it.
#[derive(Debug, Clone)]
pub struct RemoteRequest {
    /// The domain's document.
    pub document: DomainDocument,
    /// The disks.
    pub exports: Vec<RemoteExport>,
    /// The directory of the client's TLS credentials: `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` where the server
    /// verifies its clients.
    pub tls: Option<PathBuf>,
    /// What the snapshot is called there.
    pub snapshot: SnapshotName,
    /// Its instant.
    pub taken: SystemTime,
    /// The checkpoint that began at its instant.
    pub checkpoint: Option<CheckpointName>,
    /// The checkpoint that the exports tell the changes since.
    pub since: Option<CheckpointName>,
    /// Which level.
    pub level: WantedLevel,
    /// How the images' data is stored.
    pub compression: Compression,
    /// No more than so many bytes in a second are pulled.
    pub rate_limit: Option<u64>,
    /// Go on with what an interrupted run had begun. The exports must be of the very same snapshot.
    pub resume: bool,
}

struct Run<'a> {
    repository: &'a Repository,
    folder: &'a DomainFolder,
    request: &'a RemoteRequest,
    watcher: &'a dyn Watcher,
}

/// Makes a point of a snapshot that is served over NBD. The snapshot and its checkpoints are the other host's, and are left as they are.
///
/// # Errors
/// `Busy` while another backup of the domain is under way; `Unsupported` when an increment is wanted and not possible; `Denied` when
/// the server turns the client away; `Unavailable` when the connection ends or it was stopped: what was pulled is kept, and gone on with when that is
/// asked for. The repository has no new point then.
pub async fn pull(repository: &Repository, request: &RemoteRequest, watcher: &dyn Watcher) -> Result<Backup> {
    let domain = &request.document.domain().id;
    let told = |error: Error| error.during("backup pull").with("domain", domain);
    let folder = repository.folder_or_new(domain).await.map_err(told)?;
    let _lock = repository.lock(&folder, false).await.map_err(told)?;
    let run = Run {
        repository,
        folder: &folder,
        request,
        watcher,
    };
    Box::pin(run.carry_out()).await.map_err(told)
}

impl Run<'_> {
    async fn carry_out(&self) -> Result<Backup> {
        let going_on = self.settle().await?;
        let resumed = going_on.is_some();
        let mut journal = match going_on {
            Some(journal) => journal,
            None => self.begin().await?,
        };
        let made = async {
            let manifest = self.all(&mut journal).await?;
            check_chains(self.repository, self.folder, &manifest).await?;
            self.repository.publish(self.folder, &manifest).await?;
            Ok::<_, Error>(manifest)
        };
        let manifest = match made.await {
            Ok(manifest) => manifest,
            Err(error) => return Err(self.interrupted(&journal.point, error).await),
        };
        journal.remove(self.repository, self.folder).await?;
        Ok(Backup { manifest, resumed })
    }

    /// Keeps what can be gone on with; what cannot is dropped.
    async fn interrupted(&self, point: &str, error: Error) -> Error {
        let error = error.with("point", point);
        if error.kind() != ErrorKind::Broken {
            return error.leaving(Effect::Unknown).hint(
                "What was pulled is kept: while the very same snapshot is served, --resume goes on with it; else it is dropped.",
            );
        }
        let folder = self.repository.folder_of(self.folder, point);
        match self.repository.store().remove(&folder).await {
            Ok(()) => error
                .leaving(Effect::RolledBack)
                .hint("What was pulled cannot be gone on with, and is dropped. Pull again."),
            Err(failure) => error.rollback_failed(vec![failure]),
        }
    }

    /// What interrupted runs have left: one to go on with, the others dropped.
    async fn settle(&self) -> Result<Option<Journal>> {
        let mut going_on = None;
        for point in self.repository.unfinished(self.folder).await?.iter().rev() {
            let journal = Journal::load_if_sound(self.repository, self.folder, point).await?;
            let same = |journal: &Journal| {
                let asked = journal.asked == self.asked() && journal.snapshot == self.request.snapshot;
                self.request.resume && asked && journal.id.is_none()
            };
            match journal {
                Some(journal) if journal.id.is_some() => {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        "a backup of this domain by its own host was interrupted, and is not given up yet",
                    )
                    .with("point", point)
                    .hint("Run `disksnap backup create` or `disksnap backup abandon` there first."));
                }
                Some(journal) if going_on.is_none() && same(&journal) => going_on = Some(journal),
                _ => {
                    self.repository
                        .store()
                        .remove(&self.repository.folder_of(self.folder, point))
                        .await?;
                    let message = format!("{point} was interrupted: it was given up");
                    self.watcher.event(&Event::Note { message: &message });
                }
            }
        }
        Ok(going_on)
    }

    fn asked(&self) -> Asked {
        let exports = self.request.exports.iter();
        Asked {
            level: self.request.level,
            disks: Disks::Named(exports.map(|export| DiskChoice::new(&export.target)).collect()),
            compression: self.request.compression,
            quiesce: Quiesce::None,
            mountpoints: Vec::new(),
            served: Some(Served {
                taken: self.request.taken,
                since: self.request.since.clone(),
                checkpoint: self.request.checkpoint.clone(),
                exports: self
                    .request
                    .exports
                    .iter()
                    .map(|export| export.uri.clone())
                    .collect(),
            }),
        }
    }

    async fn begin(&self) -> Result<Journal> {
        let mut journal = Journal {
            attempts: 0,
            warnings: Vec::new(),
            point: self.repository.next_point(self.folder, &[]).await?,
            asked: self.asked(),
            snapshot: self.request.snapshot.clone(),
            id: None,
            checkpoint: self.request.checkpoint.clone(),
            machine: None,
            disks: Vec::new(),
        };
        journal.save(self.repository, self.folder).await?;
        let prefix = self.repository.folder_of(self.folder, &journal.point);
        let saved = save_document(&**self.repository.store(), &prefix, &self.request.document).await?;
        journal.machine = Some(saved);
        journal.save(self.repository, self.folder).await?;
        Ok(journal)
    }

    async fn all(&self, journal: &mut Journal) -> Result<Manifest> {
        let mut disks = Vec::new();
        for export in &self.request.exports {
            disks.push(
                self.disk(journal, export)
                    .await
                    .map_err(|e| e.with("disk", &export.target))?,
            );
        }
        let machine = journal.machine.clone();
        Ok(Manifest {
            repository: self.repository.id(),
            point: journal.point.clone(),
            domain: self.request.document.domain().id.clone(),
            created: self.request.taken,
            consistency: Consistency::Unquiesced {
                reason: "the host that took the snapshot knows more".to_owned(),
            },
            snapshot: journal.snapshot.clone(),
            checkpoint: journal.checkpoint.clone(),
            disks,
            machine: machine
                .ok_or_else(|| Error::new(ErrorKind::Internal, "the domain's document was not saved"))?,
            warnings: vec!["pulled from another host: EFI variables and TPM state are not in it".to_owned()],
            tool: tool(),
        })
    }

    async fn disk(&self, journal: &mut Journal, export: &RemoteExport) -> Result<DiskEntry> {
        let begun = journal.disks.iter().find(|begun| begun.target == export.target);
        if let Some(entry) = begun.and_then(|begun| begun.entry.clone()) {
            return Ok(entry);
        }
        let planned = begun.map(|begun| begun.planned.clone());
        let opened = self.open(export, planned).await?;
        let about = About {
            target: &export.target,
            method: "nbd",
            tracked: self.request.checkpoint.is_some(),
        };
        let puller = Puller {
            repository: self.repository,
            folder: self.folder,
            watcher: self.watcher,
            rate_limit: self.request.rate_limit,
        };
        puller.pull(journal, &about, opened).await
    }

    async fn open(&self, export: &RemoteExport, planned: Option<Planned>) -> Result<Opened> {
        let why = match (&planned, self.request.level) {
            (
                Some(Planned {
                    level: Level::Full,
                    why_full,
                    ..
                }),
                _,
            ) => why_full.clone(),
            (None, WantedLevel::Full) => None,
            (begun, level) => match self.increment(export, begun.is_some()).await? {
                Ok(opened)
                    if begun
                        .as_ref()
                        .is_none_or(|begun| begun.parent == opened.planned.parent) =>
                {
                    return Ok(opened);
                }
                Ok(opened) => {
                    opened.source.close().await?;
                    let why = "the disk's last point is another now than its increment was begun over";
                    return Err(Error::new(ErrorKind::Broken, why));
                }
                Err(why) if begun.is_some() => return Err(Error::new(ErrorKind::Broken, why)),
                Err(why) if level == WantedLevel::Incremental => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("no increment of the disk is possible: {why}"),
                    ));
                }
                Err(why) => Some(why),
            },
        };
        let disk = RemoteDisk::connect(&export.uri, self.request.tls.as_deref(), None).await?;
        Ok(Opened {
            source: Source::Remote(disk),
            planned: Planned {
                level: Level::Full,
                parent: None,
                why_full: why,
            },
            below: Vec::new(),
        })
    }

    /// An increment over the disk's last point, or why none is possible.
    async fn increment(
        &self,
        export: &RemoteExport,
        begun: bool,
    ) -> Result<std::result::Result<Opened, String>> {
        let Some(since) = &self.request.since else {
            return Ok(Err(
                "no checkpoint was named that the exports tell the changes since".to_owned(),
            ));
        };
        let parent = match parent(self.repository, self.folder, &export.target).await? {
            Ok(parent) => parent,
            Err(why) => return Ok(Err(why)),
        };
        if parent.checkpoint != *since {
            return Ok(Err(format!(
                "the last point, {}, began the checkpoint '{}', and the exports tell the changes since '{since}'",
                parent.point, parent.checkpoint
            )));
        }
        let bitmap = export.bitmap.as_deref().unwrap_or(since.as_str());
        let connected = RemoteDisk::connect(&export.uri, self.request.tls.as_deref(), Some(bitmap)).await;
        let source = match connected {
            Ok(disk) => Source::Remote(disk),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Err(error.message().to_owned())),
            Err(error) => return Err(error),
        };
        if let Some(why) = stranger(&**self.repository.store(), &parent, &source, begun).await? {
            source.close().await?;
            return Ok(Err(why));
        }
        Ok(Ok(parent.opened(source)))
    }
}
