//! Snapshots of a guest that writes are clean: `qemu-img check` finds nothing, and `fsck` nothing but a journal to
//! be replayed, or not even that where the guest was quiesced.
//!
//! A handful of rounds; for more: `DISKSNAP_CLEAN_ROUNDS=200 cargo test -p disksnap-btrfs --test clean -- --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use disksnap_btrfs::Btrfs;
use disksnap_conformance_qemu::become_guardian_when_asked;
use disksnap_core::{Consistency, Quiesce, Snapshot};
use disksnap_test_support::{DiskSpec, GuestSetup, LoopFsKind, MIB, Qemu, need, replay_journal, skip, tools};
use support::rig::{Rig, check, file, is_sound_without_the_pause, machine, qemu_img};
use support::{btrfs, create};

/// How often a snapshot must be clean.
const ROUNDS: usize = 4;
const ROUNDS_ENV: &str = "DISKSNAP_CLEAN_ROUNDS";
/// Without the pause about one in five is unsound. So many that are sound are no chance any more.
const CONTROLS: usize = 300;

#[test]
fn becomes_the_guardian_when_asked() {
    become_guardian_when_asked();
}

fn rounds() -> usize {
    let said = std::env::var(ROUNDS_ENV).ok();
    said.map_or(ROUNDS, |said| said.parse().unwrap())
}

/// What `e2fsck` says with these options, and its exit code: 0 is clean, 1 is mended, 4 and more is worse.
fn e2fsck(options: &str, disk: &Path) -> (i32, String) {
    let mut command = Command::new(tools::program("e2fsck"));
    let output = command.arg(options).arg(disk).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A copy of a snapshot's disk, as the guest would see it.
fn copy(snapshot: &Snapshot, rig: &Rig) -> std::path::PathBuf {
    let copy = rig.dir.path().join("copy.raw");
    let (from, to) = (file(snapshot, "vda"), copy.to_str().unwrap().to_owned());
    let arguments = ["convert", "-f", "qcow2", "-O", "raw", from.to_str().unwrap(), &to];
    qemu_img(&arguments, rig.dir.path()).unwrap();
    copy
}

/// The totals in the superblock, which the kernel writes at unmount, and counts itself at mount.
const TOTALS: [&str; 2] = ["Free blocks count wrong (", "Free inodes count wrong ("];

/// What `e2fsck -y` found wrong that no journal mends: what stands before each of its "Fix? yes".
fn mended(said: &str) -> Vec<&str> {
    let found = said.split("? yes").collect::<Vec<_>>();
    let (_, found) = found.split_last().unwrap();
    let wrong = found
        .iter()
        .map(|text| text.trim().lines().rev().nth(1).unwrap_or(text).trim());
    wrong
        .filter(|wrong| !TOTALS.iter().any(|total| wrong.starts_with(total)))
        .collect()
}

/// As after a power cut: the journal is replayed, and then nothing is wrong.
fn is_clean_after_replay(disk: &Path) {
    let (code, said) = e2fsck("-fy", disk);
    assert!(
        code <= 1 && mended(&said).is_empty() && said.contains("recovering journal"),
        "exit code {code}: {said}"
    );
    let (code, said) = e2fsck("-fn", disk);
    assert_eq!(code, 0, "after the replay: {said}");
}

/// There is nothing in the journal that the file system has not.
fn is_clean_as_it_is(disk: &Path) {
    let (code, said) = e2fsck("-fn", disk);
    assert!(code == 0 && !said.contains("journal"), "exit code {code}: {said}");
}

async fn taken(rig: &Rig, qemu: &Qemu, name: &str, quiesce: Quiesce) -> Snapshot {
    qemu.wait_files(2);
    let snapshot = rig.try_create_quiesced(name, &[], quiesce).await.unwrap();
    for disk in &snapshot.disks {
        let checked = check(&file(&snapshot, &disk.target), rig.dir.path());
        checked.unwrap_or_else(|why| panic!("{name}, {}: {why}", disk.target));
    }
    if quiesce == Quiesce::Require {
        assert!(
            matches!(
                snapshot.consistency,
                Consistency::Filesystem { filesystems: 1, .. }
            ),
            "{:?}",
            snapshot.consistency
        );
    }
    snapshot
}

#[tokio::test]
#[expect(
    clippy::print_stderr,
    reason = "how many rounds it was, and how the control went"
)]
async fn snapshots_of_a_guest_that_writes_are_clean() {
    need!("btrfs", "qemu-system-x86_64", "guest");
    if tools::find("e2fsck").is_none() {
        skip!("e2fsck", "the program is not there");
    }
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let guest = GuestSetup::new().file_system("ext4", "vda").writer(&["vdb"]);
    let qemu = machine(&images, "cluster_size=4096").guest(guest).start();
    let rig = Rig::running(Btrfs, &qemu);
    qemu.wait_files(20);
    let rounds = rounds();
    for n in 0..rounds {
        let snapshot = taken(&rig, &qemu, &format!("crash-{n}"), Quiesce::None).await;
        is_clean_after_replay(&copy(&snapshot, &rig));
        rig.delete(snapshot.name.as_str()).await;

        let snapshot = taken(&rig, &qemu, &format!("quiesced-{n}"), Quiesce::Require).await;
        is_clean_as_it_is(&copy(&snapshot, &rig));
        rig.delete(snapshot.name.as_str()).await;
    }
    eprintln!("{rounds} of {rounds} clean after replay, {rounds} of {rounds} quiesced clean without");

    // The control: without the pause some are not.
    let mut unsound = 0;
    let mut tries = 0;
    while tries < rounds || (unsound == 0 && tries < CONTROLS) {
        qemu.wait_files(2);
        tries += 1;
        unsound += usize::from(!is_sound_without_the_pause(&rig).await);
    }
    eprintln!("without the pause {unsound} of {tries} are found wrong by qemu-img check");
    assert!(unsound > 0, "{tries} snapshots without the pause were all sound");
    assert_eq!(qemu.status(), "running");
}

