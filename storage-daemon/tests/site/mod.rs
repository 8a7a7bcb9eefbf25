//! A domain's storage daemon in a directory of its own, and images to serve: a module of each test program.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test program")]

use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_core::{BackingStore, DomainId, Image, ImageServer, Listen, NbdServer, ServeNode, Source};
use disksnap_storage_daemon::StorageDaemons;
use disksnap_test_support::{QemuVersion, pattern, tools};
use tempfile::TempDir;

pub struct Site {
    pub dir: TempDir,
    pub daemons: StorageDaemons,
    pub domain: DomainId,
}

/// A test that fails must leave no daemon.
impl Drop for Site {
    fn drop(&mut self) {
        let (daemons, domain) = (self.daemons.clone(), self.domain.clone());
        let ended = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let _ = runtime.block_on(daemons.stop(&domain));
        });
        let _ = ended.join();
    }
}

impl Site {
    pub fn new() -> Self {
        Self::with(QemuVersion::V10_0)
    }

    pub fn with(version: QemuVersion) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        let program = version.program("qemu-storage-daemon");
        let daemons = StorageDaemons::new(dir.path().join("run")).program(program);
        let domain = DomainId::new("vm", None);
        Self { dir, daemons, domain }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("run")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    pub fn server(&self) -> NbdServer {
        NbdServer {
            listen: self.daemons.default_listen(&self.domain).unwrap(),
            tls: None,
            explicit: false,
            instance: None,
        }
    }

    pub async fn start(&self) {
        self.daemons.start(&self.domain, &self.server()).await.unwrap();
    }

    pub async fn serve(&self, name: &str, image: &Image) -> disksnap_core::Result<()> {
        self.daemons.serve(&self.domain, &node(name), image, None).await
    }

    pub async fn served(&self) -> Vec<String> {
        self.daemons.served(&self.domain).await.unwrap()
    }

    pub async fn stop(&self) {
        self.daemons.stop(&self.domain).await.unwrap();
        assert_eq!(self.running().await, None);
        assert_eq!(self.run_files(), Vec::<PathBuf>::new());
    }

    pub async fn running(&self) -> Option<NbdServer> {
        self.daemons.running(&self.domain).await.unwrap()
    }

    /// What comes over an export.
    pub fn digest(&self, name: &str) -> String {
        let Listen::Unix(socket) = self.server().listen else {
            panic!("it listens elsewhere")
        };
        let to = self.path("copied.raw");
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        run("nbdcopy", &[&uri, text(&to)]);
        pattern::digest_file(&to)
    }

    /// An image file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }
}

pub fn node(name: &str) -> ServeNode {
    ServeNode {
        id: format!("ds-{name}"),
        node: format!("ds-{name}"),
        name: name.to_owned(),
        bitmap: None,
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(tools::program(program))
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
}

pub fn file(path: &Path) -> Source {
    Source::File {
        file: path.to_owned(),
    }
}

pub fn image(path: &Path, format: &str, backing: Option<BackingStore>) -> Image {
    Image {
        source: file(path),
        format: format.to_owned(),
        backing: backing.map(Box::new),
        changed: std::collections::BTreeMap::new(),
    }
}

pub fn layer(path: &Path, format: &str) -> BackingStore {
    BackingStore {
        format: Some(format.to_owned()),
        source: file(path),
        data_store: None,
        backing: None,
    }
}
