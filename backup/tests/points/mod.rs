//! Repositories with points of random disks, each with what it must read as; and a store that dies.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use disksnap::{Consistency, DomainId};
use disksnap_backup::{
    Blob, BlobWriter, CHUNK, ChainReader, Compression, Digest, DiskEntry, DomainFolder, Error, ErrorKind,
    FileEntry, ImageKeys, ImageSpec, ImageWriter, Layer, Level, LocalStore, MachineEntry, Manifest, Piece,
    Repository, Result, Silent, Store, StoreLock, VerifyOptions, content_digest, verify,
};
use disksnap_test_support::pattern::{self, Random};
use disksnap_test_support::tools;
use tempfile::TempDir;

/// 2026-11-22T02:15:00Z
pub(crate) const FIRST_NIGHT: u64 = 1_795_313_700;

/// What a point's disks must read as, by target.
pub(crate) type Disks = BTreeMap<String, Vec<u8>>;

/// A repository and what is in it.
pub(crate) struct Life {
    pub(crate) dir: TempDir,
    pub(crate) repository: Repository,
    pub(crate) folder: DomainFolder,
    pub(crate) points: BTreeMap<String, Disks>,
    random: Random,
    nights: u64,
}

/// The domain of all these tests.
pub(crate) fn domain() -> DomainId {
    DomainId::new(
        "web 1",
        Some("7c3f9d52-0b4e-4b8a-9a52-0d6c8d3b1f11".parse().unwrap()),
    )
}

