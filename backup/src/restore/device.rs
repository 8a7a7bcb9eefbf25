//! Restoring onto a block device, which is overwritten.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use disksnap::{Error, ErrorKind, Result};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, fcntl_lock, ioctl_blksszget};
use rustix::io::Errno;

use super::file::write_zeroes;
use super::too_small;
use super::worker::Place;

/// How often a device that is in use is looked at again, and after what time.
const LOOKS: u32 = 10;
const BETWEEN: Duration = Duration::from_millis(200);

/// A block device, held so that nobody who asks the kernel or QEMU's locks uses it at the same time.
#[derive(Debug)]
pub(crate) struct Device {
    file: File,
    path: PathBuf,
    /// The device zeroes whole blocks of so many bytes.
    block: u64,
    /// Ways to zero a range that are still worth trying, the best last.
    ways: Vec<FallocateFlags>,
    notes: Vec<String>,
}

impl Device {
    /// Opens a device for a disk of `size` bytes. Nothing is written yet.
    ///
    /// # Errors
    /// `Invalid` for what is no block device; `Busy` for one that is mounted, part of a volume, or open in a
    /// hypervisor; `NoSpace` for one that is smaller than the disk; `Denied`, `NotFound`, `Io`.
    pub(crate) fn open(path: &Path, size: u64) -> Result<Self> {
        let failed = |e| Error::io("cannot open the device", e).with("path", path.display());
        let kind = path.metadata().map_err(failed)?.file_type();
        if !kind.is_block_device() {
            return Err(Error::new(ErrorKind::Invalid, "it is no block device")
                .with("path", path.display())
                .hint("Restore to a new file instead: a file is never overwritten."));
        }
        let flags = OFlags::EXCL | OFlags::NONBLOCK;
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path);
        let mut file = opened.map_err(|e| match e.raw_os_error() {
            Some(n) if n == Errno::BUSY.raw_os_error() => {
                busy(path, "it is mounted, or part of a volume or an array").because(e)
            }
            _ => failed(e),
        })?;
        // Held until the end: QEMU then refuses to open it, too.
        let locked = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
        if matches!(locked, Err(Errno::AGAIN | Errno::ACCESS)) {
            return Err(busy(path, "a hypervisor or a storage daemon has it open"));
        }
        // A hypervisor may have it open under a node of its own, which no lock of ours is on.
        if let Some(process) = lasting_user_of(&file).map_err(failed)? {
            return Err(busy(path, &format!("the process {process} has it open")));
        }
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if length < size {
            return Err(too_small(&path.display(), length, size));
        }
        let rest = length - size;
        let note = format!(
            "{} is larger than the disk: its last {rest} bytes are as they were",
            path.display()
        );
        let block = ioctl_blksszget(&file).map_err(|e| failed(e.into()))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            block: u64::from(block).max(1),
            ways: vec![
                FallocateFlags::ZERO_RANGE,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            ],
            notes: Vec::from_iter((rest > 0).then_some(note)),
        })
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io("cannot write to the device", error).with("path", self.path.display())
    }

    /// By discarding where that is known to give zeroes, else by the device's own zeroing, else by writing.
    fn zero_blocks(&mut self, offset: u64, length: u64) -> Result<()> {
        while let Some(way) = self.ways.last().filter(|_| length > 0) {
            match fallocate(&self.file, *way, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => self.ways.pop(),
                // In other blocks than the device says.
                Err(Errno::INVAL) => break,
                Err(e) => return Err(self.failed(e.into())),
            };
        }
        self.zero_bytes(offset, length)
    }

    fn zero_bytes(&self, offset: u64, length: u64) -> Result<()> {
        write_zeroes(&self.file, offset, length).map_err(|e| self.failed(e))
    }
}

impl Place for Device {
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset).map_err(|e| self.failed(e))
    }

    /// The whole blocks in it by the device, what is of blocks that it ends in by writing.
    fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        let from = offset.next_multiple_of(self.block).min(end);
        let to = (end / self.block * self.block).max(from);
        self.zero_bytes(offset, from - offset)?;
        self.zero_blocks(from, to - from)?;
        self.zero_bytes(to, end - to)
    }

    fn finish(self) -> Result<Vec<String>> {
        self.file.sync_all().map_err(|e| self.failed(e))?;
        Ok(self.notes)
    }
}

/// Another process that has this device open, and not only to look at it for a moment, as many programs do.
fn lasting_user_of(device: &File) -> io::Result<Option<String>> {
    for _ in 0..LOOKS {
        if user_of(device)?.is_none() {
            return Ok(None);
        }
        std::thread::sleep(BETWEEN);
    }
    user_of(device)
}

/// Another process that has this device open, under whatever name, as far as we may look (root: all of them).
fn user_of(device: &File) -> io::Result<Option<String>> {
    let number = device.metadata()?.rdev();
    let own = std::process::id().to_string();
    for process in std::fs::read_dir("/proc")?.flatten() {
        let id = process.file_name().to_string_lossy().into_owned();
        if id == own || !id.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let files = std::fs::read_dir(process.path().join("fd"));
        for file in files.into_iter().flatten().flatten() {
            let about = std::fs::metadata(file.path());
            if about.is_ok_and(|about| about.file_type().is_block_device() && about.rdev() == number) {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Ok(Some(format!("{id} ({})", name.trim())));
            }
        }
    }
    Ok(None)
}

fn busy(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Busy, format!("the device is in use: {why}"))
        .with("path", path.display())
        .hint("Nothing was written. End what uses it first.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use std::process::Command;

    use disksnap_test_support::skip;

    use super::*;

    struct Loop(PathBuf);

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("--detach").arg(&self.0).output();
        }
    }

    #[test]
    fn zeroes_that_end_within_a_block_are_written_by_hand_only_there() {
        const SIZE: u64 = (24 << 20) + 512 * 3;
        let file = tempfile::NamedTempFile::new().unwrap();
        // The file's last bytes are no whole block: the device ends before them.
        std::fs::write(file.path(), vec![7; usize::try_from(SIZE).unwrap() + 100]).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output();
        let device = match made {
            Ok(made) if made.status.success() => Loop(String::from_utf8(made.stdout).unwrap().trim().into()),
            other => skip!("loop", "no loop device: {other:?}"),
        };
        let too_large = Device::open(&device.0, SIZE + 100).unwrap_err();
        assert_eq!(too_large.kind(), ErrorKind::NoSpace, "{too_large}");
        let mut opened = Device::open(&device.0, SIZE).unwrap();
        opened.data(0, &[1; 1000]).unwrap();
        opened.zero(1000, SIZE - 1000 - 412).unwrap();
        opened.data(SIZE - 412, &[2; 412]).unwrap();
        opened.finish().unwrap();
        let content = std::fs::read(&device.0).unwrap();
        let end = usize::try_from(SIZE).unwrap();
        assert_eq!(content.len(), end);
        assert!(content[..1000].iter().all(|byte| *byte == 1));
        assert!(content[1000..end - 412].iter().all(|byte| *byte == 0));
        assert!(content[end - 412..].iter().all(|byte| *byte == 2));
        let room = file.path().metadata().unwrap().blocks() * 512;
        assert!(room < 1 << 20, "{room} bytes were written");
    }
}
