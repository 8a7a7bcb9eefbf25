//! Random lives of disks: writes, zeroes, discards, snapshots, checkpoints, removals, overlays, merges, stops and kills, in
//! any order, while a guest writes. Every increment applied to its base is the snapshot, byte for byte.
//!
//! Some live in a storage daemon, whose disks are written like any file; the others in a QEMU, where a take may need a
//! pause. `DISKSNAP_SEQUENCES` says how many; one that fails names its seed, and `DISKSNAP_SEED` runs that alone.
#![allow(clippy::unwrap_used, reason = "tests")]

mod race;
mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use disksnap_core::{
    Access, Control, DiskSnapshotRecord, Disks, ErrorKind, JobUnit, MergeOptions, Snapshot, SnapshotRequest,
};
use disksnap_test_support::{DiskSpec, GuestDisk, KIB, MIB, Qemu, StorageDaemon, need, pattern::Random};
use race::Race;
use rig::Rig;

/// How many where nobody says otherwise.
const SEQUENCES: u64 = 500;
/// No multiple of a bitmap's granularity, nor of a cluster.
const SIZE: u64 = 2 * MIB + 72 * KIB;
const TARGETS: [&str; 2] = ["vda", "vdb"];

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// What runs the disks.
enum Machine {
    Qemu(Qemu),
    Daemon(StorageDaemon),
}

impl Machine {
    fn disk(&self, target: &str) -> GuestDisk {
        match self {
            Self::Qemu(qemu) => qemu.disk(target),
            Self::Daemon(daemon) => daemon.disk(target),
        }
    }

    fn domain_xml(&self) -> String {
        match self {
            Self::Qemu(qemu) => qemu.domain_xml(),
            Self::Daemon(daemon) => daemon.domain_xml(),
        }
    }

    fn end(&mut self, orderly: bool) {
        match (self, orderly) {
            (Self::Qemu(qemu), true) => drop(qemu.quit()),
            (Self::Qemu(qemu), false) => qemu.kill9(),
            (Self::Daemon(daemon), true) => drop(daemon.quit()),
            (Self::Daemon(daemon), false) => daemon.kill9(),
        }
    }

    fn start_again(&mut self) {
        match self {
            Self::Qemu(qemu) => qemu.restart(),
            Self::Daemon(daemon) => daemon.restart(),
        }
    }

    /// Between two writes of a guest that writes on and on: a monitor's are dear.
    fn pause(&self) -> Duration {
        Duration::from_millis(match self {
            Self::Qemu(_) => 12,
            Self::Daemon(_) => 2,
        })
    }

    /// Stopping and starting a QEMU is dear, and under a guest's file nothing can be merged.
    fn step(&self, random: &mut Random) -> Step {
        let n = random.below(40);
        match self {
            Self::Qemu(_) => match n {
                0..14 => Step::Snapshot { checkpoint: true },
                14..26 => Step::Snapshot { checkpoint: false },
                26..32 => Step::Remove,
                32..35 => Step::Overlay,
                35..39 => Step::Merge,
                _ => Step::End,
            },
            Self::Daemon(_) => match n {
                0..15 => Step::Snapshot { checkpoint: true },
                15..30 => Step::Snapshot { checkpoint: false },
                30..38 => Step::Remove,
                _ => Step::End,
            },
        }
    }
}

enum Step {
    Snapshot {
        checkpoint: bool,
    },
    Remove,
    Overlay,
    Merge,
    /// The machine's, and its beginning anew.
    End,
}

/// What was compared in all lives.
#[derive(Default)]
struct Tally {
    increments: u64,
    /// Snapshots during whose making the guest wrote.
    raced: u64,
}

