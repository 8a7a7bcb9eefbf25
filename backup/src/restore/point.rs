//! Restoring a whole point in time into a directory: its disks as new images, and what makes a machine of them.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disksnap::xml::{self, RestoredAs, TpmPlace};
use disksnap::{DomainDocument, Error, ErrorKind, Result, Source};
use serde::Serialize;
use uuid::Uuid;

use super::file::{must_be_free, must_not_be_a_device, write_new};
use super::worker::joined;
use super::{RestoredDisk, Target, as_locked, restore_disk, with_complete};
use crate::{
    ChainReader, Compression, DiskEntry, DomainFolder, Event, Manifest, Repository, SavedMachine, Watcher,
    load_machine,
};

/// The document's file in the directory.
const DOCUMENT: &str = "domain.xml";
/// The EFI variables' file.
const NVRAM: &str = "nvram.fd";
/// The directory of the TPM's state.
const TPM: &str = "tpm";

/// What images are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `vda.qcow2`, standing alone.
    Qcow2(Compression),
    /// `vda.raw`.
    Raw {
        /// Zeroes become holes.
        sparse: bool,
    },
}

impl Form {
    /// The format's name, which is also the suffix of the files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2(_) => "qcow2",
            Self::Raw { .. } => "raw",
        }
    }

    fn target(self, path: PathBuf) -> Target {
        match self {
            Self::Qcow2(compression) => Target::Qcow2 { path, compression },
            Self::Raw { sparse } => Target::Raw { path, sparse },
        }
    }
}

/// What is asked of the restoration of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointRequest {
    /// Where to: made when it is not there. Nothing in it is overwritten.
    pub directory: PathBuf,
    /// What images.
    pub form: Form,
    /// Only these disks; all of the point's where none is named.
    pub disks: Vec<String>,
    /// The domain's document, EFI variables and TPM state too.
    pub machine: bool,
    /// Another name for the machine.
    pub name: Option<String>,
    /// Another UUID: see [`RestoredAs::uuid`].
    pub uuid: Option<Uuid>,
}

/// What was restored of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoredPoint {
    /// The disks, in the point's order.
    pub disks: Vec<RestoredDisk>,
    /// The document of the restored machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<PathBuf>,
    /// Its EFI variables.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvram: Option<PathBuf>,
    /// The directory of its TPM's state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<PathBuf>,
    /// What the operator should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Restores disks of a point as new images in a directory, and the machine beside them: `vda.qcow2`, `nvram.fd`, `tpm/`, and last
/// `domain.xml`, which names them.
///
/// The point cannot be merged or pruned meanwhile. Each file appears when it is complete. When it fails, those before it stay, and the error names them.
///
/// # Errors
/// `NotFound` for a disk that the point does not have, or a point that is dropped by now; `AlreadyExists` before anything is written, when one of the names is
/// taken; `Broken` where the repository is not as it was written; `Busy` while the point's chain is being changed; those of
/// [`restore_disk`].
pub async fn restore_point(
    repository: &Repository,
    folder: &DomainFolder,
    point: &Manifest,
    request: &PointRequest,
    watcher: &dyn Watcher,
) -> Result<RestoredPoint> {
    let told = |error: Error| error.during("restore").with("point", &point.point);
    let _lock = repository.lock(folder, true).await.map_err(told)?;
    let point = &as_locked(repository, folder, point).await.map_err(told)?;
    let act = PointAct {
        repository,
        folder,
        point,
        request,
        watcher,
    };
    let mut restored = RestoredPoint {
        disks: Vec::new(),
        document: None,
        nvram: None,
        tpm: None,
        warnings: Vec::new(),
    };
    let done = act.run(&mut restored).await;
    match done {
        Ok(()) => Ok(restored),
        Err(error) => Err(told(with_complete(error, &restored.disks))),
    }
}

struct PointAct<'a> {
    repository: &'a Repository,
    folder: &'a DomainFolder,
    point: &'a Manifest,
    request: &'a PointRequest,
    watcher: &'a dyn Watcher,
}

