//! The acts on exports. Each of a domain's two servers starts with the first export and stops with the
//! last, or is started and stopped by itself. What is to be exported is found in `wanted`, who serves in `place`.

use std::time::SystemTime;

use uuid::Uuid;

use crate::changes::excess;
use crate::dispatcher::Held;
use crate::place::Place;
pub(crate) use crate::wanted::disk_of;
use crate::wanted::{Purpose, refuse_one_address_for_two, unknown_alias};
use crate::{
    Access, Act, Alias, Change, Control, Dispatcher, Domain, DomainId, Effect, Error, ErrorKind, Export,
    ExportRequest, ImageServer, Intent, Listen, NbdServer, Recovered, RecoveredHow, Result, ServedBy,
    Snapshot, SnapshotId, SnapshotName, Source, Tls,
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
    /// The hypervisor's server, when it runs.
    pub server: Option<NbdServer>,
    /// The server for images on this host, when it runs.
    pub image_server: Option<NbdServer>,
    /// The exports that were asked for, by alias.
    pub exports: Vec<Export>,
}

impl Serving {
    /// The server that serves an export.
    #[must_use]
    pub fn server_of(&self, export: &Export) -> Option<&NbdServer> {
        match export.served_by() {
            ServedBy::Hypervisor => self.server.as_ref(),
            ServedBy::ImageServer => self.image_server.as_ref(),
        }
    }

    /// The servers that run, each with its exports.
    #[must_use]
    pub fn by_server(&self) -> Vec<(&NbdServer, Vec<Export>)> {
        let with_exports = |(by, server)| {
            let its = |export: &&Export| export.served_by() == by;
            (server, self.exports.iter().filter(its).cloned().collect())
        };
        let hypervisors = self.server.iter().map(|server| (ServedBy::Hypervisor, server));
        let images = self
            .image_server
            .iter()
            .map(|server| (ServedBy::ImageServer, server));
        hypervisors.chain(images).map(with_exports).collect()
    }
}

/// What one of the two servers has to do for a request.
struct Side<'a> {
    place: Place<'a>,
    server: NbdServer,
    starts: bool,
    exports: Vec<Export>,
}

impl Dispatcher {
    /// Starts exports, and the servers with their first ones. All of the request or nothing.
    ///
    /// What is a node of the hypervisor's is served by the hypervisor, what lies on this host by the image
    /// server: a request with both makes two servers listen, each on a unix socket of its own.
    ///
    /// # Errors
    /// `NotFound` for an unknown alias; `AlreadyExists` for one that is being served or an export name
    /// in use; `Broken` for a snapshot that must not be read; `Busy` when the server listens elsewhere;
    /// `Invalid` when an address is given and two servers would have to listen on it;
    /// `Denied` for a place other hosts reach without TLS that is not expressly allowed.
    pub async fn start_exports(&self, domain: &Domain, request: &ExportRequest) -> Result<Vec<Export>> {
        let held = self.hold(domain).await.map_err(|e| e.during("export"))?;
        self.start_held(&held, domain, request, &Purpose::Asked)
            .await
            .map_err(|e| e.during("export").with("domain", &domain.id))
    }

