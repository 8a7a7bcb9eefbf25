//! A snapshot's disk as another guest's: printed, plugged in and read there, taken out again.

use std::process::Command;

use disksnap_test_support::{DiskSpec, GuestSetup, LoopFs, LoopFsKind, MIB, Qemu, loop_fs, need, tools};
use serde_json::{Value, json};

use crate::daemons;
use crate::site::{Site, arg};

const PORT: [&str; 2] = ["-device", "pcie-root-port,id=rp1,chassis=1,addr=0x10"];

/// A running domain with the snapshot `nightly` of `vda`, a fleece, and of `vdb`, a clone of its image.
struct Vm {
    site: Site,
    qemu: Qemu,
    xml: String,
    _fs: LoopFs,
}

impl Vm {
    fn new() -> Self {
        let site = Site::new();
        let fs = loop_fs(LoopFsKind::Xfs, 400 * MIB, "");
        let image = fs.path().join("vdb.qcow2");
        let made = Command::new(tools::program("qemu-img"))
            .args(["create", "-q", "-f", "qcow2", &arg(&image), "8M"])
            .status();
        assert!(made.unwrap().success());
        let vdb = DiskSpec::new("vdb", 8 * MIB).qcow2().image(&image);
        let qemu = Qemu::builder()
            .disk(DiskSpec::new("vda", 8 * MIB))
            .disk(vdb)
            .start();
        let xml = arg(&qemu.domain_xml_file());
        qemu.write("vda", 0, MIB, 0x61);
        qemu.write("vdb", 0, MIB, 0x62);
        let create = [
            "-d", &xml, "snapshot", "create", "--name", "nightly", "--disk", "vda",
        ];
        site.ok(&[&create[..], &["--disk", "vdb,method=reflink"]].concat());
        qemu.write("vda", 0, MIB, 0x7a);
        qemu.write("vdb", 0, MIB, 0x7a);
        Self {
            site,
            qemu,
            xml,
            _fs: fs,
        }
    }

    fn attach(&self, target: &str, to: &str) -> Value {
        self.site
            .json(&["-d", &self.xml, "attach", "nightly", target, "--to", to])
    }

    fn served(&self) -> usize {
        let list = self.site.json(&["-d", &self.xml, "export", "list"]);
        list["exports"].as_array().unwrap().len()
    }
}

/// What the appliance's QEMU reads from a device, by an export of its own.
fn read_there(site: &Site, appliance: &Qemu, device: &str) -> Vec<u8> {
    let socket = arg(&appliance.dir().join("there.sock"));
    let address = json!({"type": "unix", "data": {"path": socket}});
    appliance.qmp("nbd-server-start", json!({ "addr": address }));
    let export = json!({"type": "nbd", "id": "there", "node-name": format!("{device}-n"), "name": "there"});
    appliance.qmp("block-export-add", export);
    let to = site.path("there.raw");
    let uri = format!("nbd+unix:///there?socket={socket}");
    let copied = Command::new(tools::program("nbdcopy"))
        .args([&uri, &arg(&to)])
        .status();
    assert!(copied.unwrap().success());
    appliance.qmp("nbd-server-stop", json!({}));
    std::fs::read(&to).unwrap()
}

/// The ids of what is ours below this path of QEMU's object tree.
fn ours(qemu: &Qemu, path: &str) -> Vec<String> {
    let list = qemu.qmp("qom-list", json!({ "path": path }));
    let names = list
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|entry| entry["name"].as_str());
    names
        .filter(|name| name.starts_with("ds-"))
        .map(str::to_owned)
        .collect()
}

fn devices(qemu: &Qemu) -> Vec<String> {
    ours(qemu, "/machine/peripheral")
}

fn objects(qemu: &Qemu) -> Vec<String> {
    ours(qemu, "/objects")
}

fn nodes(qemu: &Qemu) -> usize {
    let list = qemu.qmp("query-named-block-nodes", json!({}));
    let ours = |node: &&Value| {
        node["node-name"]
            .as_str()
            .is_some_and(|name| name.starts_with("ds-"))
    };
    list.as_array().unwrap().iter().filter(ours).count()
}

#[test]
fn a_disk_is_printed_for_an_appliance() {
    need!("xfs");
    let vm = Vm::new();
    let print = |target: &str| {
        vm.site.run(&[
            "-d", &vm.xml, "attach", "nightly", target, "--print", "--to", &vm.xml,
        ])
    };
    let fleece = print("vda");
    assert_eq!(fleece.code, Some(8), "{}", fleece.stderr);
    assert!(
        fleece
            .stderr
            .contains("disksnap export start -d DOMAIN nightly --disk vda"),
        "{}",
        fleece.stderr
    );
    let image = String::from_utf8(print("vdb").stdout).unwrap();
    for part in [
        "<disk type='file' device='disk'>",
        "<driver name='qemu' type='qcow2'/>",
        "<target dev='vdc' bus='virtio'/>",
        "<readonly/>",
    ] {
        assert!(image.contains(part), "{image}");
    }
    vm.site.ok(&["-d", &vm.xml, "export", "start", "nightly"]);
    for (target, alias) in [("vda", "virtio-disk0-backup"), ("vdb", "virtio-disk1-backup")] {
        let text = String::from_utf8(print(target).stdout).unwrap();
        assert!(text.contains("<disk type='network' device='disk'>"), "{text}");
        assert!(text.contains("<driver name='qemu' type='raw'/>"), "{text}");
        assert!(
            text.contains(&format!("<source protocol='nbd' name='{alias}'>")),
            "{text}"
        );
    }
    vm.site.ok(&["-d", &vm.xml, "export", "stop", "--all"]);
}

