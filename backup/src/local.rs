//! A repository in a directory of this host: one file per object, of mode 0600, in directories of mode 0700.
//!
//! What is being written bears another name that ends in `.part` until it is whole and on the disk. A file that ends so is
//! no object: it is not listed, and no key ends so.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use disksnap::{Error, ErrorKind, Result, faults};
use rustix::fs::OFlags;

use crate::{Blob, BlobWriter, Store, StoreLock};

/// How the name of what is not whole yet ends.
const PART: &str = ".part";
/// The same for a small file that is written in one go: nobody goes on with it.
const PUT_PART: &str = ".put.part";

/// A directory.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// A store in this directory, which must exist.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        check_key(key)?;
        Ok(self.root.join(key))
    }
}

#[async_trait]
impl Store for LocalStore {
    fn describe(&self) -> String {
        self.root.display().to_string()
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let path = if prefix.is_empty() {
            self.root.clone()
        } else {
            self.path(prefix)?
        };
        blocking(move || list(&path)).await
    }

    async fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let path = self.path(key)?;
        blocking(move || get(&path, limit)).await
    }

    async fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let (path, root, bytes) = (self.path(key)?, self.root.clone(), bytes.to_vec());
        blocking(move || {
            make_folders(&root, &path)?;
            put(&path, &bytes).map_err(|e| failed("cannot write the file", &path, e))
        })
        .await
    }

    async fn open(&self, key: &str) -> Result<Arc<dyn Blob>> {
        let path = self.path(key)?;
        blocking(move || {
            let (file, length) = open(&path)?;
            let file = Arc::new(file);
            Ok(Arc::new(LocalBlob { file, path, length }) as Arc<dyn Blob>)
        })
        .await
    }

    async fn write(&self, key: &str, resume: Option<u64>) -> Result<Box<dyn BlobWriter>> {
        let (path, root) = (self.path(key)?, self.root.clone());
        blocking(move || {
            let file = match resume {
                None => begin(&root, &path)?,
                Some(length) => go_on(&path, length)?,
            };
            Ok(Box::new(LocalWriter {
                file: Arc::new(file),
                path,
                length: resume.unwrap_or(0),
                unsure: false,
            }) as Box<dyn BlobWriter>)
        })
        .await
    }

    async fn discard(&self, key: &str) -> Result<()> {
        let part = part_of(&self.path(key)?);
        blocking(move || remove(&part)).await
    }

    async fn sweep(&self, prefix: &str) -> Result<()> {
        let path = self.path(prefix)?;
        blocking(move || sweep(&path)).await
    }

    async fn remove(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        blocking(move || remove(&path)).await
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to, root) = (self.path(from)?, self.path(to)?, self.root.clone());
        blocking(move || {
            make_folders(&root, &to)?;
            rename(&from, &to)
                .map_err(|e| failed("cannot rename the file", &from, e).with("to", to.display()))
        })
        .await
    }

    async fn lock(&self, key: &str, shared: bool) -> Result<Box<dyn StoreLock>> {
        let (path, root) = (self.path(key)?, self.root.clone());
        blocking(move || lock(&root, &path, shared).map(|x| Box::new(x) as Box<dyn StoreLock>)).await
    }

    fn file(&self, key: &str) -> Option<PathBuf> {
        self.path(key).ok()
    }
}

/// A file that is read.
#[derive(Debug)]
struct LocalBlob {
    file: Arc<File>,
    path: PathBuf,
    length: u64,
}

#[async_trait]
impl Blob for LocalBlob {
    fn length(&self) -> u64 {
        self.length
    }

    async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.length) {
            return Err(ends_early(&self.path, self.length).with("offset", offset));
        }
        let (file, path) = (Arc::clone(&self.file), self.path.clone());
        blocking(move || {
            let mut bytes = BytesMut::zeroed(length);
            match file.read_exact_at(&mut bytes, offset) {
                Ok(()) => Ok(bytes.freeze()),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    Err(ends_early(&path, offset).with("offset", offset))
                }
                Err(e) => Err(failed("cannot read the file", &path, e).with("offset", offset)),
            }
        })
        .await
    }
}

/// A file that is written, under its other name.
#[derive(Debug)]
struct LocalWriter {
    file: Arc<File>,
    /// Where it will be.
    path: PathBuf,
    length: u64,
    /// A write has failed or was not waited for: nobody knows what is at the end.
    unsure: bool,
}

impl LocalWriter {
    /// Does something to the file that must come to its end before anything else is done.
    async fn act<T: Send + 'static>(
        &mut self,
        act: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.unsure {
            let text = "an earlier write to the file did not come to its end: nothing more can be written";
            return Err(Error::new(ErrorKind::Io, text).with("path", self.path.display()));
        }
        let (file, path) = (Arc::clone(&self.file), part_of(&self.path));
        self.unsure = true;
        let done = blocking(move || act(&file).map_err(|e| failed("cannot write the file", &path, e))).await;
        self.unsure = done.is_err();
        done
    }
}

#[async_trait]
impl BlobWriter for LocalWriter {
    fn length(&self) -> u64 {
        self.length
    }