impl Life {
    /// An empty one.
    pub(crate) async fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::at(dir.path()));
        let repository = Repository::open_or_init(store).await.unwrap();
        let folder = repository.folder_or_new(&domain()).await.unwrap();
        Self {
            dir,
            repository,
            folder,
            points: BTreeMap::new(),
            random: Random::new(seed),
            nights: 0,
        }
    }

    /// One of a chain of `increments` over a full image, of one disk.
    pub(crate) async fn chain(seed: u64, increments: usize) -> Self {
        let mut life = Self::new(seed).await;
        let mut last = life.full(&["vda"]).await;
        for _ in 0..increments {
            last = life.increment(&[("vda", &last)]).await;
        }
        life
    }

    /// The names of the points, oldest first.
    pub(crate) fn names(&self) -> Vec<String> {
        self.points.keys().cloned().collect()
    }

    pub(crate) fn path(&self, point: &str, file: &str) -> PathBuf {
        self.dir
            .path()
            .join(self.repository.key(&self.folder, point, file))
    }

    /// A point with full images of these disks.
    pub(crate) async fn full(&mut self, targets: &[&str]) -> String {
        let disks: Vec<(&str, Option<&str>)> = targets.iter().map(|target| (*target, None)).collect();
        self.point(&disks).await
    }

    /// A point with increments of these disks, each over a point.
    pub(crate) async fn increment(&mut self, disks: &[(&str, &str)]) -> String {
        let disks: Vec<(&str, Option<&str>)> = disks
            .iter()
            .map(|(target, parent)| (*target, Some(*parent)))
            .collect();
        self.point(&disks).await
    }

    /// A point of these disks, each full or over a point.
    pub(crate) async fn point(&mut self, disks: &[(&str, Option<&str>)]) -> String {
        let created =
            SystemTime::UNIX_EPOCH + Duration::from_millis((FIRST_NIGHT + self.nights * 86400) * 1000 + 250);
        self.nights += 1;
        let name = self.repository.new_point(&self.folder, created).await.unwrap();
        let (mut entries, mut models) = (Vec::new(), Disks::new());
        for (target, parent) in disks {
            let (entry, model) = match parent {
                None => self.write_full(&name, target).await,
                Some(parent) => self.write_increment(&name, target, parent).await,
            };
            entries.push(entry);
            models.insert((*target).to_owned(), model);
        }
        let manifest = Manifest {
            repository: self.repository.id(),
            point: name.clone(),
            domain: domain(),
            created,
            consistency: Consistency::Crash,
            snapshot: format!("backup-{name}").parse().unwrap(),
            checkpoint: None,
            disks: entries,
            machine: self.machine(&name).await,
            warnings: Vec::new(),
            tool: "disksnap test".to_owned(),
        };
        self.repository.publish(&self.folder, &manifest).await.unwrap();
        self.points.insert(name.clone(), models);
        name
    }

    async fn machine(&self, point: &str) -> MachineEntry {
        let save = async |file: &str, bytes: &[u8]| {
            let key = self.repository.key(&self.folder, point, file);
            self.repository.store().put(&key, bytes).await.unwrap();
            FileEntry {
                file: file.to_owned(),
                path: None,
                bytes: bytes.len() as u64,
                digest: Digest::of(bytes),
            }
        };
        MachineEntry {
            domain_xml: save("domain.xml", b"<domain type='kvm'><name>web 1</name></domain>").await,
            nvram: Some(save("nvram.fd", &[7; 3000]).await),
            tpm: vec![save("tpm/tpm2-00.permall", b"a secret").await],
        }
    }

    async fn write_full(&mut self, point: &str, target: &str) -> (DiskEntry, Vec<u8>) {
        let chunks = 6 + self.random.below(10);
        let size = usize::try_from(chunks * CHUNK - 512 * self.random.below(3)).unwrap();
        let mut model = vec![0; size];
        for chunk in 0..chunks {
            if self.random.below(3) > 0 {
                self.scribble(&mut model, chunk);
            }
        }
        let all: BTreeSet<u64> = (0..chunks).collect();
        (self.write(point, target, &model, &all, None).await, model)
    }

    async fn write_increment(&mut self, point: &str, target: &str, parent: &str) -> (DiskEntry, Vec<u8>) {
        let mut model = self.points[parent][target].clone();
        let mut changed = BTreeSet::new();
        if self.random.below(4) == 0 {
            let (old, new) = (model.len(), self.other_size(model.len()));
            model.resize(new, 0);
            // As a backup does: what the smaller of both ends in, and all that has come.
            let first = old.min(new) as u64 / CHUNK;
            changed.extend(first..(new as u64).div_ceil(CHUNK));
        }
        let chunks = (model.len() as u64).div_ceil(CHUNK);
        for _ in 0..self.random.below(5) {
            let chunk = self.random.below(chunks);
            changed.insert(chunk);
            match self.random.below(3) {
                0 => range(&mut model, chunk).fill(0),
                _ => self.scribble(&mut model, chunk),
            }
        }
        (
            self.write(point, target, &model, &changed, Some(parent)).await,
            model,
        )
    }

    fn other_size(&mut self, old: usize) -> usize {
        let step = 512 * usize::try_from(self.random.below(400)).unwrap();
        if self.random.below(2) == 0 {
            old + step
        } else {
            old.saturating_sub(step).max(70_144)
        }
    }

    fn scribble(&mut self, model: &mut [u8], chunk: u64) {
        let seed = self.random.next_u64();
        let range = range(model, chunk);
        // Of the one half no byte compresses, of the other all do.
        if seed.is_multiple_of(2) {
            range.copy_from_slice(&pattern::bytes(seed, range.len()));
        } else {
            range.fill(u8::try_from(seed % 255).unwrap() + 1);
        }
    }

    async fn write(
        &mut self,
        point: &str,
        target: &str,
        model: &[u8],
        changed: &BTreeSet<u64>,
        parent: Option<&str>,
    ) -> DiskEntry {
        let (image, chunks) = (format!("{target}.qcow2"), format!("{target}.chunks"));
        let compression =
            [Compression::None, Compression::Zstd(1)][usize::try_from(self.random.below(2)).unwrap()];
        let spec = ImageSpec {
            size: model.len() as u64,
            backing: parent.map(|parent| format!("../{parent}/{image}")),
            compression,
        };
        let keys = ImageKeys {
            image: self.repository.key(&self.folder, point, &image),
            chunks: self.repository.key(&self.folder, point, &chunks),
        };
        let store = Arc::clone(self.repository.store());
        let mut writer = ImageWriter::create(Arc::clone(&store), keys.clone(), spec.clone())
            .await
            .unwrap();
        for chunk in changed {
            let data = slice(model, *chunk).to_vec();
            let (offset, length) = (chunk * CHUNK, data.len() as u64);
            let zero = data.iter().all(|byte| *byte == 0) && self.random.below(2) == 0;
            let piece = if zero {
                Piece::Zero { offset, length }
            } else {
                Piece::Data { offset, data }
            };
            writer.write(piece).await.unwrap();
        }
        let summary = writer.finish().await.unwrap();
        let mut layers = vec![Layer {
            point: point.to_owned(),
            image: keys.image,
            chunks: keys.chunks,
            chunks_digest: summary.chunks_digest,
            size: spec.size,
        }];
        if let Some(parent) = parent {
            let below = self.repository.manifest(&self.folder, parent).await.unwrap();
            layers.extend(self.repository.chain(&self.folder, &below, target).await.unwrap());
        }
        let content = content_digest(store.as_ref(), &layers).await.unwrap();
        assert_eq!(
            content,
            digest_of(model),
            "the content's digest, as anyone computes it"
        );
        DiskEntry {
            target: target.to_owned(),
            size: spec.size,
            method: "memory".to_owned(),
            level: if parent.is_some() {
                Level::Incremental
            } else {
                Level::Full
            },
            why_full: None,
            excess: None,
            parent: parent.map(str::to_owned),
            image,
            image_bytes: summary.image_bytes,
            compression,
            data: summary.data,
            zero: summary.zero,
            chunks,
            chunks_digest: summary.chunks_digest,
            content,
            tracked: true,
        }
    }

    /// Every point that is there reads as it must, and verifying finds nothing.
    pub(crate) async fn check(&self) {
        check(&self.repository, &self.folder, &self.points).await;
    }

    /// QEMU reads every point as it must be.
    pub(crate) fn check_with_qemu(&self) {
        check_with_qemu(self.dir.path(), &self.folder, &self.points);
    }
}

