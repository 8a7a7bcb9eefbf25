//! A repository: domains, their points in time, and the chains between them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use disksnap::{DomainId, Error, ErrorKind, Result};
use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::manifest::{newer_version, point_order};
use crate::names::encoded;
use crate::{Layer, Level, Manifest, Store, StoreLock, merging};

/// What describes the repository.
const DESCRIPTION: &str = "repository.json";
/// What describes a domain's folder.
pub(crate) const DOMAIN: &str = "domain.json";
/// What is locked, of the repository and of each domain.
pub(crate) const LOCK: &str = "lock";
/// No longer is waited for whoever makes a domain's folder.
const MOMENT: Duration = Duration::from_secs(30);
/// The largest description that is read, in bytes.
const SMALL: u64 = 1 << 20;
const FORMAT: &str = "disksnap-repository";
const VERSION: u64 = 1;

/// A repository of backups.
#[derive(Debug, Clone)]
pub struct Repository {
    store: Arc<dyn Store>,
    id: Uuid,
}

/// The folder of one domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainFolder {
    /// Its key: `web1-7c3f9d52`.
    pub key: String,
    /// Whose it is.
    pub id: DomainId,
}

/// A point, or what is wrong with its manifest.
#[derive(Debug)]
pub struct ListedPoint {
    /// Its name.
    pub name: String,
    /// What its manifest says.
    pub manifest: Result<Manifest>,
}

/// Which point is meant.
///
/// As text: `latest`; a point's name or the beginning of one; or a time, and the last point of that time or before is meant.
/// A time is RFC 3339, UTC where it names no zone, and stands for all of what it names: `2026-11-22` for the day to its end,
/// `2026-11-22T02:15` for the minute to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointSpec {
    /// The last one.
    Latest,
    /// The one of this name, or the only one whose name begins so.
    Named(String),
    /// The last one at or before this instant.
    At(SystemTime),
}

/// `repository.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    format: String,
    version: u64,
    id: Uuid,
}

/// `domain.json`.
#[derive(Debug, Serialize, Deserialize)]
struct DomainDescription {
    version: u64,
    #[serde(flatten)]
    id: DomainId,
}

