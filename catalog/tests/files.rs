//! The files: their modes, damage, newer and foreign ones, and file systems that are full or read-only.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{catalog, checkpoint, definition, domain, intent, snapshot, state};
use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{Act, Catalog, Change, Error, ErrorKind};
use disksnap_test_support::{need, small_fs};
use rusqlite::Connection;
use rustix::mount::MountFlags;
use uuid::Uuid;

async fn refused(dir: &StateDir) -> Error {
    SqliteCatalog::open(dir.clone()).await.unwrap_err()
}

/// A catalog with records in it, folded into its one file.
async fn closed(temp: &Path) -> StateDir {
    let dir = state(temp);
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    let vm = domain("vm");
    let changes: Vec<Change> = (0..100)
        .map(|n| Change::AddSnapshot(Box::new(snapshot(&vm, &format!("s{n}"), n))))
        .collect();
    catalog.settle(Uuid::new_v4(), &vm, &changes).await.unwrap();
    drop(catalog);
    edit(&dir, "PRAGMA wal_checkpoint(TRUNCATE)");
    dir
}

/// Runs SQL as somebody who opens the file with a tool of their own.
fn edit(dir: &StateDir, sql: &str) {
    let connection = Connection::open(dir.path().join("catalog.sqlite")).unwrap();
    connection.execute_batch(sql).unwrap();
}

#[tokio::test]
async fn all_files_are_private() {
    let (_temp, catalog) = catalog().await;
    let _lock = catalog.lock(&domain("vm")).await.unwrap();
    let _lease = catalog.lease().await.unwrap();
    catalog.define(&definition(&domain("vm"))).await.unwrap();
    let dir = catalog.state_dir();
    let mut names = Vec::new();
    for folder in [dir.path(), &dir.locks()] {
        for entry in fs::read_dir(folder).unwrap() {
            let (path, found) = entry.map(|e| (e.path(), e.metadata().unwrap())).unwrap();
            let wanted = if found.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(found.mode() & 0o7777, wanted, "{}", path.display());
            names.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    for name in [
        "catalog.sqlite",
        "catalog.sqlite-wal",
        "reserve",
        "images",
        "run",
        "locks",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
    }
    assert!(
        names.contains(&format!("{}.lock", domain("vm").uuid)),
        "{names:?}"
    );
}

#[tokio::test]
async fn names_of_domains_never_become_file_names() {
    let (temp, catalog) = catalog().await;
    let vm = domain("../../../escaped");
    let _lock = catalog.lock(&vm).await.unwrap();
    catalog.define(&definition(&vm)).await.unwrap();
    assert!(!temp.path().join("escaped").exists() && !temp.path().join("escaped.lock").exists());
    assert!(
        catalog
            .state_dir()
            .locks()
            .join(format!("{}.lock", vm.uuid))
            .exists()
    );
}

#[tokio::test]
async fn what_is_not_a_database_is_refused_and_left() {
    let temp = tempfile::tempdir().unwrap();
    let dir = state(temp.path());
    let file = dir.path().join("catalog.sqlite");
    let noise = vec![0x5a; 8192];
    fs::write(&file, &noise).unwrap();
    let error = refused(&dir).await;
    assert_eq!(error.kind(), ErrorKind::Broken);
    assert!(error.to_string().contains("catalog.sqlite"), "{error}");
    let hint = error.next_step().unwrap();
    assert!(hint.contains("untouched") && hint.contains(".recover"), "{hint}");
    assert_eq!(fs::read(&file).unwrap(), noise);
}

#[tokio::test]
async fn a_torn_file_is_found_out() {
    for keep in [100, 4096, 6000] {
        let temp = tempfile::tempdir().unwrap();
        let dir = closed(temp.path()).await;
        let file = dir.path().join("catalog.sqlite");
        fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_len(keep)
            .unwrap();
        let error = match SqliteCatalog::open(dir).await {
            Err(error) => error,
            Ok(catalog) => catalog.check().await.unwrap_err(),
        };
        assert_eq!(error.kind(), ErrorKind::Broken, "{keep}: {error}");
        assert!(error.to_string().contains("catalog.sqlite"), "{error}");
    }
}

#[tokio::test]
async fn damage_in_the_middle_is_found_by_a_check() {
    let temp = tempfile::tempdir().unwrap();
    let dir = closed(temp.path()).await;
    let file = dir.path().join("catalog.sqlite");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() / 4096 * 4096 - 8 * 4096;
    bytes[at..at + 4096].fill(0xff);
    fs::write(&file, bytes).unwrap();
    let catalog = SqliteCatalog::open(dir).await.unwrap();
    assert_eq!(catalog.check().await.unwrap_err().kind(), ErrorKind::Broken);
    assert_eq!(
        catalog.snapshots(&domain("vm")).await.unwrap_err().kind(),
        ErrorKind::Broken
    );
}

#[tokio::test]
async fn a_lost_database_is_not_taken_for_a_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let dir = state(temp.path());
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    catalog.define(&definition(&domain("vm"))).await.unwrap();
    drop(catalog);
    let (file, log) = (
        dir.path().join("catalog.sqlite"),
        dir.path().join("catalog.sqlite-wal"),
    );
    let before = fs::read(&log).unwrap();
    fs::write(&file, "").unwrap();
    assert_eq!(refused(&dir).await.kind(), ErrorKind::Broken);
    fs::remove_file(&file).unwrap();
    assert_eq!(refused(&dir).await.kind(), ErrorKind::Broken);
    assert_eq!(fs::read(&log).unwrap(), before);
    assert!(!file.exists());
}

#[tokio::test]
async fn an_empty_file_is_a_catalog_that_was_being_made() {
    let temp = tempfile::tempdir().unwrap();
    let dir = state(temp.path());
    fs::write(dir.path().join("catalog.sqlite"), "").unwrap();
    let catalog = SqliteCatalog::open(dir).await.unwrap();
    assert_eq!(catalog.definitions().await.unwrap(), []);
}

#[tokio::test]
async fn a_newer_catalog_is_refused_and_left() {
    let temp = tempfile::tempdir().unwrap();
    let dir = closed(temp.path()).await;
    edit(&dir, "PRAGMA user_version = 99");
    let error = refused(&dir).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("version 99"), "{error}");
    edit(&dir, "PRAGMA user_version = 4");
    let catalog = SqliteCatalog::open(dir).await.unwrap();
    assert_eq!(catalog.snapshots(&domain("vm")).await.unwrap().len(), 100);
}

