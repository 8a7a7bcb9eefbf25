//! A snapshot's disk for another guest: over an export of its own, whichever server serves it; half of it never stays.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod scene;

use disksnap_core::{
    Attached, Catalog, Domain, DomainId, Effect, ErrorKind, PlugTls, RecoveredHow, Result, RunState,
    ServedBy, Sockets, StopExports, Tls,
};
use scene::slots::Hangs;
use scene::{FakeMethod, Plan, Scene, by, name_of, named};

/// A running domain with a snapshot `s`: `vda` is the hypervisor's, `vdb` lies on this host.
struct Vm {
    scene: Scene,
    to: Domain,
}

impl Vm {
    async fn new() -> Self {
        let methods = [
            FakeMethod::new("node", Plan::Atomic),
            FakeMethod::new("host", Plan::Host).on_this_host(),
        ];
        let scene = Scene::new(RunState::Running, methods);
        let request = named("s", [by("vda", "node"), by("vdb", "host")]);
        scene.create(&request).await.unwrap();
        scene.log.take();
        let to = Domain {
            id: DomainId::new("appliance", None),
            disks: Vec::new(),
            sockets: Sockets::default(),
        };
        Self { scene, to }
    }

    async fn attach(&self, target: &str) -> Result<Attached> {
        self.attach_by(target, None).await
    }

    async fn attach_by(&self, target: &str, tls: Option<&PlugTls>) -> Result<Attached> {
        let (dispatcher, domain) = (&self.scene.dispatcher, &self.scene.domain);
        dispatcher
            .attach(domain, &name_of("s"), target, &self.to, tls)
            .await
    }

    async fn detach(&self, target: &str) -> Result<Vec<DomainId>> {
        let (dispatcher, domain) = (&self.scene.dispatcher, &self.scene.domain);
        dispatcher.detach(domain, &name_of("s"), target, None, None).await
    }

    fn plugged(&self) -> usize {
        self.scene.connector.slots().plugged().len()
    }

    /// How many exports are recorded, by either server served, and how many acts are open.
    async fn there(&self) -> (usize, usize, usize) {
        let catalog = &self.scene.catalog;
        let connector = &self.scene.connector;
        (
            catalog.exports(&self.scene.domain.id).await.unwrap().len(),
            connector.served().len() + connector.images().names().len(),
            catalog.intents(None).await.unwrap().len(),
        )
    }

    async fn nothing_is_left(&self) {
        assert_eq!((self.there().await, self.plugged()), ((0, 0, 0), 0));
        let serving = self.scene.dispatcher.serving(&self.scene.domain).await;
        assert_eq!(serving.unwrap(), disksnap_core::Serving::default());
    }

    /// The one thing that there was to recover.
    async fn recovered(&self) -> RecoveredHow {
        let mut recovered = self.scene.dispatcher.recover(None).await.unwrap();
        assert_eq!(recovered.len(), 1, "{recovered:?}");
        assert!(self.scene.dispatcher.recover(None).await.unwrap().is_empty());
        recovered.remove(0).how
    }
}

const BOTH: [&str; 2] = ["vda", "vdb"];

#[tokio::test]
async fn it_comes_with_its_server_and_goes_with_it() {
    for target in BOTH {
        let vm = Vm::new().await;
        let attached = vm.attach(target).await.unwrap();
        assert_eq!(attached.disk.tls, None);
        assert_eq!(vm.attach(target).await.unwrap(), attached, "again is the same");
        assert_eq!((vm.there().await, vm.plugged()), ((1, 1, 0), 1));
        let plugs = vm.scene.log.take();
        assert_eq!(plugs.iter().filter(|event| event.starts_with("plug")).count(), 1);
        // It is the guest's: neither its export nor its snapshot goes.
        let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
        let stopped = dispatcher.stop_exports(domain, &StopExports::All).await;
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Busy);
        let deleted = dispatcher.delete(domain, &name_of("s")).await;
        assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(vm.detach(target).await.unwrap(), std::slice::from_ref(&vm.to.id));
        assert!(vm.detach(target).await.unwrap().is_empty());
        vm.nothing_is_left().await;
    }
}