impl Repository {
    /// Opens a repository.
    ///
    /// # Errors
    /// `NotFound` when there is none; `Unsupported` when a newer disksnap made it; `Broken` when its description is damaged.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self> {
        let text = store.get(DESCRIPTION, SMALL).await.map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::NotFound, "there is no repository here")
                .with("repository", store.describe())
                .hint("Name the directory of one; the first `disksnap backup create` makes it in an empty directory."),
            _ => e,
        })?;
        let told = described(&text);
        let id = told.map_err(|e| e.with("repository", store.describe()).with("object", DESCRIPTION))?;
        Ok(Self { store, id })
    }

    /// Opens a repository, and makes it in an empty place.
    ///
    /// # Errors
    /// As [`Repository::open`]; `AlreadyExists` where there is something else.
    pub async fn open_or_init(store: Arc<dyn Store>) -> Result<Self> {
        match Self::open(Arc::clone(&store)).await {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            other => return other,
        }
        refuse_what_is_there(store.as_ref()).await?;
        let held = store.lock(LOCK, false).await?;
        // Another one may have made it just now.
        match Self::open(Arc::clone(&store)).await {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            other => return other,
        }
        let (format, id) = (FORMAT.to_owned(), Uuid::new_v4());
        put_json(
            store.as_ref(),
            DESCRIPTION,
            &Description {
                format,
                version: VERSION,
                id,
            },
        )
        .await?;
        drop(held);
        Ok(Self { store, id })
    }

    /// Where its objects are.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Tells it from every other repository.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The folders of its domains, sorted.
    ///
    /// # Errors
    /// `Broken`, naming it, for a folder that neither its description nor a manifest in it says whose it is.
    pub async fn domains(&self) -> Result<Vec<DomainFolder>> {
        let mut folders = Vec::new();
        for key in self.folder_keys().await? {
            folders.extend(self.read_folder(&key).await?);
        }
        Ok(folders)
    }

    /// The folder of a domain, by its UUID; `None` where it has none yet.
    ///
    /// # Errors
    /// `Broken` where it may be one of which nothing says whose it is.
    pub async fn folder(&self, domain: &DomainId) -> Result<Option<DomainFolder>> {
        let mut unread = None;
        for key in self.folder_keys().await? {
            match self.read_folder(&key).await {
                Ok(Some(folder)) if folder.id.uuid == domain.uuid => return Ok(Some(folder)),
                Ok(_) => {}
                Err(e) => unread = Some(e),
            }
        }
        unread.map_or(Ok(None), Err)
    }

    /// The folder that a domain has or gets. Idempotent; a domain that has another name by now is renamed in it.
    pub async fn folder_or_new(&self, domain: &DomainId) -> Result<DomainFolder> {
        if let Some(folder) = self.folder(domain).await?.filter(|folder| folder.id == *domain) {
            return Ok(folder);
        }
        let _held = self.lock_for_a_moment().await?;
        // Another one may have made it just now.
        let key = match self.folder(domain).await? {
            Some(folder) if folder.id == *domain => return Ok(folder),
            Some(folder) => folder.key,
            None => self.new_folder_key(domain).await?,
        };
        let (version, id) = (VERSION, domain.clone());
        put_json(
            self.store.as_ref(),
            &format!("{key}/{DOMAIN}"),
            &DomainDescription { version, id },
        )
        .await?;
        Ok(DomainFolder {
            key,
            id: domain.clone(),
        })
    }

    /// Locks what all domains share. Whoever holds it is done at once, so that it is waited for.
    async fn lock_for_a_moment(&self) -> Result<Box<dyn StoreLock>> {
        let since = Instant::now();
        loop {
            match self.store.lock(LOCK, false).await {
                Err(e) if e.kind() == ErrorKind::Busy && since.elapsed() < MOMENT => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                held => return held,
            }
        }
    }

    /// Locks a domain's folder. Who has it alone finds nothing in it that others were about to put there when they were killed.
    ///
    /// # Errors
    /// `Busy` when a backup, a prune or a reader of it is under way.
    pub async fn lock(&self, folder: &DomainFolder, shared: bool) -> Result<Box<dyn StoreLock>> {
        let told = |e: Error| e.with("domain", &folder.id.name);
        let held = self.store.lock(&format!("{}/{LOCK}", folder.key), shared).await;
        let held = held.map_err(told)?;
        if !shared {
            self.sweep(folder).await.map_err(told)?;
        }
        Ok(held)
    }

    async fn sweep(&self, folder: &DomainFolder) -> Result<()> {
        self.store.sweep(&folder.key).await?;
        for name in self.point_names(folder).await? {
            self.store.sweep(&self.folder_of(folder, &name)).await?;
        }
        Ok(())
    }

    /// The points of a domain, oldest first. One whose manifest cannot be trusted is among them, and says so.
    pub async fn points(&self, folder: &DomainFolder) -> Result<Vec<ListedPoint>> {
        let renewed = self.renewed(folder).await;
        let mut points = Vec::new();
        for name in self.point_names(folder).await? {
            match self.manifest_or(folder, &name, renewed.as_ref()).await {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    // Else it never came to be, or is gone since.
                    if self.is_lost(folder, &name).await? {
                        let manifest = Err(lost(folder, &name));
                        points.push(ListedPoint { name, manifest });
                    }
                }
                manifest => points.push(ListedPoint { name, manifest }),
            }
        }
        Ok(points)
    }

    /// What the manifest of the point of exactly this name says.
    ///
    /// # Errors
    /// `NotFound`; `Unsupported` for one of a newer version; `Broken` for one that is damaged or is another point's.
    pub async fn manifest(&self, folder: &DomainFolder, point: &str) -> Result<Manifest> {
        self.manifest_or(folder, point, self.renewed(folder).await.as_ref())
            .await
    }

    /// The manifest that holds in the place of the one in its point's folder: a merge was cut short.
    async fn renewed(&self, folder: &DomainFolder) -> Option<Manifest> {
        // A journal that cannot be read is told of by verifying; the points that it does not concern can do without.
        merging::journal(self, folder)
            .await
            .ok()??
            .in_force(self, folder)
            .await
            .ok()?
    }

    async fn manifest_or(
        &self,
        folder: &DomainFolder,
        point: &str,
        renewed: Option<&Manifest>,
    ) -> Result<Manifest> {
        if let Some(renewed) = renewed.filter(|manifest| manifest.point == point) {
            return Ok(renewed.clone());
        }
        let key = self.key(folder, point, Manifest::FILE);
        let told = |e: Error| e.with("point", point).with("object", &key);
        let text = self.store.get(&key, Manifest::LIMIT).await.map_err(told)?;
        let manifest = Manifest::from_json(&text).map_err(told)?;
        self.check_place(folder, point, &manifest).map_err(told)?;
        Ok(manifest)
    }

    /// The one point that is meant.
    ///
    /// # Errors
    /// `NotFound`, with the names that come near; `Invalid` for a beginning of several names; what is wrong with its manifest.
    pub async fn point(&self, folder: &DomainFolder, which: &PointSpec) -> Result<Manifest> {
        let mut points = self.points(folder).await?;
        let found = find(&points, which).map_err(|e| e.with("domain", &folder.id.name))?;
        points.swap_remove(found).manifest
    }

    /// The chain of a disk at a point, the newest image first.
    ///
    /// # Errors
    /// `NotFound` for a disk that is not in the point; `Broken`, naming what is missing, where the chain is not whole.
    pub async fn chain(&self, folder: &DomainFolder, point: &Manifest, target: &str) -> Result<Vec<Layer>> {
        let renewed = self.renewed(folder).await;
        let mut line = Line::default();
        let mut next = point.disk(target).and_then(|disk| disk.parent.clone());
        line.insert(point.clone());
        while let Some(name) = next {
            let manifest = match self.manifest_or(folder, &name, renewed.as_ref()).await {
                Ok(manifest) => manifest,
                Err(e) => {
                    line.insert_failed(&name, e);
                    break;
                }
            };
            next = manifest.disk(target).and_then(|disk| disk.parent.clone());
            line.insert(manifest);
        }
        line.chain(self, folder, &point.point, target)
    }

    /// The name for a point of this instant that no other has, whether that came to be or not.
    pub async fn new_point(&self, folder: &DomainFolder, created: SystemTime) -> Result<String> {
        let instant = Timestamp::try_from(created).map_err(|e| {
            Error::new(
                ErrorKind::Invalid,
                "the snapshot's instant is none that can be written down",
            )
            .because(e)
        })?;
        let name = instant.strftime("%Y%m%dT%H%M%SZ").to_string();
        let taken = self.store.list(&folder.key).await?;
        let numbered = (2_u32..).map(|n| format!("{name}-{n}"));
        let mut names = std::iter::once(name.clone()).chain(numbered);
        Ok(names.find(|name| !taken.contains(name)).unwrap_or(name))
    }

    /// Makes a point exist: its manifest is written, durably.
    ///
    /// # Errors
    /// `AlreadyExists` for a name that is there.
    pub async fn publish(&self, folder: &DomainFolder, manifest: &Manifest) -> Result<()> {
        let files = self.store.list(&self.folder_of(folder, &manifest.point)).await?;
        if files.iter().any(|file| file == Manifest::FILE) {
            return Err(
                Error::new(ErrorKind::AlreadyExists, "there is a point of that name already")
                    .with("domain", &folder.id.name)
                    .with("point", &manifest.point)
                    .hint("Nothing of it was changed."),
            );
        }
        self.put_manifest(folder, manifest).await
    }

    /// Writes a point's manifest in the place of the one that is there.
    pub(crate) async fn put_manifest(&self, folder: &DomainFolder, manifest: &Manifest) -> Result<()> {
        let key = self.key(folder, &manifest.point, Manifest::FILE);
        let told = |e: Error| e.with("point", &manifest.point).with("object", &key);
        if let Err(fault) = self.check_place(folder, &manifest.point, manifest) {
            return Err(told(Error::new(ErrorKind::Internal, fault.message())));
        }
        self.store
            .put(&key, &manifest.to_json().map_err(told)?)
            .await
            .map_err(told)
    }

    /// The folders that have no manifest: points that never came to be, or were being removed. One that has images and nothing that
    /// says why is none of them: its manifest was lost, and others may be built on it.
    pub async fn unfinished(&self, folder: &DomainFolder) -> Result<Vec<String>> {
        let mut unfinished = Vec::new();
        for name in self.point_names(folder).await? {
            let files = self.store.list(&self.folder_of(folder, &name)).await?;
            let has = |wanted: &str| files.iter().any(|file| file == wanted);
            if !has(Manifest::FILE) && !self.is_lost(folder, &name).await? {
                unfinished.push(name);
            }
        }
        Ok(unfinished)
    }

    /// Whether a point has images, and neither a manifest nor anything that says that it is to have none.
    async fn is_lost(&self, folder: &DomainFolder, point: &str) -> Result<bool> {
        if !self.has_images_alone(folder, point).await? {
            return Ok(false);
        }
        // One that cannot be read is told of by verifying, and is no reason to give up images.
        let merging = merging::journal(self, folder).await.ok().flatten();
        if merging.is_some_and(|merging| merging.drop.contains(point)) {
            return Ok(false);
        }
        // Who looks without a lock may have seen the end of a merge in between: then its folder is gone by now.
        self.has_images_alone(folder, point).await
    }

    /// Whether a point has images, and neither a manifest nor a journal of its own.
    async fn has_images_alone(&self, folder: &DomainFolder, point: &str) -> Result<bool> {
        let files = self.store.list(&self.folder_of(folder, point)).await?;
        let has = |wanted: &str| files.iter().any(|file| file == wanted);
        Ok(!has(Manifest::FILE) && !has(crate::journal::FILE) && files.iter().any(|file| is_image(file)))
    }

    /// The name for a point that begins now, after all that are there. Names ascend, also where the clock has gone back.
    ///
    /// `others`: names of points that are not here any more, or never came to be, and that something still bears; it comes after those too.
    ///
    /// # Errors
    /// `Broken` where a name is there after which there is none.
    pub async fn next_point(&self, folder: &DomainFolder, others: &[String]) -> Result<String> {
        let mut names = self.point_names(folder).await?;
        names.extend_from_slice(others);
        let known = names
            .iter()
            .filter(|name| named_instant(name).is_some())
            .filter_map(|name| point_order(name));
        let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let Some((instant, number)) = known.max().filter(|(instant, _)| **instant >= *now) else {
            return Ok(now);
        };
        let next = number.checked_add(1).ok_or_else(|| {
            Error::new(ErrorKind::Broken, "no later point can be named")
                .with("point", format!("{instant}-{number}"))
                .hint("Such a name is none of disksnap's. Remove what bears it.")
        })?;
        Ok(format!("{instant}-{next}"))
    }

    /// The key of a file of a point.
    #[must_use]
    pub fn key(&self, folder: &DomainFolder, point: &str, file: &str) -> String {
        format!("{}/{point}/{file}", folder.key)
    }

    /// The key of a point's folder.
    #[must_use]
    pub fn folder_of(&self, folder: &DomainFolder, point: &str) -> String {
        format!("{}/{point}", folder.key)
    }

    /// All that the manifests of a domain say.
    pub(crate) async fn line(&self, folder: &DomainFolder) -> Result<Line> {
        let mut line = Line::default();
        for point in self.points(folder).await? {
            match point.manifest {
                Ok(manifest) => line.insert(manifest),
                Err(e) => line.insert_failed(&point.name, e),
            }
        }
        Ok(line)
    }

    /// The names of all folders that look like a point's, oldest first.
    async fn point_names(&self, folder: &DomainFolder) -> Result<Vec<String>> {
        let mut names = self.store.list(&folder.key).await?;
        names.retain(|name| point_order(name).is_some());
        names.sort_by(|a, b| point_order(a).cmp(&point_order(b)));
        Ok(names)
    }

    /// Whether a manifest belongs where it lies.
    fn check_place(&self, folder: &DomainFolder, point: &str, manifest: &Manifest) -> Result<()> {
        let fault = if manifest.repository != self.id {
            format!(
                "it is of the repository {}, and this is {}",
                manifest.repository, self.id
            )
        } else if manifest.domain.uuid != folder.id.uuid {
            let (theirs, ours) = (&manifest.domain, &folder.id);
            format!(
                "it is of the domain {theirs} ({}), and this is {ours} ({})",
                theirs.uuid, ours.uuid
            )
        } else if manifest.point != point {
            format!("it is of the point {}", manifest.point)
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Broken,
            format!("the manifest does not belong here: {fault}"),
        )
        .hint("It was copied here from elsewhere. Put the point's own manifest back, or drop the point."))
    }

    async fn folder_keys(&self) -> Result<Vec<String>> {
        let mut keys = self.store.list("").await?;
        keys.retain(|key| !matches!(key.as_str(), DESCRIPTION | LOCK) && is_folder_key(key));
        Ok(keys)
    }

    /// Whose folder this is; `None` for what is no domain's.
    async fn read_folder(&self, key: &str) -> Result<Option<DomainFolder>> {
        let object = format!("{key}/{DOMAIN}");
        let read = self
            .store
            .get(&object, SMALL)
            .await
            .and_then(|text| described_domain(&text));
        let fault = match read {
            Ok(id) => {
                return Ok(Some(DomainFolder {
                    key: key.to_owned(),
                    id,
                }));
            }
            Err(e) if e.kind() == ErrorKind::Broken || e.kind() == ErrorKind::NotFound => {
                e.with("object", object)
            }
            Err(e) => return Err(e.with("object", object)),
        };
        // The manifests say it too.
        for name in self
            .store
            .list(key)
            .await?
            .iter()
            .filter(|name| point_order(name).is_some())
        {
            let text = self
                .store
                .get(&format!("{key}/{name}/{}", Manifest::FILE), Manifest::LIMIT)
                .await;
            let manifest = text.and_then(|text| Manifest::from_json(&text)).ok();
            if let Some(manifest) = manifest.filter(|x| x.repository == self.id && x.point == *name) {
                return Ok(Some(DomainFolder {
                    key: key.to_owned(),
                    id: manifest.domain,
                }));
            }
        }
        match fault.kind() {
            ErrorKind::NotFound => Ok(None),
            _ => Err(fault),
        }
    }

    async fn new_folder_key(&self, domain: &DomainId) -> Result<String> {
        let taken = self.store.list("").await?;
        let (name, digits) = (short(encoded(&domain.name)), domain.uuid.simple().to_string());
        for length in [8, 16, digits.len()] {
            let key = format!("{name}-{}", &digits[..length]);
            // What is no domain's folder, by now, is left from one that was being made.
            if !taken.contains(&key) || self.read_folder(&key).await.is_ok_and(|x| x.is_none()) {
                return Ok(key);
            }
        }
        Err(Error::new(
            ErrorKind::AlreadyExists,
            "every name for the domain's folder is taken",
        )
        .with("domain", &domain.name)
        .with("repository", self.store.describe()))
    }
}

