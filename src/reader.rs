//! Reading one disk of a snapshot: opened through the dispatcher, read at any place, closed again.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use disksnap_core::{
    CheckpointName, Dispatcher, Domain, Error, ErrorKind, Health, NetworkHost, Opened, Result, SnapshotName,
    Source,
};
use disksnap_nbd::{
    BASE_ALLOCATION, BulkOptions, BulkReader, Chunk, Client, ConnectOptions, DEFAULT_PORT, TlsCredentials,
    Uri, dirty_bitmap_context,
};

use crate::changed::ChangeStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// How much is read from a file at once, in bytes.
const STEP: u64 = 1 << 20;
/// Connections to one NBD export: a server with several threads can use them.
const CONNECTIONS: usize = 4;
/// What zeroes are written from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// One disk of a snapshot, open for reading.
///
/// What the domain's hypervisor serves is read over NBD, through an export of this reader's own that
/// ends with [`SnapshotReader::close`]; what lies in a raw file or device is read from there. A reader
/// that is dropped unclosed leaves its export to the next request on the domain, which stops it.
#[derive(Debug)]
pub struct SnapshotReader {
    dispatcher: Dispatcher,
    domain: Domain,
    name: SnapshotName,
    target: String,
    opened: Opened,
    data: Data,
    size: u64,
}

/// Where the bytes come from.
#[derive(Debug)]
enum Data {
    Nbd(Vec<Client>),
    File(Arc<File>),
}

/// A piece of what was read. Pieces come in order and cover the range without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of the disk; they may be zeroes.
    Data {
        /// Where they stand on the disk.
        offset: u64,
        /// The bytes; never empty.
        data: Vec<u8>,
    },
    /// A range that reads as zeroes.
    Zero {
        /// Where it begins on the disk.
        offset: u64,
        /// How long it is.
        length: u64,
    },
}

impl Piece {
    /// How many bytes of the disk it stands for.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Data { data, .. } => data.len() as u64,
            Self::Zero { length, .. } => *length,
        }
    }
}

impl SnapshotReader {
    pub(crate) async fn open(
        dispatcher: &Dispatcher,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        since: Option<&CheckpointName>,
    ) -> Result<Self> {
        let opened = match since {
            None => dispatcher.open(domain, name, target).await?,
            Some(since) => dispatcher.open_since(domain, name, target, since).await?,
        };
        match connect(&opened).await {
            Ok((data, size)) => Ok(Self {
                dispatcher: dispatcher.clone(),
                domain: domain.clone(),
                name: name.clone(),
                target: target.to_owned(),
                opened,
                data,
                size,
            }),
            Err(error) => {
                let closed = dispatcher.close(domain, opened).await;
                let error = error
                    .during("read")
                    .with("domain", &domain.id)
                    .with("snapshot", name);
                Err(error
                    .with("disk", target)
                    .rollback_failed(closed.err().into_iter().collect()))
            }
        }
    }

