//! A domain with fifty checkpoints goes to another host: two state directories, two QEMU processes. `./x demo move` shows the
//! same with a Linux guest.

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu};
use serde_json::{Value, json};

use crate::programs::program as run;
use crate::site::{Site, arg};

const DISKS: [&str; 2] = ["vda", "vdb"];
const SIZE: u64 = 32 * MIB;
/// The guest writes to the first half all the time. Of the other: what is zeroed after the last backup, what is written between
/// the backups and after the last, and what never is.
const ZEROED: u64 = 18 * MIB;
const BETWEEN: u64 = 20 * MIB;
const AFTER: u64 = 24 * MIB;
const NEVER: u64 = 28 * MIB;
const CHECKPOINTS: usize = 50;
/// Those whose snapshots are kept as full backups.
const BACKUPS: [usize; 2] = [10, CHECKPOINTS];

/// One host's state and its running domain.
struct Host {
    site: Site,
    machine: Qemu,
    xml: String,
}

impl Host {
    /// A machine whose document says that it is the domain of this name and UUID, as one that moves does.
    fn new(machine: Qemu, name: &str, uuid: &str) -> Self {
        let site = Site::new();
        let text = machine.domain_xml().replace(machine.name(), name);
        let text = text.replace(&machine.uuid().to_string(), uuid);
        let xml = site.file("web1.xml", &text);
        Self { site, machine, xml }
    }

    fn ok(&self, words: &[&str]) -> String {
        self.site.ok(&[words, &["-d", &self.xml]].concat())
    }

    fn json(&self, words: &[&str]) -> Value {
        self.site.json(&[words, &["-d", &self.xml]].concat())
    }

    fn mark(&self, place: u64) {
        for target in DISKS {
            self.machine.disk(target).fill(place, 64 * KIB, 0xab);
        }
    }

    /// Starts an export; its address.
    fn export(&self, snapshot: &str, target: &str, more: &[&str]) -> String {
        let start = ["export", "start", snapshot, "--disk", target];
        let told = self.json(&[&start[..], more].concat());
        told["exports"][0]["uri"].as_str().unwrap().to_owned()
    }

    /// The whole disk of a snapshot, by way of an export.
    fn pull(&self, snapshot: &str, target: &str) -> Vec<u8> {
        let uri = self.export(snapshot, target, &[]);
        let whole = self.copy(&uri);
        self.ok(&["export", "stop", "--all"]);
        whole
    }

    fn copy(&self, uri: &str) -> Vec<u8> {
        let to = self.site.path("copy.raw");
        run("nbdcopy", &[uri, &arg(&to)]);
        let whole = std::fs::read(&to).unwrap();
        std::fs::remove_file(to).unwrap();
        whole
    }
}

/// What an export says has changed: offset and length.
fn changed(uri: &str, checkpoint: &str) -> Vec<(usize, usize)> {
    let context = format!("--map=qemu:dirty-bitmap:{checkpoint}");
    let map: Value = serde_json::from_str(&run("nbdinfo", &["--json", &context, uri])).unwrap();
    let number = |extent: &Value, key: &str| usize::try_from(extent[key].as_u64().unwrap()).unwrap();
    let dirty = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 1);
    dirty
        .map(|extent| (number(extent, "offset"), number(extent, "length")))
        .collect()
}

fn name(n: usize) -> String {
    format!("c{n:02}")
}

/// A machine whose guest writes to these disks.
fn start(disk: impl Fn(&str) -> DiskSpec) -> Qemu {
    let builder = DISKS
        .iter()
        .fold(Qemu::builder(), |builder, target| builder.disk(disk(target)));
    builder.firmware_writer().start()
}

/// The machine of another host, on copies of these disks.
fn carried(from: &Qemu, to: &Site) -> Qemu {
    start(|target| {
        let image = to.path(&format!("{target}.qcow2"));
        std::fs::copy(from.image(target), &image).unwrap();
        DiskSpec::new(target, SIZE).qcow2().image(&image)
    })
}

/// Fifty checkpoints while something writes, and the full backups.
fn take_all(a: &Host) -> Vec<(usize, Vec<Vec<u8>>)> {
    a.mark(ZEROED);
    a.machine.wait_writer(8);
    let mut backups = Vec::new();
    for n in 1..=CHECKPOINTS {
        let name = name(n);
        a.ok(&["snapshot", "create", "--name", &name, "--checkpoint"]);
        if BACKUPS.contains(&n) {
            backups.push((n, DISKS.map(|target| a.pull(&name, target)).to_vec()));
        }
        a.ok(&["snapshot", "delete", &name]);
        if n == BACKUPS[0] {
            a.mark(BETWEEN);
        }
        a.machine.wait_writer(8);
    }
    backups
}