/// What the manifests of a domain say, and which of them cannot be trusted; by their order in time.
#[derive(Debug, Default)]
pub(crate) struct Line(BTreeMap<Order, Result<Manifest>>);

/// A point's name, which sorts as the points do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Order(String, u32, String);

impl Order {
    fn of(name: &str) -> Self {
        let (instant, number) = point_order(name).unwrap_or((name, 0));
        Self(instant.to_owned(), number, name.to_owned())
    }
}

impl Line {
    pub(crate) fn insert(&mut self, manifest: Manifest) {
        self.0.insert(Order::of(&manifest.point), Ok(manifest));
    }

    pub(crate) fn insert_failed(&mut self, name: &str, error: Error) {
        self.0.insert(Order::of(name), Err(error));
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.0.remove(&Order::of(name));
    }

    /// Every point, oldest first.
    pub(crate) fn all(&self) -> impl DoubleEndedIterator<Item = (&str, &Result<Manifest>)> {
        self.0
            .iter()
            .map(|(order, manifest)| (order.2.as_str(), manifest))
    }

    /// The points whose manifests can be trusted, oldest first.
    pub(crate) fn manifests(&self) -> impl DoubleEndedIterator<Item = &Manifest> {
        self.0.values().filter_map(|manifest| manifest.as_ref().ok())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Result<Manifest>> {
        self.0.get(&Order::of(name))
    }

    /// The chain of a disk at a point, the newest image first.
    pub(crate) fn chain(
        &self,
        repository: &Repository,
        folder: &DomainFolder,
        point: &str,
        target: &str,
    ) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        let mut next = Some(point.to_owned());
        while let Some(name) = next {
            let manifest = self.link(&name).map_err(|e| {
                let e = e.with("object", repository.key(folder, &name, Manifest::FILE));
                under(e, point, &name, target)
            })?;
            let Some(disk) = manifest.disk(target) else {
                return Err(under(
                    no_disk(manifest, target, name == point),
                    point,
                    &name,
                    target,
                ));
            };
            layers.push(Layer {
                point: name.clone(),
                image: repository.key(folder, &name, &disk.image),
                chunks: repository.key(folder, &name, &disk.chunks),
                chunks_digest: disk.chunks_digest,
                size: disk.size,
            });
            // A manifest names an earlier point as the parent, always: this comes to an end.
            next = match disk.level {
                Level::Full => None,
                Level::Incremental => disk.parent.clone(),
            };
        }
        Ok(layers)
    }

