//! `./x demo move`: a machine with fifty checkpoints goes to another host, and its next backup is an incremental one.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, tools};
use serde_json::Value;

use crate::demo_stage::{build, run_quiet, step};

const DISKS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 256 * MIB;
const CHECKPOINTS: usize = 50;
/// Those at which a full backup is made: one of old, and the last.
const BACKUPS: [usize; 2] = [10, CHECKPOINTS];
/// A host tells its domains by UUID; a machine that moves keeps its own.
const UUID: &str = "7c3f9d52-0b7e-4c55-9a4a-2a1d2f0c6e11";
const SET: &str = "web1.checkpoints.json";

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    let disksnap = build()?;
    let backups = tempfile::tempdir()?;
    let backups = Backups(backups.path());
    let (a, b) = (Host::new("host-a", &disksnap)?, Host::new("host-b", &disksnap)?);

    step("Host A: a Linux guest writes to two qcow2 disks without pause; it is made known");
    let machine = start(|disk| disk);
    a.define(&machine)?;
    step("Host A: fifty checkpoints; at the 10th and at the 50th a full backup is made");
    take_all(&a, &machine, &backups)?;
    step(
        "Host A: the machine is shut down, its set of checkpoints written down and, with its images, copied",
    );
    let rounds = machine.writer_rounds();
    machine.quit();
    println!("web1 is shut down; its guest had written {rounds} rounds");
    a.dump()?;
    let images = carry(&machine, &a, &b)?;
    a.disksnap(&["checkpoint", "forget", "-d", "web1", "--all"])?;
    a.disksnap(&["domain", "undefine", "web1"])?;
    drop(machine);

    step("Host B: another state directory and another QEMU, on the copied images; the guest writes on");
    let machine = start(|disk| {
        let image = images.join(image_name(disk.target()));
        disk.image(&image)
    });
    b.define(&machine)?;
    step(
        "Host B: the whole set is defined in one call, if it is what the bitmaps in the images say, and checked again",
    );
    b.disksnap(&["checkpoint", "redefine", "-d", "web1", SET, "--validate"])?;
    b.disksnap(&["checkpoint", "validate", "-d", "web1"])?;
    step("Host B: the next backup, with a checkpoint of its own, while the guest writes");
    b.disksnap_last(
        &[
            "snapshot",
            "create",
            "-d",
            "web1",
            "--name",
            "c51",
            "--checkpoint",
        ],
        "checkpoint",
    )?;
    machine.wait_writer(20);
    for since in BACKUPS {
        step(&format!(
            "The increment since {}, put on that full backup: is it the snapshot?",
            name(since)
        ));
        prove(&b, &backups, since)?;
    }
    b.disksnap(&["snapshot", "delete", "-d", "web1", "c51"])?;
    println!(
        "\nFifty checkpoints went along in one call, and what changed since any of them is known to the byte."
    );
    Ok(())
}

/// The n-th checkpoint.
fn name(n: usize) -> String {
    format!("c{n:02}")
}

fn image_name(target: &str) -> String {
    format!("{target}.qcow2")
}

/// A machine with the two disks, whose guest writes to them.
fn start(with: impl Fn(DiskSpec) -> DiskSpec) -> Qemu {
    let builder = DISKS.iter().fold(Qemu::builder(), |builder, target| {
        builder.disk(with(DiskSpec::new(target, SIZE).qcow2()))
    });
    let machine = builder.guest(GuestSetup::new().writer(&DISKS)).start();
    machine.wait_writer(5);
    machine
}

