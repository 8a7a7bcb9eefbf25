//! Restoring into a paused domain: its disks are lent out, writable over NBD, until they are filled; then the guest has
//! them again, and goes on from what they hold (`seeds/fleecing-pull-backup-rfc.txt`, "restore").
//!
//! A filling is an act in force: its intent stays from the start to the end, and no other act on the domain comes
//! between. A run of the hypervisor that ends takes it along: the next one has its disks.

use std::time::SystemTime;

use serde::Serialize;
use uuid::Uuid;

use crate::dispatcher::Held;
use crate::place::Place;
use crate::resolve::reason_to_skip;
use crate::wanted::node_name;
use crate::{
    Act, Change, Control, Disk, DiskNode, Dispatcher, Domain, DomainId, Effect, Error, ErrorKind,
    ExportRequest, FillStage, Intent, Lend, Lending, LentDisk, Listen, NbdServer, RecoveredHow, Result,
    RunState, ServedBy, Skipped, Source, Tls,
};

/// Which disks of a paused domain are to be filled, and where they are served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FillRequest {
    /// The disks' targets; none for all but CD-ROMs, floppies, read-only and shareable disks and empty drives.
    pub targets: Vec<String>,
    /// Where to listen; `None` for the running server, or else the domain's default unix socket.
    pub listen: Option<Listen>,
    /// TLS, on TCP.
    pub tls: Option<Tls>,
    /// Whether a place that other hosts can reach is meant so although there is no TLS.
    pub allow_remote: bool,
    /// The lease ([`Catalog::lease`](crate::Catalog::lease)) of the process that is going to fill them itself: nobody else gets them while it
    /// lives, and once it is dead the next such process takes its filling over. `None` where that is left to others.
    pub lease: Option<Uuid>,
}

/// Disks of a paused domain that are being filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Filling {
    /// Whose.
    pub domain: DomainId,
    /// Since when.
    pub since: SystemTime,
    /// The NBD server.
    pub server: NbdServer,
    /// The disks, in the domain's order.
    pub disks: Vec<FillDisk>,
    /// The domain's other disks, and why they are left out.
    pub skipped: Vec<Skipped>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// Whether they can be written now.
    pub health: FillHealth,
}

/// One disk that is being filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FillDisk {
    /// Its target.
    pub target: String,
    /// Bytes.
    pub size: u64,
    /// The export name that NBD clients ask for.
    pub name: String,
    /// Where it can be written: an NBD export.
    pub source: Source,
}

/// Whether disks can be filled now, as the hypervisor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FillHealth {
    /// They can be written.
    Open,
    /// Something stands against it, and what: end the filling, and begin anew.
    Interrupted(String),
    /// The run of the hypervisor that it began in has ended: the disks hold what was written by then.
    Over,
}

/// What becomes of the guest when its disks have been filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FillEnd {
    /// It runs, on what the disks hold now.
    Resume,
    /// It stays as it is.
    StayPaused,
}

/// What the end of a filling did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FillEnded {
    /// The targets of the disks that the guest has again; none where nothing was being filled.
    pub disks: Vec<String>,
    /// Whether the guest was let run.
    pub resumed: bool,
}

impl Dispatcher {
    /// Takes the disks of a paused domain from its guest and serves them writable over NBD, until
    /// [`Dispatcher::fill_end`]. All of the request or nothing; the guest stands still and is not touched otherwise.
    ///
    /// Only one filling at a time, and no other act on the domain meanwhile. Idempotent: the same disks again answer
    /// with the filling that is under way, unless another process fills them itself ([`FillRequest::lease`]). What is written goes the same way as the guest's own writes, so that
    /// checkpoints know of it.
    ///
    /// # Errors
    /// `Unavailable` when the domain is off (restore to the images themselves); `Busy` when it runs, a migration,
    /// merge, job, export or snapshot uses a disk, other disks are being filled, or the server listens elsewhere;
    /// `Denied` for a disk that the guest has read-only, or a place that other hosts reach without TLS that is not
    /// expressly allowed; `NotFound` and `Invalid` for disks that the domain does not have so; `Unsupported` where a
    /// device cannot let its disk go.
    pub async fn fill_start(&self, domain: &Domain, request: &FillRequest) -> Result<Filling> {
        let started = async {
            let held = self.hold_filling(domain, None).await?;
            match self.fill_in_force(&domain.id).await? {
                Some((intent, lending)) => self.fill_again(&held, domain, request, &intent, &lending).await,
                None => self.fill_held(&held, domain, request).await,
            }
        };
        let started = started.await;
        started.map_err(|e: Error| e.during("fill start").with("domain", &domain.id))
    }

