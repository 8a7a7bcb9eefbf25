//! The two that serve a domain's snapshots, treated alike: the hypervisor, and the image server of this host.

use crate::marking::untracked;
use crate::{
    Changed, Control, Dispatcher, DomainId, Error, ErrorKind, Export, ExportRequest, ImageServer, Listen,
    NbdServer, Result, ServedBy, Tls, Told, Tracker, Union,
};

/// One of the two servers of one domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) by: ServedBy,
    control: &'a dyn Control,
    images: Option<&'a dyn ImageServer>,
    tracker: Option<&'a dyn Tracker>,
    domain: &'a DomainId,
}

impl<'a> Place<'a> {
    fn images(&self) -> Result<&'a dyn ImageServer> {
        self.images.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "nothing serves images on this host")
                .hint("Open the snapshot's backupSource read-only; `disksnap snapshot show` tells it.")
        })
    }

    /// Where it listens when nobody says otherwise.
    pub(crate) fn default_listen(&self) -> Result<Listen> {
        match self.by {
            ServedBy::Hypervisor => Ok(Listen::Unix(self.control.default_socket())),
            ServedBy::ImageServer => self.images()?.default_listen(self.domain),
        }
    }

    /// The run of the process that serves; `None` where it cannot be told, or is not there yet.
    async fn instance(&self) -> Result<Option<String>> {
        match self.by {
            ServedBy::Hypervisor => self.control.instance().await,
            ServedBy::ImageServer => Ok(None),
        }
    }

    pub(crate) async fn start(&self, server: &NbdServer) -> Result<()> {
        match self.by {
            ServedBy::Hypervisor => self.control.start_server(server).await,
            ServedBy::ImageServer => self.images()?.start(self.domain, server).await,
        }
    }

    /// Idempotent.
    pub(crate) async fn stop(&self) -> Result<()> {
        match (self.by, self.images) {
            (ServedBy::Hypervisor, _) => self.control.stop_server().await,
            (ServedBy::ImageServer, Some(images)) => images.stop(self.domain).await,
            (ServedBy::ImageServer, None) => Ok(()),
        }
    }

    /// `changed` is what a comparing method has told of it.
    pub(crate) async fn serve(&self, export: &Export, changed: Option<Changed>) -> Result<()> {
        if let (Some(union), ServedBy::Hypervisor) = (union_of(export), self.by) {
            let tracker = self.tracker.ok_or_else(untracked)?;
            tracker.unite(self.control, union).await?;
        }
        match &export.image {
            None => self.control.serve(&export.node).await,
            Some(image) => {
                self.images()?
                    .serve(self.domain, &export.node, image, changed)
                    .await
            }
        }
    }

    /// Idempotent.
    pub(crate) async fn unserve(&self, export: &Export) -> Result<()> {
        match self.by {
            ServedBy::Hypervisor => self.control.unserve(&export.node.id).await?,
            ServedBy::ImageServer => self.images()?.unserve(self.domain, &export.node).await?,
        }
        match (union_of(export), self.tracker, self.by) {
            (Some(union), Some(tracker), ServedBy::Hypervisor) => {
                tracker.part(self.control, union.held_by(), &union.name).await
            }
            _ => Ok(()),
        }
    }

    async fn served(&self) -> Result<Vec<String>> {
        match self.by {
            ServedBy::Hypervisor => self.control.served().await,
            ServedBy::ImageServer => self.images()?.served(self.domain).await,
        }
    }

    /// Whether exports of it could be there: an image server needs no running domain.
    pub(crate) async fn is_up(&self) -> Result<bool> {
        match self.by {
            ServedBy::Hypervisor => Ok(self.control.state().await?.is_active()),
            ServedBy::ImageServer => Ok(true),
        }
    }

    /// The server that a request will use: the running one, when that is what it wants, or a new one.
    pub(crate) async fn server_for(
        &self,
        running: Option<NbdServer>,
        request: &ExportRequest,
    ) -> Result<NbdServer> {
        if let Some(server) = running {
            self.refuse_elsewhere(&server, request)?;
            return Ok(server);
        }
        self.new_server(request, "read").await
    }

    /// The same for disks that clients write. A server that others can reach was perhaps meant for reading alone, so
    /// it too must be expressly allowed.
    pub(crate) async fn server_to_fill(
        &self,
        running: Option<NbdServer>,
        request: &ExportRequest,
    ) -> Result<NbdServer> {
        let Some(server) = running else {
            return self.new_server(request, "write").await;
        };
        self.refuse_elsewhere(&server, request)?;
        let as_it_runs = ExportRequest {
            tls: server.tls.clone(),
            ..request.clone()
        };
        refuse_careless(&server.listen, &as_it_runs, "write")?;
        Ok(server)
    }

    async fn new_server(&self, request: &ExportRequest, could: &str) -> Result<NbdServer> {
        let listen = match &request.listen {
            Some(listen) => listen.clone(),
            None => self.default_listen()?,
        };
        refuse_careless(&listen, request, could)?;
        Ok(NbdServer {
            listen,
            tls: request.tls.clone(),
            explicit: false,
            instance: self.instance().await?,
        })
    }

    fn refuse_elsewhere(&self, server: &NbdServer, request: &ExportRequest) -> Result<()> {
        let elsewhere = request.listen.as_ref().is_some_and(|l| *l != server.listen);
        if !elsewhere && (request.tls.is_none() || request.tls == server.tls) {
            return Ok(());
        }
        let what = match self.by {
            ServedBy::Hypervisor => "a domain has one NBD server",
            ServedBy::ImageServer => "a domain has one NBD server for the images on this host",
        };
        let tls = if server.tls.is_some() {
            " with TLS"
        } else {
            " without TLS"
        };
        let message = format!("{what}, and this one's listens on {}{tls}", server.listen);
        Err(Error::new(ErrorKind::Busy, message)
            .hint("Export there (leave the address out), or stop its exports first."))
    }
}

