//! The acts on exports: the domain's one NBD server starts with the first and stops with the last,
//! or is started and stopped by itself.

use std::time::SystemTime;

use uuid::Uuid;

use crate::dispatcher::Held;
use crate::names::nearest;
use crate::{
    Access, Act, Alias, Change, Control, Dispatcher, Domain, DomainId, Effect, Error, ErrorKind, Export,
    ExportDisk, ExportRequest, Health, Intent, Listen, NbdServer, NetworkHost, Result, ServeNode, Snapshot,
    SnapshotId, SnapshotName, Source, Tls,
};

/// Which exports to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopExports {
    /// These; one that is not being served is as good as stopped.
    Aliases(Vec<Alias>),
    /// All disks of this snapshot.
    Snapshot(SnapshotName),
    /// All of the domain.
    All,
}

/// What a domain serves.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct Serving {
    /// The server, when it runs.
    pub server: Option<NbdServer>,
    /// The exports that were asked for, by alias.
    pub exports: Vec<Export>,
}

impl Dispatcher {
    /// Starts exports, and the server with the first one. All of the request or nothing.
    ///
    /// # Errors
    /// `NotFound` for an unknown alias; `AlreadyExists` for one that is being served or an export name
    /// in use; `Broken` for a snapshot that must not be read; `Busy` when the server listens elsewhere;
    /// `Denied` for a place other hosts reach without TLS that is not expressly allowed.
    pub async fn start_exports(&self, domain: &Domain, request: &ExportRequest) -> Result<Vec<Export>> {
        let held = self.hold(domain).await.map_err(|e| e.during("export"))?;
        self.start_held(&held, domain, request, None)
            .await
            .map_err(|e| e.during("export").with("domain", &domain.id))
    }

    /// Stops exports, and the server with the last one unless it was started by itself. Idempotent.
    /// Returns the aliases that were being served.
    pub async fn stop_exports(&self, domain: &Domain, which: &StopExports) -> Result<Vec<Alias>> {
        let held = self.hold(domain).await.map_err(|e| e.during("export stop"))?;
        let act = async {
            let aliases = self.aliases_to_stop(domain, which).await?;
            let intent = self
                .intend(
                    domain,
                    Act::Unserve {
                        exports: aliases.clone(),
                    },
                )
                .await?;
            self.finish_unserve(&held, &intent, &aliases).await
        };
        act.await
            .map_err(|e: Error| e.during("export stop").with("domain", &domain.id))
    }

    /// What the domain serves now; asks the hypervisor, not only the catalog.
    pub async fn serving(&self, domain: &Domain) -> Result<Serving> {
        let control = self.connector.control(domain).await?;
        let (server, mut exports) = self.truly_served(&*control, &domain.id).await?;
        exports.retain(|export| export.lease.is_none());
        Ok(Serving { server, exports })
    }

    /// Starts the server by itself; it then stays until [`Dispatcher::stop_server`]. Idempotent for the same place.
    pub async fn start_server(
        &self,
        domain: &Domain,
        listen: Option<Listen>,
        tls: Option<Tls>,
        allow_remote: bool,
    ) -> Result<NbdServer> {
        let held = self.hold(domain).await.map_err(|e| e.during("server start"))?;
        let request = ExportRequest {
            listen,
            tls,
            allow_remote,
            disks: Vec::new(),
        };
        let act = async {
            let (running, _) = self.truly_served(&*held.control, &domain.id).await?;
            let starts = running.is_none();
            let mut server = self.server_for(&*held.control, running, &request).await?;
            server.explicit = true;
            let act = Act::Serve {
                server: server.clone(),
                starts,
                exports: Vec::new(),
            };
            let intent = self.intend(domain, act).await?;
            if starts && let Err(error) = held.control.start_server(&server).await {
                self.catalog.settle(intent.id, &domain.id, &[]).await?;
                return Err(error);
            }
            self.catalog
                .settle(intent.id, &domain.id, &[Change::SetServer(server.clone())])
                .await?;
            Ok(server)
        };
        act.await
            .map_err(|e: Error| e.during("server start").with("domain", &domain.id))
    }

