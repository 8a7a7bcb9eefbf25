//! The QMP session: one connection to a monitor, shared, made anew when it is lost, that survives whatever it does not know.
//!
//! The protocol is QEMU's `docs/interop/qmp-spec.rst`. Messages stay JSON values: a typed reader would end the
//! connection at the first event or enum value that is newer than its types.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use disksnap_core::{Command, Error, ErrorKind, Result, faults};
use serde_json::{Map, Value};
use tokio::io::{AsyncBufRead, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OnceCell, broadcast, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::clients;
use crate::errors::{self, ConnectFailure, Lost};
use crate::lines::{self, Line};
use crate::peer::Peer;

/// How many events are kept for those who wait; older ones are dropped and their loss is told.
const EVENTS: usize = 1024;

/// The longest event that is kept for those who wait, in bytes. Those of QEMU have some hundred.
const LONGEST_EVENT: usize = 8 << 10;

/// How many connections in a row the monitor may close before it has taken a command; one is its due.
const ATTEMPTS: u32 = 4;

/// How long to wait for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a monitor's greeting after connecting; 10 s.
    pub greeting: Duration,
    /// For the answer to one monitor command; 30 s.
    pub command: Duration,
    /// For the guest agent's first sign of life; 5 s.
    pub agent: Duration,
    /// For all that thawing takes, from a hung agent on; 30 s.
    pub thaw: Duration,
    /// For the guardian to start, and to answer when it is let go; 20 s.
    pub guardian: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            command: Duration::from_secs(30),
            agent: Duration::from_secs(5),
            thaw: Duration::from_secs(30),
            guardian: Duration::from_secs(20),
        }
    }
}

/// An event that the monitor sent by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name (`BLOCK_EXPORT_DELETED`).
    pub name: String,
    /// Its data; null where it has none.
    pub data: Value,
}

/// What a listener hears.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// An event.
    Event(Event),
    /// Events came faster than they were taken, and some are gone: ask for the state instead.
    Missed,
    /// The connection is over; whatever was awaited may have happened unheard.
    Lost,
}

/// Hears every event from the moment of [`Session::subscribe`] on.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Heard>);

impl Events {
    /// The next thing heard, waiting for it. Cancel-safe.
    pub async fn next(&mut self) -> Heard {
        self.0.recv().await.unwrap_or_else(|error| match error {
            broadcast::error::RecvError::Lagged(_) => Heard::Missed,
            broadcast::error::RecvError::Closed => Heard::Lost,
        })
    }
}

/// Told of every new connection, with a duplicate of its descriptor.
pub(crate) type OnConnect = Box<dyn Fn(&OwnedFd) + Send + Sync>;

/// One monitor, reached by its unix socket.
///
/// It connects with the first command. A lost connection is made anew by the next command; no command is ever
/// sent twice. `query-qmp-schema` is asked once per connection and then answered from memory.
pub struct Session {
    path: PathBuf,
    /// Where our NBD server in that QEMU listens when nobody says otherwise.
    clients: Option<PathBuf>,
    timeouts: Timeouts,
    slot: tokio::sync::Mutex<Option<Arc<Connection>>>,
    events: broadcast::Sender<Heard>,
    on_connect: OnConnect,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// A session with the monitor at `path`. Connects later.
    pub fn new(path: impl Into<PathBuf>, timeouts: Timeouts) -> Self {
        Self::with_hook(path.into(), timeouts, Box::new(|_| ()))
    }

    pub(crate) fn with_hook(path: PathBuf, timeouts: Timeouts, on_connect: OnConnect) -> Self {
        Self {
            path,
            clients: None,
            timeouts,
            slot: tokio::sync::Mutex::default(),
            events: broadcast::Sender::new(EVENTS),
            on_connect,
        }
    }

    /// The same, and while it is silent the connections to its NBD server on this unix socket are ended whose clients take nothing: it
    /// waits for those before it drains a disk.
    #[must_use]
    pub fn with_clients_at(mut self, socket: impl Into<PathBuf>) -> Self {
        self.clients = Some(socket.into());
        self
    }