/// A copy of a repository's directory.
pub(crate) fn copy_of(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let done = Command::new("cp")
        .arg("-a")
        .arg(dir.join("."))
        .arg(copy.path())
        .status()
        .unwrap();
    assert!(done.success());
    copy
}

/// Every point that is there reads as it must, and verifying finds nothing.
pub(crate) async fn check(repository: &Repository, folder: &DomainFolder, points: &BTreeMap<String, Disks>) {
    for point in repository.points(folder).await.unwrap() {
        let manifest = point.manifest.unwrap();
        for (target, model) in &points[&point.name] {
            let read = read(repository, folder, &manifest, target).await.unwrap();
            assert!(
                read == *model,
                "{target} at {} reads as something else",
                point.name
            );
        }
    }
    let found = verify(repository, folder, &VerifyOptions::default(), &Silent)
        .await
        .unwrap();
    assert!(found.is_whole(), "{found:#?}");
}

/// QEMU reads every one of these points as it must be.
pub(crate) fn check_with_qemu(dir: &Path, folder: &DomainFolder, points: &BTreeMap<String, Disks>) {
    let place = tempfile::tempdir().unwrap();
    for (point, disks) in points {
        for (target, model) in disks {
            let image = dir.join(&folder.key).join(point).join(format!("{target}.qcow2"));
            let raw = place.path().join("raw");
            std::fs::write(&raw, model).unwrap();
            qemu_img(&["check", "-f", "qcow2"], &[&image]);
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&raw, &image]);
        }
    }
}

fn qemu_img(words: &[&str], paths: &[&Path]) {
    let done = Command::new(tools::program("qemu-img"))
        .args(words)
        .args(paths)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "qemu-img {words:?} {paths:?}: {told}");
}

/// A disk as it was at a point.
pub(crate) async fn read(
    repository: &Repository,
    folder: &DomainFolder,
    point: &Manifest,
    target: &str,
) -> Result<Vec<u8>> {
    let layers = repository.chain(folder, point, target).await?;
    let mut reader = ChainReader::open(Arc::clone(repository.store()), &layers).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = reader.next().await? {
        match piece {
            Piece::Data { offset, data } => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.extend(data);
            }
            Piece::Zero { offset, length } => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0);
            }
        }
    }
    Ok(bytes)
}

/// The digest of a disk's content, as `docs/backup-format.md` says it.
pub(crate) fn digest_of(model: &[u8]) -> Digest {
    let chunks = model.chunks(usize::try_from(CHUNK).unwrap());
    let digests: Vec<u8> = chunks.flat_map(|chunk| Digest::of(chunk).0).collect();
    Digest::of(&digests)
}

fn range(model: &mut [u8], chunk: u64) -> &mut [u8] {
    let begin = usize::try_from(chunk * CHUNK).unwrap();
    let end = model.len().min(begin + usize::try_from(CHUNK).unwrap());
    &mut model[begin..end]
}

