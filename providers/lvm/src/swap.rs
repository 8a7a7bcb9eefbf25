//! Putting back a thin snapshot that LVM does not tie to its volume (any more): a writable snapshot of the snapshot
//! takes the volume's place and name.
//!
//! It is done in steps that each leave a state the next call goes on from. The snapshot stays. LVM has no command that
//! exchanges two volumes, so their two renames, and the removal after them, are given to one process of lvm2 as a
//! script: whatever becomes of ours, the volume's name leads to what it led to before or to the new content. Only where
//! that process itself dies between two of its commands, with the whole machine say, does the name lead nowhere until the
//! next call; to wrong data it never leads. A file that the process holds locked tells the next call that it still works.

use std::fs::File;
use std::path::Path;

use disksnap_core::{Effect, Error, ErrorKind, Result};

use crate::lvm2::Lvm;
use crate::marker;
use crate::snapshot::Made;
use crate::volume::Volume;

/// Does what is left to be done, with a file in this directory until it is.
///
/// # Errors
/// `Busy` when something has the volume open, and `NoSpace` when the pool has no room; nothing is changed then.
pub(crate) fn put_back(lvm: &Lvm, made: &Made, dir: &Path) -> Result<()> {
    let file = dir.join(format!("lvm-{}", made.side_name("back")));
    marker::make(&file)?;
    let gone = || {
        Error::new(
            ErrorKind::Internal,
            format!("{} has just been removed", file.display()),
        )
    };
    let held = marker::close(&file)?.ok_or_else(gone)?;
    let put = exchange(lvm, made, &file, held);
    marker::remove(&file)?;
    put
}

fn exchange(lvm: &Lvm, made: &Made, file: &Path, held: File) -> Result<()> {
    let (new, old) = (made.side_name("back"), made.side_name("old"));
    let volumes = lvm.volumes_of(&made.group)?;
    let named = |name: &str| volumes.iter().find(|volume| volume.name == name);
    let take_over: [&str; 4] = ["lvrename", &made.group, &new, &made.origin];
    let give_way: [&str; 4] = ["lvrename", &made.group, &made.origin, &old];
    let discarded = format!("{}/{old}", made.group);
    let discard: [&str; 3] = ["lvremove", "-y", &discarded];
    let rest: &[&[&str]] = match (named(&made.origin), named(&new), named(&old)) {
        (Some(_), None, Some(_)) => &[&discard],
        (None, Some(_), Some(_)) => &[&take_over, &discard],
        (Some(origin), new_volume, None) => {
            refuse_open(origin)?;
            if new_volume.is_none() {
                let held = held.try_clone().map_err(|e| Error::io("cannot hold a file", e))?;
                make(lvm, made, &new, origin, held)?;
            }
            &[&give_way, &take_over, &discard]
        }
        _ => {
            let what = format!("the volume {} does not exist any more", made.origin_name());
            return Err(Error::new(ErrorKind::NotFound, what));
        }
    };
    // The next call goes on where this one ended.
    lvm.script(rest, file, held)
        .map_err(|error| error.leaving(Effect::Unknown))
}

fn refuse_open(origin: &Volume) -> Result<()> {
    if !origin.open {
        return Ok(());
    }
    let what = format!("{} is in use, and cannot be exchanged", origin.full_name());
    Err(Error::new(ErrorKind::Busy, what).hint("Shut down what uses it, then revert again."))
}

/// What will be the volume, with the tags of the one that is.
fn make(lvm: &Lvm, made: &Made, new: &str, origin: &Volume, held: File) -> Result<()> {
    let mut arguments = vec!["-y", "-s", "-kn", "-ay", "-prw", "-n", new];
    arguments.extend(origin.tags.iter().flat_map(|tag| ["--addtag", tag.as_str()]));
    let snapshot = made.full_name();
    arguments.push(&snapshot);
    lvm.run("lvcreate", &arguments, Some(held)).map(drop)
}
