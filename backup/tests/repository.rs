//! A repository: its place, its domains and points, and what is told of damaged ones.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod points;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use disksnap::DomainId;
use disksnap_backup::{
    ErrorKind, Fault, LocalStore, Manifest, PointSpec, Repository, Silent, Store, Verification,
    VerifyOptions, merge, verify,
};
use points::{Life, copy_of, domain};

fn store(dir: &Path) -> Arc<dyn Store> {
    Arc::new(LocalStore::at(dir))
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn keys_lead_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for bad in [
        "",
        "/etc/passwd",
        "a//b",
        "a/",
        "../a",
        "a/../b",
        "a/.",
        "a b",
        "a\n",
        "ä",
        "a.part",
        "a.part/b",
        &"x".repeat(300),
    ] {
        let error = store.put(bad, b"x").await.expect_err(bad);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
        assert_eq!(
            store.remove(bad).await.unwrap_err().kind(),
            ErrorKind::Invalid,
            "{bad:?}"
        );
        assert!(store.open(bad).await.is_err());
        assert!(store.file(bad).is_none());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn objects_are_there_as_a_whole_and_for_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.put("a/b/c.json", b"one").await.unwrap();
    store.put("a/b/c.json", b"two").await.unwrap();
    assert_eq!(store.get("a/b/c.json", 3).await.unwrap(), b"two");
    assert_eq!(
        store.get("a/b/c.json", 2).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    assert_eq!(
        store.get("a/b/d.json", 2).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(mode(&dir.path().join("a/b")), 0o700);
    assert_eq!(mode(&dir.path().join("a/b/c.json")), 0o600);
    assert_eq!(store.list("a").await.unwrap(), ["b"]);
    assert_eq!(store.list("a/b").await.unwrap(), ["c.json"]);
    assert!(store.list("nowhere").await.unwrap().is_empty());
    let blob = store.open("a/b/c.json").await.unwrap();
    assert_eq!(
        (blob.length(), &blob.read_at(1, 2).await.unwrap()[..]),
        (3, &b"wo"[..])
    );
    assert_eq!(blob.read_at(2, 2).await.unwrap_err().kind(), ErrorKind::Broken);
    assert_eq!(
        blob.read_at(u64::MAX, 2).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    store.rename("a/b/c.json", "a/x/c.json").await.unwrap();
    assert!(store.list("a/b").await.unwrap().is_empty());
    store.remove("a").await.unwrap();
    store.remove("a").await.unwrap();
    store.remove("a/b/c").await.unwrap();
    assert!(store.list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_link_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let secret = other.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    symlink(&secret, dir.path().join("manifest.json")).unwrap();
    symlink(&secret, dir.path().join("vda.qcow2.part")).unwrap();
    symlink(&secret, dir.path().join("lock")).unwrap();
    let store = store(dir.path());
    let error = store.get("manifest.json", 100).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(store.open("manifest.json").await.is_err());
    assert!(store.write("vda.qcow2", Some(0)).await.is_err());
    assert!(store.lock("lock", false).await.is_err());
    let mut writer = store.write("vda.qcow2", None).await.unwrap();
    writer.append(Bytes::from_static(b"mine")).await.unwrap();
    writer.finish(Bytes::new()).await.unwrap();
    store.put("manifest.json", b"mine").await.unwrap();
    store.remove("manifest.json").await.unwrap();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    assert_eq!(fs::read_to_string(dir.path().join("vda.qcow2")).unwrap(), "mine");
}

#[tokio::test]
async fn a_large_object_appears_when_it_is_finished_and_can_be_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut writer = store.write("p/vda.qcow2", None).await.unwrap();
    writer.append(Bytes::from_static(b"____data")).await.unwrap();
    assert_eq!(writer.sync().await.unwrap(), 8);
    writer.read_back(4, Bytes::from_static(b"data")).await.unwrap();
    assert_eq!(
        writer
            .read_back(4, Bytes::from_static(b"date"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Broken
    );
    writer.append(Bytes::from_static(b"lost")).await.unwrap();
    drop(writer);
    assert!(store.list("p").await.unwrap().is_empty());
    assert_eq!(
        store.open("p/vda.qcow2").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        store.write("p/vda.qcow2", Some(13)).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    assert_eq!(
        store.write("p/other", Some(0)).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    let mut writer = store.write("p/vda.qcow2", Some(8)).await.unwrap();
    assert_eq!(writer.length(), 8);
    writer.append(Bytes::from_static(b"more")).await.unwrap();
    writer.finish(Bytes::from_static(b"head")).await.unwrap();
    assert_eq!(store.get("p/vda.qcow2", 100).await.unwrap(), b"headdatamore");
    assert_eq!(mode(&dir.path().join("p/vda.qcow2")), 0o600);
    assert_eq!(fs::read_dir(dir.path().join("p")).unwrap().count(), 1);
    drop(store.write("p/vda.qcow2", None).await.unwrap());
    store.discard("p/vda.qcow2").await.unwrap();
    store.discard("p/vda.qcow2").await.unwrap();
    assert_eq!(fs::read_dir(dir.path().join("p")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_lock_is_for_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let held = store.lock("web/lock", false).await.unwrap();
    for shared in [false, true] {
        let error = store.lock("web/lock", shared).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            error.to_string().contains(&std::process::id().to_string()),
            "{error}"
        );
    }
    drop(held);
    let (one, other) = (
        store.lock("web/lock", true).await.unwrap(),
        store.lock("web/lock", true).await.unwrap(),
    );
    drop(one);
    assert_eq!(
        store.lock("web/lock", false).await.unwrap_err().kind(),
        ErrorKind::Busy
    );
    drop(other);
    store.lock("web/lock", false).await.unwrap();
}

#[tokio::test]
async fn whoever_has_a_folder_alone_clears_away_what_was_about_to_be_put_there() {
    let life = Life::chain(28, 1).await;
    let point = &life.names()[1];
    let folder = life.dir.path().join(&life.folder.key);
    let left = [
        folder.join("merging.jsona1B2c3.put.part"),
        folder.join(point).join("manifest.jsonuVDlv2.put.part"),
    ];
    // What somebody may go on with.
    let unfinished = folder.join(point).join("vda.qcow2.part");
    for file in left.iter().chain([&unfinished]) {
        fs::write(file, "{").unwrap();
    }
    let repository = &life.repository;
    drop(repository.lock(&life.folder, true).await.unwrap());
    assert!(left.iter().all(|file| file.exists()), "others may be at it");
    drop(repository.lock(&life.folder, false).await.unwrap());
    assert!(!left.iter().any(|file| file.exists()));
    assert!(unfinished.exists());
}

#[tokio::test]
async fn a_repository_is_made_once_and_only_in_an_empty_place() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        Repository::open(store(dir.path())).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    fs::create_dir(dir.path().join("lost+found")).unwrap();
    let made = Repository::open_or_init(store(dir.path())).await.unwrap();
    assert_eq!(
        Repository::open_or_init(store(dir.path())).await.unwrap().id(),
        made.id()
    );
    assert_eq!(Repository::open(store(dir.path())).await.unwrap().id(), made.id());

    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("letters"), "").unwrap();
    let error = Repository::open_or_init(store(other.path())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert_eq!(fs::read_dir(other.path()).unwrap().count(), 1);
    let error = Repository::open_or_init(store(&other.path().join("no")))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn a_repository_of_another_time_or_torn_is_named() {
    let dir = tempfile::tempdir().unwrap();
    Repository::open_or_init(store(dir.path())).await.unwrap();
    let path = dir.path().join("repository.json");
    let text = fs::read_to_string(&path).unwrap();
    for (text, kind) in [
        (
            text.replace("\"version\": 1", "\"version\": 2"),
            ErrorKind::Unsupported,
        ),
        (text[..text.len() / 2].to_owned(), ErrorKind::Broken),
        (String::new(), ErrorKind::Broken),
        (
            text.replace("disksnap-repository", "something"),
            ErrorKind::Broken,
        ),
        (text.replace("\"id\"", "\"ID\""), ErrorKind::Broken),
    ] {
        fs::write(&path, &text).unwrap();
        let error = Repository::open(store(dir.path())).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(error.to_string().contains("repository.json"), "{error}");
        assert_eq!(
            Repository::open_or_init(store(dir.path()))
                .await
                .unwrap_err()
                .kind(),
            kind
        );
    }
}

#[tokio::test]
async fn domains_are_found_by_their_uuids() {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::open_or_init(store(dir.path())).await.unwrap();
    assert_eq!(repository.folder(&domain()).await.unwrap(), None);
    let folder = repository.folder_or_new(&domain()).await.unwrap();
    assert_eq!(folder.key, "web%201-7c3f9d52");
    assert_eq!(repository.folder_or_new(&domain()).await.unwrap(), folder);
    // Another name for it.
    let renamed = DomainId::new("../db", Some(domain().uuid));
    let found = repository.folder_or_new(&renamed).await.unwrap();
    assert_eq!((&found.key, &found.id), (&folder.key, &renamed));
    assert_eq!(repository.folder(&domain()).await.unwrap().unwrap(), found);
    // Others: one whose folder would have the same name, one of any name.
    let twin = DomainId::new(
        "web 1",
        Some("7c3f9d52-ffff-4b8a-9a52-0d6c8d3b1f11".parse().unwrap()),
    );
    let twin = repository.folder_or_new(&twin).await.unwrap();
    assert_eq!(twin.key, "web%201-7c3f9d52ffff4b8a");
    let strange = DomainId::new(format!("..{}", "ä".repeat(200)), None);
    let strange = repository.folder_or_new(&strange).await.unwrap();
    assert!(
        strange.key.starts_with("%2E.%C3") && strange.key.len() < 120,
        "{}",
        strange.key
    );
    let mut all = [found, twin, strange];
    all.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(repository.domains().await.unwrap(), all);
}

#[tokio::test]
async fn a_domains_folder_says_whose_it_is_in_its_points_too() {
    let life = Life::chain(21, 1).await;
    let path = life.dir.path().join(&life.folder.key).join("domain.json");
    for text in [None, Some("{")] {
        match text {
            None => fs::remove_file(&path).unwrap(),
            Some(text) => fs::write(&path, text).unwrap(),
        }
        assert_eq!(
            life.repository.folder(&domain()).await.unwrap().unwrap(),
            life.folder
        );
    }
    fs::write(&path, "{\"version\": 2}").unwrap();
    assert_eq!(
        life.repository.folder(&domain()).await.unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    // Without points nothing says it: nobody gets a second folder by mistake.
    fs::write(&path, "{").unwrap();
    for point in life.names() {
        fs::remove_dir_all(path.with_file_name(point)).unwrap();
    }
    let error = life.repository.folder_or_new(&domain()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
    assert!(error.to_string().contains("domain.json"), "{error}");
}

#[tokio::test]
async fn points_have_names_of_their_own() {
    let life = Life::new(22).await;
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(points::FIRST_NIGHT);
    let mut names = Vec::new();
    for _ in 0..12 {
        let name = life.repository.new_point(&life.folder, at).await.unwrap();
        fs::create_dir(life.dir.path().join(&life.folder.key).join(&name)).unwrap();
        names.push(name);
    }
    assert_eq!(
        names[..3],
        ["20261122T021500Z", "20261122T021500Z-2", "20261122T021500Z-3"]
    );
    assert_eq!(
        life.repository.unfinished(&life.folder).await.unwrap(),
        names,
        "in their order, also from the tenth on"
    );
    assert!(life.repository.points(&life.folder).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_point_is_found_by_what_people_call_it() {
    let life = Life::chain(23, 3).await;
    let all = life.names();
    assert_eq!(all[1], "20261123T021500Z");
    let find = async |text: &str| {
        let spec = text.parse::<PointSpec>().map_err(|e| (e.kind(), String::new()))?;
        let found = life.repository.point(&life.folder, &spec).await;
        found
            .map(|manifest| manifest.point)
            .map_err(|e| (e.kind(), e.next_step().unwrap_or_default().to_owned()))
    };
    for (text, which) in [
        ("latest", 3),
        ("20261123T021500Z", 1),
        ("20261123", 1),
        ("20261125T", 3),
        ("2026-11-23", 1),
        ("2026-11-23T02:15", 1),
        ("2026-11-23T02:14", 0),
        ("2026-11-23T02:15:00", 1),
        ("2026-11-23 02:15", 1),
        ("2026-11-23T02:15:00Z", 1),
        ("2026-11-23T03:15+01:00", 1),
        ("2026-11-23T02:15:00.25Z", 1),
        ("2026-11-23T02:15:00.2Z", 0),
        ("2027-01-01", 3),
    ] {
        assert_eq!(find(text).await.as_ref(), Ok(&all[which]), "{text}");
    }
    for (text, kind) in [
        ("2026112", ErrorKind::Invalid),
        ("2026-11-21", ErrorKind::NotFound),
        ("2026-11-22T02:14", ErrorKind::NotFound),
        ("20261122T021501Z", ErrorKind::NotFound),
        ("2026-13-01", ErrorKind::Invalid),
        ("2026-11-23T02:15+nowhere", ErrorKind::Invalid),
        ("yesterday", ErrorKind::Invalid),
        ("", ErrorKind::Invalid),
        ("-1", ErrorKind::Invalid),
    ] {
        assert_eq!(find(text).await.map_err(|(kind, _)| kind), Err(kind), "{text}");
    }
    let (_, hint) = find("20261124T000000Z").await.unwrap_err();
    assert!(hint.contains(&all[1]) && hint.contains(&all[2]), "{hint}");
    let manifest = life.repository.manifest(&life.folder, &all[0]).await.unwrap();
    let error = life
        .repository
        .publish(&life.folder, &manifest)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let error = life
        .repository
        .chain(&life.folder, &manifest, "vdz")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn a_manifest_is_what_was_written_or_told() {
    let life = Life::chain(24, 2).await;
    let path = life.path(&life.names()[1], "manifest.json");
    let whole = fs::read(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    // Whoever formats it anew does no harm.
    let value: serde_json::Value = serde_json::from_slice(&whole).unwrap();
    assert!(Manifest::from_json(value.to_string().as_bytes()).is_ok());
    for cut in (0..whole.len() - 2).step_by(97) {
        assert_eq!(
            Manifest::from_json(&whole[..cut]).unwrap_err().kind(),
            ErrorKind::Broken,
            "cut at {cut}"
        );
    }
    for at in (0..whole.len()).step_by(13) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        // White space may become other white space, and nothing else.
        match Manifest::from_json(&flipped) {
            Ok(manifest) => assert_eq!(manifest, Manifest::from_json(&whole).unwrap()),
            Err(e) => assert!(
                matches!(e.kind(), ErrorKind::Broken | ErrorKind::Unsupported),
                "{e}"
            ),
        }
    }
    let newer = String::from_utf8(whole)
        .unwrap()
        .replace("\"version\": 1", "\"version\": 2");
    fs::write(&path, newer).unwrap();
    let listed = life.repository.points(&life.folder).await.unwrap();
    let error = listed[1].manifest.as_ref().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains(&listed[1].name) && error.to_string().contains("version 2"),
        "{error}"
    );
    assert!(
        listed[0].manifest.is_ok() && listed[2].manifest.is_ok(),
        "the others go on"
    );
    let mut wrong = listed.into_iter().next_back().unwrap().manifest.unwrap();
    wrong.disks[0].parent = Some(wrong.point.clone());
    assert_eq!(
        wrong.to_json().unwrap_err().kind(),
        ErrorKind::Internal,
        "a chain that ends nowhere"
    );
}

/// What verifying finds wrong: where it lies, and which points it concerns.
async fn found(life: &Life, dir: &Path, quick: bool) -> (Verification, Vec<(String, Fault)>) {
    let repository = Repository::open(store(dir)).await.unwrap();
    let options = VerifyOptions {
        quick,
        ..VerifyOptions::default()
    };
    let found = verify(&repository, &life.folder, &options, &Silent)
        .await
        .unwrap();
    let mut faults = Vec::new();
    for point in &found.points {
        let disks = point.disks.iter().flat_map(|disk| &disk.faults);
        faults.extend(
            point
                .faults
                .iter()
                .chain(disks)
                .map(|fault| (point.point.clone(), fault.clone())),
        );
    }
    (found, faults)
}

/// What is done to a file.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Remove,
    RemoveFolder,
    Empty,
    CutHalf,
    CutOne,
    Flip(usize),
    /// That of this other point in its place.
    Swap(usize),
    /// One of another repository in its place.
    Stranger,
    /// A link to it in its place.
    Link,
}

/// A name; whether it is found without reading the data; the point and the file that are harmed, and that must be named; how many of the
/// five points of the chain cannot be restored then.
const DAMAGES: [(&str, bool, usize, &str, usize, Harm); 16] = [
    ("torn manifest", true, 1, "manifest.json", 4, Harm::CutHalf),
    (
        "manifest of another repository",
        true,
        2,
        "manifest.json",
        3,
        Harm::Stranger,
    ),
    (
        "manifest of another point",
        true,
        2,
        "manifest.json",
        3,
        Harm::Swap(3),
    ),
    (
        "missing increment",
        true,
        2,
        "manifest.json",
        2,
        Harm::RemoveFolder,
    ),
    ("missing image", true, 0, "vda.qcow2", 5, Harm::Remove),
    ("missing digests", true, 3, "vda.chunks", 2, Harm::Remove),
    ("swapped digests", true, 2, "vda.chunks", 3, Harm::Swap(3)),
    ("swapped images", true, 2, "vda.qcow2", 3, Harm::Swap(3)),
    ("cut image", true, 4, "vda.qcow2", 1, Harm::CutOne),
    ("no image at all", true, 4, "vda.qcow2", 1, Harm::Empty),
    ("a bit in the digests", true, 0, "vda.chunks", 5, Harm::Flip(40)),
    ("a bit in the data", false, 0, "vda.qcow2", 5, Harm::Flip(70_000)),
    (
        "a link in the place of an image",
        true,
        1,
        "vda.qcow2",
        4,
        Harm::Link,
    ),
    ("a bit in the document", true, 3, "domain.xml", 1, Harm::Flip(5)),
    (
        "missing TPM state",
        true,
        3,
        "tpm/tpm2-00.permall",
        1,
        Harm::Remove,
    ),
    ("cut variables", true, 3, "nvram.fd", 1, Harm::CutOne),
];

impl Harm {
    fn to(self, path: &Path, at: impl Fn(usize) -> PathBuf, stranger: &Path) {
        let mut bytes = fs::read(path).unwrap();
        match self {
            Self::Remove => fs::remove_file(path).unwrap(),
            Self::RemoveFolder => fs::remove_dir_all(path.parent().unwrap()).unwrap(),
            Self::Empty => fs::write(path, "").unwrap(),
            Self::CutHalf => fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
            Self::CutOne => fs::write(path, &bytes[..bytes.len() - 1]).unwrap(),
            Self::Flip(at) => {
                bytes[at] ^= 4;
                fs::write(path, bytes).unwrap();
            }
            Self::Swap(other) => {
                fs::copy(at(other), path).unwrap();
            }
            Self::Stranger => {
                fs::copy(stranger, path).unwrap();
            }
            Self::Link => {
                let moved = path.with_extension("moved");
                fs::rename(path, &moved).unwrap();
                symlink(&moved, path).unwrap();
            }
        }
    }
}

#[tokio::test]
async fn damage_is_found_and_named_and_the_rest_is_whole() {
    let life = Life::chain(25, 4).await;
    let all = life.names();
    let elsewhere = Life::chain(26, 1).await;
    let stranger = elsewhere.path(&elsewhere.names()[0], "manifest.json");
    for (name, without_data, point, file, concerned, harm) in DAMAGES {
        let copy = copy_of(life.dir.path());
        let folder = copy.path().join(&life.folder.key);
        let at = |n: usize| folder.join(&all[n]).join(file);
        harm.to(&at(point), at, &stranger);
        // The document and what is like it concern one point; all else those above, too.
        let from = if concerned == 1 {
            point
        } else {
            all.len() - concerned
        };
        let expected: Vec<&String> = all[from..from + concerned].iter().collect();
        for quick in [true, false] {
            let (verification, faults) = found(&life, copy.path(), quick).await;
            if quick && !without_data {
                assert!(verification.is_whole(), "{name} cannot be found without reading");
                continue;
            }
            let told: Vec<&String> = faults.iter().map(|(concerned, _)| concerned).collect();
            assert_eq!(told, expected, "{name}, quick {quick}: {faults:#?}");
            let object = format!("{}/{}/{file}", life.folder.key, all[point]);
            for (_, fault) in &faults {
                assert_eq!(
                    (fault.kind, &fault.point),
                    (ErrorKind::Broken, &all[point]),
                    "{name}: {fault:?}"
                );
                assert!(
                    fault.object.as_ref().unwrap().ends_with(&object),
                    "{name}: {fault:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn what_a_merge_made_is_found_out_too_when_it_is_damaged() {
    let mut life = Life::chain(27, 3).await;
    let all = life.names();
    merge(&life.repository, &life.folder, &[all[0].clone()].into(), &Silent)
        .await
        .unwrap();
    life.points.remove(&all[0]);
    life.check().await;
    let old = fs::read(life.path(&all[2], "vda.qcow2")).unwrap();
    fs::write(life.path(&all[1], "vda.qcow2"), old).unwrap();
    let (found, faults) = found(&life, life.dir.path(), true).await;
    assert_eq!((found.points.len(), faults.len()), (3, 3), "{faults:#?}");
    assert!(faults.iter().all(|(_, fault)| fault.point == all[1]));
}

#[tokio::test]
async fn strays_and_unfinished_points_are_told_and_harm_nothing() {
    let life = Life::chain(28, 1).await;
    let all = life.names();
    let folder = life.dir.path().join(&life.folder.key);
    fs::write(folder.join("notes"), "").unwrap();
    fs::write(life.path(&all[0], "vdb.qcow2"), "").unwrap();
    fs::write(life.path(&all[0], "tpm/old"), "").unwrap();
    fs::write(life.path(&all[1], "unfinished.json"), "{}").unwrap();
    fs::create_dir(folder.join("20270101T000000Z")).unwrap();
    let (found, faults) = found(&life, life.dir.path(), false).await;
    assert!(faults.is_empty());
    let mut strays: Vec<&str> = found.strays.iter().map(|stray| stray.object.as_str()).collect();
    strays.sort_unstable();
    let key = &life.folder.key;
    let expected = [
        format!("{key}/{}/tpm/old", all[0]),
        format!("{key}/{}/vdb.qcow2", all[0]),
        format!("{key}/notes"),
    ];
    assert_eq!(strays, expected);
    assert_eq!(found.unfinished, ["20270101T000000Z"]);
    assert!(found.read > 0);
}

#[tokio::test]
async fn what_is_too_large_to_be_what_it_should_be_is_not_read() {
    let life = Life::chain(41, 1).await;
    let first = &life.names()[0];
    let manifest = fs::OpenOptions::new()
        .write(true)
        .open(life.path(first, "manifest.json"));
    manifest.unwrap().set_len(10 << 30).unwrap();
    let error = life.repository.manifest(&life.folder, first).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(error.to_string().contains("10737418240 bytes"), "{error}");
}

#[tokio::test]
async fn only_what_is_asked_for_is_read() {
    let mut life = Life::new(29).await;
    let a = life.full(&["vda", "vdb"]).await;
    let b = life.increment(&[("vda", &a), ("vdb", &a)]).await;
    fs::remove_file(life.path(&b, "vdb.qcow2")).unwrap();
    let ask = async |points: &[&String], targets: &[&str]| {
        let options = VerifyOptions {
            points: points.iter().map(|name| (*name).clone()).collect(),
            targets: targets.iter().map(|target| (*target).to_owned()).collect(),
            quick: false,
        };
        verify(&life.repository, &life.folder, &options, &Silent).await
    };
    assert!(!ask(&[], &[]).await.unwrap().is_whole());
    assert!(ask(&[&a], &[]).await.unwrap().is_whole());
    let vda = ask(&[&b], &["vda"]).await.unwrap();
    assert!(vda.is_whole());
    assert_eq!((vda.points.len(), vda.points[0].disks.len()), (1, 1));
    assert!(!ask(&[&b], &["vdb"]).await.unwrap().is_whole());
    assert_eq!(ask(&[], &["vdz"]).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(
        ask(&[&"20200101T000000Z".to_owned()], &[])
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
    // The full images were read once each, though two points need them.
    let manifest = life.repository.manifest(&life.folder, &a).await.unwrap();
    let over = life.repository.manifest(&life.folder, &b).await.unwrap();
    let all = ask(&[], &["vda"]).await.unwrap();
    assert_eq!(all.read, rounded(&manifest, "vda") + rounded(&over, "vda"));
}

fn rounded(manifest: &Manifest, target: &str) -> u64 {
    manifest.disk(target).unwrap().data
}

#[tokio::test]
async fn a_file_of_digests_is_what_the_docs_say() {
    // docs/backup-format.md computes the same with Python's blake3.
    let life = Life::chain(30, 2).await;
    let point = life.names()[2].clone();
    let manifest = life.repository.manifest(&life.folder, &point).await.unwrap();
    assert_eq!(
        manifest.disks[0].content,
        points::digest_of(&life.points[&point]["vda"])
    );
    let about = fs::metadata(life.path(&point, "vda.qcow2")).unwrap();
    assert_eq!(manifest.disks[0].image_bytes, about.size());
}

#[tokio::test]
async fn names_ascend_also_where_the_clock_has_gone_back() {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::open_or_init(store(dir.path())).await.unwrap();
    let folder = repository
        .folder_or_new(&DomainId::new("web1", None))
        .await
        .unwrap();
    let now = repository.next_point(&folder, &[]).await.unwrap();
    let later = "20991231T235959Z";
    let key = repository.key(&folder, later, "unfinished.json");
    repository.store().put(&key, b"{}").await.unwrap();
    let next = repository.next_point(&folder, &[]).await.unwrap();
    assert!(*now < *later);
    assert_eq!(next, "20991231T235959Z-2");
    // What the domain still has of a point that is gone is not given to another.
    let held = ["20991231T235959Z-11", "20991231T235959Z-9"].map(str::to_owned);
    let next = repository.next_point(&folder, &held).await.unwrap();
    assert_eq!(next, "20991231T235959Z-12");
    let held = [format!("20991231T235959Z-{}", u32::MAX)];
    let error = repository.next_point(&folder, &held).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
}

#[tokio::test]
async fn whoever_makes_a_folder_is_waited_for_and_nobody_who_has_one_waits() {
    let life = Life::new(31).await;
    let held = life.repository.store().lock("lock", false).await.unwrap();
    assert_eq!(
        life.repository.folder_or_new(&domain()).await.unwrap(),
        life.folder
    );
    let repository = life.repository.clone();
    let other = DomainId::new("another", None);
    let theirs = other.clone();
    let made = tokio::spawn(async move { repository.folder_or_new(&theirs).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(life.repository.folder(&other).await.unwrap(), None);
    drop(held);
    assert_eq!(made.await.unwrap().unwrap().id, other);
}
