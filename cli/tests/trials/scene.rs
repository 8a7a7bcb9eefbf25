//! Where trials take place: a domain whose guest writes, what a method needs below its disks, and a state directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use disksnap_test_support::{DiskSpec, GuestSetup, LoopFs, LoopFsKind, MIB, Qemu, QemuBuilder, loop_fs};
use rustix::process::{Pid, setpriority_process};
use serde_json::Value;

use crate::programs::program;
use crate::site::{Ended, Site, arg};

/// The size of each disk, in bytes: large enough for every kind of cluster, and read in a moment.
pub(crate) const SIZE: u64 = 4 * MIB;

/// What a scene is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// A running guest's disks, fleeced.
    Fleece,
    /// The same with a Linux in it, whose agent freezes its file system. It takes its time to boot.
    Quiesced,
    /// A running guest's disks, which go on in overlays.
    External,
    /// The same disks with the domain off.
    ExternalOff,
    /// A running guest's disks on XFS, cloned.
    Reflink,
    /// The same disks with the domain off.
    ReflinkOff,
    /// A running guest's disks in one subvolume.
    Btrfs,
    /// The same disks with the domain off.
    BtrfsOff,
    /// A guest that has not begun to run, into which is restored.
    Paused,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 9] = [
        Self::Quiesced,
        Self::Fleece,
        Self::External,
        Self::ExternalOff,
        Self::Reflink,
        Self::ReflinkOff,
        Self::Btrfs,
        Self::BtrfsOff,
        Self::Paused,
    ];

    /// What people call it: the method, and how the domain is.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fleece => "qemu-fleece",
            Self::Quiesced => "qemu-fleece, quiesced",
            Self::External => "qemu-external-qcow2",
            Self::ExternalOff => "qemu-external-qcow2, off",
            Self::Reflink => "reflink",
            Self::ReflinkOff => "reflink, off",
            Self::Btrfs => "btrfs",
            Self::BtrfsOff => "btrfs, off",
            Self::Paused => "qemu-fleece, paused",
        }
    }

    /// The state that the guest is in; none where it is off.
    pub(crate) fn status(self) -> Option<&'static str> {
        match self {
            Self::ExternalOff | Self::ReflinkOff | Self::BtrfsOff => None,
            Self::Paused => Some("prelaunch"),
            Self::Quiesced | Self::Fleece | Self::External | Self::Reflink | Self::Btrfs => Some("running"),
        }
    }

    /// Whether the guest writes.
    pub(crate) fn writes(self) -> bool {
        self.status() == Some("running")
    }

    /// The method that its disks are snapshotted by.
    pub(crate) fn method(self) -> &'static str {
        match self {
            Self::Fleece | Self::Quiesced | Self::Paused => "qemu-fleece",
            Self::External | Self::ExternalOff => "qemu-external-qcow2",
            Self::Reflink | Self::ReflinkOff => "reflink",
            Self::Btrfs | Self::BtrfsOff => "btrfs",
        }
    }

    /// What [`disksnap_test_support::require::lacking`] is asked for.
    pub(crate) fn needs(self) -> Option<&'static str> {
        match self {
            Self::Quiesced => Some("guest"),
            Self::Reflink | Self::ReflinkOff => Some("xfs"),
            Self::Btrfs | Self::BtrfsOff => Some("btrfs"),
            Self::Fleece | Self::External | Self::ExternalOff | Self::Paused => None,
        }
    }

    fn file_system(self) -> Option<LoopFs> {
        match self {
            Self::Reflink | Self::ReflinkOff => Some(loop_fs(LoopFsKind::Xfs, 400 * MIB, "")),
            Self::Btrfs | Self::BtrfsOff => Some(loop_fs(LoopFsKind::Btrfs, 300 * MIB, "")),
            _ => None,
        }
    }

    fn is_qcow2(self, disk: usize) -> bool {
        match self {
            Self::External | Self::ExternalOff => true,
            // A disk that keeps its bitmaps, and one that does not.
            _ => disk == 0,
        }
    }
}

/// A domain, its guest and its disks `vda` and `vdb`. Dropping it ends the guest and removes all.
pub(crate) struct Scene {
    pub(crate) kind: Kind,
    /// None where the domain is off.
    pub(crate) qemu: Option<Qemu>,
    /// The state directory, which several scenes may share.
    pub(crate) site: Arc<Site>,
    /// The domain's document, as an argument.
    pub(crate) xml: String,
    /// The first 12 digits of the domain's UUID: what the names of its files in `run/` begin with.
    pub(crate) stem: String,
    /// Where its disks' images are, and what their snapshots put beside them.
    pub(crate) folder: PathBuf,
    // The file system goes after whatever lies on it is used no more.
    _fs: Option<LoopFs>,
}

