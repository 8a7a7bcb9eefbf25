//! The command, killed while it begins, removes, drops or redefines checkpoints: what is there afterwards is whole, and every
//! increment is exact.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuBuilder, pattern::Random};
use serde_json::{Value, json};

use crate::kills::{kill_after, wait_running};
use crate::site::{Site, arg};
use crate::strike::{Strike, When};

const TARGETS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 8 * MIB;
/// How often each act is killed at a random moment, besides at each of the monitor's commands.
const TIMES: usize = 8;
/// What a bit of a bitmap stands for.
const PIECE: u64 = 64 * KIB;

/// A checkpoint of one disk, and what the test knows of it.
struct Known {
    name: String,
    target: &'static str,
    /// The disk's content at the instant.
    then: Vec<u8>,
    /// The pieces that were written since.
    written: BTreeSet<u64>,
}

impl Known {
    /// The disk as it was, with these pieces as they are now.
    fn applied(&self, now: &[u8], pieces: &BTreeSet<u64>) -> Vec<u8> {
        let mut base = self.then.clone();
        for piece in pieces {
            let at = usize::try_from(piece * PIECE).unwrap();
            let range = at..at + usize::try_from(PIECE).unwrap();
            base[range.clone()].copy_from_slice(&now[range]);
        }
        base
    }
}

