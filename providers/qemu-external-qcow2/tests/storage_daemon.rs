//! Overlays in a storage daemon: a chain that stays mergeable, and the export under which it would not be.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use disksnap_core::{Access, ErrorKind};
use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need};
use rig::{Rig, content, extra_files, info};
use serde_json::json;

const SIZE: u64 = 4 * MIB;

#[test]
fn becomes_the_guardian_when_asked() {
    rig::become_guardian_when_asked();
}

#[tokio::test]
async fn two_disks_are_taken_at_once_and_merged_under_their_exports() {
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("vdb", SIZE))
        .without_guest_side()
        .start();
    let socket = daemon.dir().join("guest.sock");
    let addr = json!({"type": "unix", "data": {"path": socket}});
    daemon.qmp("nbd-server-start", json!({"addr": addr}));
    let targets = ["vda", "vdb"];
    for target in targets {
        let node = daemon.top_node(target);
        let export =
            json!({"type": "nbd", "id": target, "name": target, "node-name": node, "writable": true});
        daemon.qmp("block-export-add", export);
    }
    let guest = |target: &str, commands: &[&str]| {
        let uri = format!("nbd+unix:///{target}?socket={}", socket.display());
        let mut arguments = vec!["-f", "raw"];
        arguments.extend(commands.iter().flat_map(|c| ["-c", c]));
        arguments.push(&uri);
        rig::run("qemu-io", &arguments);
    };
    let mut rig = Rig::new(&daemon.domain_xml()).await;
    for target in targets {
        guest(target, &["write -P 1 0 1M"]);
    }
    rig.create("one", &targets).await.unwrap();
    for target in targets {
        guest(target, &["write -P 2 64k 64k"]);
    }
    // The document follows; an old one would do as well while the daemon runs.
    rig.create("two", &targets).await.unwrap();
    for target in targets {
        guest(target, &["write -P 3 128k 64k", "flush"]);
    }
    let shown = rig.shown("two").await;
    for target in targets {
        let byte = |bytes: &[u8], at: usize| bytes[at * 65536];
        let one = rig.read("one", target).await;
        assert_eq!(
            [byte(&one, 0), byte(&one, 1), byte(&one, 2)],
            [1, 1, 1],
            "{target}"
        );
        let Access::Source {
            source,
            format,
            backing,
        } = &shown.snapshot.disk(target).unwrap().access
        else {
            panic!("not a file")
        };
        assert!(backing.is_some());
        let two = content(source.path().unwrap(), format);
        assert_eq!(
            [byte(&two, 0), byte(&two, 1), byte(&two, 2)],
            [1, 2, 1],
            "{target}"
        );
    }
    rig.merge("one").await.unwrap();
    // Behind the wrapper QEMU sees a raw node; the header must name what is there.
    for (target, format) in [("vda", "qcow2"), ("vdb", "raw")] {
        assert_eq!(info(&rig.image(target))["backing-filename-format"], format);
    }
    rig.merge("two").await.unwrap();
    for target in targets {
        guest(
            target,
            &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 64k"],
        );
        assert_eq!(rig.image(target), daemon.image(target));
    }
    assert_eq!(extra_files(daemon.dir()), Vec::<String>::new());
    let nodes = daemon.qmp("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 6, "{nodes:#}");
}

/// A writable FUSE export may resize its disk, and QEMU commits nothing under that: neither a merge nor the way back
/// from a take that came to nothing.
#[tokio::test]
async fn under_an_export_that_forbids_commits_it_is_refused() {
    need!("fuse");
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .start();
    let mut rig = Rig::new(&daemon.domain_xml()).await;
    let error = rig.create("one", &["vda"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(extra_files(daemon.dir()), Vec::<String>::new());
}
