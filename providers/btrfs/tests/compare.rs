//! What two snapshots are told to differ in, against what they hold: byte for byte.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]
#![allow(clippy::single_range_in_vec_init, reason = "what is told may be one range")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use disksnap_btrfs::Btrfs;
use disksnap_core::{DiskSnapshot, ErrorKind, Snapshot};
use disksnap_test_support::pattern::{Random, bytes};
use disksnap_test_support::{LoopFsKind, loop_fs, need};
use futures_util::{StreamExt, TryStreamExt};
use rustix::fs::{FallocateFlags, IFlags, copy_file_range, fallocate, ioctl_setflags};
use support::rig::{Rig, disk, file};
use support::told::{assert_told, changed, ranges};
use support::{btrfs, create, delete, run};

const MIB: u64 = 1 << 20;
/// The sector of btrfs.
const SECTOR: u64 = 4096;

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
                .write_all_at(&vec![byte(seed); usize::try_from(length).unwrap()], start)
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
    lives(&create(&fs.path().join("images")), 1, 30, |_| {}).await;
}

#[tokio::test]
async fn nothing_is_missed_where_it_is_compressed() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 << 20, "compress-force=zstd");
    lives(&create(&fs.path().join("images")), 2, 30, |_| {}).await;
}

#[tokio::test]
async fn nothing_is_missed_of_a_nocow_file() {
    need!("btrfs");
    let fs = btrfs();
    let nocow = |file: &File| ioctl_setflags(file, IFlags::NOCOW).unwrap();
    lives(&create(&fs.path().join("images")), 3, 30, nocow).await;
}

/// An image of so many sectors, all of them written, each with something else.
fn image_of(path: &Path, sectors: u64) -> PathBuf {
    let length = usize::try_from(sectors * SECTOR).unwrap();
    fs::write(path, bytes(1, length)).unwrap();
    path.to_owned()
}

/// Writes these sectors anew.
fn rewrite(image: &Path, sectors: impl IntoIterator<Item = u64>) {
    let file = open(image);
    for sector in sectors {
        let content = vec![byte(sector); usize::try_from(SECTOR).unwrap()];
        file.write_all_at(&content, sector * SECTOR).unwrap();
    }
}

/// Not zero, which would be a hole to a guest.
fn byte(number: u64) -> u8 {
    1 + u8::try_from(number % 255).unwrap()
}

fn sectors(from: u64, to: u64) -> Range<u64> {
    from * SECTOR..to * SECTOR
}

/// In either order, across snapshots between, and not what else is in the subvolume.
#[tokio::test]
async fn what_was_written_is_told_and_nothing_else() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = image_of(&images.join("a.raw"), 256);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    assert_eq!(ranges(&rig, &first, &first).await, []);
    rewrite(&image, [3, 4, 9]);
    image_of(&images.join("other.raw"), 300);
    let second = rig.create("second").await;
    allocate(
        &open(&image),
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        5 * SECTOR,
        2 * SECTOR,
    );
    let third = rig.create("third").await;

    for (one, other) in [(&first, &second), (&second, &first)] {
        let told = assert_told(&rig, one, other, "written").await;
        assert_eq!(told, [sectors(3, 5), sectors(9, 10)]);
    }
    for (one, other) in [(&second, &third), (&third, &second)] {
        assert_eq!(assert_told(&rig, one, other, "punched").await, [sectors(5, 7)]);
    }
    rig.delete("second").await;
    let told = assert_told(&rig, &first, &third, "both").await;
    assert_eq!(told, [sectors(3, 7), sectors(9, 10)]);

    // Another file by then, of the same extents.
    rig.revert(&first).await.unwrap();
    rewrite(&image, [200]);
    let fourth = rig.create("fourth").await;
    assert_eq!(
        assert_told(&rig, &first, &fourth, "put back").await,
        [sectors(200, 201)]
    );
    let told = assert_told(&rig, &fourth, &third, "put back").await;
    assert_eq!(told, [sectors(3, 7), sectors(9, 10), sectors(200, 201)]);
}