/// A machine whose checkpoints and writes the test knows.
struct Scene {
    site: Site,
    qemu: Qemu,
    strike: Strike,
    xml: String,
    random: Random,
    known: Vec<Known>,
    count: usize,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let (site, qemu) = (Site::new(), machine());
        let strike = Strike::before(&qemu.qmp_path(), site.path("strike.sock"));
        let (monitor, before) = (arg(&qemu.qmp_path()), arg(&strike.socket));
        let xml = site.file("domain.xml", &qemu.domain_xml().replace(&monitor, &before));
        let mut scene = Self {
            site,
            qemu,
            strike,
            xml,
            random: Random::new(seed),
            known: Vec::new(),
            count: 0,
        };
        scene.next();
        scene
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        [&["-d", &self.xml][..], words].concat()
    }

    fn ok(&self, words: &[&str]) {
        self.site.ok(&self.words(words));
    }

    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&self.words(words))
    }

    fn command(&self, words: &[&str]) -> Command {
        self.site.command(&self.words(words))
    }

    /// The guest writes to both disks, and zeroes.
    fn write(&mut self) {
        for target in TARGETS {
            for zeroes in [false, false, true] {
                let piece = self.random.below(SIZE / PIECE);
                let at = piece * PIECE + self.random.below(15) * 4 * KIB;
                let byte = u8::try_from(1 + self.random.below(255)).unwrap();
                let byte = if zeroes { 0 } else { byte };
                self.qemu.disk(target).fill(at, 4 * KIB, byte);
                let known = self.known.iter_mut().filter(|known| known.target == target);
                for known in known {
                    known.written.insert(piece);
                }
            }
        }
    }

    fn read(&self, snapshot: &str, target: &str) -> Vec<u8> {
        let to = self.site.path("whole.raw");
        self.ok(&["read", snapshot, target, "--to", &arg(&to)]);
        let bytes = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        bytes
    }

    /// The pieces that the command says have changed.
    fn changed(&self, snapshot: &str, target: &str, since: &str) -> BTreeSet<u64> {
        let told = self.json(&["changes", "--from", since, "--to", snapshot, "--disk", target]);
        let pieces = |extent: &Value| {
            let (offset, length) = (
                extent["offset"].as_u64().unwrap(),
                extent["length"].as_u64().unwrap(),
            );
            assert_eq!((offset % PIECE, length % PIECE), (0, 0));
            offset / PIECE..(offset + length) / PIECE
        };
        told["changes"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(pieces)
            .collect()
    }

    fn begins(&mut self, name: &str, target: &'static str, then: Vec<u8>) {
        self.known.push(Known {
            name: name.to_owned(),
            target,
            then,
            written: BTreeSet::new(),
        });
    }

    fn forget(&mut self, name: &str) {
        self.known.retain(|known| known.name != name);
    }

    /// A checkpoint begins; increments since the first and the last of each disk are as they should be.
    fn next(&mut self) {
        self.count += 1;
        let name = format!("c{}", self.count);
        self.ok(&["snapshot", "create", "--name", &name, "--checkpoint"]);
        for target in TARGETS {
            let now = self.read(&name, target);
            let mut its = self.known.iter().filter(|known| known.target == target);
            let ends = [its.next(), its.next_back()];
            for known in ends.into_iter().flatten() {
                let told = self.changed(&name, target, &known.name);
                assert_eq!(told, known.written, "{target} since {}", known.name);
                assert!(
                    known.applied(&now, &told) == now,
                    "{target}: what changed since {} is not all",
                    known.name
                );
            }
            self.begins(&name, target, now);
        }
        self.ok(&["snapshot", "delete", &name]);
    }

    fn names(&self, what: &str, list: &str) -> Vec<String> {
        let listed = self.json(&[what, "list"]);
        let each = listed[list].as_array().unwrap().iter();
        each.map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    }

    /// What there is of bitmaps in QEMU: the disk, the name, and `*` where it records.
    fn bitmaps(&self) -> Vec<String> {
        let nodes = self.qemu.qmp("query-named-block-nodes", json!({ "flat": true }));
        let mut found = Vec::new();
        for node in nodes.as_array().unwrap() {
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let star = if bitmap["recording"] == true { "*" } else { "" };
                let name = bitmap["name"].as_str().unwrap_or("-");
                found.push(format!("{}:{name}{star}", node["node-name"].as_str().unwrap()));
            }
        }
        found.sort();
        found
    }

    /// Nothing is there but the bitmaps of the checkpoints, the last of each disk recording, and they are sound.
    fn is_tidy(&self, at: &str) {
        let mut expected = Vec::new();
        for target in TARGETS {
            let its: Vec<_> = self.known.iter().filter(|known| known.target == target).collect();
            for (n, known) in its.iter().enumerate() {
                let star = if n + 1 == its.len() { "*" } else { "" };
                expected.push(format!("{}:{}{star}", self.qemu.format_node(target), known.name));
            }
        }
        expected.sort();
        assert_eq!(self.bitmaps(), expected, "{at}");
        let validation = self.json(&["checkpoint", "validate"]);
        assert_eq!(validation["sound"], true, "{at}: {validation:#}");
        assert_eq!(self.site.images(), Vec::<std::path::PathBuf>::new(), "{at}");
        assert_eq!(self.qemu.qmp("query-jobs", json!({})), json!([]), "{at}");
    }

    /// After a kill: every second time `recover`, else whatever comes next settles what was left.
    fn settle(&mut self, round: usize) {
        wait_running(&self.qemu);
        self.write();
        if round.is_multiple_of(2) {
            self.site.ok(&["recover"]);
        }
        // An act on the domain, which changes nothing of its own.
        self.json(&["checkpoint", "drop-broken"]);
    }
}

impl Scene {
    /// Stops the bitmap that records on a disk, behind the command's back; how many marks that disk has.
    fn stop_recording(&self, target: &str) -> usize {
        let mut its = self.known.iter().filter(|known| known.target == target);
        let (before, last) = (its.clone().count(), its.next_back().unwrap());
        let bitmap = json!({ "node": self.qemu.format_node(target), "name": last.name });
        self.qemu.qmp("block-dirty-bitmap-disable", bitmap);
        before
    }

    /// How many marks the records have of a disk.
    fn marks(&self, target: &str) -> usize {
        let validate = ["--output", "json", "checkpoint", "validate"];
        let ended = self.site.run(&self.words(&validate));
        let told: Value = serde_json::from_slice(&ended.stdout).unwrap();
        let marks = told["marks"].as_array().unwrap().iter();
        marks.filter(|mark| mark["disk"] == target).count()
    }
}

/// One disk that keeps its bitmaps, and one that does not.
fn machine() -> Qemu {
    let disks = [
        DiskSpec::new(TARGETS[0], SIZE).qcow2(),
        DiskSpec::new(TARGETS[1], SIZE),
    ];
    disks.into_iter().fold(Qemu::builder(), QemuBuilder::disk).start()
}

