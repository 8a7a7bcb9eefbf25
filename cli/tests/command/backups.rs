//! `disksnap backup` on a real QEMU: chains that read as the guest's disks were, interrupted runs, and what makes a full one.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use disksnap_test_support::{
    DiskSpec, GuestDisk, KIB, MIB, Qemu, QemuBuilder, pattern, pattern::Random, tools,
};
use serde_json::Value;

use crate::kills::{kill_after, wait_running};
use crate::programs::program;
use crate::site::{Site, arg, ended};

/// A domain with a repository.
pub(crate) struct Night {
    pub(crate) site: Site,
    pub(crate) machine: Qemu,
    pub(crate) xml: String,
    pub(crate) repo: String,
}

impl Night {
    pub(crate) fn new(builder: QemuBuilder) -> Self {
        let (site, machine) = (Site::new(), builder.start());
        let xml = arg(&machine.domain_xml_file());
        let repo = arg(&site.path("repo"));
        Self {
            site,
            machine,
            xml,
            repo,
        }
    }

    pub(crate) fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        let verb = words[0];
        [
            &["backup", verb, "--repo", &self.repo, "-d", &self.xml],
            &words[1..],
        ]
        .concat()
    }

    pub(crate) fn json(&self, words: &[&str]) -> Value {
        self.site.json(&self.words(words))
    }

    /// The image of a disk at a point.
    pub(crate) fn image(&self, point: &Value, target: &str) -> PathBuf {
        let folders = crate::site::list(self.repo.as_ref());
        let folder = folders.iter().find(|path| path.is_dir()).unwrap();
        let point = point["point"].as_str().unwrap();
        folder.join(point).join(format!("{target}.qcow2"))
    }

    /// What QEMU reads in the image of a point.
    pub(crate) fn read(&self, point: &Value, target: &str) -> Vec<u8> {
        let image = arg(&self.image(point, target));
        let check = program("qemu-img", &["check", &image]);
        assert!(check.contains("No errors were found"), "{check}");
        let raw = self.site.path("read.raw");
        program("qemu-img", &["convert", "-O", "raw", &image, &arg(&raw)]);
        std::fs::read(raw).unwrap()
    }

    /// What the disk holds now.
    pub(crate) fn now(&self, target: &str) -> Vec<u8> {
        let raw = self.site.path("now.raw");
        self.machine.disk(target).copy_to(&raw);
        std::fs::read(raw).unwrap()
    }

    /// Nothing of a backup is left with the domain but the checkpoints that the next ones need.
    pub(crate) fn assert_tidy(&self, checkpoints: usize) {
        let snapshots = self.site.json(&["-d", &self.xml, "snapshot", "list"]);
        assert_eq!(snapshots["snapshots"], serde_json::json!([]), "{snapshots:#}");
        let known = self.site.json(&["-d", &self.xml, "checkpoint", "list"]);
        let known = known["checkpoints"].as_array().unwrap();
        assert_eq!(known.len(), checkpoints, "{known:#?}");
        assert_eq!(self.site.images(), [] as [PathBuf; 0]);
        let list = self.json(&["list"]);
        assert_eq!(
            list["domains"][0]["unfinished"],
            serde_json::json!([]),
            "{list:#}"
        );
    }

    /// Starts a backup that takes its time.
    fn slowly(&self, rate: &str) -> Child {
        self.site
            .command(&self.words(&["create", "--rate-limit", rate]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until the journal tells of a snapshot that is being pulled.
    fn wait_for_image(&self) {
        let since = Instant::now();
        let under_way = || {
            let folders = crate::site::list(self.repo.as_ref());
            let points = folders.iter().filter(|path| path.is_dir());
            let files = points.flat_map(|folder| crate::site::list(folder));
            let mut files = files.flat_map(|point| crate::site::list(&point));
            files.any(|file| arg(&file).ends_with(".qcow2.part"))
        };
        while !under_way() {
            assert!(
                since.elapsed() < Duration::from_mins(2),
                "no image is being written"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(crate) fn level(point: &Value, n: usize) -> &str {
    point["disks"][n]["level"].as_str().unwrap()
}

/// Writes bytes that no compression and no other seed makes alike.
fn put(disk: &GuestDisk, offset: u64, length: u64, seed: u64) {
    for at in (0..length).step_by(usize::try_from(MIB).unwrap()) {
        disk.write(
            offset + at,
            &pattern::bytes(seed + at, usize::try_from(MIB).unwrap()),
        );
    }
}

fn machine() -> QemuBuilder {
    Qemu::builder()
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .disk(DiskSpec::new("vdb", 8 * MIB))
}

/// Writes, zeroes and discards at random places.
fn life(night: &Night, random: &mut Random) {
    for (target, size) in [("vda", 16 * MIB), ("vdb", 8 * MIB)] {
        let disk = night.machine.disk(target);
        for _ in 0..6 {
            let length = (1 + random.below(64)) * 4 * KIB;
            let offset = random.below((size - length) / KIB) * KIB;
            match random.below(4) {
                0 => disk.zero(offset, length),
                1 => disk.discard(offset / (64 * KIB) * 64 * KIB, 64 * KIB),
                _ => disk.fill(offset, length, 1 + u8::try_from(random.below(250)).unwrap()),
            }
        }
    }
}

#[test]
fn every_point_of_a_chain_reads_as_the_disks_were() {
    let night = Night::new(machine());
    let mut random = Random::new(17);
    let mut then = Vec::new();
    for round in 0..4 {
        life(&night, &mut random);
        let disks = [night.now("vda"), night.now("vdb")];
        let more: &[&str] = if round == 2 {
            &["create", "--compress=zstd:1"]
        } else {
            &["create"]
        };
        let point = night.json(more);
        let wanted = if round == 0 { "full" } else { "incremental" };
        assert_eq!([level(&point, 0), level(&point, 1)], [wanted; 2], "{point:#}");
        assert_eq!(point["resumed"], false);
        night.assert_tidy(1);
        then.push((point, disks));
    }
    life(&night, &mut random);
    for (point, disks) in &then {
        for (target, was) in ["vda", "vdb"].iter().zip(disks) {
            assert!(
                night.read(point, target) == *was,
                "{target} at {}",
                point["point"]
            );
        }
        // The digest of the content, as anybody can compute it.
        let digests: Vec<u8> = disks[0]
            .chunks(64 << 10)
            .flat_map(|chunk| *blake3::hash(chunk).as_bytes())
            .collect();
        let content = blake3::hash(&digests).to_hex();
        assert_eq!(point["disks"][0]["content"], content.as_str());
    }
    let list = night.site.ok(&["backup", "list", "--repo", &night.repo]);
    assert_eq!(list.matches("incremental").count(), 3, "{list}");
    let shown = night.json(&["show"]);
    assert_eq!(
        shown["chains"][0]["whole"].as_array().unwrap().len(),
        4,
        "{shown:#}"
    );
    // A guest can be started from any of them as it is.
    let info = program(
        "qemu-img",
        &["info", "--backing-chain", &arg(&night.image(&then[3].0, "vda"))],
    );
    assert_eq!(info.matches("virtual size: 16 MiB").count(), 4, "{info}");
}

#[test]
fn only_the_disks_that_need_it_are_backed_up_as_a_whole() {
    let night = Night::new(machine());
    let first = night.json(&["create"]);
    assert!(
        first["disks"][0]["whyFull"]
            .as_str()
            .unwrap()
            .contains("first backup"),
        "{first:#}"
    );
    // The bitmap of a raw disk is in QEMU's memory alone.
    night.machine.quit();
    night.machine.restart();
    night.machine.disk("vda").fill(MIB, 64 * KIB, 3);
    let refused = night
        .site
        .run(&night.words(&["create", "--level", "incremental"]));
    assert_eq!(refused.code, Some(5), "{}", refused.stderr);
    assert!(
        refused.stderr.contains("no increment of the disk is possible"),
        "{}",
        refused.stderr
    );
    let second = night.json(&["create"]);
    assert_eq!(
        [level(&second, 0), level(&second, 1)],
        ["incremental", "full"],
        "{second:#}"
    );
    assert!(
        second["disks"][1]["whyFull"]
            .as_str()
            .unwrap()
            .contains("not known"),
        "{second:#}"
    );
    assert_eq!(second["disks"][0]["data"], 64 * KIB);
    night.assert_tidy(1);
    // One disk of two: the other goes on from where it was.
    night.machine.disk("vda").fill(2 * MIB, 64 * KIB, 4);
    night.machine.disk("vdb").fill(2 * MIB, 64 * KIB, 4);
    night.json(&["create", "--disk", "vda"]);
    night.assert_tidy(2);
    let fourth = night.json(&["create"]);
    assert_eq!(
        [level(&fourth, 0), level(&fourth, 1)],
        ["incremental"; 2],
        "{fourth:#}"
    );
    assert_eq!(fourth["disks"][1]["parent"], second["point"]);
    assert_eq!(fourth["disks"][0]["data"], 0);
    assert_eq!(fourth["disks"][1]["data"], 64 * KIB);
    for target in ["vda", "vdb"] {
        assert!(night.read(&fourth, target) == night.now(target));
    }
    night.assert_tidy(1);
    let full = night.json(&["create", "--level", "full"]);
    assert_eq!([level(&full, 0), level(&full, 1)], ["full"; 2]);
}

#[test]
fn a_killed_run_is_gone_on_with() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 64 * MIB).qcow2()));
    let disk = night.machine.disk("vda");
    put(&disk, 0, 48 * MIB, 5);
    night.json(&["create"]);
    put(&disk, 0, 40 * MIB, 6);
    let then = night.now("vda");
    let mut child = night.slowly("16M");
    night.wait_for_image();
    child.kill().unwrap();
    child.wait().unwrap();
    put(&disk, 0, 32 * MIB, 7);
    let list = night.json(&["list"]);
    let unfinished = list["domains"][0]["unfinished"][0].clone();
    let point = night.json(&["create"]);
    assert_eq!(point["resumed"], true, "{point:#}");
    assert_eq!(point["point"], unfinished);
    assert!(
        night.read(&point, "vda") == then,
        "the instant is that of the killed run"
    );
    night.assert_tidy(1);
    let next = night.json(&["create"]);
    assert_eq!(level(&next, 0), "incremental");
    assert!(night.read(&next, "vda") == night.now("vda"));
    night.assert_tidy(1);
}

#[test]
fn where_its_parent_was_dropped_an_interrupted_run_begins_anew() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 64 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 8 * MIB, 5);
    night.json(&["create"]);
    put(&night.machine.disk("vda"), 8 * MIB, MIB, 6);
    let second = night.json(&["create"]);
    put(&night.machine.disk("vda"), 0, 32 * MIB, 7);
    let mut child = night.slowly("8M");
    night.wait_for_image();
    child.kill().unwrap();
    child.wait().unwrap();
    let drop = ["merge", "--drop", second["point"].as_str().unwrap()];
    let refused = night.site.fails(2, &night.words(&drop));
    assert!(refused.contains("the last point of vda"), "{refused}");
    night.json(&[&drop[..], &["--even-last"]].concat());
    let point = night.json(&["create"]);
    assert_eq!(point["resumed"], false, "{point:#}");
    assert!(night.read(&point, "vda") == night.now("vda"));
    night.json(&["verify"]);
    night.assert_tidy(1);
}

