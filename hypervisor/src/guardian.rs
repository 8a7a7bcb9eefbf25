//! The guardian: a separate small process that lets the guest run and thaws it when its parent no longer can.
//!
//! It blocks, has one thread and no runtime, and inherits nothing but its end of a socket as standard input. It acts
//! when the parent is gone (the socket ends), or when the deadline passes without the parent letting it go. A monitor
//! serves one client, so it first shuts down the parent's connections, of which it holds duplicates, and connects anew.
//!
//! A program that embeds disksnap calls [`run_if_asked`] first thing in `main`; then the program itself is also the
//! guardian's program.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use disksnap_core::Command;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::clients;
use crate::order::{self, ASKED, End, Order, Plan, Report};

/// Whether this program has offered to be the guardian's too.
static OFFERED: AtomicBool = AtomicBool::new(false);

/// How long a guardian without a parent goes on trying.
const ORPHAN: Duration = Duration::from_mins(10);

/// Between two times that all was tried in vain, while the parent has not let go.
const AGAIN: Duration = Duration::from_secs(1);

/// Between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// How long one attempt waits for a greeting or an answer: a connection of somebody else's may be served first.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The longest answer that is read, in bytes.
const LONGEST: usize = 1 << 20;

/// Becomes the guardian if this process was started as one, and then does not return; otherwise returns at once.
///
/// Call it first thing in `main`, before anything that reads arguments or starts threads. It also lets disksnap start
/// the running program as its guardian.
pub fn run_if_asked() {
    if std::env::var_os(ASKED).is_some() {
        let ended = run();
        std::process::exit(i32::from(ended != ExitCode::SUCCESS));
    }
    OFFERED.store(true, Ordering::Relaxed);
}

/// Whether [`run_if_asked`] was called in this process.
pub(crate) fn is_offered() -> bool {
    OFFERED.load(Ordering::Relaxed)
}

fn run() -> ExitCode {
    // Away from the terminal's Ctrl-C and hang-up; whoever ends the whole service must not end it before it has acted.
    let _ = rustix::process::setsid();
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGHUP,
        signal_hook::consts::SIGQUIT,
    ] {
        let _ = signal_hook::flag::register(signal, Arc::clone(&ignored));
    }
    let stdin = io::stdin();
    let Some(mut guardian) = Guardian::armed(stdin.as_fd()) else {
        return ExitCode::FAILURE;
    };
    if guardian.watch().is_err() {
        // Without news of the parent, the guest comes first.
        guardian.act(ORPHAN);
        guardian.take_note();
    }
    ExitCode::SUCCESS
}

fn retrying<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// What came over the parent's socket.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// Nothing until the time was over.
    None,
    /// A new connection of the parent's.
    Connected,
    /// The parent lets go.
    Disarm,
    /// The parent is dead.
    Gone,
}

#[derive(Debug)]
struct Guardian<'a> {
    parent: BorrowedFd<'a>,
    plan: Plan,
    monitor: Option<OwnedFd>,
    agent: Option<OwnedFd>,
    /// The outcome of acting, once it has.
    acted: Option<Result<(), String>>,
    /// News that came while it was acting.
    pending: Option<News>,
}

impl<'a> Guardian<'a> {
    /// Takes the connections that there are, and the order that comes behind them.
    fn armed(parent: BorrowedFd<'a>) -> Option<Self> {
        let mut guardian = Self {
            parent,
            plan: Plan::default(),
            monitor: None,
            agent: None,
            acted: None,
            pending: None,
        };
        loop {
            match retrying(|| order::receive::<Order>(parent)).ok()?? {
                (Order::Arm(plan), _) => {
                    guardian.plan = plan;
                    return Some(guardian);
                }
                (Order::Connected(end), descriptor) => guardian.keep(end, descriptor),
                (Order::Disarm, _) => return None,
            }
        }
    }

    fn keep(&mut self, end: End, descriptor: Option<OwnedFd>) {
        match end {
            End::Monitor => self.monitor = descriptor,
            End::Agent => self.agent = descriptor,
        }
    }

