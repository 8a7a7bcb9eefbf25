//! The place where one domain runs: core's `Host` and `Control` over a QMP session and a guest agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Command, Control, Domain, Error, ErrorKind, Freeze, Guard, Host, NbdServer, Owner, Result, RunState,
    ServeNode, Sockets, Watch,
};
use serde_json::Value;

use crate::connector::Settings;
use crate::nbd_server::NbdServerControl;
use crate::qmp::{Session, Timeouts};

/// The connections to one domain.
#[derive(Debug)]
pub(crate) struct Links {
    pub(crate) session: Option<Session>,
}

impl Links {
    pub(crate) fn new(sockets: &Sockets, timeouts: Timeouts) -> Arc<Self> {
        Arc::new(Self {
            session: sockets.monitor.as_ref().map(|path| Session::new(path, timeouts)),
        })
    }
}

/// One domain that a QEMU runs, or none: a domain that is off has a control too.
///
/// A domain that names no monitor counts as off.
#[derive(Debug)]
pub struct QemuControl {
    domain: Domain,
    settings: Arc<Settings>,
    links: Arc<Links>,
    socket: PathBuf,
}

impl QemuControl {
    pub(crate) fn new(domain: Domain, settings: Arc<Settings>, links: Arc<Links>, socket: PathBuf) -> Self {
        Self {
            domain,
            settings,
            links,
            socket,
        }
    }

    /// The session with its monitor, for what [`Host`] does not offer: events.
    ///
    /// # Errors
    /// `Unavailable` when the domain names no monitor.
    pub fn session(&self) -> Result<&Session> {
        self.links.session.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "nobody said where the domain's monitor is")
                .with("domain", &self.domain.id)
                .hint(
                    "Name its QMP socket with --monitor, or with <disksnap:monitor path='…'/> in the <metadata> of \
                     its document.",
                )
        })
    }

    fn nbd(&self) -> Result<NbdServerControl<'_>> {
        Ok(NbdServerControl {
            session: self.session()?,
            run: &self.settings.paths.run,
            patience: self.settings.timeouts.command,
        })
    }

    async fn execute(&self, command: Command) -> Result<Value> {
        let result = self.session()?.execute(command).await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }
}

#[async_trait]
impl Host for QemuControl {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    async fn state(&self) -> Result<RunState> {
        let Some(session) = &self.links.session else {
            return Ok(RunState::Off);
        };
        match state(session).await {
            // The connection broke just then: look again on a new one, queries change nothing.
            Err(error) if error.kind() == ErrorKind::Unavailable => state(session).await,
            result => result,
        }
        .map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn monitor(&self, command: Command) -> Result<Value> {
        self.execute(command).await
    }

    async fn monitor_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let result = self.session()?.execute_each(commands).await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    fn image_dir(&self) -> &Path {
        &self.settings.paths.images
    }

    async fn image_owner(&self) -> Result<Option<Owner>> {
        let Some(session) = &self.links.session else {
            return Ok(None);
        };
        match session.connection().await {
            Ok(connection) => {
                let ours = rustix::process::geteuid().as_raw();
                Ok(connection.peer.owner().filter(|owner| owner.uid != ours))
            }
            Err(failure) if failure.nobody => Ok(None),
            Err(failure) => Err(failure.error.with("domain", &self.domain.id)),
        }
    }
}

/// The run state; an outgoing migration counts although the guest still runs.
async fn state(session: &Session) -> Result<RunState> {
    match session.connection().await {
        Ok(_) => {}
        Err(failure) if failure.nobody => return Ok(RunState::Off),
        Err(failure) => return Err(failure.error),
    }
    let ask = vec![Command::bare("query-status"), Command::bare("query-migrate")];
    let mut answers = session.execute_each(ask).await?.into_iter();
    let (Some(status), Some(migration)) = (answers.next(), answers.next()) else {
        return Err(Error::new(ErrorKind::Internal, "an answer was lost"));
    };
    let status = match status {
        Ok(status) => status,
        // qemu-storage-daemon has no guest, and no such command.
        Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(RunState::Storage),
        Err(error) => return Err(error),
    };
    let word = |value: &Value| value.get("status").and_then(Value::as_str).map(str::to_owned);
    let migration = migration.ok().as_ref().and_then(word);
    let status = word(&status).ok_or_else(|| {
        Error::new(
            ErrorKind::Protocol,
            "the monitor does not say in which state the guest is",
        )
        .with("command", "query-status")
    })?;
    Ok(run_state(status, migration))
}

/// QEMU's `RunState` and `MigrationStatus` (qapi/run-state.json, qapi/migration.json) in core's words.
fn run_state(status: String, migration: Option<String>) -> RunState {
    let over = |word: &str| matches!(word, "none" | "completed" | "cancelled" | "failed");
    match (status.as_str(), migration) {
        ("inmigrate" | "finish-migrate" | "postmigrate" | "colo", _) => RunState::Migrating(status),
        (_, Some(word)) if !over(&word) => RunState::Migrating(word),
        ("running", _) => RunState::Running,
        _ => RunState::Stopped(status),
    }
}

#[async_trait]
impl Control for QemuControl {
    async fn guard(&self, _watch: Watch) -> Result<Box<dyn Guard>> {
        Err(Error::new(ErrorKind::Unsupported, "no guardian yet"))
    }

    async fn freeze(&self, _deadline: Duration) -> Result<Freeze> {
        Err(Error::new(ErrorKind::Unavailable, "no guest agent yet"))
    }

    async fn thaw(&self) -> Result<()> {
        Ok(())
    }

    async fn pause(&self) -> Result<()> {
        match self.execute(Command::bare("stop")).await {
            Ok(_) => Ok(()),
            // It may still be carried out: a `cont` right behind it lets the guest run whatever happens to the `stop`.
            Err(error) if error.effect() == disksnap_core::Effect::Unknown => match self.resume().await {
                Ok(()) => Err(error.leaving(disksnap_core::Effect::RolledBack)),
                Err(failure) => Err(error.rollback_failed(vec![failure.during("resume")])),
            },
            Err(error) => Err(error),
        }
    }

    async fn resume(&self) -> Result<()> {
        self.execute(Command::bare("cont")).await.map(drop)
    }

    async fn instance(&self) -> Result<Option<String>> {
        let Some(session) = &self.links.session else {
            return Ok(None);
        };
        match session.connection().await {
            Ok(connection) => Ok(connection.peer.instance()),
            Err(failure) if failure.nobody => Ok(None),
            Err(failure) => Err(failure.error.with("domain", &self.domain.id)),
        }
    }

    fn default_socket(&self) -> PathBuf {
        self.socket.clone()
    }

    async fn start_server(&self, server: &NbdServer) -> Result<()> {
        let result = self.nbd()?.start(server).await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn stop_server(&self) -> Result<()> {
        let result = self.nbd()?.stop().await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn serve(&self, node: &ServeNode) -> Result<()> {
        let result = self.nbd()?.serve(node).await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn unserve(&self, id: &str) -> Result<()> {
        let result = self.nbd()?.unserve(id).await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn served(&self) -> Result<Vec<String>> {
        let result = self.nbd()?.served().await;
        result.map_err(|error| error.with("domain", &self.domain.id))
    }
}
