//! Reading a disk as it was at a point, from the images of its chain, each chunk checked against its digest.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `plan` | what is to be read from where, by the digests' files and the images' tables, which must agree |
//! | `fetch` | reading a piece, and checking it |

mod fetch;
mod plan;

use std::sync::Arc;

use disksnap::{Error, ErrorKind, Piece, Result};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinHandle};

use crate::digests::{ChunksReader, Has, Overlay, Span, chunk_length, digest, digest_of, to_usize};
use crate::object::Object;
use crate::qcow2::{MAX_L1_ENTRIES, Tables, l1_entries};
use crate::{CHUNK, Digest, Store};
use plan::{Planned, Planner, Source};

/// How many pieces are read ahead.
const AHEAD: usize = 4;

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The point that it belongs to, for messages.
    pub point: String,
    /// The key of the qcow2 image.
    pub image: String,
    /// The key of its chunks' digests.
    pub chunks: String,
    /// What the manifest says that file's digest is.
    pub chunks_digest: Digest,
    /// The disk's size at that point, in bytes.
    pub size: u64,
}

/// Reads what the images of a chain hold, from the disk's start to its end.
///
/// With all layers down to a full image that is the whole disk; with fewer, what these hold together: what an increment over
/// the layer below them would hold.
///
/// Some MiB are read and checked ahead. What an image's tables say must agree with the digests: what reads right here reads
/// right in QEMU.
#[derive(Debug)]
pub struct ChainReader {
    size: u64,
    pieces: mpsc::Receiver<Result<Ahead>>,
    /// The piece that is being waited for: a call of [`ChainReader::next`] that is given up loses nothing.
    awaited: Option<JoinHandle<Result<Piece>>>,
    planner: AbortHandle,
    ended: bool,
}

/// A piece that is being read.
#[derive(Debug)]
enum Ahead {
    /// The disk's end. Nothing at all is no end: whoever read ahead has died.
    End,
    Ready(Piece),
    Read(JoinHandle<Result<Piece>>),
}

impl ChainReader {
    /// Opens the layers, the newest first.
    ///
    /// The chain is the one that is given: no image's header is trusted to name another file; one that names a backing file
    /// which is not the next layer's is told. Layers below an image without a backing file are not read.
    ///
    /// # Errors
    /// `Broken`, naming point and object, for an image or a file of digests that is missing or is not what it should be.
    /// `Invalid` without a layer.
    pub async fn open(store: Arc<dyn Store>, layers: &[Layer]) -> Result<Self> {
        let sources = open_images(store.as_ref(), layers).await?;
        let layers = &layers[..sources.len()];
        let overlay = open_digests(store.as_ref(), layers).await?;
        let size = layers.first().map_or(0, |layer| layer.size);
        let (to, pieces) = mpsc::channel(AHEAD);
        let planner = tokio::spawn(read_ahead(Planner::new(overlay, sources), to)).abort_handle();
        Ok(Self {
            size,
            pieces,
            awaited: None,
            planner,
            ended: false,
        })
    }

    /// The disk's size, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next piece, or `None` at the end. Pieces ascend, and begin and end at chunks' ends; data comes in pieces of up to a
    /// MiB, zeroes of any length. Every byte in one has been compared with the digest that was taken of the snapshot.
    ///
    /// # Errors
    /// `Broken`, naming point, image and offset, where they differ. Nothing follows then.
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        if self.ended {
            return Ok(None);
        }
        let next = self.wait().await;
        self.ended = !matches!(next, Ok(Some(_)));
        next
    }

    async fn wait(&mut self) -> Result<Option<Piece>> {
        if self.awaited.is_none() {
            match self.pieces.recv().await.transpose()? {
                None => {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "the task that reads the images ahead has died",
                    ));
                }
                Some(Ahead::End) => return Ok(None),
                Some(Ahead::Ready(piece)) => return Ok(Some(piece)),
                Some(Ahead::Read(piece)) => self.awaited = Some(piece),
            }
        }
        let Some(awaited) = &mut self.awaited else {
            return Ok(None);
        };
        let piece = awaited.await;
        self.awaited = None;
        piece.map_err(died)?.map(Some)
    }
}

impl Drop for ChainReader {
    fn drop(&mut self) {
        self.planner.abort();
        if let Some(awaited) = &self.awaited {
            awaited.abort();
        }
    }
}

/// Plans pieces and has them read, as many as are waited for.
async fn read_ahead(mut planner: Planner, to: mpsc::Sender<Result<Ahead>>) {
    loop {
        let Ok(place) = to.reserve().await else { return };
        let ahead = match planner.next().await {
            Ok(None) => Ok(Ahead::End),
            Ok(Some(Planned::Zero { offset, length })) => Ok(Ahead::Ready(Piece::Zero { offset, length })),
            Ok(Some(Planned::Data(fetch))) => Ok(Ahead::Read(tokio::spawn(fetch.read()))),
            Err(error) => Err(error),
        };
        let last = matches!(ahead, Err(_) | Ok(Ahead::End));
        place.send(ahead);
        if last {
            return;
        }
    }
}