    /// Stops the server. `Busy` while it serves exports. Idempotent.
    pub async fn stop_server(&self, domain: &Domain) -> Result<()> {
        let held = self.hold(domain).await.map_err(|e| e.during("server stop"))?;
        let (server, exports) = self.truly_served(&*held.control, &domain.id).await?;
        if let Some(export) = exports.first() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("the NBD server serves {} exports", exports.len()),
            )
            .during("server stop")
            .with("domain", &domain.id)
            .with("export", &export.alias)
            .hint("Stop them first: `disksnap export stop -d DOMAIN --all`."));
        }
        if server.is_some() {
            held.control
                .stop_server()
                .await
                .map_err(|e| e.during("server stop"))?;
        }
        self.catalog
            .settle(Uuid::nil(), &domain.id, &[Change::ClearServer])
            .await
    }

    /// Where a snapshot's disk is, or will be once it is exported (`backupSource`).
    pub async fn backup_source(&self, domain: &Domain, snapshot: &Snapshot, target: &str) -> Result<Source> {
        let control = self.connector.control(domain).await?;
        let disk = disk_of(snapshot, target)?;
        if let Access::Source { source, .. } = &disk.access {
            return Ok(source.clone());
        }
        let server = self.catalog.server(&domain.id).await?;
        let exports = self.catalog.exports(&domain.id).await?;
        let export = exports
            .iter()
            .find(|e| e.alias == disk.alias && e.lease.is_none());
        let name = export.map_or(disk.alias.0.as_str(), |e| e.node.name.as_str());
        let server = server.unwrap_or_else(|| default_server(&*control));
        Ok(network_source(&server, name))
    }

    pub(crate) async fn intend(&self, domain: &Domain, act: Act) -> Result<Intent> {
        let intent = Intent {
            id: Uuid::new_v4(),
            domain: domain.clone(),
            since: SystemTime::now(),
            act,
        };
        self.catalog.intend(&intent).await?;
        Ok(intent)
    }

    pub(crate) async fn start_held(
        &self,
        held: &Held,
        domain: &Domain,
        request: &ExportRequest,
        lease: Option<Uuid>,
    ) -> Result<Vec<Export>> {
        let control = &*held.control;
        let (running, present) = self.truly_served(control, &domain.id).await?;
        let exports = self
            .new_exports(control, domain, request, &present, lease)
            .await?;
        let starts = running.is_none();
        let server = self.server_for(control, running, request).await?;
        let act = Act::Serve {
            server: server.clone(),
            starts,
            exports: exports.clone(),
        };
        let intent = self.intend(domain, act).await?;
        if let Err(error) = serve_all(control, &server, starts, &exports).await {
            return Err(match self.undo_serve(control, &intent, starts, &exports).await {
                Ok(()) => error.leaving(Effect::RolledBack),
                Err(failure) => error.rollback_failed(vec![failure]),
            });
        }
        let mut changes = vec![Change::SetServer(server)];
        changes.extend(exports.iter().cloned().map(Change::AddExport));
        self.catalog.settle(intent.id, &domain.id, &changes).await?;
        Ok(exports)
    }

    /// Takes back what a start of exports has done, and settles its intent.
    pub(crate) async fn undo_serve(
        &self,
        control: &dyn Control,
        intent: &Intent,
        starts: bool,
        exports: &[Export],
    ) -> Result<()> {
        if control.state().await?.is_active() {
            for export in exports {
                control.unserve(&export.node.id).await?;
            }
            if starts {
                control.stop_server().await?;
            }
        }
        self.catalog.settle(intent.id, &intent.domain.id, &[]).await
    }

    /// Everything that a stop does after its intent; also what finishes one that was killed.
    pub(crate) async fn finish_unserve(
        &self,
        held: &Held,
        intent: &Intent,
        aliases: &[Alias],
    ) -> Result<Vec<Alias>> {
        let (control, domain) = (&*held.control, &intent.domain.id);
        let (stopped, changes) = self
            .unserve(control, domain, |export| aliases.contains(&export.alias))
            .await?;
        self.catalog.settle(intent.id, domain, &changes).await?;
        Ok(stopped)
    }

    /// Stops the exports of a snapshot that is being deleted.
    pub(crate) async fn unserve_snapshot(
        &self,
        control: &dyn Control,
        domain: &DomainId,
        snapshot: SnapshotId,
    ) -> Result<Vec<Change>> {
        self.unserve(control, domain, |export| export.snapshot == snapshot)
            .await
            .map(|(_, changes)| changes)
    }

    /// Stops serving what `which` picks; returns what was being served, and what to record.
    pub(crate) async fn unserve(
        &self,
        control: &dyn Control,
        domain: &DomainId,
        which: impl Fn(&Export) -> bool,
    ) -> Result<(Vec<Alias>, Vec<Change>)> {
        let recorded = self.catalog.exports(domain).await?;
        let (server, served) = self.truly_served(control, domain).await?;
        let (stop, keep): (Vec<&Export>, Vec<&Export>) = recorded.iter().partition(|export| which(export));
        let mut stopped = Vec::new();
        for export in &stop {
            if served.contains(export) {
                control.unserve(&export.node.id).await?;
                stopped.push(export.alias.clone());
            }
        }
        let mut changes: Vec<Change> = stop
            .iter()
            .map(|e| Change::RemoveExport(e.alias.clone()))
            .collect();
        let left = keep.iter().any(|export| served.contains(export));
        match server {
            Some(server) if !left && !server.explicit => {
                control.stop_server().await?;
                changes.push(Change::ClearServer);
            }
            Some(_) => {}
            None => changes.push(Change::ClearServer),
        }
        Ok((stopped, changes))
    }

    /// The recorded server and exports that the hypervisor still has.
    pub(crate) async fn truly_served(
        &self,
        control: &dyn Control,
        domain: &DomainId,
    ) -> Result<(Option<NbdServer>, Vec<Export>)> {
        let Some(server) = self.catalog.server(domain).await? else {
            return Ok((None, Vec::new()));
        };
        if !control.state().await?.is_active() || control.instance().await? != server.instance {
            return Ok((None, Vec::new()));
        }
        let mut exports = self.catalog.exports(domain).await?;
        if !exports.is_empty() {
            let served = control.served().await?;
            exports.retain(|export| served.contains(&export.node.id));
        }
        Ok((Some(server), exports))
    }

    async fn aliases_to_stop(&self, domain: &Domain, which: &StopExports) -> Result<Vec<Alias>> {
        let recorded = self.catalog.exports(&domain.id).await?;
        match which {
            StopExports::All => Ok(recorded.into_iter().map(|e| e.alias).collect()),
            StopExports::Snapshot(name) => {
                let snapshot = self.find(domain, name).await?.id;
                Ok(recorded
                    .into_iter()
                    .filter(|e| e.snapshot == snapshot)
                    .map(|e| e.alias)
                    .collect())
            }
            StopExports::Aliases(aliases) => {
                let known = self.known_aliases(domain, &recorded).await?;
                match aliases.iter().find(|alias| !known.contains(alias)) {
                    None => Ok(aliases.clone()),
                    Some(unknown) => Err(unknown_alias(domain, unknown, &known)),
                }
            }
        }
    }

    async fn known_aliases(&self, domain: &Domain, recorded: &[Export]) -> Result<Vec<Alias>> {
        let snapshots = self.catalog.snapshots(&domain.id).await?;
        let of_disks = snapshots.into_iter().flat_map(|s| s.disks).map(|disk| disk.alias);
        Ok(of_disks.chain(recorded.iter().map(|e| e.alias.clone())).collect())
    }

    /// The exports that a request asks for, each checked against its snapshot and against those there are.
    async fn new_exports(
        &self,
        control: &dyn Control,
        domain: &Domain,
        request: &ExportRequest,
        present: &[Export],
        lease: Option<Uuid>,
    ) -> Result<Vec<Export>> {
        if request.disks.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "there is no disk to export"));
        }
        let snapshots = self.catalog.snapshots(&domain.id).await?;
        let mut exports: Vec<Export> = Vec::with_capacity(request.disks.len());
        for wanted in &request.disks {
            let (snapshot, disk) = by_alias(domain, &snapshots, &wanted.alias)?;
            self.refuse_unless_healthy(control, snapshot, disk).await?;
            let Access::Node(node) = &disk.access else {
                return Err(
                    Error::new(ErrorKind::Unsupported, "this snapshot is read without an export")
                        .by(&disk.method)
                        .with("export", &wanted.alias)
                        .hint("Open its backupSource read-only; `disksnap snapshot show` tells it."),
                );
            };
            let export = new_export(wanted, snapshot.id, &disk.target, node, lease);
            let clash = |e: &&Export| e.alias == export.alias || e.node.name == export.node.name;
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

    pub(crate) async fn refuse_unless_healthy(
        &self,
        control: &dyn Control,
        snapshot: &Snapshot,
        disk: &crate::DiskSnapshotRecord,
    ) -> Result<()> {
        let (what, reason) = match self.health(control, snapshot, disk).await? {
            Health::Active => return Ok(()),
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

    /// The server that a request will use: the running one, when that is what it wants, or a new one.
    async fn server_for(
        &self,
        control: &dyn Control,
        running: Option<NbdServer>,
        request: &ExportRequest,
    ) -> Result<NbdServer> {
        if let Some(server) = running {
            let elsewhere = request
                .listen
                .as_ref()
                .is_some_and(|listen| *listen != server.listen);
            if elsewhere || (request.tls.is_some() && request.tls != server.tls) {
                let tls = if server.tls.is_some() {
                    " with TLS"
                } else {
                    " without TLS"
                };
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!(
                        "a domain has one NBD server, and this one's listens on {}{tls}",
                        server.listen
                    ),
                )
                .hint("Export there (leave the address out), or stop its exports first."));
            }
            return Ok(server);
        }
        let listen = request
            .listen
            .clone()
            .unwrap_or_else(|| Listen::Unix(control.default_socket()));
        refuse_careless(&listen, request)?;
        Ok(NbdServer {
            listen,
            tls: request.tls.clone(),
            explicit: false,
            instance: control.instance().await?,
        })
    }
}

