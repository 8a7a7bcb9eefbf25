//! What disk a test wants, and the guest's side of it: writing, zeroing, discarding, reading.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::json;

use crate::process::run;
use crate::qmp::Monitor;
use crate::tools::QemuVersion;

/// An image's format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// Raw.
    #[default]
    Raw,
    /// qcow2.
    Qcow2,
}

impl Format {
    /// The name QEMU and libvirt give it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What a disk hangs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Bus {
    /// virtio-blk; target names `vda`, `vdb`, …
    #[default]
    VirtioBlk,
    /// virtio-scsi with `scsi-hd`; target names `sda`, `sdb`, …
    VirtioScsi,
}

/// A disk to start a machine with.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    pub(crate) target: String,
    pub(crate) size: u64,
    pub(crate) format: Format,
    pub(crate) bus: Bus,
    pub(crate) iothread: bool,
    pub(crate) wrapped: bool,
    pub(crate) read_only: bool,
    pub(crate) cluster_size: Option<u64>,
    pub(crate) l2_cache_size: Option<u64>,
    pub(crate) image: Option<PathBuf>,
    pub(crate) nodes: Option<(String, String)>,
}

impl DiskSpec {
    /// An empty raw virtio-blk disk. `target` is the name in the domain XML, `size` is in bytes.
    #[must_use]
    pub fn new(target: &str, size: u64) -> Self {
        Self {
            target: target.to_owned(),
            size,
            format: Format::Raw,
            bus: if target.starts_with("sd") {
                Bus::VirtioScsi
            } else {
                Bus::VirtioBlk
            },
            iothread: false,
            wrapped: false,
            read_only: false,
            cluster_size: None,
            l2_cache_size: None,
            image: None,
            nodes: None,
        }
    }

    /// The name in the domain XML.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Makes the image qcow2.
    #[must_use]
    pub fn qcow2(mut self) -> Self {
        self.format = Format::Qcow2;
        self
    }

    /// Makes the image qcow2 with clusters of that many bytes.
    #[must_use]
    pub fn cluster_size(mut self, bytes: u64) -> Self {
        self.cluster_size = Some(bytes);
        self.qcow2()
    }

    /// Makes the image qcow2, of whose tables QEMU keeps so many bytes in memory: with few, nearly every write of the
    /// guest writes them.
    #[must_use]
    pub fn l2_cache_size(mut self, bytes: u64) -> Self {
        self.l2_cache_size = Some(bytes);
        self.qcow2()
    }

    /// Hangs it on virtio-scsi.
    #[must_use]
    pub fn scsi(mut self) -> Self {
        self.bus = Bus::VirtioScsi;
        self
    }

    /// Serves it (or its SCSI controller) in an iothread.
    #[must_use]
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }

    /// Puts a permanent `raw` node `top-TARGET` between the device and the format node.
    #[must_use]
    pub fn wrapped(mut self) -> Self {
        self.wrapped = true;
        self
    }

    /// Attaches it read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Uses an existing image, or a block device, instead of making one; `size` is not looked at then.
    #[must_use]
    pub fn image(mut self, path: &Path) -> Self {
        self.image = Some(path.to_path_buf());
        self
    }

    /// Names the protocol and the format node; libvirt's names otherwise.
    #[must_use]
    pub fn node_names(mut self, storage: &str, format: &str) -> Self {
        self.nodes = Some((storage.to_owned(), format.to_owned()));
        self
    }
}

/// A disk of a started machine: its spec with every name filled in.
#[derive(Clone, Debug)]
pub(crate) struct Attached {
    pub(crate) spec: DiskSpec,
    /// Position among the machine's disks.
    pub(crate) index: usize,
    pub(crate) image: PathBuf,
    pub(crate) storage_node: String,
    pub(crate) format_node: String,
    /// The device's id, which is libvirt's alias.
    pub(crate) alias: String,
}

