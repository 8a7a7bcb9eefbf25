//! Whether what the guest wrote has reached its images: the flush errors that `stop` hides.
//!
//! QMP's `stop` flushes every disk and drops what comes of it (`vm_stop` in QEMU's `system/cpus.c`), and no command
//! just flushes. `blockdev-reopen` flushes the nodes that it names before it looks at what is to become of them
//! (`bdrv_reopen_multiple` in `block.c`), and tells: "Error flushing drive". So each node is asked to become what it
//! cannot become, another driver: QEMU flushes, and refuses, and has changed nothing. Asked to stay as it is, a node
//! would lose the options that nobody can look up (`discard`, …).
//!
//! A flush that succeeds after one that failed is good: QEMU writes again what it has not yet written, and remembers
//! where the kernel has given data up (`page_cache_inconsistent` in `block/file-posix.c`).

use disksnap_core::{Command, Disk, DiskNode, Error, ErrorKind, Host, Result};
use serde_json::json;

use crate::Graph;

/// What no node that holds data can become.
const NEVER: &str = "null-co";
/// How QEMU says that a flush failed, before anything else.
const FAILED: &str = "Error flushing drive";
/// How it says that it has not come as far as the flush.
const UNKNOWN: &str = "Failed to find node";

/// The topmost nodes of disks, without those that are read-only.
pub(crate) async fn nodes(host: &dyn Host, disks: &[&Disk]) -> Result<Vec<DiskNode>> {
    let graph = Graph::read(host).await?;
    let mut nodes = Vec::new();
    for disk in disks {
        let top = graph.root_of_disk(disk)?.top;
        let holds = |node: &crate::graph::Node| !node.read_only && node.driver != NEVER;
        if graph.node(&top).is_some_and(holds) {
            nodes.push(DiskNode {
                target: disk.target.clone(),
                node: top,
            });
        }
    }
    Ok(nodes)
}

/// Flushes these nodes, and with each all that is below it.
///
/// # Errors
/// `Io`, naming the disk, when one cannot be flushed; the monitor's.
pub async fn verify(host: &dyn Host, nodes: &[DiskNode]) -> Result<()> {
    let impossible = |disk: &DiskNode| {
        let options = json!([{ "driver": NEVER, "node-name": disk.node }]);
        Command::new("blockdev-reopen", json!({ "options": options }))
    };
    let answers = host.monitor_each(nodes.iter().map(impossible).collect()).await?;
    for (disk, answer) in nodes.iter().zip(answers) {
        flushed(answer).map_err(|error| error.with("disk", &disk.target).with("node", &disk.node))?;
    }
    Ok(())
}

fn flushed(answer: Result<serde_json::Value>) -> Result<()> {
    let refusal = match answer {
        Err(error) if error.kind() == ErrorKind::Refused => error,
        Err(error) => return Err(error),
        Ok(_) => {
            return Err(Error::new(
                ErrorKind::Protocol,
                format!("QEMU says that a disk's node has become a {NEVER} node, which none can"),
            ));
        }
    };
    let words = refusal.message();
    if words.starts_with(FAILED) {
        let what = format!("what the guest wrote cannot be written to the disk's image: {words}");
        return Err(Error::new(ErrorKind::Io, what).hint(
            "A snapshot now would lack writes that the guest was told are done. Look after the storage that the image \
             is on, then try again.",
        ));
    }
    if words.starts_with(UNKNOWN) {
        return Err(refusal.retryable(true));
    }
    Ok(())
}
