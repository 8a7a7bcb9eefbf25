//! Disks that come, go, grow and are called otherwise between checkpoints: each has its own chain, and only what must be full
//! is full.

use std::path::PathBuf;
use std::process::Command;

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, tools};
use serde_json::{Value, json};

use crate::site::{Site, arg};

const UUID: &str = "7c3f9d52-0b7e-4c55-9a4a-2a1d2f0c6e11";

/// A domain whose disks change while it is off.
struct Domain {
    site: Site,
    xml: String,
    machine: Option<Qemu>,
}

impl Domain {
    fn new() -> Self {
        let site = Site::new();
        let xml = arg(&site.path("web1.xml"));
        Self {
            site,
            xml,
            machine: None,
        }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.site.path(&format!("{name}.qcow2"))
    }

    fn make(&self, name: &str, size: &str) {
        qemu_img(&["create", "-q", "-f", "qcow2", &arg(&self.image(name)), size]);
    }

    /// Starts it with these disks: the target, and the image's name.
    fn start(&mut self, disks: &[(&str, &str)]) {
        let builder = disks.iter().fold(Qemu::builder(), |builder, (target, image)| {
            let spec = DiskSpec::new(target, MIB).qcow2().image(&self.image(image));
            builder.disk(spec)
        });
        let machine = builder.start();
        let text = machine.domain_xml().replace(machine.name(), "web1");
        std::fs::write(&self.xml, text.replace(&machine.uuid().to_string(), UUID)).unwrap();
        self.machine = Some(machine);
    }

    fn machine(&self) -> &Qemu {
        self.machine.as_ref().unwrap()
    }

    fn stop(&mut self) {
        self.machine.take().unwrap().quit();
    }

    fn write(&self, target: &str, mib: u64) {
        self.machine().disk(target).fill(mib * MIB, 64 * KIB, 7);
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        [words, &["-d", &self.xml]].concat()
    }

    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&self.words(words))
    }

    fn fails(&self, code: i32, words: &[&str]) -> String {
        self.site.fails(code, &self.words(words))
    }

    /// A checkpoint with its snapshot; what the create warned of.
    fn begin(&self, name: &str) -> Value {
        self.json(&["snapshot", "create", "--name", name, "--checkpoint"])["warnings"].clone()
    }

    fn delete(&self, name: &str) {
        self.json(&["snapshot", "delete", name]);
    }

    /// What has changed since, disk by disk, in MiB from the beginning.
    fn changes(&self, since: &str) -> Vec<String> {
        let told = self.json(&["changes", "--from", since]);
        let each = told["changes"].as_array().unwrap().iter();
        each.map(|one| {
            format!(
                "{}@{}",
                one["disk"].as_str().unwrap(),
                one["offset"].as_u64().unwrap() / MIB
            )
        })
        .collect()
    }

    /// What validate says, whether it finds all sound or not.
    fn validate(&self) -> Value {
        let ended = self
            .site
            .run(&self.words(&["--output", "json", "checkpoint", "validate"]));
        serde_json::from_slice(&ended.stdout).unwrap()
    }

    /// The disks whose next backup must be a full one, and the word that says why.
    fn full(&self) -> Vec<String> {
        let told = self.validate();
        let each = told["fullReasons"].as_array().unwrap().iter();
        each.map(|one| {
            let word = |key: &str| one[key].as_str().unwrap();
            format!("{}: {}", word("disk"), word("reason"))
        })
        .collect()
    }

    /// The marks that are not as they should be: `checkpoint:disk=verdict`.
    fn wrong(&self) -> Vec<String> {
        let told = self.validate();
        let word = |mark: &Value, key: &str| mark[key].as_str().unwrap().to_owned();
        let marks = told["marks"].as_array().unwrap().iter();
        let wrong = marks.filter(|mark| mark["verdict"] != "ok");
        wrong
            .map(|mark| {
                format!(
                    "{}:{}={}",
                    word(mark, "checkpoint"),
                    word(mark, "disk"),
                    word(mark, "verdict")
                )
            })
            .collect()
    }
}

fn qemu_img(words: &[&str]) {
    let status = Command::new(tools::program("qemu-img"))
        .args(words)
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success(), "qemu-img {words:?}");
}