    /// A point that a chain goes through.
    fn link(&self, name: &str) -> Result<&Manifest> {
        match self.get(name) {
            Some(Ok(manifest)) => Ok(manifest),
            Some(Err(e)) if e.kind() != ErrorKind::NotFound => Err(again(e)),
            _ => Err(Error::new(
                ErrorKind::Broken,
                format!("the chain is not whole: there is no point {name}"),
            )),
        }
    }
}

impl fmt::Display for PointSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Named(name) => f.write_str(name),
            Self::At(instant) => match Timestamp::try_from(*instant) {
                Ok(instant) => instant.fmt(f),
                Err(_) => f.write_str("an instant out of range"),
            },
        }
    }
}

impl FromStr for PointSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(instant) = end_of(text) {
            return Ok(Self::At(instant));
        }
        // A name, or the beginning of one: 20261122T021500Z-2
        let plausible = text.bytes().all(|b| b.is_ascii_digit() || b"TZ-".contains(&b));
        if plausible && text.as_bytes().first().is_some_and(u8::is_ascii_digit) && !is_dashed_date(text) {
            return Ok(Self::Named(text.to_owned()));
        }
        Err(Error::new(ErrorKind::Invalid, format!("{text:?} says no point"))
            .hint("Give `latest`, the name of a point or its beginning (20261122T02), or a time (2026-11-22, 2026-11-22T02:15Z)."))
    }
}

