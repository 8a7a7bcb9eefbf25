//! Checkpoints through the life of a domain: stopped, started, killed, off; and what is said of each then.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::os::unix::fs::FileExt;

use disksnap_core::{ErrorKind, MarkVerdict, Trackable, Tracker};
use disksnap_dirty_bitmaps::DirtyBitmaps;
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu};
use rig::Rig;

const SIZE: u64 = 4 * MIB;
const TARGETS: [&str; 2] = ["vda", "vdb"];

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// A qcow2 disk and a raw one.
fn two_disks() -> Qemu {
    Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start()
}

/// The verdicts, one word each: `checkpoint:disk=verdict`.
async fn verdicts(rig: &Rig) -> Vec<String> {
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    let told = |mark: &disksnap_core::CheckedMark| {
        format!("{}:{}={}", mark.checkpoint, mark.target, mark.verdict.as_str())
    };
    let mut all: Vec<String> = validation.marks.iter().map(told).collect();
    all.extend(
        validation
            .unknown
            .iter()
            .map(|u| format!("unknown:{}={}", u.target, u.name)),
    );
    all.extend(validation.full.iter().map(|target| format!("full:{target}")));
    all
}

async fn made(rig: &Rig, names: &[&str]) {
    for name in names {
        rig.create(name, &TARGETS, true).await.unwrap();
        rig.delete(name).await;
    }
}

#[tokio::test]
async fn a_clean_stop_keeps_what_the_format_keeps() {
    let qemu = two_disks();
    let rig = Rig::new(&qemu.domain_xml()).await;
    made(&rig, &["a", "b"]).await;
    assert_eq!(
        verdicts(&rig).await,
        ["a:vda=ok", "a:vdb=ok", "b:vda=ok", "b:vdb=ok"]
    );
    for target in TARGETS {
        qemu.disk(target).fill(MIB, 64 * KIB, 7);
    }
    qemu.quit();
    let off = ["a:vda=ok", "a:vdb=lost", "b:vda=ok", "b:vdb=lost", "full:vdb"];
    assert_eq!(verdicts(&rig).await, off);
    qemu.restart();
    assert_eq!(verdicts(&rig).await, off);
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 8);
    rig.create("c", &["vda"], false).await.unwrap();
    let changed = rig.changed("c", "vda", "a").await.unwrap();
    let ranges: Vec<_> = changed.iter().map(|(range, _)| range.clone()).collect();
    assert_eq!(ranges, [MIB..MIB + 64 * KIB, 2 * MIB..2 * MIB + 64 * KIB]);
    rig.create("d", &TARGETS, false).await.unwrap();
    let error = rig.changed("d", "vdb", "a").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
}

