//! The suite itself is tested: providers broken on purpose, each caught by the case that is there for it.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod broken;
mod unmoved;

use std::path::Path;
use std::sync::Arc;

use broken::{Broken, Fault, Handing, Hands};
use disksnap_conformance::{Fixture, Outcome, RawFiles, Report, run};
use disksnap_core::{Capability, DiskSnapshot};
use disksnap_memory::Memory;
use unmoved::Unmoved;

const CAPABILITIES: [Capability; 5] = [
    Capability::Active,
    Capability::Inactive,
    Capability::DirectRead,
    Capability::GuestSafe,
    Capability::Revert,
];

fn fixture(dir: &Path, make: fn() -> Arc<dyn DiskSnapshot>) -> Arc<dyn Fixture> {
    Arc::new(RawFiles::new(dir, CAPABILITIES, make))
}

async fn report_on(make: fn() -> Arc<dyn DiskSnapshot>) -> Report {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    run(fixture(dir.path(), make), None).await
}

#[tokio::test]
async fn the_unbroken_one_passes() {
    let report = report_on(|| Arc::new(Memory)).await;
    assert!(report.conforms(), "{report}");
}

/// The wrapper alone changes nothing: what the others are caught at is their fault.
#[tokio::test]
async fn the_wrapper_without_a_fault_passes() {
    let report = report_on(|| Arc::new(Broken::new(Fault::None))).await;
    assert!(report.conforms(), "{report}");
}

/// The fault, and the cases that must catch it, each alone.
macro_rules! caught {
    ($($test:ident: $fault:ident by $($case:literal),+;)+) => {$(
        #[tokio::test]
        async fn $test() {
            for case in [$($case),+] {
                let dir = tempfile::tempdir_in("/dev/shm").unwrap();
                let fixture = fixture(dir.path(), || Arc::new(Broken::new(Fault::$fault)));
                let report = run(fixture, Some(case)).await;
                assert_eq!(report.failures(), [case], "{report}");
            }
        }
    )+};
}

caught! {
    who_rejects_everything_passes_nothing: RejectsAll by "control";
    state_in_the_instance: StateInInstance by "stateless";
    an_option_listed_twice: OptionTwice by "describes-itself";
    a_capability_lost: CapabilityLost by "capabilities";
    a_probe_that_makes_something: ProbeMakes by "probe-unfit";
    an_unfit_disk_as_an_error: UnfitIsError by "probe-unfit";
    a_disk_left_out: DiskLeftOut by "prepare-covers";
    a_second_prepare_that_differs: PrepareDiffers by "prepare-again";
    a_plan_that_changes: PlanChanges by "take-plan-pure";
    a_file_left_by_abort: AbortLeaks by "abort-undoes", "abort-before-anything", "create-call-fails", "create-killed";
    an_abort_that_needs_the_record: AbortNeedsRecord by "abort-without-record", "create-killed";
    an_abort_that_hates_to_be_repeated: AbortOnce by "abort-twice";
    an_abort_that_takes_all: AbortTakesAll by "abort-spares-others";
    an_abort_that_knows_nothing_of_complete: CompleteMakes by "create-call-fails", "create-killed";
    stale_data: Stale by "content-edges", "content-zeroes", "content-overwrite", "two-older-first", "two-newer-first";
    a_tail_forgotten: TailForgotten by "control";
    disks_mixed_up: MixedUp by "several-disks";
    a_disk_that_is_written_by_delete: DeleteWrites by "domain-goes-on";
    a_lie_about_what_is_gone: InspectLies by "inspect-truth", "damage-is-told";
    a_delete_that_hates_to_be_repeated: DeleteOnce by "delete-twice", "delete-killed", "delete-call-fails";
    a_file_left_by_delete: DeleteLeaks by "delete-twice", "id-twice", "name-twice";
    a_revert_that_is_promised: RevertMissing by "revert-content", "revert-killed";
    a_revert_that_does_nothing: RevertForgets by "revert-content", "revert-spares-others", "revert-killed";
    a_revert_that_hates_to_be_repeated: RevertOnce by "revert-content", "revert-call-fails", "revert-killed";
    a_revert_that_shares_the_snapshot: RevertSpoils by "revert-content";
    a_revert_that_changes_others: RevertMixesUp by "revert-spares-others";
    a_panic: Panics by "control";
}

/// The suite goes with the domain to the disks that a revert hands it.
#[tokio::test]
async fn a_revert_that_hands_over_another_image_passes() {
    let report = report_on(|| Arc::new(Handing(Hands::TheRight))).await;
    assert!(report.conforms(), "{report}");
}

/// What a revert hands over, and the cases that must catch what is wrong with it, each alone.
macro_rules! caught_in_hand {
    ($($test:ident: $hands:ident by $($case:literal),+;)+) => {$(
        #[tokio::test]
        async fn $test() {
            for case in [$($case),+] {
                let dir = tempfile::tempdir_in("/dev/shm").unwrap();
                let fixture = fixture(dir.path(), || Arc::new(Handing(Hands::$hands)));
                let report = run(fixture, Some(case)).await;
                assert_eq!(report.failures(), [case], "{report}");
            }
        }
    )+};
}

caught_in_hand! {
    a_revert_that_hands_over_the_snapshot: TheSnapshots by "revert-content";
    a_revert_that_hands_over_the_old_image: TheOld by "revert-content", "revert-spares-others", "revert-killed";
    a_revert_that_hands_over_a_half: AHalf by "revert-content", "revert-call-fails", "revert-killed";
    a_revert_that_tells_no_peer: WithoutPeers by "revert-spares-others";
    a_revert_that_keeps_the_old_image: AndKeepsTheOld by "revert-content", "revert-spares-others";
}

/// A fixture that cannot follow says so; it does not read the old disks and call that a pass.
#[tokio::test]
async fn who_does_not_follow_cannot_pass() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let inner = fixture(dir.path(), || Arc::new(Handing(Hands::TheRight)));
    let report = run(Arc::new(Unmoved(inner)), Some("revert-content")).await;
    assert_eq!(report.failures(), ["revert-content"], "{report}");
    assert!(report.to_string().contains("no adopt()"), "{report}");
}

#[tokio::test]
async fn after_a_failed_control_nothing_counts() {
    let report = report_on(|| Arc::new(Broken::new(Fault::RejectsAll))).await;
    assert!(!report.conforms());
    assert_eq!(report.passed(), 0);
    assert!(report.results[1..].iter().all(|r| r.outcome == Outcome::NotRun));
}

#[tokio::test]
async fn a_filter_chooses_but_the_control_always_runs() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let report = run(fixture(dir.path(), || Arc::new(Memory)), Some("abort")).await;
    let cases: Vec<&str> = report.results.iter().map(|r| r.case).collect();
    assert_eq!(cases.len(), 6, "{cases:?}");
    assert_eq!(cases[0], "control");
    assert!(cases[1..].iter().all(|c| c.starts_with("abort-")));
}

#[tokio::test]
async fn a_filter_that_chooses_nothing_proves_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let report = run(fixture(dir.path(), || Arc::new(Memory)), Some("no such case")).await;
    assert!(!report.conforms());
}
