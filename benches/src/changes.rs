//! Part `changes`: the changed ranges of a 1 TiB disk, listed from an export by us and by nbdinfo, and how that grows.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use disksnap_core::{
    CheckpointName, ExportDisk, ExportRequest, Listen, NewCheckpoint, Snapshot, SnapshotName,
};
use disksnap_nbd::{Client, CommandFlags, ConnectOptions, Uri, dirty_bitmap_context};
use disksnap_test_support::{DiskSpec, GIB, KIB, tools};
use serde_json::json;

use crate::child;
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, compared, ratio};
use crate::scene::{Holder, Scene, request};

const SIZE: u64 = GIB << 10;
/// What is written at each place.
const PIECE: u64 = 64 * KIB;
/// The disks: how much of each is written, and of how many pieces one is.
const DISKS: [(&str, &str, u64); 3] = [("vda", "0.1 %", 1000), ("vdb", "1 %", 100), ("vdc", "10 %", 10)];
/// What the growth is told against.
const MIDDLE: &str = "1 %";
const ROUNDS: usize = 5;
const SINCE: &str = "since";
/// So many zero requests are under way at once.
const AT_ONCE: usize = 64;

pub(crate) fn run(scratch: &Path) -> Result<()> {
    let dir = tempfile::tempdir_in(scratch)?;
    let holder = Holder::daemon(&DISKS.map(|(target, ..)| DiskSpec::new(target, SIZE).qcow2()));
    let scene = Scene::new(&holder.domain_xml(), &dir.path().join("state"))?;
    let first = take(&scene, SINCE)?;
    scene.delete(&first.name)?;
    for (target, _, stride) in DISKS {
        write(&scene, &holder, &dir.path().join("fill.sock"), target, stride)?;
    }
    let second = take(&scene, "then")?;
    let uris = export(&scene, &second, &dir.path().join("export.sock"))?;
    let rounds = rounds(&uris)?;
    print_rates(&rounds);
    print_growth(&rounds);
    scene.delete(&second.name)
}

fn take(scene: &Scene, name: &str) -> Result<Snapshot> {
    let targets = DISKS.map(|(target, ..)| target.to_owned());
    // One transaction: a storage daemon has no guest that could be paused for more.
    let mut request = request(&targets, "job");
    request.name = Some(name.parse::<SnapshotName>()?);
    request.checkpoint = Some(NewCheckpoint::AsSnapshot);
    scene.create(&request)
}

/// Writes zeroes, which take no room but in the tables, to one piece of every so many.
fn write(scene: &Scene, holder: &Holder, socket: &Path, target: &str, stride: u64) -> Result<()> {
    let Holder::Daemon(daemon) = holder else {
        anyhow::bail!("the disks are a storage daemon's")
    };
    let address = json!({ "type": "unix", "data": { "path": socket } });
    daemon.qmp("nbd-server-start", json!({ "addr": address }));
    let export = json!({ "type": "nbd", "id": "fill", "node-name": daemon.top_node(target), "name": "fill",
        "writable": true });
    daemon.qmp("block-export-add", export);
    let written = scene.runtime.block_on(async {
        let uri = Uri::unix(socket, "fill");
        let client = Client::connect(&uri, &ConnectOptions::default()).await?;
        let places: Vec<u64> = (0..SIZE / PIECE / stride).map(|n| n * stride * PIECE).collect();
        for some in places.chunks(AT_ONCE) {
            let mut all = tokio::task::JoinSet::new();
            for &place in some {
                let client = client.clone();
                all.spawn(async move { client.write_zeroes(place, PIECE, CommandFlags::default()).await });
            }
            while let Some(done) = all.join_next().await {
                done??;
            }
        }
        client.disconnect().await;
        Ok(())
    });
    daemon.qmp("block-export-del", json!({ "id": "fill", "mode": "hard" }));
    daemon.qmp("nbd-server-stop", json!({}));
    written
}

/// Exports the disks, each with what has changed; the addresses, in the order of the disks.
fn export(scene: &Scene, snapshot: &Snapshot, socket: &Path) -> Result<Vec<String>> {
    let since: CheckpointName = SINCE.parse()?;
    let disks = snapshot.disks.iter().map(|disk| ExportDisk {
        alias: disk.alias.clone(),
        name: Some(disk.target.clone()),
        checkpoint: Some(since.clone()),
    });
    let request = ExportRequest {
        listen: Some(Listen::Unix(socket.to_owned())),
        tls: None,
        allow_remote: false,
        disks: disks.collect(),
    };
    scene
        .runtime
        .block_on(scene.dispatcher.start_exports(&scene.domain, &request))?;
    let uri = |target: &str| Uri::unix(socket, target).to_string();
    Ok(DISKS.iter().map(|(target, ..)| uri(target)).collect())
}

fn rounds(uris: &[String]) -> Result<Rounds> {
    let nbdinfo = tools::program("nbdinfo");
    let context = dirty_bitmap_context(SINCE);
    let map = format!("--map={context}");
    let mut contenders = Vec::new();
    for ((_, share, _), uri) in DISKS.iter().zip(uris) {
        let (context, map, nbdinfo) = (context.as_str(), map.as_str(), nbdinfo.as_path());
        contenders.push(Contender::new(format!("ours {share}"), move || {
            timed(Path::new(child::OWN), &[child::CHANGES, uri, context])
        }));
        contenders.push(Contender::new(format!("nbdinfo {share}"), move || {
            timed(nbdinfo, &[map, uri])
        }));
    }
    race(ROUNDS, contenders)
}

/// How long a program takes whose output nobody reads.
fn timed(program: &Path, arguments: &[&str]) -> Result<Measures> {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::null());
    let since = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let took = since.elapsed().as_secs_f64();
    ensure!(status.success(), "{} {arguments:?}: {status}", program.display());
    Ok(Measures::from([("time", took)]))
}

fn print_rates(rounds: &Rounds) {
    let explained = "What has changed in a 1 TiB qcow2 disk since a checkpoint, in pieces of 64 KiB that do not touch, listed \
        from one export. Each program is started anew and prints each range to nowhere; `nbdinfo --map` = 1.";
    let columns = ["changed", "ranges", "ours", "best", "goal ≤ 1"];
    let mut table = Table::new("Changed ranges", explained, &columns);
    for (_, share, stride) in DISKS {
        let (ours, nbdinfo) = (format!("ours {share}"), format!("nbdinfo {share}"));
        let pair = ((ours.as_str(), "time"), (nbdinfo.as_str(), "time"));
        let [to, best] = compared(rounds, pair.0, pair.1);
        let met = rounds.ratio(pair.0, pair.1).median <= 1.05;
        let ranges = (SIZE / PIECE / stride).to_string();
        let met = if met { "met" } else { "not met" };
        table.row(&[share, &ranges, &to, &best, met]);
    }
    table.print();
}

fn print_growth(rounds: &Rounds) {
    let explained =
        "The same, each program's time for 1 % = 1: ten times the ranges, ten times the time, and no more.";
    let columns = ["changed", "ours", "nbdinfo"];
    let mut table = Table::new("Changed ranges: growth", explained, &columns);
    for (_, share, _) in DISKS {
        let cell = |who: &str| {
            let (of, to) = (format!("{who} {share}"), format!("{who} {MIDDLE}"));
            ratio(rounds.ratio((&of, "time"), (&to, "time")))
        };
        table.row(&[share, &cell("ours"), &cell("nbdinfo")]);
    }
    table.print();
}
