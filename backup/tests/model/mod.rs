//! Disks as bytes in memory, written as images in every way that they can come, and what QEMU makes of these.

#![allow(dead_code, reason = "each test program uses its part")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use disksnap_backup::{
    CHUNK, ChainReader, Compression, Digest, ImageKeys, ImageSpec, ImageSummary, ImageWriter, Layer,
    LocalStore, Piece, Store,
};
use disksnap_test_support::pattern::Random;
use disksnap_test_support::tools;
use tempfile::TempDir;

/// A repository's directory, and its store.
#[derive(Debug)]
pub(crate) struct Place {
    dir: TempDir,
    pub(crate) store: Arc<dyn Store>,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::at(dir.path()));
        Self { dir, store }
    }

    pub(crate) fn file(&self, key: &str) -> PathBuf {
        self.dir.path().join(key)
    }

    pub(crate) fn read(&self, key: &str) -> Vec<u8> {
        std::fs::read(self.file(key)).unwrap()
    }
}

/// The keys of the disk's image at a point.
pub(crate) fn keys(point: &str) -> ImageKeys {
    ImageKeys {
        image: format!("web1/{point}/vda.qcow2"),
        chunks: format!("web1/{point}/vda.chunks"),
    }
}

/// The name of a point's image in the header of the next one's.
pub(crate) fn backing(point: &str) -> String {
    format!("../{point}/vda.qcow2")
}

pub(crate) fn layer(point: &str, size: usize, summary: &ImageSummary) -> Layer {
    let ImageKeys { image, chunks } = keys(point);
    Layer {
        point: point.to_owned(),
        image,
        chunks,
        chunks_digest: summary.chunks_digest,
        size: size as u64,
    }
}

/// What may stand on a stretch of a disk.
pub(crate) fn fill(random: &mut Random, bytes: &mut [u8]) {
    match random.below(4) {
        0 => bytes.fill(0),
        1 => {
            let seed = random.next_u64();
            let noise = disksnap_test_support::pattern::bytes(seed, bytes.len());
            bytes.copy_from_slice(&noise);
        }
        2 => {
            let word = random.next_u64().to_le_bytes();
            bytes.copy_from_slice(&word.repeat(bytes.len() / 8 + 1)[..bytes.len()]);
            // No chunk is as another one.
            for (n, block) in bytes.chunks_mut(4096).enumerate() {
                block[0] ^= u8::try_from(n % 256).unwrap();
                block[block.len() / 2] ^= u8::try_from(n / 256 % 256).unwrap();
            }
        }
        _ => {
            // Mostly zeroes, and not all.
            bytes.fill(0);
            if let Some(at) = (!bytes.is_empty()).then(|| random.below(bytes.len() as u64)) {
                bytes[usize::try_from(at).unwrap()] = 7;
            }
        }
    }
}

/// The whole of a disk.
pub(crate) fn whole(disk: &[u8]) -> Vec<Range<usize>> {
    std::iter::once(0..disk.len()).collect()
}

/// Some ranges of chunks of a disk of this size, in order.
pub(crate) fn some_chunks(random: &mut Random, size: usize) -> Vec<Range<usize>> {
    let (mut ranges, mut at) = (Vec::new(), 0_u64);
    let size = size as u64;
    while at < size {
        let gap = if random.below(3) == 0 {
            random.below(40)
        } else {
            random.below(4)
        };
        let begin = at + gap * CHUNK;
        let most = 1 << random.below(7);
        let end = (begin + (1 + random.below(most)) * CHUNK).min(size);
        if begin < end {
            ranges.push(usize::try_from(begin).unwrap()..usize::try_from(end).unwrap());
        }
        at = end.max(begin);
    }
    ranges
}

/// Fills ranges of a disk, each in stretches of any alignment.
pub(crate) fn change(random: &mut Random, disk: &mut [u8], ranges: &[Range<usize>]) {
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = (at + 1 + usize::try_from(random.below(5 * CHUNK)).unwrap()).min(range.end);
            fill(random, &mut disk[at..end]);
            at = end;
        }
    }
}

