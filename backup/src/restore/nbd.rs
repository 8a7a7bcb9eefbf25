//! Restoring into an NBD export, which is overwritten.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use disksnap::{Error, ErrorKind, Piece, Result, faults};
use disksnap_nbd::{Client, CommandFlags, ConnectOptions, TlsCredentials, TransmissionFlags, Uri};
use tokio::task::JoinSet;

use super::worker::joined;
use super::{Sink, too_small};

/// Requests in flight. One holds at most about a MiB.
const IN_FLIGHT: usize = 16;

/// What becomes of what the export has beyond the disk's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    /// It stays.
    Kept,
    /// It becomes zero: nothing stale is to be found there.
    Zeroed,
}

/// An export that is written, several requests at a time.
#[derive(Debug)]
pub(crate) struct Export {
    client: Client,
    uri: String,
    size: u64,
    rest: Rest,
    requests: JoinSet<disksnap_nbd::Result<()>>,
}

impl Export {
    /// Connects to an export for a disk of `size` bytes. Nothing is written yet.
    ///
    /// # Errors
    /// `Invalid` for no NBD URI; `Denied` for a read-only export or credentials that do not do; `NoSpace` for one that is
    /// smaller than the disk; `Unavailable`, `Refused`, `Timeout`, `Protocol` as the server has it.
    pub(crate) async fn open(uri: &str, tls: Option<&Path>, size: u64, rest: Rest) -> Result<Self> {
        let told = |e| of_nbd("the export cannot be opened", e);
        let parsed: Uri = uri.parse().map_err(told)?;
        // A flush at the end may write for long, and is silent meanwhile.
        let mut options = ConnectOptions {
            idle_timeout: Some(Duration::from_mins(30)),
            ..ConnectOptions::default()
        };
        if let Some(directory) = tls {
            options.tls = Some(TlsCredentials::from_directory(directory).map_err(told)?);
        }
        let client = Client::connect(&parsed, &options).await.map_err(told)?;
        if client.is_read_only() {
            return Err(Error::new(ErrorKind::Denied, "the export is read-only")
                .with("target", uri)
                .hint("Nothing was written. Export it writable."));
        }
        if client.size() < size {
            return Err(too_small(&uri, client.size(), size));
        }
        Ok(Self {
            client,
            uri: uri.to_owned(),
            size,
            rest,
            requests: JoinSet::new(),
        })
    }

    fn failed(&self, error: disksnap_nbd::Error) -> Error {
        of_nbd("the export cannot be written", error).with("target", &self.uri)
    }

    /// Waits for one of the requests on their way.
    async fn one(&mut self) -> Result<()> {
        match self.requests.join_next().await {
            Some(ended) => joined(ended)?.map_err(|e| self.failed(e)),
            None => Ok(()),
        }
    }

    async fn all(&mut self) -> Result<()> {
        while !self.requests.is_empty() {
            self.one().await?;
        }
        Ok(())
    }

    /// The unit that the server wants requests to keep to.
    fn unit(&self) -> u64 {
        u64::from(self.client.block_sizes().minimum)
    }

    /// Puts in what ends within one of the server's units, where the disk ends: what is behind stays.
    async fn end_within_unit(&mut self, offset: u64, data: Vec<u8>) -> Result<()> {
        self.all().await?;
        let unit = self.unit();
        let start = offset / unit * unit;
        let end = self
            .client
            .size()
            .min((offset + data.len() as u64).next_multiple_of(unit));
        let length = usize::try_from(end - start).unwrap_or(usize::MAX);
        let mut block: Vec<u8> = self
            .client
            .read(start, length)
            .await
            .map_err(|e| self.failed(e))?
            .into();
        let at = usize::try_from(offset - start).unwrap_or(usize::MAX);
        block[at..at + data.len()].copy_from_slice(&data);
        let written = self.client.write(start, block, CommandFlags::empty()).await;
        written.map_err(|e| self.failed(e))
    }

    async fn send(&mut self, piece: Piece) -> Result<()> {
        while self.requests.len() >= IN_FLIGHT {
            self.one().await?;
        }
        let client = self.client.clone();
        let none = CommandFlags::empty();
        match piece {
            Piece::Data { offset, data } => {
                let data = Bytes::from(data);
                self.requests
                    .spawn(async move { client.write(offset, data, none).await });
            }
            Piece::Zero { offset, length } => {
                self.requests
                    .spawn(async move { client.write_zeroes(offset, length, none).await });
            }
        }
        Ok(())
    }