    /// From arming until it is let go or has done what a dead parent cannot.
    fn watch(&mut self) -> rustix::io::Result<()> {
        let deadline = Duration::from_millis(self.plan.deadline_ms);
        // A parent that is gone is found out below.
        let _ = order::send(self.parent, &Report::Armed, None);
        // When to act; never again once it has, unless the parent has connected anew and may have paused the guest since.
        let mut next = Some(Instant::now() + deadline);
        loop {
            match self.news(next)? {
                News::Disarm => {
                    if matches!(self.acted, Some(Err(_))) {
                        // It may be possible by now.
                        self.act(Duration::from_millis(self.plan.patience_ms));
                    }
                    self.answer();
                    return Ok(());
                }
                News::Gone => {
                    if next.is_some() || matches!(self.acted, Some(Err(_))) {
                        self.act(ORPHAN);
                    }
                    self.take_note();
                    return Ok(());
                }
                News::Connected if next.is_none() => next = Some(Instant::now() + deadline),
                News::Connected => {}
                News::None => {
                    self.act(Duration::from_millis(self.plan.patience_ms));
                    // A parent that is stopped asks for nothing, and a hypervisor that was silent may answer yet.
                    let in_vain = matches!(self.acted, Some(Err(_)));
                    next = in_vain.then(|| Instant::now() + AGAIN);
                }
            }
        }
    }

    /// Nobody needs to be told any more; but for what was tried in vain.
    fn take_note(&self) {
        if let (Some(note), Some(Ok(()))) = (&self.plan.note, &self.acted) {
            let _ = std::fs::remove_file(note);
        }
    }

    /// Whether whoever came after a dead parent has let the guest go meanwhile.
    fn is_relieved(&self) -> bool {
        self.pending == Some(News::Gone) && self.plan.note.as_ref().is_some_and(|note| !note.exists())
    }

    fn answer(&self) {
        let report = match &self.acted {
            None => Report::Quiet,
            Some(Ok(())) => Report::Fired,
            Some(Err(why)) => Report::Failed(why.clone()),
        };
        let _ = order::send(self.parent, &report, None);
    }