#[tokio::test]
async fn what_cannot_be_plugged_is_not_served_either() {
    for target in BOTH {
        let vm = Vm::new().await;
        let plug = format!("plug {}", vm.attach(target).await.unwrap().disk.name);
        vm.detach(target).await.unwrap();
        vm.scene.log.fail(&plug, 1);
        let error = vm.attach(target).await.unwrap_err();
        assert_eq!(error.effect(), Effect::RolledBack);
        vm.nothing_is_left().await;
        vm.scene.connector.set_state(RunState::Off);
        let error = vm.attach(target).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        vm.nothing_is_left().await;
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_not_plugged() {
    let vm = Vm::new().await;
    for (target, serve) in [("vda", "serve"), ("vdb", "images serve")] {
        let name = vm.attach(target).await.unwrap().disk.name;
        vm.detach(target).await.unwrap();
        vm.scene.log.take();
        vm.scene.log.fail(&format!("{serve} {name}"), 1);
        vm.attach(target).await.unwrap_err();
        assert!(!vm.scene.log.take().contains(&format!("plug {name}")));
        vm.nothing_is_left().await;
    }
}

/// Both failures are told, and what is left is undone later.
#[tokio::test]
async fn an_undoing_that_fails_is_made_up_for() {
    let vm = Vm::new().await;
    let name = vm.attach("vdb").await.unwrap().disk.name;
    vm.detach("vdb").await.unwrap();
    vm.scene.log.fail(&format!("plug {name}"), 1);
    vm.scene.log.fail(&format!("images unserve {name}"), 1);
    let error = vm.attach("vdb").await.unwrap_err();
    assert_eq!(
        (error.effect(), error.rollback_failures().len()),
        (Effect::Unknown, 1)
    );
    assert_eq!(vm.there().await, (1, 1, 1));
    assert_eq!(vm.recovered().await, RecoveredHow::Undone);
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn a_guest_that_does_not_let_go_keeps_it() {
    let vm = Vm::new().await;
    let name = vm.attach("vdb").await.unwrap().disk.name;
    vm.scene.log.fail(&format!("unplug {name}"), 1);
    vm.detach("vdb").await.unwrap_err();
    assert_eq!((vm.there().await, vm.plugged()), ((1, 1, 0), 1));
    vm.detach("vdb").await.unwrap();
    vm.nothing_is_left().await;
}

#[tokio::test]
async fn a_server_that_died_under_a_guest_s_disk_is_told_by_the_next_attach() {
    let vm = Vm::new().await;
    let before = vm.attach("vdb").await.unwrap();
    vm.scene.connector.images().die();
    vm.scene.log.take();
    let after = vm.attach("vdb").await.unwrap();
    assert_eq!(after, before);
    let events = vm.scene.log.take();
    let name = &before.disk.name;
    assert_eq!(events[0], format!("unplug {name}"), "the dead one first");
    assert_eq!(*events.last().unwrap(), format!("plug {name}"));
    assert_eq!((vm.there().await, vm.plugged()), ((1, 1, 0), 1));
}

#[tokio::test]
async fn killed_before_the_guest_has_it_it_is_undone_and_after_that_it_is_done() {
    for target in BOTH {
        let vm = Vm::new().await;
        let slots = vm.scene.connector.slots();
        slots.killed(Hangs::Before, vm.attach(target)).await;
        assert_eq!(vm.recovered().await, RecoveredHow::Undone);
        vm.nothing_is_left().await;
        slots.killed(Hangs::After, vm.attach(target)).await;
        assert_eq!(vm.recovered().await, RecoveredHow::Finished);
        assert_eq!((vm.there().await, vm.plugged()), ((1, 1, 0), 1));
        slots.killed(Hangs::Before, vm.detach(target)).await;
        assert_eq!(vm.recovered().await, RecoveredHow::Undone);
        assert_eq!((vm.there().await, vm.plugged()), ((1, 1, 0), 1));
        slots.killed(Hangs::After, vm.detach(target)).await;
        assert_eq!(vm.recovered().await, RecoveredHow::Finished);
        vm.nothing_is_left().await;
    }
}

#[tokio::test]
async fn to_a_server_that_speaks_tls_the_other_hypervisor_does_too() {
    for (target, by) in [("vda", ServedBy::Hypervisor), ("vdb", ServedBy::ImageServer)] {
        let vm = Vm::new().await;
        let own = PlugTls {
            credentials: "/pki/client".into(),
            hostname: Some("storage1".to_owned()),
        };
        let error = vm.attach_by(target, Some(&own)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        vm.nothing_is_left().await;
        let tls = Tls {
            credentials: "/pki/server".into(),
            verify_client: true,
            allowed: Vec::new(),
        };
        let listen = "127.0.0.1:10809".parse().ok();
        let (dispatcher, domain) = (&vm.scene.dispatcher, &vm.scene.domain);
        let started = dispatcher.start_server(domain, by, listen, Some(tls), false);
        started.await.unwrap();
        let attached = vm.attach_by(target, Some(&own)).await.unwrap();
        assert_eq!(attached.disk.tls.as_ref(), Some(&own));
        assert_eq!(attached.disk.listen.to_string(), "127.0.0.1:10809");
        vm.detach(target).await.unwrap();
        // Without a directory of its own it is the server's.
        let tls = vm.attach(target).await.unwrap().disk.tls.unwrap();
        assert_eq!((tls.credentials, tls.hostname), ("/pki/server".into(), None));
        vm.detach(target).await.unwrap();
        dispatcher.stop_server(domain, by).await.unwrap();
        vm.nothing_is_left().await;
    }
}
