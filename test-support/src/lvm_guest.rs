//! The guest that has LVM: a small machine without KVM, in which a test runs programs, its own among them.
//!
//! Not every kernel has device-mapper, and not everyone is root; this guest has both everywhere. It starts in
//! seconds, so a test program runs many of its tests in one.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::guest::{KERNEL_ARGUMENTS, file};
use crate::process::{PATIENCE, Process};

/// How long one program in the guest may be silent; far more than it needs.
const SILENCE: Duration = Duration::from_mins(15);

/// The processor's own counter is measured at boot, and wrongly when others want the host's processors at that moment: the
/// guest's clock then runs several times too fast, and deadlines in it pass.
const CLOCK: &str = "tsc=unstable clocksource=hpet nolapic_timer";

/// Its sockets in its directory: for the test's messages, and the monitor.
const PORT: &str = "port.sock";
pub(crate) const MONITOR: &str = "qmp.sock";

/// How much of a file goes in one message: the guest's memory holds it whole.
const PIECE: usize = 1 << 20;

/// What a program in the guest has left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestOutput {
    /// The exit status; 128 and the signal's number where one ended it, 127 where it did not start.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct LvmGuest {
    pub(crate) process: Process,
    port: UnixStream,
    pub(crate) initrds: Vec<&'static str>,
    pub(crate) disks: usize,
    // Last: the directory goes after the process.
    pub(crate) dir: TempDir,
}

impl LvmGuest {
    /// Boots one with an empty disk of each of these sizes in bytes: `/dev/vda`, `/dev/vdb`, …
    #[must_use]
    pub fn start(disks: &[u64]) -> Self {
        Self::start_of(&["lvm-initrd.img"], disks)
    }

    /// [`start`](Self::start), with a `qemu-system-x86_64` of 10.0 in it. A machine that the guest runs so is emulated
    /// twice: one of [`QemuBuilder::firmware_writer`](crate::QemuBuilder::firmware_writer) writes after some seconds, a Linux
    /// after minutes.
    #[must_use]
    pub fn start_with_qemu(disks: &[u64]) -> Self {
        Self::start_of(&["lvm-initrd.img", "machine-initrd.img"], disks)
    }

