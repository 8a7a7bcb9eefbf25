//! How long a take is beside the bare tool, and what prepare spares it. Measures, and judges nothing:
//! `cargo test -p disksnap-btrfs --test take -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::time::Instant;

use disksnap_btrfs::Btrfs;
use disksnap_core::{DiskSnapshot, SnapshotId};
use disksnap_test_support::{LoopFsKind, loop_fs, need};
use support::rig::{Rig, disk};
use support::{create, delete, run};

const DIRTY: usize = 400 << 20;

fn make_dirty(image: &Path, byte: u8) {
    fs::write(image, vec![byte; DIRTY]).unwrap();
}

/// The bare tool on the same subvolume, in milliseconds.
fn bare(images: &Path, fs: &Path) -> f64 {
    let snapshot = fs.join("bare");
    let arguments = ["subvolume", "snapshot", "-r"].map(AsRef::as_ref);
    let since = Instant::now();
    run(arguments
        .into_iter()
        .chain([images.as_os_str(), snapshot.as_os_str()]));
    let took = since.elapsed();
    delete(&snapshot);
    took.as_secs_f64() * 1e3
}

#[tokio::test]
#[ignore = "measures, and judges nothing"]
#[expect(clippy::print_stderr, reason = "the figures are what it is for")]
async fn takes() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 4 << 30, "");
    let images = create(&fs.path().join("images"));
    let image = images.join("a.raw");
    make_dirty(&image, 0);
    let rig = Rig::off(Btrfs, vec![disk("vda", "raw", &image)]);
    let (control, requests) = (rig.control().await, rig.requests(&[]));
    eprintln!("400 MiB dirty, milliseconds: bare tool at once | prepare, take | bare tool right after");
    // What is deleted is freed in the background: there is room for three.
    for byte in 1..=3 {
        make_dirty(&image, byte);
        let dirty = bare(&images, fs.path());
        make_dirty(&image, byte);
        let id = SnapshotId::random();
        let since = Instant::now();
        let prepared = Btrfs.prepare(&*control, id, &requests).await.unwrap();
        let prepare = since.elapsed().as_secs_f64() * 1e3;
        let since = Instant::now();
        let taken = Btrfs.take(&*control, &prepared[0]).await.unwrap();
        let take = since.elapsed().as_secs_f64() * 1e3;
        let clean = bare(&images, fs.path());
        let unit = Btrfs.complete(&*control, id, &prepared[0], &taken).await.unwrap();
        Btrfs.delete(&*control, id, &unit).await.unwrap();
        eprintln!("{dirty:8.1} | {prepare:8.1}, {take:6.1} | {clean:6.1}");
    }
}