/// More extents than one search reads, and not the same in both.
#[tokio::test]
async fn images_in_many_pieces_are_told_piece_by_piece() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = image_of(&images.join("a.raw"), 4000);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let whole = rig.create("whole").await;
    rewrite(&image, (0..4000).step_by(2));
    let pieces = rig.create("pieces").await;
    rewrite(&image, (2500..4000).step_by(3));
    let others = rig.create("others").await;

    let every = |from: usize, step| (0..4000).skip(from).step_by(step).map(|n| sectors(n, n + 1));
    for (one, other) in [(&whole, &pieces), (&pieces, &whole)] {
        assert!(assert_told(&rig, one, other, "every other").await == every(0, 2).collect::<Vec<_>>());
    }
    for (one, other) in [(&others, &pieces), (&pieces, &others)] {
        assert!(assert_told(&rig, one, other, "every third").await == every(2500, 3).collect::<Vec<_>>());
    }
    assert_told(&rig, &others, &whole, "all").await;

    // Whoever has had enough ends what looks on.
    let mut changed = changed(&rig, &whole, &pieces).await.unwrap();
    changed.ranges.next().await.unwrap().unwrap();
    assert!(is_open(&fs.path().join("images.vda")));
    drop(changed);
    while is_open(&fs.path().join("images.vda")) {
        tokio::task::yield_now().await;
    }
}

/// Whether this process has a file open whose path begins so.
fn is_open(path: &Path) -> bool {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut paths = open.filter_map(|fd| fs::read_link(fd.path()).ok());
    let begin = path.to_str().unwrap();
    paths.any(|path| path.to_string_lossy().starts_with(begin))
}

/// All is somewhere else then.
#[tokio::test]
async fn a_defragmented_image_is_told_whole() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = image_of(&images.join("a.raw"), 256);
    open(&image).sync_all().unwrap();
    rewrite(&image, (0..256).step_by(2));
    open(&image).sync_all().unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    rewrite(&image, [7]);
    run([
        "filesystem",
        "defragment",
        "-f",
        "-t",
        "32M",
        image.to_str().unwrap(),
    ]);
    let second = rig.create("second").await;
    let told = assert_told(&rig, &first, &second, "defragmented").await;
    assert!(
        told.iter().map(|range| range.end - range.start).sum::<u64>() > 100 * SECTOR,
        "{told:?}"
    );
    // What is moved below all snapshots is no change of any.
    run(["balance", "start", "-d", fs.path().to_str().unwrap()]);
    assert_eq!(assert_told(&rig, &first, &second, "balanced").await, told);
    let third = rig.create("third").await;
    assert_eq!(assert_told(&rig, &second, &third, "balanced").await, []);
}

/// A part of a compressed extent where another part of it was.
#[tokio::test]
async fn a_compressed_extent_that_is_shifted_is_told() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 << 20, "compress-force=zstd");
    let image = create(&fs.path().join("images")).join("a.raw");
    let half = 64 << 10;
    let write = |file: &File| file.write_all_at(&[vec![1; half], vec![2; half]].concat(), 0);
    write(&open(&image)).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    let file = open(&image);
    let (mut from, mut to) = (0, half as u64);
    assert_eq!(
        copy_file_range(&file, Some(&mut from), &file, Some(&mut to), half).unwrap(),
        half
    );
    let second = rig.create("second").await;
    let told = assert_told(&rig, &first, &second, "shifted").await;
    let second_half = half as u64..2 * half as u64;
    assert_eq!(told, [second_half]);
}

/// A file that is so small that it is in the tree.
#[tokio::test]
async fn an_image_in_the_tree_is_compared() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = images.join("a.raw");
    fs::write(&image, bytes(1, 1000)).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    let same = rig.create("same").await;
    assert_eq!(assert_told(&rig, &first, &same, "touched").await, []);
    open(&image).write_all_at(b"changed", 500).unwrap();
    let written = rig.create("written").await;
    assert_eq!(assert_told(&rig, &first, &written, "written").await, [0..1000]);
    open(&image).set_len(3 * SECTOR + 5).unwrap();
    let grown = rig.create("grown").await;
    let told = assert_told(&rig, &written, &grown, "grown").await;
    assert_eq!(told.last().unwrap().end, 3 * SECTOR + 512);
    // The guest's last sector ends behind the file's last byte.
    open(&image).set_len(1000).unwrap();
    let shrunk = rig.create("shrunk").await;
    let told = assert_told(&rig, &grown, &shrunk, "shrunk").await;
    assert_eq!(told.last().unwrap().end, 1024);
    open(&image).set_len(0).unwrap();
    let empty = rig.create("empty").await;
    assert_eq!(assert_told(&rig, &grown, &empty, "empty").await, []);
    assert_eq!(
        assert_told(&rig, &empty, &grown, "filled").await,
        [0..3 * SECTOR + 512]
    );
}