fn refuse_careless(listen: &Listen, request: &ExportRequest) -> Result<()> {
    if request.tls.is_some() && matches!(listen, Listen::Unix(_)) {
        return Err(Error::new(
            ErrorKind::Invalid,
            "TLS is for TCP; a unix socket is guarded by its permissions",
        ));
    }
    if listen.is_local() || request.allow_remote || request.tls.as_ref().is_some_and(|tls| tls.verify_client)
    {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Denied,
        format!("anyone who reaches {listen} could read the disks"),
    )
    .hint("Use TLS with client verification, or say --allow-remote if the network is trusted."))
}

async fn serve_all(
    control: &dyn Control,
    server: &NbdServer,
    starts: bool,
    exports: &[Export],
) -> Result<()> {
    if starts {
        control.start_server(server).await?;
    }
    for export in exports {
        control
            .serve(&export.node)
            .await
            .map_err(|e| e.with("export", &export.alias))?;
    }
    Ok(())
}

/// An export of a snapshot's disk; one made for a reader gets names of its own.
fn new_export(
    wanted: &ExportDisk,
    snapshot: SnapshotId,
    target: &str,
    node: &str,
    lease: Option<Uuid>,
) -> Export {
    let suffix = lease.map(suffix).unwrap_or_default();
    let alias = Alias(format!("{}{suffix}", wanted.alias));
    let name = wanted.name.clone().unwrap_or_else(|| alias.0.clone());
    let id = format!("{node}{suffix}");
    Export {
        alias,
        snapshot,
        target: target.to_owned(),
        node: ServeNode {
            id,
            node: node.to_owned(),
            name,
        },
        lease,
    }
}

