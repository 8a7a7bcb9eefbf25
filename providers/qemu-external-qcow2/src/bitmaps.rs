//! The bitmaps of a disk across a merge: what recorded on the overlay goes on recording on the base, and the base's
//! hold exactly what both did.

use disksnap_core::{Command, Host, Result};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::graph::Bitmap;
use serde_json::{Value, json};

use crate::place::LiveLayer;

fn of<'g>(graph: &'g Graph, layer: &LiveLayer) -> impl Iterator<Item = &'g Bitmap> {
    let bitmaps = graph
        .node(&layer.format)
        .map(|n| n.bitmaps.as_slice())
        .unwrap_or_default();
    bitmaps.iter().filter(|b| !b.inconsistent)
}

/// Whether the image has any.
pub(crate) fn any(graph: &Graph, layer: &LiveLayer) -> bool {
    of(graph, layer).next().is_some()
}

#[expect(clippy::needless_pass_by_value, reason = "callers write json!({…}) in place")]
fn action(kind: &str, data: Value) -> Value {
    json!({ "type": format!("block-dirty-bitmap-{kind}"), "data": data })
}

/// The base's bitmaps that the overlay continues: they must not record what a merge itself writes.
///
/// Those that the overlay does not continue go on recording: then the merge's writes are what tells of the changes.
pub(crate) async fn stop(
    host: &dyn Host,
    graph: &Graph,
    overlay: &LiveLayer,
    base: &LiveLayer,
) -> Result<()> {
    let continued = |bitmap: &&Bitmap| of(graph, overlay).any(|b| b.name == bitmap.name);
    let actions = of(graph, base)
        .filter(|b| b.recording)
        .filter(continued)
        .map(|b| action("disable", json!({ "node": base.format, "name": b.name })));
    transact(host, actions.collect()).await
}

/// The reverse of [`stop`], after a merge that came to nothing.
pub(crate) async fn resume(
    host: &dyn Host,
    graph: &Graph,
    overlay: &LiveLayer,
    base: &LiveLayer,
) -> Result<()> {
    let continued = |bitmap: &&Bitmap| of(graph, overlay).any(|b| b.recording && b.name == bitmap.name);
    let actions = of(graph, base)
        .filter(|b| !b.recording)
        .filter(continued)
        .map(|b| action("enable", json!({ "node": base.format, "name": b.name })));
    transact(host, actions.collect()).await
}

/// Adds the overlay's bitmaps to the base's; each then records where the overlay's did. In one transaction, while
/// nothing is written to the disk.
pub(crate) async fn unite(
    host: &dyn Host,
    graph: &Graph,
    overlay: &LiveLayer,
    base: &LiveLayer,
) -> Result<()> {
    let mut actions = Vec::new();
    for bitmap in of(graph, overlay) {
        let known = of(graph, base).find(|b| b.name == bitmap.name);
        if known.is_none() {
            actions.push(action(
                "add",
                json!({
                    "node": base.format, "name": bitmap.name, "granularity": bitmap.granularity,
                    // A raw image keeps none.
                    "persistent": bitmap.persistent && base.layer.format == "qcow2",
                    "disabled": true,
                }),
            ));
        }
        let from = json!([{ "node": overlay.format, "name": bitmap.name }]);
        actions.push(action(
            "merge",
            json!({ "node": base.format, "target": bitmap.name, "bitmaps": from }),
        ));
        let recording = if bitmap.recording { "enable" } else { "disable" };
        actions.push(action(
            recording,
            json!({ "node": base.format, "name": bitmap.name }),
        ));
    }
    transact(host, actions).await
}

/// Adds the base's bitmaps to the overlay's, which record as before; those that only the base has come to be there, and do
/// not record. May be done at any time: both together tell the same before and after.
pub(crate) async fn gather(
    host: &dyn Host,
    graph: &Graph,
    base: &LiveLayer,
    overlay: &LiveLayer,
) -> Result<()> {
    let mut actions = Vec::new();
    for bitmap in of(graph, base) {
        if !of(graph, overlay).any(|b| b.name == bitmap.name) {
            actions.push(action(
                "add",
                json!({
                    "node": overlay.format, "name": bitmap.name, "granularity": bitmap.granularity,
                    "persistent": bitmap.persistent, "disabled": true,
                }),
            ));
        }
        let from = json!([{ "node": base.format, "name": bitmap.name }]);
        let merge = json!({ "node": overlay.format, "target": bitmap.name, "bitmaps": from });
        actions.push(action("merge", merge));
    }
    transact(host, actions).await
}

async fn transact(host: &dyn Host, actions: Vec<Value>) -> Result<()> {
    if actions.is_empty() {
        return Ok(());
    }
    let transaction = Command::new("transaction", json!({ "actions": actions }));
    host.monitor(transaction).await.map(drop)
}
