//! What the dispatcher's tests share: a domain that writes down what is done to it, and methods that do
//! as they are told.
#![allow(dead_code, reason = "every test file uses a part of it")]

mod control;
mod images;
mod method;
pub(crate) mod slots;
pub(crate) mod standing;
mod tracker;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use disksnap_conformance::MemoryCatalog;
use disksnap_core::{
    Disk, DiskChoice, Disks, Dispatcher, Domain, DomainId, Driver, Effect, Error, ErrorKind, MethodChoice,
    Registry, Result, RunState, SnapshotName, SnapshotRequest, Sockets, Source,
};

pub(crate) use control::FakeConnector;
pub(crate) use images::FakeImages;
pub(crate) use method::{FakeMethod, Plan};
pub(crate) use slots::Slots;
pub(crate) use tracker::FakeTracker;

/// What happened, in order, and what is to fail.
#[derive(Debug, Default)]
pub(crate) struct Log {
    events: Mutex<Vec<String>>,
    faults: Mutex<HashMap<String, Fault>>,
}

#[derive(Debug, Clone, Copy)]
struct Fault {
    times: usize,
    effect: Effect,
}

impl Log {
    /// Writes an event down; fails when it is to fail.
    pub(crate) fn note(&self, event: impl Into<String>) -> Result<()> {
        let event = event.into();
        self.events().push(event.clone());
        self.ask(&event)
    }

    /// Fails when it is to fail: of a mere look nothing is written down.
    pub(crate) fn ask(&self, event: &str) -> Result<()> {
        let mut faults = self.faults.lock().unwrap();
        match faults.get_mut(event) {
            Some(fault) if fault.times > 0 => {
                fault.times -= 1;
                Err(Error::new(ErrorKind::Refused, format!("{event} fails")).leaving(fault.effect))
            }
            _ => Ok(()),
        }
    }

    /// From now on the event fails, this many times.
    pub(crate) fn fail(&self, event: &str, times: usize) {
        self.fail_leaving(event, times, Effect::None);
    }

    pub(crate) fn fail_leaving(&self, event: &str, times: usize, effect: Effect) {
        let fault = Fault { times, effect };
        self.faults.lock().unwrap().insert(event.to_owned(), fault);
    }

    /// What happened since the last time, but for mere looks.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.events())
    }

    fn events(&self) -> MutexGuard<'_, Vec<String>> {
        self.events.lock().unwrap()
    }
}

/// A domain, two fake methods and a catalog.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) log: Arc<Log>,
    pub(crate) catalog: MemoryCatalog,
    pub(crate) connector: Arc<FakeConnector>,
    pub(crate) dispatcher: Dispatcher,
    pub(crate) domain: Domain,
}

impl Scene {
    /// Disks `vda` and `vdb` of a domain in this state, and these methods.
    pub(crate) fn new(state: RunState, methods: impl IntoIterator<Item = FakeMethod>) -> Self {
        let domain = Domain {
            id: DomainId::new("vm", None),
            disks: vec![disk("vda"), disk("vdb")],
            sockets: Sockets::default(),
        };
        Self::with(domain, state, methods)
    }

    pub(crate) fn with(
        domain: Domain,
        state: RunState,
        methods: impl IntoIterator<Item = FakeMethod>,
    ) -> Self {
        let log = Arc::<Log>::default();
        let mut registry = Registry::empty();
        for method in methods {
            registry.add(Arc::new(method.writing_to(&log))).unwrap();
        }
        let catalog = MemoryCatalog::new();
        let connector = Arc::new(FakeConnector::new(state, &log));
        let dispatcher = Dispatcher::new(registry, Arc::new(catalog.clone()), connector.clone());
        Self {
            log,
            catalog,
            connector,
            dispatcher,
            domain,
        }
    }

    /// The same with bitmaps.
    pub(crate) fn tracked(mut self) -> (Self, Arc<FakeTracker>) {
        let tracker = Arc::new(FakeTracker::new(&self.log));
        self.dispatcher = self.dispatcher.tracked_by(tracker.clone());
        (self, tracker)
    }

    pub(crate) async fn create(&self, request: &SnapshotRequest) -> Result<disksnap_core::Snapshot> {
        self.dispatcher.create(&self.domain, request).await
    }

    /// The methods' own events of the last act, without those of the domain.
    pub(crate) fn of_methods(&self) -> Vec<String> {
        let mut events = self.log.take();
        events.retain(|e| e.contains('.'));
        events
    }
}

/// A plain raw disk.
pub(crate) fn disk(target: &str) -> Disk {
    let file = format!("/images/{target}.raw").into();
    Disk {
        driver: Driver {
            name: None,
            format: Some("raw".to_owned()),
        },
        ..Disk::new(target, Source::File { file })
    }
}

/// `vda` by the method `a`, `vdb` by the method `b`.
pub(crate) fn by_two_methods(name: &str) -> SnapshotRequest {
    named(name, [by("vda", "a"), by("vdb", "b")])
}

pub(crate) fn named(name: &str, disks: impl IntoIterator<Item = DiskChoice>) -> SnapshotRequest {
    SnapshotRequest {
        name: Some(name_of(name)),
        disks: Disks::Named(disks.into_iter().collect()),
        ..SnapshotRequest::default()
    }
}

pub(crate) fn by(target: &str, method: &str) -> DiskChoice {
    DiskChoice {
        method: Some(choice(method)),
        ..DiskChoice::new(target)
    }
}

pub(crate) fn choice(method: &str) -> MethodChoice {
    MethodChoice {
        method: method.to_owned(),
        options: disksnap_core::Options::default(),
    }
}

pub(crate) fn name_of(name: &str) -> SnapshotName {
    name.parse().unwrap()
}
