//! Snapshots that lie on this host: read, exported with the domain on and off, beside the hypervisor's, through kills.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use disksnap_test_support::{DiskSpec, LoopFs, LoopFsKind, MIB, Qemu, loop_fs, need, pattern};
use serde_json::{Value, json};

use crate::daemons;
use crate::programs::program as run;
use crate::site::{Site, arg, list};

const SIZE: u64 = 32 * MIB;

/// A domain that is off. Its disk `vda` has three layers in a subvolume of its own.
struct Off {
    // First: the daemons go before the file system.
    site: Site,
    fs: LoopFs,
    xml: String,
    /// What the disk holds.
    digest: String,
}

impl Off {
    fn new() -> Self {
        let site = Site::new();
        let fs = loop_fs(LoopFsKind::Btrfs, 300 * MIB, "");
        run(
            "btrfs",
            &["-q", "subvolume", "create", &arg(&fs.path().join("images"))],
        );
        let layer = |name: &str| arg(&fs.path().join("images").join(name));
        let (base, mid, top) = (layer("base.raw"), layer("mid.qcow2"), layer("top.qcow2"));
        std::fs::write(&base, pattern::bytes(1, usize::try_from(SIZE).unwrap())).unwrap();
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", &mid],
        );
        run("qemu-io", &["-c", "write -P 2 4M 4M", &mid]);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "mid.qcow2",
                &top,
            ],
        );
        run(
            "qemu-io",
            &["-c", "write -P 3 6M 4M", "-c", "write -z 10M 4M", &top],
        );
        let flat = site.path("flat.raw");
        run("qemu-img", &["convert", "-O", "raw", &top, &arg(&flat)]);
        let digest = pattern::digest_file(&flat);
        let xml = site.file(
            "off.xml",
            &format!(
                "<domain type='qemu'><name>off</name><uuid>6f3c5a4e-0000-4000-8000-000000000001</uuid><devices>\
                 <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{top}'/>\
                 <target dev='vda' bus='virtio'/></disk></devices></domain>"
            ),
        );
        let off = Self {
            site,
            fs,
            xml,
            digest,
        };
        // Only what the document names is trusted to belong to the disk.
        off.site
            .ok(&["-q", "-d", &off.xml, "domain", "update", "--chain"]);
        off.create("nightly");
        off
    }

    fn create(&self, name: &str) {
        let disk = "vda,method=btrfs";
        self.site.ok(&[
            "-q", "-d", &self.xml, "snapshot", "create", "--name", name, "--disk", disk,
        ]);
    }

    /// What comes over an export.
    fn copied(&self, uri: &str) -> String {
        let to = self.site.path("copied.raw");
        run("nbdcopy", &[uri, &arg(&to)]);
        pattern::digest_file(&to)
    }

    fn daemons(&self) -> Vec<i32> {
        daemons::of(&self.site.run_dir())
    }

    fn nothing_left(&self, when: &str) {
        assert_eq!(self.daemons(), Vec::<i32>::new(), "{when}");
        assert_eq!(list(&self.site.run_dir()), Vec::<PathBuf>::new(), "{when}");
    }
}

fn uri(serving: &Value, n: usize) -> String {
    serving["exports"][n]["uri"].as_str().unwrap().to_owned()
}

