//! Dropping points: what they held and a later one needs becomes part of that one's image.
//!
//! An image keeps its name and its content, whatever it becomes. The order, for each kept point over dropped ones: the new
//! image and the new file of digests are written beside the old ones; what they come to is compared with what the manifest says
//! of the disk; the new manifest is put into the journal, `merging.json`; the image is renamed over the old one; the manifest
//! is replaced, which names the new file of digests; the old one is removed. Only then the dropped points go, the newest first, each
//! manifest before its folder.
//!
//! From the moment on that the new image has its name, the manifest in the journal holds, and not the one in the point's folder:
//! [`Repository::manifest`] and the others see to that. So at any moment every point that is there reads right, whoever was
//! killed; and the next merge or prune finishes what the journal says.

use std::collections::BTreeSet;

use disksnap::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::digests::{ChunksReader, Has, Overlay};
use crate::object::Object;
use crate::progress::Progress;
use crate::repository::{Line, again};
use crate::{
    CHUNK, ChainReader, DiskEntry, DomainFolder, Event, ImageKeys, ImageSpec, ImageSummary, ImageWriter,
    Layer, Level, Manifest, Phase, Piece, Repository, Store, Watcher, content_digest, stopped,
};

/// The journal's file in the domain's folder.
pub(crate) const JOURNAL: &str = "merging.json";
/// No journal is longer, in bytes.
const LIMIT: u64 = 16 << 20;
/// What an image that is being written has after its name. No disk's image ends so.
const NEW: &str = "-new";
/// What an image of nothing takes, in bytes.
const OVERHEAD: u64 = 6 * CHUNK;
/// What every other one of a disk's files of digests has after its name.
const OTHER: &str = "-2";

/// What a merge is going to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergePlan {
    /// The points that are dropped, oldest first.
    pub dropped: Vec<String>,
    /// The images that are written anew, in that order.
    pub images: Vec<PlannedImage>,
    /// How much room it needs at most, for as long as it lasts, in bytes. An estimate.
    pub room: u64,
    /// How much less the images take afterwards, in bytes; negative where they take more. An estimate.
    pub freed: i64,
}

/// An image that takes in what dropped points held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedImage {
    /// The kept point.
    pub point: String,
    /// The disk's target.
    pub disk: String,
    /// The dropped points whose part of the disk it takes in, newest first.
    pub takes: Vec<String>,
    /// The point that it is over then; none where it becomes a full image.
    pub parent: Option<String>,
    /// About how long it becomes, in bytes.
    pub image_bytes: u64,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Merged {
    /// The points that were dropped, in that order; also those that an earlier merge was to drop and did not come to.
    pub dropped: Vec<String>,
    /// The images that were written anew.
    pub images: Vec<MergedImage>,
    /// How much less the images take, in bytes; negative where they take more.
    pub freed: i64,
}

/// An image that has taken in what dropped points held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MergedImage {
    /// The kept point.
    pub point: String,
    /// The disk's target.
    pub disk: String,
    /// The point that it is over now; none: it is a full image.
    pub parent: Option<String>,
    /// Its length, in bytes.
    pub image_bytes: u64,
}

/// Drops points of a domain, by their exact names. The points that stay can be restored as before, at every moment.
///
/// Each image over a dropped one takes in what that held; over a dropped full image it becomes a full one. Where nothing is
/// over a dropped point nothing is copied. A point whose manifest cannot be trusted can be dropped, together with those
/// that are built on it.
///
/// What an earlier merge was to drop and did not, because it was cut short, is dropped too.
///
/// # Errors
/// `NotFound` for a name that is no point's; `Broken` where a chain is not whole that a kept point needs, and where an image
/// would not be what its point was; `NoSpace`; `Unavailable` when it was stopped; `Busy` while a backup or a reader is at it. Nothing
/// that any kept point needs has been touched then.
pub async fn merge(
    repository: &Repository,
    folder: &DomainFolder,
    drop: &BTreeSet<String>,
    watcher: &dyn Watcher,
) -> Result<Merged> {
    let told = |error: Error| error.during("backup merge").with("domain", &folder.id);
    let _lock = repository.lock(folder, false).await.map_err(told)?;
    let line = repository.line(folder).await.map_err(told)?;
    Merger::new(repository, folder, line, watcher)
        .run(drop)
        .await
        .map_err(told)
}

