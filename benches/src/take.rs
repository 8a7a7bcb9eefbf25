//! Part `take`: the take of an image against the bare tool, and how long the guest stands still for disks of several
//! methods.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Result, ensure};
use disksnap_btrfs::Btrfs;
use disksnap_core::{DiskChoice, DiskSnapshot, Disks, MethodChoice, Options, SnapshotRequest, Source};
use disksnap_qemu_fleece::QemuFleece;
use disksnap_reflink::Reflink;
use disksnap_test_support::{DiskSpec, LoopFsKind, MIB, loop_fs, require::lacking, tools};
use rustix::fs::ioctl_ficlone;

use crate::lvm;
use crate::off::{Off, timed};
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, ratio};
use crate::scene::{Holder, Scene, targets};

/// The size of an image, all of it data.
const IMAGE: u64 = 64 * MIB;
/// How much of it is written before each take.
const WRITTEN: usize = 4 << 20;
const ROUNDS: usize = 20;
/// A take may be so many times as long as the bare tool's, and so much longer.
const TIMES: f64 = 1.1;
const MORE_MS: f64 = 5.0;
/// The guest may stand still for so much longer than the slowest single take.
const WINDOW_MORE_MS: f64 = 20.0;

pub(crate) fn run(scratch: &Path) -> Result<()> {
    for file_system in ["btrfs", "xfs"] {
        if let Some(why) = lacking(file_system) {
            println!("\n## Take\n\nNot measured, since there is no {file_system} here: {why}");
            return Ok(());
        }
    }
    takes(scratch)?;
    window(scratch)
}

/// The take alone, of a domain that is off.
fn takes(scratch: &Path) -> Result<()> {
    let explained = "The take of a 64 MiB disk with 4 MiB just written, and written back; the bare tool is 1. \
        Milliseconds are medians; those of lvm are an emulated machine's (TCG).";
    let columns = ["take", "ours / bare", "ours", "bare", "goal ≤ 1.1 × + 5 ms"];
    let mut table = Table::new("Take", explained, &columns);
    let [classic, thin] = lvm::takes(ROUNDS)?;
    let rounds = [
        ("btrfs, `btrfs subvolume snapshot -r`", btrfs(scratch)?),
        ("reflink on btrfs, FICLONE", reflink(scratch, LoopFsKind::Btrfs)?),
        ("reflink on XFS, FICLONE", reflink(scratch, LoopFsKind::Xfs)?),
        ("lvm classic, `lvcreate -s`", classic),
        ("lvm thin, `lvcreate -s`", thin),
    ];
    for (what, rounds) in &rounds {
        let (ours, bare) = (("ours", "ms"), ("bare", "ms"));
        let met = rounds.excess(ours, TIMES, bare).median <= MORE_MS;
        table.row(&[
            what,
            &ratio(rounds.ratio(ours, bare)),
            &format!("{:.2} ms", rounds.middle("ours", "ms")),
            &format!("{:.2} ms", rounds.middle("bare", "ms")),
            if met { "met" } else { "not met" },
        ]);
    }
    table.print();
    Ok(())
}

fn btrfs(scratch: &Path) -> Result<Rounds> {
    let fs = loop_fs(LoopFsKind::Btrfs, 1 << 30, "");
    let images = subvolume(&fs.path().join("images"))?;
    let image = Image::new(scratch, &images.join("vda.raw"))?;
    let bare = || {
        image.write()?;
        let snapshot = fs.path().join("bare");
        let mut command = Command::new(tools::program("btrfs"));
        command
            .args(["subvolume", "snapshot", "-r"])
            .args([&images, &snapshot]);
        let took = timed(|| run_quietly(&mut command))?;
        run_quietly(
            Command::new(tools::program("btrfs"))
                .args(["subvolume", "delete"])
                .arg(snapshot),
        )?;
        Ok(took)
    };
    race(
        ROUNDS,
        vec![
            Contender::new("ours", || image.take(&Btrfs)),
            Contender::new("bare", bare),
        ],
    )
}

fn reflink(scratch: &Path, kind: LoopFsKind) -> Result<Rounds> {
    let fs = loop_fs(kind, 1 << 30, "");
    let image = Image::new(scratch, &fs.path().join("vda.raw"))?;
    let bare = || {
        image.write()?;
        let path = fs.path().join("bare");
        let (clone, from) = (File::create(&path)?, File::open(&image.path)?);
        let took = timed(|| Ok(ioctl_ficlone(&clone, &from)?))?;
        fs::remove_file(path)?;
        Ok(took)
    };
    race(
        ROUNDS,
        vec![
            Contender::new("ours", || image.take(&Reflink)),
            Contender::new("bare", bare),
        ],
    )
}

/// The image of a domain that is off.
struct Image {
    off: Off,
    path: PathBuf,
}