    /// What is being filled of a domain; `None` for nothing. Asks the hypervisor, not only the catalog; takes no lock.
    pub async fn filling(&self, domain: &Domain) -> Result<Option<Filling>> {
        let Some((intent, lending)) = self.fill_in_force(&domain.id).await? else {
            return Ok(None);
        };
        let looked = async {
            let control = self.connector.control(domain).await?;
            self.fill_health(&*control, &lending).await
        };
        let health = looked.await;
        let health = health.map_err(|e: Error| e.during("fill list").with("domain", &domain.id))?;
        Ok(Some(told(&intent, &lending, health)))
    }

    /// Gives the guest its disks again, flushed, and lets it run where that is asked for. Exports that clients still
    /// write to are cut off. Idempotent: where nothing is being filled it does nothing, and says so.
    ///
    /// # Errors
    /// `Busy` when somebody has let the guest run meanwhile; `Io` when what was filled does not reach the images: the
    /// guest has its disks then, and stays paused; `Broken` when the hypervisor was started anew since the start;
    /// `Refused` when the guest cannot run: it has its disks, and stays paused.
    pub async fn fill_end(&self, domain: &Domain, end: FillEnd) -> Result<FillEnded> {
        let ended = async {
            // An end that was killed is taken up again, with what is asked for now; a start that was killed is undone.
            let before = self.fill_in_force(&domain.id).await?;
            let but = before.filter(|(intent, _)| stage(intent) != Some(FillStage::Starting));
            let held = self
                .hold_filling(domain, but.map(|(intent, _)| intent.id))
                .await?;
            match self.fill_in_force(&domain.id).await? {
                Some((intent, lending)) => self.fill_end_held(&held, intent, lending, end).await,
                None => Ok(FillEnded {
                    disks: Vec::new(),
                    resumed: false,
                }),
            }
        };
        let ended = ended.await;
        ended.map_err(|e: Error| e.during("fill end").with("domain", &domain.id))
    }

    async fn fill_held(&self, held: &Held, domain: &Domain, request: &FillRequest) -> Result<Filling> {
        let control = &*held.control;
        self.refuse_while_merging(&domain.id).await?;
        let stood = standing_still(&control.state().await?)?;
        let (disks, skipped) = chosen(domain, &request.targets)?;
        let place = self.place(ServedBy::Hypervisor, control, &domain.id);
        let (running, _) = self.truly_served(&place).await?;
        let starts = running.is_none();
        let server = place.server_to_fill(running, &export_request(request)).await?;
        let id = Uuid::new_v4();
        let mut lent = Vec::with_capacity(disks.len());
        for disk in disks {
            let name = node_name(&format!("{id}/{}", disk.target));
            lent.push(lends(control)?.look(disk, &name).await?);
        }
        let lending = Lending {
            server,
            starts,
            disks: lent,
            skipped,
            warnings: warnings(&stood),
            stood,
            lease: request.lease,
        };
        let mut intent = Intent {
            id,
            domain: domain.clone(),
            since: SystemTime::now(),
            act: act(&lending, FillStage::Starting),
        };
        self.catalog.intend(&intent).await?;
        let opened = async {
            self.open_all(control, &place, &lending).await?;
            intent.act = act(&lending, FillStage::Open);
            self.catalog.intend(&intent).await
        };
        match opened.await {
            Ok(()) => Ok(told(&intent, &lending, FillHealth::Open)),
            Err(error) => Err(match self.undo_fill(control, &intent, &lending).await {
                Ok(()) => error.leaving(Effect::RolledBack),
                Err(failure) => error.rollback_failed(vec![failure]).hint(AGAIN),
            }),
        }
    }

