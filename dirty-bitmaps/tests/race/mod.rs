//! A guest that writes while a snapshot is taken, and what of that is in it.
#![allow(unreachable_pub, reason = "the tests' own")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use disksnap_test_support::{GuestDisk, pattern};

/// Bytes in each write.
const BLOCK: usize = 512;
/// The most writes: each goes where none has gone before.
const MOST: usize = 1000;
/// How far apart they are, in blocks: it divides no disk.
const STRIDE: u64 = 1237;
/// A thread that writes one block after another, to one disk or the other.
pub struct Race {
    shared: Arc<Shared>,
    thread: JoinHandle<Vec<Write>>,
    at_start: usize,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicUsize,
}

/// One write: the disk, where, and the seed of its bytes.
struct Write {
    target: String,
    offset: u64,
    seed: u64,
}

/// All that was written, in its order.
pub struct Raced {
    writes: Vec<Write>,
    pub while_it_was_made: usize,
}

impl Race {
    /// Starts to write, with `pause` between two writes, and waits for the first one.
    pub fn start(disks: [GuestDisk; 2], size: u64, pause: Duration, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = thread::spawn(move || write_on(&theirs, &disks, size / BLOCK as u64, pause, seed));
        while shared.done.load(Ordering::Acquire) == 0 && !thread.is_finished() {
            thread::sleep(Duration::from_micros(100));
        }
        let at_start = shared.done.load(Ordering::Acquire);
        Self {
            shared,
            thread,
            at_start,
        }
    }

    /// Stops after one more write.
    pub fn stop(self) -> Raced {
        let at_end = self.shared.done.load(Ordering::Acquire);
        self.shared.stop.store(true, Ordering::Release);
        Raced {
            writes: self.thread.join().unwrap(),
            while_it_was_made: at_end - self.at_start,
        }
    }
}

fn write_on(shared: &Shared, disks: &[GuestDisk; 2], blocks: u64, pause: Duration, seed: u64) -> Vec<Write> {
    let mut random = pattern::Random::new(seed);
    let (start, mut writes) = (random.below(blocks), Vec::new());
    loop {
        let stopped = shared.stop.load(Ordering::Acquire);
        if stopped || writes.len() < MOST {
            let disk = &disks[usize::try_from(random.below(2)).unwrap()];
            let offset = (start + writes.len() as u64 * STRIDE) % blocks * BLOCK as u64;
            let seed = random.next_u64();
            disk.write(offset, &pattern::bytes(seed, BLOCK));
            writes.push(Write {
                target: disk.target().to_owned(),
                offset,
                seed,
            });
            shared.done.store(writes.len(), Ordering::Release);
        }
        if stopped {
            return writes;
        }
        thread::sleep(pause);
    }
}

impl Raced {
    /// One instant of all disks: the writes up to it are in the snapshot, the first one surely, and none after it,
    /// the last one surely not.
    pub fn check(&self, content: &BTreeMap<&'static str, Vec<u8>>, what: &str) {
        let is_there = |write: &Write| {
            let at = usize::try_from(write.offset).unwrap();
            content[write.target.as_str()][at..at + BLOCK] == pattern::bytes(write.seed, BLOCK)
        };
        let there: Vec<bool> = self.writes.iter().map(is_there).collect();
        let instant = there.iter().position(|there| !there).unwrap_or(there.len());
        let none_after = there[instant..].iter().all(|there| !there);
        assert!(
            none_after && instant > 0 && instant < there.len(),
            "{what}: not one instant: {there:?}"
        );
    }
}
