//! Documents that are to follow their domains' disks: noted before an act that may give a domain other disks, so that a kill between
//! the act's end and the document's rewriting is made good by whoever comes next.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use disksnap_core::{DomainId, Error, ErrorKind, Result, faults};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::Disksnap;
use crate::disk::run_blocking;
use crate::domain::is_path;

/// Where the notes lie, in the state directory.
const FOLDER: &str = "documents";

/// A note that a domain's document is to follow its disks. It is in force until it is [over](Following::over): dropped before, or
/// left by a kill, it is what [`Disksnap::catch_up`] goes by.
#[derive(Debug)]
pub struct Following {
    path: PathBuf,
    /// Locked for as long as somebody sees to it.
    _lock: File,
}

impl Following {
    /// The document is as it is to be.
    ///
    /// # Errors
    /// `Io`: the note is still there, and harmless.
    pub fn over(self) -> Result<()> {
        let removed = faults::around("file", "remove document's note", || fs::remove_file(&self.path));
        removed.map_err(|e| failed("remove", &self.path, e))
    }
}

impl Disksnap {
    /// Notes, durably, that the document to which `given` leads is to follow the domain's disks. `given` is as for
    /// [`Disksnap::load`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`: nothing is noted.
    pub async fn follows(&self, given: &str, domain: &DomainId) -> Result<Following> {
        let given = if is_path(given) {
            let path = std::path::absolute(given).map_err(|e| Error::io("cannot find the document", e))?;
            path.to_string_lossy().into_owned()
        } else {
            domain.uuid.to_string()
        };
        let (folder, start) = (self.notes(), format!("{}.", domain.uuid));
        run_blocking(move || {
            let noted = faults::around("file", "create document's note", || note(&folder, &start, &given));
            noted.map_err(|e| failed("write", &folder, e))
        })
        .await
    }

    /// Brings the documents up to date that killed acts left behind, of one domain or of all; which ones those were. What an act
    /// that is not settled yet may still change waits for that. Idempotent.
    ///
    /// # Errors
    /// Those of [`Disksnap::update`]; what is noted then stays noted.
    pub async fn catch_up(&self, domain: Option<&DomainId>) -> Result<Vec<DomainId>> {
        let (folder, start) = (self.notes(), domain.map(|domain| format!("{}.", domain.uuid)));
        let left = run_blocking(move || Ok(left(&folder, start.as_deref()))).await?;
        let mut caught_up = Vec::new();
        for (following, given) in left {
            let document = match self.load(&given).await {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    following.over()?;
                    continue;
                }
                document => document?,
            };
            let domain = document.domain();
            if !self
                .dispatcher()
                .catalog()
                .intents(Some(&domain.id))
                .await?
                .is_empty()
            {
                continue;
            }
            let disks = self.dispatcher().outdated(domain).await?;
            if !disks.is_empty() {
                self.update(&given, &disks).await?;
                caught_up.push(domain.id.clone());
            }
            following.over()?;
        }
        Ok(caught_up)
    }

    fn notes(&self) -> PathBuf {
        self.state_dir().path().join(FOLDER)
    }
}

fn note(folder: &Path, start: &str, given: &str) -> io::Result<Following> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    // Locked before it has the name by which it is found.
    let mut file = tempfile::Builder::new().prefix("new-").tempfile_in(folder)?;
    flock(file.as_file(), FlockOperation::NonBlockingLockExclusive)?;
    file.write_all(given.as_bytes())?;
    file.as_file().sync_all()?;
    let unique = file
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let path = folder.join(format!("{start}{unique}"));
    let lock = file.persist_noclobber(&path).map_err(|e| e.error)?;
    File::open(folder)?.sync_all()?;
    Ok(Following { path, _lock: lock })
}

/// The notes that nobody sees to any more, and what they say.
fn left(folder: &Path, start: Option<&str>) -> Vec<(Following, String)> {
    let mut left = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        let wanted = start.is_none_or(|start| name.starts_with(start));
        let Some(lock) = File::open(&path).ok().filter(|_| wanted) else {
            continue;
        };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
            continue;
        }
        // One that was being written says nothing yet, and nothing had begun.
        if name.starts_with("new-") {
            let _ = fs::remove_file(&path);
        } else if let Ok(given) = fs::read_to_string(&path) {
            left.push((Following { path, _lock: lock }, given));
        }
    }
    left
}

fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    Error::io(
        format!("cannot {what} the note that a document is to follow its domain"),
        error,
    )
    .with("path", path.display())
}
