//! `disksnap read`: parts and wholes, to files and to pipes.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need, pattern, small_fs};
use serde_json::json;

use crate::site::{Site, arg, list};

const SIZE: u64 = 64 * MIB;

fn with_snapshot() -> (Site, StorageDaemon, String) {
    let daemon = StorageDaemon::builder().disk(DiskSpec::new("vda", SIZE)).start();
    daemon
        .disk("vda")
        .write(10 * MIB + 512, &pattern::bytes(1, 20 << 20));
    let (site, xml) = (Site::new(), arg(&daemon.domain_xml_file()));
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    (site, daemon, xml)
}

fn only_the_guest_is_served(daemon: &StorageDaemon) {
    let exports = daemon.qmp("query-block-exports", json!({}));
    assert_eq!(exports.as_array().unwrap().len(), 1, "{exports:#}");
}

#[test]
fn parts_and_the_whole() {
    need!("fuse");
    let (site, daemon, xml) = with_snapshot();
    let expected = daemon.disk("vda").read(0, SIZE);
    daemon.disk("vda").fill(0, SIZE, 3);
    let read = ["read", "-d", &xml, "nightly", "vda"];
    for (offset, length, range) in [
        ("0", "512", 0..512),
        ("10M", "4K", 10 << 20..(10 << 20) + 4096),
        ("11000001", "77", 11_000_001..11_000_078),
        ("64M", "0", 64 << 20..64 << 20),
    ] {
        let ended = site.run(&[&read[..], &["--offset", offset, "--length", length]].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stdout == expected[range], "{length} at {offset}");
    }
    let tail = site.run(&[&read[..], &["--offset", "60M"]].concat());
    assert!(tail.stdout == expected[60 << 20..]);
    let to = site.path("vda.raw");
    let ended = site.run(&[&read[..], &["--to", to.to_str().unwrap()]].concat());
    assert_eq!(
        (ended.code, ended.stdout.len(), ended.stderr.as_str()),
        (Some(0), 0, "")
    );
    assert!(std::fs::read(&to).unwrap() == expected);
    let found = to.metadata().unwrap();
    assert_eq!(found.mode() & 0o777, 0o600);
    assert!(
        found.blocks() * 512 < 21 << 20,
        "zeroes take room: {} blocks",
        found.blocks()
    );
    only_the_guest_is_served(&daemon);
}

#[test]
fn a_file_that_exists_is_left_alone_and_a_failure_leaves_nothing() {
    need!("fuse", "small-fs");
    let (site, daemon, xml) = with_snapshot();
    let mine = site.file("mine", "precious");
    let text = site.fails(4, &["read", "-d", &xml, "nightly", "vda", "--to", &mine]);
    assert!(
        text.contains("there is something of that name already (path SITE/mine)"),
        "{text}"
    );
    assert_eq!(std::fs::read_to_string(&mine).unwrap(), "precious");
    let fs = small_fs(4 * MIB);
    let to = fs.path().join("vda.raw");
    site.fails(
        10,
        &["read", "-d", &xml, "nightly", "vda", "--to", to.to_str().unwrap()],
    );
    assert!(list(fs.path()).is_empty());
    site.fails(
        3,
        &["read", "-d", &xml, "nightly", "vda", "--to", "/nowhere/at/all"],
    );
    only_the_guest_is_served(&daemon);
}

#[test]
fn a_reader_that_goes_away_is_no_error_to_tell() {
    need!("fuse");
    let (site, daemon, xml) = with_snapshot();
    let mut command = site.command(&["read", "-d", &xml, "nightly", "vda"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 100]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(141));
    only_the_guest_is_served(&daemon);
}

#[test]
fn a_terminal_is_spared() {
    let (site, path) = (Site::new(), "/dev/ptmx");
    let Ok(controller) =
        rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY)
    else {
        disksnap_test_support::skip!("pty", "there is no {path}");
    };
    rustix::pty::grantpt(&controller).unwrap();
    rustix::pty::unlockpt(&controller).unwrap();
    let name = rustix::pty::ptsname(&controller, Vec::new()).unwrap();
    let terminal = std::fs::File::options()
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut command = site.command(&["read", "-d", "/nowhere.xml", "nightly", "vda"]);
    let output = command.stdout(terminal).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("a disk's bytes are not for a terminal"), "{text}");
}
