//! What is to be exported: the disks that a request names, found and checked, and the exports that come of them.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::changes::Known;
use crate::names::nearest;
use crate::{
    Access, Alias, Attached, Changes, CheckpointName, Control, DiskSnapshotRecord, Dispatcher, Domain, Error,
    ErrorKind, Export, ExportDisk, ExportRequest, Health, Image, NodeBitmap, Result, ServeNode, ServedBy,
    Snapshot, Source, Told, Union,
};

/// Who an export is made for.
#[derive(Debug, Clone)]
pub(crate) enum Purpose {
    /// Whoever asked for it.
    Asked,
    /// One reader, who has this lease.
    Reader(Uuid),
    /// One guest, whose disk it is.
    Guest(Box<Attached>),
}

impl Purpose {
    /// What tells such an export from all others.
    pub(crate) fn suffix(&self) -> String {
        let short = |of: &Uuid| of.simple().to_string()[..8].to_owned();
        match self {
            Self::Asked => String::new(),
            Self::Reader(lease) => format!("-{}", short(lease)),
            Self::Guest(attached) => format!("-at-{}", short(&attached.to.id.uuid)),
        }
    }

    /// The alias of such an export of a disk.
    pub(crate) fn alias(&self, disk: &Alias) -> Alias {
        Alias(format!("{disk}{}", self.suffix()))
    }
}

impl DiskSnapshotRecord {
    /// Who serves it when it is exported.
    #[must_use]
    pub fn served_by(&self) -> ServedBy {
        match self.access {
            Access::Node(_) => ServedBy::Hypervisor,
            Access::Source { .. } | Access::Inside(_) => ServedBy::ImageServer,
        }
    }
}

impl Dispatcher {
    /// The exports that a request asks for, each checked against its snapshot and against those there are.
    pub(crate) async fn new_exports(
        &self,
        control: &dyn Control,
        domain: &Domain,
        request: &ExportRequest,
        present: &[Export],
        purpose: &Purpose,
    ) -> Result<Vec<Export>> {
        if request.disks.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "there is no disk to export"));
        }
        let snapshots = self.catalog.snapshots(&domain.id).await?;
        let mut exports: Vec<Export> = Vec::with_capacity(request.disks.len());
        for wanted in &request.disks {
            let (snapshot, disk) = by_alias(domain, &snapshots, &wanted.alias)?;
            let danger = self.refuse_unless_healthy(control, snapshot, disk).await?;
            // A reader gets it with what it opened.
            if let Some(why) = danger.filter(|_| !matches!(purpose, Purpose::Reader(_))) {
                tracing::warn!(
                    "the snapshot {} that is exported is endangered: {why}",
                    snapshot.name
                );
            }
            let mut export = new_export(wanted, snapshot, disk, purpose)?;
            if let Some(since) = &wanted.checkpoint {
                self.tell_changes(&mut export, domain, snapshot, disk, since)
                    .await?;
                hold_apart(&mut export, present.iter().chain(&exports));
            }
            let same_server = |e: &Export| e.served_by() == export.served_by();
            let clash =
                |e: &&Export| e.alias == export.alias || (e.node.name == export.node.name && same_server(e));
            if let Some(other) = present.iter().chain(&exports).find(clash) {
                let what = format!("'{}' is being exported already", other.node.name);
                return Err(Error::new(ErrorKind::AlreadyExists, what)
                    .with("export", &other.alias)
                    .hint("Stop that export first, or give this one another export name."));
            }
            exports.push(export);
        }
        Ok(exports)
    }

    /// Adds to an export what changed since a checkpoint.
    async fn tell_changes(
        &self,
        export: &mut Export,
        domain: &Domain,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
        since: &CheckpointName,
    ) -> Result<()> {
        let known = self.known_since(domain, snapshot, disk, since).await?;
        export.node.bitmap = Some(NodeBitmap {
            node: export.node.node.clone(),
            name: since.to_string(),
        });
        let (told, excess) = match known {
            Known::ByComparing(earlier) => (Told::Compared(earlier), None),
            Known::Bitmaps(of, excess) => {
                if let Some(image) = &mut export.image {
                    let share = |name: &String| (name.clone(), disk.shares.get(name).copied().unwrap_or(1));
                    image.changed = of.iter().map(share).collect();
                }
                let union = Union {
                    disk: domain.disk(&disk.target)?.clone(),
                    of,
                    node: export.node.node.clone(),
                    name: since.to_string(),
                    holder: None,
                };
                (Told::Bitmaps(Box::new(union)), excess)
            }
        };
        export.changes = Some(Box::new(Changes {
            since: since.clone(),
            told,
            excess,
        }));
        Ok(())
    }

    /// What endangers it, where it is good.
    pub(crate) async fn refuse_unless_healthy(
        &self,
        control: &dyn Control,
        snapshot: &Snapshot,
        disk: &DiskSnapshotRecord,
    ) -> Result<Option<String>> {
        let (what, reason) = match self.health(control, snapshot, disk).await? {
            Health::Active => return Ok(None),
            Health::Endangered(why) => return Ok(Some(why)),
            Health::Broken(reason) => ("broken", reason),
            Health::Gone(reason) => ("gone", reason),
        };
        Err(
            Error::new(ErrorKind::Broken, format!("the snapshot is {what}: {reason}"))
                .with("snapshot", &snapshot.name)
                .with("disk", &disk.target)
                .hint("Its data must not be used. Delete it, and take a new one."),
        )
    }
}

