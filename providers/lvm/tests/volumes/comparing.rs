//! What changed between two thin snapshots: told is all of it, and nothing else.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use disksnap_core::{Capability, Changed, DiskSnapshot, Error, ErrorKind, Peer, Precision, Snapshot};
use disksnap_lvm::LogicalVolume;
use futures_util::TryStreamExt;

use crate::file_systems::Mounted;
use crate::support::{Group, Rig, block, device, file, fill, formatted, run, try_run};

const KIB: u64 = 1 << 10;
/// The pool's chunks; the group's extents are half as large, so that volumes end in the middle of one.
const CHUNK: u64 = 128 * KIB;
const EXTENT: u64 = 64 * KIB;

/// A group with a pool that has such chunks.
pub(crate) fn pool(group: &Group, name: &str) {
    run(&format!(
        "lvcreate -y --type thin-pool -Zn -c {CHUNK}b -L 64m --poolmetadatasize 2m -n {name} {}",
        group.name
    ));
}

pub(crate) fn thin(group: &Group, pool: &str, name: &str, size: u64) -> PathBuf {
    run(&format!(
        "lvcreate -y -V {size}b --thinpool {}/{pool} -n {name}",
        group.name
    ));
    group.path(name)
}

/// Whether a metadata snapshot of the pool is reserved.
pub(crate) fn held(pool: &str) -> Option<String> {
    let status = run(&format!("dmsetup status vg-{pool}-tpool"));
    let root = status.split_whitespace().nth(6).unwrap();
    (root != "-").then(|| root.to_owned())
}

/// The unit of a snapshot that holds this disk.
pub(crate) fn peer(snapshot: &Snapshot, target: &str) -> Peer {
    let mut units = snapshot.units.iter().map(|unit| &unit.unit);
    let of = |unit: &&disksnap_core::Unit| unit.disks.iter().any(|disk| disk.target == target);
    Peer {
        snapshot: snapshot.id,
        unit: units.find(of).unwrap().clone(),
    }
}

pub(crate) async fn changed(
    rig: &Rig,
    (earlier, later): (&Snapshot, &Snapshot),
    target: &str,
) -> Result<Changed, Error> {
    let (earlier, later) = (peer(earlier, target), peer(later, target));
    let compare = LogicalVolume.compare(&later.unit).unwrap();
    compare
        .changed(&*rig.control().await, &earlier, &later, target)
        .await
}

/// The ranges that are told of the disk `vda`, which are proven: they alone make the later content of the earlier.
pub(crate) async fn proven(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Vec<std::ops::Range<u64>> {
    let told = changed(rig, (earlier, later), "vda").await.unwrap();
    assert_eq!(told.precision, Precision::Exact(CHUNK));
    let ranges: Vec<_> = told.ranges.try_collect().await.unwrap();
    assert_eq!(held("pool"), None);
    let [mut content, expected] = [earlier, later].map(|of| std::fs::read(device(of, "vda")).unwrap());
    assert_eq!(told.size, expected.len() as u64);
    // No byte beyond the earlier's end may be taken for known.
    content.resize(expected.len(), 0xee);
    let mut end = None;
    for range in &ranges {
        assert!(end < Some(range.start), "{ranges:?} touch");
        assert!(range.start < range.end && range.start % CHUNK == 0, "{ranges:?}");
        assert!(range.end % CHUNK == 0 || range.end == told.size, "{ranges:?}");
        end = Some(range.end);
        let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        content[bytes.clone()].copy_from_slice(&expected[bytes]);
    }
    let differs = content.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{ranges:?}");
    ranges
}

fn chunks(ranges: &[std::ops::Range<u64>]) -> BTreeSet<u64> {
    let chunks = |range: &std::ops::Range<u64>| range.start / CHUNK..range.end.div_ceil(CHUNK);
    ranges.iter().flat_map(chunks).collect()
}

/// Numbers that look like chance, the same each time (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        for shift in [13_i32, -7, 17] {
            self.0 ^= if shift > 0 {
                self.0 << shift
            } else {
                self.0 >> -shift
            };
        }
        self.0 % limit
    }
}