    /// The monitor's socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hears the events from now on. Subscribe before sending the command whose event is awaited.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        Events(self.events.subscribe())
    }

    /// Sends one command and returns its answer.
    ///
    /// # Errors
    /// As [`Host::monitor`](disksnap_core::Host::monitor); the effect is unknown where a command that is not a
    /// query was sent and not answered.
    pub async fn execute(&self, command: Command) -> Result<Value> {
        let connection = self.connection().await.map_err(|f| f.error)?;
        if command.execute == "query-qmp-schema" {
            let ask = || self.ask(&connection, command);
            return connection.schema.get_or_try_init(ask).await.cloned();
        }
        self.ask(&connection, command).await
    }

    async fn ask(&self, connection: &Connection, command: Command) -> Result<Value> {
        let mut pending = connection.send(vec![command])?;
        match pending.pop() {
            Some(pending) => self.answer(connection, pending).await?,
            None => Err(Error::new(ErrorKind::Internal, "a command was lost on its way")),
        }
    }

    /// Sends commands back to back and returns each one's answer.
    ///
    /// # Errors
    /// The outer error is the connection's; the time-out starts anew with each answer.
    pub async fn execute_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let connection = self.connection().await.map_err(|f| f.error)?;
        let mut answers = Vec::with_capacity(commands.len());
        for pending in connection.send(commands)? {
            answers.push(self.answer(&connection, pending).await?);
        }
        Ok(answers)
    }

    /// Waits for an answer; not for clients that stall.
    async fn answer(&self, connection: &Connection, pending: Pending) -> Result<Result<Value>> {
        let answer = pending.answer(self.timeouts.command);
        clients::ending_stalled(connection.peer.pid, self.clients.as_deref(), answer).await
    }

    /// Waits for what the hypervisor does by itself; not for clients that stall.
    pub(crate) async fn wait<T>(&self, waiting: impl Future<Output = T>) -> T {
        let pid = self
            .connection()
            .await
            .ok()
            .and_then(|connection| connection.peer.pid);
        clients::ending_stalled(pid, self.clients.as_deref(), waiting).await
    }

    /// Which run of which process answers: `None` where nobody listens, or it cannot be told.
    ///
    /// # Errors
    /// Why the connection came to nothing although somebody listens.
    pub async fn instance(&self) -> Result<Option<String>> {
        match self.connection().await {
            Ok(connection) => Ok(connection.peer.instance()),
            Err(failure) if failure.nobody => Ok(None),
            Err(failure) => Err(failure.error),
        }
    }

    /// Bounds for how long clients of its server at this address may take nothing.
    pub(crate) async fn bound_on_tcp(&self, address: IpAddr, port: u16) {
        if let Ok(connection) = self.connection().await
            && let Some(pid) = connection.peer.pid
        {
            clients::bound_on_tcp(pid, address, port);
        }
    }

    /// Closes the connection; the next command makes a new one. Frees the monitor for other clients.
    pub async fn disconnect(&self) {
        *self.slot.lock().await = None;
    }

    async fn open(&self) -> std::result::Result<Connection, ConnectFailure> {
        let clients = self.clients.as_deref();
        Connection::open(&self.path, clients, self.timeouts, self.events.clone()).await
    }

    /// The living connection, or a new one.
    pub(crate) async fn connection(&self) -> std::result::Result<Arc<Connection>, ConnectFailure> {
        let mut slot = self.slot.lock().await;
        if let Some(connection) = slot.as_ref().filter(|c| c.is_alive()) {
            return Ok(Arc::clone(connection));
        }
        // Close the old one first: the monitor serves one client.
        *slot = None;
        let connection = self.open().await?;
        (self.on_connect)(&connection.descriptor);
        let connection = Arc::new(connection);
        *slot = Some(Arc::clone(&connection));
        drop(slot);
        Ok(connection)
    }
}

/// What one command waits for.
type Answer = std::result::Result<Result<Value>, Lost>;

/// The commands under way and, once the connection is over, why.
#[derive(Debug, Default)]
struct Waiting {
    answers: HashMap<u64, (String, oneshot::Sender<Answer>)>,
    lost: Option<Lost>,
}