/// Whether somebody meant a date, such as 2026-13-01: that is no beginning of a name.
fn is_dashed_date(text: &str) -> bool {
    text.as_bytes().get(4) == Some(&b'-')
}

/// The last instant of the time that is named.
fn end_of(text: &str) -> Option<SystemTime> {
    if !is_dashed_date(text) {
        return None;
    }
    let day = Duration::from_hours(24);
    let (begin, length) = match text.parse::<Date>() {
        Ok(date) if text.len() == 10 => (utc(date.at(0, 0, 0, 0))?, day),
        _ => (instant_of(text)?, precision(text)),
    };
    SystemTime::from(begin).checked_add(length.saturating_sub(Duration::from_nanos(1)))
}

fn instant_of(text: &str) -> Option<Timestamp> {
    if let Ok(instant) = text.parse::<Timestamp>() {
        return Some(instant);
    }
    let civil = text.parse::<DateTime>().ok()?;
    // Of a text with a zone that is none, the parser takes the rest.
    let time = text.get(11..)?;
    time.bytes()
        .all(|b| b.is_ascii_digit() || b":.".contains(&b))
        .then(|| utc(civil))?
}

fn utc(civil: DateTime) -> Option<Timestamp> {
    TimeZone::UTC.to_timestamp(civil).ok()
}

