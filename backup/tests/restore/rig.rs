//! A repository with a chain of three points of one disk, the contents they must have, and programs to look with.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use disksnap::{Consistency, DomainDocument};
use disksnap_backup::{
    CHUNK, ChainReader, Compression, Digest, DiskEntry, DomainFolder, Event, ImageKeys, ImageSpec,
    ImageWriter, Level, LocalStore, MachineEntry, MachineOptions, Manifest, Piece, Repository, Store,
    Watcher, save_machine,
};
use disksnap_test_support::{pattern, tools};
use tempfile::TempDir;

/// The points, oldest first.
pub(crate) const POINTS: [&str; 3] = ["20261122T020000Z", "20261122T030000Z", "20261122T040000Z"];
/// The disk's size: no multiple of a chunk.
pub(crate) const SIZE: usize = (6 << 20) + 70 * 512;

/// A repository with three points of a disk.
pub(crate) struct Saved {
    pub(crate) repository: Repository,
    pub(crate) folder: DomainFolder,
    pub(crate) points: Vec<Manifest>,
    /// What the disk held at each point.
    pub(crate) contents: Vec<Vec<u8>>,
    pub(crate) dir: TempDir,
}

impl Saved {
    /// A full image and two increments over it.
    pub(crate) async fn new() -> Self {
        Self::of(&document("")).await
    }

    /// The same of a domain with this document.
    pub(crate) async fn of(document: &DomainDocument) -> Self {
        Self::sized(document, SIZE).await
    }

    pub(crate) async fn sized(document: &DomainDocument, size: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("repository");
        std::fs::create_dir(&root).unwrap();
        let store: Arc<dyn Store> = Arc::new(LocalStore::at(&root));
        let repository = Repository::open_or_init(store).await.unwrap();
        let folder = repository.folder_or_new(&document.domain().id).await.unwrap();
        let mut saved = Self {
            repository,
            folder,
            points: Vec::new(),
            contents: Vec::new(),
            dir,
        };
        for n in 0..POINTS.len() {
            saved.add(n, document, size).await;
        }
        saved
    }

    async fn add(&mut self, n: usize, document: &DomainDocument, size: usize) {
        let mut content = self.contents.last().cloned().unwrap_or_else(|| vec![0; size]);
        let mut changed = vec![n == 0; chunks(&content)];
        change(&mut content, &mut changed, n as u64);
        let store = Arc::clone(self.repository.store());
        let prefix = self.repository.folder_of(&self.folder, POINTS[n]);
        let machine = machine_of(&*store, &prefix, document).await;
        let keys = ImageKeys {
            image: format!("{prefix}/vda.qcow2"),
            chunks: format!("{prefix}/vda.chunks"),
        };
        let compression = if n == 1 {
            Compression::Zstd(3)
        } else {
            Compression::None
        };
        let spec = ImageSpec {
            size: size as u64,
            backing: (n > 0).then(|| format!("../{}/vda.qcow2", POINTS[n - 1])),
            compression,
        };
        let mut writer = ImageWriter::create(store, keys, spec).await.unwrap();
        for (at, changed) in changed.iter().enumerate() {
            if *changed {
                writer.write(piece(&content, at)).await.unwrap();
            }
        }
        let summary = writer.finish().await.unwrap();
        let disk = DiskEntry {
            target: "vda".to_owned(),
            size: size as u64,
            method: "qemu-fleece".to_owned(),
            level: if n == 0 { Level::Full } else { Level::Incremental },
            why_full: None,
            excess: None,
            parent: (n > 0).then(|| POINTS[n - 1].to_owned()),
            image: "vda.qcow2".to_owned(),
            image_bytes: summary.image_bytes,
            compression,
            data: summary.data,
            zero: summary.zero,
            chunks: "vda.chunks".to_owned(),
            chunks_digest: summary.chunks_digest,
            content: content_digest(&content),
            tracked: true,
        };
        let manifest = Manifest {
            repository: self.repository.id(),
            point: POINTS[n].to_owned(),
            domain: document.domain().id.clone(),
            created: SystemTime::now(),
            consistency: Consistency::Crash,
            snapshot: "backup".parse().unwrap(),
            checkpoint: None,
            disks: vec![disk],
            machine,
            warnings: Vec::new(),
            tool: "a test".to_owned(),
        };
        self.repository.publish(&self.folder, &manifest).await.unwrap();
        self.points.push(manifest);
        self.contents.push(content);
    }

    /// The disk at the n-th point, to be read, and what the manifest says of it.
    pub(crate) async fn chain(&self, n: usize) -> (ChainReader, &DiskEntry) {
        let point = &self.points[n];
        let layers = self.repository.chain(&self.folder, point, "vda").await.unwrap();
        let store = Arc::clone(self.repository.store());
        let reader = ChainReader::open(store, &layers).await.unwrap();
        (reader, &point.disks[0])
    }

    /// A file of the repository.
    pub(crate) fn file(&self, n: usize, name: &str) -> PathBuf {
        let key = self.repository.key(&self.folder, POINTS[n], name);
        self.repository.store().file(&key).unwrap()
    }

