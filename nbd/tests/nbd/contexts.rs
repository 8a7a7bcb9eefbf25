//! Metadata contexts: allocation and dirty bitmaps of real images.

use disksnap_nbd::{
    BASE_ALLOCATION, Client, CommandFlags, ConnectOptions, Error, Extent, dirty_bitmap_context,
    list_meta_contexts,
};

use crate::server::{Server, directory, image, run};

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::empty();

pub(crate) async fn all(client: &Client, context: &str) -> Vec<Extent> {
    let mut stream = client.extents(context, 0..client.size()).unwrap();
    let mut extents = Vec::new();
    while let Some(extent) = stream.next().await.unwrap() {
        extents.push(extent);
    }
    extents
}

/// Sorted, disjoint, merged, and nothing left out.
fn assert_whole(extents: &[Extent], size: u64) {
    assert_eq!(extents[0].offset, 0);
    for pair in extents.windows(2) {
        assert_eq!(pair[0].end(), pair[1].offset);
        assert_ne!(pair[0].flags, pair[1].flags);
    }
    assert_eq!(extents.last().unwrap().end(), size);
}

#[tokio::test]
async fn what_is_allocated_in_a_large_sparse_image() {
    let dir = directory();
    let size = 1 << 40;
    let path = image(dir.path(), "disk.qcow2", "qcow2", size);
    let server = Server::qemu_nbd(&["--format", "qcow2", path.to_str().unwrap()]);
    let client = server.connect_with(&[]).await;
    let gib = 1 << 30;
    // One of them across the border of two requests.
    let written = [(0, 64 << 10), (5 * gib - MIB, 2 * MIB), (size - 65_536, 65_536)];
    for (offset, length) in written {
        let data = vec![7; usize::try_from(length).unwrap()];
        client.write(offset, data, NONE).await.unwrap();
    }
    let extents = all(&client, BASE_ALLOCATION).await;
    assert_whole(&extents, size);
    let data: Vec<_> = extents
        .iter()
        .filter(|e| !e.is_zero())
        .map(|e| (e.offset, e.length))
        .collect();
    assert_eq!(data, written);
    assert!(extents.iter().all(|e| e.is_zero() == e.is_hole()));
    assert_eq!(extents.len(), 5);

    let few = client
        .block_status(size - 131_072, 131_072, BASE_ALLOCATION)
        .await
        .unwrap();
    assert_eq!(few.len(), 2);
    assert!(
        client
            .block_status(0, 0, BASE_ALLOCATION)
            .await
            .unwrap()
            .is_empty()
    );
    let error = client.block_status(size, 1, BASE_ALLOCATION).await.unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
}

#[tokio::test]
async fn more_extents_than_one_reply_holds() {
    // QEMU sends at most 128 Ki extents at once: it answers for less than was asked.
    let dir = directory();
    let path = dir.path().join("striped.qcow2");
    let cluster = 4096;
    let stripes = 140_000;
    let size = stripes * 2 * cluster;
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            path.to_str().unwrap(),
            &size.to_string(),
        ],
    );
    let bitmap = [
        "bitmap",
        "--add",
        "--granularity",
        "4096",
        path.to_str().unwrap(),
        "b0",
    ];
    run("qemu-img", &bitmap);
    {
        let server = Server::qemu_nbd(&["--cache=unsafe", "--format", "qcow2", path.to_str().unwrap()]);
        let client = server.connect().await;
        let mut writes = tokio::task::JoinSet::new();
        for stripe in 0..stripes {
            let client = client.clone();
            // Cheap for the server: a cluster that is zero, and dirty.
            writes.spawn(async move { client.write_zeroes(stripe * 2 * cluster, cluster, NONE).await });
            if writes.len() > 256 {
                writes.join_next().await.unwrap().unwrap().unwrap();
            }
        }
        while let Some(write) = writes.join_next().await {
            write.unwrap().unwrap();
        }
        client.disconnect().await;
        server.stop();
    }
    run("qemu-img", &["bitmap", "--disable", path.to_str().unwrap(), "b0"]);
    let server = Server::qemu_nbd(&[
        "--read-only",
        "--bitmap=b0",
        "--format",
        "qcow2",
        path.to_str().unwrap(),
    ]);
    let context = dirty_bitmap_context("b0");
    let client = server.connect_with(&[&context]).await;
    let once = client.block_status(0, 1 << 30, &context).await.unwrap();
    assert!(
        once.last().unwrap().end() < 1 << 30,
        "the server answered for all at once"
    );
    let extents = all(&client, &context).await;
    assert_whole(&extents, size);
    assert_eq!(extents.len() as u64, 2 * stripes);
    assert!(
        extents
            .iter()
            .all(|e| e.length == cluster && e.is_dirty() == (e.offset % (2 * cluster) == 0))
    );
}

#[tokio::test]
async fn what_a_dirty_bitmap_holds() {
    let dir = directory();
    let path = image(dir.path(), "disk.qcow2", "qcow2", 64 * MIB);
    run("qemu-img", &["bitmap", "--add", path.to_str().unwrap(), "b0"]);
    let context = dirty_bitmap_context("b0");
    let file = format!(
        "driver=qcow2,node-name=disk,file.driver=file,file.filename={}",
        path.display()
    );
    let server = Server::storage_daemon(&[&file], "writable=on,bitmaps.0=b0");
    let client = server.connect_with(&[&context]).await;
    assert!(client.has_context(&context) && client.has_context(BASE_ALLOCATION));
    let dirty = async || -> Vec<(u64, u64)> {
        let extents = all(&client, &context).await;
        assert_whole(&extents, 64 * MIB);
        extents
            .iter()
            .filter(|e| e.is_dirty())
            .map(|e| (e.offset, e.length))
            .collect()
    };
    assert_eq!(dirty().await, []);
    client.write(MIB, vec![1; 4096], NONE).await.unwrap();
    client.write_zeroes(9 * MIB, MIB, NONE).await.unwrap();
    assert_eq!(dirty().await, [(MIB, 65_536), (9 * MIB, MIB)]);

    let listed = list_meta_contexts(&server.uri, &ConnectOptions::default(), &[])
        .await
        .unwrap();
    assert!(
        listed.contains(&context) && listed.contains(&BASE_ALLOCATION.to_owned()),
        "{listed:?}"
    );
    let query = ["qemu:dirty-bitmap:".to_owned()];
    let listed = list_meta_contexts(&server.uri, &ConnectOptions::default(), &query)
        .await
        .unwrap();
    assert_eq!(listed, std::slice::from_ref(&context));
}

#[tokio::test]
async fn a_context_that_is_not_there() {
    let server = Server::qemu_nbd(&["--image-opts", "driver=null-co,size=1M"]);
    let client = server.connect_with(&["qemu:dirty-bitmap:none"]).await;
    assert_eq!(client.contexts().collect::<Vec<_>>(), [BASE_ALLOCATION]);
    let error = client
        .block_status(0, 512, "qemu:dirty-bitmap:none")
        .await
        .unwrap_err();
    assert!(matches!(error, Error::MissingContext { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("\"qemu:dirty-bitmap:none\"") && text.contains("[base:allocation]"),
        "{text}"
    );
    assert!(server.connect().await.extents(BASE_ALLOCATION, 0..1).is_err());
}
