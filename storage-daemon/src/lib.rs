//! Serves snapshots that lie on this host, as images or devices: core's `ImageServer` by a
//! `qemu-storage-daemon`, one per domain, that outlives the command which started it.
//!
//! Here: what is asked of it. The process and its files are in `process`, what is remembered of it in `files`, how
//! an image becomes nodes in `nodes`, and what changed in it in `bitmaps`, from its own, and in `ranges`, from what
//! somebody else tells.

mod bitmaps;
mod files;
mod nodes;
mod process;
mod ranges;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Changed, Command, DomainId, Error, ErrorKind, Image, ImageServer, Listen, NbdServer, Result, ServeNode,
};
use disksnap_hypervisor::{NbdServerControl, Session, Timeouts};
use serde_json::{Value, json};

use crate::files::Files;
use crate::ranges::Told;

/// Names the program where it is none of [`StorageDaemons::PLACES`], by absolute path.
pub const PROGRAM_ENV: &str = "DISKSNAP_STORAGE_DAEMON";

/// How long an export may take to end: a client's request may be stuck in slow storage.
const PATIENCE: Duration = Duration::from_secs(30);

/// The storage daemons of a state directory. Keeps nothing in memory: any process may carry on.
#[derive(Debug, Clone)]
pub struct StorageDaemons {
    run: PathBuf,
    program: Option<PathBuf>,
}

impl StorageDaemons {
    /// Where the program is looked for.
    pub const PLACES: [&str; 4] = [
        "/usr/bin/qemu-storage-daemon",
        "/usr/local/bin/qemu-storage-daemon",
        "/usr/libexec/qemu-storage-daemon",
        "/usr/sbin/qemu-storage-daemon",
    ];

    /// Those whose sockets and records are in this directory, which is private to disksnap. The program is the one that
    /// the environment names ([`PROGRAM_ENV`]), else the first of [`StorageDaemons::PLACES`].
    #[must_use]
    pub fn new(run: PathBuf) -> Self {
        let program = std::env::var_os(PROGRAM_ENV).map(PathBuf::from);
        Self { run, program }
    }

    /// The same with this program.
    #[must_use]
    pub fn program(self, program: PathBuf) -> Self {
        Self {
            program: Some(program),
            ..self
        }
    }

    fn files(&self, domain: &DomainId) -> Files {
        Files::of(&self.run, domain)
    }

    fn find_program(&self) -> Result<PathBuf> {
        let places = Self::PLACES.map(PathBuf::from);
        let mut candidates = match &self.program {
            Some(program) => std::slice::from_ref(program).iter(),
            None => places.iter(),
        };
        let found = candidates.find(|path| path.is_absolute() && path.is_file());
        found.cloned().ok_or_else(|| {
            let what = match &self.program {
                Some(path) => format!("there is no program {}", path.display()),
                None => "there is no qemu-storage-daemon on this host".to_owned(),
            };
            Error::new(ErrorKind::Unavailable, what).hint(format!(
                "It serves what lies on this host: install QEMU's storage daemon (Debian: qemu-system-common; Fedora: \
                 qemu-img), or name it with {PROGRAM_ENV}. It is looked for as {}.",
                Self::PLACES.join(", ")
            ))
        })
    }

    async fn start_new(&self, domain: &DomainId, server: &NbdServer) -> Result<()> {
        let program = self.find_program()?;
        let files = self.files(domain);
        let launched = process::launch(&files, domain, &program).await?;
        let session = session(&files);
        let control = NbdServerControl::new(&session, &self.run, PATIENCE);
        let started = async {
            control.start(server).await?;
            let server = NbdServer {
                instance: session.instance().await?,
                ..server.clone()
            };
            files.remember(&server)
        };
        match started.await {
            Ok(()) => {
                launched.let_go();
                Ok(())
            }
            Err(error) => {
                session.disconnect().await;
                let failed = launched.end(&files).await.err();
                Err(error.rollback_failed(failed.into_iter().collect()))
            }
        }
    }
}

/// The program, for those who start one of their own: the one that the environment names ([`PROGRAM_ENV`]), else the first of
/// [`StorageDaemons::PLACES`].
///
/// # Errors
/// `Unavailable` when there is none.
pub fn find_program() -> Result<PathBuf> {
    StorageDaemons::new(PathBuf::new()).find_program()
}

fn session(files: &Files) -> Session {
    let session = Session::new(files.monitor(), Timeouts::default());
    match files.socket() {
        Ok(socket) => session.with_clients_at(socket),
        // A path that no socket can have: no client is there.
        Err(_) => session,
    }
}

