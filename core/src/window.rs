//! The window: the one short time in which the guest may stand still and every snapshot is taken.
//!
//! Armed guardian, freeze, pause, take, resume, thaw, disarmed guardian; resume and thaw always
//! follow, also on an error, and if this process dies the guardian does them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use serde_json::{Map, Value};

use crate::{
    Batch, Command, Consistency, Control, DiskNode, DiskSnapshot, Effect, Error, ErrorKind, Guard, Prepared,
    Quiesce, Result, RunState, SnapshotRequest, Step, TakePlan, Taken, Verdict, Watch, WindowReport,
};

/// A unit to be taken, with what fixes its instant.
pub(crate) struct Take<'a> {
    pub(crate) provider: &'a Arc<dyn DiskSnapshot>,
    pub(crate) prepared: &'a Prepared,
    pub(crate) plan: TakePlan,
}

/// All that is done in a window.
struct Work<'a> {
    takes: &'a [Take<'a>],
    /// What is flushed before the providers take.
    flush: Vec<DiskNode>,
    /// What happens to the disks' bitmaps.
    marks: Option<&'a Batch>,
}

/// What the window brought.
#[derive(Debug)]
pub(crate) struct Instantly {
    pub(crate) taken: Vec<Taken>,
    pub(crate) at: SystemTime,
    pub(crate) consistency: Consistency,
    pub(crate) report: WindowReport,
    pub(crate) warnings: Vec<String>,
}