#[test]
fn an_image_with_layers_is_read_and_exported_while_the_domain_is_off() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    // The live layers go on without the snapshot noticing.
    let live = |name: &str| arg(&off.fs.path().join("images").join(name));
    run("qemu-img", &["commit", "-q", &live("top.qcow2")]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 9 0 32M", &live("base.raw")],
    );
    let whole = site.path("whole.raw");
    site.ok(&["-d", xml, "read", "nightly", "vda", "--to", &arg(&whole)]);
    assert_eq!(pattern::digest_file(&whole), off.digest);
    off.nothing_left("after a read");
    let part = site.run(&[
        "-d", xml, "read", "nightly", "vda", "--offset", "6291450", "--length", "12",
    ]);
    assert_eq!(part.stdout, [[2; 6], [3; 6]].concat(), "{}", part.stderr);

    let started = site.json(&["-d", xml, "export", "start", "nightly"]);
    assert_eq!(started["server"], Value::Null);
    assert_eq!(off.copied(&uri(&started, 0)), off.digest);
    assert_eq!(site.json(&["-d", xml, "export", "list"]), started);
    let shown = site.json(&["-d", xml, "snapshot", "show", "nightly"]);
    let source = &shown["disks"][0]["backupSource"];
    assert_eq!(
        (&source["uri"], &source["format"]),
        (&started["exports"][0]["uri"], &json!("raw"))
    );
    assert!(
        site.ok(&["-d", xml, "domain", "show"])
            .contains("<blockexport type='nbd'>")
    );
    let text = site.fails(4, &["-d", xml, "export", "start", "nightly"]);
    assert!(text.contains("is being exported already"), "{text}");
    // A reader beside it uses the same server.
    let whole = site.path("again.raw");
    site.ok(&["-d", xml, "read", "nightly", "vda", "--to", &arg(&whole)]);
    assert_eq!(pattern::digest_file(&whole), off.digest);
    assert_eq!(off.daemons().len(), 1);
    assert_eq!(
        site.json(&["recover"]),
        json!({"recovered": []}),
        "what serves is left alone"
    );
    assert_eq!(off.daemons().len(), 1);
    site.ok(&["-d", xml, "export", "stop", "nightly"]);
    off.nothing_left("after the last export");
    assert_eq!(
        site.ok(&["-d", xml, "export", "stop", "nightly"]),
        "Nothing was being served.\n"
    );
    // A delete takes the exports with it.
    site.ok(&["-d", xml, "export", "start", "nightly"]);
    site.ok(&["-d", xml, "snapshot", "delete", "nightly"]);
    off.nothing_left("after the delete");
}

#[test]
fn addresses_follow_the_same_rules_and_a_server_by_itself_stays() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    let text = site.fails(
        7,
        &[
            "-d",
            xml,
            "export",
            "start",
            "nightly",
            "--listen",
            "0.0.0.0:10809",
        ],
    );
    assert!(text.contains("could read the disks"), "{text}");
    off.nothing_left("after a refusal");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let place = format!("127.0.0.1:{port}");
    let start = [
        "-d", xml, "export", "server", "start", "--images", "--listen", &place,
    ];
    let server = site.json(&start);
    assert_eq!(
        (&server["listen"], &server["explicit"]),
        (&json!(place), &json!(true))
    );
    assert_eq!(site.json(&start), server);
    let text = site.fails(
        6,
        &["-d", xml, "export", "start", "nightly", "--listen", "127.0.0.1:1"],
    );
    assert!(
        text.contains("one NBD server for the images on this host"),
        "{text}"
    );
    let started = site.json(&["-d", xml, "export", "start", "nightly"]);
    assert_eq!(uri(&started, 0), format!("nbd://{place}/vda-backup"));
    assert_eq!(off.copied(&uri(&started, 0)), off.digest);
    site.fails(6, &["-d", xml, "export", "server", "stop", "--images"]);
    site.ok(&["-d", xml, "export", "stop", "--all"]);
    assert_eq!(off.daemons().len(), 1);
    assert_eq!(site.json(&["recover"]), json!({"recovered": []}));
    assert_eq!(off.daemons().len(), 1);
    site.ok(&["-d", xml, "export", "server", "stop", "--images"]);
    site.ok(&["-d", xml, "export", "server", "stop", "--images"]);
    off.nothing_left("after the stop");
    // Somebody else's port.
    let _taken = std::net::TcpListener::bind(&place).unwrap();
    let text = site.fails(6, &["-d", xml, "export", "start", "nightly", "--listen", &place]);
    assert!(text.contains("is in use"), "{text}");
    off.nothing_left("after a port that is taken");
}

#[test]
fn tls_is_spoken_and_the_reader_speaks_it_too() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    let directory = site.path("pki");
    crate::exports::credentials(&directory);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap().to_string();
    drop(listener);
    let start = ["-d", xml, "export", "start", "nightly", "--listen", &place];
    let served = site.json(&[&start[..], &["--tls-credentials", &arg(&directory)]].concat());
    assert_eq!(served["imageServer"]["tls"]["verifyClient"], true);
    let uri = uri(&served, 0);
    assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
    let verified = format!("{uri}?tls-certificates={}", arg(&directory));
    assert_eq!(off.copied(&verified), off.digest);
    let to = site.path("read.raw");
    site.ok(&["-d", xml, "read", "nightly", "vda", "--to", &arg(&to)]);
    assert_eq!(pattern::digest_file(&to), off.digest);
    // A guest's disk would need certificates of its own.
    let text = site.fails(8, &["-d", xml, "attach", "nightly", "vda", "--to", xml]);
    assert!(text.contains("does not run"), "{text}");
    site.ok(&["-d", xml, "export", "stop", "--all"]);
    off.nothing_left("after TLS");
}

