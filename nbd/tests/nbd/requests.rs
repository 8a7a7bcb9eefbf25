//! Connecting, and single requests, against real servers.

use std::time::Duration;

use bytes::Bytes;
use disksnap_nbd::{
    Client, Command, CommandFlags, ConnectOptions, Errno, Error, Refusal, TransmissionFlags, Uri,
    list_exports,
};
use tokio::task::JoinSet;

use crate::server::{Server, directory, image, noise};

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::empty();

#[tokio::test]
async fn what_is_written_is_read_and_is_in_the_image() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", 80 * MIB);
    let mut expected = vec![0; 80 << 20];
    {
        let server = Server::qemu_nbd(&["--format", "raw", path.to_str().unwrap()]);
        let client = server.connect().await;
        assert_eq!(client.size(), 80 * MIB);
        assert!(!client.is_read_only());
        // Odd offsets and lengths, and one longer than any single request.
        for (seed, (offset, length)) in [
            (0, 512),
            (4095, 2),
            (MIB + 1, 65_537),
            (5 * MIB, 70 << 20),
            (80 * MIB - 3, 3),
        ]
        .into_iter()
        .enumerate()
        {
            let data = noise(seed as u64, length);
            let at = usize::try_from(offset).unwrap();
            expected[at..at + length].copy_from_slice(&data);
            client.write(offset, data.clone(), NONE).await.unwrap();
            assert!(
                client.read(offset, length).await.unwrap() == data,
                "{length} bytes at {offset}"
            );
        }
        client.flush().await.unwrap();
        assert!(client.read(0, 80 << 20).await.unwrap() == expected);
        client.disconnect().await;
        server.stop();
    }
    assert!(std::fs::read(path).unwrap() == expected);
}

#[tokio::test]
async fn zeroes_trims_and_flags() {
    let dir = directory();
    let path = image(dir.path(), "disk.qcow2", "qcow2", 8 * MIB);
    let server = Server::qemu_nbd(&["--format", "qcow2", "--discard=unmap", path.to_str().unwrap()]);
    let client = server.connect().await;
    let ones = Bytes::from(vec![1; 8 << 20]);
    client.write(0, ones, CommandFlags::FUA).await.unwrap();
    client.write_zeroes(MIB, MIB, NONE).await.unwrap();
    client
        .write_zeroes(3 * MIB + 7, 9, CommandFlags::NO_HOLE | CommandFlags::FUA)
        .await
        .unwrap();
    client.trim(5 * MIB, MIB, NONE).await.unwrap();
    assert!(
        client
            .read(MIB - 1, (1 << 20) + 2)
            .await
            .unwrap()
            .iter()
            .enumerate()
            .all(|(i, byte)| { *byte == u8::from(i == 0 || i == (1 << 20) + 1) })
    );
    assert_eq!(
        client.read(3 * MIB + 6, 11).await.unwrap()[..],
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    );
    client.flush().await.unwrap();

    let wrong = client
        .write(0, vec![0; 512], CommandFlags::FAST_ZERO)
        .await
        .unwrap_err();
    assert!(
        matches!(
            wrong,
            Error::InvalidRequest {
                command: Command::Write,
                ..
            }
        ),
        "{wrong}"
    );
}

#[tokio::test]
async fn nothing_is_asked_past_the_end_and_nothing_for_nothing() {
    let dir = directory();
    let size = MIB + 512;
    let path = image(dir.path(), "odd.raw", "raw", size);
    let server = Server::qemu_nbd(&["--format", "raw", path.to_str().unwrap()]);
    let client = server.connect().await;
    assert_eq!(client.size(), size);
    assert_eq!(client.read(size - 700, 700).await.unwrap().len(), 700);
    assert_eq!(client.read(size, 0).await.unwrap().len(), 0);
    client.write(size, Bytes::new(), NONE).await.unwrap();
    client.write_zeroes(0, 0, NONE).await.unwrap();
    client.trim(7, 0, NONE).await.unwrap();

    for (offset, length) in [
        (size - 1, 2),
        (size, 1),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
        (0, usize::MAX),
    ] {
        let error = client.read(offset, length).await.unwrap_err();
        assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
    }
    let error = client.write_zeroes(1, size, NONE).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("write of zeroes of 1049088 bytes at 1 reaches past the end"),
        "{text}"
    );
    assert!(client.is_open());
}

