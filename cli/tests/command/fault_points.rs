//! The points at which a trial can end the command: they are there at every seam, each effect has both of its points, and
//! whatever the command starts knows nothing of them.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;

use disksnap_test_support::{DiskSpec, GuestSetup, LoopFsKind, MIB, Qemu, loop_fs, need};

use crate::daemons;
use crate::every_method::off;
use crate::programs::program;
use crate::site::{Site, arg, list};

/// Runs the command, and gives the points that it passes.
fn points(site: &Site, words: &[&str]) -> Vec<String> {
    let log: PathBuf = site.path("points");
    let output = site
        .command(words)
        .env("DISKSNAP_FAULT_LOG", &log)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    let points = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(log).unwrap();
    points.lines().map(str::to_owned).collect()
}

/// Each effect is passed on both of its sides.
fn are_pairs(points: &[String]) {
    let mut open: BTreeMap<&str, i32> = BTreeMap::new();
    for point in points {
        let (when, effect) = point.split_once(' ').unwrap();
        *open.entry(effect).or_default() += match when {
            "before" => 1,
            "after" => -1,
            other => i32::from(other != "amid"),
        };
    }
    open.retain(|_, left| *left != 0);
    assert!(open.is_empty(), "passed on one side: {open:?} of {points:#?}");
}

fn have(points: &[String], effects: &[&str]) {
    for effect in effects {
        let before = format!("before {effect}");
        assert!(
            points.iter().any(|point| point.starts_with(&before)),
            "no {effect} in {points:#?}"
        );
    }
}

/// Two methods that have different seams, with the guest's file systems frozen.
#[test]
fn a_create_on_a_running_guest_passes_a_point_at_every_seam() {
    need!("guest", "xfs");
    let fs = loop_fs(LoopFsKind::Xfs, 400 * MIB, "");
    let image = fs.path().join("vdb.raw");
    program("qemu-img", &["create", "-q", "-f", "raw", &arg(&image), "8M"]);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 64 * MIB))
        .disk(DiskSpec::new("vdb", 8 * MIB).image(&image))
        .guest(GuestSetup::new().file_system("ext4", "vda"))
        .start();
    qemu.wait_files(1);
    let site = Site::new();
    let domain = arg(&qemu.domain_xml_file());
    let create = [
        "-d",
        &domain,
        "snapshot",
        "create",
        "--name",
        "one",
        "--quiesce",
        "require",
        "--deadline",
        "60",
        "--disk",
        "vda,method=qemu-fleece",
        "--disk",
        "vdb,method=reflink",
    ];
    let points = points(&site, &create);
    are_pairs(&points);
    let seams = [
        "catalog write down what is to be done",
        "file make state directory",
        "file make lock",
        "file create image",
        "file fill image",
        "file create clone",
        "file write note",
        "guardian start",
        "guardian arm",
        "agent guest-fsfreeze-freeze",
        "monitor stop",
        "monitor qom-set",
        "ioctl FICLONE",
        "monitor cont",
        "agent guest-fsfreeze-thaw",
        "file remove note",
        "guardian disarm",
        "file seal clone",
        "catalog write down what was done",
    ];
    have(&points, &seams);
    site.ok(&["-d", &domain, "snapshot", "delete", "one"]);
}

/// Programs are run where no hypervisor is at hand, and a server outlives the command that starts it.
#[test]
fn programs_and_servers_have_points_and_know_nothing_of_them() {
    let site = Site::new();
    let image = site.path("vda.qcow2");
    program("qemu-img", &["create", "-q", "-f", "qcow2", &arg(&image), "8M"]);
    let domain = off(&site, &image, "qcow2");
    let create = |name| ["-d", &domain, "snapshot", "create", "--name", name];
    points(&site, &create("one"));
    let started = points(&site, &["-d", &domain, "export", "start", "one"]);
    are_pairs(&started);
    have(
        &started,
        &["server start", "file write server's", "monitor nbd-server-start"],
    );
    let [server] = daemons::of(&site.run_dir())[..] else {
        panic!("it is served by more or less than one process")
    };
    let environment = std::fs::read(format!("/proc/{server}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(environment.contains("PATH="), "{environment}");
    assert!(!environment.contains("DISKSNAP_FAULT"), "{environment}");
    have(
        &points(&site, &["-d", &domain, "export", "stop", "--all"]),
        &["monitor quit", "file remove"],
    );
    let merged = points(&site, &["-d", &domain, "snapshot", "merge", "one"]);
    are_pairs(&merged);
    have(&merged, &["program qemu-img commit"]);
    assert!(
        merged
            .iter()
            .any(|point| point.starts_with("amid program qemu-img")),
        "{merged:#?}"
    );
}

/// What lies beside the place of a file until it is whole.
fn unfinished(site: &Site) -> Vec<PathBuf> {
    let mut found = list(site.dir.path());
    found.retain(|path| arg(path).contains("/.disksnap-"));
    found
}

fn killed_at(site: &Site, point: &str, words: &[&str]) {
    let killed = site.command(words).env("DISKSNAP_FAULT", point).output().unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{words:?}: {killed:?}");
}

#[test]
fn what_a_killed_run_left_beside_a_file_goes_with_the_next() {
    let site = Site::new();
    let image = site.path("vda.qcow2");
    program("qemu-img", &["create", "-q", "-f", "qcow2", &arg(&image), "8M"]);
    let domain = off(&site, &image, "qcow2");
    let create = |name| ["-d", &domain, "snapshot", "create", "--name", name];
    killed_at(&site, "before file rename document:1", &create("one"));
    assert_eq!(unfinished(&site).len(), 1, "the new document is not whole yet");
    site.ok(&create("two"));
    assert_eq!(unfinished(&site), Vec::<PathBuf>::new());

    let copy = arg(&site.path("copy.raw"));
    let read = ["-d", &domain, "read", "one", "vda", "--to", &copy];
    killed_at(&site, "before file name new:1", &read);
    assert_eq!(
        unfinished(&site).len(),
        1,
        "the copy has its name only at the end"
    );
    site.ok(&read);
    assert_eq!(unfinished(&site), Vec::<PathBuf>::new());
    assert_eq!(std::fs::metadata(copy).unwrap().len(), 8 * MIB);
}

/// The record of the checkpoint is gone by then, and the subvolume it was kept for is not.
#[test]
fn what_was_kept_for_a_removed_checkpoint_goes_with_recover() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 300 * MIB, "");
    let folder = fs.path().join("images");
    program("btrfs", &["-q", "subvolume", "create", &arg(&folder)]);
    let image = folder.join("vda.raw");
    program("qemu-img", &["create", "-q", "-f", "raw", &arg(&image), "8M"]);
    let site = Site::new();
    let domain = off(&site, &image, "raw");
    let create = [
        "-d",
        &domain,
        "snapshot",
        "create",
        "--name",
        "one",
        "--checkpoint",
    ];
    site.ok(&[&create[..], &["--disk", "vda,method=btrfs"]].concat());
    site.ok(&["-d", &domain, "snapshot", "delete", "one"]);
    let kept = list(fs.path()).len();
    let remove = ["-d", &domain, "checkpoint", "remove", "one"];
    killed_at(&site, "before ioctl SNAP_DESTROY:1", &remove);
    assert_eq!(
        list(fs.path()).len(),
        kept,
        "it is kept until the checkpoint is no more"
    );
    let told = site.json(&["recover"]);
    assert_eq!(told["recovered"][0]["how"], "finished", "{told}");
    assert_eq!(list(fs.path()), [folder]);
    assert_eq!(site.json(&["recover"])["recovered"], serde_json::json!([]));
}