#[test]
fn a_point_that_stands_alone_already_has_nothing_to_take_in() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 4 * MIB).qcow2()));
    let points: Vec<Value> = (0..3)
        .map(|n| {
            put(&night.machine.disk("vda"), n * MIB, MIB, 5);
            night.json(&["create"])
        })
        .collect();
    let last = points[2]["point"].as_str().unwrap();
    let merged = night.json(&["merge", last]);
    assert_eq!(merged["dropped"].as_array().unwrap().len(), 2, "{merged:#}");
    for words in [&["merge", last][..], &["merge", last, "--dry-run"]] {
        let told = night.site.ok(&night.words(words));
        assert_eq!(told, "there is nothing to merge: no point is before it\n");
    }
    assert!(night.read(&points[2], "vda") == night.now("vda"));
    night.json(&["verify"]);
}

#[test]
fn disks_that_changed_places_are_backed_up_as_a_whole() {
    let disks = ["vda", "vdb"].map(|target| DiskSpec::new(target, 16 * MIB).qcow2());
    let night = Night::new(disks.into_iter().fold(Qemu::builder(), QemuBuilder::disk));
    put(&night.machine.disk("vda"), 0, 8 * MIB, 5);
    put(&night.machine.disk("vdb"), 0, 8 * MIB, 6);
    night.json(&["create"]);
    let images = ["vda", "vdb"].map(|target| night.machine.image(target).to_owned());
    night.machine.quit();
    let aside = images[0].with_extension("aside");
    std::fs::rename(&images[0], &aside).unwrap();
    std::fs::rename(&images[1], &images[0]).unwrap();
    std::fs::rename(&aside, &images[1]).unwrap();
    night.machine.restart();
    // Their bitmaps have one name, and both say that nothing has changed.
    let point = night.json(&["create"]);
    assert_eq!([level(&point, 0), level(&point, 1)], ["full"; 2], "{point:#}");
    let why = point["disks"][0]["whyFull"].as_str().unwrap();
    assert!(why.contains("it is another disk"), "{why}");
    for target in ["vda", "vdb"] {
        assert!(night.read(&point, target) == night.now(target));
    }
    night.assert_tidy(1);
}

