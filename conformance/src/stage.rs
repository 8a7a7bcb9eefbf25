//! What one case has to work with: a fresh setting, a catalog, and the provider under examination.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use disksnap_core::{
    Altered, Catalog, Control, Deleted, Disk, DiskRequest, DiskSnapshot, Disks, Dispatcher, Domain, Error,
    ErrorKind, Inspected, Registry, Result, RunState, Snapshot, SnapshotId, SnapshotName, SnapshotRequest,
};

use crate::examined::{Examined, Instance};
use crate::points::Points;
use crate::tapped::{TappedCatalog, TappedConnector};
use crate::{Fixture, MemoryCatalog, Setting};

/// How long a guard outside this process may take to let the guest run again.
const GUARD_LIMIT: Duration = Duration::from_secs(30);

/// Why a case failed.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

/// How a case ends.
pub(crate) type Verdict = std::result::Result<(), Failure>;

/// What a step of a case gives.
pub(crate) type Step<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        use std::error::Error as _;
        let mut text = format!("{} [{}]", error, error.kind().as_str());
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}\n  because {cause}");
            source = cause.source();
        }
        for failure in error.rollback_failures() {
            text = format!("{text}\n  and undoing it: {failure}");
        }
        Self(text)
    }
}

/// Says where in a case something went wrong.
pub(crate) trait Context<T> {
    fn context(self, what: impl fmt::Display) -> Step<T>;
}

impl<T, E: Into<Failure>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Step<T> {
        self.map_err(|e| Failure(format!("{what}: {}", e.into().0)))
    }
}

/// Fails the case unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::stage::Failure(format!($($message)+)));
        }
    };
}
pub(crate) use ensure;

/// Fails the case unless the result is an error of this kind.
pub(crate) fn must_fail<T: fmt::Debug>(result: Result<T>, kind: ErrorKind, what: &str) -> Verdict {
    match result {
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => Err(error).context(format!("{what} must fail as {}, not otherwise", kind.as_str())),
        Ok(answer) => Err(Failure(format!(
            "{what} must fail as {}, and gave {answer:?}",
            kind.as_str()
        ))),
    }
}

/// The stage of one case.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) setting: Box<dyn Setting>,
    pub(crate) points: Arc<Points>,
    pub(crate) catalog: MemoryCatalog,
    provider: Examined,
    state: RunState,
}

impl Stage {
    /// A stage with at least this many disks, for a provider that gets a new instance at each call.
    pub(crate) async fn new(fixture: &Arc<dyn Fixture>, disks: usize) -> Step<Self> {
        Self::with(fixture, disks, Instance::Fresh(Arc::clone(fixture))).await
    }

    /// A stage whose provider is one instance throughout.
    pub(crate) async fn lenient(fixture: &Arc<dyn Fixture>, disks: usize) -> Step<Self> {
        Self::with(fixture, disks, Instance::Same(fixture.provider())).await
    }

    async fn with(fixture: &Arc<dyn Fixture>, disks: usize, instance: Instance) -> Step<Self> {
        let setting = fixture.setting(disks).await.context("making a setting")?;
        let points = Arc::<Points>::default();
        let provider = Examined {
            instance,
            points: Arc::clone(&points),
        };
        let mut stage = Self {
            setting,
            points,
            catalog: MemoryCatalog::new(),
            provider,
            state: RunState::Off,
        };
        stage.state = stage.control().await?.state().await?;
        let found = stage.domain().disks.len();
        ensure!(
            found >= disks,
            "the fixture made {found} disks where {disks} were asked for"
        );
        stage.nothing_left("in a fresh setting").await?;
        Ok(stage)
    }

    pub(crate) fn domain(&self) -> &Domain {
        self.setting.domain()
    }

    /// Whether a hypervisor held the disks at first.
    pub(crate) fn is_active(&self) -> bool {
        self.state.is_active()
    }

    /// The targets of the first disks.
    pub(crate) fn targets(&self, disks: usize) -> Vec<String> {
        let targets = self.domain().disks.iter().map(|d| d.target.clone());
        targets.take(disks).collect()
    }

    /// The first disk's target.
    pub(crate) fn first(&self) -> String {
        self.targets(1).remove(0)
    }

    pub(crate) fn provider(&self) -> Arc<dyn DiskSnapshot> {
        Arc::new(self.provider.clone())
    }

    /// A connection of its own. Let go of it before the dispatcher needs one: a monitor may serve one client.
    pub(crate) async fn control(&self) -> Result<Arc<dyn Control>> {
        self.setting.connector().control(self.domain()).await
    }

