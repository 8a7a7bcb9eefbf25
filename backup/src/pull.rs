//! Pulling one disk of a snapshot into an image, so that it can be taken up again where it was.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use disksnap::{ErrorKind, Piece, Result};

use crate::journal::{Begun, Journal, Planned};
use crate::levels::Opened;
use crate::names::encoded;
use crate::progress::Progress;
use crate::source::Source;
use crate::{
    CHUNK, DiskEntry, DomainFolder, Event, ImageKeys, ImageSpec, ImageSummary, ImageWriter, Layer, Level,
    Phase, Repository, Watcher, content_digest, stopped,
};

/// What was pulled is made durable, so that a later run can go on there, after so many bytes or so long.
const DURABLE_BYTES: u64 = 512 << 20;
const DURABLE_AFTER: Duration = Duration::from_secs(15);

/// Pulls disks into the images of one point.
#[derive(Debug)]
pub(crate) struct Puller<'a> {
    pub(crate) repository: &'a Repository,
    pub(crate) folder: &'a DomainFolder,
    pub(crate) watcher: &'a dyn Watcher,
    /// No more than so many bytes in a second.
    pub(crate) rate_limit: Option<u64>,
}

/// What is known of a disk beside its data.
#[derive(Debug)]
pub(crate) struct About<'a> {
    pub(crate) target: &'a str,
    pub(crate) method: &'a str,
    /// Whether the checkpoint that began with the snapshot covers it.
    pub(crate) tracked: bool,
}

/// How far a pull is.
struct Meter {
    total: u64,
    done: u64,
    moved: u64,
    began: Instant,
    durable_at: (u64, Instant),
}

