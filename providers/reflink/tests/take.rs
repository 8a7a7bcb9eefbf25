//! How long a take is beside the bare tool, and what prepare spares it. Measures, and judges nothing:
//! `cargo test -p disksnap-reflink --test take -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[path = "../../../image-file/testing/rig.rs"]
mod rig;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use disksnap_core::{DiskSnapshot, SnapshotId};
use disksnap_reflink::Reflink;
use disksnap_test_support::{LoopFsKind, loop_fs, need};
use rig::{Rig, disk};

const SIZE: u64 = 1 << 30;

/// Every other block of 4 KiB in the first part, each an extent of its own.
fn make_dirty(image: &Path, extents: u64, byte: u8) {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(image)
        .unwrap();
    file.set_len(SIZE).unwrap();
    for n in 0..extents {
        file.write_all_at(&[byte; 4096], n * 8192).unwrap();
    }
}

/// The bare tool on the same file, in milliseconds.
fn bare(image: &Path) -> f64 {
    let clone = image.with_extension("bare");
    let since = Instant::now();
    let copied = Command::new("cp")
        .arg("--reflink=always")
        .args([image, &clone])
        .status();
    let took = since.elapsed();
    assert!(copied.unwrap().success());
    fs::remove_file(&clone).unwrap();
    took.as_secs_f64() * 1e3
}

#[tokio::test]
#[ignore = "measures, and judges nothing"]
#[expect(clippy::print_stderr, reason = "the figures are what it is for")]
async fn takes() {
    need!("xfs", "btrfs");
    for kind in [LoopFsKind::Xfs, LoopFsKind::Btrfs] {
        let fs = loop_fs(kind, 4 << 30, "");
        let image = fs.path().join("a.raw");
        eprintln!(
            "{kind:?}, dirty extents, milliseconds: bare tool at once | prepare, take | bare tool right after"
        );
        for extents in [1, 1_000, 36_000] {
            make_dirty(&image, extents, 0);
            let rig = Rig::off(Reflink, vec![disk("vda", "raw", &image)]);
            let (control, requests) = (rig.control().await, rig.requests(&[]));
            for byte in 1..=4 {
                make_dirty(&image, extents, byte);
                let dirty = bare(&image);
                make_dirty(&image, extents, byte);
                let id = SnapshotId::random();
                let since = Instant::now();
                let prepared = Reflink.prepare(&*control, id, &requests).await.unwrap();
                let prepare = since.elapsed().as_secs_f64() * 1e3;
                let since = Instant::now();
                Reflink.take(&*control, &prepared[0]).await.unwrap();
                let take = since.elapsed().as_secs_f64() * 1e3;
                let clean = bare(&image);
                Reflink
                    .abort(&*control, id, &requests, Some(&prepared))
                    .await
                    .unwrap();
                eprintln!("{extents:6}: {dirty:8.1} | {prepare:8.1}, {take:6.1} | {clean:6.1}");
            }
        }
    }
}
