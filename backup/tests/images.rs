//! Images as `ImageWriter` makes them: QEMU finds nothing wrong with them, and reads the disk that they were made of.

#![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

mod model;

use std::sync::Arc;

use disksnap_backup::{
    CHUNK, ChainReader, Compression, ErrorKind, ImageSpec, ImageSummary, ImageWriter, Piece, content_digest,
};
use disksnap_test_support::pattern::Random;
use model::Place;

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Zstd(1), Compression::Zstd(9)];

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_images_is_sound_to_qemu_and_reads_as_the_disk() {
    for (seed, compression) in (0..).zip(COMPRESSIONS) {
        let mut random = Random::new(seed);
        let place = Place::new();
        // Not whole chunks, and not whole sectors.
        let mut disk = vec![0; (20 << 20) + [0, 3 * 512, 700][usize::try_from(seed).unwrap() % 3]];
        let (mut layers, mut parent) = (Vec::new(), None);
        for point in ["a", "b", "c", "d"] {
            let ranges = model::some_chunks(&mut random, disk.len());
            model::change(&mut random, &mut disk, &ranges);
            let ranges = if parent.is_none() {
                model::whole(&disk)
            } else {
                ranges
            };
            let spec = model::spec(disk.len(), parent.map(model::backing), compression);
            let summary = model::write(&place, &mut random, point, &spec, &disk, &ranges).await;
            layers.insert(0, model::layer(point, disk.len(), &summary));
            let image = place.file(&model::keys(point).image);
            assert_eq!(summary.image_bytes, image.metadata().unwrap().len());
            model::check(&image);
            let converted = model::convert(&place, &image);
            assert_eq!(
                model::difference(&converted[..disk.len()], &disk),
                None,
                "seed {seed}, {point}"
            );
            assert!(
                converted.len().is_multiple_of(512) && converted[disk.len()..].iter().all(|byte| *byte == 0)
            );
            let read = model::read(&place, &layers, &[]).await.unwrap();
            assert_eq!(model::difference(&read, &disk), None, "seed {seed}, {point}");
            assert_eq!(
                content_digest(place.store.as_ref(), &layers).await.unwrap(),
                model::content(&disk)
            );
            parent = Some(point);
        }
    }
}

