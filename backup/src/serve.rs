//! An instant look: the disks of a point, served read-only over NBD for as long as somebody wants to look.
//!
//! A `qemu-storage-daemon` serves them, over the chain that the manifests tell: every image is opened by its path in the
//! repository, and no header is asked for the name of another file. The repository's domain is locked for readers meanwhile,
//! so that no merge and no prune takes an image away.
//!
//! Here: what is asked and what is served. The daemon and how it ends with us is in `daemon`, where it listens in `place`.

mod daemon;
mod place;

use std::path::{Path, PathBuf};

use disksnap::{Error, ErrorKind, Listen, Result, Tls, nbd_uri, storage_daemon_program};
use serde::Serialize;
use serde_json::{Value, json};

use crate::qcow2::Header;
use crate::serve::daemon::Daemon;
use crate::serve::place::Place;
use crate::{CHUNK, DiskEntry, DomainFolder, Layer, Manifest, PointSpec, Repository, StoreLock};

pub use daemon::run_if_asked;

/// The unit of an image's size, in bytes.
const SECTOR: u64 = 512;

/// What is asked of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeRequest {
    /// The disks, by their targets; all of the point when none is named.
    pub targets: Vec<String>,
    /// Where to listen; a new socket in `run` when nothing is said.
    pub listen: Option<Listen>,
    /// TLS, on TCP.
    pub tls: Option<Tls>,
    /// Whether a place that other hosts can reach is meant so although clients are not verified.
    pub allow_remote: bool,
    /// A directory of this user's alone, for the socket: [`StateDir::run`](disksnap::StateDir::run).
    pub run: PathBuf,
}

/// A disk that is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServedDisk {
    /// Its target, and the export's name.
    pub target: String,
    /// How many bytes are served: whole sectors.
    pub size: u64,
    /// How many images its chain has.
    pub images: usize,
    /// Where NBD clients find it.
    pub uri: String,
}

/// The disks of a point, being served. It ends with the value or the process, however that ends.
#[derive(Debug)]
pub struct PointServer {
    point: Manifest,
    disks: Vec<ServedDisk>,
    daemon: Daemon,
    place: Place,
    _lock: Box<dyn StoreLock>,
}

/// Serves disks of a point, read-only. On return it listens.
///
/// What is in the images is not compared with its digests: [`verify`](crate::verify) does that.
///
/// # Errors
/// `Denied` for a place that others can reach, without verified clients or `allow_remote`; `Invalid` for TLS on a unix socket;
/// `Busy` while a backup, merge or prune of the domain is under way, or for a port that is taken; `AlreadyExists` for a path
/// that is taken; `NotFound` for an unknown point or disk; `Broken`, naming it, for an image that is missing or is none of ours;
/// `Unsupported` where the repository's objects are no files of this host; `Unavailable` without a storage daemon.
pub async fn serve(
    repository: &Repository,
    folder: &DomainFolder,
    which: &PointSpec,
    request: &ServeRequest,
) -> Result<PointServer> {
    let told = |error: Error| error.during("backup serve").with("domain", &folder.id.name);
    let place = Place::wanted(request).map_err(told)?;
    let lock = repository.lock(folder, true).await.map_err(told)?;
    let point = repository.point(folder, which).await.map_err(told)?;
    let told = |error: Error| told(error).with("point", &point.point);
    let started = async {
        let program = storage_daemon_program()?;
        let mut arguments = place.arguments()?;
        let mut disks = Vec::new();
        for (n, disk) in wanted(&point, &request.targets)?.into_iter().enumerate() {
            let layers = repository.chain(folder, &point, &disk.target).await?;
            arguments.extend(disk_arguments(repository, n, disk, &layers).await?);
            disks.push(served(&place, disk, layers.len()));
        }
        let place = place.claim().await?;
        match Daemon::start(&program, arguments).await {
            Ok(daemon) => Ok((disks, daemon, place.taken())),
            Err(error) => Err(place.given_up(error)),
        }
    };
    let (disks, daemon, place) = started.await.map_err(told)?;
    Ok(PointServer {
        point,
        disks,
        daemon,
        place,
        _lock: lock,
    })
}

impl PointServer {
    /// The point.
    #[must_use]
    pub fn point(&self) -> &Manifest {
        &self.point
    }

    /// Its disks that are served.
    #[must_use]
    pub fn disks(&self) -> &[ServedDisk] {
        &self.disks
    }

    /// Where it listens.
    #[must_use]
    pub fn listen(&self) -> &Listen {
        self.place.listen()
    }

    /// TLS, when it speaks it.
    #[must_use]
    pub fn tls(&self) -> Option<&Tls> {
        self.place.tls()
    }

