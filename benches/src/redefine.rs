//! Part `redefine`: a set of checkpoints made known in one call, against one call for each; how it grows, and its memory.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use disksnap_checkpoint_set::json;
use disksnap_core::{Checkpoint, CheckpointDisk, Mark, Redefine};

use crate::child::{self, memory_of};
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, compared, ratio};
use crate::scene::{Scene, targets};

const DISKS: usize = 4;
/// How many checkpoints, and how many rounds.
const SETS: [(usize, usize); 2] = [(100, 5), (1000, 1)];
/// How many checkpoints of how many disks, the first being what the others are told against.
const GROWTH: [(usize, usize); 4] = [(1000, 4), (10_000, 4), (1000, 16), (10_000, 16)];
const GROWTH_ROUNDS: usize = 5;

pub(crate) fn run(scratch: &Path) -> Result<()> {
    one_call(scratch)?;
    growth(scratch)
}

fn one_call(scratch: &Path) -> Result<()> {
    let explained = "A set of checkpoints of 4 disks, with none known before: one call that has them all, and a call for each that has \
        it and those before it, since a call has all that is known. One connected program; each call is durable. One call = 1.";
    let mut table = Table::new("Redefine", explained, &["checkpoints", "a call for each", "best"]);
    for (count, rounds) in SETS {
        let rounds = calls(scratch, count, rounds)?;
        let [to, best] = compared(&rounds, ("each", "time"), ("one", "time"));
        table.row(&[&count.to_string(), &to, &best]);
    }
    table.print();
    Ok(())
}

fn calls(scratch: &Path, count: usize, rounds: usize) -> Result<Rounds> {
    let (dir, all) = (tempfile::tempdir_in(scratch)?, set(count, DISKS)?);
    let scene = Scene::new(&domain(DISKS), &dir.path().join("state"))?;
    let call = |checkpoints: &[Checkpoint]| {
        let redefined = scene
            .dispatcher
            .redefine(&scene.domain, checkpoints.to_vec(), Redefine::default());
        scene.runtime.block_on(redefined).map(drop)
    };
    let turn = |each: bool| {
        let since = Instant::now();
        if each {
            for known in 1..=count {
                call(&all[..known])?;
            }
        } else {
            call(&all)?;
        }
        let took = since.elapsed().as_secs_f64();
        let forgotten = scene.dispatcher.forget_checkpoints(&scene.domain);
        scene.runtime.block_on(forgotten)?;
        Ok(Measures::from([("time", took)]))
    };
    race(
        rounds,
        vec![
            Contender::new("one", || turn(false)),
            Contender::new("each", || turn(true)),
        ],
    )
}

fn growth(scratch: &Path) -> Result<()> {
    let dir = tempfile::tempdir_in(scratch)?;
    let mut contenders = Vec::new();
    for (count, disks) in GROWTH {
        let at = dir.path().join(format!("{count}x{disks}"));
        std::fs::create_dir(&at)?;
        std::fs::write(at.join("domain.xml"), domain(disks))?;
        let set = set(count, disks)?;
        json::Set::new(&set)?.write(BufWriter::new(File::create(at.join("set.json"))?))?;
        contenders.push(Contender::new(name(count, disks), move || {
            let path = |name: &str| at.join(name).display().to_string();
            let state = path("state");
            let since = Instant::now();
            let kib = memory_of(&[child::REDEFINE, &state, &path("domain.xml"), &path("set.json")])?;
            let took = since.elapsed().as_secs_f64();
            std::fs::remove_dir_all(state)?;
            Ok(Measures::from([("time", took), ("kib", kib)]))
        }));
    }
    let rounds = race(GROWTH_ROUNDS, contenders)?;
    print_growth(&rounds);
    Ok(())
}

fn print_growth(rounds: &Rounds) {
    let explained = "A process of its own reads the set as JSON from a file and makes it known in one call, with none known before. \
        Against 1 000 checkpoints of 4 disks. Seconds and MiB (VmHWM) are medians.";
    let columns = [
        "checkpoints × disks",
        "marks",
        "time",
        "memory",
        "seconds",
        "MiB",
        "goal: 10 000 × 16 < 2 s",
    ];
    let mut table = Table::new("Redefine: growth", explained, &columns);
    let first = name(GROWTH[0].0, GROWTH[0].1);
    let marks = |(count, disks): (usize, usize)| (count * disks) / (GROWTH[0].0 * GROWTH[0].1);
    for (count, disks) in GROWTH {
        let its = name(count, disks);
        let cell = |measure| ratio(rounds.ratio((&its, measure), (&first, measure)));
        let seconds = rounds.middle(&its, "time");
        let goal = match (count, disks) {
            (10_000, 16) if seconds < 2.0 => "met",
            (10_000, 16) => "not met",
            _ => "",
        };
        table.row(&[
            &its,
            &format!("{} ×", marks((count, disks))),
            &cell("time"),
            &cell("kib"),
            &format!("{seconds:.2}"),
            &format!("{:.0}", rounds.middle(&its, "kib") / 1024.0),
            goal,
        ]);
    }
    table.print();
}

fn name(count: usize, disks: usize) -> String {
    format!("{count} × {disks}")
}

/// A line of checkpoints, each of all disks.
fn set(count: usize, disks: usize) -> Result<Vec<Checkpoint>> {
    let targets = targets(disks);
    let one = |n: usize| {
        let name = |n: usize| uuid::Uuid::from_u128(n as u128).to_string();
        let disk = |target: &String| CheckpointDisk {
            target: target.clone(),
            id: None,
            size: Some(1 << 40),
            mark: Mark::Bitmap(name(n)),
            volatile: false,
            anew: false,
        };
        Ok(Checkpoint {
            name: name(n).parse()?,
            parent: n.checked_sub(1).map(|n| name(n).parse()).transpose()?,
            created: SystemTime::UNIX_EPOCH + Duration::from_mins(n as u64),
            description: None,
            disks: targets.iter().map(disk).collect(),
        })
    };
    (0..count).map(one).collect()
}

/// A domain that is off.
fn domain(disks: usize) -> String {
    let disk = |target: String| {
        format!(
            "<disk type='file'><driver type='qcow2'/><source file='/srv/{target}.qcow2'/><target dev='{target}'/></disk>"
        )
    };
    let disks: String = targets(disks).into_iter().map(disk).collect();
    format!("<domain type='kvm'><name>web1</name><devices>{disks}</devices></domain>")
}