#[test]
fn the_image_server_keeps_a_list_of_clients_too() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    let directory = site.path("pki");
    crate::exports::credentials(&directory);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap().to_string();
    drop(listener);
    let pki = arg(&directory);
    let start = [
        "-d",
        xml,
        "export",
        "start",
        "nightly",
        "--listen",
        &place,
        "--tls-credentials",
        &pki,
    ];
    let served = site.json(&[&start[..], &["--allow-client", "O=Example,CN=other"]].concat());
    let uri = uri(&served, 0);
    assert!(crate::exports::is_let_in(&uri, &directory.join("other")));
    assert!(!crate::exports::is_let_in(&uri, &directory));
    // The list holds for the reader, which shows the certificate beside the server's.
    let text = site.fails(
        7,
        &[
            "-d",
            xml,
            "read",
            "nightly",
            "vda",
            "--to",
            &arg(&site.path("read.raw")),
        ],
    );
    assert!(text.contains("TLS"), "{text}");
    site.ok(&["-d", xml, "export", "stop", "--all"]);
    off.nothing_left("after the list");
}

#[test]
fn a_daemon_that_died_is_told_and_started_anew() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    site.ok(&["-d", xml, "export", "start", "nightly"]);
    daemons::kill(&site.run_dir());
    assert_eq!(site.json(&["-d", xml, "export", "list"])["exports"], json!([]));
    let started = site.json(&["-d", xml, "export", "start", "nightly"]);
    assert_eq!(off.copied(&uri(&started, 0)), off.digest);
    daemons::kill(&site.run_dir());
    let recovered = site.json(&["recover"]);
    assert_eq!(
        recovered["recovered"][0]["what"],
        "the image server without exports"
    );
    off.nothing_left("after recover");
    assert_eq!(site.json(&["recover"]), json!({"recovered": []}));
    site.ok(&["-d", xml, "export", "stop", "--all"]);
}

#[test]
fn without_the_program_nothing_is_left_and_the_next_step_is_told() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    let fails = |program: &str, said: &str| {
        let mut command = site.command(&["-d", xml, "export", "start", "nightly"]);
        let output = command.env("DISKSNAP_STORAGE_DAEMON", program).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(8), "{text}");
        assert!(text.contains(said), "{text}");
        off.nothing_left(program);
    };
    fails("/nowhere/qemu-storage-daemon", "there is no program");
    fails("/bin/false", "the storage daemon ended at once");
}