#[test]
fn what_a_chain_needs_is_looked_at_before_an_increment_is_made_over_it() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 16 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 4 * MIB, 5);
    let first = night.json(&["create"]);
    night.json(&["create"]);
    // A manifest that is lost is no reason to throw away the images that others are built on.
    let image = night.image(&first, "vda");
    let manifest = image.with_file_name("manifest.json");
    let aside = image.with_file_name("aside");
    std::fs::rename(&manifest, &aside).unwrap();
    let third = night.json(&["create"]);
    assert_eq!(level(&third, 0), "full", "{third:#}");
    assert!(image.exists());
    let found = night.site.run(&night.words(&["verify"]));
    let told = String::from_utf8(found.stdout).unwrap();
    assert_eq!(found.code, Some(11), "{told}{}", found.stderr);
    assert!(told.contains("its manifest is missing"), "{told}");
    std::fs::rename(&aside, &manifest).unwrap();
    night.json(&["verify"]);
    // Nor is an image that is lost.
    let image = night.image(&third, "vda");
    std::fs::rename(&image, image.with_file_name("aside")).unwrap();
    let fourth = night.json(&["create"]);
    assert_eq!(level(&fourth, 0), "full", "{fourth:#}");
    assert!(
        fourth["disks"][0]["whyFull"]
            .as_str()
            .unwrap()
            .contains("not whole"),
        "{fourth:#}"
    );
    assert!(night.read(&fourth, "vda") == night.now("vda"));
}

