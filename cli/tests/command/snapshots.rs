//! Plan, create, list, show, delete on a real QEMU, from options and from XML, in three forms.

use disksnap_test_support::{DiskSpec, MIB, Qemu};
use serde_json::{Value, json};

use crate::site::{Site, arg};

/// No guest agent listens here, and so it is known at once that none answers.
const NO_AGENT: &str = "/nowhere/agent.sock";

fn machine() -> Qemu {
    Qemu::builder()
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .disk(DiskSpec::new("vdb", 8 * MIB))
        .start()
}

/// The nodes that a snapshot makes show up here.
fn nodes(machine: &Qemu) -> usize {
    let nodes = machine.qmp("query-named-block-nodes", json!({}));
    nodes.as_array().unwrap().len()
}

#[test]
fn a_domain_is_known_by_name_and_by_uuid() {
    let (site, machine) = (Site::new(), machine());
    assert!(site.ok(&["domain", "list"]).starts_with("No domain is known."));
    let xml = arg(&machine.domain_xml_file());
    let defined = site.ok(&["domain", "define", &xml]);
    assert_eq!(
        defined,
        format!("defined {} ({})\n", machine.name(), machine.uuid())
    );
    assert_eq!(
        site.json(&["domain", "list"])["domains"][0]["name"],
        machine.name()
    );
    let uuid = machine.uuid().to_string();
    for given in [machine.name(), &uuid, &xml] {
        let plan = site.json(&["plan", "-d", given]);
        assert_eq!(plan["possible"], true, "{plan:#}");
    }
    site.ok(&["snapshot", "create", "-d", machine.name(), "--name", "one"]);
    let text = site.fails(6, &["domain", "undefine", machine.name()]);
    assert!(text.contains("next: "), "{text}");
    site.ok(&["snapshot", "delete", "-d", machine.name(), "one"]);
    site.ok(&["domain", "undefine", &uuid]);
    site.fails(3, &["plan", "-d", machine.name()]);
}

#[test]
fn a_plan_tells_and_changes_nothing() {
    let (site, machine) = (Site::new(), machine());
    let (xml, before) = (arg(&machine.domain_xml_file()), nodes(&machine));
    let text = site.ok(&["plan", "-d", &xml]);
    for part in [
        "vda\n",
        "vdb\n",
        "qemu-fleece (default for this disk)",
        "skipped\n  hdc  a CD-ROM drive",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let plan = site.json(&["plan", "-d", &xml, "--disk", "vdb,method=memory"]);
    assert_eq!(plan["possible"], false);
    assert_eq!(plan["disks"][0]["method"], "memory");
    assert_eq!(plan["disks"][0]["why"], "override");
    assert_eq!(plan["disks"][0]["fit"], "unfit");
    assert_eq!(
        plan["skipped"][0],
        json!({ "target": "vda", "reason": "not named" })
    );
    let xml_plan = site.ok(&["plan", "-d", &xml, "--output", "xml"]);
    assert!(xml_plan.starts_with("<diskSnapshotPlan>"), "{xml_plan}");
    assert_eq!(nodes(&machine), before);
    machine.kill9();
    let off = site.json(&["plan", "-d", &xml]);
    assert_eq!(
        off["disks"][0]["target"], "vda",
        "a plan needs no running domain: {off:#}"
    );
}

#[test]
fn create_tells_alias_and_sources_and_the_rest_follows() {
    let (site, machine) = (Site::new(), machine());
    let (xml, before) = (arg(&machine.domain_xml_file()), nodes(&machine));
    let text = site.ok(&[
        "snapshot",
        "create",
        "-d",
        &xml,
        "--name",
        "nightly",
        "--quiesce",
        "none",
    ]);
    for part in [
        "alias           virtio-disk0-backup",
        "modifiedDisk    none",
        "backupSource    nbd+unix:///virtio-disk0-backup?socket=",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let other = site.json(&[
        "snapshot",
        "create",
        "-d",
        &xml,
        "--disk",
        "vda",
        "--quiesce",
        "try",
    ]);
    check_shape(&other, &machine);
    let list = site.ok(&["snapshot", "list", "-d", &xml]);
    assert!(list.lines().nth(1).unwrap().starts_with("nightly "), "{list}");
    assert_eq!(list.lines().count(), 3);
    let shown = site.json(&["snapshot", "show", "-d", &xml, "nightly"]);
    assert_eq!(shown["targets"], json!(["vda", "vdb"]));
    assert_eq!(machine.status(), "running");
    let name = other["name"].as_str().unwrap();
    assert_eq!(
        site.ok(&["snapshot", "delete", "-d", &xml, "nightly", name]),
        format!("deleted nightly\ndeleted {name}\n")
    );
    assert_eq!(
        site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]),
        "nightly had been deleted before\n"
    );
    assert_eq!(
        site.ok(&["snapshot", "list", "-d", &xml]),
        "The domain has no snapshots.\n"
    );
    assert_eq!(nodes(&machine), before);
    assert!(site.images().is_empty());
}

