//! `./x demo`: the main job end to end on a real QEMU, told step by step.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, pattern, tools};

use crate::demo_stage::{Stage, build, run_quiet, run_shown, step};

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    let demo = Demo { stage: start()? };
    demo.look()?;
    let name = demo.take()?;
    let first = demo.export_and_copy(&name)?;
    demo.prove_it_stands_still(&name, &first)?;
    demo.prove_it_is_the_disk()?;
    demo.tidy_up(&name)?;
    println!("\nAll of it worked, on a real QEMU whose guest wrote all along.");
    Ok(())
}

struct Demo {
    stage: Stage,
}

/// The guest's disks: a raw one and a qcow2 one that it writes to without pause, and one with ext4.
const WRITTEN: [&str; 2] = ["vda", "vdb"];
const FILES: &str = "vdc";
const SIZE: u64 = 64 * MIB;

fn start() -> Result<Stage> {
    let disksnap = build()?;
    step(
        "Start a real QEMU: a Linux guest that writes to two disks without pause, and files to an ext4 on a third",
    );
    let machine = Qemu::builder()
        .disk(DiskSpec::new(WRITTEN[0], SIZE))
        .disk(DiskSpec::new(WRITTEN[1], SIZE).qcow2())
        .disk(DiskSpec::new(FILES, SIZE).qcow2())
        .guest(GuestSetup::new().writer(&WRITTEN).file_system("ext4", FILES))
        .start();
    machine.wait_writer(5);
    machine.wait_files(1);
    drop(machine.agent());
    println!(
        "the guest is up and has written {} rounds; its agent answers",
        machine.writer_rounds()
    );
    Stage::new(disksnap, machine)
}

impl Demo {
    fn look(&self) -> Result<()> {
        step("Ask what a snapshot would do");
        self.stage.disksnap(&["plan"])?;
        Ok(())
    }

    fn take(&self) -> Result<String> {
        step(
            "Take a snapshot of all three disks at one instant, the guest's file systems frozen around it, from XML",
        );
        let request = self.stage.path("request.xml");
        let xml = "<domainblocksnapshot>\n  <name>nightly</name>\n  <snapshot disk='vda'/>\n  <snapshot disk='vdb'/>\n  \
                   <snapshot disk='vdc'/>\n</domainblocksnapshot>\n";
        std::fs::write(&request, xml)?;
        print!("{xml}");
        self.stage.disksnap(&[
            "snapshot".as_ref(),
            "create".as_ref(),
            "--quiesce".as_ref(),
            "require".as_ref(),
            "--xml".as_ref(),
            request.as_os_str(),
        ])?;
        Ok("nightly".to_owned())
    }

    /// Copies all disks of the snapshot with nbdcopy; returns their digests.
    fn export_and_copy(&self, name: &str) -> Result<Vec<String>> {
        step("Export it over NBD, see it in the domain's active XML, and copy it with nbdcopy");
        self.stage.disksnap(&["export", "start", name])?;
        let active = self.stage.disksnap_quiet(&["domain", "show"])?;
        let begin = active
            .find("<blockexport")
            .context("the active XML has no <blockexport>")?;
        let end = active
            .find("</blockexport>")
            .context("the active XML has no end of <blockexport>")?;
        println!(
            "$ disksnap -d vm.xml domain show   # in <devices>:\n    {}</blockexport>",
            &active[begin..end]
        );
        let before = self.stage.machine.writer_rounds();
        let digests = self.copy_all(name, "first")?;
        println!(
            "meanwhile the guest wrote {} more rounds",
            self.stage.machine.writer_rounds() - before
        );
        Ok(digests)
    }

    fn prove_it_stands_still(&self, name: &str, first: &[String]) -> Result<()> {
        step("Let the guest write on, copy the snapshot again, and compare by SHA-256");
        self.stage.machine.wait_writer(20);
        let second = self.copy_all(name, "second")?;
        for (disk, (first, second)) in disks().zip(first.iter().zip(&second)) {
            println!("{disk}: {first}\n     {second}");
            ensure!(first == second, "the snapshot of {disk} has changed");
        }
        let round = |disk: &str| -> Result<u64> {
            let copy = std::fs::read(self.copy_path(disk, "second"))?;
            Ok(u64::from_le_bytes(copy[..8].try_into()?))
        };
        let (one, other) = (round(WRITTEN[0])?, round(WRITTEN[1])?);
        println!(
            "last round in the snapshot: {one} on vda, {other} on vdb; the guest is at {}",
            self.stage.machine.writer_rounds()
        );
        ensure!(one.abs_diff(other) <= 1, "the disks are not of one instant");
        self.check_file_system()
    }

