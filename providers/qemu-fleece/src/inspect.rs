//! Whether a fleece can be trusted. QEMU sends no event when a snapshot breaks, so one byte range is read.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering};

use disksnap_core::{Command, Health, Host, Result, RunState};
use disksnap_hypervisor::jobs;
use serde_json::json;

use crate::build::Fleece;
use crate::choice::Choice;
use crate::image;
use crate::names::Names;
use crate::settings::Way;

/// How much is read: enough to be a whole cluster of any image format in use.
const LOOK: u64 = 64 << 10;

/// How often an inspection is begun whose job somebody takes away.
const TRIES: usize = 3;

/// What tells the inspections of this process from another's.
static OURS: LazyLock<u8> = LazyLock::new(|| uuid::Uuid::new_v4().as_bytes()[0]);
/// What tells the inspections of this process apart.
static COUNT: AtomicU8 = AtomicU8::new(0);

/// Looks at the real thing.
pub(crate) async fn inspect(host: &dyn Host, fleece: &Fleece) -> Result<Health> {
    if host.state().await? == RunState::Off {
        return Ok(Health::Gone(
            "the QEMU that held it has ended, and a fleece ends with it".to_owned(),
        ));
    }
    let names = fleece.names();
    let nodes = nodes(host).await?;
    if !nodes.contains(&names.filter()) {
        return Ok(Health::Gone(
            "the QEMU that held it was restarted, or its nodes were removed".to_owned(),
        ));
    }
    let Choice {
        image,
        way,
        encrypted,
        size,
        ..
    } = &fleece.choice;
    if image::is_cut(&image.path, *way, *encrypted, *size) {
        return Ok(Health::Broken(format!(
            "its fleece image was cut off, and what was kept there is lost: {}",
            image.path.display()
        )));
    }
    if fleece.choice.way != Way::Filter
        && let Some(reason) = job_failure(host, &names).await?
    {
        return Ok(Health::Broken(reason));
    }
    if fleece.choice.way == Way::Classic {
        return Ok(Health::Active);
    }
    if !nodes.contains(&names.access()) {
        return Ok(Health::Broken(
            "the node that it is read through was removed".to_owned(),
        ));
    }
    if nodes.iter().any(|node| is_left(&names, node)) {
        remove_left(host, &names, &nodes).await?;
    }
    for _ in 0..TRIES {
        if let Some(health) = look(host, &names, fleece.choice.size.min(LOOK)).await? {
            return Ok(health);
        }
    }
    Ok(Health::Broken(
        "its data could not be looked at: the reading job is taken away each time".to_owned(),
    ))
}

/// The names of all nodes.
async fn nodes(host: &dyn Host) -> Result<Vec<String>> {
    let nodes = host
        .monitor(Command::new("query-named-block-nodes", json!({ "flat": true })))
        .await?;
    let nodes = nodes.as_array().into_iter().flatten();
    Ok(nodes
        .filter_map(|node| node["node-name"].as_str().map(str::to_owned))
        .collect())
}

/// Whether a node or job is what an inspection of another process has left. A monitor has one client at a time: that one is no
/// more at it, and if it is by another monitor, it looks again.
fn is_left(names: &Names, name: &str) -> bool {
    let rest = name.strip_prefix(&names.prefix_of_probes());
    rest.is_some_and(|rest| rest.get(1..3) != Some(&format!("{:02x}", *OURS)))
}

/// Ends what a killed inspection was about: its job would hold the snapshot, and read it, for ever.
async fn remove_left(host: &dyn Host, names: &Names, nodes: &[String]) -> Result<()> {
    for job in jobs::all(host).await? {
        if is_left(names, &job.id) {
            jobs::end(host, &job.id).await?;
        }
    }
    let left = nodes.iter().filter(|node| is_left(names, node));
    let delete = |node: &String| Command::new("blockdev-del", json!({ "node-name": node }));
    // One that is gone already is as good.
    host.monitor_each(left.map(delete).collect()).await.map(drop)
}

async fn job_failure(host: &dyn Host, names: &Names) -> Result<Option<String>> {
    Ok(match jobs::find(host, &names.job()).await? {
        None => Some("its backup job is gone".to_owned()),
        Some(job) if job.has_ended() => Some(format!(
            "its backup job has ended: {}",
            job.error.as_deref().unwrap_or("no error told")
        )),
        Some(_) => None,
    })
}

/// Reads the beginning of the snapshot with a job of its own: that works in every QEMU, needs no NBD
/// server, and sees what a reader would see. None where somebody took the job away.
async fn look(host: &dyn Host, names: &Names, size: u64) -> Result<Option<Health>> {
    let salt = u16::from_be_bytes([*OURS, COUNT.fetch_add(1, Ordering::Relaxed)]);
    let (window, sink, job) = (
        names.probe('w', salt),
        names.probe('n', salt),
        names.probe('j', salt),
    );
    let begin = vec![
        Command::new(
            "blockdev-add",
            json!({ "driver": "raw", "node-name": window, "read-only": true, "size": size, "file": names.access() }),
        ),
        Command::new(
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": sink, "size": size }),
        ),
        Command::new(
            "blockdev-mirror",
            json!({ "job-id": job, "device": window, "target": sink, "sync": "full", "auto-dismiss": false }),
        ),
    ];
    let begun: Result<Vec<_>> = host.monitor_each(begin).await?.into_iter().collect();
    let seen = match begun {
        Ok(_) => read_through(host, &job).await,
        Err(error) => Err(error),
    };
    let end = [&window, &sink].map(|node| Command::new("blockdev-del", json!({ "node-name": node })));
    host.monitor_each(end.into()).await?;
    seen
}

async fn read_through(host: &dyn Host, id: &str) -> Result<Option<Health>> {
    let settled = |job: &jobs::Job| job.has_ended() || job.status == "ready";
    let Some(job) = jobs::wait(host, id, settled).await? else {
        return Ok(None);
    };
    jobs::end(host, id).await?;
    Ok(Some(match job.error {
        None => Health::Active,
        Some(error) => Health::Broken(format!(
            "it was given up so that the guest could go on: its fleece image is full, too slow or failing ({error})"
        )),
    }))
}
