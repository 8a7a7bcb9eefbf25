//! Storage that fails under a guest that writes: its writes go on, the snapshot says that it is broken, and nobody is
//! given other bytes than those of the instant.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use disksnap_test_support::{
    DiskSpec, LoopFsKind, MIB, Qemu, QemuVersion, SmallFs, firmware_writer_round, loop_fs, loop_fs_in, need,
    pattern, small_fs,
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
        Self::with(version, DiskSpec::new("vda", SIZE))
    }

    fn with(version: QemuVersion, disk: DiskSpec) -> Self {
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
        self.json(&[
            "snapshot",
            "create",
            "--name",
            "one",
            "--disk",
            &disk(file, options),
        ]);
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

    /// The same, and all that it holds, and a client that has read the half of it.
    fn create_and_read_half(&self, file: &Path, options: &str) -> (Vec<u8>, RawNbd) {
        self.create(file, options);
        let instant = self.read();
        let mut client = self.client();
        for offset in (0..SIZE / 2).step_by(PIECE as usize) {
            let bytes = client.read(offset, PIECE).unwrap();
            assert!(bytes == part(&instant, offset), "other bytes at {offset}");
        }
        (instant, client)
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

#[test]
fn a_full_fleece_image_breaks_the_snapshot_and_no_write() {
    need!("small-fs");
    let (scene, (fs, file)) = (Scene::new(QemuVersion::V10_0), room());
    let (instant, mut client) = scene.create_and_read_half(&file, "");
    fill(&fs);
    let reason = scene.wait_broken();
    assert!(reason.contains("full"), "{reason}");
    assert_no_other_bytes(&mut client, SIZE / 2, &instant);
    scene.assert_refused();
    scene.assert_guest_writes();
    scene.end();
    assert!(!file.exists());
}

/// Ways in which QEMU would fail the guest's write rather than break the snapshot.
fn there_is_room_for_all_of_it(version: QemuVersion, way: &str) {
    let (scene, narrow) = (Scene::new(version), small_fs(SIZE / 2));
    let way = format!(",fleece.way={way}");
    let disk = disk(&narrow.path().join("fleece"), &way);
    let text = scene.site.fails(
        10,
        &scene.words(&["snapshot", "create", "--name", "one", "--disk", &disk]),
    );
    assert!(text.contains("cannot reserve"), "{text}");
    assert_eq!(leftovers(&scene.site, &scene.qemu), Vec::<String>::new());
    assert_eq!(crate::site::list(narrow.path()), [] as [PathBuf; 0]);
    let (fs, file) = room();
    let (instant, mut client) = scene.create_and_read_half(&file, &way);
    fill(&fs);
    // Many parts of the disk that were not written to since.
    scene.qemu.wait_writer(128);
    scene.assert_guest_writes();
    assert_eq!(scene.state().0, "active");
    for offset in (SIZE / 2..SIZE).step_by(PIECE as usize) {
        assert!(client.read(offset, PIECE).unwrap() == part(&instant, offset));
    }
    assert!(scene.read() == instant);
    scene.end();
    assert!(!file.exists());
}

#[test]
fn where_a_full_fleece_image_would_fail_the_guest_there_is_room_for_all_of_it() {
    need!("small-fs");
    there_is_room_for_all_of_it(QemuVersion::V10_0, "job");
    there_is_room_for_all_of_it(QemuVersion::V10_0, "classic");
}

#[test]
fn in_an_old_qemu_there_is_room_for_all_of_it() {
    need!("small-fs", "qemu-7.2");
    there_is_room_for_all_of_it(QemuVersion::V7_2, "classic");
}

/// The node of the fleece image.
fn fleece_node(qemu: &Qemu) -> String {
    let nodes = qemu.qmp("query-named-block-nodes", json!({ "flat": true }));
    let names = nodes.as_array().unwrap().iter().map(|node| &node["node-name"]);
    let mut names = names.filter_map(|name| name.as_str().map(str::to_owned));
    names
        .find(|name| name.starts_with("ds-") && name.ends_with("-fl"))
        .unwrap()
}

/// Has every write to the fleece image wait for ever.
fn stall(qemu: &Qemu, file: &Path) {
    let group = json!({ "qom-type": "throttle-group", "id": "slow", "limits": { "bps-write": 1 } });
    qemu.qmp("object-add", group);
    let below = json!({ "driver": "file", "filename": file, "locking": "off", "discard": "unmap" });
    let slow = json!({ "driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": below, "discard": "unmap" });
    qemu.qmp("blockdev-add", slow);
    let options = json!({ "driver": "raw", "node-name": fleece_node(qemu), "size": SIZE, "discard": "unmap", "file": "slow" });
    qemu.qmp("blockdev-reopen", json!({ "options": [options] }));
}

#[test]
fn a_fleece_image_that_is_too_slow_breaks_the_snapshot_and_no_write() {
    let scene = Scene::new(QemuVersion::V10_0);
    let file = scene.site.path("fleece");
    let (instant, mut client) = scene.create_and_read_half(&file, ",fleece.timeout=2");
    stall(&scene.qemu, &file);
    // Looking at it would let through what waits, so the guest has to come by first.
    scene.qemu.wait_writer(32);
    let reason = scene.wait_broken();
    assert!(reason.contains("too slow"), "{reason}");
    assert_no_other_bytes(&mut client, SIZE / 2, &instant);
    scene.assert_refused();
    scene.assert_guest_writes();
    scene.end();
    scene.qemu.qmp("blockdev-del", json!({ "node-name": "slow" }));
    assert!(!file.exists());
}

/// Has the fleece image of the way `classic` take so many bytes a second.
fn slow_down_classic(scene: &Scene, file: &Path, bytes_a_second: u64) {
    let qemu = &scene.qemu;
    let limits = json!({ "bps-write": bytes_a_second });
    let group = json!({ "qom-type": "throttle-group", "id": "slow", "limits": limits });
    qemu.qmp("object-add", group);
    let below = json!({ "driver": "file", "filename": file, "locking": "off", "discard": "unmap" });
    let slow = json!({ "driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": below, "discard": "unmap" });
    qemu.qmp("blockdev-add", slow);
    let options = json!({
        "driver": "qcow2", "node-name": fleece_node(qemu), "backing": qemu.format_node("vda"), "file": "slow", "discard": "unmap",
    });
    qemu.qmp("blockdev-reopen", json!({ "options": [options] }));
}

/// There is nothing in it that would give the snapshot up: the guest waits, is told of no error, and the snapshot is right.
#[test]
fn a_slow_fleece_image_has_the_guest_of_an_old_qemu_wait_and_no_write_fail() {
    need!("qemu-7.2");
    // Zeroes that take room: a hole would be copied by a note.
    let written = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(written.path(), vec![0; usize::try_from(SIZE).unwrap()]).unwrap();
    let image = DiskSpec::new("vda", SIZE).image(written.path());
    let scene = Scene::with(QemuVersion::V7_2, image);
    let file = scene.site.path("fleece");
    let disk = disk(&file, ",fleece.timeout=1");
    let planned = scene.json(&["plan", "--disk", &disk]).to_string();
    for told in ["wait for as long as it is slow", "fleece.timeout has no effect"] {
        assert!(planned.contains(told), "{planned}");
    }
    let (instant, mut client) = scene.create_and_read_half(&file, ",fleece.timeout=1");
    // What is copied at once is 64 KiB: the guest's writes wait for longer than it was told to.
    slow_down_classic(&scene, &file, 40 << 10);
    let since = Instant::now();
    scene.qemu.wait_writer(16);
    assert!(
        since.elapsed() > Duration::from_secs(4),
        "it is not slow: {:?}",
        since.elapsed()
    );
    assert_eq!(scene.state().0, "active");
    for offset in (SIZE / 2..SIZE).step_by(PIECE as usize) {
        assert!(client.read(offset, PIECE).unwrap() == part(&instant, offset));
    }
    assert!(scene.read() == instant);
    scene.end();
    scene.qemu.qmp("blockdev-del", json!({ "node-name": "slow" }));
    assert!(!file.exists());
}

#[test]
fn a_fleece_image_whose_name_is_removed_is_still_right() {
    let scene = Scene::new(QemuVersion::V10_0);
    let file = scene.site.path("fleece");
    let (instant, mut client) = scene.create_and_read_half(&file, "");
    std::fs::remove_file(&file).unwrap();
    scene.qemu.wait_writer(32);
    assert_eq!(scene.state().0, "active");
    for offset in (SIZE / 2..SIZE).step_by(PIECE as usize) {
        assert!(client.read(offset, PIECE).unwrap() == part(&instant, offset));
    }
    assert!(scene.read() == instant);
    scene.assert_guest_writes();
    scene.end();
}

/// QEMU reads zeroes where a file ends too soon, and nobody is told.
fn a_cut_image_is_broken(version: QemuVersion, length: u64) {
    let scene = Scene::new(version);
    let file = scene.site.path("fleece");
    scene.create(&file, "");
    let instant = scene.read();
    scene.qemu.wait_writer(64);
    let mut reader = scene.site.command(&scene.words(&["read", "one", "vda"]));
    let (out, err) = (Stdio::piped(), Stdio::piped());
    let mut reader = reader.stdout(out).stderr(err).spawn().unwrap();
    let mut begun = vec![0; 1 << 20];
    reader.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    assert!(begun == instant[..begun.len()]);

    let image = File::options().write(true).open(&file).unwrap();
    image.set_len(length).unwrap();
    let ended = reader.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(11), "{text}");
    assert!(text.contains("cut off"), "{text}");
    // What the guest writes now is kept in it, and makes it long again.
    let reason = scene.wait_broken();
    assert!(reason.contains("cut off"), "{reason}");
    scene.assert_refused();
    scene.assert_guest_writes();
    scene.end();
    assert!(!file.exists());
}

#[test]
fn a_fleece_image_that_is_cut_off_breaks_the_snapshot_and_no_write() {
    a_cut_image_is_broken(QemuVersion::V10_0, 0);
    a_cut_image_is_broken(QemuVersion::V10_0, SIZE / 2);
}

#[test]
fn so_it_does_in_an_old_qemu() {
    need!("qemu-7.2");
    a_cut_image_is_broken(QemuVersion::V7_2, 0);
}

/// How many reads a client asks for whose answers fill every buffer on the way.
const ASKED: u64 = 32;

/// A client that asks for much and takes nothing.
fn stalled(uri: &str) -> RawNbd {
    let mut client = RawNbd::of(uri);
    for n in 0..ASKED {
        client.ask(n * MIB, u32::try_from(MIB).unwrap()).unwrap();
    }
    client
}

/// Clients that go in the midst of what they asked for: one that hangs up, and one that is killed.
fn vanish(uri: &str) {
    drop(stalled(uri));
    let mut copy = Command::new(disksnap_test_support::tools::program("nbdcopy"));
    let mut copy = copy.args([uri, "-"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 4096];
    copy.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    copy.kill().unwrap();
    copy.wait().unwrap();
}

/// Through clients that stall and vanish the guest writes on, others read, and all can be ended.
fn clients_do_no_harm(scene: &Scene, disk: &str) {
    scene.json(&["snapshot", "create", "--name", "one", "--disk", disk]);
    let instant = scene.read();
    for end in [&["export", "stop", "one"][..], &["snapshot", "delete", "one"]] {
        let started = scene.json(&["export", "start", "one"]);
        let uri = started["exports"][0]["uri"].as_str().unwrap();
        let stalled = [stalled(uri), stalled(uri)];
        vanish(uri);
        scene.assert_guest_writes();
        let mut other = RawNbd::of(uri);
        for offset in (0..SIZE).step_by(PIECE as usize) {
            assert!(other.read(offset, PIECE).unwrap() == part(&instant, offset));
        }
        scene.site.ok(&scene.words(end));
        scene.assert_guest_writes();
        drop(stalled);
    }
    scene.end();
    assert_eq!(crate::daemons::of(&scene.site.run_dir()), Vec::<i32>::new());
}

/// Whether a client that had asked for much has been left, with a part of it.
fn is_left(mut client: RawNbd) -> bool {
    (0..ASKED).any(|_| client.receive(u32::try_from(MIB).unwrap()).is_err())
}

/// QEMU waits for a client that stalls when it drains the disk, and so would its guest and whoever looks at the snapshot: the
/// client is left.
fn clients_hold_nobody_up(scene: &Scene, uri_of_one: impl Fn(&Scene) -> String) {
    let disk = "vda,method=qemu-fleece";
    scene.json(&["snapshot", "create", "--name", "one", "--disk", disk]);
    let instant = scene.read();
    let uri = uri_of_one(scene);
    let looked_at: [&dyn Fn(); 3] = [
        &|| assert_eq!(scene.state().0, "active"),
        &|| assert!(scene.read() == instant),
        &|| drop(scene.json(&["snapshot", "create", "--name", "two", "--disk", disk])),
    ];
    let mut left = 0;
    for act in looked_at {
        let clients = [stalled(&uri), stalled(&uri)];
        act();
        scene.assert_guest_writes();
        left += clients.map(is_left).iter().filter(|left| **left).count();
        // Others are served.
        assert!(RawNbd::of(&uri).read(0, PIECE).unwrap() == part(&instant, 0));
    }
    // Not each act drains the disk with each QEMU.
    assert!(left > 0, "QEMU waited for nobody");
    scene.site.ok(&scene.words(&["snapshot", "delete", "two"]));
    scene.end();
}

/// On the socket that is ours.
fn by_default(scene: &Scene) -> String {
    let started = scene.json(&["export", "start", "one"]);
    started["exports"][0]["uri"].as_str().unwrap().to_owned()
}

#[test]
fn clients_that_stall_hold_nobody_up() {
    clients_hold_nobody_up(&Scene::new(QemuVersion::V10_0), by_default);
}

#[test]
fn clients_that_stall_hold_no_old_qemu_up() {
    need!("qemu-7.2");
    clients_hold_nobody_up(&Scene::new(QemuVersion::V7_2), by_default);
}

#[test]
fn clients_that_stall_far_away_hold_nobody_up() {
    clients_hold_nobody_up(&Scene::new(QemuVersion::V10_0), |scene| {
        let listen = format!("127.0.0.1:{}", crate::exports::port());
        let server = ["export", "server", "start", "--listen", &listen];
        scene.site.ok(&scene.words(&server));
        by_default(scene)
    });
}

#[test]
fn clients_that_stall_or_vanish_do_no_harm() {
    let scene = Scene::new(QemuVersion::V10_0);
    clients_do_no_harm(&scene, "vda,method=qemu-fleece");
}

#[test]
fn clients_of_an_old_qemu_do_none_either() {
    need!("qemu-7.2");
    let scene = Scene::new(QemuVersion::V7_2);
    clients_do_no_harm(&scene, "vda,method=qemu-fleece");
}

#[test]
fn clients_of_the_image_server_do_none_either() {
    need!("xfs");
    let fs = loop_fs(LoopFsKind::Xfs, 2 * SIZE + 400 * MIB, "");
    let image = fs.path().join("vda.qcow2");
    let length = SIZE.to_string();
    crate::programs::program(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &arg(&image), &length],
    );
    let disk = DiskSpec::new("vda", SIZE).qcow2().image(&image);
    let scene = Scene::with(QemuVersion::V10_0, disk);
    clients_do_no_harm(&scene, "vda,method=reflink");
    drop(scene);
    assert_eq!(crate::site::list(fs.path()), [image]);
}

/// Starts a backup that takes its time, and waits until it has some of the disk.
fn backup_slowly(scene: &Scene, repo: &str, disk: &str) -> std::process::Child {
    let words = [
        "backup",
        "create",
        "--repo",
        repo,
        "--disk",
        disk,
        "--rate-limit",
        "256K",
    ];
    let mut create = scene.site.command(&scene.words(&words));
    let child = create
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while !below(repo.as_ref())
        .iter()
        .any(|path| arg(path).ends_with(".qcow2.part"))
    {
        assert!(
            since.elapsed() < Duration::from_mins(3),
            "no image is being written"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

/// All files below a directory.
fn below(directory: &Path) -> Vec<PathBuf> {
    let each = |path: PathBuf| if path.is_dir() { below(&path) } else { vec![path] };
    crate::site::list(directory).into_iter().flat_map(each).collect()
}

/// A backup whose snapshot's storage fails: it is none, and the next one is.
fn a_backup_is_whole_or_none(fail: impl FnOnce(&SmallFs, &Path)) {
    let (scene, (fs, file)) = (Scene::new(QemuVersion::V10_0), room());
    let (repo, disk) = (arg(&scene.site.path("repo")), disk(&file, ""));
    let child = backup_slowly(&scene, &repo, &disk);
    fail(&fs, &file);
    let ended = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(11), "{text}");
    let list = scene.site.json(&["backup", "list", "--repo", &repo]);
    assert_eq!(list["domains"][0]["points"], json!([]), "{list:#}");
    scene.assert_guest_writes();
    let _ = std::fs::remove_file(fs.path().join("filler"));
    let again = ["backup", "create", "--repo", &repo, "--disk", &disk];
    let point = scene.json(&again);
    assert_eq!(point["resumed"], false, "{point:#}");
    let verified = ["backup", "verify", "--repo", &repo];
    scene.json(&verified);
    let images = below(repo.as_ref());
    let images: Vec<_> = images
        .iter()
        .filter(|path| arg(path).ends_with("vda.qcow2"))
        .collect();
    assert_eq!(images.len(), 1, "{images:?}");
    let raw = scene.site.path("backup.raw");
    crate::programs::program("qemu-img", &["convert", "-O", "raw", &arg(images[0]), &arg(&raw)]);
    firmware_writer_round(&std::fs::read(&raw).unwrap()).unwrap_or_else(|why| panic!("no instant: {why}"));
    let snapshots = scene.json(&["snapshot", "list"]);
    assert_eq!(snapshots["snapshots"], json!([]));
    assert_eq!(leftovers(&scene.site, &scene.qemu), Vec::<String>::new());
    scene.assert_guest_writes();
}

#[test]
fn a_backup_whose_fleece_image_is_full_is_none_and_the_next_one_is() {
    need!("small-fs");
    a_backup_is_whole_or_none(|fs, _| fill(fs));
}

#[test]
fn a_backup_whose_fleece_image_is_cut_off_is_none_and_the_next_one_is() {
    need!("small-fs");
    a_backup_is_whole_or_none(|_, file| {
        let image = File::options().write(true).open(file).unwrap();
        image.set_len(0).unwrap();
    });
}

#[test]
fn a_backup_beside_clients_that_vanish_is_whole() {
    let scene = Scene::new(QemuVersion::V10_0);
    let (repo, disk) = (arg(&scene.site.path("repo")), "vda,method=qemu-fleece");
    scene.json(&["snapshot", "create", "--name", "one", "--disk", disk]);
    let started = scene.json(&["export", "start", "one"]);
    let uri = started["exports"][0]["uri"].as_str().unwrap();
    let mut child = backup_slowly(&scene, &repo, disk);
    vanish(uri);
    assert!(child.wait().unwrap().success());
    scene.site.json(&["backup", "verify", "--repo", &repo]);
    scene.end();
}

/// A domain that is off, whose image is alone in a subvolume.
fn on_btrfs(site: &Site, fs: &Path) -> (String, PathBuf) {
    let images = fs.join("images");
    crate::programs::program("btrfs", &["-q", "subvolume", "create", &arg(&images)]);
    let image = images.join("disk.raw");
    std::fs::write(&image, pattern::bytes(3, usize::try_from(32 * MIB).unwrap())).unwrap();
    (crate::every_method::off(site, &image, "raw"), image)
}

/// Whether the snapshot `one` reads as this, told good.
fn reads_as(site: &Site, xml: &str, digest: &str) -> bool {
    let listed = site.json(&["snapshot", "list", "-d", xml]);
    assert_eq!(listed["snapshots"][0]["state"], "active", "{listed:#}");
    let to = site.path("read.raw");
    site.ok(&["read", "-d", xml, "one", "vda", "--to", &arg(&to)]);
    let same = pattern::digest_file(&to) == digest;
    std::fs::remove_file(to).unwrap();
    same
}

/// A guest that writes to a raw image in a subvolume, in which a large file is besides.
fn running_on_btrfs(fs: &Path) -> (Scene, PathBuf) {
    let images = fs.join("images");
    crate::programs::program("btrfs", &["-q", "subvolume", "create", &arg(&images)]);
    let image = images.join("disk.raw");
    std::fs::write(&image, vec![0; usize::try_from(ON_BTRFS).unwrap()]).unwrap();
    std::fs::write(images.join("ballast"), vec![1; 64 << 20]).unwrap();
    let disk = DiskSpec::new("vda", ON_BTRFS).image(&image);
    (Scene::with(QemuVersion::V10_0, disk), images)
}

/// The size of such a disk.
const ON_BTRFS: u64 = 8 * MIB;

/// Waits for what the guest's storage comes to.
fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !so() {
        assert!(since.elapsed() < Duration::from_mins(4), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// It is btrfs that has no room for what the guest overwrites, and QEMU that stops the guest then, which is told of no error; we
/// leave it so, and make room by deleting the snapshot.
#[test]
fn a_btrfs_that_is_full_under_a_guest_has_room_again_when_the_snapshot_is_deleted() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 256 * MIB, "");
    let (scene, images) = running_on_btrfs(fs.path());
    let create = |name: &'static str| ["snapshot", "create", "--disk", "vda,method=btrfs", "--name", name];
    scene.json(&create("one"));
    let instant = scene.read();
    // From now on it is the snapshot alone that holds it.
    std::fs::remove_file(images.join("ballast")).unwrap();
    let mut filler = File::create(fs.path().join("filler")).unwrap();
    let block = vec![1; 64 << 10];
    wait_for("the guest's disk is full", || {
        while filler.write_all(&block).is_ok() {}
        let _ = filler.sync_data();
        scene.qemu.status() == "io-error"
    });
    drop(filler);
    // The file system keeps room for itself, so that this may work still.
    let more = scene.site.run(&scene.words(&create("two")));
    assert!(more.code.is_some(), "{}", more.stderr);
    assert_eq!(scene.qemu.status(), "io-error", "it is not ours to let go");
    if more.code == Some(0) {
        scene.site.ok(&scene.words(&["snapshot", "delete", "two"]));
    }
    let left = scene.json(&["snapshot", "list"]);
    assert_eq!(left["snapshots"].as_array().unwrap().len(), 1, "{left:#}");
    assert_eq!(scene.state().0, "active");
    assert!(scene.read() == instant);
    scene.site.ok(&scene.words(&["snapshot", "delete", "one"]));
    crate::programs::program("btrfs", &["subvolume", "sync", &arg(fs.path())]);
    crate::programs::program("btrfs", &["filesystem", "sync", &arg(fs.path())]);
    scene.qemu.qmp("cont", json!({}));
    scene.qemu.wait_writer(16);
    assert_eq!(scene.qemu.status(), "running");
    assert!(!scene.qemu.serial().contains("GUEST FAILED"));
    scene.qemu.qmp("stop", json!({}));
    firmware_writer_round(&std::fs::read(images.join("disk.raw")).unwrap())
        .unwrap_or_else(|why| panic!("a write of the guest's is lost: {why}"));
    assert_eq!(crate::site::list(fs.path()), [fs.path().join("filler"), images]);
}

/// What is below the file system has no more room than this, and then fails its writes.
#[test]
fn a_btrfs_that_becomes_read_only_under_a_guest_keeps_the_snapshot_and_stops_nobody() {
    need!("btrfs", "small-fs");
    let below = small_fs(160 * MIB);
    let fs = loop_fs_in(below.path(), LoopFsKind::Btrfs, 256 * MIB, "");
    let (scene, images) = running_on_btrfs(fs.path());
    let create = |name: &'static str| ["snapshot", "create", "--disk", "vda,method=btrfs", "--name", name];
    scene.json(&create("one"));
    scene.json(&create("other"));
    let instant = scene.read();
    fill(&below);
    let is_read_only = || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let of_it = |line: &&str| line.contains(&arg(fs.path()));
        mounts.lines().find(of_it).unwrap().contains(" ro,")
    };
    wait_for("the file system is read-only", is_read_only);
    let status = scene.qemu.status();
    let refused = scene.site.run(&scene.words(&create("two")));
    assert!(!matches!(refused.code, None | Some(0)), "{}", refused.stderr);
    assert_eq!(scene.qemu.status(), status, "{}", refused.stderr);
    assert_ne!(status, "paused");
    // What the file system could not write it may not read either: the right bytes, or none.
    let to = scene.site.path("read.raw");
    let read = scene
        .site
        .run(&scene.words(&["read", "one", "vda", "--to", &arg(&to)]));
    assert_eq!(read.code == Some(0), to.exists(), "{}", read.stderr);
    if to.exists() {
        assert!(std::fs::read(&to).unwrap() == instant, "other bytes");
        std::fs::remove_file(to).unwrap();
    }
    let refused = scene.site.run(&scene.words(&["snapshot", "delete", "other"]));
    assert!(!matches!(refused.code, None | Some(0)), "{}", refused.stderr);
    assert_eq!(scene.qemu.status(), status, "{}", refused.stderr);

    // Where there is room again, the file system is as it was when it failed.
    std::fs::remove_file(below.path().join("filler")).unwrap();
    scene.qemu.kill9();
    let at = arg(fs.path());
    wait_for("the file system is unmounted", || {
        Command::new("umount").arg(&at).status().unwrap().success()
    });
    let image = arg(&below.path().join("image"));
    // Its device may be let go a little later.
    wait_for("the file system is mounted", || {
        let mut mount = Command::new("mount");
        mount
            .args(["-o", "loop", &image, &at])
            .status()
            .unwrap()
            .success()
    });
    // The next act finishes what was begun.
    assert!(scene.read() == instant);
    assert_eq!(scene.state(), ("active".to_owned(), String::new()));
    let left = scene.json(&["snapshot", "list"]);
    assert_eq!(left["snapshots"].as_array().unwrap().len(), 1, "{left:#}");
    scene.site.ok(&scene.words(&["snapshot", "delete", "one"]));
    assert_eq!(crate::site::list(fs.path()), [images]);
}

const BTRFS: [&str; 4] = ["snapshot", "create", "--disk", "vda,method=btrfs"];

#[test]
fn a_full_btrfs_keeps_its_snapshots_and_lets_them_go() {
    need!("btrfs");
    let (site, fs) = (Site::new(), loop_fs(LoopFsKind::Btrfs, 200 * MIB, ""));
    let (xml, image) = on_btrfs(&site, fs.path());
    let digest = pattern::digest_file(&image);
    site.ok(&[&BTRFS[..], &["-d", &xml, "--name", "one"]].concat());
    let mut filler = File::create(fs.path().join("filler")).unwrap();
    let block = vec![1; 64 << 10];
    while filler.write_all(&block).is_ok() {}
    drop(filler);
    // The file system keeps room for itself, so that this may work still.
    let more = site.run(&[&BTRFS[..], &["-d", &xml, "--name", "two"]].concat());
    assert!(matches!(more.code, Some(0 | 10)), "{}", more.stderr);
    assert!(reads_as(&site, &xml, &digest));
    if more.code == Some(0) {
        site.ok(&["snapshot", "delete", "-d", &xml, "two"]);
    }
    site.ok(&["snapshot", "delete", "-d", &xml, "one"]);
    let listed = site.json(&["snapshot", "list", "-d", &xml]);
    assert_eq!(listed["snapshots"], json!([]));
    assert_eq!(pattern::digest_file(&image), digest);
}

#[test]
fn a_btrfs_that_became_read_only_keeps_its_snapshots_until_it_can_be_written() {
    need!("btrfs");
    let (site, fs) = (Site::new(), loop_fs(LoopFsKind::Btrfs, 200 * MIB, ""));
    let (xml, image) = on_btrfs(&site, fs.path());
    let digest = pattern::digest_file(&image);
    site.ok(&[&BTRFS[..], &["-d", &xml, "--name", "one"]].concat());
    let remount = |how: &str| {
        let mut mount = Command::new("mount");
        let mount = mount.args(["-o", how]).arg(fs.path()).status();
        assert!(mount.unwrap().success(), "{how}");
    };
    remount("remount,ro");
    let refused = site.run(&[&BTRFS[..], &["-d", &xml, "--name", "two"]].concat());
    assert_ne!(refused.code, Some(0));
    assert!(
        refused.stderr.contains("ead-only file system"),
        "{}",
        refused.stderr
    );
    assert!(reads_as(&site, &xml, &digest));
    let refused = site.run(&["snapshot", "delete", "-d", &xml, "one"]);
    assert_ne!(refused.code, Some(0));
    assert!(
        refused.stderr.contains("ead-only file system"),
        "{}",
        refused.stderr
    );
    remount("remount,rw");
    site.ok(&["snapshot", "delete", "-d", &xml, "one"]);
    let listed = site.json(&["snapshot", "list", "-d", &xml]);
    assert_eq!(listed["snapshots"], json!([]));
    assert_eq!(crate::site::list(fs.path()), [fs.path().join("images")]);
}
