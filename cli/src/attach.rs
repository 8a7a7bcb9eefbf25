//! `disksnap attach` and `disksnap detach`: a snapshot's disk as a read-only disk of another domain's guest.

use disksnap::xml::{self, Element};
use disksnap::{
    Access, Attached, BackingStore, Disk, DiskSnapshotRecord, Domain, DomainId, Driver, Error, ErrorKind,
    PlugTls, Result, Serving, SnapshotName, Source,
};
use serde::Serialize;

use crate::args::{Attach, Detach};
use crate::context::{Context, Target};
use crate::failure::Outcome;
use crate::inside_view::InsideView;
use crate::output::{Text, fields, print};
use crate::signals::Stop;

pub(crate) async fn attach(context: &Context, attach: Attach) -> Outcome {
    let target = context.target().await?;
    let to = match &attach.to {
        Some(given) => Some(target.disksnap.load(given).await?.domain().clone()),
        None => None,
    };
    if attach.print {
        return print_disk(context, &target, &attach, to.as_ref()).await;
    }
    let to = to.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "no domain to attach to is given")
            .hint("Say --to DOMAIN, or --print for the <disk> alone.")
    })?;
    // Whatever is wrong with the snapshot, the act itself tells.
    let found = target
        .disksnap
        .dispatcher()
        .show(&target.domain, &attach.name)
        .await;
    let inside = found.ok().and_then(|found| {
        let record = found.snapshot.disk(&attach.target)?;
        InsideView::of(&record.access)
    });
    let stop = Stop::listen(true)?;
    let attached = target
        .disksnap
        .dispatcher()
        .attach(
            &target.domain,
            &attach.name,
            &attach.target,
            &to,
            tls(&attach)?.as_ref(),
        )
        .await?;
    let view = AttachedView::new(&attach, &attached, inside);
    context.out.show(&view, || {
        xml::new_disk_element(&seen(&attached, &to))?.to_document()
    })?;
    stop.check()
}

fn tls(attach: &Attach) -> Result<Option<PlugTls>> {
    let Some(directory) = &attach.tls_credentials else {
        return Ok(None);
    };
    Ok(Some(PlugTls {
        credentials: crate::export::credentials(directory)?,
        hostname: attach.tls_hostname.clone(),
    }))
}

/// Prints the `<disk>` and touches nothing.
async fn print_disk(context: &Context, target: &Target, attach: &Attach, to: Option<&Domain>) -> Outcome {
    let dispatcher = target.disksnap.dispatcher();
    let found = dispatcher.show(&target.domain, &attach.name).await?;
    let record = found.snapshot.disk(&attach.target).ok_or_else(|| {
        let known: Vec<&str> = found
            .snapshot
            .disks
            .iter()
            .map(|disk| disk.target.as_str())
            .collect();
        let what = format!("the snapshot has no disk '{}'", attach.target);
        Error::new(ErrorKind::NotFound, what).hint(format!("Its disks: {}.", known.join(", ")))
    })?;
    let serving = dispatcher.serving(&target.domain).await?;
    let disk = printed(record, &serving, &attach.name, &free_target(to))?;
    if let Some(inside) = InsideView::of(&record.access) {
        let what = format!(
            "this is the device that the image is inside: {}",
            inside.path_text()
        );
        context.out.warn(&what);
    }
    print(xml::new_disk_element(&disk)?.to_document()?.as_bytes())
}

/// The export where there is one, else the image with all its layers, or the device that it is inside.
fn printed(record: &DiskSnapshotRecord, serving: &Serving, name: &SnapshotName, dev: &str) -> Result<Disk> {
    let export = serving.exports.iter().find(|export| export.alias == record.alias);
    if let Some((export, server)) = export.and_then(|e| Some((e, serving.server_of(e)?))) {
        return Ok(disk(dev, server.source(&export.node.name), "raw", None));
    }
    match &record.access {
        Access::Source {
            source,
            format,
            backing,
        } => Ok(disk(dev, source.clone(), format, backing.as_deref())),
        Access::Inside(inside) => {
            let source = Source::Block {
                dev: inside.device.clone(),
            };
            Ok(disk(dev, source, "raw", None))
        }
        Access::Node(_) => Err(Error::new(
            ErrorKind::Unavailable,
            "the snapshot's disk is inside the hypervisor, and not exported",
        )
        .with("disk", &record.target)
        .hint(format!(
            "Export it first: `disksnap export start -d DOMAIN {name} --disk {}`.",
            record.target
        ))),
    }
}

