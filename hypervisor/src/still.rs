//! What is about to stand still because of us, written down where the next process finds it.
//!
//! The guardian lets the guest go when its parent cannot. Where both are dead nobody is left who knows that it was us
//! who paused the guest or froze its file systems, and not somebody who wants it so. Hence the note: it is left before
//! the guardian is armed, and taken away by whoever has let the guest go.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use disksnap_core::{Command, Domain, Error, Result, faults};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::agent::Agent;
use crate::order::Plan;
use crate::qmp::{Session, Timeouts};

/// What a note's file name ends with.
const SUFFIX: &str = ".still";

/// What a guardian is about to watch over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    /// The monitor's socket, and which run of the hypervisor answers there: another one has nothing standing still.
    monitor: PathBuf,
    instance: Option<String>,
    plan: Plan,
}

/// What the names of a domain's notes begin with.
fn prefix(domain: &Domain) -> String {
    let uuid = domain.id.uuid.simple().to_string();
    format!("{}.", &uuid[..12])
}

/// Writes a note of what this plan undoes, and names it in the plan. Where that cannot be done the guardian alone
/// remains, as it does on a file system that is full.
pub(crate) async fn leave(run: &Path, domain: &Domain, session: &Session, plan: &mut Plan) {
    let path = run.join(format!("{}{}{SUFFIX}", prefix(domain), Uuid::new_v4().simple()));
    let connection = session.connection().await;
    let note = Note {
        monitor: session.path().to_owned(),
        instance: connection.ok().and_then(|connection| connection.peer.instance()),
        plan: plan.clone(),
    };
    match faults::around("file", "write note", || write(&path, &note)) {
        Ok(()) => plan.note = Some(path),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "what is paused cannot be written down");
            // A part of it is of no use.
            take(&path);
        }
    }
}

/// Not flushed: a host that loses its power loses the guest too.
fn write(path: &Path, note: &Note) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(serde_json::to_string(note)?.as_bytes())
}

/// Takes a note away.
pub(crate) fn take(path: &Path) {
    match faults::around("file", "remove note", || fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "a note of what was paused stays behind");
        }
        _ => {}
    }
}

/// The notes that there are of a domain. What cannot be read was never acted upon, and is taken away.
fn found(run: &Path, domain: &Domain) -> io::Result<Vec<(PathBuf, Note)>> {
    let prefix = prefix(domain);
    let mut notes = Vec::new();
    for entry in fs::read_dir(run)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(&prefix) || !name.ends_with(SUFFIX) {
            continue;
        }
        match fs::read(entry.path()).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(note)) => notes.push((entry.path(), note)),
            Ok(Err(_)) => take(&entry.path()),
            // Its guardian has just taken it away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(notes)
}

/// The connections of whoever undoes what is noted, used where they lead to the place that a note names.
pub(crate) struct Ways<'a> {
    pub(crate) session: Option<&'a Session>,
    pub(crate) agent: Option<&'a Agent>,
    pub(crate) timeouts: Timeouts,
}

/// Undoes what the notes of a domain tell, as far as the run of the hypervisor that they were written for goes on.
pub(crate) async fn undo(run: &Path, domain: &Domain, ways: &Ways<'_>) -> Result<()> {
    let notes = found(run, domain).map_err(|error| {
        Error::io("cannot see whether the guest was left standing still", error).with("path", run.display())
    })?;
    for (path, note) in notes {
        if ways.lead_to(&note).await? {
            undo_one(&note.plan, ways).await.map_err(|error| {
                error.during("let the guest go").hint(format!(
                    "A run that was killed may have left the guest frozen: start its agent or thaw it from inside \
                     (fsfreeze -u), then run disksnap recover. Where the guest was reset meanwhile, remove {}.",
                    path.display()
                ))
            })?;
        }
        take(&path);
    }
    Ok(())
}

/// In the guardian's order: a paused guest's agent cannot answer, so the guest runs first.
async fn undo_one(plan: &Plan, ways: &Ways<'_>) -> Result<()> {
    if let Some((path, commands)) = &plan.release {
        let fresh = Session::new(path, ways.timeouts);
        // Each is refused where there is nothing to let go.
        ways.session_to(path, &fresh)
            .execute_each(commands.clone())
            .await?;
    }
    if let Some(path) = &plan.resume {
        let fresh = Session::new(path, ways.timeouts);
        resume(ways.session_to(path, &fresh)).await?;
    }
    if let Some(path) = &plan.thaw {
        let fresh = Agent::new(path.clone(), ways.timeouts, Box::new(|_| {}));
        let known = ways.agent.filter(|agent| agent.path() == path);
        known.unwrap_or(&fresh).thaw().await?;
    }
    Ok(())
}

/// `cont`, if the guest is paused; what stands for another reason is left alone.
async fn resume(session: &Session) -> Result<()> {
    let status = session.execute(Command::bare("query-status")).await?;
    if status["status"] == "paused" {
        session.execute(Command::bare("cont")).await?;
    }
    Ok(())
}

impl<'a> Ways<'a> {
    /// Whether the hypervisor still runs that a note was written for.
    async fn lead_to(&self, note: &Note) -> Result<bool> {
        let fresh = Session::new(&note.monitor, self.timeouts);
        match self.session_to(&note.monitor, &fresh).connection().await {
            Ok(connection) => Ok(connection.peer.instance() == note.instance),
            Err(failure) if failure.nobody => Ok(false),
            Err(failure) => Err(failure.error),
        }
    }

    /// A monitor serves one client: the connection that there is, where it leads to this place.
    fn session_to<'s>(&self, path: &Path, fresh: &'s Session) -> &'s Session
    where
        'a: 's,
    {
        self.session
            .filter(|session| session.path() == path)
            .unwrap_or(fresh)
    }
}
