//! The parent's side of the guardian: which program it is, how it is armed, told of new connections and let go.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{Effect, Error, ErrorKind, Guard, Result, Verdict, faults};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::guardian;
use crate::order::{self, ASKED, End, Order, Plan, Report};
use crate::still;

/// Which program is started as the thaw guardian.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum GuardianProgram {
    /// The running program, when it has called [`run_if_asked`](crate::guardian::run_if_asked); else the first of
    /// [`GuardianProgram::PLACES`] that is there.
    #[default]
    Automatic,
    /// This one. It must call [`run_if_asked`](crate::guardian::run_if_asked) first thing in its `main`.
    Program {
        /// Absolute path.
        path: PathBuf,
        /// Its arguments.
        arguments: Vec<OsString>,
    },
}

impl GuardianProgram {
    /// Where an installed guardian is looked for.
    pub const PLACES: [&str; 5] = [
        "/usr/libexec/disksnap/disksnap-guardian",
        "/usr/lib/disksnap/disksnap-guardian",
        "/usr/local/libexec/disksnap/disksnap-guardian",
        "/usr/bin/disksnap",
        "/usr/local/bin/disksnap",
    ];

    fn command(&self) -> Result<std::process::Command> {
        match self {
            Self::Program { path, arguments } => {
                let mut command = std::process::Command::new(path);
                command.args(arguments);
                Ok(command)
            }
            // The link leads to the running program even when its file was replaced meanwhile.
            Self::Automatic if guardian::is_offered() => Ok(std::process::Command::new("/proc/self/exe")),
            Self::Automatic => {
                let found = Self::PLACES.iter().find(|path| is_program(Path::new(path)));
                found.map(std::process::Command::new).ok_or_else(|| {
                    Error::new(
                        ErrorKind::Unavailable,
                        "there is no program to guard the guest with, so it is neither paused nor frozen",
                    )
                    .hint(format!(
                        "A program that embeds disksnap calls disksnap_hypervisor::guardian::run_if_asked() first \
                         thing in main, names one with GuardianProgram::Program, or installs one as any of {}.",
                        Self::PLACES.join(", ")
                    ))
                })
            }
        }
    }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Tells the guardians that are armed of every connection that is made meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Lifeline(Mutex<Vec<Weak<UnixStream>>>);

impl Lifeline {
    pub(crate) fn connected(&self, end: End, descriptor: &OwnedFd) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain(|socket| socket.strong_count() > 0);
        for socket in sockets.iter().filter_map(Weak::upgrade) {
            if let Err(error) = order::send(&*socket, &Order::Connected(end), Some(descriptor.as_fd())) {
                tracing::warn!(%error, ?end, "the guardian does not know of a new connection");
            }
        }
    }

    fn add(&self, socket: &Arc<UnixStream>) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.push(Arc::downgrade(socket));
    }
}

/// A guardian that is armed.
#[derive(Debug)]
pub(crate) struct ArmedGuardian {
    socket: Arc<UnixStream>,
    patience: Duration,
    note: Option<PathBuf>,
}

/// Starts a guardian, gives it the connections there are, and waits until it says that it is armed. On an error the
/// plan's note is taken away.
pub(crate) async fn arm(
    program: &GuardianProgram,
    plan: Plan,
    connections: Vec<(End, OwnedFd)>,
    lifeline: &Lifeline,
    patience: Duration,
) -> Result<ArmedGuardian> {
    let note = plan.note.clone();
    let started = start_and_arm(program, plan, connections, lifeline, patience).await;
    if let (Err(_), Some(note)) = (&started, note) {
        still::take(&note);
    }
    started
}

