//! The bitmaps of a domain that is off, in its images, by `qemu-img`.
//!
//! One step after another: nobody writes meanwhile, and each is such that the whole can be done again.

use std::iter::successors;
use std::path::Path;

use disksnap_core::{
    DirtyBitmap, Disk, Ending, Error, ErrorKind, Result, SCRATCH_BITMAP, Source, Start, Trackable, Tracked,
};
use disksnap_image_file::{QemuImg, check_said, raw_data_of};
use serde::Deserialize;

use crate::{GRANULARITY, OLD_QCOW2};

/// What `qemu-img info --output=json` says of one image.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Image {
    filename: String,
    virtual_size: u64,
    #[serde(default)]
    format_specific: Specific,
}

#[derive(Debug, Default, Deserialize)]
struct Specific {
    #[serde(default)]
    data: Data,
}

#[derive(Debug, Default, Deserialize)]
struct Data {
    compat: Option<String>,
    #[serde(default)]
    bitmaps: Vec<InImage>,
}

/// `Qcow2BitmapInfo`.
#[derive(Debug, Clone, Deserialize)]
struct InImage {
    name: String,
    granularity: u64,
    flags: Vec<String>,
}

impl InImage {
    fn is(&self, flag: &str) -> bool {
        self.flags.iter().any(|known| known == flag)
    }
}

/// A disk's images, the top one first, as far as they are qcow2.
pub(crate) struct Layers {
    size: u64,
    pub(crate) images: Vec<Image>,
}

/// The image that can keep bitmaps, or why there is none.
fn image_of(disk: &Disk) -> std::result::Result<String, Trackable> {
    if disk.driver.format.as_deref() != Some("qcow2") {
        let format = disk.driver.format.as_deref().unwrap_or("raw");
        return Err(Trackable::No(format!(
            "the domain is off, and an image of the format '{format}' keeps no bitmaps"
        )));
    }
    match disk
        .source
        .as_ref()
        .and_then(Source::path)
        .and_then(|path| path.to_str())
    {
        Some(path) => Ok(path.to_owned()),
        None => Err(Trackable::Unreachable(
            "the domain is off, and its image is no file or device of this host".to_owned(),
        )),
    }
}

fn program() -> Result<QemuImg> {
    QemuImg::find().ok_or_else(|| {
        let why =
            "there is no qemu-img, and with the domain off the images' bitmaps cannot be reached without it";
        QemuImg::missing(ErrorKind::Unavailable, why)
    })
}

async fn run(arguments: &[&str]) -> Result<String> {
    let ran = program()?.run(arguments.iter().copied(), "").await;
    ran.map_err(|e| {
        e.hint("If the domain runs, say where its monitor is: --monitor, or the <metadata> of its document.")
    })
}

/// The images of a disk, by its document; each is looked at by itself. What else a header names is refused, since `qemu-img` would
/// open it.
async fn layers_of(disk: &Disk, path: &str) -> Result<Layers> {
    check_said(disk)?;
    let mut images = vec![image_at(path).await?];
    for layer in successors(disk.backing.as_ref(), |layer| layer.backing.as_deref()) {
        let place = layer
            .source
            .path()
            .filter(|_| layer.format.as_deref() == Some("qcow2"));
        // Another format has no bitmaps; what is not there was merged since the document was read.
        images.push(
            match place.filter(|place| place.exists()).and_then(Path::to_str) {
                Some(place) => image_at(place).await?,
                None => Image::without_bitmaps(&layer.source),
            },
        );
    }
    Ok(Layers::of(images))
}

async fn image_at(path: &str) -> Result<Image> {
    read(&run(&["info", "--output=json", "-f", "qcow2", path]).await?)
}

/// What `qemu-img info` says of an image.
pub(crate) fn read(said: &str) -> Result<Image> {
    serde_json::from_str(said).map_err(|e| {
        Error::new(
            ErrorKind::Protocol,
            "the answer of qemu-img info is not what it should be",
        )
        .because(e)
    })
}

