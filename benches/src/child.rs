//! What this program does when it starts itself: one act in a process of its own, whose time or memory is measured.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use disksnap_checkpoint_set::json;
use disksnap_core::{Redefine, SnapshotName};
use disksnap_nbd::{BASE_ALLOCATION, BulkOptions, BulkReader, Chunk, Client, ConnectOptions, Uri};
use tokio::runtime::Runtime;

use crate::scene::{Scene, request};
use crate::{backup, lvm};

/// `READ URI [FILE]`: the whole export, to a file or to nowhere.
pub(crate) const READ: &str = "child-read";
/// `EXTENTS URI`: only which parts are zero.
pub(crate) const EXTENTS: &str = "child-extents";
/// `ACT STATE-DIRECTORY DOMAIN.XML VERB`: one act of the dispatcher.
pub(crate) const ACT: &str = "child-act";

/// `CHANGES URI CONTEXT`: each changed range on a line, as `disksnap changes` prints them.
pub(crate) const CHANGES: &str = "child-changes";
/// `REDEFINE STATE-DIRECTORY DOMAIN.XML SET.JSON`: a set of checkpoints made known in one call.
pub(crate) const REDEFINE: &str = "child-redefine";

/// How many connections a read uses, as `disksnap read` does.
const CONNECTIONS: usize = 4;
/// This program, also when its file was replaced meanwhile.
pub(crate) const OWN: &str = "/proc/self/exe";
/// The name of the snapshot that acts are about.
pub(crate) const NAME: &str = "measured";

/// Does what the arguments say, if they are for a child, and prints the most memory that it took, in KiB, or what it
/// measured.
pub(crate) fn run_if_asked(arguments: &[String]) -> Result<bool> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [READ, uri] => read(uri, None)?,
        [READ, uri, file] => read(uri, Some(Path::new(file)))?,
        [EXTENTS, uri] => Runtime::new()?.block_on(extents(uri))?,
        [ACT, state, domain, verb] => act(Path::new(state), Path::new(domain), verb)?,
        [CHANGES, uri, context] => {
            Runtime::new()?.block_on(changes(uri, context))?;
            return Ok(true);
        }
        [REDEFINE, state, domain, set] => redefine(Path::new(state), Path::new(domain), Path::new(set))?,
        [backup::PULL, repository, domain, uri, checkpoint] => {
            backup::pull_here(repository, domain, uri, checkpoint, None)?;
        }
        [backup::PULL, repository, domain, uri, checkpoint, since] => {
            backup::pull_here(repository, domain, uri, checkpoint, Some(since))?;
        }
        [backup::CHANGED, uri, bitmap] => backup::read_changed(uri, bitmap)?,
        [lvm::TAKES, rounds] => {
            lvm::run_inside(rounds.parse()?)?;
            return Ok(true);
        }
        _ => return Ok(false),
    }
    println!("{}", most_memory()?);
    Ok(true)
}

/// Runs a child and returns the most memory that it took, in KiB.
pub(crate) fn memory_of(arguments: &[&str]) -> Result<f64> {
    let output = Command::new(OWN).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}

/// `VmHWM` of proc(5).
fn most_memory() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("/proc/self/status does not tell VmHWM")?.parse()?)
}

async fn connect(uri: &str, connections: usize, context: &str) -> Result<Vec<Client>> {
    let options = ConnectOptions {
        meta_contexts: vec![context.to_owned()],
        ..ConnectOptions::default()
    };
    let uri: Uri = uri.parse()?;
    Ok(Client::connect_many(&uri, &options, connections).await?)
}

fn read(uri: &str, file: Option<&Path>) -> Result<()> {
    Runtime::new()?.block_on(async {
        let clients = connect(uri, CONNECTIONS, BASE_ALLOCATION).await?;
        let size = clients[0].size();
        let file = file.map(File::create).transpose()?;
        if let Some(file) = &file {
            file.set_len(size)?;
        }
        let mut reader = BulkReader::new(clients, 0..size, &BulkOptions::default())?;
        while let Some(chunk) = reader.next().await? {
            if let (Chunk::Data { offset, data }, Some(file)) = (chunk, &file) {
                file.write_all_at(&data, offset)?;
            }
        }
        Ok(())
    })
}

async fn extents(uri: &str) -> Result<()> {
    let clients = connect(uri, 1, BASE_ALLOCATION).await?;
    let mut extents = clients[0].extents(BASE_ALLOCATION, 0..clients[0].size())?;
    let mut data = 0;
    while let Some(extent) = extents.next().await? {
        data += if extent.is_zero() { 0 } else { extent.length };
    }
    ensure!(data > 0, "the disk has data");
    Ok(())
}

async fn changes(uri: &str, context: &str) -> Result<()> {
    let clients = connect(uri, 1, context).await?;
    let mut extents = clients[0].extents(context, 0..clients[0].size())?;
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
    while let Some(extent) = extents.next().await? {
        if extent.is_dirty() {
            writeln!(out, "vda  {}  {}", extent.offset, extent.length)?;
        }
    }
    Ok(out.flush()?)
}

fn redefine(state: &Path, domain: &Path, set: &Path) -> Result<()> {
    let scene = Scene::new(&fs::read_to_string(domain)?, state)?;
    let set = json::read(BufReader::new(File::open(set)?))?;
    let redefined = scene.dispatcher.redefine(&scene.domain, set, Redefine::default());
    scene.runtime.block_on(redefined)?;
    Ok(())
}

fn act(state: &Path, domain: &Path, verb: &str) -> Result<()> {
    let scene = Scene::new(&fs::read_to_string(PathBuf::from(domain))?, state)?;
    let name: SnapshotName = NAME.parse()?;
    match verb {
        "create" => {
            let mut request = request(&["vda".to_owned()], "filter");
            request.name = Some(name);
            scene.create(&request).map(drop)
        }
        "list" => {
            let list = scene.runtime.block_on(scene.dispatcher.list(&scene.domain))?;
            ensure!(list.len() == 1, "there are {} snapshots", list.len());
            Ok(())
        }
        "delete" => scene.delete(&name),
        _ => bail!("there is no act {verb:?}"),
    }
}
