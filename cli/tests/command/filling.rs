//! Restoring into paused domains: filled by clients, ended and killed at any step, on real QEMUs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use disksnap_test_support::tools::QemuVersion;
use disksnap_test_support::{DiskSpec, MIB, Qemu, pattern};
use serde_json::{Value, json};

use crate::programs::program as run;
use crate::site::{Site, arg, list};
use crate::strike::{Strike, When};

const SIZE: u64 = 4 * MIB;
const TARGETS: [&str; 3] = ["vda", "vdb", "sda"];

/// A paused machine with three disks, and what it is reached by.
struct Vm {
    // First: what is in the state directory is of the machine.
    site: Site,
    qemu: Qemu,
    xml: String,
}

/// How a machine came to stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stood {
    /// It has not run.
    Prelaunch,
    /// It was paused.
    Paused,
}

impl Vm {
    fn new() -> Self {
        Self::of(QemuVersion::V10_0, false, Stood::Prelaunch)
    }

    /// Two disks on virtio-blk, one on virtio-scsi, all with something on them.
    fn of(version: QemuVersion, iothread: bool, stood: Stood) -> Self {
        let spec = |spec: DiskSpec| if iothread { spec.iothread() } else { spec };
        let mut builder = Qemu::builder().version(version);
        if stood == Stood::Prelaunch {
            builder = builder.prelaunch();
        }
        let qemu = builder
            .disk(spec(DiskSpec::new("vda", SIZE).qcow2()))
            .disk(spec(DiskSpec::new("vdb", SIZE)))
            .disk(spec(DiskSpec::new("sda", SIZE).qcow2().scsi()))
            .start();
        for target in TARGETS {
            qemu.write(target, 0, SIZE, 0x55);
            // What it has read it may keep.
            let before = qemu.disk(target).read(0, 4096);
            assert!(before.iter().all(|byte| *byte == 0x55));
        }
        if stood == Stood::Paused {
            qemu.qmp("stop", json!({}));
        }
        let xml = arg(&qemu.domain_xml_file());
        Self {
            site: Site::new(),
            qemu,
            xml,
        }
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        [&["-d", &self.xml][..], words].concat()
    }

    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&self.words(words))
    }

    fn ok(&self, words: &[&str]) -> String {
        self.site.ok(&self.words(words))
    }

    fn fails(&self, code: i32, words: &[&str]) -> String {
        self.site.fails(code, &self.words(words))
    }

    /// A file of random bytes.
    fn content(&self, seed: u64) -> String {
        let path = self.site.path(&format!("content-{seed}.raw"));
        std::fs::write(&path, pattern::bytes(seed, usize::try_from(SIZE).unwrap())).unwrap();
        arg(&path)
    }

    fn assert_holds(&self, target: &str, content: &str, when: &str) {
        let disk = self.qemu.disk(target);
        assert_eq!(
            disk.digest(),
            pattern::digest_file(Path::new(content)),
            "{target} {when}"
        );
        let bytes = std::fs::read(content).unwrap();
        for at in [0, usize::try_from(SIZE).unwrap() - 8192] {
            let seen = disk.read(at as u64, 8192);
            assert!(
                seen == bytes[at..at + 8192],
                "{when}: the guest sees old bytes of {target} at {at}"
            );
        }
    }

    /// The guest has its disks and no others, and nothing else is left.
    fn assert_whole(&self, when: &str) {
        let nodes = self
            .qemu
            .qmp("query-named-block-nodes", json!({ "flat": true }))
            .to_string();
        assert!(
            !nodes.contains("\"ds-") && !nodes.contains("null-co"),
            "{when}: {nodes}"
        );
        assert_eq!(
            self.qemu.qmp("query-block-exports", json!({})),
            json!([]),
            "{when}"
        );
        let devices = self.qemu.qmp("query-block", json!({}));
        let mut found: Vec<&str> = devices
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|device| device["inserted"]["node-name"].as_str())
            .collect();
        found.sort_unstable();
        let mut wanted = TARGETS.map(|target| self.qemu.top_node(target));
        wanted.sort_unstable();
        assert_eq!(found, wanted, "{when}");
        assert_eq!(self.json(&["fill", "list"]), json!({"filling": null}), "{when}");
        assert_eq!(self.json(&["export", "list"])["server"], Value::Null, "{when}");
    }

    /// Nothing listens any more, and nothing looks like it.
    fn assert_no_socket(&self, when: &str) {
        let sockets: Vec<_> = list(&self.site.run_dir())
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "sock"))
            .collect();
        assert!(sockets.is_empty(), "{when}: {sockets:?}");
    }
}

