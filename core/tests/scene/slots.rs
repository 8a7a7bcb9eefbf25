//! What can be plugged into a guest: written down, and hanging when it is told to.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{Hotplug, PlugDisk, Result};
use tokio::sync::Notify;

use super::Log;

/// The disks of the one guest there is.
#[derive(Debug)]
pub(crate) struct Slots {
    log: Arc<Log>,
    plugged: Mutex<Vec<PlugDisk>>,
    hangs: Mutex<Option<Hangs>>,
    hanging: Notify,
}

/// When a call hangs: the process that waits for it can be killed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hangs {
    Before,
    After,
}

impl Slots {
    pub(crate) fn new(log: &Arc<Log>) -> Self {
        Self {
            log: Arc::clone(log),
            plugged: Mutex::default(),
            hangs: Mutex::default(),
            hanging: Notify::new(),
        }
    }

    /// What the guest has.
    pub(crate) fn plugged(&self) -> Vec<PlugDisk> {
        self.plugged.lock().unwrap().clone()
    }

    /// Drops an act that hangs in the next call, before or after it is done.
    pub(crate) async fn killed<T: std::fmt::Debug>(&self, hangs: Hangs, act: impl Future<Output = T>) {
        *self.hangs.lock().unwrap() = Some(hangs);
        tokio::select! {
            ended = act => panic!("it ended: {ended:?}"),
            () = self.hanging.notified() => {}
        }
        *self.hangs.lock().unwrap() = None;
    }

    async fn hang(&self, here: Hangs) {
        if *self.hangs.lock().unwrap() == Some(here) {
            self.hanging.notify_one();
            std::future::pending::<()>().await;
        }
    }

    fn has(&self, disk: &PlugDisk) -> bool {
        self.plugged.lock().unwrap().contains(disk)
    }
}

#[async_trait]
impl Hotplug for Slots {
    async fn plug(&self, disk: &PlugDisk) -> Result<()> {
        self.hang(Hangs::Before).await;
        self.log.note(format!("plug {}", disk.name))?;
        if !self.has(disk) {
            self.plugged.lock().unwrap().push(disk.clone());
        }
        self.hang(Hangs::After).await;
        Ok(())
    }

    async fn unplug(&self, disk: &PlugDisk, _: Duration) -> Result<()> {
        self.hang(Hangs::Before).await;
        self.log.note(format!("unplug {}", disk.name))?;
        self.plugged.lock().unwrap().retain(|known| known != disk);
        self.hang(Hangs::After).await;
        Ok(())
    }

    async fn plugged(&self, disk: &PlugDisk) -> Result<bool> {
        Ok(self.has(disk))
    }
}