    /// Waits for news until then, or for ever.
    fn news(&mut self, until: Option<Instant>) -> rustix::io::Result<News> {
        if let Some(news) = self.pending.take() {
            return Ok(news);
        }
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut watched = [PollFd::new(&self.parent, PollFlags::IN)];
            match poll(&mut watched, left.as_ref()) {
                Ok(0) => return Ok(News::None),
                Ok(_) => return self.receive(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self) -> rustix::io::Result<News> {
        match retrying(|| order::receive::<Order>(self.parent)) {
            Ok(Some((Order::Disarm, _))) => Ok(News::Disarm),
            Ok(Some((Order::Connected(end), descriptor))) => {
                self.keep(end, descriptor);
                Ok(News::Connected)
            }
            Ok(Some((Order::Arm(_), _))) => Err(Errno::PROTO),
            Ok(None) | Err(Errno::CONNRESET) => Ok(News::Gone),
            Err(error) => Err(error),
        }
    }

    /// Lets the disks go and the guest run, and thaws it. A paused guest's agent cannot answer, so it runs first.
    fn act(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        let released = match self.plan.release.clone() {
            Some((path, commands)) => self.until_done(until, |left| release(&path, &commands, left)),
            None => Ok(()),
        };
        let resumed = match self.plan.resume.clone() {
            Some(path) => self.until_done(until, |left| resume(&path, left)),
            None => Ok(()),
        };
        let thawed = match self.plan.thaw.clone() {
            Some(path) => self.until_done(until, |left| thaw(&path, left)),
            None => Ok(()),
        };
        self.acted = Some(released.and(resumed).and(thawed));
    }

    fn until_done(
        &mut self,
        until: Instant,
        attempt: impl Fn(Instant) -> Result<(), Failed>,
    ) -> Result<(), String> {
        loop {
            self.take_over();
            if self.is_relieved() {
                return Ok(());
            }
            match attempt(until) {
                Ok(()) | Err(Failed::Gone) => return Ok(()),
                Err(Failed::Try(_)) if Instant::now() + RETRY < until => self.try_again_soon(),
                Err(Failed::Try(why)) => return Err(why),
            }
        }
    }

    fn try_again_soon(&self) {
        if let Some((pid, socket)) = &self.plan.clients {
            clients::end_stalled(*pid, socket);
        }
        std::thread::sleep(RETRY);
    }

    /// Ends the parent's connections, also those it has made since.
    fn take_over(&mut self) {
        let now = Instant::now();
        while self.pending.is_none() {
            match self.news(Some(now)) {
                Ok(News::None) => break,
                Ok(News::Connected) => {}
                Ok(news) => self.pending = Some(news),
                Err(_) => self.pending = Some(News::Gone),
            }
        }
        for descriptor in [self.monitor.take(), self.agent.take()].into_iter().flatten() {
            let _ = rustix::net::shutdown(&descriptor, Shutdown::Both);
        }
    }
}

/// Why an attempt came to nothing.
#[derive(Debug)]
enum Failed {
    /// Nobody listens: the hypervisor is gone, and the guest with it.
    Gone,
    /// It may work the next time.
    Try(String),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Try(error.to_string())
    }
}

/// Sends each command. One that is refused has nothing left to let go: its job has ended, or never was.
fn release(path: &Path, commands: &[Command], until: Instant) -> Result<(), Failed> {
    let mut monitor = Wire::greeted(path, until)?;
    for command in commands {
        monitor.ask_by_id(command)?;
    }
    Ok(())
}

/// `cont`, if the guest is paused; what stands for another reason is left alone.
fn resume(path: &Path, until: Instant) -> Result<(), Failed> {
    let mut monitor = Wire::greeted(path, until)?;
    let status = monitor.ask_by_id(&Command::bare("query-status"))?;
    let Some(word) = status["return"]["status"].as_str() else {
        return Err(Failed::Try(format!("query-status: {status}")));
    };
    if word != "paused" {
        return Ok(());
    }
    let answer = monitor.ask_by_id(&Command::bare("cont"))?;
    match answer.get("error") {
        None => Ok(()),
        Some(error) => Err(Failed::Try(format!("cont: {error}"))),
    }
}

/// `guest-fsfreeze-thaw` until the status is thawed.
///
/// The port is one stream: a hung agent that freezes late finds the thaw behind the freeze, though nobody waits for the
/// answer any more. And one that is started anew has lost what it was asked, which is why it is asked again.
fn thaw(path: &Path, until: Instant) -> Result<(), Failed> {
    let mut agent = Wire::connect(path, until)?;
    let id = std::process::id();
    let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
    let thaw = json!({"execute": "guest-fsfreeze-thaw"});
    agent.write(format!("{sync}\n{thaw}\n").as_bytes(), true)?;
    while agent.delimited()?["return"] != id {}
    agent.wait_anew();
    agent.message()?;
    loop {
        let status = agent.ask("guest-fsfreeze-status")?;
        match status.get("error") {
            None if status["return"] == "thawed" => return Ok(()),
            None => agent.ask("guest-fsfreeze-thaw")?,
            Some(error) => return Err(Failed::Try(format!("guest-fsfreeze-status: {error}"))),
        };
        std::thread::sleep(RETRY);
    }
}

/// A blocking connection that speaks lines of JSON.
#[derive(Debug)]
struct Wire {
    reader: BufReader<UnixStream>,
    /// When all has to be done.
    until: Instant,
    /// When the answer to the last question has to be there, however much else is said meanwhile: whoever drips or floods does not
    /// buy time.
    answered: Instant,
}

impl Wire {
    fn connect(path: &Path, until: Instant) -> Result<Self, Failed> {
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        // A blocking connect would wait in the queue behind other clients for ever.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(io::Error::from)?;
        match retrying(|| rustix::net::connect(&socket, &address)) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(Failed::Gone),
            Err(error) => return Err(Failed::Try(format!("cannot connect: {error}"))),
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        let mut wire = Self {
            reader: BufReader::new(stream),
            until,
            answered: until,
        };
        wire.wait_anew();
        Ok(wire)
    }

    /// A monitor that is ready for commands.
    fn greeted(path: &Path, until: Instant) -> Result<Self, Failed> {
        let mut monitor = Self::connect(path, until)?;
        while monitor.message()?.get("QMP").is_none() {}
        monitor.ask_by_id(&Command::bare("qmp_capabilities"))?;
        Ok(monitor)
    }

    /// Waits for the next answer for one attempt's time, and not beyond the end.
    fn wait_anew(&mut self) {
        self.answered = self.until.min(Instant::now() + ATTEMPT);
    }

