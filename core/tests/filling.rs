//! Filling a paused domain's disks: all lent or none, one filling at a time and nothing beside it, nothing left by a
//! start or an end that fails or is killed.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use disksnap_core::{
    Act, Catalog, DeviceKind, Effect, ErrorKind, FillEnd, FillEnded, FillHealth, FillRequest, FillStage,
    Filling, Listen, RecoveredHow, Result, RunState, ServedBy, StopExports, Tls,
};
use scene::{FakeMethod, Plan, Scene, by, disk, name_of, named};

struct Vm {
    scene: Scene,
}

impl Vm {
    /// Two disks that can be filled, and a CD-ROM.
    fn new() -> Self {
        let state = RunState::Stopped("prelaunch".to_owned());
        let mut scene = Scene::new(state, [FakeMethod::new("node", Plan::Atomic)]);
        let mut cdrom = disk("sda");
        cdrom.device = DeviceKind::Cdrom;
        scene.domain.disks.push(cdrom);
        Self { scene }
    }

    async fn start(&self, request: &FillRequest) -> Result<Filling> {
        self.scene
            .dispatcher
            .fill_start(&self.scene.domain, request)
            .await
    }

    async fn all(&self) -> Result<Filling> {
        self.start(&FillRequest::default()).await
    }

    async fn end(&self, end: FillEnd) -> Result<FillEnded> {
        self.scene.dispatcher.fill_end(&self.scene.domain, end).await
    }

    async fn health(&self) -> Option<FillHealth> {
        let filling = self.scene.dispatcher.filling(&self.scene.domain).await;
        filling.unwrap().map(|filling| filling.health)
    }

    fn set_state(&self, state: RunState) {
        self.scene.connector.set_state(state);
    }

    async fn nothing_is_left(&self) {
        assert_eq!(
            (self.scene.connector.lent(), self.scene.connector.served().len()),
            (0, 0)
        );
        assert_eq!(self.scene.catalog.intents(None).await.unwrap(), []);
        assert_eq!(
            self.scene.catalog.server(&self.scene.domain.id).await.unwrap(),
            None
        );
        assert_eq!(self.health().await, None);
    }

    /// What is written down, put back as a kill would have left it.
    async fn killed_at(&self, stage: FillStage) {
        let mut intent = self.scene.catalog.intents(None).await.unwrap().remove(0);
        if let Act::Fill { stage: was, .. } = &mut intent.act {
            *was = stage;
        }
        self.scene.catalog.intend(&intent).await.unwrap();
    }

    async fn recovered(&self) -> RecoveredHow {
        let mut recovered = self.scene.dispatcher.recover(None).await.unwrap();
        assert_eq!(recovered.len(), 1, "{recovered:?}");
        assert!(self.scene.dispatcher.recover(None).await.unwrap().is_empty());
        recovered.remove(0).how
    }
}

fn only(target: &str) -> FillRequest {
    FillRequest {
        targets: vec![target.to_owned()],
        ..FillRequest::default()
    }
}

#[tokio::test]
async fn all_are_lent_before_any_is_served_and_flushed_before_they_are_given_back() {
    let vm = Vm::new();
    let filling = vm.all().await.unwrap();
    assert_eq!(filling.skipped[0].reason, "a CD-ROM drive");
    assert_eq!(
        (filling.disks[1].target.as_str(), filling.disks[1].size),
        ("vdb", 1 << 20)
    );
    let began = [
        "look vda",
        "look vdb",
        "lend vda",
        "lend vdb",
        "start server unix:/run/vm.sock",
        "serve writable vda",
        "serve writable vdb",
    ];
    assert_eq!(vm.scene.log.take(), began);
    assert_eq!(vm.all().await.unwrap(), filling, "again is the same");
    assert_eq!(vm.health().await, Some(FillHealth::Open));
    assert!(vm.scene.dispatcher.recover(None).await.unwrap().is_empty());
    assert_eq!(vm.scene.log.take(), Vec::<String>::new());
    let ended = vm.end(FillEnd::StayPaused).await.unwrap();
    assert_eq!(
        (ended.disks, ended.resumed),
        (vec!["vda".to_owned(), "vdb".to_owned()], false)
    );
    let mut events = vm.scene.log.take();
    events.retain(|event| !event.starts_with("unserve"));
    assert_eq!(
        events,
        [
            "flush node-vda",
            "flush node-vdb",
            "give back vda",
            "give back vdb",
            "stop server"
        ]
    );
    vm.nothing_is_left().await;
    let again = vm.end(FillEnd::Resume).await.unwrap();
    assert_eq!(again.disks, Vec::<String>::new());
    assert!(!vm.scene.log.take().contains(&"resume".to_owned()));
}

