//! Several processes and one catalog: locks between them, and kills at any moment.
//!
//! The second process is this test binary again.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::second::{Second, check_settles, role, say, set_checkpoints_for_ever, settle_for_ever};
use common::{catalog, domain, intent, snapshot, state};
use disksnap_catalog::SqliteCatalog;
use disksnap_core::{Catalog, Change, ErrorKind};
use uuid::Uuid;

/// What the second process does; a test in name only.
#[tokio::test]
#[ignore = "the other tests start it as a second process"]
async fn second_process() {
    let Some((role, catalog, dir)) = role().await else {
        return;
    };
    match role.as_str() {
        "lock" => hold_a_lock(&catalog).await,
        "lease" => hold_a_lease(&catalog).await,
        "settle" => settle_for_ever(&catalog).await,
        "sets" => set_checkpoints_for_ever(&catalog).await,
        "count" => count_under_lock(&catalog, &dir).await,
        "own" => settle_on_a_domain_of_its_own(&catalog).await,
        "grandchild" => leave_a_grandchild(&catalog).await,
        role => panic!("{role}?"),
    }
}

async fn hold_a_lock(catalog: &SqliteCatalog) {
    let _held = catalog.lock(&domain("vm")).await.unwrap();
    say("held");
    std::future::pending::<()>().await;
}

async fn hold_a_lease(catalog: &SqliteCatalog) {
    let (lease, _held) = catalog.lease().await.unwrap();
    say(&lease.to_string());
    std::future::pending::<()>().await;
}

/// Ten acts, each under the lock as the dispatcher has it.
async fn settle_on_a_domain_of_its_own(catalog: &SqliteCatalog) {
    let vm = domain(&format!("vm{}", std::process::id()));
    for n in 0..10 {
        let _held = catalog.lock(&vm).await.unwrap();
        let begun = intent(&vm, &format!("{n}"));
        catalog.intend(&begun).await.unwrap();
        let made = Change::AddSnapshot(Box::new(snapshot(&vm, &format!("{n}"), n)));
        catalog.settle(begun.id, &vm, &[made]).await.unwrap();
    }
    say("done");
}

/// Reads, thinks and writes: without the lock some of the counting gets lost.
async fn count_under_lock(catalog: &SqliteCatalog, dir: &Path) {
    let (vm, file) = (domain("vm"), dir.join("count"));
    for _ in 0..50 {
        let _held = catalog.lock(&vm).await.unwrap();
        let count: u32 = std::fs::read_to_string(&file).unwrap().parse().unwrap();
        tokio::task::yield_now().await;
        std::fs::write(&file, (count + 1).to_string()).unwrap();
    }
}

#[expect(clippy::zombie_processes, reason = "the test ends the grandchild")]
/// Starts a process while it holds the lock, and dies before that one.
async fn leave_a_grandchild(catalog: &SqliteCatalog) {
    let held = catalog.lock(&domain("vm")).await.unwrap();
    let grandchild = Command::new("sleep").arg("600").spawn().unwrap();
    std::mem::forget(held);
    say(&grandchild.id().to_string());
}