fn slice(model: &[u8], chunk: u64) -> &[u8] {
    let begin = usize::try_from(chunk * CHUNK).unwrap();
    &model[begin..model.len().min(begin + usize::try_from(CHUNK).unwrap())]
}

/// How a store's life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// One change fails, as on a full disk; those after it succeed.
    OneFails(usize),
    /// Before this change everything ends.
    Before(usize),
    /// This change is done, or half done where it can be, and nobody learns of it: then everything ends.
    Within(usize),
}

/// A directory that nothing can be changed in any more from some change on. Reading goes on.
#[derive(Debug, Clone)]
pub(crate) struct Dying {
    inner: LocalStore,
    death: Death,
    changes: Arc<AtomicUsize>,
}

/// What becomes of a change.
enum Fate {
    Done,
    Fails,
    DoneUnheard,
}

impl Dying {
    pub(crate) fn at(root: &Path, death: Death) -> Self {
        Self {
            inner: LocalStore::at(root),
            death,
            changes: Arc::default(),
        }
    }

    /// Whether its time had come.
    pub(crate) fn has_died(&self) -> bool {
        let (Death::OneFails(at) | Death::Before(at) | Death::Within(at)) = self.death;
        self.changes.load(Ordering::SeqCst) > at
    }

    fn fate(&self) -> Fate {
        let now = self.changes.fetch_add(1, Ordering::SeqCst);
        match self.death {
            Death::OneFails(at) if now == at => Fate::Fails,
            Death::Before(at) if now >= at => Fate::Fails,
            Death::Within(at) if now == at => Fate::DoneUnheard,
            Death::Within(at) if now > at => Fate::Fails,
            _ => Fate::Done,
        }
    }

    async fn change<T>(&self, act: impl Future<Output = Result<T>>) -> Result<T> {
        match self.fate() {
            Fate::Done => act.await,
            Fate::Fails => Err(dead()),
            Fate::DoneUnheard => {
                let _ = act.await;
                Err(dead())
            }
        }
    }
}

fn dead() -> Error {
    Error::new(ErrorKind::NoSpace, "the store has died")
}

#[async_trait]
impl Store for Dying {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list(prefix).await
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.inner.get(key, limit).await
    }

    async fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.change(self.inner.put(key, bytes)).await
    }

    async fn open(&self, key: &str) -> Result<Arc<dyn Blob>> {
        self.inner.open(key).await
    }

    async fn write(&self, key: &str, resume: Option<u64>) -> Result<Box<dyn BlobWriter>> {
        let inner = self.change(self.inner.write(key, resume)).await?;
        Ok(Box::new(DyingWriter {
            inner,
            store: self.clone(),
        }))
    }

    async fn discard(&self, key: &str) -> Result<()> {
        self.change(self.inner.discard(key)).await
    }

    async fn sweep(&self, prefix: &str) -> Result<()> {
        self.inner.sweep(prefix).await
    }

    async fn remove(&self, key: &str) -> Result<()> {
        match self.fate() {
            Fate::Done => self.inner.remove(key).await,
            Fate::Fails => Err(dead()),
            Fate::DoneUnheard => {
                // Of a folder only a part has gone.
                match self.inner.list(key).await?.first() {
                    Some(file) => self.inner.remove(&format!("{key}/{file}")).await?,
                    None => self.inner.remove(key).await?,
                }
                Err(dead())
            }
        }
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.change(self.inner.rename(from, to)).await
    }

    async fn lock(&self, key: &str, shared: bool) -> Result<Box<dyn StoreLock>> {
        self.inner.lock(key, shared).await
    }

    fn file(&self, key: &str) -> Option<PathBuf> {
        self.inner.file(key)
    }
}

#[derive(Debug)]
struct DyingWriter {
    inner: Box<dyn BlobWriter>,
    store: Dying,
}

#[async_trait]
impl BlobWriter for DyingWriter {
    fn length(&self) -> u64 {
        self.inner.length()
    }

    async fn append(&mut self, bytes: Bytes) -> Result<()> {
        let store = self.store.clone();
        store.change(self.inner.append(bytes)).await
    }

    async fn read_back(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        self.inner.read_back(offset, bytes).await
    }

    async fn sync(&mut self) -> Result<u64> {
        let store = self.store.clone();
        store.change(self.inner.sync()).await
    }

    async fn finish(self: Box<Self>, head: Bytes) -> Result<()> {
        let store = self.store.clone();
        store.change(self.inner.finish(head)).await
    }
}
