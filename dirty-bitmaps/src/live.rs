//! The bitmaps of a domain that runs, by its monitor.

use std::cmp::Ordering;

use disksnap_core::{
    Batch, Command, DirtyBitmap, Disk, Ending, Error, ErrorKind, Host, Result, SCRATCH_BITMAP, Start,
    Trackable, Tracked, Union,
};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::graph::{Bitmap, Node};
use serde_json::{Value, json};

use crate::chain::{Chain, bitmap};
use crate::raw::past_now;
use crate::widen::{self, BySize};
use crate::{GRANULARITY, OLD_QCOW2};

pub(crate) async fn look(host: &dyn Host, disks: &[&Disk]) -> Result<Vec<Tracked>> {
    let graph = Graph::read(host).await?;
    Ok(disks.iter().map(|disk| look_at(&graph, disk)).collect())
}

fn look_at(graph: &Graph, disk: &Disk) -> Tracked {
    let chain = match Chain::of(graph, disk) {
        Ok(chain) => chain,
        Err(error) => {
            return Tracked {
                trackable: Trackable::Unreachable(error.to_string()),
                size: None,
                bitmaps: Vec::new(),
            };
        }
    };
    let top = chain.top();
    let trackable = if top.read_only {
        Trackable::No("the disk is read-only: it does not change".to_owned())
    } else if keeps(top) {
        Trackable::Durable
    } else if top.driver == "qcow2" {
        Trackable::Volatile(OLD_QCOW2.to_owned())
    } else {
        Trackable::Volatile(format!(
            "an image of the format '{}' keeps no bitmaps",
            top.driver
        ))
    };
    let layers = chain.layers.iter().enumerate();
    let told = layers.flat_map(|(layer, node)| node.bitmaps.iter().map(move |bitmap| tell(layer, bitmap)));
    Tracked {
        trackable,
        size: Some(top.size),
        bitmaps: told
            .filter(|bitmap| !bitmap.name.starts_with(SCRATCH_BITMAP))
            .collect(),
    }
}

fn tell(layer: usize, bitmap: &Bitmap) -> DirtyBitmap {
    DirtyBitmap {
        name: bitmap.name.clone(),
        layer,
        recording: bitmap.recording,
        durable: bitmap.persistent,
        inconsistent: bitmap.inconsistent,
        granularity: bitmap.granularity,
    }
}

/// Whether the image of a node can keep bitmaps.
fn keeps(node: &Node) -> bool {
    let compat = &node.info["image"]["format-specific"]["data"]["compat"];
    node.driver == "qcow2" && compat != "0.10"
}

/// One action of a `transaction` on the bitmaps of a node.
pub(crate) fn action(kind: &str, data: Value) -> Value {
    let mut action = json!({ "type": format!("block-dirty-bitmap-{kind}") });
    action["data"] = data;
    action
}

pub(crate) fn on(node: &str, name: &str) -> Value {
    json!({ "node": node, "name": name })
}

pub(crate) fn merge(node: &str, target: &str, sources: &[Value]) -> Value {
    action(
        "merge",
        json!({ "node": node, "target": target, "bitmaps": sources }),
    )
}

pub(crate) fn add(node: &str, name: &str, granularity: u64, persistent: bool, disabled: bool) -> Value {
    let data = json!({
        "node": node, "name": name, "granularity": granularity, "persistent": persistent, "disabled": disabled,
    });
    action("add", data)
}

pub(crate) async fn transact(host: &dyn Host, actions: Vec<Value>) -> Result<()> {
    if actions.is_empty() {
        return Ok(());
    }
    let command = Command::new("transaction", json!({ "actions": actions }));
    host.monitor(command).await.map(drop)
}