    /// The disk's virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is to be known before its data is read: that the snapshot's room runs out.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.opened.warnings
    }

    /// Why more is told as changed than was written, where it is; never less.
    #[must_use]
    pub fn excess(&self) -> Option<&str> {
        self.opened.excess.as_deref()
    }

    /// The ranges that have changed since the checkpoint that the reader was opened with.
    ///
    /// # Errors
    /// `Invalid` when it was opened without one; what the connection meets.
    pub fn changes(&self) -> Result<ChangeStream> {
        let (Data::Nbd(clients), Some(bitmap)) = (&self.data, &self.opened.bitmap) else {
            let why = "the disk was not opened for what has changed since a checkpoint";
            return Err(self.told(Error::new(ErrorKind::Invalid, why)));
        };
        let extents = clients[0].extents(&dirty_bitmap_context(bitmap), 0..self.size);
        Ok(ChangeStream::new(extents.map_err(|e| self.told(of_nbd(e)))?))
    }

    /// Where the bytes come from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.opened.source
    }

    /// Reads `length` bytes at `offset`.
    ///
    /// # Errors
    /// `Invalid` for a range that reaches past the end; `Broken` when the snapshot broke meanwhile;
    /// what the connection or the file meets.
    pub async fn read_at(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.range(offset, length as u64)?;
        match &self.data {
            Data::Nbd(clients) => match clients[0].read(offset, length).await {
                Ok(bytes) => Ok(bytes.into()),
                Err(error) => Err(self.explain(of_nbd(error)).await),
            },
            Data::File(file) => read_file(file, offset, length).await.map_err(|e| self.told(e)),
        }
    }

    /// All of a range, piece by piece, with many requests in flight and zeroes not fetched.
    ///
    /// # Errors
    /// `Invalid` for a range that reaches past the end.
    pub fn pieces(&self, offset: u64, length: u64) -> Result<Pieces<'_>> {
        let range = self.range(offset, length)?;
        let from = match &self.data {
            Data::File(file) => From::File(file, range),
            Data::Nbd(clients) => {
                let reader = BulkReader::new(clients.clone(), range, &BulkOptions::default());
                From::Nbd(Box::new(reader.map_err(|e| self.told(of_nbd(e)))?))
            }
        };
        Ok(Pieces { of: self, from })
    }

    /// Writes a range to a stream, zeroes included; `progress` is told how many bytes are done.
    ///
    /// # Errors
    /// Those of [`SnapshotReader::read_at`], and what the writer meets.
    pub async fn copy_to<W: AsyncWrite + Unpin>(
        &self,
        writer: &mut W,
        offset: u64,
        length: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let failed = |error| self.told(Error::io("cannot write what was read", error));
        let mut pieces = self.pieces(offset, length)?;
        let mut done = 0;
        while let Some(piece) = pieces.next().await? {
            done += piece.length();
            match piece {
                Piece::Data { data, .. } => writer.write_all(&data).await.map_err(failed)?,
                Piece::Zero { length, .. } => write_zeroes(writer, length).await.map_err(failed)?,
            }
            progress(done);
        }
        writer.flush().await.map_err(failed)
    }

    /// Writes a range to a new file, mode 0600, in which zeroes become holes; `progress` is told how
    /// many bytes are done. The file appears under its name when it is complete and on disk, or not at all.
    ///
    /// # Errors
    /// `AlreadyExists` when there is something of that name, which is left as it is; `NoSpace`; those
    /// of [`SnapshotReader::read_at`].
    pub async fn save_to(
        &self,
        path: &Path,
        offset: u64,
        length: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let mut pieces = self.pieces(offset, length)?;
        let mut file = crate::save::NewFile::create(path)?;
        let mut done = 0;
        while let Some(piece) = pieces.next().await? {
            done += piece.length();
            if let Piece::Data { offset: at, data } = piece {
                file.write(at - offset, data).await?;
            }
            progress(done);
        }
        file.finish(length).await
    }

    /// Ends the reading, and with it the export that was made for it.
    ///
    /// # Errors
    /// What stopping the export meets.
    pub async fn close(self) -> Result<()> {
        if let Data::Nbd(clients) = &self.data {
            for client in clients {
                client.disconnect().await;
            }
        }
        self.dispatcher.close(&self.domain, self.opened).await
    }

    /// The range, if it lies within the disk.
    fn range(&self, offset: u64, length: u64) -> Result<Range<u64>> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(offset..end),
            _ => Err(self
                .told(Error::new(
                    ErrorKind::Invalid,
                    format!("{length} bytes at {offset} reach past the end of the disk"),
                ))
                .with("size", self.size)
                .hint(format!(
                    "The disk has {} bytes: read less, or from an earlier place.",
                    self.size
                ))),
        }
    }

    fn told(&self, error: Error) -> Error {
        error
            .during("read")
            .with("snapshot", &self.name)
            .with("disk", &self.target)
    }

    /// The server's error says little: a snapshot that broke meanwhile is the usual cause.
    async fn explain(&self, error: Error) -> Error {
        let error = self.told(error);
        let Ok(found) = self.dispatcher.show(&self.domain, &self.name).await else {
            return error;
        };
        let disk = found.snapshot.disks.iter().position(|d| d.target == self.target);
        match disk.and_then(|n| found.health.get(n)) {
            Some(Health::Broken(why) | Health::Gone(why)) => self
                .told(Error::new(
                    ErrorKind::Broken,
                    format!("the snapshot broke while it was read: {why}"),
                ))
                .hint("What was read must not be used. Delete the snapshot, and take a new one.")
                .because(error),
            _ => error,
        }
    }
}

