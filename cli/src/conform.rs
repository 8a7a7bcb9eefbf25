//! `disksnap conform`: a method's provider against the conformance suite.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use disksnap::{Capability, DiskSnapshot, Error, ErrorKind};
use disksnap_conformance::{CaseResult, Fixture, Outcome as Case, RawFiles, Report, run_chosen};
use disksnap_conformance_qemu::{
    InSubvolumes, LogicalVolumes, LoopFs, LoopFsKind, OverlayFixture, OverlaysOff, Process, QemuFixture,
    QemuVersion, lacking, lacking_fs, loop_fs,
};
use serde_json::{Value, json};

use crate::args::{Conform, Form};
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::print;
use crate::signals::Stop;

/// One run of the suite: a method in one kind of place.
struct Run {
    place: String,
    /// Or why this machine cannot do it.
    fixture: Result<Arc<dyn Fixture>, String>,
}

/// Directories that are removed at the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    /// Where it fails a directory of empty directories stays behind in memory.
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) async fn run(context: &Context, wanted: Conform) -> Outcome {
    let method = disksnap::methods()?.get(&wanted.method)?.method().name;
    let method = method.as_str();
    if wanted.volume_group.is_some() && method != "lvm" {
        let what = format!("--volume-group is for the method lvm, and '{method}' makes no volumes");
        return Err(Error::new(ErrorKind::Invalid, what).into());
    }
    let (mut held, mut mounted, mut volumes) = (None, Vec::new(), Vec::new());
    let mut runs = match method {
        "memory" => memory(&held.insert(scratch()?).0),
        "qemu-fleece" => qemu_fleece(),
        "qemu-external-qcow2" => qemu_external_qcow2(),
        "btrfs" => btrfs(&mut mounted),
        "reflink" => reflink(&mut mounted),
        "lvm" => lvm(&wanted, &mut volumes)?,
        _ => return Err(no_fixture(method).into()),
    };
    if let Some(text) = &wanted.place {
        only_places(&mut runs, text)?;
    }
    // From here on something is made, which a case removes at its end.
    let stop = Stop::listen(true)?;
    let (mut reports, mut skipped) = (Vec::new(), 0);
    for Run { place, fixture } in runs {
        match fixture {
            Ok(fixture) => {
                let report = run_one(context, &wanted, &stop, (method, &place), fixture).await?;
                reports.push((place, report));
            }
            Err(why) => {
                skipped += 1;
                context.out.warn(&format!("{method}, {place}: left out, {why}"));
            }
        }
        stop.check()?;
    }
    let left: Vec<String> = volumes.iter().flat_map(|volumes| volumes.not_removed()).collect();
    if !left.is_empty() {
        let what = format!("volumes could not be removed after a case: {}", left.join("; "));
        let hint = "Remove them with `lvremove`; the names of all begin with disksnap-conform- or disksnap.";
        return Err(Error::new(ErrorKind::Busy, what).by(method).hint(hint).into());
    }
    conclude(context, method, &reports, skipped)
}

/// Runs the suite in one place. After a signal the case that runs is let to its end, and no other begins.
async fn run_one(
    context: &Context,
    wanted: &Conform,
    stop: &Stop,
    (method, place): (&str, &str),
    fixture: Arc<dyn Fixture>,
) -> Outcome<Report> {
    let text = context.out.form == Form::Text;
    if text {
        print(format!("{method}, {place}\n").as_bytes())?;
    }
    let mut printed = Ok(());
    let told = |result: &CaseResult| {
        if text && printed.is_ok() {
            printed = print(line(result).as_bytes());
        }
    };
    let named = |case: &str| wanted.case.as_ref().is_none_or(|text| case.contains(text));
    let chosen = |case: &str| named(case) && stop.heard().is_none();
    let report = run_chosen(fixture, chosen, told).await;
    printed?;
    if text {
        print(format!("{}\n\n", report.summary()).as_bytes())?;
    }
    Ok(report)
}

/// Leaves the other places out.
fn only_places(runs: &mut Vec<Run>, text: &str) -> Result<(), Error> {
    let all: Vec<String> = runs.iter().map(|run| run.place.clone()).collect();
    runs.retain(|run| run.place.contains(text));
    if !runs.is_empty() {
        return Ok(());
    }
    let what = format!("no place's name holds {text:?}");
    Err(Error::new(ErrorKind::NotFound, what).hint(format!("There are: {}.", all.join("; "))))
}

fn conclude(context: &Context, method: &str, reports: &[(String, Report)], skipped: usize) -> Outcome {
    let sum = |count: fn(&Report) -> usize| reports.iter().map(|(_, report)| count(report)).sum::<usize>();
    let (passed, failed) = (sum(Report::passed), sum(Report::failed));
    let total = format!("{passed} passed, {failed} failed");
    if context.out.form == Form::Text {
        print(format!("{total}\n").as_bytes())?;
    } else {
        let runs: Vec<Value> = reports
            .iter()
            .map(|(place, report)| json(place, report))
            .collect();
        let all =
            json!({ "method": method, "passed": passed, "failed": failed, "runs": runs, "leftOut": skipped });
        print(format!("{all:#}\n").as_bytes())?;
    }
    if !reports.is_empty() && reports.iter().all(|(_, report)| report.conforms()) {
        return Ok(());
    }
    let why = if reports.is_empty() {
        "nothing could be tried on this machine".to_owned()
    } else {
        format!("the provider does not keep its contract: {total}")
    };
    Err(Error::new(ErrorKind::Internal, why)
        .by(method)
        .hint("docs/provider-guide.md tells what each case wants of a provider.")
        .into())
}

