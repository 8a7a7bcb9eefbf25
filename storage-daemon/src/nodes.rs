//! From an image's record to QEMU's block nodes: every layer by the record, and nothing that a header names.

use disksnap_core::{BackingStore, Command, Error, ErrorKind, Image, Result, Source};
use disksnap_hypervisor::Session;
use disksnap_image_file::{FileInImage, opened, unknown_format};
use serde_json::{Value, json};

/// The arguments of `blockdev-add` for an image, its layers nested in it.
///
/// # Errors
/// `NotFound` for a layer that is missing, `Unsupported` for one that the record alone does not open, `Broken` for one
/// that needs a layer which the record does not have.
pub(crate) fn of(name: &str, image: &Image) -> Result<Value> {
    let mut files = vec![file(&image.source, Some(&image.format))?];
    let mut next = image.backing.as_deref();
    while let Some(BackingStore {
        format,
        source,
        backing,
        ..
    }) = next
    {
        files.push(file(source, format.as_deref())?);
        next = backing.as_deref();
    }
    opened(&files, |n| Some(layer_name(name, n)))
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

/// All nodes that the daemon has, as QEMU's `query-named-block-nodes` tells them.
pub(crate) async fn all(session: &Session) -> Result<Vec<Value>> {
    let ask = Command::new("query-named-block-nodes", json!({ "flat": true }));
    match session.execute(ask).await? {
        Value::Array(nodes) => Ok(nodes),
        _ => Err(Error::new(
            ErrorKind::Protocol,
            "the monitor's list of nodes is not a list",
        )),
    }
}

fn file(source: &Source, format: Option<&str>) -> Result<FileInImage> {
    let (Source::File { file: path } | Source::Block { dev: path }) = source else {
        let what = format!("a source of the type {} is not served from here", source.kind());
        return Err(Error::new(ErrorKind::Unsupported, what)
            .with("image", source)
            .hint("Open the snapshot's backupSource with a program that knows it."));
    };
    let format = format.ok_or_else(|| unknown_format("(not recorded)").with("image", source))?;
    Ok(FileInImage {
        path: path.clone(),
        format: format.to_owned(),
    })
}