#[tokio::test]
async fn an_unknown_export_is_told_from_a_known_one() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", MIB);
    let arguments = [
        "--format",
        "raw",
        "--export-name",
        "vda",
        "--description",
        "the first",
        path.to_str().unwrap(),
    ];
    let server = Server::qemu_nbd(&arguments);
    let error = Client::connect(&server.uri.clone().with_export("vdb"), &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Refused {
                refusal: Refusal::UnknownExport,
                ..
            }
        ),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("/vdb?socket=") && text.contains("list_exports"),
        "{text}"
    );

    let client = Client::connect(&server.uri.clone().with_export("vda"), &ConnectOptions::default())
        .await
        .unwrap();
    assert_eq!(client.description(), Some("the first"));
    let exports = list_exports(&server.uri, &ConnectOptions::default())
        .await
        .unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!(
        (exports[0].name.as_str(), exports[0].description.as_str()),
        ("vda", "the first")
    );
}

#[tokio::test]
async fn a_read_only_export_is_not_written() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", MIB);
    let server = Server::qemu_nbd(&["--read-only", "--format", "raw", path.to_str().unwrap()]);
    let client = server.connect().await;
    assert!(client.is_read_only());
    let write = client.write(0, vec![1; 512], NONE).await.unwrap_err();
    let zero = client.write_zeroes(0, 512, NONE).await.unwrap_err();
    let trim = client.trim(0, 512, NONE).await.unwrap_err();
    for error in [write, zero, trim] {
        assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
    }
    assert_eq!(client.read(0, 512).await.unwrap()[..], [0; 512]);
}

#[tokio::test]
async fn an_address_where_nobody_listens() {
    let dir = directory();
    let uri = Uri::unix(dir.path().join("none"), "vda");
    let error = Client::connect(&uri, &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains(&uri.to_string()), "{error}");
}

#[tokio::test]
async fn the_storages_error_is_the_requests_error() {
    let fails = "driver=blkdebug,node-name=disk,image.driver=null-co,image.size=1048576,\
                 inject-error.0.event=none,inject-error.0.errno=5,inject-error.0.sector=1";
    let server = Server::storage_daemon(&[fails], "writable=on");
    let client = server.connect().await;
    let read = client.read(0, 4096).await.unwrap_err();
    let write = client.write(512, vec![0; 512], NONE).await.unwrap_err();
    for (error, asked) in [(read, Command::Read), (write, Command::Write)] {
        let expected = matches!(&error, Error::Server { errno: Errno::Io, command, .. } if *command == asked);
        assert!(expected, "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains(" failed on nbd+unix:///vda?") && text.contains("EIO"),
            "{text}"
        );
    }
    client.read(1024, 4096).await.unwrap();
    client.write(0, vec![0; 512], NONE).await.unwrap();
}

