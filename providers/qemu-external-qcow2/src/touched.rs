//! Overlays that a stream writes to although snapshots are read from them: it changes the file and not what is read.
//!
//! A snapshot knows by its stamp whether somebody has written to its image. While data is streamed into that image, and
//! when a stream was cancelled or killed, the stamp is another and the content the same; a small file beside the image
//! says so: which stamps it had before, and which when the stream had ended.

use std::path::{Path, PathBuf};

use disksnap_core::{Error, Result, faults};
use disksnap_image_file::remove_file;
use serde::{Deserialize, Serialize};

use crate::layer::Stamp;
use crate::record::written;

/// What is written beside the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Touched {
    /// As it was before each stream: a snapshot may have any of these stamps.
    from: Vec<Stamp>,
    /// As the last one left it; `None` while one goes on.
    to: Option<Stamp>,
}

fn mark_of(image: &Path) -> PathBuf {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    image.with_file_name(format!(".{name}.disksnap-streamed"))
}

fn read(image: &Path) -> Option<Touched> {
    let text = std::fs::read_to_string(mark_of(image)).ok()?;
    serde_json::from_str(&text).ok()
}

/// Whole or not at all: a kill must not take the knowledge of the former stamp along.
fn write(image: &Path, touched: &Touched) -> Result<()> {
    let path = mark_of(image);
    let new = path.with_extension("disksnap-streamed-new");
    let text = written(touched)?.to_string();
    let put = faults::around("file", "write mark", || std::fs::write(&new, text))
        .and_then(|()| faults::around("file", "rename mark", || std::fs::rename(&new, &path)));
    put.map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

/// Before a stream into this image begins. Idempotent.
pub(crate) fn begin(image: &Path) -> Result<()> {
    let Some(now) = Stamp::of(image)? else {
        return Ok(());
    };
    let mut from = match read(image) {
        Some(Touched { from, to }) if to.is_none() || to.as_ref() == Some(&now) => from,
        _ => Vec::new(),
    };
    if !from.contains(&now) {
        from.push(now);
    }
    write(image, &Touched { from, to: None })
}

/// After a stream into this image has ended, well or badly. Idempotent.
pub(crate) fn end(image: &Path) -> Result<()> {
    let Some(Touched { from, to: None }) = read(image) else {
        return Ok(());
    };
    let to = Stamp::of(image)?;
    write(image, &Touched { from, to })
}

/// Whether an image that had this stamp once was written to by nothing but streams.
pub(crate) fn only_streamed(image: &Path, stamp: &Stamp) -> Result<bool> {
    let Some(Touched { to, .. }) = read(image).filter(|touched| touched.from.contains(stamp)) else {
        return Ok(false);
    };
    Ok(to.is_none() || to == Stamp::of(image)?)
}

/// The stamp that an image with this one has now, as far as only streams have written to it.
pub(crate) fn renewed(image: &Path, stamp: Option<Stamp>) -> Result<Option<Stamp>> {
    match stamp {
        Some(stamp) if only_streamed(image, &stamp)? => Stamp::of(image),
        stamp => Ok(stamp),
    }
}

/// When nobody has the former stamp any more. Idempotent.
pub(crate) fn forget(image: &Path) -> Result<()> {
    remove_file(&mark_of(image))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn stamp(image: &Path) -> Stamp {
        Stamp::of(image).unwrap().unwrap()
    }

    #[test]
    fn what_a_stream_writes_is_told_from_what_others_write() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, "1").unwrap();
        let first = stamp(&image);
        assert!(!only_streamed(&image, &first).unwrap(), "nothing was streamed");
        begin(&image).unwrap();
        std::fs::write(&image, "12").unwrap();
        assert!(only_streamed(&image, &first).unwrap(), "while it goes on");
        end(&image).unwrap();
        end(&image).unwrap();
        assert!(only_streamed(&image, &first).unwrap(), "after its end");
        // A second attempt, killed.
        begin(&image).unwrap();
        std::fs::write(&image, "123").unwrap();
        begin(&image).unwrap();
        std::fs::write(&image, "1234").unwrap();
        end(&image).unwrap();
        assert!(only_streamed(&image, &first).unwrap());
        let renewed_stamp = renewed(&image, Some(first.clone())).unwrap();
        assert_eq!(renewed_stamp, Some(stamp(&image)));
        std::fs::write(&image, "12345").unwrap();
        assert!(!only_streamed(&image, &first).unwrap(), "somebody else wrote");
        assert_eq!(renewed(&image, Some(first.clone())).unwrap(), Some(first));
        forget(&image).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
