//! The command, killed at any moment: the guest runs on, its writes are whole, and nothing stays behind.

use std::process::Stdio;
use std::time::{Duration, Instant};

use disksnap_test_support::{DiskSpec, MIB, Qemu, Writer, pattern};
use serde_json::json;

use crate::site::{Site, arg};

const TARGETS: [&str; 3] = ["vda", "vdb", "sda"];

fn machine() -> Qemu {
    Qemu::builder()
        .disk(DiskSpec::new("vda", 8 * MIB).qcow2())
        .disk(DiskSpec::new("vdb", 8 * MIB))
        .disk(DiskSpec::new("sda", 8 * MIB).qcow2().scsi())
        .start()
}

/// Starts the command and kills it after `delay`; whether it was still at work.
pub(crate) fn kill_after(site: &Site, delay: Duration, arguments: &[&str]) -> bool {
    let mut child = site
        .command(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(delay);
    let ended = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    ended.is_none()
}

/// The guest runs, at the latest once the guardian has acted.
pub(crate) fn wait_running(qemu: &Qemu) {
    let since = Instant::now();
    while qemu.status() != "running" {
        assert!(
            since.elapsed() < Duration::from_mins(2),
            "the guest stays {}",
            qemu.status()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What there is of ours in QEMU and in the state directory.
pub(crate) fn leftovers(site: &Site, qemu: &Qemu) -> Vec<String> {
    let mut left: Vec<String> = site
        .images()
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let ask = [
        ("query-named-block-nodes", "node-name"),
        ("query-jobs", "id"),
        ("query-block-exports", "id"),
    ];
    for (command, key) in ask {
        let answer = qemu.qmp(command, json!({}));
        let names = answer
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|item| item[key].as_str());
        left.extend(names.filter(|name| name.starts_with("ds-")).map(str::to_owned));
    }
    left
}

/// How long the command takes when nobody kills it, so that the kills fall into it and not behind it.
fn duration_of(run: impl FnOnce()) -> Duration {
    let since = Instant::now();
    run();
    since.elapsed()
}

#[test]
fn a_create_killed_at_any_moment_leaves_a_running_guest_and_the_next_one_works() {
    let (qemu, site) = (machine(), Site::new());
    let domain = arg(&qemu.domain_xml_file());
    let create = |name: &str| site.ok(&["-d", &domain, "snapshot", "create", "--name", name]);
    let delete = |name: &str| site.ok(&["-d", &domain, "snapshot", "delete", name]);
    let whole = duration_of(|| drop(create("first")));
    delete("first");
    let writer = Writer::start(TARGETS.map(|target| qemu.disk(target)).to_vec(), 8 * MIB, 11);
    let (rounds, mut killed) = (24, 0);
    for round in 0..rounds {
        let delay = whole * round / rounds;
        killed += u32::from(kill_after(
            &site,
            delay,
            &["-d", &domain, "snapshot", "create", "--name", "killed"],
        ));
        wait_running(&qemu);
        writer.wait(2);
        site.ok(&["recover"]);
        if round % 3 == 0 {
            site.ok(&["recover"]);
        }
        // It may have come to its end before the kill; then it is there, and whole.
        let there = site.json(&["-d", &domain, "snapshot", "list"]);
        for snapshot in there["snapshots"].as_array().unwrap() {
            assert_eq!(
                (&snapshot["name"], &snapshot["state"]),
                (&json!("killed"), &json!("active"))
            );
            delete("killed");
        }
        assert_eq!(
            leftovers(&site, &qemu),
            Vec::<String>::new(),
            "killed after {delay:?}"
        );
        create("next");
        delete("next");
        writer.wait(2);
    }
    assert!(
        killed > rounds / 2,
        "only {killed} of {rounds} were killed at work: the test proves little"
    );
    writer.stop();
    assert_eq!(leftovers(&site, &qemu), Vec::<String>::new());
}

/// How often the guest has been paused so far.
fn stops(qemu: &Qemu) -> usize {
    qemu.monitor()
        .events()
        .iter()
        .filter(|event| *event == "STOP")
        .count()
}

/// Inside the window the guest stands still, and QEMU may be busy with a command of the killed one, whose answer it
/// then gives to the guardian.
#[test]
fn a_create_killed_while_the_guest_is_paused_leaves_it_running() {
    let (qemu, site) = (machine(), Site::new());
    let domain = arg(&qemu.domain_xml_file());
    let (rounds, mut paused) = (60, 0);
    for _ in 0..rounds {
        let before = stops(&qemu);
        let mut create = site.command(&["-d", &domain, "snapshot", "create", "--name", "killed"]);
        let mut child = create
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while child.try_wait().unwrap().is_none() {
            qemu.qmp("query-version", json!({}));
            if stops(&qemu) > before {
                paused += 1;
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        wait_running(&qemu);
        site.ok(&["recover"]);
        // A create that got through before the kill is there, and whole.
        let there = site.json(&["-d", &domain, "snapshot", "list"]);
        if there["snapshots"] != json!([]) {
            site.ok(&["-d", &domain, "snapshot", "delete", "killed"]);
        }
        assert_eq!(leftovers(&site, &qemu), Vec::<String>::new());
    }
    assert!(
        paused > rounds / 2,
        "only {paused} of {rounds} were killed in the window: the test proves little"
    );
}

#[test]
fn a_delete_killed_at_any_moment_is_finished_by_the_next_command() {
    let (qemu, site) = (machine(), Site::new());
    let domain = arg(&qemu.domain_xml_file());
    let create = || site.ok(&["-d", &domain, "snapshot", "create", "--name", "one"]);
    create();
    site.ok(&["-d", &domain, "export", "start", "one"]);
    let whole = duration_of(|| drop(site.ok(&["-d", &domain, "snapshot", "delete", "one"])));
    let rounds = 16;
    for round in 0..rounds {
        create();
        site.ok(&["-d", &domain, "export", "start", "one"]);
        qemu.disk("vda").fill(0, MIB, 7);
        kill_after(
            &site,
            whole * round / rounds,
            &["-d", &domain, "snapshot", "delete", "one"],
        );
        wait_running(&qemu);
        qemu.disk("vda").fill(MIB, MIB, 8);
        site.ok(&["recover"]);
        site.ok(&["-d", &domain, "snapshot", "delete", "one"]);
        assert_eq!(leftovers(&site, &qemu), Vec::<String>::new());
        let content = qemu.disk("vda").read(0, 2 * MIB);
        let expected = [vec![7; content.len() / 2], vec![8; content.len() / 2]].concat();
        assert_eq!(
            pattern::digest(&content),
            pattern::digest(&expected),
            "the guest's writes are whole"
        );
    }
}

#[test]
fn a_killed_reader_takes_its_export_with_it() {
    let (qemu, site) = (machine(), Site::new());
    let domain = arg(&qemu.domain_xml_file());
    site.ok(&["-d", &domain, "snapshot", "create", "--name", "one"]);
    let to = arg(&site.path("copy.raw"));
    let read = ["-d", &domain, "read", "one", "vda", "--to", &to];
    let whole = duration_of(|| drop(site.ok(&read)));
    std::fs::remove_file(&to).unwrap();
    for round in 0..8 {
        kill_after(&site, whole * round / 8, &read);
        site.ok(&["recover"]);
        assert_eq!(
            qemu.qmp("query-block-exports", json!({})),
            json!([]),
            "round {round}"
        );
        let _ = std::fs::remove_file(&to);
        site.ok(&read);
        std::fs::remove_file(&to).unwrap();
    }
    site.ok(&["-d", &domain, "snapshot", "delete", "one"]);
    assert_eq!(leftovers(&site, &qemu), Vec::<String>::new());
}

/// Between a commit's end and its finalization the guest's disk stands still: there the guardian lets it go.
#[test]
fn a_merge_killed_at_any_moment_leaves_a_running_guest_and_can_be_taken_up_again() {
    let (qemu, site) = (machine(), Site::new());
    let xml = arg(&qemu.domain_xml_file());
    let run = |words: &[&str]| site.json(&[&["-d", &xml][..], words].concat());
    let create = || {
        let disks = ["--disk", "vda,method=qemu", "--disk", "vdb,method=qemu"];
        run(&[&["snapshot", "create", "--name", "one"][..], &disks].concat());
    };
    let before = std::fs::read_to_string(&xml).unwrap();
    create();
    let whole = duration_of(|| drop(run(&["snapshot", "merge", "one"])));
    let writer = Writer::start(["vda", "vdb"].map(|t| qemu.disk(t)).to_vec(), 8 * MIB, 5);
    let (rounds, mut killed) = (16, 0);
    for round in 0..rounds {
        create();
        writer.wait(2);
        let merge = ["-d", &xml, "snapshot", "merge", "one"];
        killed += u32::from(kill_after(&site, whole * round / rounds, &merge));
        // A guest whose disk stood still for ever would end the writer.
        writer.wait(2);
        if round % 2 == 0 {
            site.ok(&["recover"]);
            writer.wait(2);
        }
        run(&["domain", "update"]);
        let there = run(&["snapshot", "list"]);
        if there["snapshots"] != json!([]) {
            run(&["snapshot", "merge", "one"]);
        }
        assert_eq!(std::fs::read_to_string(&xml).unwrap(), before, "round {round}");
        let nodes = qemu.qmp("query-named-block-nodes", json!({ "flat": true }));
        assert!(!nodes.to_string().contains("\"dsx-"), "round {round}: {nodes:#}");
        assert_eq!(qemu.qmp("query-jobs", json!({})), json!([]), "round {round}");
    }
    assert!(
        killed > rounds / 2,
        "only {killed} of {rounds} were killed at work: the test proves little"
    );
    writer.stop();
    assert_eq!(qemu.status(), "running");
}

/// A stream writes to nothing but the overlay, and there nothing that can be seen: the snapshot is good at any moment.
#[test]
fn a_merge_into_the_overlay_killed_at_any_moment_leaves_the_snapshot_good() {
    let (qemu, site) = (machine(), Site::new());
    let xml = arg(&qemu.domain_xml_file());
    let run = |words: &[&str]| site.json(&[&["-d", &xml][..], words].concat());
    let create = || {
        let disks = ["--disk", "vda,method=qemu", "--disk", "vdb,method=qemu"];
        run(&[&["snapshot", "create", "--name", "one"][..], &disks].concat());
    };
    let free = ["snapshot", "merge", "--into", "overlay", "one"];
    create();
    let whole = duration_of(|| drop(run(&free)));
    run(&["snapshot", "delete", "one"]);
    let writer = Writer::start(["vda", "vdb"].map(|t| qemu.disk(t)).to_vec(), 8 * MIB, 5);
    let (rounds, mut killed) = (8, 0);
    for round in 0..rounds {
        create();
        writer.wait(2);
        let kept = ["vda", "vdb"].map(|disk| read_whole(&site, &xml, disk));
        let killable = [&["-d", &xml][..], &free].concat();
        killed += u32::from(kill_after(&site, whole * round / rounds, &killable));
        writer.wait(2);
        if round % 2 == 0 {
            site.ok(&["recover"]);
        }
        run(&["domain", "update"]);
        run(&free);
        assert_eq!(
            ["vda", "vdb"].map(|disk| read_whole(&site, &xml, disk)),
            kept,
            "round {round}"
        );
        run(&["snapshot", "delete", "one"]);
        assert_eq!(qemu.qmp("query-jobs", json!({})), json!([]), "round {round}");
    }
    assert!(
        killed > rounds / 2,
        "only {killed} of {rounds} were killed at work: the test proves little"
    );
    writer.stop();
    // The first images are their owner's; of the later ones there is the disk's, and no other.
    let files = std::fs::read_dir(qemu.dir()).unwrap();
    let images = files.filter(|f| {
        f.as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with("vd")
    });
    assert_eq!(images.count(), 4);
    let nodes = qemu.qmp("query-named-block-nodes", json!({ "flat": true }));
    let nodes: Vec<&str> = nodes
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|n| n["file"].as_str())
        .collect();
    // A file and a format each, of the disk that was left alone too.
    assert_eq!(nodes.len(), 6, "{nodes:#?}");
    assert_eq!(qemu.status(), "running");
}

/// A snapshot's disk as the command reads it.
fn read_whole(site: &Site, domain: &str, disk: &str) -> Vec<u8> {
    let to = site.path("whole.raw");
    site.ok(&["-d", domain, "read", "one", disk, "--to", &arg(&to)]);
    let bytes = std::fs::read(&to).unwrap();
    std::fs::remove_file(to).unwrap();
    bytes
}

/// What a merge takes out of a chain is closed by the hypervisor that has opened it by itself, as it has all below the image that it was
/// started on. Also whoever comes after a kill knows that it was merged.
#[test]
fn a_merge_below_an_image_that_the_hypervisor_was_started_on_is_finished_after_a_kill() {
    let vda = DiskSpec::new("vda", 8 * MIB).qcow2();
    let (qemu, site) = (Qemu::builder().disk(vda).start(), Site::new());
    let xml = arg(&qemu.domain_xml_file());
    let run = |words: &[&str]| site.json(&[&["-d", &xml][..], words].concat());
    let delete = ["snapshot", "delete", "under"];
    let log = site.path("points");
    let mut points: Vec<Option<String>> = vec![None];
    let mut at = 0;
    while at < points.len() {
        let point = points[at].clone();
        for (name, byte) in [("under", 1), ("one", 2)] {
            qemu.disk("vda").fill(0, MIB, byte);
            let method = ["--disk", "vda,method=qemu"];
            run(&[&["snapshot", "create", "--name", name], &method[..]].concat());
        }
        qemu.disk("vda").fill(0, MIB, 3);
        let kept = read_whole(&site, &xml, "vda");
        qemu.quit();
        let document = std::fs::read_to_string(&xml).unwrap();
        let top = document.split("<source file='").nth(1).unwrap();
        let top = top.split('\'').next().unwrap();
        assert_ne!(qemu.image("vda").to_str(), Some(top));
        qemu.restart_on(&[("vda", top.as_ref())]);
        let mut command = site.command(&[&["-d", &xml][..], &delete].concat());
        match &point {
            None => command.env("DISKSNAP_FAULT_LOG", &log),
            Some(point) => command.env("DISKSNAP_FAULT", point),
        };
        let ended = crate::site::ended(command.output().unwrap());
        if let Some(point) = &point {
            assert_eq!(ended.code, None, "not killed {point}: {}", ended.stderr);
            run(&["recover"]);
            if run(&["snapshot", "list"])["snapshots"].as_array().unwrap().len() > 1 {
                run(&delete);
            }
        } else {
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            let passed = std::fs::read_to_string(&log).unwrap();
            points.extend(about_the_end_of_the_job(&passed).into_iter().map(Some));
            assert!(points.len() > 8, "{points:?}");
        }
        run(&["domain", "update"]);
        assert!(read_whole(&site, &xml, "vda") == kept, "{point:?}");
        run(&["snapshot", "delete", "one"]);
        assert_eq!(qemu.qmp("query-jobs", json!({})), json!([]), "{point:?}");
        let left: Vec<_> = std::fs::read_dir(qemu.dir()).unwrap().collect();
        let images = left.iter().filter(|file| {
            let name = file.as_ref().unwrap().file_name();
            name.to_string_lossy().contains("vda")
        });
        assert_eq!(images.count(), 1, "{point:?}: {left:?}");
        at += 1;
    }
}

/// The points of a run from when its job is told to end until the overlay is removed, each with how many times it was passed by then.
fn about_the_end_of_the_job(passed: &str) -> Vec<String> {
    let lines: Vec<&str> = passed.lines().collect();
    let numbered = lines.iter().enumerate().map(|(at, line)| {
        let before = lines[..at].iter().filter(|other| *other == line).count();
        format!("{line}:{}", before + 1)
    });
    numbered
        .skip_while(|point| !point.contains("job-finalize"))
        .take_while(|point| point != "before file remove:2")
        .collect()
}
