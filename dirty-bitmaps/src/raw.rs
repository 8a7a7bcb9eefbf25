//! Raw disks through a qcow2 that keeps their bitmaps: core's [`RawDisks`] over QEMU's external data files.
//!
//! The qcow2 is written here, never by `qemu-img create`, which zeroes the disk. While the domain runs the qcow2 is
//! opened over the node that the disk has, so that there is one way to the bytes at any time; while it is off QEMU finds
//! the raw disk by the name in the qcow2's header.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use disksnap_core::{
    Command, Crossing, DataStore, DeviceKind, Disk, Error, ErrorKind, Host, RawDisks, Result, RunState,
    SCRATCH_BITMAP, SnapshotId, Source, Step,
};
use disksnap_hypervisor::graph::{Device, Node, same_file};
use disksnap_hypervisor::{DiskNodes, Graph};
use disksnap_image_file::{
    Called, MadeFile, can_tell_written_past, is_in_use, raw_data_of, raw_data_qcow2_is_new,
    raw_data_qcow2_size, remove_file, renew_raw_data_qcow2, room, write_raw_data_qcow2, written_past,
};
use serde_json::{Value, json};

use crate::DirtyBitmaps;
use crate::chain::{Chain, bitmap};
use crate::live::{action, add, merge, on, refuse_busy, transact};

/// The nodes of a raw disk: formats and protocols that show one file as it is.
const RAW: [&str; 3] = ["raw", "file", "host_device"];

const CALLED: Called = Called {
    what: "qcow2 for the disk's bitmaps",
    option: "--in",
    filled_by: "its bitmaps fill it",
    too_large: "Such a qcow2 can have a raw disk of at most 2 PiB.",
};

#[async_trait]
impl RawDisks for DirtyBitmaps {
    async fn plan(&self, host: &dyn Host, disk: &Disk, metadata: &Path) -> Result<(Disk, Vec<String>)> {
        let source = suits(disk)?;
        let raw = path_of(disk)?;
        let directory = refuse_place(metadata)?;
        let size = size_of(&raw).await?;
        let mut warnings = Vec::new();
        match host.state().await? {
            RunState::Off => refuse_open(&raw)?,
            state => {
                refuse_state(&state)?;
                let graph = Graph::read(host).await?;
                let seat = Seat::of(&graph, disk)?;
                same_size(&graph, &seat, size)?;
                warnings.push(
                    "until the domain is started anew, what the guest trims is not passed on to its raw disk"
                        .to_owned(),
                );
            }
        }
        refuse_full(&directory, size)?;
        if !can_tell_written_past(&directory, &raw) {
            warnings.push(format!(
                "whoever writes to {} itself does so past the bitmaps, and that cannot be noticed: it is no file in the \
                 file system of {}",
                raw.display(),
                directory.display()
            ));
        }
        let mut to = disk.clone();
        to.source = Some(Source::File {
            file: metadata.to_owned(),
        });
        to.driver.format = Some("qcow2".to_owned());
        to.data_store = Some(DataStore {
            format: Some("raw".to_owned()),
            source,
        });
        Ok((to, warnings))
    }

    async fn prepare(&self, host: &dyn Host, crossing: &Crossing) -> Result<Vec<Step>> {
        if crossing.tracks() {
            make(host, crossing).await?;
        }
        if !host.state().await?.is_active() {
            if !crossing.tracks() {
                refuse_open(&path_of(crossing.through())?)?;
            }
            return Ok(Vec::new());
        }
        let graph = Graph::read(host).await?;
        if crossing.tracks() {
            put_over(host, &graph, crossing).await
        } else {
            take_away(&graph, crossing)
        }
    }

    async fn has_crossed(&self, host: &dyn Host, crossing: &Crossing) -> Result<Option<bool>> {
        if !host.state().await?.is_active() {
            return Ok(None);
        }
        let graph = Graph::read(host).await?;
        // A disk that is neither is gone with its device: whatever was begun has come to nothing.
        let through = over(&graph, crossing.through())?.is_some_and(|seat| seat.device.is_some());
        Ok(Some(through == crossing.tracks()))
    }

