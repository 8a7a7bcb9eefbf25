//! Putting a snapshot's content back, with the domain off: a fresh, empty overlay over its base takes the place of the
//! disk's present one, in one rename.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use async_trait::async_trait;
use disksnap_core::{
    Affected, Error, ErrorKind, Health, Host, Owner, Peer, Result, Revert, SnapshotId, Unit, faults,
};
use disksnap_image_file::{MadeFile, remove_file};

use crate::busy;
use crate::image::{CALLED, fill_in};
use crate::inspect;
use crate::layer::{Layer, chain_of, disk_of, in_use, is_in_use, unfit};
use crate::record::{Kin, Record};

/// What reverts. It has no state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExternalRevert;

#[async_trait]
impl Revert for ExternalRevert {
    async fn revert(&self, host: &dyn Host, _: SnapshotId, unit: &Unit, peers: &[Peer]) -> Result<Affected> {
        let record = Record::of(unit)?;
        let kin = Kin::of(&record.target, peers)?;
        if host.state().await?.is_active() {
            return Err(busy(
                "the domain is not off, and its disk cannot be exchanged under it",
                "Shut the domain down, then revert.",
            ));
        }
        refuse_untrusted(&record)?;
        let disk = host.domain().disk(&record.target)?;
        let layers = chain_of(disk)?;
        let top = layers.first().ok_or_else(|| unfit("the disk has no image"))?;
        refuse_foreign(&record, &kin, top)?;
        if is_in_use(&top.path) {
            return Err(in_use(&top.path));
        }
        replace(&record, &top.path)?;
        let mut chain = vec![top.clone()];
        chain.extend(record.files().cloned());
        let ours = overlays(&record, &kin);
        let mut affected = Affected {
            unit: Some(restood(&record, &chain, &ours).unit(disk)?),
            disks: vec![disk_of(disk, &chain)],
            ..Affected::default()
        };
        for peer in &kin {
            let changed = restood(&peer.record, &chain, &ours);
            affected.peers.extend(peer.changed(&changed, disk)?);
        }
        Ok(affected)
    }
}

fn refuse_untrusted(record: &Record) -> Result<()> {
    // Without an overlay of its own the base is as trustworthy: nobody writes to it.
    let bare = Record {
        overlay: None,
        ..record.clone()
    };
    match inspect::files(&bare)? {
        Some(Health::Broken(why) | Health::Gone(why)) => Err(Error::new(ErrorKind::Broken, why)),
        _ => Ok(()),
    }
}

/// Only an overlay of ours can go: another image may be all that there is of something.
fn refuse_foreign(record: &Record, kin: &[Kin], top: &Layer) -> Result<()> {
    let mut records = std::iter::once(record).chain(kin.iter().map(|peer| &peer.record));
    let mut all = records.clone();
    if all.any(|r| r.files().any(|layer| layer.is_at(&top.path))) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "the domain's document names {}, which a snapshot is read from",
                top.path.display()
            ),
        )
        .hint("Bring the document up to date with `disksnap domain update`."));
    }
    let made = |r: &Record| r.overlay.iter().chain(&r.streamed).any(|path| top.is_at(path));
    if records.any(made) {
        return Ok(());
    }
    Err(busy(
        format!(
            "the disk's image {} is not one that disksnap has made",
            top.path.display()
        ),
        "Merge it, or take a snapshot of it first, so that what it holds is not lost.",
    ))
}

/// Puts an empty overlay over the base in the place of the one at `path`.
fn replace(record: &Record, path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.disksnap-revert"));
    // What a killed revert left.
    remove_file(&new)?;
    let owner = path
        .metadata()
        .ok()
        .filter(|_| rustix::process::geteuid().is_root());
    let owner = owner.map(|m| Owner {
        uid: m.uid(),
        gid: m.gid(),
    });
    let made = MadeFile::own(new);
    made.create(CALLED, owner, |file| {
        fill_in(file, path, &record.base, record.size)
    })?;
    let new = &made.path;
    let renamed = faults::around("file", "rename image", || std::fs::rename(new, path));
    renamed.map_err(|e| {
        Error::io(
            format!("cannot put the overlay in the place of {}", path.display()),
            e,
        )
    })
}

/// Every image that this method has made and a record still names.
pub(crate) fn overlays(record: &Record, kin: &[Kin]) -> Vec<std::path::PathBuf> {
    let records = std::iter::once(record).chain(kin.iter().map(|peer| &peer.record));
    let of = |r: &Record| {
        let base = r.orphan.then(|| r.base.path.clone());
        let made = r.overlay.iter().chain(&r.streamed).cloned();
        made.chain(base).collect::<Vec<_>>()
    };
    records.flat_map(of).collect()
}

/// The record of a snapshot once the disk has this chain: what of it stands on the base.
fn restood(record: &Record, chain: &[Layer], ours: &[std::path::PathBuf]) -> Record {
    let at = chain
        .iter()
        .skip(1)
        .position(|layer| layer.is_at(&record.base.path));
    let mut record = record.clone();
    record.overlay = at.map(|at| chain[at].path.clone());
    if record.overlay.is_some() {
        record.streamed = None;
    }
    record.orphan = at.is_none() && ours.iter().any(|path| record.base.is_at(path));
    record
}
