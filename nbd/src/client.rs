//! The client: connecting to an export, and the requests that can be made of it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::assembly::ReadData;
use crate::connect::{ConnectOptions, HANDSHAKE, open, within};
use crate::connection::{Connection, InFlight, Reply};
use crate::error::{Errno, Error, Result};
use crate::extents::{Extent, ExtentStream, clipped};
use crate::handshake::{BoxedStream, Negotiation, Session};
use crate::uri::Uri;
use crate::wire::{BlockSizes, Command, CommandFlags, StatusChunk, TransmissionFlags};
use bytes::{Bytes, BytesMut};
use tokio::time::timeout;

/// What is read of an export to see whether it answers, in bytes.
const SECTOR: u64 = 512;
/// So many connections are left because they do not answer; the next is waited for.
const IMPATIENT: u32 = 3;
/// The longest read or write in one request, whatever the server allows: what the protocol calls
/// portable.
const MAX_PAYLOAD: u64 = 32 << 20;
/// The longest request that carries no data. Far below the 4 GiB that fit in a request.
const MAX_RANGE: u64 = 1 << 30;
/// `NBD_CMD_FLAG_DF`: the answer to a read must come in one piece. QEMU hangs up when it cannot read
/// what it is to send in pieces, and says `EIO` when it is to send it in one.
const ONE_PIECE: CommandFlags = CommandFlags::from_bits_retain(1 << 2);
/// Parts of one long request that are in flight together.
const PARTS: usize = 8;

/// A connection to one export of an NBD server.
///
/// A clone is another handle on the same connection. Requests made at the same time are in flight
/// together, and may be carried out in any order. A request whose future is dropped is forgotten,
/// not undone: a write may still happen. When the last handle is dropped, the connection is closed
/// without waiting for what is in flight; [`Client::disconnect`] waits.
///
/// A task on the tokio runtime that [`Client::connect`] ran on serves the connection.
#[derive(Debug, Clone)]
pub struct Client {
    connection: Arc<Connection>,
    limits: Limits,
}

/// What one request can ask for, in bytes.
#[derive(Debug, Clone, Copy)]
struct Limits {
    align: u64,
    payload: u64,
    zeroes: u64,
}

impl Limits {
    fn of(session: &Session, max_in_flight: usize) -> Self {
        let sizes = session.block_sizes.unwrap_or_default();
        let align = u64::from(sizes.minimum);
        let aligned = |length: u64| (length / align * align).max(align);
        let payload = u64::from(sizes.maximum)
            .min(MAX_PAYLOAD)
            .min(max_in_flight as u64);
        let zeroes = match session.block_sizes {
            Some(sizes) => u64::from(sizes.maximum).min(MAX_RANGE),
            None => MAX_RANGE,
        };
        Self {
            align,
            payload: aligned(payload),
            zeroes: aligned(zeroes),
        }
    }
}

impl Client {
    /// Connects to an export, and gets ready for requests (`NBD_OPT_GO`).
    ///
    /// With [`ConnectOptions::first_answer`] one sector is read before the connection is given out. QEMU 10.0 can be caught
    /// between a client that has just connected and something that drains the export's node: it then answers nobody, and its guest stands
    /// still, until that client has gone. So a connection that is not answered is left soon, and another one made.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Timeout`], [`Error::Refused`], [`Error::Tls`],
    /// [`Error::Credentials`], [`Error::Disconnected`] or [`Error::Protocol`].
    pub async fn connect(uri: &Uri, options: &ConnectOptions) -> Result<Self> {
        if let Some(patience) = options.first_answer {
            for _ in 0..IMPATIENT {
                let client = Self::connect_once(uri, options).await?;
                if client.answers_within(patience).await {
                    return Ok(client);
                }
                tracing::info!("{uri} does not answer: connecting anew");
            }
        }
        // A server that is only slow is waited for in the end.
        Self::connect_once(uri, options).await
    }

    async fn connect_once(uri: &Uri, options: &ConnectOptions) -> Result<Self> {
        let target: Arc<str> = uri.to_string().into();
        let stream = open(uri, &target, options.handshake_timeout).await?;
        Self::over(stream, uri, target, options).await
    }

    /// Whether anything comes, be it an error.
    async fn answers_within(&self, patience: Duration) -> bool {
        let length = usize::try_from(self.size().min(SECTOR)).unwrap_or_default();
        length == 0 || timeout(patience, self.read(0, length)).await.is_ok()
    }

