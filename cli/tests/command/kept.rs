//! Checkpoints that are kept snapshots: of btrfs under a real QEMU that runs, and with it off.

use std::path::{Path, PathBuf};

use disksnap_test_support::{DiskSpec, KIB, LoopFsKind, MIB, Qemu, loop_fs, need};
use serde_json::{Value, json};

use crate::every_method::off;
use crate::programs::program as run;
use crate::site::{Site, arg};

const SIZE: u64 = 16 * MIB;
const DISKS: [&str; 2] = ["vda", "vdb"];

struct Stage {
    site: Site,
    xml: String,
}

impl Stage {
    fn of(xml: String) -> Self {
        let site = Site::new();
        Self { site, xml }
    }

    /// A snapshot of both disks by btrfs.
    fn create(&self, name: &str, more: &[&str]) -> Value {
        let disks = ["vda,method=btrfs", "vdb,method=btrfs"];
        let words = ["snapshot", "create", "-d", &self.xml, "--name", name];
        let words = [&words[..], &["--disk", disks[0], "--disk", disks[1]], more].concat();
        self.site.json(&words)
    }

    /// A disk as it is in a snapshot, as the guest had it.
    fn read(&self, snapshot: &str, disk: &str) -> Vec<u8> {
        let to = self.site.path("whole");
        self.site
            .ok(&["read", "-d", &self.xml, snapshot, disk, "--to", &arg(&to)]);
        let whole = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        whole
    }

    fn changes(&self, from: &str, to: &str, disk: &str) -> Value {
        let words = [
            "changes", "-d", &self.xml, "--from", from, "--to", to, "--disk", disk,
        ];
        self.site.json(&words)
    }

    /// What was read at the checkpoint and what has changed since are the snapshot; the bytes that changed.
    fn prove(&self, base: &[u8], from: &str, to: &str, disk: &str) -> usize {
        let (mut made, whole) = (base.to_vec(), self.read(to, disk));
        let told = self.changes(from, to, disk);
        let mut bytes = 0;
        for extent in told["changes"].as_array().unwrap() {
            let number = |key: &str| usize::try_from(extent[key].as_u64().unwrap()).unwrap();
            let range = number("offset")..number("offset") + number("length");
            made[range.clone()].copy_from_slice(&whole[range.clone()]);
            bytes += range.len();
        }
        assert!(made == whole, "{disk} since {from}: {told:#}");
        bytes
    }
}

/// A subvolume with an empty qcow2 image in it.
fn subvolume(fs: &Path) -> PathBuf {
    let images = fs.join("images");
    run("btrfs", &["subvolume", "create", &arg(&images)]);
    let image = arg(&images.join("vdb.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    images
}

/// A raw and a qcow2 disk in one subvolume of a btrfs.
fn machine(images: &Path) -> Qemu {
    let raw = images.join("vda.raw");
    if !raw.exists() {
        let made = std::fs::File::create(&raw).and_then(|file| file.set_len(SIZE));
        made.unwrap();
    }
    let qcow2 = images.join("vdb.qcow2");
    Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).image(&raw))
        .disk(DiskSpec::new("vdb", SIZE).qcow2().image(&qcow2))
        .start()
}

fn scribble(machine: &Qemu, seed: u8) {
    for target in DISKS {
        let disk = machine.disk(target);
        disk.fill(u64::from(seed) * MIB, 64 * KIB, seed);
        disk.fill(8 * MIB, 4 * KIB, seed);
        disk.zero(u64::from(seed - 1) * MIB, 32 * KIB);
    }
}

/// The subvolumes of the file system beside that of the images.
fn kept(fs: &Path) -> usize {
    run("btrfs", &["subvolume", "list", &arg(fs)]).lines().count() - 1
}

