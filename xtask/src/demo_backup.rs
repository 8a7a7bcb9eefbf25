//! `./x demo backup`: the night's tale. A guest writes; four nights' backups, one of them killed half way; all of them verified,
//! restored and compared with what was taken then; pruned; and a machine is started from the last.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, QemuBuilder, pattern, tools};
use serde_json::Value;

use crate::demo_stage::{build, step};

/// One that the guest writes blocks to without pause, and one with an ext4 that it writes files to.
const DISKS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 64 * MIB;
/// The night on which the backup is killed.
const KILLED: usize = 3;
const NIGHTS: [&str; 4] = ["Monday", "Tuesday", "Wednesday", "Thursday"];
/// How long a thing may take that takes moments.
const PATIENCE: Duration = Duration::from_mins(2);

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    let disksnap = build()?;
    step("A Linux guest writes blocks to one disk and files to an ext4 on another, without pause");
    let tale = Tale::new(disksnap)?;
    let mut points = Vec::new();
    for (n, night) in NIGHTS.into_iter().enumerate() {
        step(&format!(
            "{night} night: {}, while the guest writes; meanwhile somebody else copies the same snapshot",
            if n == 0 {
                "all of both disks"
            } else {
                "what has changed"
            }
        ));
        let taken = if n == KILLED {
            tale.killed_night()?
        } else {
            tale.night()?
        };
        points.push(tale.point(taken)?);
        tale.machine.wait_writer(40);
        tale.machine.wait_files(20);
    }
    step("What is there");
    tale.disksnap(&["backup", "list", "--repo", "backups"])?;
    tale.disksnap(&["backup", "show", "--repo", "backups"])?;
    step(
        "Every byte of every image is read back and compared with the digests that were taken of the snapshots",
    );
    tale.disksnap(&["backup", "verify", "--repo", "backups"])?;
    step("Each point is restored, and compared with what somebody else copied then");
    for point in &points {
        tale.restore_and_compare(point)?;
    }
    step("An instant look at Tuesday, without restoring it");
    tale.look(&points[1])?;
    step("Two nights are enough: the older increments are merged, and Wednesday becomes a full backup");
    tale.disksnap(&["backup", "prune", "--repo", "backups", "--keep-last", "2"])?;
    tale.disksnap(&["backup", "list", "--repo", "backups"])?;
    tale.disksnap(&["backup", "verify", "--repo", "backups"])?;
    for point in &points[2..] {
        tale.restore_and_compare(point)?;
    }
    step("Disaster: the machine is gone, with its disks. It is restored, and started");
    tale.start_again(&points[3])?;
    println!(
        "\nEvery point is what was on the disks at its instant, to the byte, and a machine runs from it."
    );
    Ok(())
}

struct Tale {
    disksnap: PathBuf,
    machine: Qemu,
    dir: tempfile::TempDir,
}

/// What somebody else copied of a snapshot: a digest per disk.
type Taken = Vec<String>;

struct Point {
    name: String,
    taken: Taken,
}

impl Tale {
    fn new(disksnap: PathBuf) -> Result<Self> {
        let builder = DISKS.iter().fold(Qemu::builder(), |builder, target| {
            builder.disk(DiskSpec::new(target, SIZE).qcow2())
        });
        let guest = GuestSetup::new()
            .writer(&DISKS[..1])
            .file_system("ext4", DISKS[1]);
        let machine = builder.guest(guest).start();
        machine.wait_writer(20);
        machine.wait_files(5);
        let dir = tempfile::tempdir()?;
        let document = machine.domain_xml().replace(machine.name(), "web1");
        fs::write(dir.path().join("vm.xml"), document)?;
        println!(
            "it has written {} rounds of blocks and {} files",
            machine.writer_rounds(),
            machine.file_rounds()
        );
        Ok(Self {
            disksnap,
            machine,
            dir,
        })
    }

    /// A night that ends well.
    fn night(&self) -> Result<Taken> {
        let words = backup("2M");
        println!("$ disksnap {}", words.join(" "));
        let running = self.spawn(&words)?;
        let taken = self.copy_snapshot()?;
        print!("{}", self.ended_well(running)?);
        Ok(taken)
    }

