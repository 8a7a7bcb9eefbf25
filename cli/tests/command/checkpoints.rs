//! Sets of checkpoints, in and out of the command: no disk is needed for the records.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::site::{Ended, Site, ended};

const VM: &str = "5768a388-c1c4-414c-ac4e-eab216ba7c0c";
const ROOT: &str = "0b5f8a3a-70ad-4b55-8e4e-6a6bb53f55a1";
const DATA: &str = "8a7ad2ae-0b8e-4d5c-9d6c-63b5b4ad2a11";

/// Where a domain that is off is known.
struct Known {
    site: Site,
    xml: String,
}

impl Known {
    fn new() -> Self {
        let site = Site::new();
        let text = format!(
            "<domain type='kvm'><name>web1</name><uuid>{VM}</uuid><devices>\
             <disk type='file'><driver type='qcow2'/><source file='/srv/a.qcow2'/><target dev='vda'/><serial>{ROOT}</serial></disk>\
             <disk type='file'><driver type='qcow2'/><source file='/rhev/images/{DATA}/b'/><target dev='vdb'/></disk>\
             </devices></domain>"
        );
        let xml = site.file("web1.xml", &text);
        Self { site, xml }
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let given = [&["checkpoint"], arguments, &["-d", &self.xml]].concat();
        self.site.ok(&given)
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.ok(&["list", "--output", "json"])).unwrap()
    }

    /// It is refused with this code, and what was known before is known still.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let before = self.json();
        let given = [&["checkpoint"], arguments, &["-d", &self.xml]].concat();
        let text = self.site.fails(code, &given);
        assert_eq!(self.json(), before, "{arguments:?} changed what was known");
        text
    }

    /// Redefines this text, which is refused.
    fn refuses(&self, name: &str, text: &str) -> String {
        let file = self.site.file(name, text);
        self.fails(2, &["redefine", &file])
    }

    fn define(&self, set: &Value) {
        let file = self.site.file("set.json", &set.to_string());
        self.ok(&["redefine", &file, "--replace"]);
    }
}

fn uuid(n: u32) -> String {
    format!("c0ffee00-0000-4000-8000-{n:012}")
}

/// The n-th minute of the test's own time.
fn checkpoint(name: &str, parent: Option<&str>, n: u32, targets: &[&str]) -> Value {
    let disks: Vec<Value> = targets
        .iter()
        .map(|target| json!({ "target": target, "size": 1 << 30, "bitmap": name }))
        .collect();
    let mut checkpoint =
        json!({ "name": name, "created": format!("2026-11-22T04:{n:02}:00.25Z"), "disks": disks });
    if let Some(parent) = parent {
        checkpoint["parent"] = parent.into();
    }
    checkpoint
}

fn line() -> Value {
    json!({ "checkpoints": [
        checkpoint(&uuid(1), None, 1, &["vda"]),
        checkpoint(&uuid(2), Some(&uuid(1)), 2, &["vda", "vdb"]),
        checkpoint(&uuid(3), Some(&uuid(2)), 3, &["vda", "vdb"]),
    ] })
}

