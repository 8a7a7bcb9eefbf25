//! The window: in which order the guest is guarded, frozen, paused and let go, also when something fails.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use std::time::Duration;

use disksnap_core::{
    Consistency, Effect, ErrorKind, Quiesce, RunState, SnapshotRequest, Verdict, WindowReport,
};
use scene::{FakeMethod, Plan, Scene, by, by_two_methods, named};

fn running(plan: Plan) -> Scene {
    Scene::new(
        RunState::Running,
        [FakeMethod::new("a", plan), FakeMethod::new("b", plan)],
    )
}

fn quiesced(quiesce: Quiesce) -> SnapshotRequest {
    SnapshotRequest {
        quiesce,
        ..by_two_methods("s")
    }
}

const AROUND: [&str; 6] = ["arm", "freeze", "pause", "resume", "thaw", "disarm"];

/// The events of the window itself.
fn around(events: &[String]) -> Vec<&str> {
    let of_window = |e: &&str| AROUND.contains(e) || *e == "guard acts";
    events.iter().map(String::as_str).filter(of_window).collect()
}

#[tokio::test]
async fn everything_is_prepared_before_and_completed_after() {
    let scene = running(Plan::Host);
    scene.create(&quiesced(Quiesce::Require)).await.unwrap();
    let order = [
        "a.prepare",
        "b.prepare",
        "arm",
        "freeze",
        "pause",
        "flush node-vda node-vdb",
        "a.take",
        "b.take",
        "resume",
        "thaw",
        "disarm",
        "a.complete",
        "b.complete",
    ];
    assert_eq!(scene.log.take(), order);
}

