//! The storage daemon's process: started so that it outlives us, and ended, it and no other.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command as Program, Stdio};
use std::time::Duration;

use disksnap_core::{Command, DomainId, Error, ErrorKind, Result, faults};
use disksnap_hypervisor::{Session, Timeouts};
use rustix::fs::Mode;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;

use crate::files::Files;
use crate::{ended_by_quit, session};

/// How long it may take to start, and to end: seconds where nothing is wrong with a loaded host.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one connection is waited for while it starts.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Between two looks.
const POLL: Duration = Duration::from_millis(5);
/// Takes a program out of our session and process group (util-linux, setsid(1)).
const SETSID: [&str; 2] = ["/usr/bin/setsid", "/bin/setsid"];

/// A daemon that answers, and that its starter still can take back.
#[derive(Debug)]
pub(crate) struct Launched {
    child: Child,
    lock: File,
}

/// Starts a daemon without exports and waits until it answers.
///
/// # Errors
/// `Unavailable`, with what it said; then nothing is left of it.
pub(crate) async fn launch(files: &Files, domain: &DomainId, program: &Path) -> Result<Launched> {
    let failed =
        |e: io::Error| Error::io("cannot start the storage daemon", e).with("program", program.display());
    let lock = files.take_lock(domain)?;
    let log = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(files.log())
        .map_err(failed)?;
    let mut command = command(program);
    for variable in faults::VARIABLES {
        command.env_remove(variable);
    }
    command
        .args(arguments(files)?)
        .current_dir("/")
        .stdin(Stdio::from(lock.try_clone().map_err(failed)?))
        .stdout(Stdio::from(log.try_clone().map_err(failed)?))
        .stderr(Stdio::from(log));
    // Its sockets are for us alone, and it makes them as its umask says. Whatever else this process makes meanwhile is private too.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let spawned = faults::around("server", "start", || command.spawn());
    rustix::process::umask(before);
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            drop((command, lock));
            files.remove()?;
            return Err(failed(error));
        }
    };
    // The command holds the lock too.
    drop(command);
    let mut launched = Launched { child, lock };
    match launched.until_answers(files).await {
        Ok(()) => Ok(launched),
        Err(error) => {
            let error = error.with("program", program.display());
            let failed = launched.end(files).await.err();
            Err(error.rollback_failed(failed.into_iter().collect()))
        }
    }
}

/// In a session of its own it does not hear the terminal's signals, and outlives it.
fn command(program: &Path) -> Program {
    if let Some(setsid) = SETSID.iter().find(|path| Path::new(path).is_file()) {
        let mut command = Program::new(setsid);
        command.arg(program);
        return command;
    }
    let mut command = Program::new(program);
    command.process_group(0);
    command
}

fn arguments(files: &Files) -> Result<[String; 6]> {
    // So that the place for exports is found wanting before anything runs.
    files.socket()?;
    let utf8 = |path: std::path::PathBuf| {
        path.into_os_string().into_string().map_err(|path| {
            Error::new(
                ErrorKind::Invalid,
                "the path of the state directory must be UTF-8",
            )
            .with("path", path.display())
        })
    };
    let monitor = utf8(files.monitor())?.replace(',', ",,");
    Ok([
        "--pidfile".to_owned(),
        utf8(files.pid())?,
        "--chardev".to_owned(),
        format!("socket,id=monitor,path={monitor},server=on,wait=off"),
        "--monitor".to_owned(),
        "chardev=monitor".to_owned(),
    ])
}