/// A range being read; see [`SnapshotReader::pieces`].
#[derive(Debug)]
pub struct Pieces<'a> {
    of: &'a SnapshotReader,
    from: From<'a>,
}

#[derive(Debug)]
enum From<'a> {
    Nbd(Box<BulkReader>),
    File(&'a Arc<File>, Range<u64>),
}

impl Pieces<'_> {
    /// The next piece, or `None` at the end of the range. The future may be dropped; over NBD no piece is then lost.
    ///
    /// # Errors
    /// Those of [`SnapshotReader::read_at`].
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        match &mut self.from {
            From::File(file, left) => next_of_file(file, left).await.map_err(|e| self.of.told(e)),
            From::Nbd(reader) => match reader.next().await {
                Ok(None) => Ok(None),
                Ok(Some(Chunk::Zero { offset, length })) => Ok(Some(Piece::Zero { offset, length })),
                Ok(Some(Chunk::Data { offset, data })) => {
                    let data = data.into();
                    Ok(Some(Piece::Data { offset, data }))
                }
                Err(error) => Err(self.of.explain(of_nbd(error)).await),
            },
        }
    }
}

async fn write_zeroes<W: AsyncWrite + Unpin>(writer: &mut W, length: u64) -> io::Result<()> {
    let mut left = length;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
        writer.write_all(&ZEROES[..part]).await?;
        left -= part as u64;
    }
    Ok(())
}

async fn connect(opened: &Opened) -> Result<(Data, u64)> {
    match (&opened.source, opened.format.as_str()) {
        (source @ Source::Network { .. }, "raw") => {
            let uri = uri_of(source).ok_or_else(|| unreadable(opened))?;
            connect_nbd(&uri, opened).await
        }
        (Source::File { file: path } | Source::Block { dev: path }, "raw") => {
            let path = path.clone();
            run_blocking(move || open_file(&path)).await
        }
        _ => Err(unreadable(opened)),
    }
}

fn unreadable(opened: &Opened) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{} data at {} cannot be read here", opened.format, opened.source),
    )
    .hint(
        "Open the snapshot's backupSource read-only with a program that knows the format, such as qemu-img.",
    )
}

async fn connect_nbd(uri: &Uri, opened: &Opened) -> Result<(Data, u64)> {
    let mut options = ConnectOptions {
        meta_contexts: vec![BASE_ALLOCATION.to_owned()],
        ..ConnectOptions::default()
    };
    let context = opened.bitmap.as_deref().map(dirty_bitmap_context);
    options.meta_contexts.extend(context);
    if let Some(tls) = &opened.tls {
        options.tls = Some(TlsCredentials::from_directory(&tls.credentials).map_err(of_nbd)?);
    }
    let clients = Client::connect_many(uri, &options, CONNECTIONS)
        .await
        .map_err(of_nbd)?;
    let size = clients[0].size();
    Ok((Data::Nbd(clients), size))
}

/// The URI of an NBD source (the NBD project's `doc/uri.md`), as nbdcopy and qemu-img take it; `None`
/// for any other source. A server that listens on all addresses is reached on this host's own.
#[must_use]
pub fn nbd_uri(source: &Source) -> Option<String> {
    uri_of(source).map(|uri| uri.to_string())
}

