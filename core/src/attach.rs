//! Attaching a snapshot's disk to the guest of another running domain, read-only, and taking it out again.
//!
//! The disk goes over an export of its own, which lives until the detach; the export's record says whose
//! disk it is.

use std::time::Duration;

use uuid::Uuid;

use crate::dispatcher::Held;
use crate::wanted::{Purpose, disk_of, node_name};
use crate::{
    Act, Alias, Attached, Dispatcher, Domain, DomainId, Effect, Error, ErrorKind, Export, ExportDisk,
    ExportRequest, Hotplug, Intent, Listen, NbdServer, PlugDisk, PlugTls, RecoveredHow, Result, SnapshotName,
};

/// The most characters that a guest sees of a serial number.
const SERIAL: usize = 20;
/// How long a guest may take to let a disk go when nobody says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

impl Dispatcher {
    /// Attaches a disk of a snapshot, read-only, to the running domain `to`. Idempotent.
    ///
    /// The disk goes over the server that runs, or over one on a unix socket. To a server that speaks TLS the other
    /// hypervisor does too: with `tls`, or else with the client's certificate in the server's own directory.
    ///
    /// # Errors
    /// `NotFound` for an unknown snapshot or disk; `Broken` for one that must not be read; `Unavailable` when `to` does
    /// not run; `NoSpace` when its machine has no free place to plug into; `Invalid` for `tls` where the server does not
    /// speak it; what the export meets.
    pub async fn attach(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        to: &Domain,
        tls: Option<&PlugTls>,
    ) -> Result<Attached> {
        let held = self.hold(domain).await.map_err(|e| e.during("attach"))?;
        let attached = self.attach_held(&held, domain, name, target, (to, tls)).await;
        attached.map_err(|e| {
            e.during("attach")
                .with("domain", &domain.id)
                .with("snapshot", name)
                .with("disk", target)
                .with("to", &to.id)
        })
    }

    async fn attach_held(
        &self,
        held: &Held,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        (to, tls): (&Domain, Option<&PlugTls>),
    ) -> Result<Attached> {
        let snapshot = self.find(domain, name).await?;
        let disk = disk_of(&snapshot, target)?;
        self.refuse_unless_healthy(&*held.control, &snapshot, disk)
            .await?;
        self.refuse_off(to).await?;
        let device = node_name(&format!("{}/{target}/{}", snapshot.id, to.id.uuid));
        let (listen, server) = self.listening_for(held, domain, disk).await?;
        let mut attached = Box::new(Attached {
            to: Domain {
                disks: Vec::new(),
                ..to.clone()
            },
            disk: PlugDisk {
                serial: device.chars().take(SERIAL).collect(),
                node: format!("{device}-n"),
                device,
                listen,
                name: String::new(),
                tls: client_of(server.as_ref(), tls)?,
            },
        });
        let purpose = Purpose::Guest(attached.clone());
        let alias = purpose.alias(&disk.alias);
        attached.disk.name.clone_from(&alias.0);
        if let Some(there) = self.attachment(&domain.id, &alias).await? {
            if server.is_some() && self.is_plugged(&there).await? {
                return Ok(*there);
            }
            // The guest or the server is another one since: begin anew.
            self.clear_stale(held, domain, &there, &alias).await?;
        }
        self.plug_new(held, domain, &disk.alias, attached).await
    }

    async fn plug_new(
        &self,
        held: &Held,
        domain: &Domain,
        disk: &Alias,
        attached: Box<Attached>,
    ) -> Result<Attached> {
        let purpose = Purpose::Guest(attached.clone());
        let export = purpose.alias(disk);
        let intent = self
            .intend(
                domain,
                Act::Attach {
                    attached: attached.clone(),
                    export: export.clone(),
                },
            )
            .await?;
        let request = ExportRequest {
            listen: None,
            tls: None,
            allow_remote: false,
            disks: vec![ExportDisk {
                alias: disk.clone(),
                name: None,
                checkpoint: None,
            }],
        };
        let plugged = match self.start_held(held, domain, &request, &purpose).await {
            Ok(_) => self.plug(&attached).await,
            Err(error) => {
                self.catalog.settle(intent.id, &domain.id, &[]).await?;
                return Err(error);
            }
        };
        if let Err(error) = plugged {
            let undone = self
                .finish_unserve(held, &intent, std::slice::from_ref(&export))
                .await;
            return Err(match undone {
                Ok(_) => error.leaving(Effect::RolledBack),
                Err(failure) => error.rollback_failed(vec![failure]),
            });
        }
        self.catalog.settle(intent.id, &domain.id, &[]).await?;
        Ok(*attached)
    }

