//! Exports: the server starts with the first and stops with the last; what is recorded is what is served.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use std::sync::{Arc, Mutex};

use disksnap_core::{
    Alias, Catalog, ErrorKind, Export, ExportDisk, ExportRequest, Health, Listen, Result, RunState, ServedBy,
    Source, StopExports, Tls,
};
use scene::{FakeMethod, Plan, Scene, by_two_methods, name_of};

const SOCKET: &str = "unix:/run/vm.sock";

struct Served {
    scene: Scene,
    health: Arc<Mutex<Health>>,
}

/// A running domain with one snapshot `s` of `vda` and `vdb`.
async fn with_snapshot() -> Served {
    let a = FakeMethod::new("a", Plan::Atomic);
    let health = a.health();
    let scene = Scene::new(RunState::Running, [a, FakeMethod::new("b", Plan::Atomic)]);
    scene.create(&by_two_methods("s")).await.unwrap();
    scene.log.take();
    Served { scene, health }
}

fn request(listen: Option<&str>, aliases: &[&str]) -> ExportRequest {
    let disk = |alias: &&str| ExportDisk {
        alias: Alias((*alias).to_owned()),
        name: None,
        checkpoint: None,
    };
    ExportRequest {
        listen: listen.map(|l| l.parse().unwrap()),
        tls: None,
        allow_remote: false,
        disks: aliases.iter().map(disk).collect(),
    }
}

impl Served {
    async fn start(&self, request: &ExportRequest) -> Result<Vec<Export>> {
        self.scene
            .dispatcher
            .start_exports(&self.scene.domain, request)
            .await
    }

    async fn stop(&self, aliases: &[&str]) -> Result<Vec<Alias>> {
        let aliases = aliases.iter().map(|a| Alias((*a).to_owned())).collect();
        self.stop_these(&StopExports::Aliases(aliases)).await
    }

    async fn stop_these(&self, which: &StopExports) -> Result<Vec<Alias>> {
        self.scene
            .dispatcher
            .stop_exports(&self.scene.domain, which)
            .await
    }

    fn events(&self) -> Vec<String> {
        self.scene.log.take()
    }
}

#[tokio::test]
async fn the_first_starts_the_server_and_the_last_stops_it() {
    let vm = with_snapshot().await;
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    assert_eq!(
        vm.events(),
        [&format!("start server {SOCKET}"), "serve vda-backup"]
    );
    vm.start(&request(None, &["vdb-backup"])).await.unwrap();
    assert_eq!(vm.events(), ["serve vdb-backup"]);
    let serving = vm.scene.dispatcher.serving(&vm.scene.domain).await.unwrap();
    assert_eq!(serving.exports.len(), 2);
    assert_eq!(serving.server.unwrap().listen.to_string(), SOCKET);
    vm.stop(&["vda-backup"]).await.unwrap();
    assert_eq!(vm.events(), ["unserve node-vda-backup"]);
    vm.stop(&["vdb-backup"]).await.unwrap();
    assert_eq!(vm.events(), ["unserve node-vdb-backup", "stop server"]);
    let serving = vm.scene.dispatcher.serving(&vm.scene.domain).await.unwrap();
    assert_eq!((serving.server, serving.exports.len()), (None, 0));
}

