//! One connection in transmission: a task of its own sends requests as they come, many at a time,
//! and gives every reply to the request that it answers.
//!
//! Callers only hand over requests and wait for answers. So a caller that stops waiting leaves the
//! stream in order: a request is sent whole or not at all, and its reply is taken off the stream.

use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::assembly::{Assembly, ReadData};
use crate::error::{Errno, Error, Result};
use crate::handshake::{BoxedStream, Session, is_end};
use crate::tls;
use crate::wire::{self, Chunk, Command, CommandFlags, ReplyHead, StatusChunk, Violation};

/// What the budget for requests in flight is counted in, in bytes.
const BUDGET_UNIT: usize = 4096;
/// Requests without data are sent together up to so many bytes.
const BATCH: usize = 16 << 10;
/// Replies' headers are read in pieces of this size. Larger data goes past this buffer.
const HEADER_BUFFER: usize = 4 << 10;
/// How long a server may take to hang up after we said goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// A reply may hold several errors, but not without end.
const MAX_ERROR_CHUNKS: u32 = 1024;

/// A successful answer.
#[derive(Debug)]
pub(crate) enum Reply {
    Done,
    Data(ReadData),
    /// One chunk per negotiated context, in any order.
    Status(Vec<StatusChunk>),
}

/// The callers' end of a connection.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: mpsc::UnboundedSender<Message>,
    shared: Arc<Shared>,
}

/// A request that was handed over. Dropping it forgets the answer, not the request.
#[derive(Debug)]
pub(crate) struct InFlight {
    answer: oneshot::Receiver<Result<Reply>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    session: Session,
    budget: Arc<Semaphore>,
    budget_units: u32,
    /// Why the connection ended, once it has.
    failure: OnceLock<Error>,
}

#[derive(Debug)]
enum Message {
    Request(Request),
    Disconnect(oneshot::Sender<()>),
}

#[derive(Debug)]
struct Request {
    flags: CommandFlags,
    payload: Bytes,
    entry: Entry,
}

/// A request as its reply finds it.
#[derive(Debug)]
struct Entry {
    command: Command,
    offset: u64,
    length: u32,
    progress: Progress,
    error_chunks: u32,
    /// The first error in the reply.
    failed: Option<(Errno, Option<Box<str>>)>,
    answer: oneshot::Sender<Result<Reply>>,
    /// Its share of the budget, given back with the reply.
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Progress {
    Plain,
    Read(Assembly),
    Status(Vec<StatusChunk>),
}

impl Connection {
    /// Starts the task that serves the connection, on the current tokio runtime.
    pub(crate) fn start(
        stream: BoxedStream,
        session: Session,
        idle_timeout: Option<Duration>,
        max_in_flight: usize,
    ) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let budget_units = u32::try_from(max_in_flight / BUDGET_UNIT)
            .unwrap_or(u32::MAX >> 1)
            .max(1);
        let shared = Arc::new(Shared {
            session,
            budget: Arc::new(Semaphore::new(budget_units as usize)),
            budget_units,
            failure: OnceLock::new(),
        });
        let task = Task {
            shared: Arc::clone(&shared),
            pending: Mutex::new(Pending {
                entries: HashMap::new(),
                outstanding: 0,
                next_cookie: 0,
                last_heard: Instant::now(),
            }),
            idle: Notify::new(),
            shutting_down: Notify::new(),
            idle_timeout,
        };
        tokio::spawn(task.run(stream, receiver));
        Self { sender, shared }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.shared.session
    }

    pub(crate) fn is_open(&self) -> bool {
        self.shared.failure.get().is_none() && !self.sender.is_closed()
    }