    /// A dispatcher as another process would have it: nothing but the catalog is the same.
    pub(crate) fn dispatcher(&self) -> Result<Dispatcher> {
        let mut registry = Registry::empty();
        registry.add(self.provider())?;
        let catalog = TappedCatalog {
            inner: self.catalog.clone(),
            points: Arc::clone(&self.points),
        };
        let connector = TappedConnector {
            inner: self.setting.connector(),
            points: Arc::clone(&self.points),
        };
        Ok(Dispatcher::new(registry, Arc::new(catalog), Arc::new(connector)))
    }

    /// A request for a snapshot of these disks.
    pub(crate) fn request(&self, name: &SnapshotName, targets: &[String]) -> SnapshotRequest {
        let choices = targets.iter().map(|target| self.setting.choice(target));
        SnapshotRequest {
            name: Some(name.clone()),
            disks: Disks::Named(choices.collect()),
            ..SnapshotRequest::default()
        }
    }

    /// What the provider is asked for when these disks are snapshotted.
    pub(crate) async fn disk_requests(&self, targets: &[String]) -> Step<Vec<DiskRequest>> {
        let request = self.request(&name("plan"), targets);
        let plan = self
            .dispatcher()?
            .plan(self.domain(), &request)
            .await
            .context("planning")?;
        Ok(plan.disks.into_iter().map(|disk| disk.request).collect())
    }

    pub(crate) async fn create(&mut self, name: &SnapshotName, targets: &[String]) -> Step<Snapshot> {
        let request = self.request(name, targets);
        let snapshot = self.try_create(&request).await?;
        snapshot.context(format!("creating {name}"))
    }

    /// A create whose error is the case's to judge.
    pub(crate) async fn try_create(&mut self, request: &SnapshotRequest) -> Step<Result<Snapshot>> {
        let created = self.dispatcher()?.create(self.domain(), request).await;
        self.follow(&[]).await?;
        Ok(created)
    }

    /// A delete whose error is the case's to judge.
    pub(crate) async fn try_delete(&mut self, name: &SnapshotName) -> Step<Result<Deleted>> {
        let deleted = self.dispatcher()?.delete(self.domain(), name).await;
        let disks = deleted.as_ref().map_or(&[][..], |done| &done.altered.disks);
        self.follow(disks).await?;
        Ok(deleted.map(|done| done.deleted))
    }

    /// A revert whose error is the case's to judge.
    pub(crate) async fn try_revert(&mut self, name: &SnapshotName) -> Step<Result<Altered>> {
        let reverted = self.dispatcher()?.revert(self.domain(), name, &[]).await;
        let disks = reverted.as_ref().map_or(&[][..], |altered| &altered.disks);
        self.follow(disks).await?;
        Ok(reverted)
    }

    /// After an act that may have given a domain that is off other disks: the setting is told, by what the act said
    /// and by what the records say, as the domain's document would be changed.
    pub(crate) async fn follow(&mut self, told: &[Disk]) -> Verdict {
        if self.is_active() {
            return Ok(());
        }
        self.adopt(told)?;
        let outdated = self.dispatcher()?.outdated(self.domain()).await;
        self.adopt(&outdated.context("asking what the domain's disks are now")?)?;
        let outdated = self.dispatcher()?.outdated(self.domain()).await?;
        ensure!(
            outdated.is_empty(),
            "the domain's disks are {outdated:?} now, and the fixture has not followed"
        );
        Ok(())
    }

    /// Whether an act that was asked with this document failed because another one, or what it settled itself, has
    /// given the domain other disks since.
    pub(crate) fn is_overtaken(&self, before: &Domain, error: &Error) -> bool {
        error.kind() == ErrorKind::Invalid && self.domain().disks != before.disks
    }

    fn adopt(&mut self, disks: &[Disk]) -> Verdict {
        if disks.is_empty() {
            return Ok(());
        }
        self.setting
            .adopt(disks)
            .context("following the domain to its disks")
    }

    pub(crate) async fn show(&self, name: &SnapshotName) -> Step<Inspected> {
        let shown = self.dispatcher()?.show(self.domain(), name).await;
        shown.context(format!("showing {name}"))
    }

    pub(crate) async fn delete(&mut self, name: &SnapshotName) -> Step<Deleted> {
        let deleted = self.try_delete(name).await?;
        deleted.context(format!("deleting {name}"))
    }

