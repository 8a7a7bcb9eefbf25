//! From an image's record to QEMU's block nodes: every layer by the record, and nothing that a header names.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use disksnap_core::{BackingStore, Error, ErrorKind, Image, Result, Source};
use disksnap_image_file::Qcow2;
use serde_json::{Value, json};

/// More layers than anyone has.
const DEEPEST: usize = 64;

/// The arguments of `blockdev-add` for an image, its layers nested in it.
///
/// Image locking is off: the hypervisor may have the lower layers open, and nobody writes to what is opened here.
///
/// # Errors
/// `NotFound` for a layer that is missing, `Unsupported` for one that the record alone does not open, `Broken` for one
/// that needs a layer which the record does not have.
pub(crate) fn of(name: &str, image: &Image) -> Result<Value> {
    let mut layers = vec![(&image.source, Some(image.format.as_str()))];
    let mut next = image.backing.as_deref();
    while let Some(BackingStore {
        format,
        source,
        backing,
    }) = next
    {
        layers.push((source, format.as_deref()));
        next = backing.as_deref();
        if layers.len() > DEEPEST {
            let what = format!("the image has more than {DEEPEST} layers");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
    }
    let mut below = None;
    for (n, (source, format)) in layers.iter().enumerate().rev() {
        let mut made = layer(source, *format, below.as_ref()).map_err(|error| error.with("image", source))?;
        made["node-name"] = layer_name(name, n).into();
        below = Some(made);
    }
    Ok(below.unwrap_or_default())
}

/// The name of a layer's node; the top one's is the image's.
fn layer_name(name: &str, n: usize) -> String {
    if n == 0 {
        name.to_owned()
    } else {
        format!("{name}-{n}")
    }
}

/// Whether a node is a layer of this image.
pub(crate) fn is_layer_of(node: &str, name: &str) -> bool {
    let rest = node.strip_prefix(name);
    let number = |rest: &str| rest.strip_prefix('-').is_some_and(|n| n.parse::<usize>().is_ok());
    rest.is_some_and(|rest| rest.is_empty() || number(rest))
}

fn layer(source: &Source, format: Option<&str>, below: Option<&Value>) -> Result<Value> {
    let (path, driver) = match source {
        Source::File { file } => (file, "file"),
        Source::Block { dev } => (dev, "host_device"),
        other => {
            let what = format!("a source of the type {} is not served from here", other.kind());
            return Err(Error::new(ErrorKind::Unsupported, what)
                .hint("Open the snapshot's backupSource with a program that knows it."));
        }
    };
    let header = look(path, format)?;
    let name = path
        .to_str()
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "the path of an image must be UTF-8"))?;
    let file = json!({"driver": driver, "filename": name, "read-only": true, "auto-read-only": false,
        "locking": "off"});
    match (format, header) {
        (Some("raw"), _) if below.is_some() => Err(Error::new(
            ErrorKind::Invalid,
            "a raw image has no layers below, and the record names one",
        )),
        (Some("raw"), _) => Ok(json!({"driver": "raw", "read-only": true, "file": file})),
        (_, Some(header)) => {
            check(&header, below.is_some())?;
            Ok(json!({"driver": "qcow2", "read-only": true, "file": file, "backing": below}))
        }
        _ => {
            let format = format.unwrap_or("(not recorded)");
            Err(Error::new(
                ErrorKind::Unsupported,
                format!("images of the format {format} are not served"),
            )
            .hint("Only raw and qcow2 are known to name no files by themselves that are not in the record."))
        }
    }
}

/// The header of a qcow2 layer. What is no file and no device is not even opened: it could wait, or do things.
fn look(path: &Path, format: Option<&str>) -> Result<Option<Qcow2>> {
    let failed = |e| Error::io("cannot open the image", e);
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "the image is neither a file nor a block device",
        ));
    }
    if format != Some("qcow2") {
        return Ok(None);
    }
    let file = File::open(path).map_err(failed)?;
    Qcow2::read(&file).map(Some).map_err(failed)
}

fn check(header: &Qcow2, has_below: bool) -> Result<()> {
    if header.external_data {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the image keeps its data in another file, which the record does not name",
        ));
    }
    match &header.backing {
        Some(name) if !has_below => {
            let what = format!(
                "the image's header names the backing file {name:?}, and the snapshot's record has none: it would be \
                 read without it"
            );
            Err(Error::new(ErrorKind::Broken, what).hint("Delete the snapshot, and take a new one."))
        }
        _ => Ok(()),
    }
}