    /// A path in the test's own directory, where nothing is yet.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Flips a bit in the data of the full image.
    pub(crate) fn damage(&self) {
        let path = self.file(0, "vda.qcow2");
        let mut image = std::fs::read(&path).unwrap();
        let needle = &self.contents[0][..4096];
        let at = image.windows(4096).position(|window| window == needle).unwrap();
        image[at + 100] ^= 4;
        std::fs::write(&path, image).unwrap();
    }
}

async fn machine_of(store: &dyn Store, prefix: &str, document: &DomainDocument) -> MachineEntry {
    let options = MachineOptions::default();
    let saved = save_machine(store, prefix, document, &options, &mut Vec::new()).await;
    saved.unwrap()
}

fn chunks(content: &[u8]) -> usize {
    content.len().div_ceil(usize::try_from(CHUNK).unwrap())
}

fn range(content: &[u8], n: usize) -> std::ops::Range<usize> {
    let chunk = usize::try_from(CHUNK).unwrap();
    n * chunk..content.len().min((n + 1) * chunk)
}

fn piece(content: &[u8], n: usize) -> Piece {
    let range = range(content, n);
    let data = content[range.clone()].to_vec();
    Piece::Data {
        offset: range.start as u64,
        data,
    }
}

/// Writes and zeroes chunks: data stays, data becomes zero, zero becomes data; the first and last are data at first.
fn change(content: &mut [u8], changed: &mut [bool], seed: u64) {
    let mut random = pattern::Random::new(seed);
    let count = chunks(content);
    for (n, changed) in changed.iter_mut().enumerate() {
        let edge = seed == 0 && (n == 0 || n + 1 == count);
        let kind = if edge { 0 } else { random.below(4) };
        let range = range(content, n);
        match kind {
            0 => content[range.clone()].copy_from_slice(&pattern::bytes(random.next_u64(), range.len())),
            1 if n > 0 => content[range].fill(0),
            // A little at the end: most of the chunk is zero.
            2 if seed == 0 => content[range.end - 1] = 7,
            _ => continue,
        }
        *changed = true;
    }
}

/// BLAKE3 over the digests of all chunks, as the format's description says it.
pub(crate) fn content_digest(content: &[u8]) -> Digest {
    let chunk = usize::try_from(CHUNK).unwrap();
    let digests: Vec<u8> = content
        .chunks(chunk)
        .flat_map(|chunk| Digest::of(chunk).0)
        .collect();
    Digest::of(&digests)
}

/// A domain with the disk vda, and these devices and `<os>` beside.
pub(crate) fn document(more: &str) -> DomainDocument {
    DomainDocument::parse(format!(
        "<domain type='kvm'>\n  <name>web 1</name>\n  <uuid>5768a388-c1c4-414c-ac4e-eab216ba7c0c</uuid>\n  <devices>\n    \
         <disk type='block' device='disk'>\n      <driver name='qemu' type='raw'/>\n      <source dev='/dev/vg0/web'/>\n      \
         <target dev='vda' bus='virtio'/>\n    </disk>\n  </devices>\n{more}</domain>\n"
    ))
    .unwrap()
}

/// Runs a program of the tools, which must succeed; what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(tools::program(program))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

/// Whether QEMU reads exactly this from an image.
pub(crate) fn reads_as(image: &Path, format: &str, content: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    run(
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", text(image), text(&raw)],
    );
    assert!(
        std::fs::read(&raw).unwrap() == content,
        "{} reads otherwise",
        image.display()
    );
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The names in a directory.
pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Asks to stop when this much of a disk is done.
#[derive(Debug)]
pub(crate) struct StopAfter(pub(crate) u64, pub(crate) AtomicU64);

impl Watcher for StopAfter {
    fn event(&self, event: &Event<'_>) {
        if let Event::Done { done, .. } = event {
            self.1.store(*done, Ordering::SeqCst);
        }
    }

    fn stop(&self) -> bool {
        self.1.load(Ordering::SeqCst) >= self.0
    }
}

/// A qemu-nbd, killed with the value.
pub(crate) struct QemuNbd {
    child: Child,
    pub(crate) uri: String,
    _dir: TempDir,
}

impl QemuNbd {
    /// Serves an image; `arguments` come before it.
    pub(crate) fn start(arguments: &[&str], image: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("dsnap-").tempdir().unwrap();
        let (socket, pid) = (dir.path().join("s"), dir.path().join("pid"));
        let child = Command::new(tools::program("qemu-nbd"))
            .args(["--persistent", "--shared=8", "--socket", text(&socket)])
            .args(["--pid-file", text(&pid)])
            .args(arguments)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            uri: format!("nbd+unix:///?socket={}", socket.display()),
            _dir: dir,
        };
        let begun = Instant::now();
        while !pid.exists() {
            assert!(server.child.try_wait().unwrap().is_none(), "qemu-nbd ended");
            assert!(
                begun.elapsed() < Duration::from_mins(2),
                "qemu-nbd does not serve"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it so that all is in the image.
    pub(crate) fn quit(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        self.kill();
    }
}
