//! What makes a machine of its disks, saved beside them: the domain's document, its EFI variables, its TPM's state.
//!
//! A guest writes its EFI variables and its TPM whenever it likes, and no snapshot holds them. They are small and seldom
//! written, so each is read until two reads in a row agree.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use disksnap::xml::{Tpm, TpmPlace};
use disksnap::{DomainDocument, Effect, Error, ErrorKind, Result, Source};
use rustix::fs::{CWD, Dir, Mode, OFlags, openat};

use crate::{Digest, FileEntry, MachineEntry, Store};

/// The document's file in a point's folder.
const DOCUMENT: &str = "domain.xml";
/// The EFI variables' file there.
const NVRAM: &str = "nvram.fd";
/// The folder of the TPM's state there.
const TPM: &str = "tpm";
/// What a TPM's state is called there when it is one file.
pub(crate) const TPM_FILE: &str = "state";
/// Largest EFI variables: of a pflash device, with some room for a qcow2 image of it. In bytes.
const MOST_NVRAM: u64 = 65 << 20;
/// Largest state of a TPM, all files together, in bytes; and how many files.
const MOST_TPM: u64 = 16 << 20;
const MOST_TPM_FILES: usize = 64;
/// How often something that changes under the eyes is read before it is taken as it is.
const TRIES: usize = 5;
/// How long to let a writer be before it is read again.
const PAUSE: Duration = Duration::from_millis(100);

/// How a machine is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MachineOptions {
    /// EFI variables or TPM state that the document speaks of and that cannot be read are a warning, not an error.
    pub allow_missing: bool,
}

/// A machine as it was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedMachine {
    /// The domain's document.
    pub document: DomainDocument,
    /// The EFI variables.
    pub nvram: Option<Vec<u8>>,
    /// The files of the TPM's state, by name.
    pub tpm: Vec<(String, Vec<u8>)>,
}

/// Saves a domain's document, its EFI variables and its emulated TPM's state under `prefix`, the key of a point's folder. Idempotent:
/// what an earlier run has saved is replaced.
///
/// `warnings` gets what the operator should know: what could not be saved, and what changed while it was read.
///
/// # Errors
/// Unless `allow_missing`: `NotFound`, `Denied`, `Unsupported`, `Io` for EFI variables or TPM state that cannot be read. What the
/// store meets.
pub async fn save_machine(
    store: &dyn Store,
    prefix: &str,
    document: &DomainDocument,
    options: &MachineOptions,
    warnings: &mut Vec<String>,
) -> Result<MachineEntry> {
    let mut entry = save_document(store, prefix, document).await?;
    let nvram = read_nvram(document, warnings).await;
    if let Some(Some((path, bytes))) = or_missing(nvram, *options, warnings)? {
        entry.nvram = Some(save(store, prefix, NVRAM, Some(&path), &bytes).await?);
    }
    let tpm = read_tpm(document, warnings).await;
    for (name, path, bytes) in or_missing(tpm, *options, warnings)?.unwrap_or_default() {
        let file = format!("{TPM}/{name}");
        let saved = save(store, prefix, &file, Some(&path), &bytes).await?;
        entry.tpm.push(saved);
    }
    Ok(entry)
}

/// Saves a domain's document alone.
pub(crate) async fn save_document(
    store: &dyn Store,
    prefix: &str,
    document: &DomainDocument,
) -> Result<MachineEntry> {
    Ok(MachineEntry {
        domain_xml: save(store, prefix, DOCUMENT, None, document.text().as_bytes()).await?,
        nvram: None,
        tpm: Vec::new(),
    })
}

/// Reads a saved machine back, each file compared with its digest.
///
/// # Errors
/// `Broken`, naming the file, for one that is missing or is not what was saved.
pub async fn load_machine(store: &dyn Store, prefix: &str, entry: &MachineEntry) -> Result<SavedMachine> {
    let text = load(store, prefix, &entry.domain_xml).await?;
    let document = disksnap::xml::text_of(text).and_then(DomainDocument::parse);
    let document =
        document.map_err(|e| broken(prefix, &entry.domain_xml, "is no domain's document").because(e))?;
    let mut machine = SavedMachine {
        document,
        nvram: None,
        tpm: Vec::new(),
    };
    if let Some(nvram) = &entry.nvram {
        machine.nvram = Some(load(store, prefix, nvram).await?);
    }
    for file in &entry.tpm {
        let name = file.file.strip_prefix("tpm/").filter(|name| is_plain(name));
        let Some(name) = name else {
            return Err(broken(
                prefix,
                file,
                "has no name that a file of a TPM's state can have",
            ));
        };
        machine
            .tpm
            .push((name.to_owned(), load(store, prefix, file).await?));
    }
    Ok(machine)
}

