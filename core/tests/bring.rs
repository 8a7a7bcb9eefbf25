//! Merges and reverts: the order of calls, what is recorded, and what a failure or a kill leaves.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod scene;

use std::ops::ControlFlow;
use std::time::Duration;

use disksnap_core::{
    Altered, Catalog, Command, Deleted, Effect, ErrorKind, JobUnit, MergeInto, MergeOptions, Progress,
    RecoveredHow, Result, RunState,
};
use serde_json::json;

use scene::standing::{Merges, overlay};
use scene::{FakeMethod, Plan, Scene, by, by_two_methods, disk, name_of, named};

const LONG: Duration = Duration::from_mins(1);

/// `a` puts the disk on an overlay, `b` does not.
fn scene(state: RunState) -> (Scene, Merges) {
    let merges = Merges::default();
    let a = FakeMethod::new("a", Plan::Atomic).stood_on(&merges);
    (Scene::new(state, [a, FakeMethod::new("b", Plan::Atomic)]), merges)
}

fn on(units: &[JobUnit]) -> ControlFlow<()> {
    assert!(!units.is_empty());
    ControlFlow::Continue(())
}

fn of(targets: &[&str]) -> MergeOptions {
    MergeOptions {
        targets: targets.iter().map(|&t| t.to_owned()).collect(),
        deadline: LONG,
        ..MergeOptions::default()
    }
}

async fn merge(scene: &Scene, targets: &[&str]) -> Result<Altered> {
    let name = name_of("s");
    let dispatcher = &scene.dispatcher;
    dispatcher
        .merge(&scene.domain, &name, &of(targets), &mut on)
        .await
}

async fn names(scene: &Scene) -> Vec<String> {
    let all = scene.catalog.snapshots(&scene.domain.id).await.unwrap();
    all.into_iter().map(|s| s.name.to_string()).collect()
}

