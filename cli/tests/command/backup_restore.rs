//! `disksnap backup restore`: every place that a disk can be restored to, and what stands against it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use disksnap_test_support::{DiskSpec, MIB, Qemu, QemuBuilder, pattern};
use insta::assert_snapshot;

use crate::backups::Night;
use crate::programs::program;
use crate::site::arg;

const SIZE: u64 = 8 * MIB;

/// A paused machine, two points, and what its disk held then.
struct Restoring {
    night: Night,
    points: Vec<String>,
    then: Vec<Vec<u8>>,
}

impl Restoring {
    fn new() -> Self {
        let disks = [DiskSpec::new("vda", SIZE).qcow2(), DiskSpec::new("vdb", MIB)];
        let builder = disks
            .into_iter()
            .fold(Qemu::builder().prelaunch(), QemuBuilder::disk);
        let night = Night::new(builder);
        let (mut points, mut then) = (Vec::new(), Vec::new());
        for n in 0..2 {
            let disk = night.machine.disk("vda");
            disk.write(n * MIB, &pattern::bytes(n + 1, 3 << 20));
            disk.zero(0, n * MIB / 2);
            then.push(night.now("vda"));
            let point = night.json(&["create"]);
            points.push(point["point"].as_str().unwrap().to_owned());
        }
        // What is there now is to be restored over.
        night.machine.disk("vda").write(0, &pattern::bytes(9, 8 << 20));
        night.machine.disk("vdb").write(0, &pattern::bytes(9, 1 << 20));
        Self { night, points, then }
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        [&["backup", "restore", "--repo", &self.night.repo], words].concat()
    }

    fn ok(&self, words: &[&str]) -> String {
        self.night.site.ok(&self.words(words))
    }

    fn fails(&self, code: i32, words: &[&str]) -> String {
        let told = self.night.site.fails(code, &self.words(words));
        // Progress is told as lines of JSON where there is no terminal.
        let lines = told.lines().filter(|line| !line.starts_with('{'));
        self.short(&lines.collect::<Vec<_>>().join("\n"))
    }

    /// Without what is another name in each run.
    fn short(&self, text: &str) -> String {
        let text = text.replace(self.night.machine.name(), "DOMAIN");
        // The later ones first: of two in one second the second's name goes on where the first's ends.
        let points = self.points.iter().rev();
        points.fold(text, |text, point| text.replace(point.as_str(), "POINT"))
    }

    fn path(&self, name: &str) -> String {
        arg(&self.night.site.path(name))
    }

    fn reads_as(&self, image: &str, format: &str, n: usize) {
        let raw = self.path("converted");
        program("qemu-img", &["convert", "-f", format, "-O", "raw", image, &raw]);
        assert!(
            std::fs::read(raw).unwrap() == self.then[n],
            "{image} is not as at point {n}"
        );
    }
}

#[test]
fn every_place() {
    let restoring = Restoring::new();
    let [first, last] = [&restoring.points[0], &restoring.points[1]];
    for (n, point) in [(0, first), (1, last)] {
        let out = restoring.path(&format!("out-{n}"));
        restoring.ok(&[point, "--to", &out]);
        restoring.reads_as(&format!("{out}/vda.qcow2"), "qcow2", n);
        let names: Vec<String> = crate::site::list(Path::new(&out))
            .iter()
            .map(|path| arg(path))
            .collect();
        let expected = ["domain.xml", "vda.qcow2", "vdb.qcow2"].map(|name| format!("{out}/{name}"));
        assert_eq!(names, expected);
    }
    for (name, format, more) in [
        ("a.qcow2", "qcow2", "--compress=zstd:5"),
        ("b.raw", "raw", "--preallocate"),
        ("c.img", "raw", "--overwrite"),
        ("d", "qcow2", "--format=qcow2"),
    ] {
        let (path, disk) = (restoring.path(name), format!("vda={}", restoring.path(name)));
        let done = restoring
            .night
            .site
            .json(&restoring.words(&["latest", "--disk", &disk, more]));
        restoring.reads_as(&path, format, 1);
        assert_eq!(done["disks"][0]["place"], path.as_str(), "{done:#}");
        assert_eq!(done["disks"][0]["bytes"], SIZE);
        assert_eq!(done["point"], last.as_str());
    }
    assert_snapshot!(
        restoring.fails(4, &["--disk", &format!("vda={}", restoring.path("a.qcow2"))]),
        @"
    error: restore: there is something of that name already (path SITE/a.qcow2, disk vda, point POINT)
      effect: nothing was changed
      next: Choose another name, or remove it first; no file is ever overwritten.
    "
    );
}

