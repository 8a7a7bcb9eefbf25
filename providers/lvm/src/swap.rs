//! Putting back a thin snapshot that LVM does not tie to its volume (any more): a writable snapshot of the snapshot
//! takes the volume's place and name.
//!
//! It is done in steps that each leave a state the next call goes on from. The snapshot stays.

use disksnap_core::{Effect, Error, ErrorKind, Result};

use crate::lvm2::Lvm;
use crate::snapshot::Made;
use crate::volume::Volume;

/// Does what is left to be done.
///
/// # Errors
/// `Busy` when something has the volume open; nothing is changed then.
pub(crate) fn put_back(lvm: &Lvm, made: &Made) -> Result<()> {
    let (new, old) = (made.side_name("back"), made.side_name("old"));
    let volumes = lvm.volumes_of(&made.group)?;
    let named = |name: &str| {
        volumes
            .iter()
            .find(|volume| volume.group == made.group && volume.name == name)
    };
    match (named(&made.origin), named(&new), named(&old)) {
        (Some(_), None, Some(_)) => {}
        (None, Some(_), Some(_)) => rename(lvm, made, &new, &made.origin)?,
        (Some(origin), Some(_), None) => {
            refuse_open(origin)?;
            exchange(lvm, made, &new, &old)?;
        }
        (Some(origin), None, None) => {
            refuse_open(origin)?;
            make(lvm, made, &new, origin)?;
            exchange(lvm, made, &new, &old)?;
        }
        _ => {
            let what = format!("the volume {} does not exist any more", made.origin_name());
            return Err(Error::new(ErrorKind::NotFound, what));
        }
    }
    let old = format!("{}/{old}", made.group);
    lvm.run("lvremove", &["-y", &old], None)
        .map(drop)
        .map_err(half_done)
}

fn refuse_open(origin: &Volume) -> Result<()> {
    if !origin.open {
        return Ok(());
    }
    let what = format!("{} is in use, and cannot be exchanged", origin.full_name());
    Err(Error::new(ErrorKind::Busy, what).hint("Shut down what uses it, then revert again."))
}

/// What will be the volume, with the tags of the one that is.
fn make(lvm: &Lvm, made: &Made, new: &str, origin: &Volume) -> Result<()> {
    let mut arguments = vec!["-y", "-s", "-kn", "-ay", "-prw", "-n", new];
    arguments.extend(origin.tags.iter().flat_map(|tag| ["--addtag", tag.as_str()]));
    let snapshot = made.full_name();
    arguments.push(&snapshot);
    lvm.run("lvcreate", &arguments, None).map(drop)
}

fn exchange(lvm: &Lvm, made: &Made, new: &str, old: &str) -> Result<()> {
    rename(lvm, made, &made.origin, old)?;
    rename(lvm, made, new, &made.origin)
}

fn rename(lvm: &Lvm, made: &Made, from: &str, to: &str) -> Result<()> {
    let renamed = lvm.run("lvrename", &[&made.group, from, to], None);
    renamed.map(drop).map_err(half_done)
}

/// The next call goes on where this one ended.
fn half_done(error: Error) -> Error {
    error.leaving(Effect::Unknown)
}
