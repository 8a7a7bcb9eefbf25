//! What differs between a disk of two snapshots, without reading its data: by the extents that its image lies in.
//!
//! Nobody writes to an extent that two read-only snapshots have: whatever wrote to the image in between, hole punching,
//! reflinks and NOCOW files among it, left another extent in one of them, or none. So a place of the image is the same in
//! both if both have the same part of the same extent there. That is so whichever of them is the older one, whether the image
//! was another file meanwhile (a revert makes it a clone), and in whatever subvolume of the file system it was.
//!
//! Found by searching the tree of each snapshot for the extents of the one file (`extents`). The other ways, for an
//! image of 1 GiB and 20 000 random writes of 4 KiB:

use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use disksnap_core::{
    Changed, Compare, Error, ErrorKind, Health, Host, Peer, Precision, Ranges, Result, Unit,
};
use disksnap_image_file::file_system;
use futures_util::StreamExt;
use futures_util::stream::unfold;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::differences::{Joining, differences};
use crate::extents::{Extents, Window};
use crate::snapshot::{Made, MadeImage};
use crate::{blocking, remembered};

/// How many ranges wait at most for whoever wants them.
const WAITING: usize = 1024;
/// How often a place of a file is looked at that balancing moves at that very moment.
const TRIES: usize = 100;
/// Why more may be told than was written.
const SUPERSET: &str = "what was written is told by where btrfs has it: what was moved meanwhile, by defragmenting or \
    deduplicating, is told too";

/// What tells how two snapshots differ.
#[derive(Debug)]
pub(crate) struct CompareImages;

impl CompareImages {
    pub(crate) fn of(unit: &Unit) -> Option<Self> {
        let made: Made = remembered(&unit.data).ok()?;
        made.comparable.then_some(Self)
    }
}

#[async_trait]
impl Compare for CompareImages {
    async fn changed(&self, _: &dyn Host, earlier: &Peer, later: &Peer, target: &str) -> Result<Changed> {
        let both = Snapshots {
            earlier: remembered(&earlier.unit.data)?,
            later: remembered(&later.unit.data)?,
        };
        let target = target.to_owned();
        let begun = move || both.begin(&target).map_err(|e| e.with("disk", &target));
        let (size, files, both) = blocking(begun).await?;
        Ok(Changed {
            size,
            precision: Precision::Superset(SUPERSET.to_owned()),
            ranges: files.ranges(both),
        })
    }
}

/// Two snapshots, on one file system.
#[derive(Debug)]
struct Snapshots {
    earlier: Made,
    later: Made,
}

impl Snapshots {
    /// Looks whether the disk can be compared at all.
    fn begin(self, target: &str) -> Result<(u64, Files, Self)> {
        self.are_good()?;
        let (was, is) = (image(&self.earlier, target)?, image(&self.later, target)?);
        if was.format != "raw" || is.format != "raw" {
            let what = format!("images of the format {} cannot be compared yet", is.format);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let files = Files::open(&was.file, &is.file)?;
        Ok((is.size, files, self))
    }

    /// Both hold their instants, so nobody can have written to what they have in common.
    fn are_good(&self) -> Result<()> {
        for made in [&self.earlier, &self.later] {
            if let Health::Broken(why) | Health::Gone(why) = made.health() {
                return Err(Error::new(ErrorKind::Broken, why).hint("Take all of the disk instead."));
            }
        }
        Ok(())
    }
}

/// Whether an image of this format, here, could be compared with another one. Tried, not guessed.
pub(crate) fn is_possible(file: &Path, format: &str) -> bool {
    format == "raw" && Extents::open(file).is_ok()
}

fn image<'a>(made: &'a Made, target: &str) -> Result<&'a MadeImage> {
    let found = made.images.iter().find(|image| image.target == target);
    found.ok_or_else(|| {
        let shown = made.dir.join(&made.name);
        let what = format!("the disk is not in the snapshot {}", shown.display());
        Error::new(ErrorKind::Unsupported, what)
    })
}

