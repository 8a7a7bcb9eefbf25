//! Ranges that somebody tells, as clients see them: exactly those, or nothing is served at all.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::single_range_in_vec_init, reason = "what changed may be one range")]

mod site;

use std::future::{Future, poll_fn};
use std::net::TcpListener;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Command as Program;
use std::task::Poll;

use disksnap_core::{
    Changed, Command, Error, ErrorKind, Image, ImageServer, Listen, NbdServer, NodeBitmap, Precision, Result,
    ServeNode, Tls,
};
use disksnap_hypervisor::{Session, Timeouts};
use disksnap_nbd::{Client, ConnectOptions, TlsCredentials, Uri, dirty_bitmap_context};
use disksnap_test_support::{QemuVersion, need, pattern, tools};
use futures_util::{StreamExt, stream};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};

use site::{Site, image, layer, node, run, text};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What clients ask for.
const NAME: &str = "since/monday";

/// An export with a bitmap.
fn told(name: &str) -> ServeNode {
    let node = node(name);
    let bitmap = NodeBitmap {
        node: node.node.clone(),
        name: NAME.to_owned(),
    };
    ServeNode {
        bitmap: Some(bitmap),
        ..node
    }
}

fn changed(
    size: u64,
    ranges: impl IntoIterator<Item = Result<Range<u64>>, IntoIter: Send + 'static>,
) -> Changed {
    Changed {
        size,
        precision: Precision::Exact(4096),
        ranges: stream::iter(ranges).boxed(),
    }
}

fn these(size: u64, ranges: &[Range<u64>]) -> Changed {
    changed(size, ranges.iter().cloned().map(Ok).collect::<Vec<_>>())
}

impl Site {
    async fn serve_told(&self, name: &str, image: &Image, changed: Changed) -> Result<()> {
        self.daemons
            .serve(&self.domain, &told(name), image, Some(changed))
            .await
    }

    fn uri(&self, name: &str) -> Uri {
        let Listen::Unix(socket) = self.server().listen else {
            panic!("it listens elsewhere")
        };
        format!("nbd+unix:///{name}?socket={}", socket.display())
            .parse()
            .unwrap()
    }

    async fn nodes(&self) -> Vec<String> {
        let is_monitor = |path: &PathBuf| path.extension().is_some_and(|is| is == "qmp");
        let monitor = self.run_files().into_iter().find(is_monitor).unwrap();
        let session = Session::new(monitor, Timeouts::default());
        let ask = Command::new("query-named-block-nodes", json!({ "flat": true }));
        let nodes = session.execute(ask).await.unwrap();
        session.disconnect().await;
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        nodes.as_array().unwrap().iter().map(name).collect()
    }

    /// Nothing but the server itself.
    async fn assert_empty(&self, files: &[PathBuf]) {
        assert_eq!(self.served().await, Vec::<String>::new());
        assert_eq!(self.nodes().await, Vec::<String>::new());
        assert_eq!(self.sorted_files(), files);
    }

    fn sorted_files(&self) -> Vec<PathBuf> {
        let mut files = self.run_files();
        files.sort();
        files
    }
}

/// What our client sees.
async fn seen(uri: &Uri, tls: Option<TlsCredentials>) -> Vec<Range<u64>> {
    let context = dirty_bitmap_context(NAME);
    let options = ConnectOptions {
        meta_contexts: vec![context.clone()],
        tls,
        ..ConnectOptions::default()
    };
    let client = Client::connect(uri, &options).await.unwrap();
    let mut extents = client.extents(&context, 0..client.size()).unwrap();
    let mut seen = Vec::new();
    while let Some(extent) = extents.next().await.unwrap() {
        if extent.flags & 1 != 0 {
            seen.push(extent.offset..extent.end());
        }
    }
    client.disconnect().await;
    seen
}

/// What nbdinfo sees.
fn nbdinfo(uri: &Uri) -> Vec<Range<u64>> {
    let context = format!("--map={}", dirty_bitmap_context(NAME));
    let mut program = Program::new(tools::program("nbdinfo"));
    let output = program
        .args(["--json", &context, &uri.to_string()])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let extents: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let dirty = extents.iter().filter(|extent| extent["type"] == 1);
    let range =
        |extent: &Value| number(extent, "offset")..number(extent, "offset") + number(extent, "length");
    dirty.map(range).collect()
}

#[tokio::test]
async fn clients_see_exactly_the_ranges() {
    exactly(QemuVersion::V10_0).await;
}

#[tokio::test]
async fn and_from_an_older_qemu() {
    need!("qemu-7.2");
    exactly(QemuVersion::V7_2).await;
}

