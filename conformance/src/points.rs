//! Where a mishap can strike: before and after every call to the monitor, the provider and the catalog.

use std::sync::{Mutex, MutexGuard, PoisonError};

use disksnap_core::{Error, ErrorKind, Result};
use tokio::sync::Notify;

/// What befalls the n-th point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    /// The call is refused before it is done, or its answer is lost after it is done.
    Error,
    /// The connection to the monitor ends here, and every later call on it fails.
    Disconnect,
    /// The process is killed: nothing after this point happens.
    Kill,
}

/// Who is called at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    Control,
    Provider,
    Catalog,
}

/// On which side of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

/// Counts the points that are passed, and lets one mishap strike at one of them.
#[derive(Debug, Default)]
pub(crate) struct Points {
    state: Mutex<State>,
    killed: Notify,
}

#[derive(Debug, Default)]
struct State {
    armed: Option<(usize, Mishap)>,
    seen: usize,
    hit: Option<String>,
}

/// How an act that could be killed ended.
#[derive(Debug)]
pub(crate) enum Ended<T> {
    /// By itself.
    Done(T),
    /// Killed at this point.
    Killed(String),
}

impl Points {
    /// Lets a mishap strike at the n-th point from now that it can strike at.
    pub(crate) fn arm(&self, n: usize, mishap: Mishap) {
        *self.state() = State {
            armed: Some((n, mishap)),
            ..State::default()
        };
    }

    /// Makes all points harmless; returns the point that the mishap struck at.
    pub(crate) fn disarm(&self) -> Option<String> {
        std::mem::take(&mut *self.state()).hit
    }

    /// Runs an act until it ends, or drops it where the mishap kills it.
    pub(crate) async fn killable<T>(&self, act: impl Future<Output = T>) -> Ended<T> {
        let ended = tokio::select! {
            biased;
            () = self.killed.notified() => None,
            result = act => Some(result),
        };
        match (ended, self.disarm()) {
            (Some(result), _) => Ended::Done(result),
            (None, at) => Ended::Killed(at.unwrap_or_default()),
        }
    }

    /// Passes one point. The error, or the end, is what strikes there.
    pub(crate) async fn pass(&self, whose: Whose, what: &str, when: When) -> Result<()> {
        match self.strikes(whose, what, when) {
            None => Ok(()),
            Some(Mishap::Kill) => {
                self.killed.notify_one();
                std::future::pending().await
            }
            Some(Mishap::Disconnect) => Err(disconnected()),
            Some(Mishap::Error) if when == When::Before => {
                Err(Error::new(ErrorKind::Refused, "refused for the test's sake").with("point", what))
            }
            Some(Mishap::Error) => {
                Err(Error::new(ErrorKind::Timeout, "answer lost for the test's sake").with("point", what))
            }
        }
    }

    /// A call of the provider's, with a point before and after.
    pub(crate) async fn tap<T>(&self, what: &str, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.pass(Whose::Provider, what, When::Before).await?;
        let answer = call.await?;
        self.pass(Whose::Provider, what, When::After).await?;
        Ok(answer)
    }

    fn strikes(&self, whose: Whose, what: &str, when: When) -> Option<Mishap> {
        let mut state = self.state();
        let (n, mishap) = state.armed?;
        let can = match mishap {
            Mishap::Kill => true,
            Mishap::Error => whose != Whose::Catalog,
            Mishap::Disconnect => whose == Whose::Control,
        };
        if !can || state.hit.is_some() {
            return None;
        }
        let here = state.seen == n;
        state.seen += 1;
        if !here {
            return None;
        }
        state.hit = Some(match when {
            When::Before => format!("point {n}, before {what}"),
            When::After => format!("point {n}, after {what}"),
        });
        Some(mishap)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a call on a connection that has ended says.
pub(crate) fn disconnected() -> Error {
    Error::new(ErrorKind::Unavailable, "disconnected for the test's sake")
}