    /// What is left of the time for an answer.
    fn left(&self) -> io::Result<Duration> {
        let left = self.answered.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }

    fn write(&mut self, bytes: &[u8], delimit: bool) -> io::Result<()> {
        self.wait_anew();
        let left = self.left()?;
        let stream = self.reader.get_mut();
        stream.set_write_timeout(Some(left))?;
        if delimit {
            stream.write_all(&[0xff])?;
        }
        stream.write_all(bytes)
    }

    fn ask(&mut self, command: &str) -> io::Result<Value> {
        self.write(format!("{}\n", json!({ "execute": command })).as_bytes(), false)?;
        loop {
            let message = self.message()?;
            if message.get("return").is_some() || message.get("error").is_some() {
                return Ok(message);
            }
        }
    }

    /// Asks the monitor, and waits for the answer to this very question: what QEMU was doing for the parent when the
    /// connection was taken from it, it answers to whoever is connected then.
    fn ask_by_id(&mut self, command: &Command) -> io::Result<Value> {
        let id = format!("guardian-{}-{}", std::process::id(), command.execute);
        let mut question = json!({ "execute": command.execute, "id": id });
        if !command.arguments.is_null() {
            question["arguments"] = command.arguments.clone();
        }
        self.write(format!("{question}\n").as_bytes(), false)?;
        loop {
            let message = self.message()?;
            if message["id"] == *id {
                return Ok(message);
            }
        }
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            let left = self.left()?;
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let chunk = self.reader.fill_buf()?;
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(chunk.len());
            if chunk.is_empty() || line.len() + taken > LONGEST {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            line.extend_from_slice(&chunk[..taken]);
            self.reader.consume(taken + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(line);
            }
        }
    }

    fn message(&mut self) -> io::Result<Value> {
        let line = self.line()?;
        serde_json::from_slice(&line).map_err(io::Error::other)
    }

    /// The next message behind a delimiter; all others are passed over.
    fn delimited(&mut self) -> io::Result<Value> {
        loop {
            let line = self.line()?;
            if let Some(mark) = line.iter().rposition(|byte| *byte == 0xff)
                && let Ok(message) = serde_json::from_slice(&line[mark + 1..])
            {
                return Ok(message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A QEMU that was busy with the dead parent's `stop` answers it to the guardian: here a fake, since the real one
    /// does so only now and then.
    #[test]
    fn an_answer_to_the_parent_is_not_taken_for_ones_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut to = stream.try_clone().unwrap();
            writeln!(to, "{}", json!({"QMP": {}})).unwrap();
            writeln!(to, "{}", json!({"return": {}, "id": 7})).unwrap();
            let mut asked = Vec::new();
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let command: Value = serde_json::from_str(&line).unwrap();
                let name = command["execute"].as_str().unwrap().to_owned();
                let value = if name == "query-status" {
                    json!({"status": "paused"})
                } else {
                    json!({})
                };
                writeln!(to, "{}", json!({"return": value, "id": command["id"]})).unwrap();
                asked.push(name);
            }
            asked
        });
        resume(&path, Instant::now() + Duration::from_mins(1)).unwrap();
        assert_eq!(qemu.join().unwrap(), ["qmp_capabilities", "query-status", "cont"]);
    }

    /// A guest's agent that says something all the time, and never an answer: the monitor's turn comes all the same.
    #[test]
    fn who_drips_or_floods_buys_no_time() {
        let (drip, flood) = (&b"{"[..], b"{\"event\": 1}\n\xff{}\n".repeat(1000));
        for (say, pause) in [(drip, Duration::from_millis(10)), (&*flood, Duration::ZERO)] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("agent");
            let (listener, say) = (UnixListener::bind(&path).unwrap(), say.to_vec());
            let peer = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                while stream.write_all(&say).is_ok() {
                    std::thread::sleep(pause);
                }
            });
            let (done, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let outcome = thaw(&path, Instant::now() + Duration::from_millis(300));
                done.send(matches!(outcome, Err(Failed::Try(_))))
            });
            assert!(told.recv_timeout(Duration::from_mins(2)).expect("it never ends"));
            peer.join().unwrap();
        }
    }
}
