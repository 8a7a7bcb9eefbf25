//! Each bad input gives one clear error with the next step, the exit code of its kind, and changes nothing.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, StorageDaemonBuilder, need, skip, small_fs};
use insta::assert_snapshot;
use serde_json::json;

use crate::site::{Site, arg, ended, list, program};

/// A daemon with disks `vda` and `vdb`, its XML, and how many nodes it has when nothing was done to it.
struct Bad {
    site: Site,
    daemon: StorageDaemon,
    xml: String,
    nodes: usize,
}

impl Bad {
    fn new() -> Self {
        let disks = ["vda", "vdb"].map(|target| DiskSpec::new(target, 4 * MIB).qcow2());
        let builder = disks
            .into_iter()
            .fold(StorageDaemon::builder(), StorageDaemonBuilder::disk);
        let daemon = builder.without_guest_side().start();
        let xml = arg(&daemon.domain_xml_file());
        let mut bad = Self {
            site: Site::new(),
            daemon,
            xml,
            nodes: 0,
        };
        bad.nodes = bad.count();
        bad
    }

    fn count(&self) -> usize {
        let nodes = self.daemon.qmp("query-named-block-nodes", json!({}));
        nodes.as_array().unwrap().len()
    }

    /// Fails with this code, and leaves neither a node nor an export nor a server nor an image nor a snapshot.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let text = self.site.fails(code, &[arguments, &["-d", &self.xml]].concat());
        assert_eq!(self.count(), self.nodes, "{arguments:?} left nodes behind");
        assert_eq!(self.daemon.qmp("query-block-exports", json!({})), json!([]));
        assert!(self.site.images().is_empty(), "{:?}", self.site.images());
        assert_eq!(
            self.site.json(&["snapshot", "list", "-d", &self.xml]),
            json!({ "snapshots": [] })
        );
        let dir = arg(self.daemon.dir());
        text.replace(&dir, "DAEMON").replace(self.daemon.name(), "NAME")
    }
}