fn line(result: &CaseResult) -> String {
    let (word, why) = match &result.outcome {
        Case::Passed => ("ok", String::new()),
        Case::NotRun => ("not run", String::new()),
        Case::Failed(why) => ("FAILED", why.replace('\n', "\n                         ")),
    };
    format!("  {:22} {word:7} {why}", result.case)
        .trim_end()
        .to_owned()
        + "\n"
}

fn json(place: &str, report: &Report) -> Value {
    let case = |result: &CaseResult| match &result.outcome {
        Case::Passed => json!({ "case": result.case, "outcome": "passed" }),
        Case::NotRun => json!({ "case": result.case, "outcome": "not-run" }),
        Case::Failed(why) => json!({ "case": result.case, "outcome": "failed", "why": why }),
    };
    let cases: Vec<Value> = report.results.iter().map(case).collect();
    json!({ "place": place, "passed": report.passed(), "failed": report.failed(), "cases": cases })
}

fn no_fixture(method: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("this command cannot make disks for the method '{method}'"),
    )
    .hint("Run the tests of the crate that brings it; docs/provider-guide.md tells how a provider brings its own fixture.")
}

/// A new instance at each call, by the registration that the method has in this program.
fn linked(method: &'static str) -> impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static {
    move || {
        let registry = disksnap::methods().unwrap_or_default();
        // It was looked up before the first case ran.
        let found = registry.get(method).map(Arc::clone);
        found.unwrap_or_else(|e| unreachable!("{e}"))
    }
}

/// Memory holds the images, in a directory of our own.
fn scratch() -> Result<Scratch, Error> {
    let dir = Path::new("/dev/shm").join(format!("disksnap-conform-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|e| Error::io(format!("cannot create {}", dir.display()), e))?;
    Ok(Scratch(dir))
}

fn memory(scratch: &Path) -> Vec<Run> {
    let capabilities = [
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::GuestSafe,
        Capability::Revert,
    ];
    let off = RawFiles::new(scratch, capabilities, linked("memory"));
    let running = QemuFixture::new(Process::Machine, capabilities, linked("memory")).raw_images_in(scratch);
    vec![
        Run {
            place: "the domain off".to_owned(),
            fixture: Ok(Arc::new(off)),
        },
        qemu_run(
            "the domain running",
            running,
            Process::Machine,
            QemuVersion::V10_0,
        ),
    ]
}

/// Every way of every QEMU that offers it, written down so that none goes missing unseen.
fn qemu_fleece() -> Vec<Run> {
    use Process::{Machine, StorageDaemon};
    use QemuVersion::{V7_2, V10_0};
    let all = [
        (Machine, V10_0, "filter"),
        (Machine, V10_0, "job"),
        (Machine, V10_0, "classic"),
        (Machine, V7_2, "classic"),
        (StorageDaemon, V10_0, "filter"),
        (StorageDaemon, V10_0, "job"),
        (StorageDaemon, V10_0, "classic"),
        (StorageDaemon, V7_2, "classic"),
    ];
    let run = |(process, version, way): (Process, QemuVersion, &str)| {
        let mut capabilities = vec![Capability::Active, Capability::Export];
        if way == "filter" {
            capabilities.push(Capability::GuestSafe);
        }
        let fixture = QemuFixture::new(process, capabilities, linked("qemu-fleece"))
            .version(version)
            .option("fleece.way", way);
        let holder = match process {
            Machine => "a machine",
            _ => "a storage daemon",
        };
        let place = format!("way {way}, {holder} of QEMU {}", version.as_str());
        qemu_run(&place, fixture, process, version)
    };
    all.into_iter().map(run).collect()
}

/// In every kind of process, on every QEMU, and with the domain off.
fn qemu_external_qcow2() -> Vec<Run> {
    use Process::{ExportedStorageDaemon, Machine};
    use QemuVersion::{V7_2, V10_0};
    let capabilities = [
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::Revert,
        Capability::Merge,
    ];
    let make = || linked("qemu-external-qcow2");
    let all = [(Machine, V10_0), (ExportedStorageDaemon, V10_0), (Machine, V7_2)];
    let run = |(process, version): (Process, QemuVersion)| {
        let fixture = QemuFixture::new(process, capabilities, make()).version(version);
        let holder = match process {
            Machine => "a machine",
            _ => "a storage daemon",
        };
        Run {
            place: format!("{holder} of QEMU {}", version.as_str()),
            fixture: match lacking(process, version) {
                None => Ok(Arc::new(OverlayFixture(fixture))),
                Some(why) => Err(why),
            },
        }
    };
    let off = Run {
        place: "the domain off".to_owned(),
        fixture: match OverlaysOff::lacking() {
            None => Ok(Arc::new(OverlaysOff::new(capabilities, make()))),
            Some(why) => Err(why),
        },
    };
    all.into_iter().map(run).chain([off]).collect()
}

/// What the methods offer that take a disk whole. Not `GuestSafe`: a guest that overwrites what is shared can run out of
/// room.
const WHOLE: [Capability; 4] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
];
/// Of btrfs also what two snapshots differ in.
const IN_SUBVOLUMES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::Revert,
    Capability::Compare,
];