fn uri(told: &Value, n: usize) -> String {
    told["filling"]["disks"][n]["uri"].as_str().unwrap().to_owned()
}

/// Writes a file to an export, as a restoring program does.
fn copy(content: &str, uri: &str) {
    run("nbdcopy", &["--flush", content, uri]);
}

/// On both QEMUs, on virtio-blk and virtio-scsi, with iothreads and without, not yet run and paused.
#[test]
fn a_paused_guest_goes_on_from_what_its_disks_are_filled_with() {
    for version in [QemuVersion::V10_0, QemuVersion::V7_2] {
        for iothread in [false, true] {
            for stood in [Stood::Prelaunch, Stood::Paused] {
                let when = format!("{} {iothread} {stood:?}", version.as_str());
                filled_and_resumed(&Vm::of(version, iothread, stood), stood, &when);
            }
        }
    }
}

fn filled_and_resumed(vm: &Vm, stood: Stood, when: &str) {
    let status = vm.qemu.status();
    let told = vm.json(&["fill", "start"]);
    let filling = &told["filling"];
    assert_eq!(
        (&filling["state"], &filling["skipped"][0]["target"]),
        (&json!("open"), &json!("hdc")),
        "{when}"
    );
    assert_eq!(
        filling["warnings"].as_array().unwrap().is_empty(),
        stood == Stood::Prelaunch,
        "{when}"
    );
    assert_eq!(vm.json(&["fill", "list"]), told, "{when}");
    assert_eq!(vm.json(&["fill", "start"]), told, "{when}: again is the same");
    assert_eq!(
        vm.site.json(&["recover"]),
        json!({"recovered": []}),
        "{when}: what is open is left alone"
    );
    let mut contents = Vec::new();
    for (n, target) in TARGETS.iter().enumerate() {
        let disk = &filling["disks"][n];
        assert_eq!(
            (&disk["target"], &disk["size"]),
            (&json!(target), &json!(SIZE)),
            "{when}"
        );
        let content = vm.content(n as u64);
        copy(&content, &uri(&told, n));
        contents.push(content);
    }
    assert_eq!(vm.qemu.status(), status, "{when}: the guest was not touched");
    let ended = vm.json(&["fill", "end", "--resume"]);
    assert_eq!(ended, json!({"disks": TARGETS, "resumed": true}), "{when}");
    assert_eq!(vm.qemu.status(), "running", "{when}");
    for (target, content) in TARGETS.iter().zip(&contents) {
        vm.assert_holds(target, content, when);
        vm.qemu.write(target, 0, MIB, 0x77);
    }
    vm.assert_whole(when);
    vm.assert_no_socket(when);
    let again = vm.ok(&["fill", "end"]);
    assert_eq!(
        again, "Nothing was being filled; the guest is left as it is.\n",
        "{when}"
    );
    assert_eq!(vm.qemu.status(), "running", "{when}");
}

/// The firmware starts what was written to an empty disk before the machine ran.
#[test]
fn the_machine_boots_from_a_disk_that_was_filled() {
    let disk = DiskSpec::new("vda", SIZE).qcow2();
    let qemu = Qemu::builder().disk(disk).prelaunch().start();
    let vm = Vm {
        site: Site::new(),
        xml: arg(&qemu.domain_xml_file()),
        qemu,
    };
    // To the serial port, then halt.
    let mut sector = vec![0xba, 0xf8, 0x03];
    sector.extend(b"RESTORED\n".iter().flat_map(|byte| [0xb0, *byte, 0xee]));
    sector.extend([0xf4, 0xeb, 0xfd]);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(usize::try_from(SIZE).unwrap(), 0);
    let content = vm.site.path("boot.raw");
    std::fs::write(&content, sector).unwrap();
    let told = vm.json(&["fill", "start", "--disk", "vda"]);
    copy(&arg(&content), &uri(&told, 0));
    vm.ok(&["fill", "end", "--resume"]);
    let booted = |serial: &str| serial.contains("RESTORED").then_some(());
    vm.qemu.wait_serial("the restored boot sector", booted);
}

