//! What the command says of itself.

use crate::site::{Site, program};
use std::process::Command;

fn help(arguments: &[&str]) -> String {
    let output = Command::new(program())
        .args(arguments)
        .arg("--help")
        .env("COLUMNS", "100")
        .output()
        .unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_help_texts() {
    for (name, arguments) in [
        ("help", &[][..]),
        ("help_plan", &["plan"]),
        ("help_snapshot_create", &["snapshot", "create"]),
        ("help_checkpoint_redefine", &["checkpoint", "redefine"]),
        ("help_export_start", &["export", "start"]),
        ("help_read", &["read"]),
        ("help_fill_start", &["fill", "start"]),
    ] {
        insta::assert_snapshot!(name, help(arguments));
    }
}

#[test]
fn every_subcommand_of_the_synopsis_is_there() {
    for arguments in [
        &["methods"][..],
        &["domain", "define"],
        &["domain", "undefine"],
        &["domain", "list"],
        &["domain", "show"],
        &["plan"],
        &["snapshot", "create"],
        &["snapshot", "list"],
        &["snapshot", "show"],
        &["snapshot", "delete"],
        &["checkpoint", "list"],
        &["checkpoint", "dump"],
        &["checkpoint", "redefine"],
        &["checkpoint", "validate"],
        &["checkpoint", "drop-broken"],
        &["checkpoint", "remove"],
        &["checkpoint", "forget"],
        &["changes"],
        &["export", "start"],
        &["export", "list"],
        &["export", "stop"],
        &["export", "server", "start"],
        &["export", "server", "stop"],
        &["read"],
        &["fill", "start"],
        &["fill", "list"],
        &["fill", "end"],
        &["recover"],
        &["conform"],
        &["completions"],
        &["man"],
    ] {
        assert!(help(arguments).contains("--state-dir"), "{arguments:?}");
    }
}

#[test]
fn methods_in_three_forms() {
    let site = Site::new();
    let all = site.ok(&["methods"]);
    assert!(all.lines().any(|line| line.starts_with("memory  ")), "{all}");
    assert!(all.lines().any(|line| line.starts_with("qemu-fleece  ")), "{all}");
    insta::assert_snapshot!(site.ok(&["methods", "memory"]));
    let json = site.json(&["methods"]);
    let names = json["methods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|method| &method["name"]);
    assert_eq!(
        names.collect::<Vec<_>>(),
        [
            "btrfs",
            "lvm",
            "memory",
            "qemu-external-qcow2",
            "qemu-fleece",
            "reflink"
        ]
    );
    assert_eq!(json["methods"][2]["options"][0]["key"], "copy.dir");
    let xml = site.ok(&["methods", "memory", "--output", "xml"]);
    assert!(
        xml.starts_with("<diskSnapshotMethods>\n  <method name='memory'>"),
        "{xml}"
    );
    assert!(
        !site.state().exists(),
        "a list of methods needs no state directory"
    );
}

#[test]
fn completions_and_manual_pages() {
    let site = Site::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = site.ok(&["completions", shell]);
        assert!(
            script.contains("snapshot") && script.contains("quiesce"),
            "{shell}"
        );
    }
    let dir = site.path("man");
    site.ok(&["man", dir.to_str().unwrap()]);
    let page = std::fs::read_to_string(dir.join("disksnap-snapshot-create.1")).unwrap();
    assert!(page.contains("\\-\\-quiesce"));
    assert!(
        std::fs::read_to_string(dir.join("disksnap.1"))
            .unwrap()
            .contains("Exit codes")
    );
}

#[test]
fn a_wrong_command_line_is_told_in_the_form_that_was_asked_for() {
    let site = Site::new();
    let text = site.fails(2, &["snapshot", "create", "--quiesce", "maybe"]);
    assert!(text.starts_with("error: invalid value 'maybe'"), "{text}");
    let text = site.fails(2, &["--output", "json", "snapshot", "delete"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["error"]["kind"], "invalid");
    assert_eq!(json["error"]["exitCode"], 2);
    let text = site.fails(2, &["snapshot", "list"]);
    insta::assert_snapshot!(text, @r"
    error: no domain is given
      effect: nothing was changed
      next: Say -d DOMAIN: the path of its XML, or its name or UUID if it was made known with `disksnap domain define`.
    ");
}
