//! Writing pieces to a file or device on a thread of its own, while the next ones are read.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use disksnap::{Error, ErrorKind, Piece, Result, faults};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Sink;

/// Pieces that wait to be written. One is at most about a MiB.
const WAITING: usize = 8;

/// Where the bytes go.
pub(crate) trait Place: fmt::Debug + Send + 'static {
    /// Puts bytes at an offset.
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<()>;

    /// Makes a range read as zeroes.
    fn zero(&mut self, offset: u64, length: u64) -> Result<()>;

    /// Puts it all on stable storage and ends it; what the operator should know.
    fn finish(self) -> Result<Vec<String>>;
}

/// A thread that writes to a place. One that is dropped before its end drops the place.
#[derive(Debug)]
pub(crate) struct Worker<P> {
    to: Option<mpsc::Sender<Piece>>,
    thread: Option<JoinHandle<Result<P>>>,
    /// What still waits is not to be written.
    abandoned: Arc<AtomicBool>,
}

impl<P: Place> Worker<P> {
    pub(crate) fn start(mut place: P) -> Self {
        let (to, mut from) = mpsc::channel(WAITING);
        let abandoned = Arc::new(AtomicBool::new(false));
        let useless = Arc::clone(&abandoned);
        let thread = tokio::task::spawn_blocking(move || {
            while let Some(piece) = from.blocking_recv() {
                if useless.load(Ordering::Relaxed) {
                    continue;
                }
                faults::around("restore", "write", || match &piece {
                    Piece::Data { offset, data } => place.data(*offset, data),
                    Piece::Zero { offset, length } => place.zero(*offset, *length),
                })?;
            }
            Ok(place)
        });
        Self {
            to: Some(to),
            thread: Some(thread),
            abandoned,
        }
    }

    /// The place, when all that was sent has been written.
    async fn ended(&mut self) -> Result<P> {
        self.to = None;
        match self.thread.take() {
            Some(thread) => joined(thread.await)?,
            None => Err(Error::new(ErrorKind::Internal, "an ended writer was written to")),
        }
    }
}

#[async_trait]
impl<P: Place> Sink for Worker<P> {
    async fn write(&mut self, piece: Piece) -> Result<()> {
        let sent = match &self.to {
            Some(to) => to.send(piece).await.is_ok(),
            None => false,
        };
        if sent {
            return Ok(());
        }
        // It takes no more: it has failed, and says why.
        self.ended().await.map(|_| ())?;
        Err(Error::new(ErrorKind::Internal, "a writer ended early"))
    }

    async fn finish(&mut self) -> Result<Vec<String>> {
        let place = self.ended().await?;
        let finish = move || faults::around("restore", "finish", || place.finish());
        joined(tokio::task::spawn_blocking(finish).await)?
    }

    async fn abandon(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        // Why it fails now is of no interest any more.
        drop(self.ended().await);
    }
}

impl<P> Drop for Worker<P> {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

/// What a thread came to.
pub(crate) fn joined<T>(ended: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    ended.map_err(|e| Error::new(ErrorKind::Internal, "writing did not come to its end").because(e))
}
