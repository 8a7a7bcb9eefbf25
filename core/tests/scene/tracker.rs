//! A tracker of bitmaps that it only remembers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use disksnap_core::{
    Batch, DirtyBitmap, Disk, Ending, Host, RawDisks, Result, Start, Trackable, Tracked, Tracker, Union,
};

use super::Log;

#[derive(Debug)]
pub(crate) struct FakeTracker {
    log: Arc<Log>,
    /// By disk: the bitmaps, and whether each records.
    bitmaps: Mutex<BTreeMap<String, BTreeMap<String, bool>>>,
}

impl FakeTracker {
    pub(crate) fn new(log: &Arc<Log>) -> Self {
        Self {
            log: Arc::clone(log),
            bitmaps: Mutex::default(),
        }
    }

    /// The bitmaps of a disk; those that record with a star.
    pub(crate) fn of(&self, target: &str) -> Vec<String> {
        let all = self.bitmaps.lock().unwrap();
        let own = all.get(target).into_iter().flatten();
        own.map(|(name, records)| format!("{name}{}", if *records { "*" } else { "" }))
            .collect()
    }

    /// As somebody would disable it.
    pub(crate) fn stop(&self, target: &str, name: &str) {
        self.set(target, name, false);
    }

    /// As somebody would enable it.
    pub(crate) fn record(&self, target: &str, name: &str) {
        self.set(target, name, true);
    }

    fn set(&self, target: &str, name: &str, records: bool) {
        let mut all = self.bitmaps.lock().unwrap();
        all.get_mut(target).unwrap().insert(name.to_owned(), records);
    }

    /// As a crash would lose it.
    pub(crate) fn lose(&self, target: &str, name: &str) {
        self.bitmaps.lock().unwrap().get_mut(target).unwrap().remove(name);
    }
}

#[async_trait]
impl Tracker for FakeTracker {
    async fn look(&self, _: &dyn Host, disks: &[&Disk]) -> Result<Vec<Tracked>> {
        let all = self.bitmaps.lock().unwrap();
        let tracked = |disk: &&Disk| Tracked {
            trackable: Trackable::Durable,
            size: Some(1 << 20),
            bitmaps: all
                .get(&disk.target)
                .into_iter()
                .flatten()
                .map(|(name, records)| DirtyBitmap {
                    name: name.clone(),
                    layer: 0,
                    recording: *records,
                    durable: true,
                    inconsistent: false,
                    granularity: 65536,
                })
                .collect(),
        };
        Ok(disks.iter().map(tracked).collect())
    }

    async fn start(&self, _: &dyn Host, starts: &[Start]) -> Result<Option<Batch>> {
        let mut all = self.bitmaps.lock().unwrap();
        for start in starts {
            let own = all.entry(start.disk.target.clone()).or_default();
            if let (Some(name), Some(_)) = (&start.recording, &start.starts) {
                own.insert(name.clone(), false);
            }
            own.extend(start.starts.iter().map(|name| (name.clone(), true)));
            self.log.note(format!("tracker.start {}", start.disk.target))?;
        }
        Ok(None)
    }

    async fn abort(&self, _: &dyn Host, _: &[Start]) -> Result<()> {
        self.log.note("tracker.abort")
    }

    async fn end(&self, _: &dyn Host, endings: &[Ending]) -> Result<()> {
        for Ending {
            disk,
            bitmap,
            into,
            record,
        } in endings
        {
            self.log.note(format!("tracker.end {} {bitmap}", disk.target))?;
            let mut all = self.bitmaps.lock().unwrap();
            let own = all.entry(disk.target.clone()).or_default();
            own.remove(bitmap);
            if let Some(into) = into.as_ref().filter(|_| *record) {
                own.insert(into.clone(), true);
            }
        }
        Ok(())
    }

    async fn unite(&self, _: &dyn Host, union: &Union) -> Result<()> {
        self.log.note(format!("tracker.unite {}", union.of.join("+")))
    }

    async fn part(&self, _: &dyn Host, _: &str, _: &str) -> Result<()> {
        Ok(())
    }

    fn raw_disks(&self) -> Option<&dyn RawDisks> {
        None
    }
}
