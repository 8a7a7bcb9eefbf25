//! One layer of a disk's chain of images, as it lies on this host, and the chain of a domain that is off.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use disksnap_core::{BackingStore, DataStore, Disk, Error, ErrorKind, Result, Source};
use disksnap_hypervisor::graph::same_file;
use disksnap_image_file::{Qcow2, check_said, plain};
use disksnap_nbd::Uri;
use serde::{Deserialize, Serialize};

use crate::remote;

/// More layers than anyone has; a header is not trusted to end the chain.
const DEEPEST: usize = 200;

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// A file or a block device; or the URI of an NBD export.
    pub(crate) path: PathBuf,
    /// `raw` or `qcow2`.
    pub(crate) format: String,
    /// The file that a qcow2 image keeps the guest's data in, where that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<PathBuf>,
}

impl Layer {
    pub(crate) fn new(path: impl Into<PathBuf>, format: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            format: format.into(),
            data: None,
        }
    }

    /// A layer as a document names it.
    ///
    /// # Errors
    /// Why the header of an overlay cannot name it.
    fn of(source: &Source, format: String) -> std::result::Result<Self, String> {
        match source {
            Source::File { file: path } | Source::Block { dev: path } => {
                if !path.is_absolute() {
                    return Err(format!("the path {} is not absolute", path.display()));
                }
                Ok(Self::new(path, format))
            }
            other => Ok(Self::new(remote::uri(other)?.to_string(), format)),
        }
    }

    /// Where it is, if it is an NBD export.
    pub(crate) fn remote(&self) -> Option<Uri> {
        remote::uri_of(&self.path)
    }

    /// As the domain's document names it.
    pub(crate) fn source(&self) -> Source {
        if let Some(uri) = self.remote() {
            return remote::source(&uri);
        }
        let path = self.path.clone();
        if is_device(&path) || path.starts_with("/dev") && !path.starts_with("/dev/shm") {
            Source::Block { dev: path }
        } else {
            Source::File { file: path }
        }
    }

    /// Where its data is, as the domain's document names it.
    fn data_store(&self) -> Option<DataStore> {
        self.data.as_ref().map(|data| DataStore {
            format: Some("raw".to_owned()),
            source: Self::new(data.clone(), "raw").source(),
        })
    }

    /// What the header of an overlay at `overlay` calls it: relative where both are in one directory, so that they
    /// can be moved, or be in one snapshot of a file system, together.
    pub(crate) fn name_from(&self, overlay: &Path) -> String {
        let name = self.path.file_name().and_then(|name| name.to_str());
        match name {
            // QEMU takes what stands before a colon for a protocol.
            Some(name) if overlay.parent() == self.path.parent() && !name.contains(':') => name.to_owned(),
            _ => self.path.to_string_lossy().into_owned(),
        }
    }

    /// Whether it is the file at this path.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        same_file(&self.path, path)
    }
}

/// `<backingStore>` for these layers, nearest first.
pub(crate) fn backing_store(layers: &[Layer]) -> Option<Box<BackingStore>> {
    let (first, rest) = layers.split_first()?;
    Some(Box::new(BackingStore {
        format: Some(first.format.clone()),
        source: first.source(),
        data_store: first.data_store(),
        backing: backing_store(rest),
    }))
}

/// The disk with these layers, the top image first; all else as in `template`.
pub(crate) fn disk_of(template: &Disk, layers: &[Layer]) -> Disk {
    let mut disk = template.clone();
    if let Some((top, below)) = layers.split_first() {
        let same = disk.source == Some(top.source()) && disk.data_store.is_some();
        if !same {
            disk.data_store = top.data_store();
        }
        disk.source = Some(top.source());
        disk.driver.format = Some(top.format.clone());
        disk.backing = backing_store(below).map(|store| *store);
    }
    disk
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// The virtual size in bytes, in whole sectors as QEMU counts them.
///
/// # Errors
/// Why the image cannot be a base.
pub(crate) fn size_of(layer: &Layer) -> std::result::Result<u64, String> {
    let failed = |e| format!("cannot read {}: {e}", layer.path.display());
    let mut file = File::open(&layer.path).map_err(failed)?;
    let size = if layer.format == "qcow2" {
        let header = Qcow2::read(&file).map_err(failed)?;
        sound(&layer.path, &header)?;
        header.size
    } else {
        file.seek(SeekFrom::End(0)).map_err(failed)?
    };
    Ok(size.next_multiple_of(512))
}

/// Whether a hypervisor has the image open although the domain is said to be off: QEMU locks what it opens.
///
/// Nothing is said of an image that this process may not write to.
pub(crate) fn is_in_use(path: &Path) -> bool {
    use rustix::fs::{FlockOperation, fcntl_lock};
    let Ok(file) = fs::OpenOptions::new().read(true).write(true).open(path) else {
        return false;
    };
    let locked = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
    matches!(locked, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS))
}