#[test]
fn a_place_where_nothing_is_mounted_does_not_become_a_repository() {
    let night = Night::new(machine());
    std::fs::create_dir(&night.repo).unwrap();
    let refused = night.site.fails(3, &night.words(&["create"]));
    assert!(refused.contains("mounted"), "{refused}");
    night.json(&["create", "--init"]);
}

#[test]
fn a_run_that_is_told_to_stop_says_how_to_go_on_and_can_be_given_up() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 64 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 48 * MIB, 5);
    let child = night.slowly("16M");
    night.wait_for_image();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let stopped = ended(child.wait_with_output().unwrap());
    assert_eq!(stopped.code, Some(130), "{}", stopped.stderr);
    assert!(
        stopped.stderr.contains("disksnap backup abandon"),
        "{}",
        stopped.stderr
    );
    let given_up = night.json(&["abandon"]);
    assert_eq!(given_up["givenUp"].as_array().unwrap().len(), 1, "{given_up:#}");
    night.assert_tidy(0);
    assert_eq!(night.json(&["abandon"])["givenUp"], serde_json::json!([]));
    assert_eq!(night.json(&["create"])["resumed"], false);
}

#[test]
fn where_the_snapshot_is_gone_the_next_run_goes_on_from_the_parent() {
    let night = Night::new(machine());
    let first = night.json(&["create"]);
    let disk = night.machine.disk("vda");
    put(&disk, 0, 8 * MIB, 6);
    let mut child = night.slowly("2M");
    night.wait_for_image();
    child.kill().unwrap();
    child.wait().unwrap();
    put(&disk, 8 * MIB, MIB, 7);
    let snapshots = night.site.json(&["-d", &night.xml, "snapshot", "list"]);
    let name = snapshots["snapshots"][0]["name"].as_str().unwrap();
    night.site.ok(&["-d", &night.xml, "snapshot", "delete", name]);
    let point = night.json(&["create"]);
    assert_eq!(point["resumed"], false);
    assert_eq!(point["disks"][0]["parent"], first["point"], "{point:#}");
    assert_eq!(point["disks"][0]["data"], 9 * MIB);
    assert!(night.read(&point, "vda") == night.now("vda"));
    night.assert_tidy(1);
}