/// A small file system of our own, mounted until the suite has ended.
fn mount(kind: LoopFsKind, mounted: &mut Vec<LoopFs>) -> Result<PathBuf, String> {
    if let Some(why) = lacking_fs(kind) {
        return Err(why);
    }
    mounted.push(loop_fs(kind, ROOM, ""));
    Ok(mounted.last().map(|fs| fs.path().to_owned()).unwrap_or_default())
}

/// In bytes; the image file is sparse.
const ROOM: u64 = 512 << 20;

fn running<const N: usize>(method: &'static str, offered: [Capability; N], images: &Path) -> QemuFixture {
    QemuFixture::new(Process::Machine, offered, linked(method)).raw_images_in(images)
}

fn btrfs(mounted: &mut Vec<LoopFs>) -> Vec<Run> {
    let fs = mount(LoopFsKind::Btrfs, mounted);
    let off = fs.clone().map(|fs| InSubvolumes {
        fs,
        make: Box::new(|images: &Path| RawFiles::new(images, IN_SUBVOLUMES, linked("btrfs"))),
    });
    let on = fs.map(|fs| InSubvolumes {
        fs,
        make: Box::new(|images: &Path| running("btrfs", IN_SUBVOLUMES, images)),
    });
    vec![
        Run {
            place: "the domain off".to_owned(),
            fixture: off.map(|fixture| Arc::new(fixture) as _),
        },
        Run {
            place: "the domain running".to_owned(),
            fixture: on.and_then(|fixture| in_machine(Arc::new(fixture))),
        },
    ]
}

fn reflink(mounted: &mut Vec<LoopFs>) -> Vec<Run> {
    let mut runs = Vec::new();
    for (kind, name) in [(LoopFsKind::Xfs, "XFS"), (LoopFsKind::Btrfs, "btrfs")] {
        let fs = mount(kind, mounted);
        let off = fs.clone().map(|fs| RawFiles::new(fs, WHOLE, linked("reflink")));
        runs.push(Run {
            place: format!("{name}, the domain off"),
            fixture: off.map(|fixture| Arc::new(fixture) as _),
        });
        runs.push(Run {
            place: format!("{name}, the domain running"),
            fixture: fs.and_then(|fs| in_machine(Arc::new(running("reflink", WHOLE, &fs)))),
        });
    }
    runs
}

/// On volumes of the caller's own group: there is no place that is ours on every machine.
fn lvm(wanted: &Conform, made: &mut Vec<Arc<LogicalVolumes>>) -> Result<Vec<Run>, Error> {
    let Some(group) = &wanted.volume_group else {
        return Err(Error::new(ErrorKind::Invalid, "the method lvm needs a volume group to be tried in").hint(
            "Give one with a little free space by `--volume-group VG`, and a thin pool of it by `--thin-pool POOL`; \
             small volumes are made there and removed again.",
        ));
    };
    let mut runs = Vec::new();
    let pools = std::iter::once(None).chain(wanted.thin_pool.as_deref().map(Some));
    for pool in pools {
        let mut capabilities = WHOLE.to_vec();
        capabilities.push(match pool {
            // A classic snapshot that is full breaks, and the guest goes on.
            None => Capability::GuestSafe,
            // Two thin snapshots share what neither has written.
            Some(_) => Capability::Compare,
        });
        let fixture = Arc::new(LogicalVolumes::new(group, pool, capabilities, linked("lvm"))?);
        made.push(Arc::clone(&fixture));
        runs.push(Run {
            place: match pool {
                None => "classic snapshots, the domain off".to_owned(),
                Some(_) => "thin snapshots, the domain off".to_owned(),
            },
            fixture: Ok(fixture),
        });
    }
    Ok(runs)
}

/// A fixture that needs a QEMU 10.0, where there is one.
fn in_machine(fixture: Arc<dyn Fixture>) -> Result<Arc<dyn Fixture>, String> {
    match lacking(Process::Machine, QemuVersion::V10_0) {
        None => Ok(fixture),
        Some(why) => Err(why),
    }
}

fn qemu_run(place: &str, fixture: QemuFixture, process: Process, version: QemuVersion) -> Run {
    Run {
        place: place.to_owned(),
        fixture: match lacking(process, version) {
            None => Ok(Arc::new(fixture)),
            Some(why) => Err(why),
        },
    }
}
