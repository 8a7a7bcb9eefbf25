//! Merging with the domain off: `qemu-img`, and a mark that says when it has done its work.

use std::path::{Path, PathBuf};

use disksnap_core::{Error, Progress, Result, faults};
use disksnap_image_file::remove_file;

use crate::layer::{Layer, Stamp};
use crate::off_bitmaps::{Bitmap, bitmaps_of, change};
use crate::qemu_img;
use crate::record::{Record, written};

/// The file that says that an overlay is merged: it holds the overlay's stamp at that time, so that it is worth
/// nothing once somebody has written to the overlay again.
fn mark_of(overlay: &Path) -> PathBuf {
    let name = overlay.file_name().unwrap_or_default().to_string_lossy();
    overlay.with_file_name(format!(".{name}.disksnap-merged"))
}

/// Ready until the overlay is merged; finished then, and when it is gone.
pub(super) fn progress(record: &Record) -> Result<Progress> {
    let Some(overlay) = record.overlay.as_ref().filter(|overlay| overlay.exists()) else {
        return Ok(Progress::Finished);
    };
    Ok(if is_marked(overlay)? {
        Progress::Finished
    } else {
        Progress::Ready
    })
}

/// Commits the overlay, unites the bitmaps, and leads what stands on the overlay to the base. Idempotent.
pub(super) async fn finish(record: &Record, layers: &[Layer], at: usize) -> Result<()> {
    if progress(record)? == Progress::Finished {
        return Ok(());
    }
    let chain = &layers[at..];
    let [overlay, base, ..] = chain else {
        return Err(crate::layer::unfit("the overlay has no backing image"));
    };
    let carried = bitmaps_of(overlay).await?;
    let known = bitmaps_of(base).await?;
    let continued = |bitmap: &&Bitmap| carried.iter().any(|b| b.name == bitmap.name);
    for bitmap in known.iter().filter(continued) {
        // It must not record what the commit writes.
        change(base, &["--disable"], bitmap, None).await?;
    }
    qemu_img::run(qemu_img::commit(chain)).await?;
    for bitmap in carried.iter().filter(|_| base.format == "qcow2") {
        if !known.iter().any(|b| b.name == bitmap.name) {
            change(base, &["--add", "--disable"], bitmap, None).await?;
        }
        change(base, &["--merge"], bitmap, Some(overlay)).await?;
        let recording = if bitmap.recording() {
            "--enable"
        } else {
            "--disable"
        };
        change(base, &[recording], bitmap, None).await?;
    }
    if let Some(child) = at.checked_sub(1).and_then(|above| layers.get(above)) {
        qemu_img::name_below(child, Some(base)).await?;
    }
    mark(&overlay.path)
}

/// Whether the mark says that this overlay is merged, as it is now.
pub(super) fn is_marked(overlay: &Path) -> Result<bool> {
    let text = std::fs::read_to_string(mark_of(overlay)).ok();
    let marked: Option<Stamp> = text.and_then(|text| serde_json::from_str(&text).ok());
    Ok(marked.is_some() && overlay.exists() && marked == Stamp::of(overlay)?)
}

/// Says so: of an overlay that nobody writes to any more.
pub(super) fn mark(overlay: &Path) -> Result<()> {
    let path = mark_of(overlay);
    let text = written(&Stamp::of(overlay)?)?.to_string();
    faults::around("file", "write mark", || std::fs::write(&path, text))
        .map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

/// Removes the mark. Idempotent.
pub(super) fn unmark(overlay: &Path) -> Result<()> {
    remove_file(&mark_of(overlay))
}