/// The error where it is.
pub(crate) fn in_use(path: &Path) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "the domain is taken to be off, and somebody has its image {} open",
            path.display()
        ),
    )
    .hint("If the domain runs, say where its monitor is: --monitor, or the <metadata> of its document.")
}

fn sound(path: &Path, header: &Qcow2) -> std::result::Result<(), String> {
    if header.corrupt {
        return Err(format!(
            "QEMU has marked {} as corrupt; mend it with `qemu-img check -r all`",
            path.display()
        ));
    }
    Ok(())
}

/// The chain of a disk of a domain that is off, the top image first: as the document says. Ends where a file is not there.
///
/// # Errors
/// Those of [`check_said`]: nothing is opened that only a header names. `Unsupported`, with the reason, where the chain cannot be told.
pub(crate) fn chain_of(disk: &Disk) -> Result<Vec<Layer>> {
    check_said(disk)?;
    said_chain(disk).map_err(unfit)
}

fn said_chain(disk: &Disk) -> std::result::Result<Vec<Layer>, String> {
    let source = disk.source.as_ref().ok_or("the drive is empty")?;
    let Some(format) = disk.driver.format.clone() else {
        return Err("the domain's document does not say the image's format".to_owned());
    };
    let mut chain = vec![known(Layer::of(source, format)?)?];
    let mut said = disk.backing.as_ref();
    while let Some(BackingStore {
        format,
        source,
        backing,
        ..
    }) = said
    {
        let format = format
            .clone()
            .ok_or_else(|| format!("the domain's document does not say the format of {source}"))?;
        if source.path().is_some_and(|path| !path.exists()) {
            // It was merged since the document was read: the header above it was brought up to date, and says which of those
            // that the document names is below it now.
            break;
        }
        chain.push(known(Layer::of(source, format)?)?);
        said = backing.as_deref();
    }
    while let Some(below) = chain.last().map(below_by_header).transpose()?.flatten() {
        if chain.len() >= DEEPEST {
            return Err(format!("the image has more than {DEEPEST} layers"));
        }
        chain.push(known(below)?);
    }
    Ok(chain)
}

fn known(mut layer: Layer) -> std::result::Result<Layer, String> {
    match layer.format.as_str() {
        "raw" => Ok(layer),
        "qcow2" if layer.remote().is_some() => Err(format!(
            "{} is a qcow2 image in an NBD export, and with the domain off its header cannot be looked at",
            layer.path.display()
        )),
        "qcow2" => {
            let header = header_of(&layer)?;
            layer.data = header
                .map(|header| data_file(&layer.path, &header))
                .transpose()?
                .flatten();
            Ok(layer)
        }
        other => Err(format!("{} has the format {other}", layer.path.display())),
    }
}

/// The layer that an image's header names.
pub(crate) fn below_by_header(layer: &Layer) -> std::result::Result<Option<Layer>, String> {
    let Some(header) = header_of(layer)? else {
        return Ok(None);
    };
    let Some(name) = header.backing else {
        return Ok(None);
    };
    if let Some(uri) = remote::uri_of(Path::new(&name)) {
        let format = header.backing_format.unwrap_or_else(|| "raw".to_owned());
        return Ok(Some(Layer::new(uri.to_string(), format.replace("nbd", "raw"))));
    }
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(format!(
            "the header of {} names the backing file {name:?}, which is neither a file nor a block device",
            layer.path.display()
        ));
    }
    let format = header.backing_format.ok_or_else(|| {
        format!(
            "the header of {} does not say the format of its backing file",
            layer.path.display()
        )
    })?;
    // A job writes the driver below it: where a raw image is open without a format, that of its file.
    let format = match format.as_str() {
        "file" | "host_device" => "raw".to_owned(),
        _ => format,
    };
    let path = layer.path.parent().unwrap_or(Path::new("/")).join(name);
    Ok(Some(Layer::new(plain(&path), format)))
}

