//! Merging while a hypervisor has the disk: a commit job, which this process may lose and another find again.

use std::path::Path;
use std::time::Duration;

use disksnap_core::{Command, Error, ErrorKind, Host, Progress, Result};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::jobs::{self, Job};
use serde_json::json;

use super::{Live, Standing, find, off};
use crate::layer::unfit;
use crate::place::{flush, is_overlay, overlay_root};
use crate::record::Record;
use crate::{bitmaps, busy};

/// How long it takes to commit a little.
const SMALL: Duration = Duration::from_millis(5);

/// Whether the job of this merge is there and has not failed.
pub(super) async fn is_under_way(host: &dyn Host, record: &Record) -> Result<bool> {
    let job = jobs::find(host, &record.names().merge()).await?;
    Ok(job.is_some_and(|job| !job.has_ended() || job.error.is_none()))
}

/// What stands against a commit of the overlay into the base below it.
pub(super) fn check(Live { graph, place, at }: &Live) -> Result<()> {
    place.refuse_busy(graph)?;
    let filtered = *at > 0 || overlay_root(graph, &place.layers[0].node) == place.root;
    // From the disk's root down to the overlay.
    let wrapped = place.layers[..=*at]
        .iter()
        .any(|layer| layer.node != layer.format);
    if !filtered || wrapped {
        return Err(unfit(
            "a node that is no filter stands on the overlay, and QEMU does not commit below one",
        )
        .hint("With the domain off it can be merged."));
    }
    if graph.node(&place.root).is_some_and(|root| root.read_only) {
        return Err(busy(
            "the disk is read-only now",
            "With the domain off it can be merged.",
        ));
    }
    Ok(())
}

/// Starts the commit of the overlay into the base below it.
pub(super) async fn start(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let Live { graph, place, at } = live;
    let (overlay, base) = (&place.layers[*at], &place.layers[at + 1]);
    // Only a commit of the top image with bitmaps must be held before its end, and the guest's disk with it.
    let at_once = *at == 0 && !bitmaps::any(graph, overlay);
    let mut commit = json!({
        "job-id": record.names().merge(), "device": place.root, "top-node": overlay.node, "base-node": base.node,
        "auto-finalize": at_once, "auto-dismiss": false,
    });
    if let Some(child) = at.checked_sub(1).and_then(|above| place.layers.get(above)) {
        // What the header of the image above is going to say.
        commit["backing-file"] = json!(record.base.name_from(&child.layer.path));
    }
    bitmaps::stop(host, graph, overlay, base).await?;
    let started = host.monitor(Command::new("block-commit", commit)).await;
    match started {
        Ok(_) => {
            // Most overlays are small: who looks next finds it ready.
            tokio::time::sleep(SMALL).await;
            Ok(())
        }
        Err(error) => {
            let resumed = bitmaps::resume(host, &Graph::read(host).await?, overlay, base).await;
            let resizes = error.message().contains("'resize'");
            let error = error.rollback_failed(resumed.err().into_iter().collect());
            if resizes {
                return Err(error.hint(
                    "An export that may resize the disk stands against it: end that export, or merge with the domain \
                     off.",
                ));
            }
            Err(error)
        }
    }
}

/// How far the job is, if there is one.
pub(super) async fn progress(host: &dyn Host, record: &Record) -> Result<Option<Progress>> {
    let job = jobs::find(host, &record.names().merge()).await?;
    // An intermediate commit has no `ready`: it waits to be finalized. An active one does after `ready`.
    Ok(job.map(|job| job.progress(&["ready", "standby", "pending"])))
}

/// Ends a commit that is ready: from `job-complete` until it is finalized the guest's disk stands still.
pub(super) async fn finish(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let id = record.names().merge();
    let job = jobs::find(host, &id).await?.ok_or_else(|| {
        Error::new(ErrorKind::Refused, "no merge is under way on this disk")
            .hint("Start it again: `disksnap snapshot merge`.")
    })?;
    if matches!(job.status.as_str(), "ready" | "standby") {
        refuse_new_bitmaps(host, &id, live).await?;
        jobs::tell(host, &id, "job-complete").await?;
    }
    let settled = |job: &Job| job.status == "pending" || job.has_ended();
    let mut ended = jobs::wait(host, &id, settled).await?;
    if ended.as_ref().is_some_and(|job| !job.has_ended()) {
        if let Err(error) = finalize(host, record, live).await {
            // Whatever failed, the guest must not wait for it.
            let failure = jobs::tell(host, &id, "job-cancel").await.err();
            return Err(error.rollback_failed(failure.into_iter().collect()));
        }
        ended = jobs::wait(host, &id, Job::has_ended).await?;
    }
    if let Some(error) = ended.and_then(|job| job.error) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("the merge failed: {error}"),
        ));
    }
    end(host, record).await?;
    // The header as soon as can be: a domain might be started from it.
    match live.renamed() {
        Some(rename) => host.monitor(rename).await.map(drop),
        None => Ok(()),
    }
}