#[test]
fn a_guest_sees_the_snapshot_and_lets_it_go() {
    need!("xfs", "guest");
    let vm = Vm::new();
    let appliance = Qemu::builder()
        .disk(DiskSpec::new("vda", MIB))
        .guest(GuestSetup::new())
        .args(PORT)
        .start();
    let to = arg(&appliance.domain_xml_file());
    // An agent that answers is a guest that can be plugged into.
    drop(appliance.agent());
    for (target, byte) in [("vda", 'a'), ("vdb", 'b')] {
        let attached = vm.attach(target, &to);
        assert_eq!(vm.attach(target, &to), attached, "again is the same");
        let (device, serial) = (
            attached["device"].as_str().unwrap(),
            attached["serial"].as_str().unwrap(),
        );
        assert_eq!(devices(&appliance), [device]);
        // The guest finds it by its serial number, reads it, and cannot write to it.
        appliance.run_in_guest(&format!(
            "while ! grep -q {serial} /sys/block/vd*/serial; do usleep 100000; done; \
             d=$(grep -l {serial} /sys/block/vd*/serial | cut -d/ -f4); \
             echo SEEN {target} $(dd if=/dev/$d bs=4 count=1 skip=100 2>/dev/null) $(cat /sys/block/$d/ro) > /dev/console"
        ));
        let line: String = std::iter::repeat_n(byte, 4).collect();
        let seen = format!("SEEN {target} {line} 1");
        appliance.wait_serial("sight of the disk", |text| text.contains(&seen).then_some(()));
        assert_eq!(vm.served(), 1);
        let text = vm
            .site
            .fails(6, &["-d", &vm.xml, "snapshot", "delete", "nightly"]);
        assert!(
            text.contains("has it as a disk") && text.contains("disksnap detach"),
            "{text}"
        );
        vm.site.fails(6, &["-d", &vm.xml, "export", "stop", "--all"]);
        let text = vm
            .site
            .ok(&["-d", &vm.xml, "detach", "nightly", target, "--wait", "120"]);
        assert!(
            text.contains(&format!("detached {target} of 'nightly'")),
            "{text}"
        );
        assert_eq!(
            (devices(&appliance).len(), nodes(&appliance), vm.served()),
            (0, 0, 0)
        );
        let text = vm.site.ok(&["-d", &vm.xml, "detach", "nightly", target]);
        assert!(text.contains("is no guest's disk"), "{text}");
    }
    vm.site.ok(&["-d", &vm.xml, "snapshot", "delete", "nightly"]);
    assert!(daemons::of(&vm.site.run_dir()).is_empty());
    assert_eq!(vm.qemu.qmp("query-block-exports", json!({})), json!([]));
}

/// The appliance's QEMU is a client with a certificate of its own; what it is given for that goes with the disk.
#[test]
fn a_disk_goes_over_tls_to_a_server_that_verifies_its_clients() {
    need!("xfs");
    let vm = Vm::new();
    // SCSI disks are let go without the guest.
    let appliance = Qemu::builder().disk(DiskSpec::new("sda", MIB).scsi()).start();
    let to = arg(&appliance.domain_xml_file());
    let (both, server, client) = (
        vm.site.path("pki"),
        vm.site.path("server"),
        vm.site.path("client"),
    );
    crate::exports::credentials(&both);
    for (dir, who) in [(&server, "server"), (&client, "client")] {
        std::fs::create_dir(dir).unwrap();
        for name in [
            "ca-cert.pem",
            &format!("{who}-cert.pem"),
            &format!("{who}-key.pem"),
        ] {
            std::fs::copy(both.join(name), dir.join(name)).unwrap();
        }
    }
    let (server, client) = (arg(&server), arg(&client));
    for (target, byte, which) in [("vda", 0x61, &[][..]), ("vdb", 0x62, &["--images"][..])] {
        let attach = ["-d", &vm.xml, "attach", "nightly", target, "--to", &to];
        let as_client = [&attach[..], &["--tls-credentials", &client]].concat();
        let text = vm.site.fails(2, &as_client);
        assert!(text.contains("the disk does not go over TLS"), "{text}");
        let listen = format!("127.0.0.1:{}", crate::exports::port());
        let start = ["-d", &vm.xml, "export", "server", "start", "--listen", &listen];
        vm.site
            .ok(&[&start[..], which, &["--tls-credentials", &server]].concat());
        // The server's own directory has no client's certificate.
        let text = vm.site.fails(7, &attach);
        assert!(text.contains("does not come to terms"), "{text}");
        let nobody = (Vec::<String>::new(), Vec::<String>::new(), 0);
        assert_eq!(
            (devices(&appliance), objects(&appliance), nodes(&appliance)),
            nobody
        );
        assert_eq!(vm.served(), 0);

        let attached = vm.site.json(&as_client);
        assert_eq!(vm.site.json(&as_client), attached, "again is the same");
        let uri = attached["uri"].as_str().unwrap();
        assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
        let device = attached["device"].as_str().unwrap();
        assert_eq!(objects(&appliance), [format!("{device}-t")]);
        let there = read_there(&vm.site, &appliance, device);
        assert!(there[..1 << 20].iter().all(|found| *found == byte));
        vm.site.ok(&["-d", &vm.xml, "detach", "nightly", target]);
        assert_eq!(
            (devices(&appliance), objects(&appliance), nodes(&appliance)),
            nobody
        );
        // One directory with both is what an operator of one host has.
        for name in ["client-cert.pem", "client-key.pem"] {
            std::fs::copy(both.join(name), vm.site.path("server").join(name)).unwrap();
        }
        vm.site.ok(&attach);
        assert_eq!(vm.site.json(&attach)["device"], device);
        vm.site.ok(&["-d", &vm.xml, "detach", "nightly", target]);
        for name in ["client-cert.pem", "client-key.pem"] {
            std::fs::remove_file(vm.site.path("server").join(name)).unwrap();
        }
        vm.site
            .ok(&[&["-d", &vm.xml, "export", "server", "stop"][..], which].concat());
    }
    vm.site.ok(&["-d", &vm.xml, "snapshot", "delete", "nightly"]);
}

