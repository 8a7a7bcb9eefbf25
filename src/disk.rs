//! The bytes of one disk, read at any place or from its start to its end: over NBD, or from a raw file or device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use disksnap_core::{Dispatcher, Domain, Error, ErrorKind, Health, Result, SnapshotName, Source};
use disksnap_nbd::{
    Address, BASE_ALLOCATION, BulkOptions, BulkReader, Chunk, Client, ConnectOptions, Errno, TlsCredentials,
    Uri, dirty_bitmap_context,
};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::changed::{ChangeStream, ChangedExtent};
use crate::onto::RawCopy;
use crate::save::NewFile;

/// How much is read from a file at once, in bytes.
const STEP: u64 = 1 << 20;
/// Connections to one NBD export: a server with several threads can use them.
const CONNECTIONS: usize = 4;
/// So soon a server on this host answers; see [`ConnectOptions::first_answer`].
const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// What zeroes are written from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A disk that can be read: what [`SnapshotReader`](crate::SnapshotReader) and [`RemoteDisk`](crate::RemoteDisk) have in common,
/// so that one who reads need not know from where.
#[derive(Debug)]
pub struct DiskReader {
    data: Data,
    size: u64,
    /// The dirty bitmap that tells what has changed.
    bitmap: Option<String>,
    of: Of,
}

/// Where the bytes come from.
#[derive(Debug)]
enum Data {
    Nbd(Vec<Client>),
    File(Arc<File>),
}

/// Whose bytes they are.
#[derive(Debug)]
pub(crate) enum Of {
    Snapshot {
        dispatcher: Dispatcher,
        domain: Box<Domain>,
        name: SnapshotName,
        target: String,
    },
    Export {
        uri: String,
    },
}

/// A piece of what was read. Pieces come in order.
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
    /// Where it begins on the disk, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Data { offset, .. } | Self::Zero { offset, .. } => *offset,
        }
    }

    /// How many bytes of the disk it stands for.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Data { data, .. } => data.len() as u64,
            Self::Zero { length, .. } => *length,
        }
    }
}

impl DiskReader {
    /// Connects to an export; with a bitmap, for reading what is dirty in it.
    pub(crate) async fn connect(uri: &Uri, tls: Option<&Path>, bitmap: Option<&str>, of: Of) -> Result<Self> {
        let mut options = ConnectOptions {
            meta_contexts: vec![BASE_ALLOCATION.to_owned()],
            // On this host it may be the guest that waits for us meanwhile.
            first_answer: matches!(uri.address(), Address::Unix(_)).then_some(FIRST_ANSWER),
            ..ConnectOptions::default()
        };
        options.meta_contexts.extend(bitmap.map(dirty_bitmap_context));
        if let Some(directory) = tls {
            options.tls = Some(TlsCredentials::from_directory(directory).map_err(of_nbd)?);
        }
        let clients = Client::connect_many(uri, &options, CONNECTIONS)
            .await
            .map_err(of_nbd)?;
        Ok(Self {
            size: clients[0].size(),
            data: Data::Nbd(clients),
            bitmap: bitmap.map(str::to_owned),
            of,
        })
    }

    /// Opens a raw file or device.
    pub(crate) async fn open(path: &Path, of: Of) -> Result<Self> {
        let path = path.to_owned();
        run_blocking(move || {
            let failed = |e| Error::io("cannot open the snapshot's data", e).with("path", path.display());
            let mut file = File::open(&path).map_err(failed)?;
            Ok(Self {
                size: file.seek(SeekFrom::End(0)).map_err(failed)?,
                data: Data::File(Arc::new(file)),
                bitmap: None,
                of,
            })
        })
        .await
    }

    /// The connection's metadata contexts; none where there is no connection.
    pub(crate) fn contexts(&self) -> Vec<String> {
        match &self.data {
            Data::Nbd(clients) => clients[0].contexts().map(str::to_owned).collect(),
            Data::File(_) => Vec::new(),
        }
    }

    pub(crate) async fn disconnect(&self) {
        if let Data::Nbd(clients) = &self.data {
            for client in clients {
                client.disconnect().await;
            }
        }
    }

    /// The disk's virtual size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether what has changed can be told: the reader was opened with a checkpoint, or with a bitmap.
    #[must_use]
    pub fn tells_changes(&self) -> bool {
        self.bitmap.is_some()
    }