/// Reads all files of a saved machine and compares them with their digests.
///
/// # Errors
/// As [`load_machine`].
pub async fn verify_machine(store: &dyn Store, prefix: &str, entry: &MachineEntry) -> Result<()> {
    load_machine(store, prefix, entry).await.map(|_| ())
}

async fn save(
    store: &dyn Store,
    prefix: &str,
    file: &str,
    path: Option<&Path>,
    bytes: &[u8],
) -> Result<FileEntry> {
    store.put(&format!("{prefix}/{file}"), bytes).await?;
    Ok(FileEntry {
        file: file.to_owned(),
        path: path.map(|path| path.display().to_string()),
        bytes: bytes.len() as u64,
        digest: Digest::of(bytes),
    })
}

async fn load(store: &dyn Store, prefix: &str, entry: &FileEntry) -> Result<Vec<u8>> {
    let key = format!("{prefix}/{}", entry.file);
    let bytes = match store.get(&key, entry.bytes.min(MOST_NVRAM)).await {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(broken(prefix, entry, "is not there").because(e));
        }
        other => other?,
    };
    if bytes.len() as u64 == entry.bytes && Digest::of(&bytes) == entry.digest {
        return Ok(bytes);
    }
    Err(broken(prefix, entry, "is not what was saved, by its digest"))
}

fn broken(prefix: &str, entry: &FileEntry, what: &str) -> Error {
    Error::new(ErrorKind::Broken, format!("the saved file {} {what}", entry.file))
        .with("object", format!("{prefix}/{}", entry.file))
        .hint("The disks of the point may still be good: restore them without the machine.")
}

/// What was read; or nothing and a warning, where that is allowed.
fn or_missing<T>(read: Result<T>, options: MachineOptions, warnings: &mut Vec<String>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if options.allow_missing => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            warnings.push(format!("{error}{}", cause.unwrap_or_default()));
            Ok(None)
        }
        Err(error) => Err(error
            .leaving(Effect::None)
            .hint("Correct the domain's document, or ask for a backup without it.")),
    }
}

type Nvram = Option<(PathBuf, Vec<u8>)>;

async fn read_nvram(document: &DomainDocument, warnings: &mut Vec<String>) -> Result<Nvram> {
    let Some(variables) = document.efi_variables()? else {
        return Ok(None);
    };
    let path = match variables.source {
        Some(Source::File { file: path } | Source::Block { dev: path }) => path,
        Some(other) => {
            let why = format!("the EFI variables are at {other}, which is no file of this host");
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        None => {
            let why = "the document does not say where the EFI variables are";
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
    };
    let told = path.clone();
    let read = move || settled(|| nvram_once(&path).map(|(bytes, stamp)| (bytes, vec![stamp])));
    let (bytes, calm) = blocking(read)
        .await?
        .map_err(|e| Error::io("cannot read the EFI variables", e).with("path", told.display()))?;
    if !calm {
        warnings.push(unsettled("EFI variables", &told));
    }
    Ok(Some((told, bytes)))
}

fn nvram_once(path: &Path) -> io::Result<(Vec<u8>, Stamp)> {
    let file = File::from(openat(CWD, path, READ, Mode::empty())?);
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a device"));
    }
    read_once(file, MOST_NVRAM)
}

type StateFile = (String, PathBuf, Vec<u8>);

async fn read_tpm(document: &DomainDocument, warnings: &mut Vec<String>) -> Result<Vec<StateFile>> {
    let places = match document.tpm()? {
        None => return Ok(Vec::new()),
        Some(Tpm::Emulated { places, .. }) => places,
        Some(Tpm::Other { kind }) => {
            warnings.push(format!("the state of a TPM of the type '{kind}' is not saved"));
            return Ok(Vec::new());
        }
        Some(other) => {
            warnings.push(format!("the state of this TPM is not saved: {other:?}"));
            return Ok(Vec::new());
        }
    };
    let named: Vec<String> = places.iter().map(|p| p.path().display().to_string()).collect();
    let Some(place) = places.into_iter().find(|p| p.path().symlink_metadata().is_ok()) else {
        let why = match named.as_slice() {
            [] => "the document does not say where the TPM's state is".to_owned(),
            named => format!("there is no TPM state at {}", named.join(" or ")),
        };
        return Err(Error::new(ErrorKind::NotFound, why));
    };
    let path = place.path().to_owned();
    let (files, calm) = blocking(move || settled(|| tpm_once(&place)))
        .await?
        .map_err(|e| Error::io("cannot read the TPM's state", e).with("path", path.display()))?;
    if !calm {
        warnings.push(unsettled("TPM's state", &path));
    }
    Ok(files)
}

fn tpm_once(place: &TpmPlace) -> io::Result<(Vec<StateFile>, Vec<Stamp>)> {
    let directory = match place {
        TpmPlace::Directory(path) => path,
        TpmPlace::File(path) => {
            let (bytes, stamp) = state_file(CWD, path, MOST_TPM)?;
            return Ok((vec![(TPM_FILE.to_owned(), path.clone(), bytes)], vec![stamp]));
        }
    };
    let folder = openat(CWD, directory, READ | OFlags::DIRECTORY, Mode::empty())?;
    let (mut files, mut stamps, mut left) = (Vec::new(), Vec::new(), MOST_TPM);
    for name in names_in(&folder)? {
        let (bytes, stamp) = state_file(&folder, Path::new(&name), left)
            .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
        left -= bytes.len() as u64;
        files.push((name.clone(), directory.join(&name), bytes));
        stamps.push(stamp);
    }
    if files.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "nothing is in it"));
    }
    Ok((files, stamps))
}