    /// Connects up to `count` times, so that a server with several threads can use them: see
    /// [`BulkReader`](crate::BulkReader). One connection is all there is with a server that does not
    /// set [`TransmissionFlags::CAN_MULTI_CONN`], and there are fewer if the server takes no more.
    ///
    /// # Errors
    /// Those of [`Client::connect`], for the first connection, and [`Error::Protocol`] if the
    /// connections see exports of different sizes.
    pub async fn connect_many(uri: &Uri, options: &ConnectOptions, count: usize) -> Result<Vec<Self>> {
        let first = Self::connect(uri, options).await?;
        let mut clients = vec![first];
        if !clients[0].flags().contains(TransmissionFlags::CAN_MULTI_CONN) {
            return Ok(clients);
        }
        // A server that is full may leave a further connection waiting without a word.
        let patience = options.handshake_timeout.min(Duration::from_secs(1));
        let options = ConnectOptions {
            handshake_timeout: patience,
            ..options.clone()
        };
        while clients.len() < count {
            match Self::connect(uri, &options).await {
                Ok(client) if client.size() == clients[0].size() => clients.push(client),
                Ok(_) => {
                    let violation = "its connections see exports of different sizes".into();
                    return Err(Error::Protocol {
                        target: Arc::clone(clients[0].target()),
                        violation,
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "going on with {} NBD connections", clients.len());
                    break;
                }
            }
        }
        Ok(clients)
    }

    /// The handshake over a stream that is already there.
    pub(crate) async fn over(
        stream: BoxedStream,
        uri: &Uri,
        target: Arc<str>,
        options: &ConnectOptions,
    ) -> Result<Self> {
        let haggling = async {
            let negotiation =
                Negotiation::begin(stream, uri, Arc::clone(&target), options.tls.as_ref()).await?;
            negotiation.go(uri.export(), &options.meta_contexts).await
        };
        let (stream, session) = within(options.handshake_timeout, &target, HANDSHAKE, haggling).await?;
        tracing::debug!(target = &*session.target, size = session.size, flags = ?session.flags, "NBD export open");
        let limits = Limits::of(&session, options.max_in_flight);
        let connection = Connection::start(stream, session, options.idle_timeout, options.max_in_flight);
        Ok(Self {
            connection: Arc::new(connection),
            limits,
        })
    }

    fn session(&self) -> &Session {
        self.connection.session()
    }

    pub(crate) fn target(&self) -> &Arc<str> {
        &self.session().target
    }

    /// The size of the export, in bytes. It need not be a multiple of anything.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.session().size
    }

    /// What the server says it can do with the export.
    #[must_use]
    pub fn flags(&self) -> TransmissionFlags {
        self.session().flags
    }