/// What is in these ranges from `from` on, cut anywhere; what is zero comes as data or as zero.
pub(crate) fn pieces(random: &mut Random, disk: &[u8], ranges: &[Range<usize>], from: u64) -> Vec<Piece> {
    let from = usize::try_from(from).unwrap();
    let mut pieces = Vec::new();
    for range in ranges {
        let mut at = range.start.max(from);
        while at < range.end {
            let most = [512, CHUNK, CHUNK, 1 << 20, 5 << 20][usize::try_from(random.below(5)).unwrap()];
            let whole = random.below(2) * (CHUNK - 1);
            let length = usize::try_from((1 + random.below(most)).max(whole) & !whole).unwrap();
            let bytes = &disk[at..(at + length.max(1)).min(range.end)];
            let offset = at as u64;
            pieces.push(if is_zero(bytes) && random.below(4) > 0 {
                Piece::Zero {
                    offset,
                    length: bytes.len() as u64,
                }
            } else {
                Piece::Data {
                    offset,
                    data: bytes.to_vec(),
                }
            });
            at += bytes.len();
        }
    }
    pieces
}

fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    bytes
        .chunks(ZEROES.len())
        .all(|part| part == &ZEROES[..part.len()])
}

/// Writes an image of these ranges of a disk.
pub(crate) async fn write(
    place: &Place,
    random: &mut Random,
    point: &str,
    spec: &ImageSpec,
    disk: &[u8],
    ranges: &[Range<usize>],
) -> ImageSummary {
    let mut writer = ImageWriter::create(Arc::clone(&place.store), keys(point), spec.clone())
        .await
        .unwrap();
    for piece in pieces(random, disk, ranges, 0) {
        writer.write(piece).await.unwrap();
    }
    writer.finish().await.unwrap()
}

pub(crate) fn spec(size: usize, backing: Option<String>, compression: Compression) -> ImageSpec {
    ImageSpec {
        size: size as u64,
        backing,
        compression,
    }
}

/// What the chain reads as, over a disk that is below its lowest image. Pieces must come as is promised.
pub(crate) async fn read(place: &Place, layers: &[Layer], below: &[u8]) -> disksnap_backup::Result<Vec<u8>> {
    let mut reader = ChainReader::open(Arc::clone(&place.store), layers).await?;
    let size = reader.size();
    let mut disk = below.to_vec();
    disk.resize(usize::try_from(size).unwrap(), 0);
    let (mut at, mut zero_before) = (0, None);
    while let Some(piece) = reader.next().await? {
        let (offset, length) = match &piece {
            Piece::Data { offset, data } => (*offset, data.len() as u64),
            Piece::Zero { offset, length } => (*offset, *length),
        };
        assert!(offset >= at && length > 0, "pieces ascend");
        at = offset + length;
        assert!(
            offset % CHUNK == 0 && (at % CHUNK == 0 || at == size),
            "pieces are whole chunks"
        );
        let range = usize::try_from(offset).unwrap()..usize::try_from(at).unwrap();
        match piece {
            Piece::Data { data, .. } => {
                assert!(data.len() <= 1 << 20);
                disk[range].copy_from_slice(&data);
                zero_before = None;
            }
            Piece::Zero { .. } => {
                assert_ne!(zero_before, Some(offset), "neighbouring zeroes are one piece");
                disk[range].fill(0);
                zero_before = Some(at);
            }
        }
    }
    Ok(disk)
}

/// A disk's content digest by its definition.
pub(crate) fn content(disk: &[u8]) -> Digest {
    let digests: Vec<u8> = disk
        .chunks(usize::try_from(CHUNK).unwrap())
        .flat_map(|chunk| Digest::of(chunk).0)
        .collect();
    Digest::of(&digests)
}

/// Has `qemu-img check` look at an image: nothing is wrong, nothing is lost.
pub(crate) fn check(image: &Path) {
    let mut qemu_img = Command::new(tools::program("qemu-img"));
    let out = qemu_img
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(image)
        .output()
        .unwrap();
    let (text, error) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(out.status.success(), "{}: {text}{error}", image.display());
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    for fault in ["leaks", "corruptions", "check-errors"] {
        assert_eq!(
            report.get(fault).and_then(serde_json::Value::as_u64).unwrap_or(0),
            0,
            "{text}"
        );
    }
}

/// What QEMU reads from an image and all below it.
pub(crate) fn convert(place: &Place, image: &Path) -> Vec<u8> {
    try_convert(place, image).expect("qemu-img reads the image")
}

/// The same, where QEMU reads it.
pub(crate) fn try_convert(place: &Place, image: &Path) -> Option<Vec<u8>> {
    let raw = place.dir.path().join("converted.raw");
    let mut qemu_img = Command::new(tools::program("qemu-img"));
    let out = qemu_img
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(image)
        .arg(&raw)
        .output()
        .unwrap();
    if !out.status.success() {
        return None;
    }
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    Some(bytes)
}

/// Where two disks differ first, if they do: no test prints megabytes.
pub(crate) fn difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    let at = a.iter().zip(b).position(|(a, b)| a != b);
    Some(at.unwrap_or(a.len().min(b.len())))
}
