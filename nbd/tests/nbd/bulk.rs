//! Bulk reads of real images: nothing skipped, nothing doubled, zeroes said to be zero.

use std::ops::Range;
use std::time::Duration;

use disksnap_nbd::{BulkOptions, BulkReader, Chunk, Client, CommandFlags, Error, dirty_bitmap_context};

use crate::server::{Server, directory, image, noise, run, with_contexts};

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::empty();

/// Everything of `start..start + length`, checked for order and gaps; how many bytes came as data.
async fn collect(mut reader: BulkReader, start: u64, length: u64) -> (Vec<u8>, u64) {
    let (mut bytes, mut data_bytes) = (Vec::new(), 0);
    while let Some(chunk) = reader.next().await.unwrap() {
        assert_eq!(chunk.offset(), start + bytes.len() as u64);
        assert!(chunk.length() > 0);
        match chunk {
            Chunk::Data { data, .. } => {
                data_bytes += data.len() as u64;
                bytes.extend_from_slice(&data);
            }
            Chunk::Zero { length, .. } => bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0),
        }
    }
    assert_eq!(bytes.len() as u64, length);
    assert_eq!(reader.next().await.unwrap(), None);
    (bytes, data_bytes)
}

/// A qcow2 with data, holes and zeroed clusters, and what it holds.
async fn patchwork(path: &str, size: u64) -> Vec<u8> {
    let server = Server::qemu_nbd(&["--format", "qcow2", path]);
    let client = server.connect().await;
    let mut expected = vec![0; usize::try_from(size).unwrap()];
    for i in 0..24_u64 {
        let offset = (i * 2_777_777) % (size - 300_000);
        let data = noise(i, 70_000 + usize::try_from(i).unwrap() * 5000);
        let at = usize::try_from(offset).unwrap();
        expected[at..at + data.len()].copy_from_slice(&data);
        client.write(offset, data, NONE).await.unwrap();
    }
    client.write_zeroes(3 * MIB, MIB, NONE).await.unwrap();
    expected[3 << 20..4 << 20].fill(0);
    client.flush().await.unwrap();
    client.disconnect().await;
    server.stop();
    expected
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_disk_in_many_ways() {
    let dir = directory();
    let size = 48 * MIB + 512;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let expected = patchwork(path.to_str().unwrap(), size).await;
    let server = Server::qemu_nbd(&[
        "--shared=4",
        "--read-only",
        "--format",
        "qcow2",
        path.to_str().unwrap(),
    ]);
    for connections in [1, 4] {
        for (request_size, in_flight, skip_zeroes) in [
            (256 << 10, 16, true),
            (4096, 3, true),
            (1 << 20, 1, false),
            (1, 64, true),
            (u32::MAX, 2, true),
        ] {
            // A byte at a time only for a short way.
            let range = if request_size == 1 {
                65_000..66_000
            } else {
                0..size
            };
            let bulk = BulkOptions {
                request_size,
                in_flight,
                skip_zeroes,
                ..BulkOptions::default()
            };
            let clients = Client::connect_many(&server.uri, &with_contexts(&[]), connections)
                .await
                .unwrap();
            assert_eq!(clients.len(), connections);
            let reader = BulkReader::new(clients, range.clone(), &bulk).unwrap();
            let (bytes, data) = collect(reader, range.start, range.end - range.start).await;
            let index = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            assert!(bytes == expected[index], "{bulk:?}");
            assert!(
                !skip_zeroes || data < size / 4,
                "zeroes were fetched: {data} bytes by {bulk:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_part_with_odd_ends() {
    let dir = directory();
    let size = 48 * MIB;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let expected = patchwork(path.to_str().unwrap(), size).await;
    let server = Server::qemu_nbd(&["--read-only", "--format", "qcow2", path.to_str().unwrap()]);
    for range in [
        1..size - 1,
        70_001..70_002,
        5..5,
        size..size,
        2_777_777..9_000_001,
    ] {
        let client = server.connect_with(&[]).await;
        let reader = BulkReader::new(vec![client], range.clone(), &BulkOptions::default()).unwrap();
        let (bytes, _) = collect(reader, range.start, range.end - range.start).await;
        let index = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert!(bytes == expected[index], "{range:?}");
    }
    let client = server.connect().await;
    let error = BulkReader::new(vec![client], 0..size + 1, &BulkOptions::default()).unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
}

#[tokio::test]
async fn only_what_changed_and_what_became_zero_too() {
    let dir = directory();
    let path = image(dir.path(), "disk.qcow2", "qcow2", 64 * MIB);
    let name = path.to_str().unwrap();
    {
        let server = Server::qemu_nbd(&["--format", "qcow2", name]);
        let client = server.connect().await;
        client.write(0, noise(1, 32 << 20), NONE).await.unwrap();
        client.disconnect().await;
        server.stop();
    }
    run("qemu-img", &["bitmap", "--add", name, "b0"]);
    let changed = noise(2, 65_536);
    {
        let server = Server::qemu_nbd(&["--discard=unmap", "--format", "qcow2", name]);
        let client = server.connect().await;
        client.write(MIB, changed.clone(), NONE).await.unwrap();
        client.write_zeroes(2 * MIB, 65_536, NONE).await.unwrap();
        // Long enough to ask where it is zero; a little of it is not.
        client.write_zeroes(8 * MIB, 8 * MIB, NONE).await.unwrap();
        client.write(10 * MIB, changed.clone(), NONE).await.unwrap();
        client.trim(40 * MIB, 65_536, NONE).await.unwrap();
        client.disconnect().await;
        server.stop();
    }
    run("qemu-img", &["bitmap", "--disable", name, "b0"]);
    let server = Server::qemu_nbd(&["--read-only", "--bitmap=b0", "--format", "qcow2", name]);
    let context = dirty_bitmap_context("b0");
    for skip_zeroes in [true, false] {
        let client = server.connect_with(&[&context]).await;
        let bulk = BulkOptions {
            only_changed: Some(context.clone()),
            skip_zeroes,
            ..BulkOptions::default()
        };
        let mut reader = BulkReader::new(vec![client], 0..64 * MIB, &bulk).unwrap();
        let mut chunks = Vec::new();
        while let Some(chunk) = reader.next().await.unwrap() {
            chunks.push(chunk);
        }
        let data: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| match chunk {
                Chunk::Data { offset, data } => Some((*offset, data.to_vec())),
                Chunk::Zero { .. } => None,
            })
            .collect();
        let first = (MIB, changed.clone());
        assert!(data[0] == first && data[1].0 == 10 * MIB && data[1].1[..65_536] == changed[..]);
        assert_eq!(data.len(), 2);
        let zeroes = |from: u64, to: u64| -> u64 {
            let zero = chunks.iter().filter(|chunk| matches!(chunk, Chunk::Zero { .. }));
            zero.filter(|chunk| (from..to).contains(&chunk.offset()))
                .map(Chunk::length)
                .sum()
        };
        assert_eq!(zeroes(2 * MIB, 3 * MIB), 65_536);
        assert_eq!(zeroes(8 * MIB, 16 * MIB) + data[1].1.len() as u64, 8 * MIB);
        assert_eq!(zeroes(40 * MIB, 41 * MIB), 65_536);
    }
}

#[tokio::test]
async fn given_up_and_taken_up_again_nothing_is_lost() {
    let dir = directory();
    let size = 48 * MIB;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let expected = patchwork(path.to_str().unwrap(), size).await;
    let server = Server::qemu_nbd(&["--read-only", "--format", "qcow2", path.to_str().unwrap()]);
    let client = server.connect_with(&[]).await;
    let bulk = BulkOptions {
        request_size: 16 << 10,
        in_flight: 4,
        ..BulkOptions::default()
    };
    let mut reader = BulkReader::new(vec![client], 0..size, &bulk).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    let mut given_up = 0;
    loop {
        // Polled once at most, then dropped, over and over.
        let Ok(chunk) = tokio::time::timeout(Duration::ZERO, reader.next()).await else {
            given_up += 1;
            continue;
        };
        match chunk.unwrap() {
            None => break,
            Some(Chunk::Data { data, .. }) => bytes.extend_from_slice(&data),
            Some(Chunk::Zero { length, .. }) => {
                bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0);
            }
        }
    }
    assert!(given_up > 0);
    assert!(bytes == expected);
}

#[tokio::test]
async fn a_server_that_dies_half_way() {
    let mut server = Server::qemu_nbd(&[
        "--shared=2",
        "--read-only",
        "--image-opts",
        "driver=null-co,size=1T,read-zeroes=off",
    ]);
    let clients = Client::connect_many(&server.uri, &with_contexts(&[]), 2)
        .await
        .unwrap();
    let bulk = BulkOptions {
        skip_zeroes: false,
        ..BulkOptions::default()
    };
    let mut reader = BulkReader::new(clients, 0..1 << 40, &bulk).unwrap();
    for _ in 0..100 {
        assert!(reader.next().await.unwrap().is_some());
    }
    server.kill();
    let error = loop {
        match reader.next().await {
            Ok(chunk) => assert!(chunk.is_some()),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert!(reader.next().await.is_err(), "an end would look like success");
}

/// A disk with writes of all sizes, zeroed and discarded parts since its bitmap `b0` began; what it holds.
async fn altered(path: &str, size: u64) -> Vec<u8> {
    patchwork(path, size).await;
    run("qemu-img", &["bitmap", "--add", "-g", "4096", path, "b0"]);
    let server = Server::qemu_nbd(&["--discard=unmap", "--format", "qcow2", path]);
    let client = server.connect().await;
    for i in 0..20_u64 {
        let offset = (i * i * 90_001) % (size - 20_000);
        let data = noise(100 + i, 1 + usize::try_from(i * 700).unwrap());
        client.write(offset, data, NONE).await.unwrap();
    }
    // Long enough to ask where they are zero, with ends within units.
    client.write_zeroes(20 * MIB + 4096, 3 * MIB, NONE).await.unwrap();
    client.write(21 * MIB + 512, noise(7, 512), NONE).await.unwrap();
    client.trim(30 * MIB + 65_536, MIB, NONE).await.unwrap();
    client.write(size - 100, noise(8, 100), NONE).await.unwrap();
    let expected = client.read(0, usize::try_from(size).unwrap()).await.unwrap();
    client.disconnect().await;
    server.stop();
    run("qemu-img", &["bitmap", "--disable", path, "b0"]);
    expected.into()
}

/// The units of a disk that one of the ranges touches.
fn units(ranges: &[Range<u64>], unit: u64, size: u64) -> Vec<bool> {
    let mut touched = vec![false; usize::try_from(size.div_ceil(unit)).unwrap()];
    for range in ranges {
        for n in range.start / unit..range.end.min(size).div_ceil(unit) {
            touched[usize::try_from(n).unwrap()] = true;
        }
    }
    touched
}

/// What came: checked to ascend in whole units and to be what the disk holds.
async fn in_units(reader: &mut BulkReader, unit: u64, expected: &[u8]) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    while let Some(chunk) = reader.next().await.unwrap() {
        let range = chunk.offset()..chunk.offset() + chunk.length();
        assert!(
            found.last().is_none_or(|last| last.end <= range.start),
            "{range:?} after {found:?}"
        );
        for end in [range.start, range.end] {
            assert!(
                end % unit == 0 || end == expected.len() as u64,
                "{range:?} in units of {unit}"
            );
        }
        let holds = &expected[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        match chunk {
            Chunk::Data { data, .. } => assert!(data == holds, "{range:?}"),
            Chunk::Zero { .. } => assert!(holds.iter().all(|byte| *byte == 0), "{range:?}"),
        }
        found.push(range);
    }
    found
}

#[tokio::test]
async fn what_changed_comes_in_whole_units_with_the_rest_of_them() {
    let dir = directory();
    let size = 48 * MIB + 1536;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let name = path.to_str().unwrap();
    let expected = altered(name, size).await;
    let server = Server::qemu_nbd(&[
        "--read-only",
        "--bitmap=b0",
        "--shared=2",
        "--format",
        "qcow2",
        name,
    ]);
    let context = dirty_bitmap_context("b0");
    let client = server.connect_with(&[&context]).await;
    let mut dirty = Vec::new();
    let mut extents = client.extents(&context, 0..size).unwrap();
    while let Some(extent) = extents.next().await.unwrap() {
        dirty.extend(extent.is_dirty().then_some(extent.offset..extent.end()));
    }
    assert!(dirty.len() > 10, "{dirty:?}");
    let grown = [
        40 * MIB + 5..size,
        2 * MIB..2 * MIB + 1,
        40 * MIB..41 * MIB,
        size..u64::MAX,
    ];
    for (unit, also, skip_zeroes) in [
        (1, &grown[..0], true),
        (512, &grown[..], true),
        (65_536, &grown[..0], true),
        (65_536, &grown[..], false),
        (12_288, &grown[..], true),
        (MIB, &grown[..0], true),
        (3 * MIB, &grown[..], true),
    ] {
        let bulk = BulkOptions {
            only_changed: Some(context.clone()),
            round_to: unit,
            also: also.to_vec(),
            skip_zeroes,
            request_size: 100_000,
            ..BulkOptions::default()
        };
        let read = |range| BulkReader::new(vec![client.clone()], range, &bulk).unwrap();
        let found = in_units(&mut read(0..size), unit, &expected).await;
        let wanted = units(&[&dirty[..], also].concat(), unit, size);
        assert!(units(&found, unit, size) == wanted, "{unit}: {found:?}");
        // From the end of any chunk on, the rest comes.
        let middle = found[found.len() / 2].end;
        let rest = in_units(&mut read(middle..size), unit, &expected).await;
        let wanted: Vec<_> = found
            .iter()
            .filter(|range| range.start >= middle)
            .cloned()
            .collect();
        assert!(
            units(&rest, unit, size) == units(&wanted, unit, size),
            "{unit}: {rest:?}"
        );
    }
}

#[tokio::test]
async fn everything_comes_in_whole_units_too() {
    let dir = directory();
    let size = 48 * MIB + 1536;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let expected = patchwork(path.to_str().unwrap(), size).await;
    let server = Server::qemu_nbd(&["--read-only", "--format", "qcow2", path.to_str().unwrap()]);
    let client = server.connect_with(&[]).await;
    for unit in [65_536, MIB, 100_000] {
        let bulk = BulkOptions {
            round_to: unit,
            ..BulkOptions::default()
        };
        let mut reader = BulkReader::new(vec![client.clone()], 0..size, &bulk).unwrap();
        let found = in_units(&mut reader, unit, &expected).await;
        assert!(units(&found, unit, size).iter().all(|touched| *touched));
        assert!(found.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