/// The names in a TPM's folder, sorted; without swtpm's lock.
fn names_in(folder: impl AsFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if matches!(name.as_str(), "." | ".." | ".lock") {
            continue;
        }
        if !is_plain(&name) || names.len() == MOST_TPM_FILES {
            return Err(io::Error::other(format!(
                "{name:?} is nothing that swtpm keeps there"
            )));
        }
        names.push(name);
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether a name can be that of a file in a point's folder.
fn is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    // A store writes under such names what is not whole yet.
    let unfinished = Path::new(name).extension().is_some_and(|suffix| suffix == "part");
    name.bytes().all(plain) && !name.is_empty() && !name.starts_with('.') && !unfinished
}

fn state_file(folder: impl AsFd, path: &Path, most: u64) -> io::Result<(Vec<u8>, Stamp)> {
    let file = File::from(openat(folder, path, READ, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    read_once(file, most)
}

/// No link is followed: another user, whose files these are, may have put it there. Nothing is waited for.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// What tells whether a file was written meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

fn read_once(mut file: File, most: u64) -> io::Result<(Vec<u8>, Stamp)> {
    let mut bytes = Vec::new();
    (&mut file).take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!(
            "it has more than the {most} bytes that it may have"
        )));
    }
    // Afterwards: a write since the bytes were read shows in the next one's.
    let about = file.metadata()?;
    let stamp = Stamp {
        inode: about.ino(),
        modified: (about.mtime(), about.mtime_nsec()),
        changed: (about.ctime(), about.ctime_nsec()),
    };
    Ok((bytes, stamp))
}

/// Reads until two reads in a row agree; says whether they did.
fn settled<T: PartialEq>(read: impl Fn() -> io::Result<(T, Vec<Stamp>)>) -> io::Result<(T, bool)> {
    let mut last = read();
    for _ in 1..TRIES {
        let next = read();
        match (&last, &next) {
            (Ok(a), Ok(b)) if a == b => return next.map(|(value, _)| (value, true)),
            // What is not there does not come by waiting; what is replaced may be away for a moment.
            (Err(_), Err(_)) => return next.map(|(value, _)| (value, false)),
            _ => std::thread::sleep(PAUSE),
        }
        last = next;
    }
    last.map(|(value, _)| (value, false))
}

fn unsettled(what: &str, path: &Path) -> String {
    format!(
        "the {what} in {} changed each of the {TRIES} times that it was read: what was saved may be a state in between",
        path.display()
    )
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| {
        Error::new(
            ErrorKind::Internal,
            "reading the machine's files did not come to its end",
        )
        .because(e)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use std::cell::Cell;

    use super::*;

    /// Reads what comes next; the last of it for ever.
    fn reading(states: &[Option<u8>]) -> (io::Result<(u8, bool)>, usize) {
        let reads = Cell::new(0);
        let found = settled(|| {
            let n = reads.replace(reads.get() + 1);
            let state = states[n.min(states.len() - 1)];
            let gone = || io::Error::from(io::ErrorKind::NotFound);
            state.map(|state| (state, Vec::new())).ok_or_else(gone)
        });
        (found, reads.get())
    }

    #[test]
    fn two_reads_in_a_row_must_agree() {
        for (states, expected, reads) in [
            (&[Some(1)][..], (1, true), 2),
            (&[Some(1), Some(2)], (2, true), 3),
            (&[Some(1), Some(2), Some(1), Some(2), Some(2)], (2, true), 5),
            (&[Some(1), Some(2), Some(1), Some(2), Some(3)], (3, false), 5),
            // It was being replaced.
            (&[None, Some(1)], (1, true), 3),
            (&[Some(1), None, Some(1)], (1, true), 4),
        ] {
            let (found, count) = reading(states);
            assert_eq!((found.unwrap(), count), (expected, reads), "{states:?}");
        }
        let (found, count) = reading(&[None]);
        assert_eq!((found.unwrap_err().kind(), count), (io::ErrorKind::NotFound, 2));
    }
}
