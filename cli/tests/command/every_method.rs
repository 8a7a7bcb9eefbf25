//! One export document for every method: what a snapshot lies on is nobody's business who reads it. A fleece is served by
//! the hypervisor, in `exports`; these lie on this host.

use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_test_support::{DiskSpec, GIB, LoopFsKind, LvmGuest, MIB, Qemu, loop_fs, need, pattern};
use serde_json::{Value, json};

use crate::daemons;
use crate::programs::program as client;
use crate::site::{Site, arg, list, program};

const SIZE: u64 = 8 * MIB;

/// A domain that is off, with this image as its disk `vda`.
pub(crate) fn off(site: &Site, image: &Path, format: &str) -> String {
    let xml = format!(
        "<domain type='qemu'><name>off</name><uuid>6f3c5a4e-0000-4000-8000-000000000002</uuid><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>",
        image.display()
    );
    site.file("off.xml", &xml)
}

/// The image that the document names for the disk.
fn named(xml: &str) -> PathBuf {
    let text = std::fs::read_to_string(xml).unwrap();
    let (_, rest) = text.split_once("<source file='").unwrap();
    rest.split_once('\'').unwrap().0.into()
}

fn overwritten(image: &Path, format: &str) {
    client(
        "qemu-io",
        &["-f", format, "-c", "write -P 0x7a 0 8M", &arg(image)],
    );
}

/// A snapshot `nightly` of `vda`, and what it must hold.
struct Snapshot<'a> {
    site: &'a Site,
    xml: &'a str,
    /// As the command takes it: `vda,method=…`.
    disk: &'a str,
    digest: String,
}

impl Snapshot<'_> {
    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&[&["-d", self.xml], words].concat())
    }

    fn nothing_serves(&self, when: &str) {
        assert_eq!(daemons::of(&self.site.run_dir()), Vec::<i32>::new(), "{when}");
        let left = list(&self.site.run_dir());
        assert!(
            !left
                .iter()
                .any(|path| arg(path).contains(".img") || arg(path).contains(".images")),
            "{when}: {left:?}"
        );
    }

    /// Read by three clients, none of them ours.
    fn is_read_at(&self, uri: &str) {
        let info = client("nbdinfo", &[uri]);
        for part in [&format!("export-size: {SIZE}"), "is_read_only: true"] {
            assert!(info.contains(part), "{info}");
        }
        let (copied, converted) = (self.site.path("copied.raw"), self.site.path("converted.raw"));
        client("nbdcopy", &[uri, &arg(&copied)]);
        client(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", uri, &arg(&converted)],
        );
        for copy in [&copied, &converted] {
            assert_eq!(pattern::digest_file(copy), self.digest);
            std::fs::remove_file(copy).unwrap();
        }
    }

    /// Takes it, lets the domain go on, and exports it by one and the same document; through kills of the server.
    fn is_served_as_any_other(&self, goes_on: impl FnOnce()) {
        let (site, xml) = (self.site, self.xml);
        let created = self.json(&["snapshot", "create", "--name", "nightly", "--disk", self.disk]);
        goes_on();
        let alias = created["disks"][0]["alias"].as_str().unwrap();
        let socket = site.path("export.sock");
        let request = format!(
            "<blockexport type='nbd'>\n  <listen type='socket' socket='{}'/>\n  <disk name='{alias}'/>\n</blockexport>\n",
            socket.display()
        );
        let document = site.file("export.xml", &request);
        let start = [
            "-d", xml, "export", "start", "--xml", &document, "--output", "xml",
        ];
        assert_eq!(site.ok(&start), request);
        assert_eq!(
            site.ok(&["-d", xml, "export", "list", "--output", "xml"]),
            request
        );
        // The command has ended, and its child serves.
        assert_eq!(daemons::of(&site.run_dir()).len(), 1);
        let uri = self.json(&["export", "list"])["exports"][0]["uri"].clone();
        let uri = uri.as_str().unwrap();
        assert_eq!(uri, format!("nbd+unix:///{alias}?socket={}", socket.display()));
        self.is_read_at(uri);
        let shown = self.json(&["snapshot", "show", "nightly"]);
        assert_eq!(shown["disks"][0]["backupSource"]["uri"], uri, "{shown:#}");

        // Its end is no secret: not in lists, not to `recover`, and the next start is as good as the first.
        daemons::kill(&site.run_dir());
        assert_eq!(self.json(&["export", "list"])["exports"], json!([]));
        let recovered = site.json(&["recover"]);
        assert_eq!(
            recovered["recovered"][0]["what"], "the image server without exports",
            "{recovered:#}"
        );
        self.nothing_serves("recovered");
        assert_eq!(site.ok(&start), request);
        self.is_read_at(uri);
        daemons::kill(&site.run_dir());
        assert_eq!(site.ok(&start), request, "without recover between");
        self.is_read_at(uri);

        site.ok(&["-d", xml, "export", "stop", alias]);
        self.nothing_serves("after the last export");
        site.ok(&["-d", xml, "snapshot", "delete", "nightly"]);
        self.nothing_serves("after the delete");
    }
}