impl Launched {
    /// A monitor that is connected to while it is being set up may greet and never answer (QEMU 10.0): it is waited
    /// for until it is all set up, and asked again on a new connection, which helps there too.
    async fn until_answers(&mut self, files: &Files) -> Result<()> {
        let timeouts = Timeouts {
            greeting: ATTEMPT,
            ..Timeouts::default()
        };
        let session = Session::new(files.monitor(), timeouts);
        let until = Instant::now() + PATIENCE;
        loop {
            if files.pid().exists() {
                match session.instance().await {
                    Ok(Some(_)) => return Ok(()),
                    Err(error) if error.kind() != ErrorKind::Timeout => return Err(error),
                    _ => {}
                }
            }
            let ended = self.child.try_wait();
            let ended = ended.map_err(|e| Error::io("cannot look at the storage daemon", e))?;
            if let Some(status) = ended {
                return Err(died(files, &status.to_string()));
            }
            if Instant::now() > until {
                let what = format!("the storage daemon has not answered for {} s", PATIENCE.as_secs());
                return Err(Error::new(ErrorKind::Timeout, what));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// From here on it lives by itself.
    pub(crate) fn let_go(self) {
        let Self { mut child, lock } = self;
        drop(lock);
        // Without the thread it would stay a zombie when it ends before us.
        let reaper = std::thread::Builder::new().name("image-server-reaper".into());
        let _ = reaper.spawn(move || child.wait());
    }

    /// Ends it and removes its files.
    pub(crate) async fn end(self, files: &Files) -> Result<()> {
        let Self { mut child, lock } = self;
        let ended = tokio::task::spawn_blocking(move || {
            // One that has ended is as good.
            let _ = faults::around("server", "kill", || child.kill());
            child.wait()
        });
        let failed = |e| Error::io("cannot end the storage daemon", e);
        ended
            .await
            .map_err(|e| failed(io::Error::other(e)))?
            .map_err(failed)?;
        drop(lock);
        files.remove()
    }
}

fn died(files: &Files, status: &str) -> Error {
    let log = std::fs::read(files.log()).unwrap_or_default();
    let said = String::from_utf8_lossy(&log);
    let said: Vec<&str> = said.lines().rev().take(5).collect();
    let said: Vec<&str> = said.into_iter().rev().collect();
    let what = format!("the storage daemon ended at once ({status}): {}", said.join("; "));
    Error::new(ErrorKind::Unavailable, what)
        .hint("Try the program by itself: `qemu-storage-daemon --version`.")
}

/// Ends the daemon that lives by this lock, also one that hangs or has never answered.
///
/// # Errors
/// `Timeout` when it does not die even so (it hangs in the kernel, on storage that is gone).
pub(crate) async fn end(files: &Files) -> Result<()> {
    if let Err(error) = quit(files).await {
        tracing::debug!(%error, "the storage daemon does not end when told to");
        kill(files)?;
    }
    if until_free(files).await? {
        return Ok(());
    }
    kill(files)?;
    if until_free(files).await? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Timeout, "the storage daemon does not end")
        .with("pid", files.holder().map_or("unknown".to_owned(), |pid| pid.to_string()))
        .hint("It hangs in the kernel: look at the storage that its images are on, then run `disksnap recover`."))
}

/// Asks it to end. One that is about to start is waited for.
async fn quit(files: &Files) -> Result<()> {
    let session = session(files);
    let until = Instant::now() + PATIENCE / 3;
    while session.instance().await?.is_none() {
        if !files.is_held()? {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(Error::new(ErrorKind::Timeout, "it has no monitor"));
        }
        tokio::time::sleep(POLL).await;
    }
    ended_by_quit(session.execute(Command::bare("quit")).await)
}

async fn until_free(files: &Files) -> Result<bool> {
    let until = Instant::now() + PATIENCE / 3;
    while files.is_held()? {
        if Instant::now() > until {
            return Ok(false);
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(true)
}

/// SIGKILL for the process whose standard input the lock is, and for no process that has its number since.
fn kill(files: &Files) -> Result<()> {
    let Some(pid) = files.holder() else {
        return Ok(());
    };
    let failed = |e: rustix::io::Errno| Error::io("cannot end the storage daemon", e.into()).with("pid", pid);
    let Some(handle) = Pid::from_raw(pid) else {
        return Ok(());
    };
    let handle = match pidfd_open(handle, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other.map_err(failed)?,
    };
    // The handle stays with the process; only now is it known to be the one.
    if !files.is_holder(pid) {
        return Ok(());
    }
    match faults::around("server", "kill", || pidfd_send_signal(&handle, Signal::KILL)) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => other.map_err(failed),
    }
}
