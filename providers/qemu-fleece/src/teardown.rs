//! Taking a fleece apart, from what is really there and not from a record: idempotent, and right in any
//! order of fleeces on one disk.

use disksnap_core::{Command, Error, ErrorKind, Host, Result, RunState};
use disksnap_hypervisor::graph::Node;
use disksnap_hypervisor::{Graph, jobs};
use serde_json::json;

use crate::choice::reopen_options;
use crate::names::Names;

/// Removes the jobs, nodes and secrets of these fleeces from QEMU. Images stay.
pub(crate) async fn take_apart(host: &dyn Host, all: &[Names]) -> Result<()> {
    if host.state().await? == RunState::Off {
        return Ok(());
    }
    // Once: reading the graph costs more than all the rest where there are many disks.
    let graph = Graph::read(host).await?;
    let is_there = |names: &Names| !names_of(&graph, names, |_| true).is_empty();
    if all.iter().any(is_there) {
        take_nodes_apart(host, &graph, all).await?;
    } else {
        end_jobs(host, all, Names::prefix).await?;
    }
    remove_secrets(host, all).await
}

async fn take_nodes_apart(host: &dyn Host, graph: &Graph, all: &[Names]) -> Result<()> {
    end_exports(host, graph, all).await?;
    // What a killed inspection left reads the snapshot; and what reads a filter must go before its job can.
    end_jobs(host, all, Names::prefix_of_probes).await?;
    remove(
        host,
        among(graph, all, |node, names| {
            node.name.starts_with(&names.prefix_of_probes())
        }),
    )
    .await?;
    remove(host, among(graph, all, |node, names| node.name == names.access())).await?;
    end_jobs(host, all, Names::prefix).await?;
    unseat(host, graph, all).await?;
    // With a filter of our own goes all that was made in one command with it.
    remove(
        host,
        among(graph, all, |node, names| {
            node.name == names.filter() && is_seated(graph, names)
        }),
    )
    .await?;
    // What was below a filter that went with its job.
    remove(
        host,
        among(graph, all, |node, names| {
            node.name == names.fleece() && !is_seated(graph, names)
        }),
    )
    .await
}

/// Whether the filter is one of our own, and not a job's.
fn is_seated(graph: &Graph, names: &Names) -> bool {
    graph.node(&names.wrapper()).is_some()
}

/// Exports that a killed run left on nodes that are about to go.
async fn end_exports(host: &dyn Host, graph: &Graph, all: &[Names]) -> Result<()> {
    for export in &graph.exports {
        if all.iter().any(|names| export.node.starts_with(&names.prefix())) {
            let delete = json!({ "id": export.id, "mode": "hard" });
            tolerate(host.monitor(Command::new("block-export-del", delete)).await)?;
            wait_unexported(host, &export.id).await?;
        }
    }
    Ok(())
}

async fn wait_unexported(host: &dyn Host, id: &str) -> Result<()> {
    for _ in 0..EXPORT_POLLS {
        let exports = host.monitor(Command::bare("query-block-exports")).await?;
        let listed = exports
            .as_array()
            .is_some_and(|list| list.iter().any(|export| export["id"] == id));
        if !listed {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    Err(Error::new(
        ErrorKind::Timeout,
        format!("the export '{id}' does not end"),
    ))
}

/// About ten seconds of asking.
const EXPORT_POLLS: u32 = 5_000;

/// Ends the jobs whose ids begin with what `prefix` says of a fleece.
async fn end_jobs(host: &dyn Host, all: &[Names], prefix: fn(&Names) -> String) -> Result<()> {
    for job in jobs::all(host).await? {
        if all.iter().any(|names| job.id.starts_with(&prefix(names))) {
            jobs::end(host, &job.id).await?;
        }
    }
    Ok(())
}

fn among(graph: &Graph, all: &[Names], which: impl Fn(&Node, &Names) -> bool) -> Vec<String> {
    let of = |names| names_of(graph, names, |node| which(node, names));
    all.iter().flat_map(of).collect()
}

/// Puts whatever is on top of the filters onto what is below them; the readers are gone already.
async fn unseat(host: &dyn Host, graph: &Graph, all: &[Names]) -> Result<()> {
    let mut commands = Vec::new();
    for names in all {
        commands.extend(unseating(graph, names)?);
    }
    if commands.is_empty() {
        return Ok(());
    }
    host.monitor_each(commands)
        .await?
        .into_iter()
        .try_for_each(|answer| answer.map(drop))
}

fn unseating(graph: &Graph, names: &Names) -> Result<Vec<Command>> {
    let (filter, mut commands) = (names.filter(), Vec::new());
    let Some(below) = graph.node(&names.wrapper()).and_then(Node::primary) else {
        return Ok(commands);
    };
    let above = |node: Option<&str>| node == Some(filter.as_str());
    for device in graph
        .devices
        .iter()
        .filter(|device| above(device.node.as_deref()))
    {
        let back = json!({ "path": device.qom_path, "property": "drive", "value": below });
        commands.push(Command::new("qom-set", back));
    }
    let own = |node: &Node| node.name == names.access();
    for (parent, role) in graph.parents(&filter).filter(|(parent, _)| !own(parent)) {
        if parent.driver != "raw" || role != "file" {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "the node '{}' ({}) is in the way of removing the filter",
                    parent.name, parent.driver
                ),
            )
            .hint("End the job or the snapshot that it belongs to, then delete again."));
        }
        let mut options = reopen_options(parent);
        options["file"] = json!(below);
        commands.push(Command::new("blockdev-reopen", json!({ "options": [options] })));
    }
    Ok(commands)
}

fn names_of(graph: &Graph, names: &Names, which: impl Fn(&Node) -> bool) -> Vec<String> {
    let prefix = names.prefix();
    graph
        .nodes()
        .filter(|n| n.name.starts_with(&prefix) && which(n))
        .map(|n| n.name.clone())
        .collect()
}

/// Deletes nodes; one that went with the node above it is as good as deleted.
async fn remove(host: &dyn Host, nodes: Vec<String>) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let delete = |name: &String| Command::new("blockdev-del", json!({ "node-name": name }));
    let answers = host.monitor_each(nodes.iter().map(delete).collect()).await?;
    let refused: Vec<(&String, Error)> = nodes
        .iter()
        .zip(answers)
        .filter_map(|(name, answer)| answer.err().map(|e| (name, e)))
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    let graph = Graph::read(host).await?;
    for (name, error) in refused {
        if graph.node(name).is_some() {
            return Err(error.with("node", name));
        }
    }
    Ok(())
}

async fn remove_secrets(host: &dyn Host, all: &[Names]) -> Result<()> {
    let objects = match host
        .monitor(Command::new("qom-list", json!({ "path": "/objects" })))
        .await
    {
        // A storage daemon may have no place for objects until it has the first one.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        answer => answer?,
    };
    let exists = |id: &str| {
        objects
            .as_array()
            .is_some_and(|list| list.iter().any(|object| object["name"] == id))
    };
    for secret in all.iter().map(Names::secret).filter(|secret| exists(secret)) {
        host.monitor(Command::new("object-del", json!({ "id": secret })))
            .await?;
    }
    Ok(())
}

/// What was to be undone is perhaps undone already; whether it is, the graph tells.
fn tolerate<T>(answer: Result<T>) -> Result<()> {
    match answer {
        Err(error) if !matches!(error.kind(), ErrorKind::Refused | ErrorKind::NotFound) => Err(error),
        _ => Ok(()),
    }
}
