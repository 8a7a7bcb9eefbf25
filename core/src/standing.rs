//! Which disk the domain stands on, as opposed to what an old document says of it.
//!
//! A snapshot that changed the domain's disk left the former one as its base. A document from before still names
//! that base: starting the domain from it would write to the base and destroy the snapshot.

use crate::{
    Access, DataStore, Disk, Dispatcher, Domain, DomainId, Error, ErrorKind, Moved, Result, RunState,
    Snapshot, Source,
};

/// What the records tell of where a domain's disks are.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) moves: Vec<Moved>,
}

impl Standing {
    /// The disk that has taken the place of this one, if any has, and the snapshot that stands on this one, if one does.
    fn successor(&self, disk: &Disk) -> Option<(Option<&Snapshot>, &Disk)> {
        let of = |snapshot: &'_ Snapshot| {
            let record = snapshot.disk(&disk.target)?;
            let modified = record.modified_disk.as_ref()?;
            let here = matches!(&record.access, Access::Source { source, .. } if Some(source) == disk.source.as_ref());
            (here && modified.source != disk.source).then_some(())
        };
        let stands = self
            .snapshots
            .iter()
            .rev()
            .find(|snapshot| of(snapshot).is_some());
        if let Some(snapshot) = stands {
            let now = snapshot.disk(&disk.target)?.modified_disk.as_ref()?;
            return Some((Some(snapshot), now));
        }
        let moved = |moved: &&Moved| {
            moved.disk.target == disk.target
                && Some(&moved.from) == disk.source.as_ref()
                && moved.disk.source != disk.source
        };
        self.moves
            .iter()
            .rev()
            .find(moved)
            .map(|moved| (None, self.latest(&moved.disk)))
    }

    /// The disk with the images below it that the last act left it, where it has moved more than once.
    fn latest<'a>(&'a self, disk: &'a Disk) -> &'a Disk {
        let mut moved = self.moves.iter().rev().map(|moved| &moved.disk);
        let same = |d: &&Disk| d.target == disk.target && d.source == disk.source;
        moved.find(same).unwrap_or(disk)
    }

    /// The disk as the domain uses it now: what the records say has taken the place of what the document says.
    pub(crate) fn present(&self, disk: &Disk) -> Disk {
        let mut present = disk.clone();
        // Every step is a record's, so there are no more of them than records.
        for _ in 0..self.snapshots.len() + self.moves.len() {
            match self.successor(&present) {
                Some((_, next)) => present = next.clone(),
                None => break,
            }
        }
        if self.lacks_what_is_below(&present) || self.stands_no_more_on_what_is_below(&present) {
            present.backing = self.known(&present).backing.clone();
        }
        if present.data_store.is_none() {
            present.data_store = self.data_store_of(&present);
        }
        present
    }

    /// The disk as the snapshot has it that it stands on by its record, or else as the last act left it.
    fn known<'a>(&'a self, disk: &'a Disk) -> &'a Disk {
        self.stood_on(disk).unwrap_or_else(|| self.latest(disk))
    }

    /// The disk over the snapshot that it stands on, if it is on one's: where a revert puts another one's content below the same
    /// image, its record is all that tells.
    fn stood_on(&self, disk: &Disk) -> Option<&Disk> {
        let records = self.snapshots.iter().rev();
        let mut over = records.filter_map(|s| s.disk(&disk.target)?.modified_disk.as_ref());
        over.find(|over| over.source == disk.source)
    }

    /// Whether the document does not name the snapshot below the disk that it stands on.
    fn lacks_what_is_below(&self, disk: &Disk) -> bool {
        let base = self.stood_on(disk).and_then(|over| over.backing.as_ref());
        base.is_some_and(|base| !below(disk).any(|source| *source == base.source))
    }

    /// Whether the document names an image below the disk that an act has left behind: the disk is the same, and needs it no
    /// longer.
    fn stands_no_more_on_what_is_below(&self, disk: &Disk) -> bool {
        let now: Vec<&Source> = below(self.known(disk)).collect();
        let left = |source: &Source| {
            let to = |moved: &Moved| moved.disk.target == disk.target && moved.disk.source == disk.source;
            self.moves.iter().any(|moved| moved.from == *source && to(moved))
        };
        below(disk).any(|source| left(source) && !now.contains(&source))
    }

    /// Where a disk's qcow2 keeps the data, as the act that made it so knows: a document may have lost it, in a libvirt
    /// that does not know such a thing.
    fn data_store_of(&self, disk: &Disk) -> Option<DataStore> {
        let mut moved = self.moves.iter().rev().map(|moved| &moved.disk);
        let same = |d: &&Disk| d.target == disk.target && d.source == disk.source;
        moved.find(same)?.data_store.clone()
    }

    /// Refuses a document that names the base of a snapshot, or an image that is no more, as the disk of a domain that
    /// is off. A domain that runs is asked itself what its disks are.
    pub(crate) fn refuse_stale<'a>(
        &self,
        state: &RunState,
        disks: impl IntoIterator<Item = &'a Disk>,
    ) -> Result<()> {
        if state.is_active() {
            return Ok(());
        }
        for disk in disks {
            let Some((snapshot, _)) = self.successor(disk) else {
                continue;
            };
            let stands = snapshot.map_or_else(String::new, |s| {
                format!("the snapshot '{}' stands on that, and ", s.name)
            });
            let message = format!(
                "the domain's document is out of date: it says that the disk is {}, but {stands}the disk is {} now",
                place(disk),
                place(&self.present(disk))
            );
            return Err(Error::new(ErrorKind::Invalid, message)
                .with("disk", &disk.target)
                .hint(format!(
                    "Bring the document up to date with `disksnap domain update`, and do not start the domain before: \
                     it would write {}.",
                    if self.present(disk).data_store.is_some() && snapshot.is_none() {
                        "past the disk's bitmaps"
                    } else {
                        "to the snapshot"
                    }
                )));
        }
        Ok(())
    }
}