#[test]
fn killed_at_any_moment_under_a_writer_the_chain_stays_right() {
    // A guest, and no writer at the monitor: the window stops it.
    let disks = ["vda", "vdb"].map(|target| DiskSpec::new(target, 8 * MIB));
    let [vda, vdb] = disks;
    let night = Night::new(Qemu::builder().disk(vda.qcow2()).disk(vdb).firmware_writer());
    night.machine.wait_writer(1);
    night.json(&["create"]);
    let since = Instant::now();
    night.json(&["create"]);
    let whole = since.elapsed();
    let (rounds, mut killed) = (8, 0);
    for round in 0..rounds {
        let words = night.words(&["create"]);
        killed += u32::from(kill_after(&night.site, whole * round / rounds, &words));
        wait_running(&night.machine);
        night.machine.wait_writer(1);
        // Under the writer, whatever the killed one has left; then of what stands still.
        night.json(&["create"]);
        night.machine.qmp("stop", serde_json::json!({}));
        let point = night.json(&["create"]);
        for (target, n) in [("vda", 0), ("vdb", 1)] {
            assert_eq!(level(&point, n), "incremental", "round {round}: {point:#}");
            let (read, now) = (night.read(&point, target), night.now(target));
            let differ = |at: &usize| read[*at..at + 65536] != now[*at..at + 65536];
            let differing: Vec<usize> = (0..now.len()).step_by(65536).filter(differ).collect();
            assert_eq!(differing, [] as [usize; 0], "round {round}: {target}: {point:#}");
        }
        night.assert_tidy(1);
        night.machine.qmp("cont", serde_json::json!({}));
    }
    assert!(killed >= 2, "only {killed} runs were killed");
}

#[test]
fn a_disk_that_has_grown_is_an_increment_with_all_that_is_new() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 16 * MIB + 32 * KIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 16 * MIB, 5);
    night.json(&["create"]);
    let node = night.machine.top_node("vda");
    let size = 20 * MIB + 32 * KIB;
    night.machine.qmp(
        "block_resize",
        serde_json::json!({"node-name": node, "size": size}),
    );
    night.machine.disk("vda").fill(18 * MIB, 4 * KIB, 9);
    let point = night.json(&["create"]);
    assert_eq!(level(&point, 0), "incremental", "{point:#}");
    assert_eq!(point["disks"][0]["size"], size);
    let read = night.read(&point, "vda");
    assert!(read == std::fs::read(raw_of(&night, "vda")).unwrap());
}

/// The disk as QEMU has it now, whatever its size.
fn raw_of(night: &Night, target: &str) -> PathBuf {
    let raw = night.site.path("now.raw");
    let status = Command::new(tools::program("qemu-img"))
        .args(["convert", "-U", "-O", "raw"])
        .arg(night.machine.image(target))
        .arg(&raw)
        .status()
        .unwrap();
    assert!(status.success());
    raw
}

#[test]
fn with_the_domain_off_a_qcow2_is_backed_up_in_increments() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 16 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 4 * MIB, 5);
    night.json(&["create"]);
    put(&night.machine.disk("vda"), 8 * MIB, MIB, 6);
    let then = night.now("vda");
    night.machine.quit();
    let before = std::fs::read_to_string(&night.xml).unwrap();
    let point = night.json(&["create"]);
    assert_eq!(level(&point, 0), "incremental", "{point:#}");
    assert!(night.read(&point, "vda") == then);
    night.assert_tidy(1);
    assert_eq!(
        std::fs::read_to_string(&night.xml).unwrap(),
        before,
        "the domain has its disk back"
    );
    assert_eq!(
        pattern::digest(&night.read(&point, "vda")),
        pattern::digest(&then)
    );
}

#[test]
fn what_cannot_be_is_said_and_changes_nothing() {
    let night = Night::new(machine());
    let missing = night.site.fails(3, &["backup", "list", "--repo", &night.repo]);
    assert!(missing.contains("SITE/repo"), "{missing}");
    night.json(&["create"]);
    let unknown = night.site.fails(
        3,
        &[
            "backup",
            "show",
            "--repo",
            &night.repo,
            "-d",
            &night.xml,
            "2001-01-01",
        ],
    );
    assert!(unknown.contains("2001-01-01"), "{unknown}");
    night
        .site
        .fails(3, &["backup", "show", "--repo", &night.repo, "-d", "other"]);
    night.site.fails(3, &night.words(&["create", "--disk", "vdx"]));
    night.assert_tidy(1);
    let foreign = night.site.path("full-of-other-things");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("letter"), "dear").unwrap();
    let words = [
        "backup",
        "create",
        "--repo",
        foreign.to_str().unwrap(),
        "-d",
        &night.xml,
    ];
    night.site.fails(4, &words);
    assert_eq!(crate::site::list(&foreign), [foreign.join("letter")]);
}

