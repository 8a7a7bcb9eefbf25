//! Doors for fuzz targets: what `qemu-img map` prints, and images that somebody else has made. Not part of the interface.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use disksnap_core::{BackingStore, Disk, Driver, Source};

use crate::map::Telling;
use crate::packed::Packed;
use crate::{
    ByHeaders, FileInImage, Qcow2, check_said, named, opened, qcow2_holds_data, raw_data_of,
    raw_data_qcow2_is_new,
};

/// Takes `data` as the map of a disk of 1 MiB.
///
/// # Panics
/// If the pieces do not follow one another, or go beyond the disk.
pub fn map(data: &[u8]) {
    const SIZE: u64 = 1 << 20;
    let (mut telling, mut at) = (Telling::of(SIZE), 0);
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        match telling.piece(line) {
            Err(_) => return,
            Ok(None) => {}
            Ok(Some(piece)) => {
                assert!(
                    piece.start == at && piece.end > at && piece.end <= SIZE,
                    "{piece:?} after {at}"
                );
                let _ = piece.at(piece.end - 1);
                at = piece.end;
            }
        }
    }
    assert_eq!(telling.all_is_told().is_ok(), at == SIZE);
}

/// Where images lie: one folder for all inputs.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("disksnap-fuzz-{}", std::process::id()));
    // Where it cannot be made nothing is tried.
    let _ = std::fs::create_dir(&folder);
    let _ = std::fs::write(folder.join("base"), [0; 512]);
    folder
});

/// Takes `data` as an image over which a document says that `base` is, and nothing else.
///
/// # Panics
/// If anything else that its header names is let pass.
pub fn image(data: &[u8]) {
    let (image, base) = (FOLDER.join("image"), FOLDER.join("base"));
    if std::fs::write(&image, data).is_err() {
        return;
    }
    let file = |path: &Path| Source::File {
        file: path.to_owned(),
    };
    let disk = Disk {
        driver: Driver {
            name: None,
            format: Some("qcow2".to_owned()),
        },
        backing: Some(BackingStore {
            format: Some("raw".to_owned()),
            source: file(&base),
            data_store: None,
            backing: None,
        }),
        ..Disk::new("vda", file(&image))
    };
    if check_said(&disk).is_ok() {
        let header = Qcow2::parse(&data[..data.len().min(64 << 10)]);
        let header = header.unwrap_or_else(|why| panic!("{why}, and it was taken for an image"));
        assert!(!header.external_data, "data elsewhere");
        let below = header.backing.map(|name| named(&image, &name));
        assert!(
            below.is_none_or(|below| below == Some(base)),
            "another file below"
        );
    }
    assert!(ByHeaders::of(&disk).below.len() <= 64);
    let alone = FileInImage {
        path: image.clone(),
        format: "qcow2".to_owned(),
    };
    let _ = (opened(std::slice::from_ref(&alone), |_| None), alone.disk_size());
    let _ = (
        raw_data_of(&image),
        raw_data_qcow2_is_new(&image),
        qcow2_holds_data(&image),
    );
    if let Ok(Some(mut packed)) = Packed::of(&alone) {
        for at in [0, 1 << 16, 1 << 29, u64::MAX] {
            if let Ok(Some(place)) = packed.find(at) {
                assert!(place.start < place.end, "{place:?}");
            }
        }
    }
}
