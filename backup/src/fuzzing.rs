//! Doors for fuzz targets: the files of a repository, damaged or written by somebody else. Not part of the interface.
//!
//! What a digest guards is given its digest first: else no input would come past that.

mod memory;

use std::sync::{Arc, LazyLock};

use disksnap::{ErrorKind, Piece};
use tokio::runtime::Runtime;

use crate::digests::{ChunksReader, Has, chunks, content_size};
use crate::journal::Journal;
use crate::manifest::seal;
use crate::object::Object;
use crate::{
    CHUNK, ChainReader, Compression, Digest, ImageKeys, ImageSpec, ImageState, ImageWriter, Layer, Manifest,
    PointSpec, Repository, Store, content_digest, load_machine,
};
use memory::Memory;

/// One for all inputs: threads cost more than reading one.
static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().max_blocking_threads(2).build().ok()
});

fn run(work: impl Future<Output = ()>) {
    if let Some(runtime) = &*RUNTIME {
        runtime.block_on(work);
    }
}

/// Takes `data` as a point's manifest.
///
/// # Panics
/// If what is accepted cannot be written again, or is read otherwise then.
pub fn manifest(data: &[u8]) {
    let _ = Manifest::from_json(data);
    let Ok(manifest) = sealed_manifest(data) else {
        return;
    };
    let written = manifest.to_json();
    let written = written.unwrap_or_else(|e| panic!("it was a manifest: {e}"));
    assert!(Manifest::from_json(&written).is_ok_and(|again| again == manifest));
    for file in manifest.files() {
        let leads_away = file.starts_with('/') || file.split('/').any(|part| part == "..");
        assert!(!leads_away, "{file:?}");
    }
}

fn sealed_manifest(data: &[u8]) -> disksnap::Result<Manifest> {
    let sealed = serde_json::from_slice(data).map(seal).unwrap_or_default();
    Manifest::from_json(sealed.to_string().as_bytes())
}

/// Takes `data` as the journal of a point that is being pulled, and goes on with the images that it tells of.
///
/// # Panics
/// If what is accepted cannot be written again, or a writer tells another state than the one that it went on from.
pub fn journal(data: &[u8]) {
    let _ = Journal::from_json(data);
    let Ok(journal) = serde_json::from_slice::<Journal>(data) else {
        return;
    };
    let written = journal.to_json();
    let again = written.ok().and_then(|text| Journal::from_json(&text).ok());
    assert_eq!(again.as_ref(), Some(&journal));
    run(async {
        for begun in journal.disks {
            if let Some(state) = begun.state {
                go_on(state).await;
            }
        }
    });
}

/// Goes on from a state, and from the one that is told then; the rest of the disk is zero.
async fn go_on(state: ImageState) {
    const LARGEST: u64 = 64 << 20;
    let (spec, offset) = (state.spec.clone(), state.offset);
    // Bytes can be packed in many ways, and are from now on packed in ours.
    let Some((_, told)) = resumed(state).await else {
        return;
    };
    assert_eq!((&told.spec, told.offset), (&spec, offset), "it goes on elsewhere");
    let again = resumed(told.clone()).await;
    let (mut writer, again) = again.unwrap_or_else(|| panic!("it does not go on from what it tells"));
    let text = |state: &ImageState| serde_json::to_string(state).unwrap_or_default();
    assert_eq!(text(&told), text(&again), "it goes on from another state");
    if spec.size > LARGEST {
        return;
    }
    let length = spec.size - offset;
    let rest = writer.write(Piece::Zero { offset, length }).await;
    assert!(rest.is_ok() || length == 0, "{rest:?}");
    let _ = writer.finish().await;
}

/// A writer that goes on from a state, and what it tells of that; `None` for a state that it refuses.
async fn resumed(state: ImageState) -> Option<(ImageWriter, ImageState)> {
    let store = Arc::new(Memory::endless());
    let mut writer = ImageWriter::resume(store, keys("a"), state).await.ok()?;
    let told = writer.checkpoint().await;
    let told = told.unwrap_or_else(|e| panic!("it is in memory: {e}"));
    Some((writer, told))
}

/// Takes `data` as two files of digests, one over the other: the first two bytes say how long the first one is.
///
/// # Panics
/// If what is told is not in order, or goes beyond the disk.
pub fn digests(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk() else {
        return;
    };
    let (one, two) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    run(async {
        let store = Memory::default();
        let mut layers = Vec::new();
        for (name, bytes) in [("a", one), ("b", two)] {
            // Without one there is none.
            let Some(size) = content_size(bytes) else { break };
            store.hold(&keys(name).chunks, bytes);
            layers.push(layer(name, size, Digest::of(bytes)));
        }
        for layer in &layers {
            read_runs(&store, layer).await;
        }
        overlaid(&store, &layers).await;
    });
}

