//! QEMU's jobs, followed by asking: a provider has no event stream, and asking survives a reconnect.

use std::time::{Duration, Instant};

use disksnap_core::{Command, Error, ErrorKind, Host, Result};
use serde::Deserialize;
use serde_json::json;

/// One job as `query-jobs` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Job {
    pub(crate) id: String,
    /// `created`, `running`, `ready`, `pending`, `concluded`, …
    pub(crate) status: String,
    /// Bytes done.
    #[serde(default)]
    pub(crate) current_progress: u64,
    /// Bytes in all, as known now.
    #[serde(default)]
    pub(crate) total_progress: u64,
    #[serde(default)]
    pub(crate) error: Option<String>,
}

impl Job {
    /// Whether it has ended, well or badly.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "concluded" | "null")
    }
}

/// How long a job of ours may take to end once it should.
const PATIENCE: Duration = Duration::from_secs(30);

/// The job of this id (`query-jobs`).
pub(crate) async fn find(host: &dyn Host, id: &str) -> Result<Option<Job>> {
    let reply = host.monitor(Command::bare("query-jobs")).await?;
    let jobs: Vec<Job> = serde_json::from_value(reply).map_err(|e| {
        Error::new(
            ErrorKind::Protocol,
            "query-jobs answered something that is no list of jobs",
        )
        .because(e)
    })?;
    Ok(jobs.into_iter().find(|job| job.id == id))
}

/// Asks until `done` says so of the job, or it does not exist any more (`None`).
pub(crate) async fn wait(host: &dyn Host, id: &str, done: impl Fn(&Job) -> bool) -> Result<Option<Job>> {
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
pub(crate) async fn tell(host: &dyn Host, id: &str, command: &str) -> Result<()> {
    host.monitor(Command::new(command, json!({ "id": id })))
        .await
        .map(drop)
}

/// Ends a job, whatever it does, and forgets it; says how it had ended. Idempotent.
pub(crate) async fn end(host: &dyn Host, id: &str) -> Result<Option<Job>> {
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
