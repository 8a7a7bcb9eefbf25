//! Part `snapshot`: the time of a create and of a delete against the bare monitor commands, and where ours goes.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use disksnap_core::Host;
use disksnap_hypervisor::{Graph, Schema};
use disksnap_test_support::{DiskSpec, MIB};

use crate::bare::{self, Client, Place, Seat, Way};
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, compared, percent, ratio};
use crate::scene::{Holder, Scene, request, targets};

/// What a create consists of, in its order, as the stopwatch calls it.
const PHASES: [&str; 7] = [
    "catalog", "probe", "prepare", "guardian", "window", "complete", "rest",
];

/// One of the cases that are measured.
struct Case {
    what: String,
    rounds: Rounds,
    window: bool,
}

/// The goal for a create, as a multiple of the bare commands.
const GOAL: f64 = 1.2;

pub(crate) fn run(scratch: &Path) -> Result<()> {
    let mut cases = Vec::new();
    for (count, rounds) in [(1, 20), (8, 10), (64, 3)] {
        let disks = disks(count);
        let machine = Holder::machine(&disks)?;
        for way in [Way::Filter, Way::Job] {
            cases.push(case(scratch, &machine, "machine", way, count, rounds)?);
        }
        if count == 8 {
            cases.push(case(scratch, &machine, "machine", Way::Classic, count, rounds)?);
        }
        drop(machine);
        let daemon = Holder::daemon(&disks);
        cases.push(case(
            scratch,
            &daemon,
            "storage daemon",
            Way::Filter,
            count,
            rounds,
        )?);
    }
    create_table(&cases).print();
    phase_table(&cases).print();
    monitor_table(&cases).print();
    delete_table(&cases).print();
    Ok(())
}

fn disks(count: usize) -> Vec<DiskSpec> {
    targets(count)
        .iter()
        .map(|target| DiskSpec::new(target, 64 * MIB))
        .collect()
}

fn places(holder: &Holder, targets: &[String], dir: &Path) -> Vec<Place> {
    let place = |(n, target): (usize, &String)| Place {
        size: 64 * MIB,
        format_node: holder.format_node(target).to_owned(),
        seat: match holder {
            Holder::Machine(machine) => Seat::Device(format!(
                "/machine/peripheral/{}/virtio-backend",
                machine.alias(target)
            )),
            Holder::Daemon(_) => Seat::Wrapper(holder.top_node(target)),
        },
        image: dir.join(format!("{n}.bare")),
    };
    targets.iter().enumerate().map(place).collect()
}

fn case(
    scratch: &Path,
    holder: &Holder,
    where_: &str,
    way: Way,
    count: usize,
    rounds: usize,
) -> Result<Case> {
    let dir = tempfile::tempdir_in(scratch)?;
    let scene = Scene::new(&holder.domain_xml(), &dir.path().join("state"))?;
    let targets = targets(count);
    let (places, monitor) = (places(holder, &targets, dir.path()), holder.monitor());
    let ours = |connected| ours(&scene, &targets, way, connected);
    let bare = |connected| bare(&monitor, way, &places, connected);
    let contenders = vec![
        Contender::new("ours", || ours(false)),
        Contender::new("bare", || bare(false)),
        Contender::new("ours, connected", || ours(true)),
        Contender::new("bare, connected", || bare(true)),
    ];
    let rounds = race(rounds, contenders)?;
    let plural = if count == 1 { "disk" } else { "disks" };
    Ok(Case {
        what: format!("{count} {plural}, {where_}, {}", way.as_str()),
        rounds,
        window: matches!(holder, Holder::Machine(_)) && way == Way::Filter,
    })
}

