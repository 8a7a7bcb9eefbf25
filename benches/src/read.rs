//! Part `read`: our NBD client against nbdcopy and `qemu-img convert`, on the same exports of a snapshot.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use disksnap_core::{ExportDisk, ExportRequest, Listen, Snapshot, StopExports};
use disksnap_nbd::Uri;
use disksnap_test_support::pattern::bytes;
use disksnap_test_support::{DiskSpec, GIB, KIB, MIB, Qemu, QemuVersion, tools};

use crate::child;
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, compared};
use crate::scene::{Holder, Scene, request};

const SIZE: u64 = GIB;
const ROUNDS: usize = 5;

pub(crate) fn run(scratch: &Path) -> Result<()> {
    let dir = tempfile::tempdir_in(scratch)?;
    let half = image(&dir.path().join("half.raw"), |mib| mib % 2 == 0)?;
    let full = image(&dir.path().join("full.raw"), |_| true)?;
    let targets = ["vda".to_owned(), "vdb".to_owned()];
    let disks = [(&targets[0], &half), (&targets[1], &full)]
        .map(|(target, image)| DiskSpec::new(target, SIZE).image(image));
    let holder = Holder::machine(&disks)?;
    let scene = Scene::new(&holder.domain_xml(), &dir.path().join("state"))?;
    let snapshot = scene.create(&request(&targets, "filter"))?;
    if let Holder::Machine(machine) = &holder {
        overwrite(machine, &targets);
    }

    let mut table = Table::new(
        "Read",
        "Reading a whole 1 GiB disk of a snapshot from its export, each program started anew; the other program = 1. \
         A twentieth was overwritten by the guest and comes from the fleece image.",
        &[
            "ours against",
            "nbdcopy",
            "best",
            "qemu-img convert",
            "best",
            "goal: nbdcopy ≤ 1",
        ],
    );
    for listen in [Listen::Unix(dir.path().join("export.sock")), tcp()?] {
        let transport = if matches!(listen, Listen::Unix(_)) {
            "unix"
        } else {
            "TCP"
        };
        let uris = export(&scene, &snapshot, &listen)?;
        for (uri, what) in uris.iter().zip(["half empty", "full"]) {
            for to in [None, Some(dir.path().join("copy.raw"))] {
                let rounds = rounds(uri, to.as_ref())?;
                let to = if to.is_some() { "to a file" } else { "to nowhere" };
                row(&mut table, &format!("{what}, {transport}, {to}"), &rounds);
            }
        }
        let stop = scene.dispatcher.stop_exports(&scene.domain, &StopExports::All);
        scene.runtime.block_on(stop)?;
    }
    table.print();
    scene.delete(&snapshot.name)
}

fn row(table: &mut Table, what: &str, rounds: &Rounds) {
    let (ours, nbdcopy) = (("ours", "time"), ("nbdcopy", "time"));
    let [to_nbdcopy, best] = compared(rounds, ours, nbdcopy);
    let [to_qemu_img, best_qemu_img] = compared(rounds, ours, ("qemu-img", "time"));
    // A median within a twentieth of one is as fast, as far as these rounds can tell.
    let met = if rounds.ratio(ours, nbdcopy).median <= 1.05 {
        "met"
    } else {
        "not met"
    };
    table.row(&[what, &to_nbdcopy, &best, &to_qemu_img, &best_qemu_img, met]);
}

/// A raw image, with data in those of its mebibytes.
fn image(path: &Path, has_data: impl Fn(u64) -> bool) -> Result<PathBuf> {
    let file = File::create_new(path)?;
    file.set_len(SIZE)?;
    let data = bytes(3, 1 << 20);
    for mib in (0..SIZE / MIB).filter(|mib| has_data(*mib)) {
        file.write_all_at(&data, mib * MIB)?;
    }
    Ok(path.to_owned())
}

/// What the guest writes after the instant: a twentieth of the data.
fn overwrite(machine: &Qemu, targets: &[String]) {
    for target in targets {
        let disk = machine.disk(target);
        for place in 0..SIZE / (20 * MIB) {
            disk.fill(place * 20 * MIB, MIB - 4 * KIB, 9);
        }
    }
}

/// A port of the loopback address that was free just now.
fn tcp() -> Result<Listen> {
    let address = Ipv4Addr::LOCALHOST;
    let port = TcpListener::bind((address, 0))?.local_addr()?.port();
    Ok(Listen::Tcp {
        address: address.into(),
        port,
    })
}

fn export(scene: &Scene, snapshot: &Snapshot, listen: &Listen) -> Result<Vec<String>> {
    let names: Vec<String> = snapshot.disks.iter().map(|disk| disk.target.clone()).collect();
    let disk = |disk: &disksnap_core::DiskSnapshotRecord| ExportDisk {
        alias: disk.alias.clone(),
        name: Some(disk.target.clone()),
        checkpoint: None,
    };
    let request = ExportRequest {
        listen: Some(listen.clone()),
        tls: None,
        allow_remote: false,
        disks: snapshot.disks.iter().map(disk).collect(),
    };
    let start = scene.dispatcher.start_exports(&scene.domain, &request);
    scene.runtime.block_on(start)?;
    let uri = |name: &String| match listen {
        Listen::Unix(path) => Uri::unix(path, name),
        Listen::Tcp { address, port } => Uri::tcp(address.to_string(), *port, name),
    };
    Ok(names.iter().map(|name| uri(name).to_string()).collect())
}

fn rounds(uri: &str, to: Option<&PathBuf>) -> Result<Rounds> {
    let file = to.map(|path| path.clone().into_os_string());
    let own = std::env::current_exe()?;
    let ours = [Some(child::READ.into()), Some(uri.into()), file.clone()];
    let nbdcopy = [
        Some(uri.into()),
        Some(file.clone().unwrap_or_else(|| "null:".into())),
    ];
    let convert: Vec<OsString> = if let Some(file) = &file {
        let words = ["convert", "-f", "raw", "-O", "raw", uri].map(OsString::from);
        words.into_iter().chain([file.clone()]).collect()
    } else {
        let nowhere = format!("driver=null-co,size={SIZE}");
        let words = ["convert", "-n", "-f", "raw", "--target-image-opts", uri, &nowhere];
        words.map(OsString::from).into()
    };
    let turn = |program: &Path, arguments: &[OsString]| -> Result<Measures> {
        if let Some(path) = to {
            // Each makes it anew; whether it is there does not matter.
            let _ = fs::remove_file(path);
        }
        let since = Instant::now();
        let output = Command::new(program).args(arguments).output();
        let took = since.elapsed().as_secs_f64();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{} {arguments:?}: {said}",
            program.display()
        );
        Ok(Measures::from([("time", took)]))
    };
    let (ours, nbdcopy): (Vec<_>, Vec<_>) = (
        ours.into_iter().flatten().collect(),
        nbdcopy.into_iter().flatten().collect(),
    );
    let (nbdcopy_program, qemu_img) = (tools::program("nbdcopy"), QemuVersion::V10_0.program("qemu-img"));
    race(
        ROUNDS,
        vec![
            Contender::new("ours", || turn(&own, &ours)),
            Contender::new("nbdcopy", || turn(&nbdcopy_program, &nbdcopy)),
            Contender::new("qemu-img", || turn(&qemu_img, &convert)),
        ],
    )
}