/// Without an operating system nobody answers the request to let the disk go.
#[test]
fn a_guest_that_does_not_cooperate_keeps_the_disk_and_says_so() {
    need!("xfs");
    let vm = Vm::new();
    let appliance = Qemu::builder().args(PORT).start();
    let to = arg(&appliance.domain_xml_file());
    let attached = vm.attach("vdb", &to);
    let device = attached["device"].as_str().unwrap();
    let there = read_there(&vm.site, &appliance, device);
    assert!(there[..1 << 20].iter().all(|byte| *byte == 0x62));
    // The one place is taken.
    let text = vm
        .site
        .fails(10, &["-d", &vm.xml, "attach", "nightly", "vda", "--to", &to]);
    assert!(
        text.contains("no free place") && text.contains("pcie-root-port"),
        "{text}"
    );
    assert_eq!((vm.served(), nodes(&appliance)), (1, 1));
    let detach = ["-d", &vm.xml, "detach", "nightly", "vdb", "--wait", "1"];
    let text = vm.site.fails(9, &detach);
    assert!(
        text.contains("the guest has not let the disk go for 1 s"),
        "{text}"
    );
    assert_eq!(devices(&appliance), [device]);
    vm.site
        .fails(6, &["-d", &vm.xml, "snapshot", "delete", "nightly"]);
    assert_eq!(vm.site.json(&["recover"]), json!({"recovered": []}));
    // A domain that is off has no disks.
    appliance.kill9();
    vm.site.ok(&["-d", &vm.xml, "snapshot", "delete", "nightly"]);
    assert!(daemons::of(&vm.site.run_dir()).is_empty());
    let text = vm
        .site
        .fails(3, &["-d", &vm.xml, "attach", "nightly", "vdb", "--to", &to]);
    assert!(text.contains("no snapshot 'nightly'"), "{text}");
}

#[test]
fn killed_at_any_moment_it_is_attached_or_not_and_never_half() {
    need!("xfs");
    let vm = Vm::new();
    // SCSI disks are let go without the guest.
    let appliance = Qemu::builder().disk(DiskSpec::new("sda", MIB).scsi()).start();
    let to = arg(&appliance.domain_xml_file());
    let attach = ["-d", &vm.xml, "attach", "nightly", "vdb", "--to", &to];
    let detach = ["-d", &vm.xml, "detach", "nightly", "vdb"];
    let since = std::time::Instant::now();
    vm.site.ok(&attach);
    let whole = since.elapsed();
    vm.site.ok(&detach);
    let rounds = 12;
    for round in 0..rounds {
        for act in [&attach[..], &detach[..]] {
            let mut command = vm.site.command(act);
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            let mut child = command.spawn().unwrap();
            std::thread::sleep(whole * round / rounds);
            child.kill().unwrap();
            child.wait().unwrap();
            vm.site.ok(&["recover"]);
            let there = devices(&appliance).len();
            assert_eq!(
                (nodes(&appliance), vm.served()),
                (there, there),
                "round {round}, {act:?}"
            );
            assert_eq!(
                daemons::of(&vm.site.run_dir()).len(),
                there,
                "round {round}, {act:?}"
            );
        }
        vm.site.ok(&detach);
        assert_eq!(
            (devices(&appliance).len(), nodes(&appliance), vm.served()),
            (0, 0, 0)
        );
    }
    vm.site.ok(&["-d", &vm.xml, "snapshot", "delete", "nightly"]);
}
