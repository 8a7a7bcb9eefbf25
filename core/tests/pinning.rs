//! Snapshots that are checkpoints: kept when they are deleted, compared with later ones, freed with the checkpoint.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use std::sync::Arc;

use disksnap_core::{
    Alias, Catalog, CheckpointName, Deleted, Deletion, ErrorKind, ExportDisk, ExportRequest, Health, Mark,
    MarkVerdict, NewCheckpoint, Redefine, Result, RunState, Snapshot, SnapshotRequest,
};
use scene::{FakeMethod, FakeTracker, Plan, Scene, by, name_of, named};

fn scene() -> (Scene, Arc<FakeTracker>) {
    let methods = [
        FakeMethod::new("a", Plan::Host).comparing(),
        FakeMethod::new("b", Plan::Atomic),
    ];
    Scene::new(RunState::Running, methods).tracked()
}

fn checkpoint(name: &str) -> CheckpointName {
    name.parse().unwrap()
}

/// A snapshot of these disks by these methods, and a checkpoint called the same.
fn marked(name: &str, disks: &[(&str, &str)]) -> SnapshotRequest {
    let disks = disks.iter().map(|(target, method)| by(target, method));
    SnapshotRequest {
        checkpoint: Some(NewCheckpoint::AsSnapshot),
        ..named(name, disks)
    }
}

async fn names(scene: &Scene) -> Vec<String> {
    let all = scene.catalog.snapshots(&scene.domain.id).await.unwrap();
    all.iter().map(|s| s.name.to_string()).collect()
}

async fn kept(scene: &Scene) -> Vec<Snapshot> {
    scene.catalog.pinned(&scene.domain.id).await.unwrap()
}

async fn delete(scene: &Scene, name: &str) -> Deletion {
    let deleted = scene.dispatcher.delete(&scene.domain, &name_of(name)).await;
    deleted.unwrap()
}

async fn remove(scene: &Scene, name: &str) -> Result<()> {
    scene
        .dispatcher
        .remove_checkpoint(&scene.domain, &checkpoint(name))
        .await
}

/// What the image server is told when this snapshot's vda is exported since a checkpoint; `None` where nothing is.
async fn exported(scene: &Scene, snapshot: &Snapshot, since: &str) -> Result<Option<String>> {
    scene.log.take();
    let request = ExportRequest {
        listen: None,
        tls: None,
        allow_remote: false,
        disks: vec![ExportDisk {
            alias: Alias(snapshot.disk("vda").unwrap().alias.0.clone()),
            name: Some("x".to_owned()),
            checkpoint: Some(checkpoint(since)),
        }],
    };
    let exports = scene.dispatcher.start_exports(&scene.domain, &request).await?;
    let excess = exports[0].changes.as_ref().unwrap().excess.clone();
    let all = disksnap_core::StopExports::All;
    scene.dispatcher.stop_exports(&scene.domain, &all).await.unwrap();
    Ok(excess)
}

#[tokio::test]
async fn the_checkpoint_of_a_comparing_method_is_the_snapshot() {
    let (scene, tracker) = scene();
    let made = scene
        .create(&marked("mon", &[("vda", "a"), ("vdb", "b")]))
        .await
        .unwrap();
    let set = scene.catalog.checkpoints(&scene.domain.id).await.unwrap();
    assert_eq!(set[0].disk("vda").unwrap().mark, Mark::Pinned(made.id));
    assert_eq!(set[0].disk("vdb").unwrap().mark, Mark::Bitmap("mon".to_owned()));
    assert_eq!(
        (tracker.of("vda"), tracker.of("vdb")),
        (vec![], vec!["mon*".to_owned()])
    );
    let found = scene.dispatcher.validate(&scene.domain).await.unwrap();
    assert!(found.is_sound() && found.full.is_empty(), "{found:?}");
}