/// What tells a reader's export from all others.
pub(crate) fn suffix(lease: Uuid) -> String {
    format!("-{}", &lease.simple().to_string()[..8])
}

fn by_alias<'a>(
    domain: &Domain,
    snapshots: &'a [Snapshot],
    alias: &Alias,
) -> Result<(&'a Snapshot, &'a crate::DiskSnapshotRecord)> {
    let all = || snapshots.iter().flat_map(|s| s.disks.iter().map(move |d| (s, d)));
    all().find(|(_, disk)| disk.alias == *alias).ok_or_else(|| {
        let known: Vec<Alias> = all().map(|(_, disk)| disk.alias.clone()).collect();
        unknown_alias(domain, alias, &known)
    })
}

fn unknown_alias(domain: &Domain, alias: &Alias, known: &[Alias]) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("no snapshot's disk has the alias '{alias}'"),
    )
    .with("domain", &domain.id)
    .hint(nearest("aliases", &alias.0, known.iter().map(|a| a.0.as_str())))
}

pub(crate) fn disk_of<'a>(snapshot: &'a Snapshot, target: &str) -> Result<&'a crate::DiskSnapshotRecord> {
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

fn default_server(control: &dyn Control) -> NbdServer {
    NbdServer {
        listen: Listen::Unix(control.default_socket()),
        tls: None,
        explicit: false,
        instance: None,
    }
}

pub(crate) fn network_source(server: &NbdServer, name: &str) -> Source {
    let hosts: Vec<NetworkHost> = vec![server.listen.host()];
    Source::Network {
        protocol: "nbd".to_owned(),
        name: Some(name.to_owned()),
        hosts,
        tls: server.tls.is_some(),
    }
}