    /// Takes a disk of a snapshot out of the guests that it was attached to, or of `from` alone. Idempotent;
    /// returns where it was taken out. A guest has `patience` to let it go, 30 s if nothing is said.
    ///
    /// # Errors
    /// `Timeout` or `Refused` when a guest does not let it go: it stays attached there.
    pub async fn detach(
        &self,
        domain: &Domain,
        name: &SnapshotName,
        target: &str,
        from: Option<&DomainId>,
        patience: Option<Duration>,
    ) -> Result<Vec<DomainId>> {
        let held = self.hold(domain).await.map_err(|e| e.during("detach"))?;
        let detached = async {
            let snapshot = self.find(domain, name).await?;
            disk_of(&snapshot, target)?;
            let mut detached = Vec::new();
            for export in self.catalog.exports(&domain.id).await? {
                let Some(attached) = &export.attached else {
                    continue;
                };
                let other = from.is_some_and(|from| from.uuid != attached.to.id.uuid);
                if other || export.snapshot != snapshot.id || export.target != target {
                    continue;
                }
                let patience = patience.unwrap_or(PATIENCE);
                self.detach_one(&held, domain, attached, &export.alias, patience)
                    .await
                    .map_err(|e| e.with("from", &attached.to.id))?;
                detached.push(attached.to.id.clone());
            }
            Ok(detached)
        };
        detached.await.map_err(|e: Error| {
            e.during("detach")
                .with("domain", &domain.id)
                .with("snapshot", name)
                .with("disk", target)
        })
    }

    async fn detach_one(
        &self,
        held: &Held,
        domain: &Domain,
        attached: &Attached,
        export: &Alias,
        patience: Duration,
    ) -> Result<()> {
        let intent = self
            .intend(
                domain,
                Act::Detach {
                    attached: Box::new(attached.clone()),
                    export: export.clone(),
                },
            )
            .await?;
        if let Err(error) = self.unplug(attached, patience).await {
            self.catalog.settle(intent.id, &domain.id, &[]).await?;
            return Err(error);
        }
        let ended = self
            .finish_unserve(held, &intent, std::slice::from_ref(export))
            .await;
        ended.map(drop)
    }

    /// What a killed attach or detach left. A guest that has the disk, over an export that is recorded, keeps it; of
    /// anything less the rest goes.
    pub(crate) async fn settle_plugging(
        &self,
        held: &Held,
        intent: &Intent,
        attached: &Attached,
        export: &Alias,
    ) -> Result<RecoveredHow> {
        let recorded = self.attachment(&intent.domain.id, export).await?.is_some();
        let stays = recorded && self.is_plugged(attached).await?;
        if stays {
            self.catalog.settle(intent.id, &intent.domain.id, &[]).await?;
        } else {
            self.unplug(attached, PATIENCE).await?;
            self.finish_unserve(held, intent, std::slice::from_ref(export))
                .await?;
        }
        let wanted = matches!(intent.act, Act::Attach { .. });
        Ok(if stays == wanted {
            RecoveredHow::Finished
        } else {
            RecoveredHow::Undone
        })
    }

