//! A real `qemu-system-x86_64` under TCG, idle without a guest kernel or with the test guest booted.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::disk::{Attached, Bus, DiskSpec, GuestDisk};
use crate::domain_xml::Described;
use crate::firmware_writer;
use crate::guest::GuestSetup;
use crate::process::{PATIENCE, Process};
use crate::qmp::Monitor;
use crate::tools::QemuVersion;

/// What to start a [`Qemu`] with.
#[derive(Clone, Debug, Default)]
pub struct QemuBuilder {
    disks: Vec<DiskSpec>,
    version: QemuVersion,
    guest: Option<GuestSetup>,
    firmware_writer: bool,
    prelaunch: bool,
    extra: Vec<String>,
}

impl QemuBuilder {
    /// Adds a disk; in the guest they appear in this order (`vda`, `vdb`, … and `sda`, `sdb`, …).
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Chooses the QEMU.
    #[must_use]
    pub fn version(mut self, version: QemuVersion) -> Self {
        self.version = version;
        self
    }

    /// Boots the test guest; without it the firmware finds nothing to boot and the machine idles,
    /// running. The capability `guest` is needed.
    #[must_use]
    pub fn guest(mut self, setup: GuestSetup) -> Self {
        self.guest = Some(setup);
        self
    }

    /// Boots a writer that needs no kernel, only the firmware, on all disks, which are of one size and full of zeroes: see
    /// [`firmware_writer_round`](crate::firmware_writer_round). [`Qemu::wait_writer`] waits for it.
    ///
    /// It starts within seconds and writes on also where the machine is emulated twice. The firmware's driver of
    /// virtio-blk knows no flushes, so that QEMU flushes after each write; on virtio-scsi QEMU never does.
    #[must_use]
    pub fn firmware_writer(mut self) -> Self {
        self.firmware_writer = true;
        self
    }

    /// Does not let the CPU run (`-S`): the state is `prelaunch`.
    #[must_use]
    pub fn prelaunch(mut self) -> Self {
        self.prelaunch = true;
        self
    }

    /// Adds arguments of QEMU's command line.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: Into<String>>(mut self, args: I) -> Self {
        self.extra.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it and waits until its monitor answers (not until a guest has booted).
    #[must_use]
    pub fn start(self) -> Qemu {
        let dir = crate::temp_dir();
        let at = dir.path();
        let specs = self.disks.iter().cloned().enumerate();
        let disks: Vec<_> = specs
            .map(|(n, disk)| Attached::new(disk, n, at, self.version))
            .collect();
        let args = self
            .arguments(at, &disks)
            .into_iter()
            .map(OsString::from)
            .collect();
        let program = self.version.program("qemu-system-x86_64");
        let process = Process::start("qemu-system", program, args, at);
        let described = Described::new("vm", at, disks);
        let monitor = Arc::new(Mutex::new(connect(&process, at)));
        Qemu {
            process,
            monitor,
            described,
            dir,
        }
    }