pub(crate) async fn start(host: &dyn Host, starts: &[Start]) -> Result<Batch> {
    let graph = Graph::read(host).await?;
    let mut batch = Batch {
        execute: "transaction".to_owned(),
        list: "actions".to_owned(),
        items: Vec::new(),
        undo: Vec::new(),
    };
    for start in starts {
        start_one(&graph, start, &mut batch).map_err(|e| e.with("disk", &start.disk.target))?;
    }
    for start in starts {
        copy_smaller(host, &graph, start)
            .await
            .map_err(|e| e.with("disk", &start.disk.target))?;
    }
    Ok(batch)
}

/// What the copy of one start is made of; `None` where it takes none, or a layer is larger than the disk: then nothing can be
/// told with it.
fn to_copy<'s>(chain: &Chain<'_>, start: &'s Start) -> Result<Option<(&'s str, Known)>> {
    let (Some(copy), Some(name)) = (&start.copy, &start.recording) else {
        return Ok(None);
    };
    let mut known = Known::new();
    match known.add(chain, name, chain.top().size) {
        Ok(_) => Ok(Some((copy, known))),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// What smaller layers know is in the copy before the window: nobody writes to them.
async fn copy_smaller(host: &dyn Host, graph: &Graph, start: &Start) -> Result<()> {
    let chain = Chain::of(graph, &start.disk)?;
    let Some((copy, mut known)) = to_copy(&chain, start)?.filter(|(_, known)| !known.smaller.is_empty())
    else {
        return Ok(());
    };
    let top = chain.top();
    known.same.clear();
    let make = async {
        known.widen(host, 0, top.size).await?;
        let add = add(&top.name, copy, known.granularity, false, true);
        transact(host, vec![add, merge(&top.name, copy, &known.same)]).await
    };
    let made = make.await;
    let cleared = widen::clear(host).await;
    made.and(cleared)
}

fn start_one(graph: &Graph, start: &Start, batch: &mut Batch) -> Result<()> {
    let chain = Chain::of(graph, &start.disk)?;
    let now = chain.top();
    let next = match &start.top {
        Some(name) => graph.node(name).ok_or_else(|| missing_node(name))?,
        None => now,
    };
    let recording = match &start.recording {
        Some(name) => Some((name, recording_in(&chain, name)?)),
        None => None,
    };
    let mut undo = |kind: &str, data| {
        let command = Command::new(format!("block-dirty-bitmap-{kind}"), data);
        batch.undo.push(command);
    };
    if let Some((copy, known)) = to_copy(&chain, start)? {
        if known.smaller.is_empty() {
            batch
                .items
                .push(add(&now.name, copy, known.granularity, false, true));
        }
        batch.items.push(merge(&now.name, copy, &known.same));
        undo("remove", on(&now.name, copy));
    }
    let Some(starts) = &start.starts else {
        return Ok(());
    };
    if chain.having(starts).next().is_some() {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("the disk has a bitmap '{starts}' already"),
        )
        .hint("Choose another name for the checkpoint; `disksnap checkpoint validate` tells of bitmaps that nobody knows."));
    }
    let mut granularity = GRANULARITY;
    // In one image the window undoes nothing: the guest may go on before that, and then only the new bitmap knows what
    // it writes. `abort` merges that, and always follows. What is in an overlay is noted below when it is committed.
    let on_top = next.name != now.name;
    if let Some((name, found)) = recording {
        granularity = found.granularity;
        batch.items.push(action("disable", on(&now.name, name)));
        if on_top {
            // Whoever puts an image on top lets the bitmap go on there.
            batch.items.push(action("disable", on(&next.name, name)));
            undo("enable", on(&now.name, name));
        }
    }
    batch
        .items
        .push(add(&next.name, starts, granularity, keeps(next), false));
    if on_top {
        undo("remove", on(&next.name, starts));
    }
    Ok(())
}

fn missing_node(name: &str) -> Error {
    Error::new(
        ErrorKind::Internal,
        "the node that the guest is going to write to is not there",
    )
    .with("node", name)
}