impl Layers {
    pub(crate) fn of(images: Vec<Image>) -> Self {
        let size = images.first().map_or(0, |image| image.virtual_size);
        Self { size, images }
    }

    /// The images that have a bitmap of this name, and it.
    fn having(&self, name: &str) -> impl Iterator<Item = (&str, &InImage)> {
        self.images
            .iter()
            .filter_map(move |image| image.bitmap(name).map(|b| (image.filename.as_str(), b)))
    }

    fn top(&self, name: &str) -> Option<&InImage> {
        self.images.first()?.bitmap(name)
    }
}

impl Image {
    fn without_bitmaps(source: &Source) -> Self {
        Self {
            filename: source.to_string(),
            virtual_size: 0,
            format_specific: Specific::default(),
        }
    }

    fn bitmap(&self, name: &str) -> Option<&InImage> {
        self.format_specific
            .data
            .bitmaps
            .iter()
            .find(|bitmap| bitmap.name == name)
    }
}

pub(crate) async fn look(disks: &[&Disk]) -> Result<Vec<Tracked>> {
    let mut all = Vec::with_capacity(disks.len());
    for disk in disks {
        all.push(look_at(disk).await.map_err(|e| e.with("disk", &disk.target))?);
    }
    Ok(all)
}

async fn look_at(disk: &Disk) -> Result<Tracked> {
    let found = match image_of(disk) {
        // `qemu-img info` does not look at it.
        Ok(path) => match missing_data(&path) {
            Some(why) => return Ok(nothing(why)),
            None => layers_of(disk, &path).await,
        },
        Err(why) => return Ok(nothing(why)),
    };
    match found {
        Ok(layers) => Ok(tell(&layers)),
        // Without the program no disk can be looked at.
        Err(error) if error.kind() == ErrorKind::Unavailable => Err(error),
        Err(error) => Ok(nothing(Trackable::Unreachable(error.to_string()))),
    }
}

/// Why a qcow2 that keeps its data in a raw disk cannot be reached: that is not there.
fn missing_data(path: &str) -> Option<Trackable> {
    let data = raw_data_of(Path::new(path)).ok().flatten()?;
    let error = data.metadata().err()?;
    Some(Trackable::Unreachable(format!(
        "its data in {} cannot be looked at: {error}",
        data.display()
    )))
}

fn nothing(trackable: Trackable) -> Tracked {
    Tracked {
        trackable,
        size: None,
        bitmaps: Vec::new(),
    }
}

pub(crate) fn tell(layers: &Layers) -> Tracked {
    let mut bitmaps = Vec::new();
    for (layer, image) in layers.images.iter().enumerate() {
        for bitmap in &image.format_specific.data.bitmaps {
            bitmaps.push(DirtyBitmap {
                name: bitmap.name.clone(),
                layer,
                recording: bitmap.is("auto"),
                durable: true,
                inconsistent: bitmap.is("in-use"),
                granularity: bitmap.granularity,
            });
        }
    }
    bitmaps.retain(|bitmap| !bitmap.name.starts_with(SCRATCH_BITMAP));
    let top = layers.images.first();
    let compat = top.and_then(|image| image.format_specific.data.compat.as_deref());
    let trackable = if compat == Some("0.10") {
        Trackable::No(format!("the domain is off, and {OLD_QCOW2}"))
    } else {
        Trackable::Durable
    };
    Tracked {
        trackable,
        size: Some(layers.size),
        bitmaps,
    }
}

/// The image of a disk that is to be worked on.
fn needed(disk: &Disk) -> Result<String> {
    image_of(disk).map_err(|why| {
        let (Trackable::No(why) | Trackable::Unreachable(why) | Trackable::Volatile(why)) = why else {
            return Error::new(ErrorKind::Internal, "an image is none");
        };
        Error::new(ErrorKind::Unsupported, why).with("disk", &disk.target)
    })
}

async fn bitmap(arguments: &[&str]) -> Result<()> {
    let all: Vec<&str> = ["bitmap"].iter().chain(arguments).copied().collect();
    run(&all).await.map(drop)
}