    /// Waits until the daemon ends by itself, which it should not. Cancel-safe.
    pub async fn ended(&mut self) -> Error {
        self.daemon.ended().await.during("backup serve")
    }

    /// Stops serving; idempotent with the daemon's own end.
    pub async fn stop(self) -> Result<()> {
        self.daemon.stop().await
    }
}

/// The entries of the disks that are meant, in the order of the point.
fn wanted<'a>(point: &'a Manifest, targets: &[String]) -> Result<Vec<&'a DiskEntry>> {
    if let Some(unknown) = targets.iter().find(|target| point.disk(target).is_none()) {
        let known: Vec<&str> = point.disks.iter().map(|disk| disk.target.as_str()).collect();
        return Err(
            Error::new(ErrorKind::NotFound, format!("the point has no disk '{unknown}'"))
                .hint(format!("Its disks: {}.", known.join(", "))),
        );
    }
    let meant = |disk: &&DiskEntry| targets.is_empty() || targets.contains(&disk.target);
    Ok(point.disks.iter().filter(meant).collect())
}

fn served(place: &Place, disk: &DiskEntry, images: usize) -> ServedDisk {
    let source = place.listen().source(&disk.target, place.tls().is_some());
    ServedDisk {
        target: disk.target.clone(),
        size: disk.size.next_multiple_of(SECTOR),
        images,
        uri: nbd_uri(&source).unwrap_or_default(),
    }
}

/// A node for every image, the oldest first, as QEMU wants them made, and the export of the newest.
async fn disk_arguments(
    repository: &Repository,
    n: usize,
    disk: &DiskEntry,
    layers: &[Layer],
) -> Result<Vec<String>> {
    let name = |layer: usize| format!("disk{n}-{layer}");
    let mut arguments = Vec::new();
    for (number, layer) in layers.iter().enumerate().rev() {
        let image = checked(repository, layer)
            .await
            .map_err(|e| e.with("image", &layer.image))?;
        let backing = (number + 1 < layers.len()).then(|| name(number + 1));
        arguments.extend([
            "--blockdev".to_owned(),
            node(&name(number), &image, backing.as_deref()).to_string(),
        ]);
    }
    let export = json!({"type": "nbd", "id": format!("export{n}"), "node-name": name(0), "name": disk.target,
        "writable": false});
    arguments.extend(["--export".to_owned(), export.to_string()]);
    Ok(arguments)
}

/// QEMU's `blockdev-add` for an image (QAPI `BlockdevOptions`). Nothing writes to it, so that no lock of QEMU's is needed, which
/// not every file system has.
fn node(name: &str, image: &str, backing: Option<&str>) -> Value {
    json!({"driver": "qcow2", "node-name": name, "read-only": true, "backing": backing,
        "file": {"driver": "file", "filename": image, "read-only": true, "locking": "off"}})
}

/// The path of an image whose header is one that we write: no other has QEMU open a file that the header names.
async fn checked(repository: &Repository, layer: &Layer) -> Result<String> {
    let broken = |why: String| {
        Error::new(
            ErrorKind::Broken,
            format!("the image of {} is damaged: {why}", layer.point),
        )
    };
    let store = repository.store();
    let blob = store
        .open(&layer.image)
        .await
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => broken("it is missing".to_owned()).because(error),
            _ => error,
        })?;
    let length = usize::try_from(blob.length().min(CHUNK)).unwrap_or(usize::MAX);
    let header = Header::decode(&blob.read_at(0, length).await?).map_err(broken)?;
    // QEMU serves whole sectors.
    let (has, should) = (header.size, layer.size.next_multiple_of(SECTOR));
    if has != should {
        return Err(broken(format!(
            "it is of a disk of {has} bytes, and the disk has {should}"
        )));
    }
    let Some(path) = store.file(&layer.image) else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "only a repository in a directory of this host can be served",
        )
        .with("repository", store.describe())
        .hint("Restore the point to a file, and look at that."));
    };
    utf8(std::path::absolute(&path).map_err(|e| Error::io("cannot find the image", e))?)
}

/// A path as QEMU takes it.
fn utf8(path: PathBuf) -> Result<String> {
    path.into_os_string().into_string().map_err(|path| {
        Error::new(ErrorKind::Invalid, "QEMU opens no path that is not UTF-8")
            .with("path", Path::new(&path).display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_its_backing_by_name_and_none_where_there_is_none() {
        let top = node("disk0-0", "/repo/a,b.qcow2", Some("disk0-1"));
        assert_eq!(
            (&top["backing"], &top["file"]["filename"]),
            (&json!("disk0-1"), &json!("/repo/a,b.qcow2"))
        );
        // Left out, the header would be asked.
        assert_eq!(
            node("disk0-1", "/repo/x", None).get("backing"),
            Some(&Value::Null)
        );
    }
}