/// Writes with interruptions: at each a new writer goes on from the last state, which went through JSON, after more was written
/// than that state knows of.
async fn write_interrupted(
    place: &Place,
    random: &mut Random,
    point: &str,
    spec: &ImageSpec,
    disk: &[u8],
    ranges: &[std::ops::Range<usize>],
) -> ImageSummary {
    let keys = model::keys(point);
    let mut writer = ImageWriter::create(Arc::clone(&place.store), keys.clone(), spec.clone())
        .await
        .unwrap();
    'again: loop {
        let (mut left, mut state) = (1 + random.below(40), None);
        for piece in model::pieces(random, disk, ranges, writer.offset()) {
            let reached = writer.offset();
            writer.write(piece).await.unwrap();
            if random.below(10) == 0 {
                let taken = writer.checkpoint().await.unwrap();
                assert!(
                    taken.offset <= writer.offset() && taken.spec == *spec,
                    "{} {reached}",
                    taken.offset
                );
                state = Some(serde_json::to_string(&taken).unwrap());
            }
            left -= 1;
            if left == 0
                && let Some(state) = &state
            {
                drop(writer);
                let state = serde_json::from_str(state).unwrap();
                writer = ImageWriter::resume(Arc::clone(&place.store), keys.clone(), state)
                    .await
                    .unwrap();
                continue 'again;
            }
            left = left.max(1);
        }
        return writer.finish().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_writer_makes_the_same_files() {
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let compression = COMPRESSIONS[usize::try_from(seed).unwrap() % 3];
        let (whole, interrupted) = (Place::new(), Place::new());
        let mut disk = vec![0; (24 << 20) + 512 * usize::try_from(random.below(300)).unwrap()];
        let all = model::whole(&disk);
        let some = model::some_chunks(&mut random, disk.len());
        model::change(&mut random, &mut disk, &all);
        for (point, parent, ranges) in [("a", None, all.as_slice()), ("b", Some("a"), some.as_slice())] {
            model::change(&mut random, &mut disk, &some);
            let spec = model::spec(disk.len(), parent.map(model::backing), compression);
            let a = model::write(&whole, &mut random, point, &spec, &disk, ranges).await;
            let b = write_interrupted(&interrupted, &mut random, point, &spec, &disk, ranges).await;
            assert_eq!(a, b, "seed {seed}, {point}");
            let keys = model::keys(point);
            for key in [&keys.image, &keys.chunks] {
                let difference = model::difference(&whole.read(key), &interrupted.read(key));
                assert_eq!(difference, None, "seed {seed}, {key}");
            }
            model::check(&interrupted.file(&keys.image));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_kept_is_told() {
    let place = Place::new();
    let spec = model::spec(1 << 20, None, Compression::None);
    let keys = model::keys("a");
    let mut writer = ImageWriter::create(Arc::clone(&place.store), keys.clone(), spec)
        .await
        .unwrap();
    writer
        .write(Piece::Data {
            offset: 0,
            data: vec![1; 1 << 19],
        })
        .await
        .unwrap();
    let state = writer.checkpoint().await.unwrap();
    drop(writer);
    place.store.discard(&keys.image).await.unwrap();
    let error = ImageWriter::resume(Arc::clone(&place.store), keys.clone(), state.clone())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    // A state that was tampered with is no reason to panic.
    let text = serde_json::to_string(&state).unwrap();
    let mut random = Random::new(1);
    for _ in 0..300 {
        let mut bytes = text.clone().into_bytes();
        let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
        bytes[at] = b"0123456789A"[usize::try_from(random.below(11)).unwrap()];
        if let Ok(state) = serde_json::from_slice(&bytes) {
            let _ = ImageWriter::resume(Arc::clone(&place.store), keys.clone(), state).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_that_cannot_be_are_refused() {
    let place = Place::new();
    let refused = async |backing: Option<&str>, pieces: Vec<Piece>| {
        let spec = model::spec(1 << 20, backing.map(model::backing), Compression::None);
        let mut writer = ImageWriter::create(Arc::clone(&place.store), model::keys("b"), spec)
            .await
            .unwrap();
        for piece in pieces {
            if let Err(error) = writer.write(piece).await {
                return error.kind();
            }
        }
        writer.finish().await.unwrap_err().kind()
    };
    let data = |offset: u64, length: usize| Piece::Data {
        offset,
        data: vec![1; length],
    };
    let chunk = usize::try_from(CHUNK).unwrap();
    // A full image with a gap, and one without its end.
    assert_eq!(refused(None, vec![data(CHUNK, chunk)]).await, ErrorKind::Internal);
    assert_eq!(refused(None, vec![data(0, chunk)]).await, ErrorKind::Internal);
    // Backwards, beyond the end, gaps that are not chunks'.
    assert_eq!(
        refused(Some("a"), vec![data(CHUNK, chunk), data(0, chunk)]).await,
        ErrorKind::Invalid
    );
    assert_eq!(
        refused(Some("a"), vec![data(CHUNK, 1 << 20)]).await,
        ErrorKind::Invalid
    );
    assert_eq!(
        refused(
            Some("a"),
            vec![Piece::Zero {
                offset: CHUNK,
                length: u64::MAX
            }]
        )
        .await,
        ErrorKind::Invalid
    );
    assert_eq!(
        refused(Some("a"), vec![data(512, chunk)]).await,
        ErrorKind::Invalid
    );
    assert_eq!(
        refused(Some("a"), vec![data(0, 512), data(CHUNK, chunk)]).await,
        ErrorKind::Invalid
    );
    assert_eq!(refused(Some("a"), vec![data(0, 512)]).await, ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_has_an_image() {
    let place = Place::new();
    let mut random = Random::new(0);
    let spec = model::spec(0, None, Compression::None);
    let summary = model::write(&place, &mut random, "a", &spec, &[], &[]).await;
    let image = place.file(&model::keys("a").image);
    model::check(&image);
    assert_eq!(model::convert(&place, &image).len(), 0);
    let layers = [model::layer("a", 0, &summary)];
    assert_eq!(model::read(&place, &layers, &[]).await.unwrap().len(), 0);
    assert_eq!(
        content_digest(place.store.as_ref(), &layers).await.unwrap(),
        model::content(&[])
    );
}

/// A large disk with little in it: pieces here and there, zeroes between them.
async fn write_sparse(
    place: &Place,
    size: u64,
    data: u64,
    compression: Compression,
) -> (ImageSummary, usize) {
    let spec = ImageSpec {
        size,
        backing: None,
        compression,
    };
    let mut writer = ImageWriter::create(Arc::clone(&place.store), model::keys("a"), spec)
        .await
        .unwrap();
    let (step, mut largest) = (size / data / CHUNK * CHUNK, 0);
    for n in 0..data {
        let offset = n * step;
        let bytes = disksnap_test_support::pattern::bytes(n, 1 << 20);
        writer.write(Piece::Data { offset, data: bytes }).await.unwrap();
        writer
            .write(Piece::Zero {
                offset: offset + (1 << 20),
                length: step - (1 << 20),
            })
            .await
            .unwrap();
        if n % 37 == 0 {
            let state = serde_json::to_vec(&writer.checkpoint().await.unwrap()).unwrap();
            largest = largest.max(state.len());
        }
    }
    let end = data * step;
    writer
        .write(Piece::Zero {
            offset: end,
            length: size - end,
        })
        .await
        .unwrap();
    (writer.finish().await.unwrap(), largest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_disk_with_little_in_it_makes_a_small_image() {
    for (size, compression) in [(1 << 40, Compression::None), (16 << 40, Compression::Zstd(1))] {
        let place = Place::new();
        let (summary, state) = write_sparse(&place, size, 100, compression).await;
        assert_eq!((summary.data, summary.zero), (100 << 20, size - (100 << 20)));
        // The data, an L2 table for each of its places, and the L1 table.
        assert!(summary.image_bytes < 110 << 20, "{} bytes", summary.image_bytes);
        assert!(place.file(&model::keys("a").chunks).metadata().unwrap().len() < 1 << 20);
        assert!(state < 1 << 20, "a state of {state} bytes");
        model::check(&place.file(&model::keys("a").image));
        let (layers, mut data) = (
            [disksnap_backup::Layer {
                size,
                ..model::layer("a", 0, &summary)
            }],
            0,
        );
        let mut reader = ChainReader::open(Arc::clone(&place.store), &layers)
            .await
            .unwrap();
        while let Some(piece) = reader.next().await.unwrap() {
            if let Piece::Data { data: bytes, .. } = piece {
                data += bytes.len();
            }
        }
        assert_eq!(data, 100 << 20);
    }
}
