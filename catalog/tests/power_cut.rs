//! The power is cut: what was flushed is on the disk, and of all later writes as much as the disk likes.
//!
//! Two ways. A file system of its own, whose device is copied at one instant while the catalog is written to: on the copy is
//! what had reached the device by then, just as after a cut. And the log with its end lost, torn or garbled at any byte.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::second::{Second, check_settles, role, set_checkpoints_for_ever, settle_for_ever};
use common::{catalog, domain, intent, snapshot, state};
use disksnap_catalog::SqliteCatalog;
use disksnap_core::{Catalog, Change};
use disksnap_test_support::pattern::Random;
use disksnap_test_support::{LoopFsKind, loop_fs, need, tools};

/// What the second process does; a test in name only.
#[tokio::test]
#[ignore = "the other tests start it as a second process"]
async fn second_process() {
    match role().await {
        Some((role, catalog, _)) if role == "settle" => settle_for_ever(&catalog).await,
        Some((_, catalog, _)) => set_checkpoints_for_ever(&catalog).await,
        None => {}
    }
}

/// An XFS in an image, mounted. Unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// A copy has the original's identity, and XFS mounts no two of one.
    fn new(image: &Path, point: PathBuf) -> Self {
        fs::create_dir(&point).unwrap();
        run(Command::new("mount")
            .args(["-t", "xfs", "-o", "loop,nouuid"])
            .arg(image)
            .arg(&point));
        Self(point)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Detached, since a process that dies may hold a file a little longer.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
        let _ = fs::remove_dir(&self.0);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
}

/// Writes to a catalog on a device of its own, and copies the device again and again.
struct Device {
    outer: disksnap_test_support::LoopFs,
    image: PathBuf,
    inner: Mounted,
}

impl Device {
    fn new() -> Self {
        let outer = loop_fs(LoopFsKind::Xfs, 2 << 30, "");
        let image = outer.path().join("device");
        File::create(&image).unwrap().set_len(320 << 20).unwrap();
        run(Command::new(tools::program("mkfs.xfs")).arg("-q").arg(&image));
        let inner = Mounted::new(&image, outer.path().join("point"));
        Self { outer, image, inner }
    }

    /// The device as it is at one instant, mounted as after the next start of the host.
    fn cut(&self) -> (Mounted, PathBuf) {
        let copy = self.outer.path().join("copy");
        let (from, to) = (File::open(&self.image).unwrap(), File::create(&copy).unwrap());
        rustix::fs::ioctl_ficlone(&to, &from).unwrap();
        (Mounted::new(&copy, self.outer.path().join("after")), copy)
    }
}

/// What a second process has said so far, heard all the time.
fn heard(second: &mut Second) -> (Arc<Mutex<Vec<String>>>, std::thread::JoinHandle<()>) {
    let said = Arc::<Mutex<Vec<String>>>::default();
    let theirs = Arc::clone(&said);
    let mut words = second.take_words();
    let hearing = std::thread::spawn(move || {
        while let Some(word) = words.word() {
            theirs.lock().unwrap().push(word);
        }
    });
    (said, hearing)
}

#[tokio::test]
async fn every_settle_that_was_told_survives_a_cut() {
    need!("xfs");
    let device = Device::new();
    let mut second = Second::start("settle", &device.inner.0);
    let (said, hearing) = heard(&mut second);
    let mut random = Random::new(31);
    let mut most = 0;
    for _ in 0..25 {
        std::thread::sleep(Duration::from_micros(random.below(200_000)));
        let promised: BTreeSet<String> = said.lock().unwrap().iter().cloned().collect();
        let (after, copy) = device.cut();
        // The very first cuts may come before the catalog was made.
        if promised.is_empty() && !after.0.join("state").exists() {
            continue;
        }
        let catalog = SqliteCatalog::open(state(&after.0)).await.unwrap();
        check_settles(&catalog, &promised).await;
        most = most.max(promised.len());
        drop((catalog, after));
        fs::remove_file(copy).unwrap();
    }
    second.kill();
    hearing.join().unwrap();
    assert!(most > 20, "only {most} settles in all: the test proves little");
}

