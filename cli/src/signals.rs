//! SIGINT and SIGTERM: an act that runs is let to its end, a read stops at once.

use std::io::Write;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::failure::{Failure, Outcome, Signal};

/// Knows whether a signal asked to stop.
///
/// Made before the first change, and not earlier: until then a signal ends the process as usual. After
/// it the first signal is noted, for whoever asks; the second ends the process there and then, and leaves
/// the rest to the guardian and to `disksnap recover`.
#[derive(Debug)]
pub(crate) struct Stop(watch::Receiver<Option<Signal>>);

impl Stop {
    /// Begins to listen. `acting` says on standard error that the first signal was heard.
    pub(crate) fn listen(acting: bool) -> Outcome<Self> {
        let handler =
            |kind| signal(kind).map_err(|e| Failure::Error(disksnap::Error::io("cannot handle signals", e)));
        let mut interrupt = handler(SignalKind::interrupt())?;
        let mut terminate = handler(SignalKind::terminate())?;
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                let heard = tokio::select! {
                    _ = interrupt.recv() => Signal::Interrupt,
                    _ = terminate.recv() => Signal::Terminate,
                };
                if sender.borrow().is_some() {
                    std::process::exit(heard.exit_code().into());
                }
                if acting {
                    let text = "disksnap: stopping when this is done; once more stops at once\n";
                    let _ = std::io::stderr().write_all(text.as_bytes());
                }
                sender.send_replace(Some(heard));
            }
        });
        Ok(Self(receiver))
    }

    /// The signal that was heard, if one was.
    pub(crate) fn heard(&self) -> Option<Signal> {
        *self.0.borrow()
    }

    /// `Err` if a signal was heard: between two acts.
    pub(crate) fn check(&self) -> Outcome {
        self.heard()
            .map_or(Ok(()), |signal| Err(Failure::Stopped(signal)))
    }

    /// Waits for a signal.
    pub(crate) async fn wait(&self) -> Signal {
        let mut receiver = self.0.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(heard) => heard.unwrap_or(Signal::Terminate),
            // The listener lives as long as the runtime.
            Err(_) => std::future::pending().await,
        }
    }
}