async fn exactly(version: QemuVersion) {
    let site = Site::with(version);
    site.start().await;
    let files = site.sorted_files();
    // The last block of the disk is cut short.
    let size = 3 * MIB + 512;
    let base = site.file("base.raw", &pattern::bytes(7, usize::try_from(size).unwrap()));
    let top = site.path("top.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&base),
            "-F",
            "raw",
            text(&top),
        ],
    );
    let raw = image(&base, "raw", None);
    let over = image(&top, "qcow2", Some(layer(&base, "raw")));
    for (n, (image, ranges, expected)) in [
        (&raw, vec![0..4096, 64 * KIB..MIB, 3 * MIB..size], None),
        (&over, vec![4096..8192, 2 * MIB..size], None),
        (&raw, vec![], None),
        (&over, vec![0..size], None),
        // Whole blocks of 4 KiB, and nothing beyond the disk.
        (&raw, vec![1..2, 8191..8193, MIB..MIB], Some(vec![0..12288])),
        (&raw, vec![3 * MIB + 511..9 * MIB], Some(vec![3 * MIB..size])),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("disk{n}");
        site.serve_told(&name, image, these(size, &ranges)).await.unwrap();
        let uri = site.uri(&name);
        let expected = expected.unwrap_or(ranges);
        assert_eq!(seen(&uri, None).await, expected);
        assert_eq!(nbdinfo(&uri), expected);
        assert_eq!(site.digest(&name), pattern::digest_file(&base));
        assert_eq!(
            site.nodes()
                .await
                .iter()
                .filter(|node| node.ends_with("-f"))
                .count(),
            0
        );
        assert_eq!(site.sorted_files(), files, "what it was told by is gone");
    }
    for n in 0..6 {
        site.daemons
            .unserve(&site.domain, &told(&format!("disk{n}")))
            .await
            .unwrap();
    }
    site.assert_empty(&files).await;
    site.stop().await;
}

#[tokio::test]
async fn a_disk_of_a_tebibyte_with_a_percent_of_it_changed() {
    let site = Site::new();
    site.start().await;
    let size = 1_u64 << 40;
    let disk = site.path("large.raw");
    std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
    let pieces = (0..size / (6400 * KIB)).map(|n| n * 6400 * KIB..n * 6400 * KIB + 64 * KIB);
    let ranges = changed(size, pieces.clone().map(Ok));
    site.serve_told("large", &image(&disk, "raw", None), ranges)
        .await
        .unwrap();
    let seen = seen(&site.uri("large"), None).await;
    assert!(seen.iter().cloned().eq(pieces), "{} ranges", seen.len());
    site.stop().await;
}

#[tokio::test]
async fn an_error_among_the_ranges_is_an_error_and_nothing_is_served() {
    let site = Site::new();
    site.start().await;
    let files = site.sorted_files();
    let raw = site.file("disk.raw", &pattern::bytes(3, 1 << 20));
    let raw = image(&raw, "raw", None);
    let broken = || Err(Error::new(ErrorKind::Unavailable, "the other end is gone"));
    for n in [0, 1, 100] {
        let ranges = (0..n)
            .map(|n| Ok(n * 8192..n * 8192 + 1))
            .chain([broken()])
            .chain([Ok(0..MIB)]);
        let ranges = changed(MIB, ranges.collect::<Vec<_>>());
        let error = site.serve_told("disk", &raw, ranges).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        site.assert_empty(&files).await;
    }
    // Another disk's.
    let error = site
        .serve_told("disk", &raw, these(MIB + 512, &[0..512]))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(
        error
            .to_string()
            .contains("1049088 bytes, and the image is one of 1048576"),
        "{error}"
    );
    site.assert_empty(&files).await;
    // Where nobody asks for a bitmap nothing is read.
    let never = changed(MIB, std::iter::from_fn(|| panic!("nobody wants to know")));
    site.daemons
        .serve(&site.domain, &node("disk"), &raw, Some(never))
        .await
        .unwrap();
    assert_eq!(site.served().await, ["ds-disk"]);
    site.stop().await;
}

