//! NBD exports of others: qemu-nbd and qemu-storage-daemon.

use std::sync::Mutex;

use disksnap::Effect;
use disksnap_backup::{ErrorKind, Event, Silent, Target, Watcher, restore_disk};
use disksnap_test_support::pattern;

use crate::rig::{QemuNbd, Saved, reads_as, run, text};

fn nbd(uri: &str) -> Target {
    Target::Nbd {
        uri: uri.to_owned(),
        tls: None,
    }
}

/// A raw file of random bytes.
fn raw(saved: &Saved, length: usize) -> std::path::PathBuf {
    let path = saved.path("export");
    std::fs::write(&path, pattern::bytes(7, length)).unwrap();
    path
}

#[tokio::test]
async fn into_a_raw_file_and_into_qcow2() {
    let saved = Saved::new().await;
    let size = saved.contents[0].len();
    for n in 0..saved.points.len() {
        let image = raw(&saved, size);
        let server = QemuNbd::start(&["--format=raw", "--discard=unmap"], &image);
        let (chain, disk) = saved.chain(n).await;
        let restored = restore_disk(chain, disk, &nbd(&server.uri), true, &Silent)
            .await
            .unwrap();
        server.quit();
        assert!(std::fs::read(&image).unwrap() == saved.contents[n], "point {n}");
        assert_eq!(restored.digest, disk.content);
        assert_eq!(restored.notes, [""; 0]);
    }
    let image = saved.path("export.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&image), &size.to_string()],
    );
    // It holds other data where the disk is zero.
    let pattern = ["-f", "qcow2", "-c", "write -P 90 0 6M", text(&image)];
    run("qemu-io", &pattern);
    let server = QemuNbd::start(&["--format=qcow2"], &image);
    let (chain, disk) = saved.chain(2).await;
    restore_disk(chain, disk, &nbd(&server.uri), true, &Silent)
        .await
        .unwrap();
    server.quit();
    reads_as(&image, "qcow2", &saved.contents[2]);
}

/// The disk ends within a unit of the server's, and the export goes on behind it.
#[tokio::test]
async fn a_larger_export_of_large_blocks_keeps_its_rest() {
    let saved = Saved::new().await;
    let size = saved.contents[1].len();
    for extra in [1024, 4096 * 3 + 1024] {
        let image = raw(&saved, (size + extra).next_multiple_of(4096));
        let before = std::fs::read(&image).unwrap();
        let options = format!(
            "driver=blkdebug,align=4096,image.driver=file,image.filename={}",
            text(&image)
        );
        let server = QemuNbd::start(&["--image-opts"], std::path::Path::new(&options));
        let (chain, disk) = saved.chain(1).await;
        let restored = restore_disk(chain, disk, &nbd(&server.uri), true, &Silent)
            .await
            .unwrap();
        server.quit();
        let after = std::fs::read(&image).unwrap();
        assert!(after[..size] == saved.contents[1]);
        assert!(after[size..] == before[size..]);
        assert!(
            restored.notes[0].contains("are as they were"),
            "{:?}",
            restored.notes
        );
    }
}

#[tokio::test]
async fn what_must_not_be_overwritten_is_not() {
    let saved = Saved::new().await;
    let size = saved.contents[0].len();
    let image = raw(&saved, size - 512);
    let before = std::fs::read(&image).unwrap();
    let writable = QemuNbd::start(&["--format=raw"], &image);
    let read_only = QemuNbd::start(&["--format=raw", "--read-only"], &image);
    let cases = [
        (writable.uri.clone(), true, ErrorKind::NoSpace),
        (writable.uri.clone(), false, ErrorKind::AlreadyExists),
        (read_only.uri.clone(), true, ErrorKind::Denied),
        ("http://example.org/".to_owned(), true, ErrorKind::Invalid),
        (
            format!("nbd+unix:///?socket={}", text(&saved.path("none"))),
            true,
            ErrorKind::Unavailable,
        ),
        (
            writable.uri.replace("///?", "///other?"),
            true,
            ErrorKind::Refused,
        ),
    ];
    for (uri, overwrite, kind) in cases {
        let (chain, disk) = saved.chain(0).await;
        let error = restore_disk(chain, disk, &nbd(&uri), overwrite, &Silent)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{uri}: {error:?}");
        assert_eq!(error.effect(), Effect::None);
    }
    let credentials = Target::Nbd {
        uri: writable.uri.clone(),
        tls: Some(saved.path("none")),
    };
    let (chain, disk) = saved.chain(0).await;
    let error = restore_disk(chain, disk, &credentials, true, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    drop((writable, read_only));
    assert!(std::fs::read(&image).unwrap() == before);
}

/// Kills the server when the first piece has been sent.
#[derive(Debug)]
struct Killer(Mutex<Option<QemuNbd>>);

impl Watcher for Killer {
    fn event(&self, event: &Event<'_>) {
        if matches!(event, Event::Done { .. }) {
            self.0.lock().unwrap().take();
        }
    }

    fn stop(&self) -> bool {
        false
    }
}

impl std::fmt::Debug for QemuNbd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.uri)
    }
}

#[tokio::test]
async fn a_server_that_dies_leaves_it_unfinished() {
    let saved = Saved::new().await;
    let image = raw(&saved, saved.contents[0].len());
    let server = QemuNbd::start(&["--format=raw"], &image);
    let target = nbd(&server.uri);
    let killer = Killer(Mutex::new(Some(server)));
    let (chain, disk) = saved.chain(0).await;
    let error = restore_disk(chain, disk, &target, true, &killer)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("unfinished"), "{error}");
    assert_eq!(error.effect(), Effect::Unknown);
}

#[tokio::test]
async fn a_full_file_system_below_the_server_is_told() {
    disksnap_test_support::need!("small-fs");
    let saved = Saved::new().await;
    let small = disksnap_test_support::small_fs(1 << 20);
    let image = small.path().join("sparse");
    let size = saved.contents[0].len() as u64;
    std::fs::File::create(&image).unwrap().set_len(size).unwrap();
    let server = QemuNbd::start(&["--format=raw"], &image);
    let (chain, disk) = saved.chain(0).await;
    let error = restore_disk(chain, disk, &nbd(&server.uri), true, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert_eq!(error.effect(), Effect::Unknown);
}