#[test]
fn malformed_documents_name_line_and_column() {
    let site = Site::new();
    let broken = site.file("broken.xml", "<domain>\n  <name>a</name>\n  <devices>\n");
    assert_snapshot!(site.fails(2, &["plan", "-d", &broken]), @r"
    error: the document ends inside <devices>, which was opened in line 3 (line 3, column 12, element devices, document SITE/broken.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let hostile = site.file(
        "hostile.xml",
        "<!DOCTYPE d [<!ENTITY x 'y'>]>\n<domain><name>&x;</name></domain>",
    );
    assert_snapshot!(site.fails(2, &["plan", "-d", &hostile]), @r"
    error: a document type declaration (<!DOCTYPE …>) is not accepted (line 1, column 1, document SITE/hostile.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let nameless = site.file("nameless.xml", "<domain>\n  <devices/>\n</domain>\n");
    assert_snapshot!(site.fails(2, &["domain", "define", &nameless]), @r"
    error: <domain> lacks its <name>: expected <name>…</name> (line 1, column 1, element domain, document SITE/nameless.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    assert_snapshot!(site.fails(3, &["domain", "define", "/nowhere/a.xml"]), @r"
    error: cannot read the document (document /nowhere/a.xml)
      cause: No such file or directory (os error 2)
      effect: nothing was changed
      next: Check the spelling, and that it has not been deleted or moved.
    ");
    let bad = Bad::new();
    let request = bad.site.file(
        "request.xml",
        "<domainblocksnapshot>\n  <snapshot/>\n</domainblocksnapshot>\n",
    );
    let text = bad.fails(2, &["snapshot", "create", "--xml", &request]);
    assert_snapshot!(bad.site.short(&text), @r"
    error: <snapshot> lacks the attribute 'disk': expected disk='…', the disk's name in the guest, such as vda (line 2, column 3, element snapshot, document SITE/request.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let export = bad
        .site
        .file("export.xml", "<blockexport type='nbd' port='x'/>\n");
    let text = bad.fails(2, &["export", "start", "--xml", &export]);
    assert_snapshot!(bad.site.short(&text), @r"
    error: a port without an address: expected <listen type='address' address='127.0.0.1'/> with it (line 1, column 25, element blockexport, document SITE/export.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
}

#[test]
fn unknown_names_are_answered_with_those_that_come_near() {
    let bad = Bad::new();
    assert_snapshot!(bad.fails(3, &["snapshot", "create", "--disk", "vda,method=memry"]), @r"
    error: create: there is no method 'memry' (disk vda, domain NAME)
      effect: nothing was changed
      next: Available methods, nearest first: memory, lvm, btrfs, reflink, qemu-fleece, qemu-external-qcow2.
    ");
    assert_snapshot!(bad.fails(3, &["snapshot", "create", "--disk", "vdx"]), @r"
    error: create: the domain has no disk 'vdx' (domain NAME)
      effect: nothing was changed
      next: Available disks, nearest first: vda, vdb, hdc.
    ");
    assert_snapshot!(bad.fails(2, &["snapshot", "create", "--disk", "vda,method=memory,copy.dri=/x"]), @r"
    error: create: the method has no option 'copy.dri' (method memory, disk vda, domain NAME)
      effect: nothing was changed
      next: Available options, nearest first: copy.dir.
    ");
    assert_snapshot!(bad.fails(3, &["snapshot", "show", "nightly"]), @r"
    error: the domain has no snapshot 'nightly' (domain NAME)
      effect: nothing was changed
      next: There are no snapshots.
    ");
    assert_snapshot!(bad.fails(3, &["snapshot", "delete", "nightly"]), @r"
    error: delete: the domain has no snapshot 'nightly' (domain NAME, snapshot nightly)
      effect: nothing was changed
      next: There are no snapshots.
    ");
    assert_snapshot!(bad.fails(3, &["read", "nightly", "vda"]), @r"
    error: read: the domain has no snapshot 'nightly' (domain NAME, snapshot nightly)
      effect: nothing was changed
      next: There are no snapshots.
    ");
    assert_snapshot!(bad.fails(3, &["export", "start", "nightly"]), @r"
    error: the domain has no snapshot 'nightly' (domain NAME)
      effect: nothing was changed
      next: There are no snapshots.
    ");
    assert_snapshot!(bad.fails(3, &["export", "stop", "nightly"]), @r"
    error: export stop: 'nightly' is neither an export's alias nor a snapshot's name (domain NAME)
      effect: nothing was changed
      next: See `disksnap export list` and `disksnap snapshot list`.
    ");
    assert_snapshot!(bad.site.fails(3, &["plan", "-d", "web1"]), @r"
    error: no domain 'web1' is known
      effect: nothing was changed
      next: Give the path of its XML, or make it known: `disksnap domain define FILE`.
    ");
    assert_snapshot!(bad.site.fails(3, &["domain", "undefine", "web1"]), @r"
    error: no domain 'web1' is known
      effect: nothing was changed
      next: Give the path of its XML, or make it known: `disksnap domain define FILE`.
    ");
    assert_snapshot!(bad.site.fails(3, &["methods", "qemu-flece"]), @r"
    error: there is no method 'qemu-flece'
      effect: nothing was changed
      next: Available methods, nearest first: qemu-fleece, reflink, memory, btrfs, lvm, qemu-external-qcow2.
    ");
}

#[test]
fn a_disk_twice_and_a_method_that_does_not_suit() {
    let bad = Bad::new();
    assert_snapshot!(bad.fails(2, &["snapshot", "create", "--disk", "vda", "--disk", "vda"]), @r"
    error: create: the disk is named twice (disk vda, domain NAME)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let twice =
        "<domainblocksnapshot>\n  <snapshot disk='vda'/>\n  <snapshot disk='vda'/>\n</domainblocksnapshot>";
    let twice = bad.site.file("twice.xml", twice);
    let text = bad.fails(2, &["snapshot", "create", "--xml", &twice]);
    assert_snapshot!(bad.site.short(&text), @r"
    error: the disk 'vda' comes twice: expected it once (line 3, column 13, element snapshot, document SITE/twice.xml)
      effect: nothing was changed
      next: Correct that and try again.
    ");
    let text = bad.fails(5, &["snapshot", "create", "--disk", "vda,method=memory"]);
    assert_snapshot!(text, @r"
    error: create: the image is not raw, or has a backing file: a copy of it alone would not be complete (method memory, disk vda, domain NAME)
      effect: nothing was changed
      next: `disksnap plan` tells for each disk which method is chosen, and why.
    ");
}

#[test]
fn a_fleece_image_that_exists_is_never_overwritten() {
    let bad = Bad::new();
    let mine = bad.site.file("mine.raw", "precious");
    let disk = format!("vda,fleece.file={mine}");
    let text = bad.fails(4, &["snapshot", "create", "--disk", &disk, "--disk", "vdb"]);
    assert_snapshot!(bad.site.short(&text), @r"
    error: prepare: cannot create the fleece image SITE/mine.raw (method qemu-fleece, disk vda, domain NAME)
      cause: File exists (os error 17)
      effect: what had been done was undone
      next: An existing file is never overwritten: name another, or remove it.
    ");
    assert_eq!(std::fs::read_to_string(&mine).unwrap(), "precious");
}

#[test]
fn a_name_twice_is_refused_and_the_first_stays() {
    let bad = Bad::new();
    let create = ["snapshot", "create", "-d", &bad.xml, "--name", "nightly"];
    bad.site.ok(&create);
    let text = bad.site.fails(4, &create).replace(bad.daemon.name(), "NAME");
    assert_snapshot!(text, @r"
    error: create: the snapshot 'nightly' exists already (domain NAME)
      effect: nothing was changed
      next: Choose another name, or delete that snapshot first; it is never replaced.
    ");
    assert_eq!(
        bad.site.json(&["snapshot", "list", "-d", &bad.xml])["snapshots"][0]["state"],
        "active"
    );
    bad.site.ok(&["snapshot", "delete", "-d", &bad.xml, "--all"]);
}

#[test]
fn a_read_past_the_end_is_refused_and_leaves_no_file() {
    let bad = Bad::new();
    bad.site
        .ok(&["snapshot", "create", "-d", &bad.xml, "--name", "nightly"]);
    let to = bad.site.path("out.raw");
    let arguments = [
        "read", "-d", &bad.xml, "nightly", "vda", "--offset", "4M", "--length", "1",
    ];
    let text = bad
        .site
        .fails(2, &[&arguments[..], &["--to", to.to_str().unwrap()]].concat());
    assert_snapshot!(text.replace(bad.daemon.name(), "NAME"), @r"
    error: read: 1 bytes at 4194304 reach past the end of the disk (snapshot nightly, disk vda, size 4194304)
      effect: nothing was changed
      next: The disk has 4194304 bytes: read less, or from an earlier place.
    ");
    assert_eq!(list(bad.site.dir.path()), [bad.site.state()]);
    assert_eq!(bad.daemon.qmp("query-block-exports", json!({})), json!([]));
    let text = bad
        .site
        .fails(2, &["read", "-d", &bad.xml, "nightly", "vda", "--length", "1X"]);
    assert!(
        text.contains("expected bytes, such as 4096, 64K, 10M or 2G"),
        "{text}"
    );
    bad.site.ok(&["snapshot", "delete", "-d", &bad.xml, "nightly"]);
}

#[test]
fn a_port_in_use_and_a_careless_address() {
    let bad = Bad::new();
    bad.site
        .ok(&["snapshot", "create", "-d", &bad.xml, "--name", "nightly"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let start = ["export", "start", "-d", &bad.xml, "nightly", "--listen"];
    let text = bad.site.fails(6, &[&start[..], &[&listen]].concat());
    let text = text
        .replace(&listen, "127.0.0.1:PORT")
        .replace(bad.daemon.name(), "NAME");
    assert_snapshot!(text, @r"
    error: export: 127.0.0.1:PORT is in use (command nbd-server-start, listen 127.0.0.1:PORT, domain NAME)
      cause: Failed to find an available port: Address already in use (command nbd-server-start)
      effect: what had been done was undone
      next: Choose another port, or stop what listens there.
    ");
    let text = bad.site.fails(7, &[&start[..], &["0.0.0.0:10809"]].concat());
    assert_snapshot!(text.replace(bad.daemon.name(), "NAME"), @r"
    error: export: anyone who reaches 0.0.0.0:10809 could read the disks (domain NAME)
      effect: nothing was changed
      next: Use TLS with client verification, or say --allow-remote if the network is trusted.
    ");
    let text = bad.site.fails(2, &[&start[..], &["localhost:10809"]].concat());
    assert!(text.contains("the host is not an IP address"), "{text}");
    assert_eq!(bad.daemon.qmp("query-block-exports", json!({})), json!([]));
    assert_eq!(
        bad.site.json(&["export", "list", "-d", &bad.xml]),
        json!({ "server": null, "exports": [] })
    );
    bad.site.ok(&["snapshot", "delete", "-d", &bad.xml, "nightly"]);
}

#[test]
fn a_domain_that_does_not_answer() {
    let bad = Bad::new();
    assert_snapshot!(bad.fails(8, &["snapshot", "create", "--quiesce", "require"]), @r"
    error: create: the file systems cannot be frozen: a storage daemon has no guest (domain NAME)
      effect: what had been done was undone
      next: Start the guest and its agent, or ask for --quiesce try.
    ");
    bad.daemon.kill9();
    // Named, since whether a method below QEMU would do depends on the file system of the test.
    let disk = "vda,method=qemu-fleece";
    let text = bad
        .site
        .fails(8, &["snapshot", "create", "-d", &bad.xml, "--disk", disk]);
    assert_snapshot!(text.replace(bad.daemon.name(), "NAME"), @r"
    error: create: the domain is off; fleecing is done by the QEMU that runs it (method qemu-fleece, disk vda, domain NAME)
      effect: nothing was changed
      next: `disksnap plan` tells for each disk which method is chosen, and why.
    ");
    assert!(bad.site.images().is_empty());
}

#[test]
fn no_room_for_a_copy() {
    need!("small-fs");
    let fs = small_fs(6 * MIB);
    let site = Site::new();
    let image = fs.path().join("a.raw");
    std::fs::write(&image, vec![1; 4 << 20]).unwrap();
    let text = format!(
        "<domain><name>full</name><devices><disk type='file'><driver type='raw'/><source file='{}'/>\
         <target dev='vda'/></disk></devices></domain>",
        image.display()
    );
    let xml = site.file("full.xml", &text);
    let text = site.fails(10, &["snapshot", "create", "-d", &xml]);
    let id = text.split(".vda.").nth(1).unwrap()[..12].to_owned();
    assert_snapshot!(text.replace(&arg(fs.path()), "FS").replace(&id, "ID"), @r"
    error: prepare: cannot reserve 4194304 bytes for FS/a.raw.vda.ID.snapshot (method memory, disk vda, domain full)
      cause: No space left on device (os error 28)
      effect: what had been done was undone
      next: Free some memory, or take the snapshot by another method.
    ");
    assert_eq!(list(fs.path()), [image]);
}

/// Runs a program that was just written: another test's fork may still hold the file open for writing.
fn patiently(command: &mut Command) -> Output {
    loop {
        match command.output() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
            output => return output.unwrap(),
        }
    }
}

/// The user that may do nothing.
const NOBODY: u32 = 65534;

#[test]
fn no_permission() {
    if !rustix::process::geteuid().is_root() {
        skip!("root", "only root can become another user");
    }
    let bad = Bad::new();
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let copy = dir.path().join("disksnap");
    std::fs::copy(program(), &copy).unwrap();
    for path in [dir.path(), &copy, bad.daemon.dir()] {
        open(path);
    }
    let (state, xml) = (dir.path().join("state"), dir.path().join("domain.xml"));
    std::fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(NOBODY), Some(NOBODY)).unwrap();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::copy(&bad.xml, &xml).unwrap();
    let as_nobody = |state: &std::path::Path| {
        let mut command = Command::new(&copy);
        command.uid(NOBODY).gid(NOBODY).arg("--state-dir").arg(state);
        command
            .args(["snapshot", "create", "--disk", "vda", "-d"])
            .arg(&xml);
        let ended = ended(patiently(&mut command));
        assert_eq!(ended.code, Some(7), "{}", ended.stderr);
        let text = ended.stderr.replace(&arg(dir.path()), "DIR");
        text.replace(&arg(bad.daemon.dir()), "DAEMON")
            .replace(bad.daemon.name(), "NAME")
    };
    assert_snapshot!("a_monitor_of_somebody_else", as_nobody(&state));
    assert_eq!(list(&state.join("images")), Vec::<std::path::PathBuf>::new());
    bad.site.ok(&["snapshot", "list", "-d", &bad.xml]);
    open(bad.site.dir.path());
    let text = as_nobody(&bad.site.state());
    assert_snapshot!("a_state_directory_of_somebody_else", bad.site.short(&text));
    assert_eq!(bad.count(), bad.nodes);
}
