//! The place where one domain runs: core's `Host` and `Control` over a QMP session and a guest agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Command, Control, Disk, DiskNode, Domain, Error, ErrorKind, Freeze, Guard, Host, Hotplug, Lend,
    NbdServer, Owner, Result, RunState, ServeNode, Sockets, Watch,
};
use serde_json::Value;

use crate::agent::Agent;
use crate::connector::Settings;
use crate::errors;
use crate::flush;
use crate::guard::{self, Lifeline};
use crate::nbd_server::NbdServerControl;
use crate::order::{End, Plan};
use crate::qmp::{OnConnect, Session, Timeouts};
use crate::still;

/// The connections to one domain.
#[derive(Debug)]
pub(crate) struct Links {
    session: Option<Session>,
    agent: Option<Agent>,
    lifeline: Arc<Lifeline>,
}

impl Links {
    /// `clients` is where the domain's NBD server listens when nobody says otherwise.
    pub(crate) fn new(sockets: &Sockets, clients: &Path, timeouts: Timeouts) -> Arc<Self> {
        let lifeline = Arc::<Lifeline>::default();
        // The guardian connects to the same paths from another working directory.
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let hook = |end| -> OnConnect {
            let lifeline = Arc::clone(&lifeline);
            Box::new(move |descriptor| lifeline.connected(end, descriptor))
        };
        let clients = absolute(&clients.to_owned());
        let session =
            |path| Session::with_hook(absolute(path), timeouts, hook(End::Monitor)).with_clients_at(&clients);
        let agent = |path| Agent::new(absolute(path), timeouts, hook(End::Agent));
        Arc::new(Self {
            session: sockets.monitor.as_ref().map(session),
            agent: sockets.agent.as_ref().map(agent),
            lifeline,
        })
    }
}

/// How long a hypervisor is left alone whose job nobody drives any more; the end of a job takes milliseconds.
const REST: Duration = Duration::from_millis(500);

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

    pub(crate) fn nbd(&self) -> Result<NbdServerControl<'_>> {
        Ok(NbdServerControl::new(
            self.session()?,
            &self.settings.paths.run,
            self.settings.timeouts.command,
        ))
    }

    async fn execute(&self, command: Command) -> Result<Value> {
        let session = self.session()?;
        let again = is_query(&command).then(|| command.clone());
        let result = match (session.execute(command).await, again) {
            (Err(error), Some(query)) if error.kind() == ErrorKind::Unavailable => {
                session.execute(query).await
            }
            (result, _) => result,
        };
        result.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn execute_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let session = self.session()?;
        let again = commands.iter().all(is_query).then(|| commands.clone());
        let result = match (session.execute_each(commands).await, again) {
            (Err(error), Some(queries)) if error.kind() == ErrorKind::Unavailable => {
                session.execute_each(queries).await
            }
            (result, _) => result,
        };
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
        self.execute_each(commands).await
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

/// Whether a command changes nothing, so that it may be asked again when the connection broke under it.
fn is_query(command: &Command) -> bool {
    !errors::has_effect(&command.execute)
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
    async fn guard(&self, watch: Watch) -> Result<Box<dyn Guard>> {
        let timeouts = self.settings.timeouts;
        let mut connections = Vec::new();
        let mut plan = Plan {
            deadline_ms: millis(watch.deadline),
            // It must have given up before the parent, who waits for its word, does.
            patience_ms: millis(timeouts.guardian) * 3 / 4,
            ..Plan::default()
        };
        if watch.resume || !watch.release.is_empty() {
            let session = self.session()?;
            let connection = session
                .connection()
                .await
                .map_err(|f| f.error.with("domain", &self.domain.id))?;
            let duplicate = connection.descriptor.try_clone();
            let duplicate =
                duplicate.map_err(|error| Error::io("cannot duplicate the monitor's descriptor", error))?;
            connections.push((End::Monitor, duplicate));
            plan.clients = connection.peer.pid.map(|pid| (pid, self.socket.clone()));
            let path = || session.path().to_owned();
            plan.resume = watch.resume.then(path);
            plan.release = (!watch.release.is_empty()).then(|| (path(), watch.release));
        }
        if watch.thaw
            && let Some(agent) = &self.links.agent
        {
            connections.extend(
                agent
                    .descriptor()
                    .await
                    .map(|descriptor| (End::Agent, descriptor)),
            );
            plan.thaw = Some(agent.path().to_owned());
        }
        if let Some(session) = &self.links.session {
            still::leave(&self.settings.paths.run, &self.domain, session, &mut plan).await;
        }
        let program = &self.settings.guardian;
        let armed = guard::arm(
            program,
            plan,
            connections,
            &self.links.lifeline,
            timeouts.guardian,
        )
        .await;
        Ok(Box::new(
            armed.map_err(|error| error.with("domain", &self.domain.id))?,
        ))
    }

    async fn freeze(&self, mountpoints: &[String], deadline: Duration) -> Result<Freeze> {
        let agent = self.links.agent.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Unavailable, "nobody said where the guest agent is").hint(
                "Name the socket of its channel with --agent, or with <disksnap:agent path='…'/> in the <metadata> of \
                 the domain's document.",
            )
        });
        let frozen = match agent {
            Ok(agent) => agent.freeze(mountpoints, deadline).await,
            Err(error) => Err(error),
        };
        frozen.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn thaw(&self) -> Result<()> {
        match &self.links.agent {
            Some(agent) => agent
                .thaw()
                .await
                .map_err(|error| error.with("domain", &self.domain.id)),
            // Without an agent nothing was frozen.
            None => Ok(()),
        }
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

    async fn let_go(&self) -> Result<()> {
        let ways = still::Ways {
            session: self.links.session.as_ref(),
            agent: self.links.agent.as_ref(),
            timeouts: self.settings.timeouts,
        };
        let undone = still::undo(&self.settings.paths.run, &self.domain, &ways).await;
        undone.map_err(|error| error.with("domain", &self.domain.id))
    }

    /// QEMU 10.0 ends in a segmentation fault when it is asked for its nodes (`query-named-block-nodes`) in the middle of a
    /// stream's end, and no state of the job tells the middle from the wait before it: so it is left alone for a moment.
    async fn come_to_rest(&self) -> Result<()> {
        if self.state().await?.is_active() {
            tokio::time::sleep(REST).await;
        }
        Ok(())
    }

    async fn flush_nodes(&self, disks: &[&Disk]) -> Result<Vec<DiskNode>> {
        let nodes = flush::nodes(self, disks).await;
        nodes.map_err(|error| error.with("domain", &self.domain.id))
    }

    async fn flush(&self, nodes: &[DiskNode]) -> Result<()> {
        let flushed = flush::verify(self, nodes).await;
        flushed.map_err(|error| error.with("domain", &self.domain.id))
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

    fn hotplug(&self) -> Option<&dyn Hotplug> {
        Some(self)
    }

    fn lends(&self) -> Option<&dyn Lend> {
        Some(self)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