/// The checkpoints of the disk know what was filled, to the block, and no more.
#[test]
fn what_is_filled_is_in_the_next_increment() {
    let vm = Vm::of(QemuVersion::V10_0, false, Stood::Paused);
    vm.ok(&[
        "snapshot",
        "create",
        "--name",
        "one",
        "--checkpoint",
        "--disk",
        "vda",
        "--disk",
        "sda",
    ]);
    vm.ok(&["snapshot", "delete", "one"]);
    let told = vm.json(&["fill", "start", "--disk", "vda", "--disk", "sda"]);
    for n in 0..2 {
        let writes = [
            "-f",
            "raw",
            "-c",
            "write -P 1 64k 64k",
            "-c",
            "write -z 1M 128k",
            "-c",
            "discard 3M 64k",
        ];
        run("qemu-io", &[&writes[..], &[uri(&told, n).as_str()]].concat());
    }
    vm.ok(&["fill", "end", "--resume"]);
    vm.ok(&[
        "snapshot", "create", "--name", "two", "--disk", "vda", "--disk", "sda",
    ]);
    for target in ["vda", "sda"] {
        let changes = vm.json(&["changes", "--from", "one", "--to", "two", "--disk", target]);
        let found: Vec<(u64, u64)> = changes["changes"]
            .as_array()
            .unwrap_or_else(|| panic!("{changes}"))
            .iter()
            .map(|range| {
                (
                    range["offset"].as_u64().unwrap(),
                    range["length"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            found,
            [(64 << 10, 64 << 10), (1 << 20, 128 << 10), (3 << 20, 64 << 10)],
            "{target}"
        );
    }
}

#[test]
fn what_cannot_be_filled_is_refused_and_nothing_is_changed() {
    let vm = Vm::new();
    let refused = |code: i32, words: &[&str], says: &str| {
        let text = vm.fails(code, &[&["fill", "start"][..], words].concat());
        assert!(
            text.contains(says) && text.contains("nothing was changed"),
            "{words:?}: {text}"
        );
        vm.assert_whole(says);
    };
    refused(3, &["--disk", "vdx"], "the domain has no disk 'vdx'");
    refused(2, &["--disk", "vda", "--disk", "vda"], "is named twice");
    refused(2, &["--disk", "hdc"], "the drive is empty");
    refused(7, &["--listen", "0.0.0.0:10809"], "could write the disks");
    refused(2, &["--tls-credentials", "/"], "TLS is for TCP");
    vm.qemu.qmp("cont", json!({}));
    refused(6, &[], "the guest runs, and uses its disks");
    vm.ok(&["snapshot", "create", "--name", "one", "--disk", "vda"]);
    vm.qemu.qmp("stop", json!({}));
    let text = vm.fails(6, &["fill", "start"]);
    assert!(text.contains("snapshot") && text.contains("(disk vda,"), "{text}");
    // The other disks are free.
    vm.ok(&["fill", "start", "--disk", "vdb", "--disk", "sda"]);
    vm.ok(&["fill", "end"]);
    vm.ok(&["snapshot", "delete", "one"]);
    vm.assert_whole("after all that");
    vm.qemu.kill9();
    let text = vm.fails(8, &["fill", "start"]);
    assert!(text.contains("the domain is off"), "{text}");
}

#[test]
fn a_disk_that_the_guest_has_read_only_is_left_out_or_refused() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE))
        .disk(DiskSpec::new("vdb", SIZE).read_only())
        .prelaunch()
        .start();
    let (site, xml) = (Site::new(), arg(&qemu.domain_xml_file()));
    let told = site.json(&["-d", &xml, "fill", "start"]);
    assert_eq!(told["filling"]["disks"].as_array().unwrap().len(), 1);
    assert_eq!(
        told["filling"]["skipped"][0],
        json!({"target": "vdb", "reason": "read-only"})
    );
    site.ok(&["-d", &xml, "fill", "end"]);
    let text = site.fails(7, &["-d", &xml, "fill", "start", "--disk", "vdb"]);
    assert!(text.contains("read-only"), "{text}");
}

