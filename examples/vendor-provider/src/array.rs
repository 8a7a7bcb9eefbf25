//! ACME's array: a directory whose files are volumes. A vendor talks to the real one here.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use disksnap_core::{Error, Result, SnapshotId};
use serde::{Deserialize, Serialize};

/// An array, by its address.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Array(PathBuf);

/// A copy of a volume on the same array.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Copy {
    volume: String,
    id: SnapshotId,
}

impl Copy {
    pub(crate) fn new(volume: String, id: SnapshotId) -> Self {
        Self { volume, id }
    }

    /// What it is called on the array; until it is published it is called otherwise.
    pub(crate) fn name(&self) -> String {
        format!("{}@{}", self.volume, self.id.short())
    }
}

impl Array {
    pub(crate) fn at(address: PathBuf) -> Self {
        Self(address)
    }

    pub(crate) fn address(&self) -> String {
        self.0.display().to_string()
    }

    pub(crate) fn volume(&self, volume: &str) -> PathBuf {
        self.0.join(volume)
    }

    fn finished(&self, copy: &Copy) -> PathBuf {
        self.0.join(copy.name())
    }

    fn unfinished(&self, copy: &Copy) -> PathBuf {
        self.0.join(format!("{}.new", copy.name()))
    }

    /// Makes an empty copy of the volume's size, and tells the size.
    pub(crate) fn reserve(&self, copy: &Copy) -> Result<u64> {
        let volume = self.volume(&copy.volume);
        let size = fs::metadata(&volume).map_err(failed("find", &volume))?.len();
        let file = self.unfinished(copy);
        let reserved = File::create(&file).and_then(|new| new.set_len(size));
        reserved.map_err(failed("reserve", &file))?;
        Ok(size)
    }

    /// Copies the volume as it is now.
    pub(crate) fn take(&self, copy: &Copy) -> Result<()> {
        let (volume, file) = (self.volume(&copy.volume), self.unfinished(copy));
        let taken = (|| {
            let mut to = OpenOptions::new().write(true).open(&file)?;
            io::copy(&mut File::open(&volume)?, &mut to)
        })();
        taken.map(|_| ()).map_err(failed("copy to", &file))
    }

    /// Makes the copy a snapshot: read-only, under its name.
    pub(crate) fn publish(&self, copy: &Copy) -> Result<PathBuf> {
        let (from, to) = (self.unfinished(copy), self.finished(copy));
        let published =
            fs::set_permissions(&from, Permissions::from_mode(0o400)).and_then(|()| fs::rename(&from, &to));
        published.map_err(failed("publish", &to))?;
        Ok(to)
    }

    /// The size of a snapshot, if the array has it.
    pub(crate) fn size_of(&self, copy: &Copy) -> Result<Option<u64>> {
        let file = self.finished(copy);
        match fs::metadata(&file) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("look at", &file)(error)),
        }
    }

    /// Removes a copy, finished or not. One that is not there is as good as removed.
    pub(crate) fn remove(&self, copy: &Copy) -> Result<()> {
        for file in [self.unfinished(copy), self.finished(copy)] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &file)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn failed(what: &str, file: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("cannot {what} {}", file.display());
    move |error| Error::io(what, error)
}
