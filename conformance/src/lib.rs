//! The suite that every disksnap provider passes, in this tree or out of it.
//!
//! A vendor writes a [`Fixture`] (a provider, and how to make, write and read disks that suit it) and
//! one test:
//!
//! ```no_run
//! # fn my_fixture() -> disksnap_conformance::RawFiles { unimplemented!() }
//! // #[test] fn conforms()
//! disksnap_conformance::assert_conforms(my_fixture());
//! ```
//!
//! The suite calls the provider as the contract says it may be called: directly, through the
//! [`Dispatcher`](disksnap_core::Dispatcher), from ever new instances with records that went through JSON,
//! with every call failing once and the process dying at every call. It looks at kinds of errors, never
//! at texts. `docs/provider-guide.md` tells what each call must do.

mod cases;
mod catalog;
mod examined;
mod fixture;
mod inactive;
mod points;
mod raw_files;
mod report;
mod stage;
mod tapped;

use std::sync::Arc;
use std::time::Duration;

pub use catalog::MemoryCatalog;
pub use fixture::{Fixture, Setting, read_file};
pub use inactive::InactiveConnector;
pub use raw_files::{RawFiles, RawSetting};
pub use report::{CaseResult, Outcome, Report};

use cases::{CASES, CONTROL, Case};
use stage::Failure;

/// When a case counts as hanging. The slowest have taken a hundredth of it.
const CASE_LIMIT: Duration = Duration::from_mins(10);

/// Runs the control and every case whose name contains `filter`; all without one. Prints nothing.
///
/// Needs a tokio runtime with time enabled. A provider that panics or hangs fails the case, not the run.
pub async fn run(fixture: Arc<dyn Fixture>, filter: Option<&str>) -> Report {
    run_watched(fixture, filter, |_| ()).await
}

/// As [`run`], telling each result as it comes.
pub async fn run_watched(
    fixture: Arc<dyn Fixture>,
    filter: Option<&str>,
    told: impl FnMut(&CaseResult),
) -> Report {
    run_chosen(fixture, |name| filter.is_none_or(|f| name.contains(f)), told).await
}

/// As [`run_watched`], with every case whose name is `chosen`: for storage so slow that the suite is shared out.
pub async fn run_chosen(
    fixture: Arc<dyn Fixture>,
    chosen: impl Fn(&str) -> bool,
    mut told: impl FnMut(&CaseResult),
) -> Report {
    let mut report = Report {
        method: fixture.provider().method().name,
        results: Vec::new(),
    };
    let mut works = true;
    let cases = CASES.iter().filter(|case| chosen(case.name));
    for (n, case) in std::iter::once(&CONTROL).chain(cases).enumerate() {
        let outcome = if works {
            run_case(&fixture, case).await
        } else {
            Outcome::NotRun
        };
        works = works && (n > 0 || outcome == Outcome::Passed);
        let result = CaseResult {
            case: case.name,
            purpose: case.purpose,
            outcome,
        };
        told(&result);
        report.results.push(result);
    }
    report
}

/// The names and purposes of all cases, the control first.
pub fn cases() -> impl Iterator<Item = (&'static str, &'static str)> {
    std::iter::once(&CONTROL)
        .chain(CASES)
        .map(|case| (case.name, case.purpose))
}

/// The whole suite as one test: panics with the report unless every case passes.
///
/// # Panics
/// That is how a test fails.
pub fn assert_conforms(fixture: impl Fixture) {
    assert_cases(fixture, |_| true);
}

/// As [`assert_conforms`], with the control and every case whose name is `chosen`.
///
/// # Panics
/// That is how a test fails.
pub fn assert_cases(fixture: impl Fixture, chosen: impl Fn(&str) -> bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.unwrap_or_else(|e| panic!("cannot start a runtime: {e}"));
    let report = runtime.block_on(run_chosen(Arc::new(fixture), chosen, |_| ()));
    assert!(report.conforms(), "the provider does not conform\n\n{report}");
}

async fn run_case(fixture: &Arc<dyn Fixture>, case: &Case) -> Outcome {
    let outcome = try_case(fixture, case).await;
    match (outcome, fixture.postmortem()) {
        (Outcome::Failed(why), Some(below)) => Outcome::Failed(format!("{why}\n{below}")),
        (outcome, _) => outcome,
    }
}

async fn try_case(fixture: &Arc<dyn Fixture>, case: &Case) -> Outcome {
    let running = tokio::spawn((case.run)(Arc::clone(fixture)));
    let stop = running.abort_handle();
    match tokio::time::timeout(CASE_LIMIT, running).await {
        Ok(Ok(Ok(()))) => Outcome::Passed,
        Ok(Ok(Err(Failure(why)))) => Outcome::Failed(why),
        Ok(Err(died)) => Outcome::Failed(format!("it panicked: {}", panic_text(died))),
        Err(_) => {
            stop.abort();
            Outcome::Failed(format!("it hung for {} s", CASE_LIMIT.as_secs()))
        }
    }
}

fn panic_text(died: tokio::task::JoinError) -> String {
    match died.try_into_panic() {
        Ok(panic) => match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_owned(),
            (None, None) => "no text".to_owned(),
        },
        Err(other) => other.to_string(),
    }
}