/// An exported bitmap cannot be exported a second time: where another export of the node tells what changed since the same
/// checkpoint, this one's bitmap is on a node of its own.
fn hold_apart<'a>(export: &mut Export, mut others: impl Iterator<Item = &'a Export>) {
    let Some(Told::Bitmaps(union)) = export.changes.as_mut().map(|changes| &mut changes.told) else {
        return;
    };
    if others.any(|other| other.node.bitmap.is_some() && other.node.bitmap == export.node.bitmap) {
        let holder = node_name(&format!("{}/changed", export.node.id));
        union.holder = Some(holder.clone());
        export.node.bitmap = Some(NodeBitmap {
            node: holder,
            name: union.name.clone(),
        });
    }
}

/// An export of a snapshot's disk; one made for a reader or a guest gets names of its own. A guest gets the whole device
/// that the disk is inside.
///
/// # Errors
/// `Unsupported` for a disk that only a guest can reach.
fn new_export(
    wanted: &ExportDisk,
    snapshot: &Snapshot,
    disk: &DiskSnapshotRecord,
    purpose: &Purpose,
) -> Result<Export> {
    let (suffix, alias) = (purpose.suffix(), purpose.alias(&wanted.alias));
    let name = wanted.name.clone().unwrap_or_else(|| alias.0.clone());
    let (id, node, image) = match (&disk.access, purpose) {
        (Access::Node(node), _) => (format!("{node}{suffix}"), node.clone(), None),
        (Access::Inside(inside), Purpose::Asked | Purpose::Reader(_)) => {
            return Err(inside.not_here(&disk.target).with("snapshot", &snapshot.name));
        }
        (Access::Source { .. } | Access::Inside(_), _) => {
            let node = node_name(&format!("{}/{}{suffix}", snapshot.id, disk.target));
            (node.clone(), node, image_of(&disk.access))
        }
    };
    Ok(Export {
        alias,
        snapshot: snapshot.id,
        target: disk.target.clone(),
        node: ServeNode {
            id,
            node,
            name,
            bitmap: None,
        },
        lease: match purpose {
            Purpose::Reader(lease) => Some(*lease),
            _ => None,
        },
        image,
        attached: match purpose {
            Purpose::Guest(attached) => Some(attached.clone()),
            _ => None,
        },
        changes: None,
    })
}

/// What the image server opens.
fn image_of(access: &Access) -> Option<Image> {
    match access {
        Access::Node(_) => None,
        Access::Source {
            source,
            format,
            backing,
        } => Some(Image {
            source: source.clone(),
            format: format.clone(),
            backing: backing.clone(),
            changed: BTreeMap::new(),
        }),
        Access::Inside(inside) => Some(Image {
            source: Source::Block {
                dev: inside.device.clone(),
            },
            format: "raw".to_owned(),
            backing: None,
            changed: BTreeMap::new(),
        }),
    }
}

/// A name for a node, the same each time: QEMU's have at most 31 characters, a letter first.
pub(crate) fn node_name(of: &str) -> String {
    let digest = Uuid::new_v5(&Uuid::NAMESPACE_OID, of.as_bytes())
        .simple()
        .to_string();
    format!("ds-{}", &digest[..20])
}

/// Two servers cannot listen on one address.
pub(crate) fn refuse_one_address_for_two(exports: &[Export]) -> Result<()> {
    let by = |by: ServedBy| {
        let its = exports.iter().filter(|export| export.served_by() == by);
        its.map(|export| export.target.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (hypervisors, images) = (by(ServedBy::Hypervisor), by(ServedBy::ImageServer));
    if hypervisors.is_empty() || images.is_empty() {
        return Ok(());
    }
    let message = format!(
        "two servers cannot listen on one address: {hypervisors} is served by the hypervisor, and {images}, which lies \
         on this host, by the image server"
    );
    Err(Error::new(ErrorKind::Invalid, message).hint(
        "Export them in two requests, each with an address of its own, or give no address: then each server listens on \
         a unix socket of its own.",
    ))
}

pub(crate) fn by_alias<'a>(
    domain: &Domain,
    snapshots: &'a [Snapshot],
    alias: &Alias,
) -> Result<(&'a Snapshot, &'a DiskSnapshotRecord)> {
    let all = || snapshots.iter().flat_map(|s| s.disks.iter().map(move |d| (s, d)));
    all().find(|(_, disk)| disk.alias == *alias).ok_or_else(|| {
        let known: Vec<Alias> = all().map(|(_, disk)| disk.alias.clone()).collect();
        unknown_alias(domain, alias, &known)
    })
}

pub(crate) fn unknown_alias(domain: &Domain, alias: &Alias, known: &[Alias]) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("no snapshot's disk has the alias '{alias}'"),
    )
    .with("domain", &domain.id)
    .hint(nearest("aliases", &alias.0, known.iter().map(|a| a.0.as_str())))
}

pub(crate) fn disk_of<'a>(snapshot: &'a Snapshot, target: &str) -> Result<&'a DiskSnapshotRecord> {
    snapshot.disk(target).ok_or_else(|| {
        let known = snapshot.disks.iter().map(|d| d.target.as_str());
        Error::new(
            ErrorKind::NotFound,
            format!("the snapshot has no disk '{target}'"),
        )
        .with("snapshot", &snapshot.name)
        .hint(nearest("disks", target, known))
    })
}