async fn read_runs(store: &Memory, layer: &Layer) {
    let Ok(object) = Object::open(store, &layer.point, &layer.chunks).await else {
        return;
    };
    let Ok(mut reader) = ChunksReader::open(object, layer.size).await else {
        return;
    };
    let mut at = 0;
    while let Ok(Some(run)) = reader.next().await {
        assert!(
            run.first >= at && run.count > 0 && run.end() <= chunks(layer.size),
            "{run:?} after {at}"
        );
        at = run.end();
    }
}

async fn overlaid(store: &Memory, layers: &[Layer]) {
    let Ok(mut overlay) = crate::chain::open_digests(store, layers).await else {
        return;
    };
    let (mut at, size) = (0, layers.first().map_or(0, |layer| layer.size));
    while let Ok(Some(span)) = overlay.next().await {
        assert!(span.first == at && span.count > 0, "{span:?} after {at}");
        if let Has::Data(layer, digests) = &span.has {
            assert!(*layer < layers.len() && digests.len() as u64 == span.count * 32);
        }
        at += span.count;
    }
    assert!(at <= chunks(size), "{at} chunks of {size} bytes");
}

/// A sound chain of two images, and what it holds: made once.
struct Chain {
    layers: Vec<Layer>,
    objects: Vec<(String, Vec<u8>)>,
    content: Vec<u8>,
}

static CHAIN: LazyLock<Option<Chain>> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().ok()?;
    runtime.block_on(made())
});

/// The newer disk is larger, and its last chunk is no whole one.
const SIZES: [u64; 2] = [7 * CHUNK + 1000, 5 * CHUNK + 512];

async fn made() -> Option<Chain> {
    let store = Arc::new(Memory::default());
    let chunk =
        |seed: u8, length: u64| -> Vec<u8> { (0..length).map(|n| (n / 997 % 251) as u8 ^ seed).collect() };
    let (mut content, mut layers) = (Vec::new(), Vec::new());
    for (name, size, backing, compression) in [
        ("a", SIZES[1], None, Compression::None),
        ("b", SIZES[0], Some("../a/vda.qcow2"), Compression::Zstd(3)),
    ] {
        let (backing, keys) = (backing.map(str::to_owned), keys(name));
        let spec = ImageSpec {
            size,
            backing,
            compression,
        };
        let mut writer = ImageWriter::create(Arc::clone(&store) as _, keys, spec)
            .await
            .ok()?;
        content.resize(usize::try_from(size).ok()?, 0);
        for n in 0..chunks(size) {
            // Of the older one the first two chunks stay, and the fourth.
            if name == "b" && matches!(n, 0 | 1 | 3) {
                continue;
            }
            let (offset, length) = (n * CHUNK, CHUNK.min(size - n * CHUNK));
            let seed = u8::try_from(n).ok()? ^ name.as_bytes()[0];
            let data = if n % 3 == 1 {
                vec![0; usize::try_from(length).ok()?]
            } else {
                chunk(seed, length)
            };
            let at = usize::try_from(offset).ok()?;
            content[at..at + data.len()].copy_from_slice(&data);
            writer.write(Piece::Data { offset, data }).await.ok()?;
        }
        layers.insert(0, layer(name, size, writer.finish().await.ok()?.chunks_digest));
    }
    Some(Chain {
        layers,
        objects: store.all(),
        content,
    })
}

/// Damages a chain, and reads it. The first byte says whether the digests' digests are still those of before; five bytes each say
/// which object has another byte where: its number, three bytes of offset, the byte.
///
/// # Panics
/// If what is read is not what the chain held, although the digests say that it is; or if it is not the disk, in its order.
pub fn chain(data: &[u8]) {
    let (Some(chain), Some((mode, patches))) = (&*CHAIN, data.split_first()) else {
        return;
    };
    let mut objects = chain.objects.clone();
    for patch in patches.as_chunks::<5>().0 {
        let (_, bytes) = &mut objects[usize::from(patch[0]) % chain.objects.len()];
        let at = u32::from_le_bytes([patch[1], patch[2], patch[3], 0]) as usize;
        match bytes.get_mut(at) {
            Some(byte) => *byte = patch[4],
            // Behind its end: it is torn off there.
            None => bytes.truncate(at / 16),
        }
    }
    let forged = mode % 2 == 1;
    let mut layers = chain.layers.clone();
    let store = Memory::default();
    for (key, bytes) in &objects {
        for layer in layers.iter_mut().filter(|layer| forged && layer.chunks == *key) {
            layer.chunks_digest = Digest::of(bytes);
        }
        store.hold(key, bytes);
    }
    run(async {
        let expected = (!forged).then_some(&chain.content[..]);
        read(&Arc::new(store), &layers, expected).await;
    });
}