/// What [`merge`] is going to do. Changes nothing.
///
/// # Errors
/// As [`merge`].
pub async fn merge_plan(
    repository: &Repository,
    folder: &DomainFolder,
    drop: &BTreeSet<String>,
) -> Result<MergePlan> {
    let told = |error: Error| error.during("backup merge").with("domain", &folder.id);
    let _lock = repository.lock(folder, true).await.map_err(told)?;
    let line = repository.line(folder).await.map_err(told)?;
    let earlier = journal(repository, folder)
        .await
        .map_err(told)?
        .map(|journal| journal.drop)
        .unwrap_or_default();
    let drop = drop.union(&earlier).cloned().collect();
    Merger::new(repository, folder, line, &crate::Silent)
        .plan(&drop)
        .await
        .map_err(told)
}

/// `merging.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Journal {
    version: u64,
    /// The points that are to go.
    pub(crate) drop: BTreeSet<String>,
    /// The image that is being put in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    renewing: Option<Renewing>,
}

/// An image that is being put in place, or has been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Renewing {
    /// Its name in the point's folder until it is in its place.
    image: String,
    /// The text of the point's manifest with it.
    manifest: String,
}

impl Journal {
    /// The manifest that holds in the place of the one in its point's folder, since its image is in its place already.
    pub(crate) async fn in_force(
        &self,
        repository: &Repository,
        folder: &DomainFolder,
    ) -> Result<Option<Manifest>> {
        let Some(renewing) = &self.renewing else {
            return Ok(None);
        };
        let manifest = Manifest::from_json(renewing.manifest.as_bytes())
            .map_err(|e| e.with("object", key_of(folder)))?;
        let files = repository
            .store()
            .list(&repository.folder_of(folder, &manifest.point))
            .await?;
        let waits = files.contains(&renewing.image) || !files.iter().any(|file| file == Manifest::FILE);
        Ok(Some(manifest).filter(|_| !waits))
    }
}

/// What a merge that was cut short has left to do; `None` where there was none.
///
/// # Errors
/// `Broken` for a journal that cannot be read.
pub(crate) async fn journal(repository: &Repository, folder: &DomainFolder) -> Result<Option<Journal>> {
    let key = key_of(folder);
    let text = match repository.store().get(&key, LIMIT).await {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    match serde_json::from_slice::<Journal>(&text) {
        Ok(journal) if journal.version == 1 => Ok(Some(journal)),
        Ok(newer) => {
            Err(crate::manifest::newer_version("journal of a merge", newer.version).with("object", key))
        }
        Err(e) => Err(Error::new(
            ErrorKind::Broken,
            "the journal of a merge that was cut short cannot be read",
        )
        .with("object", key)
        .hint("Put it back from a copy of the repository. Where there is none: remove it, verify, and repeat the merge.")
        .because(e)),
    }
}

fn key_of(folder: &DomainFolder) -> String {
    format!("{}/{JOURNAL}", folder.key)
}

/// The names beside its own that a merge uses for a disk's files.
pub(crate) struct Beside {
    pub(crate) image: String,
    pub(crate) chunks: String,
}

impl Beside {
    pub(crate) fn of(disk: &DiskEntry) -> Self {
        let chunks = match disk.chunks.strip_suffix(OTHER) {
            Some(first) => first.to_owned(),
            None => format!("{}{OTHER}", disk.chunks),
        };
        Self {
            image: format!("{}{NEW}", disk.image),
            chunks,
        }
    }
}

/// Carries a merge out, under the lock of the domain's folder.
#[derive(Debug)]
pub(crate) struct Merger<'a> {
    repository: &'a Repository,
    folder: &'a DomainFolder,
    /// How things are, at each moment.
    line: Line,
    watcher: &'a dyn Watcher,
    /// The points that are to go.
    drop: BTreeSet<String>,
    /// Something of a point may be otherwise than before: what was begun is to be gone on with.
    touched: bool,
}

impl<'a> Merger<'a> {
    pub(crate) fn new(
        repository: &'a Repository,
        folder: &'a DomainFolder,
        line: Line,
        watcher: &'a dyn Watcher,
    ) -> Self {
        Self {
            repository,
            folder,
            line,
            watcher,
            drop: BTreeSet::new(),
            touched: false,
        }
    }

