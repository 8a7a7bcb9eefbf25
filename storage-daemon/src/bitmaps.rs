//! What changed in an image, from the dirty bitmaps that its layers keep.

use std::collections::BTreeMap;

use disksnap_core::{Command, Error, ErrorKind, NodeBitmap, Result};
use disksnap_hypervisor::Session;
use serde_json::{Value, json};

use crate::nodes;

/// The name of the node that holds what is served: an image's own bitmap may have the name that is asked for.
pub(crate) fn holder(node: &str) -> String {
    format!("{node}-c")
}

/// Unites bitmaps of an image's layers in one on a node of its own, which is served beside the data.
///
/// # Errors
/// `Broken` where one of them is in no layer, or must not be trusted.
pub(crate) async fn unite(
    session: &Session,
    node: &str,
    of: &BTreeMap<String, usize>,
    name: &str,
) -> Result<NodeBitmap> {
    let nodes = nodes::all(session).await?;
    let is_layer = |layer: &&Value| {
        layer["node-name"]
            .as_str()
            .is_some_and(|layer| nodes::is_layer_of(layer, node))
    };
    let layers: Vec<&Value> = nodes.iter().filter(is_layer).collect();
    let top = layers.iter().find(|layer| layer["node-name"] == node);
    let size = top.and_then(|top| top["image"]["virtual-size"].as_u64());
    let (sources, granularity) = sources(&layers, of)?;
    hold(
        session,
        node,
        name,
        size.unwrap_or_default(),
        granularity,
        &sources,
    )
    .await
}

/// Makes the node for the image `node`, of a disk of `size` bytes, with the union of these bitmaps.
pub(crate) async fn hold(
    session: &Session,
    node: &str,
    name: &str,
    size: u64,
    granularity: u64,
    sources: &[Value],
) -> Result<NodeBitmap> {
    let held = NodeBitmap {
        node: holder(node),
        name: name.to_owned(),
    };
    let null = json!({ "driver": "null-co", "node-name": held.node, "size": size, "read-only": true });
    session.execute(Command::new("blockdev-add", null)).await?;
    let actions = json!([
        { "type": "block-dirty-bitmap-add", "data": {
            "node": held.node, "name": name, "granularity": granularity, "persistent": false, "disabled": true } },
        { "type": "block-dirty-bitmap-merge", "data": { "node": held.node, "target": name, "bitmaps": sources } },
    ]);
    session
        .execute(Command::new("transaction", json!({ "actions": actions })))
        .await?;
    Ok(held)
}

/// The bitmaps of these names in all layers, and the finest granularity of them.
fn sources(layers: &[&Value], of: &BTreeMap<String, usize>) -> Result<(Vec<Value>, u64)> {
    let (mut sources, mut granularity) = (Vec::new(), u64::MAX);
    for (wanted, shares) in of {
        let before = sources.len();
        for layer in layers {
            let bitmaps = layer["dirty-bitmaps"].as_array().into_iter().flatten();
            for bitmap in bitmaps.filter(|bitmap| bitmap["name"] == wanted.as_str()) {
                if bitmap["inconsistent"] == true {
                    return Err(lost(
                        wanted,
                        "is inconsistent: the image was open when the snapshot was taken",
                    ));
                }
                granularity = granularity.min(bitmap["granularity"].as_u64().unwrap_or(u64::MAX));
                sources.push(json!({ "node": layer["node-name"], "name": wanted }));
            }
        }
        let found = sources.len() - before;
        if found > 0 && found < (*shares).min(layers.len()) {
            return Err(lost(
                wanted,
                "is not in all layers of the image that had it: it was never saved there",
            ));
        }
        if found == 0 {
            return Err(lost(wanted, "is in no layer of the snapshot's image"));
        }
    }
    Ok((sources, granularity))
}

fn lost(bitmap: &str, why: &str) -> Error {
    Error::new(
        ErrorKind::Broken,
        format!("what has changed is not known: the bitmap '{bitmap}' {why}"),
    )
    .with("bitmap", bitmap)
    .hint("Take a full backup from this snapshot, or export it without the checkpoint.")
}