#[tokio::test]
async fn one_atomic_command_needs_no_pause_and_no_guard() {
    let scene = running(Plan::Atomic);
    let snapshot = scene.create(&by_two_methods("s")).await.unwrap();
    let events = scene.log.take();
    let takes: Vec<&String> = events.iter().filter(|e| e.starts_with("monitor")).collect();
    assert_eq!(takes, [r#"monitor transaction {"actions":["a vda","b vdb"]}"#]);
    assert!(around(&events).is_empty(), "{events:?}");
    assert_eq!(snapshot.consistency, Consistency::Crash);
    assert_eq!((snapshot.window.frozen_us, snapshot.window.paused_us), (0, 0));
}

#[tokio::test]
async fn an_atomic_command_beside_another_take_needs_the_pause() {
    let methods = [
        FakeMethod::new("a", Plan::Atomic),
        FakeMethod::new("b", Plan::Host),
    ];
    let scene = Scene::new(RunState::Running, methods);
    scene.create(&by_two_methods("s")).await.unwrap();
    assert_eq!(around(&scene.log.take()), ["arm", "pause", "resume", "disarm"]);
}

#[tokio::test]
async fn who_does_not_run_is_not_paused() {
    for state in [RunState::Off, RunState::Stopped("prelaunch".to_owned())] {
        let scene = Scene::new(state, [FakeMethod::new("a", Plan::Host)]);
        let snapshot = scene.create(&named("s", [by("vda", "a")])).await.unwrap();
        assert!(around(&scene.log.take()).is_empty());
        assert_eq!(snapshot.window.paused_us, 0);
    }
}

#[tokio::test]
async fn a_domain_that_is_off_says_so() {
    let scene = Scene::new(RunState::Off, [FakeMethod::new("a", Plan::Host)]);
    let snapshot = scene.create(&named("s", [by("vda", "a")])).await.unwrap();
    assert_eq!(snapshot.consistency, Consistency::Inactive);
}

#[tokio::test]
async fn a_storage_daemon_cannot_be_made_to_stand_still() {
    let scene = Scene::new(
        RunState::Storage,
        [
            FakeMethod::new("a", Plan::Paused),
            FakeMethod::new("b", Plan::Paused),
        ],
    );
    let error = scene.create(&by_two_methods("s")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unsupported, Effect::RolledBack)
    );
    assert!(around(&scene.log.take()).is_empty());
    // One act alone is one instant without a pause.
    scene.create(&named("s", [by("vda", "a")])).await.unwrap();
}

#[tokio::test]
async fn a_migrating_domain_is_left_alone() {
    let scene = Scene::new(
        RunState::Migrating("active".to_owned()),
        [FakeMethod::new("a", Plan::Host)],
    );
    let error = scene.create(&named("s", [by("vda", "a")])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(scene.log.take().is_empty());
}

#[tokio::test]
async fn the_guard_is_told_what_to_undo() {
    let scene = running(Plan::Host);
    let request = SnapshotRequest {
        deadline: Duration::from_secs(3),
        ..quiesced(Quiesce::Try)
    };
    scene.create(&request).await.unwrap();
    let watch = scene.connector.watches()[0].clone();
    assert!(watch.resume && watch.thaw);
    assert_eq!(watch.deadline, Duration::from_secs(3));
}

#[tokio::test]
async fn without_a_guard_nothing_is_paused() {
    let scene = running(Plan::Host);
    scene.log.fail("arm", 1);
    let error = scene.create(&by_two_methods("s")).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    assert_eq!(around(&scene.log.take()), ["arm"]);
}

#[tokio::test]
async fn a_failed_take_lets_the_guest_go() {
    let scene = running(Plan::Host);
    scene.log.fail("b.take", 1);
    let error = scene.create(&quiesced(Quiesce::Require)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Refused, Effect::RolledBack)
    );
    assert_eq!(around(&scene.log.take()), AROUND);
}

/// `pause` flushes too, and does not tell.
#[tokio::test]
async fn what_cannot_be_flushed_is_not_taken() {
    for state in [RunState::Running, RunState::Stopped("paused".to_owned())] {
        let methods = [
            FakeMethod::new("a", Plan::Host),
            FakeMethod::new("b", Plan::Paused),
        ];
        let scene = Scene::new(state.clone(), methods);
        scene.log.fail("flush node-vda", 1);
        let error = scene.create(&by_two_methods("s")).await.unwrap_err();
        assert_eq!(error.effect(), Effect::RolledBack);
        let events = scene.log.take();
        assert!(events.contains(&"flush node-vda".to_owned()), "{events:?}");
        assert!(
            !events.iter().any(|e| e == "a.take" || e.starts_with("monitor")),
            "{events:?}"
        );
        assert_eq!(events.contains(&"resume".to_owned()), state == RunState::Running);
    }
}

/// What the hypervisor takes itself sees what is not yet flushed, and a domain that is off has nothing to flush.
#[tokio::test]
async fn only_what_is_taken_below_a_guest_is_flushed() {
    let scenes = [
        running(Plan::Atomic),
        running(Plan::Paused),
        Scene::new(RunState::Off, [FakeMethod::new("a", Plan::Host)]),
    ];
    for scene in scenes {
        scene.create(&named("s", [by("vda", "a")])).await.unwrap();
        let events = scene.log.take();
        assert!(!events.iter().any(|e| e.starts_with("flush")), "{events:?}");
    }
}

#[tokio::test]
async fn a_failed_pause_is_undone_for_it_may_have_been_done() {
    let scene = running(Plan::Host);
    scene.log.fail("pause", 1);
    scene.create(&quiesced(Quiesce::Require)).await.unwrap_err();
    let events = scene.log.take();
    assert_eq!(around(&events), AROUND);
    assert!(!events.contains(&"a.take".to_owned()));
}

#[tokio::test]
async fn letting_go_is_insisted_on() {
    for event in ["resume", "thaw"] {
        let scene = running(Plan::Host);
        scene.log.fail(event, 1);
        scene.create(&quiesced(Quiesce::Require)).await.unwrap();
        let events = scene.log.take();
        assert_eq!(events.iter().filter(|e| *e == event).count(), 2);
        assert!(events.contains(&"disarm".to_owned()));
    }
}

/// The one thing that must never happen is a guard let go over a guest that stands.
#[tokio::test]
async fn where_letting_go_fails_the_guard_stays_armed() {
    for event in ["resume", "thaw"] {
        let scene = running(Plan::Host);
        scene.log.fail(event, 9);
        scene.create(&quiesced(Quiesce::Require)).await.unwrap_err();
        let events = scene.log.take();
        assert!(events.contains(&"guard acts".to_owned()), "{events:?}");
        assert!(!events.contains(&"disarm".to_owned()), "{events:?}");
    }
}

#[tokio::test]
async fn a_guard_that_had_to_act_spoils_the_snapshot() {
    let scene = running(Plan::Host);
    scene.connector.set_verdict(Verdict::Fired);
    let error = scene.create(&by_two_methods("s")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::RolledBack)
    );
    let events = scene.of_methods();
    assert_eq!(
        events[events.len() - 2..],
        ["b.abort prepared", "a.abort prepared"]
    );
    assert!(!events.contains(&"a.complete".to_owned()));
}