    fn start_of(initrds: &[&'static str], disks: &[u64]) -> Self {
        let dir = crate::temp_dir();
        for (n, size) in disks.iter().enumerate() {
            let made = File::create(disk(dir.path(), n)).and_then(|made| made.set_len(*size));
            made.expect("a disk's image can be made");
        }
        let mut guest = Self::launch(dir, initrds, disks.len(), &[]);
        let (letter, _) = guest.receive();
        assert_eq!(letter, b'H', "the guest begins with another word");
        guest
    }

    /// Starts the machine on the disks that are in the directory.
    pub(crate) fn launch(dir: TempDir, initrds: &[&'static str], disks: usize, more: &[&str]) -> Self {
        let initrd = initrd(dir.path(), initrds);
        let mut args = arguments(dir.path(), &initrd, disks);
        args.extend(more.iter().map(Into::into));
        let program = crate::tools::program("qemu-system-x86_64");
        let process = Process::start("lvm-guest", program, args, dir.path());
        let port = connect(&process, &dir.path().join(PORT));
        Self {
            process,
            port,
            initrds: initrds.to_vec(),
            disks,
            dir,
        }
    }

    /// Puts a file of the host into the guest, to be run there, and returns its path there.
    ///
    /// A program finds there the C library and what else the guest's own programs need.
    #[must_use]
    pub fn put(&mut self, path: &Path) -> String {
        let name = path.file_name().expect("a file has a name").to_string_lossy();
        let place = format!("/tmp/{name}");
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for piece in std::iter::once(&[][..]).chain(bytes.chunks(PIECE)) {
            let mut body = place.clone().into_bytes();
            body.push(0);
            body.extend(piece);
            let put = self.call(b'F', &body);
            assert_eq!(put.status, 0, "{place}: {}", put.stderr);
        }
        place
    }

    /// Runs a program in the guest and waits until it, and whatever it left running with its output, has ended.
    #[must_use]
    pub fn run<S: AsRef<OsStr>>(&mut self, program_and_arguments: &[S]) -> GuestOutput {
        self.run_with(&[], program_and_arguments)
    }

    /// As [`run`](Self::run), with these in its environment.
    #[must_use]
    pub fn run_with<S: AsRef<OsStr>>(
        &mut self,
        variables: &[(&str, &str)],
        program_and_arguments: &[S],
    ) -> GuestOutput {
        let mut body = Vec::new();
        for (name, value) in variables {
            body.extend(format!("{name}={value}\0").bytes());
        }
        body.push(0);
        for word in program_and_arguments {
            body.extend(word.as_ref().as_encoded_bytes());
            body.push(0);
        }
        self.call(b'R', &body)
    }

    /// What the guest printed on its serial console so far.
    #[must_use]
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(self.dir.path().join("serial.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn call(&mut self, letter: u8, body: &[u8]) -> GuestOutput {
        let length = u32::try_from(body.len()).expect("a message is short");
        let mut message = vec![letter];
        message.extend(length.to_le_bytes());
        message.extend(body);
        let sent = self.port.write_all(&message);
        sent.unwrap_or_else(|error| panic!("the guest does not listen: {error}\n{}", self.state()));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.receive() {
                (b'O', piece) => out.extend(piece),
                (b'E', piece) => err.extend(piece),
                (b'X', status) => {
                    let status = status.try_into().expect("a status has four bytes");
                    return GuestOutput {
                        status: i32::from_le_bytes(status),
                        stdout: String::from_utf8_lossy(&out).into_owned(),
                        stderr: String::from_utf8_lossy(&err).into_owned(),
                    };
                }
                (other, _) => panic!("the guest says {other}\n{}", self.state()),
            }
        }
    }

    fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.read(&mut head);
        let [letter, length @ ..] = head;
        let mut body = vec![0; usize::try_from(u32::from_le_bytes(length)).expect("a usize has 32 bits")];
        self.read(&mut body);
        (letter, body)
    }

    fn read(&mut self, bytes: &mut [u8]) {
        let read = self.port.read_exact(bytes);
        read.unwrap_or_else(|error| panic!("the guest is silent: {error}\n{}", self.state()));
    }

    fn state(&self) -> String {
        format!("{}\n{}", self.process.log(), self.serial())
    }
}

/// One initrd: the kernel unpacks archives that follow each other, and QEMU takes one file.
fn initrd(dir: &Path, names: &[&str]) -> String {
    if let [one] = names {
        return file(one);
    }
    let path = dir.join("initrd.img");
    let mut joined = File::create(&path).expect("a file can be made in a temporary directory");
    for name in names {
        let copied = File::open(file(name)).and_then(|mut part| std::io::copy(&mut part, &mut joined));
        copied.unwrap_or_else(|error| panic!("cannot append {name}: {error}"));
    }
    path.to_string_lossy().into_owned()
}

/// Where the image of a disk is.
pub(crate) fn disk(dir: &Path, n: usize) -> PathBuf {
    dir.join(format!("disk{n}"))
}

fn arguments(dir: &Path, initrd: &str, disks: usize) -> Vec<OsString> {
    let kernel = file("vmlinux");
    let serial = format!("file:{}", dir.join("serial.log").display());
    let socket = |id: &str, name| format!("{id}{},server=on,wait=off", dir.join(name).display());
    let port = socket("socket,id=port,path=", PORT);
    let monitor = socket("unix:", MONITOR);
    // One processor: under emulation a second only costs. Without rdrand the first `pvcreate` waits for entropy.
    let line = format!("{KERNEL_ARGUMENTS} {CLOCK}");
    let fixed = "-nodefaults -no-user-config -display none -no-reboot -machine q35,usb=off,graphics=off \
                 -accel tcg -cpu qemu64,+rdrand,+rdseed -smp 1 -m 768 -device virtio-serial-pci \
                 -device virtserialport,chardev=port,name=disksnap.test";
    let mut args: Vec<OsString> = fixed.split_whitespace().map(Into::into).collect();
    let told = [
        ["-kernel", &kernel],
        ["-initrd", initrd],
        ["-append", &line],
        ["-serial", &serial],
        ["-chardev", &port],
        ["-qmp", &monitor],
    ];
    args.extend(told.iter().flatten().map(Into::into));
    for n in 0..disks {
        let image = disk(dir, n);
        let node = format!(
            "node-name=disk{n},driver=raw,discard=unmap,file.driver=file,file.filename={},file.cache.no-flush=on",
            image.display()
        );
        let device = format!("virtio-blk-pci,drive=disk{n},serial=disk{n}");
        args.extend(["-blockdev", &node, "-device", &device].map(Into::into));
    }
    args
}

fn connect(process: &Process, socket: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                let limited = stream.set_read_timeout(Some(SILENCE));
                limited.expect("a socket takes a time-out");
                return stream;
            }
            Err(error) => {
                assert!(process.is_running(), "the guest ended\n{}", process.log());
                assert!(
                    begun.elapsed() < PATIENCE,
                    "no socket {}: {error}",
                    socket.display()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