/// One life: what the disks held at each checkpoint, and the snapshots that are there.
struct Life<'a> {
    machine: &'a mut Machine,
    rig: &'a mut Rig,
    random: Random,
    seed: u64,
    steps: u64,
    /// The checkpoints, oldest first, and what each disk that they can be asked for held then.
    then: Vec<(String, BTreeMap<&'static str, Vec<u8>>)>,
    /// The snapshots that the disks stand on, oldest first.
    overlays: Vec<String>,
    tally: &'a mut Tally,
}

impl Life<'_> {
    async fn live(&mut self) {
        self.snapshot(true).await;
        for _ in 0..3 {
            for _ in 0..=self.random.below(3) {
                self.write();
            }
            match self.machine.step(&mut self.random) {
                Step::Snapshot { checkpoint } => self.snapshot(checkpoint).await,
                Step::Remove => {
                    self.remove().await;
                    self.is_sound().await;
                }
                Step::Overlay => self.overlay().await,
                Step::Merge => self.merge().await,
                Step::End => self.end().await,
            }
        }
        while !self.overlays.is_empty() {
            self.merge().await;
        }
        while !self.then.is_empty() {
            self.remove().await;
        }
        assert_eq!(
            self.rig.bitmaps().await,
            Vec::<String>::new(),
            "seed {}",
            self.seed
        );
    }

    fn target(&mut self) -> &'static str {
        TARGETS[usize::try_from(self.random.below(2)).unwrap()]
    }

    fn write(&mut self) {
        let target = self.target();
        let disk = self.machine.disk(target);
        let offset = self.random.below(SIZE / 512) * 512;
        let length = (1 + self.random.below(400)) * 512;
        let length = length.min(SIZE - offset);
        match self.random.below(4) {
            0 => disk.zero(offset, length),
            // Where no whole cluster is in it there may be nothing to discard.
            1 => drop(disk.try_discard(offset, length)),
            _ => disk.fill(offset, length, 1 + u8::try_from(self.random.below(255)).unwrap()),
        }
    }

    fn next_name(&mut self) -> String {
        self.steps += 1;
        format!("s{}-{}", self.seed, self.steps)
    }

    async fn snapshot(&mut self, checkpoint: bool) {
        let name = self.next_name();
        let mut request = rig::request(&name, &TARGETS, checkpoint);
        // The filter needs a pause, and so a guardian: dearer than the others, and not more often than they. A monitor's
        // writes, unlike a guest's, go on in a pause: nobody races it.
        let way = ["job", "classic", "job", "filter"][usize::try_from(self.random.below(4)).unwrap()];
        let way = match self.machine {
            // There is no guest that could be paused.
            Machine::Daemon(_) if way == "filter" => "classic",
            _ => way,
        };
        if let Disks::Named(disks) = &mut request.disks {
            for disk in disks {
                disk.options.push("fleece.way", way);
            }
        }
        self.create_and_compare(&request, &name, way != "filter").await;
        self.rig.delete(&name).await;
    }

    /// A snapshot that the disks stand on from then on.
    async fn overlay(&mut self) {
        if self.overlays.len() == 2 {
            return;
        }
        let (name, checkpoint) = (self.next_name(), self.random.below(2) == 0);
        let request = rig::by("qemu-external-qcow2", rig::request(&name, &TARGETS, checkpoint));
        self.create_and_compare(&request, &name, true).await;
        self.overlays.push(name);
    }

    async fn create_and_compare(&mut self, request: &SnapshotRequest, name: &str, races: bool) {
        let (seed, disks) = (
            self.random.next_u64(),
            TARGETS.map(|target| self.machine.disk(target)),
        );
        let race = races.then(|| Race::start(disks, SIZE, self.machine.pause(), seed));
        let created = self.rig.dispatcher.create(&self.rig.domain, request).await;
        let raced = race.map(Race::stop);
        let snapshot = created.unwrap_or_else(|error| panic!("seed {}: {name}: {error}", self.seed));
        self.rig.follow(&snapshot);
        // What is written from here on is none of the snapshot's.
        self.write();
        let now = self.compare(&snapshot, name).await;
        if let Some(raced) = raced {
            raced.check(&now, &format!("seed {}: {name}", self.seed));
            self.tally.raced += u64::from(raced.while_it_was_made > 0);
        }
        if request.checkpoint.is_some() {
            self.then.push((name.to_owned(), now));
        }
    }

    /// The disks in a snapshot, after comparing them with what they were and what has changed.
    async fn compare(&mut self, snapshot: &Snapshot, name: &str) -> BTreeMap<&'static str, Vec<u8>> {
        let mut since = BTreeMap::new();
        for target in TARGETS {
            since.insert(target, self.some_checkpoint(target));
        }
        let mut told = self.rig.tell(snapshot, &since).await;
        let is_image = |disk: &DiskSnapshotRecord| matches!(disk.access, Access::Source { .. });
        if told
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::Broken)
            && snapshot.disk("vdb").is_some_and(is_image)
        {
            // A raw image keeps none of the bitmaps that the hypervisor had for it.
            since.insert("vdb", None);
            told = self.rig.tell(snapshot, &since).await;
        }
        let told = told.unwrap_or_else(|error| panic!("seed {}: {name}: {error}", self.seed));
        for (target, told) in &told {
            let Some(since) = &since[target] else { continue };
            let held = self.then.iter().find(|(name, _)| name == since);
            let before = held.unwrap().1[target].clone();
            assert!(
                told.applied(before) == told.content,
                "seed {}: {target} in {name} since {since}",
                self.seed
            );
            self.tally.increments += 1;
        }
        told.into_iter()
            .map(|(target, told)| (target, told.content))
            .collect()
    }

    /// The first of those that can be asked for a disk, or any other: each holds what those after it know.
    fn some_checkpoint(&mut self, target: &str) -> Option<String> {
        let known = self.then.iter().filter(|(_, held)| held.contains_key(target));
        let known: Vec<&String> = known.map(|(name, _)| name).collect();
        let n = self.random.below(2 * known.len().max(1) as u64);
        let n = usize::try_from(n).unwrap();
        known.get(n).or(known.first()).map(|name| (*name).clone())
    }

    async fn remove(&mut self) {
        if self.then.is_empty() {
            return;
        }
        let n = self.random.below(u64::try_from(self.then.len()).unwrap());
        let (name, _) = self.then.remove(usize::try_from(n).unwrap());
        let name = rig::checkpoint(&name);
        let removed = self
            .rig
            .dispatcher
            .remove_checkpoint(&self.rig.domain, &name)
            .await;
        removed.unwrap_or_else(|error| panic!("seed {}: removal of {name}: {error}", self.seed));
    }

    async fn is_sound(&self) {
        let validation = self.rig.dispatcher.validate(&self.rig.domain).await.unwrap();
        assert!(validation.is_sound(), "seed {}: {validation:?}", self.seed);
    }

    async fn merge(&mut self) {
        if self.overlays.is_empty() {
            return;
        }
        let n = self.random.below(u64::try_from(self.overlays.len()).unwrap());
        let name = self.overlays.remove(usize::try_from(n).unwrap());
        let mut on = |_: &[JobUnit]| std::ops::ControlFlow::Continue(());
        let (name, options) = (rig::name_of(&name), MergeOptions::default());
        let merged = self
            .rig
            .dispatcher
            .merge(&self.rig.domain, &name, &options, &mut on)
            .await;
        let altered = merged.unwrap_or_else(|error| panic!("seed {}: merge of {name}: {error}", self.seed));
        self.rig.stand_on(&altered.disks);
        self.is_sound().await;
    }

    /// The machine stops or is killed, and what was lost with it is dropped, and nothing else.
    async fn end(&mut self) {
        // It starts again from what it was started from.
        while !self.overlays.is_empty() {
            self.merge().await;
        }
        let orderly = self.random.below(3) > 0;
        self.machine.end(orderly);
        for (_, held) in &mut self.then {
            held.retain(|target, _| orderly && *target == "vda");
        }
        self.then.retain(|(_, held)| !held.is_empty());
        if orderly && self.random.below(2) == 0 {
            self.drop_broken().await;
            self.remove().await;
            self.machine.start_again();
            self.is_sound().await;
        } else {
            self.machine.start_again();
            self.drop_broken().await;
        }
    }

    async fn drop_broken(&self) {
        let dropped = self.rig.dispatcher.drop_broken(&self.rig.domain, false).await;
        dropped.unwrap();
        self.is_sound().await;
        let left = self.rig.dispatcher.checkpoints(&self.rig.domain).await.unwrap();
        let mut left: Vec<&str> = left.checkpoints().iter().map(|c| c.name.as_str()).collect();
        let mut known: Vec<&str> = self.then.iter().map(|(name, _)| name.as_str()).collect();
        left.sort_unstable();
        known.sort_unstable();
        assert_eq!(left, known, "seed {}", self.seed);
    }
}

