//! What the headers of a disk's images name, and what the domain's document says of it.
//!
//! Whoever could write an image wrote its header, which can name any file of this host. So with the domain off it is the document
//! that decides: what only a header names is told, and not opened. (Of a domain that runs, the hypervisor has the images open
//! already.) Looking at what a header names goes as far as that file's own header.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::iter::successors;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use disksnap_core::{BackingStore, DataStore, Disk, ErrorKind, Source};
use rustix::fs::OFlags;

use crate::{Qcow2, Unfit, export, named};

/// More layers than anyone has; a header is not trusted to end the chain.
const DEEPEST: usize = 64;

/// Checks a disk of a domain that is off: what the headers of its images name must be what the document says, too. A file that is
/// not there is left to whoever needs it, and so is what the document says beyond the headers.
///
/// # Errors
/// `Invalid`, with all that the headers name and what to do, for a file that the document does not name; `Unsupported` for a backing
/// file whose format the header does not say or says otherwise: a program that goes by it would guess. What else keeps an image
/// from being looked at.
pub fn check_said(disk: &Disk) -> Result<(), Unfit> {
    let Some(source) = &disk.source else { return Ok(()) };
    let below: Vec<&BackingStore> =
        successors(disk.backing.as_ref(), |layer| layer.backing.as_deref()).collect();
    let top = (source, disk.data_store.as_ref());
    let layers = below
        .iter()
        .map(|layer| (&layer.source, layer.data_store.as_ref()));
    let said = below.iter().map(|layer| layer.format.clone());
    // Where the document leaves a layer's format out, the header above says what it will be read as.
    let mut formats: Vec<Option<String>> = std::iter::once(disk.driver.format.clone()).chain(said).collect();
    for (n, (source, data)) in std::iter::once(top).chain(layers).enumerate() {
        let Some(path) = source.path().filter(|_| formats[n].as_deref() == Some("qcow2")) else {
            continue;
        };
        let header = match header_of(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            header => header.map_err(|error| unread(path, &error))?,
        };
        check_data(disk, path, &header, data)?;
        if let Some(next) = named_below(disk, path, &header, &below[n..])? {
            let by_header = header.backing_format.as_deref().map(plain_format);
            let format = &mut formats[n + 1 + next];
            check_format(path, &header, format.as_deref())?;
            *format = format.take().or(by_header.map(str::to_owned));
        }
    }
    Ok(())
}

fn check_data(disk: &Disk, image: &Path, header: &Qcow2, said: Option<&DataStore>) -> Result<(), Unfit> {
    if !header.external_data {
        return Ok(());
    }
    let name = header.data_file.as_deref().unwrap_or_default();
    match said {
        Some(said) if leads_to(image, name, &said.source) => Ok(()),
        _ => Err(unsaid(
            disk,
            &format!(
                "the header of {} names the file {name:?} for its data",
                image.display()
            ),
        )),
    }
}

/// Which of the layers below it the header of an image names, if it names one.
fn named_below(
    disk: &Disk,
    image: &Path,
    header: &Qcow2,
    below: &[&BackingStore],
) -> Result<Option<usize>, Unfit> {
    let Some(name) = &header.backing else {
        return Ok(None);
    };
    let said = below
        .iter()
        .position(|layer| leads_to(image, name, &layer.source));
    match said {
        None => Err(unsaid(
            disk,
            &format!(
                "the header of {} names the backing file {name:?}",
                image.display()
            ),
        )),
        found => Ok(found),
    }
}

fn check_format(image: &Path, header: &Qcow2, said: Option<&str>) -> Result<(), Unfit> {
    let name = header.backing.as_deref().unwrap_or_default();
    match (header.backing_format.as_deref().map(plain_format), said) {
        (None, _) if export::uri_of(Path::new(name)).is_none() => Err(no_format(image, name).into()),
        // The other way round nothing that is in the file is followed.
        (Some("qcow2"), Some("raw")) => Err(format!(
            "the header of {} says that its backing file {name:?} is qcow2, and the domain's document that it is raw",
            image.display()
        )
        .into()),
        _ => Ok(()),
    }
}

/// A job writes the driver below it: where a raw image is open without a format, that of its file.
fn plain_format(format: &str) -> &str {
    match format {
        "file" | "host_device" | "nbd" => "raw",
        other => other,
    }
}

fn no_format(image: &Path, name: &str) -> String {
    format!(
        "the header of {} does not say the format of its backing file {name:?}, and none is guessed from what is in it; \
         write it there with `qemu-img rebase -u -F FORMAT -b FILE IMAGE`",
        image.display()
    )
}

fn unread(path: &Path, error: &io::Error) -> Unfit {
    Unfit {
        kind: match error.kind() {
            io::ErrorKind::InvalidData => ErrorKind::Unsupported,
            _ => ErrorKind::of_io(error),
        },
        why: format!("cannot read {}: {error}", path.display()),
    }
}