    /// Stops exports, and each server with its last one unless it was started by itself. Idempotent.
    /// Returns the aliases that were being served.
    ///
    /// # Errors
    /// `Busy` for one that a guest has as its disk.
    pub async fn stop_exports(&self, domain: &Domain, which: &StopExports) -> Result<Vec<Alias>> {
        let held = self.hold(domain).await.map_err(|e| e.during("export stop"))?;
        let act = async {
            let aliases = self.aliases_to_stop(domain, which).await?;
            self.refuse_attached(&domain.id, |export| aliases.contains(&export.alias))
                .await?;
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

    /// What the domain serves now; asks the servers, not only the catalog.
    pub async fn serving(&self, domain: &Domain) -> Result<Serving> {
        let control = self.connector.control(domain).await?;
        let [hypervisor, images] = self.both(&*control, &domain.id);
        let (server, mut exports) = self.truly_served(&hypervisor).await?;
        let (image_server, more) = self.truly_served(&images).await?;
        exports.extend(more);
        exports.retain(|export| export.lease.is_none());
        exports.sort_by(|a, b| a.alias.cmp(&b.alias));
        Ok(Serving {
            server,
            image_server,
            exports,
        })
    }

    /// Starts a server by itself; it then stays until [`Dispatcher::stop_server`]. Idempotent for the same place.
    pub async fn start_server(
        &self,
        domain: &Domain,
        by: ServedBy,
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
        let started = self.start_server_held(&held, domain, by, &request).await;
        started.map_err(|e: Error| e.during("server start").with("domain", &domain.id))
    }

    async fn start_server_held(
        &self,
        held: &Held,
        domain: &Domain,
        by: ServedBy,
        request: &ExportRequest,
    ) -> Result<NbdServer> {
        let place = self.place(by, &*held.control, &domain.id);
        let (running, _) = self.truly_served(&place).await?;
        let starts = running.is_none();
        let was_explicit = running.as_ref().is_some_and(|server| server.explicit);
        let mut server = place.server_for(running, request).await?;
        server.explicit = true;
        let act = Act::Serve {
            server: server.clone(),
            starts: starts && by == ServedBy::Hypervisor,
            starts_images: starts && by == ServedBy::ImageServer,
            exports: Vec::new(),
        };
        let intent = self.intend(domain, act).await?;
        // The image server keeps its own record: one that runs is told that it stays.
        let tell = by == ServedBy::ImageServer && !was_explicit;
        if (starts || tell)
            && let Err(error) = place.start(&server).await
        {
            self.catalog.settle(intent.id, &domain.id, &[]).await?;
            return Err(error);
        }
        let recorded = (by == ServedBy::Hypervisor).then(|| Change::SetServer(server.clone()));
        let changes: Vec<Change> = recorded.into_iter().collect();
        self.catalog.settle(intent.id, &domain.id, &changes).await?;
        Ok(server)
    }

    /// Stops a server. `Busy` while it serves exports. Idempotent.
    pub async fn stop_server(&self, domain: &Domain, by: ServedBy) -> Result<()> {
        let held = self.hold(domain).await.map_err(|e| e.during("server stop"))?;
        let place = self.place(by, &*held.control, &domain.id);
        let (server, exports) = self.truly_served(&place).await?;
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
            place.stop().await.map_err(|e| e.during("server stop"))?;
        }
        if by == ServedBy::Hypervisor {
            let cleared = [Change::ClearServer];
            self.catalog.settle(Uuid::nil(), &domain.id, &cleared).await?;
        }
        Ok(())
    }

    /// Where a snapshot's disk is, or will be once it is exported (`backupSource`); `None` where nothing on this host
    /// gives its bytes ([`Access::Inside`]).
    ///
    /// What lies on this host is there, and while it is exported it is the export.
    pub async fn backup_source(
        &self,
        domain: &Domain,
        snapshot: &Snapshot,
        target: &str,
    ) -> Result<Option<Source>> {
        let control = self.connector.control(domain).await?;
        let disk = disk_of(snapshot, target)?;
        let exports = self.catalog.exports(&domain.id).await?;
        let asked = |e: &&Export| e.alias == disk.alias && e.lease.is_none();
        let export = exports.iter().find(asked);
        if let Access::Inside(_) = &disk.access {
            return Ok(None);
        }
        if let Access::Source { source, .. } = &disk.access {
            let place = self.place(ServedBy::ImageServer, &*control, &domain.id);
            let (server, served) = match export {
                Some(_) => self.truly_served(&place).await?,
                None => (None, Vec::new()),
            };
            return Ok(Some(match (server, served.iter().find(asked)) {
                (Some(server), Some(export)) => server.source(&export.node.name),
                _ => source.clone(),
            }));
        }
        let name = export.map_or(disk.alias.0.as_str(), |e| e.node.name.as_str());
        let server = self.catalog.server(&domain.id).await?;
        let server = server.unwrap_or_else(|| default_server(&*control));
        Ok(Some(server.source(name)))
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
        purpose: &Purpose,
    ) -> Result<Vec<Export>> {
        let control = &*held.control;
        let mut sides = self.sides(control, domain, request, purpose).await?;
        let exports = all_of(&sides);
        let Some(first) = sides.first() else {
            return Err(Error::new(ErrorKind::Internal, "nobody is to serve the exports"));
        };
        let starts = |by| sides.iter().any(|side| side.place.by == by && side.starts);
        let act = Act::Serve {
            server: first.server.clone(),
            starts: starts(ServedBy::Hypervisor),
            starts_images: starts(ServedBy::ImageServer),
            exports: exports.clone(),
        };
        let starts = starts(ServedBy::Hypervisor);
        let intent = self.intend(domain, act).await?;
        if let Err(error) = self.serve_all(control, domain, &mut sides).await {
            return Err(match self.undo_serve(control, &intent, starts, &exports).await {
                Ok(()) => error.leaving(Effect::RolledBack),
                Err(failure) => error.rollback_failed(vec![failure]),
            });
        }
        let exports = all_of(&sides);
        let hypervisors = sides.iter().find(|side| side.place.by == ServedBy::Hypervisor);
        let mut changes: Vec<Change> = Vec::new();
        changes.extend(hypervisors.map(|side| Change::SetServer(side.server.clone())));
        changes.extend(exports.iter().cloned().map(Change::AddExport));
        self.catalog.settle(intent.id, &domain.id, &changes).await?;
        Ok(exports)
    }

    async fn serve_all(&self, control: &dyn Control, domain: &Domain, sides: &mut [Side<'_>]) -> Result<()> {
        for side in sides {
            if side.starts {
                side.place.start(&side.server).await?;
            }
            for export in &mut side.exports {
                let served = async {
                    let changed = self.compared(control, &domain.id, export).await?;
                    if let (Some(changed), Some(changes)) = (&changed, &mut export.changes) {
                        changes.excess = excess(&changed.precision);
                    }
                    side.place.serve(export, changed).await
                };
                let served = served.await;
                served.map_err(|e: Error| e.with("export", &export.alias))?;
            }
        }
        Ok(())
    }

    /// What each server has to do for a request; those that have nothing to do are left out.
    async fn sides<'a>(
        &'a self,
        control: &'a dyn Control,
        domain: &'a Domain,
        request: &ExportRequest,
        purpose: &Purpose,
    ) -> Result<Vec<Side<'a>>> {
        let mut present = Vec::new();
        let mut running = Vec::new();
        for place in self.both(control, &domain.id) {
            let (server, exports) = self.truly_served(&place).await?;
            running.push((place, server));
            present.extend(exports);
        }
        let exports = self
            .new_exports(control, domain, request, &present, purpose)
            .await?;
        if request.listen.is_some() {
            refuse_one_address_for_two(&exports)?;
        }
        let mut sides = Vec::new();
        for (place, server) in running {
            let its = |export: &&Export| export.served_by() == place.by;
            let exports: Vec<Export> = exports.iter().filter(its).cloned().collect();
            if exports.is_empty() {
                continue;
            }
            sides.push(Side {
                place,
                starts: server.is_none(),
                server: place.server_for(server, request).await?,
                exports,
            });
        }
        Ok(sides)
    }