/// State that the connection's tasks share with its users.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    waiting: Mutex<Waiting>,
    events: broadcast::Sender<Heard>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection for everyone; the first reason stays.
    fn lose(&self, why: &Lost) {
        let mut waiting = self.waiting();
        let why = waiting.lost.get_or_insert_with(|| why.clone()).clone();
        let answers = std::mem::take(&mut waiting.answers);
        drop(waiting);
        for (_, answer) in answers.into_values() {
            // Nobody may be waiting any more.
            let _ = answer.send(Err(why.clone()));
        }
        let _ = self.events.send(Heard::Lost);
    }
}

/// How many messages to others are read past before a greeting.
const LATE_ANSWERS: usize = 1000;

/// One connection, from its greeting on. Dropping it closes it, whoever else holds duplicates.
#[derive(Debug)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
    next_id: AtomicU64,
    schema: OnceCell<Value>,
    pub(crate) peer: Peer,
    pub(crate) descriptor: OwnedFd,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Closing would not do: the guardian may hold a duplicate. It fails only when it is over already.
        let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Both);
    }
}

/// Why there is no connection.
enum Unopened {
    /// The peer ended it before it had taken a command.
    Ended(Lost),
    Failed(ConnectFailure),
}

impl<E: Into<ConnectFailure>> From<E> for Unopened {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Lost {
    fn into_unopened(self, path: &Path) -> Unopened {
        match self {
            Self::Closed | Self::Io(..) => Unopened::Ended(self),
            Self::Nonsense(_) => self.error(path).into(),
        }
    }
}

impl Connection {
    /// Connects, and again where the monitor ends the connection at once.
    ///
    /// QEMU, still answering a client that is gone, finds that it cannot, closes "the" connection, and that is
    /// ours by then: seen once or twice in thousands where clients left with commands under way. No command was
    /// sent, so nothing is done twice.
    async fn open(
        path: &Path,
        clients: Option<&Path>,
        timeouts: Timeouts,
        events: broadcast::Sender<Heard>,
    ) -> std::result::Result<Self, ConnectFailure> {
        let deadline = Instant::now() + timeouts.greeting;
        let mut attempt = 1;
        loop {
            match Self::open_once(path, clients, timeouts, deadline, events.clone()).await {
                Ok(connection) => return Ok(connection),
                Err(Unopened::Failed(failure)) => return Err(failure),
                Err(Unopened::Ended(lost)) if attempt == ATTEMPTS => return Err(lost.error(path).into()),
                Err(Unopened::Ended(lost)) => {
                    tracing::debug!(socket = %path.display(), ?lost, attempt, "the monitor ended a new connection");
                }
            }
            attempt += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn open_once(
        path: &Path,
        clients: Option<&Path>,
        timeouts: Timeouts,
        deadline: Instant,
        events: broadcast::Sender<Heard>,
    ) -> std::result::Result<Self, Unopened> {
        let stream = connect("monitor", path, deadline).await?;
        let peer = Peer::of(&stream);
        let descriptor =
            duplicate(&stream).map_err(|e| Error::io("cannot keep the monitor's descriptor", e))?;
        let (read, write) = stream.into_split();
        let mut reader = BufReader::with_capacity(64 << 10, read);
        let greeted = timeout_at(deadline, greeting(&mut reader));
        match clients::ending_stalled(peer.pid, clients, greeted).await {
            Ok(Ok(())) => {}
            Ok(Err(lost)) => return Err(lost.into_unopened(path)),
            Err(_) => return Err(no_greeting(path, peer, timeouts.greeting).into()),
        }
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            waiting: Mutex::default(),
            events,
        });
        let (outgoing, lines) = mpsc::unbounded_channel();
        tokio::spawn(write_all(Arc::clone(&shared), write, lines));
        tokio::spawn(read_all(Arc::clone(&shared), reader));
        let connection = Self {
            shared,
            outgoing,
            next_id: AtomicU64::new(first_id()),
            schema: OnceCell::new(),
            peer,
            descriptor,
        };
        match connection.negotiate(timeouts.greeting).await {
            Ok(()) => Ok(connection),
            Err(error) => Err(connection
                .lost()
                .map_or_else(|| error.into(), |lost| lost.into_unopened(path))),
        }
    }

    /// Leaves the mode in which a new connection is.
    async fn negotiate(&self, patience: Duration) -> Result<()> {
        for pending in self.send(vec![Command::bare("qmp_capabilities")])? {
            pending.answer(patience).await??;
        }
        Ok(())
    }

