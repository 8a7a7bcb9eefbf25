//! Restoring into a paused domain as a program does it: the library's own dispatcher and NBD client, on a real QEMU.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use disksnap::{Disksnap, ErrorKind, FillDisk, FillEnd, FillHealth, FillRequest, nbd_uri};
use disksnap_nbd::{Client, CommandFlags, ConnectOptions};
use disksnap_test_support::{DiskSpec, MIB, Qemu, pattern};

const SIZE: u64 = 4 * MIB;

/// The first half random bytes, the second zeroes, which the disk did not hold.
async fn fill(disk: &FillDisk, content: &[u8]) {
    let uri = nbd_uri(&disk.source).unwrap().parse().unwrap();
    let client = Client::connect(&uri, &ConnectOptions::default()).await.unwrap();
    assert!(!client.is_read_only());
    assert_eq!((client.size(), disk.size), (SIZE, SIZE));
    let half = content.len() / 2;
    for (n, piece) in content[..half].chunks(1 << 20).enumerate() {
        let write = client.write((n as u64) << 20, piece.to_vec(), CommandFlags::empty());
        write.await.unwrap();
    }
    let zeroes = client.write_zeroes(half as u64, half as u64, CommandFlags::empty());
    zeroes.await.unwrap();
    client.disconnect().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_fills_the_disks_and_the_guest_goes_on() {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", SIZE).qcow2())
        .disk(DiskSpec::new("sda", SIZE).scsi().iothread())
        .prelaunch()
        .start();
    for target in ["vda", "sda"] {
        qemu.write(target, 0, SIZE, 0x55);
    }
    let state = tempfile::tempdir().unwrap();
    let disksnap = Disksnap::open(Some(state.path())).await.unwrap();
    let xml = qemu.domain_xml_file();
    let document = disksnap.load(xml.to_str().unwrap()).await.unwrap();
    let (dispatcher, domain) = (disksnap.dispatcher(), document.domain());

    let filling = dispatcher
        .fill_start(domain, &FillRequest::default())
        .await
        .unwrap();
    assert_eq!(filling.health, FillHealth::Open);
    assert_eq!(dispatcher.filling(domain).await.unwrap(), Some(filling.clone()));
    let refused = dispatcher
        .create(domain, &disksnap::SnapshotRequest::default())
        .await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
    let mut contents = Vec::new();
    for (n, disk) in filling.disks.iter().enumerate() {
        let half = usize::try_from(SIZE / 2).unwrap();
        let mut content = pattern::bytes(n as u64, half);
        content.resize(2 * half, 0);
        fill(disk, &content).await;
        contents.push(content);
    }
    let ended = dispatcher.fill_end(domain, FillEnd::Resume).await.unwrap();
    assert_eq!(
        (ended.disks, ended.resumed),
        (vec!["vda".to_owned(), "sda".to_owned()], true)
    );
    assert_eq!(qemu.status(), "running");
    for (target, content) in ["vda", "sda"].into_iter().zip(contents) {
        assert_eq!(qemu.disk(target).digest(), pattern::digest(&content), "{target}");
    }
}
