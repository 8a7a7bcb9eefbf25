//! What serves the snapshots that lie on this host, as images or devices, where no hypervisor has them open.

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{BackingStore, Changed, DomainId, Listen, NbdServer, Result, ServeNode, Source};

/// An image on this host, with all the layers that it stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Where the top layer is.
    pub source: Source,
    /// The format of the top layer.
    pub format: String,
    /// The layers below, each with its format; `None` where the image stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Box<BackingStore>>,
    /// The dirty bitmaps in its layers that tell, between them, what is served as [`ServeNode::bitmap`]; and in how many
    /// of the layers each must be, as far as there are so many.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub changed: BTreeMap<String, usize>,
}

/// Serves images over NBD, read-only: one server per domain, whether the domain runs or not, which
/// outlives the process that started it.
///
/// What an image is made of is told by the record ([`Image`]) and by nothing else: the names in the
/// headers of a snapshot's layers lead to live files.
#[async_trait]
pub trait ImageServer: fmt::Debug + Send + Sync {
    /// The unix socket that a domain's server listens on when nobody says otherwise.
    ///
    /// # Errors
    /// `Invalid` where a socket cannot have that path.
    fn default_listen(&self, domain: &DomainId) -> Result<Listen>;

    /// The domain's server, if it runs: from the process itself, not from a record alone.
    async fn running(&self, domain: &DomainId) -> Result<Option<NbdServer>>;

    /// Starts the domain's server; there is at most one. What a killed start left is ended first.
    ///
    /// # Errors
    /// `Unavailable` when the program is missing or does not start; `Busy` when it runs already or the
    /// place is taken. Nothing is left running then.
    async fn start(&self, domain: &DomainId, server: &NbdServer) -> Result<()>;

    /// Ends it with all its exports, and only it. Idempotent; also for one that was never wholly started.
    async fn stop(&self, domain: &DomainId) -> Result<()>;

    /// Serves an image read-only on the running server. Where the node asks for a bitmap it is made of `changed`, whose
    /// ranges are read to their end before anything is served, or else of what the image itself keeps ([`Image::changed`]).
    ///
    /// # Errors
    /// `NotFound` where a layer is missing; `Unsupported` for a layer that cannot be opened by the record
    /// alone; `Broken` where a layer needs another one that the record does not have, or where what changed is to be
    /// served and a bitmap is not there or must not be trusted.
    async fn serve(
        &self,
        domain: &DomainId,
        node: &ServeNode,
        image: &Image,
        changed: Option<Changed>,
    ) -> Result<()>;

    /// Stops serving, disconnecting clients; returns once the image is closed. Idempotent.
    async fn unserve(&self, domain: &DomainId, node: &ServeNode) -> Result<()>;

    /// The ids that are being served now, from the server itself.
    async fn served(&self, domain: &DomainId) -> Result<Vec<String>>;

    /// The domains whose servers may run: what [`ImageServer::running`] is worth asking for.
    async fn domains(&self) -> Result<Vec<DomainId>>;
}
