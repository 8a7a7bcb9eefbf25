//! Storage that fails under a guest that writes: its writes go on, the snapshot says that it is broken, and nobody is
//! given other bytes than those of the instant.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_test_support::{
    DiskSpec, MIB, Qemu, QemuVersion, SmallFs, firmware_writer_round, need, small_fs,
};
use serde_json::{Value, json};

use crate::kills::leftovers;
use crate::raw_nbd::RawNbd;
use crate::site::{Site, arg};

/// The size of the disk: the guest takes minutes to come by each part of it, so that there is always something to be
/// copied for the first time.
const SIZE: u64 = 128 * MIB;
/// How often the guest writes in a second.
const WRITES: u32 = 100;
/// What a reader asks for at once.
const PIECE: u32 = 64 << 10;

/// A guest that writes all the time, and its snapshots.
struct Scene {
    site: Site,
    qemu: Qemu,
    xml: String,
}

impl Scene {
    fn new(version: QemuVersion) -> Self {
        let disk = DiskSpec::new("vda", SIZE);
        let qemu = Qemu::builder().version(version).disk(disk);
        let qemu = qemu.firmware_writer().start();
        let (site, xml) = (Site::new(), arg(&qemu.domain_xml_file()));
        // What has the block backend is the virtio device inside the PCI one.
        let device = format!("/machine/peripheral/{}/virtio-backend", qemu.alias("vda"));
        let pace = json!({
            "id": device, "iops": WRITES, "iops_rd": 0, "iops_wr": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0,
        });
        qemu.qmp("block_set_io_throttle", pace);
        qemu.wait_writer(8);
        Self { site, qemu, xml }
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        [words, &["-d", &self.xml]].concat()
    }

    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&self.words(words))
    }

    /// Takes a snapshot `one` whose fleece image is this file, with more options.
    fn create(&self, file: &Path, options: &str) {
        self.json(&["snapshot", "create", "--name", "one", "--disk", &disk(file, options)]);
    }

    /// The state of `one`, and why, as it is listed and shown.
    fn state(&self) -> (String, String) {
        let listed = &self.json(&["snapshot", "list"])["snapshots"][0];
        let shown = self.json(&["snapshot", "show", "one"]);
        let told = |of: &Value, what: &str| of[what].as_str().unwrap_or_default().to_owned();
        assert_eq!(
            (told(listed, "state"), told(listed, "reason")),
            (told(&shown, "state"), told(&shown, "reason"))
        );
        (told(listed, "state"), told(listed, "reason"))
    }

    /// All of the snapshot's disk, which was the guest's at one instant.
    fn read(&self) -> Vec<u8> {
        let to = self.site.path("read.raw");
        self.site
            .ok(&self.words(&["read", "one", "vda", "--to", &arg(&to)]));
        let bytes = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        firmware_writer_round(&bytes).unwrap_or_else(|why| panic!("no instant: {why}"));
        bytes
    }

    /// A client of an export of the snapshot, that other programs may be.
    fn client(&self) -> RawNbd {
        let started = self.json(&["export", "start", "one"]);
        RawNbd::of(started["exports"][0]["uri"].as_str().unwrap())
    }

    /// Waits until the snapshot is broken, while the guest writes on.
    fn wait_broken(&self) -> String {
        let since = Instant::now();
        loop {
            self.qemu.wait_writer(8);
            let (state, reason) = self.state();
            if state == "broken" {
                return reason;
            }
            assert!(since.elapsed() < Duration::from_mins(4), "it stays {state}");
        }
    }

    /// Nobody gets anything of a broken snapshot, and it is said why.
    fn assert_refused(&self) {
        let to = arg(&self.site.path("refused.raw"));
        for words in [
            &["read", "one", "vda", "--to", &to][..],
            &["export", "start", "one"],
        ] {
            let text = self.site.fails(11, &self.words(words));
            assert!(text.contains("one"), "{text}");
        }
        assert!(!Path::new(&to).exists());
    }

    /// The guest runs, writes on, and was told of no error by its disk.
    fn assert_guest_writes(&self) {
        self.qemu.wait_writer(16);
        assert_eq!(self.qemu.status(), "running");
        let events = self.qemu.monitor().events();
        assert!(!events.iter().any(|e| e == "BLOCK_IO_ERROR"), "{events:?}");
    }

    /// The snapshot goes, the guest writes on, and all that it wrote is there.
    fn end(&self) {
        self.site.ok(&self.words(&["snapshot", "delete", "one"]));
        assert_eq!(leftovers(&self.site, &self.qemu), Vec::<String>::new());
        assert_eq!(self.qemu.qmp("query-block-exports", json!({})), json!([]));
        self.assert_guest_writes();
        self.qemu.qmp("stop", json!({}));
        let copy = self.site.path("disk.raw");
        self.qemu.disk("vda").copy_to(&copy);
        let bytes = std::fs::read(copy).unwrap();
        firmware_writer_round(&bytes).unwrap_or_else(|why| panic!("a write of the guest's is lost: {why}"));
        self.qemu.qmp("cont", json!({}));
    }
}

fn disk(file: &Path, options: &str) -> String {
    format!("vda,method=qemu-fleece,fleece.file={}{options}", file.display())
}

/// Room for all of the disk, until it is filled.
fn room() -> (SmallFs, PathBuf) {
    let fs = small_fs(SIZE + 8 * MIB);
    let file = fs.path().join("fleece");
    (fs, file)
}

/// Leaves no room.
fn fill(fs: &SmallFs) {
    let mut filler = File::create(fs.path().join("filler")).unwrap();
    let zeroes = vec![0; 64 << 10];
    let full = loop {
        if let Err(error) = filler.write_all(&zeroes) {
            break error;
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
}

/// Reads on after `from`, which held `instant` to there: it may get more of the same, and then an error, or nothing more.
fn assert_no_other_bytes(client: &mut RawNbd, from: u64, instant: &[u8]) {
    let mut refused = 0;
    for offset in (from..SIZE).step_by(PIECE as usize) {
        match client.read(offset, PIECE) {
            Ok(bytes) => assert!(bytes == part(instant, offset), "other bytes at {offset}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "nothing was refused");
}

fn part(instant: &[u8], offset: u64) -> &[u8] {
    let offset = usize::try_from(offset).unwrap();
    &instant[offset..offset + PIECE as usize]
}

/// Reads the first half, as a reader that is at work when the storage fails.
fn read_half(client: &mut RawNbd, instant: &[u8]) {
    for offset in (0..SIZE / 2).step_by(PIECE as usize) {
        let bytes = client.read(offset, PIECE).unwrap();
        assert!(bytes == part(instant, offset), "other bytes at {offset}");
    }
}

#[test]
fn a_full_fleece_image_breaks_the_snapshot_and_no_write() {
    need!("small-fs");
    let (scene, (fs, file)) = (Scene::new(QemuVersion::V10_0), room());
    scene.create(&file, "");
    let instant = scene.read();
    let mut client = scene.client();
    read_half(&mut client, &instant);
    fill(&fs);
    let reason = scene.wait_broken();
    assert!(reason.contains("full"), "{reason}");
    assert_no_other_bytes(&mut client, SIZE / 2, &instant);
    scene.assert_refused();
    scene.assert_guest_writes();
    scene.end();
    assert!(!file.exists());
}