impl Attached {
    /// Fills in the names and makes the image.
    pub(crate) fn new(spec: DiskSpec, index: usize, dir: &Path, version: QemuVersion) -> Self {
        let image = match &spec.image {
            Some(path) => path.clone(),
            None => create_image(&spec, dir, version),
        };
        let number = index + 1;
        let (storage_node, format_node) = spec.nodes.clone().unwrap_or_else(|| {
            (
                format!("libvirt-{number}-storage"),
                format!("libvirt-{number}-format"),
            )
        });
        let alias = match spec.bus {
            Bus::VirtioBlk => format!("virtio-disk{index}"),
            Bus::VirtioScsi => format!("scsi0-0-{index}-0"),
        };
        Self {
            spec,
            index,
            image,
            storage_node,
            format_node,
            alias,
        }
    }

    /// The node the device or export sits on.
    pub(crate) fn top_node(&self) -> String {
        if self.spec.wrapped {
            format!("top-{}", self.spec.target)
        } else {
            self.format_node.clone()
        }
    }

    /// The PCI slot of a virtio-blk disk: eight to a slot, so that a bus holds more than 200.
    pub(crate) fn pci_slot(&self) -> usize {
        4 + self.index / 8
    }

    /// The PCI function of a virtio-blk disk in its slot.
    pub(crate) fn pci_function(&self) -> usize {
        self.index % 8
    }

    /// The serial number the guest sees.
    pub(crate) fn serial(&self) -> String {
        format!("serial-{}", self.spec.target)
    }

    /// Whether its image is a block device.
    pub(crate) fn is_device(&self) -> bool {
        let found = self.image.metadata();
        found.is_ok_and(|found| found.file_type().is_block_device())
    }

    /// What `-blockdev` takes, bottom to top.
    pub(crate) fn blockdevs(&self) -> Vec<String> {
        let read_only = self.spec.read_only;
        let driver = if self.is_device() { "host_device" } else { "file" };
        let file = json!({"driver": driver, "node-name": self.storage_node, "filename": self.image,
            "read-only": read_only, "discard": "unmap", "auto-read-only": false});
        let mut format = json!({"driver": self.spec.format.as_str(), "node-name": self.format_node,
            "file": self.storage_node, "read-only": read_only, "discard": "unmap"});
        if let Some(bytes) = self.spec.l2_cache_size {
            // Two entries are the least.
            format["l2-cache-size"] = bytes.into();
            format["l2-cache-entry-size"] = 512.into();
        }
        let mut nodes = vec![file, format];
        if self.spec.wrapped {
            nodes.push(json!({"driver": "raw", "node-name": self.top_node(),
                "file": self.format_node, "read-only": read_only, "discard": "unmap"}));
        }
        nodes.iter().map(ToString::to_string).collect()
    }
}

fn create_image(spec: &DiskSpec, dir: &Path, version: QemuVersion) -> PathBuf {
    let path = dir.join(format!("{}.{}", spec.target, spec.format.as_str()));
    if spec.format == Format::Raw {
        let file = File::create(&path).and_then(|file| file.set_len(spec.size));
        file.unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        return path;
    }
    let cluster = spec.cluster_size.unwrap_or(65536);
    let options = format!("cluster_size={cluster}");
    let (name, size) = (path.to_string_lossy(), spec.size.to_string());
    let args = ["create", "-q", "-f", "qcow2", "-o", &options, &name, &size];
    run(&version.program("qemu-img"), &args);
    path
}

/// The guest's side of one disk. Clones are handles of the same disk, usable from any thread.
///
/// Offsets and lengths are bytes. Every method panics when the machine answers with an error: the
/// guest's writes must never fail. The `try_` variants return it instead.
#[derive(Clone, Debug)]
pub struct GuestDisk {
    target: String,
    image: PathBuf,
    format: Format,
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    /// A storage daemon's FUSE export of the top node.
    Fuse(Arc<File>),
    /// The monitor's `qemu-io` on the device.
    QemuIo(Arc<Mutex<Monitor>>, QemuIo),
}

#[derive(Clone, Debug)]
struct QemuIo {
    qdev: String,
    /// `qemu-io` prints to QEMU's standard output, not to the monitor.
    stdout: PathBuf,
    scratch: PathBuf,
}

impl GuestDisk {
    pub(crate) fn over_fuse(disk: &Attached, file: Arc<File>) -> Self {
        Self::new(disk, Way::Fuse(file))
    }

