//! A domain that is off: snapshots, merges with `qemu-img`, reverts, and the tree that they make.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::os::unix::fs::FileExt;
use std::path::Path;

use disksnap_core::{Disks, ErrorKind, Health};
use disksnap_test_support::{DiskSpec, MIB, Qemu, pattern};
use rig::{Rig, choice, content, extra_files, info, request, run};

const SIZE: u64 = 4 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

/// A domain with a qcow2 and a raw disk that has run and ended.
async fn ended() -> (Qemu, Rig) {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    qemu.disk("vda").write(0, &pattern::bytes(1, 100_000));
    qemu.disk("vdb").write(MIB, &pattern::bytes(2, 100_000));
    let rig = Rig::new(&qemu.domain_xml()).await;
    qemu.quit();
    (qemu, rig)
}

/// Writes to the disk as a domain would that was started and ended.
fn write(rig: &Rig, target: &str, offset: u64, byte: u8) {
    let disk = rig.domain.disk(target).unwrap();
    let format = disk.driver.format.as_deref().unwrap();
    let command = format!("write -P {byte} {offset} 4096");
    run(
        "qemu-io",
        &["-f", format, "-c", &command, rig.image(target).to_str().unwrap()],
    );
}

fn byte_at(content: &[u8], offset: u64) -> u8 {
    content[usize::try_from(offset).unwrap()]
}

#[tokio::test]
async fn snapshots_of_a_domain_that_is_off_are_merged_in_either_order() {
    for order in [["one", "two"], ["two", "one"]] {
        let (qemu, mut rig) = ended().await;
        let both = ["vda", "vdb"];
        let before: Vec<_> = both.iter().map(|t| rig.content(t)).collect();
        rig.create("one", &both).await.unwrap();
        assert_ne!(rig.image("vda"), qemu.image("vda"));
        for (n, target) in both.into_iter().enumerate() {
            assert!(rig.read("one", target).await == before[n]);
            assert!(rig.content(target) == before[n], "the overlay is empty");
            write(&rig, target, 8192, 0x11);
        }
        let between: Vec<_> = both.iter().map(|t| rig.content(t)).collect();
        rig.create("two", &both).await.unwrap();
        for target in both {
            write(&rig, target, 16384, 0x22);
        }
        let after: Vec<_> = both.iter().map(|t| rig.content(t)).collect();
        let kept = if order[0] == "one" {
            ("two", &between)
        } else {
            ("one", &before)
        };
        rig.merge(order[0]).await.unwrap();
        for (n, target) in both.into_iter().enumerate() {
            assert!(
                rig.read(kept.0, target).await == kept.1[n],
                "{target} in {}",
                kept.0
            );
            assert!(rig.content(target) == after[n]);
        }
        rig.merge(order[1]).await.unwrap();
        for (n, target) in both.into_iter().enumerate() {
            assert!(rig.content(target) == after[n]);
            assert_eq!(rig.image(target), qemu.image(target));
        }
        assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
        // And the domain starts from it.
        qemu.restart();
        assert_eq!(qemu.disk("vda").read(16384, 4), [0x22; 4]);
    }
}