/// An image that is nothing but a hole has no extents at all.
#[tokio::test]
async fn an_empty_disk_is_compared() {
    need!("btrfs");
    let fs = btrfs();
    let image = create(&fs.path().join("images")).join("a.raw");
    open(&image).set_len(16 * MIB).unwrap();
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let hole = rig.create("hole").await;
    allocate(&open(&image), FallocateFlags::KEEP_SIZE, 0, 8 * MIB);
    let room = rig.create("room").await;
    assert_eq!(assert_told(&rig, &hole, &room, "zeros both").await, []);
    rewrite(&image, [5, 3000]);
    let written = rig.create("written").await;
    let both = [sectors(5, 6), sectors(3000, 3001)];
    for empty in [&hole, &room] {
        assert_eq!(assert_told(&rig, empty, &written, "written").await, both);
        assert_eq!(assert_told(&rig, &written, empty, "gone").await, both);
    }
}

/// Another file of the name is another content; one that was moved is not.
#[tokio::test]
async fn another_file_and_another_place_are_compared() {
    need!("btrfs");
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let image = image_of(&images.join("a.raw"), 64);
    let mut rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    fs::copy(&image, images.join("copy")).unwrap();
    fs::write(images.join("copy"), bytes(2, 64 * 4096)).unwrap();
    fs::rename(images.join("copy"), &image).unwrap();
    let replaced = rig.create("replaced").await;
    assert_eq!(
        assert_told(&rig, &first, &replaced, "replaced").await,
        [sectors(0, 64)]
    );

    let elsewhere = create(&fs.path().join("elsewhere")).join("b.raw");
    fs::copy(&image, &elsewhere).unwrap();
    rewrite(&elsewhere, [1]);
    rig.disks_are(vec![disk("vda", "raw", &elsewhere)]);
    let moved = rig.create("moved").await;
    let told = assert_told(&rig, &replaced, &moved, "moved").await;
    // `cp` shares the extents, where the kernel lets it.
    assert!(
        told.contains(&sectors(1, 2)) || told == [sectors(0, 64)],
        "{told:?}"
    );
    assert_told(&rig, &moved, &first, "moved").await;
}

#[tokio::test]
async fn what_cannot_be_compared_is_said() {
    need!("btrfs");
    let (fs, other) = (btrfs(), btrfs());
    let image = image_of(&create(&fs.path().join("images")).join("a.raw"), 16);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let first = rig.create("first").await;
    rewrite(&image, [1]);
    let second = rig.create("second").await;
    let kind = async |one: &Snapshot, other: &Snapshot| {
        let error = changed(&rig, one, other).await.unwrap_err();
        assert!(!error.to_string().is_empty());
        error.kind()
    };

    let far = image_of(&create(&other.path().join("images")).join("a.raw"), 16);
    let far = Rig::off(Btrfs, vec![disk("vda", "raw", &far)])
        .create("far")
        .await;
    assert_eq!(kind(&first, &far).await, ErrorKind::Unsupported);
    let mut another = first.clone();
    let made = &mut another.units[0].unit.data["images"][0]["target"];
    *made = "vdz".into();
    assert_eq!(kind(&another, &second).await, ErrorKind::Unsupported);

    // Taken, and gone while it was being compared.
    let changed = changed(&rig, &first, &second).await.unwrap();
    let root = file(&first, "vda").parent().unwrap().to_owned();
    run(["property", "set", root.to_str().unwrap(), "ro", "false"]);
    let told: Result<Vec<_>, _> = changed.ranges.try_collect().await;
    assert_eq!(told.unwrap_err().kind(), ErrorKind::Broken);
    assert_eq!(kind(&first, &second).await, ErrorKind::Broken);
    assert_eq!(kind(&second, &first).await, ErrorKind::Broken);
    delete(&root);
    assert_eq!(kind(&first, &second).await, ErrorKind::Broken);

    // A record of old does not say that it can be compared.
    let mut old = second.units[0].unit.clone();
    assert!(Btrfs.compare(&old).is_some());
    old.data.as_object_mut().unwrap().remove("comparable");
    assert!(Btrfs.compare(&old).is_none());
}