#[test]
fn nothing_else_happens_to_a_domain_whose_disks_are_being_filled() {
    let vm = Vm::new();
    vm.ok(&["snapshot", "create", "--name", "one", "--disk", "vdb"]);
    vm.ok(&["export", "start", "one"]);
    vm.ok(&["fill", "start", "--disk", "vda"]);
    for words in [
        &["snapshot", "create", "--name", "two", "--disk", "vdb"][..],
        &["snapshot", "delete", "one"],
        &["export", "start", "one"],
        &["export", "stop", "--all"],
        &["export", "server", "stop"],
        &["checkpoint", "validate"],
        &["fill", "start", "--disk", "sda"],
        &["fill", "start"],
    ] {
        let text = vm.fails(6, words);
        assert!(
            text.contains("its disks vda are being filled"),
            "{words:?}: {text}"
        );
    }
    let text = vm.fails(6, &["fill", "start", "--disk", "vda", "--listen", "127.0.0.1:1"]);
    assert!(text.contains("a domain has one NBD server"), "{text}");
    vm.ok(&["fill", "end"]);
    // The server had been there before, and stays for those that it served.
    assert_eq!(
        vm.json(&["export", "list"])["exports"].as_array().unwrap().len(),
        1
    );
    vm.ok(&["snapshot", "delete", "one"]);
    vm.assert_whole("at the end");
}

/// Every request of the guest fails on the stand-in, so that nothing is lost in silence.
#[test]
fn a_guest_that_somebody_lets_run_meanwhile_finds_disks_that_fail() {
    for iothread in [false, true] {
        let vm = Vm::of(QemuVersion::V10_0, iothread, Stood::Prelaunch);
        let told = vm.json(&["fill", "start", "--disk", "vda", "--disk", "sda"]);
        let contents = [vm.content(1), vm.content(2)];
        copy(&contents[0], &uri(&told, 0));
        copy(&contents[1], &uri(&told, 1));
        vm.qemu.qmp("cont", json!({}));
        assert!(vm.qemu.disk("vda").try_fill(0, MIB, 9).is_err());
        let text = vm.fails(6, &["fill", "end", "--resume"]);
        assert!(text.contains("somebody has let it go"), "{text}");
        let told = vm.json(&["fill", "list"]);
        assert_eq!(told["filling"]["state"], "interrupted");
        let ended = vm.site.run(&["recover"]);
        assert_eq!(ended.code, Some(0), "an open one is left alone: {}", ended.stderr);
        vm.qemu.qmp("stop", json!({}));
        let text = vm.fails(13, &["fill", "end", "--resume"]);
        assert!(text.contains("it has run meanwhile"), "{text}");
        assert_eq!(vm.qemu.status(), "paused");
        vm.assert_whole("after it had run");
        vm.assert_holds("vda", &contents[0], "after it had run");
        vm.assert_holds("sda", &contents[1], "after it had run");
    }
}

#[test]
fn a_hypervisor_that_ends_takes_the_filling_along_and_it_is_told() {
    let vm = Vm::new();
    let begin = || {
        let told = vm.json(&["fill", "start"]);
        copy(&vm.content(1), &uri(&told, 0));
        vm.qemu.restart();
        assert_eq!(vm.json(&["fill", "list"])["filling"]["state"], "over");
    };
    begin();
    let text = vm.fails(11, &["fill", "end", "--resume"]);
    assert!(text.contains("hypervisor has ended since"), "{text}");
    assert_eq!(vm.qemu.status(), "prelaunch");
    vm.assert_whole("after the end");
    begin();
    let recovered = vm.site.json(&["recover"]);
    assert_eq!(
        recovered["recovered"][0]["what"],
        "filling, which the hypervisor has not outlived, of vda, vdb, sda"
    );
    vm.assert_whole("after recover");
    begin();
    // The next one takes its place.
    vm.ok(&["fill", "start", "--disk", "vdb"]);
    vm.ok(&["fill", "end"]);
    vm.assert_whole("after the next");
}

