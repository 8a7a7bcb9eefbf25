//! Stands between the command and a monitor, and kills the command at one of the monitor's commands that change something.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::spawn;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// On which side of a monitor's command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// It is not sent.
    Before,
    /// It has been done, and nobody hears the answer.
    After,
}

/// A socket in front of a monitor's. Its threads end with the test's process.
pub(crate) struct Strike {
    pub(crate) socket: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    armed: Option<(usize, When)>,
    victim: Option<Pid>,
    seen: usize,
    /// The answer that is coming kills.
    due: bool,
    hit: Option<String>,
}

impl State {
    fn kill(&mut self) {
        if let Some(victim) = self.victim {
            kill_process(victim, Signal::KILL).unwrap();
        }
        self.due = false;
    }

    /// Looks at what is going to the monitor; whether it goes there.
    fn passes(&mut self, line: &str) -> bool {
        let Some((n, when)) = self.armed.filter(|_| self.hit.is_none()) else {
            return true;
        };
        let Some(command) = changing(line) else {
            return true;
        };
        self.seen += 1;
        if self.seen <= n {
            return true;
        }
        self.hit = Some(format!("{when:?} {command}"));
        if when == When::After {
            self.due = true;
            return true;
        }
        self.kill();
        false
    }
}

/// The command in a line, where it changes something.
fn changing(line: &str) -> Option<String> {
    let message: Value = serde_json::from_str(line).ok()?;
    let command = message["execute"].as_str()?;
    let looks = ["query-", "qmp_", "qom-list", "qom-get"];
    let changes = !looks.iter().any(|look| command.starts_with(look));
    changes.then(|| command.to_owned())
}

impl Strike {
    /// In front of this monitor.
    pub(crate) fn before(monitor: &Path, socket: PathBuf) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let listener = UnixListener::bind(&socket).unwrap();
        let (theirs, monitor) = (Arc::clone(&state), monitor.to_owned());
        spawn(move || {
            for client in listener.incoming() {
                let server = UnixStream::connect(&monitor);
                // A machine that has ended.
                let (Ok(client), Ok(server)) = (client, server) else {
                    continue;
                };
                let state = Arc::clone(&theirs);
                spawn(move || serve(&client, &server, &state));
            }
        });
        Self { socket, state }
    }

    /// Runs a command to its end, or kills it at the n-th of the monitor's commands; tells where it was killed.
    pub(crate) fn run(&self, mut command: Command, n: usize, when: When) -> Option<String> {
        let mut state = self.state.lock().unwrap();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        *state = State {
            armed: Some((n, when)),
            victim: Pid::from_raw(i32::try_from(child.id()).unwrap()),
            ..State::default()
        };
        drop(state);
        let status = loop {
            // Under the lock: a process that has been waited for must not be killed any more.
            let mut state = self.state.lock().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                state.victim = None;
                break status;
            }
            drop(state);
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        let hit = std::mem::take(&mut *self.state.lock().unwrap()).hit;
        assert!(hit.is_some() || status.success(), "it failed by itself: {status}");
        hit
    }
}

fn serve(client: &UnixStream, server: &UnixStream, state: &Arc<Mutex<State>>) {
    let [from, to] = [server, client].map(|end| end.try_clone().unwrap());
    let theirs = Arc::clone(state);
    let back = spawn(move || {
        pass(&from, &to, |line| {
            let answers = line.contains("\"return\"") || line.contains("\"error\"");
            let mut state = lock(&theirs);
            let due = state.due && answers;
            if due {
                state.kill();
            }
            !due
        });
    });
    pass(client, server, |line| lock(state).passes(line));
    back.join().unwrap();
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap()
}

/// Passes lines on until one end closes; then both are closed.
fn pass(from: &UnixStream, mut to: &UnixStream, mut passes: impl FnMut(&str) -> bool) {
    let mut lines = BufReader::new(from);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
        if passes(&line) && to.write_all(line.as_bytes()).is_err() {
            break;
        }
        line.clear();
    }
    // One that is closed already is as good.
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
