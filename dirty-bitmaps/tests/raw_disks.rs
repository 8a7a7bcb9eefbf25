//! Raw disks whose bitmaps are made durable: the disk keeps every byte, what changed is told exactly across stops, and
//! what is written past the qcow2 is not told as if it were known.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use disksnap_core::{
    Crossed, Crossing, Disk, Ending, ErrorKind, MergeOptions, RawDisks, RecoveredHow, Snapshot, Source,
    Start, Tracker,
};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_test_support::{DiskSpec, KIB, LoopFsKind, MIB, Qemu, QemuVersion, loop_fs, need};
use rig::{Rig, by, name_of, request};
use tempfile::TempDir;

const SIZE: u64 = 8 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// A raw disk with something on it, and where its qcow2 is to be.
struct Raw {
    dir: TempDir,
    version: QemuVersion,
}

impl Raw {
    fn new(version: QemuVersion) -> Self {
        Self::at(&std::env::temp_dir(), version)
    }

    /// On a disk: what is compared are times that a file system keeps.
    fn at(place: &Path, version: QemuVersion) -> Self {
        let dir = tempfile::tempdir_in(place).unwrap();
        let raw = Self { dir, version };
        let content: Vec<u8> = (0..SIZE)
            .map(|n| u8::try_from((n / 4096 + n) % 251).unwrap())
            .collect();
        fs::write(raw.image(), content).unwrap();
        raw
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn qcow2(&self) -> PathBuf {
        self.dir.path().join("disk.qcow2")
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }

    /// A machine from a document that names the raw disk.
    fn start(&self, disk: impl Fn(DiskSpec) -> DiskSpec) -> Qemu {
        let spec = disk(DiskSpec::new("vda", SIZE)).image(&self.image());
        Qemu::builder().version(self.version).disk(spec).start()
    }

    /// A machine from a document that names the qcow2.
    fn start_through(&self) -> Qemu {
        let spec = DiskSpec::new("vda", SIZE).qcow2().image(&self.qcow2());
        Qemu::builder().version(self.version).disk(spec).start()
    }

    /// QEMU's own word that the qcow2 is sound and reads as the raw disk does.
    fn is_the_same(&self) {
        let (qcow2, raw) = (self.qcow2(), self.image());
        let (qcow2, raw) = (qcow2.to_str().unwrap(), raw.to_str().unwrap());
        for arguments in [
            vec!["check", "-q", qcow2],
            vec!["compare", "-q", "-f", "qcow2", "-F", "raw", qcow2, raw],
        ] {
            let output = Command::new(self.version.program("qemu-img"))
                .args(&arguments)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {said}");
        }
    }
}

/// The same domain in another machine.
fn goes_on(rig: &mut Rig, qemu: &Qemu) {
    rig.domain.sockets.monitor = Some(qemu.qmp_path());
}

fn is_off(rig: &mut Rig) {
    rig.domain.sockets.monitor = None;
}

async fn track(rig: &mut Rig, raw: &Raw) -> Crossed {
    let crossed = rig
        .dispatcher
        .track(&rig.domain, "vda", &raw.qcow2())
        .await
        .unwrap();
    assert!(crossed.now);
    let file = raw.qcow2();
    assert_eq!(crossed.disk.source, Some(Source::File { file }));
    rig.stand_on(std::slice::from_ref(&crossed.disk));
    crossed
}

async fn verdicts(rig: &Rig) -> Vec<String> {
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    let told = |mark: &disksnap_core::CheckedMark| format!("{}={}", mark.checkpoint, mark.verdict.as_str());
    validation.marks.iter().map(told).collect()
}

/// What was there before with what is told to have changed.
async fn applied(rig: &Rig, base: &[u8], name: &str, since: &str) -> Vec<u8> {
    let mut all = base.to_vec();
    for (range, data) in rig.changed(name, "vda", since).await.unwrap() {
        let start = usize::try_from(range.start).unwrap();
        all[start..start + data.len()].copy_from_slice(&data);
    }
    all
}

fn ends_with_the_hypervisor(snapshot: &Snapshot) -> bool {
    snapshot
        .warnings
        .iter()
        .any(|w| w.contains("the checkpoint ends when"))
}

fn begins_anew(snapshot: &Snapshot) -> bool {
    let anew = |w: &String| w.contains("what has changed since the checkpoint");
    snapshot.warnings.iter().any(anew)
}

/// Off, then two runs with stops between them: the increment is exact, and so is the raw disk itself.
async fn durable_across_stops(version: QemuVersion) {
    let raw = Raw::new(version);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.disk("vda").fill(0, MIB, 1);
    qemu.quit();
    is_off(&mut rig);
    let (before, old) = (raw.content(), rig.domain.disks[0].clone());
    track(&mut rig, &raw).await;
    assert_eq!(raw.content(), before, "the disk keeps every byte");
    raw.is_the_same();
    let again = rig
        .dispatcher
        .track(&rig.domain, "vda", &raw.qcow2())
        .await
        .unwrap();
    assert!(!again.now);
    assert_eq!(again.disk, rig.domain.disks[0]);
    assert_eq!(
        rig.dispatcher.outdated(&rig.domain).await.unwrap(),
        Vec::<Disk>::new()
    );
    a_document_of_before_is_refused(&mut rig, &old).await;
    a_document_without_the_data_is_brought_up_to_date(&mut rig).await;

    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    let first = rig.create("one", &["vda"], true).await.unwrap();
    assert!(!ends_with_the_hypervisor(&first), "{:?}", first.warnings);
    let base = rig.read("one", "vda").await;
    assert_eq!(base, before);
    rig.delete("one").await;
    qemu.disk("vda").fill(2 * MIB, 100 * KIB, 2);
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(verdicts(&rig).await, ["one=ok"]);
    raw.is_the_same();

    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    qemu.disk("vda").zero(4 * MIB, 192 * KIB);
    qemu.disk("vda").discard(5 * MIB, 128 * KIB);
    qemu.disk("vda").fill(SIZE - 4 * KIB, 4 * KIB, 3);
    rig.create("two", &["vda"], true).await.unwrap();
    let now = rig.read("two", "vda").await;
    assert_ne!(now, base);
    assert_eq!(applied(&rig, &base, "two", "one").await, now);
    let changed = rig.changed("two", "vda", "one").await.unwrap();
    let told: u64 = changed.iter().map(|(range, _)| range.end - range.start).sum();
    assert!(told <= MIB, "{told} bytes are more than changed");
    rig.delete("two").await;
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(raw.content(), now, "the raw disk is the disk");
    raw.is_the_same();
}

/// A libvirt that does not know `<dataStore>` leaves it out; what it was is remembered.
async fn a_document_without_the_data_is_brought_up_to_date(rig: &mut Rig) {
    let new = rig.domain.disks[0].clone();
    rig.domain.disks[0].data_store = None;
    assert_eq!(
        rig.dispatcher.outdated(&rig.domain).await.unwrap(),
        std::slice::from_ref(&new)
    );
    rig.stand_on(&[new]);
}

async fn a_document_of_before_is_refused(rig: &mut Rig, old: &Disk) {
    let new = rig.domain.disks[0].clone();
    rig.stand_on(std::slice::from_ref(old));
    assert_eq!(
        rig.dispatcher.outdated(&rig.domain).await.unwrap(),
        std::slice::from_ref(&new)
    );
    let error = rig.create("stale", &["vda"], true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let error = rig.dispatcher.validate(&rig.domain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    rig.stand_on(&[new]);
}

#[tokio::test]
async fn checkpoints_of_a_raw_disk_outlive_the_hypervisor() {
    durable_across_stops(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn so_they_do_in_the_old_qemu() {
    need!("qemu-7.2");
    durable_across_stops(QemuVersion::V7_2).await;
}

/// A running guest goes over with the bitmaps that it has, and back.
async fn over_and_back(version: QemuVersion, disk: impl Fn(DiskSpec) -> DiskSpec) {
    let raw = Raw::new(version);
    let qemu = raw.start(disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let first = rig.create("one", &["vda"], true).await.unwrap();
    assert!(ends_with_the_hypervisor(&first), "{:?}", first.warnings);
    let base = rig.read("one", "vda").await;
    rig.delete("one").await;
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    let before = raw.content();
    let crossed = track(&mut rig, &raw).await;
    assert!(crossed.paused.is_some());
    assert_eq!(qemu.status(), "running");
    assert_eq!(raw.content(), before);
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 2);
    assert_eq!(verdicts(&rig).await, ["one=ok"]);
    let snapshot = rig.create("two", &["vda"], true).await.unwrap();
    assert!(!ends_with_the_hypervisor(&snapshot), "{:?}", snapshot.warnings);
    assert!(!begins_anew(&snapshot), "{:?}", snapshot.warnings);
    let now = rig.read("two", "vda").await;
    assert_eq!(applied(&rig, &base, "two", "one").await, now);
    let error = rig
        .dispatcher
        .untrack(&rig.domain, "vda", false)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.delete("two").await;

    // Also what was in memory alone has outlived it.
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(verdicts(&rig).await, ["one=ok", "two=ok"]);
    raw.is_the_same();
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    let error = rig
        .dispatcher
        .untrack(&rig.domain, "vda", false)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.to_string().contains("one, two"), "{error}");
    qemu.disk("vda").fill(3 * MIB, 64 * KIB, 3);
    let given_up = rig.dispatcher.untrack(&rig.domain, "vda", true).await.unwrap();
    assert_eq!(given_up.dropped.len(), 2);
    assert_eq!(given_up.disk.source, Some(Source::File { file: raw.image() }));
    assert!(!raw.qcow2().exists());
    rig.stand_on(std::slice::from_ref(&given_up.disk));
    qemu.disk("vda").fill(4 * MIB, 64 * KIB, 4);
    assert_eq!(qemu.status(), "running");
    qemu.quit();
    is_off(&mut rig);
    let content = raw.content();
    for (byte, at) in [1, 2, 3, 4].map(|n| (n, usize::from(n) << 20)) {
        assert!(content[at..at + (64 << 10)].iter().all(|found| *found == byte));
    }
    let again = rig.dispatcher.untrack(&rig.domain, "vda", true).await.unwrap();
    assert!(!again.now);
}

#[tokio::test]
async fn a_running_guest_goes_over_and_back() {
    over_and_back(QemuVersion::V10_0, |disk| disk).await;
}

#[tokio::test]
async fn so_it_does_in_the_old_qemu() {
    need!("qemu-7.2");
    over_and_back(QemuVersion::V7_2, |disk| disk).await;
}

#[tokio::test]
async fn so_it_does_where_the_disk_has_an_iothread() {
    over_and_back(QemuVersion::V10_0, DiskSpec::iothread).await;
}

#[tokio::test]
async fn so_it_does_with_a_wrapper_over_the_disk() {
    over_and_back(QemuVersion::V10_0, DiskSpec::wrapped).await;
}

#[tokio::test]
async fn so_it_does_on_scsi() {
    need!("qemu-7.2");
    let raw = Raw::new(QemuVersion::V7_2);
    let spec = DiskSpec::new("sda", SIZE).image(&raw.image());
    let qemu = Qemu::builder().version(raw.version).disk(spec).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let crossed = rig
        .dispatcher
        .track(&rig.domain, "sda", &raw.qcow2())
        .await
        .unwrap();
    rig.stand_on(&[crossed.disk]);
    qemu.disk("sda").fill(MIB, 64 * KIB, 7);
    let snapshot = rig.create("one", &["sda"], true).await.unwrap();
    assert!(!ends_with_the_hypervisor(&snapshot), "{:?}", snapshot.warnings);
    assert!(!begins_anew(&snapshot), "{:?}", snapshot.warnings);
    rig.delete("one").await;
    qemu.quit();
    raw.is_the_same();
}

/// The guardian lets the guest go between the steps: what is written then only the old bitmaps know.
#[tokio::test]
async fn what_is_written_on_the_way_over_is_known() {
    let raw = Raw::new(QemuVersion::V10_0);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    let (control, from) = (rig.control(), rig.domain.disks[0].clone());
    let planned = DirtyBitmaps.plan(&*control, &from, &raw.qcow2()).await;
    let (to, _) = planned.unwrap();
    let crossing = Crossing {
        id: uuid::Uuid::new_v4(),
        from,
        to,
        node: "over".to_owned(),
        made: true,
    };
    let steps = DirtyBitmaps.prepare(&*control, &crossing).await.unwrap();
    let (last, first) = steps.split_last().unwrap();
    for step in first {
        control.monitor(step.command.clone()).await.unwrap();
    }
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    control.monitor(last.command.clone()).await.unwrap();
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 2);
    let crossed = DirtyBitmaps.has_crossed(&*control, &crossing).await.unwrap();
    assert_eq!(crossed, Some(true));
    // Again, as after a kill: nothing is left to be done.
    for _ in 0..2 {
        DirtyBitmaps.clear(&*control, &crossing, true).await.unwrap();
        assert_eq!(rig.bitmaps().await, ["over:one*"]);
    }
    rig.stand_on(&[crossing.to]);
    rig.create("two", &["vda"], false).await.unwrap();
    let changed = rig.changed("two", "vda", "one").await.unwrap();
    let told: u64 = changed.iter().map(|(range, _)| range.end - range.start).sum();
    assert_eq!(told, 128 * KIB);
}

/// QEMU cannot open a qcow2 over a node that an iothread keeps: nothing is changed, and it says what to do.
#[tokio::test]
async fn a_controller_with_an_iothread_is_refused_while_the_guest_runs() {
    for version in [QemuVersion::V10_0, QemuVersion::V7_2] {
        let raw = Raw::new(version);
        let spec = DiskSpec::new("sda", SIZE).iothread().image(&raw.image());
        let qemu = Qemu::builder().version(version).disk(spec).start();
        let rig = Rig::new(&qemu.domain_xml()).await;
        let error = rig
            .dispatcher
            .track(&rig.domain, "sda", &raw.qcow2())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("iothread"), "{error}");
        assert_eq!(fs::read_dir(raw.dir.path()).unwrap().count(), 1);
        assert_eq!(qemu.status(), "running");
        qemu.disk("sda").fill(0, 4 * KIB, 1);
        rig.create("one", &["sda"], false).await.unwrap();
    }
}

/// The domain ran from a document of before: what it wrote is in no bitmap.
#[tokio::test]
async fn what_was_written_past_the_qcow2_is_noticed_at_rest() {
    let raw = Raw::new(QemuVersion::V10_0);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.quit();
    is_off(&mut rig);
    track(&mut rig, &raw).await;
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    // Reads as zeroes through the qcow2 from now on, whatever is written past it.
    qemu.disk("vda").discard(MIB, 64 * KIB);
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(verdicts(&rig).await, ["one=ok"]);
    let away = raw.dir.path().join("away");
    fs::rename(raw.image(), &away).unwrap();
    assert_eq!(verdicts(&rig).await, ["one=unreachable"]);
    fs::rename(&away, raw.image()).unwrap();
    assert_eq!(verdicts(&rig).await, ["one=ok"]);

    let file = fs::OpenOptions::new().write(true).open(raw.image()).unwrap();
    file.write_all_at(&[7; 512], MIB).unwrap();
    // A second later at least, whatever the file system's clock ticks in.
    file.set_modified(SystemTime::now() + Duration::from_secs(1))
        .unwrap();
    drop(file);
    let past = raw.content();
    assert_eq!(verdicts(&rig).await, ["one=missing"]);
    assert_eq!(raw.content(), past);
    raw.is_the_same();
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    let snapshot = rig.create("two", &["vda"], true).await.unwrap();
    assert!(begins_anew(&snapshot), "{:?}", snapshot.warnings);
    let error = rig.changed("two", "vda", "one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(rig.read("two", "vda").await, past);
    rig.delete("two").await;
    let dropped = rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert_eq!(dropped.marks.len(), 1);
}

/// While it runs on the raw disk nobody says that its checkpoints are well, nor ever again afterwards.
#[tokio::test]
async fn a_domain_that_runs_past_the_qcow2_is_noticed() {
    let raw = Raw::new(QemuVersion::V10_0);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.quit();
    is_off(&mut rig);
    let old = rig.domain.disks[0].clone();
    track(&mut rig, &raw).await;
    let new = rig.domain.disks[0].clone();
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    qemu.quit();

    let qemu = raw.start(|disk| disk);
    goes_on(&mut rig, &qemu);
    qemu.disk("vda").fill(MIB, 64 * KIB, 7);
    rig.stand_on(&[old]);
    let snapshot = rig.create("two", &["vda"], false).await.unwrap();
    let told = |w: &String| w.contains("the domain runs on") && w.contains("disk.raw itself");
    assert!(snapshot.warnings.iter().any(told), "{:?}", snapshot.warnings);
    assert!(begins_anew(&snapshot), "{:?}", snapshot.warnings);
    let error = rig.changed("two", "vda", "one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(verdicts(&rig).await, ["one=missing"]);
    rig.delete("two").await;
    qemu.quit();

    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    rig.stand_on(&[new]);
    assert_eq!(verdicts(&rig).await, ["one=missing"]);
    let error = {
        rig.create("three", &["vda"], false).await.unwrap();
        rig.changed("three", "vda", "one").await.unwrap_err()
    };
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
}

/// Nothing stands in the way of giving a checkpoint up, nor of settling what was begun before; and what is left is not told as if it knew.
#[tokio::test]
async fn a_checkpoint_is_removed_while_the_domain_runs_past_the_qcow2() {
    let raw = Raw::new(QemuVersion::V10_0);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    qemu.quit();
    is_off(&mut rig);
    track(&mut rig, &raw).await;
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    for name in ["one", "two", "three"] {
        rig.create(name, &["vda"], true).await.unwrap();
        rig.delete(name).await;
    }
    qemu.quit();
    let qemu = raw.start(|disk| disk);
    goes_on(&mut rig, &qemu);
    let name = rig::checkpoint("one");
    let removed = rig.dispatcher.remove_checkpoint(&rig.domain, &name).await;
    removed.unwrap();
    // What was begun before, and is settled now.
    let (control, disk) = (rig.control(), rig.domain.disks[0].clone());
    let ending = Ending {
        disk: disk.clone(),
        bitmap: "three".to_owned(),
        into: Some("two".to_owned()),
        record: true,
    };
    DirtyBitmaps.end(&*control, &[ending]).await.unwrap();
    let start = Start {
        disk,
        top: None,
        starts: Some("four".to_owned()),
        recording: Some("three".to_owned()),
        copy: None,
    };
    DirtyBitmaps.abort(&*control, &[start]).await.unwrap();
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(verdicts(&rig).await, ["two=missing", "three=missing"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_nothing_is_left() {
    let raw = Raw::new(QemuVersion::V10_0);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).image(&raw.image()))
        .disk(DiskSpec::new("vdb", SIZE).qcow2())
        .start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let refused = async |rig: &Rig, target: &str, at: &Path| {
        let tracked = rig.dispatcher.track(&rig.domain, target, at).await;
        tracked.unwrap_err()
    };
    let error = refused(&rig, "vdb", &raw.qcow2()).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let error = refused(&rig, "vda", &raw.image()).await;
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    let error = refused(&rig, "vda", &raw.dir.path().join("no/such.qcow2")).await;
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let error = refused(&rig, "vda", Path::new("disk.qcow2")).await;
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    // A fleece in the way.
    rig.create("one", &["vda"], false).await.unwrap();
    let error = refused(&rig, "vda", &raw.qcow2()).await;
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.delete("one").await;
    // Somebody has it open, and the domain is taken to be off.
    is_off(&mut rig);
    let error = refused(&rig, "vda", &raw.qcow2()).await;
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    let error = rig
        .dispatcher
        .untrack(&rig.domain, "vdb", false)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(fs::read_dir(raw.dir.path()).unwrap().count(), 1);
    assert_eq!(qemu.status(), "running");
    let recovered = rig.dispatcher.recover(None).await.unwrap();
    let left = |r: &&disksnap_core::Recovered| matches!(r.how, RecoveredHow::Left(_));
    assert_eq!(recovered.iter().filter(left).count(), 0, "{recovered:?}");
}

/// A raw disk that is tracked, in a machine that runs.
async fn tracked(version: QemuVersion) -> (Raw, Qemu, Rig) {
    let raw = Raw::new(version);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    track(&mut rig, &raw).await;
    (raw, qemu, rig)
}

/// Overlays come and go over the qcow2, with what they know; the raw disk has it all in the end.
async fn an_overlay_over_it(version: QemuVersion) {
    let (raw, qemu, mut rig) = tracked(version).await;
    rig.create("one", &["vda"], true).await.unwrap();
    let base = rig.read("one", "vda").await;
    rig.delete("one").await;
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    let request = by("qemu-external-qcow2", request("over", &["vda"], false));
    let over = rig.dispatcher.create(&rig.domain, &request).await.unwrap();
    let told = |w: &String| w.contains("not be read or exported");
    assert!(over.warnings.iter().any(told), "{:?}", over.warnings);
    rig.follow(&over);
    assert_eq!(rig.domain.disks[0].data_store, None);
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 2);
    let error = rig
        .dispatcher
        .open(&rig.domain, &name_of("over"), "vda")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let error = rig
        .dispatcher
        .untrack(&rig.domain, "vda", true)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let merged = rig
        .dispatcher
        .merge(
            &rig.domain,
            &name_of("over"),
            &MergeOptions::default(),
            &mut |_| ControlFlow::Continue(()),
        )
        .await
        .unwrap();
    rig.stand_on(&merged.disks);
    let data = rig.domain.disks[0].data_store.clone().unwrap();
    assert_eq!(data.source, Source::File { file: raw.image() });
    qemu.disk("vda").fill(3 * MIB, 64 * KIB, 3);
    rig.create("two", &["vda"], true).await.unwrap();
    let now = rig.read("two", "vda").await;
    assert_eq!(applied(&rig, &base, "two", "one").await, now);
    rig.delete("two").await;
    qemu.quit();
    is_off(&mut rig);
    assert_eq!(raw.content(), now);
    raw.is_the_same();
    assert_eq!(verdicts(&rig).await, ["one=ok", "two=ok"]);
}

#[tokio::test]
async fn overlays_over_it_hand_down_what_they_know() {
    an_overlay_over_it(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn so_they_do_in_the_old_qemu_too() {
    need!("qemu-7.2");
    an_overlay_over_it(QemuVersion::V7_2).await;
}

/// A clone of the qcow2 would be read with the data of the live disk.
#[tokio::test]
async fn a_method_that_takes_the_file_refuses_it() {
    let (_raw, _qemu, rig) = tracked(QemuVersion::V10_0).await;
    let request = by("reflink", request("one", &["vda"], false));
    let error = rig.dispatcher.create(&rig.domain, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(
        error.to_string().contains("keeps its data in another file"),
        "{error}"
    );
}

/// What is put back into the raw file would not be seen where the qcow2 says that there are zeroes.
#[tokio::test]
async fn a_snapshot_of_before_is_not_put_back_below_the_qcow2() {
    need!("xfs");
    let fs = loop_fs(LoopFsKind::Xfs, 320 * MIB, "");
    let raw = Raw::at(fs.path(), QemuVersion::V10_0);
    let qemu = raw.start(|disk| disk);
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let request = by("reflink", request("before", &["vda"], false));
    rig.dispatcher.create(&rig.domain, &request).await.unwrap();
    let before = raw.content();
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    qemu.quit();
    is_off(&mut rig);
    track(&mut rig, &raw).await;
    let revert = async |rig: &Rig| {
        let name = name_of("before");
        rig.dispatcher.revert(&rig.domain, &name, &[]).await
    };
    let error = revert(&rig).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.next_step().unwrap().contains("untrack"), "{error}");
    let raw_again = rig.dispatcher.untrack(&rig.domain, "vda", false).await.unwrap();
    rig.stand_on(&[raw_again.disk]);
    revert(&rig).await.unwrap();
    assert_eq!(raw.content(), before);
}

/// A block device, with the guest running and off.
#[tokio::test]
async fn a_block_device_keeps_every_byte() {
    let raw = Raw::new(QemuVersion::V10_0);
    let Some(device) = Loop::of(&raw.image()) else {
        return;
    };
    let spec = || DiskSpec::new("vda", SIZE).image(&device.path);
    let qemu = Qemu::builder().disk(spec()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    let before = fs::read(&device.path).unwrap();
    let crossed = track(&mut rig, &raw).await;
    let told = |w: &String| w.contains("cannot be noticed");
    assert!(crossed.warnings.iter().any(told), "{:?}", crossed.warnings);
    let dev = device.path.clone();
    assert_eq!(crossed.disk.data_store.unwrap().source, Source::Block { dev });
    assert_eq!(fs::read(&device.path).unwrap(), before);
    rig.create("one", &["vda"], true).await.unwrap();
    rig.delete("one").await;
    qemu.disk("vda").fill(MIB, 64 * KIB, 1);
    qemu.quit();
    let qemu = raw.start_through();
    goes_on(&mut rig, &qemu);
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 2);
    rig.create("two", &["vda"], true).await.unwrap();
    let now = rig.read("two", "vda").await;
    assert_eq!(applied(&rig, &before, "two", "one").await, now);
    rig.delete("two").await;
    qemu.quit();
    is_off(&mut rig);
    let untracked = rig.dispatcher.untrack(&rig.domain, "vda", true).await.unwrap();
    rig.stand_on(&[untracked.disk]);
    let again = track(&mut rig, &raw).await;
    assert_eq!(again.paused, None);
    assert_eq!(fs::read(&device.path).unwrap(), now);
}

/// A loop device, detached when dropped.
struct Loop {
    path: PathBuf,
}

impl Loop {
    /// `None`, saying why, where this machine lets nobody have one.
    #[expect(clippy::print_stderr, reason = "this is the report of a skipped test")]
    fn of(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap();
                let path = PathBuf::from(path.trim());
                Some(Self { path })
            }
            Ok(output) => {
                eprintln!("SKIPPED: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                eprintln!("SKIPPED: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