fn disk(dev: &str, source: Source, format: &str, backing: Option<&BackingStore>) -> Disk {
    Disk {
        bus: Some("virtio".to_owned()),
        driver: Driver {
            name: Some("qemu".to_owned()),
            format: Some(format.to_owned()),
        },
        backing: backing.cloned(),
        read_only: true,
        ..Disk::new(dev, source)
    }
}

/// The disk as the other domain now has it.
fn seen(attached: &Attached, to: &Domain) -> Disk {
    Disk {
        serial: Some(attached.disk.serial.clone()),
        alias: Some(attached.disk.device.clone()),
        ..disk(&free_target(Some(to)), attached.disk.source(), "raw", None)
    }
}

/// The first name of a virtio disk that the other domain does not have.
fn free_target(to: Option<&Domain>) -> String {
    let taken = |name: &String| to.is_some_and(|to| to.disks.iter().any(|disk| disk.target == *name));
    let mut names = ('a'..='z').map(|letter| format!("vd{letter}"));
    names
        .find(|name| !taken(name))
        .unwrap_or_else(|| "vdaa".to_owned())
}

pub(crate) async fn detach(context: &Context, detach: Detach) -> Outcome {
    let target = context.target().await?;
    let from = match &detach.from {
        Some(given) => Some(target.disksnap.load(given).await?.domain().id.clone()),
        None => None,
    };
    let stop = Stop::listen(true)?;
    let detached = target
        .disksnap
        .dispatcher()
        .detach(
            &target.domain,
            &detach.name,
            &detach.target,
            from.as_ref(),
            detach.wait,
        )
        .await?;
    let view = DetachedView::new(&detach, &detached);
    context.out.show(&view, || {
        let each = detached
            .iter()
            .map(|id| Element::new("domain").attr("name", &id.name));
        Element::new("detached").children(each).to_document()
    })?;
    stop.check()
}

/// A disk that a guest has now.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AttachedView {
    snapshot: String,
    target: String,
    /// The domain that it was attached to.
    to: String,
    /// The device's id in that domain's hypervisor.
    device: String,
    /// What the guest sees: in Linux `/dev/disk/by-id/virtio-SERIAL`.
    serial: String,
    /// Where its bytes come from.
    uri: Option<String>,
    read_only: bool,
    /// Where the image is in the attached device, where it is not the device itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    inside: Option<InsideView>,
}

impl AttachedView {
    fn new(attach: &Attach, attached: &Attached, inside: Option<InsideView>) -> Self {
        let disk = &attached.disk;
        Self {
            snapshot: attach.name.to_string(),
            target: attach.target.clone(),
            to: attached.to.id.name.clone(),
            device: disk.device.clone(),
            serial: disk.serial.clone(),
            uri: disksnap::nbd_uri(&disk.source()),
            read_only: true,
            inside,
        }
    }
}

impl Text for AttachedView {
    fn text(&self) -> String {
        let rows = [
            (
                "attached",
                format!("{} of '{}', read-only", self.target, self.snapshot),
            ),
            ("to", self.to.clone()),
            ("device", self.device.clone()),
            ("serial", self.serial.clone()),
            ("over", self.uri.clone().unwrap_or_default()),
        ];
        // The guest's device holds the file system; how it is reached from the host is of no use there.
        let inside = self.inside.iter().map(|inside| ("image", inside.path_text()));
        fields("", rows.into_iter().chain(inside))
    }
}

#[derive(Debug, Serialize)]
struct DetachedView {
    snapshot: String,
    target: String,
    from: Vec<String>,
}

impl DetachedView {
    fn new(detach: &Detach, detached: &[DomainId]) -> Self {
        Self {
            snapshot: detach.name.to_string(),
            target: detach.target.clone(),
            from: detached.iter().map(|id| id.name.clone()).collect(),
        }
    }
}

impl Text for DetachedView {
    fn text(&self) -> String {
        if self.from.is_empty() {
            return format!("{} of '{}' is no guest's disk.\n", self.target, self.snapshot);
        }
        let line = |from: &String| format!("detached {} of '{}' from {from}\n", self.target, self.snapshot);
        self.from.iter().map(line).collect()
    }
}