/// The digest of a disk's whole content: BLAKE3 over the digests of all its chunks in order. From the files of digests alone; of
/// the images only a chunk is read in which an earlier point's disk ended, where it was of another size.
///
/// # Errors
/// `Broken` for a file of digests that is missing or is not what it should be, or where the layers do not cover the disk.
pub async fn content_digest(store: &dyn Store, layers: &[Layer]) -> Result<Digest> {
    let size = layers.first().map_or(0, |layer| layer.size);
    let mut overlay = open_digests(store, layers).await?;
    let mut hasher = blake3::Hasher::new();
    while let Some(span) = overlay.next().await? {
        let is_cut = |layer: usize| {
            span.visible.is_some()
                || chunk_length(layers[layer].size, span.first) != chunk_length(size, span.first)
        };
        match &span.has {
            Has::Nobody => return Err(uncovered(layers, &span)),
            Has::Zero(_) | Has::Behind(_) => {
                hash_zeroes(&mut hasher, size, &span).await;
            }
            Has::Data(layer, digests) if is_cut(*layer) => {
                let content = one_chunk(store, &layers[*layer], &span, digest(digests, 0), size).await?;
                hasher.update(&Digest::of(&content).0);
            }
            Has::Data(_, digests) => {
                hasher.update(digests);
            }
        }
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

/// Adds the digests of chunks that are zero, which may be very many.
async fn hash_zeroes(hasher: &mut blake3::Hasher, size: u64, span: &Span) {
    const AT_ONCE: u64 = 8192;
    let last = span.first + span.count - 1;
    let many = Digest::of_zeroes(CHUNK)
        .0
        .repeat(to_usize(AT_ONCE.min(span.count)));
    let mut left = span.count - 1;
    while left > 0 {
        let now = left.min(AT_ONCE);
        hasher.update(&many[..to_usize(now) * size_of::<Digest>()]);
        left -= now;
        tokio::task::yield_now().await;
    }
    hasher.update(&Digest::of_zeroes(chunk_length(size, last)).0);
}

/// A chunk of which an image has another length than the disk.
async fn one_chunk(
    store: &dyn Store,
    layer: &Layer,
    span: &Span,
    expected: Digest,
    size: u64,
) -> Result<Vec<u8>> {
    let object = Object::open(store, &layer.point, &layer.image).await?;
    let mut source = Source {
        tables: Tables::open(object, layer.size).await?,
        size: layer.size,
    };
    let part = source.part(span, expected, size).await?;
    match fetch::Fetch::of(part).read().await? {
        Piece::Data { data, .. } => Ok(data),
        Piece::Zero { .. } => Ok(Vec::new()),
    }
}

/// Opens the images down to the first that stands alone.
async fn open_images(store: &dyn Store, layers: &[Layer]) -> Result<Vec<Source>> {
    if layers.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "a chain has at least one image"));
    }
    let mut sources = Vec::with_capacity(layers.len());
    for (n, layer) in layers.iter().enumerate() {
        let object = Object::open(store, &layer.point, &layer.image).await?;
        check_size(&object, layer.size)?;
        let tables = Tables::open(object, layer.size).await?;
        let backing = tables.header().backing.clone();
        if let (Some(name), Some(below)) = (&backing, layers.get(n + 1))
            && resolve(&layer.image, name).as_deref() != Some(below.image.as_str())
        {
            let what = format!(
                "its header names the backing file '{name}', and '{}' is below it",
                below.image
            );
            return Err(tables.object().broken(0, what));
        }
        sources.push(Source {
            tables,
            size: layer.size,
        });
        if backing.is_none() {
            break;
        }
    }
    Ok(sources)
}

/// Opens the files of digests, each of which is what its manifest says.
pub(crate) async fn open_digests(store: &dyn Store, layers: &[Layer]) -> Result<Overlay> {
    let mut readers = Vec::with_capacity(layers.len());
    for layer in layers {
        let object = Object::open(store, &layer.point, &layer.chunks).await?;
        check_size(&object, layer.size)?;
        if digest_of(&object).await? != layer.chunks_digest {
            let what = format!(
                "the file is not the one whose digest, {}, was written down",
                layer.chunks_digest
            );
            return Err(object.broken(0, what));
        }
        readers.push((ChunksReader::open(object, layer.size).await?, layer.size));
    }
    Overlay::new(readers).await
}

/// No image is of a larger disk, and no calculation with a disk's size goes wrong.
fn check_size(object: &Object, size: u64) -> Result<()> {
    if l1_entries(size) > MAX_L1_ENTRIES {
        return Err(object.broken(0, format!("no image is of a disk of {size} bytes")));
    }
    Ok(())
}

fn uncovered(layers: &[Layer], span: &Span) -> Error {
    let (point, object) = layers
        .last()
        .map_or(("", ""), |layer| (&layer.point, &layer.chunks));
    Error::new(
        ErrorKind::Broken,
        "none of the chain's images has this part of the disk",
    )
    .with("point", point)
    .with("object", object)
    .with("disk offset", span.first * CHUNK)
}

/// The key that a backing file's name means, in the header of the image with this key.
fn resolve(image: &str, name: &str) -> Option<String> {
    let mut parts: Vec<&str> = image.split('/').collect();
    parts.pop();
    for part in name.split('/') {
        match part {
            "" => return None,
            "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A task of ours that did not come to its end.
pub(crate) fn died(error: JoinError) -> Error {
    Error::new(ErrorKind::Internal, "a task did not come to its end").because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_are_keys_beside_the_image() {
        let of = |name| resolve("web1-7c3f9d52/b/vda.qcow2", name);
        assert_eq!(of("../a/vda.qcow2").as_deref(), Some("web1-7c3f9d52/a/vda.qcow2"));
        assert_eq!(of("./x").as_deref(), Some("web1-7c3f9d52/b/x"));
        assert_eq!(of("../../../../etc/shadow"), None);
        assert_eq!(of("/etc/shadow"), None);
    }
}