    /// The ranges that have changed since the checkpoint that the reader was opened with.
    ///
    /// # Errors
    /// `Invalid` when it was opened without one; what the connection meets.
    pub fn changes(&self) -> Result<ChangeStream> {
        let (clients, context) = self.changing()?;
        let extents = clients[0].extents(&context, 0..self.size);
        Ok(ChangeStream::new(extents.map_err(|e| self.told(of_nbd(e)))?))
    }

    fn changing(&self) -> Result<(&[Client], String)> {
        if let (Data::Nbd(clients), Some(bitmap)) = (&self.data, &self.bitmap) {
            return Ok((clients, dirty_bitmap_context(bitmap)));
        }
        let why = "the disk was not opened for what has changed since a checkpoint";
        Err(self.told(Error::new(ErrorKind::Invalid, why)))
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
            Data::File(file) => match read_file(file, offset, length).await {
                Ok(bytes) => Ok(bytes),
                Err(error) => Err(self.explain(error).await),
            },
        }
    }

    /// All of a range, piece by piece and without a gap, with many requests in flight and zeroes not fetched.
    ///
    /// # Errors
    /// `Invalid` for a range that reaches past the end.
    pub fn pieces(&self, offset: u64, length: u64) -> Result<Pieces<'_>> {
        let range = self.range(offset, length)?;
        match &self.data {
            Data::File(file) => Ok(Pieces {
                of: self,
                done: offset,
                from: From::File(file, range),
            }),
            Data::Nbd(clients) => self.bulk(clients, range, &BulkOptions::default()),
        }
    }

    /// What has changed of a range since the checkpoint that the reader was opened with, piece by piece; what is not told is
    /// as it was. Pieces begin and end at multiples of `round_to` bytes or at the disk's end (0 and 1: anywhere), the rest of
    /// such a unit being read from the disk. What of `also` lies in the range is read as if it had changed, such as what a
    /// disk has grown by. To take up a reading again, begin the range where [`Pieces::done`] was.
    ///
    /// # Errors
    /// `Invalid` when the reader was opened without a checkpoint, for a range that reaches past the disk's end, and for one
    /// that begins or ends within a unit.
    pub fn changed_pieces(
        &self,
        range: Range<u64>,
        round_to: u64,
        also: Option<Range<u64>>,
    ) -> Result<Pieces<'_>> {
        let range = self.range(range.start, range.end.saturating_sub(range.start))?;
        let (clients, context) = self.changing()?;
        let unit = round_to.max(1);
        let odd = |at: u64| !at.is_multiple_of(unit) && at != self.size;
        if odd(range.start) || odd(range.end) {
            let why = format!(
                "{} to {} are not whole units of {unit} bytes",
                range.start, range.end
            );
            return Err(self.told(Error::new(ErrorKind::Invalid, why)));
        }
        let options = BulkOptions {
            only_changed: Some(context),
            round_to,
            also: also.into_iter().collect(),
            ..BulkOptions::default()
        };
        self.bulk(clients, range, &options)
    }

    fn bulk(&self, clients: &[Client], range: Range<u64>, options: &BulkOptions) -> Result<Pieces<'_>> {
        let done = range.start;
        let reader = BulkReader::new(clients.to_vec(), range, options);
        Ok(Pieces {
            of: self,
            done,
            from: From::Nbd(Box::new(reader.map_err(|e| self.told(of_nbd(e)))?)),
        })
    }

    /// Writes a range to a stream, zeroes included; `progress` is told how many bytes are done.
    ///
    /// # Errors
    /// `Broken`, after all was written, when the snapshot broke meanwhile in a way that no read met; those of [`DiskReader::read_at`], and what the writer meets.
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
        writer.flush().await.map_err(failed)?;
        self.of.still_good().await
    }

    /// Writes a range to a new file, mode 0600, in which zeroes become holes; `progress` is told how
    /// many bytes are done. The file appears under its name when it is complete and on disk, or not at all.
    ///
    /// # Errors
    /// `AlreadyExists` when there is something of that name, which is left as it is; `NoSpace`; those
    /// of [`DiskReader::read_at`].
    pub async fn save_to(
        &self,
        path: &Path,
        offset: u64,
        length: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let mut pieces = self.pieces(offset, length)?;
        let mut file = NewFile::create(path)?;
        let mut done = 0;
        while let Some(piece) = pieces.next().await? {
            done += piece.length();
            if let Piece::Data { offset: at, data } = piece {
                file.write(at - offset, data).await?;
            }
            progress(done);
        }
        self.of.still_good().await?;
        file.finish(length).await
    }

    /// Writes what has changed of a range to a new file of the range's length, as [`DiskReader::save_to`] does: the rest of it
    /// are holes. `told` is given what is in it, in order; of that, what reads as zero is zero on the disk.
    ///
    /// `earlier` is the disk's size at the checkpoint, where it is known: what the disk has grown by is taken for changed.
    ///
    /// # Errors
    /// Those of [`DiskReader::save_to`] and [`DiskReader::changed_pieces`].
    pub async fn save_changed_to(
        &self,
        path: &Path,
        range: Range<u64>,
        earlier: Option<u64>,
        mut told: impl FnMut(ChangedExtent),
    ) -> Result<()> {
        let mut pieces = self.changed_pieces(range.clone(), 1, self.grown_by(earlier))?;
        let mut file = NewFile::create(path)?;
        while let Some(piece) = pieces.next().await? {
            let extent = piece.extent();
            if let Piece::Data { offset, data } = piece {
                file.write(offset - range.start, data).await?;
            }
            told(extent);
        }
        self.of.still_good().await?;
        file.finish(range.end - range.start).await
    }

    /// Brings a raw file that holds the disk as it was at the checkpoint up to date, in place and durably: what changed of the
    /// range is written, zeroes become holes, and the file gets the disk's size. Repeating it is harmless.
    ///
    /// `earlier` is the disk's size at the checkpoint, where it is known. `told` is given what was written, in order.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for what is no regular file, has neither the disk's size nor `earlier`, or belongs to a disk of the
    /// domain; `Busy` when QEMU or another run has it open; nothing is changed then. Any error after that leaves the file between the two states, and
    /// says so: a retry completes it, but for `Broken`.
    pub async fn bring_up_to_date(
        &self,
        path: &Path,
        range: Range<u64>,
        earlier: Option<u64>,
        mut told: impl FnMut(ChangedExtent),
    ) -> Result<()> {
        let mut pieces = self.changed_pieces(range, 1, self.grown_by(earlier))?;
        self.of.spare_the_domain(path).map_err(|e| self.told(e))?;
        let copy = RawCopy::open(path).await.map_err(|e| self.told(e))?;
        copy.check(earlier, self.size).map_err(|e| self.told(e))?;
        let bring = async {
            copy.resize(self.size).await?;
            while let Some(piece) = pieces.next().await? {
                let extent = piece.extent();
                match piece {
                    Piece::Data { offset, data } => copy.write(offset, data).await?,
                    Piece::Zero { offset, length } => copy.zero(offset..offset + length).await?,
                }
                told(extent);
            }
            copy.sync().await?;
            self.of.still_good().await
        };
        bring.await.map_err(|e| self.told(copy.unfinished(e)))
    }

    /// What the disk has and had not.
    fn grown_by(&self, earlier: Option<u64>) -> Option<Range<u64>> {
        earlier
            .filter(|size| *size < self.size)
            .map(|size| size..self.size)
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

    pub(crate) fn told(&self, error: Error) -> Error {
        self.of.told(error)
    }

    async fn explain(&self, error: Error) -> Error {
        self.of.explain(error).await
    }
}

