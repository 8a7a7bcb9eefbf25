//! QEMU's jobs, followed by asking: a provider has no event stream, and asking survives a reconnect.

use std::time::{Duration, Instant};

use disksnap_core::{Command, Error, ErrorKind, Host, Result};
use serde::Deserialize;
use serde_json::json;

/// One job as `query-jobs` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Job {
    pub(crate) id: String,
    /// `created`, `running`, `ready`, `concluded`, …
    pub(crate) status: String,
    #[serde(default)]
    pub(crate) error: Option<String>,
}

impl Job {
    /// Whether it has ended, well or badly.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "concluded" | "null")
    }
}

/// How long a job of ours may take to end once it should: reading a little, or cancelling.
const PATIENCE: Duration = Duration::from_secs(30);

/// All jobs (`query-jobs`).
pub(crate) async fn all(host: &dyn Host) -> Result<Vec<Job>> {
    let reply = host.monitor(Command::bare("query-jobs")).await?;
    serde_json::from_value(reply).map_err(|e| {
        Error::new(
            ErrorKind::Protocol,
            "query-jobs answered something that is no list of jobs",
        )
        .because(e)
    })
}

/// Asks until `done` says so of the job, or it does not exist any more (`None`).
pub(crate) async fn wait(host: &dyn Host, id: &str, done: impl Fn(&Job) -> bool) -> Result<Option<Job>> {
    let (since, mut pause) = (Instant::now(), Duration::from_micros(500));
    loop {
        let job = all(host).await?.into_iter().find(|job| job.id == id);
        match job {
            Some(job) if !done(&job) => {}
            other => return Ok(other),
        }
        if since.elapsed() > PATIENCE {
            return Err(
                Error::new(ErrorKind::Timeout, format!("the job {id} does not end"))
                    .hint("See `query-jobs` in the monitor; the storage may hang."),
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Ends a job, whatever it does, and forgets it. Idempotent.
pub(crate) async fn end(host: &dyn Host, job: &Job) -> Result<()> {
    let id = json!({ "id": job.id });
    if !job.has_ended() {
        // Refused when it ends by itself at this very moment; then the wait sees that.
        let cancelled = host.monitor(Command::new("job-cancel", id.clone())).await;
        if wait(host, &job.id, Job::has_ended).await?.is_none() {
            return Ok(());
        }
        drop(cancelled);
    }
    host.monitor(Command::new("job-dismiss", id)).await.map(|_| ())
}
