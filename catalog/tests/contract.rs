//! Every method of core's `Catalog` as its contract says, within one process.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::Duration;

use common::{catalog, checkpoint, definition, domain, export, intent, name, server, snapshot, state};
use disksnap_catalog::SqliteCatalog;
use disksnap_core::{
    Act, Alias, Catalog, Change, Disk, DomainId, ErrorKind, Moved, Snapshot, SnapshotId, Source,
};
use uuid::Uuid;

async fn add(catalog: &SqliteCatalog, domain: &DomainId, snapshot: &Snapshot) {
    let change = Change::AddSnapshot(Box::new(snapshot.clone()));
    catalog.settle(snapshot.id.0, domain, &[change]).await.unwrap();
}

#[tokio::test]
async fn definitions_are_replaced_by_uuid_and_unique_by_name() {
    let (_temp, catalog) = catalog().await;
    let (b, a) = (domain("b"), domain("a"));
    catalog.define(&definition(&b)).await.unwrap();
    catalog.define(&definition(&a)).await.unwrap();
    catalog.define(&definition(&a)).await.unwrap();
    assert_eq!(
        catalog.definitions().await.unwrap(),
        [definition(&a), definition(&b)]
    );

    let other = DomainId::new("a", Some(Uuid::new_v4()));
    let error = catalog.define(&definition(&other)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.message().contains(&a.uuid.to_string()), "{error}");

    let renamed = DomainId::new("c", Some(a.uuid));
    catalog.define(&definition(&renamed)).await.unwrap();
    catalog.define(&definition(&other)).await.unwrap();
    let names: Vec<String> = catalog
        .definitions()
        .await
        .unwrap()
        .into_iter()
        .map(|d| d.id.name)
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[tokio::test]
async fn a_domain_is_undefined_only_when_nothing_of_it_is_left() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    assert_eq!(
        catalog.undefine(&vm).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    catalog.define(&definition(&vm)).await.unwrap();
    let kept = snapshot(&vm, "kept", 0);
    add(&catalog, &vm, &kept).await;
    let error = catalog.undefine(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(!error.is_retryable());

    let begun = intent(&vm, "begun");
    catalog.intend(&begun).await.unwrap();
    let gone = Change::RemoveSnapshot(kept.id);
    catalog.settle(Uuid::new_v4(), &vm, &[gone]).await.unwrap();
    assert_eq!(catalog.undefine(&vm).await.unwrap_err().kind(), ErrorKind::Busy);

    catalog.settle(begun.id, &vm, &[]).await.unwrap();
    catalog.undefine(&vm).await.unwrap();
    assert!(catalog.definitions().await.unwrap().is_empty());
    assert_eq!(
        catalog.undefine(&vm).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn intents_are_kept_in_order_until_settled() {
    let (temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let (mut first, second, third) = (intent(&vm, "1"), intent(&other, "2"), intent(&vm, "3"));
    for intent in [&first, &second, &third] {
        catalog.intend(intent).await.unwrap();
    }
    // What has become known since replaces it, in its place.
    first.act = Act::Delete {
        snapshot: SnapshotId::random(),
    };
    catalog.intend(&first).await.unwrap();

    drop(catalog);
    let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
    assert_eq!(
        catalog.intents(None).await.unwrap(),
        [first.clone(), second.clone(), third.clone()]
    );
    assert_eq!(
        catalog.intents(Some(&vm)).await.unwrap(),
        [first.clone(), third.clone()]
    );
    for _ in 0..2 {
        catalog.settle(first.id, &vm, &[]).await.unwrap();
        assert_eq!(
            catalog.intents(None).await.unwrap(),
            [second.clone(), third.clone()]
        );
    }
}

#[tokio::test]
async fn a_settle_is_all_or_nothing() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let taken = snapshot(&vm, "taken", 0);
    add(&catalog, &vm, &taken).await;

    let begun = intent(&vm, "taken");
    catalog.intend(&begun).await.unwrap();
    let changes = [
        Change::SetServer(server(10809)),
        Change::AddExport(export("vda-backup", "vda")),
        Change::AddSnapshot(Box::new(snapshot(&vm, "new", 1))),
        Change::RemoveSnapshot(taken.id),
        Change::AddSnapshot(Box::new(snapshot(&vm, "new", 2))),
    ];
    let error = catalog.settle(begun.id, &vm, &changes).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.context().any(|c| c == ("snapshot", "new")), "{error}");
    assert_eq!(catalog.snapshots(&vm).await.unwrap(), [taken]);
    assert_eq!(catalog.intents(None).await.unwrap(), [begun]);
    assert_eq!(catalog.server(&vm).await.unwrap(), None);
    assert_eq!(catalog.exports(&vm).await.unwrap(), []);
    assert_eq!(catalog.deleted(&vm, &name("taken")).await.unwrap(), None);
}

#[tokio::test]
async fn the_same_settle_twice_is_one_settle() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let begun = intent(&vm, "new");
    let changes = [
        Change::AddSnapshot(Box::new(snapshot(&vm, "new", 1))),
        Change::SetServer(server(10809)),
        Change::AddExport(export("vda-backup", "vda")),
        Change::RemoveExport(Alias("never was".to_owned())),
        Change::RemoveSnapshot(SnapshotId::random()),
    ];
    catalog.intend(&begun).await.unwrap();
    catalog.settle(begun.id, &vm, &changes).await.unwrap();
    let once = (
        catalog.snapshots(&vm).await.unwrap(),
        catalog.exports(&vm).await.unwrap(),
    );
    catalog.settle(begun.id, &vm, &changes).await.unwrap();
    let twice = (
        catalog.snapshots(&vm).await.unwrap(),
        catalog.exports(&vm).await.unwrap(),
    );
    assert_eq!(once, twice);
    assert_eq!((once.0.len(), once.1.len()), (1, 1));
}

#[tokio::test]
async fn a_name_that_was_freed_can_be_taken_in_the_same_settle() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let (old, new) = (snapshot(&vm, "same", 0), snapshot(&vm, "same", 1));
    add(&catalog, &vm, &old).await;
    let changes = [
        Change::RemoveSnapshot(old.id),
        Change::AddSnapshot(Box::new(new.clone())),
    ];
    catalog.settle(Uuid::new_v4(), &vm, &changes).await.unwrap();
    assert_eq!(catalog.snapshots(&vm).await.unwrap(), [new]);
    assert_eq!(catalog.deleted(&vm, &name("same")).await.unwrap(), Some(old.id));
}

#[tokio::test]
async fn snapshots_come_oldest_first_and_whole() {
    let (_temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let (late, early) = (snapshot(&vm, "late", 9), snapshot(&vm, "early", 1));
    add(&catalog, &vm, &late).await;
    add(&catalog, &vm, &early).await;
    // Names are each domain's own.
    let theirs = snapshot(&other, "late", 0);
    add(&catalog, &other, &theirs).await;
    assert_eq!(catalog.snapshots(&vm).await.unwrap(), [early, late]);
    assert_eq!(catalog.snapshots(&other).await.unwrap(), [theirs]);
    assert_eq!(catalog.snapshots(&domain("none")).await.unwrap(), []);
    catalog.check().await.unwrap();
}

#[tokio::test]
async fn a_snapshot_of_another_domain_is_a_defect() {
    let (_temp, catalog) = catalog().await;
    let change = Change::AddSnapshot(Box::new(snapshot(&domain("theirs"), "a", 0)));
    let settled = catalog.settle(Uuid::new_v4(), &domain("vm"), &[change]).await;
    assert_eq!(settled.unwrap_err().kind(), ErrorKind::Internal);
}

#[tokio::test]
async fn the_last_deleted_snapshot_of_a_name_is_remembered() {
    let (_temp, catalog) = catalog().await;
    let (vm, nightly) = (domain("vm"), name("nightly"));
    assert_eq!(catalog.deleted(&vm, &nightly).await.unwrap(), None);
    for at in 0..3 {
        let snapshot = snapshot(&vm, "nightly", at);
        add(&catalog, &vm, &snapshot).await;
        for _ in 0..2 {
            let gone = Change::RemoveSnapshot(snapshot.id);
            catalog.settle(Uuid::new_v4(), &vm, &[gone]).await.unwrap();
        }
        assert_eq!(catalog.deleted(&vm, &nightly).await.unwrap(), Some(snapshot.id));
    }
    assert_eq!(catalog.deleted(&domain("other"), &nightly).await.unwrap(), None);
}

#[tokio::test]
async fn a_thousand_deleted_names_are_remembered_and_no_more() {
    let (_temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let bury = |of: &DomainId, n: u64| {
        let snapshot = snapshot(of, &format!("s{n}"), n);
        [
            Change::AddSnapshot(Box::new(snapshot.clone())),
            Change::RemoveSnapshot(snapshot.id),
        ]
    };
    let theirs = bury(&other, 0);
    catalog.settle(Uuid::new_v4(), &other, &theirs).await.unwrap();
    let changes: Vec<Change> = (0..1001).flat_map(|n| bury(&vm, n)).collect();
    catalog.settle(Uuid::new_v4(), &vm, &changes).await.unwrap();
    assert_eq!(catalog.deleted(&vm, &name("s0")).await.unwrap(), None);
    assert!(catalog.deleted(&vm, &name("s1")).await.unwrap().is_some());
    assert!(catalog.deleted(&vm, &name("s1000")).await.unwrap().is_some());
    assert!(catalog.deleted(&other, &name("s0")).await.unwrap().is_some());
}

#[tokio::test]
async fn servers_and_exports_are_replaced_and_removed() {
    let (_temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let settle = async |changes: &[Change]| catalog.settle(Uuid::new_v4(), &vm, changes).await.unwrap();
    let (b, a) = (export("b", "vdb"), export("a", "vda"));
    settle(&[
        Change::SetServer(server(1)),
        Change::AddExport(b.clone()),
        Change::AddExport(a.clone()),
    ])
    .await;
    let replaced = export("b", "vdc");
    settle(&[Change::SetServer(server(2)), Change::AddExport(replaced.clone())]).await;
    assert_eq!(catalog.server(&vm).await.unwrap(), Some(server(2)));
    assert_eq!(catalog.exports(&vm).await.unwrap(), [replaced, a.clone()]);
    assert_eq!(catalog.server(&other).await.unwrap(), None);
    assert_eq!(catalog.exports(&other).await.unwrap(), []);
    for _ in 0..2 {
        settle(&[Change::ClearServer, Change::RemoveExport(b.alias.clone())]).await;
        assert_eq!(catalog.server(&vm).await.unwrap(), None);
        assert_eq!(catalog.exports(&vm).await.unwrap(), std::slice::from_ref(&a));
    }
}

#[tokio::test]
async fn a_lock_keeps_tasks_of_one_process_apart() {
    let (temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let again = SqliteCatalog::open(state(temp.path()))
        .await
        .unwrap()
        .with_patience(Duration::ZERO);
    let held = catalog.lock(&vm).await.unwrap();
    let _other = again.lock(&other).await.unwrap();
    let error = again.lock(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.is_retryable());
    assert!(
        error.message().contains("another task of this process"),
        "{error}"
    );
    assert!(error.context().any(|c| c == ("domain", "vm")), "{error}");
    drop(held);
    again.lock(&vm).await.unwrap();
}

#[tokio::test]
async fn a_lock_is_waited_for() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let held = catalog.lock(&vm).await.unwrap();
    let waiting = {
        let (catalog, vm) = (catalog.clone().with_patience(Duration::from_mins(10)), vm.clone());
        tokio::spawn(async move { catalog.lock(&vm).await.map(drop) })
    };
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    drop(held);
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn leases_end_with_their_value() {
    let (_temp, catalog) = catalog().await;
    let (lease, held) = catalog.lease().await.unwrap();
    assert!(catalog.lease_lives(lease).await.unwrap());
    drop(held);
    for _ in 0..2 {
        assert!(!catalog.lease_lives(lease).await.unwrap());
    }
    assert!(!catalog.lease_lives(Uuid::new_v4()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_domains_settle_at_once() {
    let (temp, catalog) = catalog().await;
    let mut tasks = Vec::new();
    for n in 0..64 {
        // Half of them over connections of their own, as other processes would.
        let catalog = if n % 2 == 0 {
            catalog.clone()
        } else {
            SqliteCatalog::open(state(temp.path())).await.unwrap()
        };
        tasks.push(tokio::spawn(async move {
            let vm = domain(&format!("vm{n}"));
            let _lock = catalog.lock(&vm).await.unwrap();
            for k in 0..4 {
                let begun = intent(&vm, "x");
                catalog.intend(&begun).await.unwrap();
                let new = snapshot(&vm, &format!("s{k}"), k);
                let change = Change::AddSnapshot(Box::new(new));
                catalog.settle(begun.id, &vm, &[change]).await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    for n in 0..64 {
        let found = catalog.snapshots(&domain(&format!("vm{n}"))).await.unwrap();
        assert_eq!(found.len(), 4);
    }
    assert_eq!(catalog.intents(None).await.unwrap(), []);
    catalog.check().await.unwrap();
}

#[tokio::test]
async fn ten_thousand_snapshots_of_one_domain_are_listed() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let changes: Vec<Change> = (0..10_000)
        .rev()
        .map(|n| Change::AddSnapshot(Box::new(snapshot(&vm, &format!("s{n}"), n))))
        .collect();
    catalog.settle(Uuid::new_v4(), &vm, &changes).await.unwrap();
    let found = catalog.snapshots(&vm).await.unwrap();
    assert_eq!(found.len(), 10_000);
    assert!(found.is_sorted_by_key(|snapshot| snapshot.created));
}

#[tokio::test]
async fn a_disk_s_ways_are_remembered_and_none_leads_away_from_what_it_is() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let at = |path: &str| Source::File { file: path.into() };
    let moved = |from: &str, to: &str| Moved {
        from: at(from),
        disk: Disk::new("vda", at(to)),
    };
    let settle = |moved: Moved| {
        let (catalog, vm) = (&catalog, &vm);
        async move {
            let change = [Change::Move(Box::new(moved))];
            catalog.settle(Uuid::nil(), vm, &change).await.unwrap();
            catalog.moves(vm).await.unwrap()
        }
    };
    assert_eq!(settle(moved("/a", "/b")).await, [moved("/a", "/b")]);
    assert_eq!(
        settle(moved("/b", "/c")).await,
        [moved("/a", "/b"), moved("/b", "/c")]
    );
    // Back at the first: nothing leads away from it any more.
    assert_eq!(
        settle(moved("/c", "/a")).await,
        [moved("/b", "/c"), moved("/c", "/a")]
    );
    // One way from each place; another domain's disks are not concerned.
    assert_eq!(
        settle(moved("/c", "/d")).await,
        [moved("/b", "/c"), moved("/c", "/d")]
    );
    assert!(catalog.moves(&domain("other")).await.unwrap().is_empty());
}

#[tokio::test]
async fn checkpoints_are_set_added_and_removed_and_come_oldest_first() {
    let (temp, catalog) = catalog().await;
    let (vm, other) = (domain("vm"), domain("other"));
    let settle = async |of: &DomainId, changes: &[Change]| {
        catalog.settle(Uuid::nil(), of, changes).await.unwrap();
        catalog.checkpoints(of).await.unwrap()
    };
    let (a, b) = (checkpoint("a", None, 1, 16), checkpoint("b", Some("a"), 2, 1));
    let theirs = checkpoint("a", None, 5, 0);
    assert_eq!(settle(&vm, &[]).await, []);
    settle(&other, &[Change::AddCheckpoint(Box::new(theirs.clone()))]).await;
    let set = Change::SetCheckpoints(vec![b.clone(), a.clone()]);
    for _ in 0..2 {
        assert_eq!(
            settle(&vm, std::slice::from_ref(&set)).await,
            [a.clone(), b.clone()]
        );
    }
    // A record of the same name is replaced, and takes its place by its time.
    let later = checkpoint("a", Some("b"), 3, 2);
    assert_eq!(
        settle(&vm, &[Change::AddCheckpoint(Box::new(later.clone()))]).await,
        [b.clone(), later.clone()]
    );
    for _ in 0..2 {
        let gone = Change::RemoveCheckpoint(b.name.clone());
        assert_eq!(settle(&vm, &[gone]).await, std::slice::from_ref(&later));
    }
    // The whole set goes, and only this domain's.
    let new = checkpoint("c", None, 0, 3);
    assert_eq!(
        settle(&vm, &[Change::SetCheckpoints(vec![new.clone()])]).await,
        std::slice::from_ref(&new)
    );
    assert_eq!(catalog.checkpoints(&other).await.unwrap(), [theirs]);
    catalog.check().await.unwrap();
    drop(catalog);
    let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
    assert_eq!(catalog.checkpoints(&vm).await.unwrap(), [new]);
}

#[tokio::test]
async fn a_set_of_checkpoints_is_replaced_whole_or_not_at_all() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let set = vec![checkpoint("a", None, 1, 2), checkpoint("b", Some("a"), 2, 2)];
    let add = [Change::SetCheckpoints(set.clone())];
    catalog.settle(Uuid::nil(), &vm, &add).await.unwrap();
    let taken = snapshot(&vm, "taken", 0);
    self::add(&catalog, &vm, &taken).await;
    let fails = Change::AddSnapshot(Box::new(snapshot(&vm, "taken", 1)));
    let new = Change::SetCheckpoints(vec![checkpoint("c", None, 3, 1)]);
    catalog.settle(Uuid::nil(), &vm, &[new, fails]).await.unwrap_err();
    assert_eq!(catalog.checkpoints(&vm).await.unwrap(), set);
}

#[tokio::test]
async fn a_domain_with_checkpoints_is_not_undefined() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    catalog.define(&definition(&vm)).await.unwrap();
    let add = Change::AddCheckpoint(Box::new(checkpoint("a", None, 1, 1)));
    catalog.settle(Uuid::nil(), &vm, &[add]).await.unwrap();
    let error = catalog.undefine(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(!error.is_retryable());
    let hint = error.next_step().unwrap();
    assert!(
        hint.contains("checkpoint dump") && hint.contains("forget"),
        "{hint}"
    );
    let none = Change::SetCheckpoints(Vec::new());
    catalog.settle(Uuid::nil(), &vm, &[none]).await.unwrap();
    catalog.undefine(&vm).await.unwrap();
}

#[tokio::test]
async fn ten_thousand_checkpoints_of_sixteen_disks_are_one_step() {
    let (_temp, catalog) = catalog().await;
    let vm = domain("vm");
    let set: Vec<_> = (0..10_000)
        .map(|n| checkpoint(&format!("c{n}"), None, n, 16))
        .collect();
    let change = [Change::SetCheckpoints(set.clone())];
    catalog.settle(Uuid::nil(), &vm, &change).await.unwrap();
    assert!(catalog.checkpoints(&vm).await.unwrap() == set);
}