impl PointAct<'_> {
    async fn run(&self, restored: &mut RestoredPoint) -> Result<()> {
        let disks = wanted(self.point, &self.request.disks)?;
        let machine = self.machine().await?;
        let directory = self.directory(&disks, machine.as_ref()).await?;
        let document = match &machine {
            Some(machine) => Some(self.document(machine, &disks, &directory, &mut restored.warnings)?),
            None => None,
        };
        for disk in disks {
            let path = directory.join(self.file_name(disk));
            let done = self.disk(disk, path).await?;
            self.warn(&done.restored.notes, restored);
            restored.disks.push(done);
        }
        if let Some(machine) = machine {
            self.firmware(&machine, &directory, restored).await?;
        }
        if let Some(document) = document {
            let path = directory.join(DOCUMENT);
            new_file(path.clone(), document.text().as_bytes().to_vec()).await?;
            restored.document = Some(path);
        }
        Ok(())
    }

    fn warn(&self, warnings: &[String], restored: &mut RestoredPoint) {
        for message in warnings {
            self.watcher.event(&Event::Warning { message });
            restored.warnings.push(message.clone());
        }
    }

    async fn machine(&self) -> Result<Option<SavedMachine>> {
        if !self.request.machine {
            return Ok(None);
        }
        let prefix = format!("{}/{}", self.folder.key, self.point.point);
        let store = &**self.repository.store();
        load_machine(store, &prefix, &self.point.machine).await.map(Some)
    }

    /// The directory, in which none of the names is taken.
    async fn directory(&self, disks: &[&DiskEntry], machine: Option<&SavedMachine>) -> Result<PathBuf> {
        let mut names: Vec<String> = disks.iter().map(|disk| self.file_name(disk)).collect();
        if let Some(machine) = machine {
            names.push(DOCUMENT.to_owned());
            names.extend(machine.nvram.as_ref().map(|_| NVRAM.to_owned()));
            names.extend((!machine.tpm.is_empty()).then(|| TPM.to_owned()));
        }
        let given = self.request.directory.clone();
        let work = tokio::task::spawn_blocking(move || {
            let failed = |e| Error::io("cannot make the directory", e).with("path", given.display());
            must_not_be_a_device(&given.join(DOCUMENT))?;
            let mut builder = DirBuilder::new();
            builder
                .mode(0o700)
                .recursive(true)
                .create(&given)
                .map_err(failed)?;
            let directory = given.canonicalize().map_err(failed)?;
            for name in names {
                must_be_free(&directory.join(name))?;
            }
            Ok(directory)
        });
        joined(work.await)?
    }

    fn file_name(&self, disk: &DiskEntry) -> String {
        format!("{}.{}", plain(&disk.target), self.request.form.name())
    }

    /// The document that names what will be in the directory.
    fn document(
        &self,
        machine: &SavedMachine,
        disks: &[&DiskEntry],
        directory: &Path,
        warnings: &mut Vec<String>,
    ) -> Result<DomainDocument> {
        let restored = disks.iter().map(|disk| xml::RestoredDisk {
            target: disk.target.clone(),
            source: Source::File {
                file: directory.join(self.file_name(disk)),
            },
            format: self.request.form.name().to_owned(),
        });
        let wanted = RestoredAs {
            disks: restored.collect(),
            efi_variables: machine.nvram.as_ref().map(|_| directory.join(NVRAM)),
            tpm: tpm_place(machine, &directory.join(TPM)),
            name: self.request.name.clone(),
            uuid: self.request.uuid,
        };
        let (document, told) = machine.document.restored(&wanted)?;
        for message in &told {
            self.watcher.event(&Event::Warning { message });
        }
        warnings.extend(told);
        Ok(document)
    }

    async fn disk(&self, disk: &DiskEntry, path: PathBuf) -> Result<RestoredDisk> {
        let target = &disk.target;
        let layers = self.repository.chain(self.folder, self.point, target).await?;
        let store = Arc::clone(self.repository.store());
        let chain = ChainReader::open(store, &layers).await?;
        let to = self.request.form.target(path.clone());
        let restored = restore_disk(chain, disk, &to, false, self.watcher).await?;
        Ok(RestoredDisk {
            target: target.clone(),
            place: path.display().to_string(),
            restored,
        })
    }

    async fn firmware(
        &self,
        machine: &SavedMachine,
        directory: &Path,
        restored: &mut RestoredPoint,
    ) -> Result<()> {
        if let Some(nvram) = &machine.nvram {
            let path = directory.join(NVRAM);
            new_file(path.clone(), nvram.clone()).await?;
            restored.nvram = Some(path);
        }
        if machine.tpm.is_empty() {
            return Ok(());
        }
        let path = directory.join(TPM);
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|e| Error::io("cannot make the directory", e).with("path", path.display()))?;
        for (name, bytes) in &machine.tpm {
            new_file(path.join(name), bytes.clone()).await?;
        }
        restored.tpm = Some(path);
        Ok(())
    }
}

/// The disks of a point that are wanted; all of them where none is named.
pub(super) fn wanted<'a>(point: &'a Manifest, named: &[String]) -> Result<Vec<&'a DiskEntry>> {
    for target in named {
        if point.disk(target).is_none() {
            let known: Vec<&str> = point.disks.iter().map(|disk| disk.target.as_str()).collect();
            let why = format!("the point has no disk '{target}'");
            return Err(
                Error::new(ErrorKind::NotFound, why).hint(format!("Its disks are: {}.", known.join(", ")))
            );
        }
    }
    let all = point.disks.iter();
    Ok(all
        .filter(|disk| named.is_empty() || named.contains(&disk.target))
        .collect())
}

/// Where the restored state of a TPM is: in files of a directory, or in the one file that it was.
fn tpm_place(machine: &SavedMachine, directory: &Path) -> Option<TpmPlace> {
    match machine.tpm.as_slice() {
        [] => None,
        [(name, _)] if name == crate::machine::TPM_FILE => Some(TpmPlace::File(directory.join(name))),
        _ => Some(TpmPlace::Directory(directory.to_owned())),
    }
}

/// A disk's target as part of a file's name, whatever a manifest says.
fn plain(target: &str) -> String {
    let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
    target.chars().map(|c| if kept(c) { c } else { '_' }).collect()
}

async fn new_file(path: PathBuf, bytes: Vec<u8>) -> Result<()> {
    let work = tokio::task::spawn_blocking(move || write_new(&path, &bytes));
    joined(work.await)?
}
