//! Which disks, which method, which name; all of it or nothing.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use disksnap_core::{
    Act, Alias, Catalog, Deleted, DeviceKind, Disk, DiskChoice, Disks, Effect, ErrorKind, Fit, MethodChoice,
    RecoveredHow, RunState, SnapshotRequest, Why,
};
use scene::{FakeMethod, Plan, Scene, by, by_two_methods, choice, disk, name_of, named};

fn off(methods: impl IntoIterator<Item = FakeMethod>) -> Scene {
    Scene::new(RunState::Off, methods)
}

fn two() -> Scene {
    off([FakeMethod::new("a", Plan::Host), FakeMethod::new("b", Plan::Host)])
}

#[tokio::test]
async fn the_caller_wins_over_the_disk_and_the_disk_over_the_default() {
    let methods = [
        FakeMethod::new("a", Plan::Host),
        FakeMethod::new("b", Plan::Host),
        FakeMethod::new("c", Plan::Host).natural(),
    ];
    let mut scene = off(methods);
    scene.domain.disks.push(disk("vdc"));
    scene.domain.disks[0].method = Some(choice("a"));
    scene.domain.disks[1].method = Some(choice("a"));
    let request = named(
        "s",
        [by("vda", "b"), DiskChoice::new("vdb"), DiskChoice::new("vdc")],
    );
    let plan = scene.dispatcher.plan(&scene.domain, &request).await.unwrap();
    let chosen: Vec<_> = plan
        .disks
        .iter()
        .map(|d| (d.method.as_deref().unwrap(), d.why))
        .collect();
    assert_eq!(
        chosen,
        [("b", Why::Override), ("a", Why::Disk), ("c", Why::Default)]
    );
    assert!(scene.log.take().is_empty(), "a plan does nothing");
    let snapshot = scene.create(&request).await.unwrap();
    let chosen: Vec<_> = snapshot
        .disks
        .iter()
        .map(|d| (d.method.as_str(), d.why))
        .collect();
    assert_eq!(
        chosen,
        [("b", Why::Override), ("a", Why::Disk), ("c", Why::Default)]
    );
}

#[tokio::test]
async fn options_of_the_caller_win_over_those_of_the_disk() {
    let mut scene = two();
    let options = [("size", "1"), ("colour", "red")].into_iter().collect();
    scene.domain.disks[0].method = Some(MethodChoice {
        method: "a".to_owned(),
        options,
    });
    let mut wanted = DiskChoice::new("vda");
    wanted.options.push("size", "2");
    let plan = scene
        .dispatcher
        .plan(&scene.domain, &named("s", [wanted]))
        .await
        .unwrap();
    let options: Vec<_> = plan.disks[0].request.options.iter().collect();
    assert_eq!(options, [("colour", "red"), ("size", "2")]);
}

#[tokio::test]
async fn an_unfit_method_is_refused_by_name_and_never_chosen_by_default() {
    let scene = off([
        FakeMethod::new("a", Plan::Host).natural().unfit(),
        FakeMethod::new("b", Plan::Host),
    ]);
    let error = scene.create(&named("s", [by("vda", "a")])).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unsupported, Effect::None)
    );
    assert_eq!(error.provider(), Some("a"));
    let snapshot = scene.create(&named("s", [DiskChoice::new("vda")])).await.unwrap();
    assert_eq!(snapshot.disks[0].method, "b");
}

