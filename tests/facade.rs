//! The library as a program uses it: its methods, its one constructor, reading, and the example.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap::{
    DiskChoice, Disks, Disksnap, Domain, ErrorKind, MethodChoice, Options, Piece, SnapshotName,
    SnapshotReader, SnapshotRequest,
};
use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need, pattern, small_fs};

#[test]
fn the_linked_methods_are_these() {
    let registry = disksnap::methods().unwrap();
    let names: Vec<&str> = registry.iter().map(|(name, _)| name).collect();
    let expected: &[&str] = &[
        #[cfg(feature = "btrfs")]
        "btrfs",
        #[cfg(feature = "lvm")]
        "lvm",
        #[cfg(feature = "memory")]
        "memory",
        #[cfg(feature = "qemu-external-qcow2")]
        "qemu-external-qcow2",
        #[cfg(feature = "qemu-fleece")]
        "qemu-fleece",
        #[cfg(feature = "reflink")]
        "reflink",
    ];
    assert_eq!(names, expected);
}

/// What each method offers on the disks that suit it best, written down so that nothing goes missing unseen.
const OFFERED: [(&str, &str); 6] = [
    ("btrfs", "active inactive direct-read revert compare"),
    ("lvm", "active inactive direct-read revert guest-safe compare"),
    ("memory", "active inactive direct-read guest-safe revert"),
    ("qemu-external-qcow2", "active inactive direct-read revert merge"),
    ("qemu-fleece", "active export guest-safe"),
    ("reflink", "active inactive direct-read revert"),
];

#[test]
fn no_method_offers_less_than_it_did() {
    let registry = disksnap::methods().unwrap();
    for (name, provider) in registry.iter() {
        let found = provider.method().capabilities;
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        let known = OFFERED.iter().find(|(method, _)| *method == name);
        let (_, offered) = known.unwrap_or_else(|| panic!("write down that {name} offers {found:?}"));
        for capability in offered.split(' ') {
            assert!(
                found.iter().any(|c| c == capability),
                "{name} offered {capability}, and offers {found:?}"
            );
        }
    }
}

/// The example's program, built if `cargo test` was told to build less.
fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/embed");
    if !program.exists() {
        let arguments = ["build", "-q", "-p", "disksnap", "--example", "embed"];
        let built = Command::new(env!("CARGO")).args(arguments).status().unwrap();
        assert!(built.success());
    }
    program
}

#[test]
fn the_example_creates_reads_and_deletes() {
    need!("fuse");
    let source = include_str!("../examples/embed.rs");
    assert!(
        source.lines().count() < 40,
        "the example is to be read at a glance"
    );
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 8 * MIB).qcow2())
        .start();
    daemon
        .disk("vda")
        .write(3 * MIB + 512, &pattern::bytes(1, 70_000));
    let temp = tempfile::tempdir().unwrap();
    let (state, output) = (temp.path().join("state"), temp.path().join("vda.raw"));
    let arguments = [&daemon.domain_xml_file(), &state, &output];
    let ended = Command::new(example()).args(arguments).output().unwrap();
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert_eq!(pattern::digest_file(&output), daemon.disk("vda").digest());
    assert_eq!(std::fs::read_dir(state.join("images")).unwrap().count(), 0);
    let nodes = daemon.qmp("query-named-block-nodes", serde_json::json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 3, "{nodes:#}");
}

/// A snapshot of `vda`, a state directory, and a reader of it.
struct Site {
    _temp: tempfile::TempDir,
    disksnap: Disksnap,
    domain: Domain,
    name: SnapshotName,
}

impl Site {
    async fn new(xml: &Path, method: &str, options: &[(&str, &str)]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let disksnap = Disksnap::open(Some(&temp.path().join("state"))).await.unwrap();
        let document = disksnap.load(xml.to_str().unwrap()).await.unwrap();
        let domain = document.domain().clone();
        let options: Options = options.iter().copied().collect();
        let method = method.to_owned();
        let choice = DiskChoice {
            method: Some(MethodChoice { method, options }),
            ..DiskChoice::new("vda")
        };
        let request = SnapshotRequest {
            disks: Disks::Named(vec![choice]),
            ..SnapshotRequest::default()
        };
        let snapshot = disksnap.dispatcher().create(&domain, &request).await.unwrap();
        Self {
            _temp: temp,
            disksnap,
            domain,
            name: snapshot.name,
        }
    }