/// The full backup of a checkpoint and what has changed since are the snapshot, and the changes are just those.
fn prove(b: &Host, target: &str, since: usize, mut base: Vec<u8>) {
    let checkpoint = name(since);
    let uri = b.export("c51", target, &["--checkpoint", &checkpoint]);
    let (whole, ranges) = (b.copy(&uri), changed(&uri, &checkpoint));
    assert!(base != whole, "{target} since {checkpoint}: nothing is proven");
    for &(offset, length) in &ranges {
        base[offset..offset + length].copy_from_slice(&whole[offset..offset + length]);
    }
    assert!(
        base == whole,
        "{target}: the increment since {checkpoint} is not the snapshot"
    );
    let has = |place: u64| {
        let place = usize::try_from(place).unwrap();
        ranges
            .iter()
            .any(|(offset, length)| (*offset..offset + length).contains(&place))
    };
    let told = [ZEROED, BETWEEN, AFTER, NEVER].map(has);
    assert_eq!(
        told,
        [true, since == BACKUPS[0], true, false],
        "{target} since {checkpoint}: {ranges:?}"
    );
    b.ok(&["export", "stop", "--all"]);
}

#[test]
fn a_domain_with_fifty_checkpoints_moves_and_goes_on_with_increments() {
    let machine = start(|target| DiskSpec::new(target, SIZE).qcow2());
    let (domain, uuid) = (machine.name().to_owned(), machine.uuid().to_string());
    let a = Host::new(machine, &domain, &uuid);
    let backups = take_all(&a);
    a.machine.quit();
    let set = a.ok(&["checkpoint", "dump", "--format", "json"]);

    let there = Site::new();
    let b = Host::new(carried(&a.machine, &there), &domain, &uuid);
    let file = b.site.file("set.json", &set);
    let defined = b.json(&["checkpoint", "redefine", &file, "--validate"]);
    assert_eq!(defined["added"].as_array().unwrap().len(), CHECKPOINTS);
    let validation = b.json(&["checkpoint", "validate"]);
    assert_eq!(validation["sound"], true, "{validation:#}");
    assert_eq!(validation["marks"].as_array().unwrap().len(), 2 * CHECKPOINTS);
    assert_eq!(b.ok(&["checkpoint", "dump", "--format", "json"]), set);

    b.mark(AFTER);
    for target in DISKS {
        b.machine.disk(target).zero(ZEROED, 64 * KIB);
    }
    b.machine.wait_writer(8);
    b.ok(&["snapshot", "create", "--name", "c51", "--checkpoint"]);
    b.machine.wait_writer(8);
    for (n, full) in backups {
        for (target, base) in DISKS.into_iter().zip(full) {
            prove(&b, target, n, base);
        }
    }
    b.ok(&["snapshot", "delete", "c51"]);
    // The first host lets go of them, and the images there keep their bitmaps.
    let forgotten = a.json(&["checkpoint", "forget", "--all"]);
    assert_eq!(forgotten["forgotten"].as_array().unwrap().len(), CHECKPOINTS);
    assert_eq!(a.json(&["checkpoint", "list"]), json!({ "checkpoints": [] }));
}

/// The same set on images that lack a bitmap is refused whole, and names what is wrong.
#[test]
fn a_set_that_does_not_match_the_images_is_not_defined() {
    let machine = Qemu::builder().disk(DiskSpec::new("vda", MIB).qcow2()).start();
    let (domain, uuid) = (machine.name().to_owned(), machine.uuid().to_string());
    let a = Host::new(machine, &domain, &uuid);
    for name in ["mon", "tue", "wed"] {
        a.ok(&["snapshot", "create", "--name", name, "--checkpoint"]);
        a.ok(&["snapshot", "delete", name]);
    }
    a.machine.quit();
    let set = a.ok(&["checkpoint", "dump", "--format", "json"]);
    let there = Site::new();
    let image = there.path("vda.qcow2");
    std::fs::copy(a.machine.image("vda"), &image).unwrap();
    run(
        "qemu-img",
        &["bitmap", "--remove", "-f", "qcow2", &arg(&image), "tue"],
    );
    run(
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", &arg(&image), "stranger"],
    );
    let disk = DiskSpec::new("vda", MIB).qcow2().image(&image);
    let b = Host::new(Qemu::builder().disk(disk).start(), &domain, &uuid);
    let file = b.site.file("set.json", &set);
    let refused = b
        .site
        .fails(11, &["checkpoint", "redefine", &file, "--validate", "-d", &b.xml]);
    assert!(
        refused.contains("vda of tue: missing; vda: unknown bitmap 'stranger'"),
        "{refused}"
    );
    assert_eq!(b.json(&["checkpoint", "list"]), json!({ "checkpoints": [] }));
    // Without --validate it is taken as it is said, and drop-broken leaves what can be trusted.
    b.ok(&["checkpoint", "redefine", &file]);
    b.ok(&["checkpoint", "drop-broken", "--unknown"]);
    assert_eq!(b.json(&["checkpoint", "validate"])["sound"], true);
    let left = b.json(&["checkpoint", "list"]);
    assert_eq!(left["checkpoints"].as_array().unwrap().len(), 1);
    assert_eq!(left["checkpoints"][0]["name"], "wed");
}