#[test]
fn a_disk_that_comes_later_begins_later_and_one_that_goes_takes_its_own_along() {
    let mut domain = Domain::new();
    for name in ["a", "b", "c"] {
        domain.make(name, "8M");
    }
    domain.start(&[("vda", "a"), ("vdb", "b")]);
    assert_eq!(domain.begin("c1"), json!([]));
    domain.delete("c1");
    domain.write("vda", 1);
    domain.write("vdb", 2);
    domain.stop();
    // Added: the others' chains go on, its own begins.
    domain.start(&[("vda", "a"), ("vdb", "b"), ("vdc", "c")]);
    assert_eq!(domain.full(), ["vdc: no-checkpoint"]);
    assert_eq!(domain.begin("c2"), json!([]));
    assert_eq!(domain.full(), [""; 0]);
    assert_eq!(domain.changes("c1"), ["vda@1", "vdb@2"]);
    let refused = domain.fails(2, &["changes", "--from", "c1", "--disk", "vdc"]);
    assert!(refused.contains("c1") && refused.contains("vdc"), "{refused}");
    domain.delete("c2");
    domain.write("vda", 3);
    domain.write("vdc", 4);
    domain.stop();
    // Removed: only what was of it is missing.
    domain.start(&[("vda", "a"), ("vdc", "c")]);
    assert_eq!(domain.begin("c3"), json!([]));
    assert_eq!(domain.changes("c1"), ["vda@1", "vda@3"]);
    assert_eq!(domain.changes("c2"), ["vda@3", "vdc@4"]);
    assert_eq!(domain.wrong(), ["c1:vdb=missing", "c2:vdb=missing"]);
    assert_eq!(domain.full(), ["vdb: disk-gone"]);
    domain.delete("c3");
    domain.json(&["checkpoint", "drop-broken"]);
    let told = domain.validate();
    assert_eq!((&told["sound"], &told["full"]), (&json!(true), &json!([])));
    assert_eq!(told["marks"].as_array().unwrap().len(), 2 + 2 + 1, "{told:#}");
    domain.write("vdc", 5);
    domain.begin("c4");
    assert_eq!(domain.changes("c2"), ["vda@3", "vdc@4", "vdc@5"]);
}

#[test]
fn a_disk_that_is_called_otherwise_begins_anew_and_the_other_goes_on() {
    let mut domain = Domain::new();
    for name in ["a", "b"] {
        domain.make(name, "8M");
    }
    domain.start(&[("vda", "a"), ("vdb", "b")]);
    domain.begin("c1");
    domain.delete("c1");
    domain.write("vda", 1);
    domain.write("vdb", 2);
    domain.stop();
    domain.start(&[("vda", "a"), ("vdc", "b")]);
    assert_eq!(domain.wrong(), ["c1:vdb=missing"]);
    assert_eq!(domain.full(), ["vdb: disk-gone", "vdc: no-checkpoint"]);
    assert_eq!(
        domain.validate()["unknown"],
        json!([{ "disk": "vdc", "name": "c1" }])
    );
    let dropped = domain.json(&["checkpoint", "drop-broken", "--unknown"]);
    assert_eq!(dropped["checkpoints"], json!([]), "{dropped:#}");
    domain.begin("c2");
    assert_eq!(domain.changes("c1"), ["vda@1"]);
    domain.fails(2, &["changes", "--from", "c1", "--disk", "vdc"]);
    domain.delete("c2");
    domain.write("vdc", 3);
    domain.begin("c3");
    assert_eq!(domain.changes("c2"), ["vdc@3"]);
    assert_eq!(domain.changes("c1"), ["vda@1"]);
    assert_eq!(domain.validate()["sound"], true);
}

/// What is beyond the former end reads as zeroes until it is written: an increment stays exact.
#[test]
fn a_disk_that_grows_keeps_its_chain() {
    let mut domain = Domain::new();
    domain.make("a", "8M");
    domain.make("b", "8M");
    domain.start(&[("vda", "a"), ("vdb", "b")]);
    domain.write("vda", 0);
    domain.begin("c1");
    let base = read(&domain, "c1", "vda");
    domain.delete("c1");
    domain.write("vda", 1);
    let resize = json!({ "node-name": domain.machine().format_node("vda"), "size": 16 * MIB });
    domain.machine().qmp("block_resize", resize);
    domain.write("vda", 12);
    domain.begin("c2");
    exact(&domain, "c2", &base);
    domain.delete("c2");
    domain.stop();
    qemu_img(&["resize", "-q", "-f", "qcow2", &arg(&domain.image("a")), "24M"]);
    domain.start(&[("vda", "a"), ("vdb", "b")]);
    domain.write("vda", 20);
    domain.write("vdb", 5);
    domain.begin("c3");
    assert_eq!(domain.changes("c2"), ["vda@20", "vdb@5"]);
    assert_eq!(domain.changes("c1"), ["vda@1", "vda@12", "vda@20", "vdb@5"]);
    exact(&domain, "c3", &base);
    assert_eq!(domain.validate()["sound"], true);
}