/// Lets the job go if it has ended, and with it what it alone has open; one that has ended well is written down beside its overlay
/// before. To be called before the graph is read by which nodes are closed. Idempotent.
///
/// An overlay that QEMU has opened by itself, below an image that it was started on, is closed by itself when the chain and the job
/// lose it; then nothing in QEMU tells it from one that the disk does not stand on because of an old document.
pub(super) async fn end(host: &dyn Host, record: &Record) -> Result<()> {
    if !host.state().await?.is_active() {
        return Ok(());
    }
    let id = record.names().merge();
    let Some(job) = jobs::find(host, &id).await?.filter(Job::has_ended) else {
        return Ok(());
    };
    let merged = if job.error.is_none() {
        left(host, record).await?
    } else {
        None
    };
    if let Some(overlay) = merged {
        off::mark(overlay)?;
    }
    jobs::tell(host, &id, "job-dismiss").await?;
    match merged {
        // What closed it has written to it.
        Some(overlay) if overlay.exists() && !off::is_marked(overlay)? => off::mark(overlay),
        _ => Ok(()),
    }
}

/// The overlay, if it is there and the disk's chain does without it.
async fn left<'r>(host: &dyn Host, record: &'r Record) -> Result<Option<&'r Path>> {
    let (Some(overlay), Ok(disk)) = (&record.overlay, host.domain().disk(&record.target)) else {
        return Ok(None);
    };
    let place = find(&Graph::read(host).await?, disk, record, overlay)?;
    let left = place.position(overlay).is_none() && overlay.exists();
    Ok(left.then_some(overlay.as_path()))
}

/// A commit that was begun without bitmaps ends by itself, and would lose those that were added since.
async fn refuse_new_bitmaps(host: &dyn Host, id: &str, live: &Live) -> Result<()> {
    if !bitmaps::any(&live.graph, &live.place.layers[live.at]) {
        return Ok(());
    }
    let jobs = host.monitor(Command::bare("query-block-jobs")).await?;
    let mut jobs = jobs.as_array().into_iter().flatten();
    if !jobs.any(|job| job["device"] == id && job["auto-finalize"] == true) {
        return Ok(());
    }
    let failure = jobs::end(host, id).await.err();
    Err(busy(
        "a bitmap was added to the disk while it was merged, and would be lost",
        "Merge again: it will be kept.",
    )
    .rollback_failed(failure.into_iter().collect()))
}

/// At `pending` nothing is written to the two images: their bitmaps are united, and the job made final.
async fn finalize(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let graph = Graph::read(host).await?;
    let (overlay, base) = (&live.place.layers[live.at], &live.place.layers[live.at + 1]);
    bitmaps::unite(host, &graph, overlay, base).await?;
    if live.at > 0 {
        // A commit of the top image flushes by itself.
        flush(host, &record.target, base).await?;
    }
    jobs::tell(host, &record.names().merge(), "job-finalize").await
}

/// Brings the header right of the image that stands on the base after a merge. Idempotent; the job must be gone.
pub(super) async fn name_base(host: &dyn Host, graph: &Graph, record: &Record) -> Result<()> {
    let (Ok(disk), Some(overlay)) = (host.domain().disk(&record.target), &record.overlay) else {
        return Ok(());
    };
    let place = find(graph, disk, record, overlay)?;
    let at = place.position(&record.base.path);
    let above = at.and_then(|at| at.checked_sub(1));
    match above.and_then(|above| place.name_below(above, above + 1)) {
        Some(rename) => host.monitor(rename).await.map(drop),
        None => Ok(()),
    }
}

impl Live {
    /// What brings the header of the image above the overlay right once that stands on the base.
    fn renamed(&self) -> Option<Command> {
        self.place.name_below(self.at.checked_sub(1)?, self.at + 1)
    }
}

/// Stops the job, if there is one; the base's bitmaps record again as they did.
pub(super) async fn cancel(host: &dyn Host, record: &Record) -> Result<()> {
    jobs::end(host, &record.names().merge()).await?;
    if let Standing::Live(Live { graph, place, at }) = Standing::of(host, record).await? {
        bitmaps::resume(host, &graph, &place.layers[at], &place.layers[at + 1]).await?;
    }
    Ok(())
}

/// Closes an overlay that nothing uses any more: its format, and its file where that is a node by itself.
pub(super) async fn remove_nodes(host: &dyn Host, nodes: Vec<(String, String)>) -> Result<()> {
    for (format, file) in nodes {
        let delete = |node: &str| host.monitor(Command::new("blockdev-del", json!({ "node-name": node })));
        delete(&format).await.map_err(|e| e.with("node", &format))?;
        // Ours goes with the format; another was perhaps added by itself, as libvirt does.
        if !is_overlay(&format) && Graph::read(host).await?.node(&file).is_some() {
            delete(&file).await.map_err(|e| e.with("node", &file))?;
        }
    }
    Ok(())
}
