//! How long acts are told: bars on a terminal, lines of JSON elsewhere; both on standard error.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use disksnap_backup::{Event, Phase, Watcher};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;
use crate::signals::Stop;

/// Where there is no terminal, so often is told how far it is.
const EVERY: Duration = Duration::from_secs(10);

/// Tells what happens, and whether a signal asked to stop.
#[derive(Debug)]
pub(crate) struct Teller<'a> {
    out: Output,
    stop: &'a Stop,
    terminal: bool,
    shown: Mutex<Shown>,
}

#[derive(Debug, Default)]
struct Shown {
    bar: Option<ProgressBar>,
    /// When each disk's progress was told last.
    told: HashMap<String, Instant>,
}

impl<'a> Teller<'a> {
    pub(crate) fn new(out: Output, stop: &'a Stop) -> Self {
        Self {
            out,
            stop,
            terminal: std::io::stderr().is_terminal(),
            shown: Mutex::new(Shown::default()),
        }
    }

    /// Takes down what is left on the terminal.
    pub(crate) fn end(&self) {
        if let Ok(mut shown) = self.shown.lock()
            && let Some(bar) = shown.bar.take()
        {
            bar.finish_and_clear();
        }
    }

    fn bar(&self, event: &Event<'_>) {
        let Ok(mut shown) = self.shown.lock() else { return };
        match event {
            Event::Begun { phase, disk, total } => shown.bar = Some(bar(*phase, disk, *total)),
            Event::Done { done, total, .. } => {
                if let Some(bar) = &shown.bar {
                    bar.set_length(*total);
                    bar.set_position(*done);
                }
            }
            Event::Ended { .. } => {
                if let Some(bar) = shown.bar.take() {
                    bar.finish_and_clear();
                }
            }
            Event::Warning { message } => match &shown.bar {
                Some(bar) => bar.suspend(|| self.out.warn(message)),
                None => self.out.warn(message),
            },
            Event::Note { message } => {
                let text = format!("{message}\n");
                let say = || drop(anstream::stderr().write_all(text.as_bytes()));
                match &shown.bar {
                    Some(bar) => bar.suspend(say),
                    None => say(),
                }
            }
        }
    }

    fn line(&self, event: &Event<'_>) {
        if let Event::Done { disk, .. } = event {
            let Ok(mut shown) = self.shown.lock() else { return };
            let now = Instant::now();
            let last = shown.told.entry((*disk).to_owned()).or_insert(now);
            if now.duration_since(*last) < EVERY {
                return;
            }
            *last = now;
        }
        if let Ok(mut json) = serde_json::to_string(event) {
            json.push('\n');
            // Where standard error is gone there is nobody to be told.
            let _ = std::io::stderr().write_all(json.as_bytes());
        }
    }
}

impl Watcher for Teller<'_> {
    fn event(&self, event: &Event<'_>) {
        match () {
            () if self.out.quiet => {}
            () if self.terminal => self.bar(event),
            () => self.line(event),
        }
    }

    fn stop(&self) -> bool {
        self.stop.heard().is_some()
    }
}

fn bar(phase: Phase, disk: &str, total: u64) -> ProgressBar {
    let verb = match phase {
        Phase::Pull => "pulling",
        Phase::Verify => "verifying",
        Phase::Restore => "restoring",
        Phase::Merge => "merging",
    };
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{prefix} {wide_bar} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
    );
    let bar = match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    bar.with_prefix(format!("{verb} {disk}"))
}