    /// Whether the export cannot be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags().contains(TransmissionFlags::READ_ONLY)
    }

    /// The sizes that the server wants requests to keep to; what the protocol tells to assume when
    /// it said nothing. Long requests are split, and reads are aligned, by this client.
    #[must_use]
    pub fn block_sizes(&self) -> BlockSizes {
        self.session().block_sizes.unwrap_or_default()
    }

    /// The server's words about the export, if it has any. Control characters are escaped.
    #[must_use]
    pub fn description(&self) -> Option<&str> {
        self.session().description.as_deref()
    }

    /// Whether the server sends structured replies, without which there are no metadata contexts.
    #[must_use]
    pub fn has_structured_replies(&self) -> bool {
        self.session().structured
    }

    /// The metadata contexts that the server granted, in the server's order.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.session().contexts.iter().map(|(_, name)| name.as_str())
    }

    /// Whether the server granted this metadata context.
    #[must_use]
    pub fn has_context(&self, name: &str) -> bool {
        self.contexts().any(|context| context == name)
    }

    /// Whether the connection still stood when last heard of.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.connection.is_open()
    }

    /// Reads `length` bytes at `offset` (`NBD_CMD_READ`).
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] before anything is sent; [`Error::Server`] with the server's error
    /// number; and whatever ends the connection.
    pub async fn read(&self, offset: u64, length: usize) -> Result<Bytes> {
        let length = length as u64;
        self.check_range(Command::Read, offset, length)?;
        if length <= self.limits.payload - self.limits.align {
            if length == 0 {
                return Ok(Bytes::new());
            }
            return Ok(self.start_read(offset, length).await?.wait().await?.into_bytes());
        }
        let mut whole = BytesMut::new();
        let mut parts = parts(offset, length, self.limits.payload);
        let mut reads = VecDeque::new();
        loop {
            while reads.len() < PARTS
                && let Some(part) = parts.next()
            {
                reads.push_back(self.start_read(part.start, part.end - part.start).await?);
            }
            let Some(mut read) = reads.pop_front() else {
                return Ok(whole.freeze());
            };
            match read.wait().await? {
                Content::Zero(length) => whole.resize(whole.len() + length, 0),
                Content::Data(bytes) => whole.extend_from_slice(&bytes),
            }
        }
    }

    /// Writes `data` at `offset` (`NBD_CMD_WRITE`). Only [`CommandFlags::FUA`] has a meaning here.
    ///
    /// A write that is longer than the server takes at once is split; when it fails, parts of it may
    /// have been written.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::OutOfBounds`], [`Error::InvalidRequest`] if not aligned to
    /// [`BlockSizes::minimum`], or [`Error::Unsupported`] flags, before anything is sent;
    /// [`Error::Server`] with the server's error number; and whatever ends the connection.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>, flags: CommandFlags) -> Result<()> {
        let data = data.into();
        self.check_write(
            Command::Write,
            offset,
            data.len() as u64,
            flags,
            CommandFlags::FUA,
        )?;
        let payload = |part: &Range<u64>| -> Bytes {
            let index = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
            data.slice(index(part.start)..index(part.end))
        };
        let parts = parts(offset, data.len() as u64, self.limits.payload);
        self.in_parts(Command::Write, flags, parts, payload).await
    }

    /// Makes a range read as zeroes (`NBD_CMD_WRITE_ZEROES`). The server may punch a hole, unless
    /// [`CommandFlags::NO_HOLE`] is given. Zero is data: it is written even where zeroes are.
    ///
    /// To a server that does not know the request, zeroes are written as data.
    ///
    /// # Errors
    /// As for [`Client::write`]; also [`Errno::NotSup`](crate::Errno::NotSup) with
    /// [`CommandFlags::FAST_ZERO`], when it would not be fast.
    pub async fn write_zeroes(&self, offset: u64, length: u64, flags: CommandFlags) -> Result<()> {
        self.check_write(Command::WriteZeroes, offset, length, flags, CommandFlags::all())?;
        if self.flags().contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            let parts = parts(offset, length, self.limits.zeroes);
            return self
                .in_parts(Command::WriteZeroes, flags, parts, |_| Bytes::new())
                .await;
        }
        let most = self.limits.payload.min(1 << 20).max(self.limits.align);
        let zeroes = Bytes::from(vec![0; usize::try_from(most.min(length)).unwrap_or(0)]);
        let payload = |part: &Range<u64>| -> Bytes {
            zeroes.slice(..usize::try_from(part.end - part.start).unwrap_or(usize::MAX))
        };
        let parts = parts(offset, length, most);
        self.in_parts(Command::Write, flags & CommandFlags::FUA, parts, payload)
            .await
    }

    /// Says that the contents of a range are no longer needed (`NBD_CMD_TRIM`). What it reads as
    /// afterwards is undefined.
    ///
    /// # Errors
    /// As for [`Client::write`]; [`Error::Unsupported`] where the server does not offer it.
    pub async fn trim(&self, offset: u64, length: u64, flags: CommandFlags) -> Result<()> {
        self.check_write(Command::Trim, offset, length, flags, CommandFlags::FUA)?;
        self.need(TransmissionFlags::SEND_TRIM, "trim")?;
        let parts = parts(offset, length, MAX_RANGE);
        self.in_parts(Command::Trim, flags, parts, |_| Bytes::new()).await
    }

    /// Puts on stable storage everything whose write was answered before (`NBD_CMD_FLUSH`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the server does not offer it; [`Error::Server`] with the
    /// server's error number; and whatever ends the connection.
    pub async fn flush(&self) -> Result<()> {
        self.need(TransmissionFlags::SEND_FLUSH, "flush")?;
        let none = CommandFlags::empty();
        self.connection
            .submit(Command::Flush, none, (0, 0), Bytes::new())
            .await?
            .wait()
            .await?;
        Ok(())
    }

    /// The status of a range in one context, by one request (`NBD_CMD_BLOCK_STATUS`): sorted,
    /// disjoint extents from `offset` on, none beyond `offset + length`. The server may answer for
    /// less than the range, never for nothing: [`Client::extents`] asks on until the end.
    ///
    /// # Errors
    /// [`Error::MissingContext`] or [`Error::OutOfBounds`] before anything is sent;
    /// [`Error::Server`] with the server's error number; and whatever ends the connection.
    pub async fn block_status(&self, offset: u64, length: u64, context: &str) -> Result<Vec<Extent>> {
        self.check_range(Command::BlockStatus, offset, length)?;
        let id = self.context_id(context)?;
        if length == 0 {
            return Ok(Vec::new());
        }
        let range = offset..offset + length.min(MAX_RANGE);
        let mut status = self.start_status(range.clone(), id).await?;
        status.wait().await
    }

    /// The status of a whole range in one context: merged, sorted and disjoint extents that cover
    /// it, however many requests that takes.
    ///
    /// # Errors
    /// [`Error::MissingContext`] or [`Error::OutOfBounds`].
    pub fn extents(&self, context: &str, range: Range<u64>) -> Result<ExtentStream> {
        self.check_range(
            Command::BlockStatus,
            range.start,
            range.end.saturating_sub(range.start),
        )?;
        Ok(ExtentStream::new(self.clone(), self.context_id(context)?, range))
    }

    /// Ends the connection politely (`NBD_CMD_DISC`) after everything in flight was answered.
    /// Requests made later fail with [`Error::Disconnected`]. Idempotent; closed is closed, so there
    /// is nothing that can fail.
    pub async fn disconnect(&self) {
        self.connection.disconnect().await;
    }

    // --- building blocks -----------------------------------------------------------------------

    /// Sends one read, of at most [`Self::max_payload`] bytes after alignment.
    pub(crate) async fn start_read(&self, offset: u64, length: u64) -> Result<PendingRead> {
        let range = self.aligned(Command::Read, offset, length)?;
        let one_piece = self.flags().contains(TransmissionFlags::SEND_DF);
        let small = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let mut read = PendingRead {
            connection: Arc::clone(&self.connection),
            request: (range.start, length32(range.end - range.start)),
            reply: None,
            flags: if one_piece {
                ONE_PIECE
            } else {
                CommandFlags::empty()
            },
            skip: small(offset - range.start),
            length: small(length),
        };
        read.send().await?;
        Ok(read)
    }

    /// Asks for the status of a range of at most [`MAX_RANGE`] bytes.
    pub(crate) async fn start_status(&self, range: Range<u64>, context: u32) -> Result<PendingStatus> {
        let asked = self.aligned(Command::BlockStatus, range.start, range.end - range.start)?;
        let request = (asked.start, length32(asked.end - asked.start));
        let none = CommandFlags::empty();
        let reply = self
            .connection
            .submit(Command::BlockStatus, none, request, Bytes::new())
            .await?;
        Ok(PendingStatus {
            reply,
            at: asked.start,
            range,
            context,
        })
    }

    /// The longest read or write that goes out as one request, in bytes.
    pub(crate) fn max_payload(&self) -> u64 {
        self.limits.payload
    }

    /// What offsets and lengths must be multiples of.
    pub(crate) fn alignment(&self) -> u64 {
        self.limits.align
    }

    pub(crate) fn check_range(&self, command: Command, offset: u64, length: u64) -> Result<()> {
        let size = self.size();
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(Error::OutOfBounds {
            target: Arc::clone(self.target()),
            command,
            offset,
            length,
            size,
        })
    }

    fn check_write(
        &self,
        command: Command,
        offset: u64,
        length: u64,
        flags: CommandFlags,
        known: CommandFlags,
    ) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::ReadOnly {
                target: Arc::clone(self.target()),
                command,
            });
        }
        self.check_range(command, offset, length)?;
        let invalid = |reason| {
            let target = Arc::clone(self.target());
            Err(Error::InvalidRequest {
                target,
                command,
                offset,
                length,
                reason,
            })
        };
        if !(offset | length).is_multiple_of(self.limits.align) {
            return invalid("it is not aligned to the server's minimum block size");
        }
        if !known.contains(flags) {
            return invalid("the request does not know one of its flags");
        }
        if flags.contains(CommandFlags::FUA) {
            self.need(
                TransmissionFlags::SEND_FUA,
                "writes through to stable storage (FUA)",
            )?;
        }
        if flags.contains(CommandFlags::FAST_ZERO) {
            self.need(TransmissionFlags::SEND_FAST_ZERO, "fast zeroes")?;
        }
        Ok(())
    }

    fn need(&self, flag: TransmissionFlags, feature: &'static str) -> Result<()> {
        if self.flags().contains(flag) {
            return Ok(());
        }
        Err(Error::Unsupported {
            target: Arc::clone(self.target()),
            feature,
        })
    }

    fn context_id(&self, context: &str) -> Result<u32> {
        let found = self.session().contexts.iter().find(|(_, name)| name == context);
        found.map(|(id, _)| *id).ok_or_else(|| Error::MissingContext {
            target: Arc::clone(self.target()),
            context: context.to_owned(),
            granted: self.contexts().map(str::to_owned).collect(),
        })
    }

    /// The range widened to the server's minimum block size. Within bounds it can only pass the end
    /// of an export whose last bytes the server cannot serve at all.
    fn aligned(&self, command: Command, offset: u64, length: u64) -> Result<Range<u64>> {
        let align = self.limits.align;
        let start = offset / align * align;
        let end = (offset + length).next_multiple_of(align);
        if end <= self.size() {
            return Ok(start..end);
        }
        Err(Error::InvalidRequest {
            target: Arc::clone(self.target()),
            command,
            offset,
            length,
            reason: "the export ends with less than the server's minimum block size",
        })
    }

    /// Makes the same request of every part, several at a time. After a failure the answers of those
    /// on their way are awaited, so that nothing happens after it was reported.
    async fn in_parts(
        &self,
        command: Command,
        flags: CommandFlags,
        mut parts: impl Iterator<Item = Range<u64>>,
        payload: impl Fn(&Range<u64>) -> Bytes,
    ) -> Result<()> {
        let mut requests: VecDeque<InFlight> = VecDeque::new();
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && requests.len() < PARTS
                && let Some(part) = parts.next()
            {
                let range = (part.start, length32(part.end - part.start));
                match self
                    .connection
                    .submit(command, flags, range, payload(&part))
                    .await
                {
                    Ok(request) => requests.push_back(request),
                    Err(error) => result = Err(error),
                }
            }
            let Some(mut request) = requests.pop_front() else {
                return result;
            };
            result = result.and(request.wait().await.map(|_| ()));
        }
    }
}

