//! Whether a fleece can be trusted. QEMU sends no event when a snapshot breaks, so one byte range is read.

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

/// Looks at the real thing.
pub(crate) async fn inspect(host: &dyn Host, fleece: &Fleece) -> Result<Health> {
    if host.state().await? == RunState::Off {
        return Ok(Health::Gone(
            "the QEMU that held it has ended, and a fleece ends with it".to_owned(),
        ));
    }
    let names = fleece.names();
    if !exists(host, &names.filter()).await? {
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
    if !exists(host, &names.access()).await? {
        return Ok(Health::Broken(
            "the node that it is read through was removed".to_owned(),
        ));
    }
    look(host, &names, fleece.choice.size.min(LOOK)).await
}

async fn exists(host: &dyn Host, node: &str) -> Result<bool> {
    let nodes = host
        .monitor(Command::new("query-named-block-nodes", json!({ "flat": true })))
        .await?;
    Ok(nodes
        .as_array()
        .is_some_and(|nodes| nodes.iter().any(|n| n["node-name"] == node)))
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
/// server, and sees what a reader would see.
async fn look(host: &dyn Host, names: &Names, size: u64) -> Result<Health> {
    let salt = uuid::Uuid::new_v4().as_bytes()[0];
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

async fn read_through(host: &dyn Host, id: &str) -> Result<Health> {
    let settled = |job: &jobs::Job| job.has_ended() || job.status == "ready";
    let Some(job) = jobs::wait(host, id, settled).await? else {
        return Ok(Health::Broken(
            "its data could not be looked at: the reading job is gone".to_owned(),
        ));
    };
    jobs::end(host, id).await?;
    Ok(match job.error {
        None => Health::Active,
        Some(error) => Health::Broken(format!(
            "it was given up so that the guest could go on: its fleece image is full, too slow or failing ({error})"
        )),
    })
}