async fn start_and_arm(
    program: &GuardianProgram,
    plan: Plan,
    connections: Vec<(End, OwnedFd)>,
    lifeline: &Lifeline,
    patience: Duration,
) -> Result<ArmedGuardian> {
    let command = program.command()?;
    let name = command.get_program().to_owned();
    let note = plan.note.clone();
    let armed = async {
        let socket = Arc::new(faults::around("guardian", "start", || start(command))?);
        // From here on it is told of new connections; those there are come first.
        lifeline.add(&socket);
        for (end, descriptor) in connections {
            order::send(&*socket, &Order::Connected(end), Some(descriptor.as_fd())).map_err(cannot_start)?;
        }
        faults::before("guardian", "arm");
        order::send(&*socket, &Order::Arm(plan), None).map_err(cannot_start)?;
        let armed = ArmedGuardian {
            socket,
            patience,
            note,
        };
        let report = armed.report().await?;
        faults::after("guardian", "arm");
        match report {
            Report::Armed => Ok(armed),
            report => {
                let what = format!("the guardian answered {report:?} when armed");
                Err(Error::new(ErrorKind::Protocol, what))
            }
        }
    };
    let hint = "Nothing was paused or frozen. Does the program's main call run_if_asked first thing?";
    armed
        .await
        .map_err(|error| error.with("program", name.display()).hint(hint))
}

/// Starts the process; our end of its socket.
fn start(mut command: std::process::Command) -> Result<UnixStream> {
    let (ours, its) = order::pair().map_err(cannot_start)?;
    rustix::io::ioctl_fionbio(&ours, true).map_err(cannot_start)?;
    command.arg0("disksnap-guardian").env(ASKED, "1").current_dir("/");
    for variable in faults::VARIABLES {
        command.env_remove(variable);
    }
    command
        .stdin(Stdio::from(its))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().map_err(cannot_start)?;
    // The command holds the guardian's end of the socket: as long as it is open here, its death would go unseen.
    drop(command);
    let reaper = std::thread::Builder::new().name("guardian-reaper".into());
    // Without the thread the guardian stays a zombie until this process ends.
    let _ = reaper.spawn(move || child.wait());
    UnixStream::from_std(std::os::unix::net::UnixStream::from(ours)).map_err(cannot_start)
}

fn cannot_start(error: impl Into<io::Error>) -> Error {
    Error::io("the guardian cannot be started", error.into())
}

impl ArmedGuardian {
    async fn report(&self) -> Result<Report> {
        let receive = self.socket.async_io(Interest::READABLE, || {
            order::receive::<Report>(&*self.socket).map_err(io::Error::from)
        });
        match tokio::time::timeout(self.patience, receive).await {
            Ok(Ok(Some((report, _)))) => Ok(report),
            Ok(Ok(None)) => Err(Error::new(ErrorKind::Unavailable, "the guardian has died")),
            Ok(Err(error)) if error.raw_os_error() == Some(Errno::CONNRESET.raw_os_error()) => {
                Err(Error::new(ErrorKind::Unavailable, "the guardian has died"))
            }
            Ok(Err(error)) => Err(Error::io("the guardian cannot be heard", error)),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!("the guardian did not answer for {} ms", self.patience.as_millis()),
            )),
        }
    }
}

#[async_trait]
impl Guard for ArmedGuardian {
    async fn disarm(self: Box<Self>) -> Result<Verdict> {
        let unsure = |error: Error| {
            error.leaving(Effect::Unknown).hint(
                "Whether the guest stood still throughout the window is not known; take the snapshot again.",
            )
        };
        // The guest runs, whatever becomes of the guardian.
        if let Some(note) = &self.note {
            still::take(note);
        }
        // A guardian that has died takes no order; why it has is not known.
        let disarmed = faults::around("guardian", "disarm", || {
            order::send(&*self.socket, &Order::Disarm, None)
        });
        disarmed.map_err(|error| {
            unsure(Error::new(ErrorKind::Unavailable, "the guardian has died").because(error))
        })?;
        match self.report().await.map_err(unsure)? {
            Report::Quiet => Ok(Verdict::Quiet),
            Report::Fired => Ok(Verdict::Fired),
            Report::Failed(why) => Err(unsure(Error::new(
                ErrorKind::Timeout,
                format!("the window was open for too long, and the guardian could not close it: {why}"),
            ))),
            Report::Armed => Err(unsure(Error::new(
                ErrorKind::Protocol,
                "the guardian is armed twice",
            ))),
        }
    }
}
