//! What bitmaps of a smaller disk say, in one of a larger disk: QEMU merges bitmaps of one size only.
//!
//! A backup job copies what the smaller ones say from a node that holds nothing to another, which is as large as the disk
//! is now, and what it writes there is noted in a bitmap of that size. No data is read or written. Nothing is missed, and
//! what is finer than the job's clusters (64 KiB) becomes as coarse as they are. What a disk has grown by reads as zeroes
//! until it is written, and that is noted by the layers that have it.

use std::collections::BTreeMap;

use disksnap_core::{Command, Error, ErrorKind, Host, Result};
use disksnap_hypervisor::{Graph, jobs};
use serde_json::{Value, json};

use crate::live::{add, merge, on, transact};

/// The nodes that are made meanwhile, in the order in which they can be deleted, and the job. A domain is locked by whoever
/// works on it: they serve one at a time.
const PART: &str = "ds-widen-part";
const FROM: &str = "ds-widen-from";
const JOB: &str = "ds-widen";
/// The bitmap on either end.
const NAME: &str = "ds-widen";

/// Bitmaps (as a merge takes them), by the size of their node in bytes.
pub(crate) type BySize = BTreeMap<u64, Vec<Value>>;

/// The node of the size that is wanted; there may be several.
fn to(n: usize) -> String {
    format!("ds-widen-to{n}")
}

/// One bitmap of `size` that knows what all these know, as a merge takes it. [`clear`] takes it away.
///
/// # Errors
/// `Refused` where the job fails; the monitor's.
pub(crate) async fn widened(
    host: &dyn Host,
    n: usize,
    smaller: &BySize,
    size: u64,
    granularity: u64,
) -> Result<Value> {
    if n == 0 {
        // What one that was killed has left.
        clear(host).await?;
    }
    let to = to(n);
    node(
        host,
        json!({ "driver": "null-co", "node-name": to, "size": size }),
    )
    .await?;
    transact(host, vec![add(&to, NAME, granularity, false, false)]).await?;
    for (from, bitmaps) in smaller {
        node(
            host,
            json!({ "driver": "null-co", "node-name": FROM, "size": from }),
        )
        .await?;
        node(
            host,
            json!({ "driver": "raw", "node-name": PART, "file": to, "size": from }),
        )
        .await?;
        transact(
            host,
            vec![
                add(FROM, NAME, granularity, false, true),
                merge(FROM, NAME, bitmaps),
            ],
        )
        .await?;
        copy(host).await?;
        delete(host, PART).await?;
        delete(host, FROM).await?;
    }
    Ok(on(&to, NAME))
}

async fn copy(host: &dyn Host) -> Result<()> {
    let backup = json!({
        "job-id": JOB, "device": FROM, "target": PART, "sync": "bitmap", "bitmap": NAME, "bitmap-mode": "never",
        "auto-dismiss": false,
    });
    host.monitor(Command::new("blockdev-backup", backup)).await?;
    jobs::wait(host, JOB, jobs::Job::has_ended).await?;
    match jobs::end(host, JOB).await?.and_then(|job| job.error) {
        None => Ok(()),
        Some(error) => Err(Error::new(
            ErrorKind::Refused,
            format!("what a smaller disk's bitmap says cannot be copied: {error}"),
        )),
    }
}

/// Takes away all that was made. Idempotent.
pub(crate) async fn clear(host: &dyn Host) -> Result<()> {
    jobs::end(host, JOB).await?;
    let graph = Graph::read(host).await?;
    let wide = (0..).map(to).take_while(|name| graph.node(name).is_some());
    let all = [PART, FROM].map(str::to_owned).into_iter().chain(wide);
    for name in all.filter(|name| graph.node(name).is_some()) {
        delete(host, &name).await?;
    }
    Ok(())
}

async fn node(host: &dyn Host, options: Value) -> Result<()> {
    host.monitor(Command::new("blockdev-add", options))
        .await
        .map(drop)
}

async fn delete(host: &dyn Host, name: &str) -> Result<()> {
    let command = Command::new("blockdev-del", json!({ "node-name": name }));
    host.monitor(command).await.map(drop)
}
