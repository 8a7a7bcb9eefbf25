//! Part `backup`: pulling a disk into a repository, against programs that copy the same export and against reading alone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use disksnap::{DomainDocument, RemoteDisk};
use disksnap_backup::{
    CHUNK, Compression, LocalStore, RemoteExport, RemoteRequest, Repository, Silent, WantedLevel, pull,
};
use disksnap_nbd::Uri;
use disksnap_test_support::pattern::bytes;
use disksnap_test_support::{GIB, KIB, MIB, QemuVersion, tools};
use tokio::runtime::Runtime;

use crate::child::{self, OWN};
use crate::race::{Contender, Measures, Rounds, race};
use crate::report::{Table, compared, ratio};

/// `PULL REPOSITORY DOMAIN.XML URI CHECKPOINT [SINCE]`: a backup, as `disksnap backup pull` makes one.
pub(crate) const PULL: &str = "child-pull";
/// `CHANGED URI BITMAP`: reads what has changed, whole chunks, to nowhere.
pub(crate) const CHANGED: &str = "child-changed";

const ROUNDS: usize = 5;
const FULL: u64 = 2 * GIB;
/// The disk of the increments, and how far apart its changed chunks are: 1 %.
const LARGE: u64 = 16 * GIB;
const APART: u64 = 100 * CHUNK;
/// A disk for the memory alone: its pieces of data are so far apart.
const HUGE: u64 = 1 << 40;
const FAR: u64 = 64 * MIB;
/// The bitmap, and the checkpoint that it is since.
const BITMAP: &str = "since-c0";
const OURS: &str = "ours";
const NBDCOPY: &str = "nbdcopy";
const QEMU_IMG: &str = "qemu-img convert";
const READING: &str = "reading";

pub(crate) fn run(scratch: &Path) -> Result<()> {
    let dir = tempfile::tempdir_in(scratch)?;
    let place = Place(dir.path().to_owned());
    fs::write(place.at("domain.xml"), DOMAIN)?;
    let full = full(&place)?;
    let incremental = incremental(&place)?;
    let huge = huge(&place)?;
    speed(&full, &incremental);
    cost(&full, &incremental, huge);
    Ok(())
}

/// How long it takes.
fn speed(full: &Rounds, incremental: &Rounds) {
    let mut table = Table::new(
        "Backup",
        "A full backup of a 2 GiB disk, every other MiB of it data, from an export of qemu-nbd on a unix socket: image, \
         digests, manifest, all read back and durable when it ends. The others, with nothing of that, are 1: nbdcopy to a raw \
         file, `qemu-img convert` to a qcow2 one; `durable`: and fsync of that file, which nbdcopy does as it goes. Then an increment of 1 % of 16 GiB, 64 KiB \
         here and there, against reading the same bytes to nowhere.",
        &["ours against", "time", "best", "goal"],
    );
    for (name, measure, what) in [
        (NBDCOPY, "time", "full: nbdcopy"),
        (NBDCOPY, "durable", "full: nbdcopy, durable"),
        (QEMU_IMG, "time", "full: qemu-img convert"),
        (QEMU_IMG, "durable", "full: qemu-img convert, durable"),
    ] {
        row(&mut table, what, full, (name, measure), 1.0);
    }
    row(
        &mut table,
        "increment: reading",
        incremental,
        (READING, "time"),
        2.0,
    );
    table.print();
}

fn row(table: &mut Table, what: &str, rounds: &Rounds, to: (&str, &str), goal: f64) {
    let of = (OURS, "time");
    let [time, best] = compared(rounds, of, to);
    // A median within a twentieth of the goal is there, as far as these rounds can tell.
    let met = if rounds.ratio(of, to).median <= goal * 1.05 {
        "met"
    } else {
        "not met"
    };
    table.row(&[what, &time, &best, &format!("≤ {goal}: {met}")]);
}

/// What it takes of the processor and of memory.
fn cost(full: &Rounds, incremental: &Rounds, huge: f64) {
    let mut table = Table::new(
        "Backup: processor and memory",
        "The time, the processor time of the process (user and system), and the most memory that it held at once (VmHWM).",
        &["", "time, s", "processor, s", "ours = 1", "MiB, goal < 200"],
    );
    for (what, rounds, names) in [
        ("full", full, &[OURS, NBDCOPY, QEMU_IMG][..]),
        ("increment", incremental, &[OURS, READING]),
    ] {
        for name in names {
            let [time, cpu] = ["time", "cpu"].map(|what| format!("{:.2}", rounds.middle(name, what)));
            let ratio = ratio(rounds.ratio((name, "cpu"), (OURS, "cpu")));
            let memory = match rounds.middle(name, "KiB") {
                0.0 => "–".to_owned(),
                kib => format!("{:.0}", kib / 1024.0),
            };
            table.row(&[&format!("{what}: {name}"), &time, &cpu, &ratio, &memory]);
        }
    }
    table.row(&[
        "full of 1 TiB, 1 GiB of data: ours",
        "",
        "",
        "",
        &format!("{:.0}", huge / 1024.0),
    ]);
    table.print();
}