#[tokio::test]
async fn a_catalog_from_before_checkpoints_is_upgraded() {
    let temp = tempfile::tempdir().unwrap();
    let dir = closed(temp.path()).await;
    edit(
        &dir,
        "DROP TABLE checkpoints; DROP TABLE pinned; PRAGMA user_version = 2",
    );
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    let vm = domain("vm");
    assert_eq!(catalog.snapshots(&vm).await.unwrap().len(), 100);
    assert_eq!(catalog.checkpoints(&vm).await.unwrap(), []);
    let set = vec![checkpoint("a", None, 1, 2)];
    let change = [Change::SetCheckpoints(set.clone())];
    catalog.settle(Uuid::nil(), &vm, &change).await.unwrap();
    drop(catalog);
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    assert_eq!(catalog.checkpoints(&vm).await.unwrap(), set);
    edit(&dir, "UPDATE checkpoints SET record = '{}'");
    assert_eq!(catalog.check().await.unwrap_err().kind(), ErrorKind::Broken);
}

#[tokio::test]
async fn a_set_of_checkpoints_does_not_use_up_the_reserve() {
    need!("small-fs");
    let fs = small_fs(8 * 1024 * 1024);
    let dir = state(fs.path());
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    fill(&dir.images().join("fleece"));
    let vm = domain("vm");
    let set: Vec<_> = (0..1000)
        .map(|n| checkpoint(&format!("c{n}"), None, n, 16))
        .collect();
    let change = [Change::SetCheckpoints(set)];
    let error = catalog.settle(Uuid::nil(), &vm, &change).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(catalog.checkpoints(&vm).await.unwrap(), []);
    assert!(dir.path().join("reserve").exists());
}

#[tokio::test]
async fn another_programs_database_is_refused_and_left() {
    let temp = tempfile::tempdir().unwrap();
    let dir = state(temp.path());
    edit(&dir, "CREATE TABLE theirs (x); INSERT INTO theirs VALUES (7)");
    let before = fs::read(dir.path().join("catalog.sqlite")).unwrap();
    assert_eq!(refused(&dir).await.kind(), ErrorKind::Invalid);
    assert_eq!(fs::read(dir.path().join("catalog.sqlite")).unwrap(), before);
}

#[tokio::test]
async fn a_symbolic_link_in_place_of_the_file_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = state(temp.path());
    std::os::unix::fs::symlink(temp.path().join("victim"), dir.path().join("catalog.sqlite")).unwrap();
    refused(&dir).await;
    assert!(!temp.path().join("victim").exists());
}

