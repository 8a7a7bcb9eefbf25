//! `disksnap read`: the bytes of a snapshot's disk, to a new file or to standard output; or what has changed of them, onto
//! an earlier copy too.

use std::io::IsTerminal;
use std::path::Path;

use disksnap::{ChangedExtent, Error, ErrorKind, SnapshotReader};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Read;
use crate::changes::Listing;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::signals::Stop;

/// Less than this many bytes is read in no time.
const LONG: u64 = 64 << 20;

pub(crate) async fn run(context: &Context, read: Read) -> Outcome {
    let plan = Plan::of(&read)?;
    let target = context.target().await?;
    // Opening an export is an act, and is let to its end; the reading stops at once.
    let stop = Stop::listen(false)?;
    let (disksnap, domain) = (&target.disksnap, &target.domain);
    let reader = match &read.changed_since {
        None => disksnap.read(domain, &read.name, &read.target).await?,
        Some(since) => {
            disksnap
                .read_since(domain, &read.name, &read.target, since)
                .await?
        }
    };
    for warning in reader.warnings() {
        context.out.warn(warning);
    }
    let work = async {
        match plan {
            Plan::Everything => copy(context, &reader, &read).await,
            Plan::Changed(into) => changed(context, &reader, &read, into).await,
        }
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        signal = stop.wait() => Err(Failure::Stopped(signal)),
    };
    if let (Plan::Changed(Destination::Copy(path)), Err(Failure::Stopped(_))) = (plan, &outcome) {
        context.out.warn(&format!(
            "{} is between the two states; repeat the command before it is used",
            path.display()
        ));
    }
    let closed = reader.close().await;
    outcome?;
    Ok(closed?)
}

/// What is read, and where it goes.
#[derive(Debug, Clone, Copy)]
enum Plan<'a> {
    Everything,
    Changed(Destination<'a>),
}

/// Where what has changed goes.
#[derive(Debug, Clone, Copy)]
enum Destination<'a> {
    /// A new file.
    New(&'a Path),
    /// A copy of the earlier state.
    Copy(&'a Path),
}

impl<'a> Plan<'a> {
    fn of(read: &'a Read) -> Outcome<Self> {
        match (&read.changed_since, &read.to, &read.onto) {
            (Some(_), Some(to), _) => Ok(Self::Changed(Destination::New(to))),
            (Some(_), None, Some(onto)) => Ok(Self::Changed(Destination::Copy(onto))),
            (Some(_), None, None) => Err(Error::new(
                ErrorKind::Invalid,
                "ranges that have changed cannot be told apart in a stream of bytes",
            )
            .during("read")
            .hint("Give a new file with --to, or with --onto a copy of the disk as it was at the checkpoint.")
            .into()),
            (None, None, _) if std::io::stdout().is_terminal() => Err(Error::new(
                ErrorKind::Invalid,
                "a disk's bytes are not for a terminal",
            )
            .during("read")
            .hint("Give a file with --to, or send standard output to a file or a program.")
            .into()),
            (None, ..) => Ok(Self::Everything),
        }
    }
}

async fn copy(context: &Context, reader: &SnapshotReader, read: &Read) -> Outcome {
    let length = read.length.unwrap_or(reader.size().saturating_sub(read.offset));
    let bar = progress_bar(length, context.out.quiet);
    let progress = |done| bar.set_position(done);
    let copied = if let Some(path) = &read.to {
        reader.save_to(path, read.offset, length, progress).await
    } else {
        reader
            .copy_to(&mut tokio::io::stdout(), read.offset, length, progress)
            .await
    };
    bar.finish_and_clear();
    copied.map_err(gone)
}

/// Writes what has changed, and tells where that is.
async fn changed(context: &Context, reader: &SnapshotReader, read: &Read, into: Destination<'_>) -> Outcome {
    let length = read.length.unwrap_or(reader.size().saturating_sub(read.offset));
    let range = read.offset..read.offset.saturating_add(length);
    let bar = progress_bar(length, context.out.quiet);
    let mut told = Told::begin(context, reader, &read.target);
    let tell = |extent: ChangedExtent| {
        bar.set_position(extent.offset + extent.length - read.offset);
        told.add(extent);
    };
    let before = reader.size_before();
    let done = match into {
        Destination::New(path) => reader.save_changed_to(path, range, before, tell).await,
        Destination::Copy(path) => reader.bring_up_to_date(path, range, before, tell).await,
    };
    bar.finish_and_clear();
    done?;
    told.end()
}

/// The ranges that were written, each as long as it can be, printed as `disksnap changes` does.
struct Told<'a> {
    disk: &'a str,
    listed: Listing,
    held: Option<ChangedExtent>,
    /// What befell standard output. The file matters more, and is finished all the same.
    failed: Outcome,
}

impl<'a> Told<'a> {
    fn begin(context: &Context, reader: &SnapshotReader, disk: &'a str) -> Self {
        let mut listed = Listing::begin(context.out.form);
        let excess = reader.excess().map(|why| (disk.to_owned(), why.to_owned()));
        listed.superset.extend(excess);
        Self {
            disk,
            listed,
            held: None,
            failed: Ok(()),
        }
    }

    fn add(&mut self, extent: ChangedExtent) {
        match &mut self.held {
            Some(held) if held.offset + held.length == extent.offset => held.length += extent.length,
            held => {
                if let Some(done) = held.replace(extent) {
                    self.put(done);
                }
            }
        }
    }

    fn put(&mut self, extent: ChangedExtent) {
        if self.failed.is_ok() {
            self.failed = self.listed.put(self.disk, extent);
        }
    }

    fn end(mut self) -> Outcome {
        if let Some(last) = self.held.take() {
            self.put(last);
        }
        self.failed?;
        self.listed.end()
    }
}

/// Standard output whose reader has gone is no error to tell.
fn gone(error: Error) -> Failure {
    let source = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<std::io::Error>());
    match source {
        Some(cause) if cause.kind() == std::io::ErrorKind::BrokenPipe => Failure::Pipe,
        _ => Failure::Error(error),
    }
}

/// A bar on standard error where that is a terminal and it is worth it.
fn progress_bar(length: u64, quiet: bool) -> ProgressBar {
    if quiet || length < LONG {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{wide_bar} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
    );
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
