//! What differs between two states of a file, as a stream: fed by a thread that goes through the extents of both, as far
//! as somebody wants to know.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use disksnap_core::{Changed, Error, ErrorKind, Precision, Result};
use disksnap_image_file::file_system;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::differences::{Joining, differences};
use crate::extents::{Extents, Window};

/// A guest's disk is whole sectors, the last one filled up with zeros.
pub(crate) const SECTOR: u64 = 512;
/// How many ranges wait at most for whoever wants them.
const WAITING: usize = 1024;
/// How often a place of a file is looked at that balancing moves at that very moment.
const TRIES: usize = 100;
/// Why more may be told than was written.
const SUPERSET: &str = "what was written is told by where btrfs has it: what was moved meanwhile, by defragmenting or \
    deduplicating, is told too";

/// A file as it is in two read-only snapshots.
#[derive(Debug)]
pub(crate) struct TwoStates {
    earlier: Extents,
    later: Extents,
    /// The later one's.
    path: PathBuf,
}

impl TwoStates {
    /// # Errors
    /// `Unsupported` where they are on two file systems; `Denied` for those who may not search its trees.
    pub(crate) fn open(earlier: &Path, later: &Path) -> Result<Self> {
        let of = |path: &Path| file_system(path).map_err(|e| failed(path, e));
        if of(earlier)? != of(later)? {
            let (earlier, later) = (earlier.display(), later.display());
            let what = format!("{earlier} and {later} are on two file systems, and share no extents");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(Self {
            earlier: Extents::open(earlier).map_err(|e| failed(earlier, e))?,
            later: Extents::open(later).map_err(|e| failed(later, e))?,
            path: later.to_owned(),
        })
    }

    /// What differs in the file, up to the end of the last sector of the longer one of the two.
    pub(crate) fn changed(self) -> Changed {
        let size = self.later.size();
        let (to, receiver) = mpsc::channel(WAITING);
        let feed = move || {
            let mut telling = Telling {
                joining: Joining::default(),
                to,
            };
            let how = self.compare(&mut telling);
            telling.end(how);
        };
        let fed = Fed {
            receiver,
            feeding: Some(spawn_blocking(feed)),
        };
        Changed {
            size,
            precision: Precision::Superset(SUPERSET.to_owned()),
            ranges: unfold(fed, Fed::next).boxed(),
        }
    }

    fn compare(mut self, telling: &mut Telling) -> Result<()> {
        let (was, is) = (self.earlier.size(), self.later.size());
        let (mut at, common) = (0, was.min(is));
        while at < common && telling.is_wanted() {
            let (earlier, later) = self.windows(at)?;
            let to = earlier.end.min(later.end).min(common);
            for range in differences((&earlier.pieces, &later.pieces), (at, to)) {
                telling.tell(range);
            }
            let went_on = [self.earlier.advance(&earlier, to), self.later.advance(&later, to)];
            if to == at && went_on == [false; 2] {
                return Err(failed(&self.path, io::Error::other("its tree is damaged")));
            }
            at = to;
        }
        if was != is {
            // With what the last sector of a guest's disk has beyond the file.
            telling.tell(common..was.max(is).next_multiple_of(SECTOR));
        }
        Ok(())
    }

    /// What both hold from a place on, at one time. While btrfs balances its block groups it moves extents, also those
    /// of snapshots, and may then give their addresses to others.
    fn windows(&self, at: u64) -> Result<(Window, Window)> {
        let failed = |e| failed(&self.path, e);
        for _ in 0..TRIES {
            let earlier = self.earlier.window(at).map_err(failed)?;
            let later = self.later.window(at).map_err(failed)?;
            if self.earlier.window(at).map_err(failed)? == earlier {
                return Ok((earlier, later));
            }
        }
        let what = format!("btrfs is moving {} at the moment", self.path.display());
        Err(Error::new(ErrorKind::Busy, what).hint("Try again after `btrfs balance` has ended."))
    }
}

/// The feeding end.
struct Telling {
    joining: Joining,
    to: mpsc::Sender<Result<Range<u64>>>,
}

impl Telling {
    fn is_wanted(&self) -> bool {
        !self.to.is_closed()
    }

    fn tell(&mut self, range: Range<u64>) {
        if let Some(whole) = self.joining.add(range) {
            self.send(Ok(whole));
        }
    }

    fn end(mut self, how: Result<()>) {
        let last = std::mem::take(&mut self.joining).end();
        match (how, last) {
            (Err(error), _) => self.send(Err(error)),
            (Ok(()), Some(last)) => self.send(Ok(last)),
            (Ok(()), None) => {}
        }
    }

    /// Waits while there are many that nobody has taken yet.
    fn send(&self, told: Result<Range<u64>>) {
        // Where it fails nobody wants to know any more.
        let _ = self.to.blocking_send(told);
    }
}

/// The other end. Dropping it ends the feeding.
struct Fed {
    receiver: mpsc::Receiver<Result<Range<u64>>>,
    feeding: Option<JoinHandle<()>>,
}

impl Fed {
    /// The next range, if there is one. That the thread has died must not look like the end.
    async fn next(mut self) -> Option<(Result<Range<u64>>, Self)> {
        if let Some(told) = self.receiver.recv().await {
            return Some((told, self));
        }
        let died = self.feeding.take()?.await.err()?;
        let error = Error::new(ErrorKind::Internal, "the comparison died").because(died);
        Some((Err(error), self))
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    let what = format!("cannot look at the extents of {}", path.display());
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = Error::io(what, error);
    if denied {
        error.hint("Compare as root: nobody else may search the trees of btrfs.")
    } else {
        error
    }
}