/// Full backups of a half-empty disk.
fn full(place: &Place) -> Result<Rounds> {
    let image = place.raw("half.raw", FULL, MIB, 2 * MIB)?;
    let served = Served::new(place, &["-f", "raw", &image])?;
    let (uri, raw, qcow2) = (served.uri(), place.path("copy.raw"), place.path("copy.qcow2"));
    let nbdcopy = tools::program("nbdcopy");
    let qemu_img = QemuVersion::V10_0.program("qemu-img");
    let copying = |program: &Path, words: &[&str], file: &str| {
        // Each makes it anew; whether it is there does not matter.
        let _ = fs::remove_file(file);
        let (mut measures, _) = timed(program, words)?;
        let since = Instant::now();
        File::open(file)?.sync_all()?;
        let durable = measures["time"] + since.elapsed().as_secs_f64();
        measures.insert("durable", durable);
        fs::remove_file(file)?;
        Ok(measures)
    };
    race(
        ROUNDS,
        vec![
            Contender::new(OURS, || place.pull(&place.fresh("repo")?, &uri, None)),
            Contender::new(NBDCOPY, || copying(&nbdcopy, &[&uri, &raw], &raw)),
            Contender::new(QEMU_IMG, || {
                copying(
                    &qemu_img,
                    &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow2],
                    &qcow2,
                )
            }),
        ],
    )
}

/// Increments of what changed in a large disk.
fn incremental(place: &Place) -> Result<Rounds> {
    let image = place.path("large.qcow2");
    let qemu_img = QemuVersion::V10_0.program("qemu-img");
    timed(
        &qemu_img,
        &["create", "-q", "-f", "qcow2", &image, &LARGE.to_string()],
    )?;
    let base = place.fresh("base")?;
    {
        let before = Served::new(place, &["-f", "qcow2", &image])?;
        place.pull(&base, &before.uri(), None)?;
    }
    timed(&qemu_img, &["bitmap", "--add", &image, BITMAP])?;
    let writes = (0..LARGE / APART).map(|n| format!("write -P {} {} {CHUNK}", n % 250 + 1, n * APART));
    let commands: Vec<String> = writes.flat_map(|write| ["-c".to_owned(), write]).collect();
    let words = ["-f", "qcow2", &image]
        .into_iter()
        .chain(commands.iter().map(String::as_str));
    timed(&QemuVersion::V10_0.program("qemu-io"), &words.collect::<Vec<_>>())?;
    let served = Served::new(place, &["-f", "qcow2", "-B", BITMAP, &image])?;
    let uri = served.uri();
    race(
        ROUNDS,
        vec![
            Contender::new(OURS, || {
                let repository = place.fresh("repo")?;
                copy_folder(&base, &repository)?;
                place.pull(&repository, &uri, Some("c0"))
            }),
            Contender::new(READING, || measured(&[CHANGED, &uri, BITMAP])),
        ],
    )
}

/// The memory that a full backup of a disk takes that is nearly all empty, in KiB.
fn huge(place: &Place) -> Result<f64> {
    let image = place.raw("huge.raw", HUGE, 64 * KIB, FAR)?;
    let served = Served::new(place, &["-f", "raw", &image])?;
    Ok(place.pull(&place.fresh("repo")?, &served.uri(), None)?["KiB"])
}

/// The directory of all files.
struct Place(PathBuf);

impl Place {
    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn path(&self, name: &str) -> String {
        self.at(name).display().to_string()
    }