    /// Why it is over.
    fn lost(&self) -> Option<Lost> {
        self.shared.waiting().lost.clone()
    }

    fn is_alive(&self) -> bool {
        self.lost().is_none() && !self.outgoing.is_closed()
    }

    /// Hands the commands to the writer, in this order. Nothing is sent when this fails.
    fn send(&self, commands: Vec<Command>) -> Result<Vec<Pending>> {
        for command in commands
            .iter()
            .filter(|command| errors::has_effect(&command.execute))
        {
            faults::before("monitor", &command.execute);
        }
        let first = self.next_id.fetch_add(commands.len() as u64, Ordering::Relaxed);
        let mut text = Vec::new();
        let mut pending = Vec::with_capacity(commands.len());
        let mut waiting = self.shared.waiting();
        if let Some(lost) = &waiting.lost {
            return Err(lost.error(&self.shared.path));
        }
        for (id, command) in (first..).zip(commands) {
            let (sender, receiver) = oneshot::channel();
            waiting.answers.insert(id, (command.execute.clone(), sender));
            pending.push(Pending {
                command: command.execute.clone(),
                receiver,
                path: self.shared.path.clone(),
            });
            text.extend_from_slice(encode(id, command).to_string().as_bytes());
            text.push(b'\n');
        }
        // Sent under the lock, so that two senders' commands stay in the order of their ids.
        if self.outgoing.send(text).is_err() {
            return Err(Lost::Closed.error(&self.shared.path));
        }
        Ok(pending)
    }
}

/// The first id of a connection, unlike those of any other: what QEMU was doing for a client that is gone, it
/// answers to whoever is connected then, and that answer must not be taken for one of ours.
fn first_id() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 12
}

fn encode(id: u64, command: Command) -> Value {
    let mut message = Map::new();
    message.insert("execute".into(), command.execute.into());
    if !command.arguments.is_null() {
        message.insert("arguments".into(), command.arguments);
    }
    message.insert("id".into(), id.into());
    Value::Object(message)
}

/// A command that has been handed to the writer.
#[derive(Debug)]
struct Pending {
    command: String,
    receiver: oneshot::Receiver<Answer>,
    path: PathBuf,
}

impl Pending {
    async fn answer(self, patience: Duration) -> Result<Result<Value>> {
        let answer = tokio::time::timeout(patience, self.receiver).await;
        if errors::has_effect(&self.command) {
            faults::after("monitor", &self.command);
        }
        match answer {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(lost))) => Err(lost
                .error(&self.path)
                .with("command", &self.command)
                .leaving(errors::effect_unanswered(&self.command))),
            // The runtime that the connection's tasks lived on is gone, and they with it.
            Ok(Err(_)) => Err(Lost::Closed
                .error(&self.path)
                .with("command", &self.command)
                .leaving(errors::effect_unanswered(&self.command))),
            Err(_) => Err(
                errors::silent("monitor", &self.command, &self.path, patience).hint(
                    "The hypervisor may be hung or its storage slow. The command may still be carried out.",
                ),
            ),
        }
    }
}

/// Connects, waiting while the queue of those who want to is full.
pub(crate) async fn connect(
    what: &'static str,
    path: &Path,
    deadline: Instant,
) -> std::result::Result<UnixStream, ConnectFailure> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => {
                Peer::of(&stream).must_be_meant(what, path)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(errors::held(what, path).because(error).into());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(errors::connecting(what, path, error)),
        }
    }
}

pub(crate) fn duplicate(stream: &impl AsFd) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}

/// Reads up to the greeting. What a QEMU was still doing for a client that has gone it answers to whoever is connected
/// then, also before it greets; and an event may come in between.
async fn greeting(reader: &mut BufReader<OwnedReadHalf>) -> std::result::Result<(), Lost> {
    let mut buffer = Vec::new();
    for _ in 0..LATE_ANSWERS {
        let message = next_message(reader, &mut buffer).await?;
        let is = |key: &str| message.get(key).is_some();
        if is("QMP") {
            return Ok(());
        }
        if !(is("event") || is("id") && (is("return") || is("error"))) {
            let what = excerpt(message.to_string().as_bytes());
            return Err(Lost::Nonsense(format!("it greets with {what}")));
        }
    }
    Err(Lost::Nonsense(format!(
        "it does not greet within {LATE_ANSWERS} messages"
    )))
}