#[test]
fn what_changed_is_told_by_comparing_and_the_snapshot_goes_with_its_checkpoint() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 * MIB, "");
    let images = subvolume(fs.path());
    let machine = machine(&images);
    let stage = Stage::of(arg(&machine.domain_xml_file()));
    scribble(&machine, 1);
    let made = stage.create("monday", &["--checkpoint"]);
    assert_eq!(made["checkpoint"], "monday");
    // The guest pays for no bitmap.
    let nodes = machine.qmp("query-named-block-nodes", json!({ "flat": true }));
    assert!(!nodes.to_string().contains("dirty-bitmaps"), "{nodes:#}");
    let monday = DISKS.map(|disk| stage.read("monday", disk));
    scribble(&machine, 2);
    stage.create("tuesday", &["--checkpoint"]);
    let tuesday = DISKS.map(|disk| stage.read("tuesday", disk));
    let deleted = stage
        .site
        .json(&["snapshot", "delete", "-d", &stage.xml, "monday"]);
    assert_eq!(deleted["deleted"][0]["keptFor"], json!(["monday"]));
    scribble(&machine, 3);
    stage.create("wednesday", &[]);
    for (n, disk) in DISKS.into_iter().enumerate() {
        let since_monday = stage.prove(&monday[n], "monday", "wednesday", disk);
        let since_tuesday = stage.prove(&tuesday[n], "tuesday", "wednesday", disk);
        assert!(stage.prove(&monday[n], "monday", "tuesday", disk) > 0);
        assert!(0 < since_tuesday && since_tuesday <= since_monday && since_monday < 2 << 20);
    }
    let superset = stage.changes("monday", "wednesday", "vdb")["superset"].clone();
    assert_eq!(superset[0]["disk"], "vdb", "{superset:#}");
    let listed = stage.site.ok(&["checkpoint", "list", "-d", &stage.xml]);
    assert!(listed.contains("vda (kept snapshot)"), "{listed}");
    stage.site.ok(&["checkpoint", "validate", "-d", &stage.xml]);
    // With the domain off, and by another process of QEMU's.
    machine.quit();
    for (n, disk) in DISKS.into_iter().enumerate() {
        stage.prove(&monday[n], "monday", "wednesday", disk);
    }
    stage.create("thursday", &["--checkpoint"]);
    for (n, disk) in DISKS.into_iter().enumerate() {
        stage.prove(&tuesday[n], "tuesday", "thursday", disk);
    }
    // Everything goes when nobody needs it.
    for name in ["tuesday", "wednesday", "thursday"] {
        stage.site.ok(&["snapshot", "delete", "-d", &stage.xml, name]);
    }
    assert_eq!(kept(fs.path()), 3);
    for name in ["monday", "tuesday", "thursday"] {
        stage.site.ok(&["checkpoint", "remove", "-d", &stage.xml, name]);
    }
    assert_eq!(kept(fs.path()), 0);
    let list = stage.site.json(&["snapshot", "list", "-d", &stage.xml]);
    assert_eq!(list, json!({ "snapshots": [] }));
}

/// A snapshot by another method is not compared with: what to do is said.
#[test]
fn a_snapshot_by_another_method_is_refused_with_the_way_out() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 * MIB, "");
    let images = subvolume(fs.path());
    let machine = machine(&images);
    let stage = Stage::of(arg(&machine.domain_xml_file()));
    stage.create("monday", &["--checkpoint"]);
    scribble(&machine, 1);
    let fleece = "vdb,method=qemu-fleece";
    stage.site.ok(&[
        "snapshot", "create", "-d", &stage.xml, "--name", "tuesday", "--disk", fleece,
    ]);
    let words = ["changes", "-d", &stage.xml, "--from", "monday", "--to", "tuesday"];
    let refused = stage.site.fails(5, &words);
    assert!(
        refused.contains("kept snapshot") && refused.contains("next:"),
        "{refused}"
    );
}

/// A bitmap that a revert has put back with its image knows nothing of what was written before the kept snapshot that comes
/// after it: nothing is told by it since then.
#[test]
fn after_a_revert_no_older_bitmap_stands_in_for_a_kept_snapshot() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 512 * MIB, "");
    let images = subvolume(fs.path());
    let image = arg(&images.join("vdb.qcow2"));
    let site = Site::new();
    let xml = off(&site, Path::new(&image), "qcow2");
    let write = |at: &str| {
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", &format!("write -P 7 {at} 64k"), &image],
        )
    };
    let create = |name: &str, method: &str, more: &[&str]| {
        let disk = format!("vda,method={method}");
        let words = ["snapshot", "create", "-d", &xml, "--name", name, "--disk", &disk];
        site.ok(&[&words[..], more].concat());
    };
    create("monday", "reflink", &["--checkpoint"]);
    create("base", "btrfs", &[]);
    write("1M");
    create("tuesday", "btrfs", &["--checkpoint"]);
    write("2M");
    let changes = ["changes", "-d", &xml, "--from", "tuesday", "--to"];
    create("wednesday", "reflink", &[]);
    let told = site.ok(&[&changes[..], &["wednesday"]].concat());
    assert!(told.contains("2097152") && told.contains("'monday'"), "{told}");
    site.ok(&["snapshot", "revert", "-d", &xml, "base"]);
    write("3M");
    create("thursday", "reflink", &[]);
    // What was written at 1M is in tuesday's, not in thursday's, and monday's bitmap does not know of it.
    let refused = site.run(&[&changes[..], &["thursday"]].concat());
    assert_ne!(
        refused.code,
        Some(0),
        "{}",
        String::from_utf8_lossy(&refused.stdout)
    );
    create("friday", "btrfs", &[]);
    let told = site.ok(&[&changes[..], &["friday"]].concat());
    for at in ["1048576", "3145728"] {
        assert!(told.contains(at), "{told}");
    }
}