/// The bitmaps that an export tells what changed by.
fn union_of(export: &Export) -> Option<&Union> {
    match &export.changes.as_ref()?.told {
        Told::Bitmaps(union) => Some(union),
        Told::Compared(_) => None,
    }
}

fn refuse_careless(listen: &Listen, request: &ExportRequest, could: &str) -> Result<()> {
    if request.tls.is_some() && matches!(listen, Listen::Unix(_)) {
        return Err(Error::new(
            ErrorKind::Invalid,
            "TLS is for TCP; a unix socket is guarded by its permissions",
        ));
    }
    if request
        .tls
        .as_ref()
        .is_some_and(|tls| !tls.verify_client && !tls.allowed.is_empty())
    {
        return Err(Error::new(
            ErrorKind::Invalid,
            "clients that show no certificate have no name that a list could allow",
        )
        .hint("Have the clients verified, or leave the list out."));
    }
    let verified = |tls: &Tls| tls.verify_client;
    if listen.is_local() || request.allow_remote || request.tls.as_ref().is_some_and(verified) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Denied,
        format!("anyone who reaches {listen} could {could} the disks"),
    )
    .hint("Use TLS with client verification, or say --allow-remote if the network is trusted."))
}

impl Dispatcher {
    /// One of the servers of a domain.
    pub(crate) fn place<'a>(
        &'a self,
        by: ServedBy,
        control: &'a dyn Control,
        domain: &'a DomainId,
    ) -> Place<'a> {
        let images = self.connector.image_server();
        Place {
            by,
            control,
            images,
            tracker: self.tracker.as_deref(),
            domain,
        }
    }

    /// Both servers of a domain.
    pub(crate) fn both<'a>(&'a self, control: &'a dyn Control, domain: &'a DomainId) -> [Place<'a>; 2] {
        [ServedBy::Hypervisor, ServedBy::ImageServer].map(|by| self.place(by, control, domain))
    }

    /// The server of a place and its recorded exports, as far as the server itself still has them.
    pub(crate) async fn truly_served(&self, place: &Place<'_>) -> Result<(Option<NbdServer>, Vec<Export>)> {
        let server = match (place.by, place.images) {
            (ServedBy::Hypervisor, _) => self.hypervisors_server(place).await?,
            (ServedBy::ImageServer, Some(images)) => images.running(place.domain).await?,
            (ServedBy::ImageServer, None) => None,
        };
        if server.is_none() {
            return Ok((None, Vec::new()));
        }
        let mut exports = self.catalog.exports(place.domain).await?;
        exports.retain(|export| export.served_by() == place.by);
        if !exports.is_empty() {
            let served = place.served().await?;
            exports.retain(|export| served.contains(&export.node.id));
        }
        Ok((server, exports))
    }

    async fn hypervisors_server(&self, place: &Place<'_>) -> Result<Option<NbdServer>> {
        let Some(server) = self.catalog.server(place.domain).await? else {
            return Ok(None);
        };
        let same =
            place.control.state().await?.is_active() && place.control.instance().await? == server.instance;
        Ok(same.then_some(server))
    }
}
