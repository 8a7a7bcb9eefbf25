//! A backup of a domain of this host: the snapshot, the pull, the point, and what is tidied up behind it.

use std::time::Duration;

use disksnap::{
    CheckpointName, DEADLINE, Disk, Disks, Disksnap, Dispatcher, Domain, DomainDocument, Effect, Error,
    ErrorKind, NewCheckpoint, Quiesce, Result, Snapshot, SnapshotId, SnapshotName, SnapshotRequest,
};

use crate::journal::{Asked, Journal};
use crate::levels::open;
use crate::pull::{About, Puller};
use crate::tidy::{self, Ours};
use crate::{
    Compression, DomainFolder, Event, MachineOptions, Manifest, Repository, WantedLevel, Watcher,
    save_machine, stopped,
};

/// A domain to back up.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// What reaches it.
    pub disksnap: &'a Disksnap,
    /// What leads to its document, as for [`Disksnap::load`]: it is brought up to date where a method gives the domain
    /// another disk for as long as the snapshot is there.
    pub given: &'a str,
    /// Its document.
    pub document: &'a DomainDocument,
    /// What was read from it, and where it answers.
    pub domain: &'a Domain,
}

/// What is asked of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRequest {
    /// Which level.
    pub level: WantedLevel,
    /// Which disks.
    pub disks: Disks,
    /// How consistent the guest's file systems must be.
    pub quiesce: Quiesce,
    /// The mount points whose file systems are frozen; all when none is named.
    pub mountpoints: Vec<String>,
    /// How long the guest may stand still.
    pub deadline: Duration,
    /// How the images' data is stored.
    pub compression: Compression,
    /// No more than so many bytes in a second are pulled.
    pub rate_limit: Option<u64>,
    /// Go on with what an interrupted run of the same request had begun, where its snapshot is still good.
    pub resume: bool,
    /// Save the point although EFI variables or TPM state that the domain has cannot be read, with a warning.
    pub allow_missing_machine: bool,
}

impl Default for BackupRequest {
    /// As good as it can be: increments where possible, all disks that are snapshotted when none is named, not quiesced,
    /// not compressed, resumed.
    fn default() -> Self {
        Self {
            level: WantedLevel::Auto,
            disks: Disks::Writable,
            quiesce: Quiesce::None,
            mountpoints: Vec::new(),
            deadline: DEADLINE,
            compression: Compression::None,
            rate_limit: None,
            resume: true,
            allow_missing_machine: false,
        }
    }
}

/// A backup that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The point.
    pub manifest: Manifest,
    /// It went on with what an interrupted run had begun.
    pub resumed: bool,
}

/// A domain that is backed up, with the disks that it uses by now.
#[derive(Debug)]
pub(crate) struct Live<'a> {
    pub(crate) of: Subject<'a>,
    pub(crate) domain: Domain,
}

impl<'a> Live<'a> {
    pub(crate) fn new(of: Subject<'a>) -> Self {
        Self {
            of,
            domain: of.domain.clone(),
        }
    }

    pub(crate) fn dispatcher(&self) -> &Dispatcher {
        self.of.disksnap.dispatcher()
    }

    /// Brings the domain's document up to date where an interrupted run has left it behind.
    pub(crate) async fn catch_up(&mut self) -> Result<()> {
        let outdated = self.dispatcher().outdated(&self.domain).await?;
        self.follow(&outdated).await
    }

    /// Brings the domain's document up to date where its disks have become others.
    pub(crate) async fn follow(&mut self, disks: &[Disk]) -> Result<()> {
        for disk in disks {
            self.domain.replace_disk(disk.clone());
        }
        if disks.is_empty() {
            return Ok(());
        }
        let updated = self.of.disksnap.update(self.of.given, disks).await;
        updated.map(drop).map_err(|error| {
            error.leaving(Effect::Unknown).hint(
                "Do not start the domain from its document as it is; bring it up to date with `disksnap domain update`.",
            )
        })
    }
}

/// A snapshot that so many runs could not pull to its end is given up, and so is one that is older than this: the next backup
/// is to be of its own night.
const ATTEMPTS: u32 = 3;
const OLDEST: Duration = Duration::from_hours(24);
/// What is saved beside the disks this long after their instant is told to be later.
const SOON: Duration = Duration::from_mins(1);

