//! Real images, written by QEMU, copied, written on, copied again: what is told of the guest's disk, from what differs in
//! the copied files, makes the earlier content the later one.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stderr, reason = "which round it is that fails")]
#![allow(clippy::single_range_in_vec_init, reason = "what is told may be one range")]

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use disksnap_core::{Changed, Error, ErrorKind, Precision, Ranges, Result};
use disksnap_image_file::{FileInImage, QemuImg, SameFile, guest_ranges, opened};
use disksnap_test_support::{QemuVersion, need, pattern};
use futures_util::{StreamExt, TryStreamExt, stream};
use tempfile::TempDir;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Numbers that a seed gives.
struct Dice(std::vec::IntoIter<u8>);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(pattern::bytes(seed, 64 << 10).into_iter())
    }

    fn below(&mut self, end: u64) -> u64 {
        let bytes: Vec<u8> = self.0.by_ref().take(4).collect();
        u64::from(u32::from_le_bytes(bytes.try_into().unwrap())) % end
    }
}

/// An image that is being used, and copies of it as they were at some time.
struct Bench {
    dir: TempDir,
    version: QemuVersion,
    /// The live files, the top one first.
    files: Vec<FileInImage>,
    copies: usize,
}

/// The files as they were, and what a guest would have read.
struct Copy(Vec<FileInImage>, Vec<u8>);