fn uri_of(source: &Source) -> Option<Uri> {
    let Source::Network {
        protocol,
        name,
        hosts,
        tls,
    } = source
    else {
        return None;
    };
    let export = name.clone().unwrap_or_default();
    let uri = match hosts.first().filter(|_| protocol == "nbd")? {
        NetworkHost::Unix { socket } => Uri::unix(socket, export),
        NetworkHost::Tcp { name, port } => Uri::tcp(reachable(name), port.unwrap_or(DEFAULT_PORT), export),
    };
    Some(if *tls { uri.with_tls() } else { uri })
}

/// A server that listens on all addresses is reached on this host's own.
fn reachable(address: &str) -> &str {
    match address {
        "0.0.0.0" => "127.0.0.1",
        "::" => "::1",
        other => other,
    }
}

fn open_file(path: &Path) -> Result<(Data, u64)> {
    let failed = |e| Error::io("cannot open the snapshot's data", e).with("path", path.display());
    let mut file = File::open(path).map_err(failed)?;
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((Data::File(Arc::new(file)), size))
}

async fn read_file(file: &Arc<File>, offset: u64, length: usize) -> Result<Vec<u8>> {
    let file = Arc::clone(file);
    run_blocking(move || {
        let mut data = vec![0; length];
        file.read_exact_at(&mut data, offset)
            .map_err(|e| Error::io("cannot read the snapshot's data", e).with("offset", offset))?;
        Ok(data)
    })
    .await
}

/// The next piece of what is `left`: a hole as far as it goes, or a step of data.
async fn next_of_file(file: &Arc<File>, left: &mut Range<u64>) -> Result<Option<Piece>> {
    if left.is_empty() {
        return Ok(None);
    }
    let offset = left.start;
    let data = next_data(file, offset).min(left.end);
    if data > offset {
        left.start = data;
        let length = data - offset;
        return Ok(Some(Piece::Zero { offset, length }));
    }
    let length = STEP.min(left.end - offset);
    left.start = offset + length;
    // STEP fits.
    let data = read_file(file, offset, usize::try_from(length).unwrap_or_default()).await?;
    Ok(Some(Piece::Data { offset, data }))
}

/// Where data begins at or after `offset` (lseek(2), `SEEK_DATA`); `offset` where that is not known.
fn next_data(file: &File, offset: u64) -> u64 {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(data) => data,
        Err(rustix::io::Errno::NXIO) => u64::MAX,
        Err(_) => offset,
    }
}

/// Runs what may wait for a disk where it holds up nobody.
pub(crate) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::new(ErrorKind::Internal, "a blocking task died").because(error)),
    }
}

/// The client's error as ours; what it says is kept as the cause.
pub(crate) fn of_nbd(error: disksnap_nbd::Error) -> Error {
    use disksnap_nbd::Error as Nbd;
    let (kind, hint) = match &error {
        Nbd::Credentials { .. } => (
            ErrorKind::Denied,
            Some(
                "The server's credentials directory needs ca-cert.pem, and client-cert.pem and client-key.pem where the server verifies clients.",
            ),
        ),
        Nbd::Connect { .. } | Nbd::Disconnected { .. } => (ErrorKind::Unavailable, None),
        Nbd::Tls { .. } => (ErrorKind::Denied, None),
        Nbd::Refused { .. } => (ErrorKind::Refused, None),
        Nbd::Server { .. } => (ErrorKind::Io, None),
        Nbd::Protocol { .. } => (ErrorKind::Protocol, None),
        Nbd::Timeout { .. } => (ErrorKind::Timeout, None),
        Nbd::OutOfBounds { .. } => (ErrorKind::Invalid, None),
        Nbd::Unsupported { .. } => (ErrorKind::Unsupported, None),
        _ => (ErrorKind::Internal, None),
    };
    let told = Error::new(kind, "the export cannot be read").because(error);
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}