    async fn reader(&self) -> SnapshotReader {
        self.disksnap.read(&self.domain, &self.name, "vda").await.unwrap()
    }
}

/// The whole disk from its pieces, which must come in order and without a gap.
async fn whole(reader: &SnapshotReader) -> Vec<u8> {
    let mut pieces = reader.pieces(0, reader.size()).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    while let Some(piece) = pieces.next().await.unwrap() {
        match piece {
            Piece::Data { offset, data } => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.extend(data);
            }
            Piece::Zero { offset, length } => {
                assert_eq!(offset, bytes.len() as u64);
                bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0);
            }
        }
    }
    bytes
}

async fn reads_as(reader: &SnapshotReader, expected: &[u8]) {
    assert_eq!(reader.size(), expected.len() as u64);
    assert!(whole(reader).await == expected);
    let end = expected.len() - 700;
    assert_eq!(reader.read_at(end as u64, 700).await.unwrap(), &expected[end..]);
    assert!(reader.read_at(reader.size(), 0).await.unwrap().is_empty());
    for (offset, length) in [(reader.size(), 1), (reader.size() - 1, 2), (u64::MAX, 1)] {
        let error = reader.read_at(offset, length).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert_eq!(
            reader.pieces(offset, length as u64).unwrap_err().kind(),
            ErrorKind::Invalid
        );
    }
    let (mut copied, mut told) = (Vec::new(), 0);
    reader
        .copy_to(&mut copied, 100, 3 * MIB, |done| told = done)
        .await
        .unwrap();
    assert!(copied == expected[100..][..3 << 20]);
    assert_eq!(told, 3 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_read_over_nbd_while_the_guest_writes() {
    need!("fuse");
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 8 * MIB))
        .start();
    let disk = daemon.disk("vda");
    disk.write(MIB - 100, &pattern::bytes(2, 3 << 20));
    let expected = disk.read(0, 8 * MIB);
    let site = Site::new(&daemon.domain_xml_file(), "qemu-fleece", &[]).await;
    disk.fill(0, 8 * MIB, 7);
    let (reader, second) = (site.reader().await, site.reader().await);
    reads_as(&reader, &expected).await;
    reads_as(&second, &expected).await;
    reader.close().await.unwrap();
    assert_eq!(second.read_at(MIB, 16).await.unwrap(), &expected[1 << 20..][..16]);
    second.close().await.unwrap();
    let left = daemon.qmp("query-block-exports", serde_json::json!({}));
    assert_eq!(
        left.as_array().unwrap().len(),
        1,
        "only the guest's side: {left:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_in_a_file_is_read_from_the_file() {
    need!("small-fs");
    let fs = small_fs(32 * MIB);
    let image = fs.path().join("vda.raw");
    let mut expected = vec![0; 8 << 20];
    expected[5 << 20..][..70_000].copy_from_slice(&pattern::bytes(3, 70_000));
    std::fs::write(&image, &expected).unwrap();
    let xml = fs.path().join("off.xml");
    let text = format!(
        "<domain><name>off</name><devices><disk type='file'><driver type='raw'/><source file='{}'/>\
         <target dev='vda'/></disk></devices></domain>",
        image.display()
    );
    std::fs::write(&xml, text).unwrap();
    let site = Site::new(&xml, "memory", &[]).await;
    std::fs::write(&image, vec![9; 8 << 20]).unwrap();
    let reader = site.reader().await;
    reads_as(&reader, &expected).await;
    reader.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_breaks_while_it_is_read_says_so() {
    need!("fuse", "small-fs");
    let fs = small_fs(MIB);
    let daemon = StorageDaemon::builder()
        .disk(DiskSpec::new("vda", 8 * MIB))
        .start();
    daemon.disk("vda").fill(0, 8 * MIB, 1);
    let fleece = fs.path().join("f").display().to_string();
    let options = [("fleece.file", fleece.as_str())];
    let site = Site::new(&daemon.domain_xml_file(), "qemu-fleece", &options).await;
    let reader = site.reader().await;
    daemon.disk("vda").fill(0, 8 * MIB, 2);
    let error = reader.read_at(0, 4096).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    reader.close().await.unwrap();
    let error = site
        .disksnap
        .read(&site.domain, &site.name, "vda")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
}