impl Bench {
    fn new(version: QemuVersion) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            version,
            files: Vec::new(),
            copies: 0,
        }
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let output = Command::new(self.version.program(program))
            .args(arguments)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
        assert!(output.status.success(), "{program} {arguments:?}: {said:?}");
    }

    /// Another file on top.
    fn create(&mut self, format: &str, options: &str, size: u64) {
        let path = self.dir.path().join(format!("{}.{format}", self.files.len()));
        let size = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        if let Some(below) = self.files.first() {
            arguments.extend(["-b", text(&below.path), "-F", &below.format]);
        }
        arguments.extend([text(&path), &size]);
        self.run("qemu-img", &arguments);
        let format = format.to_owned();
        self.files.insert(0, FileInImage { path, format });
    }

    /// Writes on the top file, with as much success as there may be.
    fn try_io(&self, commands: &[String]) -> bool {
        let FileInImage { path, format } = &self.files[0];
        let mut program = Command::new(self.version.program("qemu-io"));
        program.args(["-f", format.as_str(), "-d", "unmap"]);
        program.args(commands.iter().flat_map(|command| ["-c", command]));
        program.arg(path).output().unwrap().status.success()
    }

    fn io(&self, commands: &[&str]) {
        let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
        assert!(self.try_io(&commands), "{commands:?}");
    }

    /// The files as they are now.
    fn copy(&mut self) -> Copy {
        self.copies += 1;
        let dir = self.dir.path().join(format!("copy-{}", self.copies));
        std::fs::create_dir(&dir).unwrap();
        let copied = |file: &FileInImage| {
            let path = dir.join(file.path.file_name().unwrap());
            let copied = Command::new("cp")
                .arg("--sparse=auto")
                .args([&file.path, &path])
                .status();
            assert!(copied.unwrap().success());
            let format = file.format.clone();
            FileInImage { path, format }
        };
        let files: Vec<FileInImage> = self.files.iter().map(copied).collect();
        let from = format!("json:{}", opened(&files, |_| None).unwrap());
        let to = dir.join("content");
        self.run("qemu-img", &["convert", "-O", "raw", &from, text(&to)]);
        Copy(files, std::fs::read(to).unwrap())
    }

    fn qemu_img(&self) -> QemuImg {
        QemuImg::at(self.version.program("qemu-img"))
    }

    async fn told(&self, earlier: &Copy, later: &Copy) -> Vec<Range<u64>> {
        let changed = guest_ranges(&self.qemu_img(), &earlier.0, &later.0, same(earlier, later)).await;
        changed.unwrap().ranges.try_collect().await.unwrap()
    }

    /// The ranges are in order, and all that differs is in them.
    async fn check(&self, earlier: &Copy, later: &Copy) -> Vec<Range<u64>> {
        let told = self.told(earlier, later).await;
        let (mut disk, after) = (earlier.1.clone(), &later.1);
        disk.resize(after.len(), 0xEE);
        let apart = told.windows(2).all(|pair| pair[0].end < pair[1].start);
        assert!(
            apart && told.iter().all(|range| range.start < range.end),
            "{told:?}"
        );
        for range in &told {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            disk[range.clone()].copy_from_slice(&after[range]);
        }
        assert!(disk == *after, "not all that differs is told: {told:?}");
        told
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ranges(ranges: Vec<Range<u64>>) -> Ranges {
    stream::iter(ranges.into_iter().map(Ok)).boxed()
}

/// What differs in the files of the same name.
fn same(earlier: &Copy, later: &Copy) -> Vec<SameFile> {
    let mut same = Vec::new();
    for (n, file) in later.0.iter().enumerate() {
        let name = file.path.file_name();
        if let Some(before) = earlier.0.iter().position(|file| file.path.file_name() == name) {
            let changed = differing(&earlier.0[before].path, &file.path);
            same.push(SameFile {
                earlier: before,
                later: n,
                changed,
            });
        }
    }
    same
}

/// What differs, in blocks of 512 bytes, up to where the longer one ends.
fn differing(earlier: &Path, later: &Path) -> Changed {
    let [before, after] = [earlier, later].map(|path| std::fs::read(path).unwrap());
    let mut differing: Vec<Range<u64>> = Vec::new();
    let whole = before.len().max(after.len());
    for at in (0..whole).step_by(512) {
        let end = (at + 512).min(whole);
        let same = before.get(at..end).zip(after.get(at..end));
        if same.is_some_and(|(before, after)| before == after) {
            continue;
        }
        match differing.last_mut() {
            Some(last) if last.end == at as u64 => last.end = end as u64,
            _ => differing.push(at as u64..end as u64),
        }
    }
    Changed {
        size: after.len() as u64,
        precision: Precision::Exact(512),
        ranges: ranges(differing),
    }
}

/// Something that a guest or an operator does.
fn act(bench: &mut Bench, dice: &mut Dice, size: &mut u64) {
    let options = [
        "cluster_size=4k",
        "",
        "cluster_size=16k",
        "extended_l2=on",
        "compat=0.10",
    ];
    let commands: Vec<String> = (0..=dice.below(12)).map(|_| command(dice, *size)).collect();
    // QEMU refuses to compress what lies there uncompressed.
    bench.try_io(&commands);
    match dice.below(6) {
        0 if bench.files.len() < 4 => {
            *size += dice.below(3) * 128 * KIB;
            let options = options[usize::try_from(dice.below(5)).unwrap()];
            bench.create("qcow2", options, *size);
        }
        1 if bench.files.len() > 1 => {
            let [top, below] = [0, 1].map(|n| bench.files[n].clone());
            bench.run(
                "qemu-img",
                &["commit", "-q", "-d", "-f", &top.format, text(&top.path)],
            );
            bench.files.remove(0);
            *size = below.disk_size().unwrap();
        }
        2 => {
            *size += 200 * KIB;
            let FileInImage { path, format } = &bench.files[0];
            let size = size.to_string();
            bench.run("qemu-img", &["resize", "-q", "-f", format, text(path), &size]);
        }
        _ => {}
    }
}

fn command(dice: &mut Dice, size: u64) -> String {
    let sector = |bytes: u64| bytes / 512 * 512;
    let at = sector(dice.below(size - 64 * KIB));
    let length = sector(dice.below((size - at).min(160 * KIB)) + 512).min(size - at);
    let pattern = dice.below(255) + 1;
    match dice.below(8) {
        0 => format!("write -z {at} {length}"),
        1 => format!("write -zu {at} {length}"),
        2 | 3 => format!("discard {at} {length}"),
        // Only whole clusters can be compressed.
        4 => format!("write -c -P {pattern} {} 64k", at / (64 * KIB) * 64 * KIB),
        _ => format!("write -P {pattern} {at} {length}"),
    }
}

async fn round(seed: u64, version: QemuVersion) {
    eprintln!("round {seed}");
    let mut dice = Dice::new(seed);
    let mut bench = Bench::new(version);
    let mut size = MIB + dice.below(16) * 128 * KIB;
    match dice.below(3) {
        0 => {
            bench.create("raw", "", size);
            bench.create("qcow2", "", size);
        }
        1 => bench.create("qcow2", "", size),
        _ => bench.create("qcow2", "cluster_size=4k", size),
    }
    for _ in 0..=dice.below(2) {
        act(&mut bench, &mut dice, &mut size);
    }
    let earlier = bench.copy();
    for _ in 0..=dice.below(2) {
        act(&mut bench, &mut dice, &mut size);
    }
    let later = bench.copy();
    bench.check(&earlier, &later).await;
    // In any order of time.
    bench.check(&later, &earlier).await;
    assert_eq!(
        bench.told(&later, &later).await,
        [],
        "of one with itself nothing is told"
    );
}

#[tokio::test]
async fn all_that_differs_is_told_whatever_was_done() {
    for seed in 0..25 {
        round(seed, QemuVersion::V10_0).await;
    }
}

#[tokio::test]
async fn and_by_an_older_qemu() {
    need!("qemu-7.2");
    for seed in 100..108 {
        round(seed, QemuVersion::V7_2).await;
    }
}

/// An image with a few clusters of 64 KiB written, three of them compressed.
fn simple() -> Bench {
    let mut bench = Bench::new(QemuVersion::V10_0);
    bench.create("qcow2", "", 4 * MIB);
    bench.io(&[
        "write -P 1 0 1M",
        "write -c -P 2 1M 64k",
        "write -c -P 3 1088k 64k",
        "write -P 4 2M 64k",
    ]);
    bench
}

#[tokio::test]
async fn tables_written_anew_are_no_change() {
    let mut bench = simple();
    let earlier = bench.copy();
    let live = text(&bench.files[0].path).to_owned();
    // Every entry of the tables loses its mark of being the only one, and every count is two.
    bench.run("qemu-img", &["snapshot", "-c", "inner", &live]);
    let later = bench.copy();
    let differing = differing(&earlier.0[0].path, &later.0[0].path)
        .ranges
        .collect::<Vec<_>>()
        .await;
    assert!(!differing.is_empty());
    assert_eq!(bench.check(&earlier, &later).await, []);
}

#[tokio::test]
async fn of_a_cluster_that_stays_where_it_is_only_the_blocks_are_told_that_differ() {
    let mut bench = simple();
    let earlier = bench.copy();
    bench.io(&[
        "write -P 9 512 1k",
        "discard 1M 64k",
        "write -c -P 8 1M 64k",
        "write -P 4 2M 64k",
        "write -P 9 3M 64k",
        "discard 128k 64k",
    ]);
    let later = bench.copy();
    let told = bench.check(&earlier, &later).await;
    // The other one that is compressed stays where it is, next to what was and is.
    let packed = MIB..MIB + 64 * KIB;
    assert_eq!(
        told,
        [
            512..1536,
            128 * KIB..192 * KIB,
            packed.clone(),
            3 * MIB..3 * MIB + 64 * KIB
        ]
    );
    // A layer that stays as it is, packed clusters and all, is no change when another one is laid over it.
    bench.create("qcow2", "", 4 * MIB);
    bench.io(&["write -z 0 64k", "write -P 7 192k 64k"]);
    let over = bench.copy();
    assert_eq!(
        bench.check(&later, &over).await,
        [0..64 * KIB, 192 * KIB..256 * KIB]
    );
}

/// A file that is cut off reads zeros beyond its end, though its tables are the same.
#[tokio::test]
async fn what_is_cut_off_is_told() {
    let mut bench = simple();
    bench.io(&["write -P 9 3M 64k"]);
    let earlier = bench.copy();
    let file = std::fs::OpenOptions::new().write(true).open(&bench.files[0].path);
    let file = file.unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length / (64 * KIB) * (64 * KIB) - 4 * KIB).unwrap();
    let later = bench.copy();
    assert!(earlier.1 != later.1, "nothing was cut off");
    for (earlier, later) in [(&earlier, &later), (&later, &earlier)] {
        assert!(!bench.check(earlier, later).await.is_empty());
    }
}