#[tokio::test]
async fn a_server_with_large_blocks() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", MIB);
    let file = format!("driver=file,node-name=file,filename={}", path.display());
    let aligned = "driver=blkdebug,node-name=disk,image=file,align=4096";
    let server = Server::storage_daemon(&[&file, aligned], "writable=on");
    let client = server.connect_with(&[]).await;
    assert_eq!(client.block_sizes().minimum, 4096);
    let data = noise(1, 8192);
    client.write(4096, data.clone(), NONE).await.unwrap();
    assert!(client.read(5000, 3000).await.unwrap() == data[904..3904]);
    assert!(client.read(MIB - 1, 1).await.unwrap()[..] == [0]);
    let extents = client.block_status(5000, 100, "base:allocation").await.unwrap();
    assert_eq!((extents[0].offset, extents[0].end()), (5000, 5100));
    for (offset, length) in [(512, 4096), (4096, 512)] {
        let error = client.write(offset, vec![0; length], NONE).await.unwrap_err();
        assert!(matches!(error, Error::InvalidRequest { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_reads_at_once_each_get_their_own() {
    let dir = directory();
    let path = dir.path().join("disk.raw");
    let data = noise(3, 16 << 20);
    std::fs::write(&path, &data).unwrap();
    let server = Server::qemu_nbd(&["--read-only", "--format", "raw", path.to_str().unwrap()]);
    // Less than what is asked for at once: some must wait.
    let options = ConnectOptions {
        max_in_flight: 1 << 20,
        ..ConnectOptions::default()
    };
    let client = Client::connect(&server.uri, &options).await.unwrap();
    let mut reads = JoinSet::new();
    for i in 0..400_usize {
        let client = client.clone();
        let (offset, length) = (i * 40_009, 1 + (i * 7919) % 400_000);
        reads.spawn(async move { (offset, length, client.read(offset as u64, length).await) });
    }
    while let Some(read) = reads.join_next().await {
        let (offset, length, bytes) = read.unwrap();
        assert!(
            bytes.unwrap() == data[offset..offset + length],
            "{length} bytes at {offset}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_future_leaves_the_connection_in_order() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", 64 * MIB);
    let server = Server::qemu_nbd(&["--format", "raw", path.to_str().unwrap()]);
    let client = server.connect().await;
    let data = noise(4, 4 << 20);
    client.write(0, data.clone(), NONE).await.unwrap();
    for i in 0..200_u64 {
        // Given up at every stage: before it is sent, on its way, while the answer comes.
        let patience = Duration::from_micros(i * 10);
        let read = client.read(i * 1000, 2 << 20);
        let write = client.write(8 * MIB + i * 4096, data.clone(), NONE);
        let _ = tokio::time::timeout(patience, async { tokio::join!(read, write) }).await;
    }
    assert!(client.read(0, 4 << 20).await.unwrap() == data);
    client.write(32 * MIB, data.clone(), NONE).await.unwrap();
    assert!(client.read(32 * MIB, 4 << 20).await.unwrap() == data);
    client.disconnect().await;
}

#[tokio::test]
async fn disconnected_is_disconnected() {
    let server = Server::qemu_nbd(&["--image-opts", "driver=null-co,size=1G"]);
    let client = server.connect().await;
    let other = client.clone();
    let (read, ()) = tokio::join!(client.read(0, 1 << 20), other.disconnect());
    // It was handed over before the goodbye.
    assert_eq!(read.unwrap().len(), 1 << 20);
    client.disconnect().await;
    assert!(!client.is_open());
    let error = client.read(0, 512).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert!(error.to_string().contains("this side closed it"), "{error}");
}

#[tokio::test]
async fn a_killed_server_fails_what_is_in_flight() {
    let mut server = Server::qemu_nbd(&["--image-opts", "driver=null-co,size=64G,latency-ns=60000000000"]);
    let client = server.connect().await;
    let reads: Vec<_> = (0..8).map(|i| (client.clone(), i)).collect();
    let mut tasks = JoinSet::new();
    for (client, i) in reads {
        tasks.spawn(async move { client.read(i << 20, 1 << 20).await });
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.kill();
    while let Some(read) = tasks.join_next().await {
        let error = read.unwrap().unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    }
    assert!(!client.is_open());
}

#[tokio::test]
async fn as_many_connections_as_the_server_takes() {
    let several = Server::qemu_nbd(&[
        "--shared=3",
        "--read-only",
        "--image-opts",
        "driver=null-co,size=1G",
    ]);
    let clients = Client::connect_many(&several.uri, &ConnectOptions::default(), 3)
        .await
        .unwrap();
    assert_eq!(clients.len(), 3);
    assert!(clients[0].flags().contains(TransmissionFlags::CAN_MULTI_CONN));
    drop(clients);
    let single = Server::qemu_nbd(&["--shared=1", "--image-opts", "driver=null-co,size=1G"]);
    let clients = Client::connect_many(&single.uri, &ConnectOptions::default(), 3)
        .await
        .unwrap();
    assert_eq!(clients.len(), 1);
}

#[tokio::test]
async fn over_tcp() {
    let dir = directory();
    let path = image(dir.path(), "disk.raw", "raw", MIB);
    let server = Server::qemu_nbd_tcp(&["--format", "raw", path.to_str().unwrap()]);
    let client = server.connect().await;
    let data = noise(5, 1 << 20);
    client.write(0, data.clone(), NONE).await.unwrap();
    assert!(client.read(0, 1 << 20).await.unwrap() == data);
}
