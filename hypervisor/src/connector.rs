//! Finds the place where a domain runs: from its sockets to a control.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use disksnap_core::{Connector, Control, Domain, Error, ErrorKind, ImageServer, Result};

use crate::control::{Links, QemuControl};
use crate::guard::GuardianProgram;
use crate::qmp::Timeouts;

/// The longest path of a unix socket, in bytes (unix(7)).
pub(crate) const LONGEST_SOCKET: usize = 107;

/// The directories of the state directory that a control uses. Both exist and are private to disksnap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// For fleece images that nobody named a place for.
    pub images: PathBuf,
    /// For the sockets that exports listen on when nobody says otherwise.
    pub run: PathBuf,
}

/// The monitor's and the agent's socket.
type SocketPaths = (Option<PathBuf>, Option<PathBuf>);

/// What all controls of one connector share.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) paths: Paths,
    pub(crate) timeouts: Timeouts,
    pub(crate) guardian: GuardianProgram,
    pub(crate) images: Option<Arc<dyn ImageServer>>,
}

/// Connects to QEMUs by the sockets that a domain names. Clones share their connections.
#[derive(Debug, Clone)]
pub struct QemuConnector {
    settings: Arc<Settings>,
    links: Arc<Mutex<HashMap<SocketPaths, Weak<Links>>>>,
}

impl QemuConnector {
    /// A connector with the default time-outs.
    #[must_use]
    pub fn new(paths: Paths) -> Self {
        Self::with(Settings {
            paths,
            timeouts: Timeouts::default(),
            guardian: GuardianProgram::default(),
            images: None,
        })
    }

    fn with(settings: Settings) -> Self {
        Self {
            settings: Arc::new(settings),
            links: Arc::default(),
        }
    }

    /// The same with other time-outs, and connections of its own.
    #[must_use]
    pub fn timeouts(self, timeouts: Timeouts) -> Self {
        Self::with(Settings {
            timeouts,
            ..(*self.settings).clone()
        })
    }

    /// The same with another guardian, and connections of its own.
    #[must_use]
    pub fn guardian(self, guardian: GuardianProgram) -> Self {
        Self::with(Settings {
            guardian,
            ..(*self.settings).clone()
        })
    }

    /// The same with something that serves images, and connections of its own.
    #[must_use]
    pub fn images(self, images: Arc<dyn ImageServer>) -> Self {
        Self::with(Settings {
            images: Some(images),
            ..(*self.settings).clone()
        })
    }

    /// The control of a domain; connects with the first command.
    ///
    /// Controls of one connector that name the same sockets share one connection, since a monitor serves one client.
    ///
    /// # Errors
    /// `Invalid` when the directory for sockets is so deep that no socket can be made in it.
    pub fn control(&self, domain: &Domain) -> Result<QemuControl> {
        let socket = default_socket(&self.settings.paths.run, domain)?;
        let key = (domain.sockets.monitor.clone(), domain.sockets.agent.clone());
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|_, link| link.strong_count() > 0);
        let shared = links.get(&key).and_then(Weak::upgrade).unwrap_or_else(|| {
            let fresh = Links::new(&domain.sockets, &socket, self.settings.timeouts);
            links.insert(key, Arc::downgrade(&fresh));
            fresh
        });
        drop(links);
        let settings = Arc::clone(&self.settings);
        Ok(QemuControl::new(domain.clone(), settings, shared, socket))
    }
}

#[async_trait]
impl Connector for QemuConnector {
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>> {
        Ok(Arc::new(Self::control(self, domain)?))
    }

    fn image_server(&self) -> Option<&dyn ImageServer> {
        self.settings.images.as_deref()
    }
}

fn default_socket(run: &Path, domain: &Domain) -> Result<PathBuf> {
    let uuid = domain.id.uuid.simple().to_string();
    let socket = run.join(format!("{}.nbd.sock", &uuid[..12]));
    check_socket_path(&socket)?;
    Ok(socket)
}

/// Refuses a path that no unix socket can have.
pub(crate) fn check_socket_path(socket: &Path) -> Result<()> {
    if socket.as_os_str().len() <= LONGEST_SOCKET {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!("the path of a unix socket has at most {LONGEST_SOCKET} bytes"),
    )
    .with("socket", socket.display())
    .hint("Choose a shorter one, or a shorter state directory."))
}