/// What carries a backup out.
struct Run<'a> {
    live: Live<'a>,
    repository: &'a Repository,
    folder: &'a DomainFolder,
    request: &'a BackupRequest,
    watcher: &'a dyn Watcher,
    ours: Ours,
}

/// Makes a backup: a snapshot of all disks at one instant, pulled, written down, and only then given up.
///
/// Where it is interrupted, by whatever, the next call goes on with the same snapshot; where that is not good any more, from the point
/// before, as if this one had not been tried.
///
/// # Errors
/// What the snapshot meets; `Busy` while another backup of the domain is under way in the repository; `Unsupported` when an
/// increment is wanted and not possible; `Broken` when the snapshot broke while it was pulled; `NoSpace`; `Unavailable` when it was stopped. The
/// repository has no new point then, unless the error says that the backup is complete: then only the snapshot is left to be given up.
pub async fn create(
    of: Subject<'_>,
    repository: &Repository,
    request: &BackupRequest,
    watcher: &dyn Watcher,
) -> Result<Backup> {
    let told = |error: Error| error.during("backup create").with("domain", &of.domain.id);
    let folder = repository.folder_or_new(&of.domain.id).await.map_err(told)?;
    let _lock = repository.lock(&folder, false).await.map_err(told)?;
    let mut run = Run {
        live: Live::new(of),
        repository,
        folder: &folder,
        request,
        watcher,
        ours: Ours::of(repository),
    };
    Box::pin(run.carry_out()).await.map_err(told)
}