    /// An empty directory in the place of what was there.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.at(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(path)
    }

    /// A raw image with pieces of data, so far apart.
    fn raw(&self, name: &str, size: u64, piece: u64, apart: u64) -> Result<String> {
        let file = File::create_new(self.at(name))?;
        file.set_len(size)?;
        let data = bytes(3, usize::try_from(piece)?);
        for at in (0..size).step_by(usize::try_from(apart)?) {
            file.write_all_at(&data, at)?;
        }
        file.sync_all()?;
        Ok(self.path(name))
    }

    fn pull(&self, repository: &Path, uri: &str, since: Option<&str>) -> Result<Measures> {
        let (repository, domain) = (repository.display().to_string(), self.path("domain.xml"));
        let checkpoint = if since.is_some() { "c1" } else { "c0" };
        let words = [PULL, &repository, &domain, uri, checkpoint];
        measured(&words.into_iter().chain(since).collect::<Vec<_>>())
    }
}

const DOMAIN: &str = "<domain type='qemu'><name>measured</name><uuid>7c3f9d52-0b7e-4c55-9a4a-2a1d2f0c6e12</uuid><devices>\
     <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/nowhere/vda.raw'/>\
     <target dev='vda' bus='virtio'/></disk></devices></domain>";

/// An image that qemu-nbd serves, read-only.
struct Served {
    child: Child,
    socket: PathBuf,
}

impl Served {
    fn new(place: &Place, words: &[&str]) -> Result<Self> {
        let socket = place.at("nbd.sock");
        let _ = fs::remove_file(&socket);
        let child = Command::new(QemuVersion::V10_0.program("qemu-nbd"))
            .args(["--read-only", "--persistent", "--shared=8", "--socket"])
            .arg(&socket)
            .args(words)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run qemu-nbd")?;
        let mut served = Self { child, socket };
        while UnixStream::connect(&served.socket).is_err() {
            if let Some(status) = served.child.try_wait()? {
                bail!("qemu-nbd {words:?}: {status}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(served)
    }

    fn uri(&self) -> String {
        Uri::unix(&self.socket, "").to_string()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of this program: its time, its processor time, its memory.
fn measured(words: &[&str]) -> Result<Measures> {
    let (mut measures, said) = timed(Path::new(OWN), words)?;
    measures.insert("KiB", said.trim().parse()?);
    Ok(measures)
}

/// Runs a program; its time and processor time, and what it said.
fn timed(program: &Path, words: &[&str]) -> Result<(Measures, String)> {
    let (before, since) = (childrens_time()?, Instant::now());
    let output = Command::new(program).args(words).output();
    let took = since.elapsed().as_secs_f64();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", program.display());
    let cpu = childrens_time()? - before;
    let measures = Measures::from([("time", took), ("cpu", cpu)]);
    Ok((measures, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// The processor time of all children that have ended, in seconds (`cutime` and `cstime` of proc(5), in ticks of 10 ms).
fn childrens_time() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    ensure!(fields.len() > 14, "/proc/self/stat is not as proc(5) says");
    let ticks = fields[13].parse::<f64>()? + fields[14].parse::<f64>()?;
    Ok(ticks / 100.0)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// What a child does for [`PULL`].
pub(crate) fn pull_here(
    repository: &str,
    domain: &str,
    uri: &str,
    checkpoint: &str,
    since: Option<&str>,
) -> Result<()> {
    let request = RemoteRequest {
        document: DomainDocument::parse(&fs::read_to_string(domain)?)?,
        exports: vec![RemoteExport {
            target: "vda".to_owned(),
            uri: uri.to_owned(),
            bitmap: since.map(|_| BITMAP.to_owned()),
        }],
        tls: None,
        snapshot: child::NAME.parse()?,
        taken: SystemTime::now(),
        checkpoint: Some(checkpoint.parse()?),
        since: since.map(str::parse).transpose()?,
        level: if since.is_some() {
            WantedLevel::Incremental
        } else {
            WantedLevel::Full
        },
        compression: Compression::None,
        rate_limit: None,
        resume: false,
    };
    Runtime::new()?.block_on(async {
        let store = Arc::new(LocalStore::at(repository));
        let repository = Repository::open_or_init(store).await?;
        pull(&repository, &request, &Silent).await?;
        Ok(())
    })
}

/// What a child does for [`CHANGED`].
pub(crate) fn read_changed(uri: &str, bitmap: &str) -> Result<()> {
    Runtime::new()?.block_on(async {
        let disk = RemoteDisk::connect(uri, None, Some(bitmap)).await?;
        let mut pieces = disk.changed_pieces(0..disk.size(), CHUNK, None)?;
        let mut total = 0;
        while let Some(piece) = pieces.next().await? {
            total += piece.length();
        }
        ensure!(total == LARGE / APART * CHUNK, "{total} bytes have changed");
        Ok(())
    })
}
