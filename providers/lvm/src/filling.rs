//! How full things are: thin pools and classic snapshots.

use crate::volume::Volume;

/// What is wrong with the pool of a thin volume, if anything.
pub(crate) fn pool_fault(volume: &Volume, volumes: &[Volume]) -> Option<String> {
    let pool = pool_of(volume, volumes)?;
    let name = pool.full_name();
    let full = |percent: Option<f64>| percent.is_some_and(|percent| percent >= 100.0);
    if full(pool.data_percent) || pool.health == "out_of_data" {
        Some(format!(
            "the thin pool {name} is full: writes to its volumes wait or fail; `lvextend` enlarges it"
        ))
    } else if full(pool.metadata_percent) {
        Some(format!(
            "the metadata of the thin pool {name} is full; `lvextend --poolmetadatasize` enlarges it"
        ))
    } else if !pool.health.is_empty() {
        Some(format!("the thin pool {name} is not well: {}", pool.health))
    } else {
        None
    }
}

fn pool_of<'a>(volume: &Volume, volumes: &'a [Volume]) -> Option<&'a Volume> {
    let of = |pool: &&Volume| pool.group == volume.group && pool.name == volume.pool && pool.is_thin_pool();
    volumes.iter().find(of)
}

/// What fills up before a snapshot of this volume is made: its pool, or its earlier classic snapshots.
pub(crate) fn filling(volume: &Volume, volumes: &[Volume], mark: u8) -> Vec<String> {
    let mut warnings = filling_pool(volume, volumes, mark);
    let of_it = |other: &&Volume| other.group == volume.group && other.origin == volume.name;
    warnings.extend(volumes.iter().filter(of_it).filter_map(|snapshot| {
        let percent = above(snapshot_percent(snapshot), mark)?;
        let name = snapshot.full_name();
        Some(format!(
            "the snapshot {name} of the same volume is {percent:.0} % full, and breaks when it is full: \
             `lvextend` enlarges it"
        ))
    }));
    warnings
}

/// What endangers a snapshot that is good: its own room runs out, or its pool's.
pub(crate) fn danger(snapshot: &Volume, volumes: &[Volume], mark: u8) -> Option<String> {
    if let Some(percent) = above(snapshot_percent(snapshot), mark) {
        let name = snapshot.full_name();
        return Some(format!(
            "the snapshot {name} is {percent:.0} % full, and breaks when it is full: `lvextend` enlarges it"
        ));
    }
    let of_pool = filling_pool(snapshot, volumes, mark);
    (!of_pool.is_empty()).then(|| of_pool.join("; "))
}

fn filling_pool(volume: &Volume, volumes: &[Volume], mark: u8) -> Vec<String> {
    let Some(pool) = pool_of(volume, volumes) else {
        return Vec::new();
    };
    let name = pool.full_name();
    let data = above(pool.data_percent, mark).map(|percent| {
        format!(
            "the thin pool {name} is {percent:.0} % full; when it is full, the guest's writes wait or fail: \
             `lvextend` enlarges it"
        )
    });
    let metadata = above(pool.metadata_percent, mark).map(|percent| {
        format!(
            "the metadata of the thin pool {name} is {percent:.0} % full: `lvextend --poolmetadatasize` enlarges it"
        )
    });
    data.into_iter().chain(metadata).collect()
}

/// How full a classic snapshot is; of a thin one LVM tells something else there.
fn snapshot_percent(volume: &Volume) -> Option<f64> {
    volume.data_percent.filter(|_| volume.is_classic_snapshot())
}

fn above(percent: Option<f64>, mark: u8) -> Option<f64> {
    percent.filter(|percent| *percent >= f64::from(mark))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    fn volume(name: &str, attributes: &str, percent: f64) -> Volume {
        Volume {
            group: "vg".to_owned(),
            name: name.to_owned(),
            attributes: attributes.to_owned(),
            data_percent: Some(percent),
            ..Volume::default()
        }
    }

    #[test]
    fn a_classic_snapshot_is_endangered_from_its_mark_on() {
        let snapshot = Volume {
            origin: "disk".to_owned(),
            ..volume("snap", "swi-a-s---", 79.9)
        };
        let disk = volume("disk", "owi-a-s---", 100.0);
        let all = [snapshot.clone(), disk.clone()];
        assert_eq!(danger(&snapshot, &all, 80), None);
        assert!(
            danger(&snapshot, &all, 79)
                .unwrap()
                .contains("vg/snap is 80 % full")
        );
        assert_eq!(danger(&disk, &all, 1), None, "only a snapshot fills up");
        assert_eq!(filling(&disk, &all, 79).len(), 1);
        assert!(filling(&disk, &all, 80).is_empty());
    }

    #[test]
    fn a_thin_snapshot_is_endangered_by_its_pool() {
        let snapshot = Volume {
            pool: "pool".to_owned(),
            ..volume("snap", "Vri-a-tz--", 100.0)
        };
        let pool = Volume {
            metadata_percent: Some(91.0),
            ..volume("pool", "twi-aotz--", 90.0)
        };
        let all = [snapshot.clone(), pool];
        let why = danger(&snapshot, &all, 90).unwrap();
        assert!(
            why.contains("vg/pool is 90 % full") && why.contains("metadata"),
            "{why}"
        );
        assert_eq!(
            danger(&snapshot, &all, 92),
            None,
            "how much of it is mapped is no danger"
        );
        assert_eq!(filling(&snapshot, &all, 90).len(), 2);
    }
}