impl Of {
    pub(crate) fn told(&self, error: Error) -> Error {
        let error = error.during("read");
        match self {
            Self::Snapshot { name, target, .. } => error.with("snapshot", name).with("disk", target),
            Self::Export { uri } => error.with("export", uri),
        }
    }

    /// Refuses a file that a disk of the domain is made of: it would be overwritten by its own past.
    fn spare_the_domain(&self, path: &Path) -> Result<()> {
        let Self::Snapshot { domain, .. } = self else {
            return Ok(());
        };
        let same = |one: &Path| one.canonicalize().ok().zip(path.canonicalize().ok());
        for disk in &domain.disks {
            let below = std::iter::successors(disk.backing.as_ref(), |layer| layer.backing.as_deref());
            let data = disk.data_store.iter().map(|data| &data.source);
            let sources = disk
                .source
                .iter()
                .chain(data)
                .chain(below.map(|layer| &layer.source));
            let mut files = sources.filter_map(Source::path);
            if files.any(|file| same(file).is_some_and(|(one, other)| one == other)) {
                let why = format!("the file belongs to the domain's disk {}", disk.target);
                return Err(Error::new(ErrorKind::Invalid, why)
                    .with("path", path.display())
                    .hint("Nothing was changed. Give a copy of the disk; to put the disk itself back, see `disksnap snapshot revert`."));
            }
        }
        Ok(())
    }

