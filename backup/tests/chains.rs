//! Chains as `ChainReader` reads them: whatever a disk's life was, and whatever is wrong with a file.

#![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

mod model;

use std::sync::Arc;

use disksnap_backup::{CHUNK, ChainReader, Compression, Error, ErrorKind, Layer, content_digest};
use disksnap_test_support::pattern::Random;
use model::Place;
use proptest::prelude::*;

/// A disk's life: its content and the layers at each point, the newest first.
struct Life {
    place: Place,
    points: Vec<Point>,
}

type Point = (Vec<u8>, Vec<Layer>);

/// Points of a disk that changes and is resized.
async fn live(seed: u64, points: usize) -> Life {
    let mut random = Random::new(seed);
    let place = Place::new();
    let (mut disk, mut lived): (Vec<u8>, Vec<Point>) = (Vec::new(), Vec::new());
    for n in 0..points {
        let before = disk.len();
        if n == 0 || random.below(3) == 0 {
            disk.resize(512 * usize::try_from(1 + random.below(4000)).unwrap(), 0);
        }
        let size = disk.len();
        let mut ranges = if n == 0 {
            model::whole(&disk)
        } else {
            model::some_chunks(&mut random, size)
        };
        model::change(&mut random, &mut disk, &ranges);
        // QEMU gives zeroes where the disk has grown; that is not written down, or it is.
        if before < size && n > 0 && random.below(2) == 0 {
            let chunk = usize::try_from(CHUNK).unwrap();
            let grown = before / chunk * chunk;
            ranges.retain(|range| range.start < grown);
            if let Some(last) = ranges.last_mut() {
                last.end = last.end.min(grown);
            }
            ranges.push(grown..size);
        }
        let point = n.to_string();
        let compression =
            [Compression::None, Compression::Zstd(3)][usize::try_from(random.below(2)).unwrap()];
        let backing = (n > 0).then(|| model::backing(&(n - 1).to_string()));
        let spec = model::spec(size, backing, compression);
        let summary = model::write(&place, &mut random, &point, &spec, &disk, &ranges).await;
        let mut layers = vec![model::layer(&point, size, &summary)];
        layers.extend(lived.last().iter().flat_map(|(_, layers)| layers.iter().cloned()));
        lived.push((disk.clone(), layers));
    }
    Life { place, points: lived }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_point_reads_as_the_disk_was_and_as_qemu_reads_it() {
    for seed in 0..8 {
        let Life { place, points } = live(seed, 5).await;
        for (n, (disk, layers)) in points.iter().enumerate() {
            let read = model::read(&place, layers, &[]).await.unwrap();
            assert_eq!(model::difference(&read, disk), None, "seed {seed}, point {n}");
            let image = place.file(&layers[0].image);
            model::check(&image);
            assert_eq!(
                model::difference(&model::convert(&place, &image), disk),
                None,
                "seed {seed}, point {n}: QEMU"
            );
            let content = content_digest(place.store.as_ref(), layers).await.unwrap();
            assert_eq!(content, model::content(disk), "seed {seed}, point {n}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lives_read_right(seed in any::<u64>(), points in 1_usize..7) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let Life { place, points } = live(seed, points).await;
            let (disk, layers) = points.last().unwrap();
            let read = model::read(&place, layers, &[]).await.unwrap();
            prop_assert_eq!(model::difference(&read, disk), None);
            let content = content_digest(place.store.as_ref(), layers).await.unwrap();
            prop_assert_eq!(content, model::content(disk));
            Ok(())
        })?;
    }
}

/// Layers of a chain without resizes read as an increment: laid over the point below them they give the point.
#[tokio::test(flavor = "multi_thread")]
async fn the_upper_layers_are_an_increment_over_what_is_below() {
    let mut random = Random::new(7);
    let place = Place::new();
    let mut disk = vec![0; 3 << 20];
    let (mut layers, mut below): (Vec<Layer>, Vec<u8>) = (Vec::new(), Vec::new());
    for n in 0..5 {
        let ranges = if n == 0 {
            model::whole(&disk)
        } else {
            model::some_chunks(&mut random, disk.len())
        };
        model::change(&mut random, &mut disk, &ranges);
        let backing = (n > 0).then(|| model::backing(&(n - 1).to_string()));
        let spec = model::spec(disk.len(), backing, Compression::None);
        let summary = model::write(&place, &mut random, &n.to_string(), &spec, &disk, &ranges).await;
        layers.insert(0, model::layer(&n.to_string(), disk.len(), &summary));
        if n == 2 {
            below.clone_from(&disk);
        }
    }
    let read = model::read(&place, &layers[..2], &below).await.unwrap();
    assert_eq!(model::difference(&read, &disk), None);
    let error = content_digest(place.store.as_ref(), &layers[..2])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
}

/// A chain of two points, small enough to damage it in many places.
async fn small_chain(compression: Compression) -> (Place, Vec<u8>, Vec<Layer>) {
    let mut random = Random::new(3);
    let place = Place::new();
    let mut disk = vec![0; (1 << 20) + 512];
    let (mut layers, mut parent) = (Vec::new(), None);
    for (point, ranges) in [
        ("a", model::whole(&disk)),
        ("b", vec![0..1 << 17, 3 << 17..4 << 17]),
    ] {
        model::change(&mut random, &mut disk, &ranges);
        // Zero in the increment where the full image has data: an entry of its own.
        if point == "b" {
            disk[..1 << 16].fill(0);
        }
        let spec = model::spec(disk.len(), parent.map(model::backing), compression);
        let summary = model::write(&place, &mut random, point, &spec, &disk, &ranges).await;
        layers.insert(0, model::layer(point, disk.len(), &summary));
        parent = Some(point);
    }
    (place, disk, layers)
}

/// What reading each image on its own finds, the newest first, as verifying does.
async fn verify(place: &Place, layers: &[Layer]) -> Result<(), Error> {
    for layer in layers {
        let mut reader = ChainReader::open(Arc::clone(&place.store), std::slice::from_ref(layer)).await?;
        while reader.next().await?.is_some() {}
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_and_named() {
    for compression in [Compression::None, Compression::Zstd(3)] {
        let (place, disk, layers) = small_chain(compression).await;
        verify(&place, &layers).await.unwrap();
        for layer in &layers {
            for key in [&layer.image, &layer.chunks] {
                let (path, sound) = (place.file(key), place.read(key));
                let mut random = Random::new(sound.len() as u64);
                let is_image = key == &layer.image;
                for _ in 0..60 {
                    let at = usize::try_from(random.below(sound.len() as u64)).unwrap();
                    let mut flipped = sound.clone();
                    flipped[at] ^= 1 << random.below(8);
                    std::fs::write(&path, &flipped).unwrap();
                    if let Err(error) = verify(&place, &layers).await {
                        assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
                        let named: Vec<_> = error.context().collect();
                        assert!(named.contains(&("point", layer.point.as_str())), "{error}");
                        assert!(named.contains(&("object", key.as_str())), "{error}");
                        assert!(named.iter().any(|(what, _)| *what == "offset"), "{error}");
                        continue;
                    }
                    // What no reading of the disk looks at: what fills clusters up, refcounts, the rest of the header.
                    assert!(is_image, "byte {at} of {key}");
                    let read = model::read(&place, &layers, &[]).await.unwrap();
                    assert_eq!(model::difference(&read, &disk), None, "byte {at} of {key}");
                    let qemu = model::try_convert(&place, &place.file(&layers[0].image));
                    let same = qemu.is_none_or(|qemu| qemu == disk);
                    assert!(same, "byte {at} of {key}: QEMU reads something else");
                }
                std::fs::write(&path, &sound).unwrap();
            }
        }
    }
}

/// Every bit of the L2 tables and of the data's clusters counts.
#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_entry_of_a_table_is_found() {
    for compression in [Compression::None, Compression::Zstd(3)] {
        let (place, _, layers) = small_chain(compression).await;
        for layer in &layers {
            let (path, sound) = (place.file(&layer.image), place.read(&layer.image));
            let number = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
            let l1 = usize::try_from(number(40)).unwrap();
            let l2 = usize::try_from(number(l1) & !(1 << 63)).unwrap();
            let entries = usize::try_from(layer.size.div_ceil(CHUNK)).unwrap();
            let bits = (0..64)
                .map(|bit| (l1, bit))
                .chain((0..entries * 64).map(|bit| (l2, bit)));
            for (table, bit) in bits {
                let mut flipped = sound.clone();
                flipped[table + bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, &flipped).unwrap();
                let found = verify(&place, std::slice::from_ref(layer)).await;
                let error =
                    found.expect_err(&format!("bit {bit} of the table at {table} of {}", layer.image));
                assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
            }
            std::fs::write(&path, &sound).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn torn_and_missing_files_are_told() {
    let (place, _, layers) = small_chain(Compression::Zstd(3)).await;
    for key in [&layers[1].image, &layers[1].chunks] {
        let (path, sound) = (place.file(key), place.read(key));
        for length in [0, 1, 31, 32, 40, 100, sound.len() / 2, sound.len() - 1] {
            std::fs::write(&path, &sound[..length]).unwrap();
            let error = verify(&place, &layers).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Broken, "{length}: {error}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = model::read(&place, &layers, &[]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
        assert!(error.to_string().contains(key.as_str()), "{error}");
        std::fs::write(&path, &sound).unwrap();
    }
}

/// A file of digests that somebody made, with the right digest of its own, does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_digests_are_told() {
    let (place, _, layers) = small_chain(Compression::None).await;
    let layer = layers[1].clone();
    let sound = place.read(&layer.chunks);
    let record = |first: u64, count: u32, kind: u32| {
        [
            first.to_le_bytes().as_slice(),
            &count.to_le_bytes(),
            &kind.to_le_bytes(),
        ]
        .concat()
    };
    let end = record(u64::MAX, 0, 2);
    let bodies = [
        vec![],
        end.clone(),
        record(0, u32::MAX, 1),
        [record(0, 17, 0), end.clone()].concat(),
        [record(0, 18, 0), end.clone()].concat(),
        [record(u64::MAX, 1, 0), end.clone()].concat(),
        [record(5, 0, 0), end.clone()].concat(),
        [record(5, 1, 9), end.clone()].concat(),
        [record(5, 2, 0), record(6, 1, 0), end.clone()].concat(),
        [record(0, 17, 0), end.clone(), vec![0]].concat(),
        [record(0, 1 << 16, 1), vec![7; 1 << 16], end].concat(),
    ];
    for (n, body) in bodies.iter().enumerate() {
        let bytes = [&sound[..32], body].concat();
        std::fs::write(place.file(&layer.chunks), &bytes).unwrap();
        let hostile = Layer {
            chunks_digest: disksnap_backup::Digest::of(&bytes),
            ..layer.clone()
        };
        let error = verify(&place, std::slice::from_ref(&hostile))
            .await
            .expect_err(&n.to_string());
        assert_eq!(error.kind(), ErrorKind::Broken, "{n}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_other_chains_are_told() {
    let (place, _, layers) = small_chain(Compression::None).await;
    // The increment is not over that image.
    let other = Layer {
        image: "web1/c/vda.qcow2".to_owned(),
        ..layers[1].clone()
    };
    std::fs::create_dir(place.file("web1/c")).unwrap();
    std::fs::copy(place.file(&layers[1].image), place.file(&other.image)).unwrap();
    let error = model::read(&place, &[layers[0].clone(), other], &[])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
    let message = "its header names the backing file '../a/vda.qcow2', and 'web1/c/vda.qcow2' is below it";
    assert_eq!(error.message(), message);
    // The images were swapped.
    std::fs::rename(place.file(&layers[1].image), place.file("web1/swap")).unwrap();
    std::fs::rename(place.file(&layers[0].image), place.file(&layers[1].image)).unwrap();
    std::fs::rename(place.file("web1/swap"), place.file(&layers[0].image)).unwrap();
    assert_eq!(
        verify(&place, &layers).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    assert_eq!(
        verify(&place, &layers[1..]).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    // Another size than the manifest says.
    for size in [0, 1 << 20, u64::MAX] {
        let resized = Layer {
            size,
            ..layers[1].clone()
        };
        let error = verify(&place, std::slice::from_ref(&resized)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
        let error = content_digest(place.store.as_ref(), &[resized])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    }
}