#[test]
fn a_hypervisor_that_dies_mid_way_leaves_what_was_there_and_the_next_backup_is_whole() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 64 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 16 * MIB, 5);
    let first = night.json(&["create"]);
    let then = night.now("vda");
    put(&night.machine.disk("vda"), 16 * MIB, 32 * MIB, 6);
    let child = night.slowly("8M");
    night.wait_for_image();
    night.machine.kill9();
    let died = ended(child.wait_with_output().unwrap());
    assert!(
        matches!(died.code, Some(8 | 11 | 1)),
        "{:?}: {}",
        died.code,
        died.stderr
    );
    assert!(died.stderr.contains("next:"), "{}", died.stderr);
    assert!(night.read(&first, "vda") == then);
    night.machine.restart();
    // A hypervisor that is killed leaves its bitmaps inconsistent.
    let next = night.json(&["create"]);
    assert_eq!(level(&next, 0), "full", "{next:#}");
    assert!(
        next["disks"][0]["whyFull"]
            .as_str()
            .unwrap()
            .contains("not known"),
        "{next:#}"
    );
    assert!(night.read(&next, "vda") == night.now("vda"));
    assert!(night.read(&first, "vda") == then);
    night.assert_tidy(1);
    put(&night.machine.disk("vda"), 0, MIB, 8);
    assert_eq!(level(&night.json(&["create"]), 0), "incremental");
    night.assert_tidy(1);
}

#[test]
fn a_checkpoint_that_only_bears_the_name_is_not_trusted() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 16 * MIB).qcow2()));
    put(&night.machine.disk("vda"), 0, 4 * MIB, 5);
    let first = night.json(&["create"]);
    let name = first["checkpoint"].as_str().unwrap();
    put(&night.machine.disk("vda"), 4 * MIB, MIB, 6);
    let own = ["-d", &night.xml];
    night
        .site
        .ok(&[&own[..], &["checkpoint", "remove", name]].concat());
    // Instants are told apart by the second.
    std::thread::sleep(Duration::from_millis(1100));
    let again = format!("--checkpoint={name}");
    night
        .site
        .ok(&[&own[..], &["snapshot", "create", "--name", "other", &again]].concat());
    night
        .site
        .ok(&[&own[..], &["snapshot", "delete", "other"]].concat());
    put(&night.machine.disk("vda"), 8 * MIB, MIB, 7);
    let second = night.json(&["create"]);
    assert_eq!(level(&second, 0), "full", "{second:#}");
    let why = second["disks"][0]["whyFull"].as_str().unwrap();
    assert!(why.contains("is another one than that which began with"), "{why}");
    assert!(night.read(&second, "vda") == night.now("vda"));
    night.json(&["verify"]);
}

#[test]
fn a_prune_says_what_holds_points_back_and_exits_so() {
    let night = Night::new(Qemu::builder().disk(DiskSpec::new("vda", 2 * MIB).qcow2()));
    let points: Vec<Value> = (0..4).map(|_| night.json(&["create", "--level=full"])).collect();
    let name = |n: usize| points[n]["point"].as_str().unwrap().to_owned();
    let torn = night.image(&points[1], "vda").with_file_name("manifest.json");
    std::fs::write(torn, "{").unwrap();
    let ended = night.site.run(&night.words(&["prune", "--keep-last", "1"]));
    assert_eq!(ended.code, Some(11), "{}", ended.stderr);
    let told = String::from_utf8(ended.stdout).unwrap();
    assert!(told.contains(&format!("dropped     {}", name(2))), "{told}");
    assert!(
        told.contains(&format!("{} may be built on it", name(1))),
        "{told}"
    );
    let hint = format!("backup merge --drop {}`", name(1));
    assert!(ended.stderr.contains(&hint), "{}", ended.stderr);
    night.json(&["merge", "--drop", &name(1)]);
    let pruned = night.json(&["prune", "--keep-last", "1"]);
    assert_eq!(pruned["dropped"], serde_json::json!([name(0)]), "{pruned:#}");
    assert_eq!(pruned["held"], serde_json::json!([]));
}