    async fn append(&mut self, bytes: Bytes) -> Result<()> {
        let (at, length) = (self.length, bytes.len() as u64);
        self.act(move |file| faults::around("store", "append", || file.write_all_at(&bytes, at)))
            .await?;
        self.length += length;
        Ok(())
    }

    async fn read_back(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        if self.act(move |file| is_there(file, offset, &bytes)).await? {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Broken, "what is in the file is not what was written")
                .with("path", part_of(&self.path).display())
                .with("offset", offset)
                .hint("The disk of the repository, its controller or the memory of this host is failing."),
        )
    }

    async fn sync(&mut self) -> Result<u64> {
        self.act(File::sync_data).await?;
        Ok(self.length)
    }

    async fn finish(mut self: Box<Self>, head: Bytes) -> Result<()> {
        let path = self.path.clone();
        self.act(move |file| {
            faults::around("store", "write head", || file.write_all_at(&head, 0))?;
            file.sync_all()?;
            faults::around("store", "finish", || fs::rename(part_of(&path), &path))?;
            sync_folder(&path)
        })
        .await
    }
}

/// Whether these bytes are in the file, compared in parts that stay in the processor's cache.
fn is_there(file: &File, mut at: u64, bytes: &[u8]) -> io::Result<bool> {
    const PART_READ: usize = 128 << 10;
    let mut found = vec![0; PART_READ.min(bytes.len())];
    for part in bytes.chunks(PART_READ) {
        let found = &mut found[..part.len()];
        file.read_exact_at(found, at)?;
        if found != part {
            return Ok(false);
        }
        at += part.len() as u64;
    }
    Ok(true)
}

/// A held lock on a file.
#[derive(Debug)]
struct LocalLock {
    /// None where the file system is read-only and has no file to lock: nobody can write there.
    file: Option<File>,
}

impl StoreLock for LocalLock {}

impl Drop for LocalLock {
    fn drop(&mut self) {
        // Said, not left to the close: a child that was being started at this moment has the file open until its exec.
        if let Some(file) = &self.file {
            let _ = file.unlock();
        }
    }
}

/// Refuses what is no key.
fn check_key(key: &str) -> Result<()> {
    let fault = if key.len() > 1024 || key.split('/').any(|part| part.len() > 200) {
        "is too long"
    } else if key.split('/').any(|part| matches!(part, "" | "." | "..")) {
        "has a part that is empty, '.' or '..'"
    } else if !key
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-%/".contains(&b))
    {
        "has other characters than letters, digits, '.', '_', '-' and '%'"
    } else if key.split('/').any(|part| part.ends_with(PART)) {
        "has a part that ends in '.part'"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Invalid, format!("the key {key:?} {fault}")))
}

fn list(path: &Path) -> Result<Vec<String>> {
    let mut names = names(path)?;
    names.retain(|name| !name.ends_with(PART));
    names.sort_unstable();
    Ok(names)
}

/// All that is in a directory.
fn names(path: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(failed("cannot read the directory", path, e)),
    };
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let names: io::Result<Vec<String>> = entries.map(name).collect();
    names.map_err(|e| failed("cannot read the directory", path, e))
}

fn sweep(path: &Path) -> Result<()> {
    for left in names(path)?.iter().filter(|name| name.ends_with(PUT_PART)) {
        remove(&path.join(left))?;
    }
    Ok(())
}

fn get(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    let fits = |length: u64| {
        let text = format!("the file has {length} bytes, and one of its kind has at most {limit}");
        let error = || Error::new(ErrorKind::Broken, text).with("path", path.display());
        (length <= limit).then_some(()).ok_or_else(error)
    };
    fits(length)?;
    let mut bytes = Vec::new();
    // It may grow meanwhile.
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|e| failed("cannot read the file", path, e))?;
    fits(bytes.len() as u64)?;
    Ok(bytes)
}

/// Opens a regular file for reading, no symbolic link and nothing that an opener would wait for.
fn open(path: &Path) -> Result<(File, u64)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let file = opened.map_err(|e| not_opened(path, e))?;
    let about = file
        .metadata()
        .map_err(|e| failed("cannot read the file", path, e))?;
    if !about.is_file() {
        return Err(
            Error::new(ErrorKind::Broken, "what should be a file is none").with("path", path.display())
        );
    }
    Ok((file, about.len()))
}

fn not_opened(path: &Path, error: io::Error) -> Error {
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        let text = "what should be a file is a symbolic link, which is not followed";
        return Error::new(ErrorKind::Broken, text).with("path", path.display());
    }
    failed("cannot open the file", path, error)
}

fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A name of its own: two may be at it, and the last one wins with the whole of it.
    let name = path.file_name().unwrap_or_default();
    let mut beside = tempfile::Builder::new();
    beside.prefix(name).suffix(PUT_PART);
    let mut temporary = faults::around("store", "create part", || beside.tempfile_in(folder_of(path)))?;
    faults::around("store", "write part", || temporary.write_all(bytes))?;
    temporary.as_file().sync_all()?;
    faults::around("store", "put", || temporary.persist(path)).map_err(|e| e.error)?;
    sync_folder(path)
}

