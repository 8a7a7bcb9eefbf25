//! Fixtures for the conformance suite: domains that run in a real QEMU, idle machine or storage daemon, and domains
//! on real btrfs and LVM.

mod domain;
mod overlay;
mod overlay_off;
mod setting;
mod subvolumes;
mod volumes;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use disksnap_conformance::{Fixture, Setting};
use disksnap_core::{Capability, DiskSnapshot, MethodChoice, Options, Result};
use disksnap_hypervisor::GuardianProgram;
pub use disksnap_test_support::{LoopFs, LoopFsKind, QemuVersion, loop_fs};

pub use crate::overlay::OverlayFixture;
pub use crate::overlay_off::OverlaysOff;
use crate::setting::QemuSetting;
pub use crate::subvolumes::InSubvolumes;
pub use crate::volumes::LogicalVolumes;

/// What holds the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// `qemu-system-x86_64`, running and idle: its CPU can be paused.
    Machine,
    /// `qemu-storage-daemon`: nothing to pause, each disk behind a raw wrapper node that stays.
    StorageDaemon,
    /// The same, its guest's side NBD exports: a writable FUSE export may resize its disk, which forbids commits.
    ExportedStorageDaemon,
}

/// Makes domains that run in a QEMU of their own.
#[derive(Clone)]
pub struct QemuFixture {
    pub(crate) make: Arc<dyn Fn() -> Arc<dyn DiskSnapshot> + Send + Sync>,
    pub(crate) capabilities: Vec<Capability>,
    pub(crate) process: Process,
    pub(crate) version: QemuVersion,
    pub(crate) options: Options,
    pub(crate) images: Option<PathBuf>,
    pub(crate) guardian: GuardianProgram,
    /// Of the QEMUs that ended by themselves, for the postmortem.
    pub(crate) last_words: Arc<Mutex<Vec<String>>>,
}

impl fmt::Debug for QemuFixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuFixture")
            .field("process", &self.process)
            .field("version", &self.version)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl QemuFixture {
    /// A fixture for QEMU 10.0; `make` gives a new provider at each call.
    pub fn new(
        process: Process,
        capabilities: impl IntoIterator<Item = Capability>,
        make: impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static,
    ) -> Self {
        Self {
            make: Arc::new(make),
            capabilities: capabilities.into_iter().collect(),
            process,
            version: QemuVersion::V10_0,
            options: Options::default(),
            images: None,
            guardian: GuardianProgram::Automatic,
            last_words: Arc::default(),
        }
    }

    /// Another QEMU.
    #[must_use]
    pub fn version(mut self, version: QemuVersion) -> Self {
        self.version = version;
        self
    }

    /// Tells the method this of every disk.
    #[must_use]
    pub fn option(mut self, key: &str, value: &str) -> Self {
        self.options.push(key, value);
        self
    }

    /// Makes all images raw, in directories under this one; without it they are of several formats, in a
    /// temporary directory.
    #[must_use]
    pub fn raw_images_in(mut self, parent: impl Into<PathBuf>) -> Self {
        self.images = Some(parent.into());
        self
    }

    /// The guardian's program, where this program does not call `run_if_asked` in its main.
    #[must_use]
    pub fn guardian(mut self, program: GuardianProgram) -> Self {
        self.guardian = program;
        self
    }

    /// For a test, whose main is not its own: this very test program, asked for its one test of this name,
    /// which calls [`become_guardian_when_asked`].
    ///
    /// # Panics
    /// When the running program cannot be found.
    #[must_use]
    pub fn guarded_by_test(self, name: &str) -> Self {
        let path = std::env::current_exe().unwrap_or_else(|e| panic!("where is this program? {e}"));
        let arguments = ["--exact", name].map(Into::into).to_vec();
        self.guardian(GuardianProgram::Program { path, arguments })
    }
}

/// What the test named to [`QemuFixture::guarded_by_test`] does; does not return when it is asked.
///
/// # Panics
/// Never in a test that was not asked.
pub fn become_guardian_when_asked() {
    disksnap_hypervisor::guardian::run_if_asked();
    assert!(
        std::env::var_os("DISKSNAP_GUARDIAN").is_none(),
        "a guardian does not go on as a test"
    );
}

/// Why this machine cannot mount such a file system, or `None` when it can.
#[must_use]
pub fn lacking_fs(kind: LoopFsKind) -> Option<String> {
    disksnap_test_support::require::lacking(match kind {
        LoopFsKind::Btrfs => "btrfs",
        LoopFsKind::Xfs | LoopFsKind::XfsWithoutReflink => "xfs",
    })
}

/// Why this machine cannot start such a process, or `None` when it can.
#[must_use]
pub fn lacking(process: Process, version: QemuVersion) -> Option<String> {
    use disksnap_test_support::require::lacking;
    let of_process = match process {
        Process::Machine => lacking("qemu-system-x86_64"),
        Process::StorageDaemon => lacking("qemu-storage-daemon").or_else(|| lacking("fuse")),
        Process::ExportedStorageDaemon => lacking("qemu-storage-daemon"),
    };
    let of_version = match version {
        QemuVersion::V7_2 => lacking("qemu-7.2"),
        QemuVersion::V10_0 => None,
    };
    of_process.or(of_version)
}

#[async_trait]
impl Fixture for QemuFixture {
    fn provider(&self) -> Arc<dyn DiskSnapshot> {
        (self.make)()
    }

    fn expected_capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    async fn setting(&self, disks: usize) -> Result<Box<dyn Setting>> {
        let choice = MethodChoice {
            method: self.provider().method().name,
            options: self.options.clone(),
        };
        Ok(Box::new(QemuSetting::new(self, disks, choice)?))
    }

    fn postmortem(&self) -> Option<String> {
        let words = std::mem::take(&mut *self.last_words.lock().unwrap_or_else(PoisonError::into_inner));
        (!words.is_empty()).then(|| words.join("\n"))
    }
}
