//! Signals: an act is let to its end, a read stops at once, and nothing is left behind.

use std::process::{Child, Output, Stdio};
use std::time::Duration;

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need, pattern};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::site::{Site, arg, ended};

/// A daemon that can be hung: without files on it, whose closing would hang whoever starts a program.
fn daemon() -> (Site, StorageDaemon, String) {
    let disk = DiskSpec::new("vda", 32 * MIB);
    let daemon = StorageDaemon::builder().disk(disk).without_guest_side().start();
    let xml = arg(&daemon.domain_xml_file());
    (Site::new(), daemon, xml)
}

/// A run of the command that can be sent signals.
struct Run(Child);

impl Run {
    /// Starts it, and waits until it listens to signals.
    fn start(site: &Site, arguments: &[&str]) -> Self {
        let mut command = site.command(arguments);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let run = Self(child);
        while !run.listens() {
            std::thread::sleep(Duration::from_millis(5));
        }
        run
    }

    fn listens(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let caught = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:\t"))
            .unwrap();
        let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
        let bit = |signal: Signal| 1 << (signal.as_raw() - 1);
        caught & bit(Signal::INT) != 0 && caught & bit(Signal::TERM) != 0
    }

    fn send(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits until the command has said that it heard a signal.
    fn hears(&mut self) {
        use std::io::Read;
        let mut text = [0; 9];
        self.0.stderr.as_mut().unwrap().read_exact(&mut text).unwrap();
        assert_eq!(&text, b"disksnap:");
    }

    fn output(self) -> Output {
        self.0.wait_with_output().unwrap()
    }
}

#[test]
fn a_create_is_let_to_its_end() {
    let (site, daemon, xml) = daemon();
    site.ok(&["snapshot", "list", "-d", &xml]);
    daemon.hang();
    let mut run = Run::start(&site, &["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    run.send(Signal::INT);
    run.hears();
    daemon.unhang();
    let ended = ended(run.output());
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(
        String::from_utf8(ended.stdout)
            .unwrap()
            .starts_with("snapshot     nightly\n")
    );
    assert_eq!(
        site.json(&["snapshot", "show", "-d", &xml, "nightly"])["state"],
        "active"
    );
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
}

#[test]
fn a_second_signal_ends_it_and_recover_tidies_up() {
    let (site, daemon, xml) = daemon();
    let nodes = || {
        daemon
            .qmp("query-named-block-nodes", json!({}))
            .as_array()
            .unwrap()
            .len()
    };
    let before = nodes();
    daemon.hang();
    let mut run = Run::start(&site, &["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    run.send(Signal::TERM);
    run.hears();
    run.send(Signal::TERM);
    assert_eq!(run.output().status.code(), Some(143));
    daemon.unhang();
    site.ok(&["recover", "-d", &xml]);
    assert_eq!(site.ok(&["recover"]), "Nothing was left behind.\n");
    assert_eq!(
        site.json(&["snapshot", "list", "-d", &xml]),
        json!({ "snapshots": [] })
    );
    assert_eq!(nodes(), before);
    assert!(site.images().is_empty());
}

#[test]
fn a_read_stops_at_once_and_its_export_with_it() {
    need!("fuse");
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 32 * MIB))
        .start();
    let (site, xml) = (Site::new(), arg(&daemon.domain_xml_file()));
    daemon.disk("vda").write(0, &pattern::bytes(1, 32 << 20));
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    // Nobody empties the pipe, so the read cannot come to its end.
    let mut run = Run::start(&site, &["read", "-d", &xml, "nightly", "vda"]);
    run.send(Signal::INT);
    let stdout = run.0.stdout.take();
    let ended = ended(run.output());
    drop(stdout);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(130), ""));
    let exports = daemon.qmp("query-block-exports", json!({}));
    assert_eq!(
        exports.as_array().unwrap().len(),
        1,
        "only the guest's side: {exports:#}"
    );
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
}