/// What `xfs_repair -n` says besides what it does, its exit code, and whether the journal is not empty. It changes
/// nothing, and leaves the journal out of account.
struct XfsSays {
    wrong: Vec<String>,
    code: i32,
    journal: bool,
}

/// How it begins a line that says no more than what it does, or on what.
const XFS_TALK: [&str; 8] = [
    "Phase ",
    "- ",
    "No modify flag set",
    "Cannot get host filesystem geometry",
    "Repair may fail if there is a sector size mismatch",
    "the image and the host",
    "ignored because the -n option",
    "which may be resolved by first mounting",
];
/// That the journal is not empty.
const XFS_JOURNAL: &str = "ALERT: The filesystem has valuable metadata changes in a log";
/// The totals in the superblock, which XFS counts anew at a mount that finds the journal's mark.
const XFS_TOTALS: [&str; 3] = ["sb_fdblocks ", "sb_icount ", "sb_ifree "];

fn xfs_repair(disk: &Path) -> XfsSays {
    let mut command = Command::new(tools::program("xfs_repair"));
    let output = command.args(["-n", "-f"]).arg(disk).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (journal, lines): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with(XFS_JOURNAL));
    let wrong = lines
        .into_iter()
        .filter(|line| !XFS_TALK.iter().any(|talk| line.starts_with(talk)));
    XfsSays {
        wrong: wrong.map(str::to_owned).collect(),
        code: output.status.code().unwrap(),
        journal: !journal.is_empty(),
    }
}

/// As after a power cut: the journal is replayed by a mount, and then nothing is wrong.
fn is_clean_xfs_after_replay(disk: &Path) {
    replay_journal(LoopFsKind::Xfs, disk, "nouuid").unwrap();
    let said = xfs_repair(disk);
    assert!(
        said.code == 0 && said.wrong.is_empty() && !said.journal,
        "exit code {}: {:#?}",
        said.code,
        said.wrong
    );
}

