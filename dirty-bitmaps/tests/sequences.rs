//! Random lives of disks: writes, zeroes, discards, snapshots, checkpoints, removals, in any order. Every increment applied
//! to its base is the snapshot, byte for byte.
//!
//! `DISKSNAP_SEQUENCES` says how many; the first that fails names its seed, and `DISKSNAP_SEED` runs that one again.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use std::collections::BTreeMap;

use disksnap_core::Disks;
use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, pattern::Random};
use rig::Rig;

/// How many where nobody says otherwise.
const SEQUENCES: u64 = 200;
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

/// One life: what the disks held at each checkpoint, and the snapshots that are there.
struct Life<'a> {
    qemu: &'a Qemu,
    rig: &'a Rig,
    random: Random,
    seed: u64,
    steps: u64,
    /// The checkpoints, oldest first, and what each disk held then.
    then: Vec<(String, BTreeMap<&'static str, Vec<u8>>)>,
    told: u64,
}

impl Life<'_> {
    async fn live(&mut self) {
        self.snapshot(true).await;
        for _ in 0..4 {
            for _ in 0..=self.random.below(3) {
                self.write();
            }
            match self.random.below(5) {
                0 | 1 => self.snapshot(true).await,
                2 | 3 => self.snapshot(false).await,
                _ => self.remove().await,
            }
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

    fn write(&mut self) {
        let disk = self
            .qemu
            .disk(TARGETS[usize::try_from(self.random.below(2)).unwrap()]);
        let offset = self.random.below(SIZE / 512) * 512;
        let length = (1 + self.random.below(400)) * 512;
        let length = length.min(SIZE - offset);
        match self.random.below(4) {
            0 => disk.zero(offset, length),
            1 => disk.discard(offset, length),
            _ => disk.fill(offset, length, 1 + u8::try_from(self.random.below(255)).unwrap()),
        }
    }

    async fn snapshot(&mut self, checkpoint: bool) {
        self.steps += 1;
        let name = format!("s{}-{}", self.seed, self.steps);
        let mut request = rig::request(&name, &TARGETS, checkpoint);
        // The filter needs a pause, and so a guardian: dearer than the others, and not more often than they.
        let way = ["job", "classic", "job", "filter"][usize::try_from(self.random.below(4)).unwrap()];
        if let Disks::Named(disks) = &mut request.disks {
            for disk in disks {
                disk.options.push("fleece.way", way);
            }
        }
        let created = self.rig.dispatcher.create(&self.rig.domain, &request).await;
        created.unwrap();
        // What is written from here on is none of the snapshot's.
        self.write();
        let told = TARGETS[usize::try_from(self.random.below(2)).unwrap()];
        let mut now = BTreeMap::new();
        for target in TARGETS {
            if target == told || checkpoint {
                now.insert(target, self.rig.read(&name, target).await);
            }
        }
        // The first, and any other: each holds what those after it know.
        let other = self.random.below(self.then.len().max(1) as u64);
        for (n, (since, held)) in self.then.iter().enumerate() {
            if n > 0 && n as u64 != other {
                continue;
            }
            let changed = self.rig.changed(&name, told, since).await.unwrap();
            let mut base = held[told].clone();
            for (range, data) in &changed {
                let start = usize::try_from(range.start).unwrap();
                base[start..start + data.len()].copy_from_slice(data);
            }
            assert!(
                base == now[told],
                "seed {}: {told} in {name} since {since}",
                self.seed
            );
            self.told += 1;
        }
        if checkpoint {
            self.then.push((name.clone(), now));
        }
        self.rig.delete(&name).await;
    }

    async fn remove(&mut self) {
        if self.then.is_empty() {
            return;
        }
        let n = self.random.below(u64::try_from(self.then.len()).unwrap());
        let (name, _) = self.then.remove(usize::try_from(n).unwrap());
        let name = rig::checkpoint(&name);
        self.rig
            .dispatcher
            .remove_checkpoint(&self.rig.domain, &name)
            .await
            .unwrap();
        let validation = self.rig.dispatcher.validate(&self.rig.domain).await.unwrap();
        assert!(validation.is_sound(), "seed {}: {validation:?}", self.seed);
    }
}

/// The seeds of one of the two halves: they run side by side, each in a QEMU of its own.
fn seeds(half: u64) -> Vec<u64> {
    let count = number("DISKSNAP_SEQUENCES").unwrap_or(SEQUENCES);
    let all: Vec<u64> = match number("DISKSNAP_SEED") {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    };
    all.into_iter().filter(|seed| seed % 2 == half).collect()
}

async fn lives(half: u64) {
    let seeds = seeds(half);
    if seeds.is_empty() {
        return;
    }
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .start();
    let rig = Rig::new(&qemu.domain_xml()).await;
    let (count, mut told) = (seeds.len() as u64, 0);
    for seed in seeds {
        let mut life = Life {
            qemu: &qemu,
            rig: &rig,
            random: Random::new(seed),
            seed,
            steps: 0,
            then: Vec::new(),
            told: 0,
        };
        life.live().await;
        told += life.told;
    }
    assert!(
        told >= count,
        "{told} increments were compared in {count} sequences"
    );
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot() {
    lives(0).await;
}

#[tokio::test]
async fn every_increment_applied_to_its_base_is_the_snapshot_too() {
    lives(1).await;
}
