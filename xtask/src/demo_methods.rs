//! `./x demo methods`: four disks on four layers, each by its own method, in one call and at one instant.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use disksnap_test_support::{DiskSpec, GuestSetup, LoopFs, LoopFsKind, MIB, Qemu, loop_fs};

use crate::demo_stage::{Stage, build, step};

const DISKS: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];
const SIZE: u64 = 64 * MIB;

/// The request: each disk's method, and nothing else to know.
const REQUEST: &str = "\
<domainblocksnapshot>
  <name>mixed</name>
  <snapshot disk='vda'><fleece/></snapshot>
  <snapshot disk='vdb'><diskSnapshot method='qemu'/></snapshot>
  <snapshot disk='vdc'><diskSnapshot method='btrfs'/></snapshot>
  <snapshot disk='vdd'><diskSnapshot method='reflink'/></snapshot>
</domainblocksnapshot>
";

/// Runs the demonstration. It mounts two small file systems of its own, so it needs root.
pub(crate) fn run() -> Result<()> {
    ensure!(
        disksnap_test_support::require::lacking("btrfs").is_none(),
        "mounting a btrfs and an XFS needs root; `./x demo` needs none"
    );
    let demo = Demo::start()?;
    demo.take()?;
    demo.prove_one_instant()?;
    demo.serve()?;
    demo.delete()?;
    println!("\nFour disks, four methods, one instant; and the guest wrote all along.");
    Ok(())
}

struct Demo {
    stage: Stage,
    // Unmounted after the machine has ended.
    _file_systems: [LoopFs; 2],
}

impl Demo {
    fn start() -> Result<Self> {
        let disksnap = build()?;
        step(
            "Start a real QEMU: two qcow2 images, a raw one on btrfs and a raw one on XFS; its guest writes to all",
        );
        let btrfs = loop_fs(LoopFsKind::Btrfs, 512 * MIB, "");
        let xfs = loop_fs(LoopFsKind::Xfs, 512 * MIB, "");
        let machine = Qemu::builder()
            .disk(DiskSpec::new(DISKS[0], SIZE).qcow2())
            .disk(DiskSpec::new(DISKS[1], SIZE).qcow2())
            .disk(DiskSpec::new(DISKS[2], SIZE).image(&image(btrfs.path())?))
            .disk(DiskSpec::new(DISKS[3], SIZE).image(&image(xfs.path())?))
            .guest(GuestSetup::new().writer(&DISKS))
            .start();
        machine.wait_writer(5);
        println!(
            "the guest is up and has written {} rounds",
            machine.writer_rounds()
        );
        Ok(Self {
            stage: Stage::new(disksnap, machine)?,
            _file_systems: [btrfs, xfs],
        })
    }

    fn take(&self) -> Result<()> {
        step("Take one snapshot of all four disks, each by its own method, from XML");
        let request = self.stage.path("request.xml");
        std::fs::write(&request, REQUEST)?;
        print!("{REQUEST}");
        let path = request.to_str().context("a temporary path is no UTF-8")?;
        self.stage
            .disksnap(&["snapshot", "create", "--xml", path])
            .map(drop)
    }

    /// The guest writes the number of each round to every disk, in order.
    fn prove_one_instant(&self) -> Result<()> {
        step(
            "Let the guest write on, and read from each disk of the snapshot the number of the round it was in",
        );
        self.stage.machine.wait_writer(20);
        let mut rounds = Vec::new();
        for disk in DISKS {
            let to = self.stage.path(disk);
            let path = to.to_str().context("a temporary path is no UTF-8")?;
            self.stage
                .disksnap(&["read", "mixed", disk, "--length", "8", "--to", path])?;
            let round = u64::from_le_bytes(std::fs::read(&to)?[..].try_into()?);
            println!("{disk}: round {round}");
            rounds.push(round);
        }
        let spread = rounds[0].abs_diff(rounds[3]);
        println!(
            "at most one apart, as at any one instant; the guest is at {}",
            self.stage.machine.writer_rounds()
        );
        ensure!(
            rounds.is_sorted_by(|a, b| a >= b) && spread <= 1,
            "the disks are not of one instant: {rounds:?}"
        );
        Ok(())
    }

    fn serve(&self) -> Result<()> {
        step("Serve all four over NBD with one command");
        self.stage.disksnap(&["export", "start", "mixed"])?;
        self.stage.disksnap(&["export", "list"]).map(drop)
    }

    fn delete(&self) -> Result<()> {
        step(
            "Delete it: exports, fleece, btrfs snapshot and clone go; the overlay is merged under the running guest",
        );
        self.stage.disksnap(&["snapshot", "delete", "mixed"])?;
        self.stage.disksnap(&["snapshot", "list"])?;
        self.stage.machine.wait_writer(5);
        let nodes = self
            .stage
            .machine
            .qmp("query-named-block-nodes", serde_json::json!({ "flat": true }))
            .to_string();
        ensure!(!nodes.contains("\"ds-"), "a node stayed behind in QEMU");
        println!(
            "no node stayed behind in QEMU; the guest has written {} rounds",
            self.stage.machine.writer_rounds()
        );
        Ok(())
    }
}

/// An empty raw image on a file system.
fn image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk.raw");
    File::create(&path)?.set_len(SIZE)?;
    Ok(path)
}