#[tokio::test]
async fn a_killed_hypervisor_leaves_bitmaps_that_nobody_trusts() {
    let qemu = two_disks();
    let rig = Rig::new(&qemu.domain_xml()).await;
    made(&rig, &["a", "b"]).await;
    // Saved once, and taken up again: only then is anything of them in the image.
    qemu.quit();
    qemu.restart();
    qemu.kill9();
    let broken = [
        "a:vda=inconsistent",
        "a:vdb=lost",
        "b:vda=inconsistent",
        "b:vdb=lost",
        "full:vda",
        "full:vdb",
    ];
    assert_eq!(verdicts(&rig).await, broken);
    qemu.restart();
    assert_eq!(verdicts(&rig).await, broken);
    // Tonight's backup is made all the same, and says what is wrong.
    let snapshot = rig.create("c", &TARGETS, true).await.unwrap();
    assert!(
        snapshot
            .warnings
            .iter()
            .any(|w| w.starts_with("vda: what has changed since the checkpoint 'b'"))
    );
    let error = rig.changed("c", "vda", "b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    qemu.disk("vda").fill(0, 64 * KIB, 1);
    // And so is tomorrow's: what is known from tonight on is not told as if it were all since yesterday.
    rig.create("d", &TARGETS, false).await.unwrap();
    assert_eq!(
        rig.changed("d", "vda", "b").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    assert_eq!(rig.changed("d", "vda", "c").await.unwrap().len(), 1);
    let dropped = rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    let names: Vec<&str> = dropped
        .checkpoints
        .iter()
        .map(disksnap_core::CheckpointName::as_str)
        .collect();
    assert_eq!((names, dropped.full.as_slice()), (vec!["a", "b"], [].as_slice()));
    assert_eq!(verdicts(&rig).await, ["c:vda=ok", "c:vdb=ok"]);
    let again = rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert_eq!(again, disksnap_core::Dropped::default());
}

#[tokio::test]
async fn what_somebody_did_behind_our_back_is_told() {
    let qemu = two_disks();
    let rig = Rig::new(&qemu.domain_xml()).await;
    made(&rig, &["a", "b", "c"]).await;
    let node = qemu.format_node("vda").to_owned();
    let on = |name: &str| serde_json::json!({ "node": node, "name": name });
    qemu.qmp("block-dirty-bitmap-remove", on("b"));
    qemu.qmp("block-dirty-bitmap-enable", on("a"));
    qemu.qmp("block-dirty-bitmap-add", on("stranger"));
    let mut told = verdicts(&rig).await;
    assert_eq!(
        told,
        [
            "a:vda=recording",
            "a:vdb=ok",
            "b:vda=missing",
            "b:vdb=ok",
            "c:vda=ok",
            "c:vdb=ok",
            "unknown:vda=stranger"
        ]
    );
    let dropped = rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert_eq!(dropped.marks.len(), 2, "{dropped:?}");
    assert!(
        dropped.checkpoints.is_empty() && dropped.full.is_empty(),
        "{dropped:?}"
    );
    told.retain(|word| !word.starts_with("a:vda") && !word.starts_with("b:vda"));
    assert_eq!(verdicts(&rig).await, told);
    rig.dispatcher.drop_broken(&rig.domain, true).await.unwrap();
    assert_eq!(
        verdicts(&rig).await,
        ["a:vdb=ok", "b:vdb=ok", "c:vda=ok", "c:vdb=ok"]
    );
    qemu.qmp("block-dirty-bitmap-disable", on("c"));
    let validation = rig.dispatcher.validate(&rig.domain).await.unwrap();
    let last = validation
        .marks
        .iter()
        .find(|m| m.checkpoint.as_str() == "c" && m.target == "vda");
    assert_eq!(last.unwrap().verdict, MarkVerdict::NotRecording);
    assert_eq!(validation.full, ["vda"]);
}

#[tokio::test]
async fn a_domain_that_is_off_has_checkpoints_too() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("a", &["vda"], true).await.unwrap();
    rig.delete("a").await;
    qemu.disk("vda").fill(0, 64 * KIB, 1);
    qemu.quit();
    let name = rig::checkpoint("a");
    rig.dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap();
    assert_eq!(verdicts(&rig).await, Vec::<String>::new());
    qemu.restart();
    rig.create("b", &["vda"], true).await.unwrap();
    rig.create("c", &["vda"], true).await.unwrap();
    qemu.disk("vda").fill(MIB, 64 * KIB, 2);
    qemu.quit();
    // The last one goes, and the one before goes on in its place.
    let name = rig::checkpoint("c");
    rig.dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap();
    assert_eq!(verdicts(&rig).await, ["b:vda=ok"]);
    qemu.restart();
    qemu.disk("vda").fill(2 * MIB, 64 * KIB, 3);
    rig.create("d", &["vda"], false).await.unwrap();
    let changed = rig.changed("d", "vda", "b").await.unwrap();
    let ranges: Vec<_> = changed.iter().map(|(range, _)| range.clone()).collect();
    assert_eq!(ranges, [MIB..MIB + 64 * KIB, 2 * MIB..2 * MIB + 64 * KIB]);
}

/// Nothing is handed over by what is lost, and nobody goes on as if it knew.
#[tokio::test]
async fn what_is_lost_is_dropped_and_never_merged() {
    let qemu = two_disks();
    let rig = Rig::new(&qemu.domain_xml()).await;
    made(&rig, &["a", "b"]).await;
    qemu.quit();
    qemu.restart();
    let remove = async |name: &str| {
        let name = rig::checkpoint(name);
        rig.dispatcher.remove_checkpoint(&rig.domain, &name).await
    };
    let error = remove("b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    let lost = ["a:vda=ok", "a:vdb=lost", "b:vda=ok", "b:vdb=lost", "full:vdb"];
    assert_eq!(verdicts(&rig).await, lost);
    // A snapshot from before keeps what it can tell, and what it cannot is not told.
    rig.create("kept", &TARGETS, false).await.unwrap();
    rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert!(rig.changed("kept", "vda", "a").await.is_ok());
    rig.delete("kept").await;
    remove("b").await.unwrap();
    assert_eq!(verdicts(&rig).await, ["a:vda=ok"]);
    // Killed, with the domain off: refused, and nothing is locked out by it.
    made(&rig, &["c"]).await;
    qemu.quit();
    qemu.restart();
    qemu.kill9();
    let error = remove("c").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert_eq!(verdicts(&rig).await, Vec::<String>::new());
}

/// A checkpoint after a gap takes the gap along when it is removed.
#[tokio::test]
async fn a_gap_stays_a_gap() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let one = async |name: &str| {
        let created = rig.create(name, &["vda"], true).await;
        created.unwrap();
    };
    one("a").await;
    rig.delete("a").await;
    let on = |name: &str| serde_json::json!({ "node": qemu.format_node("vda"), "name": name });
    qemu.qmp("block-dirty-bitmap-disable", on("a"));
    qemu.disk("vda").fill(0, 64 * KIB, 1);
    one("b").await;
    let name = rig::checkpoint("b");
    let removed = rig.dispatcher.remove_checkpoint(&rig.domain, &name).await;
    removed.unwrap();
    assert_eq!(
        rig.changed("b", "vda", "a").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    one("c").await;
    assert_eq!(
        rig.changed("c", "vda", "a").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    // Nor is a name taken that something else has.
    qemu.qmp("block-dirty-bitmap-add", on("d"));
    let error = rig.create("d", &["vda"], true).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert!(rig.bitmaps().await.iter().any(|name| name.ends_with(":d*")));
}

/// An old image keeps none, and says so.
#[tokio::test]
async fn an_old_qcow2_image_keeps_none() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("old.qcow2");
    rig::run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            image.to_str().unwrap(),
            "4M",
        ],
    );
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2().image(&image))
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let disk = rig.domain.disks[0].clone();
    let trackable = async || {
        let looked = DirtyBitmaps.look(&*rig.control(), &[&disk]).await.unwrap();
        looked[0].trackable.clone()
    };
    let Trackable::Volatile(why) = trackable().await else {
        panic!("{:?}", trackable().await)
    };
    assert!(why.contains("compat=0.10"), "{why}");
    let one = rig.create("a", &["vda"], true).await.unwrap();
    assert!(
        one.warnings.iter().any(|w| w.contains("compat=0.10")),
        "{:?}",
        one.warnings
    );
    qemu.disk("vda").fill(MIB, 64 * KIB, 7);
    rig.create("b", &["vda"], false).await.unwrap();
    assert_eq!(rig.changed("b", "vda", "a").await.unwrap().len(), 1);
    qemu.quit();
    assert_eq!(verdicts(&rig).await, ["a:vda=lost", "full:vda"]);
    let Trackable::No(why) = trackable().await else {
        panic!("{:?}", trackable().await)
    };
    assert!(why.contains("compat=0.10"), "{why}");
}