/// What a range holds.
#[derive(Debug)]
pub(crate) enum Content {
    /// So many zeroes, known without having been sent.
    Zero(usize),
    Data(Bytes),
}

impl Content {
    fn into_bytes(self) -> Bytes {
        match self {
            Self::Zero(length) => Bytes::from(vec![0; length]),
            Self::Data(bytes) => bytes,
        }
    }
}

/// A read on its way.
#[derive(Debug)]
pub(crate) struct PendingRead {
    connection: Arc<Connection>,
    request: (u64, u32),
    flags: CommandFlags,
    reply: Option<InFlight>,
    /// What was read before the wanted range for the sake of alignment.
    skip: usize,
    length: usize,
}

impl PendingRead {
    async fn send(&mut self) -> Result<&mut InFlight> {
        let reply = if let Some(reply) = self.reply.take() {
            reply
        } else {
            let (flags, request) = (self.flags, self.request);
            self.connection
                .submit(Command::Read, flags, request, Bytes::new())
                .await?
        };
        Ok(self.reply.insert(reply))
    }

    /// Waits for the answer. May be dropped and called again until it has given one.
    pub(crate) async fn wait(&mut self) -> Result<Content> {
        let answer = match self.send().await?.wait().await {
            // The server may find the range too long for one piece.
            Err(Error::Server {
                errno: Errno::Overflow,
                ..
            }) if self.flags == ONE_PIECE => {
                (self.flags, self.reply) = (CommandFlags::empty(), None);
                self.send().await?.wait().await
            }
            answer => answer,
        };
        match answer? {
            Reply::Data(ReadData::Bytes(bytes)) => {
                let bytes = bytes.freeze();
                Ok(Content::Data(bytes.slice(self.skip..self.skip + self.length)))
            }
            // A connection answers a read with data.
            Reply::Data(ReadData::Hole) | Reply::Done | Reply::Status(_) => Ok(Content::Zero(self.length)),
        }
    }
}

/// A query for the status of a range on its way.
#[derive(Debug)]
pub(crate) struct PendingStatus {
    reply: InFlight,
    /// Where the answer begins: at the range, or before it for the sake of alignment.
    at: u64,
    range: Range<u64>,
    context: u32,
}

impl PendingStatus {
    /// Waits for the answer. May be dropped and called again until it has given one.
    pub(crate) async fn wait(&mut self) -> Result<Vec<Extent>> {
        let Reply::Status(chunks) = self.reply.wait().await? else {
            return Ok(Vec::new());
        };
        let chunk = chunks.iter().find(|chunk| chunk.context == self.context);
        let descriptors = chunk.into_iter().flat_map(StatusChunk::descriptors);
        Ok(clipped(self.at, descriptors, &self.range))
    }
}

/// Lengths of single requests have been cut to size before.
fn length32(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Cuts a range at multiples of `most`, which is itself aligned.
fn parts(offset: u64, length: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / most + 1) * most);
        (start < end).then_some(start..at)
    })
}
