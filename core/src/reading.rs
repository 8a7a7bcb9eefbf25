//! Opening one disk of a snapshot for a reader, through an export of its own where it needs one.

use crate::dispatcher::Held;
use crate::wanted::{Purpose, disk_of};
use crate::{
    Access, Act, Alias, CheckpointName, Dispatcher, Domain, DomainLock, Error, ErrorKind, ExportDisk,
    ExportRequest, Intent, Result, SnapshotName, Source, Tls,
};

/// A snapshot's disk, held open for one reader; it is served until it is closed, at the latest until the
/// first act on the domain after this process has ended.
#[derive(Debug)]
pub struct Opened {
    /// Where its bytes are.
    pub source: Source,
    /// The image format at that place.
    pub format: String,
    /// TLS, when the server speaks it.
    pub tls: Option<Tls>,
    /// What the reader should know: the snapshot's room runs out.
    pub warnings: Vec<String>,
    /// The dirty bitmap that tells what changed since a checkpoint, where that was asked for: NBD clients ask for it as the
    /// meta context `qemu:dirty-bitmap:NAME`.
    pub bitmap: Option<String>,
    /// Why more is told as changed than was written, where it is; never less.
    pub excess: Option<String>,
    reading: Option<Reading>,
}

/// What ends with the reader.
#[derive(Debug)]
struct Reading {
    intent: Intent,
    export: Alias,
    _lease: Box<dyn DomainLock>,
}

/// Whether the bytes at a source are the disk's.
fn is_plain(source: &Source, format: &str) -> bool {
    format == "raw" && matches!(source, Source::File { .. } | Source::Block { .. })
}

impl Dispatcher {
    /// Opens one disk of a snapshot for reading: as it is where the bytes lie there plainly, else through an
    /// export of its own that ends with [`Dispatcher::close`], or after this process.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or disk; `Broken` for one that must not be read.
    pub async fn open(&self, domain: &Domain, name: &SnapshotName, target: &str) -> Result<Opened> {
        let held = self.hold(domain).await.map_err(|e| e.during("read"))?;
        let opened = self.open_held(&held, domain, name, target, None).await;
        opened.map_err(|e| e.during("read").with("domain", &domain.id).with("snapshot", name))
    }

    /// Opens one disk of a snapshot for reading what has changed since a checkpoint, always through an export, which tells
    /// it beside the data ([`Opened::bitmap`]).
    ///
    /// # Errors
    /// As [`Dispatcher::open`]; `NotFound` for an unknown checkpoint; `Invalid` when it does not cover the disk or is
    /// not before the snapshot; `Broken` when what has changed is not known; `Unsupported` where the method cannot tell.
    pub async fn open_since(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        since: &CheckpointName,
    ) -> Result<Opened> {
        let held = self.hold(domain).await.map_err(|e| e.during("read"))?;
        let opened = self.open_held(&held, domain, name, target, Some(since)).await;
        opened.map_err(|e| e.during("read").with("domain", &domain.id).with("snapshot", name))
    }

    async fn open_held(
        &self,
        held: &Held,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        since: Option<&CheckpointName>,
    ) -> Result<Opened> {
        let snapshot = self.find(domain, name).await?;
        let disk = disk_of(&snapshot, target)?;
        let danger = self
            .refuse_unless_healthy(&*held.control, &snapshot, disk)
            .await?;
        let mut opened = match &disk.access {
            Access::Inside(inside) => Err(inside.not_here(target)),
            Access::Source { source, format, .. } if since.is_none() && is_plain(source, format) => {
                Ok::<_, Error>(Opened {
                    source: source.clone(),
                    format: format.clone(),
                    tls: None,
                    warnings: Vec::new(),
                    bitmap: None,
                    excess: None,
                    reading: None,
                })
            }
            _ => self.open_export(held, domain, &disk.alias, since).await,
        }?;
        opened.warnings.extend(danger);
        Ok(opened)
    }

    /// Serves the disk for this reader alone. The intent outlives the call: it is in force while the lease lives.
    async fn open_export(
        &self,
        held: &Held,
        domain: &Domain,
        disk: &Alias,
        since: Option<&CheckpointName>,
    ) -> Result<Opened> {
        let (lease, guard) = self.catalog.lease().await?;
        let purpose = Purpose::Reader(lease);
        let export = purpose.alias(disk);
        let intent = self
            .intend(
                domain,
                Act::Read {
                    lease,
                    export: export.clone(),
                },
            )
            .await?;
        let reading = Reading {
            intent,
            export,
            _lease: guard,
        };
        let disks = vec![ExportDisk {
            alias: disk.clone(),
            name: None,
            checkpoint: since.cloned(),
        }];
        let request = ExportRequest {
            listen: None,
            tls: None,
            allow_remote: false,
            disks,
        };
        let started = match self.start_held(held, domain, &request, &purpose).await {
            Ok(started) => started,
            Err(error) => {
                self.catalog.settle(reading.intent.id, &domain.id, &[]).await?;
                return Err(error);
            }
        };
        let server = match started.first() {
            Some(export) => {
                let place = self.place(export.served_by(), &*held.control, &domain.id);
                self.truly_served(&place).await?.0
            }
            None => None,
        };
        let (Some(export), Some(server)) = (started.first(), server) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "the export that was just started is gone",
            ));
        };
        Ok(Opened {
            source: server.source(&export.node.name),
            format: "raw".to_owned(),
            tls: server.tls,
            bitmap: export.node.bitmap.as_ref().map(|bitmap| bitmap.name.clone()),
            excess: export.changes.as_ref().and_then(|changes| changes.excess.clone()),
            warnings: Vec::new(),
            reading: Some(reading),
        })
    }

    /// Ends what [`Dispatcher::open`] began.
    pub async fn close(&self, domain: &Domain, opened: Opened) -> Result<()> {
        let Some(reading) = opened.reading else {
            return Ok(());
        };
        let held = self.hold_filling(domain, None).await;
        let held = held.map_err(|e| e.during("read"))?;
        let ended = self
            .finish_unserve(&held, &reading.intent, std::slice::from_ref(&reading.export))
            .await;
        ended
            .map(drop)
            .map_err(|e| e.during("read").with("domain", &domain.id))
    }
}