#[test]
fn three_forms_and_the_document_of_the_rfc() {
    let vm = Vm::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let document = vm.site.file(
        "restore.xml",
        &format!(
            "<blockexport type='nbd' port='{port}'>\n  <listen type='address' address='127.0.0.1'/>\n  \
             <disk name='{}'/>\n  <disk name='sda'/>\n</blockexport>\n",
            vm.qemu.alias("vda")
        ),
    );
    let text = vm.ok(&["fill", "start", "--xml", &document]);
    let line = format!("vda   4 MiB  nbd://127.0.0.1:{port}/vda");
    assert!(text.contains(&line) && text.contains("skipped"), "{text}");
    let xml = vm.ok(&["fill", "list", "--output", "xml"]);
    let given = std::fs::read_to_string(&document).unwrap();
    assert_eq!(xml, given.replace(vm.qemu.alias("vda"), "vda"));
    let content = vm.content(3);
    copy(&content, &format!("nbd://127.0.0.1:{port}/vda"));
    let ended = vm.ok(&["fill", "end", "--output", "xml"]);
    assert_eq!(
        ended,
        "<filled resumed='no'>\n  <disk name='vda'/>\n  <disk name='sda'/>\n</filled>\n"
    );
    assert_eq!(vm.qemu.status(), "prelaunch");
    vm.assert_holds("vda", &content, "over TCP");
    assert_eq!(vm.ok(&["fill", "list"]), "Nothing is being filled.\n");
    vm.assert_whole("over TCP");
}

/// A client's connection to an export: it has written the first block, and goes on to be there (NBD's proto.md).
fn hold(socket: &Path, name: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    // Fixed newstyle without padding; NBD_OPT_EXPORT_NAME.
    let mut hello = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &1_u32.to_be_bytes()].concat();
    hello.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    hello.extend(name.as_bytes());
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    let (magic, write, cookie, offset) = (0x2560_9513_u32, 1_u32, 7_u64, 0_u64);
    let mut request = [magic.to_be_bytes(), write.to_be_bytes()].concat();
    request.extend([cookie.to_be_bytes(), offset.to_be_bytes()].concat());
    request.extend(4096_u32.to_be_bytes());
    request.extend([3; 4096]);
    stream.write_all(&request).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "the write failed");
    stream
}

#[test]
fn a_client_that_is_still_there_is_cut_off() {
    for version in [QemuVersion::V10_0, QemuVersion::V7_2] {
        let vm = Vm::of(version, true, Stood::Prelaunch);
        let told = vm.json(&["fill", "start"]);
        let listen = told["filling"]["server"]["listen"].as_str().unwrap();
        let listen = listen.strip_prefix("unix:").unwrap();
        let clients = TARGETS.map(|target| hold(Path::new(listen), target));
        vm.ok(&["fill", "end", "--resume"]);
        vm.assert_whole("with clients");
        for (mut client, target) in clients.into_iter().zip(TARGETS) {
            assert!(
                !matches!(client.read(&mut [0; 1]), Ok(1)),
                "{target} is still served"
            );
            let seen = vm.qemu.disk(target).read(0, 4096);
            assert!(seen.iter().all(|byte| *byte == 3), "{target}");
        }
    }
}

/// A machine behind something that kills the command at one of the monitor's commands.
struct Struck {
    vm: Vm,
    strike: Strike,
    n: usize,
    when: When,
}

impl Struck {
    fn new(vm: Vm) -> Self {
        let strike = Strike::before(&vm.qemu.qmp_path(), vm.site.path("strike.sock"));
        let (monitor, before) = (arg(&vm.qemu.qmp_path()), arg(&strike.socket));
        let xml = vm
            .site
            .file("struck.xml", &vm.qemu.domain_xml().replace(&monitor, &before));
        Self {
            vm: Vm { xml, ..vm },
            strike,
            n: 0,
            when: When::Before,
        }
    }

