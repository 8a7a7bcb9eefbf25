//! What a running hypervisor says of the images it has open: whether they are the ones that the document
//! names, and who writes to them besides the guest.

use disksnap_core::{Disk, ErrorKind, Host, Result, RunState};
use disksnap_hypervisor::{DiskNodes, Graph};

use crate::{Unfit, check_said};

/// The jobs that go on writing to a disk's own layers while the guest is paused (`JobType` in QEMU's QAPI).
const WRITING: [&str; 4] = ["amend", "commit", "snapshot-save", "stream"];

/// One disk as the hypervisor has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// How many layers are below the top image.
    pub below: usize,
}

impl Live {
    /// Looks at disks in the hypervisor; one answer per disk, `None` for each where none runs that has a
    /// guest.
    ///
    /// `Unfit` where the image that the document names is not what the guest writes to (an overlay has come
    /// on top of it since), or a job writes to a layer also while the guest is paused.
    ///
    /// # Errors
    /// The monitor's.
    pub async fn of<'a>(
        host: &dyn Host,
        state: &RunState,
        disks: impl Iterator<Item = &'a Disk> + Send,
    ) -> Result<Vec<std::result::Result<Option<Self>, Unfit>>> {
        if !matches!(state, RunState::Running | RunState::Stopped(_)) {
            return Ok(disks.map(|_| Ok(None)).collect());
        }
        let disks: Vec<&Disk> = disks.collect();
        let graph = Graph::read(host).await?;
        Ok(disks.iter().map(|disk| look(&graph, disk).map(Some)).collect())
    }

    /// Whether a reader of the disk's image will find the layers below it that the disk has: as many as the hypervisor, or
    /// where none runs those that the document names ([`check_said`]).
    ///
    /// # Errors
    /// What differs.
    pub fn agrees(live: Option<&Self>, disk: &Disk, found: usize) -> std::result::Result<(), Unfit> {
        match live {
            Some(live) if live.below != found => Err(Unfit::from(format!(
                "the hypervisor has {} layers below the image, and by its header and the domain's document it has \
                 {found}: a snapshot would be read otherwise than the disk",
                live.below
            ))),
            Some(_) => Ok(()),
            None => check_said(disk),
        }
    }
}

fn look(graph: &Graph, disk: &Disk) -> std::result::Result<Live, Unfit> {
    let nodes = graph.root_of_disk(disk).map_err(|error| Unfit {
        kind: error.kind(),
        why: error.message().to_owned(),
    })?;
    if nodes.stale {
        let top = graph
            .node(&nodes.protocol)
            .map_or("", |node| node.filename.as_str());
        return Err(Unfit::from(format!(
            "the guest writes to {top}, an overlay of the image that the domain's document names: the document is \
             of another time"
        )));
    }
    match job(graph, &nodes) {
        None => Ok(Live {
            below: nodes.backing.len(),
        }),
        Some(why) => Err(Unfit {
            kind: ErrorKind::Busy,
            why,
        }),
    }
}

/// The job that writes to a layer of this disk.
fn job(graph: &Graph, nodes: &DiskNodes) -> Option<String> {
    let mut layers = nodes.chain.clone();
    for layer in &nodes.backing {
        layers.extend(graph.primary_chain(layer).iter().map(|node| node.name.clone()));
    }
    let writing = |kind: &str| WRITING.contains(&kind);
    let mut jobs = graph.jobs_on(&layers);
    let job = jobs.find(|job| writing(&job.kind) && !matches!(job.status.as_str(), "concluded" | "null"))?;
    Some(format!(
        "the {} job '{}' writes to the disk's images, also while the guest is paused; wait for it, or cancel it",
        job.kind, job.id
    ))
}
