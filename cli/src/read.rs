//! `disksnap read`: the bytes of a snapshot's disk, to a new file or to standard output.

use std::io::IsTerminal;

use disksnap::{Error, ErrorKind, SnapshotReader};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Read;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::signals::Stop;

/// Less than this many bytes is read in no time.
const LONG: u64 = 64 << 20;

pub(crate) async fn run(context: &Context, read: Read) -> Outcome {
    if read.to.is_none() && std::io::stdout().is_terminal() {
        return Err(
            Error::new(ErrorKind::Invalid, "a disk's bytes are not for a terminal")
                .during("read")
                .hint("Give a file with --to, or send standard output to a file or a program.")
                .into(),
        );
    }
    let target = context.target().await?;
    // Opening an export is an act, and is let to its end; the reading stops at once.
    let stop = Stop::listen(false)?;
    let reader = target
        .disksnap
        .read(&target.domain, &read.name, &read.target)
        .await?;
    for warning in reader.warnings() {
        context.out.warn(warning);
    }
    let outcome = tokio::select! {
        outcome = copy(context, &reader, &read) => outcome,
        signal = stop.wait() => Err(Failure::Stopped(signal)),
    };
    let closed = reader.close().await;
    outcome?;
    Ok(closed?)
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
