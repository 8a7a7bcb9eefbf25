//! The command where its catalog has a hard time: on a file system that is full or turns read-only, and with many
//! commands at once, on one domain and on sixty-four.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need, small_fs};
use rustix::mount::{MountFlags, mount_remount};
use serde_json::{Value, json};

use crate::site::{Ended, Site, arg, ended, list, program};

/// Runs the command over this state directory.
fn run(state: &Path, xml: &str, words: &[&str]) -> Ended {
    let mut command = Command::new(program());
    command
        .arg("--state-dir")
        .arg(state)
        .args(["-d", xml])
        .args(words);
    ended(command.output().unwrap())
}

fn ok(state: &Path, xml: &str, words: &[&str]) {
    let ended = run(state, xml, words);
    assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.stderr);
}

fn names(state: &Path, xml: &str) -> Vec<String> {
    let ended = run(state, xml, &["snapshot", "list", "--output", "json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let list: Value = serde_json::from_slice(&ended.stdout).unwrap();
    let names = list["snapshots"].as_array().unwrap().iter();
    names.map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

fn daemon() -> StorageDaemon {
    let disk = DiskSpec::new("vda", 4 * MIB).qcow2();
    StorageDaemon::builder().disk(disk).without_guest_side().start()
}

fn nodes(daemon: &StorageDaemon) -> usize {
    let nodes = daemon.qmp("query-named-block-nodes", json!({}));
    nodes.as_array().unwrap().len()
}

/// Fills a file system to the last byte.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    for size in [65536, 512, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}

#[test]
fn with_a_full_state_directory_nothing_is_begun_and_what_is_there_can_go() {
    need!("small-fs");
    let (fs, daemon) = (small_fs(24 * MIB), daemon());
    let (state, xml) = (fs.path().join("state"), arg(&daemon.domain_xml_file()));
    let without = nodes(&daemon);
    ok(&state, &xml, &["snapshot", "create", "--name", "before"]);
    let with = nodes(&daemon);
    fill(&fs.path().join("rest"));
    // A little may go on while the log has room; then it is told, and nothing is left of it.
    let mut made = vec!["before".to_owned()];
    loop {
        let name = format!("n{}", made.len());
        let ended = run(&state, &xml, &["snapshot", "create", "--name", &name]);
        if ended.code != Some(0) {
            assert_eq!(ended.code, Some(10), "{}", ended.stderr);
            break;
        }
        made.push(name);
        assert!(made.len() < 200, "the file system is not full");
    }
    assert_eq!(names(&state, &xml), made);
    assert_eq!(nodes(&daemon), without + (with - without) * made.len());
    for name in &made {
        ok(&state, &xml, &["snapshot", "delete", name]);
    }
    assert_eq!((names(&state, &xml), nodes(&daemon)), (Vec::new(), without));
    std::fs::remove_file(fs.path().join("rest")).unwrap();
    ok(&state, &xml, &["snapshot", "create", "--name", "after"]);
    ok(&state, &xml, &["snapshot", "delete", "after"]);
    assert_eq!(nodes(&daemon), without);
}

/// A domain that is off, with one small image in memory.
fn off(site: &Site, memory: &Path, name: &str) -> String {
    let image = memory.join(format!("{name}.raw"));
    std::fs::write(&image, vec![7; 4096]).unwrap();
    let text = format!(
        "<domain><name>{name}</name><devices><disk type='file'><driver type='raw'/><source file='{}'/>\
         <target dev='vda'/></disk></devices></domain>",
        image.display()
    );
    site.file(&format!("{name}.xml"), &text)
}

#[test]
fn on_a_file_system_that_turns_read_only_nothing_is_changed() {
    need!("small-fs");
    let (fs, memory, site) = (small_fs(24 * MIB), small_fs(MIB), Site::new());
    let (state, xml) = (fs.path().join("state"), off(&site, memory.path(), "off"));
    ok(
        &state,
        &xml,
        &[
            "snapshot",
            "create",
            "--name",
            "kept",
            "--disk",
            "vda,method=memory",
        ],
    );
    let with = list(memory.path());
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(fs.path(), flags | MountFlags::RDONLY, "").unwrap();
    for words in [
        &["snapshot", "create", "--name", "other"][..],
        &["snapshot", "delete", "kept"],
        &["snapshot", "list"],
        &["recover"],
    ] {
        let ended = run(&state, &xml, words);
        assert_eq!(ended.code, Some(7), "{words:?}: {}", ended.stderr);
        assert!(
            ended.stderr.contains("mounted for writing"),
            "{words:?}: {}",
            ended.stderr
        );
    }
    assert_eq!(list(memory.path()), with);
    mount_remount(fs.path(), flags, "").unwrap();
    assert_eq!(names(&state, &xml), ["kept"]);
    ok(&state, &xml, &["snapshot", "delete", "kept"]);
    assert_eq!(list(memory.path()).len(), 1);
}

fn start(site: &Site, words: &[&str]) -> Child {
    let mut command = site.command(words);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn all_well(children: Vec<Child>) {
    for child in children {
        let ended = ended(child.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[test]
fn commands_on_one_domain_at_once_take_turns() {
    let (site, daemon) = (Site::new(), daemon());
    let xml = arg(&daemon.domain_xml_file());
    let without = nodes(&daemon);
    let wanted: Vec<String> = (0..8).map(|n| format!("n{n}")).collect();
    let each = |verb: &str, flag: &[&str]| {
        let start = |name: &String| {
            start(
                &site,
                &[&["-d", &xml, "snapshot", verb][..], flag, &[name]].concat(),
            )
        };
        all_well(wanted.iter().map(start).collect());
    };
    each("create", &["--name"]);
    let mut there = names(&site.state(), &xml);
    there.sort();
    assert_eq!(there, wanted);
    // Twice each: one of the two finds that there is nothing left to do.
    let twice = |name: &String| [0, 1].map(|_| start(&site, &["-d", &xml, "snapshot", "delete", name]));
    all_well(wanted.iter().flat_map(twice).collect());
    assert_eq!(
        (names(&site.state(), &xml), nodes(&daemon)),
        (Vec::new(), without)
    );
}

#[test]
fn one_name_is_given_once_however_many_ask() {
    let (site, daemon) = (Site::new(), daemon());
    let xml = arg(&daemon.domain_xml_file());
    let asked = (0..6).map(|_| start(&site, &["-d", &xml, "snapshot", "create", "--name", "one"]));
    let asked: Vec<Child> = asked.collect();
    let mut codes: Vec<_> = asked
        .into_iter()
        .map(|child| child.wait_with_output().unwrap().status.code())
        .collect();
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(4), Some(4), Some(4), Some(4), Some(4)]);
    assert_eq!(names(&site.state(), &xml), ["one"]);
}

/// Domains that are off, each with a small image: the catalog is what they share.
#[test]
fn sixty_four_domains_are_worked_on_at_once() {
    need!("small-fs");
    let (site, memory) = (Site::new(), small_fs(8 * MIB));
    let all: Vec<String> = (0..64)
        .map(|n| off(&site, memory.path(), &format!("d{n}")))
        .collect();
    let create = |xml: &String| {
        let disk = ["--disk", "vda,method=memory", "--name", "one"];
        start(&site, &[&["-d", xml, "snapshot", "create"][..], &disk].concat())
    };
    all_well(all.iter().map(create).collect());
    for xml in &all {
        assert_eq!(names(&site.state(), xml), ["one"]);
    }
    let delete = |xml: &String| start(&site, &["-d", xml, "snapshot", "delete", "one"]);
    all_well(all.iter().map(delete).collect());
    assert_eq!(site.json(&["recover"]), json!({ "recovered": [] }));
    assert_eq!(list(memory.path()).len(), 64);
}
