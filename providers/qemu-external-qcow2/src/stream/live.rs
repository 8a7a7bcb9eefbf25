//! Streaming while a hypervisor has the disk: a job that this process may lose and another find again.

use std::path::Path;

use disksnap_core::{Command, Error, ErrorKind, Host, Progress, Result};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::graph::{Node, same_file};
use disksnap_hypervisor::jobs::{self, Job};
use serde_json::json;

use crate::bitmaps;
use crate::merge::Live;
use crate::place::flush;
use crate::record::Record;

/// Whether the job is there and has not failed.
pub(super) async fn is_under_way(host: &dyn Host, id: &str) -> Result<bool> {
    let job = jobs::find(host, id).await?;
    Ok(job.is_some_and(|job| !job.has_ended() || job.error.is_none()))
}

/// Starts the stream of the base into the overlay above it.
///
/// Nobody has to dismiss it: a stream that has ended and is kept has a filter with nothing below it, and QEMU (7.2 to 10.0.2)
/// crashes when anybody asks for its nodes then. So the chain tells whether it has ended well, and not the job.
pub(super) async fn start(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let Live { place, at, .. } = live;
    let overlay = &place.layers[*at];
    let mut stream = json!({
        "job-id": record.names().stream(), "device": overlay.format,
        "auto-finalize": false, "auto-dismiss": true,
    });
    if let Some(below) = place.layers.get(at + 2) {
        stream["base-node"] = json!(below.node);
        // What the header of the overlay is going to say.
        stream["backing-file"] = json!(below.layer.name_from(&overlay.layer.path));
    }
    let started = host.monitor(Command::new("block-stream", stream)).await;
    started.map(drop).map_err(|error| {
        if error.message().contains("\" lock") {
            return error
                .hint("Somebody reads the overlay as an image: end that first, and what it is served by.");
        }
        error
    })
}

/// How far the job is, if there is one.
pub(super) async fn progress(host: &dyn Host, id: &str) -> Result<Option<Progress>> {
    let job = jobs::find(host, id).await?;
    Ok(job.map(|job| job.progress(&["pending"])))
}

/// Ends a stream that waits to be made final; the guest's disk does not stand still for it. The chain tells whether it has ended
/// well; then [`conclude`] comes next.
pub(super) async fn finish(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let id = record.names().stream();
    let job = jobs::find(host, &id).await?.ok_or_else(|| {
        Error::new(ErrorKind::Refused, "no merge is under way on this disk")
            .hint("Start it again: `disksnap snapshot merge --into overlay`.")
    })?;
    if !job.has_ended() {
        let (overlay, base) = (&live.place.layers[live.at], &live.place.layers[live.at + 1]);
        // Anew: bitmaps may have come since it was started.
        bitmaps::gather(host, &Graph::read(host).await?, base, overlay).await?;
        flush(host, &record.target, overlay).await?;
        jobs::tell(host, &id, "job-finalize").await?;
    }
    jobs::wait(host, &id, Job::has_ended).await.map(drop)
}

/// What is left to do after the end, also of a stream whose process was killed right then. Idempotent.
pub(super) async fn conclude(host: &dyn Host, record: &Record, live: &Live) -> Result<()> {
    let Live { graph, place, at } = live;
    jobs::end(host, &record.names().stream()).await?;
    if let Some(rename) = place.name_below(*at, at + 1) {
        host.monitor(rename).await?;
    }
    close(host, graph, &record.base.path).await
}

/// Closes the image at this path where nothing in the hypervisor uses it any more: its format, what wraps that, its file.
///
/// Whatever was opened along with it by QEMU itself has gone with the chain already.
async fn close(host: &dyn Host, graph: &Graph, path: &Path) -> Result<()> {
    let is_file = |node: &&Node| node.path.as_deref().is_some_and(|p| same_file(p, path));
    for file in graph.nodes().filter(is_file) {
        let Some(mut idle) = above(graph, &file.name) else {
            continue;
        };
        idle.reverse();
        let outside = |name: &String| graph.node(name).into_iter().flat_map(|node| &node.children);
        let data = idle
            .iter()
            .flat_map(outside)
            .filter(|child| child.role == "data-file");
        let data: Vec<String> = data.map(|child| child.node.clone()).collect();
        for name in data {
            idle.extend(graph.primary_chain(&name).iter().map(|node| node.name.clone()));
        }
        for node in idle {
            let delete = Command::new("blockdev-del", json!({ "node-name": node }));
            match host.monitor(delete).await {
                Err(error) if error.kind() != ErrorKind::NotFound && is_there(host, &node).await? => {
                    return Err(error.with("node", node));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// A node that went with the one above it is refused otherwise than one that was not there.
async fn is_there(host: &dyn Host, node: &str) -> Result<bool> {
    Ok(Graph::read(host).await?.node(node).is_some())
}

/// A node and all that is built on it as one image, the lowest first; `None` where anything uses that.
fn above(graph: &Graph, from: &str) -> Option<Vec<String>> {
    let mut nodes = vec![from.to_owned()];
    let mut at = from.to_owned();
    loop {
        let used = graph.exports.iter().any(|e| e.node == at)
            || graph.devices.iter().any(|d| d.node.as_deref() == Some(&at))
            || graph
                .jobs_on(std::slice::from_ref(&at))
                .any(|job| job.nodes.contains(&at));
        let parents: Vec<(&Node, &str)> = graph.parents(&at).collect();
        match parents.as_slice() {
            _ if used => return None,
            [] => return Some(nodes),
            [(parent, "file")] => {
                nodes.push(parent.name.clone());
                let next = parent.name.clone();
                at = next;
            }
            _ => return None,
        }
    }
}