    pub(crate) fn over_monitor(
        disk: &Attached,
        monitor: &Arc<Mutex<Monitor>>,
        stdout: PathBuf,
        dir: &Path,
    ) -> Self {
        let qdev = match disk.spec.bus {
            // The block backend belongs to the virtio device inside the PCI one.
            Bus::VirtioBlk => format!("/machine/peripheral/{}/virtio-backend", disk.alias),
            Bus::VirtioScsi => disk.alias.clone(),
        };
        let scratch = dir.join("qemu-io.bytes");
        Self::new(
            disk,
            Way::QemuIo(
                Arc::clone(monitor),
                QemuIo {
                    qdev,
                    stdout,
                    scratch,
                },
            ),
        )
    }

    fn new(disk: &Attached, way: Way) -> Self {
        let (target, image) = (disk.spec.target.clone(), disk.image.clone());
        Self {
            target,
            image,
            format: disk.spec.format,
            way,
        }
    }

    /// The name in the domain XML.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The image file on the host.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Writes `len` bytes of the value `byte`.
    pub fn fill(&self, offset: u64, len: u64, byte: u8) {
        self.try_fill(offset, len, byte)
            .unwrap_or_else(|error| self.fail("fill", offset, &error));
    }

    /// [`fill`](Self::fill), with the guest's error returned.
    pub fn try_fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), String> {
        match &self.way {
            Way::Fuse(file) => {
                let piece = vec![byte; usize::try_from(len.min(1 << 20)).unwrap_or(1 << 20)];
                let mut done = 0;
                while done < len {
                    let now = (len - done).min(piece.len() as u64);
                    let part = &piece[..usize::try_from(now).unwrap_or(piece.len())];
                    file.write_all_at(part, offset + done)
                        .map_err(|x| x.to_string())?;
                    done += now;
                }
                Ok(())
            }
            Way::QemuIo(monitor, io) => io
                .run(monitor, &format!("write -P {byte} {offset} {len}"), "wrote")
                .map(drop),
        }
    }

    /// Writes these bytes.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.try_write(offset, data)
            .unwrap_or_else(|error| self.fail("write", offset, &error));
    }

    /// [`write`](Self::write), with the guest's error returned.
    pub fn try_write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        match &self.way {
            Way::Fuse(file) => file.write_all_at(data, offset).map_err(|x| x.to_string()),
            Way::QemuIo(monitor, io) => io.write_bytes(monitor, offset, data),
        }
    }

    /// Makes a range zero without sending zeroes (the guest's WRITE ZEROES, no unmap).
    pub fn zero(&self, offset: u64, len: u64) {
        self.try_zero(offset, len)
            .unwrap_or_else(|error| self.fail("zero", offset, &error));
    }

    /// [`zero`](Self::zero), with the guest's error returned.
    pub fn try_zero(&self, offset: u64, len: u64) -> Result<(), String> {
        match &self.way {
            Way::Fuse(file) => {
                fallocate(file, FallocateFlags::ZERO_RANGE, offset, len).map_err(|x| x.to_string())
            }
            Way::QemuIo(monitor, io) => io
                .run(monitor, &format!("write -z {offset} {len}"), "wrote")
                .map(drop),
        }
    }

    /// Discards a range; it reads as zeroes afterwards on the formats used here.
    pub fn discard(&self, offset: u64, len: u64) {
        self.try_discard(offset, len)
            .unwrap_or_else(|error| self.fail("discard", offset, &error));
    }

    /// [`discard`](Self::discard), with the guest's error returned.
    pub fn try_discard(&self, offset: u64, len: u64) -> Result<(), String> {
        match &self.way {
            Way::Fuse(file) => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, offset, len).map_err(|x| x.to_string())
            }
            Way::QemuIo(monitor, io) => io
                .run(monitor, &format!("discard {offset} {len}"), "discard")
                .map(drop),
        }
    }

    /// Reads what the guest sees. Over the monitor this is slow beyond some MiB.
    #[must_use]
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let result = match &self.way {
            Way::Fuse(file) => {
                let mut data = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
                file.read_exact_at(&mut data, offset)
                    .map(|()| data)
                    .map_err(|x| x.to_string())
            }
            Way::QemuIo(monitor, io) => {
                let command = format!("read -v {offset} {len}");
                io.run(monitor, &command, "read").map(|text| parse_dump(&text))
            }
        };
        result.unwrap_or_else(|error| self.fail("read", offset, &error))
    }

    /// Flushes what was written.
    pub fn flush(&self) {
        let result = match &self.way {
            Way::Fuse(file) => file.sync_all().map_err(|x| x.to_string()),
            Way::QemuIo(monitor, io) => io.run(monitor, "flush", "").map(drop),
        };
        result.unwrap_or_else(|error| self.fail("flush", 0, &error));
    }

    /// Flushes, then copies the whole disk as raw data to `path`, with `qemu-img` and no lock.
    ///
    /// The copy is one instant only while nothing writes.
    pub fn copy_to(&self, path: &Path) {
        self.flush();
        let (from, to) = (self.image.to_string_lossy(), path.to_string_lossy());
        let args = [
            "convert",
            "-U",
            "-f",
            self.format.as_str(),
            "-O",
            "raw",
            &from,
            &to,
        ];
        run(&crate::tools::program("qemu-img"), &args);
    }

    /// Flushes, then gives the sha256 of the whole disk's contents; see [`copy_to`](Self::copy_to).
    #[must_use]
    pub fn digest(&self) -> String {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let path = dir.path().join("copy");
        self.copy_to(&path);
        crate::pattern::digest_file(&path)
    }

    fn fail(&self, what: &str, offset: u64, error: &str) -> ! {
        panic!("{what} of {} at {offset} failed: {error}", self.target)
    }
}