#[tokio::test]
async fn unknown_fields_are_skipped_and_newer_records_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = closed(temp.path()).await;
    edit(
        &dir,
        "UPDATE snapshots SET record = json_set(record, '$.future', json('{\"a\": [1]}'))",
    );
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    assert_eq!(catalog.snapshots(&domain("vm")).await.unwrap().len(), 100);
    edit(&dir, "UPDATE snapshots SET version = 2 WHERE name = 's7'");
    let error = catalog.snapshots(&domain("vm")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    edit(
        &dir,
        "UPDATE snapshots SET version = 1, record = '{}' WHERE name = 's7'",
    );
    let error = catalog.snapshots(&domain("vm")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
    assert_eq!(catalog.check().await.unwrap_err().kind(), ErrorKind::Broken);
}

#[tokio::test]
async fn lists_go_by_an_index() {
    let temp = tempfile::tempdir().unwrap();
    let dir = closed(temp.path()).await;
    let connection = Connection::open(dir.path().join("catalog.sqlite")).unwrap();
    for (table, order) in [
        ("snapshots", "created, seq"),
        ("checkpoints", "created, seq"),
        ("intents", "seq"),
        ("exports", "seq"),
    ] {
        let query = format!(
            "EXPLAIN QUERY PLAN SELECT version, record FROM {table} WHERE domain = 'x' ORDER BY {order}"
        );
        let plan: Vec<String> = connection
            .prepare(&query)
            .unwrap()
            .query_map((), |row| row.get(3))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(plan.len(), 1, "{plan:?}");
        assert!(
            plan[0].starts_with("SEARCH") && plan[0].contains("INDEX"),
            "{plan:?}"
        );
    }
}

#[tokio::test]
async fn on_a_full_file_system_snapshots_can_still_be_deleted() {
    need!("small-fs");
    let fs = small_fs(8 * 1024 * 1024);
    let dir = state(fs.path());
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    let vm = domain("vm");
    let kept = snapshot(&vm, "kept", 0);
    let add = Change::AddSnapshot(Box::new(kept.clone()));
    catalog.settle(kept.id.0, &vm, &[add]).await.unwrap();
    fill(&dir.images().join("fleece"));

    // Making something new fails as soon as the log has to grow ...
    let error = loop {
        if let Err(error) = catalog.intend(&intent(&vm, &"x".repeat(100))).await {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(error.effect(), disksnap_core::Effect::None);
    assert!(error.next_step().is_some_and(|hint| hint.contains("Make room")));
    let before = catalog.intents(None).await.unwrap();
    drop(catalog);

    // ... and ending something works, also for a process that only comes now.
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    let _lock = catalog.lock(&vm).await.unwrap();
    assert_eq!(catalog.intents(None).await.unwrap(), before);
    let mut delete = intent(&vm, "delete");
    delete.act = Act::Delete { snapshot: kept.id };
    catalog.intend(&delete).await.unwrap();
    let gone = Change::RemoveSnapshot(kept.id);
    catalog.settle(delete.id, &vm, &[gone]).await.unwrap();
    assert_eq!(catalog.snapshots(&vm).await.unwrap(), []);

    // With room again, space is kept back again.
    fs::remove_file(dir.images().join("fleece")).unwrap();
    drop(catalog);
    SqliteCatalog::open(dir.clone())
        .await
        .unwrap()
        .check()
        .await
        .unwrap();
    assert!(dir.path().join("reserve").exists());
}

#[tokio::test]
async fn a_full_file_system_does_not_keep_the_catalog_from_being_opened() {
    need!("small-fs");
    let fs = small_fs(8 * 1024 * 1024);
    let dir = closed(fs.path()).await;
    // As after a restore from a backup: the shared index of the log must be made anew.
    fs::remove_file(dir.path().join("catalog.sqlite-shm")).ok();
    fill(&dir.images().join("fleece"));
    let catalog = SqliteCatalog::open(dir.clone()).await.unwrap();
    assert_eq!(catalog.snapshots(&domain("vm")).await.unwrap().len(), 100);
    assert!(!dir.path().join("reserve").exists());
    drop(catalog);

    // Once nothing is left of the reserve either, it is said.
    fs::remove_file(dir.path().join("catalog.sqlite-shm")).unwrap();
    fill(&dir.images().join("more"));
    assert_eq!(refused(&dir).await.kind(), ErrorKind::NoSpace);
}

/// Writes until nothing more fits.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(path).unwrap();
    for size in [65536, 512, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}

#[tokio::test]
async fn with_no_room_at_all_nothing_is_half_made() {
    need!("small-fs");
    let fs = small_fs(256 * 1024);
    let dir = state(fs.path());
    fill(&dir.images().join("fleece"));
    assert_eq!(refused(&dir).await.kind(), ErrorKind::NoSpace);
    fs::remove_file(dir.images().join("fleece")).unwrap();
    let catalog = SqliteCatalog::open(dir).await.unwrap();
    catalog.define(&definition(&domain("vm"))).await.unwrap();
}

#[tokio::test]
async fn a_read_only_file_system_denies() {
    need!("small-fs");
    let fs = small_fs(8 * 1024 * 1024);
    let dir = closed(fs.path()).await;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount_remount(fs.path(), flags, "").unwrap();
    let error = refused(&dir).await;
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(
        error
            .next_step()
            .is_some_and(|hint| hint.contains("mounted for writing")),
        "{error}"
    );
    let elsewhere = StateDir::open(Some(&fs.path().join("new"))).unwrap_err();
    assert_eq!(elsewhere.kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn a_catalog_that_somebody_else_keeps_locked_is_waited_for() {
    let (_temp, catalog) = catalog().await;
    let file = catalog.state_dir().path().join("catalog.sqlite");
    let other = Connection::open(&file).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let writing = tokio::spawn({
        let catalog = catalog.clone();
        async move { catalog.settle(Uuid::nil(), &domain("vm"), &[]).await }
    });
    tokio::task::yield_now().await;
    assert!(!writing.is_finished());
    // A read goes on beside the other's writing, over a connection of its own.
    let reader = SqliteCatalog::open(catalog.state_dir().clone()).await.unwrap();
    assert_eq!(reader.definitions().await.unwrap(), []);
    other.execute_batch("ROLLBACK").unwrap();
    writing.await.unwrap().unwrap();
}