#[tokio::test]
async fn two_raw_files_differ_as_the_files_do() {
    let mut bench = Bench::new(QemuVersion::V10_0);
    bench.create("raw", "", MIB + 1000);
    let earlier = bench.copy();
    bench.run(
        "qemu-img",
        &["resize", "-q", "-f", "raw", text(&bench.files[0].path), "2M"],
    );
    let later = bench.copy();
    assert_eq!([earlier.1.len(), later.1.len()], [(1 << 20) + 1024, 2 << 20]);
    for (earlier, later, given, told) in [
        (
            &earlier,
            &later,
            vec![0..4096, 8192..12288],
            vec![0..4096, 8192..12288, MIB + 1024..2 * MIB],
        ),
        (&earlier, &later, vec![MIB..3 * MIB], vec![MIB..2 * MIB]),
        (
            &earlier,
            &later,
            vec![0..1, 1..2, MIB + 64 * KIB..2 * MIB],
            vec![0..2, MIB + 1024..2 * MIB],
        ),
        (&later, &earlier, vec![4096..2 * MIB], vec![4096..MIB + 1024]),
        (&earlier, &earlier, vec![], vec![]),
    ] {
        let pair = SameFile {
            earlier: 0,
            later: 0,
            changed: Changed {
                size: 0,
                precision: Precision::Exact(4096),
                ranges: ranges(given),
            },
        };
        let changed = guest_ranges(&bench.qemu_img(), &earlier.0, &later.0, vec![pair])
            .await
            .unwrap();
        assert_eq!(
            (changed.size, &changed.precision),
            (later.1.len() as u64, &Precision::Exact(4096))
        );
        let ranges: Vec<Range<u64>> = changed.ranges.try_collect().await.unwrap();
        assert_eq!(ranges, told);
    }
}