#[tokio::test]
async fn required_quiescence_or_no_snapshot() {
    let scene = running(Plan::Atomic);
    scene.log.fail("freeze", 1);
    scene.create(&quiesced(Quiesce::Require)).await.unwrap_err();
    let events = scene.log.take();
    assert_eq!(around(&events), ["arm", "freeze", "disarm"]);
    assert!(!events.iter().any(|e| e.starts_with("monitor")), "{events:?}");
    let snapshot = scene.create(&quiesced(Quiesce::Require)).await.unwrap();
    let expected = Consistency::Filesystem {
        filesystems: 3,
        mountpoints: Vec::new(),
    };
    assert_eq!(snapshot.consistency, expected);
    assert_ne!(snapshot.window, WindowReport::default());
}

#[tokio::test]
async fn tried_quiescence_says_whether_it_came_about() {
    let scene = running(Plan::Atomic);
    scene.log.fail("freeze", 1);
    let snapshot = scene.create(&quiesced(Quiesce::Try)).await.unwrap();
    assert!(matches!(snapshot.consistency, Consistency::Unquiesced { .. }));
    assert_eq!(snapshot.warnings.len(), 1, "{:?}", snapshot.warnings);
    assert_eq!(around(&scene.log.take()), ["arm", "freeze", "disarm"]);
}

#[tokio::test]
async fn a_freeze_of_unknown_effect_is_thawed() {
    for quiesce in [Quiesce::Try, Quiesce::Require] {
        let scene = running(Plan::Atomic);
        scene.log.fail_leaving("freeze", 1, Effect::Unknown);
        let created = scene.create(&quiesced(quiesce)).await;
        assert_eq!(created.is_ok(), quiesce == Quiesce::Try);
        assert_eq!(around(&scene.log.take()), ["arm", "freeze", "thaw", "disarm"]);

        let scene = running(Plan::Atomic);
        scene.log.fail_leaving("freeze", 1, Effect::Unknown);
        scene.log.fail("thaw", 9);
        scene.create(&quiesced(quiesce)).await.unwrap_err();
        assert!(scene.log.take().contains(&"guard acts".to_owned()));
    }
}

#[tokio::test]
async fn nobody_can_freeze_who_does_not_run() {
    for (state, kind) in [
        (RunState::Storage, ErrorKind::Unavailable),
        (RunState::Stopped("paused".to_owned()), ErrorKind::Unavailable),
    ] {
        let scene = Scene::new(state, [FakeMethod::new("a", Plan::Atomic)]);
        let request = |quiesce| SnapshotRequest {
            quiesce,
            ..named("s", [by("vda", "a")])
        };
        let error = scene.create(&request(Quiesce::Require)).await.unwrap_err();
        assert_eq!(error.kind(), kind);
        let snapshot = scene.create(&request(Quiesce::Try)).await.unwrap();
        assert!(matches!(snapshot.consistency, Consistency::Unquiesced { .. }));
        assert!(around(&scene.log.take()).is_empty());
    }
}

#[tokio::test]
async fn what_was_taken_is_taken_back_newest_first() {
    let scene = running(Plan::Paused);
    scene.log.fail(r#"monitor step "b vdb""#, 1);
    let error = scene.create(&by_two_methods("s")).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    let events = scene.log.take();
    let commands: Vec<&String> = events.iter().filter(|e| e.starts_with("monitor")).collect();
    let expected = [
        r#"monitor step "a vda""#,
        r#"monitor step "b vdb""#,
        r#"monitor unstep "a vda""#,
    ];
    assert_eq!(commands, expected);
    let undone = events.iter().position(|e| e.starts_with("monitor unstep"));
    assert!(
        undone < events.iter().position(|e| e == "resume"),
        "undone while the guest stands"
    );
}

/// A take that never ends must not keep the guest.
#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_take_that_hangs() {
    let scene = Scene::new(RunState::Running, [FakeMethod::new("a", Plan::Host).hanging()]);
    let error = scene.create(&named("s", [by("vda", "a")])).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::RolledBack)
    );
    assert_eq!(around(&scene.log.take()), ["arm", "pause", "resume", "disarm"]);
}
