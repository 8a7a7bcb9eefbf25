//! A raw copy of a disk's earlier state, brought up to date in place.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disksnap_core::{Error, ErrorKind, Result, faults};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fcntl_lock};
use rustix::io::Errno;

use crate::disk::run_blocking;

/// What zeroes are written from, where a file system makes no holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A raw file that is being changed. It is locked as QEMU locks its images, so that neither it nor another run has it open.
#[derive(Debug)]
pub(crate) struct RawCopy {
    file: Arc<File>,
    path: PathBuf,
    length: u64,
}

impl RawCopy {
    /// Opens what must be a file already.
    pub(crate) async fn open(path: &Path) -> Result<Self> {
        let path = path.to_owned();
        run_blocking(move || {
            let failed = |e| failed(&path, e);
            // Before it is opened: opening a pipe would wait.
            if !path.metadata().map_err(failed)?.is_file() {
                let error = Error::new(ErrorKind::Invalid, "only a regular file is brought up to date");
                return Err(error.with("path", path.display()));
            }
            let file = OpenOptions::new().read(true).write(true).open(&path);
            let file = file.map_err(failed)?;
            match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::ACCESS) => return Err(in_use(&path)),
                Err(error) => return Err(failed(error.into())),
            }
            let length = file.metadata().map_err(failed)?.len();
            let file = Arc::new(file);
            Ok(Self { file, path, length })
        })
        .await
    }

    /// Refuses a file that cannot be what it is taken for, by its length: that of the disk `earlier`, where it is known, or
    /// `now`, which a run that was cut short leaves.
    pub(crate) fn check(&self, earlier: Option<u64>, now: u64) -> Result<()> {
        if self.length == now || Some(self.length) == earlier {
            return Ok(());
        }
        let was = match earlier {
            Some(earlier) if earlier != now => {
                format!("the disk had {earlier} bytes at the checkpoint and has {now} in the snapshot")
            }
            _ => format!("the disk has {now} bytes"),
        };
        let error = Error::new(
            ErrorKind::Invalid,
            format!(
                "this is no copy of the disk: it has {} bytes, and {was}",
                self.length
            ),
        );
        Err(error
            .with("path", self.path.display())
            .hint("Give the raw file that holds the disk as it was at the checkpoint, or read the disk whole with --to."))
    }

    /// Gives it this length; what it grows by is zero.
    pub(crate) async fn resize(&self, length: u64) -> Result<()> {
        if self.length == length {
            return Ok(());
        }
        self.run(move |file| file.set_len(length)).await
    }

    pub(crate) async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        self.run(move |file| file.write_all_at(&data, offset)).await
    }

    /// Makes a range zero: a hole, where the file system makes them.
    pub(crate) async fn zero(&self, range: Range<u64>) -> Result<()> {
        self.run(move |file| zero(file, range)).await
    }

    /// Puts on disk what was written.
    pub(crate) async fn sync(&self) -> Result<()> {
        self.run(File::sync_all).await
    }

    /// What an error leaves: the file is neither the earlier state nor the later.
    pub(crate) fn unfinished(&self, error: Error) -> Error {
        let next = if error.kind() == ErrorKind::Broken {
            "It cannot be brought up to date any more: remove it, and read the disk whole from a new snapshot."
        } else {
            "Repeat the same command before the file is used, and keep the snapshot and the checkpoint until then: that is safe \
             as often as it takes."
        };
        Error::new(
            error.kind(),
            "the file is between the two states: not all that changed is in it",
        )
        .retryable(error.is_retryable())
        .with("path", self.path.display())
        .hint(next)
        .because(error)
    }

    async fn run(&self, work: impl FnOnce(&File) -> io::Result<()> + Send + 'static) -> Result<()> {
        let (file, path) = (Arc::clone(&self.file), self.path.clone());
        run_blocking(move || {
            faults::around("file", "change copy", || work(&file)).map_err(|e| failed(&path, e))
        })
        .await
    }
}

fn zero(file: &File, range: Range<u64>) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, range.start, range.end - range.start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeroes(file, range),
        other => Ok(other?),
    }
}

fn write_zeroes(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(range.end - at)
            .unwrap_or(usize::MAX)
            .min(ZEROES.len());
        file.write_all_at(&ZEROES[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::io("cannot change the file", error).with("path", path.display())
}

fn in_use(path: &Path) -> Error {
    Error::new(
        ErrorKind::Busy,
        "another program has the file open and locked: a hypervisor, or another run",
    )
    .with("path", path.display())
    .hint("Nothing was changed. Only a copy that nothing uses can be brought up to date.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    #[tokio::test]
    async fn what_is_written_zeroed_and_cut_is_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy.raw");
        std::fs::write(&path, vec![7; 300_000]).unwrap();
        let copy = RawCopy::open(&path).await.unwrap();
        copy.resize(250_001).await.unwrap();
        copy.write(10, vec![1; 5]).await.unwrap();
        copy.zero(70_001..200_000).await.unwrap();
        copy.sync().await.unwrap();
        let mut expected = vec![7; 250_001];
        expected[10..15].fill(1);
        expected[70_001..200_000].fill(0);
        assert!(std::fs::read(&path).unwrap() == expected);
        write_zeroes(&copy.file, 3..200_000).unwrap();
        expected[3..200_000].fill(0);
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    #[tokio::test]
    async fn what_is_no_copy_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy.raw");
        std::fs::write(&path, vec![7; 1024]).unwrap();
        let copy = RawCopy::open(&path).await.unwrap();
        for (earlier, now, fits) in [
            (Some(1024), 2048, true),
            (Some(512), 1024, true),
            (None, 1024, true),
            (None, 2048, false),
            (Some(512), 2048, false),
            (Some(2048), 2048, false),
        ] {
            let checked = copy.check(earlier, now).map_err(|e| e.kind());
            assert_eq!(checked, if fits { Ok(()) } else { Err(ErrorKind::Invalid) });
        }
        let kind = |path: &Path| {
            let path = path.to_owned();
            async move { RawCopy::open(&path).await.unwrap_err().kind() }
        };
        assert_eq!(kind(dir.path()).await, ErrorKind::Invalid);
        assert_eq!(kind(Path::new("/dev/null")).await, ErrorKind::Invalid);
        assert_eq!(kind(&dir.path().join("none")).await, ErrorKind::NotFound);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