fn unsaid(disk: &Disk, what: &str) -> Unfit {
    let all = ByHeaders::of(disk);
    Unfit {
        kind: ErrorKind::Invalid,
        why: format!(
            "{what}, and the domain's document does not: whoever made the image could name any file of this host. By the headers \
             the disk is {all}. If all of that belongs to it, `disksnap domain update --chain` writes it into the document as \
             <backingStore>"
        ),
    }
}

/// Whether a name in the header of `image` is this source.
fn leads_to(image: &Path, name: &str, source: &Source) -> bool {
    if let Some(uri) = export::uri_of(Path::new(name)) {
        return export::uri(source).is_ok_and(|said| said == uri);
    }
    let (Some(named), Some(said)) = (named(image, name), source.path()) else {
        return false;
    };
    let real = |path: &Path| path.canonicalize().ok();
    named == said
        || real(&named)
            .zip(real(said))
            .is_some_and(|(one, other)| one == other)
}

/// The header of an image. What is neither a file nor a block device is not opened: it could wait, or do things.
fn header_of(path: &Path) -> io::Result<Qcow2> {
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is neither a file nor a block device",
        ));
    }
    Qcow2::read(&open(path)?)
}

/// Without waiting, should it have become something else just now.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// The layers of a disk as the headers of its images name them: for telling, and for an operator to trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByHeaders {
    /// Where the top image keeps the data when not in itself.
    pub data_store: Option<DataStore>,
    /// The layers below it, nearest first; each without those below it.
    pub below: Vec<BackingStore>,
    /// Why the headers cannot be followed to the end, if they cannot.
    pub stopped: Option<String>,
    top: String,
}

impl ByHeaders {
    /// Looks at the headers, from the top image on.
    #[must_use]
    pub fn of(disk: &Disk) -> Self {
        let path = disk.source.as_ref().and_then(Source::path);
        let mut found = Self {
            data_store: None,
            below: Vec::new(),
            stopped: None,
            top: path.map_or_else(String::new, |path| path.display().to_string()),
        };
        let mut next = path
            .filter(|_| disk.driver.format.as_deref() == Some("qcow2"))
            .map(Path::to_owned);
        while let Some(path) = next {
            next = found.follow(&path).unwrap_or_else(|why| {
                found.stopped = Some(why);
                None
            });
        }
        found
    }

    /// Takes in what the header of this image names; the image that is looked at next.
    fn follow(&mut self, image: &Path) -> Result<Option<PathBuf>, String> {
        let header = header_of(image).map_err(|error| format!("cannot read {}: {error}", image.display()))?;
        if header.external_data {
            let name = header.data_file.as_deref().unwrap_or_default();
            let data = Some(DataStore {
                format: Some("raw".to_owned()),
                source: source_of(image, name)?,
            });
            match self.below.last_mut() {
                Some(layer) => layer.data_store = data,
                None => self.data_store = data,
            }
        }
        let Some(name) = header.backing else {
            return Ok(None);
        };
        if self.below.len() >= DEEPEST {
            return Err(format!("there are more than {DEEPEST} layers"));
        }
        let source = source_of(image, &name)?;
        let format = match header.backing_format.as_deref().map(plain_format) {
            Some(format) => format.to_owned(),
            None if source.path().is_none() => "raw".to_owned(),
            None => return Err(no_format(image, &name)),
        };
        let next = source.path().filter(|_| format == "qcow2").map(Path::to_owned);
        self.below.push(BackingStore {
            format: Some(format),
            source,
            data_store: None,
            backing: None,
        });
        Ok(next)
    }
}

/// What a name in the header of `image` means.
fn source_of(image: &Path, name: &str) -> Result<Source, String> {
    if let Some(uri) = export::uri_of(Path::new(name)) {
        return Ok(export::source(&uri));
    }
    let odd = || {
        format!(
            "the header of {} names {name:?}, which is neither a file nor a block device",
            image.display()
        )
    };
    let path = named(image, name)
        .filter(|path| !name.is_empty() && path.is_absolute())
        .ok_or_else(odd)?;
    let device = path
        .metadata()
        .is_ok_and(|found| found.file_type().is_block_device());
    Ok(if device {
        Source::Block { dev: path }
    } else {
        Source::File { file: path }
    })
}

impl std::fmt::Display for ByHeaders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = self.top.clone();
        let with_data = |text: &mut String, data: &Option<DataStore>| {
            if let Some(data) = data {
                // A string takes whatever is written to it.
                let _ = write!(text, " with its data in {}", data.source);
            }
        };
        with_data(&mut text, &self.data_store);
        for layer in &self.below {
            let format = layer.format.as_deref().unwrap_or("?");
            let _ = write!(text, " on {} ({format})", layer.source);
            with_data(&mut text, &layer.data_store);
        }
        match &self.stopped {
            Some(why) => write!(f, "{text}, and on what cannot be told: {why}"),
            None => f.write_str(&text),
        }
    }
}