#[tokio::test]
async fn a_merge_ends_under_guard_and_gives_up_only_its_disk() {
    let (scene, _) = scene(RunState::Running);
    scene.create(&by_two_methods("s")).await.unwrap();
    let refused = merge(&scene, &[]).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    scene.log.take();
    let altered = merge(&scene, &["vda"]).await.unwrap();
    let events = scene.log.take();
    assert_eq!(
        events,
        ["a.start vda", "arm", "a.finish vda", "disarm", "a.conclude vda"]
    );
    let watch = scene.connector.watches().pop().unwrap();
    assert_eq!(watch.release, [Command::new("release", json!("vda"))]);
    assert!(!watch.resume && !watch.thaw);
    assert_eq!((altered.ended, altered.gone), (vec!["vda".to_owned()], false));
    assert_eq!(altered.disks, [disk("vda")]);
    let left = scene.dispatcher.show(&scene.domain, &name_of("s")).await.unwrap();
    assert_eq!(left.snapshot.disks.len(), 1);
    assert_eq!(left.snapshot.disk("vdb").unwrap().unit, 0);
    assert!(scene.catalog.intents(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn nothing_is_guarded_while_the_domain_is_off() {
    let (scene, _) = scene(RunState::Off);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    // The document says where the disk is now; one from before is refused.
    let stale = merge(&scene, &[]).await.unwrap_err();
    assert_eq!(stale.kind(), ErrorKind::Invalid);
    let mut now = scene.domain.clone();
    for disk in scene.dispatcher.outdated(&scene.domain).await.unwrap() {
        now.replace_disk(disk);
    }
    assert_ne!(now, scene.domain);
    scene.log.take();
    let merged = scene
        .dispatcher
        .merge(&now, &name_of("s"), &of(&[]), &mut on)
        .await
        .unwrap();
    assert!(merged.gone);
    assert_eq!(
        scene.log.take(),
        ["a.start vda", "a.finish vda", "a.conclude vda"]
    );
    assert!(names(&scene).await.is_empty());
}

/// A unit whose merge has begun no longer holds its instant: all are asked before.
#[tokio::test]
async fn what_is_refused_for_one_disk_is_begun_for_none() {
    let (scene, _) = scene(RunState::Running);
    scene
        .create(&named("s", [by("vda", "a"), by("vdb", "a")]))
        .await
        .unwrap();
    scene.log.take();
    scene.log.fail("a.check vdb", 2);
    let merged = merge(&scene, &[]).await.unwrap_err();
    let deleted = scene.dispatcher.delete(&scene.domain, &name_of("s")).await;
    for error in [merged, deleted.unwrap_err()] {
        assert_eq!(error.effect(), Effect::None, "{error:?}");
        assert!(error.context().any(|told| told == ("disk", "vdb")), "{error}");
    }
    assert!(scene.of_methods().is_empty());
    assert_eq!(scene.dispatcher.recover(None).await.unwrap(), []);
    assert!(merge(&scene, &[]).await.unwrap().gone);
}

#[tokio::test]
async fn a_stale_document_of_a_domain_that_is_off_is_refused_everywhere() {
    let (scene, _) = scene(RunState::Off);
    let first = named("s", [by("vda", "a")]);
    scene.create(&first).await.unwrap();
    let again = named("t", [by("vda", "b")]);
    let refusals = [
        scene.create(&again).await.map(drop).unwrap_err(),
        scene
            .dispatcher
            .plan(&scene.domain, &again)
            .await
            .map(drop)
            .unwrap_err(),
        scene
            .dispatcher
            .revert(&scene.domain, &name_of("s"), &[])
            .await
            .map(drop)
            .unwrap_err(),
    ];
    for error in refusals {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.next_step().unwrap().contains("domain update"), "{error:?}");
    }
    // Another disk is not concerned, and a domain that runs knows its disks itself.
    scene.create(&named("u", [by("vdb", "b")])).await.unwrap();
    scene.connector.set_state(RunState::Running);
    scene.create(&again).await.unwrap();
    let outdated = scene.dispatcher.outdated(&scene.domain).await.unwrap();
    assert_eq!(outdated, [overlay("vda", first.id)]);
}

#[tokio::test]
async fn what_fails_leaves_the_snapshot_and_says_so() {
    for (fails, kind) in [
        ("a.start vda", ErrorKind::Refused),
        ("a.finish vda", ErrorKind::Refused),
    ] {
        let (scene, _) = scene(RunState::Running);
        scene.create(&named("s", [by("vda", "a")])).await.unwrap();
        scene.log.fail(fails, 1);
        let error = merge(&scene, &[]).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (kind, Effect::RolledBack),
            "{fails}"
        );
        assert_eq!(names(&scene).await, ["s"]);
        assert!(scene.catalog.intents(None).await.unwrap().is_empty());
        assert!(scene.log.take().contains(&"a.cancel vda".to_owned()), "{fails}");
        merge(&scene, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn a_method_that_merges_one_way_only_refuses_the_other() {
    let (scene, _) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    let up = MergeOptions {
        into: MergeInto::Overlay,
        ..of(&[])
    };
    let name = name_of("s");
    let merged = scene.dispatcher.merge(&scene.domain, &name, &up, &mut on).await;
    let error = merged.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(scene.catalog.intents(None).await.unwrap().is_empty());
    merge(&scene, &[]).await.unwrap();
}

#[tokio::test]
async fn a_merge_that_fails_by_itself_tells_why() {
    let (scene, merges) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    let failed = Progress::Failed("no space left on the base".to_owned());
    merges.lock().unwrap().insert("vda".to_owned(), failed);
    let error = merge(&scene, &[]).await.unwrap_err();
    assert!(error.to_string().contains("no space left on the base"), "{error}");
    assert_eq!(names(&scene).await, ["s"]);
}

#[tokio::test]
async fn a_watcher_that_breaks_off_cancels() {
    let (scene, merges) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    let running = Progress::Running { done: 1, total: 9 };
    merges.lock().unwrap().insert("vda".to_owned(), running.clone());
    let mut seen = Vec::new();
    let mut watcher = |units: &[JobUnit]| {
        seen.push(units[0].progress.clone());
        ControlFlow::Break(())
    };
    let name = name_of("s");
    let all = of(&[]);
    let merge = scene.dispatcher.merge(&scene.domain, &name, &all, &mut watcher);
    let error = merge.await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    assert_eq!(seen, [running]);
    assert!(merges.lock().unwrap().is_empty());
    assert_eq!(names(&scene).await, ["s"]);
}

#[tokio::test]
async fn while_a_merge_runs_others_are_told_and_can_cancel_it() {
    let (scene, merges) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    let running = Progress::Running { done: 1, total: 9 };
    merges.lock().unwrap().insert("vda".to_owned(), running.clone());
    let other = async {
        loop {
            let jobs = scene.dispatcher.jobs(None).await.unwrap();
            if let [job] = &jobs[..] {
                break job.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    let meddle = async {
        let job = other.await;
        assert!(job.driven);
        assert_eq!(job.units[0].progress, running);
        let deleted = scene.dispatcher.delete(&scene.domain, &name_of("s")).await;
        assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Busy);
        let reverted = scene.dispatcher.revert(&scene.domain, &name_of("s"), &[]).await;
        assert_eq!(reverted.unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(merge(&scene, &[]).await.unwrap_err().kind(), ErrorKind::Busy);
        scene.dispatcher.cancel_job(job.id).await.unwrap();
        job.id
    };
    let (merged, id) = tokio::join!(merge(&scene, &[]), meddle);
    let error = merged.unwrap_err();
    assert!(error.to_string().contains("cancelled"), "{error}");
    let gone = scene.dispatcher.cancel_job(id).await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
}

/// Lets a merge run until it is looked at, and drops it there, as a kill does.
async fn kill_while_running(scene: &Scene, merges: &Merges) {
    let running = Progress::Running { done: 1, total: 9 };
    merges.lock().unwrap().insert("vda".to_owned(), running);
    let begun = tokio::sync::Notify::new();
    let mut watcher = |_: &[JobUnit]| {
        begun.notify_one();
        ControlFlow::Continue(())
    };
    let name = name_of("s");
    let all = of(&[]);
    let merge = scene.dispatcher.merge(&scene.domain, &name, &all, &mut watcher);
    tokio::select! {
        merged = merge => panic!("{merged:?}"),
        () = begun.notified() => {}
    }
}

#[tokio::test]
async fn a_merge_whose_process_died_is_taken_up_again() {
    let (scene, merges) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    kill_while_running(&scene, &merges).await;
    let [before] = &scene.dispatcher.jobs(None).await.unwrap()[..] else {
        panic!("no job");
    };
    assert!(!before.driven);
    merges.lock().unwrap().insert("vda".to_owned(), Progress::Ready);
    scene.log.take();
    assert!(merge(&scene, &[]).await.unwrap().gone);
    assert!(!scene.log.take().contains(&"a.cancel vda".to_owned()));
}

#[tokio::test]
async fn a_merge_whose_process_died_is_cancelled_by_recover_and_kept_when_it_had_ended() {
    for ended in [false, true] {
        let (scene, merges) = scene(RunState::Running);
        scene.create(&named("s", [by("vda", "a")])).await.unwrap();
        kill_while_running(&scene, &merges).await;
        if ended {
            merges
                .lock()
                .unwrap()
                .insert("vda".to_owned(), Progress::Finished);
        }
        let recovered = scene.dispatcher.recover(None).await.unwrap();
        let expected = if ended {
            RecoveredHow::Finished
        } else {
            RecoveredHow::Undone
        };
        assert_eq!(recovered[0].how, expected);
        assert_eq!(names(&scene).await.is_empty(), ended);
        assert!(scene.dispatcher.recover(None).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_delete_merges_what_is_stood_on() {
    let (scene, _) = scene(RunState::Running);
    scene.create(&by_two_methods("s")).await.unwrap();
    scene.log.take();
    let deletion = scene
        .dispatcher
        .delete(&scene.domain, &name_of("s"))
        .await
        .unwrap();
    assert_eq!(deletion.deleted, Deleted::Now);
    assert_eq!(deletion.altered.disks, [disk("vda")]);
    let expected = ["a.start vda", "a.finish vda", "a.conclude vda", "b.delete"];
    assert_eq!(scene.of_methods(), expected);
    let again = scene
        .dispatcher
        .delete(&scene.domain, &name_of("s"))
        .await
        .unwrap();
    assert_eq!(again.deleted, Deleted::Before);
}

#[tokio::test]
async fn a_revert_tells_the_new_disk_and_its_peers_are_known() {
    let (scene, _) = scene(RunState::Running);
    scene
        .create(&named("s", [by("vda", "a"), by("vdb", "a")]))
        .await
        .unwrap();
    scene.create(&named("t", [by("vda", "a")])).await.unwrap();
    scene.log.take();
    let only = ["vda".to_owned()];
    let reverted = scene
        .dispatcher
        .revert(&scene.domain, &name_of("s"), &only)
        .await
        .unwrap();
    assert_eq!(scene.of_methods(), ["a.revert beside 2 vda"]);
    assert!(!reverted.gone && reverted.ended.is_empty());
    let now = scene.dispatcher.show(&scene.domain, &name_of("s")).await.unwrap();
    let recorded = now.snapshot.disk("vda").unwrap().modified_disk.clone();
    assert_eq!(recorded.as_ref(), reverted.disks.first());
    // What cannot go back is refused before anything is.
    scene
        .create(&named("mixed", [by("vda", "a"), by("vdb", "b")]))
        .await
        .unwrap();
    scene.log.take();
    let error = scene
        .dispatcher
        .revert(&scene.domain, &name_of("mixed"), &[])
        .await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(scene.of_methods().is_empty());
}

#[tokio::test]
async fn a_revert_that_stops_half_way_says_which_went_back() {
    let (scene, _) = scene(RunState::Running);
    scene
        .create(&named("s", [by("vda", "a"), by("vdb", "a")]))
        .await
        .unwrap();
    scene.log.fail("a.revert beside 1 vdb", 1);
    let name = name_of("s");
    let error = scene
        .dispatcher
        .revert(&scene.domain, &name, &[])
        .await
        .unwrap_err();
    assert_eq!(error.effect(), Effect::Unknown);
    assert!(error.next_step().unwrap().contains("vda went back"), "{error:?}");
    // A loss of the answer is another matter: the next act finishes it.
    scene
        .log
        .fail_leaving("a.revert beside 1 vdb", 1, Effect::Unknown);
    scene
        .dispatcher
        .revert(&scene.domain, &name, &[])
        .await
        .unwrap_err();
    let recovered = scene.dispatcher.recover(None).await.unwrap();
    assert_eq!(recovered[0].how, RecoveredHow::Finished);
}

#[tokio::test]
async fn a_broken_snapshot_does_not_go_back() {
    let merges = Merges::default();
    let a = FakeMethod::new("a", Plan::Atomic).stood_on(&merges);
    let health = a.health();
    let scene = Scene::new(RunState::Running, [a]);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    *health.lock().unwrap() = disksnap_core::Health::Broken("worn".to_owned());
    let error = scene.dispatcher.revert(&scene.domain, &name_of("s"), &[]).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Broken);
}

#[tokio::test]
async fn a_document_that_names_a_merged_overlay_is_brought_up_to_date() {
    let (scene, _) = scene(RunState::Running);
    let request = named("s", [by("vda", "a")]);
    scene.create(&request).await.unwrap();
    let mut old = scene.domain.clone();
    old.replace_disk(overlay("vda", request.id));
    merge(&scene, &[]).await.unwrap();
    assert_eq!(scene.dispatcher.outdated(&old).await.unwrap(), [disk("vda")]);
    assert!(scene.dispatcher.outdated(&scene.domain).await.unwrap().is_empty());
    // Off, the overlay that is no more is refused as the disk.
    scene.connector.set_state(RunState::Off);
    let error = scene.dispatcher.create(&old, &named("t", [by("vda", "b")])).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
    // A way that leads back to what the disk is now is forgotten.
    scene.connector.set_state(RunState::Running);
    let again = named("u", [by("vda", "a")]);
    scene.create(&again).await.unwrap();
    assert_eq!(
        scene.dispatcher.outdated(&old).await.unwrap(),
        [overlay("vda", again.id)]
    );
}

#[tokio::test]
async fn a_merge_that_fails_and_cannot_be_cancelled_tells_both_and_stays_for_recover() {
    let (scene, _) = scene(RunState::Running);
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    scene.log.fail("a.finish vda", 1);
    scene.log.fail("a.cancel vda", 1);
    let error = merge(&scene, &[]).await.unwrap_err();
    assert!(error.to_string().contains("a.finish vda fails"), "{error}");
    assert_eq!(error.effect(), Effect::Unknown);
    let failures: Vec<String> = error
        .rollback_failures()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(failures[0].contains("a.cancel vda fails"), "{failures:?}");
    let recovered = scene.dispatcher.recover(None).await.unwrap();
    assert_eq!(recovered[0].how, RecoveredHow::Undone);
    assert_eq!(names(&scene).await, ["s"]);
}
