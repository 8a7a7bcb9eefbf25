//! What two snapshots are told to differ in, against what they hold: byte for byte.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use disksnap_btrfs::Btrfs;
use disksnap_core::{Capability, Changed, DiskSnapshot, Error, ErrorKind, Peer, Precision, Snapshot};
use disksnap_test_support::pattern::{Random, bytes};
use disksnap_test_support::{LoopFsKind, loop_fs, need};
use futures_util::{StreamExt, TryStreamExt};
use rustix::fs::{FallocateFlags, IFlags, copy_file_range, fallocate, ioctl_setflags};
use support::rig::{Rig, disk, file};
use support::{btrfs, create, delete, run};

const MIB: u64 = 1 << 20;
/// The sector of btrfs.
const SECTOR: u64 = 4096;

fn peer(snapshot: &Snapshot) -> Peer {
    Peer {
        snapshot: snapshot.id,
        unit: snapshot.units[0].unit.clone(),
    }
}

async fn changed(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Result<Changed, Error> {
    let (earlier, later) = (peer(earlier), peer(later));
    let compare = Btrfs.compare(&earlier.unit).unwrap();
    compare
        .changed(&*rig.control().await, &earlier, &later, "vda")
        .await
}

/// The ranges, as far as they keep their promises: ascending, not empty, none touching another, all in the disk.
async fn ranges(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Vec<Range<u64>> {
    let Changed {
        size,
        precision,
        ranges,
    } = changed(rig, earlier, later).await.unwrap();
    assert!(matches!(precision, Precision::Superset(_)));
    assert_eq!(size, file(later, "vda").metadata().unwrap().len());
    let ranges: Vec<Range<u64>> = ranges.try_collect().await.unwrap();
    assert!(
        ranges
            .iter()
            .all(|range| range.start < range.end && range.end <= size),
        "{ranges:?}"
    );
    assert!(
        ranges.windows(2).all(|two| two[0].end < two[1].start),
        "{ranges:?}"
    );
    ranges
}

/// The earlier content with the told ranges of the later one is the later content.
async fn assert_told(rig: &Rig, earlier: &Snapshot, later: &Snapshot, what: &str) -> Vec<Range<u64>> {
    let told = ranges(rig, earlier, later).await;
    let (mut was, is) = (content(earlier), content(later));
    was.resize(is.len(), 0xee);
    for Range { start, end } in &told {
        let range = usize::try_from(*start).unwrap()..usize::try_from(*end).unwrap();
        was[range.clone()].copy_from_slice(&is[range]);
    }
    if was != is {
        let missed = was.iter().zip(&is).position(|(was, is)| was != is);
        panic!("{what}: missed is {missed:?}; told were {told:?}");
    }
    told
}

fn content(snapshot: &Snapshot) -> Vec<u8> {
    fs::read(file(snapshot, "vda")).unwrap()
}

fn open(image: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(image)
        .unwrap()
}

/// What may happen to an image between two snapshots.
struct Life {
    image: PathBuf,
    random: Random,
    round: u64,
}

impl Life {
    fn new(image: &Path, seed: u64) -> Self {
        Self {
            image: image.to_owned(),
            random: Random::new(seed),
            round: 0,
        }
    }

    fn length(&self) -> u64 {
        self.image.metadata().unwrap().len()
    }

    fn one_of(&mut self, all: &[Snapshot]) -> usize {
        usize::try_from(self.random.below(all.len() as u64)).unwrap()
    }

    /// A range in the image, more often than not of whole sectors.
    fn range(&mut self, longest: u64) -> (u64, u64) {
        let (start, length) = (
            self.random.below(self.length().max(1)),
            1 + self.random.below(longest),
        );
        if self.random.below(3) == 0 {
            (start, length)
        } else {
            (start / SECTOR * SECTOR, length.next_multiple_of(SECTOR))
        }
    }

    /// Does one thing to it; says what.
    fn step(&mut self) -> String {
        self.round += 1;
        let file = open(&self.image);
        let (start, length) = self.range(200 << 10);
        let (seed, other) = (self.round, self.range(1).0 / SECTOR * SECTOR);
        let whole = length.next_multiple_of(SECTOR);
        match self.random.below(12) {
            0..4 => file
                .write_all_at(&bytes(seed, usize::try_from(length).unwrap()), start)
                .unwrap(),
            // What compresses.
            4 | 5 => file
                .write_all_at(&vec![seed as u8; usize::try_from(length).unwrap()], start)
                .unwrap(),
            6 => file
                .write_all_at(&vec![0; usize::try_from(length).unwrap()], start)
                .unwrap(),
            7 => allocate(
                &file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                start,
                length,
            ),
            8 => allocate(
                &file,
                FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                start,
                length,
            ),
            9 => allocate(&file, FallocateFlags::KEEP_SIZE, start, length),
            10 => {
                let (mut from, mut to) = (other, start / SECTOR * SECTOR);
                let length = usize::try_from(whole.min(from.abs_diff(to))).unwrap();
                copy_file_range(&file, Some(&mut from), &file, Some(&mut to), length).unwrap();
            }
            _ => {
                let sizes = [
                    self.length() + self.random.below(MIB),
                    3 * MIB - self.random.below(MIB),
                ];
                file.set_len(sizes[usize::from(self.length() > 3 * MIB)]).unwrap();
            }
        }
        if self.random.below(3) == 0 {
            file.sync_data().unwrap();
        }
        format!("round {seed}, {length} bytes at {start}")
    }
}

fn allocate(file: &File, how: FallocateFlags, start: u64, length: u64) {
    fallocate(file, how, start, length).unwrap();
}

/// A random life of a disk with snapshots; any two that are there are compared, in any order.
async fn lives(images: &Path, seed: u64, rounds: usize, prepare: fn(&File)) {
    let image = images.join("a.raw");
    let empty = open(&image);
    prepare(&empty);
    empty.write_all_at(&bytes(seed, 2 << 20), 0).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let mut life = Life::new(&image, seed);
    let mut all = vec![rig.create("first").await];
    // Which of them the image was like, before what was done last.
    let mut like = 0;
    for round in 0..rounds {
        let done: Vec<String> = (0..life.random.below(6)).map(|_| life.step()).collect();
        all.push(rig.create(&round.to_string()).await);
        let what = format!("seed {seed}, {done:?}");
        let (last, any) = (all.len() - 1, life.one_of(&all));
        let told = assert_told(&rig, &all[like], &all[last], &what).await;
        assert!(
            !done.is_empty() || told.is_empty(),
            "nothing was done, and told is {told:?}"
        );
        assert_told(&rig, &all[any], &all[last], &what).await;
        assert_told(&rig, &all[last], &all[any], &what).await;
        if all.len() > 5 {
            let gone = all.remove(0);
            rig.delete(&gone.name.to_string()).await;
        }
        like = all.len() - 1;
        if life.random.below(4) == 0 {
            like = life.one_of(&all);
            rig.revert(&all[like]).await.unwrap();
        }
    }
}

#[tokio::test]
async fn nothing_is_missed() {
    need!("btrfs");
    let fs = btrfs();
    for seed in 0..2 {
        lives(
            &create(&fs.path().join(format!("images{seed}"))),
            seed,
            40,
            |_| {},
        )
        .await;
    }
}

#[tokio::test]
async fn nothing_is_missed_where_it_is_compressed() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 << 20, "compress-force=zstd");
    for seed in 10..12 {
        lives(
            &create(&fs.path().join(format!("images{seed}"))),
            seed,
            40,
            |_| {},
        )
        .await;
    }
}

#[tokio::test]
async fn nothing_is_missed_of_a_nocow_file() {
    need!("btrfs");
    let fs = btrfs();
    let nocow = |file: &File| ioctl_setflags(file, IFlags::NOCOW).unwrap();
    for seed in 20..22 {
        lives(&create(&fs.path().join(format!("images{seed}"))), seed, 40, nocow).await;
    }
}
