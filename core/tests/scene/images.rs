//! An image server that writes down what is done to it, dies when it is told to, and serves nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use disksnap_core::{
    Changed, DomainId, Error, ErrorKind, Image, ImageServer, Listen, NbdServer, Result, ServeNode,
};

use super::Log;

/// The server of the one domain there is.
#[derive(Debug)]
pub(crate) struct FakeImages {
    log: Arc<Log>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    server: Option<(DomainId, NbdServer)>,
    /// The export names by id.
    served: BTreeMap<String, String>,
    /// It dies when this is asked of it.
    dies_at: Option<String>,
}

impl FakeImages {
    pub(crate) fn new(log: &Arc<Log>) -> Self {
        Self {
            log: Arc::clone(log),
            state: Mutex::default(),
        }
    }

    /// As a kill of its process would end it.
    pub(crate) fn die(&self) {
        let mut state = self.state();
        state.server = None;
        state.served.clear();
    }

    /// It ends so when this is asked of it the next time.
    pub(crate) fn die_at(&self, event: &str) {
        self.state().dies_at = Some(event.to_owned());
    }

    /// The names of what it serves.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state().served.values().cloned().collect()
    }

    pub(crate) fn runs(&self) -> bool {
        self.state().server.is_some()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn note(&self, event: String) -> Result<()> {
        let dies = self.state().dies_at.take_if(|at| *at == event).is_some();
        if dies {
            self.die();
        }
        self.log.note(event)
    }

    /// What only a living one answers.
    fn living(&self) -> Result<()> {
        if self.runs() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            "the image server is not there",
        ))
    }
}

#[async_trait]
impl ImageServer for FakeImages {
    fn default_listen(&self, _: &DomainId) -> Result<Listen> {
        Ok(Listen::Unix(PathBuf::from("/run/images.sock")))
    }

    async fn running(&self, _: &DomainId) -> Result<Option<NbdServer>> {
        Ok(self.state().server.as_ref().map(|(_, server)| server.clone()))
    }

    async fn start(&self, domain: &DomainId, server: &NbdServer) -> Result<()> {
        self.note(format!("images start {}", server.listen))?;
        self.state().server = Some((domain.clone(), server.clone()));
        Ok(())
    }

    async fn stop(&self, _: &DomainId) -> Result<()> {
        self.note("images stop".to_owned())?;
        self.die();
        Ok(())
    }

    async fn serve(
        &self,
        _: &DomainId,
        node: &ServeNode,
        image: &Image,
        changed: Option<Changed>,
    ) -> Result<()> {
        assert!(image.source.path().is_some(), "what lies on this host has a path");
        let told = changed.map_or_else(String::new, |changed| format!(" with {:?}", changed.precision));
        self.note(format!("images serve {}{told}", node.name))?;
        self.living()?;
        self.state().served.insert(node.id.clone(), node.name.clone());
        Ok(())
    }

    async fn unserve(&self, _: &DomainId, node: &ServeNode) -> Result<()> {
        self.note(format!("images unserve {}", node.name))?;
        self.state().served.remove(&node.id);
        Ok(())
    }

    async fn served(&self, _: &DomainId) -> Result<Vec<String>> {
        Ok(self.state().served.keys().cloned().collect())
    }

    async fn domains(&self) -> Result<Vec<DomainId>> {
        Ok(self
            .state()
            .server
            .iter()
            .map(|(domain, _)| domain.clone())
            .collect())
    }
}
