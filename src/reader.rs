//! One disk of a snapshot: opened through the dispatcher, read at any place, closed again.

use std::ops::Deref;

use disksnap_core::{
    CheckpointName, Dispatcher, Domain, Error, ErrorKind, NetworkHost, Opened, Result, SnapshotName, Source,
};
use disksnap_nbd::{DEFAULT_PORT, Uri};

use crate::disk::{DiskReader, Of};

/// One disk of a snapshot, open for reading.
///
/// What the domain's hypervisor serves is read over NBD, through an export of this reader's own that
/// ends with [`SnapshotReader::close`]; what lies in a raw file or device is read from there. A reader
/// that is dropped unclosed leaves its export to the next request on the domain, which stops it.
#[derive(Debug)]
pub struct SnapshotReader {
    dispatcher: Dispatcher,
    domain: Domain,
    opened: Opened,
    disk: DiskReader,
    size_before: Option<u64>,
}

/// Everything that is read.
impl Deref for SnapshotReader {
    type Target = DiskReader;

    fn deref(&self) -> &DiskReader {
        &self.disk
    }
}

impl SnapshotReader {
    pub(crate) async fn open(
        dispatcher: &Dispatcher,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        since: Option<&CheckpointName>,
    ) -> Result<Self> {
        let (opened, size_before) = match since {
            None => (dispatcher.open(domain, name, target).await?, None),
            Some(since) => {
                let size = size_at(dispatcher, domain, since, target).await?;
                (dispatcher.open_since(domain, name, target, since).await?, size)
            }
        };
        let of = Of::Snapshot {
            dispatcher: dispatcher.clone(),
            domain: Box::new(domain.clone()),
            name: name.clone(),
            target: target.to_owned(),
        };
        match disk_of(&opened, of).await {
            Ok(disk) => Ok(Self {
                dispatcher: dispatcher.clone(),
                domain: domain.clone(),
                opened,
                disk,
                size_before,
            }),
            Err(error) => {
                let closed = dispatcher.close(domain, opened).await;
                let error = error
                    .during("read")
                    .with("domain", &domain.id)
                    .with("snapshot", name);
                Err(error
                    .with("disk", target)
                    .rollback_failed(closed.err().into_iter().collect()))
            }
        }
    }

    /// What is to be known before its data is read: that the snapshot's room runs out.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.opened.warnings
    }

    /// Why more is told as changed than was written, where it is; never less.
    #[must_use]
    pub fn excess(&self) -> Option<&str> {
        self.opened.excess.as_deref()
    }

    /// The disk's size at the checkpoint that the reader was opened with, in bytes, where it is known.
    #[must_use]
    pub fn size_before(&self) -> Option<u64> {
        self.size_before
    }

    /// Where the bytes come from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.opened.source
    }

    /// Ends the reading, and with it the export that was made for it.
    ///
    /// # Errors
    /// What stopping the export meets.
    pub async fn close(self) -> Result<()> {
        self.disk.disconnect().await;
        self.dispatcher.close(&self.domain, self.opened).await
    }
}

/// The disk's size at a checkpoint; nothing where that does not cover it, which opening tells.
async fn size_at(
    dispatcher: &Dispatcher,
    domain: &Domain,
    checkpoint: &CheckpointName,
    target: &str,
) -> Result<Option<u64>> {
    let all = dispatcher.catalog().checkpoints(&domain.id).await?;
    let found = all.iter().find(|known| known.name == *checkpoint);
    Ok(found.and_then(|known| known.disk(target)?.size))
}

async fn disk_of(opened: &Opened, of: Of) -> Result<DiskReader> {
    match (&opened.source, opened.format.as_str()) {
        (source @ Source::Network { .. }, "raw") => {
            let uri = uri_of(source).ok_or_else(|| unreadable(opened))?;
            let tls = opened.tls.as_ref().map(|tls| tls.credentials.as_ref());
            DiskReader::connect(&uri, tls, opened.bitmap.as_deref(), of).await
        }
        (Source::File { file: path } | Source::Block { dev: path }, "raw") => {
            DiskReader::open(path, of).await
        }
        _ => Err(unreadable(opened)),
    }
}

fn unreadable(opened: &Opened) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{} data at {} cannot be read here", opened.format, opened.source),
    )
    .hint(
        "Open the snapshot's backupSource read-only with a program that knows the format, such as qemu-img.",
    )
}

/// The URI of an NBD source (the NBD project's `doc/uri.md`), as nbdcopy and qemu-img take it; `None`
/// for any other source. A server that listens on all addresses is reached on this host's own.
#[must_use]
pub fn nbd_uri(source: &Source) -> Option<String> {
    uri_of(source).map(|uri| uri.to_string())
}

fn uri_of(source: &Source) -> Option<Uri> {
    let Source::Network {
        protocol,
        name,
        hosts,
        tls,
    } = source
    else {
        return None;
    };
    let export = name.clone().unwrap_or_default();
    let uri = match hosts.first().filter(|_| protocol == "nbd")? {
        NetworkHost::Unix { socket } => Uri::unix(socket, export),
        NetworkHost::Tcp { name, port } => Uri::tcp(reachable(name), port.unwrap_or(DEFAULT_PORT), export),
    };
    Some(if *tls { uri.with_tls() } else { uri })
}

/// A server that listens on all addresses is reached on this host's own.
fn reachable(address: &str) -> &str {
    match address {
        "0.0.0.0" => "127.0.0.1",
        "::" => "::1",
        other => other,
    }
}
