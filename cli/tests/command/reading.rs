//! `disksnap read`: parts and wholes, to files and to pipes.

use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;

use disksnap_test_support::{
    DiskSpec, LoopFsKind, MIB, Qemu, StorageDaemon, loop_fs, need, pattern, small_fs,
};
use serde_json::json;

use crate::programs::program;
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

/// The disk of a snapshot, read whole; its digest and bytes.
fn whole(site: &Site, xml: &str, snapshot: &str) -> Vec<u8> {
    let ended = site.run(&["read", "-d", xml, snapshot, "vda"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout
}

/// Writes of all kinds and lengths.
fn alter(machine: &Qemu, seed: u64) {
    let (disk, mut random) = (machine.disk("vda"), pattern::Random::new(seed));
    for n in 0..40 {
        let length = 512 * (1 + random.below(300));
        let offset = 512 * random.below((SIZE - length) / 512);
        match n % 4 {
            0 => disk.zero(offset, length),
            1 => disk.discard(offset, length),
            _ => disk.write(
                offset,
                &pattern::bytes(seed + n, usize::try_from(length).unwrap()),
            ),
        }
    }
    // Long enough to be told as zero and not to be read.
    disk.zero(512 * random.below(20_000), 3 * MIB);
    disk.discard(20 * MIB + 512 * random.below(10_000), 3 * MIB);
}

#[test]
fn an_earlier_copy_is_brought_up_to_date() {
    let machine = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let (site, xml) = (Site::new(), arg(&machine.domain_xml_file()));
    let create = ["snapshot", "create", "-q", "-d", &xml, "--checkpoint", "--name"];
    machine.disk("vda").write(0, &pattern::bytes(1, 30 << 20));
    site.ok(&[&create[..], &["monday"]].concat());
    alter(&machine, 100);
    let (copy, new, part) = (
        arg(&site.path("copy")),
        arg(&site.path("new")),
        arg(&site.path("part")),
    );
    site.ok(&["read", "-d", &xml, "monday", "vda", "--to", &copy]);
    site.ok(&[&create[..], &["tuesday"]].concat());
    alter(&machine, 200);
    let tuesday = whole(&site, &xml, "tuesday");
    let changes = site.json(&["changes", "-d", &xml, "--from", "monday", "--to", "tuesday"]);
    let read = ["read", "-d", &xml, "tuesday", "vda", "--changed-since", "monday"];

    // A new file has what changed, and holes.
    assert_eq!(site.json(&[&read[..], &["--to", &new]].concat()), changes);
    let mut expected = vec![0; tuesday.len()];
    let mut told = 0;
    for extent in changes["changes"].as_array().unwrap() {
        let at = |key: &str| usize::try_from(extent[key].as_u64().unwrap()).unwrap();
        let range = at("offset")..at("offset") + at("length");
        told += range.len() as u64;
        expected[range.clone()].copy_from_slice(&tuesday[range]);
    }
    assert!(std::fs::read(&new).unwrap() == expected);
    assert!(told > MIB && Path::new(&new).metadata().unwrap().blocks() * 512 <= told);
    site.fails(4, &[&read[..], &["--to", &new]].concat());

    // A part of it, whose beginning is the file's.
    let some = ["--to", &part, "--offset", "1000001", "--length", "9M"];
    let listed = site.ok(&[&read[..], &some].concat());
    assert!(listed.starts_with("DISK  OFFSET  LENGTH\nvda  "), "{listed}");
    assert!(std::fs::read(&part).unwrap() == expected[1_000_001..1_000_001 + (9 << 20)]);

    // Onto the copy, in two parts, and again.
    for some in [["--length", "30M"], ["--offset", "30M"], ["--offset", "0"]] {
        site.ok(&[&read[..], &["--onto", &copy], &some].concat());
    }
    assert!(std::fs::read(&copy).unwrap() == tuesday);
    assert_eq!(site.json(&[&read[..], &["--onto", &copy]].concat()), changes);
    assert!(std::fs::read(&copy).unwrap() == tuesday);
    assert_eq!(machine.qmp("query-block-exports", json!({})), json!([]));
}

#[test]
fn what_is_no_earlier_copy_is_left_alone() {
    let machine = Qemu::builder().disk(DiskSpec::new("vda", SIZE)).start();
    let (site, xml) = (Site::new(), arg(&machine.domain_xml_file()));
    for name in ["monday", "tuesday"] {
        site.ok(&[
            "snapshot",
            "create",
            "-q",
            "-d",
            &xml,
            "--checkpoint",
            "--name",
            name,
        ]);
    }
    let read = ["read", "-d", &xml, "tuesday", "vda", "--changed-since", "monday"];
    let text = site.fails(2, &read);
    assert!(
        text.contains("Give a new file with --to, or with --onto a copy"),
        "{text}"
    );
    let short = site.file("short", "precious");
    let text = site.fails(2, &[&read[..], &["--onto", &short]].concat());
    assert!(
        text.contains("this is no copy of the disk: it has 8 bytes, and the disk has 67108864 bytes"),
        "{text}"
    );
    let own = arg(machine.image("vda"));
    let text = site.fails(2, &[&read[..], &["--onto", &own]].concat());
    assert!(
        text.contains("the file belongs to the domain's disk vda"),
        "{text}"
    );
    let used = site.path("used");
    let file = std::fs::File::create_new(&used).unwrap();
    file.set_len(SIZE).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    site.fails(6, &[&read[..], &["--onto", &arg(&used)]].concat());
    site.fails(3, &[&read[..], &["--onto", &arg(&site.path("none"))]].concat());
    site.fails(2, &["read", "-d", &xml, "tuesday", "vda", "--onto", &short]);
    site.fails(2, &[&read[..], &["--onto", &short, "--to", "/nowhere"]].concat());
    let since = ["read", "-d", &xml, "tuesday", "vda", "--changed-since", "never"];
    site.fails(3, &[&since[..], &["--onto", &arg(&used)]].concat());
    assert_eq!(std::fs::read_to_string(&short).unwrap(), "precious");
    assert_eq!(used.metadata().unwrap().blocks(), 0);
    assert_eq!(machine.qmp("query-block-exports", json!({})), json!([]));
}

#[test]
fn a_copy_that_was_not_finished_is_finished_by_repeating() {
    need!("fuse", "small-fs");
    let machine = Qemu::builder().disk(DiskSpec::new("vda", SIZE)).start();
    let (site, xml) = (Site::new(), arg(&machine.domain_xml_file()));
    let fs = small_fs(16 * MIB);
    let (copy, ballast) = (fs.path().join("copy"), fs.path().join("ballast"));
    let create = ["snapshot", "create", "-q", "-d", &xml, "--checkpoint", "--name"];
    machine.disk("vda").write(MIB, &pattern::bytes(1, 70_144));
    site.ok(&[&create[..], &["monday"]].concat());
    site.ok(&["read", "-d", &xml, "monday", "vda", "--to", &arg(&copy)]);
    std::fs::write(&ballast, pattern::bytes(2, 12 << 20)).unwrap();
    machine.disk("vda").write(2 * MIB, &pattern::bytes(3, 6 << 20));
    machine.disk("vda").zero(MIB, 512);
    site.ok(&[&create[..], &["tuesday"]].concat());
    let onto = arg(&copy);
    let onto = [
        "read",
        "-d",
        &xml,
        "tuesday",
        "vda",
        "--changed-since",
        "monday",
        "--onto",
        &onto,
    ];
    let text = site.fails(10, &onto);
    assert!(text.contains("the file is between the two states"), "{text}");
    assert!(text.contains("next: Repeat the same command"), "{text}");
    std::fs::remove_file(&ballast).unwrap();
    site.ok(&onto);
    assert!(std::fs::read(&copy).unwrap() == whole(&site, &xml, "tuesday"));
}

/// What it grew by is as the image has it, which for a volume is what lay there before.
#[test]
fn a_copy_follows_the_size_of_the_disk() {
    let machine = Qemu::builder().disk(DiskSpec::new("vda", SIZE)).start();
    let (site, xml) = (Site::new(), arg(&machine.domain_xml_file()));
    machine.disk("vda").write(0, &pattern::bytes(1, 64 << 20));
    let copy = arg(&site.path("copy"));
    let mut before = None;
    for (name, size) in [
        ("monday", SIZE),
        ("tuesday", SIZE + 8 * MIB),
        ("wednesday", SIZE - 8 * MIB),
    ] {
        if size > SIZE {
            // Behind QEMU's back: nothing marks it.
            let image = std::fs::File::options()
                .write(true)
                .open(machine.image("vda"))
                .unwrap();
            image.write_all_at(&pattern::bytes(2, 8 << 20), SIZE).unwrap();
        }
        let node = machine.top_node("vda");
        machine.qmp("block_resize", json!({"node-name": node, "size": size}));
        site.ok(&[
            "snapshot",
            "create",
            "-q",
            "-d",
            &xml,
            "--checkpoint",
            "--name",
            name,
        ]);
        match before {
            None => site.ok(&["read", "-d", &xml, name, "vda", "--to", &copy]),
            Some(before) => {
                let read = ["read", "-d", &xml, name, "vda", "--changed-since", before];
                site.ok(&[&read[..], &["--onto", &copy]].concat())
            }
        };
        assert!(
            std::fs::read(&copy).unwrap() == whole(&site, &xml, name),
            "{name}"
        );
        machine
            .disk("vda")
            .write(3 * MIB, &pattern::bytes(size, 70_000 / 512 * 512));
        // A disk with a snapshot has one size.
        site.ok(&["snapshot", "delete", "-d", &xml, name]);
        before = Some(name);
    }
}

#[test]
fn a_copy_of_a_domain_that_is_off_is_brought_up_to_date() {
    need!("btrfs");
    let site = Site::new();
    let fs = loop_fs(LoopFsKind::Btrfs, 300 * MIB, "");
    program(
        "btrfs",
        &["-q", "subvolume", "create", &arg(&fs.path().join("images"))],
    );
    let image = fs.path().join("images/vda.raw");
    std::fs::write(&image, pattern::bytes(1, usize::try_from(SIZE).unwrap())).unwrap();
    let xml = site.file(
        "off.xml",
        &format!(
            "<domain type='qemu'><name>off</name><uuid>6f3c5a4e-0000-4000-8000-000000000002</uuid><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk></devices></domain>",
            image.display()
        ),
    );
    let create = [
        "snapshot",
        "create",
        "-q",
        "-d",
        &xml,
        "--disk",
        "vda,method=btrfs",
        "--checkpoint",
        "--name",
    ];
    let copy = arg(&site.path("copy"));
    site.ok(&[&create[..], &["monday"]].concat());
    site.ok(&["read", "-d", &xml, "monday", "vda", "--to", &copy]);
    let live = std::fs::File::options().write(true).open(&image).unwrap();
    live.write_all_at(&pattern::bytes(2, 100_000), 5_000_000).unwrap();
    let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&live, hole, 20 << 20, 3 << 20).unwrap();
    live.sync_all().unwrap();
    let expected = std::fs::read(&image).unwrap();
    site.ok(&[&create[..], &["tuesday"]].concat());
    live.write_all_at(&pattern::bytes(3, 100_000), 0).unwrap();
    let read = ["read", "-d", &xml, "tuesday", "vda", "--changed-since", "monday"];
    let told = site.json(&[&read[..], &["--onto", &copy]].concat());
    assert!(std::fs::read(&copy).unwrap() == expected, "{told:#}");
    assert_eq!(told["superset"][0]["disk"], "vda");
}