/// Its disks.
pub(crate) const TARGETS: [&str; 2] = ["vda", "vdb"];

impl Scene {
    /// A domain in a state directory; its guest is writing when this comes back.
    pub(crate) fn new(kind: Kind, site: &Arc<Site>) -> Self {
        let fs = kind.file_system();
        let number = std::fs::read_dir(site.dir.path()).unwrap().count();
        let folder = match &fs {
            Some(fs) => fs.path().join("images"),
            None => site.path(&format!("images-{number}")),
        };
        match kind {
            Kind::Btrfs | Kind::BtrfsOff => {
                drop(program("btrfs", &["-q", "subvolume", "create", &arg(&folder)]));
            }
            _ => std::fs::create_dir(&folder).unwrap(),
        }
        let qemu = kind.status().map(|_| machine(kind, &folder));
        let text = match &qemu {
            Some(qemu) => qemu.domain_xml(),
            None => off(kind, &folder, number),
        };
        let stem = stem(&text);
        let xml = site.file(&format!("domain-{stem}.xml"), &text);
        let scene = Self {
            kind,
            qemu,
            site: Arc::clone(site),
            xml,
            stem,
            folder,
            _fs: fs,
        };
        scene.begin();
        scene
    }

    /// In a state directory of its own.
    pub(crate) fn alone(kind: Kind) -> Self {
        Self::new(kind, &Arc::new(Site::new()))
    }

    fn begin(&self) {
        let Some(qemu) = &self.qemu else { return };
        if self.has_agent() {
            qemu.wait_files(1);
        }
        if self.kind.writes() {
            qemu.wait_writer(1);
            gives_way(qemu);
        }
    }

    /// Whether its guest has an agent.
    pub(crate) fn has_agent(&self) -> bool {
        self.kind == Kind::Quiesced
    }

    /// The words of a command on this domain.
    pub(crate) fn words(&self, words: &[&str]) -> Vec<String> {
        let first = ["-d", &self.xml];
        first.iter().chain(words).map(|&word| word.to_owned()).collect()
    }

    /// The command on this domain, not run yet.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let words = self.words(words);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.site.command(&words)
    }

    /// Runs the command on this domain.
    pub(crate) fn run(&self, words: &[&str]) -> Ended {
        crate::site::ended(self.command(words).output().unwrap())
    }

    /// The same, which is expected to do what it should.
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let ended = self.run(words);
        assert_eq!(
            ended.code,
            Some(0),
            "{words:?}: {}",
            self.site.short(&ended.stderr)
        );
        String::from_utf8(ended.stdout).unwrap()
    }

    /// The same with `--output json`.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[words, &["--output", "json"]].concat())).unwrap()
    }

    /// The `--disk` options that name all its disks with its method.
    pub(crate) fn disks(&self) -> Vec<String> {
        let disk = |target: &&str| format!("{target},method={}", self.kind.method());
        let disks = TARGETS.iter().map(disk);
        disks.flat_map(|disk| ["--disk".to_owned(), disk]).collect()
    }

    /// What `snapshot create` is told, for all disks by the scene's method.
    pub(crate) fn create(&self, name: &str, more: &[&str]) -> Vec<String> {
        let first = ["snapshot", "create", "--name", name];
        let words = first.iter().chain(more).map(|&word| word.to_owned());
        words.chain(self.disks()).collect()
    }

    /// Writes to all disks of a domain whose guest does not.
    pub(crate) fn fill(&self, byte: u8) {
        for target in TARGETS {
            match &self.qemu {
                Some(qemu) => qemu.disk(target).fill(64 << 10, MIB, byte),
                None => fill(&named(&self.document(), target), byte),
            }
        }
    }

    /// Where its backups go.
    pub(crate) fn repo(&self) -> String {
        arg(&self.site.path("repo"))
    }

    /// Where something is restored to.
    pub(crate) fn restored(&self) -> PathBuf {
        self.site.path("restored")
    }

    /// The domain's document as it is now.
    pub(crate) fn document(&self) -> String {
        std::fs::read_to_string(&self.xml).unwrap()
    }

    /// What a disk holds now, read past the command. The guest must not write meanwhile.
    pub(crate) fn content(&self, target: &str) -> Vec<u8> {
        let to = tempfile::NamedTempFile::new().unwrap();
        if let Some(qemu) = self.qemu.as_ref().filter(|_| self.kind == Kind::Paused) {
            qemu.disk(target).copy_to(to.path());
            return std::fs::read(to.path()).unwrap();
        }
        let (image, format) = match &self.qemu {
            Some(qemu) => top(qemu, target),
            None => named(&self.document(), target),
        };
        let words = ["convert", "-U", "-f", &format, "-O", "raw", &image];
        program("qemu-img", &[&words[..], &[&arg(to.path())]].concat());
        std::fs::read(to.path()).unwrap()
    }
}

