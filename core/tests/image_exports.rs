//! Exports of what lies on this host: the image server starts and stops as the hypervisor's does, and whatever fails
//! half way leaves nothing, or is settled later.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use disksnap_core::{
    Alias, Catalog, Effect, ErrorKind, Export, ExportDisk, ExportRequest, RecoveredHow, Result, RunState,
    ServedBy, Serving, Source, StopExports,
};
use scene::{FakeMethod, Plan, Scene, by, disk, name_of, named};

const SOCKET: &str = "images start unix:/run/images.sock";

/// A running domain with a snapshot `s`: `vda`, `vdb` and `vdc` lie on this host, `vdd` is the hypervisor's.
async fn with_snapshot() -> Scene {
    let scene = Scene::with(
        disksnap_core::Domain {
            id: disksnap_core::DomainId::new("vm", None),
            disks: ["vda", "vdb", "vdc", "vdd"].map(disk).to_vec(),
            sockets: disksnap_core::Sockets::default(),
        },
        RunState::Running,
        [
            FakeMethod::new("host", Plan::Host).on_this_host(),
            FakeMethod::new("node", Plan::Atomic),
        ],
    );
    let disks = ["vda", "vdb", "vdc"].map(|target| by(target, "host"));
    let request = named("s", disks.into_iter().chain([by("vdd", "node")]));
    scene.create(&request).await.unwrap();
    scene.log.take();
    scene
}

fn request(targets: &[&str]) -> ExportRequest {
    let disk = |target: &&str| ExportDisk {
        alias: Alias(format!("{target}-backup")),
        name: None,
        checkpoint: None,
    };
    ExportRequest {
        listen: None,
        tls: None,
        allow_remote: false,
        disks: targets.iter().map(disk).collect(),
    }
}

async fn start(scene: &Scene, targets: &[&str]) -> Result<Vec<Export>> {
    scene
        .dispatcher
        .start_exports(&scene.domain, &request(targets))
        .await
}

async fn stop(scene: &Scene, targets: &[&str]) -> Result<Vec<Alias>> {
    let aliases = targets.iter().map(|target| Alias(format!("{target}-backup")));
    let which = StopExports::Aliases(aliases.collect());
    scene.dispatcher.stop_exports(&scene.domain, &which).await
}

async fn serving(scene: &Scene) -> Serving {
    scene.dispatcher.serving(&scene.domain).await.unwrap()
}