/// How long the time is that is named: a minute, a second, or an instant.
fn precision(text: &str) -> Duration {
    let time = text.get(11..).unwrap_or_default();
    let time = time.split(['Z', 'z', '+', '-']).next().unwrap_or_default();
    match time.matches(':').count() {
        _ if time.contains(['.', ',']) => Duration::ZERO,
        0 => Duration::from_hours(1),
        1 => Duration::from_mins(1),
        _ => Duration::from_secs(1),
    }
}

fn find(points: &[ListedPoint], which: &PointSpec) -> Result<usize> {
    let near = |wrong: &str| {
        let at = points.partition_point(|point| point.name.as_str() < wrong);
        let names = points[at.saturating_sub(3)..points.len().min(at + 3)]
            .iter()
            .map(|x| x.name.as_str());
        match names.collect::<Vec<_>>().join(", ") {
            names if names.is_empty() => "There are no points yet.".to_owned(),
            names => format!("Of {} points, these come near: {names}.", points.len()),
        }
    };
    let missing = |what: String, wrong: &str| Err(Error::new(ErrorKind::NotFound, what).hint(near(wrong)));
    match which {
        PointSpec::Latest if points.is_empty() => missing("there is no point".to_owned(), ""),
        PointSpec::Latest => Ok(points.len() - 1),
        PointSpec::At(instant) => {
            // Where the manifest cannot be trusted, the name says when it was.
            let until = |point: &ListedPoint| match &point.manifest {
                Ok(manifest) => manifest.created <= *instant,
                Err(_) => named_instant(&point.name).is_some_and(|at| at <= *instant),
            };
            let found = points.iter().rposition(until);
            found.map_or_else(
                || missing(format!("there is no point at or before {which}"), ""),
                Ok,
            )
        }
        PointSpec::Named(name) => {
            if let Some(exact) = points.iter().position(|point| point.name == *name) {
                return Ok(exact);
            }
            let mut begin = (0..points.len()).filter(|n| points[*n].name.starts_with(name));
            match (begin.next(), begin.count()) {
                (Some(only), 0) => Ok(only),
                (Some(_), more) => Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{} points have names that begin with {name}", more + 1),
                )
                .hint(near(name))),
                (None, _) => missing(format!("there is no point {name}"), name),
            }
        }
    }
}