    /// The server's error says little: a snapshot that broke meanwhile is the usual cause.
    async fn explain(&self, error: Error) -> Error {
        match self.health().await {
            Some(Health::Broken(why) | Health::Gone(why)) => self.broke(&why).because(self.told(error)),
            _ => self.told(error),
        }
    }

    /// What was read to its end is the snapshot's only where that has not broken meanwhile: storage that somebody takes away
    /// may read as zeroes, without an error.
    async fn still_good(&self) -> Result<()> {
        match self.health().await {
            Some(Health::Broken(why)) => Err(self.broke(&why)),
            _ => Ok(()),
        }
    }

    fn broke(&self, why: &str) -> Error {
        let broken = Error::new(
            ErrorKind::Broken,
            format!("the snapshot broke while it was read: {why}"),
        );
        self.told(broken)
            .hint("What was read must not be used. Delete the snapshot, and take a new one.")
    }

    /// How the disk's snapshot is, where it can be looked at.
    async fn health(&self) -> Option<Health> {
        let Self::Snapshot {
            dispatcher,
            domain,
            name,
            target,
        } = self
        else {
            return None;
        };
        let found = dispatcher.show(domain, name).await.ok()?;
        let disk = found.snapshot.disks.iter().position(|d| d.target == *target)?;
        found.health.get(disk).cloned()
    }
}

/// A range being read; see [`DiskReader::pieces`] and [`DiskReader::changed_pieces`].
#[derive(Debug)]
pub struct Pieces<'a> {
    of: &'a DiskReader,
    /// Up to where pieces were given.
    done: u64,
    from: From<'a>,
}

#[derive(Debug)]
enum From<'a> {
    Nbd(Box<BulkReader>),
    File(&'a Arc<File>, Range<u64>),
}

impl Pieces<'_> {
    /// Up to where the range has been read, in bytes of the disk: the end of the last piece. Reading can be taken up again
    /// there, by another reader too.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The next piece, or `None` at the end of the range. The future may be dropped; over NBD no piece is then lost.
    ///
    /// # Errors
    /// Those of [`DiskReader::read_at`]; each says up to where was read. `Unavailable`, which is retryable, when the
    /// connection ended: connect anew and go on from [`Pieces::done`].
    pub async fn next(&mut self) -> Result<Option<Piece>> {
        let piece = match &mut self.from {
            From::File(file, left) => match next_of_file(file, left).await {
                Ok(piece) => Ok(piece),
                Err(error) => Err(self.of.explain(error).await),
            },
            From::Nbd(reader) => match reader.next().await {
                Ok(chunk) => Ok(chunk.map(Piece::of)),
                Err(error) => Err(self.of.explain(of_nbd(error)).await),
            },
        };
        let piece = piece.map_err(|e| e.with("read up to", self.done))?;
        if let Some(piece) = &piece {
            self.done = piece.offset() + piece.length();
        }
        Ok(piece)
    }
}

impl Piece {
    fn extent(&self) -> ChangedExtent {
        ChangedExtent {
            offset: self.offset(),
            length: self.length(),
        }
    }

    fn of(chunk: Chunk) -> Self {
        match chunk {
            Chunk::Zero { offset, length } => Self::Zero { offset, length },
            Chunk::Data { offset, data } => Self::Data {
                offset,
                data: data.into(),
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
                "The directory of credentials needs ca-cert.pem, and client-cert.pem and client-key.pem where the server verifies clients.",
            ),
        ),
        Nbd::Connect { .. }
        | Nbd::Disconnected { .. }
        | Nbd::Server {
            errno: Errno::Shutdown,
            ..
        } => (ErrorKind::Unavailable, None),
        Nbd::Tls { .. } => (ErrorKind::Denied, None),
        Nbd::Refused { .. } => (ErrorKind::Refused, None),
        Nbd::Server { .. } => (ErrorKind::Io, None),
        Nbd::Protocol { .. } => (ErrorKind::Protocol, None),
        Nbd::Timeout { .. } => (ErrorKind::Timeout, None),
        Nbd::OutOfBounds { .. } | Nbd::InvalidUri { .. } => (ErrorKind::Invalid, None),
        Nbd::Unsupported { .. } => (ErrorKind::Unsupported, None),
        _ => (ErrorKind::Internal, None),
    };
    let told = Error::new(kind, "the export cannot be read").because(error);
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}