/// Writes, zeroes and discards on a device, and which chunks they touched.
fn scribble(path: &Path, chance: &mut Chance, acts: u64) -> BTreeSet<u64> {
    let device = OpenOptions::new().write(true).open(path).unwrap();
    let size = std::io::Seek::seek(&mut &device, std::io::SeekFrom::End(0)).unwrap();
    let mut touched = BTreeSet::new();
    for _ in 0..acts {
        // Sectors, so that most chunks are written in part.
        let offset = chance.below(size / 512) * 512;
        let len = ((chance.below(400) + 1) * 512).min(size - offset);
        let (offset, len) = match chance.below(4) {
            0 => {
                let bytes = vec![0; usize::try_from(len).unwrap()];
                device.write_all_at(&bytes, offset).unwrap();
                (offset, len)
            }
            1 => {
                // Only whole chunks are given back to the pool.
                let first = offset / CHUNK * CHUNK;
                let len = (2 * CHUNK).min(size - first);
                run(&format!("blkdiscard -o {first} -l {len} {}", path.display()));
                (first, len)
            }
            _ => {
                let byte = u8::try_from(chance.below(255)).unwrap() + 1;
                let bytes = vec![byte; usize::try_from(len).unwrap()];
                device.write_all_at(&bytes, offset).unwrap();
                (offset, len)
            }
        };
        touched.extend(offset / CHUNK..(offset + len).div_ceil(CHUNK));
    }
    device.sync_all().unwrap();
    touched
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_is_told_is_what_differs_between_any_two() {
    let group = Group::new("vg", "-s 64k");
    pool(&group, "pool");
    let disk = thin(&group, "pool", "disk", 33 * EXTENT);
    let rig = Rig::new(vec![block("vda", &disk)]);
    assert!(
        rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let mut chance = Chance(0x5eed_d15c);
    let mut all = vec![rig.create("empty").await];
    for round in 1..=5 {
        let last = all.last().unwrap();
        let mut touched = scribble(&disk, &mut chance, 6);
        if round % 2 == 0 {
            let before = std::fs::read(device(last, "vda")).unwrap().len() as u64;
            run("lvextend -y -l +3 vg/disk");
            touched.extend(before / CHUNK..(before + 3 * EXTENT).div_ceil(CHUNK));
        }
        let new = rig.create(&format!("round-{round}")).await;
        let told = chunks(&proven(&rig, last, &new).await);
        assert!(
            !told.is_empty() && told.is_subset(&touched),
            "{told:?} of {touched:?}"
        );
        // Any of the others, either way round.
        let n = usize::try_from(chance.below(all.len() as u64)).unwrap();
        proven(&rig, &all[n], &new).await;
        proven(&rig, &new, &all[n]).await;
        all.push(new);
    }
    let last = all.last().unwrap();
    assert_eq!(proven(&rig, last, last).await, []);
    let same = rig.create("same").await;
    assert_eq!(proven(&rig, last, &same).await, [], "nothing was written");

    // One that is put back, by LVM's own merge, and another by an exchange: their devices' numbers change.
    for (name, stays) in [("round-3", false), ("round-2", true)] {
        scribble(&disk, &mut chance, 3);
        let name = name.parse().unwrap();
        let altered = rig.dispatcher.revert(&rig.domain, &name, &[]).await.unwrap();
        assert_eq!(!altered.gone, stays);
        all.retain(|snapshot| stays || snapshot.name != name);
        let reverted = rig.create(&format!("after-{name}")).await;
        let touched = scribble(&disk, &mut chance, 3);
        let new = rig.create(&format!("later-{name}")).await;
        let told = chunks(&proven(&rig, &reverted, &new).await);
        assert!(told.is_subset(&touched), "{told:?} of {touched:?}");
        for other in all.iter().step_by(3) {
            proven(&rig, other, &reverted).await;
            proven(&rig, &new, other).await;
        }
        if let Some(of) = all.iter().find(|snapshot| snapshot.name == name) {
            assert_eq!(proven(&rig, of, &reverted).await, [], "it was put back");
        }
        all.extend([reverted, new]);
    }
    let left = std::fs::read_dir(rig.dir.path()).unwrap().count();
    assert_eq!(left, 0, "files are left");
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_cannot_be_compared_is_refused() {
    let group = Group::new("vg", "-s 64k");
    for name in ["pool", "second"] {
        pool(&group, name);
    }
    let plain = group.plain("plain", 2);
    let [one, other, third] = [("pool", "one"), ("pool", "other"), ("second", "third")]
        .map(|(pool, name)| thin(&group, pool, name, 32 * EXTENT));
    let rig = Rig::new(vec![block("vda", &one), block("vdb", &plain)]);
    let (first, second) = (rig.create("first").await, rig.create("second").await);
    let classic = peer(&first, "vdb");
    assert!(LogicalVolume.compare(&classic.unit).is_none());
    assert!(
        !rig.probe(&[]).await[1]
            .capabilities
            .contains(&Capability::Compare)
    );

    let compare = LogicalVolume.compare(&peer(&first, "vda").unit).unwrap();
    let refused = async |earlier: &Peer, later: &Peer, target: &str| {
        let control = rig.control().await;
        compare
            .changed(&*control, earlier, later, target)
            .await
            .unwrap_err()
    };
    let vda = peer(&second, "vda");
    for (volume, word) in [(&other, "different volumes"), (&third, "different thin pools")] {
        let elsewhere = Rig::new(vec![block("vda", volume)]).create("elsewhere").await;
        let elsewhere = peer(&elsewhere, "vda");
        for (a, b) in [(&vda, &elsewhere), (&elsewhere, &vda)] {
            let error = refused(a, b, "vda").await;
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.message().contains(word), "{error}");
        }
    }
    for (a, b, target) in [
        (&vda, &vda, "vdc"),
        (&classic, &classic, "vdb"),
        (&classic, &vda, "vda"),
    ] {
        let error = refused(a, b, target).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    // A volume that goes by another name is the same volume.
    run("lvrename vg/one vg/renamed");
    let renamed = Rig::new(vec![block("vda", &group.path("renamed"))]);
    let third = renamed.create("third").await;
    assert_eq!(proven(&renamed, &first, &third).await, []);

    let path = device(&first, "vda");
    run(&format!("lvchange -an {}", path.display()));
    let error = changed(&rig, (&first, &second), "vda").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(error.next_step().unwrap().contains("lvchange -ay -K"), "{error}");
    run(&format!("lvremove -y {}", path.display()));
    let error = changed(&rig, (&second, &first), "vda").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(held("pool"), None);
}

/// An image's ranges are not the guest's: what is told are the guest's.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_image_on_a_volume_is_compared_as_the_guest_sees_it() {
    let group = Group::new("vg", "-s 64k");
    pool(&group, "pool");
    let disk = thin(&group, "pool", "disk", 128 * EXTENT);
    let shown = disk.display();
    run(&format!("qemu-img create -q -f qcow2 {shown} 4M"));
    let source = disksnap_core::Source::Block { dev: disk.clone() };
    let rig = Rig::new(vec![formatted("vda", source, "qcow2")]);
    assert!(
        rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let io = |command: &str| {
        let words = ["qemu-io", "-f", "qcow2", "-c", command, disk.to_str().unwrap()];
        try_run(&words).unwrap();
    };
    io("write -P 1 1M 300k");
    let first = rig.create("first").await;
    let same = rig.create("same").await;
    io("write -P 2 3M 64k");
    io("write -z -u 1M 64k");
    io("write -P 3 0 4k");
    let second = rig.create("second").await;
    assert_eq!(ranges_of_image(&rig, &first, &same).await, []);
    let told = ranges_of_image(&rig, &first, &second).await;
    assert_eq!(
        told,
        [(0, 64 * KIB), (1024 * KIB, 1088 * KIB), (3072 * KIB, 3136 * KIB)]
    );
    assert_eq!(ranges_of_image(&rig, &second, &first).await, told);
    assert_eq!(held("pool"), None);
}

/// Nothing tells where in the guest's disk an encrypted image differs, so no snapshot of one is kept for that.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_encrypted_image_is_not_compared() {
    let group = Group::new("vg", "-s 64k");
    pool(&group, "pool");
    let disk = thin(&group, "pool", "disk", 128 * EXTENT);
    run(&format!("qemu-img create -q -f qcow2 {} 4M", disk.display()));
    let source = disksnap_core::Source::Block { dev: disk.clone() };
    let rig = Rig::new(vec![formatted("vda", source, "qcow2")]);
    let offers = async || {
        let told = rig.probe(&[]).await;
        told[0].capabilities.contains(&Capability::Compare)
    };
    assert!(offers().await);
    let plain = rig.create("plain").await;
    // The header's method of encryption, LUKS.
    fill(&disk, 35, 1, 2);
    assert!(!offers().await);
    let encrypted = peer(&rig.create("encrypted").await, "vda");
    assert!(LogicalVolume.compare(&encrypted.unit).is_none());
    let error = changed_to(&rig, &plain, &encrypted).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

    // A record of old does not say that it can be compared.
    let mut old = peer(&plain, "vda").unit;
    assert!(LogicalVolume.compare(&old).is_some());
    old.data.as_object_mut().unwrap().remove("comparable");
    assert!(LogicalVolume.compare(&old).is_none());
}

/// What the earlier one's comparison says.
async fn changed_to(rig: &Rig, earlier: &Snapshot, later: &Peer) -> Result<Changed, Error> {
    let earlier = peer(earlier, "vda");
    let compare = LogicalVolume.compare(&earlier.unit).unwrap();
    compare
        .changed(&*rig.control().await, &earlier, later, "vda")
        .await
}

async fn ranges_of_image(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Vec<(u64, u64)> {
    let told = changed(rig, (earlier, later), "vda").await.unwrap();
    assert_eq!(told.size, 4096 * KIB);
    assert!(matches!(told.precision, Precision::Superset(_)), "{told:?}");
    let ranges: Vec<_> = told.ranges.try_collect().await.unwrap();
    ranges.iter().map(|range| (range.start, range.end)).collect()
}

/// Of an image in a file system on the volume, nobody here knows where it lies.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_image_in_a_file_system_is_not_compared() {
    let group = Group::new("vg", "-s 64k");
    pool(&group, "pool");
    let disk = thin(&group, "pool", "disk", 128 * EXTENT);
    run(&format!("mke2fs -q -t ext4 {}", disk.display()));
    let _mounted = Mounted::new(&disk, Path::new("/mnt/compared"), "");
    std::fs::write("/mnt/compared/image", [1; 4096]).unwrap();
    let rig = Rig::new(vec![file("vda", Path::new("/mnt/compared/image"))]);
    assert!(
        !rig.probe(&[]).await[0]
            .capabilities
            .contains(&Capability::Compare)
    );
    let snapshot = rig.create("one").await;
    assert!(LogicalVolume.compare(&peer(&snapshot, "vda").unit).is_none());
}

/// Two disks in one pool: one waits for the other, and none is refused.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs in the guest"]
async fn several_at_a_time_take_turns() {
    let group = Group::new("vg", "-s 64k");
    pool(&group, "pool");
    let disks = ["one", "other"].map(|name| thin(&group, "pool", name, 32 * EXTENT));
    let rig = Rig::new(vec![block("vda", &disks[0]), block("vdb", &disks[1])]);
    let first = rig.create("first").await;
    let mut chance = Chance(1);
    for disk in &disks {
        scribble(disk, &mut chance, 3);
    }
    let second = rig.create("second").await;
    let of = |target| changed(&rig, (&first, &second), target);
    let (a, b, c) = tokio::join!(of("vda"), of("vdb"), of("vda"));
    // Nobody has read a range yet.
    assert_eq!(held("pool"), None);
    for told in [a, b, c] {
        let ranges: Vec<_> = told.unwrap().ranges.try_collect().await.unwrap();
        assert!(!ranges.is_empty());
    }
    assert!(File::open(&disks[0]).is_ok());
}