/// Nothing serves, nothing is recorded, nothing is open.
async fn nothing_is_left(scene: &Scene) {
    assert_eq!(serving(scene).await, Serving::default());
    assert!(!scene.connector.images().runs());
    assert!(scene.connector.served().is_empty());
    assert!(scene.catalog.exports(&scene.domain.id).await.unwrap().is_empty());
    assert!(scene.catalog.intents(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_first_starts_the_server_and_the_last_stops_it() {
    let scene = with_snapshot().await;
    start(&scene, &["vda"]).await.unwrap();
    start(&scene, &["vdb"]).await.unwrap();
    assert_eq!(
        scene.log.take(),
        [SOCKET, "images serve vda-backup", "images serve vdb-backup"]
    );
    let served = serving(&scene).await;
    assert_eq!((served.exports.len(), served.server), (2, None));
    assert_eq!(stop(&scene, &["vda"]).await.unwrap().len(), 1);
    assert_eq!(scene.log.take(), ["images unserve vda-backup"]);
    stop(&scene, &["vdb"]).await.unwrap();
    assert_eq!(scene.log.take(), ["images unserve vdb-backup", "images stop"]);
    nothing_is_left(&scene).await;
}

#[tokio::test]
async fn where_the_second_of_three_fails_none_is_served() {
    let scene = with_snapshot().await;
    scene.log.fail("images serve vdb-backup", 1);
    let error = start(&scene, &["vda", "vdb", "vdc"]).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    let done = [
        SOCKET,
        "images serve vda-backup",
        "images serve vdb-backup",
        "images stop",
    ];
    assert_eq!(scene.log.take()[..4], done);
    nothing_is_left(&scene).await;
    start(&scene, &["vda", "vdb", "vdc"]).await.unwrap();
    assert_eq!(serving(&scene).await.exports.len(), 3);
}

/// What was there before stays.
#[tokio::test]
async fn where_the_second_of_three_fails_other_exports_go_on() {
    let scene = with_snapshot().await;
    start(&scene, &["vdc"]).await.unwrap();
    let before = serving(&scene).await;
    scene.log.fail("images serve vdb-backup", 1);
    let error = start(&scene, &["vda", "vdb"]).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    assert!(!scene.log.take().contains(&"images stop".to_owned()));
    assert_eq!(serving(&scene).await, before);
    assert_eq!(scene.connector.images().names(), ["vdc-backup"]);
    assert!(scene.catalog.intents(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn one_server_that_cannot_serve_ends_what_the_other_began() {
    let scene = with_snapshot().await;
    scene.log.fail("images serve vda-backup", 1);
    let error = start(&scene, &["vdd", "vda"]).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    let events = scene.log.take();
    assert!(events.contains(&"serve vdd-backup".to_owned()), "{events:?}");
    assert!(events.contains(&"stop server".to_owned()), "{events:?}");
    nothing_is_left(&scene).await;
    let both = start(&scene, &["vdd", "vda"]).await.unwrap();
    assert_eq!(both.len(), 2);
    let served = serving(&scene).await;
    assert!(served.server.is_some() && served.image_server.is_some());
}

#[tokio::test]
async fn a_server_that_dies_between_start_and_serve_leaves_nothing() {
    let scene = with_snapshot().await;
    for event in ["images serve vda-backup", "images serve vdb-backup"] {
        scene.connector.images().die_at(event);
        let error = start(&scene, &["vda", "vdb"]).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Unavailable, Effect::RolledBack)
        );
        nothing_is_left(&scene).await;
    }
    start(&scene, &["vda", "vdb"]).await.unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_start_leaves_nothing() {
    let scene = with_snapshot().await;
    scene.log.fail(SOCKET, 1);
    let error = start(&scene, &["vda"]).await.unwrap_err();
    assert_eq!(error.effect(), Effect::RolledBack);
    nothing_is_left(&scene).await;
    let asked = scene
        .dispatcher
        .start_server(&scene.domain, ServedBy::ImageServer, None, None, false);
    asked.await.unwrap();
    assert!(serving(&scene).await.image_server.unwrap().explicit);
}

/// Undoing it fails as well: both failures are told, and the next act, or `recover`, undoes it.
#[tokio::test]
async fn a_rollback_that_fails_is_told_and_made_up_for() {
    for recover in [true, false] {
        let scene = with_snapshot().await;
        scene.log.fail("images serve vda-backup", 1);
        scene.log.fail("images stop", 1);
        let error = start(&scene, &["vda"]).await.unwrap_err();
        assert_eq!(
            (error.effect(), error.rollback_failures().len()),
            (Effect::Unknown, 1)
        );
        assert_eq!(scene.catalog.intents(None).await.unwrap().len(), 1);
        if recover {
            let recovered = scene.dispatcher.recover(None).await.unwrap();
            assert_eq!(recovered[0].how, RecoveredHow::Undone);
            nothing_is_left(&scene).await;
            assert!(scene.dispatcher.recover(None).await.unwrap().is_empty());
        }
        start(&scene, &["vda"]).await.unwrap();
        assert_eq!(scene.connector.images().names(), ["vda-backup"]);
        assert!(scene.catalog.intents(None).await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn an_export_that_does_not_end_is_still_told_and_ends_later() {
    for event in ["images unserve vda-backup", "images stop"] {
        let scene = with_snapshot().await;
        start(&scene, &["vda"]).await.unwrap();
        scene.log.fail(event, 2);
        stop(&scene, &["vda"]).await.unwrap_err();
        let recorded = scene.catalog.exports(&scene.domain.id).await.unwrap();
        assert_eq!(recorded.len(), 1, "{event}");
        // It fails again: the next act says that first, and does nothing else.
        let error = start(&scene, &["vdb"]).await.unwrap_err();
        assert!(
            error.next_step().unwrap().contains("disksnap recover"),
            "{error:?}"
        );
        assert!(
            !scene
                .connector
                .images()
                .names()
                .contains(&"vdb-backup".to_owned())
        );
        let recovered = scene.dispatcher.recover(None).await.unwrap();
        assert_eq!(recovered[0].how, RecoveredHow::Finished, "{event}");
        nothing_is_left(&scene).await;
    }
}

#[tokio::test]
async fn a_server_that_died_serves_nothing_and_is_started_anew() {
    let scene = with_snapshot().await;
    start(&scene, &["vda", "vdb"]).await.unwrap();
    scene.connector.images().die();
    assert_eq!(serving(&scene).await, Serving::default());
    scene.log.take();
    start(&scene, &["vda"]).await.unwrap();
    assert_eq!(scene.log.take(), [SOCKET, "images serve vda-backup"]);
    assert_eq!(serving(&scene).await.exports.len(), 1);
    scene.connector.images().die();
    // What is not served any more is as good as stopped.
    assert!(stop(&scene, &["vda", "vdb"]).await.unwrap().is_empty());
    nothing_is_left(&scene).await;
}

#[tokio::test]
async fn recover_ends_a_server_without_exports_and_leaves_one_that_was_told_to_stay() {
    let scene = with_snapshot().await;
    let by = ServedBy::ImageServer;
    let started = scene
        .dispatcher
        .start_server(&scene.domain, by, None, None, false);
    started.await.unwrap();
    assert!(scene.dispatcher.recover(None).await.unwrap().is_empty());
    scene.dispatcher.stop_server(&scene.domain, by).await.unwrap();
    // One that nobody asked for: its exports have gone with another process' catalog.
    start(&scene, &["vda"]).await.unwrap();
    let export = scene.catalog.exports(&scene.domain.id).await.unwrap().remove(0);
    let gone = [disksnap_core::Change::RemoveExport(export.alias)];
    let settled = scene
        .catalog
        .settle(disksnap_core::SnapshotId::random().0, &scene.domain.id, &gone);
    settled.await.unwrap();
    scene.log.fail("images stop", 1);
    let recovered = scene.dispatcher.recover(None).await.unwrap();
    assert!(
        matches!(&recovered[0].how, RecoveredHow::Left(why) if why.contains("fails")),
        "{recovered:?}"
    );
    let recovered = scene.dispatcher.recover(None).await.unwrap();
    assert_eq!(recovered[0].how, RecoveredHow::Undone);
    nothing_is_left(&scene).await;
}

async fn source_of(scene: &Scene) -> Source {
    let (dispatcher, domain) = (&scene.dispatcher, &scene.domain);
    let snapshot = dispatcher.show(domain, &name_of("s")).await.unwrap().snapshot;
    let source = dispatcher.backup_source(domain, &snapshot, "vda").await;
    source.unwrap().unwrap()
}

#[tokio::test]
async fn where_an_image_is_told_to_be_follows_what_serves_it() {
    let scene = with_snapshot().await;
    let source = source_of(&scene).await;
    assert!(matches!(source, Source::File { .. }), "{source:?}");
    start(&scene, &["vda"]).await.unwrap();
    let source = source_of(&scene).await;
    assert_eq!(source.to_string(), "nbd:unix:/run/images.sock/vda-backup");
    scene.connector.images().die();
    let source = source_of(&scene).await;
    assert!(matches!(source, Source::File { .. }), "{source:?}");
}

#[tokio::test]
async fn a_domain_that_is_off_is_served_as_well() {
    let scene = with_snapshot().await;
    scene.connector.set_state(RunState::Off);
    start(&scene, &["vda"]).await.unwrap();
    assert_eq!(serving(&scene).await.exports.len(), 1);
    // A delete takes the export with it, and the server.
    scene
        .dispatcher
        .delete(&scene.domain, &name_of("s"))
        .await
        .unwrap();
    let events = scene.log.take();
    let order = ["images unserve vda-backup", "images stop", "host.delete"];
    let at = order.map(|event| events.iter().position(|e| e == event));
    assert!(at.is_sorted() && at[0].is_some(), "{events:?}");
    nothing_is_left(&scene).await;
}