#[async_trait]
impl ImageServer for StorageDaemons {
    fn default_listen(&self, domain: &DomainId) -> Result<Listen> {
        self.files(domain).socket().map(Listen::Unix)
    }

    async fn running(&self, domain: &DomainId) -> Result<Option<NbdServer>> {
        let files = self.files(domain);
        if files.lives().await? {
            files.remembered()
        } else {
            Ok(None)
        }
    }

    async fn start(&self, domain: &DomainId, server: &NbdServer) -> Result<()> {
        if let Some(running) = self.running(domain).await? {
            if running.listen != server.listen || running.tls != server.tls {
                let what = "the domain's image server already runs";
                return Err(Error::new(ErrorKind::Busy, what)
                    .with("listen", &running.listen)
                    .hint("Export there (leave the address out), or stop its exports first."));
            }
            let told = NbdServer {
                instance: running.instance,
                ..server.clone()
            };
            return self.files(domain).remember(&told);
        }
        self.stop(domain).await?;
        self.start_new(domain, server).await
    }

    async fn stop(&self, domain: &DomainId) -> Result<()> {
        let files = self.files(domain);
        if files.is_held()? {
            process::end(&files).await?;
        }
        files.remove()
    }

    async fn serve(
        &self,
        domain: &DomainId,
        node: &ServeNode,
        image: &Image,
        changed: Option<Changed>,
    ) -> Result<()> {
        let files = self.files(domain);
        let add = nodes::of(&node.node, image)?;
        let session = session(&files);
        let control = NbdServerControl::new(&session, &self.run, PATIENCE);
        // What a serve or an unserve left that was killed.
        control.unserve(&node.id).await?;
        close(&session, &files, &node.node).await?;
        let served = async {
            let told = match (changed, &node.bitmap) {
                (Some(changed), Some(_)) => Some(Told::read(changed, files.changed(&node.node)).await?),
                _ => None,
            };
            let added = session.execute(Command::new("blockdev-add", add)).await;
            added.map_err(|error| {
                error.with("image", &image.source).hint(
                    "The image cannot be opened by the record of its snapshot; `qemu-img info` tells more.",
                )
            })?;
            let mut node = node.clone();
            if let Some(bitmap) = &mut node.bitmap {
                *bitmap = match &told {
                    Some(told) => told.hold(&session, &node.node, &bitmap.name).await?,
                    None => bitmaps::unite(&session, &node.node, &image.changed, &bitmap.name).await?,
                };
            }
            files.forget_changed(&node.node)?;
            control.serve(&node).await
        };
        match served.await {
            Ok(()) => Ok(()),
            Err(error) => {
                let failed = close(&session, &files, &node.node).await.err();
                Err(error.rollback_failed(failed.into_iter().collect()))
            }
        }
    }

    async fn unserve(&self, domain: &DomainId, node: &ServeNode) -> Result<()> {
        let files = self.files(domain);
        if !files.lives().await? {
            return files.forget_changed(&node.node);
        }
        let session = session(&files);
        let control = NbdServerControl::new(&session, &self.run, PATIENCE);
        control.unserve(&node.id).await?;
        close(&session, &files, &node.node).await
    }

    async fn served(&self, domain: &DomainId) -> Result<Vec<String>> {
        let files = self.files(domain);
        if !files.lives().await? {
            return Ok(Vec::new());
        }
        let session = session(&files);
        let served = NbdServerControl::new(&session, &self.run, PATIENCE)
            .served()
            .await;
        match served {
            // It has just ended.
            Err(error) if error.kind() == ErrorKind::Unavailable && !files.lives().await? => Ok(Vec::new()),
            served => served,
        }
    }

    async fn domains(&self) -> Result<Vec<DomainId>> {
        files::domains(&self.run)
    }
}

/// Closes an image, and forgets what changed in it, as far as they are there; each whatever becomes of the others.
async fn close(session: &Session, files: &Files, node: &str) -> Result<()> {
    let mut failed = Vec::new();
    for name in [ranges::reader(node), bitmaps::holder(node), node.to_owned()] {
        let delete = Command::new("blockdev-del", json!({ "node-name": name }));
        match session.execute(delete).await {
            Err(error) if !error.message().contains("Failed to find node") => failed.push(error),
            _ => {}
        }
    }
    failed.extend(files.forget_changed(node).err());
    let mut failed = failed.into_iter();
    match failed.next() {
        None => Ok(()),
        Some(first) => Err(first.rollback_failed(failed.collect())),
    }
}

/// The answer of a monitor that has ended as it was told to is none.
fn ended_by_quit(answer: Result<Value>) -> Result<()> {
    match answer {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::Unavailable => Ok(()),
        Err(error) => Err(error),
    }
}