/// The bitmap in the layer that the guest writes to.
fn recording_in<'g>(chain: &Chain<'g>, name: &str) -> Result<&'g Bitmap> {
    let found = bitmap(chain.top(), name).ok_or_else(|| not_there(name))?;
    refuse_inconsistent(found)?;
    Ok(found)
}

fn not_there(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the disk has no bitmap '{name}'"))
        .with("bitmap", name)
        .hint("`disksnap checkpoint validate` tells which checkpoints can be trusted.")
}

fn lost(name: &str) -> Error {
    Error::new(
        ErrorKind::Broken,
        format!("the bitmap '{name}', which should take over, is not there"),
    )
    .with("bitmap", name)
    .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted.")
}

fn refuse_inconsistent(bitmap: &Bitmap) -> Result<()> {
    if !bitmap.inconsistent {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Broken,
        format!("the bitmap '{}' is inconsistent: its image was not closed properly", bitmap.name),
    )
    .with("bitmap", &bitmap.name)
    .hint("`disksnap checkpoint drop-broken` drops what cannot be trusted; the disk's next backup is a full one."))
}

pub(crate) fn refuse_busy(bitmap: &Bitmap) -> Result<()> {
    if !bitmap.busy {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Busy,
        format!("the bitmap '{}' is in use by an export or a job", bitmap.name),
    )
    .with("bitmap", &bitmap.name)
    .hint("Stop the export first, or wait until the job has ended."))
}

pub(crate) async fn abort(host: &dyn Host, starts: &[Start]) -> Result<()> {
    let graph = Graph::read(host).await?;
    let mut actions = Vec::new();
    for start in starts {
        match Chain::of(&graph, &start.disk) {
            Ok(chain) => actions.extend(undone(&chain, start)),
            // A disk that is not there any more took its bitmaps along.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => refuse_unless_past(&graph, &start.disk, error)?,
        }
    }
    transact(host, actions).await
}

/// Where the domain runs on the raw disk itself, the qcow2's bitmaps are not in this hypervisor, and do not know what it
/// writes: they are given up, so that nobody relies on what could not be done with them.
fn refuse_unless_past(graph: &Graph, disk: &Disk, error: Error) -> Result<()> {
    if error.kind() == ErrorKind::Invalid && past_now(graph, disk)?.is_some() {
        return Ok(());
    }
    Err(error)
}

/// What takes one start back: the new bitmap's content goes to the one before, which goes on.
fn undone(chain: &Chain<'_>, start: &Start) -> Vec<Value> {
    let mut actions = Vec::new();
    let top = chain.top();
    if let Some(copy) = &start.copy {
        let there = chain
            .having(copy)
            .map(|(node, _)| action("remove", on(&node.name, copy)));
        actions.extend(there);
    }
    let Some(starts) = &start.starts else {
        return actions;
    };
    // Where the new one is not there nobody knows what was written since it stopped the other: that must not go on
    // as if it knew. Lower layers are snapshots, and nothing in them is ours.
    if bitmap(top, starts).is_none() {
        return actions;
    }
    let usable = |node: &&Node| {
        let before = start.recording.as_ref().and_then(|name| bitmap(node, name));
        before
            .filter(|before| !before.inconsistent)
            .map(|before| before.name.clone())
    };
    let below = chain.layers.get(1).copied();
    if start.top.as_ref() == Some(&top.name) {
        // What is in the overlay is committed, and noted below by that.
        if let Some((node, before)) = below.and_then(|node| Some((node, usable(&node)?))) {
            actions.push(action("enable", on(&node.name, &before)));
        }
    } else if let Some(before) = usable(&top) {
        actions.push(merge(&top.name, &before, &[on(&top.name, starts)]));
        actions.push(action("enable", on(&top.name, &before)));
    }
    actions.push(action("remove", on(&top.name, starts)));
    actions
}