    fn arguments(&self, dir: &Path, disks: &[Attached]) -> Vec<String> {
        let memory = if self.guest.is_some() { "384" } else { "64" };
        let mut args = words(&format!(
            "-nodefaults -no-user-config -display none -no-reboot -machine q35,usb=off,graphics=off \
             -accel tcg -cpu qemu64,+rdrand,+rdseed -smp 1 -m {memory}"
        ));
        if self.prelaunch {
            args.push("-S".into());
        }
        let d = dir.display();
        args.extend(words(&format!(
            "-chardev file,id=serial,path={d}/serial.log,append=on -serial chardev:serial \
             -device virtio-serial-pci,addr=0x2 \
             -chardev socket,id=agent,path={d}/agent.sock,server=on,wait=off \
             -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 \
             -chardev socket,id=qmp,path={d}/qmp.sock,server=on,wait=off \
             -mon chardev=qmp,mode=control"
        )));
        if let Some(guest) = &self.guest {
            args.extend(guest.arguments());
        }
        let scsi = disks.iter().any(|x| x.spec.bus == Bus::VirtioScsi);
        if scsi {
            let threaded = disks
                .iter()
                .any(|x| x.spec.bus == Bus::VirtioScsi && x.spec.iothread);
            args.extend(scsi_controller(threaded));
        }
        for disk in disks {
            args.extend(disk_arguments(disk));
        }
        if self.firmware_writer {
            args.extend(boot_arguments(dir, disks));
        }
        args.extend(self.extra.iter().cloned());
        // The tests' own monitor comes last.
        args.extend(words(&format!(
            "-chardev socket,id=test,path={d}/test.sock,server=on,wait=off \
             -mon chardev=test,mode=control"
        )));
        args
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn scsi_controller(iothread: bool) -> Vec<String> {
    let (object, property) = if iothread {
        ("-object iothread,id=iothread-scsi0", ",iothread=iothread-scsi0")
    } else {
        ("", "")
    };
    words(&format!(
        "{object} -device virtio-scsi-pci,id=scsi0,addr=0x3{property}"
    ))
}

fn disk_arguments(disk: &Attached) -> Vec<String> {
    let mut args: Vec<String> = disk
        .blockdevs()
        .into_iter()
        .flat_map(|node| ["-blockdev".into(), node])
        .collect();
    let (alias, drive, serial) = (&disk.alias, disk.top_node(), disk.serial());
    match disk.spec.bus {
        Bus::VirtioBlk => {
            let mut property = String::new();
            if disk.spec.iothread {
                args.extend(words(&format!("-object iothread,id=iothread-{alias}")));
                property = format!(",iothread=iothread-{alias}");
            }
            let (slot, function) = (disk.pci_slot(), disk.pci_function());
            args.extend(words(&format!(
                "-device virtio-blk-pci,drive={drive},id={alias},serial={serial},\
                 addr={slot:#x}.{function:#x},multifunction=on{property}"
            )));
        }
        Bus::VirtioScsi => args.extend(words(&format!(
            "-device scsi-hd,bus=scsi0.0,channel=0,scsi-id={},lun=0,device_id=drive-{alias},\
             drive={drive},id={alias},serial={serial}",
            disk.index
        ))),
    }
    args
}

/// The firmware finds the disks in the order of their addresses, but for the one that it is told to begin with.
fn boot_arguments(dir: &Path, disks: &[Attached]) -> Vec<String> {
    let size = disks.first().map_or(0, |disk| disk.spec.size);
    let alike = |disk: &Attached| disk.spec.bus == disks[0].spec.bus && disk.spec.size == size;
    assert!(
        disks.iter().all(alike),
        "the firmware's writer wants disks that are alike"
    );
    let image = firmware_writer::make_boot_disk(dir, disks.len(), size);
    words(&format!(
        "-blockdev driver=raw,node-name=boot,read-only=on,file.driver=file,file.filename={} \
         -device virtio-blk-pci,drive=boot,addr=0x1d,bootindex=0",
        image.display()
    ))
}

fn connect(process: &Process, dir: &Path) -> Monitor {
    Monitor::connect(&dir.join("test.sock"), || alive(process))
}

fn alive(process: &Process) -> Result<(), String> {
    process
        .is_running()
        .then_some(())
        .ok_or_else(|| format!("it ended\n{}", process.log()))
}

/// A running virtual machine. Dropping it kills it and removes its directory.
#[derive(Debug)]
pub struct Qemu {
    process: Process,
    monitor: Arc<Mutex<Monitor>>,
    described: Described,
    // Last: the directory goes after the process.
    dir: TempDir,
}

impl Qemu {
    /// A machine without disks yet.
    #[must_use]
    pub fn builder() -> QemuBuilder {
        QemuBuilder::default()
    }

    /// The QMP socket for the code under test: one client at a time.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.described.qmp_path()
    }

    /// The guest agent's socket. It exists always; an agent answers only in a booted guest.
    #[must_use]
    pub fn agent_path(&self) -> PathBuf {
        self.described.agent_path()
    }

    /// The test's own monitor, on a socket of its own.
    pub fn monitor(&self) -> MutexGuard<'_, Monitor> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command on the test's own monitor; panics with QEMU's error.
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.monitor().execute(command, arguments)
    }

    /// The state in `query-status`: `running`, `paused`, `prelaunch`, …
    #[must_use]
    pub fn status(&self) -> String {
        let status = self.qmp("query-status", json!({}));
        status["status"].as_str().unwrap_or_default().to_owned()
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

    /// The guest's side of a disk, through the monitor: also while a guest runs, though then the guest
    /// does not know of it.
    ///
    /// A write blocks QEMU's main loop until it is done. QEMU 7.2 aborts when a range of a disk in an
    /// iothread is zeroed or discarded this way; filling and writing work there.
    #[must_use]
    pub fn disk(&self, target: &str) -> GuestDisk {
        let disk = self.described.disk(target);
        let stdout = self.process.stdout_path();
        GuestDisk::over_monitor(disk, &self.monitor, stdout, self.dir.path())
    }

    /// Writes `len` bytes of the value `byte` to a disk; short for [`disk`](Self::disk) and `fill`.
    pub fn write(&self, target: &str, offset: u64, len: u64, byte: u8) {
        self.disk(target).fill(offset, len, byte);
    }

    /// The image of a disk.
    #[must_use]
    pub fn image(&self, target: &str) -> &Path {
        &self.described.disk(target).image
    }

    /// The id of a disk's device (`virtio-disk0`, `scsi0-0-0-0`), which is also libvirt's alias.
    #[must_use]
    pub fn alias(&self, target: &str) -> &str {
        &self.described.disk(target).alias
    }

    /// The node the device was started on: the format node, or `top-TARGET` of a wrapped disk.
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

    /// A domain XML as libvirt writes it, with the two sockets in `<metadata>`.
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
    }