    /// Lends and serves all disks: nobody can write to one before all of them are lent.
    async fn open_all(&self, control: &dyn Control, place: &Place<'_>, lending: &Lending) -> Result<()> {
        let lend = lends(control)?;
        let of = |disk: &LentDisk| disk.target.clone();
        for disk in &lending.disks {
            lend.lend(disk).await.map_err(|e| e.with("disk", of(disk)))?;
        }
        if lending.starts {
            place.start(&lending.server).await?;
            let server = [Change::SetServer(lending.server.clone())];
            self.catalog
                .settle(Uuid::nil(), &control.domain().id, &server)
                .await?;
        }
        for disk in &lending.disks {
            lend.serve_writable(disk)
                .await
                .map_err(|e| e.with("disk", of(disk)))?;
        }
        Ok(())
    }

    /// The same disks at the same place are what is under way; anything else must wait.
    async fn fill_again(
        &self,
        held: &Held,
        domain: &Domain,
        request: &FillRequest,
        intent: &Intent,
        lending: &Lending,
    ) -> Result<Filling> {
        let (disks, _) = chosen(domain, &request.targets)?;
        let under_way = lending.disks.iter().map(|disk| disk.target.as_str());
        if !under_way.eq(disks.iter().map(|disk| disk.target.as_str())) {
            return Err(filled(lending));
        }
        let place = self.place(ServedBy::Hypervisor, &*held.control, &domain.id);
        let running = Some(lending.server.clone());
        place.server_to_fill(running, &export_request(request)).await?;
        let health = self.fill_health(&*held.control, lending).await?;
        if lending.lease != request.lease {
            self.take_over(intent, lending, request).await?;
        }
        Ok(told(intent, lending, health))
    }

    /// Makes a filling that another process had to itself this one's.
    async fn take_over(&self, intent: &Intent, lending: &Lending, request: &FillRequest) -> Result<()> {
        if match lending.lease {
            Some(lease) => self.catalog.lease_lives(lease).await?,
            // Who was let fill them is not known, nor whether they are at it.
            None => request.lease.is_some(),
        } {
            return Err(filled(lending));
        }
        let lending = Lending {
            lease: request.lease,
            ..lending.clone()
        };
        let mut intent = intent.clone();
        intent.act = act(&lending, FillStage::Open);
        self.catalog.intend(&intent).await
    }

    async fn fill_end_held(
        &self,
        held: &Held,
        mut intent: Intent,
        lending: Lending,
        end: FillEnd,
    ) -> Result<FillEnded> {
        let control = &*held.control;
        if !stands(control, &lending).await? {
            self.catalog.settle(intent.id, &intent.domain.id, &[]).await?;
            return Err(over(&lending));
        }
        intent.act = act(&lending, FillStage::Ending);
        refuse_running(control, &lending).await?;
        self.catalog.intend(&intent).await?;
        let closed = self.close_all(control, &intent, &lending).await;
        let flushed = closed.map_err(|e| e.leaving(Effect::Unknown).hint(AGAIN))?;
        let resumed = match (flushed, end) {
            (Ok(()), FillEnd::Resume) => resume(control, &lending).await,
            (flushed, _) => flushed,
        };
        // The guest has its disks: whatever else went wrong, the filling is over.
        self.catalog.settle(intent.id, &intent.domain.id, &[]).await?;
        resumed?;
        Ok(FillEnded {
            disks: lending.disks.into_iter().map(|disk| disk.target).collect(),
            resumed: control.state().await? == RunState::Running,
        })
    }