    /// Kills the command at each of the monitor's commands in turn; where. `None` when it came to its end.
    fn next(&mut self, words: &[&str]) -> Option<String> {
        let mut command = self.vm.site.command(&[]);
        command.args(self.vm.words(words));
        let hit = self.strike.run(command, self.n, self.when)?;
        let hit = format!("{words:?} killed at {} {hit}", self.n);
        if self.when == When::After {
            self.n += 1;
            self.when = When::Before;
        } else {
            self.when = When::After;
        }
        Some(hit)
    }
}

/// One disk on virtio-blk and one on virtio-scsi, in iothreads: with those all commands there are.
const STRUCK: [&str; 4] = ["--disk", "vda", "--disk", "sda"];

#[test]
fn a_start_killed_at_any_command_of_the_monitor_is_undone() {
    let mut struck = Struck::new(Vm::of(QemuVersion::V10_0, true, Stood::Prelaunch));
    let start = [&["fill", "start"][..], &STRUCK].concat();
    let mut round = 0;
    while let Some(told) = struck.next(&start) {
        let vm = &struck.vm;
        round += 1;
        // Whoever comes next on the domain settles it: `recover`, another act, or the end of what never began.
        match round % 3 {
            0 => drop(vm.ok(&["fill", "end", "--resume"])),
            1 => drop(vm.site.ok(&["recover"])),
            _ => {
                vm.ok(&["fill", "start", "--disk", "vdb"]);
                vm.ok(&["fill", "end"]);
            }
        }
        assert_eq!(vm.qemu.status(), "prelaunch", "{told}");
        vm.assert_whole(&told);
        vm.assert_no_socket(&told);
        let seen = vm.qemu.disk("sda").read(0, 4096);
        assert!(seen.iter().all(|byte| *byte == 0x55), "{told}");
    }
    assert!(round > 10, "only {round} strikes: the test proves little");
    struck.vm.ok(&["fill", "end", "--resume"]);
    assert_eq!(struck.vm.qemu.status(), "running");
}

#[test]
fn an_end_killed_at_any_command_of_the_monitor_is_finished() {
    let vm = Vm::of(QemuVersion::V10_0, true, Stood::Prelaunch);
    let contents = [("vda", vm.content(1)), ("sda", vm.content(2))];
    let mut struck = Struck::new(vm);
    let start = [&["fill", "start"][..], &STRUCK].concat();
    let mut round = 0;
    loop {
        let told = struck.vm.json(&start);
        if round == 0 {
            for (n, (_, content)) in contents.iter().enumerate() {
                copy(content, &uri(&told, n));
            }
        }
        let Some(hit) = struck.next(&["fill", "end"]) else {
            break;
        };
        let vm = &struck.vm;
        round += 1;
        if round % 2 == 0 {
            vm.site.ok(&["recover"]);
        } else {
            vm.ok(&["fill", "end"]);
        }
        assert_eq!(vm.qemu.status(), "prelaunch", "{hit}");
        vm.assert_whole(&hit);
        vm.assert_no_socket(&hit);
        for (target, content) in &contents {
            let head = std::fs::read(content).unwrap();
            assert!(vm.qemu.disk(target).read(0, 4096) == head[..4096], "{hit}");
        }
    }
    assert!(round > 10, "only {round} strikes: the test proves little");
    struck.vm.assert_whole("at the end");
    for (target, content) in &contents {
        struck.vm.assert_holds(target, content, "at the end");
    }
}

/// Killed around the command that lets the guest run, it runs once the same is asked again; `recover` leaves it paused.
#[test]
fn an_end_that_was_to_resume_can_be_asked_again() {
    let mut struck = Struck::new(Vm::new());
    loop {
        struck.vm.ok(&["fill", "start", "--disk", "vdb"]);
        let Some(hit) = struck.next(&["fill", "end", "--resume"]) else {
            break;
        };
        let ended = struck.vm.json(&["fill", "end", "--resume"]);
        assert_eq!(struck.vm.qemu.status(), "running", "{hit}: {ended}");
        struck.vm.assert_whole(&hit);
        struck.vm.qemu.restart();
    }
    assert_eq!(struck.vm.qemu.status(), "running");
}