impl Puller<'_> {
    /// Pulls a disk, from where an earlier run was, and closes its source.
    pub(crate) async fn pull(
        &self,
        journal: &mut Journal,
        about: &About<'_>,
        opened: Opened,
    ) -> Result<DiskEntry> {
        let Opened {
            source,
            planned,
            below,
        } = opened;
        let pulled = async {
            self.begin(journal, about.target, planned).await?;
            for warning in source.warnings() {
                self.watcher.event(&Event::Warning { message: warning });
            }
            self.disk(journal, about, &source, &below).await
        };
        let pulled = pulled.await;
        let closed = source.close().await;
        let entry = pulled?;
        closed?;
        Ok(entry)
    }

    async fn begin(&self, journal: &mut Journal, target: &str, planned: Planned) -> Result<()> {
        if journal.disk(target).is_ok() {
            return Ok(());
        }
        journal.disks.push(Begun {
            target: target.to_owned(),
            planned,
            state: None,
            entry: None,
        });
        journal.save(self.repository, self.folder).await
    }

    /// Pulls a disk that the journal has begun.
    async fn disk(
        &self,
        journal: &mut Journal,
        about: &About<'_>,
        source: &Source,
        below: &[Layer],
    ) -> Result<DiskEntry> {
        let pulled = self.image(journal, about.target, source, below).await;
        let (summary, spec) = pulled.map_err(|e| e.with("disk", about.target))?;
        let begun = journal.disk(about.target)?;
        let mut entry = DiskEntry {
            target: about.target.to_owned(),
            size: spec.size,
            method: about.method.to_owned(),
            level: begun.planned.level,
            why_full: begun.planned.why_full.clone(),
            excess: source.excess().map(str::to_owned),
            parent: begun.planned.parent.as_ref().map(|(point, _)| point.clone()),
            image: image_name(about.target),
            image_bytes: summary.image_bytes,
            compression: spec.compression,
            data: summary.data,
            zero: summary.zero,
            chunks: chunks_name(about.target),
            chunks_digest: summary.chunks_digest,
            content: summary.chunks_digest,
            tracked: about.tracked,
        };
        let keys = self.keys(&journal.point, about.target);
        let mut layers = vec![Layer {
            point: journal.point.clone(),
            image: keys.image,
            chunks: keys.chunks,
            chunks_digest: summary.chunks_digest,
            size: spec.size,
        }];
        layers.extend_from_slice(below);
        entry.content = content_digest(&**self.repository.store(), &layers).await?;
        journal.disk(about.target)?.entry = Some(entry.clone());
        journal.save(self.repository, self.folder).await?;
        Ok(entry)
    }

    fn keys(&self, point: &str, target: &str) -> ImageKeys {
        ImageKeys {
            image: self.repository.key(self.folder, point, &image_name(target)),
            chunks: self.repository.key(self.folder, point, &chunks_name(target)),
        }
    }

    async fn image(
        &self,
        journal: &mut Journal,
        target: &str,
        source: &Source,
        below: &[Layer],
    ) -> Result<(ImageSummary, ImageSpec)> {
        let (mut writer, spec) = self.writer(journal, target, source).await?;
        let begun = journal.disk(target)?;
        let from = writer.offset();
        let incremental = begun.planned.level == Level::Incremental;
        let mut meter = Meter::new(if incremental {
            source.changed_bytes().await?
        } else {
            source.size()
        });
        let mut pieces = if incremental {
            let grown = resized(below, source.size());
            source.changed(from, grown)?
        } else {
            meter.done = from;
            source.whole(from)?
        };
        let progress = Progress::begin(self.watcher, Phase::Pull, target, meter.total);
        while let Some(piece) = pieces.next().await? {
            stopped(self.watcher)?;
            meter.count(&piece);
            writer.write(piece).await?;
            progress.at(meter.done, meter.moved);
            self.wait(&meter).await?;
            if meter.is_due() {
                let state = writer.checkpoint().await?;
                journal.disk(target)?.state = Some(state);
                journal.save(self.repository, self.folder).await?;
                meter.durable_at = (meter.moved, Instant::now());
            }
        }
        let summary = writer.finish().await?;
        progress.end();
        Ok((summary, spec))
    }

    /// The writer of the image: where an earlier run was, if what it had written is there, else from the beginning.
    async fn writer(
        &self,
        journal: &mut Journal,
        target: &str,
        source: &Source,
    ) -> Result<(ImageWriter, ImageSpec)> {
        let compression = journal.asked.compression;
        let keys = self.keys(&journal.point, target);
        let begun = journal.disk(target)?;
        let store = Arc::clone(self.repository.store());
        let spec = ImageSpec {
            size: source.size(),
            backing: begun
                .planned
                .parent
                .as_ref()
                .map(|(point, _)| format!("../{point}/{}", image_name(target))),
            compression,
        };
        if let Some(state) = begun.state.take().filter(|state| state.spec == spec) {
            match ImageWriter::resume(Arc::clone(&store), keys.clone(), state).await {
                Err(error) if error.kind() == ErrorKind::Broken => {
                    tracing::info!("{target}: begun anew: {error}");
                }
                resumed => return Ok((resumed?, spec)),
            }
        }
        let writer = ImageWriter::create(store, keys, spec.clone()).await?;
        Ok((writer, spec))
    }

    /// Waits until what was moved is no more than the limit allows since the beginning.
    async fn wait(&self, meter: &Meter) -> Result<()> {
        let Some(limit) = self.rate_limit else {
            return Ok(());
        };
        let due = Duration::from_secs_f64(as_f64(meter.moved) / as_f64(limit.max(1)));
        loop {
            let left = due.saturating_sub(meter.began.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(left.min(Duration::from_millis(200))).await;
            stopped(self.watcher)?;
        }
    }
}

impl Meter {
    fn new(total: u64) -> Self {
        let now = Instant::now();
        Self {
            total,
            done: 0,
            moved: 0,
            began: now,
            durable_at: (0, now),
        }
    }

    fn count(&mut self, piece: &Piece) {
        self.done += piece.length();
        if let Piece::Data { data, .. } = piece {
            self.moved += data.len() as u64;
        }
    }

    fn is_due(&self) -> bool {
        let (bytes, at) = self.durable_at;
        self.moved - bytes >= DURABLE_BYTES || (self.moved > bytes && at.elapsed() >= DURABLE_AFTER)
    }
}

/// What the bitmaps cannot tell: the part that has come to a disk that has grown, and the chunk that used to be its last.
fn resized(below: &[Layer], size: u64) -> Option<Range<u64>> {
    let was = below.first()?.size;
    (was != size).then(|| was.min(size) / CHUNK * CHUNK..size)
}

/// The file of a disk's image in a point's folder.
pub(crate) fn image_name(target: &str) -> String {
    format!("{}.qcow2", encoded(target))
}

/// The file of its digests.
pub(crate) fn chunks_name(target: &str) -> String {
    format!("{}.chunks", encoded(target))
}

#[expect(clippy::cast_precision_loss, reason = "a rate need not be exact to the byte")]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}