#[test]
fn a_set_is_listed_in_every_form() {
    let known = Known::new();
    assert_eq!(known.ok(&["list"]), "The domain has no checkpoints.\n");
    assert_eq!(known.json(), json!({ "checkpoints": [] }));
    known.define(&json!({ "checkpoints": [
        checkpoint("mon", None, 1, &["vda", "vdb"]),
        checkpoint("tue", Some("mon"), 2, &["vda"]),
        checkpoint("try1", Some("tue"), 5, &["vda"]),
        checkpoint("try2", Some("try1"), 6, &["vda"]),
        checkpoint("wed", Some("tue"), 7, &["vda"]),
        checkpoint("thu", Some("wed"), 3, &["vda", "vdb"]),
        checkpoint("fri", Some("thu"), 8, &["vda"]),
        checkpoint("new", None, 4, &[]),
    ] }));
    assert_snapshot!(known.ok(&["list"]), @"
    NAME  PARENT  TAKEN                 DISKS
    mon   -       2026-11-22T04:01:00Z  vda, vdb
    tue   mon     2026-11-22T04:02:00Z  vda
    thu   wed     2026-11-22T04:03:00Z  vda, vdb
    new   -       2026-11-22T04:04:00Z
    try1  tue     2026-11-22T04:05:00Z  vda
    try2  try1    2026-11-22T04:06:00Z  vda
    wed   tue     2026-11-22T04:07:00Z  vda
    fri   thu     2026-11-22T04:08:00Z  vda
    ");
    assert_snapshot!(known.ok(&["list", "--topological"]), @"
    NAME  PARENT  TAKEN                 DISKS
    mon   -       2026-11-22T04:01:00Z  vda, vdb
    tue   mon     2026-11-22T04:02:00Z  vda
    new   -       2026-11-22T04:04:00Z
    try1  tue     2026-11-22T04:05:00Z  vda
    try2  try1    2026-11-22T04:06:00Z  vda
    wed   tue     2026-11-22T04:07:00Z  vda
    thu   wed     2026-11-22T04:03:00Z  vda, vdb
    fri   thu     2026-11-22T04:08:00Z  vda
    ");
    assert_snapshot!(known.ok(&["list", "--tree"]), @"
    NAME     PARENT  TAKEN                 DISKS
    mon      -       2026-11-22T04:01:00Z  vda, vdb
    tue      mon     2026-11-22T04:02:00Z  vda
    ├─ try1  tue     2026-11-22T04:05:00Z  vda
    │  try2  try1    2026-11-22T04:06:00Z  vda
    wed      tue     2026-11-22T04:07:00Z  vda
    thu      wed     2026-11-22T04:03:00Z  vda, vdb
    fri      thu     2026-11-22T04:08:00Z  vda
    new      -       2026-11-22T04:04:00Z
    ");
    let xml = known.ok(&["list", "--output", "xml"]);
    assert!(
        xml.starts_with("<domaincheckpoints>\n  <domaincheckpoint>\n    <name>mon</name>"),
        "{xml}"
    );
    let text = known.site.fails(
        2,
        &["checkpoint", "list", "--tree", "--topological", "-d", &known.xml],
    );
    assert!(text.contains("cannot be used with"), "{text}");
}

#[test]
fn a_set_moves_to_another_host_in_every_form() {
    let from = Known::new();
    from.define(&line());
    for (format, lacks) in [
        ("json", &[][..]),
        ("xml", &["fraction"][..]),
        ("ovirt-json", &["size"][..]),
    ] {
        let set = from.ok(&["dump", "--format", format]);
        assert!(!set.contains("<domain>") && !set.contains("web1"), "{set}");
        let to = Known::new();
        let file = to.site.file("set", &set);
        for (expected, how) in [
            ("added 3, replaced 0, kept 0", "first"),
            ("added 0, replaced 0, kept 3", "second"),
        ] {
            let said = to.ok(&["redefine", &file, "--format", format]);
            assert_eq!(said, format!("{expected}, forgotten 0\n"), "{format}, {how}");
        }
        assert_eq!(to.json() == from.json(), lacks.is_empty(), "{format}");
        assert_eq!(
            to.json()["checkpoints"][2]["parent"],
            from.json()["checkpoints"][2]["parent"]
        );
        assert_eq!(to.ok(&["dump", "--format", format]), set, "{format}");
        // What a form cannot tell is not lost where it is known.
        let before = from.json();
        let said = from.ok(&["redefine", &from.site.file("set", &set), "--format", format]);
        assert!(said.contains("forgotten 0"), "{said}");
        for (old, new) in before["checkpoints"]
            .as_array()
            .unwrap()
            .iter()
            .zip(from.json()["checkpoints"].as_array().unwrap())
        {
            assert_eq!(
                (&old["created"], &old["disks"][0]["size"]),
                (&new["created"], &new["disks"][0]["size"])
            );
        }
        from.define(&line());
    }
}

#[test]
fn ovirts_tables_come_as_csv_and_standard_input() {
    let from = Known::new();
    from.define(&line());
    let csv = ["dump", "--format", "ovirt-csv", "--table"];
    let checkpoints = from.ok(&[&csv[..], &["checkpoints"]].concat());
    let disks = from.ok(&[&csv[..], &["disks"]].concat());
    assert_snapshot!(checkpoints, @"
    checkpoint_id,parent,vm_id,creation_date
    c0ffee00-0000-4000-8000-000000000001,,5768a388-c1c4-414c-ac4e-eab216ba7c0c,2026-11-22T04:01:00.25Z
    c0ffee00-0000-4000-8000-000000000002,c0ffee00-0000-4000-8000-000000000001,5768a388-c1c4-414c-ac4e-eab216ba7c0c,2026-11-22T04:02:00.25Z
    c0ffee00-0000-4000-8000-000000000003,c0ffee00-0000-4000-8000-000000000002,5768a388-c1c4-414c-ac4e-eab216ba7c0c,2026-11-22T04:03:00.25Z
    ");
    assert_snapshot!(disks, @"
    disk_id,checkpoint_id
    0b5f8a3a-70ad-4b55-8e4e-6a6bb53f55a1,c0ffee00-0000-4000-8000-000000000001
    0b5f8a3a-70ad-4b55-8e4e-6a6bb53f55a1,c0ffee00-0000-4000-8000-000000000002
    8a7ad2ae-0b8e-4d5c-9d6c-63b5b4ad2a11,c0ffee00-0000-4000-8000-000000000002
    0b5f8a3a-70ad-4b55-8e4e-6a6bb53f55a1,c0ffee00-0000-4000-8000-000000000003
    8a7ad2ae-0b8e-4d5c-9d6c-63b5b4ad2a11,c0ffee00-0000-4000-8000-000000000003
    ");
    let to = Known::new();
    let (table, map) = (to.site.file("a.csv", &checkpoints), to.site.file("b.csv", &disks));
    let redefine = ["redefine", &table, "--format", "ovirt-csv", "--disk-map", &map];
    assert_eq!(to.ok(&redefine), "added 3, replaced 0, kept 0, forgotten 0\n");
    assert_eq!(
        from.ok(&[&csv[..], &["disks"]].concat()),
        to.ok(&[&csv[..], &["disks"]].concat())
    );
    assert_eq!(to.json()["checkpoints"][1]["disks"][1]["id"], DATA);
    let text = to.fails(2, &["redefine", &table, "--format", "ovirt-csv"]);
    assert!(text.contains("--disk-map"), "{text}");
    let text = to.fails(2, &["dump", "--format", "ovirt-csv"]);
    assert!(text.contains("--table"), "{text}");

    let mut command = to.site.command(&["checkpoint", "redefine", "-", "-d", &to.xml]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let set = from.ok(&["dump"]);
    child.stdin.take().unwrap().write_all(set.as_bytes()).unwrap();
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let said = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(
        said, "added 0, replaced 3, kept 0, forgotten 0\n",
        "the sizes had not been known"
    );
}

#[test]
fn a_domain_with_checkpoints_is_undefined_once_they_are_forgotten() {
    let known = Known::new();
    known.site.ok(&["domain", "define", &known.xml]);
    known.define(&line());
    let refused = known.site.fails(6, &["domain", "undefine", "web1"]);
    assert_snapshot!(refused, @"
    error: the domain has 3 checkpoints and was left as it is (domain web1)
      effect: nothing was changed
      next: `disksnap checkpoint dump` writes them down for another host; `disksnap checkpoint forget --all` then forgets them here. The disks keep their bitmaps.
    ");
    let said = known.ok(&["forget", "--all"]);
    assert_eq!(said, "forgot 3 checkpoints; the disks keep their bitmaps\n");
    assert_eq!(known.ok(&["forget", "--all"]), "The domain has no checkpoints.\n");
    known.site.ok(&["domain", "undefine", "web1"]);
}

#[test]
fn sets_that_are_not_sound_name_the_offender() {
    let known = Known::new();
    known.define(&line());
    let set = |checkpoints: &[Value]| json!({ "checkpoints": checkpoints }).to_string();
    let (a, b) = (
        checkpoint("a", Some("b"), 1, &["vda"]),
        checkpoint("b", Some("a"), 2, &["vda"]),
    );
    assert_snapshot!(known.refuses("cycle.json", &set(&[a.clone(), b.clone()])), @"
    error: redefine: the set of checkpoints is not sound: 'a': it comes from itself, by way of b (checkpoint a, domain web1)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(known.refuses("parent.json", &set(&[b])), @"
    error: redefine: the set of checkpoints is not sound: 'b': its parent 'a' is not in the set (checkpoint b, domain web1)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let roots = ["a", "b"].map(|name| checkpoint(name, None, 1, &["vda"]));
    assert_snapshot!(known.refuses("roots.json", &set(&roots)), @"
    error: redefine: the set of checkpoints is not sound: 'b': the disk vda begins at 'a' too, and neither comes from the other (checkpoint b, domain web1)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(known.refuses("name.json", &set(&[checkpoint("a/b", None, 1, &[])])), @r#"
    error: the checkpoint name "a/b" has '/' (line 1, column 77, document SITE/name.json)
      effect: nothing was changed
      next: Correct that and try again.
    "#);
    assert_snapshot!(known.refuses("line.json", &set(&[checkpoint("a\nb", None, 1, &[])])), @r#"
    error: the checkpoint name "a\nb" has '\n' (line 1, column 78, document SITE/line.json)
      effect: nothing was changed
      next: Correct that and try again.
    "#);
    assert_snapshot!(known.refuses("line.xml", "<domaincheckpoint>\n  <name>a\nb</name>\n  <creationTime>1</creationTime>\n</domaincheckpoint>"), @r#"
    error: the checkpoint name "a\nb" has '\n' (line 2, column 3, element name, document SITE/line.xml)
      effect: nothing was changed
      next: Names of checkpoints have letters, digits, '_', '-' and '.', do not start with '.', and have at most 1023 bytes.
    "#);
}

/// The same faults in libvirt's form; the set in between stays, as a dump tells it.
#[test]
fn the_same_in_xml_names_the_offender_too() {
    let known = Known::new();
    known.define(&line());
    let before = known.ok(&["dump"]);
    let one = |name: &str, parent: &str| {
        let parent = match parent {
            "" => String::new(),
            parent => format!("<parent><name>{parent}</name></parent>"),
        };
        format!(
            "<domaincheckpoint><name>{name}</name>{parent}<creationTime>1</creationTime><disks>\
             <disk name='vda' checkpoint='bitmap' bitmap='{name}'/></disks></domaincheckpoint>"
        )
    };
    let set = |all: &[String]| format!("<domaincheckpoints>{}</domaincheckpoints>", all.concat());
    for (told, text) in [
        ("'a': it comes from itself", set(&[one("a", "b"), one("b", "a")])),
        ("'a': it is its own parent", set(&[one("a", "a")])),
        (
            "'b': its parent 'x' is not in the set",
            set(&[one("a", ""), one("b", "x")]),
        ),
        (
            "'b': the disk vda begins at 'a' too",
            set(&[one("a", ""), one("b", "")]),
        ),
        ("the checkpoint name \"a/b\" has '/'", set(&[one("a/b", "")])),
        ("the checkpoint name \"a\\nb\" has '\\n'", set(&[one("a\nb", "")])),
    ] {
        let refused = known.refuses("set.xml", &text);
        assert!(refused.contains(told), "{told}: {refused}");
        assert!(refused.contains("effect: nothing was changed"), "{refused}");
    }
    assert_eq!(known.ok(&["dump"]), before);
}

/// A set as long as may be: refused for what is wrong with it, in memory that is a small multiple of its length.
#[test]
fn a_long_set_takes_no_more_memory_than_its_length_allows() {
    let known = Known::new();
    let piece = "<domaincheckpoint><name>a</name><creationTime>1</creationTime></domaincheckpoint>\n";
    let many = piece.repeat((60 << 20) / piece.len());
    for (what, text) in [
        (
            "the same checkpoint",
            format!("<domaincheckpoints>{many}</domaincheckpoints>"),
        ),
        ("depth", "<a>".repeat(20 << 20)),
        (
            "a name",
            format!("<domaincheckpoint><name>{}", "a".repeat(60 << 20)),
        ),
    ] {
        let file = known.site.file("long.xml", &text);
        let (ended, most) = watched(
            known
                .site
                .command(&["checkpoint", "redefine", &file, "-d", &known.xml]),
        );
        assert_eq!(ended.code, Some(2), "{what}: {}", ended.stderr);
        assert!(ended.stderr.len() < 2000, "{what} is repeated in the error");
        assert!(most < 1 << 20, "{what}: {most} KiB");
    }
    assert_eq!(known.json(), json!({ "checkpoints": [] }));
}

/// Runs it; how it ended, and the most memory that was seen of it, in KiB.
fn watched(mut command: Command) -> (Ended, u64) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let told = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = told.and_then(|told| told.split_whitespace().next()?.parse().ok());
        most = most.max(kib.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(1));
    }
    (ended(child.wait_with_output().unwrap()), most)
}

#[test]
fn files_that_are_no_set_name_the_place() {
    let known = Known::new();
    known.define(&line());
    let whole = known.ok(&["dump", "--format", "json"]);
    assert_snapshot!(known.refuses("half.json", &whole[..whole.len() / 2]), @"
    error: the document ends in the middle (line 24, column 7, document SITE/half.json)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(known.refuses("field.json", &whole.replace("\"created\"", "\"made\"")), @"
    error: unknown field `made`, expected one of `name`, `parent`, `created`, `description`, `disks` (line 5, column 13, document SITE/field.json)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let xml = known.ok(&["dump"]);
    assert_snapshot!(known.refuses("half.xml", &xml[..xml.len() / 2]), @"
    error: expected one root element, and nothing else beside it (line 17, column 7, element disks, document SITE/half.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(known.refuses("none.txt", "checkpoint_id,parent\n"), @"
    error: the set is neither XML nor JSON (document SITE/none.txt)
      effect: nothing was changed
      next: Say its form: --format xml, json, ovirt-json or ovirt-csv.
    ");
    assert_snapshot!(known.refuses("empty.txt", ""), @"
    error: the set is neither XML nor JSON (document SITE/empty.txt)
      effect: nothing was changed
      next: Say its form: --format xml, json, ovirt-json or ovirt-csv.
    ");
    let table = known.ok(&["dump", "--format", "ovirt-csv", "--table", "checkpoints"]);
    let map = known.ok(&["dump", "--format", "ovirt-csv", "--table", "disks"]);
    let csv = |checkpoints: &str, disks: &str| {
        let (table, map) = (
            known.site.file("t.csv", checkpoints),
            known.site.file("m.csv", disks),
        );
        known.fails(
            2,
            &["redefine", "--format", "ovirt-csv", &table, "--disk-map", &map],
        )
    };
    assert_snapshot!(csv(&table[..table.len() - 60], &map), @"
    error: the record has 3 fields: expected 4, as many as the first line names (table vm_checkpoints, line 4)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(csv(&table.replace("vm_id", "vm"), &map), @r#"
    error: the column "vm" is not known: expected checkpoint_id, parent, parent_id, vm_id, creation_date, _create_date, description (table vm_checkpoints, line 1)
      effect: nothing was changed
      next: Name the columns that are to be copied, or leave the others out.
    "#);
    assert_snapshot!(csv(&table, &map[..map.len() - 10]), @r#"
    error: "c0ffee00-0000-4000-8000-000" is no UUID: expected such as 5768a388-c1c4-414c-ac4e-eab216ba7c0c (table vm_checkpoint_disk_map, line 6)
      effect: nothing was changed
      next: Correct that and try again.
    "#);
    assert_snapshot!(known.fails(3, &["redefine", "/nowhere/set.xml"]), @"
    error: cannot read the set of checkpoints (document /nowhere/set.xml)
      cause: No such file or directory (os error 2)
      effect: nothing was changed
      next: Check the spelling, and that it has not been deleted or moved.
    ");
}

#[test]
fn what_would_lose_or_change_something_is_refused() {
    let known = Known::new();
    known.define(&line());
    let mut fewer = line();
    fewer["checkpoints"].as_array_mut().unwrap().truncate(1);
    let file = known.site.file("fewer.json", &fewer.to_string());
    assert_snapshot!(known.fails(4, &["redefine", &file]), @"
    error: redefine: the domain has checkpoints that are not in this set: 'c0ffee00-0000-4000-8000-000000000002', 'c0ffee00-0000-4000-8000-000000000003' (checkpoint c0ffee00-0000-4000-8000-000000000002, domain web1)
      effect: nothing was changed
      next: Give the whole set; or say --replace, and they are forgotten.
    ");
    let mut other = line();
    other["checkpoints"][1]["disks"][0]["bitmap"] = "b".into();
    let file = known.site.file("other.json", &other.to_string());
    assert_snapshot!(known.fails(4, &["redefine", &file]), @"
    error: redefine: the domain has the checkpoint 'c0ffee00-0000-4000-8000-000000000002', and the set says something else of the disk vda (checkpoint c0ffee00-0000-4000-8000-000000000002, domain web1)
      effect: nothing was changed
      next: `disksnap checkpoint dump` shows what is known. To have it as the set says, say --replace.
    ");
    let mut gone = line();
    gone["checkpoints"]
        .as_array_mut()
        .unwrap()
        .push(checkpoint("x", Some(&uuid(3)), 4, &["vda", "vdz"]));
    let file = known.site.file("gone.json", &gone.to_string());
    assert_snapshot!(known.fails(3, &["redefine", &file]), @"
    error: redefine: the checkpoint 'x' covers the disk 'vdz', which the domain does not have (checkpoint x, disk vdz, domain web1)
      effect: nothing was changed
      next: The domain's disks: vda, vdb. --leave-out-missing-disks defines the checkpoints without the disks that are gone.
    ");
    let ended = known.site.run(&[
        "checkpoint",
        "redefine",
        &file,
        "--leave-out-missing-disks",
        "-d",
        &known.xml,
    ]);
    assert_eq!(ended.code, Some(0));
    assert_snapshot!(ended.stderr, @"warning: the domain does not have the disk vdz: it was left out of 1 checkpoints");
    assert_snapshot!(known.fails(5, &["dump", "--format", "ovirt-json"]), @"
    error: the name of the checkpoint 'x' is no UUID, and oVirt knows checkpoints by UUID (checkpoint x)
      effect: nothing was changed
      next: Only sets whose names are UUIDs, in small letters and with dashes, can be told to oVirt; the other formats tell all.
    ");
    let shorter = known.site.file("fewer.json", &fewer.to_string());
    assert_eq!(
        known.ok(&["redefine", &shorter, "--replace"]),
        "added 0, replaced 0, kept 1, forgotten 3\n"
    );
}

/// A hundred megabytes, of which the command takes as much as shows that it is too much.
#[test]
fn what_is_too_long_is_not_read_to_its_end() {
    let known = Known::new();
    let piece = vec![b' '; 1 << 20];
    for (format, begin) in [("xml", "<domaincheckpoints>"), ("json", "{"), ("ovirt-json", "{")] {
        let arguments = [
            "checkpoint",
            "redefine",
            "-",
            "--format",
            format,
            "-d",
            &known.xml,
        ];
        let mut child = known
            .site
            .command(&arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(begin.as_bytes()).unwrap();
        let written = (0..100).take_while(|_| stdin.write_all(&piece).is_ok()).count();
        drop(stdin);
        let ended = ended(child.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(2), "{format}");
        assert!(
            ended.stderr.contains("has more than 67108864 bytes"),
            "{}",
            ended.stderr
        );
        assert!((64..70).contains(&written), "{format}: {written} MiB were taken");
    }
    assert_eq!(known.json(), json!({ "checkpoints": [] }));
}
