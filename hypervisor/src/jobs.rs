//! QEMU's jobs, followed by asking: a provider has no event stream, and asking survives a reconnect.
//!
//! A job is known by the id that it was started with. Whoever wants to see how it ended starts it with
//! `auto-dismiss: false`, and [`end`]s it.

use std::time::{Duration, Instant};

use disksnap_core::{Command, Error, ErrorKind, Host, Progress, Result};
use serde::Deserialize;
use serde_json::json;

/// One job (`JobInfo` in QEMU's QAPI).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `created`, `running`, `ready`, `pending`, `concluded`, …
    pub status: String,
    /// Bytes done.
    #[serde(default)]
    pub current_progress: u64,
    /// Bytes in all, as known now.
    #[serde(default)]
    pub total_progress: u64,
    /// Why it has failed, in QEMU's words.
    #[serde(default)]
    pub error: Option<String>,
}

impl Job {
    /// Whether it has ended, well or badly.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "concluded" | "null")
    }

    /// How far it is, where these are the states in which it waits to be told to end.
    #[must_use]
    pub fn progress(self, waits: &[&str]) -> Progress {
        let ended = self.has_ended();
        match self.error {
            Some(error) if ended => Progress::Failed(error),
            _ if ended => Progress::Finished,
            _ if waits.contains(&self.status.as_str()) => Progress::Ready,
            _ => Progress::Running {
                done: self.current_progress,
                total: self.total_progress.max(self.current_progress),
            },
        }
    }
}

/// How long a job may stand still where it should come to an end.
const PATIENCE: Duration = Duration::from_secs(30);

/// All jobs (`query-jobs`).
///
/// # Errors
/// The monitor's; `Protocol` when the answer is no list of jobs.
pub async fn all(host: &dyn Host) -> Result<Vec<Job>> {
    let reply = host.monitor(Command::bare("query-jobs")).await?;
    serde_json::from_value(reply).map_err(|e| {
        Error::new(
            ErrorKind::Protocol,
            "query-jobs answered something that is no list of jobs",
        )
        .because(e)
    })
}

/// The job of this id.
///
/// # Errors
/// As [`all`].
pub async fn find(host: &dyn Host, id: &str) -> Result<Option<Job>> {
    let jobs = all(host).await?;
    Ok(jobs.into_iter().find(|job| job.id == id))
}

/// Asks until `done` says so of the job, or it does not exist any more (`None`).
///
/// # Errors
/// As [`all`]; `Timeout` when it makes no progress for half a minute.
pub async fn wait(host: &dyn Host, id: &str, done: impl Fn(&Job) -> bool) -> Result<Option<Job>> {
    let (mut since, mut pause, mut seen) = (Instant::now(), Duration::from_micros(300), 0);
    loop {
        let job = find(host, id).await?;
        match job {
            Some(job) if !done(&job) => {
                if job.current_progress != seen {
                    (since, seen) = (Instant::now(), job.current_progress);
                }
            }
            other => return Ok(other),
        }
        if since.elapsed() > PATIENCE {
            return Err(
                Error::new(ErrorKind::Timeout, format!("the job {id} does not go on"))
                    .hint("See `query-jobs` in the monitor; the storage may hang."),
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// One command about a job (`job-complete`, `job-finalize`, …).
///
/// # Errors
/// The monitor's.
pub async fn tell(host: &dyn Host, id: &str, command: &str) -> Result<()> {
    host.monitor(Command::new(command, json!({ "id": id })))
        .await
        .map(drop)
}

/// Ends a job, whatever it does, and forgets it; says how it had ended. Idempotent.
///
/// # Errors
/// As [`wait`].
pub async fn end(host: &dyn Host, id: &str) -> Result<Option<Job>> {
    let Some(job) = find(host, id).await? else {
        return Ok(None);
    };
    let ended = if job.has_ended() {
        Some(job)
    } else {
        // Refused when it ends by itself at this very moment; then the wait sees that.
        let cancelled = tell(host, id, "job-cancel").await;
        let ended = wait(host, id, Job::has_ended).await?;
        drop(cancelled);
        ended
    };
    if ended.is_some() {
        tell(host, id, "job-dismiss").await?;
    }
    Ok(ended)
}