#[tokio::test]
async fn stopping_is_idempotent_and_knows_aliases() {
    let vm = with_snapshot().await;
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    assert_eq!(vm.stop(&["vda-backup", "vdb-backup"]).await.unwrap().len(), 1);
    assert!(vm.stop(&["vda-backup"]).await.unwrap().is_empty());
    let error = vm.stop(&["vdx-backup"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.next_step().unwrap().contains("vda-backup"));
    vm.start(&request(None, &["vda-backup", "vdb-backup"]))
        .await
        .unwrap();
    let of_snapshot = StopExports::Snapshot(name_of("s"));
    assert_eq!(vm.stop_these(&of_snapshot).await.unwrap().len(), 2);
    assert!(vm.stop_these(&StopExports::All).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_server_started_by_itself_stays() {
    let vm = with_snapshot().await;
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    let server = dispatcher
        .start_server(domain, ServedBy::Hypervisor, None, None, false)
        .await
        .unwrap();
    assert!(server.explicit);
    assert_eq!(
        dispatcher
            .start_server(domain, ServedBy::Hypervisor, None, None, false)
            .await
            .unwrap(),
        server
    );
    assert_eq!(vm.events(), [format!("start server {SOCKET}")]);
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    assert_eq!(
        dispatcher
            .stop_server(domain, ServedBy::Hypervisor)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Busy
    );
    vm.stop(&["vda-backup"]).await.unwrap();
    assert!(!vm.events().contains(&"stop server".to_owned()));
    dispatcher
        .stop_server(domain, ServedBy::Hypervisor)
        .await
        .unwrap();
    dispatcher
        .stop_server(domain, ServedBy::Hypervisor)
        .await
        .unwrap();
    assert_eq!(vm.events(), ["stop server"]);
}

/// An explicit start adopts the server that an export had started: it then outlives the export.
#[tokio::test]
async fn a_running_server_can_be_kept() {
    let vm = with_snapshot().await;
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    dispatcher
        .start_server(domain, ServedBy::Hypervisor, None, None, false)
        .await
        .unwrap();
    vm.stop(&["vda-backup"]).await.unwrap();
    assert!(!vm.events().contains(&"stop server".to_owned()));
}

#[tokio::test]
async fn a_second_address_is_refused_and_the_first_is_named() {
    let vm = with_snapshot().await;
    vm.start(&request(Some("127.0.0.1:10809"), &["vda-backup"]))
        .await
        .unwrap();
    let error = vm
        .start(&request(Some("127.0.0.1:10810"), &["vdb-backup"]))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains("127.0.0.1:10809"), "{error}");
    vm.start(&request(Some("127.0.0.1:10809"), &["vdb-backup"]))
        .await
        .unwrap();
}

#[tokio::test]
async fn nothing_listens_beyond_this_host_unless_it_is_meant() {
    let remote = "192.0.2.1:10809";
    let tls = |verify_client| {
        Some(Tls {
            credentials: "/tls".into(),
            verify_client,
            allowed: Vec::new(),
        })
    };
    let cases = [
        (None, false, false),
        (None, true, true),
        (tls(true), false, true),
        // Encrypted, and still readable by anyone.
        (tls(false), false, false),
    ];
    for (tls, allow_remote, allowed) in cases {
        let vm = with_snapshot().await;
        let wanted = ExportRequest {
            tls: tls.clone(),
            allow_remote,
            ..request(Some(remote), &["vda-backup"])
        };
        let started = vm.start(&wanted).await;
        match &started {
            Ok(_) => assert!(allowed, "{tls:?} {allow_remote}"),
            Err(error) => {
                assert!(!allowed, "{tls:?} {allow_remote}: {error}");
                assert_eq!(error.kind(), ErrorKind::Denied);
                assert!(vm.events().is_empty());
            }
        }
    }
    // A list of names of those who need not show any.
    let vm = with_snapshot().await;
    let mut unnamed = tls(false);
    unnamed.as_mut().unwrap().allowed = vec!["CN=backup".parse().unwrap()];
    let wanted = ExportRequest {
        tls: unnamed,
        allow_remote: true,
        ..request(Some(remote), &["vda-backup"])
    };
    assert_eq!(vm.start(&wanted).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert!(vm.events().is_empty());
    for local in ["127.0.0.1:10809", "[::1]:10809", "unix:/run/other.sock"] {
        let vm = with_snapshot().await;
        vm.start(&request(Some(local), &["vda-backup"])).await.unwrap();
    }
    assert!(
        "0.0.0.0:1"
            .parse::<Listen>()
            .is_ok_and(|listen| !listen.is_local())
    );
}

#[tokio::test]
async fn what_cannot_be_exported_is_refused_and_starts_nothing() {
    let vm = with_snapshot().await;
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    vm.events();
    let same_name = ExportRequest {
        disks: vec![ExportDisk {
            alias: Alias("vdb-backup".to_owned()),
            name: Some("vda-backup".to_owned()),
            checkpoint: None,
        }],
        ..request(None, &[])
    };
    let cases = [
        (request(None, &["vdx-backup"]), ErrorKind::NotFound),
        (request(None, &["vda-backup"]), ErrorKind::AlreadyExists),
        (
            request(None, &["vdb-backup", "vdb-backup"]),
            ErrorKind::AlreadyExists,
        ),
        (same_name, ErrorKind::AlreadyExists),
        (request(None, &[]), ErrorKind::Invalid),
    ];
    for (wanted, kind) in cases {
        assert_eq!(vm.start(&wanted).await.unwrap_err().kind(), kind, "{wanted:?}");
    }
    assert!(vm.events().is_empty());
    let served = vm.scene.connector.served();
    assert_eq!(served, ["node-vda-backup"]);
}

#[tokio::test]
async fn a_broken_snapshot_is_not_served() {
    let vm = with_snapshot().await;
    for health in [
        Health::Broken("full".to_owned()),
        Health::Gone("removed".to_owned()),
    ] {
        *vm.health.lock().unwrap() = health;
        let error = vm
            .start(&request(None, &["vdb-backup", "vda-backup"]))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken);
        let opened = vm
            .scene
            .dispatcher
            .open(&vm.scene.domain, &name_of("s"), "vda")
            .await;
        assert_eq!(opened.unwrap_err().kind(), ErrorKind::Broken);
    }
    assert!(vm.events().is_empty());
}

#[tokio::test]
async fn all_exports_of_a_request_or_none() {
    let vm = with_snapshot().await;
    vm.scene.log.fail("serve vdb-backup", 1);
    vm.start(&request(None, &["vda-backup", "vdb-backup"]))
        .await
        .unwrap_err();
    let events = vm.events();
    assert_eq!(events.last().map(String::as_str), Some("stop server"));
    assert!(vm.scene.connector.served().is_empty());
    assert!(vm.scene.catalog.intents(None).await.unwrap().is_empty());
    assert!(
        vm.scene
            .catalog
            .exports(&vm.scene.domain.id)
            .await
            .unwrap()
            .is_empty()
    );
    vm.start(&request(None, &["vda-backup", "vdb-backup"]))
        .await
        .unwrap();
}

#[tokio::test]
async fn another_run_of_the_hypervisor_serves_nothing() {
    let vm = with_snapshot().await;
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    vm.scene.connector.restart();
    let serving = vm.scene.dispatcher.serving(&vm.scene.domain).await.unwrap();
    assert_eq!((serving.server, serving.exports.len()), (None, 0));
    vm.events();
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    assert_eq!(
        vm.events(),
        [&format!("start server {SOCKET}"), "serve vda-backup"]
    );
    vm.scene.connector.set_state(RunState::Off);
    let serving = vm.scene.dispatcher.serving(&vm.scene.domain).await.unwrap();
    assert_eq!((serving.server, serving.exports.len()), (None, 0));
}

#[tokio::test]
async fn deleting_a_snapshot_stops_its_exports_first() {
    let vm = with_snapshot().await;
    vm.start(&request(None, &["vda-backup", "vdb-backup"]))
        .await
        .unwrap();
    vm.events();
    vm.scene
        .dispatcher
        .delete(&vm.scene.domain, &name_of("s"))
        .await
        .unwrap();
    let order = [
        "unserve node-vda-backup",
        "unserve node-vdb-backup",
        "stop server",
        "b.delete",
        "a.delete",
    ];
    assert_eq!(vm.events(), order);
    assert!(
        vm.scene
            .catalog
            .exports(&vm.scene.domain.id)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn a_reader_gets_an_export_of_its_own() {
    let vm = with_snapshot().await;
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    let opened = dispatcher.open(domain, &name_of("s"), "vda").await.unwrap();
    let Source::Network { name: Some(name), .. } = &opened.source else {
        panic!("{:?}", opened.source)
    };
    assert_ne!(name, "vda-backup");
    assert_eq!(opened.format, "raw");
    let serving = dispatcher.serving(domain).await.unwrap();
    assert_eq!(serving.exports.len(), 1, "a reader's export is nobody's business");
    assert_eq!(vm.scene.connector.served().len(), 2);
    dispatcher.close(domain, opened).await.unwrap();
    assert_eq!(vm.scene.connector.served(), ["node-vda-backup"]);
}

#[tokio::test]
async fn a_reader_that_dies_leaves_an_export_that_the_next_act_ends() {
    let vm = with_snapshot().await;
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    let living = dispatcher.open(domain, &name_of("s"), "vdb").await.unwrap();
    // Dropped without close, as its process would drop it.
    drop(dispatcher.open(domain, &name_of("s"), "vda").await.unwrap());
    assert_eq!(vm.scene.connector.served().len(), 2);
    vm.start(&request(None, &["vda-backup"])).await.unwrap();
    let served = vm.scene.connector.served();
    assert_eq!(served.len(), 2, "{served:?}");
    assert!(
        served.iter().any(|id| id.starts_with("node-vdb-backup-")),
        "a living reader keeps its export"
    );
    dispatcher.close(domain, living).await.unwrap();
    assert_eq!(vm.scene.connector.served(), ["node-vda-backup"]);
}

#[tokio::test]
async fn a_backup_source_names_the_export_or_the_one_to_come() {
    let vm = with_snapshot().await;
    let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
    let snapshot = dispatcher.show(domain, &name_of("s")).await.unwrap().snapshot;
    let source = dispatcher.backup_source(domain, &snapshot, "vda").await.unwrap();
    assert_eq!(source.unwrap().to_string(), "nbd:unix:/run/vm.sock/vda-backup");
    let wanted = ExportRequest {
        disks: vec![ExportDisk {
            alias: Alias("vda-backup".to_owned()),
            name: Some("first".to_owned()),
            checkpoint: None,
        }],
        ..request(Some("127.0.0.1:10809"), &[])
    };
    vm.start(&wanted).await.unwrap();
    let source = dispatcher.backup_source(domain, &snapshot, "vda").await.unwrap();
    assert_eq!(source.unwrap().to_string(), "nbd:127.0.0.1:10809/first");
}