    /// Stops the exports, flushes, gives the guest its disks; the inner result is the flush's.
    async fn close_all(
        &self,
        control: &dyn Control,
        intent: &Intent,
        lending: &Lending,
    ) -> Result<Result<()>> {
        for disk in &lending.disks {
            control.unserve(&disk.export.id).await?;
        }
        let mut flushed = Ok(());
        for disk in &lending.disks {
            if !lends(control)?.is_lent(disk).await? {
                continue;
            }
            let node = DiskNode {
                target: disk.target.clone(),
                node: disk.node.clone(),
            };
            if let Err(error) = control.flush(&[node]).await
                && flushed.is_ok()
            {
                flushed = Err(error.leaving(Effect::Unknown).hint(
                    "The guest has its disks again and stays paused, but not all that was filled has reached the image: \
                     look after the storage that it is on, then fill the disk again.",
                ));
            }
        }
        self.give_all_back(control, lending).await?;
        self.leave_server(control, intent, lending).await?;
        Ok(flushed)
    }

    async fn give_all_back(&self, control: &dyn Control, lending: &Lending) -> Result<()> {
        for disk in &lending.disks {
            let back = lends(control)?.give_back(disk).await;
            back.map_err(|e| e.with("disk", &disk.target))?;
        }
        Ok(())
    }

    /// Stops the server unless it serves something else, or was started by itself.
    async fn leave_server(&self, control: &dyn Control, intent: &Intent, lending: &Lending) -> Result<()> {
        let domain = &intent.domain.id;
        let place = self.place(ServedBy::Hypervisor, control, domain);
        let (recorded, exports) = self.truly_served(&place).await?;
        let stops = match recorded {
            Some(server) => !server.explicit && exports.is_empty(),
            // Killed between its start and its record: nobody else knows of it.
            None => lending.starts && control.served().await?.is_empty(),
        };
        if !stops {
            return Ok(());
        }
        place.stop().await?;
        self.catalog
            .settle(Uuid::nil(), domain, &[Change::ClearServer])
            .await
    }

    /// Takes back what a start has done, and settles its intent.
    async fn undo_fill(&self, control: &dyn Control, intent: &Intent, lending: &Lending) -> Result<()> {
        for disk in &lending.disks {
            control.unserve(&disk.export.id).await?;
        }
        self.give_all_back(control, lending).await?;
        self.leave_server(control, intent, lending).await?;
        self.catalog.settle(intent.id, &intent.domain.id, &[]).await
    }

    /// What a kill left of a filling. A start that nobody got an answer to is undone, an end is finished, and the guest
    /// stays paused; where the hypervisor was started anew since, there is nothing left to do.
    pub(crate) async fn settle_fill(
        &self,
        control: &dyn Control,
        intent: &Intent,
        lending: &Lending,
        stage: FillStage,
    ) -> Result<RecoveredHow> {
        if !stands(control, lending).await? {
            self.catalog.settle(intent.id, &intent.domain.id, &[]).await?;
            return Ok(RecoveredHow::Undone);
        }
        refuse_running(control, lending).await?;
        if stage == FillStage::Starting {
            self.undo_fill(control, intent, lending).await?;
            return Ok(RecoveredHow::Undone);
        }
        let flushed = self.close_all(control, intent, lending).await?;
        self.catalog.settle(intent.id, &intent.domain.id, &[]).await?;
        flushed?;
        Ok(RecoveredHow::Finished)
    }

    /// Whether a filling is to be left alone: it is open, in this run of the hypervisor.
    pub(crate) async fn fill_goes_on(
        &self,
        control: &dyn Control,
        lending: &Lending,
        stage: FillStage,
    ) -> Result<bool> {
        Ok(stage == FillStage::Open && stands(control, lending).await?)
    }

    /// Whether the server of a place serves disks that are being filled.
    pub(crate) async fn fills_at(&self, place: &Place<'_>, domain: &DomainId) -> Result<bool> {
        Ok(place.by == ServedBy::Hypervisor && self.fill_in_force(domain).await?.is_some())
    }

    /// Refuses where disks of the domain are being filled.
    ///
    /// # Errors
    /// `Busy`, naming them.
    pub(crate) async fn refuse_while_filling(&self, domain: &DomainId) -> Result<()> {
        match self.fill_in_force(domain).await? {
            Some((_, lending)) => Err(filled(&lending).with("domain", domain)),
            None => Ok(()),
        }
    }

