//! Putting a snapshot back: `lvconvert --merge` (lvconvert(8)), which gives the snapshot up.
//!
//! A merge of a thin snapshot cuts the tie between the volume and its other thin snapshots: these are put back by
//! `swap` instead.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use disksnap_core::{Affected, Error, ErrorKind, Host, Peer, Result, Revert, SnapshotId, Unit};

use crate::lvm2::Lvm;
use crate::snapshot::Made;
use crate::swap;
use crate::volume::Volume;
use crate::{blocking, remembered};

/// How long a merge may make no progress before it is taken up anew. lvm2 looks at one every 15 seconds
/// (`activation/polling_interval` of lvm.conf(5)); nobody does once the process that did has died.
const UNWATCHED: Duration = Duration::from_secs(20);

/// How long a merge may make no progress before it is left to itself.
const STANDSTILL: Duration = Duration::from_mins(1);

/// How long is waited before a merge is looked at again: first, and at most.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1);

/// The merge of a snapshot into its origin.
#[derive(Debug)]
pub(crate) struct Merging;

#[async_trait]
impl Revert for Merging {
    /// At once where nothing has the origin open. Else LVM does it when the origin is next activated, and
    /// the answer says so.
    async fn revert(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        let made: Made = remembered(&unit.data)?;
        let (count, thin) = (others(&made, peers), made.thin);
        let dir = host.image_dir().to_owned();
        let merged = blocking(move || merge(&made, &dir)).await?;
        let warnings = match (count, thin) {
            (0, _) => Vec::new(),
            (_, true) => vec![format!(
                "{count} other thin snapshots of the same volume are no longer tied to it in LVM's own lists (`lvs`); \
                 disksnap reads them and puts them back as before"
            )],
            (_, false) => vec![format!(
                "{count} other snapshots of the same volume take what the merge overwrites; a small one may overflow"
            )],
        };
        Ok(match merged {
            Merged::Done => Affected {
                warnings,
                ..Affected::default()
            },
            Merged::Kept => Affected {
                unit: Some(unit.clone()),
                ..Affected::default()
            },
            Merged::Later(why) => Affected {
                unit: Some(unit.clone()),
                deferred: Some(why),
                warnings,
                ..Affected::default()
            },
        })
    }
}

/// How many snapshots of the same origin there are besides.
fn others(made: &Made, peers: &[Peer]) -> usize {
    let of_it = |peer: &&Peer| {
        remembered::<Made>(&peer.unit.data)
            .is_ok_and(|other| other.group == made.group && other.origin == made.origin)
    };
    peers.iter().filter(of_it).count()
}

#[derive(Debug, PartialEq, Eq)]
enum Merged {
    /// The snapshot went with it.
    Done,
    /// The snapshot is still there.
    Kept,
    Later(String),
}

fn merge(made: &Made, dir: &Path) -> Result<Merged> {
    let lvm = Lvm::find()?;
    let volumes = lvm.volumes_of(&made.group)?;
    let Some(snapshot) = made.among(&volumes) else {
        return after(made, &volumes);
    };
    if made.thin && snapshot.origin != made.origin {
        return swap::put_back(&lvm, made, dir).map(|()| Merged::Kept);
    }
    if snapshot.merging {
        // Asked for before, by a call that did not live to tell.
        if !origin(made, &volumes)?.open {
            activate_anew(&lvm, made)?;
        }
    } else {
        if snapshot.invalid {
            let what = format!(
                "the snapshot {} has overflowed, and cannot be put back",
                made.full_name()
            );
            return Err(Error::new(ErrorKind::Broken, what));
        }
        if origin(made, &volumes)?.merging {
            let what = format!("another snapshot is being merged into {}", made.origin_name());
            return Err(Error::new(ErrorKind::Busy, what));
        }
        begin(&lvm, made)?;
    }
    wait(&lvm, made)
}

/// Asks for the merge. That of a call that was killed may still have been on its way: then it is as well.
fn begin(lvm: &Lvm, made: &Made) -> Result<()> {
    let begun = lvm.run("lvconvert", &["-y", "--merge", &made.full_name()], None);
    let Err(error) = begun else { return Ok(()) };
    let volumes = lvm.volumes_of(&made.group)?;
    match made.among(&volumes) {
        Some(snapshot) if !snapshot.merging => Err(error),
        _ => Ok(()),
    }
}

/// A snapshot that is not there: merged, since its health was looked at before.
fn after(made: &Made, volumes: &[Volume]) -> Result<Merged> {
    origin(made, volumes).map(|_| Merged::Done)
}

fn origin<'a>(made: &Made, volumes: &'a [Volume]) -> Result<&'a Volume> {
    let of = |volume: &&Volume| volume.group == made.group && volume.name == made.origin;
    volumes.iter().find(of).ok_or_else(|| {
        let what = format!("the origin {} does not exist any more", made.origin_name());
        Error::new(ErrorKind::NotFound, what)
    })
}

/// A merge begins when its origin is activated.
fn activate_anew(lvm: &Lvm, made: &Made) -> Result<()> {
    let name = made.origin_name();
    lvm.run("lvchange", &["-an", &name], None)?;
    lvm.run("lvchange", &["-ay", &name], None).map(drop)
}

/// Waits for the end of a merge, as long as it gets on.
fn wait(lvm: &Lvm, made: &Made) -> Result<Merged> {
    let (mut last, mut since) = (None, Instant::now());
    let (mut pause, mut anew) = (SHORTEST, false);
    loop {
        let volumes = lvm.volumes_of(&made.group)?;
        let Some(snapshot) = made.among(&volumes) else {
            return after(made, &volumes);
        };
        if snapshot.merge_failed {
            let what = format!("the merge of {} has failed", made.full_name());
            return Err(Error::new(ErrorKind::Io, what).leaving(disksnap_core::Effect::Unknown));
        }
        let name = made.origin_name();
        if origin(made, &volumes)?.open {
            return Ok(Merged::Later(format!(
                "{name} is in use: LVM puts the snapshot back when the volume is next activated, and what is written \
                 until then is lost. Shut down what uses it, then `lvchange -an {name}` and `lvchange -ay {name}`"
            )));
        }
        if snapshot.data_percent != last {
            (last, since) = (snapshot.data_percent, Instant::now());
        } else if !anew && since.elapsed() > UNWATCHED {
            activate_anew(lvm, made)?;
            anew = true;
        } else if since.elapsed() > STANDSTILL {
            return Ok(Merged::Later(format!(
                "the merge into {name} goes on in the background; `lvs -a {name}` shows how far it is"
            )));
        }
        sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
}