pub(crate) async fn end(host: &dyn Host, endings: &[Ending]) -> Result<()> {
    let graph = Graph::read(host).await?;
    let mut found = Vec::with_capacity(endings.len());
    for ending in endings {
        let chain = match Chain::of(&graph, &ending.disk) {
            Ok(chain) => chain,
            // A disk that is not there any more took its bitmaps along.
            Err(error) if error.kind() == ErrorKind::NotFound && !error.is_retryable() => continue,
            Err(error) => {
                refuse_unless_past(&graph, &ending.disk, error)?;
                continue;
            }
        };
        let known = known(&chain, ending).map_err(|e| e.with("disk", &ending.disk.target))?;
        found.push((ending, chain, known));
    }
    let widens = found.iter().any(|(_, _, known)| !known.smaller.is_empty());
    let ended = end_all(host, found).await;
    if widens {
        // What it said is what counts.
        let cleared = widen::clear(host).await;
        return ended.and(cleared);
    }
    ended
}

async fn end_all(host: &dyn Host, found: Vec<(&Ending, Chain<'_>, Known)>) -> Result<()> {
    // Before anything is made: all must be as it should be.
    for (ending, chain, known) in &found {
        ended(chain, ending, &known.same).map_err(|e| e.with("disk", &ending.disk.target))?;
    }
    let (mut actions, mut widened) = (Vec::new(), 0);
    for (ending, chain, mut known) in found {
        widened += usize::from(known.widen(host, widened, chain.top().size).await?);
        let its = ended(&chain, ending, &known.same);
        actions.extend(its.map_err(|e| e.with("disk", &ending.disk.target))?);
    }
    transact(host, actions).await
}

/// Bitmaps that are to be merged into one of some size.
struct Known {
    /// Those of that size, as a merge takes them.
    same: Vec<Value>,
    /// Those of layers from before the disk was grown.
    smaller: BySize,
    /// The finest of all.
    granularity: u64,
}

impl Known {
    fn new() -> Self {
        Self {
            same: Vec::new(),
            smaller: BySize::new(),
            granularity: u64::MAX,
        }
    }

    /// Adds the bitmaps of this name in all layers; whether there are any.
    fn add(&mut self, chain: &Chain<'_>, name: &str, size: u64) -> Result<bool> {
        let mut any = false;
        for (node, found) in chain.having(name) {
            refuse_inconsistent(found)?;
            match node.size.cmp(&size) {
                Ordering::Equal => self.same.push(on(&node.name, name)),
                Ordering::Less => self
                    .smaller
                    .entry(node.size)
                    .or_default()
                    .push(on(&node.name, name)),
                Ordering::Greater => return Err(resized(node.size, size)),
            }
            self.granularity = self.granularity.min(found.granularity);
            any = true;
        }
        Ok(any)
    }

    /// Makes those that are smaller one of the right size, the `n`th of this act; whether there are any.
    async fn widen(&mut self, host: &dyn Host, n: usize, size: u64) -> Result<bool> {
        if self.smaller.is_empty() {
            return Ok(false);
        }
        let smaller = std::mem::take(&mut self.smaller);
        let wide = widen::widened(host, n, &smaller, size, self.granularity).await?;
        self.same.push(wide);
        Ok(true)
    }
}

/// Whether an ending's bitmap hands over what it knows. One that recorded is in the top layer until this is done; where it
/// is not, it is done already or was lost, and the heir must not go on as if it knew.
fn hands_over<'e>(chain: &Chain<'_>, ending: &'e Ending) -> Option<&'e String> {
    let is_there = bitmap(chain.top(), &ending.bitmap).is_some();
    ending.into.as_ref().filter(|_| is_there || !ending.record)
}

/// What a bitmap that ends knows.
fn known(chain: &Chain<'_>, ending: &Ending) -> Result<Known> {
    let mut known = Known::new();
    if hands_over(chain, ending).is_some() {
        known.add(chain, &ending.bitmap, chain.top().size)?;
    }
    Ok(known)
}

/// What ends one bitmap. The lower layers are snapshots, and nothing in them is changed: what their bitmaps know goes to
/// the top layer's too.
fn ended(chain: &Chain<'_>, ending: &Ending, known: &[Value]) -> Result<Vec<Value>> {
    let mut actions = Vec::new();
    let top = chain.top();
    if let Some(into) = hands_over(chain, ending) {
        match bitmap(top, into) {
            Some(heir) => {
                refuse_busy(heir)?;
                refuse_inconsistent(heir)?;
            }
            None if chain.having(into).next().is_none() => return Err(lost(into)),
            None => actions.push(add(&top.name, into, GRANULARITY, keeps(top), true)),
        }
        if !known.is_empty() {
            actions.push(merge(&top.name, into, known));
        }
        if ending.record {
            actions.push(action("enable", on(&top.name, into)));
        }
    }
    if let Some(found) = bitmap(top, &ending.bitmap) {
        refuse_busy(found)?;
        actions.push(action("remove", on(&top.name, &ending.bitmap)));
    }
    Ok(actions)
}

pub(crate) async fn unite(host: &dyn Host, union: &Union) -> Result<()> {
    let graph = Graph::read(host).await?;
    let united = to_unite(&graph, union).map_err(|e| e.with("disk", &union.disk.target))?;
    let Some((size, mut known)) = united else {
        return Ok(());
    };
    if let Some(holder) = union.holder.as_ref().filter(|name| graph.node(name).is_none()) {
        let null = json!({ "driver": "null-co", "node-name": holder, "size": size, "read-only": true });
        host.monitor(Command::new("blockdev-add", null)).await?;
    }
    let widens = !known.smaller.is_empty();
    let unite = async {
        known.widen(host, 0, size).await?;
        let (node, name) = (union.held_by(), &union.name);
        let granularity = match known.granularity {
            u64::MAX => GRANULARITY,
            finest => finest,
        };
        transact(
            host,
            vec![
                add(node, name, granularity, false, true),
                merge(node, name, &known.same),
            ],
        )
        .await
    };
    let united = unite.await;
    if widens {
        let cleared = widen::clear(host).await;
        return united.and(cleared);
    }
    united
}

/// The disk's size in the snapshot, and what is known of what changed; `None` where it is united.
fn to_unite(graph: &Graph, union: &Union) -> Result<Option<(u64, Known)>> {
    let node = graph.node(&union.node).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            "the node that the snapshot is read through is not there",
        )
        .with("node", &union.node)
    })?;
    let held_by = graph.node(union.held_by());
    if held_by.is_some_and(|node| bitmap(node, &union.name).is_some()) {
        // Made before: neither the snapshot nor what is known of it changes.
        return Ok(None);
    }
    let chain = Chain::of(graph, &union.disk)?;
    let mut known = Known::new();
    for name in &union.of {
        if !known.add(&chain, name, node.size)? {
            return Err(not_there(name));
        }
    }
    Ok(Some((node.size, known)))
}

fn resized(then: u64, now: u64) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the disk's size has changed in between ({then} bytes, {now} bytes), and its changed blocks cannot be told any more"),
    )
    .hint("Take a full backup of this disk, with a new checkpoint.")
}

pub(crate) async fn part(host: &dyn Host, node: &str, name: &str) -> Result<()> {
    let graph = Graph::read(host).await?;
    let Some(node) = graph.node(node) else {
        return Ok(());
    };
    match bitmap(node, name) {
        // Another export still tells it.
        Some(found) if found.busy => return Ok(()),
        Some(_) => {
            let remove = Command::new("block-dirty-bitmap-remove", on(&node.name, name));
            host.monitor(remove).await?;
        }
        None => {}
    }
    // One that was made for the bitmap alone.
    if node.driver == "null-co" {
        let delete = Command::new("blockdev-del", json!({ "node-name": node.name }));
        host.monitor(delete).await?;
    }
    Ok(())
}