#[tokio::test]
async fn a_start_that_fails_anywhere_leaves_nothing() {
    for event in [
        "look vdb",
        "lend vda",
        "lend vdb",
        "serve writable vda",
        "serve writable vdb",
    ] {
        let vm = Vm::new();
        vm.scene.log.fail(event, 1);
        let error = vm.all().await.unwrap_err();
        let effect = if event.starts_with("look") {
            Effect::None
        } else {
            Effect::RolledBack
        };
        assert_eq!(error.effect(), effect, "{event}");
        vm.nothing_is_left().await;
        vm.all().await.unwrap();
    }
}

#[tokio::test]
async fn an_undoing_that_fails_is_made_up_for() {
    let vm = Vm::new();
    vm.scene.log.fail("serve writable vdb", 1);
    vm.scene.log.fail("give back vda", 1);
    let error = vm.all().await.unwrap_err();
    assert_eq!(
        (error.effect(), error.rollback_failures().len()),
        (Effect::Unknown, 1)
    );
    assert_eq!(vm.recovered().await, RecoveredHow::Undone);
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn a_killed_start_is_undone_and_a_killed_end_is_finished() {
    let vm = Vm::new();
    vm.all().await.unwrap();
    vm.killed_at(FillStage::Starting).await;
    assert_eq!(vm.recovered().await, RecoveredHow::Undone);
    vm.nothing_is_left().await;
    vm.all().await.unwrap();
    vm.killed_at(FillStage::Ending).await;
    assert_eq!(vm.recovered().await, RecoveredHow::Finished);
    vm.nothing_is_left().await;
    assert!(
        !vm.scene.log.take().contains(&"resume".to_owned()),
        "it stays paused"
    );
    // Asked again, it does what it was to do.
    vm.all().await.unwrap();
    vm.killed_at(FillStage::Ending).await;
    assert_eq!(vm.end(FillEnd::Resume).await.unwrap().disks.len(), 2);
    assert!(vm.scene.log.take().contains(&"resume".to_owned()));
    vm.nothing_is_left().await;
    // A start that nobody got an answer to is not ended as if it had been filled.
    vm.all().await.unwrap();
    vm.killed_at(FillStage::Starting).await;
    assert_eq!(vm.end(FillEnd::Resume).await.unwrap().disks, Vec::<String>::new());
    assert!(!vm.scene.log.take().contains(&"resume".to_owned()));
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn nothing_else_is_done_meanwhile() {
    let vm = Vm::new();
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    let request = named("s", [by("vdb", "node")]);
    vm.scene.create(&request).await.unwrap();
    vm.start(&only("vda")).await.unwrap();
    let refused = [
        vm.scene
            .create(&named("t", [by("vdb", "node")]))
            .await
            .unwrap_err(),
        dispatcher.delete(domain, &name_of("s")).await.unwrap_err(),
        dispatcher
            .stop_exports(domain, &StopExports::All)
            .await
            .unwrap_err(),
        dispatcher
            .stop_server(domain, ServedBy::Hypervisor)
            .await
            .unwrap_err(),
        dispatcher.track(domain, "vdb", "/x".as_ref()).await.unwrap_err(),
        vm.start(&only("vdb")).await.unwrap_err(),
        vm.all().await.unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.message().contains("vda are being filled"), "{error}");
    }
    vm.end(FillEnd::StayPaused).await.unwrap();
    vm.nothing_is_left().await;
    dispatcher.delete(domain, &name_of("s")).await.unwrap();
}

#[tokio::test]
async fn what_a_process_fills_itself_is_its_own_until_it_is_dead() {
    let vm = Vm::new();
    let (mine, lives) = vm.scene.catalog.lease().await.unwrap();
    let by = |lease| FillRequest {
        lease,
        ..FillRequest::default()
    };
    let begun = vm.start(&by(Some(mine))).await.unwrap();
    assert_eq!(vm.start(&by(Some(mine))).await.unwrap(), begun);
    let (next, _next_lives) = vm.scene.catalog.lease().await.unwrap();
    for other in [Some(next), None] {
        let error = vm.start(&by(other)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    drop(lives);
    assert_eq!(vm.start(&by(Some(next))).await.unwrap(), begun);
    // Of two that come after a dead one the first has it.
    let (late, _late_lives) = vm.scene.catalog.lease().await.unwrap();
    let error = vm.start(&by(Some(late))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    vm.end(FillEnd::StayPaused).await.unwrap();
    vm.nothing_is_left().await;
    // Whom it was left to is not known, nor whether they are at it.
    vm.all().await.unwrap();
    let error = vm.start(&by(Some(next))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
}

#[tokio::test]
async fn a_guest_that_does_not_stand_still_is_refused() {
    let kinds = [
        (RunState::Off, ErrorKind::Unavailable),
        (RunState::Running, ErrorKind::Busy),
        (RunState::Stopped("io-error".to_owned()), ErrorKind::Busy),
        (RunState::Migrating("active".to_owned()), ErrorKind::Busy),
        (RunState::Storage, ErrorKind::Unsupported),
    ];
    for (state, kind) in kinds {
        let vm = Vm::new();
        vm.set_state(state.clone());
        assert_eq!(vm.all().await.unwrap_err().kind(), kind, "{state}");
        vm.nothing_is_left().await;
    }
    let vm = Vm::new();
    vm.set_state(RunState::Stopped("paused".to_owned()));
    assert!(vm.all().await.unwrap().warnings[0].contains("the guest has run"));
}

#[tokio::test]
async fn a_guest_that_was_let_run_meanwhile_gets_its_disks_when_it_stands_still_again() {
    let vm = Vm::new();
    vm.all().await.unwrap();
    vm.set_state(RunState::Running);
    assert!(matches!(vm.health().await, Some(FillHealth::Interrupted(_))));
    let error = vm.end(FillEnd::Resume).await.unwrap_err();
    assert_eq!((error.kind(), vm.scene.connector.lent()), (ErrorKind::Busy, 2));
    vm.set_state(RunState::Stopped("paused".to_owned()));
    let error = vm.end(FillEnd::Resume).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(!vm.scene.log.take().contains(&"resume".to_owned()));
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn what_is_not_flushed_is_told_and_the_guest_stays_paused_with_its_disks() {
    let vm = Vm::new();
    vm.all().await.unwrap();
    vm.scene.log.fail("flush node-vda", 1);
    vm.end(FillEnd::Resume).await.unwrap_err();
    assert!(!vm.scene.log.take().contains(&"resume".to_owned()));
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn a_hypervisor_that_ended_took_it_along() {
    for off in [false, true] {
        let vm = Vm::new();
        vm.all().await.unwrap();
        vm.scene.connector.restart();
        if off {
            vm.set_state(RunState::Off);
        }
        assert_eq!(vm.health().await, Some(FillHealth::Over));
        vm.scene.log.take();
        let error = vm.end(FillEnd::Resume).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken);
        assert_eq!(
            vm.scene.log.take(),
            Vec::<String>::new(),
            "it is another machine now"
        );
        assert_eq!(vm.health().await, None);
    }
    let vm = Vm::new();
    vm.all().await.unwrap();
    vm.scene.connector.restart();
    assert_eq!(vm.recovered().await, RecoveredHow::Undone);
    vm.start(&only("vdb")).await.unwrap();
}

#[tokio::test]
async fn a_server_for_reading_is_not_written_through_unasked() {
    let vm = Vm::new();
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    let everywhere: Listen = "0.0.0.0:10809".parse().unwrap();
    let listen = Some(everywhere);
    let by = ServedBy::Hypervisor;
    dispatcher
        .start_server(domain, by, listen.clone(), None, true)
        .await
        .unwrap();
    let error = vm.all().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.message().contains("could write"), "{error}");
    let request = FillRequest {
        listen,
        allow_remote: true,
        ..FillRequest::default()
    };
    vm.start(&request).await.unwrap();
    vm.end(FillEnd::StayPaused).await.unwrap();
    let server = vm.scene.catalog.server(&domain.id).await.unwrap();
    assert!(server.unwrap().explicit, "one that was started by itself stays");
    // TLS is for TCP.
    let vm = Vm::new();
    let request = FillRequest {
        tls: Some(Tls {
            credentials: "/pki".into(),
            verify_client: true,
            allowed: Vec::new(),
        }),
        ..FillRequest::default()
    };
    assert_eq!(vm.start(&request).await.unwrap_err().kind(), ErrorKind::Invalid);
}