    /// Refuses where an export is the disk of a guest that still has it.
    ///
    /// # Errors
    /// `Busy`, naming the domain.
    pub(crate) async fn refuse_attached(
        &self,
        domain: &DomainId,
        which: impl Fn(&Export) -> bool,
    ) -> Result<()> {
        for export in self.catalog.exports(domain).await?.iter().filter(|e| which(e)) {
            let Some(attached) = &export.attached else {
                continue;
            };
            if self.is_plugged(attached).await? {
                let what = format!("the guest of '{}' has it as a disk", attached.to.id);
                return Err(Error::new(ErrorKind::Busy, what)
                    .with("export", &export.alias)
                    .with("disk", &export.target)
                    .hint("Take it out first: `disksnap detach -d DOMAIN NAME TARGET`."));
            }
        }
        Ok(())
    }

    /// Who the disk of this export belongs to.
    async fn attachment(&self, domain: &DomainId, export: &Alias) -> Result<Option<Box<Attached>>> {
        let exports = self.catalog.exports(domain).await?;
        let found = exports.into_iter().find(|e| e.alias == *export);
        Ok(found.and_then(|export| export.attached))
    }

    async fn clear_stale(
        &self,
        held: &Held,
        domain: &Domain,
        there: &Attached,
        export: &Alias,
    ) -> Result<()> {
        self.unplug(there, PATIENCE).await?;
        let (_, changes) = self
            .unserve(&*held.control, &domain.id, |e| e.alias == *export)
            .await?;
        self.catalog.settle(Uuid::nil(), &domain.id, &changes).await
    }

    async fn refuse_off(&self, to: &Domain) -> Result<()> {
        let control = self.connector.control(to).await?;
        if control.state().await?.is_active() {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Unavailable, "the domain to attach to does not run")
                .hint("Start it; or put what `disksnap attach --print` prints into its XML."),
        )
    }

    /// Where the disk's export will be, and the server there if it runs.
    async fn listening_for(
        &self,
        held: &Held,
        domain: &Domain,
        disk: &crate::DiskSnapshotRecord,
    ) -> Result<(Listen, Option<NbdServer>)> {
        let place = self.place(disk.served_by(), &*held.control, &domain.id);
        match self.truly_served(&place).await?.0 {
            Some(server) => Ok((server.listen.clone(), Some(server))),
            None => Ok((place.default_listen()?, None)),
        }
    }

    async fn plug(&self, attached: &Attached) -> Result<()> {
        let control = self.connector.control(&attached.to).await?;
        hotplug(control.hotplug())?.plug(&attached.disk).await
    }

    /// A domain that is off has no disk to let go.
    async fn unplug(&self, attached: &Attached, patience: Duration) -> Result<()> {
        let control = self.connector.control(&attached.to).await?;
        if !control.state().await?.is_active() {
            return Ok(());
        }
        hotplug(control.hotplug())?.unplug(&attached.disk, patience).await
    }

    async fn is_plugged(&self, attached: &Attached) -> Result<bool> {
        let control = self.connector.control(&attached.to).await?;
        if !control.state().await?.is_active() {
            return Ok(false);
        }
        hotplug(control.hotplug())?.plugged(&attached.disk).await
    }
}

/// How the other hypervisor is to speak TLS to this server.
fn client_of(server: Option<&NbdServer>, wanted: Option<&PlugTls>) -> Result<Option<PlugTls>> {
    match (server.and_then(|server| server.tls.as_ref()), wanted) {
        (None, None) => Ok(None),
        (Some(_), Some(wanted)) => Ok(Some(wanted.clone())),
        (Some(tls), None) => Ok(Some(PlugTls {
            credentials: tls.credentials.clone(),
            hostname: None,
        })),
        (None, Some(_)) => {
            let what = "credentials for TLS are given, and the disk does not go over TLS";
            Err(Error::new(ErrorKind::Invalid, what).hint(
                "Leave them out: without a server that speaks TLS the disk goes over a unix socket of this host. Or start \
                 that server first: `disksnap export server start --listen ADDRESS:PORT --tls-credentials DIRECTORY`.",
            ))
        }
    }
}

fn hotplug(found: Option<&dyn Hotplug>) -> Result<&dyn Hotplug> {
    found.ok_or_else(|| Error::new(ErrorKind::Unsupported, "nothing can be plugged into that domain"))
}