/// A file as it is in two snapshots.
#[derive(Debug)]
struct Files {
    earlier: Extents,
    later: Extents,
    path: PathBuf,
}

impl Files {
    fn open(earlier: &Path, later: &Path) -> Result<Self> {
        let of = |path: &Path| file_system(path).map_err(|e| failed(path, e));
        if of(earlier)? != of(later)? {
            let what = format!(
                "{} and {} are on different file systems, which share no extents",
                earlier.display(),
                later.display()
            );
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(Self {
            earlier: Extents::open(earlier).map_err(|e| failed(earlier, e))?,
            later: Extents::open(later).map_err(|e| failed(later, e))?,
            path: later.to_owned(),
        })
    }

    /// The ranges in which they may differ, ascending and none touching another. At the end it is looked again whether
    /// the snapshots are still there.
    fn ranges(self, of: Snapshots) -> Ranges {
        let (sender, receiver) = mpsc::channel(WAITING);
        let told = move || {
            let mut joining = Joining::default();
            let mut tell = |range| {
                let sent = joining
                    .add(range)
                    .map_or(Ok(()), |whole| sender.blocking_send(Ok(whole)));
                if sent.is_err() || sender.is_closed() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            };
            let compared = self.compare(&mut tell).and_then(|()| of.are_good());
            let last = match compared {
                Ok(()) => joining.end().map(Ok),
                Err(error) => Some(Err(error)),
            };
            if let Some(last) = last {
                // Nobody wants it any more, then.
                let _ = sender.blocking_send(last);
            }
        };
        let feeding = Some(spawn_blocking(told));
        unfold((receiver, feeding), next).boxed()
    }

    fn compare(mut self, tell: &mut dyn FnMut(Range<u64>) -> ControlFlow<()>) -> Result<()> {
        let failed = |path: &Path, e| failed(path, e);
        let path = self.path.clone();
        let (was, is) = (self.earlier.size(), self.later.size());
        let common = was.min(is);
        let mut at = 0;
        while at < common {
            let (earlier, later) = self.windows(at)?;
            let to = earlier.end.min(later.end).min(common);
            let mut stopped = ControlFlow::Continue(());
            differences((&earlier.pieces, &later.pieces), (at, to), |range| {
                if stopped.is_continue() {
                    stopped = tell(range);
                }
            });
            // An empty range asks whether anyone still listens.
            if stopped.is_break() || tell(to..to).is_break() {
                return Ok(());
            }
            let advanced = [self.earlier.advance(&earlier, to), self.later.advance(&later, to)];
            if to == at && advanced == [false; 2] {
                return Err(failed(&path, io::Error::other("its tree is damaged")));
            }
            at = to;
        }
        let _ = tell(common..is);
        Ok(())
    }

    /// What both hold from a place on, at one time. While btrfs balances its block groups it moves extents, in
    /// snapshots too, and gives their addresses to others.
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

/// The next range, if there is one. That the feeding died must not look like its end.
async fn next(
    (mut receiver, feeding): (mpsc::Receiver<Result<Range<u64>>>, Option<JoinHandle<()>>),
) -> Option<(
    Result<Range<u64>>,
    (mpsc::Receiver<Result<Range<u64>>>, Option<JoinHandle<()>>),
)> {
    if let Some(range) = receiver.recv().await {
        return Some((range, (receiver, feeding)));
    }
    let died = feeding?.await.err()?;
    let error = Error::new(ErrorKind::Internal, "the comparison died").because(died);
    Some((Err(error), (receiver, None)))
}

fn failed(path: &Path, error: io::Error) -> Error {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    let error = Error::io(format!("cannot look at the extents of {}", path.display()), error);
    if denied {
        error.hint("Compare as root: only it may search the trees of btrfs.")
    } else {
        error
    }
}