/// Two disks that are alike, as the firmware's writer wants them; a Linux writes to the second one, and to a file system on
/// a third.
fn machine(kind: Kind, folder: &Path) -> Qemu {
    if kind == Kind::Quiesced {
        return Qemu::builder()
            .disk(DiskSpec::new("vda", 64 * MIB))
            .disk(DiskSpec::new("vdb", 8 * MIB))
            .guest(GuestSetup::new().file_system("ext4", "vda").writer(&["vdb"]))
            .start();
    }
    let disk = |(n, target): (usize, &&str)| {
        let (image, format) = image(kind, folder, n, target);
        let spec = DiskSpec::new(target, SIZE).image(&image);
        if format == "qcow2" { spec.qcow2() } else { spec }
    };
    let disks = TARGETS.iter().enumerate().map(disk);
    let builder = disks.fold(Qemu::builder(), QemuBuilder::disk);
    match kind {
        Kind::Paused => builder.prelaunch().start(),
        _ => builder.firmware_writer().start(),
    }
}

/// The guest computes, since it cannot wait otherwise; what is tried comes first.
fn gives_way(qemu: &Qemu) {
    let cpus = qemu.qmp("query-cpus-fast", serde_json::json!({}));
    let threads = cpus
        .as_array()
        .unwrap()
        .iter()
        .map(|cpu| cpu["thread-id"].as_i64().unwrap());
    for thread in threads {
        let thread = Pid::from_raw(i32::try_from(thread).unwrap());
        setpriority_process(thread, 10).unwrap();
    }
}

/// Makes a disk's image, full of zeroes.
fn image(kind: Kind, folder: &Path, n: usize, target: &str) -> (PathBuf, &'static str) {
    let format = if kind.is_qcow2(n) { "qcow2" } else { "raw" };
    let image = folder.join(format!("{target}.{format}"));
    program(
        "qemu-img",
        &["create", "-q", "-f", format, &arg(&image), &SIZE.to_string()],
    );
    (image, format)
}

/// Writes to an image that nobody uses.
fn fill((image, format): &(String, String), byte: u8) {
    let write = format!("write -P {byte} 64k 1M");
    program("qemu-io", &["-f", format, "-c", &write, image]);
}

/// The document of a domain that is off; each has a UUID of its own.
fn off(kind: Kind, folder: &Path, number: usize) -> String {
    let disk = |(n, target): (usize, &&str)| {
        let (image, format) = image(kind, folder, n, target);
        fill(&(arg(&image), format.to_owned()), 0x5a);
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
             <backingStore/><target dev='{target}' bus='virtio'/></disk>",
            image.display()
        )
    };
    let disks: String = TARGETS.iter().enumerate().map(disk).collect();
    format!(
        "<domain type='qemu'><name>off-{number}</name><uuid>6f3c5a4e-{number:04x}-4000-8000-000000000007</uuid>\
         <devices>{disks}</devices></domain>"
    )
}

fn stem(xml: &str) -> String {
    let uuid = between(xml, "<uuid>", "</uuid>").expect("a document has a UUID");
    uuid.replace('-', "")[..12].to_owned()
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.split_once(before)?.1.split_once(after).map(|(part, _)| part)
}

/// The image that a disk stands on, and its format.
fn top(qemu: &Qemu, target: &str) -> (String, String) {
    let blocks = qemu.qmp("query-block", serde_json::json!({}));
    let qdev = |block: &&Value| {
        let qdev = block["qdev"].as_str().unwrap_or_default();
        qdev.split('/').any(|part| part == qemu.alias(target))
    };
    let block = blocks.as_array().unwrap().iter().find(qdev).unwrap();
    let image = &block["inserted"]["image"];
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&image["filename"]), text(&image["format"]))
}

/// The image that a document names for a disk, and its format.
fn named(xml: &str, target: &str) -> (String, String) {
    let its = |disk: &&str| disk.contains(&format!("dev='{target}'"));
    let disk = xml.split("<disk ").find(its).expect("the document has the disk");
    let image = between(disk, " file='", "'").expect("the disk has an image");
    let raw = Path::new(image).extension().is_some_and(|end| end == "raw");
    let format = if raw { "raw" } else { "qcow2" };
    (image.to_owned(), format.to_owned())
}
