//! The storage daemon that serves a point: started by us, and gone with us, whatever we die of.
//!
//! The kernel sees to that: the daemon asks for a SIGKILL at its parent's death (prctl(2), `PR_SET_PDEATHSIG`), and so needs no
//! watcher that could itself be killed, and no program of the host's. Only the process itself can ask, and what asked keeps it
//! through `execve`: so our own program is started once more, asks, looks whether its parent is still there (had it died
//! before, nobody would send the signal), and becomes the daemon. "Parent" is the *thread* that started it, which is why
//! a thread of its own does, and stays until the daemon has ended.
//!
//! Its monitor is a socket pair with us. It greets there when all that the arguments say is done, the exports last: so we
//! know that it listens.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use disksnap::{Error, ErrorKind, Result, faults};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

/// Says in the environment that this process is to become a daemon, and whose child it is.
const ASKED: &str = "DISKSNAP_SERVE_PARENT";
/// What a program exits with that could not become another one (as shells and env(1) do).
const CANNOT_RUN: i32 = 126;
/// How long it may take to open its images: seconds where nothing is wrong with a loaded host.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long it may take to end when asked.
const LAST_MOMENT: Duration = Duration::from_secs(10);
/// How many of its last lines are kept for an error.
const LINES: usize = 5;
/// The longest line that is kept, in bytes.
const LONGEST_LINE: u64 = 1000;

/// Whether this program's `main` calls [`run_if_asked`].
static OFFERED: AtomicBool = AtomicBool::new(false);

/// Becomes a storage daemon if this process was started to be one, and then does not return; otherwise returns at once.
///
/// A program that serves points ([`serve`](crate::serve)) calls it first thing in `main`, before anything that reads
/// arguments or starts threads.
pub fn run_if_asked() {
    let Some(parent) = std::env::var_os(ASKED) else {
        OFFERED.store(true, Ordering::Relaxed);
        return;
    };
    let why = become_daemon(&parent);
    let text = format!("cannot become the storage daemon: {why}\n");
    // Where nobody reads there is nobody to be told.
    let _ = io::stderr().write_all(text.as_bytes());
    std::process::exit(CANNOT_RUN);
}

/// Returns only what went wrong.
fn become_daemon(parent: &OsString) -> String {
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        return format!("prctl: {error}");
    }
    let pid = |pid: Pid| pid.as_raw_nonzero().get().to_string();
    if getppid().map(pid).is_none_or(|pid| pid.as_str() != parent) {
        return "its parent is gone".to_owned();
    }
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        return "no program is named".to_owned();
    };
    let mut daemon = Command::new(program);
    daemon.args(arguments).env_remove(ASKED).exec().to_string()
}

/// A daemon that listens.
#[derive(Debug)]
pub(super) struct Daemon {
    /// The process, by a handle that is never another's.
    handle: OwnedFd,
    ended: oneshot::Receiver<Ended>,
    /// While it is open, the daemon has a monitor.
    _monitor: UnixStream,
}

/// How a daemon ended.
#[derive(Debug)]
struct Ended {
    status: io::Result<ExitStatus>,
    said: Vec<String>,
}