fn take_all(host: &Host, machine: &Qemu, backups: &Backups<'_>) -> Result<()> {
    for n in 1..=CHECKPOINTS {
        let name = name(n);
        let create = [
            "snapshot",
            "create",
            "-d",
            "web1",
            "--name",
            &name,
            "--checkpoint",
        ];
        let delete = ["snapshot", "delete", "-d", "web1", &name];
        if BACKUPS.contains(&n) {
            host.disksnap_last(&create, "checkpoint")?;
            for target in DISKS {
                let uri = host.export(&name, target, None)?;
                run_told(backups.command("nbdcopy").args([&uri, &full(target, n)]))?;
            }
            host.disksnap(&["export", "stop", "-d", "web1", "--all"])?;
            host.disksnap(&delete)?;
        } else if n == 1 {
            host.disksnap(&create)?;
            host.disksnap(&delete)?;
            println!("…");
        } else {
            host.disksnap_quiet(&create)?;
            host.disksnap_quiet(&delete)?;
        }
        machine.wait_writer(2);
    }
    let listed = host.disksnap_quiet(&["checkpoint", "list", "-d", "web1"])?;
    println!("{}$ disksnap checkpoint list -d web1", host.name);
    let lines: Vec<&str> = listed.lines().collect();
    ensure!(lines.len() == 1 + CHECKPOINTS, "there are {} lines", lines.len());
    println!("{}\n…\n{}", lines[..4].join("\n"), lines[CHECKPOINTS]);
    Ok(())
}

/// Copies the images and the set to the other host; where the images are there.
fn carry(machine: &Qemu, a: &Host, b: &Host) -> Result<PathBuf> {
    let images = b.dir.path().join("images");
    fs::create_dir(&images)?;
    for target in DISKS {
        fs::copy(machine.image(target), images.join(image_name(target)))?;
    }
    fs::copy(a.dir.path().join(SET), b.dir.path().join(SET))?;
    println!("copied vda.qcow2, vdb.qcow2 and {SET} to host B, which is another directory here");
    Ok(images)
}

/// A backup's name.
fn full(target: &str, n: usize) -> String {
    format!("{target}-{}.raw", name(n))
}

/// Makes the incremental backup with QEMU's own programs, on top of the full one, and compares with the whole snapshot.
fn prove(host: &Host, backups: &Backups<'_>, since: usize) -> Result<()> {
    for target in DISKS {
        let checkpoint = name(since);
        let uri = host.export("c51", target, Some(&checkpoint))?;
        let ranges = changed(backups, &uri, &checkpoint)?;
        let increment = format!("{target}-c51-since-{checkpoint}.qcow2");
        let full = full(target, since);
        let qemu_img = |words: &[&str]| run_told(backups.command("qemu-img").args(words));
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &uri, &increment])?;
        pull(backups, &increment, &ranges)?;
        qemu_img(&["rebase", "-u", "-F", "raw", "-b", &full, &increment])?;
        qemu_img(&["compare", &increment, &uri])?;
        let mut without = backups.command("qemu-img");
        without.args(["compare", "-q", "-f", "raw", "-F", "raw", &full, &uri]);
        ensure!(
            without.status()?.code() == Some(1),
            "the snapshot is as the full backup is: the increment proves nothing"
        );
        host.disksnap_quiet(&["export", "stop", "-d", "web1", "--all"])?;
    }
    Ok(())
}

/// What has changed, as the export tells any NBD client: where and how much.
fn changed(backups: &Backups<'_>, uri: &str, checkpoint: &str) -> Result<Vec<(u64, u64)>> {
    let context = format!("--map=qemu:dirty-bitmap:{checkpoint}");
    let mut command = backups.command("nbdinfo");
    command.args(["--json", &context, uri]);
    println!("{}", shown(&command));
    let map: Vec<Value> = serde_json::from_str(&run_quiet(&mut command, "nbdinfo")?)?;
    let dirty = map.iter().filter(|extent| extent["type"] == 1);
    let range = |extent: &Value| Some((extent["offset"].as_u64()?, extent["length"].as_u64()?));
    let ranges: Vec<(u64, u64)> = dirty.filter_map(range).collect();
    let bytes: u64 = ranges.iter().map(|(_, length)| length).sum();
    println!(
        "{} ranges have changed: {} of {} KiB",
        ranges.len(),
        bytes >> 10,
        SIZE >> 10
    );
    ensure!(bytes > 0 && bytes < SIZE, "that tells nothing");
    Ok(ranges)
}