    pub(crate) async fn run(&mut self, drop: &BTreeSet<String>) -> Result<Merged> {
        let earlier = journal(self.repository, self.folder).await?;
        self.check_known(drop, earlier.as_ref())?;
        if let Some(journal) = &earlier {
            self.settle(journal).await?;
        }
        let all: BTreeSet<String> = drop.union(&self.drop).cloned().collect();
        let plan = self.plan(&all).await?;
        if all.is_empty() && earlier.is_none() {
            return Ok(Merged::default());
        }
        self.check_room(&plan)?;
        self.tell(&plan);
        self.drop = all;
        self.put_journal(None).await?;
        let mut merged = Merged::default();
        match self.carry_out(&plan, &mut merged).await {
            Ok(()) => {
                self.end().await?;
                Ok(merged)
            }
            Err(error) if !self.touched && earlier.is_none() => {
                // Nothing came of it: as if it had never been asked.
                let ended = self.end().await.err();
                Err(error.rollback_failed(ended.into_iter().collect()).hint("Every point is as it was."))
            }
            Err(error) => Err(error.hint(
                "Every point that is left is as it was. Repeat the command, or any merge or prune: it goes on from there.",
            )),
        }
    }

    /// What it takes to drop these.
    ///
    /// # Errors
    /// `Broken` where it cannot be done without harm to a point that is kept.
    pub(crate) async fn plan(&self, drop: &BTreeSet<String>) -> Result<MergePlan> {
        self.check_doubtful(drop)?;
        let mut images = Vec::new();
        for manifest in self
            .line
            .manifests()
            .filter(|manifest| !drop.contains(&manifest.point))
        {
            for disk in &manifest.disks {
                images.extend(self.plan_image(manifest, disk, drop).await?);
            }
        }
        let known = self.line.all().filter(|(name, _)| drop.contains(*name));
        let dropped: Vec<String> = known.map(|(name, _)| name.to_owned()).collect();
        let (room, freed) = self.room(&images, &dropped);
        Ok(MergePlan {
            dropped,
            images,
            room,
            freed,
        })
    }

    async fn plan_image(
        &self,
        manifest: &Manifest,
        disk: &DiskEntry,
        drop: &BTreeSet<String>,
    ) -> Result<Option<PlannedImage>> {
        if !disk.parent.as_ref().is_some_and(|parent| drop.contains(parent)) {
            return Ok(None);
        }
        let chain = self.chain(&manifest.point, &disk.target)?;
        let takes = takes(&chain, drop);
        let parent = chain.get(takes + 1).map(|layer| layer.point.clone());
        let upper = &chain[..=takes];
        Ok(Some(PlannedImage {
            point: manifest.point.clone(),
            disk: disk.target.clone(),
            takes: upper[1..].iter().map(|layer| layer.point.clone()).collect(),
            parent,
            image_bytes: self.estimate(upper, &disk.target).await?,
        }))
    }

    /// About how long an image becomes: what its layers hold together, as well compressed as now.
    async fn estimate(&self, layers: &[Layer], target: &str) -> Result<u64> {
        let entries = layers.iter().filter_map(|layer| self.entry(&layer.point, target));
        let (mut data, mut bytes) = (0_u64, 0_u64);
        for entry in entries {
            data += entry.data;
            bytes += entry.image_bytes;
        }
        let together = u128::from(data_of(self.repository.store().as_ref(), layers).await?);
        let part = together * u128::from(bytes) / u128::from(data.max(1));
        Ok(u64::try_from(part)
            .unwrap_or(u64::MAX)
            .max(OVERHEAD)
            .min(bytes.max(OVERHEAD)))
    }

    /// How much room is taken at the worst moment beyond what is taken now, and how much less it is in the end.
    fn room(&self, images: &[PlannedImage], dropped: &[String]) -> (u64, i64) {
        let (mut now, mut most) = (0_i64, 0_i64);
        let mut left: Vec<&String> = dropped.iter().collect();
        for (n, image) in images.iter().enumerate() {
            now = now.saturating_add_unsigned(image.image_bytes);
            most = most.max(now);
            let old = self
                .entry(&image.point, &image.disk)
                .map_or(0, |disk| disk.image_bytes);
            now = now.saturating_sub_unsigned(old);
            let later = &images[n + 1..];
            // As `drop_what_nothing_needs` does it.
            left.retain(|point| {
                let needed = later.iter().any(|image| image.takes.contains(point));
                if !needed {
                    now = now.saturating_sub_unsigned(self.bytes(point));
                }
                needed
            });
        }
        for point in left {
            now = now.saturating_sub_unsigned(self.bytes(point));
        }
        (most.unsigned_abs(), now.saturating_neg())
    }