    /// Takes back what a start of exports has done, and settles its intent.
    pub(crate) async fn undo_serve(
        &self,
        control: &dyn Control,
        intent: &Intent,
        starts: bool,
        exports: &[Export],
    ) -> Result<()> {
        let domain = &intent.domain.id;
        let [hypervisor, images] = self.both(control, domain);
        let starts_images = matches!(
            intent.act,
            Act::Serve {
                starts_images: true,
                ..
            }
        );
        if starts_images {
            images.stop().await?;
        }
        for (place, starts) in [(hypervisor, starts), (images, false)] {
            let its: Vec<&Export> = exports.iter().filter(|e| e.served_by() == place.by).collect();
            if (its.is_empty() && !starts) || !place.is_up().await? {
                continue;
            }
            for export in its {
                place.unserve(export).await?;
            }
            if starts {
                place.stop().await?;
            }
        }
        self.catalog.settle(intent.id, domain, &[]).await
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
        let (mut stopped, mut changes) = (Vec::new(), Vec::new());
        for place in self.both(control, domain) {
            let its = recorded.iter().filter(|export| export.served_by() == place.by);
            let (stop, keep): (Vec<&Export>, Vec<&Export>) = its.partition(|export| which(export));
            let (server, served) = self.truly_served(&place).await?;
            let was_served = !stop.is_empty();
            for export in stop {
                if served.contains(export) {
                    place.unserve(export).await?;
                    stopped.push(export.alias.clone());
                }
                changes.push(Change::RemoveExport(export.alias.clone()));
            }
            let left =
                keep.iter().any(|export| served.contains(export)) || self.fills_at(&place, domain).await?;
            let ends = server.as_ref().is_some_and(|server| !left && !server.explicit);
            // An image server that died, or whose end was cut off, has left what only a stop takes away.
            let died = server.is_none() && was_served && place.by == ServedBy::ImageServer;
            if ends || died {
                place.stop().await?;
            }
            if place.by == ServedBy::Hypervisor && (ends || server.is_none()) {
                changes.push(Change::ClearServer);
            }
        }
        Ok((stopped, changes))
    }

    /// Ends image servers that serve nothing and were not told to stay; of one domain, or of all.
    pub(crate) async fn recover_image_servers(&self, only: Option<&DomainId>) -> Result<Vec<Recovered>> {
        let mut ended = Vec::new();
        let Some(images) = self.connector.image_server() else {
            return Ok(ended);
        };
        for domain in images.domains().await? {
            if only.is_some_and(|only| only.uuid != domain.uuid) {
                continue;
            }
            let _lock = self.catalog.lock(&domain).await?;
            let idle = match images.running(&domain).await? {
                Some(server) => !server.explicit && !self.any_served(images, &domain).await?,
                // What was never wholly started is not there for those who come later.
                None => true,
            };
            if !idle {
                continue;
            }
            let how = match images.stop(&domain).await {
                Ok(()) => RecoveredHow::Undone,
                Err(error) => RecoveredHow::Left(error.to_string()),
            };
            let what = "the image server without exports".to_owned();
            ended.push(Recovered { domain, what, how });
        }
        Ok(ended)
    }

    async fn any_served(&self, images: &dyn ImageServer, domain: &DomainId) -> Result<bool> {
        let served = images.served(domain).await?;
        let recorded = self.catalog.exports(domain).await?;
        Ok(recorded.iter().any(|export| served.contains(&export.node.id)))
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
}

fn all_of(sides: &[Side<'_>]) -> Vec<Export> {
    sides.iter().flat_map(|side| side.exports.clone()).collect()
}

fn default_server(control: &dyn Control) -> NbdServer {
    NbdServer {
        listen: Listen::Unix(control.default_socket()),
        tls: None,
        explicit: false,
        instance: None,
    }
}