pub(crate) async fn start(starts: &[Start]) -> Result<()> {
    for start in starts {
        start_one(start)
            .await
            .map_err(|e| e.with("disk", &start.disk.target))?;
    }
    Ok(())
}

async fn start_one(start: &Start) -> Result<()> {
    let Some(starts) = &start.starts else {
        return carry(start).await;
    };
    let path = needed(&start.disk)?;
    let layers = layers_of(&start.disk, &path).await?;
    let granularity = match &start.recording {
        Some(name) => {
            let found = layers.top(name).ok_or_else(|| not_there(name))?;
            refuse_inconsistent(found)?;
            found.granularity
        }
        None => GRANULARITY,
    };
    if layers.having(starts).next().is_some() {
        return Err(Error::new(ErrorKind::AlreadyExists, format!("the disk has a bitmap '{starts}' already"))
            .hint("Choose another name for the checkpoint; `disksnap checkpoint validate` tells of bitmaps that nobody knows."));
    }
    let granularity = granularity.to_string();
    let top = start.top.as_ref().unwrap_or(&path);
    bitmap(&["--add", "-g", &granularity, "-f", "qcow2", top, starts]).await?;
    match &start.recording {
        Some(before) => bitmap(&["--disable", "-f", "qcow2", &path, before]).await,
        None => Ok(()),
    }
}

/// Lets the bitmap that records go on in the image that is put on top. A copy is what nobody needs here: the one below
/// stays as it is.
async fn carry(start: &Start) -> Result<()> {
    let (Some(top), Some(recording)) = (&start.top, &start.recording) else {
        return Ok(());
    };
    let layers = layers_of(&start.disk, &needed(&start.disk)?).await?;
    let found = layers.top(recording).ok_or_else(|| not_there(recording))?;
    refuse_inconsistent(found)?;
    let granularity = found.granularity.to_string();
    bitmap(&["--add", "-g", &granularity, "-f", "qcow2", top, recording]).await
}

fn not_there(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the disk has no bitmap '{name}'"))
        .with("bitmap", name)
        .hint("`disksnap checkpoint validate` tells which checkpoints can be trusted.")
}