#[test]
fn into_the_paused_domain() {
    let restoring = Restoring::new();
    let xml = &restoring.night.xml;
    let [first, last] = [&restoring.points[0], &restoring.points[1]];
    let done = restoring.ok(&[first, "--into", xml, "--disk", "vda"]);
    assert_snapshot!(restoring.short(&done), @"
    restored DOMAIN as it was at POINT
    DISK  SIZE   DATA   PLACE
    vda   8 MiB  3 MiB  the domain DOMAIN
    the guest is paused
    ");
    assert!(restoring.night.now("vda") == restoring.then[0]);
    assert_eq!(restoring.night.machine.status(), "prelaunch");
    let kept = restoring.night.now("vdb");
    assert!(kept == pattern::bytes(9, 1 << 20));
    // The next backup is an increment, and knows what was restored.
    let point = restoring.night.json(&["create"]);
    assert_eq!(crate::backups::level(&point, 0), "incremental", "{point:#}");
    assert!(restoring.night.read(&point, "vda") == restoring.then[0]);
    let done = restoring
        .night
        .site
        .json(&restoring.words(&[last, "--into", xml, "--resume"]));
    assert_eq!(done["resumed"], true, "{done:#}");
    assert_eq!(restoring.night.machine.status(), "running");
    assert!(restoring.night.now("vda") == restoring.then[1]);
    assert_snapshot!(restoring.fails(6, &[first, "--into", xml]), @"
    error: fill start: the guest runs, and uses its disks (domain DOMAIN, point POINT)
      effect: nothing was changed
      next: Pause it first: better before it has run at all (`virsh start --paused`, QEMU's -S).
    ");
}

#[test]
fn what_cannot_be_meant_is_told() {
    let restoring = Restoring::new();
    let out = restoring.path("out");
    let xml = restoring.night.xml.clone();
    let nameless = format!("vda={}", restoring.path("nameless"));
    let cases: [&[&str]; 8] = [
        &["--disk", "vda"],
        &["--disk", &nameless],
        &["--to", &out, "--disk", "vda=/x.raw"],
        &["--to", &out, "--preallocate"],
        &["--to", &out, "--format", "raw", "--compress"],
        &["--into", &xml, "--format", "raw"],
        &["--disk", "vda=x.raw", "--disk", "vda=y.raw"],
        &["--disk", "vda=/x.raw", "--disk", "vdb=/x.raw"],
    ];
    let told: Vec<String> = cases.iter().map(|words| restoring.fails(2, words)).collect();
    assert_snapshot!(told.join("\n--\n"), @"
    error: nothing says where the disk 'vda' is to be
      effect: nothing was changed
      next: Say --disk TARGET=PLACE: a new file, a block device or an NBD URI; or --to DIRECTORY, or --into DOMAIN.
    --
    error: the name SITE/nameless does not say in what format it is to be
      effect: nothing was changed
      next: Say --format, or let it end in .qcow2, .raw or .img.
    --
    error: the disk 'vda' is given the place /x.raw, and a place for all of them is given too
      effect: nothing was changed
      next: Say --disk TARGET alone with --to and --into.
    --
    error: qcow2 images are restored thin
      effect: nothing was changed
      next: Ask for --format raw with --preallocate.
    --
    error: raw images cannot be compressed
      effect: nothing was changed
      next: Ask for --format qcow2 with --compress.
    --
    error: a domain's disks stay in the format that they have
      effect: nothing was changed
      next: Leave out --format, --compress and --preallocate.
    --
    error: restore: the disk 'vda' is to be restored twice (point POINT)
      effect: nothing was changed
      next: Correct that and try again.
    --
    error: restore: two disks are to be restored to /x.raw (point POINT)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    for (code, words) in [
        (3, ["--disk", "vdz=x.raw"]),
        (3, ["20200101", "--disk=vda=x.raw"]),
        (4, ["--disk", "vda=http://x"]),
        (2, ["--overwrite", "--disk=vda=http://x"]),
    ] {
        restoring.fails(code, &words);
    }
    assert!(!Path::new(&out).exists());
    for usage in [
        &[] as &[&str],
        &["--to", &out, "--into", &xml],
        &["--disk", "vda=x", "--resume"],
    ] {
        restoring.fails(2, usage);
    }
}

#[test]
fn a_mistyped_device_does_not_become_a_file_in_memory() {
    let restoring = Restoring::new();
    for words in [
        ["--disk", "vda=/dev/disksnap-no-such-device", "--format=raw"],
        ["--disk", "vda=/dev/disksnap-no-group/lv.qcow2", "--overwrite"],
        ["--to", "/dev/disksnap-no-directory", "--format=raw"],
    ] {
        let told = restoring.fails(3, &words);
        assert!(told.contains("there is no device of that name"), "{told}");
        assert!(told.contains("nothing was changed"), "{told}");
    }
    let made = crate::site::list(Path::new("/dev"));
    let ours = made.iter().find(|path| arg(path).contains("disksnap-no"));
    assert_eq!(ours, None);
}

#[test]
fn what_a_killed_restoration_left_goes_with_the_next() {
    let restoring = Restoring::new();
    for (format, name) in [("raw", "a.raw"), ("qcow2", "a.qcow2")] {
        let folder = restoring.night.site.path(format);
        std::fs::create_dir(&folder).unwrap();
        let unfinished = || crate::site::list(&folder).into_iter().next();
        let disk = format!("vda={}", arg(&folder.join(name)));
        let words = restoring.words(&["--disk", &disk]);
        // One that had come to its end is no loss: it is tried again.
        let left = loop {
            let mut child = restoring
                .night
                .site
                .command(&words)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            while unfinished().is_none() && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            match unfinished() {
                Some(left) if left.file_name() != Some(name.as_ref()) => break left,
                Some(done) => std::fs::remove_file(done).unwrap(),
                None => {}
            }
        };
        assert!(arg(&left).contains("/.disksnap-a."), "{}", left.display());
        restoring.ok(&["--disk", &disk]);
        assert_eq!(crate::site::list(&folder), [folder.join(name)]);
        restoring.reads_as(&arg(&folder.join(name)), format, 1);
    }
}

#[test]
fn a_guest_that_has_run_is_not_let_on_over_restored_disks() {
    let restoring = Restoring::new();
    let (machine, xml) = (&restoring.night.machine, &restoring.night.xml);
    machine.qmp("cont", serde_json::json!({}));
    machine.qmp("stop", serde_json::json!({}));
    let before = restoring.night.now("vda");
    let told = restoring.fails(13, &["--into", xml, "--resume"]);
    assert!(told.contains("the guest has run"), "{told}");
    assert_eq!(machine.status(), "paused");
    assert!(restoring.night.now("vda") == before);
    let filling = restoring.night.site.json(&["-d", xml, "fill", "list"]);
    assert_eq!(filling["filling"], serde_json::Value::Null, "{filling:#}");
    // Who resets it may have it.
    restoring.ok(&["--into", xml]);
    assert_eq!(machine.status(), "paused");
    assert!(restoring.night.now("vda") == restoring.then[1]);
}

#[test]
fn of_two_into_one_domain_one_is_told_to_wait() {
    let restoring = Restoring::new();
    let xml = &restoring.night.xml;
    let [first, last] = [&restoring.points[0], &restoring.points[1]];
    let words = restoring.words(&[first, "--into", xml]);
    let mut met = false;
    while !met {
        let mut command = restoring.night.site.command(&words);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(
            told.any(|line| line.unwrap().contains("\"begun\"")),
            "it tells that it begins"
        );
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        // It stands still in the midst of it, unless it was too quick.
        let filling = restoring.night.site.json(&["-d", xml, "fill", "list"]);
        met = filling["filling"]["state"] == "open";
        if met {
            restoring.fails(6, &[last, "--into", xml]);
        }
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        told.for_each(drop);
        assert!(child.wait().unwrap().success());
        assert!(restoring.night.now("vda") == restoring.then[0]);
    }
    restoring.ok(&[last, "--into", xml]);
    assert!(restoring.night.now("vda") == restoring.then[1]);
}