    async fn clear(&self, host: &dyn Host, crossing: &Crossing, crossed: bool) -> Result<()> {
        let active = host.state().await?.is_active();
        match (crossing.tracks(), crossed) {
            (true, true) => {
                if active {
                    drop_carried(host, crossing).await?;
                }
                made(crossing)?.unmark()
            }
            (true, false) => {
                if active {
                    delete_nodes(host, crossing).await?;
                }
                let made = made(crossing)?;
                if crossing.made {
                    made.remove()
                } else {
                    made.remove_if_ours()
                }
            }
            (false, true) => {
                if active {
                    delete_nodes(host, crossing).await?;
                }
                remove_qcow2(crossing)
            }
            (false, false) => Ok(()),
        }
    }

    async fn renew_past(&self, host: &dyn Host, disks: &[&Disk]) -> Result<Vec<Option<String>>> {
        let graph = match host.state().await? {
            RunState::Off => None,
            _ => Some(Graph::read(host).await?),
        };
        let mut all = Vec::with_capacity(disks.len());
        for disk in disks {
            let found = match &graph {
                None => past_at_rest(disk),
                Some(graph) => past_now(graph, disk),
            };
            all.push(found.map_err(|e| e.with("disk", &disk.target))?);
        }
        Ok(all)
    }
}

/// The source of a disk that can go through a qcow2.
fn suits(disk: &Disk) -> Result<Source> {
    let no = |why: &str| Err(Error::new(ErrorKind::Unsupported, why.to_owned()));
    match disk.driver.format.as_deref() {
        Some("raw") => {}
        Some("qcow2") => {
            return no("the disk is a qcow2 image: it keeps its bitmaps by itself");
        }
        Some(other) => {
            return no(&format!(
                "the disk has the format '{other}': only raw disks go through a qcow2"
            ));
        }
        None => return no("the domain's document does not say the disk's format (<driver type='raw'/>)"),
    }
    if disk.encrypted {
        return no("the disk is encrypted, and the qcow2's header cannot say how it is opened");
    }
    if disk.read_only || disk.device != DeviceKind::Disk {
        return no("the disk is no hard disk that is written to through QEMU's block layer");
    }
    if disk.shareable {
        return no("other domains may write to the disk too, past the bitmaps of this one");
    }
    if disk.backing.is_some() {
        return no("a raw disk has no backing file, and the domain's document names one");
    }
    match &disk.source {
        Some(source @ (Source::File { .. } | Source::Block { .. })) => Ok(source.clone()),
        _ => no("the disk is neither a file nor a block device of this host"),
    }
}

fn path_of(disk: &Disk) -> Result<PathBuf> {
    let path = disk.source.as_ref().and_then(Source::path);
    path.filter(|path| path.is_absolute())
        .map(Path::to_owned)
        .ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "the disk's path is not absolute").with("disk", &disk.target)
        })
}

/// The directory that the qcow2 is to be in.
fn refuse_place(metadata: &Path) -> Result<PathBuf> {
    let invalid = |why: &str| Error::new(ErrorKind::Invalid, why.to_owned()).with("path", metadata.display());
    if !metadata.is_absolute() {
        return Err(invalid("the path of the qcow2 is not absolute"));
    }
    if metadata.to_str().is_none() || metadata.file_name().is_none() {
        return Err(invalid(
            "this cannot be the path of a file in a domain's document",
        ));
    }
    if metadata.symlink_metadata().is_ok() {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("{} exists already", metadata.display()),
        )
        .hint("An existing file is never overwritten: name another, or remove it."));
    }
    let directory = metadata.parent().unwrap_or(Path::new("/"));
    if directory.is_dir() {
        return Ok(directory.to_owned());
    }
    let missing = format!("there is no directory {}", directory.display());
    Err(Error::new(ErrorKind::NotFound, missing))
}