    fn ended_well(&self, child: Child) -> Result<String> {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let said = fs::read_to_string(self.path("said"))?;
            bail!("the backup failed ({}): {said}", output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A night on which the backup is killed, and begun again.
    fn killed_night(&self) -> Result<Taken> {
        let words = backup("512K");
        println!("$ disksnap {} &", words.join(" "));
        let mut running = self.spawn(&words)?;
        let taken = self.copy_snapshot()?;
        ensure!(
            running.try_wait()?.is_none(),
            "the backup was too quick to be killed"
        );
        println!("$ kill -KILL {}", running.id());
        running.kill()?;
        running.wait()?;
        self.disksnap(&["backup", "list", "--repo", "backups"])?;
        step("The guest writes on; then the same command again: it goes on with the same snapshot");
        self.machine.wait_writer(40);
        let words = backup("64M");
        self.disksnap(&words)?;
        Ok(taken)
    }

    /// While a backup pulls, copies the snapshot that it pulls with another program, and digests that.
    fn copy_snapshot(&self) -> Result<Taken> {
        // QEMU 10.0 stands still where one of its nodes is looked at just while a reader connects to it.
        wait_for("word of a pull", || {
            let said = fs::read_to_string(self.path("said"))?;
            Ok(said.contains("begun").then_some(()))
        })?;
        let name = wait_for("a snapshot", || {
            let listed = self.json(&["snapshot", "list"])?;
            Ok(listed["snapshots"][0]["name"].as_str().map(str::to_owned))
        })?;
        let served = self.json(&["export", "start", &name])?;
        let mut taken = Vec::new();
        for (n, target) in DISKS.iter().enumerate() {
            let uri = served["exports"][n]["uri"]
                .as_str()
                .context("the export has no address")?;
            taken.push(self.copied(uri)?);
            println!("  meanwhile, nbdcopy of {target}: SHA-256 {}…", &taken[n][..16]);
        }
        // Not all: the backup reads by an export of its own.
        self.quiet(&["-d", "vm.xml", "export", "stop", &name])?;
        Ok(taken)
    }

    /// The digest of what an export serves, as nbdcopy gets it.
    fn copied(&self, uri: &str) -> Result<String> {
        let copy = self.path("copy.raw");
        let _ = fs::remove_file(&copy);
        let mut nbdcopy = Command::new(tools::program("nbdcopy"));
        output_of(nbdcopy.arg(uri).arg(&copy))?;
        Ok(pattern::digest_file(&copy))
    }

    /// The latest point, of which this was taken.
    fn point(&self, taken: Taken) -> Result<Point> {
        let shown = self.json(&["backup", "show", "--repo", "backups"])?;
        let name = shown["point"]
            .as_str()
            .context("the point has no name")?
            .to_owned();
        Ok(Point { name, taken })
    }

    fn restore_and_compare(&self, point: &Point) -> Result<()> {
        let _ = fs::remove_dir_all(self.path("restored"));
        let words = [
            "backup",
            "restore",
            "--repo",
            "backups",
            &point.name,
            "--to",
            "restored",
            "--format",
            "raw",
        ];
        println!("$ disksnap {}", words.join(" "));
        self.quiet(&words)?;
        for (target, taken) in DISKS.iter().zip(&point.taken) {
            let restored = pattern::digest_file(&self.path(&format!("restored/{target}.raw")));
            ensure!(
                restored == *taken,
                "{target} of {} is not what was taken",
                point.name
            );
            println!("  {target}: SHA-256 {}…, as was taken then", &restored[..16]);
        }
        Ok(())
    }

    fn look(&self, point: &Point) -> Result<()> {
        let words = ["backup", "serve", "--repo", "backups", &point.name];
        println!("$ disksnap {} &", words.join(" "));
        let mut server = self.spawn(&words)?;
        let stdout = server.stdout.take().context("the server has no output")?;
        let mut uris = Vec::new();
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            uris.extend(
                line.split_whitespace()
                    .last()
                    .filter(|word| word.contains("://"))
                    .map(str::to_owned),
            );
            if uris.len() == DISKS.len() {
                break;
            }
        }
        for ((target, uri), taken) in DISKS.iter().zip(&uris).zip(&point.taken) {
            ensure!(
                self.copied(uri)? == *taken,
                "what is served of {target} is not what was taken"
            );
            println!("  {target}: nbdcopy of it gives what was taken then");
        }
        ensure!(uris.len() == DISKS.len(), "it serves {} disks", uris.len());
        println!("$ kill -KILL {}", server.id());
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// The machine's end, and a new one from its backup.
    fn start_again(self, point: &Point) -> Result<()> {
        let restored = self.path("new");
        self.disksnap(&[
            "backup",
            "restore",
            "--repo",
            "backups",
            &point.name,
            "--to",
            "new",
        ])?;
        let round = first_number(&self.path("restored/vda.raw"))?;
        self.machine.kill9();
        let disks = DISKS.map(|target| {
            DiskSpec::new(target, SIZE)
                .qcow2()
                .image(&restored.join(format!("{target}.qcow2")))
        });
        let builder = disks.into_iter().fold(Qemu::builder(), QemuBuilder::disk);
        let machine = builder.guest(GuestSetup::new()).start();
        machine.wait_serial("the end of the boot", |text| {
            text.contains("GUEST: ready").then_some(())
        });
        machine.run_in_guest(LOOK);
        let told = machine.wait_serial("what the guest sees", |text| {
            text.contains("LOOKED").then(|| {
                let lines = text
                    .lines()
                    .skip_while(|line| !line.contains("vda: "))
                    .map(str::trim_end);
                lines.collect::<Vec<_>>().join("\n")
            })
        });
        println!("on its console:\n{told}");
        ensure!(
            told.contains(&format!("round {round}")),
            "the round is not {round}, as in the backup"
        );
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.disksnap);
        command
            .arg("--state-dir")
            .arg(self.path("state"))
            .args(words)
            .current_dir(self.dir.path())
            .env("DISKSNAP_STORAGE_DAEMON", tools::program("qemu-storage-daemon"));
        command
    }

    fn spawn(&self, words: &[&str]) -> Result<Child> {
        let mut command = self.command(words);
        // How far it is, in lines of JSON; of one that fails, why.
        let said = fs::File::create(self.path("said"))?;
        command.stdout(Stdio::piped()).stderr(said);
        command.spawn().context("cannot run disksnap")
    }

    /// Shows the command, and what it prints.
    fn disksnap(&self, words: &[&str]) -> Result<()> {
        println!("$ disksnap {}", words.join(" "));
        print!("{}", self.quiet(words)?);
        Ok(())
    }

    fn quiet(&self, words: &[&str]) -> Result<String> {
        output_of(&mut self.command(words))
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let words = [&["-d", "vm.xml", "--output", "json"], words].concat();
        Ok(serde_json::from_str(&self.quiet(&words)?)?)
    }
}

fn wait_for<T>(what: &str, look: impl Fn() -> Result<Option<T>>) -> Result<T> {
    let since = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(since.elapsed() < PATIENCE, "there is no {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The nightly command, slow enough that somebody can look at its snapshot.
fn backup(rate: &str) -> [&str; 9] {
    [
        "-d",
        "vm.xml",
        "backup",
        "create",
        "--repo",
        "backups",
        "--quiesce=require",
        "--rate-limit",
        rate,
    ]
}

/// What the restored guest is asked: the round of blocks that it had come to, the newest of its files, and whether ext4 is sound.
const LOOK: &str = "exec >/dev/console 2>&1; echo \"vda: round $(od -An -tu8 -N8 /dev/vda | tr -d ' ')\"; \
     mount -t ext4 /dev/vdb /mnt && echo \"vdb: $(ls /mnt | grep -c file-) files, the newest by round $(cat /mnt/file-* | sort -n | tail -1 | tr -d ' ')\"; \
     echo LOOKED";

/// The number at the beginning of a disk: the writer's round.
fn first_number(raw: &Path) -> Result<u64> {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut fs::File::open(raw)?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run a program")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