    /// Zeroes what is behind the disk, and says so; or says that it stays.
    async fn deal_with_rest(&mut self) -> Result<Option<String>> {
        let rest = self.client.size() - self.size;
        if rest == 0 {
            return Ok(None);
        }
        let what = match self.rest {
            Rest::Kept => "are as they were",
            Rest::Zeroed => {
                self.write(Piece::Zero {
                    offset: self.size,
                    length: rest,
                })
                .await?;
                "were zeroed"
            }
        };
        Ok(Some(format!(
            "{} is larger than the disk: its last {rest} bytes {what}",
            self.uri
        )))
    }
}

#[async_trait]
impl Sink for Export {
    async fn write(&mut self, piece: Piece) -> Result<()> {
        // Several are on their way at a time: that they have been asked for is all that can be said.
        faults::before("restore", "write");
        let unit = self.unit();
        let (start, end) = (piece.offset(), piece.offset() + piece.length());
        if start.is_multiple_of(unit) && end.is_multiple_of(unit) {
            return self.send(piece).await;
        }
        // Only the disk's end lies within a unit: pieces end where chunks do.
        let head = (end / unit * unit).max(start);
        let inner = start.next_multiple_of(unit).min(end);
        for part in split(piece, &[inner, head]) {
            let (start, end) = (part.offset(), part.offset() + part.length());
            if start.is_multiple_of(unit) && end.is_multiple_of(unit) {
                self.send(part).await?;
            } else {
                let length = usize::try_from(part.length()).unwrap_or(usize::MAX);
                let data = match part {
                    Piece::Data { data, .. } => data,
                    Piece::Zero { .. } => vec![0; length],
                };
                self.end_within_unit(start, data).await?;
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<Vec<String>> {
        let note = self.deal_with_rest().await?;
        self.all().await?;
        if self.client.flags().contains(TransmissionFlags::SEND_FLUSH) {
            faults::before("restore", "flush");
            self.client.flush().await.map_err(|e| self.failed(e))?;
            faults::after("restore", "flush");
        }
        self.client.disconnect().await;
        Ok(Vec::from_iter(note))
    }

    async fn abandon(&mut self) {
        // What has been sent is waited for: forgotten requests might still be carried out.
        while self.requests.join_next().await.is_some() {}
        self.client.disconnect().await;
    }
}

/// A piece in parts that end at these places of the disk, as far as they lie within it.
fn split(piece: Piece, at: &[u64]) -> Vec<Piece> {
    let (mut parts, mut left) = (Vec::new(), piece);
    for place in at {
        if *place <= left.offset() || *place >= left.offset() + left.length() {
            continue;
        }
        let first = place - left.offset();
        let rest = match &mut left {
            Piece::Data { data, .. } => Piece::Data {
                offset: *place,
                data: data.split_off(usize::try_from(first).unwrap_or(data.len())),
            },
            Piece::Zero { length, .. } => {
                let behind = *length - first;
                *length = first;
                Piece::Zero {
                    offset: *place,
                    length: behind,
                }
            }
        };
        parts.push(std::mem::replace(&mut left, rest));
    }
    parts.push(left);
    parts
}

/// A server's or connection's error in disksnap's words.
fn of_nbd(what: &str, error: disksnap_nbd::Error) -> Error {
    use disksnap_nbd::Error as Nbd;
    let kind = match &error {
        Nbd::InvalidUri { .. } | Nbd::OutOfBounds { .. } | Nbd::InvalidRequest { .. } => ErrorKind::Invalid,
        Nbd::Credentials { .. } | Nbd::Tls { .. } | Nbd::ReadOnly { .. } => ErrorKind::Denied,
        Nbd::Connect { .. } | Nbd::Disconnected { .. } => ErrorKind::Unavailable,
        Nbd::Refused { .. } => ErrorKind::Refused,
        Nbd::Server { errno, .. } if *errno == disksnap_nbd::Errno::NoSpc => ErrorKind::NoSpace,
        Nbd::Server { .. } => ErrorKind::Io,
        Nbd::Protocol { .. } => ErrorKind::Protocol,
        Nbd::Timeout { .. } => ErrorKind::Timeout,
        Nbd::Unsupported { .. } => ErrorKind::Unsupported,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, what).because(error)
}