fn refuse_full(directory: &Path, size: u64) -> Result<()> {
    let free = room(directory)
        .map_err(|e| Error::io(format!("cannot look at the directory {}", directory.display()), e))?;
    let Some(needed) = raw_data_qcow2_size(size) else {
        return Err(Error::new(ErrorKind::Unsupported, CALLED.too_large));
    };
    if free > needed {
        return Ok(());
    }
    let message = format!(
        "only {} MiB are free in {}, and the qcow2 takes up {} MiB",
        free >> 20,
        directory.display(),
        (needed >> 20) + 1
    );
    Err(Error::new(ErrorKind::NoSpace, message))
}

/// Bytes of a file or a device.
async fn size_of(raw: &Path) -> Result<u64> {
    let path = raw.to_owned();
    blocking(move || {
        use std::io::Seek;
        let seek = |mut file: std::fs::File| file.seek(std::io::SeekFrom::End(0));
        std::fs::File::open(&path)
            .and_then(seek)
            .map_err(|e| Error::io(format!("cannot open {}", path.display()), e))
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::new(ErrorKind::Internal, "the task that looks at files died").because(e))?
}

/// QEMU locks what it opens.
fn refuse_open(path: &Path) -> Result<()> {
    if !is_in_use(path) {
        return Ok(());
    }
    let message = format!(
        "the domain is taken to be off, and somebody has {} open",
        path.display()
    );
    Err(Error::new(ErrorKind::Busy, message)
        .hint("If the domain runs, say where its monitor is: --monitor, or the <metadata> of its document."))
}

fn refuse_state(state: &RunState) -> Result<()> {
    match state {
        RunState::Migrating(word) => Err(Error::new(
            ErrorKind::Busy,
            format!("a migration is under way ({word})"),
        )
        .hint("Wait until the migration has ended.")),
        RunState::Storage => Err(Error::new(
            ErrorKind::Unsupported,
            "a storage daemon has no device that could go over to another node",
        )
        .hint("Stop it first, and start it with the document as it is then.")),
        _ => Ok(()),
    }
}

/// A device that can go over from one node to another.
struct Seat {
    device: Device,
    nodes: DiskNodes,
}

impl Seat {
    /// The seat of a raw disk, with nothing around it that would be in the way.
    fn of(graph: &Graph, raw: &Disk) -> Result<Self> {
        let nodes = graph.root_of_disk(raw)?;
        let strange = |name: &&String| {
            let node = graph.node(name);
            node.is_none_or(|node| !RAW.contains(&node.driver.as_str()) || node.encrypted)
        };
        if let Some(name) = nodes.chain.iter().find(strange) {
            let driver = graph.node(name).map_or("", |node| node.driver.as_str());
            return Err(in_the_way(&format!(
                "there is a node of the driver '{driver}' over the raw disk"
            )));
        }
        Self::free(graph, nodes)
    }

    fn free(graph: &Graph, nodes: DiskNodes) -> Result<Self> {
        if nodes.stale || !nodes.backing.is_empty() {
            return Err(in_the_way("the disk stands on another image"));
        }
        if let Some(job) = graph.jobs_on(&nodes.chain).next() {
            return Err(in_the_way(&format!(
                "the {} job '{}' works on the disk",
                job.kind, job.id
            )));
        }
        let exported = graph.exports.iter().find(|e| nodes.chain.contains(&e.node));
        if let Some(export) = exported {
            return Err(in_the_way(&format!("the export '{}' serves the disk", export.id)));
        }
        if let Some((parent, role)) = graph.parents(&nodes.top).next() {
            return Err(in_the_way(&format!(
                "the node '{}' ({}) has the disk as its {role}",
                parent.name, parent.driver
            )));
        }
        let Some(device) = nodes.device.clone() else {
            return Err(in_the_way("no device of the guest uses the disk"));
        };
        Ok(Self { device, nodes })
    }

    /// Hangs the device on a node, and back.
    fn goes_over(&self, to: &str) -> Step {
        let to_node = |node: &str| {
            let attach = json!({"path": self.device.qom_path, "property": "drive", "value": node});
            Command::new("qom-set", attach)
        };
        Step {
            command: to_node(to),
            undo: Some(to_node(&self.nodes.top)),
        }
    }

    /// Only QEMU's virtio-blk lets its node go back to the main thread while the guest stands still.
    fn lets_go(&self) -> bool {
        self.device.qom_path.ends_with("/virtio-backend")
    }
}

fn in_the_way(what: &str) -> Error {
    Error::new(ErrorKind::Busy, what.to_owned())
        .hint("Delete the disk's snapshots and stop its exports first, or wait until the job has ended.")
}

/// Whoever opens the qcow2 by itself finds the whole raw file: a slice of one would be another disk.
fn same_size(graph: &Graph, seat: &Seat, file: u64) -> Result<()> {
    let node = graph.node(&seat.nodes.top).map_or(0, |node| node.size);
    if node == file.next_multiple_of(512) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("the guest's disk has {node} bytes and the raw file {file}: the disk is a part of the file"),
    ))
}

