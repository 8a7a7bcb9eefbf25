//! Reading everything back and comparing it with what was written down: each image once, however many points need it.

use std::collections::{BTreeMap, BTreeSet};

use disksnap::{Error, ErrorKind, Piece, Result};
use serde::Serialize;

use crate::digests::digest_of;
use crate::manifest::point_order;
use crate::merging::{Beside, JOURNAL, backing_name, journal};
use crate::object::Object;
use crate::progress::Progress;
use crate::qcow2::{CLUSTER, Header};
use crate::repository::{DOMAIN, LOCK, Line};
use crate::{
    ChainReader, Digest, DiskEntry, DomainFolder, Layer, Manifest, Phase, Repository, Watcher,
    content_digest, stopped,
};

/// What is to be verified.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyOptions {
    /// These points and what they are built on; all when none is named.
    pub points: BTreeSet<String>,
    /// These disks, by their targets; all when none is named.
    pub targets: BTreeSet<String>,
    /// Read no image's data: what is written down is compared, that the images are there, how long they are and what they say of
    /// themselves. Finds what is missing, swapped or torn; not a flipped bit.
    pub quick: bool,
}

/// What verifying found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    /// The points that were asked for, oldest first.
    pub points: Vec<VerifiedPoint>,
    /// What lies in the domain's folder and belongs to no point. It does no harm.
    pub strays: Vec<Stray>,
    /// Points that never came to be, or were being dropped: `disksnap backup create` goes on with one or clears it away.
    pub unfinished: Vec<String>,
    /// A merge or a prune was cut short. No point is the worse for it; the next one finishes it.
    pub merging: bool,
    /// How much of the disks' data was read, in bytes.
    pub read: u64,
}

/// A point, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifiedPoint {
    /// Its name.
    pub point: String,
    /// What is wrong with its manifest, the domain's document, the EFI variables or the TPM's state.
    pub faults: Vec<Fault>,
    /// Its disks.
    pub disks: Vec<VerifiedDisk>,
}

/// A disk at a point, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifiedDisk {
    /// Its target.
    pub target: String,
    /// What is wrong with any image that it is read from: then it cannot be restored as it was.
    pub faults: Vec<Fault>,
}

/// Something that is not as it was written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// What kind of error reading it meets.
    pub kind: ErrorKind,
    /// What is wrong.
    pub what: String,
    /// The point that it lies in, which may be an earlier one than the one that needs it.
    pub point: String,
    /// The key of what is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Where in it, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// What belongs to no point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stray {
    /// Its key.
    pub object: String,
    /// What it is, as far as that is known.
    pub what: String,
}

impl Verification {
    /// Whether all that was verified can be restored as it was.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.points.iter().all(VerifiedPoint::is_whole)
    }
}

impl VerifiedPoint {
    /// Whether it can be restored as it was.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.faults.is_empty() && self.disks.iter().all(|disk| disk.faults.is_empty())
    }
}

impl Fault {
    fn of(error: &Error, point: &str) -> Self {
        let told = |key: &str| {
            error
                .context()
                .find(|(k, _)| *k == key)
                .map(|(_, value)| value.to_owned())
        };
        let mut what = error.message().to_owned();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            what = format!("{what}: {cause}");
            source = cause.source();
        }
        Self {
            kind: error.kind(),
            what,
            point: told("point").unwrap_or_else(|| point.to_owned()),
            object: told("object").or_else(|| told("path")),
            offset: told("offset").and_then(|offset| offset.parse().ok()),
        }
    }
}

