//! Disks that another program serves: read as a snapshot is, told apart when they cannot be, taken up again when they end.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use disksnap::{DiskReader, ErrorKind, Piece, RemoteDisk};
use disksnap_test_support::{MIB, pattern, tools};

/// A `qemu-nbd` on a unix socket, killed with the value.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let socket = dir.join("s");
        let pid = dir.join("pid");
        for stale in [&socket, &pid] {
            let _ = std::fs::remove_file(stale);
        }
        let mut command = Command::new(tools::program("qemu-nbd"));
        command.arg("--socket").arg(&socket).arg("--pid-file").arg(&pid);
        command.args(["--persistent", "--read-only", "--shared=4", "--export-name=vda"]);
        let child = command.args(arguments).spawn().unwrap();
        let server = Self {
            child,
            uri: format!("nbd+unix:///vda?socket={}", socket.display()),
        };
        // It is written when the server listens.
        while !pid.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(name: &str, arguments: &[&str]) {
    let output = Command::new(tools::program(name))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {text}");
}

const SIZE: u64 = 32 * MIB;

/// An image whose bitmap `monday` knows what changed after `before.raw` was made of it.
fn image(dir: &Path) -> PathBuf {
    let (image, before) = (dir.join("vda.qcow2"), dir.join("before.raw"));
    let (name, before) = (image.to_str().unwrap(), before.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "32M"]);
    run("qemu-io", &["-c", "write -P 1 0 30M", name]);
    run("qemu-img", &["convert", "-O", "raw", name, before]);
    run("qemu-img", &["bitmap", "--add", name, "monday"]);
    let commands = [
        "write -P 2 1M 5000",
        "write -z 4M 3M",
        "write -P 3 6M 512",
        "write -P 4 31M 1M",
    ];
    for command in commands {
        run("qemu-io", &["-c", command, name]);
    }
    image
}

#[tokio::test]
async fn a_copy_follows_what_another_program_serves() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let server = Server::start(
        dir.path(),
        &["--bitmap=monday", "-f", "qcow2", image.to_str().unwrap()],
    );
    let disk = RemoteDisk::connect(&server.uri, None, Some("monday"))
        .await
        .unwrap();
    assert!(disk.tells_changes() && disk.size() == SIZE);
    let copy = dir.path().join("before.raw");
    let mut told = 0;
    disk.bring_up_to_date(&copy, 0..SIZE, None, |extent| told += extent.length)
        .await
        .unwrap();
    assert!((4 * MIB..5 * MIB).contains(&told), "{told}");
    let now = dir.path().join("now.raw");
    disk.save_to(&now, 0, SIZE, |_| ()).await.unwrap();
    assert_eq!(pattern::digest_file(&copy), pattern::digest_file(&now));
    // In units, from the middle on, and as a disk that has grown.
    let pieces = units(&disk, 5 * MIB..SIZE, Some(20 * MIB + 1..20 * MIB + 2)).await;
    let unit = 64 << 10;
    let wanted = [5 * MIB..7 * MIB, 20 * MIB..20 * MIB + unit, 31 * MIB..SIZE];
    assert_eq!(pieces, wanted);
    let odd = disk.changed_pieces(1..SIZE, unit, None).unwrap_err();
    assert_eq!(odd.kind(), ErrorKind::Invalid, "{odd}");
    disk.close().await;
}

/// The ranges of what changed, in units of 64 KiB, and the rest of the units.
async fn units(
    disk: &DiskReader,
    range: std::ops::Range<u64>,
    also: Option<std::ops::Range<u64>>,
) -> Vec<std::ops::Range<u64>> {
    let mut pieces = disk.changed_pieces(range, 64 << 10, also).unwrap();
    let mut found: Vec<std::ops::Range<u64>> = Vec::new();
    while let Some(piece) = pieces.next().await.unwrap() {
        let range = piece.offset()..piece.offset() + piece.length();
        assert_eq!(pieces.done(), range.end);
        match found.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => found.push(range),
        }
    }
    found
}

#[tokio::test]
async fn what_cannot_be_read_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let server = Server::start(
        dir.path(),
        &["--bitmap=monday", "-f", "qcow2", image.to_str().unwrap()],
    );
    let refused = async |uri: &str, tls: Option<&Path>, bitmap: Option<&str>| {
        let error = RemoteDisk::connect(uri, tls, bitmap).await.unwrap_err();
        (
            error.kind(),
            format!("{error}; {}", error.next_step().unwrap_or_default()),
        )
    };
    let (kind, text) = refused(&server.uri, None, Some("sunday")).await;
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(
        text.contains("has no dirty bitmap 'sunday'") && text.contains("It has: monday."),
        "{text}"
    );
    assert!(text.contains(&server.uri), "{text}");
    let (kind, text) = refused("http://host/", None, None).await;
    assert_eq!(kind, ErrorKind::Invalid, "{text}");
    let (kind, text) = refused(&server.uri.replace("/vda", "/vdb"), None, None).await;
    assert_eq!(kind, ErrorKind::Refused, "{text}");
    let (kind, text) = refused("nbd+unix:///vda?socket=/nowhere/s", None, None).await;
    assert_eq!(kind, ErrorKind::Unavailable, "{text}");
    // No certificates, or a server without TLS: never in plain text.
    let (kind, text) = refused(&server.uri, Some(dir.path()), None).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    let (kind, text) = refused(&server.uri.replace("nbd+", "nbds+"), None, None).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    let disk = RemoteDisk::connect(&server.uri, None, None).await.unwrap();
    assert_eq!(disk.changes().unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        disk.read_at(SIZE, 1).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert_eq!(disk.read_at(MIB, 3).await.unwrap(), [2; 3]);
}

#[tokio::test]
async fn a_reading_whose_server_dies_is_taken_up_with_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vda.raw");
    let content = pattern::bytes(1, 64 << 20);
    std::fs::write(&image, &content).unwrap();
    let arguments = ["-f", "raw", image.to_str().unwrap()];
    let mut server = Server::start(dir.path(), &arguments);
    let disk = RemoteDisk::connect(&server.uri, None, None).await.unwrap();
    let mut pieces = disk.pieces(0, disk.size()).unwrap();
    let mut read = Vec::new();
    let mut take = |piece| match piece {
        Piece::Data { data, .. } => read.extend(data),
        Piece::Zero { length, .. } => read.resize(read.len() + usize::try_from(length).unwrap(), 0),
    };
    // What is in flight at most is far less than the disk.
    take(pieces.next().await.unwrap().unwrap());
    server.kill();
    let error = loop {
        match pieces.next().await {
            Ok(piece) => take(piece.expect("an end would look like success")),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.is_retryable());
    let done = pieces.done();
    let text = error.to_string();
    assert!(
        text.contains(&format!("read up to {done}")) && text.contains(&server.uri),
        "{text}"
    );
    let server = Server::start(dir.path(), &arguments);
    let again = RemoteDisk::connect(&server.uri, None, None).await.unwrap();
    let mut rest = again.pieces(done, again.size() - done).unwrap();
    while let Some(piece) = rest.next().await.unwrap() {
        take(piece);
    }
    assert!(done > 0 && read == content);
}