/// The header of a qcow2 image on this host; `None` where it is none, or is not there.
fn header_of(layer: &Layer) -> std::result::Result<Option<Qcow2>, String> {
    if layer.format != "qcow2" || layer.remote().is_some() {
        return Ok(None);
    }
    let failed = |e| format!("cannot read {}: {e}", layer.path.display());
    let file = match File::open(&layer.path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    Qcow2::read(&file).map(Some).map_err(failed)
}

/// The file that an image keeps the guest's data in, as its header names it.
fn data_file(image: &Path, header: &Qcow2) -> std::result::Result<Option<PathBuf>, String> {
    if !header.external_data {
        return Ok(None);
    }
    let strange = || format!("the header of {} does not say where its data is", image.display());
    let name = header.data_file.as_ref().ok_or_else(strange)?;
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(format!("{}: it says {name:?}", strange()));
    }
    Ok(Some(plain(&image.parent().unwrap_or(Path::new("/")).join(name))))
}

/// Whether QEMU encrypts what is written to this image of a domain that is off, as its header says.
pub(crate) fn is_encrypted(layer: &Layer) -> std::result::Result<bool, String> {
    Ok(header_of(layer)?.is_some_and(|header| header.encrypted))
}

/// The data file of an image that a hypervisor has open, which has to be the one that its header names: whoever opens the
/// image by itself finds that one.
///
/// # Errors
/// Why it cannot be told, or which two there are.
pub(crate) fn same_data(layer: &Layer, open: &Path) -> std::result::Result<PathBuf, String> {
    let header = header_of(layer)?;
    let named = header
        .map(|header| data_file(&layer.path, &header))
        .transpose()?
        .flatten();
    match named {
        Some(named) if same_file(&named, open) => Ok(named),
        named => Err(format!(
            "its image {} keeps its data in {}, and its header says {}: other programs would read other data",
            layer.path.display(),
            open.display(),
            named.map_or_else(
                || "nothing of that".to_owned(),
                |named| named.display().to_string()
            )
        )),
    }
}

/// What tells whether a file was written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Bytes of the file.
    len: u64,
    /// When it was last written to, in nanoseconds since 1970; `None` where QEMU still had reason to write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    modified: Option<i64>,
}

impl Stamp {
    /// The stamp of a file; `None` for a device or an export, which tell nothing.
    pub(crate) fn of(path: &Path) -> Result<Option<Self>> {
        if remote::uri_of(path).is_some() {
            return Ok(None);
        }
        let metadata =
            fs::metadata(path).map_err(|e| Error::io(format!("cannot look at {}", path.display()), e))?;
        if !metadata.is_file() {
            return Ok(None);
        }
        let modified = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(Some(Self {
            len: metadata.len(),
            modified: modified.and_then(|since| i64::try_from(since.as_nanos()).ok()),
        }))
    }

    /// The same, saying as little of the time as another of the same file.
    pub(crate) fn like(self, other: Option<&Self>) -> Self {
        match other {
            Some(Self { modified: None, .. }) => self.timeless(),
            _ => self,
        }
    }

    /// The same, saying nothing of the time.
    pub(crate) fn timeless(mut self) -> Self {
        self.modified = None;
        self
    }

    /// Why the file at this path is not what it was, if it is not.
    pub(crate) fn differs(&self, path: &Path) -> Result<Option<String>> {
        let now = Self::of(path)?;
        let Some(now) = now else {
            return Ok(Some(format!("{} is no file any more", path.display())));
        };
        if now.len != self.len && self.modified.is_some() {
            return Ok(Some(format!(
                "{} was {} bytes long and is {} bytes long now: something has written to it",
                path.display(),
                self.len,
                now.len
            )));
        }
        Ok(
            (self.modified.is_some() && now.modified != self.modified).then(|| {
                format!(
                    "{} has been modified since: something has written to it, or has begun to merge into it",
                    path.display()
                )
            }),
        )
    }
}

/// The error of a disk that does not suit as it is.
pub(crate) fn unfit(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, why)
}
