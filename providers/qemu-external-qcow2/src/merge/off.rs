//! Merging with the domain off: `qemu-img`, and a mark that says when it has done its work.

use std::path::{Path, PathBuf};

use disksnap_core::{Error, Progress, Result};
use disksnap_image_file::remove_file;
use serde::Deserialize;

use crate::layer::{Layer, Stamp};
use crate::qemu_img;
use crate::record::{Record, remembered, written};

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
    let text = std::fs::read_to_string(mark_of(overlay)).ok();
    let marked: Option<Stamp> = text.and_then(|text| serde_json::from_str(&text).ok());
    let merged = marked.is_some() && marked == Stamp::of(overlay)?;
    Ok(if merged {
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
        let name = record.base.name_from(&child.path);
        let path = child.path.to_string_lossy();
        let arguments = [
            "rebase",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-b",
            &name,
            "-F",
            &record.base.format,
            &path,
        ];
        qemu_img::run(arguments).await?;
    }
    mark(&overlay.path)
}

fn mark(overlay: &Path) -> Result<()> {
    let path = mark_of(overlay);
    let text = written(&Stamp::of(overlay)?)?.to_string();
    std::fs::write(&path, text).map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

/// Removes the mark. Idempotent.
pub(super) fn unmark(overlay: &Path) -> Result<()> {
    remove_file(&mark_of(overlay))
}

/// A bitmap as `qemu-img info` tells it (`Qcow2BitmapInfo`).
#[derive(Debug, Clone, Deserialize)]
struct Bitmap {
    name: String,
    granularity: u64,
    flags: Vec<String>,
}

impl Bitmap {
    fn recording(&self) -> bool {
        self.flags.iter().any(|flag| flag == "auto")
    }
}

/// The bitmaps of an image that can still be used.
async fn bitmaps_of(layer: &Layer) -> Result<Vec<Bitmap>> {
    if layer.format != "qcow2" {
        return Ok(Vec::new());
    }
    let path = layer.path.to_string_lossy();
    let arguments = ["info", "--output=json", "-f", "qcow2", &path];
    let told = qemu_img::run(arguments).await?;
    let told: serde_json::Value = remembered(&serde_json::from_str(&told).map_err(|e| {
        Error::new(disksnap_core::ErrorKind::Protocol, "qemu-img info tells no JSON").because(e)
    })?)?;
    let bitmaps = &told["format-specific"]["data"]["bitmaps"];
    let bitmaps: Vec<Bitmap> = if bitmaps.is_null() {
        Vec::new()
    } else {
        remembered(bitmaps)?
    };
    let usable = |bitmap: &Bitmap| !bitmap.flags.iter().any(|flag| flag == "in-use");
    Ok(bitmaps.into_iter().filter(usable).collect())
}

/// One change of a bitmap (`qemu-img bitmap`); a merge takes the bitmap of the same name in `from`.
async fn change(layer: &Layer, what: &[&str], bitmap: &Bitmap, from: Option<&Layer>) -> Result<()> {
    let mut arguments = vec!["bitmap".to_owned()];
    arguments.extend(what.iter().map(|&w| w.to_owned()));
    if what.contains(&"--add") {
        arguments.extend(["-g".to_owned(), bitmap.granularity.to_string()]);
    }
    if let Some(from) = from {
        let path = from.path.to_string_lossy().into_owned();
        arguments.extend([
            bitmap.name.clone(),
            "-b".to_owned(),
            path,
            "-F".to_owned(),
            "qcow2".to_owned(),
        ]);
    }
    let path = layer.path.to_string_lossy().into_owned();
    arguments.extend(["-f".to_owned(), "qcow2".to_owned(), path, bitmap.name.clone()]);
    qemu_img::run(arguments).await.map(drop)
}
