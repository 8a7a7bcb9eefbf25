//! Batches are hashed and compressed side by side while they wait, and put down in their order by a task of their own.

use disksnap::{Error, ErrorKind, Result};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};

use super::regroup::{Batch, Part};
use super::written::{Ready, ReadyPart, Written, WrittenState};
use super::{Compression, ImageSummary};
use crate::chain::died;
use crate::digests::{CHUNK_BYTES, Digest};
use crate::qcow2::Stored;

/// How many batches wait to be put down, at the most.
const WAITING: usize = 3;
/// A compressed chunk saves at least this much; else it is not worth reading it that way.
const SAVING: usize = 4 << 10;

/// Where batches are sent.
#[derive(Debug)]
pub(super) struct Pipeline {
    compression: Compression,
    jobs: mpsc::Sender<Job>,
    /// `None` once its end was told.
    task: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
enum Job {
    Batch(JoinHandle<Result<Ready>>),
    Checkpoint(oneshot::Sender<(u64, WrittenState)>),
    Finish(oneshot::Sender<ImageSummary>),
}

impl Pipeline {
    pub(super) fn start(compression: Compression, written: Written) -> Self {
        let (jobs, queue) = mpsc::channel(WAITING);
        let task = tokio::spawn(put_down(written, queue));
        Self {
            compression,
            jobs,
            task: Some(task),
        }
    }

    /// Sends a batch, and waits where too many wait.
    pub(super) async fn send(&mut self, batch: Batch) -> Result<()> {
        let compression = self.compression;
        if let Ok(place) = self.jobs.reserve().await {
            place.send(Job::Batch(spawn_blocking(move || prepare(batch, compression))));
            return Ok(());
        }
        Err(self.failure().await)
    }

    /// Makes durable what was sent.
    pub(super) async fn checkpoint(&mut self) -> Result<(u64, WrittenState)> {
        let (answer, answered) = oneshot::channel();
        // Where it does not arrive there is no answer either.
        let _ = self.jobs.send(Job::Checkpoint(answer)).await;
        match answered.await {
            Ok(state) => Ok(state),
            Err(_) => Err(self.failure().await),
        }
    }

    /// Ends both objects.
    pub(super) async fn finish(&mut self) -> Result<ImageSummary> {
        let (answer, answered) = oneshot::channel();
        let _ = self.jobs.send(Job::Finish(answer)).await;
        match answered.await {
            Ok(summary) => Ok(summary),
            Err(_) => Err(self.failure().await),
        }
    }

    /// Why the task has ended.
    async fn failure(&mut self) -> Error {
        let Some(task) = &mut self.task else {
            return Error::new(
                ErrorKind::Io,
                "an earlier write of the image failed: nothing more can be written",
            );
        };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(Err(error)) => error,
            Ok(Ok(())) => Error::new(ErrorKind::Internal, "the image's writer ended too early"),
            Err(error) => died(error),
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn put_down(mut written: Written, mut queue: mpsc::Receiver<Job>) -> Result<()> {
    while let Some(job) = queue.recv().await {
        // An answer that nobody waits for any more is lost with them.
        match job {
            Job::Batch(ready) => written.put(ready.await.map_err(died)??).await?,
            Job::Checkpoint(answer) => {
                let _ = answer.send(written.checkpoint().await?);
            }
            Job::Finish(answer) => {
                let _ = answer.send(written.finish().await?);
                break;
            }
        }
    }
    Ok(())
}

/// Hashes and compresses a batch.
fn prepare(batch: Batch, compression: Compression) -> Result<Ready> {
    let mut compressor = match compression {
        Compression::None => None,
        Compression::Zstd(level) => Some(Compressor::new(level)?),
    };
    let mut ready = Ready {
        parts: Vec::with_capacity(batch.parts.len()),
        stored: Stored::default(),
        end: batch.end,
    };
    if compressor.is_none() {
        ready.stored.plain_bytes.reserve_exact(batch.data_bytes());
    }
    for part in batch.parts {
        match part {
            Part::Zero { first, count } => ready.parts.push(ReadyPart::Zero { first, count }),
            Part::Data { chunk, bytes } => {
                let digest = Digest::of(&bytes);
                ready.parts.push(ReadyPart::Data {
                    chunk,
                    digest,
                    length: bytes.len() as u64,
                });
                store(&mut ready.stored, chunk, &bytes, compressor.as_mut());
            }
        }
    }
    Ok(ready)
}

/// Puts a chunk where it is best, filled up to a cluster.
fn store(to: &mut Stored, chunk: u64, bytes: &[u8], compressor: Option<&mut Compressor>) {
    if let Some(compressor) = compressor
        && let Some(packed) = compressor.pack(bytes)
    {
        to.compressed.push((chunk, packed.len() as u64));
        to.compressed_bytes.extend_from_slice(packed);
        return;
    }
    to.plain.push(chunk);
    to.plain_bytes.extend_from_slice(bytes);
    to.plain_bytes.resize(to.plain.len() * CHUNK_BYTES, 0);
}

/// Compresses chunk after chunk.
struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
}

impl Compressor {
    fn new(level: i32) -> Result<Self> {
        let zstd = zstd::bulk::Compressor::new(level);
        let zstd =
            zstd.map_err(|error| Error::io(format!("zstd cannot compress at level {level}"), error))?;
        Ok(Self {
            zstd,
            packed: vec![0; CHUNK_BYTES - SAVING],
        })
    }

    /// The whole cluster that begins with these bytes, where that is worth it.
    fn pack(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        let filled;
        let cluster = if bytes.len() == CHUNK_BYTES {
            bytes
        } else {
            filled = [bytes, &vec![0; CHUNK_BYTES - bytes.len()]].concat();
            &filled
        };
        // The one thing that goes wrong here is that it does not fit, which is the question.
        let length = self.zstd.compress_to_buffer(cluster, &mut self.packed[..]).ok()?;
        Some(&self.packed[..length])
    }
}