/// Where a command is killed.
#[derive(Debug, Clone, Copy)]
enum Where {
    /// At the n-th of the monitor's commands that change something.
    Monitor(usize, When),
    /// So long after it began.
    After(Duration),
}

/// Runs rounds with a kill at each of the monitor's commands, before and after it, and then so many that are killed at
/// random moments. A round tells whether its command was killed at work.
fn everywhere(took: Duration, times: usize, mut round: impl FnMut(Where, usize) -> bool) {
    let (mut n, mut rounds) = (0, 0);
    'strikes: loop {
        for when in [When::Before, When::After] {
            rounds += 1;
            if !round(Where::Monitor(n, when), rounds) {
                break 'strikes;
            }
        }
        n += 1;
    }
    assert!(
        n > 0,
        "no command of the monitor was struck at: the test proves little"
    );
    let mut moments = Moments::new(took, times);
    while let Some(delay) = moments.next() {
        rounds += 1;
        moments.was(round(Where::After(delay), rounds));
    }
}

/// Random moments of an act, until it was killed at work so often. One that came too late tells that the act takes less time.
struct Moments {
    random: Random,
    took: Duration,
    left: usize,
}

impl Moments {
    fn new(took: Duration, times: usize) -> Self {
        Self {
            random: Random::new(6),
            took,
            left: times,
        }
    }

    fn next(&mut self) -> Option<Duration> {
        let part = u32::try_from(self.random.below(100)).unwrap();
        (self.left > 0).then(|| self.took * part / 100)
    }

    fn was(&mut self, killed_at_work: bool) {
        if killed_at_work {
            self.left -= 1;
        } else {
            self.took = self.took * 9 / 10;
        }
    }
}

fn time_of(act: impl FnOnce()) -> Duration {
    let since = Instant::now();
    act();
    since.elapsed()
}

impl Scene {
    /// Runs a command and kills it there; whether it was killed at work.
    fn strike(&self, words: &[&str], at: Where) -> bool {
        match at {
            Where::Monitor(n, when) => self.strike.run(self.command(words), n, when).is_some(),
            Where::After(delay) => kill_after(&self.site, delay, &self.words(words)),
        }
    }
}

#[test]
fn a_create_with_a_checkpoint_is_there_with_it_or_neither_is() {
    let mut scene = Scene::new(1);
    let create = ["snapshot", "create", "--name", "new", "--checkpoint"];
    let took = time_of(|| scene.ok(&create));
    let remove = |scene: &mut Scene| {
        scene.ok(&["snapshot", "delete", "new"]);
        scene.ok(&["checkpoint", "remove", "new"]);
        scene.forget("new");
    };
    remove(&mut scene);
    everywhere(took, TIMES, |at, round| {
        let told = format!("{at:?}");
        scene.write();
        // Where it has begun, this is what was written since.
        for target in TARGETS {
            scene.begins("new", target, Vec::new());
        }
        let killed = scene.strike(&create, at);
        scene.settle(round);
        let there = scene.names("snapshot", "snapshots") == ["new"];
        let begun = scene
            .names("checkpoint", "checkpoints")
            .contains(&"new".to_owned());
        assert_eq!(
            there, begun,
            "{told}: a snapshot without its checkpoint, or the other way round"
        );
        if there {
            for n in scene.known.len() - TARGETS.len()..scene.known.len() {
                scene.known[n].then = scene.read("new", scene.known[n].target);
            }
        } else {
            scene.forget("new");
            scene.is_tidy(&told);
        }
        scene.next();
        if there {
            remove(&mut scene);
        }
        scene.is_tidy(&told);
        killed
    });
}