/// One create and delete by the dispatcher. `connected` as a program has it that keeps the domain's control.
fn ours(scene: &Scene, targets: &[String], way: Way, connected: bool) -> Result<Measures> {
    let request = request(targets, way.as_str());
    let mut measures = Measures::new();
    let control = connected
        .then(|| scene.connector.control(&scene.domain))
        .transpose()?;
    if let Some(control) = &control {
        let host: &dyn Host = control;
        scene.runtime.block_on(Schema::of(host))?;
        measures.insert(
            "one schema",
            timed(|| Ok(scene.runtime.block_on(Schema::of(host))?))?,
        );
        measures.insert(
            "one graph",
            timed(|| Ok(scene.runtime.block_on(Graph::read(host))?))?,
        );
    }
    scene.watch.take();
    let since = Instant::now();
    let snapshot = scene.create(&request)?;
    let create = since.elapsed();
    let laps = scene.watch.take();
    let window = Duration::from_micros(snapshot.window.paused_us.max(snapshot.window.taken_us));
    let mut rest = create.saturating_sub(window);
    measures.insert("create", create.as_secs_f64());
    measures.insert("window", window.as_secs_f64());
    let mut waits = 0;
    let mut waited = Duration::ZERO;
    for (name, (times, spent)) in laps {
        if PHASES.contains(&name) {
            rest = rest.saturating_sub(spent);
        } else {
            waits += times;
            waited += spent;
        }
        measures.insert(name, spent.as_secs_f64());
    }
    measures.insert("rest", rest.as_secs_f64());
    measures.insert("monitor", waited.as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    measures.insert("waits", waits as f64);
    measures.insert("delete", timed(|| scene.delete(&snapshot.name))?);
    Ok(measures)
}

fn bare(monitor: &Path, way: Way, places: &[Place], connected: bool) -> Result<Measures> {
    let mut measures = Measures::new();
    let mut client = connected.then(|| Client::connect(monitor)).transpose()?;
    let mut window = Duration::ZERO;
    let mut with = |act: &mut dyn FnMut(&mut Client) -> Result<()>| match &mut client {
        Some(client) => act(client),
        None => act(&mut Client::connect(monitor)?),
    };
    let create = timed(|| {
        with(&mut |client| {
            window = bare::create(client, way, places)?;
            Ok(())
        })
    })?;
    measures.insert("create", create);
    measures.insert(
        "delete",
        timed(|| with(&mut |client| bare::delete(client, way, places)))?,
    );
    measures.insert("window", window.as_secs_f64());
    Ok(measures)
}

/// How long it took, in seconds.
fn timed<T>(mut act: impl FnMut() -> Result<T>) -> Result<f64> {
    let since = Instant::now();
    act()?;
    Ok(since.elapsed().as_secs_f64())
}

fn create_table(cases: &[Case]) -> Table {
    let mut table = Table::new(
        "Create",
        "From the request to the snapshot in the catalog, bare monitor commands on the same socket = 1. \
         `connecting`: both connect first; `connected`: both are connected already. `window`: how long the guest \
         is paused, the bare `stop` … `cont` = 1.",
        &[
            "create",
            "connecting",
            "best",
            "connected",
            "best",
            "goal ≤ 1.2",
            "window",
        ],
    );
    for Case { what, rounds, window } in cases {
        let pairs = [("ours", "bare"), ("ours, connected", "bare, connected")]
            .map(|(ours, bare)| ((ours, "create"), (bare, "create")));
        let [fresh, kept] = pairs.map(|(ours, bare)| compared(rounds, ours, bare));
        let met = if pairs
            .iter()
            .all(|(ours, bare)| rounds.ratio(*ours, *bare).median <= GOAL)
        {
            "met"
        } else {
            "not met"
        };
        let stood = if *window {
            ratio(rounds.ratio(("ours, connected", "window"), ("bare, connected", "window")))
        } else {
            "none".to_owned()
        };
        table.row(&[what, &fresh[0], &fresh[1], &kept[0], &kept[1], met, &stood]);
    }
    table
}

fn phase_table(cases: &[Case]) -> Table {
    let mut columns = vec!["create = 100 % (connected)"];
    columns.extend(PHASES);
    let mut table = Table::new(
        "Where the time of a create goes",
        "Shares of our own time, the median of each. `catalog`: lock, journal and record, each durable; \
         `guardian`: the process that lets the guest go if this one dies; `window`: from the pause to the guest's \
         going on, or the taking itself where nothing is paused.",
        &columns,
    );
    for case in cases {
        let shares = case.rounds.shares("ours, connected", "create", &PHASES);
        let shares: Vec<String> = shares.into_iter().map(percent).collect();
        let cells: Vec<&str> = shares.iter().map(String::as_str).collect();
        table.row(&[&[case.what.as_str()], &cells[..]].concat());
    }
    table
}

fn monitor_table(cases: &[Case]) -> Table {
    let parts = ["monitor: graph", "monitor: schema", "monitor: add nodes"];
    let mut table = Table::new(
        "What it waits for",
        "Shares of our own time. `monitor`: waiting for QEMU, whatever the phase; of that `graph`: reading the block \
         graph; `schema`: what this QEMU can do; `nodes`: adding nodes. `one graph`, `one schema`: reading and \
         understanding it once. `waits`: how often something is sent and waited for.",
        &[
            "create = 100 % (connected)",
            "monitor",
            "graph",
            "schema",
            "nodes",
            "one graph",
            "one schema",
            "waits",
        ],
    );
    let name = "ours, connected";
    for Case { what, rounds, .. } in cases {
        let share = |measure| percent(rounds.ratio((name, measure), (name, "create")));
        let count = format!("{:.0}", rounds.middle(name, "waits"));
        let [graph, schema, nodes] = parts.map(share);
        table.row(&[
            what,
            &share("monitor"),
            &graph,
            &schema,
            &nodes,
            &share("one graph"),
            &share("one schema"),
            &count,
        ]);
    }
    table
}

fn delete_table(cases: &[Case]) -> Table {
    let mut table = Table::new(
        "Delete",
        "From the request to the tombstone in the catalog, bare monitor commands that take the same apart = 1. No goal.",
        &["delete", "connecting", "best", "connected", "best"],
    );
    for Case { what, rounds, .. } in cases {
        let fresh = compared(rounds, ("ours", "delete"), ("bare", "delete"));
        let kept = compared(
            rounds,
            ("ours, connected", "delete"),
            ("bare, connected", "delete"),
        );
        table.row(&[what, &fresh[0], &fresh[1], &kept[0], &kept[1]]);
    }
    table
}