impl Image {
    fn new(scratch: &Path, path: &Path) -> Result<Self> {
        fs::write(path, vec![1; usize::try_from(IMAGE)?])?;
        let source = Source::File {
            file: path.to_owned(),
        };
        Ok(Self {
            off: Off::new(scratch, source, Options::default())?,
            path: path.to_owned(),
        })
    }

    /// Writes a part of it, and has it written back.
    fn write(&self) -> Result<()> {
        let image = OpenOptions::new().write(true).open(&self.path)?;
        image.write_all_at(&vec![2; WRITTEN], 8 * MIB)?;
        rustix::fs::syncfs(&image)?;
        Ok(())
    }

    fn take(&self, method: &dyn DiskSnapshot) -> Result<Measures> {
        self.write()?;
        self.off.take(method)
    }
}

/// How long disks of three methods together keep a guest waiting, beside the slowest of their takes one by one.
fn window(scratch: &Path) -> Result<()> {
    let (btrfs, xfs) = (
        loop_fs(LoopFsKind::Btrfs, 1 << 30, ""),
        loop_fs(LoopFsKind::Xfs, 1 << 30, ""),
    );
    let dir = tempfile::tempdir_in(scratch)?;
    let mut disks = Vec::new();
    for (n, target) in targets(8).into_iter().enumerate() {
        let (place, method) = match n {
            0..3 => (subvolume(&btrfs.path().join(&target))?, "btrfs"),
            3..6 => (xfs.path().to_owned(), "reflink"),
            _ => (dir.path().to_owned(), "qemu-fleece"),
        };
        let image = place.join(format!("{target}.raw"));
        fs::write(&image, vec![1; usize::try_from(IMAGE)?])?;
        disks.push((target, image, method));
    }
    let specs: Vec<DiskSpec> = disks
        .iter()
        .map(|(target, image, _)| DiskSpec::new(target, IMAGE).image(image))
        .collect();
    let machine = Holder::machine(&specs)?;
    let methods: Vec<Arc<dyn DiskSnapshot>> = vec![Arc::new(Btrfs), Arc::new(Reflink), Arc::new(QemuFleece)];
    let scene = Scene::with(&machine.domain_xml(), &dir.path().join("state"), methods)?;
    let taken = |disks: &[(String, PathBuf, &str)]| {
        let snapshot = scene.create(&by_methods(disks))?;
        scene.delete(&snapshot.name)?;
        Ok::<_, anyhow::Error>(snapshot.window)
    };
    let mixed = || {
        let window = taken(&disks)?;
        Ok(Measures::from([
            ("paused", millis(window.paused_us)),
            ("taken", millis(window.taken_us)),
        ]))
    };
    let alone = || {
        let mut slowest: f64 = 0.0;
        for disk in &disks {
            slowest = slowest.max(millis(taken(std::slice::from_ref(disk))?.taken_us));
        }
        Ok(Measures::from([("taken", slowest)]))
    };
    let rounds = race(
        ROUNDS,
        vec![Contender::new("mixed", mixed), Contender::new("alone", alone)],
    )?;
    print_window(&rounds);
    Ok(())
}

fn print_window(rounds: &Rounds) {
    let explained = "8 disks of a running machine at one instant: three on btrfs, three by reflink on XFS, two by \
        qemu-fleece. How long the guest is paused, and the slowest of the same takes one by one. Medians.";
    let columns = [
        "8 disks, 3 methods",
        "paused",
        "taking",
        "slowest alone",
        "goal ≤ slowest + 20 ms",
    ];
    let mut table = Table::new("Window", explained, &columns);
    let excess = rounds.excess(("mixed", "paused"), 1.0, ("alone", "taken"));
    let met = if excess.median <= WINDOW_MORE_MS {
        "met"
    } else {
        "not met"
    };
    let (from, to) = excess.quartiles;
    table.row(&[
        "machine, idle",
        &format!("{:.1} ms", rounds.middle("mixed", "paused")),
        &format!("{:.1} ms", rounds.middle("mixed", "taken")),
        &format!("{:.1} ms", rounds.middle("alone", "taken")),
        &format!("{met}: {:+.1} ms ({from:+.1} to {to:+.1})", excess.median),
    ]);
    table.print();
}

fn by_methods(disks: &[(String, PathBuf, &str)]) -> SnapshotRequest {
    let choice = |(target, _, method): &(String, PathBuf, &str)| DiskChoice {
        method: Some(MethodChoice {
            method: (*method).to_owned(),
            options: Options::default(),
        }),
        ..DiskChoice::new(target)
    };
    SnapshotRequest {
        disks: Disks::Named(disks.iter().map(choice).collect()),
        ..SnapshotRequest::default()
    }
}

fn subvolume(path: &Path) -> Result<PathBuf> {
    run_quietly(
        Command::new(tools::program("btrfs"))
            .args(["subvolume", "create"])
            .arg(path),
    )?;
    Ok(path.to_owned())
}

fn run_quietly(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of a window are far below 2^52"
)]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}
