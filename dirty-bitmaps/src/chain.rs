//! The layers of a disk in the hypervisor that runs it, as far as bitmaps go.

use disksnap_core::{Disk, Error, ErrorKind, Result};
use disksnap_hypervisor::Graph;
use disksnap_hypervisor::graph::{Bitmap, Node};

/// The nodes of the formats of a disk's layers, the one that the guest writes to first: where bitmaps are.
pub(crate) struct Chain<'g> {
    pub(crate) layers: Vec<&'g Node>,
}

impl<'g> Chain<'g> {
    pub(crate) fn of(graph: &'g Graph, disk: &Disk) -> Result<Self> {
        let nodes = graph.root_of_disk(disk)?;
        let names = std::iter::once(&nodes.format).chain(&nodes.backing);
        let layers: Vec<&Node> = names.filter_map(|name| format_of(graph, name)).collect();
        if layers.is_empty() {
            let gone = Error::new(ErrorKind::NotFound, "the node of its image has just gone");
            return Err(gone.with("disk", &disk.target).retryable(true));
        }
        Ok(Self { layers })
    }

    pub(crate) fn top(&self) -> &'g Node {
        self.layers[0]
    }

    /// The layers that have a bitmap of this name, and it.
    pub(crate) fn having(&self, name: &str) -> impl Iterator<Item = (&'g Node, &'g Bitmap)> {
        let in_layer = move |node: &&'g Node| bitmap(node, name).map(|found| (*node, found));
        self.layers.iter().filter_map(in_layer)
    }
}

/// The bitmap of this name on a node.
pub(crate) fn bitmap<'g>(node: &'g Node, name: &str) -> Option<&'g Bitmap> {
    node.bitmaps.iter().find(|bitmap| bitmap.name == name)
}

/// The node of the format at or below this one: not a filter, nor a raw wrapper around the format.
fn format_of<'g>(graph: &'g Graph, name: &str) -> Option<&'g Node> {
    let chain = graph.primary_chain(name);
    let (protocol, images) = chain.split_last()?;
    let images: Vec<&&Node> = images.iter().filter(|node| !node.is_filter()).collect();
    let format = images.iter().find(|node| node.driver != "raw");
    Some(format.or(images.last()).map_or(*protocol, |node| **node))
}