fn begin(root: &Path, path: &Path) -> Result<File> {
    make_folders(root, path)?;
    let part = part_of(path);
    let made = || {
        match faults::around("store", "drop part", || fs::remove_file(&part)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut new = OpenOptions::new();
        new.read(true).write(true).create_new(true).mode(0o600);
        let file = faults::around("store", "begin", || new.open(&part))?;
        sync_folder(&part)?;
        Ok(file)
    };
    made().map_err(|e| failed("cannot create the file", &part, e))
}

fn go_on(path: &Path, length: u64) -> Result<File> {
    let part = part_of(path);
    let flags = OFlags::NOFOLLOW.bits().cast_signed();
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&part);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let text = "the unfinished file that was to be gone on with is not there";
            return Err(Error::new(ErrorKind::Broken, text).with("path", part.display()));
        }
        Err(e) => return Err(not_opened(&part, e)),
    };
    let about = file
        .metadata()
        .map_err(|e| failed("cannot read the file", &part, e))?;
    if !about.is_file() || about.len() < length {
        return Err(ends_early(&part, about.len()).with("expected", length));
    }
    faults::around("store", "go on", || file.set_len(length))
        .map_err(|e| failed("cannot shorten the file", &part, e))?;
    Ok(file)
}

fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(about) if about.is_dir() => faults::around("store", "remove folder", || fs::remove_dir_all(path)),
        Ok(_) => faults::around("store", "remove", || fs::remove_file(path)),
        Err(e) => Err(e),
    };
    match removed.and_then(|()| sync_folder(path)) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(()),
        other => other.map_err(|e| failed("cannot remove", path, e)),
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    faults::around("store", "rename", || fs::rename(from, to))?;
    sync_folder(to)?;
    if folder_of(from) != folder_of(to) {
        sync_folder(from)?;
    }
    Ok(())
}

fn lock(root: &Path, path: &Path, shared: bool) -> Result<LocalLock> {
    let Some(file) = lock_file(root, path, shared)? else {
        return Ok(LocalLock { file: None });
    };
    let tried = if shared {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match tried {
        Ok(()) => Ok(LocalLock { file: Some(file) }),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            ErrorKind::Busy,
            format!("somebody else is at it: {} holds the lock", holder(&file)),
        )
        .with("path", path.display())
        .hint("Wait for it to end; the lock goes with the process that holds it.")),
        Err(TryLockError::Error(e)) => Err(failed("cannot lock the file", path, e)),
    }
}

/// The file to lock, made where it is missing. Who only reads need not be allowed to write.
fn lock_file(root: &Path, path: &Path, shared: bool) -> Result<Option<File>> {
    let flags = OFlags::NOFOLLOW.bits().cast_signed();
    if shared && let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) {
        return Ok(Some(file));
    }
    let opened = make_folders(root, path).and_then(|()| {
        let mut how = OpenOptions::new();
        how.read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags);
        faults::around("store", "make lock", || how.open(path))
            .map(Some)
            .map_err(|e| failed("cannot open the lock", path, e))
    });
    match opened {
        Err(e) if shared && is_read_only(&e) => Ok(None),
        other => other,
    }
}

fn is_read_only(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|x| x.downcast_ref::<io::Error>());
    source.is_some_and(|e| e.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

/// Who may hold a lock, as the kernel tells it (proc(5), `/proc/locks`).
fn holder(file: &File) -> String {
    let inode = file.metadata().map(|about| about.ino()).unwrap_or_default();
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let pids = locks.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // A line of one who waits has a word more, and no place here.
        let [_, "FLOCK", _, _, pid, place, ..] = words[..] else {
            return None;
        };
        let same = place.rsplit(':').next().and_then(|x| x.parse().ok()) == Some(inode);
        same.then_some(pid.parse::<u32>().ok()?)
    });
    let named: Vec<String> = pids
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", name.trim())
        })
        .collect();
    if named.is_empty() {
        "a process that this host does not show".to_owned()
    } else {
        named.join(" or ")
    }
}

/// Makes the directories above `path`, below `root`, and puts them on the disk.
fn make_folders(root: &Path, path: &Path) -> Result<()> {
    let inner = path.strip_prefix(root).unwrap_or(path);
    let mut at = root.to_owned();
    for part in inner.parent().unwrap_or(Path::new("")) {
        at.push(part);
        let mut folder = DirBuilder::new();
        folder.mode(0o700);
        let made = if at.is_dir() {
            Err(io::ErrorKind::AlreadyExists.into())
        } else {
            faults::around("store", "make folder", || folder.create(&at))
        };
        match made.and_then(|()| sync_folder(&at)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|e| failed("cannot make the directory", &at, e))?,
        }
    }
    Ok(())
}

/// Puts on the disk what the directory of this file says of it.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PART);
    PathBuf::from(name)
}

fn ends_early(path: &Path, at: u64) -> Error {
    Error::new(
        ErrorKind::Broken,
        format!("the file ends at {at}, earlier than it should"),
    )
    .with("path", path.display())
}

fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    Error::io(what, error).with("path", path.display())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => Err(Error::new(ErrorKind::Internal, "work on a file did not come to its end").because(e)),
    }
}