#[test]
fn a_removal_killed_at_any_step_loses_no_block() {
    let mut scene = Scene::new(2);
    for _ in 0..3 {
        scene.write();
        scene.next();
    }
    let took = time_of(|| scene.ok(&["checkpoint", "remove", "c2"]));
    scene.forget("c2");
    everywhere(took, TIMES, |at, round| {
        let told = format!("{at:?}");
        scene.write();
        // The last one, which records, and one in the middle.
        let names = scene.names("checkpoint", "checkpoints");
        let last = if round % 4 < 2 { 1 } else { 2 };
        let gone = names[names.len() - last].clone();
        let remove = ["checkpoint", "remove", &gone];
        let killed = scene.strike(&remove, at);
        scene.settle(round);
        if !scene.names("checkpoint", "checkpoints").contains(&gone) {
            scene.forget(&gone);
        }
        scene.is_tidy(&told);
        scene.next();
        let again = scene.site.run(&scene.words(&remove));
        assert!(
            [Some(0), Some(3)].contains(&again.code),
            "{told}: {}",
            again.stderr
        );
        scene.forget(&gone);
        scene.is_tidy(&told);
        killed
    });
}

#[test]
fn what_is_dropped_when_killed_is_dropped_whole_or_as_it_was() {
    let mut scene = Scene::new(3);
    let drop_broken = ["checkpoint", "drop-broken"];
    scene.stop_recording("vda");
    let took = time_of(|| scene.ok(&drop_broken));
    scene.known.retain(|known| known.target != "vda");
    scene.next();
    everywhere(took, TIMES, |at, round| {
        let told = format!("{at:?}");
        scene.write();
        scene.next();
        let marks = scene.stop_recording("vda");
        let killed = scene.strike(&drop_broken, at);
        wait_running(&scene.qemu);
        scene.write();
        if round % 2 == 0 {
            scene.site.ok(&["recover"]);
        }
        let left = scene.marks("vda");
        assert!(left == 0 || left == marks, "{told}: {left} of {marks} are left");
        scene.ok(&drop_broken);
        scene.known.retain(|known| known.target != "vda");
        scene.is_tidy(&told);
        killed
    });
    scene.next();
}

/// A set of so many checkpoints of four disks, and what tells it from another.
fn set(count: usize, word: &str) -> Value {
    let one = |n: usize| {
        let disks = ["vda", "vdb", "vdc", "vdd"]
            .map(|target| json!({ "target": target, "bitmap": format!("{word}{n}") }));
        let mut one =
            json!({ "name": format!("{word}{n}"), "created": "2026-11-22T04:00:00Z", "disks": disks });
        if n > 0 {
            one["parent"] = format!("{word}{}", n - 1).into();
        }
        one
    };
    json!({ "checkpoints": (0..count).map(one).collect::<Vec<_>>() })
}

#[test]
fn a_large_set_is_defined_whole_or_not_at_all() {
    let site = Site::new();
    let disk = |target: &str| {
        format!(
            "<disk type='file'><driver type='qcow2'/><source file='/srv/{target}.qcow2'/><target dev='{target}'/></disk>"
        )
    };
    let disks = ["vda", "vdb", "vdc", "vdd"].map(disk).concat();
    let text = format!("<domain type='kvm'><name>web1</name><devices>{disks}</devices></domain>");
    let xml = site.file("web1.xml", &text);
    let sets = [("a", 2000), ("b", 1500)].map(|(word, count)| {
        let text = set(count, word).to_string();
        site.file(&format!("{word}.json"), &text)
    });
    let redefine = |file: &str| site.ok(&["checkpoint", "redefine", "-d", &xml, file, "--replace"]);
    let dump = || site.ok(&["checkpoint", "dump", "-d", &xml, "--format", "json"]);
    let mut whole = Duration::ZERO;
    let whole_sets = [1, 0].map(|n| {
        let since = Instant::now();
        redefine(&sets[n]);
        whole = whole.max(since.elapsed());
        dump()
    });
    let (mut now, mut moments) = (1, Moments::new(whole, 20));
    while let Some(delay) = moments.next() {
        let words = ["checkpoint", "redefine", "-d", &xml, &sets[now], "--replace"];
        // In `whole_sets` they stand the other way round.
        let (old, new) = (&whole_sets[now], &whole_sets[1 - now]);
        moments.was(kill_after(&site, delay, &words));
        let found = dump();
        assert!(
            found == *old || found == *new,
            "half a set is defined after {delay:?}"
        );
        if found == *new {
            now = 1 - now;
        }
    }
    redefine(&sets[now]);
    assert_eq!(dump(), whole_sets[1 - now]);
}