/// The seeds of one of the four tests, which run side by side. A QEMU's are the dearer ones, and fewer.
fn seeds(of_ten: &[u64]) -> Vec<u64> {
    let count = number("DISKSNAP_SEQUENCES").unwrap_or(SEQUENCES);
    let all: Vec<u64> = match number("DISKSNAP_SEED") {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    };
    all.into_iter()
        .filter(|seed| of_ten.contains(&(seed % 10)))
        .collect()
}

async fn lives(seeds: &[u64], mut machine: Machine) -> Tally {
    let mut rig = Rig::new(&machine.domain_xml()).await;
    // One connection for all of them, and one look at what the hypervisor can do.
    let held: Arc<dyn Control> = rig.control();
    let mut tally = Tally::default();
    for seed in seeds {
        let mut life = Life {
            machine: &mut machine,
            rig: &mut rig,
            random: Random::new(*seed),
            seed: *seed,
            steps: 0,
            then: Vec::new(),
            overlays: Vec::new(),
            tally: &mut tally,
        };
        life.live().await;
    }
    drop(held);
    tally
}

fn disks() -> [DiskSpec; 2] {
    [DiskSpec::new("vda", SIZE).qcow2(), DiskSpec::new("vdb", SIZE)]
}

/// That the lives were as told above.
fn was_lived(tally: &Tally, count: usize) {
    let count = count as u64;
    assert!(
        tally.increments >= count,
        "{} increments were compared in {count} lives",
        tally.increments
    );
    // A guest is only a thread: now and then it may be late.
    assert!(
        count == 1 || tally.raced >= count / 2,
        "it wrote during {} takes in {count} lives",
        tally.raced
    );
}

async fn in_a_storage_daemon(of_ten: &[u64]) {
    let seeds = seeds(of_ten);
    if seeds.is_empty() {
        return;
    }
    let [vda, vdb] = disks();
    let daemon = StorageDaemon::builder().disk(vda).disk(vdb).start();
    let tally = lives(&seeds, Machine::Daemon(daemon)).await;
    was_lived(&tally, seeds.len());
}

async fn in_qemu(of_ten: &[u64]) {
    let seeds = seeds(of_ten);
    if seeds.is_empty() {
        return;
    }
    let [vda, vdb] = disks();
    let qemu = Qemu::builder().disk(vda).disk(vdb).start();
    let tally = lives(&seeds, Machine::Qemu(qemu)).await;
    was_lived(&tally, seeds.len());
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot() {
    need!("fuse");
    in_a_storage_daemon(&[0, 1, 2, 3]).await;
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot_too() {
    need!("fuse");
    in_a_storage_daemon(&[4, 5, 6, 7]).await;
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot_in_qemu() {
    in_qemu(&[8]).await;
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot_in_qemu_too() {
    in_qemu(&[9]).await;
}
