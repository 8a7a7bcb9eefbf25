//! What every part starts from: a real QEMU with disks, and a dispatcher over it with a catalog of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    DiskChoice, DiskSnapshot, Disks, Dispatcher, Domain, Registry, Snapshot, SnapshotName, SnapshotRequest,
};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_hypervisor::{Paths, QemuConnector};
use disksnap_qemu_fleece::QemuFleece;
use disksnap_test_support::{DiskSpec, Qemu, QemuBuilder, StorageDaemon, StorageDaemonBuilder};
use disksnap_xml::DomainDocument;
use tokio::runtime::Runtime;

use crate::stopwatch::{Stopwatch, TimedCatalog, TimedConnector, TimedProvider};

/// A QEMU that holds the disks.
#[derive(Debug)]
pub(crate) enum Holder {
    /// A whole machine, idle.
    Machine(Qemu),
    /// A storage daemon.
    Daemon(StorageDaemon),
}

impl Holder {
    /// An idle machine: its firmware has found nothing to boot, and waits.
    pub(crate) fn machine(disks: &[DiskSpec]) -> Result<Self> {
        let builder = disks.iter().cloned().fold(Qemu::builder(), QemuBuilder::disk);
        let machine = builder.start();
        wait_idle(machine.pid())?;
        Ok(Self::Machine(machine))
    }

    /// A storage daemon without a guest's side.
    pub(crate) fn daemon(disks: &[DiskSpec]) -> Self {
        let builder = StorageDaemon::builder().without_guest_side();
        Self::Daemon(
            disks
                .iter()
                .cloned()
                .fold(builder, StorageDaemonBuilder::disk)
                .start(),
        )
    }

    pub(crate) fn domain_xml(&self) -> String {
        match self {
            Self::Machine(machine) => machine.domain_xml(),
            Self::Daemon(daemon) => daemon.domain_xml(),
        }
    }

    pub(crate) fn monitor(&self) -> PathBuf {
        match self {
            Self::Machine(machine) => machine.qmp_path(),
            Self::Daemon(daemon) => daemon.qmp_path(),
        }
    }

    pub(crate) fn format_node(&self, target: &str) -> &str {
        match self {
            Self::Machine(machine) => machine.format_node(target),
            Self::Daemon(daemon) => daemon.format_node(target),
        }
    }

    pub(crate) fn top_node(&self, target: &str) -> String {
        match self {
            Self::Machine(machine) => machine.top_node(target),
            Self::Daemon(daemon) => daemon.top_node(target),
        }
    }
}

/// Waits until a process has used hardly any processor time for a while.
fn wait_idle(pid: u32) -> Result<()> {
    let ticks = || -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the machine has ended")?;
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        ensure!(fields.len() > 12, "/proc/{pid}/stat is not as proc(5) says");
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    };
    let mut before = ticks()?;
    for _ in 0..60 {
        std::thread::sleep(Duration::from_millis(500));
        let now = ticks()?;
        // Ticks of 10 ms: less than a tenth of a core.
        if now - before < 5 {
            return Ok(());
        }
        before = now;
    }
    anyhow::bail!("the machine does not become idle")
}

/// A dispatcher over one domain.
pub(crate) struct Scene {
    pub(crate) runtime: Runtime,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) connector: QemuConnector,
    pub(crate) domain: Domain,
    pub(crate) watch: Arc<Stopwatch>,
}

impl Scene {
    /// A dispatcher whose state is in this directory, for fleeces.
    pub(crate) fn new(domain_xml: &str, state: &Path) -> Result<Self> {
        Self::with(domain_xml, state, vec![Arc::new(QemuFleece)])
    }

    /// A dispatcher whose state is in this directory, with these methods.
    pub(crate) fn with(domain_xml: &str, state: &Path, methods: Vec<Arc<dyn DiskSnapshot>>) -> Result<Self> {
        // As the command line program has it.
        let runtime = Runtime::new()?;
        let state = StateDir::open(Some(state))?;
        let connector = QemuConnector::new(Paths {
            images: state.images(),
            run: state.run(),
        });
        let watch = Arc::<Stopwatch>::default();
        let timed = || Arc::clone(&watch);
        let mut registry = Registry::empty();
        for inner in methods {
            registry.add(Arc::new(TimedProvider {
                inner,
                watch: timed(),
            }))?;
        }
        let catalog = TimedCatalog {
            inner: Arc::new(runtime.block_on(SqliteCatalog::open(state))?),
            watch: timed(),
        };
        let timed_connector = TimedConnector {
            inner: Arc::new(connector.clone()),
            watch: timed(),
        };
        let dispatcher = Dispatcher::new(registry, Arc::new(catalog), Arc::new(timed_connector))
            .tracked_by(Arc::new(DirtyBitmaps));
        let domain = DomainDocument::parse(domain_xml)?.domain().clone();
        Ok(Self {
            runtime,
            dispatcher,
            connector,
            domain,
            watch,
        })
    }

    pub(crate) fn create(&self, request: &SnapshotRequest) -> Result<Snapshot> {
        Ok(self
            .runtime
            .block_on(self.dispatcher.create(&self.domain, request))?)
    }

    pub(crate) fn delete(&self, name: &SnapshotName) -> Result<()> {
        self.runtime
            .block_on(self.dispatcher.delete(&self.domain, name))?;
        Ok(())
    }
}

/// A request for a snapshot of these disks, by this way.
pub(crate) fn request(targets: &[String], way: &str) -> SnapshotRequest {
    let choice = |target: &String| {
        let mut choice = DiskChoice::new(target);
        choice.options.push("fleece.way", way);
        choice
    };
    SnapshotRequest {
        disks: Disks::Named(targets.iter().map(choice).collect()),
        ..SnapshotRequest::default()
    }
}

/// The names of so many virtio-blk disks: `vda` … `vdz`, `vdaa` …
pub(crate) fn targets(count: usize) -> Vec<String> {
    let letter = |n: usize| char::from(b'a' + u8::try_from(n).unwrap_or(25));
    let name = |n: usize| match n.checked_sub(26) {
        None => format!("vd{}", letter(n)),
        Some(rest) => format!("vd{}{}", letter(rest / 26), letter(rest % 26)),
    };
    (0..count).map(name).collect()
}