/// A raw image full of a pattern, and its digest.
fn pattern_at(image: &Path) -> String {
    std::fs::write(image, pattern::bytes(7, usize::try_from(SIZE).unwrap())).unwrap();
    pattern::digest_file(image)
}

fn a_raw_image_is_served(dir: &Path, disk: &str) {
    let site = Site::new();
    let image = dir.join("vda.raw");
    let digest = pattern_at(&image);
    let xml = off(&site, &image, "raw");
    let (site, xml) = (&site, xml.as_str());
    let snapshot = Snapshot {
        site,
        xml,
        disk,
        digest,
    };
    snapshot.is_served_as_any_other(|| overwritten(&image, "raw"));
}

#[test]
fn memory_is_served() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    a_raw_image_is_served(dir.path(), "vda,method=memory");
}

#[test]
fn reflink_is_served() {
    need!("xfs");
    let fs = loop_fs(LoopFsKind::Xfs, 400 * MIB, "");
    a_raw_image_is_served(fs.path(), "vda,method=reflink");
}

#[test]
fn btrfs_is_served() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 300 * MIB, "");
    let images = fs.path().join("images");
    client("btrfs", &["-q", "subvolume", "create", &arg(&images)]);
    a_raw_image_is_served(&images, "vda,method=btrfs");
}

#[test]
fn an_external_snapshot_is_served_while_the_domain_is_off() {
    let site = Site::new();
    let (image, raw) = (site.path("a.qcow2"), site.path("a.raw"));
    let digest = pattern_at(&raw);
    client("qemu-img", &["convert", "-O", "qcow2", &arg(&raw), &arg(&image)]);
    let xml = off(&site, &image, "qcow2");
    let (site, xml, disk) = (&site, xml.as_str(), "vda,method=qemu-external-qcow2");
    let snapshot = Snapshot {
        site,
        xml,
        disk,
        digest,
    };
    snapshot.is_served_as_any_other(|| {
        assert_ne!(named(xml), image);
        overwritten(&named(xml), "qcow2");
    });
    // The delete has merged: the disk is the first image again, with what was written since.
    assert_eq!(named(xml), image);
    client("qemu-io", &["-r", "-c", "read -P 0x7a 0 8M", &arg(&image)]);
}

#[test]
fn an_external_snapshot_is_served_while_the_domain_runs() {
    let site = Site::new();
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    qemu.disk("vda").write(MIB - 5, &pattern::bytes(3, 2 << 20));
    let raw = site.path("then.raw");
    qemu.disk("vda").copy_to(&raw);
    let digest = pattern::digest_file(&raw);
    let xml = arg(&qemu.domain_xml_file());
    let (site, xml, disk) = (&site, xml.as_str(), "vda,method=qemu-external-qcow2");
    let snapshot = Snapshot {
        site,
        xml,
        disk,
        digest,
    };
    snapshot.is_served_as_any_other(|| qemu.write("vda", 0, SIZE, 0x7a));
    assert_eq!(qemu.disk("vda").read(SIZE - 4, 4), [0x7a; 4]);
}

/// What runs in the guest, as one command each: its status must be 0.
struct InGuest {
    guest: LvmGuest,
    disksnap: String,
}

impl InGuest {
    fn run(&mut self, words: &[&str]) -> String {
        let output = self.guest.run(words);
        assert_eq!(
            output.status,
            0,
            "{words:?}: {}{}\n{}",
            output.stdout,
            output.stderr,
            self.guest.serial()
        );
        output.stdout
    }

    fn shell(&mut self, script: &str) -> String {
        self.run(&["busybox", "sh", "-ec", script])
    }