    /// The frozen file system needs no journal replay.
    fn check_file_system(&self) -> Result<()> {
        let Some(fsck) = ["/sbin/e2fsck", "/usr/sbin/e2fsck"]
            .into_iter()
            .find(|p| Path::new(p).exists())
        else {
            println!("(e2fsck is not installed here: the ext4 on vdc is not checked)");
            return Ok(());
        };
        let copy = self.copy_path(FILES, "second");
        println!("$ e2fsck -fn vdc.raw");
        run_shown(Command::new(fsck).arg("-fn").arg(copy), "e2fsck")?;
        Ok(())
    }

    /// With the guest paused by hand, what the snapshot must be is known.
    fn prove_it_is_the_disk(&self) -> Result<()> {
        step(
            "Pause the guest by hand, take the digests of its disks, take a snapshot, let the guest go, and compare",
        );
        self.stage.disksnap(&["export", "stop", "--all"])?;
        self.stage.machine.qmp("stop", serde_json::json!({}));
        let truth: Vec<String> = disks()
            .map(|disk| self.live_digest(disk))
            .collect::<Result<_>>()?;
        self.stage.disksnap(&["snapshot", "create", "--name", "known"])?;
        self.stage.machine.qmp("cont", serde_json::json!({}));
        self.stage.machine.wait_writer(10);
        self.stage.disksnap_quiet(&["export", "start", "known"])?;
        let copied = self.copy_all("known", "known")?;
        for ((disk, truth), copied) in disks().zip(&truth).zip(&copied) {
            println!(
                "{disk}: {truth} the disk when the guest was paused\n     {copied} the snapshot, read while it writes"
            );
            ensure!(
                truth == copied,
                "the snapshot of {disk} is not the disk as it was"
            );
        }
        Ok(())
    }

    fn live_digest(&self, disk: &str) -> Result<String> {
        let copy = self.copy_path(disk, "live");
        let mut convert = Command::new(tools::program("qemu-img"));
        convert
            .args(["convert", "-U", "-O", "raw"])
            .arg(self.stage.machine.image(disk))
            .arg(&copy);
        run_quiet(&mut convert, "qemu-img")?;
        Ok(pattern::digest_file(&copy))
    }

    fn tidy_up(&self, name: &str) -> Result<()> {
        step("Delete both snapshots; nothing stays behind, and the guest goes on");
        self.stage.disksnap(&["snapshot", "list"])?;
        self.stage.disksnap(&["snapshot", "delete", name, "known"])?;
        self.stage.disksnap(&["snapshot", "list"])?;
        let nodes = self
            .stage
            .machine
            .qmp("query-named-block-nodes", serde_json::json!({"flat": true}))
            .to_string();
        ensure!(!nodes.contains("\"ds-"), "a node stayed behind in QEMU");
        let images = std::fs::read_dir(self.stage.path("state/images"))?.count();
        ensure!(images == 0, "{images} fleece images stayed behind");
        self.stage.machine.wait_writer(5);
        println!(
            "no node in QEMU, no image on disk; the guest has written {} rounds",
            self.stage.machine.writer_rounds()
        );
        Ok(())
    }

    fn copy_all(&self, name: &str, pass: &str) -> Result<Vec<String>> {
        let exports = self
            .stage
            .disksnap_quiet(&["--output", "json", "snapshot", "show", name])?;
        let exports: serde_json::Value =
            serde_json::from_str(&exports).context("snapshot show printed no JSON")?;
        let copy = |disk: &str| -> Result<String> {
            let uri = nbd_uri(&exports, disk)?;
            let to = self.copy_path(disk, pass);
            println!("$ nbdcopy '{uri}' {disk}.raw");
            run_quiet(
                Command::new(tools::program("nbdcopy")).arg(uri).arg(&to),
                "nbdcopy",
            )?;
            Ok(pattern::digest_file(&to))
        };
        disks().map(copy).collect()
    }

    fn copy_path(&self, disk: &str, pass: &str) -> PathBuf {
        self.stage.path(&format!("{disk}-{pass}.raw"))
    }
}

fn disks() -> impl Iterator<Item = &'static str> {
    WRITTEN.into_iter().chain([FILES])
}

/// The NBD address of a disk's `backupSource`.
fn nbd_uri(snapshot: &serde_json::Value, disk: &str) -> Result<String> {
    let disks = snapshot["disks"]
        .as_array()
        .context("snapshot show tells no disks")?;
    let found = disks
        .iter()
        .find(|d| d["target"] == disk)
        .with_context(|| format!("no {disk} in the snapshot"))?;
    let source = &found["backupSource"];
    let name = source["name"].as_str().context("the backup source has no name")?;
    let socket = source["hosts"][0]["socket"]
        .as_str()
        .context("the backup source has no unix socket")?;
    Ok(format!("nbd+unix:///{name}?socket={socket}"))
}
