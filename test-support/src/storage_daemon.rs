//! A real `qemu-storage-daemon` as the domain: block nodes, jobs, bitmaps and exports, with no guest.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::disk::{Attached, DiskSpec, GuestDisk};
use crate::domain_xml::Described;
use crate::process::Process;
use crate::qmp::Monitor;
use crate::tools::QemuVersion;

/// What to start a [`StorageDaemon`] with.
#[derive(Clone, Debug, Default)]
pub struct StorageDaemonBuilder {
    disks: Vec<DiskSpec>,
    version: QemuVersion,
    without_guest_side: bool,
}

impl StorageDaemonBuilder {
    /// Adds a disk. Its nodes are `libvirt-N-storage`, `libvirt-N-format` and the wrapper `top-TARGET`.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk.wrapped());
        self
    }

    /// Chooses the QEMU.
    #[must_use]
    pub fn version(mut self, version: QemuVersion) -> Self {
        self.version = version;
        self
    }

    /// Leaves out the FUSE exports, and with them [`StorageDaemon::disk`]: nothing writes then, and
    /// the capability `fuse` is not needed.
    #[must_use]
    pub fn without_guest_side(mut self) -> Self {
        self.without_guest_side = true;
        self
    }

    /// Starts it and waits until it answers.
    #[must_use]
    pub fn start(self) -> StorageDaemon {
        let dir = crate::temp_dir();
        let at = dir.path();
        let specs = self.disks.into_iter().enumerate();
        let disks: Vec<_> = specs
            .map(|(n, disk)| Attached::new(disk, n, at, self.version))
            .collect();
        let args = arguments(at, &disks, self.without_guest_side);
        let program = self.version.program("qemu-storage-daemon");
        let process = Process::start("qemu-storage-daemon", program, args, at);
        let described = Described::new("storage", at, disks);
        let monitor = Mutex::new(connect(&process, at));
        let guest_side = !self.without_guest_side;
        let daemon = StorageDaemon {
            process,
            monitor,
            files: Vec::new(),
            described,
            dir,
        };
        if guest_side { daemon.with_files() } else { daemon }
    }
}

fn arguments(dir: &Path, disks: &[Attached], without_guest_side: bool) -> Vec<OsString> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
    for disk in disks {
        for node in disk.blockdevs() {
            add("--blockdev", node);
        }
        if !without_guest_side {
            let point = mount_point(dir, disk);
            File::create(&point).expect("the mount point can be made");
            let target = &disk.spec.target;
            let export = json!({"type": "fuse", "id": format!("guest-{target}"),
                "node-name": disk.top_node(), "mountpoint": point,
                "writable": !disk.spec.read_only});
            add("--export", export.to_string());
        }
    }
    // The tests' own monitor comes last: when it answers, all the rest is there.
    for name in ["qmp", "test"] {
        let path = dir.join(format!("{name}.sock"));
        add(
            "--chardev",
            format!("socket,id={name},path={},server=on,wait=off", path.display()),
        );
        add("--monitor", format!("chardev={name}"));
    }
    args.into_iter().map(OsString::from).collect()
}

fn mount_point(dir: &Path, disk: &Attached) -> PathBuf {
    dir.join(format!("{}.guest", disk.spec.target))
}

fn connect(process: &Process, dir: &Path) -> Monitor {
    Monitor::connect(&dir.join("test.sock"), || {
        process
            .is_running()
            .then_some(())
            .ok_or_else(|| format!("it ended\n{}", process.log()))
    })
}

/// A running storage daemon. Dropping it kills it and removes its directory.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    monitor: Mutex<Monitor>,
    files: Vec<Arc<File>>,
    described: Described,
    // Last: the directory goes after the process.
    dir: TempDir,
}

impl StorageDaemon {
    /// A daemon without disks yet.
    #[must_use]
    pub fn builder() -> StorageDaemonBuilder {
        StorageDaemonBuilder::default()
    }