/// Polls a future so many times and drops it, as a process does that is killed then; its end, if it came so far.
async fn killed_after<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut left) = (pin!(future), polls);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(end) => Poll::Ready(Some(end)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

#[tokio::test]
async fn killed_at_any_step_it_is_served_again_and_taken_back_again() {
    let site = Site::new();
    site.start().await;
    let files = site.sorted_files();
    let raw = site.file("disk.raw", &pattern::bytes(5, 1 << 20));
    let raw = image(&raw, "raw", None);
    let ranges = [4096..8192, 64 * KIB..MIB];
    let again = || these(MIB, &[0..512, 8192..12288]);
    let (mut served, mut taken_back, mut polls) = (false, false, 0);
    while !(served && taken_back) {
        assert!(polls < 1000, "it never ends");
        let serve = site.serve_told("disk", &raw, again());
        let end = killed_after(polls, serve).await;
        served |= end.is_some_and(|served| served.is_ok());
        // By another process, and with another answer.
        site.serve_told("disk", &raw, these(MIB, &ranges)).await.unwrap();
        assert_eq!(seen(&site.uri("disk"), None).await, ranges);
        let node = told("disk");
        let end = killed_after(polls, site.daemons.unserve(&site.domain, &node)).await;
        taken_back |= end.is_some_and(|taken| taken.is_ok());
        if polls % 2 == 0 {
            site.daemons.unserve(&site.domain, &told("disk")).await.unwrap();
            site.assert_empty(&files).await;
        }
        polls += 1;
    }
    site.stop().await;
}

/// As kills leave it: nodes without an image, and a file.
#[tokio::test]
async fn what_a_kill_left_goes_with_the_next_serve_and_with_the_server() {
    let site = Site::new();
    site.start().await;
    let files = site.sorted_files();
    let raw = site.file("disk.raw", &pattern::bytes(5, 1 << 20));
    let image = image(&raw, "raw", None);
    let left = |name: &str| {
        site.path("run")
            .join(files[0].file_name().unwrap().to_str().unwrap()[..12].to_owned() + name)
    };
    let file = left(".changed.ds-disk");
    let monitor = files
        .iter()
        .find(|path| path.extension().is_some_and(|is| is == "qmp"))
        .unwrap();
    let leave = async || {
        let session = Session::new(monitor.clone(), Timeouts::default());
        for node in ["ds-disk-c", "ds-disk-f"] {
            let add = json!({"driver": "null-co", "node-name": node, "size": 512});
            session.execute(Command::new("blockdev-add", add)).await.unwrap();
        }
        session.disconnect().await;
        std::fs::write(&file, "half a file").unwrap();
    };
    leave().await;
    site.serve_told("disk", &image, these(MIB, &[0..4096]))
        .await
        .unwrap();
    assert_eq!(seen(&site.uri("disk"), None).await, [0..4096]);
    assert_eq!(site.sorted_files(), files);
    site.daemons.unserve(&site.domain, &told("disk")).await.unwrap();
    leave().await;
    site.daemons.unserve(&site.domain, &told("disk")).await.unwrap();
    site.assert_empty(&files).await;
    leave().await;
    site.stop().await;
}

#[tokio::test]
async fn a_server_with_tls_tells_those_who_speak_it() {
    let site = Site::new();
    let credentials = site.path("tls");
    std::fs::create_dir(&credentials).unwrap();
    issue(&credentials);
    let server = listening(&site, &credentials).await;
    let raw = site.file("disk.raw", &pattern::bytes(3, 1 << 20));
    let ranges = [0..4096, MIB / 2..MIB];
    let raw = image(&raw, "raw", None);
    site.serve_told("disk", &raw, these(MIB, &ranges)).await.unwrap();
    let Listen::Tcp { port, .. } = server.listen else {
        panic!("it listens elsewhere")
    };
    let uri: Uri = format!("nbds://127.0.0.1:{port}/disk").parse().unwrap();
    let tls = TlsCredentials::from_directory(&credentials).unwrap();
    assert_eq!(seen(&uri, Some(tls)).await, ranges);
    site.stop().await;
}

/// Starts it with TLS on a port that is free.
async fn listening(site: &Site, credentials: &Path) -> NbdServer {
    loop {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = NbdServer {
            listen: Listen::Tcp {
                address: address.ip(),
                port: address.port(),
            },
            tls: Some(Tls {
                credentials: credentials.to_owned(),
                verify_client: false,
                allowed: Vec::new(),
            }),
            ..site.server()
        };
        match site.daemons.start(&site.domain, &server).await {
            // Somebody else has it by now.
            Err(error) if error.kind() == ErrorKind::Busy => {}
            other => {
                other.unwrap();
                return server;
            }
        }
    }
}

/// An authority, and a server's certificate by it, as QEMU names them.
fn issue(directory: &Path) {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "the authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "server");
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
    ];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &ca).unwrap();
    for (name, content) in [
        ("ca-cert.pem", ca.pem()),
        ("server-cert.pem", certificate.pem()),
        ("server-key.pem", key.serialize_pem()),
    ] {
        std::fs::write(directory.join(name), content).unwrap();
    }
}