/// Nothing is wrong though the journal is not looked at: but for totals, all is in its place.
fn is_clean_xfs_as_it_is(disk: &Path) {
    let said = xfs_repair(disk);
    let total = |line: &String| XFS_TOTALS.iter().any(|total| line.starts_with(total));
    assert!(said.wrong.iter().all(total), "{:#?}", said.wrong);
}

/// The same for XFS. What was quiesced is whole without its journal, in which XFS leaves a mark all the same, so that a
/// mount looks for files that were open and unlinked.
#[tokio::test]
#[expect(
    clippy::print_stderr,
    reason = "how many rounds it was, and how the control went"
)]
async fn an_xfs_in_a_guest_that_writes_is_clean() {
    need!("btrfs", "xfs", "qemu-system-x86_64", "guest", "xfs_repair");
    let fs = btrfs();
    let image = create(&fs.path().join("images")).join("vda.qcow2");
    let made = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        image.to_str().unwrap(),
        "320M",
    ];
    qemu_img(&made, fs.path()).unwrap();
    let disk = DiskSpec::new("vda", 320 * MIB).qcow2().image(&image);
    let guest = GuestSetup::new().file_system("xfs", "vda");
    let qemu = Qemu::builder().disk(disk).guest(guest).start();
    let rig = Rig::running(Btrfs, &qemu);
    qemu.wait_files(20);
    let rounds = rounds();
    for n in 0..rounds {
        let snapshot = taken(&rig, &qemu, &format!("crash-{n}"), Quiesce::None).await;
        let disk = copy(&snapshot, &rig);
        let said = xfs_repair(&disk);
        assert!(said.journal, "it was mounted: {:?}", said.wrong);
        is_clean_xfs_after_replay(&disk);
        rig.delete(snapshot.name.as_str()).await;

        let snapshot = taken(&rig, &qemu, &format!("quiesced-{n}"), Quiesce::Require).await;
        is_clean_xfs_as_it_is(&copy(&snapshot, &rig));
        rig.delete(snapshot.name.as_str()).await;
    }
    eprintln!("{rounds} of {rounds} clean after replay, {rounds} of {rounds} quiesced clean without");
    assert_eq!(qemu.status(), "running");

    // The check can fail: of a file system whose tables are gone.
    let snapshot = rig.create("torn").await;
    let disk = copy(&snapshot, &rig);
    let mut bytes = fs::read(&disk).unwrap();
    bytes[4096..1 << 20].fill(0);
    fs::write(&disk, bytes).unwrap();
    let said = xfs_repair(&disk);
    assert!(said.code != 0 && !said.wrong.is_empty(), "{:?}", said.wrong);
    rig.delete("torn").await;
}

/// The checks themselves can fail: a file system that is mounted is not clean as it is, and one without its tables
/// is not mended by its journal.
#[tokio::test]
async fn what_is_not_clean_is_found() {
    need!("btrfs", "qemu-system-x86_64", "guest");
    if tools::find("e2fsck").is_none() {
        skip!("e2fsck", "the program is not there");
    }
    let fs = btrfs();
    let images = create(&fs.path().join("images"));
    let guest = GuestSetup::new().file_system("ext4", "vda");
    let qemu = machine(&images, "cluster_size=4096").guest(guest).start();
    let rig = Rig::running(Btrfs, &qemu);
    qemu.wait_files(20);
    let snapshot = rig.create("mounted").await;
    let disk = copy(&snapshot, &rig);
    let (_, said) = e2fsck("-fn", &disk);
    assert!(said.contains("journal"), "it was mounted: {said}");
    let mut bytes = fs::read(&disk).unwrap();
    // All but the superblock goes: the tables of the first group.
    let end = usize::try_from(2 * MIB).unwrap();
    bytes[8192..end].fill(0);
    fs::write(&disk, bytes).unwrap();
    let (_, said) = e2fsck("-fy", &disk);
    assert!(!mended(&said).is_empty(), "{said}");
    rig.delete("mounted").await;
}
