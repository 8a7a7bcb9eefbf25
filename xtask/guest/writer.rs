//! Runs in the test guest: writes for ever, and prints how far it is.
//!
//! `guest-writer disks DEV…` does rounds on raw disks: on each disk in turn a block with the round's
//! number at a scattered offset (now and then a range is zeroed or discarded instead), then the round's
//! number in the first block. All with direct, synchronous writes: at any instant the first disk's
//! number is the last one's, or one more. `guest-writer files DIR` does rounds of writing and syncing
//! one of 16 files.

#![allow(clippy::print_stdout, reason = "the serial console is its only output")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const O_DSYNC: i32 = 0o10_000;
const O_DIRECT: i32 = 0o40_000;

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("disks") => write_disks(&args.collect::<Vec<_>>()),
        Some("files") => write_files(&args.next().unwrap_or_else(|| "/mnt".into())),
        _ => Err(io::Error::other("usage: guest-writer disks DEV… | files DIR")),
    }
}

struct Disk {
    path: String,
    file: File,
    blocks: u64,
}

fn write_disks(paths: &[String]) -> io::Result<()> {
    let disks = paths.iter().map(|x| open(x)).collect::<io::Result<Vec<_>>>()?;
    let blocks = disks.iter().map(|x| x.blocks).min().unwrap_or(2);
    let mut buffer = Aligned::new();
    let mut progress = Progress::new("WRITER");
    let mut random: u64 = 1;
    for round in 1u64.. {
        // A linear congruential generator scatters well enough.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let block = 1 + (random >> 33) % (blocks - 1);
        for disk in &disks {
            if round.is_multiple_of(64) {
                let options: &[&str] = if round.is_multiple_of(128) { &[] } else { &["-z"] };
                zero(disk, block, options)?;
            } else {
                disk.file.write_all_at(buffer.fill(round), block * BLOCK as u64)?;
            }
            disk.file.write_all_at(buffer.fill(round), 0)?;
        }
        progress.say(round)?;
    }
    Ok(())
}

fn open(path: &str) -> io::Result<Disk> {
    let flags = O_DIRECT | O_DSYNC;
    let mut file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
    Ok(Disk {
        path: path.to_owned(),
        file,
        blocks,
    })
}

/// The kernel zeroes (`-z`) or discards the block; a disk that cannot discard answers with an error,
/// which is not this program's business.
fn zero(disk: &Disk, block: u64, options: &[&str]) -> io::Result<()> {
    let (offset, length) = ((block * BLOCK as u64).to_string(), BLOCK.to_string());
    let args = ["-o", &offset, "-l", &length, &disk.path];
    Command::new("/bin/blkdiscard")
        .args(options)
        .args(args)
        .output()
        .map(drop)
}

fn write_files(dir: &str) -> io::Result<()> {
    let mut progress = Progress::new("FILES");
    for round in 1u64.. {
        let mut file = File::create(Path::new(dir).join(format!("file-{}", round % 16)))?;
        file.write_all(format!("{round:>15}\n").repeat(512).as_bytes())?;
        file.sync_all()?;
        progress.say(round)?;
    }
    Ok(())
}

/// A block that starts at a multiple of its size in memory, as direct writes need.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![0u8; 2 * BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    /// Repeats the number over the whole block.
    fn fill(&mut self, number: u64) -> &[u8] {
        let block = &mut self.bytes[self.start..self.start + BLOCK];
        for cell in block.chunks_exact_mut(8) {
            cell.copy_from_slice(&number.to_le_bytes());
        }
        block
    }
}

/// Prints the round, but not so often that the slow serial line holds the writer up.
struct Progress {
    name: &'static str,
    last: Option<Instant>,
}

impl Progress {
    fn new(name: &'static str) -> Self {
        Self { name, last: None }
    }

    fn say(&mut self, round: u64) -> io::Result<()> {
        if self.last.is_none_or(|x| x.elapsed() > Duration::from_millis(20)) {
            self.last = Some(Instant::now());
            // One write, so that lines of several writers do not mix.
            io::stdout().write_all(format!("{} {round}\n", self.name).as_bytes())?;
        }
        Ok(())
    }
}
