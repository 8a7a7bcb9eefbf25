//! What two snapshots are told to differ in, checked against what they hold.

use std::fs;
use std::ops::Range;

use disksnap_btrfs::Btrfs;
use disksnap_core::{Access, Changed, DiskSnapshot, Error, Peer, Precision, Snapshot};
use futures_util::TryStreamExt;

use super::rig::{Rig, file, qemu_img};

/// A guest's disk is made of these.
const SECTOR: u64 = 512;

pub fn peer(snapshot: &Snapshot) -> Peer {
    Peer {
        snapshot: snapshot.id,
        unit: snapshot.units[0].unit.clone(),
    }
}

pub async fn changed(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Result<Changed, Error> {
    let (earlier, later) = (peer(earlier), peer(later));
    let compare = Btrfs.compare(&earlier.unit).unwrap();
    let control = rig.control().await;
    compare.changed(&*control, &earlier, &later, "vda").await
}

/// The ranges; checked for what is promised of them: ascending, not empty, none touching another, all in the disk.
pub async fn ranges(rig: &Rig, earlier: &Snapshot, later: &Snapshot) -> Vec<Range<u64>> {
    let Changed {
        size,
        precision,
        ranges,
    } = changed(rig, earlier, later).await.unwrap();
    assert!(matches!(precision, Precision::Superset(_)));
    assert_eq!(Some(size), later.disk("vda").unwrap().size);
    let ranges: Vec<Range<u64>> = ranges.try_collect().await.unwrap();
    let sound = |range: &Range<u64>| range.start < range.end && range.end <= size.next_multiple_of(SECTOR);
    assert!(ranges.iter().all(sound), "{ranges:?} of {size}");
    assert!(
        ranges.windows(2).all(|two| two[0].end < two[1].start),
        "{ranges:?}"
    );
    ranges
}

/// The earlier content with the told ranges of the later one must be the later content. Gives what is told.
pub async fn assert_told(rig: &Rig, earlier: &Snapshot, later: &Snapshot, what: &str) -> Vec<Range<u64>> {
    let told = ranges(rig, earlier, later).await;
    let (mut was, is) = (content(rig, earlier), content(rig, later));
    was.resize(is.len(), 0xee);
    for Range { start, end } in &told {
        let range = usize::try_from(*start).unwrap()..usize::try_from(*end).unwrap();
        was[range.clone()].copy_from_slice(&is[range]);
    }
    if was != is {
        let missed = was.iter().zip(&is).position(|(was, is)| was != is);
        panic!("{what}: missed is {missed:?}; told were {told:?}");
    }
    told
}

/// What a guest would read: whole sectors, the last one filled up with zeros.
pub fn content(rig: &Rig, snapshot: &Snapshot) -> Vec<u8> {
    let from = file(snapshot, "vda");
    let format = match &snapshot.disk("vda").unwrap().access {
        Access::Source { format, .. } => format.as_str(),
        other => panic!("it is reached by {other:?}"),
    };
    if format == "raw" {
        let mut content = fs::read(from).unwrap();
        let sectors = (content.len() as u64).next_multiple_of(SECTOR);
        content.resize(usize::try_from(sectors).unwrap(), 0);
        return content;
    }
    let (from, to) = (from.to_str().unwrap(), rig.dir.path().join("content.raw"));
    let convert = ["convert", "-f", format, "-O", "raw", from, to.to_str().unwrap()];
    qemu_img(&convert, rig.dir.path()).unwrap();
    fs::read(to).unwrap()
}
