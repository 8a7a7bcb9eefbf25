//! A writer that goes on while a test takes, reads and deletes snapshots.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::disk::GuestDisk;
use crate::pattern::{Random, bytes};
use crate::process::PATIENCE;

/// Writes to disks from a thread of its own until stopped or dropped.
///
/// Each round writes to every disk, in order, 4096 bytes at one scattered offset (every eighth round
/// zeroes there instead, every sixteenth discards the 64 KiB around it), then the round's number, little
/// endian in 8 bytes, at offset 0. So at any one instant the number on the first disk is that on the last
/// one, or one more.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Shared {
    fn fail(&self, error: &str) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_owned());
    }

    fn failure(&self) -> String {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone().unwrap_or_else(|| "it panicked".to_owned())
    }
}

/// The size of each write, in bytes.
const BLOCK: u64 = 4096;

/// What a discard covers: a cluster of qcow2 as `qemu-img` makes it.
const CLUSTER: u64 = 65536;

impl Writer {
    /// Starts writing to the first `size` bytes of each disk, at least 128 KiB; the same seed writes the
    /// same.
    #[must_use]
    pub fn start(disks: Vec<GuestDisk>, size: u64, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let mut random = Random::new(seed);
            while !theirs.stop.load(Ordering::Relaxed) {
                let round = theirs.rounds.load(Ordering::Relaxed) + 1;
                let offset = CLUSTER + random.below((size - CLUSTER) / BLOCK) * BLOCK;
                for disk in &disks {
                    write_once(disk, round, offset).inspect_err(|error| theirs.fail(error))?;
                }
                theirs.rounds.store(round, Ordering::Release);
            }
            Ok(())
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// How many rounds are done.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Acquire)
    }

    /// Waits until `more` rounds are done from now on: the guest's writes go on.
    pub fn wait(&self, more: u64) {
        let (begun, goal) = (Instant::now(), self.rounds() + more);
        while self.rounds() < goal {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!ended, "the writer ended: {}", self.shared.failure());
            assert!(begun.elapsed() < PATIENCE, "the guest's writes stand still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops after the round at hand and returns how many were done; panics if a write had failed.
    #[expect(
        clippy::must_use_candidate,
        reason = "most tests stop it just to see no write failed"
    )]
    pub fn stop(mut self) -> u64 {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => panic!("a guest's write failed: {error}"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        self.rounds()
    }
}

fn write_once(disk: &GuestDisk, round: u64, offset: u64) -> Result<(), String> {
    if round.is_multiple_of(16) {
        // QEMU refuses to discard less than a cluster of a qcow2 image.
        disk.try_discard(offset / CLUSTER * CLUSTER, CLUSTER)?;
    } else if round.is_multiple_of(8) {
        disk.try_zero(offset, BLOCK)?;
    } else {
        disk.try_write(offset, &bytes(round, usize::try_from(BLOCK).unwrap_or(0)))?;
    }
    let mut header = [0; 512];
    header[..8].copy_from_slice(&round.to_le_bytes());
    disk.try_write(0, &header)
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