    async fn fill_in_force(&self, domain: &DomainId) -> Result<Option<(Intent, Lending)>> {
        let mut intents = self.catalog.intents(Some(domain)).await?.into_iter();
        Ok(intents.find_map(|intent| {
            let lending = match &intent.act {
                Act::Fill { lending, .. } => (**lending).clone(),
                _ => return None,
            };
            Some((intent, lending))
        }))
    }

    async fn fill_health(&self, control: &dyn Control, lending: &Lending) -> Result<FillHealth> {
        if !stands(control, lending).await? {
            return Ok(FillHealth::Over);
        }
        if control.state().await? == RunState::Running {
            let why = "somebody has let the guest run, and each access to the disks fails there";
            return Ok(FillHealth::Interrupted(why.to_owned()));
        }
        let served = control.served().await?;
        for disk in &lending.disks {
            let why = if !served.contains(&disk.export.id) {
                "is not served any more"
            } else if !lends(control)?.is_lent(disk).await? {
                "is the guest's again"
            } else {
                continue;
            };
            return Ok(FillHealth::Interrupted(format!("the disk {} {why}", disk.target)));
        }
        Ok(FillHealth::Open)
    }
}

/// What an error that left something behind says to do.
const AGAIN: &str = "`disksnap fill end` again, or `disksnap recover`, gives the guest its disks once the cause is mended; it stays paused.";

fn act(lending: &Lending, stage: FillStage) -> Act {
    Act::Fill {
        lending: Box::new(lending.clone()),
        stage,
    }
}

fn stage(intent: &Intent) -> Option<FillStage> {
    match intent.act {
        Act::Fill { stage, .. } => Some(stage),
        _ => None,
    }
}

fn told(intent: &Intent, lending: &Lending, health: FillHealth) -> Filling {
    let disk = |disk: &LentDisk| FillDisk {
        target: disk.target.clone(),
        size: disk.size,
        name: disk.export.name.clone(),
        source: lending.server.source(&disk.export.name),
    };
    Filling {
        domain: intent.domain.id.clone(),
        since: intent.since,
        server: lending.server.clone(),
        disks: lending.disks.iter().map(disk).collect(),
        skipped: lending.skipped.clone(),
        warnings: lending.warnings.clone(),
        health,
    }
}

/// Whether the run of the hypervisor is still the one that it began in.
async fn stands(control: &dyn Control, lending: &Lending) -> Result<bool> {
    Ok(control.state().await?.is_active() && control.instance().await? == lending.server.instance)
}

/// Lets the guest run, unless it has run meanwhile: what it has in memory then is not what its disks hold.
async fn resume(control: &dyn Control, lending: &Lending) -> Result<()> {
    let state = control.state().await?;
    if state == RunState::Running {
        // By an end that was killed right after.
        return Ok(());
    }
    if state != RunState::Stopped(lending.stood.clone()) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("the guest was {} when the filling began, and is {state} now: it has run meanwhile, without its disks", lending.stood),
        )
        .leaving(Effect::Unknown)
        .hint("It has its disks again. Reset it before it goes on (QMP's `system_reset`, `virsh reset`), then let it run."));
    }
    control.resume().await.map_err(|e| {
        e.leaving(Effect::Unknown).hint(
            "The guest has its disks again and stays paused; let it run (QMP's `cont`, `virsh resume`).",
        )
    })
}

/// In which word the guest stands still.
fn standing_still(state: &RunState) -> Result<String> {
    let (kind, why, hint) = match state {
        RunState::Stopped(word) if word == "prelaunch" || word == "paused" => return Ok(word.clone()),
        RunState::Off => (
            ErrorKind::Unavailable,
            "the domain is off: nobody serves its disks".to_owned(),
            "Write to the images themselves; or start it paused (`virsh start --paused`, QEMU's -S).",
        ),
        RunState::Running => (
            ErrorKind::Busy,
            "the guest runs, and uses its disks".to_owned(),
            "Pause it first: better before it has run at all (`virsh start --paused`, QEMU's -S).",
        ),
        RunState::Stopped(word) => (
            ErrorKind::Busy,
            format!("the guest stands still for a reason of its own ({word})"),
            "Start it anew, paused (`virsh start --paused`, QEMU's -S).",
        ),
        RunState::Migrating(word) => (
            ErrorKind::Busy,
            format!("a migration is under way ({word})"),
            "Wait until the migration has ended.",
        ),
        RunState::Storage => (
            ErrorKind::Unsupported,
            "a storage daemon has no guest whose disks could be filled".to_owned(),
            "Write to the images themselves, with nobody else using them.",
        ),
    };
    Err(Error::new(kind, why).hint(hint))
}