async fn read(store: &Arc<Memory>, layers: &[Layer], expected: Option<&[u8]>) {
    let _ = content_digest(store.as_ref(), layers).await;
    let Ok(mut reader) = ChainReader::open(Arc::clone(store) as _, layers).await else {
        return;
    };
    let mut at = 0;
    while let Ok(Some(piece)) = reader.next().await {
        let (offset, end) = (piece.offset(), piece.offset() + piece.length());
        assert!(
            offset >= at && end > offset && end <= reader.size(),
            "{offset} after {at}"
        );
        at = end;
        let Some(held) = expected.and_then(|all| all.get(range(offset, end))) else {
            continue;
        };
        match piece {
            Piece::Data { data, .. } => assert!(data == held, "other data at {offset}"),
            Piece::Zero { .. } => assert!(held.iter().all(|byte| *byte == 0), "no zeroes at {offset}"),
        }
    }
}

fn range(start: u64, end: u64) -> std::ops::Range<usize> {
    let number = |n| usize::try_from(n).unwrap_or(usize::MAX);
    number(start)..number(end)
}

/// Takes `data` as the small files of a repository with one domain, a NUL between them: what describes the repository and the
/// domain, the journal of a merge, and the manifest and the journal of a point. Lists it, and loads the point's machine.
pub fn repository(data: &[u8]) {
    const POINT: &str = "20261122T021500Z";
    let texts: Vec<&[u8]> = data.split(|byte| *byte == 0).collect();
    let names = [
        "repository.json".to_owned(),
        "web1-7c3f9d52/domain.json".to_owned(),
        "web1-7c3f9d52/merging.json".to_owned(),
        format!("web1-7c3f9d52/{POINT}/manifest.json"),
        format!("web1-7c3f9d52/{POINT}/unfinished.json"),
        format!("web1-7c3f9d52/{POINT}/domain.xml"),
    ];
    run(async {
        let store = Arc::new(Memory::default());
        for (name, text) in names.iter().zip(texts) {
            let sealed = name
                .ends_with("manifest.json")
                .then(|| serde_json::from_slice(text).map(seal));
            match sealed {
                Some(Ok(manifest)) => store.hold(name, manifest.to_string().as_bytes()),
                _ => store.hold(name, text),
            }
        }
        let Ok(repository) = Repository::open(Arc::clone(&store) as _).await else {
            return;
        };
        for folder in repository.domains().await.unwrap_or_default() {
            let _ = repository.unfinished(&folder).await;
            let _ = repository.next_point(&folder, &[]).await;
            let _ = Journal::load_if_sound(&repository, &folder, POINT).await;
            let latest = repository.point(&folder, &PointSpec::Latest).await;
            let Ok(latest) = latest else { continue };
            for disk in &latest.disks {
                let _ = repository.chain(&folder, &latest, &disk.target).await;
            }
            let prefix = repository.folder_of(&folder, &latest.point);
            match load_machine(store.as_ref() as &dyn Store, &prefix, &latest.machine).await {
                Err(error) => assert_ne!(error.kind(), ErrorKind::Internal, "{error}"),
                Ok(machine) => assert!(machine.tpm.iter().all(|(name, _)| !name.contains('/'))),
            }
        }
    });
}

fn keys(name: &str) -> ImageKeys {
    ImageKeys {
        image: format!("{name}/vda.qcow2"),
        chunks: format!("{name}/vda.chunks"),
    }
}

fn layer(name: &str, size: u64, chunks_digest: Digest) -> Layer {
    let ImageKeys { image, chunks } = keys(name);
    Layer {
        point: name.to_owned(),
        image,
        chunks,
        chunks_digest,
        size,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use super::*;

    /// A target that never gets anywhere would find nothing.
    #[tokio::test]
    async fn the_chain_that_is_damaged_is_sound() {
        let chain = made().await.unwrap();
        let store = Arc::new(Memory::default());
        for (key, bytes) in &chain.objects {
            store.hold(key, bytes);
        }
        let mut reader = ChainReader::open(store, &chain.layers).await.unwrap();
        let mut content = vec![0; chain.content.len()];
        while let Some(piece) = reader.next().await.unwrap() {
            if let Piece::Data { offset, data } = piece {
                content[range(offset, offset + data.len() as u64)].copy_from_slice(&data);
            }
        }
        assert!(content == chain.content);
        let both = chain.layers.iter().map(|layer| layer.size);
        assert_eq!(both.collect::<Vec<_>>(), SIZES);
    }
}
