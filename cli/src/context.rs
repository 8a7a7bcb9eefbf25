//! What every command begins with: the state directory opened, the domain loaded.

use disksnap::{Disksnap, Domain, DomainDocument, Effect, Error, ErrorKind, Following, Result};

use crate::args::{Global, Keep};
use crate::failure::Outcome;
use crate::output::Output;

/// The global options and where to print.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) global: Global,
    pub(crate) out: Output,
}

/// A domain to act on.
#[derive(Debug)]
pub(crate) struct Target {
    /// As it was given with `-d`.
    pub(crate) given: String,
    pub(crate) disksnap: Disksnap,
    pub(crate) document: DomainDocument,
    /// What was read from the document, with the sockets of the command line.
    pub(crate) domain: Domain,
}

impl Context {
    pub(crate) fn new(global: Global) -> Self {
        let out = Output {
            form: global.output,
            quiet: global.quiet,
        };
        Self { global, out }
    }

    pub(crate) async fn disksnap(&self) -> Outcome<Disksnap> {
        Ok(Disksnap::open(self.global.state_dir.as_deref()).await?)
    }

    /// The domain that `-d` means.
    pub(crate) async fn target(&self) -> Outcome<Target> {
        let given = self.global.domain.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "no domain is given")
                .hint("Say -d DOMAIN: the path of its XML, or its name or UUID if it was made known with `disksnap domain define`.")
        })?;
        self.target_of(given).await
    }

    /// The domain that this means, which is given as for `-d`.
    pub(crate) async fn target_of(&self, given: &str) -> Outcome<Target> {
        let disksnap = self.disksnap().await?;
        let mut document = disksnap.load(given).await?;
        if !disksnap.catch_up(Some(&document.domain().id)).await?.is_empty() {
            self.out
                .warn("the domain's document was brought up to date: a killed command had not come to that");
            document = disksnap.load(given).await?;
        }
        for warning in document.warnings() {
            self.out.warn(warning);
        }
        let mut domain = document.domain().clone();
        let sockets = &mut domain.sockets;
        for (given, socket) in [
            (&self.global.monitor, &mut sockets.monitor),
            (&self.global.agent, &mut sockets.agent),
        ] {
            if let Some(path) = given {
                let path = std::path::absolute(path).map_err(|e| Error::io("cannot find the socket", e))?;
                *socket = Some(path);
            }
        }
        Ok(Target {
            given: given.to_owned(),
            disksnap,
            document,
            domain,
        })
    }
}

impl Target {
    /// Notes that the document is to follow what is about to be done, unless it is to be left alone.
    pub(crate) async fn followed(&self, keep: Keep) -> Result<Follows> {
        if keep.keep_document {
            return Ok(Follows::LeftAlone);
        }
        match self.disksnap.follows(&self.given, &self.domain.id).await {
            Ok(note) => Ok(Follows::Noted(note)),
            // What frees room must not need any.
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                tracing::warn!(%error, "a kill from now on leaves the document out of date");
                Ok(Follows::Unnoted)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a domain's document follows what is done.
#[derive(Debug)]
pub(crate) enum Follows {
    /// The caller wants it as it is.
    LeftAlone,
    /// It does, and whoever comes after a kill knows.
    Noted(Following),
    /// It does, and there was no room for a note of that.
    Unnoted,
}

impl Follows {
    /// For an act that has failed: where it left all as it was there is nothing to follow.
    pub(crate) fn given_up(self, error: Error) -> Error {
        if let Self::Noted(note) = self
            && error.effect() != Effect::Unknown
            && let Err(failure) = note.over()
        {
            tracing::warn!(%failure, "the document will be brought up to date by whoever comes next");
        }
        error
    }
}
