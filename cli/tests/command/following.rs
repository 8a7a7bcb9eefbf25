//! A domain's document follows its disks, also where the command was killed between the two.

use disksnap_test_support::{DiskSpec, MIB, Qemu};
use serde_json::json;

use crate::site::{Site, arg};

#[test]
fn a_document_that_a_killed_create_left_behind_is_brought_up_to_date() {
    let (qemu, site) = (
        Qemu::builder().disk(DiskSpec::new("vda", MIB).qcow2()).start(),
        Site::new(),
    );
    let xml = arg(&qemu.domain_xml_file());
    let document = || std::fs::read_to_string(&xml).unwrap();
    let create = |name: &'static str| {
        [
            "-d",
            &xml,
            "snapshot",
            "create",
            "--name",
            name,
            "--disk",
            "vda,method=qemu-external-qcow2",
        ]
    };
    let killed = |name: &'static str, point: &str| {
        let mut command = site.command(&create(name));
        let ended = command.env("DISKSNAP_FAULT", point).output().unwrap();
        assert_eq!(
            ended.status.code(),
            None,
            "it is killed: {}",
            String::from_utf8_lossy(&ended.stderr)
        );
    };
    let overlay = |name: &str| {
        let shown = site.json(&["-d", &xml, "snapshot", "show", name]);
        shown["disks"][0]["modifiedDisk"]["source"]["path"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let notes = || crate::site::list(&site.state().join("documents"));
    // `recover` knows the document without being told which it is.
    let before = document();
    killed("one", "before file write document:1");
    assert_eq!(document(), before);
    let recovered = site.json(&["recover"]);
    assert_eq!(
        recovered["recovered"][0]["what"], "the domain's document",
        "{recovered:#}"
    );
    assert!(document().contains(&overlay("one")), "{}", document());
    assert_eq!(site.json(&["recover"])["recovered"], json!([]));
    // So does the next command on the domain, whatever it is.
    killed("two", "before file rename document:1");
    let listed = site.run(&["-d", &xml, "snapshot", "list"]);
    assert!(listed.stderr.contains("brought up to date"), "{}", listed.stderr);
    assert!(document().contains(&overlay("two")), "{}", document());
    // What came to nothing has nothing to follow.
    let now = document();
    killed("three", "before catalog write down what was done:1");
    site.ok(&["recover"]);
    assert_eq!(document(), now);
    site.ok(&["-d", &xml, "snapshot", "list"]);
    assert_eq!(notes(), [""; 0].map(std::path::PathBuf::from));
    // Who wants the document left alone gets that, after a kill as well.
    let mut alone = site.command(&[&create("four")[..], &["--keep-document"]].concat());
    assert!(alone.output().unwrap().status.success());
    site.ok(&["recover"]);
    assert_eq!(document(), now);
}

/// The disk's image stays where it was, and stands on another below: the document has to say so before the header is believed.
#[test]
fn what_a_killed_revert_has_put_below_the_disk_is_written_into_its_document() {
    let (qemu, site) = (
        Qemu::builder().disk(DiskSpec::new("vda", MIB).qcow2()).start(),
        Site::new(),
    );
    let xml = arg(&qemu.domain_xml_file());
    qemu.quit();
    let act = |words: &[&str]| site.ok(&[&["-d", &xml, "snapshot"], words].concat());
    let document = || std::fs::read_to_string(&xml).unwrap();
    act(&["create", "--name", "one"]);
    act(&["merge", "--into", "overlay", "one"]);
    let alone = document();
    assert!(!alone.contains("<backingStore type"), "{alone}");
    act(&["revert", "one"]);
    let on_one = document();
    assert!(on_one.contains("<backingStore type"), "{on_one}");
    site.ok(&["-d", &xml, "domain", "update"]);
    assert_eq!(document(), on_one, "it was up to date");
    // The same again, killed before the document is written.
    act(&["merge", "--into", "overlay", "one"]);
    assert_eq!(document(), alone);
    let mut revert = site.command(&["-d", &xml, "snapshot", "revert", "one"]);
    let ended = revert.env("DISKSNAP_FAULT", "before file write document:1");
    assert_eq!(ended.output().unwrap().status.code(), None);
    assert_eq!(document(), alone);
    let recovered = site.json(&["recover"]);
    assert_eq!(
        recovered["recovered"][0]["what"], "the domain's document",
        "{recovered:#}"
    );
    assert_eq!(document(), on_one);
    act(&["delete", "one"]);
    assert_eq!(
        site.json(&["-d", &xml, "snapshot", "list"])["snapshots"],
        json!([])
    );
}

/// What had been done by then is known only when it is settled, by the very run that is to go on from there.
#[test]
fn a_backup_goes_on_where_one_was_killed_between_its_merge_and_the_record_of_it() {
    let backed_up = |point: Option<&str>| {
        let (qemu, site) = (
            Qemu::builder().disk(DiskSpec::new("vda", MIB).qcow2()).start(),
            Site::new(),
        );
        let xml = arg(&qemu.domain_xml_file());
        qemu.quit();
        let before = std::fs::read_to_string(&xml).unwrap();
        let (repo, log) = (arg(&site.path("repo")), site.path("points"));
        let backup = ["-d", &xml, "backup", "create", "-q", "--repo", &repo];
        let mut command = site.command(&backup);
        match point {
            None => command.env("DISKSNAP_FAULT_LOG", &log),
            Some(point) => command.env("DISKSNAP_FAULT", point),
        };
        let code = command.output().unwrap().status.code();
        assert_eq!(code, point.is_none().then_some(0));
        if point.is_some() {
            site.ok(&backup);
        }
        assert_eq!(std::fs::read_to_string(&xml).unwrap(), before);
        assert_eq!(
            site.json(&["-d", &xml, "snapshot", "list"])["snapshots"],
            json!([])
        );
        std::fs::read_to_string(log).unwrap_or_default()
    };
    let passed = backed_up(None);
    let record = "before catalog write down what was done";
    let merged = passed.find("after file write mark").unwrap();
    let earlier = passed[..merged].lines().filter(|line| *line == record).count();
    assert!(passed[merged..].contains(record), "{passed}");
    backed_up(Some(&format!("{record}:{}", earlier + 1)));
}