impl QemuIo {
    /// Runs one `qemu-io` command and returns what QEMU printed for it. `done` is the verb QEMU
    /// reports success with; a command that reports none prints nothing at all.
    fn run(&self, monitor: &Mutex<Monitor>, command: &str, done: &str) -> Result<String, String> {
        // The lock also keeps two commands' outputs apart.
        let mut monitor = monitor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.run_locked(&mut monitor, command, done)
    }

    fn run_locked(&self, monitor: &mut Monitor, command: &str, done: &str) -> Result<String, String> {
        let before = std::fs::metadata(&self.stdout).map_or(0, |x| x.len());
        let line = format!("qemu-io -d {} \"{command}\"", self.qdev);
        let answer = monitor
            .try_execute("human-monitor-command", &json!({"command-line": line}))
            .map_err(|error| format!("{command}: the monitor does not answer: {error}"))?
            .map_err(|error| format!("{command}: {error}"))?;
        let printed = read_from(&self.stdout, before);
        let said = answer.as_str().unwrap_or_default().trim();
        let succeeded = if done.is_empty() {
            printed.is_empty()
        } else {
            printed
                .lines()
                .any(|x| x.starts_with(done) && x.contains(" bytes at offset "))
        };
        if !said.is_empty() || !succeeded {
            return Err(format!("{command}: {said}{}", printed.trim()));
        }
        Ok(printed)
    }

    fn write_bytes(&self, monitor: &Mutex<Monitor>, at: u64, data: &[u8]) -> Result<(), String> {
        let mut monitor = monitor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::fs::write(&self.scratch, data).map_err(|x| x.to_string())?;
        let (path, len) = (self.scratch.display(), data.len());
        self.run_locked(&mut monitor, &format!("write -s {path} {at} {len}"), "wrote")
            .map(drop)
    }
}

fn read_from(path: &Path, offset: u64) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let mut text = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(offset))?;
        file.read_to_end(&mut text)
    });
    read.unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    String::from_utf8_lossy(&text).into_owned()
}

/// The bytes in the dump of `qemu-io`'s `read -v`: an offset, up to sixteen bytes, then the same as text.
fn parse_dump(text: &str) -> Vec<u8> {
    let row = |line: &str| -> Option<Vec<u8>> {
        let (offset, rest) = line.split_once(":  ")?;
        u64::from_str_radix(offset, 16).ok()?;
        let cells = rest.split("  ").next()?.split_ascii_whitespace();
        cells.map(|cell| u8::from_str_radix(cell, 16).ok()).collect()
    };
    text.lines().filter_map(row).flatten().collect()
}