fn made(crossing: &Crossing) -> Result<MadeFile> {
    Ok(MadeFile::chosen(
        path_of(crossing.through())?,
        SnapshotId(crossing.id),
    ))
}

/// Makes the qcow2, for whoever can open the raw disk.
async fn make(host: &dyn Host, crossing: &Crossing) -> Result<()> {
    let raw = path_of(crossing.raw())?;
    let size = size_of(&raw).await?;
    let made = made(crossing)?;
    let owner = match host.image_owner().await? {
        None if !host.state().await?.is_active() => owner_of(&raw),
        owner => owner,
    };
    blocking(move || {
        let name = raw
            .to_str()
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "the raw disk's path is not Unicode"))?;
        made.create(CALLED, owner, |file| write_raw_data_qcow2(file, size, name))
    })
    .await
}

/// Whose the raw file is, where it is not ours and we may give files away.
fn owner_of(raw: &Path) -> Option<disksnap_core::Owner> {
    use std::os::unix::fs::MetadataExt;
    let metadata = raw.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let ours = rustix::process::geteuid();
    (ours.is_root() && metadata.uid() != 0).then(|| disksnap_core::Owner {
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

/// Opens the qcow2 over the disk's node; what is left for the moment in which the guest stands still.
async fn put_over(host: &dyn Host, graph: &Graph, crossing: &Crossing) -> Result<Vec<Step>> {
    let seat = Seat::of(graph, crossing.raw())?;
    let top = graph.node(&seat.nodes.top);
    let open = Command::new(
        "blockdev-add",
        qcow2_node(&path_of(crossing.through())?, crossing, &seat, top),
    );
    let close = Command::new("blockdev-del", json!({"node-name": crossing.node}));
    let mut steps = Vec::new();
    match host.monitor(open.clone()).await {
        Ok(_) => {}
        // The disk's node is in an iothread, which keeps it as long as the guest runs.
        Err(error) if error.message().contains("Cannot change iothread") => {
            if !seat.lets_go() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the disk's controller has an iothread that keeps the disk's node to itself",
                )
                .because(error)
                .hint("Shut the domain down, and do it while it is off."));
            }
            steps.push(Step {
                command: open,
                undo: Some(close),
            });
        }
        Err(error) => return Err(error),
    }
    steps.extend(carried(&Chain::of(graph, crossing.raw())?, &crossing.node)?);
    steps.push(seat.goes_over(&crossing.node));
    Ok(steps)
}

fn qcow2_node(metadata: &Path, crossing: &Crossing, seat: &Seat, top: Option<&Node>) -> Value {
    let said = |key: &str| top.map_or(&Value::Null, |node| &node.info[key]);
    let cache = said("cache");
    let cache = json!({
        "direct": cache["direct"].as_bool().unwrap_or(false),
        "no-flush": cache["no-flush"].as_bool().unwrap_or(false),
    });
    // With "unmap" it would have to trim, and where the nodes below do not, the qcow2 and the raw disk would part.
    let detect = match said("detect_zeroes").as_str() {
        Some("on" | "unmap") => "on",
        _ => "off",
    };
    json!({
        "driver": "qcow2",
        "node-name": crossing.node,
        "discard": "ignore",
        "detect-zeroes": detect,
        "cache": cache,
        "data-file": seat.nodes.top,
        "file": {"driver": "file", "filename": metadata, "cache": cache},
    })
}