/// Whether a file of a point is a disk's image.
fn is_image(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|end| end == "qcow2")
}

/// What is said of a point whose manifest is not there although nothing has removed it.
fn lost(folder: &DomainFolder, point: &str) -> Error {
    Error::new(ErrorKind::Broken, "the point has images, and its manifest is missing")
        .with("domain", &folder.id.name)
        .with("point", point)
        .hint("Put the manifest back from a copy of the repository. The images are left alone: later points may be built on them.")
}

fn named_instant(name: &str) -> Option<SystemTime> {
    let (instant, _) = point_order(name)?;
    let civil = DateTime::strptime("%Y%m%dT%H%M%SZ", instant).ok()?;
    utc(civil).map(SystemTime::from)
}

/// An error that is told again, of another point.
pub(crate) fn again(error: &Error) -> Error {
    let mut copy = Error::new(error.kind(), error.message());
    for (key, value) in error.context() {
        copy = copy.with(key, value);
    }
    match error.next_step() {
        Some(hint) => copy.hint(hint),
        None => copy,
    }
}

/// Says of what chain it is that a link is wrong.
fn under(error: Error, point: &str, link: &str, target: &str) -> Error {
    let error = error.with("point", link).with("disk", target);
    if point == link {
        return error;
    }
    error.with("needed by", point).hint(format!(
        "The points over it cannot be restored without it. Put it back from a copy of the repository; the next \
         backup of {target} can be a full one."
    ))
}