#[tokio::test]
async fn where_no_method_suits_the_plan_says_why() {
    let scene = off([FakeMethod::new("a", Plan::Host).unfit()]);
    let request = named("s", [DiskChoice::new("vda")]);
    let plan = scene.dispatcher.plan(&scene.domain, &request).await.unwrap();
    assert_eq!(plan.disks[0].method, None);
    assert!(matches!(plan.disks[0].probe.fit, Fit::Unfit { .. }));
    let error = scene.create(&request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(scene.of_methods().is_empty());
}

/// The one disk of five that is snapshotted unasked.
#[tokio::test]
async fn special_disks_are_left_out_unless_named() {
    let mut scene = two();
    let special = [
        (
            "hda",
            Disk {
                device: DeviceKind::Cdrom,
                ..disk("hda")
            },
        ),
        (
            "fda",
            Disk {
                device: DeviceKind::Floppy,
                ..disk("fda")
            },
        ),
        (
            "vdr",
            Disk {
                read_only: true,
                ..disk("vdr")
            },
        ),
        (
            "vds",
            Disk {
                shareable: true,
                ..disk("vds")
            },
        ),
        (
            "vde",
            Disk {
                source: None,
                ..disk("vde")
            },
        ),
    ];
    scene.domain.disks.truncate(1);
    scene
        .domain
        .disks
        .extend(special.iter().map(|(_, disk)| disk.clone()));
    let request = SnapshotRequest {
        name: Some(name_of("all")),
        ..SnapshotRequest::default()
    };
    let snapshot = scene.create(&request).await.unwrap();
    let targets: Vec<&str> = snapshot.disks.iter().map(|d| d.target.as_str()).collect();
    assert_eq!(targets, ["vda"]);
    let skipped: Vec<&str> = snapshot.skipped.iter().map(|s| s.target.as_str()).collect();
    assert_eq!(skipped, special.map(|(target, _)| target));
    let named_ones = ["hda", "fda", "vdr", "vds"].map(|target| by(target, "a"));
    let snapshot = scene.create(&named("named", named_ones)).await.unwrap();
    assert_eq!(snapshot.disks.len(), 4);
    let error = scene.create(&named("empty", [by("vde", "a")])).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Invalid,
        "an empty drive has nothing to snapshot"
    );
    scene.domain.disks.remove(0);
    let nothing = SnapshotRequest::default();
    assert_eq!(
        scene.create(&nothing).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

#[tokio::test]
async fn wrong_names_are_answered_with_near_ones() {
    let scene = two();
    let mut bad_option = by("vda", "a");
    bad_option.options.push("color", "red");
    let mut twice = by("vda", "a");
    twice.options.push("size", "1");
    twice.options.push("size", "2");
    let cases = [
        (vec![by("vdx", "a")], ErrorKind::NotFound, "vda"),
        (vec![by("vda", "aa")], ErrorKind::NotFound, "a, b"),
        (vec![bad_option], ErrorKind::Invalid, "colour, size"),
        (vec![by("vda", "a"), by("vda", "a")], ErrorKind::Invalid, ""),
        (vec![twice], ErrorKind::Invalid, ""),
    ];
    for (disks, kind, hint) in cases {
        let error = scene.create(&named("s", disks)).await.unwrap_err();
        assert_eq!((error.kind(), error.effect()), (kind, Effect::None), "{error}");
        assert!(error.next_step().unwrap_or_default().contains(hint), "{error:?}");
    }
    scene.create(&by_two_methods("nightly")).await.unwrap();
    let error = scene
        .dispatcher
        .show(&scene.domain, &name_of("nigthly"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.next_step().unwrap().contains("nightly"));
}

#[tokio::test]
async fn when_the_second_method_fails_the_first_is_undone() {
    let cases = [
        (
            "b.prepare",
            vec!["a.prepare", "b.prepare", "b.abort", "a.abort prepared"],
        ),
        (
            "b.take",
            vec![
                "a.prepare",
                "b.prepare",
                "a.take",
                "b.take",
                "b.abort prepared",
                "a.abort prepared",
            ],
        ),
        (
            "b.complete",
            vec![
                "a.prepare",
                "b.prepare",
                "a.take",
                "b.take",
                "a.complete",
                "b.complete",
                "b.abort prepared",
                "a.abort prepared",
            ],
        ),
    ];
    for (fault, order) in cases {
        let scene = two();
        scene.log.fail(fault, 1);
        let request = by_two_methods("s");
        let error = scene.create(&request).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Refused, Effect::RolledBack)
        );
        assert_eq!(error.provider(), Some("b"));
        assert_eq!(scene.of_methods(), order, "{fault}");
        assert!(scene.catalog.intents(None).await.unwrap().is_empty());
        assert!(scene.dispatcher.list(&scene.domain).await.unwrap().is_empty());
        scene.create(&request).await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_undo_is_told_and_recover_settles_it() {
    let scene = two();
    scene.log.fail("b.take", 1);
    scene.log.fail("a.abort prepared", 2);
    let error = scene.create(&by_two_methods("s")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, Effect::Unknown)
    );
    assert_eq!(error.rollback_failures().len(), 1);
    let intents = scene.catalog.intents(None).await.unwrap();
    assert!(matches!(intents[0].act, Act::Create { .. }));
    scene.log.take();
    let left = scene.dispatcher.recover(None).await.unwrap();
    assert!(matches!(left[0].how, RecoveredHow::Left(_)), "it fails once more");
    let undone = scene.dispatcher.recover(Some(&scene.domain.id)).await.unwrap();
    assert_eq!(undone[0].how, RecoveredHow::Undone);
    assert_eq!(scene.dispatcher.recover(None).await.unwrap(), []);
    assert!(scene.of_methods().iter().all(|e| e.ends_with("abort prepared")));
}

#[tokio::test]
async fn the_next_act_settles_what_a_failed_one_left() {
    let scene = two();
    scene.log.fail("b.take", 1);
    scene.log.fail("a.abort prepared", 1);
    scene.create(&by_two_methods("s")).await.unwrap_err();
    scene.log.take();
    scene.create(&by_two_methods("t")).await.unwrap();
    let events = scene.of_methods();
    assert_eq!(events[..3], ["b.abort prepared", "a.abort prepared", "a.prepare"]);
}

#[tokio::test]
async fn an_act_that_cannot_settle_what_was_left_is_refused() {
    let scene = two();
    scene.log.fail("b.take", 1);
    scene.log.fail("a.abort prepared", 9);
    scene.create(&by_two_methods("s")).await.unwrap_err();
    scene.log.take();
    scene.create(&by_two_methods("t")).await.unwrap_err();
    assert!(!scene.of_methods().contains(&"a.prepare".to_owned()));
}

#[tokio::test]
async fn a_name_in_use_is_refused_and_an_id_in_use_answered() {
    let scene = two();
    let request = by_two_methods("nightly");
    let first = scene.create(&request).await.unwrap();
    scene.log.take();
    let error = scene.create(&by_two_methods("nightly")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::AlreadyExists, Effect::None)
    );
    assert_eq!(scene.create(&request).await.unwrap(), first);
    assert!(scene.log.take().is_empty());
}

#[tokio::test]
async fn without_a_name_the_id_is_the_name() {
    let scene = two();
    let request = SnapshotRequest {
        name: None,
        ..by_two_methods("unused")
    };
    let snapshot = scene.create(&request).await.unwrap();
    assert_eq!(snapshot.name.as_str(), request.id.to_string());
}

#[tokio::test]
async fn aliases_of_two_snapshots_differ() {
    let mut scene = two();
    scene.domain.disks[1].alias = Some("virtio-disk1".to_owned());
    let mut all = Vec::new();
    for name in ["one", "two"] {
        let snapshot = scene.create(&by_two_methods(name)).await.unwrap();
        all.extend(snapshot.disks.into_iter().map(|d| d.alias));
    }
    let expected = [
        "vda-backup",
        "virtio-disk1-backup",
        "vda-backup2",
        "virtio-disk1-backup2",
    ];
    assert_eq!(all, expected.map(|a| Alias(a.to_owned())));
}

#[tokio::test]
async fn deleted_is_not_unknown() {
    let scene = two();
    scene.create(&by_two_methods("s")).await.unwrap();
    scene.log.take();
    let name = name_of("s");
    let delete = || scene.dispatcher.delete(&scene.domain, &name);
    assert_eq!(delete().await.unwrap().deleted, Deleted::Now);
    assert_eq!(scene.of_methods(), ["b.delete", "a.delete"]);
    assert_eq!(delete().await.unwrap().deleted, Deleted::Before);
    assert!(scene.of_methods().is_empty());
    let never = scene.dispatcher.delete(&scene.domain, &name_of("never")).await;
    assert_eq!(never.unwrap_err().kind(), ErrorKind::NotFound);
    // The name is free again, and means the new one.
    scene.create(&by_two_methods("s")).await.unwrap();
    assert_eq!(delete().await.unwrap().deleted, Deleted::Now);
}

#[tokio::test]
async fn a_failed_delete_is_finished_by_the_next_act() {
    let scene = two();
    scene.create(&by_two_methods("s")).await.unwrap();
    scene.log.fail("a.delete", 1);
    let error = scene
        .dispatcher
        .delete(&scene.domain, &name_of("s"))
        .await
        .unwrap_err();
    assert_eq!(error.effect(), Effect::Unknown);
    scene.log.take();
    let deleted = scene
        .dispatcher
        .delete(&scene.domain, &name_of("s"))
        .await
        .unwrap();
    assert_eq!(
        deleted.deleted,
        Deleted::Before,
        "what was left was finished first"
    );
    assert_eq!(scene.of_methods(), ["b.delete", "a.delete"]);
}

#[tokio::test]
async fn a_snapshot_is_as_good_as_its_weakest_part() {
    use disksnap_core::Health;
    let (a, b) = (FakeMethod::new("a", Plan::Host), FakeMethod::new("b", Plan::Host));
    let (of_a, of_b) = (a.health(), b.health());
    let scene = off([a, b]);
    scene.create(&by_two_methods("s")).await.unwrap();
    *of_b.lock().unwrap() = Health::Broken("full".to_owned());
    let shown = scene.dispatcher.show(&scene.domain, &name_of("s")).await.unwrap();
    assert_eq!(shown.health[0], Health::Active);
    assert_eq!(*shown.overall(), Health::Broken("full".to_owned()));
    *of_a.lock().unwrap() = Health::Gone("removed".to_owned());
    let shown = scene.dispatcher.list(&scene.domain).await.unwrap().remove(0);
    assert_eq!(*shown.overall(), Health::Gone("removed".to_owned()));
}

/// The real provider beside a fake one: a copy in memory is undone with the rest.
#[tokio::test]
async fn the_memory_method_is_undone_with_the_others() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = dir.path().join("vda.raw");
    std::fs::write(&image, vec![7; 1 << 16]).unwrap();
    let mut scene = two();
    scene.domain.disks[0].source = Some(disksnap_core::Source::File { file: image });
    let mut registry = disksnap_core::Registry::empty();
    registry
        .add(std::sync::Arc::new(disksnap_memory::Memory))
        .unwrap();
    registry
        .add(std::sync::Arc::new(
            FakeMethod::new("z", Plan::Host).writing_to(&scene.log),
        ))
        .unwrap();
    let catalog = std::sync::Arc::new(scene.catalog.clone());
    let dispatcher = disksnap_core::Dispatcher::new(registry, catalog, scene.connector.clone());
    let request = named("s", [by("vda", "memory"), by("vdb", "z")]);
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    for fault in ["z.prepare", "z.take", "z.complete"] {
        scene.log.fail(fault, 1);
        dispatcher.create(&scene.domain, &request).await.unwrap_err();
        assert_eq!(files(), 1, "{fault}");
    }
    dispatcher.create(&scene.domain, &request).await.unwrap();
    assert_eq!(files(), 2);
    dispatcher.delete(&scene.domain, &name_of("s")).await.unwrap();
    assert_eq!(files(), 1);
}

#[tokio::test]
async fn a_locked_domain_is_busy() {
    let scene = two();
    let catalog = scene.catalog.clone().with_patience(std::time::Duration::ZERO);
    let impatient = disksnap_core::Dispatcher::new(
        scene.dispatcher.registry().clone(),
        std::sync::Arc::new(catalog),
        scene.connector.clone(),
    );
    let lock = scene.catalog.lock(&scene.domain.id).await.unwrap();
    let error = impatient
        .create(&scene.domain, &by_two_methods("s"))
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Busy, Effect::None));
    assert!(scene.log.take().is_empty());
    drop(lock);
    impatient
        .create(&scene.domain, &by_two_methods("s"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_without_any_disk_is_invalid() {
    let scene = two();
    let request = SnapshotRequest {
        disks: Disks::Named(Vec::new()),
        ..SnapshotRequest::default()
    };
    assert_eq!(
        scene.create(&request).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );
}