    /// Deletes a snapshot that must be there.
    pub(crate) async fn delete_now(&mut self, name: &SnapshotName) -> Verdict {
        let deleted = self.delete(name).await?;
        ensure!(
            deleted == Deleted::Now,
            "deleting {name} says that it was deleted before"
        );
        Ok(())
    }

    /// The whole of a live disk.
    pub(crate) async fn live(&self, target: &str) -> Step<Vec<u8>> {
        let size = self.setting.size(target);
        let bytes = self.setting.read_disk(target, 0, size).await;
        bytes.context(format!("reading the disk {target}"))
    }

    /// The whole of one disk in a snapshot, read as a user would.
    pub(crate) async fn frozen(&self, name: &SnapshotName, target: &str) -> Step<Vec<u8>> {
        let dispatcher = self.dispatcher()?;
        let opened = dispatcher.open(self.domain(), name, target).await;
        let opened = opened.context(format!("opening {name} {target}"))?;
        let size = self.setting.size(target);
        let bytes = self
            .setting
            .read_snapshot(&opened.source, &opened.format, 0, size)
            .await;
        dispatcher.close(self.domain(), opened).await.context("closing")?;
        bytes.context(format!("reading {name} {target}"))
    }

    /// Fails unless a disk in a snapshot holds just these bytes.
    pub(crate) async fn must_hold(&self, name: &SnapshotName, target: &str, bytes: &[u8]) -> Verdict {
        let found = self.frozen(name, target).await?;
        same(bytes, &found).context(format!("the content of {name} {target}"))
    }

    /// Writes to the live disk, and makes sure that it arrived.
    pub(crate) async fn write(&self, target: &str, offset: u64, len: u64, byte: u8) -> Verdict {
        let what = format!("the domain's write to {target} at {offset}, {len} bytes");
        self.setting
            .fill(target, offset, len, byte)
            .await
            .context(&what)?;
        self.must_read(target, offset, len, byte).await.context(&what)
    }

    /// Zeroes a range of the live disk, and makes sure that it arrived.
    pub(crate) async fn zero(&self, target: &str, offset: u64, len: u64) -> Verdict {
        let what = format!("the domain's zeroing of {target} at {offset}, {len} bytes");
        self.setting.zero(target, offset, len).await.context(&what)?;
        self.must_read(target, offset, len, 0).await.context(&what)
    }

    async fn must_read(&self, target: &str, offset: u64, len: u64, byte: u8) -> Verdict {
        let read = self.setting.read_disk(target, offset, len).await?;
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        ensure!(
            read.len() == wanted && read.iter().all(|b| *b == byte),
            "it does not read back"
        );
        Ok(())
    }

    /// Everything beside the disks, sorted.
    pub(crate) async fn things(&self) -> Step<Vec<String>> {
        let mut things = self.setting.leftovers().await.context("looking for leftovers")?;
        things.sort();
        Ok(things)
    }

    pub(crate) async fn nothing_left(&self, when: impl fmt::Display) -> Verdict {
        let things = self.things().await?;
        ensure!(things.is_empty(), "left behind ({when}): {}", things.join(", "));
        Ok(())
    }

    /// Fails unless the guest runs, or stands, as it did at first; a guard may take its time.
    pub(crate) async fn runs_as_before(&self) -> Verdict {
        let looks = async {
            loop {
                let now = self.control().await?.state().await?;
                if now == self.state {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(GUARD_LIMIT, looks).await {
            Ok(result) => result,
            Err(_) => Err(Failure(format!(
                "the domain was {} and is so no more",
                self.state
            ))),
        }
    }

    /// What must be so after every case.
    pub(crate) async fn finish(&self) -> Verdict {
        self.nothing_left("at the end").await?;
        self.runs_as_before().await?;
        let open = self.catalog.intents(None).await?;
        ensure!(open.is_empty(), "the journal has unsettled intents: {open:?}");
        Ok(())
    }
}

/// A snapshot's name that is known to be good.
pub(crate) fn name(text: &str) -> SnapshotName {
    text.parse().unwrap_or_else(|_| SnapshotId::random().into())
}

/// Fails where two contents differ, and says where.
pub(crate) fn same(wanted: &[u8], found: &[u8]) -> Verdict {
    ensure!(
        wanted.len() == found.len(),
        "{} bytes instead of {}",
        found.len(),
        wanted.len()
    );
    // Byte by byte takes long where the compiler does not optimize.
    if wanted == found {
        return Ok(());
    }
    match wanted.iter().zip(found).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(Failure(format!(
            "byte {at} is {:#04x} and should be {:#04x}",
            found[at], wanted[at]
        ))),
    }
}