impl Dispatcher {
    /// The domain's disks as it uses them now, where a snapshot, merge or revert has changed what its document says.
    /// Empty when the document is up to date.
    pub async fn outdated(&self, domain: &Domain) -> Result<Vec<Disk>> {
        let standing = self.standing(&domain.id).await?;
        let now = domain.disks.iter().map(|disk| (disk, standing.present(disk)));
        Ok(now
            .filter(|(said, now)| *said != now)
            .map(|(_, now)| now)
            .collect())
    }

    /// What is known of where a domain's disks are.
    pub(crate) async fn standing(&self, domain: &DomainId) -> Result<Standing> {
        Ok(Standing {
            snapshots: self.catalog.snapshots(domain).await?,
            moves: self.catalog.moves(domain).await?,
        })
    }
}

/// The images below a disk, as it says.
fn below(disk: &Disk) -> impl Iterator<Item = &Source> {
    let layers = std::iter::successors(disk.backing.as_ref(), |layer| layer.backing.as_deref());
    layers.map(|layer| &layer.source)
}

fn place(disk: &Disk) -> String {
    match &disk.source {
        Some(source) => source
            .path()
            .map_or_else(|| source.kind().to_owned(), |path| path.display().to_string()),
        None => "empty".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BackingStore;

    fn source(name: &str) -> Source {
        let file = format!("/images/{name}").into();
        Source::File { file }
    }

    fn on(layers: &[&str]) -> Option<BackingStore> {
        layers.iter().rev().fold(None, |backing, name| {
            Some(BackingStore {
                format: None,
                source: source(name),
                data_store: None,
                backing: backing.map(Box::new),
            })
        })
    }

    fn disk(name: &str, layers: &[&str]) -> Disk {
        Disk {
            backing: on(layers),
            ..Disk::new("vda", source(name))
        }
    }

    /// A merge into the overlay that was killed before the document was written.
    #[test]
    fn an_image_that_the_disk_needs_no_longer_goes_from_below_it() {
        let moved = Moved {
            from: source("base"),
            disk: disk("top", &["far"]),
        };
        let standing = Standing {
            snapshots: Vec::new(),
            moves: vec![moved],
        };
        assert_eq!(
            standing.present(&disk("top", &["base", "far"])),
            disk("top", &["far"])
        );
        // Another one's layers are what the document says of them.
        for right in [disk("top", &["far"]), disk("top", &["other"]), disk("top", &[])] {
            assert_eq!(standing.present(&right), right);
        }
        assert_eq!(
            standing.present(&disk("else", &["base"])),
            disk("else", &["base"])
        );
    }
}