fn read(domain: &Domain, snapshot: &str, target: &str) -> Vec<u8> {
    let to = domain.site.path("whole.raw");
    domain
        .site
        .ok(&domain.words(&["read", snapshot, target, "--to", &arg(&to)]));
    let bytes = std::fs::read(&to).unwrap();
    std::fs::remove_file(to).unwrap();
    bytes
}

/// The full backup, as long as the disk is now, with what has changed since is the snapshot.
fn exact(domain: &Domain, snapshot: &str, base: &[u8]) {
    let now = read(domain, snapshot, "vda");
    let mut applied = base.to_vec();
    applied.resize(now.len(), 0);
    let told = domain.json(&["changes", "--from", "c1", "--to", snapshot, "--disk", "vda"]);
    for extent in told["changes"].as_array().unwrap() {
        let number = |key: &str| usize::try_from(extent[key].as_u64().unwrap()).unwrap();
        let range = number("offset")..number("offset") + number("length");
        applied[range.clone()].copy_from_slice(&now[range]);
    }
    assert!(
        applied == now,
        "{snapshot} is not the backup and what has changed: {told}"
    );
}

/// Told for a disk that the checkpoint does not cover, or while it is being told: refused, and the set is as it was.
#[test]
fn what_cannot_be_told_or_removed_is_refused_and_the_set_stays() {
    let mut domain = Domain::new();
    domain.make("a", "8M");
    domain.make("b", "8M");
    domain.start(&[("vda", "a"), ("vdb", "b")]);
    domain.json(&[
        "snapshot",
        "create",
        "--name",
        "mon",
        "--checkpoint",
        "--disk",
        "vda",
    ]);
    domain.json(&["snapshot", "create", "--name", "tue", "--checkpoint"]);
    let dump = || domain.site.ok(&domain.words(&["checkpoint", "dump"]));
    let before = dump();
    let refused = domain.fails(
        2,
        &["export", "start", "tue", "--disk", "vdb", "--checkpoint", "mon"],
    );
    assert!(
        refused.contains("checkpoint mon") && refused.contains("disk vdb"),
        "{refused}"
    );
    let refused = domain.fails(2, &["export", "start", "tue", "--checkpoint", "mon"]);
    assert!(
        refused.contains("disk vdb"),
        "one of them is told without what was asked: {refused}"
    );
    let none = json!({ "server": null, "exports": [] });
    assert_eq!(domain.json(&["export", "list"]), none);
    domain.json(&["export", "start", "tue", "--disk", "vda", "--checkpoint", "mon"]);
    let refused = domain.fails(6, &["checkpoint", "remove", "mon"]);
    assert!(
        refused.contains("is being exported") && refused.contains("checkpoint mon"),
        "{refused}"
    );
    assert_eq!(dump(), before);
    assert_eq!(domain.validate()["sound"], true);
    domain.json(&["export", "stop", "--all"]);
    domain.json(&["checkpoint", "remove", "mon"]);
}

/// What befalls one disk's bitmaps makes that disk's next backup a full one, and says why.
#[test]
fn only_the_disk_whose_bitmap_was_lost_is_full() {
    let mut domain = Domain::new();
    for name in ["a", "b", "c"] {
        domain.make(name, "8M");
    }
    let disks = [("vda", "a"), ("vdb", "b"), ("vdc", "c")];
    domain.start(&disks);
    domain.begin("c1");
    domain.delete("c1");
    let on = |target: &str| json!({ "node": domain.machine().format_node(target), "name": "c1" });
    domain.machine().qmp("block-dirty-bitmap-disable", on("vdb"));
    domain.machine().qmp("block-dirty-bitmap-remove", on("vdc"));
    assert_eq!(domain.full(), ["vdb: not-recording", "vdc: missing"]);
    domain.write("vda", 1);
    let dropped = domain.json(&["checkpoint", "drop-broken"]);
    let reasons =
        json!([{ "disk": "vdb", "reason": "not-recording" }, { "disk": "vdc", "reason": "missing" }]);
    assert_eq!(dropped["fullReasons"], reasons, "{dropped:#}");
    assert_eq!(domain.full(), ["vdb: no-checkpoint", "vdc: no-checkpoint"]);
    domain.begin("c2");
    assert_eq!(domain.changes("c1"), ["vda@1"]);
    domain.delete("c2");
    domain.stop();
    // Killed, the bitmaps of all that were open are inconsistent.
    domain.start(&disks);
    domain.machine().kill9();
    assert_eq!(
        domain.full(),
        ["vda: inconsistent", "vdb: inconsistent", "vdc: inconsistent"]
    );
}