fn no_greeting(path: &Path, peer: Peer, waited: Duration) -> Error {
    match peer.pid.filter(|_| peer.is_stopped()) {
        Some(pid) => errors::silent("monitor", "greeting", path, waited)
            .leaving(disksnap_core::Effect::None)
            .hint(format!(
                "Its process {pid} has been stopped by a signal; kill -CONT {pid} lets it go on."
            )),
        None => errors::held("monitor", path),
    }
}

/// The next JSON value; empty lines are skipped.
pub(crate) async fn next_message<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    buffer: &mut Vec<u8>,
) -> std::result::Result<Value, Lost> {
    loop {
        buffer.clear();
        match lines::read(lines::OF_MONITOR, reader, buffer).await {
            Ok(Line::Whole) => {}
            Ok(Line::End) => return Err(Lost::Closed),
            Ok(Line::Endless) => {
                return Err(Lost::Nonsense(format!(
                    "a line is longer than {} bytes",
                    lines::OF_MONITOR
                )));
            }
            Err(error) => return Err(Lost::Io(error.kind(), error.to_string())),
        }
        if buffer.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        return serde_json::from_slice(buffer)
            .map_err(|error| Lost::Nonsense(format!("{error} in {}", excerpt(buffer))));
    }
}

/// The beginning of what a peer said, safe to print.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(60)];
    let dots = if shown.len() < bytes.len() { "…" } else { "" };
    format!("{:?}{dots}", String::from_utf8_lossy(shown))
}

async fn write_all(
    shared: Arc<Shared>,
    mut write: OwnedWriteHalf,
    mut lines: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    while let Some(text) = lines.recv().await {
        tracing::trace!(socket = %shared.path.display(), text = %String::from_utf8_lossy(&text).trim_end(), "to the monitor");
        if let Err(error) = write.write_all(&text).await {
            // What the monitor said last is worth more than the broken pipe: the reader will find the end.
            if error.kind() != io::ErrorKind::BrokenPipe {
                shared.lose(&Lost::Io(error.kind(), error.to_string()));
            }
            return;
        }
    }
}

async fn read_all(shared: Arc<Shared>, mut reader: BufReader<OwnedReadHalf>) {
    let mut buffer = Vec::new();
    loop {
        match next_message(&mut reader, &mut buffer).await {
            Ok(message) => route(&shared, message, buffer.len()),
            Err(lost) => {
                tracing::debug!(socket = %shared.path.display(), ?lost, "the monitor's connection is over");
                shared.lose(&lost);
                return;
            }
        }
    }
}

/// Brings a message of so many bytes to whoever waits for it. What is not understood is passed over.
fn route(shared: &Shared, mut message: Value, bytes: usize) {
    if let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) {
        if bytes > LONGEST_EVENT {
            tracing::warn!(socket = %shared.path.display(), bytes, "an event of the monitor is too long to be kept");
            let _ = shared.events.send(Heard::Missed);
            return;
        }
        let data = message.get_mut("data").map(Value::take).unwrap_or_default();
        tracing::debug!(socket = %shared.path.display(), name, %data, "event");
        // Nobody may be listening.
        let _ = shared.events.send(Heard::Event(Event { name, data }));
        return;
    }
    let id = message.get("id").and_then(Value::as_u64);
    let waiter = id.and_then(|id| shared.waiting().answers.remove(&id));
    let Some((command, waiter)) = waiter else {
        tracing::warn!(socket = %shared.path.display(), message = %excerpt(message.to_string().as_bytes()),
            "the monitor said something that nobody waits for");
        return;
    };
    let answer = if let Some(value) = message.get_mut("return") {
        Ok(value.take())
    } else if let Some(error) = message.get("error") {
        Err(errors::refusal(&command, error))
    } else {
        Err(Error::new(
            ErrorKind::Protocol,
            "the monitor answered with neither a value nor an error",
        )
        .with("command", &command)
        .leaving(errors::effect_unanswered(&command)))
    };
    // The one who asked may have given up.
    let _ = waiter.send(Ok(answer));
}