fn no_disk(manifest: &Manifest, target: &str, asked: bool) -> Error {
    if !asked {
        return Error::new(
            ErrorKind::Broken,
            format!("the chain is not whole: the point has no disk {target}"),
        );
    }
    let targets: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
    Error::new(ErrorKind::NotFound, format!("the point has no disk {target}"))
        .hint(format!("Its disks: {}.", targets.join(", ")))
}

fn described(text: &[u8]) -> Result<Uuid> {
    let broken = |what: &str| {
        Error::new(
            ErrorKind::Broken,
            format!("the repository's description is damaged: {what}"),
        )
    };
    let value: serde_json::Value =
        serde_json::from_slice(text).map_err(|e| broken("it is no JSON").because(e))?;
    if value["format"] != FORMAT {
        return Err(broken(&format!("it does not say that its format is '{FORMAT}'")));
    }
    check_version(&value, "repository")?;
    let told: Description =
        serde_json::from_value(value).map_err(|e| broken("a field is missing or wrong").because(e))?;
    Ok(told.id)
}

fn described_domain(text: &[u8]) -> Result<DomainId> {
    let broken = |e: serde_json::Error| {
        Error::new(ErrorKind::Broken, "the domain's description is damaged").because(e)
    };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(broken)?;
    check_version(&value, "domain's folder")?;
    let told: DomainDescription = serde_json::from_value(value).map_err(broken)?;
    Ok(told.id)
}

fn check_version(value: &serde_json::Value, what: &str) -> Result<()> {
    match value["version"].as_u64() {
        Some(VERSION) => Ok(()),
        Some(newer) if newer > VERSION => Err(newer_version(what, newer)),
        _ => Err(Error::new(
            ErrorKind::Broken,
            format!("the description of the {what} tells no version"),
        )),
    }
}

async fn put_json(store: &dyn Store, key: &str, what: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(what)
        .map_err(|e| Error::new(ErrorKind::Internal, "cannot write a description").because(e))?;
    store.put(key, format!("{text}\n").as_bytes()).await
}

/// A place for a repository has nothing in it, but for what a fresh file system has.
async fn refuse_what_is_there(store: &dyn Store) -> Result<()> {
    let there = store.list("").await?;
    let Some(other) = there
        .iter()
        .find(|name| !matches!(name.as_str(), LOCK | "lost+found"))
    else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::AlreadyExists,
        format!("no repository, and not empty: there is {other:?}"),
    )
    .with("repository", store.describe())
    .hint("Name the directory of a repository, or an empty one for a new one."))
}

fn is_folder_key(key: &str) -> bool {
    key.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-%".contains(&b))
        && !key.starts_with('.')
}

/// A long name, cut at no percent code.
fn short(mut name: String) -> String {
    const MOST: usize = 100;
    if name.len() > MOST {
        let cut = name[MOST - 2..MOST].find('%').map_or(MOST, |at| MOST - 2 + at);
        name.truncate(cut);
    }
    name
}
