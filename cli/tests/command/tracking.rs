//! Raw disks whose bitmaps outlive QEMU, by the command: what it says, and killed at any moment.

use std::time::Instant;

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, Writer};

use crate::kills::{kill_after, wait_running};
use crate::site::{Site, arg};

const SIZE: u64 = 8 * MIB;

/// A raw disk in the site's directory, in a machine that runs.
fn machine(site: &Site) -> Qemu {
    std::fs::write(site.path("a.raw"), vec![5; usize::try_from(SIZE).unwrap()]).unwrap();
    let spec = DiskSpec::new("vda", SIZE).image(&site.path("a.raw"));
    Qemu::builder().disk(spec).start()
}

fn short(site: &Site, text: &str) -> String {
    let text = site.short(text);
    // How long it took is another matter.
    let lines = text
        .lines()
        .filter(|line| !line.starts_with("the guest was paused"));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_raw_disk_is_tracked_and_untracked_with_its_document() {
    let site = Site::new();
    let qemu = machine(&site);
    let domain = arg(&qemu.domain_xml_file());
    let before = std::fs::read_to_string(&domain).unwrap();
    let qcow2 = arg(&site.path("a.qcow2"));
    let said = site.ok(&["-d", &domain, "disk", "track", "vda", "--in", &qcow2]);
    assert!(said.contains("the guest was paused for"), "{said}");
    assert_eq!(
        short(&site, &said),
        "vda: the disk is now SITE/a.qcow2, with the data in SITE/a.raw"
    );
    let document = std::fs::read_to_string(&domain).unwrap();
    assert!(document.contains("<dataStore type='file'>"), "{document}");
    assert_eq!(
        site.ok(&["-d", &domain, "domain", "update"]),
        "The document is up to date.\n"
    );
    let again = site.ok(&["-d", &domain, "disk", "track", "vda", "--in", &qcow2]);
    assert_eq!(
        short(&site, &again),
        "vda: the disk is now SITE/a.qcow2, with the data in SITE/a.raw, as before"
    );
    site.ok(&[
        "-d",
        &domain,
        "snapshot",
        "create",
        "--name",
        "one",
        "--disk",
        "vda",
        "--checkpoint",
    ]);
    site.ok(&["-d", &domain, "snapshot", "delete", "one"]);
    let refused = site.fails(6, &["-d", &domain, "disk", "untrack", "vda"]);
    insta::assert_snapshot!(refused.replace(qemu.name(), "VM"), @"
    error: untrack: what has changed in the disk since one is known by bitmaps in the qcow2 alone (domain VM, disk vda)
      effect: nothing was changed
      next: Say --drop-checkpoints: they do not cover the disk any more then, and its next backup is a full one.
    ");
    let said = site.json(&["-d", &domain, "disk", "untrack", "vda", "--drop-checkpoints"]);
    assert_eq!(said["dropped"], serde_json::json!(["one"]));
    assert_eq!(
        (&said["data"], &said["when"]),
        (&serde_json::Value::Null, &"now".into())
    );
    let after = std::fs::read_to_string(&domain).unwrap();
    assert_eq!(
        after.replace("      <backingStore/>\n", ""),
        before.replace("      <backingStore/>\n", "")
    );
    assert!(!site.path("a.qcow2").exists());
}

/// Either way the guest goes on, every write is in the raw disk, and what is begun is finished or undone.
#[test]
fn killed_at_any_moment_the_guest_goes_on_and_the_raw_disk_has_it_all() {
    let site = Site::new();
    let qemu = machine(&site);
    let domain = arg(&qemu.domain_xml_file());
    let qcow2 = arg(&site.path("a.qcow2"));
    let track = ["-d", &domain, "disk", "track", "vda", "--in", &qcow2];
    let untrack = ["-d", &domain, "disk", "untrack", "vda"];
    let since = Instant::now();
    site.ok(&track);
    let whole = since.elapsed();
    site.ok(&untrack);
    let writer = Writer::start(vec![qemu.disk("vda")], SIZE - MIB, 3);
    let (rounds, mut killed) = (20, 0);
    for round in 0..rounds {
        for command in [&track[..], &untrack[..]] {
            killed += u32::from(kill_after(&site, whole * round / rounds, command));
            wait_running(&qemu);
            writer.wait(1);
            site.ok(&["recover"]);
            if round % 3 == 0 {
                site.ok(&["recover"]);
            }
            // It may have crossed before the kill, and only the document not been told.
            site.ok(&["-d", &domain, "domain", "update"]);
            let document = std::fs::read_to_string(&domain).unwrap();
            let tracked = document.contains("<dataStore");
            assert_eq!(site.path("a.qcow2").exists(), tracked);
            let hidden = std::fs::read_dir(site.dir.path()).unwrap();
            let hidden =
                hidden.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
            assert_eq!(hidden.count(), 0);
            let nodes = qemu.qmp("query-named-block-nodes", serde_json::json!({}));
            let nodes = nodes.as_array().unwrap();
            let through = |node: &&serde_json::Value| node["drv"] == "qcow2";
            assert_eq!(nodes.iter().filter(through).count(), usize::from(tracked));
        }
        site.ok(&untrack);
        writer.wait(1);
    }
    assert!(
        killed > rounds / 2,
        "only {killed} were killed at work: the test proves little"
    );
    writer.stop();
    qemu.disk("vda").fill(SIZE - MIB, 64 * KIB, 9);
    assert_eq!(qemu.status(), "running");
    let copy = site.path("copy");
    qemu.disk("vda").copy_to(&copy);
    qemu.quit();
    let content = std::fs::read(site.path("a.raw")).unwrap();
    assert!(
        content == std::fs::read(copy).unwrap(),
        "the raw disk lacks writes"
    );
    let at = usize::try_from(SIZE - MIB).unwrap();
    assert!(content[at..at + (64 << 10)].iter().all(|byte| *byte == 9));
}