/// Verifies points of a domain. Changes nothing.
///
/// Each chunk of each image is compared with the digest that was taken of the snapshot; the digests of all a disk's chunks with
/// the digest of its content; each image's header with the manifests; each saved file with its digest.
///
/// # Errors
/// `NotFound` for a point or disk that is not there; `Unavailable` when it was stopped; `Busy` while a backup, a merge or a prune is
/// at it. What is wrong with the points is no error here.
pub async fn verify(
    repository: &Repository,
    folder: &DomainFolder,
    options: &VerifyOptions,
    watcher: &dyn Watcher,
) -> Result<Verification> {
    let told = |error: Error| error.during("backup verify").with("domain", &folder.id);
    let _lock = repository.lock(folder, true).await.map_err(told)?;
    let line = repository.line(folder).await.map_err(told)?;
    let mut verifier = Verifier {
        repository,
        folder,
        line,
        options,
        watcher,
        merging: journal(repository, folder).await.map(|journal| journal.is_some()),
        images: BTreeMap::new(),
        read: 0,
    };
    verifier.check_asked().map_err(told)?;
    verifier.read_images().await.map_err(told)?;
    verifier.judge().await.map_err(told)
}

/// An image: its point and the disk's target.
type ImageOf = (String, String);

struct Verifier<'a> {
    repository: &'a Repository,
    folder: &'a DomainFolder,
    line: Line,
    options: &'a VerifyOptions,
    watcher: &'a dyn Watcher,
    /// Whether there is a journal of a merge, or what is wrong with it.
    merging: Result<bool>,
    /// What was wrong with each image that was read.
    images: BTreeMap<ImageOf, Option<Fault>>,
    read: u64,
}