#[tokio::test]
async fn a_lock_keeps_processes_apart_and_its_holder_is_named() {
    let (temp, catalog) = catalog().await;
    let catalog = catalog.with_patience(Duration::ZERO);
    let mut second = Second::start("lock", temp.path());
    assert_eq!(second.word().as_deref(), Some("held"));
    let error = catalog.lock(&domain("vm")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let pid = format!("process {} (", second.child.id());
    assert!(error.message().contains(&pid), "{error}");
    assert!(
        error.next_step().is_some_and(|hint| hint.contains("Wait until")),
        "{error}"
    );
    catalog.lock(&domain("other")).await.unwrap();
    second.kill();
    catalog.lock(&domain("vm")).await.unwrap();
}

#[tokio::test]
async fn a_waiter_gets_the_lock_of_a_killed_holder() {
    let (temp, catalog) = catalog().await;
    let mut second = Second::start("lock", temp.path());
    second.word().unwrap();
    let catalog = catalog.with_patience(Duration::from_mins(10));
    let waiting = tokio::spawn(async move { catalog.lock(&domain("vm")).await.map(drop) });
    tokio::task::yield_now().await;
    second.kill();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_child_of_the_holder_does_not_inherit_the_lock() {
    let (temp, catalog) = catalog().await;
    let mut second = Second::start("grandchild", temp.path());
    let pid: i32 = second.word().unwrap().parse().unwrap();
    second.child.wait().unwrap();
    // Its copy closes a moment after its start; the grandchild itself stays for ten minutes.
    let locked = catalog
        .with_patience(Duration::from_mins(1))
        .lock(&domain("vm"))
        .await;
    let grandchild = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(grandchild, rustix::process::Signal::KILL).unwrap();
    locked.unwrap();
}

#[tokio::test]
async fn a_lease_ends_with_its_process() {
    let (temp, catalog) = catalog().await;
    let mut second = Second::start("lease", temp.path());
    let lease: Uuid = second.word().unwrap().parse().unwrap();
    assert!(catalog.lease_lives(lease).await.unwrap());
    second.kill();
    assert!(!catalog.lease_lives(lease).await.unwrap());
    let file = catalog.state_dir().locks().join(format!("lease-{lease}"));
    assert!(!file.exists());
}

#[test]
fn no_two_processes_are_in_the_lock_at_once() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::write(temp.path().join("count"), "0").unwrap();
    // They also make the catalog at the same time.
    let mut all: Vec<Second> = (0..4).map(|_| Second::start("count", temp.path())).collect();
    for second in &mut all {
        assert_eq!(second.word(), None);
        assert!(second.child.wait().unwrap().success());
    }
    let count = std::fs::read_to_string(temp.path().join("count")).unwrap();
    assert_eq!(count, "200");
}

#[tokio::test]
async fn a_kill_leaves_each_settle_done_or_not() {
    let temp = tempfile::tempdir().unwrap();
    let mut said = BTreeSet::new();
    for round in 0..40 {
        let mut second = Second::start("settle", temp.path());
        for _ in 0..=round % 4 {
            said.insert(second.word().unwrap());
        }
        // At another point of the next act each time.
        std::thread::sleep(Duration::from_micros(round * 50));
        second.kill();
        // What it said before it died counts as promised.
        said.extend(std::iter::from_fn(|| second.word()));
        let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
        check_settles(&catalog, &said).await;
    }
}

#[tokio::test]
async fn a_kill_never_leaves_half_a_set_of_checkpoints() {
    let temp = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let mut second = Second::start("sets", temp.path());
        for _ in 0..=round % 3 {
            second.word().unwrap();
        }
        // At another point of the next set each time.
        std::thread::sleep(Duration::from_micros(round * 400));
        second.kill();
        let said = std::iter::from_fn(|| second.word()).last();
        let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
        catalog.check().await.unwrap();
        let set = catalog.checkpoints(&domain("vm")).await.unwrap();
        assert_eq!(set.len(), 100);
        assert!(
            set.iter().all(|c| c.created == set[0].created),
            "half of two sets"
        );
        if let Some(said) = said {
            let last = common::second(said.parse().unwrap());
            assert!(set[0].created >= last, "a set that had answered is lost");
        }
    }
}

/// They also make the catalog at the same time.
#[tokio::test]
async fn sixty_four_processes_work_on_as_many_domains() {
    let temp = tempfile::tempdir().unwrap();
    let mut all: Vec<Second> = (0..64).map(|_| Second::start("own", temp.path())).collect();
    for second in &mut all {
        assert_eq!(second.word().as_deref(), Some("done"));
        assert!(second.child.wait().unwrap().success());
    }
    let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
    catalog.check().await.unwrap();
    assert_eq!(catalog.intents(None).await.unwrap(), []);
    for second in &all {
        let vm = domain(&format!("vm{}", second.child.id()));
        assert_eq!(catalog.snapshots(&vm).await.unwrap().len(), 10);
    }
}
