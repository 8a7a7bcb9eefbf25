//! A guest that has LVM as it was at a moment, memory and disks, from which it goes on as often as is wanted: what was put
//! into it and made in it is there at once, and what one trial spoils the next does not see.

use std::process::Command;
use std::time::Instant;

use serde_json::json;
use tempfile::TempDir;

use crate::lvm_guest::{LvmGuest, MONITOR, disk};
use crate::process::PATIENCE;
use crate::qmp::Monitor;

/// The guest's memory, in its directory.
const MEMORY: &str = "memory";

/// What a guest was at a moment.
#[derive(Debug)]
pub struct SavedLvmGuest {
    initrds: Vec<&'static str>,
    disks: usize,
    dir: TempDir,
}

impl LvmGuest {
    /// Ends it, and keeps what it is now.
    #[must_use]
    pub fn save(self) -> SavedLvmGuest {
        let mut monitor = self.monitor();
        monitor.execute("stop", json!({}));
        let memory = format!("file:{}", self.dir.path().join(MEMORY).display());
        monitor.execute("migrate", json!({ "uri": memory }));
        wait(&mut monitor, "query-migrate", |status| match status {
            "completed" => true,
            "failed" | "cancelled" => panic!("the guest's memory cannot be saved: {status}"),
            _ => false,
        });
        self.process.kill();
        let Self {
            initrds, disks, dir, ..
        } = self;
        SavedLvmGuest { initrds, disks, dir }
    }

    fn monitor(&self) -> Monitor {
        let alive = || {
            let ended = || format!("the guest ended\n{}", self.process.log());
            self.process.is_running().then_some(()).ok_or_else(ended)
        };
        Monitor::connect(&self.dir.path().join(MONITOR), alive)
    }
}

impl SavedLvmGuest {
    /// One that goes on from there, on disks of its own.
    #[must_use]
    pub fn restore(&self) -> LvmGuest {
        let dir = crate::temp_dir();
        for n in 0..self.disks {
            let mut copy = Command::new("cp");
            copy.args(["--sparse=always", "--reflink=auto"]);
            let copied = copy
                .arg(disk(self.dir.path(), n))
                .arg(disk(dir.path(), n))
                .status();
            assert!(
                copied.is_ok_and(|status| status.success()),
                "a disk cannot be copied"
            );
        }
        let memory = format!("file:{}", self.dir.path().join(MEMORY).display());
        let guest = LvmGuest::launch(dir, &self.initrds, self.disks, &["-incoming", &memory]);
        let mut monitor = guest.monitor();
        wait(&mut monitor, "query-status", |status| status != "inmigrate");
        monitor.execute("cont", json!({}));
        guest
    }
}

fn wait(monitor: &mut Monitor, ask: &str, done: impl Fn(&str) -> bool) {
    let begun = Instant::now();
    loop {
        let answer = monitor.execute(ask, json!({}));
        let status = answer["status"].as_str().unwrap_or_default();
        if done(status) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{ask} says {status}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