impl Verifier<'_> {
    fn check_asked(&self) -> Result<()> {
        if let Some(name) = self
            .options
            .points
            .iter()
            .find(|name| self.line.get(name).is_none())
        {
            return Err(
                Error::new(ErrorKind::NotFound, format!("there is no point {name}"))
                    .hint("`disksnap backup list` tells the points."),
            );
        }
        let known = |target: &str| self.manifests().any(|manifest| manifest.disk(target).is_some());
        match self.options.targets.iter().find(|target| !known(target)) {
            None => Ok(()),
            Some(target) => Err(Error::new(
                ErrorKind::NotFound,
                format!("none of the points has a disk {target}"),
            )),
        }
    }

    fn is_asked(&self, point: &str) -> bool {
        self.options.points.is_empty() || self.options.points.contains(point)
    }

    /// The manifests that were asked for, oldest first.
    fn manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.line
            .manifests()
            .filter(|manifest| self.is_asked(&manifest.point))
    }

    /// The disks of a point that were asked for.
    fn disks<'a>(&self, manifest: &'a Manifest) -> impl Iterator<Item = &'a DiskEntry> + use<'a, '_> {
        let targets = &self.options.targets;
        manifest
            .disks
            .iter()
            .filter(move |disk| targets.is_empty() || targets.contains(&disk.target))
    }

    fn chain(&self, point: &str, target: &str) -> Result<Vec<Layer>> {
        self.line.chain(self.repository, self.folder, point, target)
    }

    /// The images that are needed, disk by disk, each once.
    fn needed(&self) -> BTreeMap<String, Vec<Layer>> {
        let mut needed: BTreeMap<String, Vec<Layer>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for manifest in self.manifests() {
            for disk in self.disks(manifest) {
                // One that is not whole is told of each point on it.
                let layers = self
                    .chain(&manifest.point, &disk.target)
                    .unwrap_or_default()
                    .into_iter()
                    .rev();
                let new = layers.filter(|layer| seen.insert(layer.image.clone()));
                needed.entry(disk.target.clone()).or_default().extend(new);
            }
        }
        needed
    }

    async fn read_images(&mut self) -> Result<()> {
        for (target, layers) in self.needed() {
            let data = |layer: &Layer| self.entry(&layer.point, &target).map_or(0, |disk| disk.data);
            let total = layers.iter().map(data).sum();
            let progress = Progress::begin(self.watcher, Phase::Verify, &target, total);
            let mut done = 0;
            for layer in &layers {
                stopped(self.watcher)?;
                let fault = match self.read_image(layer, &target, &progress, &mut done).await {
                    Ok(()) => None,
                    Err(error) if self.watcher.stop() => return Err(error),
                    Err(error) => Some(Fault::of(&error, &layer.point)),
                };
                self.images.insert((layer.point.clone(), target.clone()), fault);
            }
            self.read += done;
            progress.end();
        }
        Ok(())
    }

    fn entry(&self, point: &str, target: &str) -> Option<&DiskEntry> {
        self.line.get(point)?.as_ref().ok()?.disk(target)
    }

    async fn read_image(
        &self,
        layer: &Layer,
        target: &str,
        progress: &Progress<'_>,
        done: &mut u64,
    ) -> Result<()> {
        let Some(disk) = self.entry(&layer.point, target) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a disk that is verified has gone",
            ));
        };
        self.check_header(layer, disk).await?;
        let store = self.repository.store();
        if self.options.quick {
            let chunks = Object::open(store.as_ref(), &layer.point, &layer.chunks).await?;
            return check_digest(&chunks, digest_of(&chunks).await?, layer.chunks_digest);
        }
        let mut reader = ChainReader::open(store.clone(), std::slice::from_ref(layer)).await?;
        while let Some(piece) = reader.next().await? {
            stopped(self.watcher)?;
            if let Piece::Data { data, .. } = piece {
                *done += data.len() as u64;
                progress.at(*done, *done);
            }
        }
        Ok(())
    }

    /// Whether an image says of itself what the manifests say of it.
    async fn check_header(&self, layer: &Layer, disk: &DiskEntry) -> Result<()> {
        let image = Object::open(self.repository.store().as_ref(), &layer.point, &layer.image).await?;
        let head = image
            .read(0, usize::try_from(image.length().min(CLUSTER)).unwrap_or(0))
            .await?;
        let header = Header::decode(&head).map_err(|what| image.broken(0, what))?;
        if header.size != disk.size.next_multiple_of(512) {
            let text = format!(
                "it is the image of a disk of {} bytes, and the disk had {}",
                header.size, disk.size
            );
            return Err(image.broken(0, text));
        }
        if image.length() != disk.image_bytes {
            let text = format!(
                "it has {} bytes, and was written with {}",
                image.length(),
                disk.image_bytes
            );
            return Err(image.broken(image.length().min(disk.image_bytes), text));
        }
        let parent = disk
            .parent
            .as_ref()
            .and_then(|parent| Some((parent, self.entry(parent, &disk.target)?)));
        let backing = parent.map(|(point, disk)| backing_name(point, &disk.image));
        if header.backing != backing {
            let said =
                |name: Option<String>| name.map_or_else(|| "none".to_owned(), |name| format!("'{name}'"));
            let text = format!(
                "its header names as its backing file {}, and it is over {}",
                said(header.backing),
                said(backing)
            );
            return Err(image.broken(8, text));
        }
        Ok(())
    }

    async fn judge(&self) -> Result<Verification> {
        let mut points = Vec::new();
        for (name, manifest) in self.line.all().filter(|(name, _)| self.is_asked(name)) {
            stopped(self.watcher)?;
            points.push(match manifest {
                Ok(manifest) => self.judge_point(manifest).await,
                Err(error) => VerifiedPoint {
                    point: name.to_owned(),
                    faults: vec![Fault::of(error, name)],
                    disks: Vec::new(),
                },
            });
        }
        Ok(Verification {
            points,
            strays: self.strays().await?,
            unfinished: self.repository.unfinished(self.folder).await?,
            // A journal that cannot be read tells of a merge, too.
            merging: *self.merging.as_ref().unwrap_or(&true),
            read: self.read,
        })
    }

    async fn judge_point(&self, manifest: &Manifest) -> VerifiedPoint {
        let mut faults = Vec::new();
        for file in manifest.machine.files() {
            let key = self.repository.key(self.folder, &manifest.point, &file.file);
            if let Err(error) = self
                .check_file(&manifest.point, &key, file.bytes, file.digest)
                .await
            {
                faults.push(Fault::of(&error, &manifest.point));
            }
        }
        let mut disks = Vec::new();
        for disk in self.disks(manifest) {
            disks.push(VerifiedDisk {
                target: disk.target.clone(),
                faults: self.judge_disk(manifest, disk).await,
            });
        }
        VerifiedPoint {
            point: manifest.point.clone(),
            faults,
            disks,
        }
    }

    async fn judge_disk(&self, manifest: &Manifest, disk: &DiskEntry) -> Vec<Fault> {
        let layers = match self.chain(&manifest.point, &disk.target) {
            Ok(layers) => layers,
            Err(error) => return vec![Fault::of(&error, &manifest.point)],
        };
        let image = |layer: &Layer| self.images.get(&(layer.point.clone(), disk.target.clone()));
        let faults: Vec<Fault> = layers.iter().filter_map(image).flatten().cloned().collect();
        if !faults.is_empty() {
            return faults;
        }
        let fault = match content_digest(self.repository.store().as_ref(), &layers).await {
            Ok(content) if content == disk.content => return Vec::new(),
            Ok(content) => Error::new(
                ErrorKind::Broken,
                format!(
                    "its images together are not what the disk was: the content has the digest {content}, and had {}",
                    disk.content
                ),
            ),
            Err(error) => error,
        };
        vec![Fault::of(&fault, &manifest.point)]
    }

    async fn check_file(&self, point: &str, key: &str, bytes: u64, digest: Digest) -> Result<()> {
        let object = Object::open(self.repository.store().as_ref(), point, key).await?;
        if object.length() != bytes {
            let text = format!("it has {} bytes, and was saved with {bytes}", object.length());
            return Err(object.broken(object.length().min(bytes), text));
        }
        check_digest(&object, digest_of(&object).await?, digest)
    }

    /// What nothing knows. Points that are unfinished, or whose manifest is not to be trusted, are not looked into.
    async fn strays(&self) -> Result<Vec<Stray>> {
        let mut strays = Vec::new();
        if let Err(error) = &self.merging {
            strays.push(Stray {
                object: format!("{}/{JOURNAL}", self.folder.key),
                what: error.message().to_owned(),
            });
        }
        for name in self.repository.store().list(&self.folder.key).await? {
            if !matches!(name.as_str(), DOMAIN | LOCK | JOURNAL) && point_order(&name).is_none() {
                strays.push(stray(format!("{}/{name}", self.folder.key), None));
            }
        }
        for manifest in self.line.manifests() {
            self.strays_of(manifest, &mut strays).await?;
        }
        Ok(strays)
    }

    async fn strays_of(&self, manifest: &Manifest, strays: &mut Vec<Stray>) -> Result<()> {
        let folder = self.repository.folder_of(self.folder, &manifest.point);
        let mut known: BTreeSet<&str> = manifest.files().collect();
        known.extend([Manifest::FILE, crate::journal::FILE]);
        let merges: Vec<Beside> = manifest.disks.iter().map(Beside::of).collect();
        let mut folders = vec![String::new()];
        while let Some(inner) = folders.pop() {
            let within = format!("{folder}/{inner}");
            for name in self.repository.store().list(within.trim_end_matches('/')).await? {
                let file = format!("{inner}{name}");
                let inside = format!("{file}/");
                if known.iter().any(|known| known.starts_with(&inside)) {
                    folders.push(inside);
                } else if !known.contains(file.as_str()) {
                    let merge = merges
                        .iter()
                        .find(|beside| beside.image == file || beside.chunks == file);
                    strays.push(stray(format!("{folder}/{file}"), merge));
                }
            }
        }
        Ok(())
    }
}

fn stray(object: String, merge: Option<&Beside>) -> Stray {
    let what = match merge {
        Some(_) => "a merge or a prune that was cut short left it; the next one removes it",
        None => "no point knows it",
    };
    Stray {
        object,
        what: what.to_owned(),
    }
}

fn check_digest(object: &Object, found: Digest, told: Digest) -> Result<()> {
    if found == told {
        return Ok(());
    }
    Err(object.broken(
        0,
        format!("it is not what was written: its digest is {found}, and was {told}"),
    ))
}