fn kill_after(site: &Site, delay: Duration, arguments: &[&str]) -> bool {
    let mut command = site.command(arguments);
    let mut child = command
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

#[test]
fn killed_at_any_moment_recover_leaves_no_daemon() {
    need!("btrfs");
    let off = Off::new();
    let (site, xml) = (&off.site, off.xml.as_str());
    let start = ["-d", xml, "export", "start", "nightly"];
    let stop = ["-d", xml, "export", "stop", "nightly"];
    let copy = arg(&site.path("copy.raw"));
    let read = ["-d", xml, "read", "nightly", "vda", "--to", &copy];
    let since = Instant::now();
    site.ok(&start);
    let whole = since.elapsed();
    site.ok(&stop);
    let (rounds, mut killed) = (16, 0);
    for round in 0..rounds {
        killed += u32::from(kill_after(site, whole * round / rounds, &start));
        site.ok(&["recover"]);
        // One that came to its end before the kill serves.
        if site.json(&["-d", xml, "export", "list"])["exports"] == json!([]) {
            off.nothing_left(&format!("round {round}"));
        }
        site.ok(&stop);
        off.nothing_left(&format!("after the stop, round {round}"));
        site.ok(&start);
        kill_after(site, whole * round / rounds, &stop);
        site.ok(&["recover"]);
        site.ok(&stop);
        off.nothing_left(&format!("after a killed stop, round {round}"));
        kill_after(site, whole * round / rounds, &read);
        site.ok(&["recover"]);
        off.nothing_left(&format!("after a killed reader, round {round}"));
        let _ = std::fs::remove_file(&copy);
    }
    assert!(
        killed > 4,
        "only {killed} of {rounds} were killed at work: the test proves little"
    );
    let started = site.json(&start);
    assert_eq!(off.copied(&uri(&started, 0)), off.digest);
    site.ok(&stop);
}

/// One snapshot by two methods: `vda` is fleeced inside QEMU, `vdb` is a clone on XFS.
#[test]
fn both_kinds_of_one_snapshot_are_served_side_by_side() {
    need!("xfs");
    let fs = loop_fs(LoopFsKind::Xfs, 400 * MIB, "");
    let image = fs.path().join("vdb.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &arg(&image), "8M"]);
    let vdb = DiskSpec::new("vdb", 8 * MIB).qcow2().image(&image);
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 8 * MIB).qcow2())
        .disk(vdb)
        .start();
    let (site, xml) = (Site::new(), arg(&qemu.domain_xml_file()));
    qemu.write("vda", 0, MIB, 1);
    qemu.write("vdb", 0, MIB, 2);
    let create = [
        "-d", &xml, "snapshot", "create", "--name", "both", "--disk", "vda",
    ];
    site.ok(&[&create[..], &["--disk", "vdb,method=reflink"]].concat());
    qemu.write("vda", 0, MIB, 8);
    qemu.write("vdb", 0, MIB, 9);

    let text = site.fails(
        2,
        &[
            "-d",
            &xml,
            "export",
            "start",
            "both",
            "--listen",
            "127.0.0.1:10809",
        ],
    );
    assert!(
        text.contains("two servers cannot listen on one address: vda is served by the hypervisor"),
        "{text}"
    );
    assert!(text.contains("give no address"), "{text}");
    assert!(daemons::of(&site.run_dir()).is_empty());
    // All or nothing: where the one cannot serve, the other does not either.
    let mut command = site.command(&["-d", &xml, "export", "start", "both"]);
    let failed = command
        .env("DISKSNAP_STORAGE_DAEMON", "/bin/false")
        .output()
        .unwrap();
    assert_eq!(failed.status.code(), Some(8), "{failed:?}");
    assert_eq!(qemu.qmp("query-block-exports", json!({})), json!([]));
    let nothing = site.json(&["-d", &xml, "export", "list"]);
    assert_eq!(nothing, json!({"server": null, "exports": []}));
    let started = site.json(&["-d", &xml, "export", "start", "both"]);
    assert_ne!(started["server"]["listen"], started["imageServer"]["listen"]);
    for (n, byte) in [(0, 1), (1, 2)] {
        let to = site.path(&format!("{n}.raw"));
        run("nbdcopy", &[&uri(&started, n), &arg(&to)]);
        let content = std::fs::read(&to).unwrap();
        assert_eq!(content.len() as u64, 8 * MIB);
        assert!(content[..1 << 20].iter().all(|b| *b == byte), "disk {n}");
    }
    let document = site.ok(&["-d", &xml, "export", "list", "--output", "xml"]);
    assert_eq!(
        document.matches("<blockexport type='nbd'>").count(),
        2,
        "{document}"
    );
    assert_eq!(
        site.ok(&["-d", &xml, "domain", "show"])
            .matches("<blockexport type=")
            .count(),
        2
    );
    let text = site.ok(&["-d", &xml, "export", "list"]);
    assert!(
        text.starts_with("hypervisor\n") && text.contains("\nimages on this host\n"),
        "{text}"
    );
    // What was asked of one server leaves the other alone.
    site.ok(&["-d", &xml, "export", "stop", "virtio-disk1-backup"]);
    assert!(daemons::of(&site.run_dir()).is_empty());
    assert_eq!(
        site.json(&["-d", &xml, "export", "list"])["exports"][0]["target"],
        "vda"
    );
    site.ok(&["-d", &xml, "export", "start", "both", "--disk", "vdb"]);
    site.ok(&["-d", &xml, "snapshot", "delete", "both"]);
    assert!(daemons::of(&site.run_dir()).is_empty());
    assert_eq!(qemu.qmp("query-block-exports", json!({})), json!([]));
    assert!(!Path::new(&site.run_dir()).read_dir().unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().contains("im")
    }));
}