/// A guest that runs on a stand-in cannot be given its disk. One that runs and has its disks was let run by an end that
/// was killed right then.
async fn refuse_running(control: &dyn Control, lending: &Lending) -> Result<()> {
    let state = control.state().await?;
    if matches!(state, RunState::Stopped(_)) {
        return Ok(());
    }
    for disk in &lending.disks {
        if lends(control)?.is_lent(disk).await? {
            let what = format!(
                "the guest is {state}: somebody has let it go while its disks are being filled, and each access to them \
                 fails there"
            );
            return Err(Error::new(ErrorKind::Busy, what).hint(
                "Pause it (QMP's `stop`, `virsh suspend`), then `disksnap fill end`; and reset it before it goes on.",
            ));
        }
    }
    Ok(())
}

fn warnings(stood: &str) -> Vec<String> {
    if stood == "prelaunch" {
        return Vec::new();
    }
    let what = "the guest has run: what it has of its disks in memory is not what they will hold; reset it before it \
                goes on (QMP's `system_reset`, `virsh reset`)";
    vec![what.to_owned()]
}

/// The disks that are meant, and the others.
fn chosen<'a>(domain: &'a Domain, targets: &[String]) -> Result<(Vec<&'a Disk>, Vec<Skipped>)> {
    for (n, target) in targets.iter().enumerate() {
        let disk = domain.disk(target)?;
        let why = if targets[..n].contains(target) {
            "the disk is named twice"
        } else if disk.source.is_none() {
            "the drive is empty: there is nothing to fill"
        } else {
            continue;
        };
        return Err(Error::new(ErrorKind::Invalid, why).with("disk", target));
    }
    let (mut disks, mut skipped) = (Vec::new(), Vec::new());
    for disk in &domain.disks {
        let reason = if targets.is_empty() {
            reason_to_skip(disk)
        } else {
            (!targets.contains(&disk.target)).then(|| "not named".to_owned())
        };
        match reason {
            None => disks.push(disk),
            Some(reason) => skipped.push(Skipped {
                target: disk.target.clone(),
                reason,
            }),
        }
    }
    if disks.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "there is no disk to fill").hint(
            "CD-ROMs, floppies, read-only and shareable disks and empty drives are left out unless they are named.",
        ));
    }
    Ok((disks, skipped))
}

fn export_request(request: &FillRequest) -> ExportRequest {
    ExportRequest {
        listen: request.listen.clone(),
        tls: request.tls.clone(),
        allow_remote: request.allow_remote,
        disks: Vec::new(),
    }
}

fn lends(control: &dyn Control) -> Result<&dyn Lend> {
    control.lends().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "this domain's guest cannot lend its disks",
        )
    })
}

fn filled(lending: &Lending) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("its disks {} are being filled", targets(lending)),
    )
    .hint(
        "`disksnap fill list` tells where. Wait until that has ended; where nobody is at it any more, `disksnap fill end` gives the \
         guest its disks again.",
    )
}

fn over(lending: &Lending) -> Error {
    Error::new(
        ErrorKind::Broken,
        "the domain's hypervisor has ended since the filling began: the disks hold what was written by then",
    )
    .with("disks", targets(lending))
    .hint("Nothing is left of the filling. Start the domain paused, and fill the disks again.")
}

/// The disks by their targets.
pub(crate) fn targets(lending: &Lending) -> String {
    let names: Vec<&str> = lending.disks.iter().map(|disk| disk.target.as_str()).collect();
    names.join(", ")
}