/// The documented shape of `snapshot create` and `snapshot show`.
fn check_shape(shown: &Value, machine: &Qemu) {
    assert_eq!(shown["domain"], machine.name());
    assert_eq!(shown["state"], "active");
    assert_eq!(
        shown["consistency"]["level"], "unquiesced",
        "no agent answers: {shown:#}"
    );
    assert!(shown["consistency"]["reason"].is_string());
    assert_eq!(shown["window"]["unit"], "us");
    assert_eq!(
        shown["created"].as_str().unwrap().len(),
        "2025-01-01T00:00:00Z".len()
    );
    assert!(
        shown["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with("not quiesced: ")
    );
    let disk = &shown["disks"][0];
    assert_eq!(disk["target"], "vda");
    assert_eq!(disk["alias"], "virtio-disk0-backup2");
    assert_eq!(disk["size"], 16 * MIB);
    assert_eq!(disk["modifiedDisk"], Value::Null);
    assert_eq!(disk["backupSource"]["type"], "network");
    assert_eq!(disk["backupSource"]["hosts"][0]["transport"], "unix");
    assert!(
        disk["backupSource"]["uri"]
            .as_str()
            .unwrap()
            .starts_with("nbd+unix:///virtio-disk0-backup2?")
    );
    assert_eq!(shown["skipped"][0]["target"], "vdb");
}

#[test]
fn from_xml_to_xml_and_back() {
    let (site, machine) = (Site::new(), machine());
    let xml = arg(&machine.domain_xml_file());
    let fleece = site.path("vdb,1.fleece");
    let request = format!(
        "<domainblocksnapshot>\n  <name>weekly</name>\n  <snapshot disk='vdb'>\n    <fleece file='{}'/>\n  \
         </snapshot>\n</domainblocksnapshot>\n",
        fleece.display()
    );
    let request = site.file("request.xml", &request);
    let made = site.ok(&[
        "snapshot", "create", "-d", &xml, "--xml", &request, "--output", "xml",
    ]);
    assert!(made.contains("<alias name='virtio-disk1-backup'/>"), "{made}");
    assert!(made.contains("<backupSource type='network'>"), "{made}");
    assert!(fleece.exists());
    let described = site.ok(&["snapshot", "show", "-d", &xml, "weekly", "--output", "xml"]);
    site.ok(&["snapshot", "delete", "-d", &xml, "weekly"]);
    assert!(!fleece.exists());
    // The description asks for the same again; an option says more of the same disk, with a comma in the value.
    let again = site.file("again.xml", &described);
    let other = site.path("a,b.fleece");
    let disk = format!("vdb,fleece.file={}", arg(&other).replace(',', ",,"));
    let arguments = [
        "snapshot", "create", "-d", &xml, "--xml", &again, "--disk", &disk, "--name", "again",
    ];
    let json = site.json(&arguments);
    assert_eq!(
        (&json["name"], &json["targets"]),
        (&json!("again"), &json!(["vdb"]))
    );
    assert!(other.exists() && !fleece.exists());
    assert_eq!(
        site.json(&["snapshot", "delete", "-d", &xml, "--all"]),
        json!({ "deleted": [{ "name": "again", "when": "now" }] })
    );
}

#[test]
fn the_active_document_shows_exports_and_snapshots() {
    let (site, machine) = (Site::new(), machine());
    let xml = arg(&machine.domain_xml_file());
    assert_eq!(site.ok(&["domain", "show", "-d", &xml]), machine.domain_xml());
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    site.ok(&["export", "start", "-d", &xml, "nightly", "--disk", "vdb"]);
    let active = site.ok(&["domain", "show", "-d", &xml]);
    assert!(active.contains("    <blockexport type='nbd'>\n"), "{active}");
    assert!(
        active.contains("      <disk name='virtio-disk1-backup'/>\n    </blockexport>"),
        "{active}"
    );
    assert!(
        active.contains("    <domainblocksnapshot>\n      <name>nightly</name>"),
        "{active}"
    );
    let json = site.json(&["domain", "show", "-d", &xml]);
    assert_eq!(json["exports"][0]["snapshot"], "nightly");
    assert_eq!(json["snapshots"][0]["name"], "nightly");
    assert_eq!(json["disks"][0]["source"]["format"], "qcow2");
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
    assert_eq!(site.ok(&["domain", "show", "-d", &xml]), machine.domain_xml());
}

#[test]
fn the_sockets_can_be_given_on_the_command_line() {
    let (site, machine) = (Site::new(), machine());
    let text = machine.domain_xml();
    let (head, tail) = (
        text.find("  <metadata>").unwrap(),
        text.find("  <memory").unwrap(),
    );
    let bare = site.file("bare.xml", &format!("{}{}", &text[..head], &text[tail..]));
    let plan = site.json(&["plan", "-d", &bare]);
    assert_eq!(plan["possible"], false, "it looks as if it were off: {plan:#}");
    let monitor = arg(&machine.qmp_path());
    let create = [
        "snapshot",
        "create",
        "-d",
        &bare,
        "--monitor",
        &monitor,
        "--name",
        "a",
    ];
    assert_eq!(site.json(&create)["state"], "active");
    site.ok(&["snapshot", "delete", "-d", &bare, "--monitor", &monitor, "a"]);
}

#[test]
fn a_broken_snapshot_says_so_in_every_list() {
    let (site, machine) = (Site::new(), machine());
    let xml = arg(&machine.domain_xml_file());
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    machine.restart();
    let shown = site.json(&["snapshot", "show", "-d", &xml, "nightly"]);
    assert_eq!(shown["state"], "gone", "{shown:#}");
    assert!(site.ok(&["snapshot", "list", "-d", &xml]).contains("  gone: "));
    site.fails(11, &["read", "-d", &xml, "nightly", "vda"]);
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
    assert!(site.images().is_empty());
    assert_eq!(site.ok(&["recover"]), "Nothing was left behind.\n");
}

#[test]
fn quiet_and_verbose() {
    let (site, machine) = (Site::new(), machine());
    let xml = arg(&machine.domain_xml_file());
    let create = [
        "snapshot",
        "create",
        "-d",
        &xml,
        "--quiesce",
        "try",
        "--agent",
        NO_AGENT,
    ];
    let told = site.run(&create);
    assert!(
        told.stderr.starts_with("warning: not quiesced: "),
        "{}",
        told.stderr
    );
    let quiet = site.run(&[&create[..], &["-q"]].concat());
    assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""));
    let json = site.run(&[&create[..], &["--output", "json"]].concat());
    assert_eq!((json.code, json.stderr.as_str()), (Some(0), ""));
    site.ok(&["snapshot", "delete", "-d", &xml, "--all", "-vv"]);
}
