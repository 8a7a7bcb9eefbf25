//! Takes of logical volumes against the bare `lvcreate -s`, in the guest that has LVM: not every host does.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use disksnap_core::{Options, Source};
use disksnap_lvm::LogicalVolume;
use disksnap_test_support::{GIB, LvmGuest};

use crate::child::OWN;
use crate::off::{Off, timed};
use crate::race::{Contender, Measures, Rounds, race};

/// `TAKES ROUNDS`: what this program does when it is started in the guest.
pub(crate) const TAKES: &str = "guest-lvm-takes";

/// The room of a classic snapshot in bytes, for both sides.
const ROOM: &str = "16777216";
/// How much of the disk is written before each take.
const WRITTEN: usize = 4 << 20;

/// Takes of a classic and of a thin volume, each against the bare tool.
pub(crate) fn takes(rounds: usize) -> Result<[Rounds; 2]> {
    let mut guest = LvmGuest::start(&[GIB]);
    let own = guest.put(Path::new(OWN));
    let output = guest.run(&[own.as_str(), TAKES, &rounds.to_string()]);
    ensure!(
        output.status == 0,
        "in the guest: {}{}",
        output.stdout,
        output.stderr
    );
    let of =
        |kind| measured(&output.stdout, kind).with_context(|| format!("the guest says {}", output.stdout));
    Ok([of("classic")?, of("thin")?])
}

/// Reads what [`run_inside`] printed of one kind.
fn measured(printed: &str, kind: &str) -> Option<Rounds> {
    let of = |name: &str| {
        let begin = format!("{kind} {name}");
        let line = printed.lines().find_map(|line| line.strip_prefix(&begin))?;
        let turn = |ms: &str| Some(Measures::from([("ms", ms.parse().ok()?)]));
        let turns: Option<Vec<Measures>> = line.split_whitespace().map(turn).collect();
        Some((name.to_owned(), turns?))
    };
    Some(Rounds::of([of("ours")?, of("bare")?]))
}

/// In the guest: makes volumes, runs the rounds, and prints `KIND NAME MILLISECONDS…`.
pub(crate) fn run_inside(rounds: usize) -> Result<()> {
    lvm("vgcreate -y vg /dev/vda")?;
    lvm("lvcreate -y -Wn -L 64m -n classic vg")?;
    lvm("lvcreate -y --type thin-pool -Zn -L 256m -n pool vg")?;
    lvm("lvcreate -y -V 64m --thinpool vg/pool -n thin")?;
    for (kind, options, bare) in [
        ("classic", &[("snapshot.size", ROOM)][..], format!("-L {ROOM}b")),
        ("thin", &[], "-kn -ay".to_owned()),
    ] {
        let rounds = of_volume(kind, options.iter().copied().collect(), &bare, rounds)?;
        for name in ["ours", "bare"] {
            let times: Vec<String> = rounds.values((name, "ms")).iter().map(f64::to_string).collect();
            println!("{kind} {name} {}", times.join(" "));
        }
    }
    Ok(())
}

/// Alternately: our take, and the same `lvcreate` by itself.
fn of_volume(name: &str, options: Options, arguments: &str, rounds: usize) -> Result<Rounds> {
    let device = Path::new("/dev/vg").join(name);
    let source = Source::Block { dev: device.clone() };
    let off = Off::new(Path::new("/tmp"), source, options)?;
    let ours = || {
        write(&device)?;
        off.take(&LogicalVolume)
    };
    let bare = || {
        write(&device)?;
        let took = timed(|| lvm(&format!("lvcreate -y -s -pr {arguments} -n bare vg/{name}")))?;
        lvm("lvremove -y vg/bare")?;
        Ok(took)
    };
    let contenders = vec![Contender::new("ours", ours), Contender::new("bare", bare)];
    race(rounds, contenders)
}

/// Writes a part of the disk, and has it written back.
fn write(device: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(device)?;
    file.write_all_at(&vec![2; WRITTEN], 8 << 20)?;
    Ok(file.sync_all()?)
}

fn lvm(line: &str) -> Result<()> {
    let mut command = Command::new("/sbin/lvm");
    let output = command.args(line.split_whitespace()).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {errors}");
    Ok(())
}