impl Run<'_> {
    async fn carry_out(&mut self) -> Result<Backup> {
        stopped(self.watcher)?;
        self.live.catch_up().await?;
        let going_on = self.settle().await?;
        tidy::tidy(
            &mut self.live,
            self.repository,
            self.folder,
            going_on.as_ref(),
            self.watcher,
        )
        .await?;
        let mut resumed = going_on.is_some();
        let (mut journal, snapshot) = match going_on {
            Some(mut journal) => {
                journal.attempts += 1;
                journal.save(self.repository, self.folder).await?;
                let snapshot = self.ours.snapshot(&self.live, &journal.snapshot).await?;
                let gone = || Error::new(ErrorKind::NotFound, "the snapshot is gone");
                (journal, snapshot.ok_or_else(gone)?)
            }
            None => self.begin().await?,
        };
        let mut pulled = self.pull(&mut journal, &snapshot).await;
        if let (true, Err(error)) = (resumed, &pulled)
            && error.kind() == ErrorKind::Broken
        {
            // What had been begun is good for nothing any more: then as if it had not been.
            let message = format!(
                "{} cannot be gone on with: {}; it was given up",
                journal.point,
                error.message()
            );
            tidy::abandon_point(&mut self.live, self.repository, self.folder, &journal.point).await?;
            self.watcher.event(&Event::Note { message: &message });
            let (anew, snapshot) = self.begin().await?;
            (journal, resumed) = (anew, false);
            pulled = self.pull(&mut journal, &snapshot).await;
        }
        let manifest = match pulled {
            Ok(manifest) => manifest,
            Err(error) => return Err(self.interrupted(&journal, error).await),
        };
        self.finish(&journal).await.map_err(|error| {
            error
                .with("point", &journal.point)
                .leaving(Effect::Unknown)
                .hint("The backup itself is complete. The next one deletes the snapshot that is left; or `disksnap backup abandon` does.")
        })?;
        Ok(Backup { manifest, resumed })
    }

    /// Looks at what interrupted runs have left: one to go on with, the others given up.
    async fn settle(&mut self) -> Result<Option<Journal>> {
        let mut going_on = None;
        for point in self.repository.unfinished(self.folder).await?.iter().rev() {
            match Journal::load_if_sound(self.repository, self.folder, point).await? {
                Some(journal) if going_on.is_none() && self.can_go_on(&journal).await? => {
                    let message = format!("going on with {point}, which was interrupted");
                    self.watcher.event(&Event::Note { message: &message });
                    going_on = Some(journal);
                }
                _ => {
                    tidy::abandon_point(&mut self.live, self.repository, self.folder, point).await?;
                    let message =
                        format!("{point} was interrupted and cannot be gone on with: it was given up");
                    self.watcher.event(&Event::Note { message: &message });
                }
            }
        }
        Ok(going_on)
    }

    async fn can_go_on(&self, journal: &Journal) -> Result<bool> {
        if !self.request.resume || journal.asked != self.asked() || journal.attempts >= ATTEMPTS {
            return Ok(false);
        }
        let dispatcher = self.live.dispatcher();
        match dispatcher.show(&self.live.domain, &journal.snapshot).await {
            Ok(found) => {
                let age = found.snapshot.created.elapsed().unwrap_or_default();
                Ok(Some(found.snapshot.id) == journal.id && found.overall().is_good() && age <= OLDEST)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn asked(&self) -> Asked {
        Asked {
            level: self.request.level,
            disks: self.request.disks.clone(),
            compression: self.request.compression,
            quiesce: self.request.quiesce,
            mountpoints: self.request.mountpoints.clone(),
            served: None,
        }
    }

    /// Takes the snapshot. The journal is there first, so that whoever comes next knows whose it is.
    async fn begin(&mut self) -> Result<(Journal, Snapshot)> {
        let held = self.ours.held(&self.live).await?;
        let point = self.repository.next_point(self.folder, &held).await?;
        let name: SnapshotName = self.ours.name(&point).parse()?;
        let checkpoint = CheckpointName::try_from(&name)?;
        let id = SnapshotId::random();
        let mut journal = Journal {
            point,
            asked: self.asked(),
            snapshot: name.clone(),
            id: Some(id),
            checkpoint: Some(checkpoint.clone()),
            attempts: 0,
            machine: None,
            warnings: Vec::new(),
            disks: Vec::new(),
        };
        journal.save(self.repository, self.folder).await?;
        let request = SnapshotRequest {
            id,
            name: Some(name),
            disks: self.request.disks.clone(),
            quiesce: self.request.quiesce,
            mountpoints: self.request.mountpoints.clone(),
            deadline: self.request.deadline,
            checkpoint: Some(NewCheckpoint::Named(checkpoint)),
            checkpoint_where_possible: true,
        };
        let created = self.live.dispatcher().create(&self.live.domain, &request).await;
        let snapshot = match created {
            Ok(snapshot) => snapshot,
            Err(error) => {
                let folder = self.repository.folder_of(self.folder, &journal.point);
                let removed = self.repository.store().remove(&folder).await;
                return Err(match removed {
                    Ok(()) => error,
                    Err(failure) => error.rollback_failed(vec![failure]),
                });
            }
        };
        self.live.follow(&modified(&snapshot)).await?;
        journal.checkpoint.clone_from(&snapshot.checkpoint);
        journal.save(self.repository, self.folder).await?;
        Ok((journal, snapshot))
    }

    /// Pulls every disk, and makes the point exist.
    async fn pull(&self, journal: &mut Journal, snapshot: &Snapshot) -> Result<Manifest> {
        for warning in &snapshot.warnings {
            self.watcher.event(&Event::Warning { message: warning });
        }
        self.save_machine(journal, snapshot).await?;
        let mut disks = Vec::new();
        for disk in &snapshot.disks {
            let entry = self.disk(journal, snapshot, &disk.target, &disk.method).await?;
            disks.push(entry);
        }
        self.check_health(snapshot).await?;
        let machine = journal.machine.clone();
        let mut warnings = snapshot.warnings.clone();
        warnings.extend(journal.warnings.iter().cloned());
        let manifest = Manifest {
            repository: self.repository.id(),
            point: journal.point.clone(),
            domain: self.live.domain.id.clone(),
            created: snapshot.created,
            consistency: snapshot.consistency.clone(),
            snapshot: snapshot.name.clone(),
            checkpoint: snapshot.checkpoint.clone(),
            disks,
            machine: machine
                .ok_or_else(|| Error::new(ErrorKind::Internal, "the domain's document was not saved"))?,
            warnings,
            tool: tool(),
        };
        check_chains(self.repository, self.folder, &manifest).await?;
        self.repository.publish(self.folder, &manifest).await?;
        Ok(manifest)
    }

    /// Saves what there is of the domain besides its disks, once.
    async fn save_machine(&self, journal: &mut Journal, snapshot: &Snapshot) -> Result<()> {
        if journal.machine.is_some() {
            return Ok(());
        }
        let options = MachineOptions {
            allow_missing: self.request.allow_missing_machine,
        };
        let prefix = self.repository.folder_of(self.folder, &journal.point);
        let store = &**self.repository.store();
        let (document, mut warnings) = (self.live.of.document, Vec::new());
        let saved = save_machine(store, &prefix, document, &options, &mut warnings).await?;
        let later = snapshot.created.elapsed().unwrap_or_default();
        if later > SOON && (saved.nvram.is_some() || !saved.tpm.is_empty()) {
            warnings.push(format!(
                "EFI variables and TPM state were saved {} s after the disks' instant: the run was interrupted in between",
                later.as_secs()
            ));
        }
        journal.machine = Some(saved);
        journal.warnings = warnings;
        journal.save(self.repository, self.folder).await
    }

    /// Whether all that was pulled was the snapshot's.
    async fn check_health(&self, snapshot: &Snapshot) -> Result<()> {
        let dispatcher = self.live.dispatcher();
        let found = dispatcher.show(&self.live.domain, &snapshot.name).await?;
        if let disksnap::Health::Broken(why) | disksnap::Health::Gone(why) = found.overall() {
            return Err(Error::new(
                ErrorKind::Broken,
                format!("the snapshot broke while it was pulled: {why}"),
            ));
        }
        Ok(())
    }

    async fn disk(
        &self,
        journal: &mut Journal,
        snapshot: &Snapshot,
        target: &str,
        method: &str,
    ) -> Result<crate::DiskEntry> {
        let begun = journal.disks.iter().find(|begun| begun.target == target);
        if let Some(entry) = begun.and_then(|begun| begun.entry.clone()) {
            return Ok(entry);
        }
        let planned = begun.map(|begun| begun.planned.clone());
        let tracked = self.tracked(snapshot, target).await?;
        let opened = open(
            &self.live,
            self.repository,
            self.folder,
            &snapshot.name,
            target,
            planned,
            self.request.level,
        )
        .await
        .map_err(|e| e.with("disk", target))?;
        let about = About {
            target,
            method,
            tracked,
        };
        let puller = Puller {
            repository: self.repository,
            folder: self.folder,
            watcher: self.watcher,
            rate_limit: self.request.rate_limit,
        };
        puller.pull(journal, &about, opened).await
    }

    /// Whether the checkpoint that began with the snapshot covers the disk.
    async fn tracked(&self, snapshot: &Snapshot, target: &str) -> Result<bool> {
        let Some(name) = &snapshot.checkpoint else {
            return Ok(false);
        };
        let lineage = self.live.dispatcher().checkpoints(&self.live.domain).await?;
        Ok(lineage.get(name)?.disk(target).is_some())
    }

    /// Gives up what the point needed: it exists.
    async fn finish(&mut self, journal: &Journal) -> Result<()> {
        journal.remove(self.repository, self.folder).await?;
        self.ours
            .delete_snapshot(&mut self.live, &journal.snapshot)
            .await?;
        tidy::tidy(&mut self.live, self.repository, self.folder, None, self.watcher).await
    }

    /// Keeps what a later run can go on with, or gives it all up.
    async fn interrupted(&mut self, journal: &Journal, error: Error) -> Error {
        let again = [
            ErrorKind::Unavailable,
            ErrorKind::NoSpace,
            ErrorKind::Io,
            ErrorKind::Timeout,
            ErrorKind::Denied,
            ErrorKind::Busy,
        ];
        let error = error.with("point", &journal.point);
        if again.contains(&error.kind()) {
            return error.leaving(Effect::Unknown).hint(
                "The snapshot and what was pulled are kept: the same command goes on where this one was. \
                 `disksnap backup abandon` gives them up.",
            );
        }
        let abandoned =
            tidy::abandon_point(&mut self.live, self.repository, self.folder, &journal.point).await;
        match abandoned {
            Ok(()) => error
                .leaving(Effect::RolledBack)
                .hint("Nothing of it is left; the next backup goes on from the point before."),
            Err(failure) => error.rollback_failed(vec![failure]),
        }
    }
}

fn modified(snapshot: &Snapshot) -> Vec<Disk> {
    let disks = snapshot.disks.iter();
    disks.filter_map(|disk| disk.modified_disk.clone()).collect()
}

/// Makes sure that what the increments are over is still there: points may have been dropped while this one was unfinished.
pub(crate) async fn check_chains(
    repository: &Repository,
    folder: &DomainFolder,
    manifest: &Manifest,
) -> Result<()> {
    for disk in &manifest.disks {
        repository.chain(folder, manifest, &disk.target).await?;
    }
    Ok(())
}

/// What wrote a manifest.
pub(crate) fn tool() -> String {
    format!("disksnap {}", env!("CARGO_PKG_VERSION"))
}