    /// How much the images of a point take.
    fn bytes(&self, point: &str) -> u64 {
        let manifest = self.line.get(point).and_then(|manifest| manifest.as_ref().ok());
        manifest.map_or(0, |manifest| {
            manifest.disks.iter().map(|disk| disk.image_bytes).sum()
        })
    }

    fn entry(&self, point: &str, target: &str) -> Option<&DiskEntry> {
        self.line.get(point)?.as_ref().ok()?.disk(target)
    }

    fn chain(&self, point: &str, target: &str) -> Result<Vec<Layer>> {
        self.line.chain(self.repository, self.folder, point, target)
    }

    fn check_known(&self, drop: &BTreeSet<String>, earlier: Option<&Journal>) -> Result<()> {
        let known = |name: &String| {
            self.line.get(name).is_some() || earlier.is_some_and(|journal| journal.drop.contains(name))
        };
        match drop.iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(
                Error::new(ErrorKind::NotFound, format!("there is no point {name}"))
                    .hint("Nothing was dropped. `disksnap backup list` tells the points."),
            ),
        }
    }

    /// A point of which nobody knows what it is built on may be built on any before it.
    fn check_doubtful(&self, drop: &BTreeSet<String>) -> Result<()> {
        let mut after = self.line.all().skip_while(|(name, _)| !drop.contains(*name));
        let doubtful = after.find_map(|(name, manifest)| {
            manifest
                .as_ref()
                .err()
                .filter(|_| !drop.contains(name))
                .map(|e| (name, e))
        });
        match doubtful {
            None => Ok(()),
            Some((name, e)) => Err(again(e).with("point", name).hint(
                "It may be built on a point that was to be dropped: nothing was dropped. Put its manifest back from a copy \
                 of the repository, or drop it too.",
            )),
        }
    }

    /// Whether the room is there, where the store can tell.
    fn check_room(&self, plan: &MergePlan) -> Result<()> {
        let place = self.repository.store().file(&self.folder.key);
        let Some(about) = place.and_then(|path| rustix::fs::statvfs(path).ok()) else {
            return Ok(());
        };
        let there = about.f_bavail.saturating_mul(about.f_frsize);
        if plan.room <= there {
            return Ok(());
        }
        let text = format!(
            "a merge needs about {} bytes of room, and there are {there}",
            plan.room
        );
        Err(Error::new(ErrorKind::NoSpace, text)
            .with("repository", self.repository.store().describe())
            .hint("Every point is as it was. Make room, or drop fewer points at a time."))
    }

    /// What the operator should know.
    fn tell(&self, plan: &MergePlan) {
        let mut seen = BTreeSet::new();
        for manifest in self.line.manifests().rev() {
            for disk in &manifest.disks {
                if seen.insert(&disk.target) && plan.dropped.contains(&manifest.point) {
                    let target = &disk.target;
                    let message = format!(
                        "{} is the last point of {target}: the next backup of it will be a full one",
                        manifest.point
                    );
                    self.watcher.event(&Event::Warning { message: &message });
                }
            }
        }
    }

    async fn put_journal(&self, renewing: Option<Renewing>) -> Result<()> {
        let journal = Journal {
            version: 1,
            drop: self.drop.clone(),
            renewing,
        };
        let text = serde_json::to_vec_pretty(&journal)
            .map_err(|e| Error::new(ErrorKind::Internal, "cannot write the journal of a merge").because(e))?;
        self.repository.store().put(&key_of(self.folder), &text).await
    }

    async fn end(&self) -> Result<()> {
        self.repository.store().remove(&key_of(self.folder)).await
    }

    /// Clears away what a merge that was cut short has left: a manifest that holds comes into its place, and what it was writing
    /// and what remains of points that it dropped is removed.
    async fn settle(&mut self, journal: &Journal) -> Result<()> {
        self.drop.clone_from(&journal.drop);
        if let Some(manifest) = journal.in_force(self.repository, self.folder).await? {
            self.repository.put_manifest(self.folder, &manifest).await?;
        }
        // First: without the image beside the old one the manifest in it would hold.
        self.put_journal(None).await?;
        for manifest in self.line.manifests() {
            for disk in &manifest.disks {
                self.discard(&manifest.point, disk).await?;
            }
        }
        for point in self.drop.iter().filter(|point| self.line.get(point).is_none()) {
            self.repository
                .store()
                .remove(&self.repository.folder_of(self.folder, point))
                .await?;
        }
        Ok(())
    }

    /// Removes what lies beside a disk's own files.
    async fn discard(&self, point: &str, disk: &DiskEntry) -> Result<()> {
        let (store, beside) = (self.repository.store(), Beside::of(disk));
        for file in [beside.image, beside.chunks] {
            let key = self.repository.key(self.folder, point, &file);
            store.discard(&key).await?;
            store.remove(&key).await?;
        }
        Ok(())
    }

    async fn carry_out(&mut self, plan: &MergePlan, merged: &mut Merged) -> Result<()> {
        let mut left: BTreeSet<&str> = plan.dropped.iter().map(String::as_str).collect();
        self.drop_what_nothing_needs(&mut left, merged).await?;
        for image in &plan.images {
            stopped(self.watcher)?;
            let told = |e: Error| e.with("point", &image.point).with("disk", &image.disk);
            self.renew(image, merged).await.map_err(told)?;
            self.drop_what_nothing_needs(&mut left, merged).await?;
        }
        Ok(())
    }

    /// Drops those of the points that no other one is built on, the newest first.
    async fn drop_what_nothing_needs(
        &mut self,
        left: &mut BTreeSet<&str>,
        merged: &mut Merged,
    ) -> Result<()> {
        let names: Vec<String> = self.line.all().rev().map(|(name, _)| name.to_owned()).collect();
        for name in names
            .iter()
            .filter(|name| left.contains(name.as_str()))
            .collect::<Vec<_>>()
        {
            let over = |manifest: &Manifest| {
                manifest
                    .disks
                    .iter()
                    .any(|disk| disk.parent.as_ref() == Some(name))
            };
            if self.line.manifests().any(over) {
                continue;
            }
            self.touched = true;
            let (store, repository) = (self.repository.store(), self.repository);
            store
                .remove(&repository.key(self.folder, name, Manifest::FILE))
                .await?;
            store.remove(&repository.folder_of(self.folder, name)).await?;
            merged.freed = merged.freed.saturating_add_unsigned(self.bytes(name));
            merged.dropped.push(name.clone());
            self.line.remove(name);
            left.remove(name.as_str());
        }
        Ok(())
    }

    /// Gives a kept point an image that needs none of the points that it takes from.
    async fn renew(&mut self, planned: &PlannedImage, merged: &mut Merged) -> Result<()> {
        let chain = self.chain(&planned.point, &planned.disk)?;
        let (upper, lower) = chain.split_at(planned.takes.len() + 1);
        let Some(Ok(manifest)) = self.line.get(&planned.point) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a point that is merged into has gone",
            ));
        };
        let mut manifest = manifest.clone();
        let Some(disk) = manifest.disks.iter_mut().find(|disk| disk.target == planned.disk) else {
            return Err(Error::new(ErrorKind::Internal, "a disk that is merged has gone"));
        };
        let old = disk.clone();
        let summary = match self.write_beside(&old, planned, upper, lower).await {
            Ok(summary) => summary,
            Err(error) => {
                let left = self.discard(&planned.point, &old).await.err();
                return Err(error.rollback_failed(left.into_iter().collect()));
            }
        };
        renewed(disk, planned, &summary);
        self.put_in_place(&old, &manifest).await?;
        merged.freed = merged
            .freed
            .saturating_add_unsigned(old.image_bytes)
            .saturating_sub_unsigned(summary.image_bytes);
        merged.images.push(MergedImage {
            point: planned.point.clone(),
            disk: planned.disk.clone(),
            parent: planned.parent.clone(),
            image_bytes: summary.image_bytes,
        });
        self.line.insert(manifest);
        Ok(())
    }

    /// Writes the new image and its digests, and compares what they come to with what the disk was at the point.
    async fn write_beside(
        &self,
        old: &DiskEntry,
        planned: &PlannedImage,
        upper: &[Layer],
        lower: &[Layer],
    ) -> Result<ImageSummary> {
        let beside = Beside::of(old);
        let keys = ImageKeys {
            image: self.repository.key(self.folder, &planned.point, &beside.image),
            chunks: self.repository.key(self.folder, &planned.point, &beside.chunks),
        };
        let backing = planned
            .parent
            .as_ref()
            .and_then(|parent| self.entry(parent, &old.target));
        let backing = backing
            .zip(planned.parent.as_ref())
            .map(|(disk, parent)| backing_name(parent, &disk.image));
        let spec = ImageSpec {
            size: old.size,
            backing,
            compression: old.compression,
        };
        let summary = self.copy(planned, upper, &keys, spec).await?;
        let mut layers = vec![Layer {
            point: planned.point.clone(),
            image: keys.image,
            chunks: keys.chunks,
            chunks_digest: summary.chunks_digest,
            size: old.size,
        }];
        layers.extend_from_slice(lower);
        let content = content_digest(self.repository.store().as_ref(), &layers).await?;
        if content != old.content {
            let text = format!(
                "the merged image is not what the disk was: its content has the digest {content}, and the point's {}",
                old.content
            );
            return Err(
                Error::new(ErrorKind::Broken, text).hint("`disksnap backup verify` tells what is damaged.")
            );
        }
        Ok(summary)
    }

    async fn copy(
        &self,
        planned: &PlannedImage,
        layers: &[Layer],
        keys: &ImageKeys,
        spec: ImageSpec,
    ) -> Result<ImageSummary> {
        let store = self.repository.store();
        let progress = Progress::begin(self.watcher, Phase::Merge, &planned.disk, spec.size);
        let mut moved = 0;
        let mut reader = ChainReader::open(store.clone(), layers).await?;
        let mut writer = ImageWriter::create(store.clone(), keys.clone(), spec).await?;
        while let Some(piece) = reader.next().await? {
            stopped(self.watcher)?;
            if let Piece::Data { data, .. } = &piece {
                moved += data.len() as u64;
            }
            progress.at(piece.offset() + piece.length(), moved);
            writer.write(piece).await?;
        }
        let summary = writer.finish().await?;
        progress.end();
        Ok(summary)
    }

    /// Makes the new files the point's own.
    async fn put_in_place(&mut self, old: &DiskEntry, manifest: &Manifest) -> Result<()> {
        let (store, point) = (self.repository.store().clone(), &manifest.point);
        let key = |file: &str| self.repository.key(self.folder, point, file);
        let (beside, image, chunks) = (Beside::of(old).image, key(&old.image), key(&old.chunks));
        let from = key(&beside);
        let text = String::from_utf8_lossy(&manifest.to_json()?).into_owned();
        if let Err(error) = self
            .put_journal(Some(Renewing {
                image: beside,
                manifest: text,
            }))
            .await
        {
            // It may be there all the same: only when it surely is not, the new image may go.
            match self.put_journal(None).await {
                Ok(()) => self.discard(point, old).await?,
                Err(_) => self.touched = true,
            }
            return Err(error);
        }
        self.touched = true;
        store.rename(&from, &image).await?;
        self.repository.put_manifest(self.folder, manifest).await?;
        store.remove(&chunks).await
    }
}