/// What cannot be looked at is told so, does not hide what can, and is not given up.
#[tokio::test]
async fn a_disk_that_is_out_of_reach_loses_nothing() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE).qcow2())
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    made(&rig, &["a", "b"]).await;
    qemu.quit();
    let (image, away) = (qemu.image("vdb").to_owned(), qemu.dir().join("away"));
    std::fs::rename(&image, &away).unwrap();
    let out_of_reach = ["a:vda=ok", "a:vdb=unreachable", "b:vda=ok", "b:vdb=unreachable"];
    assert_eq!(verdicts(&rig).await, out_of_reach);
    // There, and no image.
    std::fs::write(&image, "nothing").unwrap();
    assert_eq!(verdicts(&rig).await, out_of_reach);
    let dropped = rig.dispatcher.drop_broken(&rig.domain, true).await.unwrap();
    assert_eq!(dropped, disksnap_core::Dropped::default());
    let name = rig::checkpoint("b");
    let error = rig
        .dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("vdb"), "{error}");
    std::fs::rename(&away, &image).unwrap();
    assert_eq!(
        verdicts(&rig).await,
        ["a:vda=ok", "a:vdb=ok", "b:vda=ok", "b:vdb=ok"]
    );
}

/// An old QEMU, or another program, writes to the image and clears the bit that says that the bitmaps know it all.
#[tokio::test]
async fn what_is_written_past_the_bitmaps_is_not_trusted() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    for name in ["a", "b"] {
        rig.create(name, &["vda"], true).await.unwrap();
        rig.delete(name).await;
    }
    qemu.quit();
    let image = std::fs::File::options()
        .write(true)
        .open(qemu.image("vda"))
        .unwrap();
    // `autoclear_features` (QEMU's docs/interop/qcow2.txt).
    image.write_all_at(&[0; 8], 88).unwrap();
    let gone = ["a:vda=missing", "b:vda=missing", "full:vda"];
    assert_eq!(verdicts(&rig).await, gone);
    let name = rig::checkpoint("b");
    let error = rig
        .dispatcher
        .remove_checkpoint(&rig.domain, &name)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    qemu.restart();
    assert_eq!(verdicts(&rig).await, gone);
    let tonight = rig.create("c", &["vda"], true).await.unwrap();
    let told = |warning: &String| warning.starts_with("vda: what has changed since the checkpoint 'b'");
    assert!(tonight.warnings.iter().any(told), "{:?}", tonight.warnings);
    let error = rig.changed("c", "vda", "b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    rig.dispatcher.drop_broken(&rig.domain, false).await.unwrap();
    assert_eq!(verdicts(&rig).await, ["c:vda=ok"]);
}