    /// SIGKILL. Where it had ended by itself before: its exit status and what it printed.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        self.process.last_words(&self.monitor)
    }

    /// Ends it in an orderly way (QMP `quit`), which saves persistent bitmaps.
    pub fn quit(&self) -> ExitStatus {
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
    pub fn restart(&self) {
        self.process.restart();
        *self.monitor() = connect(&self.process, self.dir.path());
    }

    /// Starts it again with its disks on these images, of the formats that they had at first, ending it first if it runs: what
    /// an overlay is over is what its header names.
    pub fn restart_on(&self, images: &[(&str, &Path)]) {
        let moved = |arg: &OsString| {
            let text = arg.to_string_lossy().into_owned();
            let each = images.iter().map(|(target, image)| (self.image(target), image));
            let moved = each.fold(text, |text, (from, to)| {
                text.replace(&format!("{}\"", from.display()), &format!("{}\"", to.display()))
            });
            OsString::from(moved)
        };
        let args: Vec<OsString> = self.process.args().iter().map(moved).collect();
        self.process.restart_with(&args);
        *self.monitor() = connect(&self.process, self.dir.path());
    }

    /// What QEMU printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What the guest printed on its serial console so far.
    #[must_use]
    pub fn serial(&self) -> String {
        let bytes = fs::read(self.dir.path().join("serial.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until `find` finds what it wants in the serial console's text.
    ///
    /// Panics with the console's last lines when the machine ends or some minutes pass.
    pub fn wait_serial<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            let text = self.serial();
            if let Some(found) = find(&text) {
                return found;
            }
            let tail: Vec<_> = text.lines().rev().take(20).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            alive(&self.process).unwrap_or_else(|why| panic!("no {what}: {why}\n{tail}"));
            assert!(
                !text.contains("GUEST FAILED"),
                "no {what}: the guest says\n{tail}"
            );
            assert!(
                begun.elapsed() < 2 * PATIENCE,
                "no {what} on the serial console:\n{tail}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// How many rounds the guest's own writer has done ([`GuestSetup::writer`]).
    #[must_use]
    pub fn writer_rounds(&self) -> u64 {
        crate::guest::rounds("WRITER", &self.serial())
    }

    /// How many files the guest has written and synced ([`GuestSetup::file_system`]).
    #[must_use]
    pub fn file_rounds(&self) -> u64 {
        crate::guest::rounds("FILES", &self.serial())
    }

    /// Waits until the guest's own writer has done `more` rounds from now on; boots first if need be.
    pub fn wait_writer(&self, more: u64) {
        self.wait_rounds("WRITER", more);
    }

    /// Waits until the guest has written and synced `more` files from now on.
    pub fn wait_files(&self, more: u64) {
        self.wait_rounds("FILES", more);
    }

    fn wait_rounds(&self, name: &str, more: u64) {
        let goal = crate::guest::rounds(name, &self.serial()) + more;
        self.wait_serial(&format!("progress of the guest's {name}"), |text| {
            (crate::guest::rounds(name, text) >= goal).then_some(())
        });
    }

    /// Starts a shell script in the booted guest, by way of its agent, and does not wait for its end.
    pub fn run_in_guest(&self, script: &str) {
        let arguments = json!({"path": "/bin/busybox", "arg": ["sh", "-c", script]});
        self.agent().execute("guest-exec", arguments);
    }

    /// Makes the guest agent hang for so many seconds from now on: it neither answers nor closes its
    /// port, and answers late, when it wakes, what it was sent meanwhile.
    pub fn hang_agent(&self, seconds: u32) {
        // The agent is the script's parent. Its answer to this very command must leave first.
        self.run_in_guest(&format!(
            "usleep 200000; kill -STOP $PPID && echo AGENT HANGS > /dev/console; \
             sleep {seconds}; kill -CONT $PPID"
        ));
        self.wait_serial("hanging agent", |text| text.contains("AGENT HANGS").then_some(()));
    }

    /// Waits until the guest agent answers, and gives a connection to it.
    ///
    /// It occupies the agent's socket: drop it before the code under test connects.
    #[must_use]
    pub fn agent(&self) -> Monitor {
        Monitor::connect_agent(&self.agent_path(), || alive(&self.process))
    }
}