/// Has the image take what it reads of its backing file, which is the export: that, and nothing else, is the increment.
fn pull(backups: &Backups<'_>, increment: &str, ranges: &[(u64, u64)]) -> Result<()> {
    let mut command = backups.command("qemu-io");
    command.args(["-C", "-f", "qcow2"]);
    for (offset, length) in ranges {
        command.args(["-c", &format!("read {offset} {length}")]);
    }
    let (offset, length) = ranges[0];
    println!("backup$ qemu-io -C -f qcow2 -c 'read {offset} {length}' -c … {increment}");
    let said = run_quiet(command.arg(increment), "qemu-io")?;
    let read = said.lines().filter(|line| line.starts_with("read ")).count();
    ensure!(
        read == ranges.len(),
        "qemu-io read {read} of {} ranges: {said}",
        ranges.len()
    );
    Ok(())
}

/// Where the backups are.
struct Backups<'a>(&'a Path);

impl Backups<'_> {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(tools::program(program));
        command.current_dir(self.0);
        command
    }
}

/// Runs a program, shows it as one types it, and what it prints.
fn run_told(command: &mut Command) -> Result<()> {
    println!("{}", shown(command));
    let program = command.get_program().to_string_lossy().into_owned();
    print!("{}", run_quiet(command, &program)?);
    Ok(())
}

/// A command as one types it.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let quoted = |word: &std::ffi::OsStr| {
        let word = word.to_string_lossy();
        if word.contains(['?', ' ']) {
            format!("'{word}'")
        } else {
            word.into_owned()
        }
    };
    let words: Vec<String> = [program]
        .into_iter()
        .chain(command.get_args())
        .map(quoted)
        .collect();
    format!("backup$ {}", words.join(" "))
}

/// A host: its state directory, and the command there.
struct Host {
    name: &'static str,
    disksnap: PathBuf,
    dir: tempfile::TempDir,
}

impl Host {
    fn new(name: &'static str, disksnap: &Path) -> Result<Self> {
        Ok(Self {
            name,
            disksnap: disksnap.to_owned(),
            dir: tempfile::Builder::new().prefix(name).tempdir()?,
        })
    }

    /// Makes the machine known by its document, in which its name and UUID are those that it keeps.
    fn define(&self, machine: &Qemu) -> Result<()> {
        let document = machine.domain_xml().replace(machine.name(), "web1");
        let document = document.replace(&machine.uuid().to_string(), UUID);
        fs::write(self.dir.path().join("web1.xml"), document)?;
        self.disksnap(&["domain", "define", "web1.xml"]).map(drop)
    }

    fn dump(&self) -> Result<()> {
        println!(
            "{}$ disksnap checkpoint dump -d web1 --format json > {SET}",
            self.name
        );
        let set = self.disksnap_quiet(&["checkpoint", "dump", "-d", "web1", "--format", "json"])?;
        fs::write(self.dir.path().join(SET), set)?;
        Ok(())
    }

    /// Exports one disk of a snapshot, with what has changed since a checkpoint; its address.
    fn export(&self, snapshot: &str, target: &str, since: Option<&str>) -> Result<String> {
        let mut words = vec!["export", "start", "-d", "web1", snapshot, "--disk", target];
        words.extend(since.into_iter().flat_map(|since| ["--checkpoint", since]));
        println!("{}$ disksnap {}", self.name, words.join(" "));
        let told = self.disksnap_quiet(&[&words[..], &["--output", "json"]].concat())?;
        let told: Value = serde_json::from_str(&told)?;
        let uri = told["exports"][0]["uri"].as_str();
        Ok(uri.context("the export has no address")?.to_owned())
    }

    /// Shows the command, and what it prints.
    fn disksnap(&self, words: &[&str]) -> Result<()> {
        println!("{}$ disksnap {}", self.name, words.join(" "));
        print!("{}", self.disksnap_quiet(words)?);
        Ok(())
    }

    /// Shows the command, and of what it prints the line that begins so.
    fn disksnap_last(&self, words: &[&str], begin: &str) -> Result<()> {
        println!("{}$ disksnap {}", self.name, words.join(" "));
        let told = self.disksnap_quiet(words)?;
        let Some(line) = told.lines().find(|line| line.starts_with(begin)) else {
            bail!("{words:?} tells no {begin}: {told}")
        };
        println!("…\n{line}\n…");
        Ok(())
    }

    fn disksnap_quiet(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.disksnap);
        let state: OsString = self.dir.path().join("state").into();
        command.arg("--state-dir").arg(state).args(words);
        run_quiet(command.current_dir(self.dir.path()), "disksnap")
    }
}
