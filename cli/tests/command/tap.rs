//! Stands between whoever talks to a guest's monitor or agent and these, and strikes at one command: before it is passed
//! on, or between its being done and its answer being heard. It tells who came, and who asked for what lets a guest go.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::spawn;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::Value;

use crate::rests;

/// On which side of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// It has not been passed on.
    Before,
    /// It has been done, and nobody has heard the answer.
    After,
}

/// What becomes of the line that was struck at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It goes where it was going.
    Pass,
    /// It is lost, and the connection with it.
    Cut,
}

/// What happens at the command.
pub(crate) type Blow = Box<dyn FnOnce(&Side<'_>) -> Then + Send>;

/// The side of the one who is asked.
pub(crate) struct Side<'a> {
    server: &'a UnixStream,
    state: &'a Mutex<State>,
}

impl Side<'_> {
    /// Asks something that the client does not know of, and does not hear the answer of.
    pub(crate) fn ask(&self, question: &Value) {
        lock(self.state).swallow += 1;
        let mut server = self.server;
        server.write_all(format!("{question}\n").as_bytes()).unwrap();
    }
}

/// A socket in front of another. Its threads end with the test's process.
pub(crate) struct Tap {
    pub(crate) socket: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    armed: Option<(When, &'static str, Blow)>,
    /// The answer that comes next is that of the command that is struck at.
    due: Option<Blow>,
    hit: Option<Instant>,
    /// So many answers are nobody's but the test's.
    swallow: usize,
    thawed: Option<Instant>,
    /// Who has come, and when.
    came: Vec<(Pid, Duration)>,
    /// Who has asked for what lets a guest go.
    let_go: Vec<(Pid, String)>,
}

/// What lets a guest go.
const LETS_GO: [&str; 2] = ["cont", "guest-fsfreeze-thaw"];

impl Tap {
    /// In front of this socket.
    pub(crate) fn before(real: &Path, socket: PathBuf) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let listener = UnixListener::bind(&socket).unwrap();
        let (theirs, real) = (Arc::clone(&state), real.to_owned());
        spawn(move || {
            for client in listener.incoming() {
                let server = UnixStream::connect(&real);
                // A machine that has ended.
                let (Ok(client), Ok(server)) = (client, server) else {
                    continue;
                };
                let state = Arc::clone(&theirs);
                let who = rustix::net::sockopt::socket_peercred(&client).unwrap().pid;
                lock(&state).came.push((who, rests::now()));
                spawn(move || serve(&client, &server, who, &state));
            }
        });
        Self { socket, state }
    }

    /// Strikes at the next command of this name.
    pub(crate) fn arm(&self, when: When, command: &'static str, blow: Blow) {
        *lock(&self.state) = State {
            armed: Some((when, command, blow)),
            ..State::default()
        };
    }

    /// Forgets who came and who asked.
    pub(crate) fn forget(&self) {
        let mut state = lock(&self.state);
        state.came.clear();
        state.let_go.clear();
    }

    /// Strikes no more.
    pub(crate) fn disarm(&self) {
        lock(&self.state).armed = None;
    }

    /// When it struck, once that is done.
    pub(crate) fn hit(&self) -> Option<Instant> {
        lock(&self.state).hit
    }

    /// When a process first came, by the clock of [`rests`].
    pub(crate) fn came(&self, who: Pid) -> Option<Duration> {
        let state = lock(&self.state);
        let came = state.came.iter().find(|(pid, _)| *pid == who);
        came.map(|(_, when)| *when)
    }

    /// Who was the first to ask for this.
    pub(crate) fn first_to_ask(&self, command: &str) -> Option<Pid> {
        let state = lock(&self.state);
        let asked = state.let_go.iter().find(|(_, name)| name == command);
        asked.map(|(pid, _)| *pid)
    }

    /// When somebody was last told that all is thawed.
    pub(crate) fn thawed(&self) -> Option<Instant> {
        lock(&self.state).thawed
    }
}

impl State {
    /// The blow that is to fall on a line of the client's, where it falls before it.
    fn asked(&mut self, line: &str, who: Pid) -> Option<Blow> {
        let command = command(line)?;
        if LETS_GO.contains(&command.as_str()) {
            self.let_go.push((who, command.clone()));
        }
        let (when, _, blow) = self.armed.take_if(|(_, name, _)| *name == command)?;
        if when == When::Before {
            return Some(blow);
        }
        self.due = Some(blow);
        None
    }

    /// Whether a line of the other end's goes to the client, and the blow that falls first.
    fn answered(&mut self, line: &str) -> (bool, Option<Blow>) {
        if !line.contains("\"return\"") && !line.contains("\"error\"") {
            return (true, None);
        }
        if self.swallow > 0 {
            self.swallow -= 1;
            return (false, None);
        }
        if line.contains("\"thawed\"") {
            self.thawed = Some(Instant::now());
        }
        (true, self.due.take())
    }
}

/// The command in a line; the agent's may begin with a delimiter.
fn command(line: &str) -> Option<String> {
    let message: Value = serde_json::from_str(line.get(line.find('{')?..)?).ok()?;
    message["execute"].as_str().map(str::to_owned)
}

fn serve(client: &UnixStream, server: &UnixStream, who: Pid, state: &Arc<Mutex<State>>) {
    let [from, to] = [server, client].map(|end| end.try_clone().unwrap());
    let theirs = Arc::clone(state);
    let back = spawn(move || {
        pass(&from, &to, |line| {
            let (passes, blow) = lock(&theirs).answered(line);
            match fall(blow, &from, &theirs) {
                Then::Pass => Some(passes),
                Then::Cut => None,
            }
        });
    });
    pass(client, server, |line| {
        let blow = lock(state).asked(line, who);
        match fall(blow, server, state) {
            Then::Pass => Some(true),
            Then::Cut => None,
        }
    });
    back.join().unwrap();
}

/// Whoever waits for the hit finds it done.
fn fall(blow: Option<Blow>, server: &UnixStream, state: &Mutex<State>) -> Then {
    let Some(blow) = blow else { return Then::Pass };
    let now = Instant::now();
    let then = blow(&Side { server, state });
    lock(state).hit = Some(now);
    then
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes lines on, all but those that are to be left out, until one end closes or `passes` says so; then both are closed.
fn pass(from: &UnixStream, mut to: &UnixStream, mut passes: impl FnMut(&str) -> Option<bool>) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        match passes(&String::from_utf8_lossy(&line)) {
            Some(true) if to.write_all(&line).is_err() => break,
            Some(_) => line.clear(),
            None => break,
        }
    }
    // One that is closed already is as good.
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