#[tokio::test]
async fn reverts_make_a_tree_in_which_every_snapshot_stays_readable() {
    let (qemu, mut rig) = ended().await;
    let start = rig.content("vda");
    rig.create("one", &["vda"]).await.unwrap();
    write(&rig, "vda", 0, 1);
    let one = rig.content("vda");
    rig.create("two", &["vda"]).await.unwrap();
    write(&rig, "vda", 0, 2);
    // Back to the older: what was written since is lost, the newer one stays.
    rig.revert("one").await.unwrap();
    assert!(rig.content("vda") == start);
    assert!(rig.read("one", "vda").await == start);
    assert!(rig.read("two", "vda").await == one);
    rig.revert("one").await.unwrap();
    assert!(rig.content("vda") == start, "twice is as good");
    write(&rig, "vda", 0, 3);
    // What both snapshots stand on cannot be merged into.
    let error = rig.merge("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.next_step().unwrap().contains("first"));
    assert!(rig.read("two", "vda").await == one);
    // A snapshot on the new branch, and back to the other one.
    rig.create("three", &["vda"]).await.unwrap();
    write(&rig, "vda", 4096, 4);
    rig.revert("two").await.unwrap();
    assert!(rig.content("vda") == one);
    assert_eq!(byte_at(&rig.read("three", "vda").await, 0), 3);
    let error = rig.merge("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.delete("three").await;
    write(&rig, "vda", 8192, 5);
    let last = rig.content("vda");
    rig.delete("one").await;
    assert!(rig.read("two", "vda").await == one);
    rig.delete("two").await;
    assert!(rig.content("vda") == last);
    assert_eq!(rig.image("vda"), qemu.image("vda"));
    assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
}

#[tokio::test]
async fn a_running_domain_is_not_reverted() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let mut rig = Rig::new(&qemu.domain_xml()).await;
    rig.create("one", &["vda"]).await.unwrap();
    qemu.disk("vda").fill(0, 4096, 7);
    let error = rig.revert("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    qemu.quit();
    rig.revert("one").await.unwrap();
    assert_eq!(byte_at(&rig.content("vda"), 0), 0);
    rig.delete("one").await;
    assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
}

/// An old document would have the domain write to the base.
#[tokio::test]
async fn an_old_document_is_refused_and_its_start_is_told() {
    let (qemu, mut rig) = ended().await;
    let old = rig.domain.clone();
    rig.create("one", &["vda"]).await.unwrap();
    let now = std::mem::replace(&mut rig.domain, old);
    let error = rig.create("two", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert_eq!(rig.revert("one").await.unwrap_err().kind(), ErrorKind::Invalid);
    qemu.restart();
    assert!(matches!(rig.health("one").await, Health::Broken(_)));
    let error = rig.merge("one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    qemu.quit();
    rig.domain = now;
    rig.delete("one").await;
    assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
}

/// Every layer of a chain is recorded, whatever the document says of it.
#[tokio::test]
async fn a_chain_is_recorded_in_full() {
    let (qemu, mut rig) = ended().await;
    let top = qemu.dir().join("sub");
    std::fs::create_dir(&top).unwrap();
    let top = top.join("top.qcow2");
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "../vda.qcow2",
        "-F",
        "qcow2",
        top.to_str().unwrap(),
    ];
    run("qemu-img", &make);
    let mut disk = rig.domain.disk("vda").unwrap().clone();
    let base = disk
        .source
        .replace(disksnap_core::Source::File { file: top.clone() });
    rig.follow([disk.clone()]);
    // The document says nothing of a chain, and a header is not trusted to name one.
    let error = rig.create("none", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("domain update --chain"), "{error}");
    disk.backing = Some(disksnap_core::BackingStore {
        format: Some("qcow2".to_owned()),
        source: base.unwrap(),
        data_store: None,
        backing: None,
    });
    rig.follow([disk]);
    let before = rig.content("vda");
    let given = qemu.dir().join("given.qcow2");
    let mut wanted = request("one", &[]);
    let options = [("source.file", given.to_str().unwrap())];
    wanted.disks = Disks::Named(vec![choice("vda", "qemu-external-qcow2", &options)]);
    rig.create_as(wanted).await.unwrap();
    let disk = rig.domain.disk("vda").unwrap();
    let paths = |disk: &disksnap_core::Disk| {
        let mut paths = vec![disk.source.as_ref().unwrap().path().unwrap().to_owned()];
        let mut below = disk.backing.as_ref();
        while let Some(store) = below {
            paths.push(store.source.path().unwrap().to_owned());
            below = store.backing.as_deref();
        }
        paths
    };
    assert_eq!(
        paths(disk),
        [given.clone(), top.clone(), qemu.image("vda").to_owned()]
    );
    assert_eq!(info(&given)["backing-filename"], top.to_str().unwrap());
    assert!(content(&given, "qcow2") == before);
    rig.delete("one").await;
    assert_eq!(
        paths(rig.domain.disk("vda").unwrap()),
        [top.clone(), qemu.image("vda").to_owned()]
    );
    assert!(rig.content("vda") == before);
    assert!(!given.exists());
}

#[tokio::test]
async fn bad_input_is_told_by_kind_and_nothing_is_left() {
    let (qemu, mut rig) = ended().await;
    let there = qemu.dir().join("there");
    std::fs::write(&there, "precious").unwrap();
    for (options, kind) in [
        (
            [("source.file", there.to_str().unwrap())],
            ErrorKind::AlreadyExists,
        ),
        ([("source.file", "x")], ErrorKind::Invalid),
        ([("source.file", "/no/such/dir/x")], ErrorKind::NotFound),
    ] {
        let mut wanted = request("no", &[]);
        wanted.disks = Disks::Named(vec![choice("vdb", "qemu", &[]), choice("vda", "qemu", &options)]);
        let error = rig.create_as(wanted).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
    }
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "precious");
    // A domain that runs, and nobody said where its monitor is.
    qemu.restart();
    let sockets = std::mem::take(&mut rig.domain.sockets);
    let error = rig.create("no", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.domain.sockets = sockets;
    qemu.quit();
    assert_eq!(extra_files(qemu.dir()), Vec::<String>::new());
    std::fs::OpenOptions::new()
        .write(true)
        .open(qemu.image("vda"))
        .unwrap()
        .write_all_at(b"rubbish", 0)
        .unwrap();
    let error = rig.create("no", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    std::fs::remove_file(qemu.image("vdb")).unwrap();
    let error = rig.create("no", &["vdb"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(!Path::new(qemu.image("vdb")).exists());
}
