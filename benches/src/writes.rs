//! Part `writes`: what a fleece costs the guest that writes, each way against no fleece.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use disksnap_test_support::pattern::{Random, bytes};
use disksnap_test_support::require::lacking;
use disksnap_test_support::{DiskSpec, GuestDisk, KIB, MIB, StorageDaemon};

use crate::bare::Way;
use crate::race::{Contender, Measures, Spread, race};
use crate::report::{Table, compared};
use crate::scene::{Scene, request};

/// What QEMU copies at once when the guest first touches it.
const CLUSTER: u64 = 64 * KIB;
/// The first half of the disk is written at random, the second in sequence.
const HALF: u64 = 64 * MIB;
const ROUNDS: usize = 15;

/// What is measured, in its order, and what it is.
const WRITES: [(&str, &str); 4] = [
    ("random", "4K at random places, each the first in its 64K"),
    ("random again", "the same places again"),
    ("sequence", "64K in sequence, each the first there"),
    ("sequence again", "the same again"),
];

pub(crate) fn run(scratch: &Path) -> Result<()> {
    if let Some(why) = lacking("fuse") {
        println!("\n## Guest writes\n\nLeft out: {why}");
        return Ok(());
    }
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 2 * HALF))
        .start();
    let disk = daemon.disk("vda");
    // What is written later is there already: growing the image is not what is measured.
    disk.fill(0, 2 * HALF, 1);
    let dir = tempfile::tempdir_in(scratch)?;
    let scene = Scene::new(&daemon.domain_xml(), &dir.path().join("state"))?;
    let places = random_places();
    let turn = |way| turn(&scene, &disk, &places, way);
    let mut contenders = vec![Contender::new("none", || turn(None))];
    for way in Way::ALL {
        contenders.push(Contender::new(way.as_str(), move || turn(Some(way))));
    }
    let rounds = race(ROUNDS, contenders)?;
    let mut table = Table::new(
        "Guest writes",
        "Time of a guest's write (the median of a turn's) while its disk is fleeced, without a fleece = 1. One write \
         at a time; the guest's side is a FUSE file of a storage daemon, whose own cost is in both.",
        &["write", "filter", "best", "job", "best", "classic", "best"],
    );
    for (measure, what) in WRITES {
        let of = |way: Way| compared(&rounds, (way.as_str(), measure), ("none", measure));
        let cells: Vec<String> = Way::ALL.into_iter().flat_map(of).collect();
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        table.row(&[&[what], &cells[..]].concat());
    }
    table.print();
    Ok(())
}

/// One place of 4 KiB in each cluster of the first half, in a random order that is the same in every run.
fn random_places() -> Vec<u64> {
    let mut random = Random::new(7);
    let mut places: Vec<(u64, u64)> = (0..HALF / CLUSTER)
        .map(|n| {
            (
                random.next_u64(),
                n * CLUSTER + random.below(CLUSTER / (4 * KIB)) * 4 * KIB,
            )
        })
        .collect();
    places.sort_unstable();
    places.into_iter().map(|(_, place)| place).collect()
}

fn turn(scene: &Scene, disk: &GuestDisk, places: &[u64], way: Option<Way>) -> Result<Measures> {
    let targets = [disk.target().to_owned()];
    let snapshot = way
        .map(|way| scene.create(&request(&targets, way.as_str())))
        .transpose()?;
    let (small, large) = (bytes(1, 4 << 10), bytes(2, 64 << 10));
    let sequence: Vec<u64> = (0..HALF / CLUSTER).map(|n| HALF + n * CLUSTER).collect();
    let mut measures = Measures::new();
    for (first, again, places, data) in [
        ("random", "random again", places, &small),
        ("sequence", "sequence again", &sequence[..], &large),
    ] {
        for name in [first, again] {
            let write = |place: &u64| {
                let since = Instant::now();
                disk.write(*place, data);
                since.elapsed().as_secs_f64()
            };
            // The one in the middle: a sum would tell how often something else had the processor.
            measures.insert(name, Spread::of(places.iter().map(write).collect()).median);
        }
    }
    if let Some(snapshot) = snapshot {
        scene.delete(&snapshot.name)?;
    }
    Ok(measures)
}