    fn disksnap(&mut self, words: &[&str]) -> String {
        let program = self.disksnap.clone();
        let env = [("DISKSNAP_STORAGE_DAEMON", "/bin/qemu-storage-daemon")];
        let words = [
            &[&program, "--state-dir", "/tmp/state", "-d", "/tmp/vm.xml"],
            words,
        ]
        .concat();
        let output = self.guest.run_with(&env, &words);
        let told = format!("{words:?}: {}\n{}", output.stderr, self.guest.serial());
        assert_eq!(output.status, 0, "{told}");
        output.stdout
    }
}

/// The same document and the same life for a volume, in the guest that has LVM; its clients are QEMU's.
#[test]
fn a_volume_is_served() {
    need!("lvm");
    let mut guest = LvmGuest::start(&[GIB]);
    let site = Site::new();
    let disksnap = guest.put(&stripped(&site));
    let image = site.path("content.raw");
    let digest = pattern_at(&image);
    let content = guest.put(&image);
    let request = "<blockexport type='nbd'>\n  <listen type='socket' socket='/tmp/export.sock'/>\n  \
                   <disk name='vda-backup'/>\n</blockexport>\n";
    let document = site.file("export.xml", request);
    let document = guest.put(Path::new(&document));
    let xml = "<domain type='qemu'><name>off</name><uuid>6f3c5a4e-0000-4000-8000-000000000003</uuid><devices>\
               <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/disk'/>\
               <target dev='vda' bus='virtio'/></disk></devices></domain>";
    let xml = site.file("vm.xml", xml);
    assert_eq!(guest.put(Path::new(&xml)), "/tmp/vm.xml");
    let mut vm = InGuest { guest, disksnap };
    vm.run(&["lvm", "pvcreate", "-q", "/dev/vda"]);
    vm.run(&["lvm", "vgcreate", "-q", "vg", "/dev/vda"]);
    vm.run(&["lvm", "lvcreate", "-q", "-n", "disk", "-L", "8m", "vg"]);
    vm.shell(&format!("dd if={content} of=/dev/vg/disk bs=1M conv=fsync"));
    vm.disksnap(&[
        "snapshot",
        "create",
        "--name",
        "nightly",
        "--disk",
        "vda,method=lvm",
    ]);
    vm.shell("tr '\\000' z </dev/zero | dd of=/dev/vg/disk bs=64k count=8 iflag=fullblock conv=fsync");

    let start = ["export", "start", "--xml", &document, "--output", "xml"];
    let uri = "nbd+unix:///vda-backup?socket=/tmp/export.sock";
    let is_read = |vm: &mut InGuest| {
        assert!(vm.run(&["qemu-img", "info", uri]).contains("virtual size: 8 MiB"));
        vm.run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, &content]);
        let sum = format!(
            "qemu-img convert -f raw -O raw '{uri}' /tmp/copy && sha256sum /tmp/copy && rm /tmp/copy"
        );
        assert!(vm.shell(&sum).starts_with(&digest));
    };
    let pid = "cat /tmp/state/run/*.images.pid";
    assert_eq!(vm.disksnap(&start), request);
    is_read(&mut vm);
    vm.shell(&format!("kill -9 $({pid})"));
    let list = ["export", "list", "--output", "json"];
    let served: Value = serde_json::from_str(&vm.disksnap(&list)).unwrap();
    assert_eq!(served["exports"], json!([]));
    let recovered: Value = serde_json::from_str(&vm.disksnap(&["recover", "--output", "json"])).unwrap();
    assert_eq!(
        recovered["recovered"][0]["what"],
        "the image server without exports"
    );
    for _ in 0..2 {
        assert_eq!(vm.disksnap(&start), request);
        is_read(&mut vm);
        vm.shell(&format!("kill -9 $({pid})"));
    }
    assert_eq!(vm.disksnap(&start), request);
    vm.disksnap(&["export", "stop", "vda-backup"]);
    assert_eq!(vm.shell("ls /tmp/state/run"), "");
    vm.disksnap(&["snapshot", "delete", "nightly"]);
    let volumes = vm.run(&["lvm", "lvs", "--noheadings", "-o", "lv_name"]);
    assert_eq!(volumes.trim(), "disk");
}

/// The command without what only a debugger reads: the guest holds it in memory.
fn stripped(site: &Site) -> PathBuf {
    let to = site.path("disksnap");
    let stripped = Command::new("strip").arg("-o").arg(&to).arg(program()).status();
    if !stripped.is_ok_and(|status| status.success()) {
        std::fs::copy(program(), &to).unwrap();
    }
    to
}