/// Large sets, so that the log is folded into the database again and again.
#[tokio::test]
async fn a_cut_while_the_log_is_folded_in_leaves_one_whole_set() {
    need!("xfs");
    let device = Device::new();
    let mut second = Second::start("sets", &device.inner.0);
    let (said, hearing) = heard(&mut second);
    let mut random = Random::new(32);
    let (mut cuts, mut most) = (0, 0);
    while cuts < 25 {
        std::thread::sleep(Duration::from_micros(random.below(200_000)));
        let Some(promised) = said.lock().unwrap().last().map(|n| n.parse::<u64>().unwrap()) else {
            continue;
        };
        let (after, copy) = device.cut();
        let catalog = SqliteCatalog::open(state(&after.0)).await.unwrap();
        catalog.check().await.unwrap();
        let set = catalog.checkpoints(&domain("vm")).await.unwrap();
        assert_eq!(set.len(), 100);
        assert!(
            set.iter().all(|c| c.created == set[0].created),
            "parts of two sets"
        );
        assert!(
            set[0].created >= common::second(promised),
            "a set that was told is lost"
        );
        (cuts, most) = (cuts + 1, promised);
        drop((catalog, after));
        fs::remove_file(copy).unwrap();
    }
    second.kill();
    hearing.join().unwrap();
    assert!(most > 20, "only {most} sets in all: the test proves little");
}

/// What becomes of the end of the log.
#[derive(Debug, Clone, Copy)]
enum Rest {
    Lost,
    Zeroes,
    Garbage,
    /// Some sectors came, and others did not.
    Holes,
}

/// As many settles as the log holds up to there are there, and nothing of the next.
#[tokio::test]
async fn a_log_that_ends_anywhere_is_good_up_to_there() {
    let (temp, catalog) = catalog().await;
    let vm = domain("vm");
    let file = |dir: &Path, end: &str| dir.join(format!("state/catalog.sqlite{end}"));
    // How long the log is once so many settles have been told.
    let length = || file(temp.path(), "-wal").metadata().unwrap().len();
    let mut told = vec![length()];
    for n in 0..12 {
        let begun = intent(&vm, &format!("{n}"));
        catalog.intend(&begun).await.unwrap();
        let changes = ["a", "b"].map(|half| {
            let made = snapshot(&vm, &format!("{n}-{half}"), 0);
            Change::AddSnapshot(Box::new(made))
        });
        catalog.settle(begun.id, &vm, &changes).await.unwrap();
        told.push(length());
    }
    let whole = fs::read(file(temp.path(), "-wal")).unwrap();
    assert_eq!(
        whole.len() as u64,
        told[12],
        "the log was folded in: the test proves nothing"
    );
    let (first, mut random) = (told[0], Random::new(33));
    for round in 0..160 {
        let rest = [Rest::Lost, Rest::Zeroes, Rest::Garbage, Rest::Holes][round % 4];
        let at = first + random.below(told[12] - first + 1);
        let cut = usize::try_from(at).unwrap();
        let mut log = whole.clone();
        spoil(&mut log, cut, rest, &mut random);
        let copy = tempfile::tempdir().unwrap();
        drop(state(copy.path()));
        fs::copy(file(temp.path(), ""), file(copy.path(), "")).unwrap();
        fs::write(file(copy.path(), "-wal"), &log).unwrap();
        let catalog = SqliteCatalog::open(state(copy.path())).await.unwrap();
        catalog.check().await.unwrap();
        let there = catalog.snapshots(&vm).await.unwrap().len();
        let promised = told.iter().rposition(|length| *length <= at).unwrap();
        assert_eq!(there % 2, 0, "half a settle, cut at {at}, {rest:?}");
        assert!(
            there / 2 >= promised,
            "{there} of {promised}, cut at {at}, {rest:?}"
        );
        assert!(
            there / 2 <= promised + 1,
            "{there} of {promised}, cut at {at}, {rest:?}"
        );
        // And it can be written to again.
        catalog.intend(&intent(&vm, "next")).await.unwrap();
    }
}

fn spoil(log: &mut Vec<u8>, at: usize, rest: Rest, random: &mut Random) {
    match rest {
        Rest::Lost => log.truncate(at),
        Rest::Zeroes => log[at..].fill(0),
        Rest::Garbage => log[at..]
            .iter_mut()
            .for_each(|byte| *byte = u8::try_from(random.below(256)).unwrap()),
        Rest::Holes => {
            for sector in log[at..].chunks_mut(512) {
                if random.below(2) == 0 {
                    sector.fill(0);
                }
            }
        }
    }
}