fn refuse_inconsistent(bitmap: &InImage) -> Result<()> {
    if !bitmap.is("in-use") {
        return Ok(());
    }
    let message = format!(
        "the bitmap '{}' is inconsistent: its image was not closed properly",
        bitmap.name
    );
    Err(Error::new(ErrorKind::Broken, message)
        .with("bitmap", &bitmap.name)
        .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted; the disk's next backup is a full one."))
}

pub(crate) async fn abort(starts: &[Start]) -> Result<()> {
    for start in starts {
        if let (Some(starts), Ok(path)) = (&start.starts, image_of(&start.disk)) {
            undo(&path, start, starts)
                .await
                .map_err(|e| e.with("disk", &start.disk.target))?;
        }
    }
    Ok(())
}

async fn undo(path: &str, start: &Start, starts: &str) -> Result<()> {
    let overlay = start.top.as_deref().filter(|top| *top != path);
    let noted_in = overlay.unwrap_or(path);
    // One that has not come to be, or is gone, took what it noted along.
    if overlay.is_some_and(|overlay| !Path::new(overlay).exists()) {
        return Ok(());
    }
    // Where the new one is not there nobody knows what was written since it stopped the other: that must not go on
    // as if it knew. Lower images are snapshots, and nothing in them is ours.
    let layers = layers_of(&start.disk, path).await?;
    let noted = Layers::of(vec![image_at(noted_in).await?]);
    let Some(new) = noted.top(starts) else {
        return Ok(());
    };
    let before = start.recording.as_deref().and_then(|name| layers.top(name));
    if let Some(before) = before.filter(|before| !before.is("in-use") && !new.is("in-use")) {
        let mut merge = vec!["--merge", starts];
        // `qemu-img` cannot open the image that it writes to a second time.
        if let Some(overlay) = overlay {
            merge.extend(["-b", overlay, "-F", "qcow2"]);
        }
        merge.extend(["-f", "qcow2", path, &before.name]);
        bitmap(&merge).await?;
        bitmap(&["--enable", "-f", "qcow2", path, &before.name]).await?;
    }
    bitmap(&["--remove", "-f", "qcow2", noted_in, starts]).await
}

pub(crate) async fn end(endings: &[Ending]) -> Result<()> {
    // All are looked at before any is touched.
    let mut found = Vec::new();
    for ending in endings {
        // An image that keeps no bitmaps has none that could be ended.
        let Ok(path) = image_of(&ending.disk) else {
            continue;
        };
        let layers = layers_of(&ending.disk, &path)
            .await
            .map_err(|e| e.with("disk", &ending.disk.target))?;
        check(ending, &layers).map_err(|e| e.with("disk", &ending.disk.target))?;
        found.push((ending, path, layers));
    }
    for (ending, path, layers) in found {
        end_one(ending, &path, &layers)
            .await
            .map_err(|e| e.with("disk", &ending.disk.target))?;
    }
    Ok(())
}

/// Whether an ending can be done; nothing has been touched yet.
fn check(ending: &Ending, layers: &Layers) -> Result<()> {
    let Some(into) = ending.into.as_ref().filter(|_| hands_over(ending, layers)) else {
        return Ok(());
    };
    for (_, bitmap) in layers.having(&ending.bitmap) {
        refuse_inconsistent(bitmap)?;
    }
    refuse_resized(layers, &ending.bitmap)?;
    match layers.top(into) {
        Some(heir) => refuse_inconsistent(heir),
        None if layers.having(into).next().is_some() => Ok(()),
        None => Err(Error::new(
            ErrorKind::Broken,
            format!("the bitmap '{into}', which should take over, is not there"),
        )
        .with("bitmap", into)
        .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted.")),
    }
}

/// `qemu-img` merges bitmaps of one size only.
fn refuse_resized(layers: &Layers, name: &str) -> Result<()> {
    let other = |image: &&Image| image.bitmap(name).is_some() && image.virtual_size != layers.size;
    let Some(image) = layers.images.iter().find(other) else {
        return Ok(());
    };
    let message = format!(
        "the disk's size has changed in between ({} bytes, {} bytes), and with the domain off what the bitmap '{name}' knows \
         cannot be handed over",
        image.virtual_size, layers.size
    );
    Err(Error::new(ErrorKind::Unsupported, message)
        .with("image", &image.filename)
        .hint("Start the domain first: while it runs that can be done where the disk has grown."))
}

/// One that recorded is in the top image until this is done; where it is not, it is done already or was lost, and the
/// heir must not go on as if it knew.
fn hands_over(ending: &Ending, layers: &Layers) -> bool {
    layers.top(&ending.bitmap).is_some() || !ending.record
}

/// The lower images are snapshots, and nothing in them is changed: what their bitmaps know goes to the top image's too.
async fn end_one(ending: &Ending, path: &str, layers: &Layers) -> Result<()> {
    if let Some(into) = ending.into.as_ref().filter(|_| hands_over(ending, layers)) {
        if layers.top(into).is_none() {
            let granularity = GRANULARITY.to_string();
            bitmap(&[
                "--add",
                "--disable",
                "-g",
                &granularity,
                "-f",
                "qcow2",
                path,
                into,
            ])
            .await?;
        }
        for (image, _) in layers.having(&ending.bitmap) {
            let mut merge = vec!["--merge", &ending.bitmap];
            // `qemu-img` cannot open the image that it writes to a second time.
            if image != path {
                merge.extend(["-b", image, "-F", "qcow2"]);
            }
            merge.extend(["-f", "qcow2", path, into]);
            bitmap(&merge).await?;
        }
        if ending.record {
            bitmap(&["--enable", "-f", "qcow2", path, into]).await?;
        }
    }
    if layers.top(&ending.bitmap).is_some() {
        bitmap(&["--remove", "-f", "qcow2", path, &ending.bitmap]).await?;
    }
    Ok(())
}
