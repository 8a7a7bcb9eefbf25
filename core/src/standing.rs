//! Which disk the domain stands on, as opposed to what an old document says of it.
//!
//! A snapshot that changed the domain's disk left the former one as its base. A document from before still names
//! that base: starting the domain from it would write to the base and destroy the snapshot.

use crate::{Access, Disk, Error, ErrorKind, Result, RunState, Snapshot};

/// The disk that a snapshot has put in the place of this one, if any has.
fn successor<'a>(disk: &Disk, snapshots: &'a [Snapshot]) -> Option<(&'a Snapshot, &'a Disk)> {
    let of = |snapshot: &'a Snapshot| {
        let record = snapshot.disk(&disk.target)?;
        let modified = record.modified_disk.as_ref()?;
        match &record.access {
            Access::Source { source, .. }
                if Some(source) == disk.source.as_ref() && modified.source != disk.source =>
            {
                Some((snapshot, modified))
            }
            _ => None,
        }
    };
    snapshots.iter().rev().find_map(of)
}

/// The disk as the domain uses it now: what the records say has taken the place of what the document says.
#[must_use]
pub(crate) fn present(disk: &Disk, snapshots: &[Snapshot]) -> Disk {
    let mut present = disk.clone();
    // A record leads one step up a chain, and no chain has more steps than there are records.
    for _ in snapshots {
        match successor(&present, snapshots) {
            Some((_, next)) => present = next.clone(),
            None => break,
        }
    }
    present
}

/// Refuses a document that names the base of a snapshot as the disk of a domain that is off.
///
/// A domain that runs is asked itself what its disks are.
pub(crate) fn refuse_stale<'a>(
    state: &RunState,
    disks: impl IntoIterator<Item = &'a Disk>,
    snapshots: &[Snapshot],
) -> Result<()> {
    if state.is_active() {
        return Ok(());
    }
    for disk in disks {
        if let Some((snapshot, now)) = successor(disk, snapshots) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the domain's document is out of date: it says that the disk is {}, but the snapshot '{}' stands \
                     on that, and the disk is {} now",
                    place(disk),
                    snapshot.name,
                    place(now)
                ),
            )
            .with("disk", &disk.target)
            .hint(
                "Bring the document up to date with `disksnap domain update`, and do not start the domain before: it \
                 would write to the snapshot.",
            ));
        }
    }
    Ok(())
}

fn place(disk: &Disk) -> String {
    match &disk.source {
        Some(source) => source
            .path()
            .map_or_else(|| source.kind().to_owned(), |path| path.display().to_string()),
        None => "empty".to_owned(),
    }
}
