//! The bitmaps in images that no hypervisor has open, read and changed by `qemu-img`.

use disksnap_core::{Error, ErrorKind, Result};
use serde::Deserialize;

use crate::layer::Layer;
use crate::qemu_img;
use crate::record::remembered;

/// A bitmap as `qemu-img info` tells it (`Qcow2BitmapInfo`).
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) granularity: u64,
    pub(crate) flags: Vec<String>,
}

impl Bitmap {
    /// Whether a write marks it.
    pub(crate) fn recording(&self) -> bool {
        self.flags.iter().any(|flag| flag == "auto")
    }
}

/// The bitmaps of an image that can still be used.
pub(crate) async fn bitmaps_of(layer: &Layer) -> Result<Vec<Bitmap>> {
    if layer.format != "qcow2" {
        return Ok(Vec::new());
    }
    let path = layer.path.to_string_lossy();
    let arguments = ["info", "--output=json", "-f", "qcow2", &path];
    let told = qemu_img::run(arguments).await?;
    let told: serde_json::Value = remembered(
        &serde_json::from_str(&told)
            .map_err(|e| Error::new(ErrorKind::Protocol, "qemu-img info tells no JSON").because(e))?,
    )?;
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
pub(crate) async fn change(
    layer: &Layer,
    what: &[&str],
    bitmap: &Bitmap,
    from: Option<&Layer>,
) -> Result<()> {
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

/// Adds the bitmaps of one image to those of another. What the other lacks comes to be there, and does not record; what
/// it has records as before.
pub(crate) async fn gather(from: &Layer, to: &Layer) -> Result<()> {
    let known = bitmaps_of(to).await?;
    for bitmap in bitmaps_of(from).await? {
        if !known.iter().any(|b| b.name == bitmap.name) {
            change(to, &["--add", "--disable"], &bitmap, None).await?;
        }
        change(to, &["--merge"], &bitmap, Some(from)).await?;
    }
    Ok(())
}