    /// Hands a request over as soon as the budget allows. Range and rights were checked before.
    pub(crate) async fn submit(
        &self,
        command: Command,
        flags: CommandFlags,
        (offset, length): (u64, u32),
        payload: Bytes,
    ) -> Result<InFlight> {
        let carried = if command == Command::Read {
            length as usize
        } else {
            payload.len()
        };
        let units = u32::try_from(carried / BUDGET_UNIT + 1).unwrap_or(u32::MAX);
        let units = units.min(self.shared.budget_units);
        let budget = Arc::clone(&self.shared.budget);
        let permit = budget
            .acquire_many_owned(units)
            .await
            .map_err(|_| self.shared.failure())?;
        let (answer, receiver) = oneshot::channel();
        let progress = match command {
            Command::Read => Progress::Read(Assembly::new(offset, length)),
            Command::BlockStatus => Progress::Status(Vec::new()),
            _ => Progress::Plain,
        };
        let entry = Entry {
            command,
            offset,
            length,
            progress,
            error_chunks: 0,
            failed: None,
            answer,
            _permit: permit,
        };
        let request = Message::Request(Request {
            flags,
            payload,
            entry,
        });
        self.sender.send(request).map_err(|_| self.shared.failure())?;
        Ok(InFlight {
            answer: receiver,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Says goodbye after what is in flight was answered, and waits for the end. Idempotent.
    pub(crate) async fn disconnect(&self) {
        let (done, wait) = oneshot::channel();
        if self.sender.send(Message::Disconnect(done)).is_ok() {
            // An error means that the connection ended in another way: ended it is.
            let _ = wait.await;
        }
    }
}

impl InFlight {
    /// Waits for the answer. May be dropped and called again until it has given one.
    pub(crate) async fn wait(&mut self) -> Result<Reply> {
        match (&mut self.answer).await {
            Ok(answer) => answer,
            Err(_) => Err(self.shared.failure()),
        }
    }
}

impl Shared {
    fn failure(&self) -> Error {
        match self.failure.get() {
            Some(error) => error.clone(),
            None => self.disconnected("this side is closing it", None),
        }
    }

    fn disconnected(&self, reason: &'static str, source: Option<io::Error>) -> Error {
        let target = Arc::clone(&self.session.target);
        Error::Disconnected {
            target,
            reason,
            source: source.map(Arc::new),
        }
    }

    fn broken(&self, Violation(text): Violation) -> Error {
        let target = Arc::clone(&self.session.target);
        Error::Protocol {
            target,
            violation: text.into(),
        }
    }

    fn lost(&self, error: io::Error, ended: &'static str) -> Error {
        if tls::is_tls_error(&error) {
            let target = Arc::clone(&self.session.target);
            return Error::Tls {
                target,
                source: Arc::new(error),
            };
        }
        let reason = if is_end(&error) { ended } else { "it broke" };
        self.disconnected(reason, Some(error))
    }
}

/// What the serving task owns.
struct Task {
    shared: Arc<Shared>,
    pending: Mutex<Pending>,
    /// Nothing is outstanding any more.
    idle: Notify,
    /// The server said `ESHUTDOWN`: the protocol wants us to leave.
    shutting_down: Notify,
    idle_timeout: Option<Duration>,
}

struct Pending {
    entries: HashMap<u64, Entry>,
    /// Requests sent and not wholly answered: those in `entries`, and the one whose reply is being read.
    outstanding: usize,
    next_cookie: u64,
    /// When the server last sent something, or when it first had something to answer.
    last_heard: Instant,
}

/// How sending came to its end without an error.
struct Farewell {
    reason: &'static str,
    done: Option<oneshot::Sender<()>>,
}

type Reader = BufReader<ReadHalf<BoxedStream>>;
type Writer = WriteHalf<BoxedStream>;

impl Task {
    async fn run(self, stream: BoxedStream, mut receiver: mpsc::UnboundedReceiver<Message>) {
        let (reader, writer) = tokio::io::split(stream);
        let reader = BufReader::with_capacity(HEADER_BUFFER, reader);
        let done;
        {
            let mut receive = pin!(self.receive(reader));
            let mut send = pin!(self.send(writer, &mut receiver));
            let error;
            (error, done) = tokio::select! {
                error = &mut receive => (error, None),
                error = self.watch() => (error, None),
                sent = &mut send => match sent {
                    Ok(farewell) => {
                        let _ = timeout(GOODBYE, &mut receive).await;
                        (self.shared.disconnected(farewell.reason, None), farewell.done)
                    }
                    // The server's last words may tell more than our failure to write to it.
                    Err(error) => match timeout(GOODBYE, &mut receive).await {
                        Ok(heard) => (heard, None),
                        Err(_) => (error, None),
                    },
                },
            };
            tracing::debug!(target = &*self.shared.session.target, %error, "NBD connection ended");
            // Before the waiting ends below with what `receive` and `send` hold, so that it finds it.
            let _ = self.shared.failure.set(error);
        }
        self.shared.budget.close();
        receiver.close();
        while receiver.try_recv().is_ok() {}
        self.lock().entries.clear();
        if let Some(done) = done {
            let _ = done.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- sending ---

    /// Sends requests until nobody can make any more.
    async fn send(
        &self,
        mut writer: Writer,
        receiver: &mut mpsc::UnboundedReceiver<Message>,
    ) -> Result<Farewell> {
        let mut out = BytesMut::new();
        loop {
            let message = match receiver.try_recv() {
                Ok(message) => Some(message),
                Err(TryRecvError::Disconnected) => None,
                Err(TryRecvError::Empty) => {
                    self.write(&mut writer, &mut out, Bytes::new()).await?;
                    tokio::select! {
                        message = receiver.recv() => message,
                        () = self.shutting_down.notified() => {
                            let reason = "the server is shutting down";
                            return self.leave(writer, out, Farewell { reason, done: None }).await;
                        }
                    }
                }
            };
            match message {
                Some(Message::Request(request)) => {
                    let payload = self.register(request, &mut out);
                    if !payload.is_empty() || out.len() >= BATCH {
                        self.write(&mut writer, &mut out, payload).await?;
                    }
                }
                Some(Message::Disconnect(done)) => {
                    let farewell = Farewell {
                        reason: "this side closed it",
                        done: Some(done),
                    };
                    receiver.close();
                    return self.leave(writer, out, farewell).await;
                }
                // Nobody waits for an answer any more.
                None => {
                    self.write(&mut writer, &mut out, Bytes::new()).await?;
                    let farewell = Farewell {
                        reason: "this side closed it",
                        done: None,
                    };
                    return self.say_goodbye(writer, farewell).await;
                }
            }
        }
    }

    /// Writes a request's header to `out` and expects its reply. Returns the data that must follow.
    fn register(&self, request: Request, out: &mut BytesMut) -> Bytes {
        let Request {
            flags,
            payload,
            entry,
        } = request;
        if entry.answer.is_closed() {
            return Bytes::new();
        }
        let mut pending = self.lock();
        if pending.outstanding == 0 {
            pending.last_heard = Instant::now();
        }
        let cookie = pending.next_cookie;
        pending.next_cookie = cookie.wrapping_add(1);
        wire::put_request(out, entry.command, flags, cookie, entry.offset, entry.length);
        pending.outstanding += 1;
        pending.entries.insert(cookie, entry);
        payload
    }

    async fn write(&self, writer: &mut Writer, out: &mut BytesMut, payload: Bytes) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let mut bytes = out.split().chain(payload);
        let written = match writer.write_all_buf(&mut bytes).await {
            Ok(()) => writer.flush().await,
            Err(error) => Err(error),
        };
        written.map_err(|error| self.shared.lost(error, "the server hung up"))
    }

    async fn leave(&self, mut writer: Writer, mut out: BytesMut, farewell: Farewell) -> Result<Farewell> {
        self.write(&mut writer, &mut out, Bytes::new()).await?;
        while self.lock().outstanding > 0 {
            self.idle.notified().await;
        }
        self.say_goodbye(writer, farewell).await
    }

    async fn say_goodbye(&self, mut writer: Writer, farewell: Farewell) -> Result<Farewell> {
        let mut out = BytesMut::new();
        wire::put_request(&mut out, Command::Disconnect, CommandFlags::empty(), 0, 0, 0);
        self.write(&mut writer, &mut out, Bytes::new()).await?;
        let _ = writer.shutdown().await;
        Ok(farewell)
    }

    // --- receiving ---

    /// Takes replies until the stream ends, in whatever way.
    async fn receive(&self, mut reader: Reader) -> Error {
        loop {
            if let Err(error) = self.receive_one(&mut reader).await {
                return error;
            }
        }
    }

    async fn receive_one(&self, reader: &mut Reader) -> Result<()> {
        let at_end = match reader.fill_buf().await {
            Ok(bytes) => bytes.is_empty(),
            Err(error) => return Err(self.shared.lost(error, "the server hung up")),
        };
        if at_end {
            let reason = match self.lock().outstanding {
                0 => "the server hung up",
                _ => "the server hung up with requests unanswered",
            };
            return Err(self.shared.disconnected(reason, None));
        }
        let mut head = [0; ReplyHead::LENGTH];
        self.read_exact(reader, &mut head).await?;
        match self.checked(ReplyHead::parse(&head))? {
            ReplyHead::Simple { cookie, error } => self.receive_simple(reader, cookie, error).await,
            ReplyHead::Chunk { cookie, chunk, done } => self.receive_chunk(reader, cookie, chunk, done).await,
        }
    }

    async fn receive_simple(&self, reader: &mut Reader, cookie: u64, error: u32) -> Result<()> {
        let mut entry = self.take(cookie)?;
        if error != 0 {
            entry.failed.get_or_insert((Errno::from_raw(error), None));
            return self.complete(entry);
        }
        let structured = self.shared.session.structured;
        let (offset, length) = (entry.offset, entry.length as usize);
        match &mut entry.progress {
            Progress::Plain => {}
            Progress::Read(assembly) if !structured => {
                self.checked(assembly.data(offset, length))?;
                self.read_data(reader, assembly, 0, length).await?;
            }
            Progress::Read(_) | Progress::Status(_) => {
                let text = format!("a simple reply to a {}, which must be structured", entry.command);
                return Err(self.shared.broken(Violation(text)));
            }
        }
        self.complete(entry)
    }

    async fn receive_chunk(&self, reader: &mut Reader, cookie: u64, chunk: Chunk, done: bool) -> Result<()> {
        let mut length = [0; 4];
        self.read_exact(reader, &mut length).await?;
        let length = u32::from_be_bytes(length);
        let mut entry = self.take(cookie)?;
        if !self.shared.session.structured {
            return Err(self
                .shared
                .broken(Violation("a structured reply that was not agreed on".into())));
        }
        self.checked(chunk.check_length(length, entry.length))?;
        match (chunk, &mut entry.progress) {
            (Chunk::None, _) if done => {}
            (Chunk::Data, Progress::Read(assembly)) => {
                let mut offset = [0; 8];
                self.read_exact(reader, &mut offset).await?;
                let length = length as usize - offset.len();
                let at = self.checked(assembly.data(u64::from_be_bytes(offset), length))?;
                self.read_data(reader, assembly, at, length).await?;
            }
            (Chunk::Hole, Progress::Read(assembly)) => {
                let mut payload = [0; 12];
                self.read_exact(reader, &mut payload).await?;
                let (offset, length) = self.checked(wire::parse_hole(&payload))?;
                self.checked(assembly.hole(offset, length as usize))?;
            }
            (Chunk::BlockStatus, Progress::Status(chunks)) => {
                let payload = self.read_payload(reader, length).await?;
                let size = self.shared.session.size;
                let status = StatusChunk::parse(payload, entry.offset, entry.length, size);
                let status = self.checked(status)?;
                self.checked(self.check_context(&status, chunks))?;
                chunks.push(status);
            }
            (Chunk::Error | Chunk::ErrorOffset | Chunk::UnknownError(_), _) => {
                let payload = self.read_payload(reader, length).await?;
                let (error, message) = self.checked(wire::parse_error(&payload))?;
                entry.failed.get_or_insert((Errno::from_raw(error), message));
                entry.error_chunks += 1;
                if entry.error_chunks > MAX_ERROR_CHUNKS {
                    return Err(self
                        .shared
                        .broken(Violation("errors without end in one reply".into())));
                }
            }
            (chunk, _) => {
                let text = format!("a {chunk:?} chunk in answer to a {}", entry.command);
                return Err(self.shared.broken(Violation(text)));
            }
        }
        if done {
            return self.complete(entry);
        }
        self.lock().entries.insert(cookie, entry);
        Ok(())
    }

    fn check_context(&self, status: &StatusChunk, before: &[StatusChunk]) -> wire::Checked<()> {
        if !self
            .shared
            .session
            .contexts
            .iter()
            .any(|(id, _)| *id == status.context)
        {
            return wire::violation(format!(
                "a block status of context {}, never granted",
                status.context
            ));
        }
        if before.iter().any(|other| other.context == status.context) {
            return wire::violation(format!(
                "two block statuses of context {} in one reply",
                status.context
            ));
        }
        Ok(())
    }

    /// The request that `cookie` stands for, out of the table.
    fn take(&self, cookie: u64) -> Result<Entry> {
        let entry = self.lock().entries.remove(&cookie);
        entry.ok_or_else(|| {
            self.shared.broken(Violation(format!(
                "a reply to request {cookie}, which is not in flight"
            )))
        })
    }

    /// Gives a request its answer.
    fn complete(&self, entry: Entry) -> Result<()> {
        let Entry {
            command,
            offset,
            length,
            progress,
            failed,
            answer,
            ..
        } = entry;
        let reply = match (failed, progress) {
            (Some((errno, message)), _) => {
                if errno == Errno::Shutdown {
                    self.shutting_down.notify_one();
                }
                let target = Arc::clone(&self.shared.session.target);
                Err(Error::Server {
                    target,
                    command,
                    offset,
                    length: u64::from(length),
                    errno,
                    message,
                })
            }
            (None, Progress::Plain) => Ok(Reply::Done),
            (None, Progress::Read(assembly)) => Ok(Reply::Data(self.checked(assembly.finish())?)),
            (None, Progress::Status(chunks)) => {
                if chunks.len() != self.shared.session.contexts.len() {
                    let text = "a block status without all of the granted contexts";
                    return Err(self.shared.broken(Violation(text.into())));
                }
                Ok(Reply::Status(chunks))
            }
        };
        // Whoever asked may have stopped waiting.
        let _ = answer.send(reply);
        let mut pending = self.lock();
        pending.outstanding -= 1;
        if pending.outstanding == 0 {
            self.idle.notify_one();
        }
        Ok(())
    }

    fn checked<T>(&self, result: Result<T, Violation>) -> Result<T> {
        result.map_err(|violation| self.shared.broken(violation))
    }

    fn heard(&self) {
        self.lock().last_heard = Instant::now();
    }

    async fn read_exact(&self, reader: &mut Reader, buffer: &mut [u8]) -> Result<()> {
        match reader.read_exact(buffer).await {
            Ok(_) => {
                self.heard();
                Ok(())
            }
            Err(error) => Err(self.shared.lost(error, IN_REPLY)),
        }
    }

    /// Reads `length` bytes to index `at` of the assembly's buffer, which has been made ready.
    async fn read_data(
        &self,
        reader: &mut Reader,
        assembly: &mut Assembly,
        at: usize,
        length: usize,
    ) -> Result<()> {
        let buffer = assembly.buffer();
        let end = at + length;
        if at == buffer.len() {
            return self.append(reader, buffer, length).await;
        }
        let mut place = &mut buffer[at..end];
        while !place.is_empty() {
            let count = reader.read(place).await;
            let count = self.progress(count)?;
            place = &mut place[count..];
        }
        Ok(())
    }

    /// The payload of a chunk, whose length has been checked.
    async fn read_payload(&self, reader: &mut Reader, length: u32) -> Result<Bytes> {
        let mut buffer = BytesMut::new();
        self.append(reader, &mut buffer, length as usize).await?;
        Ok(buffer.freeze())
    }

    async fn append(&self, reader: &mut Reader, buffer: &mut BytesMut, length: usize) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let count = reader.read_buf(&mut (&mut *buffer).limit(left)).await;
            left -= self.progress(count)?;
        }
        Ok(())
    }

    /// How far one read of a payload came.
    fn progress(&self, count: io::Result<usize>) -> Result<usize> {
        match count {
            Ok(0) => Err(self.shared.disconnected(IN_REPLY, None)),
            Ok(count) => {
                self.heard();
                Ok(count)
            }
            Err(error) => Err(self.shared.lost(error, IN_REPLY)),
        }
    }

    // --- silence ---

    /// Ends when the server has had something to answer and sent nothing for too long.
    async fn watch(&self) -> Error {
        let Some(limit) = self.idle_timeout else {
            return std::future::pending().await;
        };
        loop {
            let since = {
                let pending = self.lock();
                if pending.outstanding > 0 {
                    pending.last_heard
                } else {
                    Instant::now()
                }
            };
            let deadline = since + limit;
            if deadline <= Instant::now() {
                let target = Arc::clone(&self.shared.session.target);
                return Error::Timeout {
                    target,
                    during: "it had requests to answer",
                    after: limit,
                };
            }
            sleep_until(deadline).await;
        }
    }
}

const IN_REPLY: &str = "the server hung up in the middle of a reply";