/// How much data these layers hold together, in bytes.
async fn data_of(store: &dyn Store, layers: &[Layer]) -> Result<u64> {
    let mut readers = Vec::with_capacity(layers.len());
    for layer in layers {
        let object = Object::open(store, &layer.point, &layer.chunks).await?;
        readers.push((ChunksReader::open(object, layer.size).await?, layer.size));
    }
    let (mut overlay, mut chunks) = (Overlay::new(readers).await?, 0);
    while let Some(span) = overlay.next().await? {
        if matches!(span.has, Has::Data(..)) {
            chunks += span.count;
        }
    }
    Ok(chunks * CHUNK)
}

/// How many of the layers below the first are dropped ones.
fn takes(chain: &[Layer], drop: &BTreeSet<String>) -> usize {
    chain[1..]
        .iter()
        .take_while(|layer| drop.contains(&layer.point))
        .count()
}

/// What stands in an image's header: where QEMU finds the image below, from where this one lies.
pub(crate) fn backing_name(point: &str, image: &str) -> String {
    format!("../{point}/{image}")
}

fn renewed(disk: &mut DiskEntry, planned: &PlannedImage, summary: &ImageSummary) {
    disk.level = if planned.parent.is_some() {
        Level::Incremental
    } else {
        Level::Full
    };
    disk.parent.clone_from(&planned.parent);
    disk.chunks = Beside::of(disk).chunks;
    disk.chunks_digest = summary.chunks_digest;
    disk.image_bytes = summary.image_bytes;
    disk.data = summary.data;
    disk.zero = summary.zero;
    if planned.parent.is_none() {
        disk.excess = None;
    }
}