/// What takes the bitmaps that are in memory along. Those of checkpoints are durable from then on.
fn carried(chain: &Chain<'_>, node: &str) -> Result<Option<Step>> {
    let from = chain.top();
    let mut actions = Vec::new();
    for bitmap in from.bitmaps.iter().filter(|bitmap| !bitmap.inconsistent) {
        refuse_busy(bitmap)?;
        let durable = !bitmap.name.starts_with(SCRATCH_BITMAP);
        actions.push(add(
            node,
            &bitmap.name,
            bitmap.granularity,
            durable,
            !bitmap.recording,
        ));
        actions.push(merge(node, &bitmap.name, &[on(&from.name, &bitmap.name)]));
    }
    // What is undone is the node itself, and they with it.
    let carry = || Command::new("transaction", json!({ "actions": actions }));
    Ok((!actions.is_empty()).then(|| Step {
        command: carry(),
        undo: None,
    }))
}

/// Those that were taken along are not needed on the raw disk's own node any more.
///
/// The guardian may have let the guest go after they were taken along and before it crossed: what it wrote then is
/// known by the old ones alone, and goes to the new ones before they are removed.
async fn drop_carried(host: &dyn Host, crossing: &Crossing) -> Result<()> {
    let graph = Graph::read(host).await?;
    let Some(over) = over(&graph, crossing.through())? else {
        return Ok(());
    };
    let mut actions = Vec::new();
    for below in over.data.iter().flat_map(|data| graph.primary_chain(data)) {
        for old in below.bitmaps.iter().filter(|old| !old.busy) {
            let Some(new) = bitmap(over.node, &old.name) else {
                continue;
            };
            if !old.inconsistent && !new.inconsistent {
                refuse_busy(new)?;
                actions.push(merge(&over.node.name, &old.name, &[on(&below.name, &old.name)]));
            }
            actions.push(action("remove", on(&below.name, &old.name)));
        }
    }
    transact(host, actions).await
}

/// A qcow2 that the hypervisor has open.
struct Over<'g> {
    node: &'g Node,
    /// The node of the raw disk.
    data: Option<String>,
    /// The device that is on it.
    device: Option<&'g Device>,
}

/// The qcow2 of a disk in the hypervisor, if it has it open.
fn over<'g>(graph: &'g Graph, through: &Disk) -> Result<Option<Over<'g>>> {
    let path = path_of(through)?;
    let here = |node: &&Node| {
        let chain = graph.primary_chain(&node.name);
        let file = chain.last().and_then(|last| last.path.as_ref());
        node.driver == "qcow2" && file.is_some_and(|file| same_file(file, &path))
    };
    let node = graph.nodes().find(here);
    Ok(node.map(|node| Over {
        node,
        data: node
            .children
            .iter()
            .find(|child| child.role == "data-file")
            .map(|child| child.node.clone()),
        device: graph.devices.iter().find(|device| {
            let top = device.node.as_deref().unwrap_or_default();
            graph.primary_chain(top).iter().any(|n| n.name == node.name)
        }),
    }))
}

fn take_away(graph: &Graph, crossing: &Crossing) -> Result<Vec<Step>> {
    let nodes = graph.root_of_disk(crossing.through())?;
    if nodes.chain.first() != Some(&nodes.format) {
        return Err(in_the_way("there is a node over the qcow2"));
    }
    let seat = Seat::free(graph, nodes)?;
    let format = graph.node(&seat.nodes.format);
    for bitmap in format.iter().flat_map(|node| &node.bitmaps) {
        refuse_busy(bitmap)?;
    }
    let data = over(graph, crossing.through())?.and_then(|over| over.data);
    let data = data.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "the hypervisor does not have the raw disk as the data of this qcow2",
        )
    })?;
    Ok(vec![seat.goes_over(&data)])
}