/// Takes all units at one instant, or none.
pub(crate) async fn open(
    control: &dyn Control,
    state: &RunState,
    request: &SnapshotRequest,
    takes: &[Take<'_>],
    marks: Option<&Batch>,
) -> Result<Instantly> {
    let deadline = request.deadline;
    let needs_pause = needs_pause(state, takes, marks)?;
    let wants_freeze = wants_freeze(state, request.quiesce)?;
    let flush = flush_nodes(control, state, takes).await?;
    let work = Work { takes, flush, marks };
    if !needs_pause && wants_freeze.is_err() {
        return run(control, request, &work, false, wants_freeze, &mut false).await;
    }
    let watch = Watch {
        release: Vec::new(),
        resume: needs_pause,
        thaw: wants_freeze.is_ok(),
        deadline,
    };
    let guard = control.guard(watch).await.map_err(|e| e.during("guard"))?;
    let mut stands = false;
    let result = run(control, request, &work, needs_pause, wants_freeze, &mut stands).await;
    if stands {
        // We could not let the guest go: the guardian does, if we leave it armed.
        drop(guard);
        return result;
    }
    let verdict = let_go(guard).await;
    match (result, verdict) {
        (Ok(instant), Ok(Verdict::Quiet)) => Ok(instant),
        (Ok(_), Ok(Verdict::Fired)) => Err(Error::new(
            ErrorKind::Timeout,
            format!(
                "the guest stood still for longer than {} ms and was let go",
                deadline.as_millis()
            ),
        )
        .hint("Try again when the host is less busy, or allow more time with a longer deadline.")),
        (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// Takes a few steps that are all there is to be done, while the guest stands still; an error takes back those that
/// were taken. For how long it stood still, where it ran.
pub(crate) async fn steps_alone(
    control: &dyn Control,
    state: &RunState,
    deadline: Duration,
    steps: &[Step],
) -> Result<Option<Duration>> {
    if *state != RunState::Running {
        return in_order(control, deadline, steps).await.map(|()| None);
    }
    let watch = Watch {
        release: Vec::new(),
        resume: true,
        thaw: false,
        deadline,
    };
    let guard = control.guard(watch).await.map_err(|e| e.during("guard"))?;
    let since = Instant::now();
    let result = match control.pause().await {
        Ok(()) => in_order(control, deadline, steps).await,
        Err(error) => Err(error.during("pause")),
    };
    if let Err(failure) = resume(control).await {
        // We could not let the guest go: the guardian does, if we leave it armed.
        drop(guard);
        return Err(still(result, failure));
    }
    let paused = since.elapsed();
    // Whether it fired or not: what was done is done, and needs no one instant.
    let_go(guard).await?;
    result.map(|()| Some(paused))
}

/// One step after another; on an error takes back what was taken, newest first.
async fn in_order(control: &dyn Control, left: Duration, steps: &[Step]) -> Result<()> {
    let mut undo = Vec::new();
    let all = async {
        for step in steps {
            control.monitor(step.command.clone()).await?;
            undo.extend(step.undo.clone());
        }
        Ok(())
    };
    let error = match tokio::time::timeout(left, all).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(_) => Error::new(ErrorKind::Timeout, "it was not done before the deadline"),
    };
    let mut failures = Vec::new();
    for command in undo.into_iter().rev() {
        failures.extend(control.monitor(command).await.err());
    }
    Err(error.rollback_failed(failures))
}

async fn let_go(guard: Box<dyn Guard>) -> Result<Verdict> {
    guard.disarm().await.map_err(|e| e.during("guard"))
}

/// Whether the guest must be paused for all takes to be one instant.
fn needs_pause(state: &RunState, takes: &[Take<'_>], marks: Option<&Batch>) -> Result<bool> {
    let mut commands: Vec<&str> = marks.iter().map(|batch| batch.execute.as_str()).collect();
    let (mut acts, mut paused) = (commands.len(), false);
    for take in takes {
        match &take.plan {
            TakePlan::Atomic(batch) if commands.contains(&batch.execute.as_str()) => {}
            TakePlan::Atomic(batch) => {
                commands.push(&batch.execute);
                acts += 1;
            }
            TakePlan::Paused(steps) => {
                paused = true;
                acts += steps.len();
            }
            TakePlan::Host => {
                paused = true;
                acts += 1;
            }
        }
    }
    let must = paused || acts > 1;
    match state {
        RunState::Running => Ok(must),
        RunState::Storage if must && acts > 1 => Err(Error::new(
            ErrorKind::Unsupported,
            "a storage daemon has no guest to pause, and these disks cannot be taken in one command",
        )
        .hint("Snapshot the disks one by one, or put all of them under permanent raw wrapper nodes.")),
        _ => Ok(false),
    }
}

/// What must be flushed before the providers take: the disks below a hypervisor that has a guest.
async fn flush_nodes(control: &dyn Control, state: &RunState, takes: &[Take<'_>]) -> Result<Vec<DiskNode>> {
    let own = takes.iter().filter(|take| take.plan == TakePlan::Host);
    let mut disks = Vec::new();
    for target in own.flat_map(|take| &take.prepared.targets) {
        disks.push(control.domain().disk(target)?);
    }
    if disks.is_empty() || !matches!(state, RunState::Running | RunState::Stopped(_)) {
        return Ok(Vec::new());
    }
    control.flush_nodes(&disks).await.map_err(|e| e.during("flush"))
}

/// `Ok` when a freeze is to be tried; else the consistency that results without one.
fn wants_freeze(state: &RunState, quiesce: Quiesce) -> Result<std::result::Result<(), Consistency>> {
    let why = match (state, quiesce) {
        (RunState::Off, _) => return Ok(Err(Consistency::Inactive)),
        (_, Quiesce::None) => return Ok(Err(Consistency::Crash)),
        (RunState::Running, _) => return Ok(Ok(())),
        (RunState::Storage, _) => "a storage daemon has no guest".to_owned(),
        (state, _) => format!("the guest does not run: {state}"),
    };
    if quiesce == Quiesce::Require {
        return Err(Error::new(
            ErrorKind::Unavailable,
            format!("the file systems cannot be frozen: {why}"),
        )
        .hint("Start the guest and its agent, or ask for --quiesce try."));
    }
    Ok(Err(Consistency::Unquiesced { reason: why }))
}

/// Everything between arming and disarming. Thaws and resumes whatever it froze and paused; where that
/// fails, the error comes with `stands` set.
async fn run(
    control: &dyn Control,
    request: &SnapshotRequest,
    work: &Work<'_>,
    pause: bool,
    freeze: std::result::Result<(), Consistency>,
    stands: &mut bool,
) -> Result<Instantly> {
    let opened = Instant::now();
    let mut warnings = Vec::new();
    let consistency = match freeze {
        Err(consistency) => consistency,
        Ok(()) => quiesced(control, request, &mut warnings, stands).await?,
    };
    let frozen = matches!(consistency, Consistency::Filesystem { .. });
    let mut report = WindowReport::default();
    let left = remaining(request.deadline, opened);
    let mut result = paused(control, work, pause, left, &mut report, stands).await;
    if frozen {
        if let Err(failure) = thaw(control).await {
            *stands = true;
            result = Err(still(result, failure));
        }
        report.frozen_us = micros(opened.elapsed());
    }
    let (taken, at) = result?;
    Ok(Instantly {
        taken,
        at,
        consistency,
        report,
        warnings,
    })
}

/// Freezes, or says why it is not frozen where that is good enough.
async fn quiesced(
    control: &dyn Control,
    request: &SnapshotRequest,
    warnings: &mut Vec<String>,
    stands: &mut bool,
) -> Result<Consistency> {
    let error = match control.freeze(&request.mountpoints, request.deadline).await {
        Ok(freeze) => {
            return Ok(Consistency::Filesystem {
                filesystems: freeze.filesystems,
                mountpoints: freeze.mountpoints,
            });
        }
        Err(error) => error.during("freeze"),
    };
    // A silent agent may have frozen some, or do so yet.
    if error.effect() == Effect::Unknown
        && let Err(failure) = thaw(control).await
    {
        *stands = true;
        return Err(error.rollback_failed(vec![failure]));
    }
    if request.quiesce == Quiesce::Require {
        return Err(error);
    }
    warnings.push(format!("not quiesced: {error}"));
    let reason = error.to_string();
    Ok(Consistency::Unquiesced { reason })
}

/// Resumes, and insists: perhaps only the answer was lost, or the connection, and the next one is sound.
async fn resume(control: &dyn Control) -> Result<()> {
    match control.resume().await {
        Err(_) => control.resume().await.map_err(|e| e.during("resume")),
        ok => ok,
    }
}

/// Thaws, and insists.
async fn thaw(control: &dyn Control) -> Result<()> {
    match control.thaw().await {
        Err(_) => control.thaw().await.map_err(|e| e.during("thaw")),
        ok => ok,
    }
}

/// The error of a window after which the guest may not have been let go.
fn still<T>(result: Result<T>, failure: Error) -> Error {
    match result {
        Ok(_) => failure,
        Err(error) => error.rollback_failed(vec![failure]),
    }
}

fn remaining(deadline: Duration, since: Instant) -> Duration {
    deadline.saturating_sub(since.elapsed())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

async fn paused(
    control: &dyn Control,
    work: &Work<'_>,
    pause: bool,
    left: Duration,
    report: &mut WindowReport,
    stands: &mut bool,
) -> Result<(Vec<Taken>, SystemTime)> {
    let since = Instant::now();
    if pause && let Err(error) = control.pause().await {
        let error = error.during("pause");
        // Perhaps it was done and only the answer was lost.
        return Err(match resume(control).await {
            Ok(()) => error,
            Err(failure) => {
                *stands = true;
                error.rollback_failed(vec![failure])
            }
        });
    }
    let started = Instant::now();
    let at = SystemTime::now();
    let result = take_or_undo(control, work, left).await;
    report.taken_us = micros(started.elapsed());
    if pause {
        if let Err(failure) = resume(control).await {
            *stands = true;
            return Err(still(result, failure));
        }
        report.paused_us = micros(since.elapsed());
    }
    result.map(|taken| (taken, at))
}

/// Takes all in the time that is left; on an error takes back what was taken, newest first.
///
/// A take that hangs must not keep the guest: the time left bounds it, as the guardian bounds us.
async fn take_or_undo(control: &dyn Control, work: &Work<'_>, left: Duration) -> Result<Vec<Taken>> {
    let mut undo = Vec::new();
    let error = match tokio::time::timeout(left, take_all(control, work, &mut undo)).await {
        Ok(Ok(taken)) => return Ok(taken),
        Ok(Err(error)) => error,
        Err(_) => Error::new(
            ErrorKind::Timeout,
            "the snapshots were not taken before the deadline",
        ),
    };
    undo.reverse();
    let mut failures = Vec::new();
    if !undo.is_empty() {
        match control.monitor_each(undo).await {
            Ok(answers) => failures.extend(answers.into_iter().filter_map(Result::err)),
            Err(lost) => failures.push(lost),
        }
    }
    let failures = failures
        .into_iter()
        .map(|failure| failure.during("undo"))
        .collect();
    Err(error.during("take").rollback_failed(failures))
}

async fn take_all(control: &dyn Control, work: &Work<'_>, undo: &mut Vec<Command>) -> Result<Vec<Taken>> {
    let takes = work.takes;
    if !work.flush.is_empty() {
        control.flush(&work.flush).await.map_err(|e| e.during("flush"))?;
    }
    // The paused steps first: they are the ones that are refused most easily, and cost least to undo.
    steps(control, takes, undo).await?;
    for (execute, (list, items, back)) in batches(work) {
        let arguments = Map::from_iter([(list, Value::Array(items))]);
        control
            .monitor(Command::new(execute, Value::Object(arguments)))
            .await?;
        undo.extend(back);
    }
    host_takes(control, takes).await
}

/// All paused steps, sent back to back: one after the other, the guest would wait for each answer.
async fn steps(control: &dyn Control, takes: &[Take<'_>], undo: &mut Vec<Command>) -> Result<()> {
    let mut steps = Vec::new();
    for take in takes {
        if let TakePlan::Paused(its) = &take.plan {
            steps.extend(its.iter().map(|step| (take.provider, step)));
        }
    }
    if steps.is_empty() {
        return Ok(());
    }
    let answers = control
        .monitor_each(steps.iter().map(|(_, step)| step.command.clone()).collect())
        .await?;
    let mut refused = None;
    for ((provider, Step { undo: back, .. }), answer) in steps.into_iter().zip(answers) {
        match answer {
            Ok(_) => undo.extend(back.clone()),
            Err(error) => {
                refused.get_or_insert_with(|| error.by(provider.method().name));
            }
        }
    }
    refused.map_or(Ok(()), Err)
}

/// The shares of all plans in each all-or-nothing command, merged; those of the bitmaps come last, when what they are on
/// is there.
fn batches(work: &Work<'_>) -> BTreeMap<String, (String, Vec<Value>, Vec<Command>)> {
    let of_plan = |take: &'_ Take<'_>| match &take.plan {
        TakePlan::Atomic(batch) => Some(batch.clone()),
        _ => None,
    };
    let shares = work.takes.iter().filter_map(of_plan).chain(work.marks.cloned());
    let mut batches = BTreeMap::new();
    for Batch {
        execute,
        list,
        items,
        undo,
    } in shares
    {
        let (_, all, back) = batches
            .entry(execute)
            .or_insert_with(|| (list, Vec::new(), Vec::new()));
        all.extend(items);
        back.extend(undo);
    }
    batches
}

/// The providers' own takes, side by side. Units come out in the order they went in; those that core took
/// itself left nothing to remember.
async fn host_takes(control: &dyn Control, takes: &[Take<'_>]) -> Result<Vec<Taken>> {
    let take = |take: &Take<'_>| {
        let (provider, prepared) = (Arc::clone(take.provider), take.prepared.clone());
        let own = take.plan == TakePlan::Host;
        async move {
            if !own {
                return Ok(Taken::default());
            }
            provider
                .take(control, &prepared)
                .await
                .map_err(|e| e.by(provider.method().name))
        }
    };
    // All are waited for, also after one has failed: none may go on when the guest does.
    join_all(takes.iter().map(take)).await.into_iter().collect()
}