impl Daemon {
    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// `Unavailable`, with what it said; then nothing is left of it.
    pub(super) async fn start(program: &Path, arguments: Vec<String>) -> Result<Self> {
        if !OFFERED.load(Ordering::Relaxed) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "this program cannot serve: a server would outlive it",
            )
            .hint("A program that serves calls disksnap_backup::run_if_asked() first thing in main."));
        }
        let failed =
            |e: io::Error| Error::io("cannot start the storage daemon", e).with("program", program.display());
        let (monitor, theirs) = UnixStream::pair().map_err(failed)?;
        let command = command(program, arguments, theirs);
        let (handle, ended) = spawn(command).await.map_err(failed)?;
        let mut daemon = Self {
            handle,
            ended,
            _monitor: monitor.try_clone().map_err(failed)?,
        };
        match daemon.until_greeting(monitor).await {
            Ok(()) => Ok(daemon),
            Err(error) => {
                daemon.stop().await?;
                Err(error.with("program", program.display()))
            }
        }
    }

    async fn until_greeting(&mut self, mut monitor: UnixStream) -> Result<()> {
        let greeted = tokio::task::spawn_blocking(move || {
            monitor.set_read_timeout(Some(PATIENCE))?;
            monitor.read(&mut [0; 1])
        });
        match greeted.await {
            Ok(Ok(1)) => Ok(()),
            Ok(Err(e)) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                let what = format!(
                    "the storage daemon has not opened the images for {} s",
                    PATIENCE.as_secs()
                );
                Err(Error::new(ErrorKind::Timeout, what))
            }
            // It has closed its end: it ends.
            _ => Err(self.ended().await),
        }
    }

    /// Waits until it has ended, and says how.
    pub(super) async fn ended(&mut self) -> Error {
        match (&mut self.ended).await {
            Ok(ended) => died(&ended),
            Err(e) => Error::new(ErrorKind::Internal, "nobody waits for the storage daemon").because(e),
        }
    }

    /// Ends it, and waits until it has.
    ///
    /// # Errors
    /// `Timeout` when it does not die of SIGKILL (it hangs in the kernel, on storage that is gone).
    pub(super) async fn stop(mut self) -> Result<()> {
        for signal in [Signal::TERM, Signal::KILL] {
            self.send(signal);
            if self.ended.is_terminated() || tokio::time::timeout(LAST_MOMENT, &mut self.ended).await.is_ok()
            {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Timeout, "the storage daemon does not end")
            .hint("It hangs in the kernel: look at the storage that the repository is on."))
    }

    fn send(&self, signal: Signal) {
        // One that has ended needs none.
        let _ = faults::around("server", "end", || pidfd_send_signal(&self.handle, signal));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.send(Signal::KILL);
    }
}

/// Our own program, which will become the daemon; away from the terminal's signals, which are for us.
fn command(program: &Path, arguments: Vec<String>, monitor: UnixStream) -> Command {
    // The link leads to the running program even when its file was replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("disksnap-serve")
        .env(ASKED, std::process::id().to_string())
        .arg(program)
        .args(arguments)
        .args([
            "--chardev",
            "socket,id=monitor,fd=0",
            "--monitor",
            "chardev=monitor",
        ])
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(monitor)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for variable in faults::VARIABLES {
        command.env_remove(variable);
    }
    command
}

/// Starts it in a thread that stays until it has ended.
async fn spawn(mut command: Command) -> io::Result<(OwnedFd, oneshot::Receiver<Ended>)> {
    let (tell, told) = oneshot::channel();
    let (tell_end, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("point-server".into());
    thread.spawn(move || {
        let child = faults::around("server", "start", || command.spawn());
        // It holds the daemon's end of the monitor too.
        drop(command);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return drop(tell.send(Err(error))),
        };
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let stderr = child.stderr.take();
        match handle {
            Ok(handle) => drop(tell.send(Ok(handle))),
            Err(error) => {
                let _ = child.kill();
                drop(tell.send(Err(error.into())));
            }
        }
        let said = stderr.map(last_lines).unwrap_or_default();
        let status = child.wait();
        let _ = tell_end.send(Ended { status, said });
    })?;
    let gone = || io::Error::other("the thread that starts it has ended");
    Ok((told.await.map_err(|_| gone())??, ended))
}

/// Reads what it says to its end, and keeps the last of it.
fn last_lines(stderr: ChildStderr) -> Vec<String> {
    let mut stderr = BufReader::new(stderr);
    let mut lines = VecDeque::new();
    loop {
        let mut line = Vec::new();
        match stderr.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return lines.into(),
            Ok(_) => {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                tracing::debug!(%line, "the storage daemon says");
                lines.push_back(line);
                if lines.len() > LINES {
                    lines.pop_front();
                }
            }
        }
    }
}

fn died(ended: &Ended) -> Error {
    let status = match &ended.status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let what = format!(
        "the storage daemon has ended ({status}): {}",
        ended.said.join("; ")
    );
    Error::new(ErrorKind::Unavailable, what)
        .hint("Try the program by itself: `qemu-storage-daemon --version`.")
}