/// Closes the qcow2 in the hypervisor, where no device is on it any more. Idempotent.
async fn delete_nodes(host: &dyn Host, crossing: &Crossing) -> Result<()> {
    let graph = Graph::read(host).await?;
    let Some(over) = over(&graph, crossing.through())? else {
        return Ok(());
    };
    // Nodes that nobody named go with the one that they belong to.
    let file = over.node.primary().filter(|name| !name.starts_with('#'));
    for name in std::iter::once(over.node.name.as_str()).chain(file) {
        let delete = Command::new("blockdev-del", json!({ "node-name": name }));
        match host.monitor(delete).await {
            Err(error) if name == over.node.name => return Err(error.with("node", name)),
            _ => {}
        }
    }
    Ok(())
}

/// Removes a qcow2 that is not needed any more: only if it is one for this raw disk.
fn remove_qcow2(crossing: &Crossing) -> Result<()> {
    let (path, raw) = (path_of(crossing.through())?, path_of(crossing.raw())?);
    match raw_data_of(&path) {
        Ok(Some(data)) if data == raw || same_file(&data, &raw) => remove_file(&path),
        // It is somebody else's by now, or nobody's.
        _ => Ok(()),
    }
}

/// Whether the raw disk of a domain that is off was written to past its qcow2.
fn past_at_rest(disk: &Disk) -> Result<Option<String>> {
    let image = path_of(disk)?;
    let (Ok(Some(data)), Some(said)) = (raw_data_of(&image), &disk.data_store) else {
        // Whoever needs it says what is wrong with it.
        return Ok(None);
    };
    // The header may name any file; what is looked at, and in the end written anew, is the one that belongs to the disk.
    if !said
        .source
        .path()
        .is_some_and(|said| data == said || same_file(&data, said))
    {
        return Ok(None);
    }
    let past = match written_past(&image, &data) {
        Ok(past) => past,
        // The raw disk is not there now. The next act looks at it again, and this one goes on with the others.
        Err(error) if is_missing(&error) && image.exists() => return Ok(None),
        Err(error) => {
            let failed = format!("cannot look at {} and its data", image.display());
            return Err(Error::io(failed, error));
        }
    };
    if !past || is_new(&image)? {
        return Ok(None);
    }
    refuse_open(&image)?;
    let why = format!("{} was written to by something else", said.source);
    renew(&image, why).map(Some)
}

fn is_missing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

/// Whether the domain runs on the raw disk itself. Then the qcow2 is made anew, without bitmaps.
pub(crate) fn past_now(graph: &Graph, disk: &Disk) -> Result<Option<String>> {
    let image = path_of(disk)?;
    let Some(data) = disk.data_store.as_ref().and_then(|data| data.source.path()) else {
        return Ok(None);
    };
    let open = |path: &Path| {
        graph
            .nodes()
            .any(|n| n.path.as_ref().is_some_and(|p| same_file(p, path)))
    };
    if open(&image) || !open(data) {
        return Ok(None);
    }
    let why = format!("the domain runs on {} itself", data.display());
    if is_new(&image)? {
        return Ok(Some(why));
    }
    renew(&image, why).map(Some)
}

/// Makes the qcow2 anew; nobody may have it open. Why, and what else is to be told of it.
fn renew(image: &Path, why: String) -> Result<String> {
    let shorter = renew_raw_data_qcow2(image)
        .map_err(|e| Error::io(format!("cannot make {} anew", image.display()), e))?;
    Ok(match shorter {
        None => why,
        Some(length) => {
            format!("{why} (it has {length} bytes now, fewer than the guest's disk, which keeps its size)")
        }
    })
}

fn is_new(image: &Path) -> Result<bool> {
    raw_data_qcow2_is_new(image)
        .map_err(|e| Error::io(format!("cannot read {} and its data", image.display()), e))
}