#[tokio::test]
async fn deleting_it_keeps_what_the_checkpoint_is_and_removing_that_frees_it() {
    let (scene, _) = scene();
    let both = [("vda", "a"), ("vdb", "b")];
    scene.create(&marked("mon", &both)).await.unwrap();
    scene.log.take();
    let deletion = delete(&scene, "mon").await;
    assert_eq!(
        (deletion.deleted, deletion.kept_for),
        (Deleted::Now, vec![checkpoint("mon")])
    );
    assert_eq!(scene.of_methods(), ["b.delete"]);
    assert!(names(&scene).await.is_empty());
    let again = delete(&scene, "mon").await;
    assert_eq!(again.deleted, Deleted::Before);
    // The name and the alias are free.
    scene.create(&named("mon", [by("vda", "a")])).await.unwrap();
    let left = kept(&scene).await;
    assert_eq!((left.len(), left[0].disks.len(), left[0].units.len()), (1, 1, 1));
    assert!(scene.dispatcher.validate(&scene.domain).await.unwrap().is_sound());
    scene.log.take();
    remove(&scene, "mon").await.unwrap();
    assert_eq!(scene.of_methods(), ["tracker.end vdb mon", "a.delete vda"]);
    assert!(kept(&scene).await.is_empty());
    assert_eq!(names(&scene).await, ["mon"]);
    assert!(scene.catalog.intents(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn removing_the_checkpoint_first_leaves_an_ordinary_snapshot() {
    let (scene, _) = scene();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    scene.log.take();
    remove(&scene, "mon").await.unwrap();
    assert!(scene.of_methods().is_empty());
    assert_eq!(names(&scene).await, ["mon"]);
    let deletion = delete(&scene, "mon").await;
    assert!(deletion.kept_for.is_empty());
    assert_eq!(scene.of_methods(), ["a.delete vda"]);
    assert!(kept(&scene).await.is_empty());
}

#[tokio::test]
async fn what_could_not_be_freed_goes_with_the_next_act() {
    let (scene, _) = scene();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    delete(&scene, "mon").await;
    scene.log.fail("a.delete vda", 1);
    remove(&scene, "mon").await.unwrap();
    assert!(
        scene.catalog.intents(None).await.unwrap().is_empty(),
        "nothing stands against the next act"
    );
    assert!(
        scene
            .catalog
            .checkpoints(&scene.domain.id)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(kept(&scene).await.len(), 1);
    scene.create(&named("tue", [by("vda", "a")])).await.unwrap();
    assert!(kept(&scene).await.is_empty());
}

#[tokio::test]
async fn a_kill_between_the_two_ends_leaves_nothing_for_good() {
    let (scene, _) = scene();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    delete(&scene, "mon").await;
    // As the checkpoint's end alone would leave it.
    let gone = [disksnap_core::Change::RemoveCheckpoint(checkpoint("mon"))];
    let nil = uuid::Uuid::nil();
    scene.catalog.settle(nil, &scene.domain.id, &gone).await.unwrap();
    scene.dispatcher.validate(&scene.domain).await.unwrap();
    assert!(kept(&scene).await.is_empty());
}

#[tokio::test]
async fn what_changed_is_told_by_comparing_also_with_a_deleted_one() {
    let (scene, tracker) = scene();
    let mon = scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    let tue = scene.create(&marked("tue", &[("vda", "a")])).await.unwrap();
    let wed = scene.create(&named("wed", [by("vda", "a")])).await.unwrap();
    assert!(tracker.of("vda").is_empty());
    let alias = |snapshot: &Snapshot| snapshot.disk("vda").unwrap().alias.0.clone();
    let told = |from: &Snapshot, to: &Snapshot| Some(format!("{} to {}", alias(from), alias(to)));
    assert_eq!(exported(&scene, &wed, "mon").await.unwrap(), told(&mon, &wed));
    assert_eq!(exported(&scene, &wed, "tue").await.unwrap(), told(&tue, &wed));
    delete(&scene, "mon").await;
    assert_eq!(exported(&scene, &wed, "mon").await.unwrap(), told(&mon, &wed));
    assert_eq!(
        exported(&scene, &tue, "tue").await.unwrap_err().kind(),
        ErrorKind::Invalid
    );
    let removed = remove(&scene, "mon").await;
    assert!(removed.is_ok());
    assert_eq!(
        exported(&scene, &wed, "mon").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(exported(&scene, &wed, "tue").await.unwrap(), told(&tue, &wed));
}

#[tokio::test]
async fn a_bitmap_from_before_tells_more_where_the_method_changes() {
    let (scene, tracker) = scene();
    scene.create(&marked("mon", &[("vda", "b")])).await.unwrap();
    scene.create(&marked("tue", &[("vda", "a")])).await.unwrap();
    assert_eq!(tracker.of("vda"), ["mon*"]);
    let wed = scene.create(&marked("wed", &[("vda", "b")])).await.unwrap();
    assert_eq!(tracker.of("vda"), ["mon", "wed*"]);
    let excess = exported(&scene, &wed, "tue").await.unwrap().unwrap();
    assert!(excess.contains("'mon'"), "{excess}");
    assert!(scene.log.take().contains(&"tracker.unite mon".to_owned()));
    assert_eq!(exported(&scene, &wed, "mon").await.unwrap(), None);
    // The bitmap of the last goes over to the bitmap before, not to the kept snapshot.
    remove(&scene, "wed").await.unwrap();
    assert_eq!(tracker.of("vda"), ["mon*"]);
    remove(&scene, "tue").await.unwrap();
    assert_eq!(tracker.of("vda"), ["mon*"]);
}

#[tokio::test]
async fn a_method_that_cannot_compare_says_so() {
    let (scene, _) = scene();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    let tue = scene.create(&named("tue", [by("vda", "b")])).await.unwrap();
    let error = exported(&scene, &tue, "mon").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.next_step().unwrap().contains("by the method"), "{error}");
}

#[tokio::test]
async fn one_that_cannot_be_used_now_is_told_and_kept() {
    let a = FakeMethod::new("a", Plan::Host).comparing();
    let health = a.health();
    let (scene, _) = Scene::new(RunState::Running, [a]).tracked();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    delete(&scene, "mon").await;
    let tue = scene.create(&named("tue", [by("vda", "a")])).await.unwrap();
    *health.lock().unwrap() = Health::Broken("the volume is not active".to_owned());
    let found = scene.dispatcher.validate(&scene.domain).await.unwrap();
    assert_eq!(found.marks[0].verdict, MarkVerdict::Unreachable);
    let dropped = scene.dispatcher.drop_broken(&scene.domain, false).await.unwrap();
    assert!(dropped.marks.is_empty());
    assert_eq!(kept(&scene).await.len(), 1);
    *health.lock().unwrap() = Health::Active;
    assert!(exported(&scene, &tue, "mon").await.unwrap().is_some());
}

#[tokio::test]
async fn the_same_request_again_does_not_touch_what_is_kept() {
    let (scene, _) = scene();
    let request = marked("mon", &[("vda", "a")]);
    scene.create(&request).await.unwrap();
    delete(&scene, "mon").await;
    scene.log.take();
    let error = scene.create(&request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(scene.of_methods().is_empty());
    assert_eq!(kept(&scene).await.len(), 1);
}

#[tokio::test]
async fn one_that_is_gone_is_told_and_dropped_alone() {
    let health;
    let (scene, tracker) = {
        let a = FakeMethod::new("a", Plan::Host).comparing();
        health = a.health();
        Scene::new(RunState::Running, [a, FakeMethod::new("b", Plan::Atomic)]).tracked()
    };
    scene.create(&marked("mon", &[("vda", "b")])).await.unwrap();
    scene.create(&marked("tue", &[("vda", "a")])).await.unwrap();
    let wed = scene.create(&marked("wed", &[("vda", "b")])).await.unwrap();
    *health.lock().unwrap() = Health::Gone("it was removed".to_owned());
    let found = scene.dispatcher.validate(&scene.domain).await.unwrap();
    let verdicts: Vec<_> = found.marks.iter().map(|mark| mark.verdict).collect();
    assert_eq!(verdicts, [MarkVerdict::Ok, MarkVerdict::Missing, MarkVerdict::Ok]);
    assert!(found.full.is_empty());
    let dropped = scene.dispatcher.drop_broken(&scene.domain, false).await.unwrap();
    assert_eq!(dropped.checkpoints, [checkpoint("tue")]);
    assert_eq!(tracker.of("vda"), ["mon", "wed*"]);
    assert_eq!(exported(&scene, &wed, "mon").await.unwrap(), None);
}

#[tokio::test]
async fn a_lost_bitmap_takes_no_kept_snapshot_with_it() {
    let (scene, tracker) = scene();
    scene.create(&marked("mon", &[("vda", "a")])).await.unwrap();
    scene.create(&marked("tue", &[("vda", "b")])).await.unwrap();
    tracker.lose("vda", "tue");
    let wed = scene.create(&marked("wed", &[("vda", "a")])).await.unwrap();
    let dropped = scene.dispatcher.drop_broken(&scene.domain, false).await.unwrap();
    assert_eq!(dropped.checkpoints, [checkpoint("tue")]);
    assert!(dropped.full.is_empty());
    assert!(exported(&scene, &wed, "mon").await.unwrap().is_some());
}

#[tokio::test]
async fn a_gap_that_only_a_kept_snapshot_saw_is_not_forgotten() {
    let (scene, tracker) = scene();
    scene.create(&marked("mon", &[("vda", "b")])).await.unwrap();
    tracker.stop("vda", "mon");
    scene.create(&marked("tue", &[("vda", "a")])).await.unwrap();
    tracker.record("vda", "mon");
    let wed = scene.create(&marked("wed", &[("vda", "b")])).await.unwrap();
    assert_eq!(
        exported(&scene, &wed, "mon").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    assert_eq!(
        exported(&scene, &wed, "tue").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
    remove(&scene, "tue").await.unwrap();
    assert_eq!(
        exported(&scene, &wed, "mon").await.unwrap_err().kind(),
        ErrorKind::Broken
    );
}

#[tokio::test]
async fn a_set_without_the_kept_snapshots_leaves_them_and_forgetting_frees_them() {
    let (scene, _) = scene();
    scene
        .create(&marked("mon", &[("vda", "a"), ("vdb", "b")]))
        .await
        .unwrap();
    delete(&scene, "mon").await;
    // As libvirt's documents have it: nothing of vda.
    let mut set = scene.catalog.checkpoints(&scene.domain.id).await.unwrap();
    set[0].disks.retain(|disk| disk.target == "vdb");
    let how = Redefine::default();
    let done = scene.dispatcher.redefine(&scene.domain, set, how).await.unwrap();
    assert_eq!(done.kept, [checkpoint("mon")]);
    assert_eq!(kept(&scene).await.len(), 1);
    let mut set = scene.catalog.checkpoints(&scene.domain.id).await.unwrap();
    set[0].disks.retain(|disk| disk.target == "vdb");
    let how = Redefine { replace: true, ..how };
    scene.dispatcher.redefine(&scene.domain, set, how).await.unwrap();
    assert_eq!(kept(&scene).await.len(), 1);
    scene.dispatcher.forget_checkpoints(&scene.domain).await.unwrap();
    assert!(kept(&scene).await.is_empty());
}