#[tokio::test]
async fn what_is_not_known_to_be_the_same_file_is_told() {
    let mut bench = simple();
    let (earlier, later) = (bench.copy(), bench.copy());
    let changed = guest_ranges(&bench.qemu_img(), &earlier.0, &later.0, Vec::new())
        .await
        .unwrap();
    assert!(matches!(&changed.precision, Precision::Superset(why) if why.contains("cluster")));
    let told: Vec<Range<u64>> = changed.ranges.try_collect().await.unwrap();
    assert_eq!(told, [0..MIB + 128 * KIB, 2 * MIB..2 * MIB + 64 * KIB]);
}

#[tokio::test]
async fn what_goes_wrong_is_said_and_never_an_end() {
    let mut bench = simple();
    let (earlier, later) = (bench.copy(), bench.copy());
    let pair = |changed| {
        vec![SameFile {
            earlier: 0,
            later: 0,
            changed,
        }]
    };
    let failing = stream::iter([
        Ok(0..512),
        Err(Error::new(ErrorKind::Io, "the other end is gone")),
    ]);
    let changed = Changed {
        ranges: failing.boxed(),
        ..differing(&earlier.0[0].path, &later.0[0].path)
    };
    let error = guest_ranges(&bench.qemu_img(), &earlier.0, &later.0, pair(changed))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "the other end is gone");
    // The first of the tables that the header's table names is at a place where none can be.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&later.0[0].path)
        .unwrap();
    let mut tables = [0; 8];
    file.read_exact_at(&mut tables, 40).unwrap();
    file.write_all_at(&(1 << 63 | 512_u64).to_be_bytes(), u64::from_be_bytes(tables))
        .unwrap();
    let changed = guest_ranges(&bench.qemu_img(), &earlier.0, &later.0, same(&earlier, &later)).await;
    let told: Result<Vec<Range<u64>>> = changed.unwrap().ranges.try_collect().await;
    let error = told.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(error.to_string().contains("qemu-img map failed"), "{error}");
    std::fs::remove_file(&later.0[0].path).unwrap();
    let error = guest_ranges(&bench.qemu_img(), &earlier.0, &later.0, Vec::new())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let none = guest_ranges(&bench.qemu_img(), &earlier.0, &[], Vec::new())
        .await
        .unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Unsupported, "{none}");
}