    fn with_files(mut self) -> Self {
        let open = |disk: &Attached| {
            let path = mount_point(self.dir.path(), disk);
            let file = File::options().read(true).write(!disk.spec.read_only).open(&path);
            Arc::new(file.unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display())))
        };
        self.files = self.described.disks.iter().map(open).collect();
        self
    }

    /// The QMP socket for the code under test: one client at a time.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.described.qmp_path()
    }

    /// The test's own monitor, on a socket of its own.
    pub fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command on the test's own monitor; panics with QEMU's error.
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.monitor().execute(command, arguments)
    }

    /// The process, for signals and `/proc`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// A directory of its own, removed when dropped.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The guest's side of a disk.
    #[must_use]
    pub fn disk(&self, target: &str) -> GuestDisk {
        let disk = self.described.disk(target);
        let file = self.files.get(disk.index);
        let file = file.expect("this daemon was started without the guest's side");
        GuestDisk::over_fuse(disk, Arc::clone(file))
    }

    /// The image of a disk.
    #[must_use]
    pub fn image(&self, target: &str) -> &Path {
        &self.described.disk(target).image
    }

    /// The node at the top of a disk's chain: `top-TARGET`.
    #[must_use]
    pub fn top_node(&self, target: &str) -> String {
        self.described.disk(target).top_node()
    }

    /// The format node of a disk.
    #[must_use]
    pub fn format_node(&self, target: &str) -> &str {
        &self.described.disk(target).format_node
    }

    /// The domain's name in [`domain_xml`](Self::domain_xml).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.described.name
    }

    /// The domain's UUID in [`domain_xml`](Self::domain_xml).
    #[must_use]
    pub fn uuid(&self) -> uuid::Uuid {
        self.described.uuid
    }

    /// A domain XML as libvirt writes it, with the monitor's socket in `<metadata>`.
    #[must_use]
    pub fn domain_xml(&self) -> String {
        self.described.xml()
    }

    /// Writes [`domain_xml`](Self::domain_xml) into its directory and returns the path.
    #[must_use]
    pub fn domain_xml_file(&self) -> PathBuf {
        self.described.write(self.dir.path())
    }

    /// SIGKILL, as if it crashed, and waits until it is gone.
    pub fn kill9(&self) {
        self.process.kill();
        self.unmount();
    }

    /// SIGKILL. Where it had ended by itself before: its exit status and what it printed.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        self.process.last_words(&self.monitor)
    }

    /// Ends it in an orderly way (QMP `quit`), which saves persistent bitmaps.
    pub fn quit(&mut self) -> ExitStatus {
        self.files.clear();
        // Its answer may be lost in its end.
        let _ = self.monitor().try_execute("quit", &json!({}));
        self.process.wait()
    }

    /// Stops the process with SIGSTOP: its sockets accept connections and nothing answers.
    pub fn hang(&self) {
        self.process.signal(rustix::process::Signal::STOP);
    }

    /// Lets it go on after [`hang`](Self::hang).
    pub fn unhang(&self) {
        self.process.signal(rustix::process::Signal::CONT);
    }

    /// Starts it again on the same images, with the same arguments, ending it first if it runs.
    pub fn restart(&mut self) {
        let guest_side = !self.files.is_empty() || mount_point_exists(self);
        self.files.clear();
        self.process.kill();
        self.unmount();
        self.process.restart();
        *self.monitor() = connect(&self.process, self.dir.path());
        if guest_side {
            let open = |disk: &Attached| {
                let path = mount_point(self.dir.path(), disk);
                let file = File::options().read(true).write(!disk.spec.read_only).open(&path);
                Arc::new(file.expect("the guest's side can be opened again"))
            };
            self.files = self.described.disks.iter().map(open).collect();
        }
    }

    /// What it printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// A killed daemon leaves its mounts behind, dead.
    fn unmount(&self) {
        for disk in &self.described.disks {
            let point = mount_point(self.dir.path(), disk);
            let flags = rustix::mount::UnmountFlags::DETACH;
            if rustix::mount::unmount(&point, flags).is_err() {
                // Not root, or not mounted: the helper tells them apart, and neither is an error here.
                if let Some(helper) = crate::tools::find("fusermount3") {
                    let mut command = std::process::Command::new(helper);
                    let _ = command.args(["-u", "-q", "-z"]).arg(&point).output();
                }
            }
        }
    }
}

fn mount_point_exists(daemon: &StorageDaemon) -> bool {
    let disks = &daemon.described.disks;
    disks
        .iter()
        .any(|disk| mount_point(daemon.dir.path(), disk).symlink_metadata().is_ok())
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.files.clear();
        self.process.kill();
        self.unmount();
    }
}
