//! The suite itself is tested: providers broken on purpose, each caught by the case that is there for it.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod broken;
mod unmoved;

use std::path::Path;
use std::sync::Arc;

use broken::{Broken, Call, Fault, Hands, Mishap, Slip, Subtle, Wrong};
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

fn fixture(dir: &Path, make: impl Fn() -> Arc<dyn DiskSnapshot> + Send + Sync + 'static) -> Arc<dyn Fixture> {
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

fn comparing(dir: &Path, wrong: Wrong) -> Arc<dyn Fixture> {
    let capabilities = CAPABILITIES.into_iter().chain([Capability::Compare]);
    let make = move || Arc::new(Subtle(Slip::Compares(wrong))) as Arc<dyn DiskSnapshot>;
    Arc::new(RawFiles::new(dir, capabilities, make))
}

#[tokio::test]
async fn one_that_compares_passes() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let report = run(comparing(dir.path(), Wrong::Nothing), None).await;
    assert!(report.conforms(), "{report}");
}

/// What is wrong with the comparing, and the cases that must catch it, each alone.
const COMPARING: [(Wrong, &[&str]); 9] = [
    (Wrong::ForgetsZeroes, &["compare-content"]),
    (Wrong::ForgetsTheTail, &["compare-content", "compare-outlives"]),
    (Wrong::Backwards, &["compare-content", "compare-outlives"]),
    (Wrong::InPieces, &["compare-content", "compare-outlives"]),
    (Wrong::AllExactly, &["compare-content"]),
    (Wrong::OneWay, &["compare-content"]),
    (Wrong::SizeOfTheEarlier, &["compare-content", "compare-outlives"]),
    (
        Wrong::NotOffered,
        &["compare-content", "compare-outlives", "access-fits"],
    ),
    (Wrong::Unpromised, &["capabilities"]),
];

#[tokio::test]
async fn what_compares_wrongly_is_caught() {
    for (wrong, cases) in COMPARING {
        for case in cases {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let report = run(comparing(dir.path(), wrong), Some(case)).await;
            assert_eq!(report.failures(), [*case], "{wrong:?}: {report}");
        }
    }
}

/// The suite goes with the domain to the disks that a revert hands it.
#[tokio::test]
async fn a_revert_that_hands_over_another_image_passes() {
    let report = report_on(|| Arc::new(Subtle(Slip::Reverts(Hands::TheRight)))).await;
    assert!(report.conforms(), "{report}");
}

/// What a revert hands over, and the cases that must catch what is wrong with it, each alone.
macro_rules! caught_in_hand {
    ($($test:ident: $hands:ident by $($case:literal),+;)+) => {$(
        #[tokio::test]
        async fn $test() {
            for case in [$($case),+] {
                let dir = tempfile::tempdir_in("/dev/shm").unwrap();
                let fixture = fixture(dir.path(), || Arc::new(Subtle(Slip::Reverts(Hands::$hands))));
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
    let inner = fixture(dir.path(), || Arc::new(Subtle(Slip::Reverts(Hands::TheRight))));
    let report = run(Arc::new(Unmoved(inner)), Some("revert-content")).await;
    assert_eq!(report.failures(), ["revert-content"], "{report}");
    assert!(report.to_string().contains("no adopt()"), "{report}");
}

/// A slip and the one case that sees it, while all others pass.
macro_rules! seen_by_one {
    ($($test:ident: $slip:expr => $case:literal;)+) => {
        /// The cases of which it is proven that no other makes them superfluous.
        const ALONE: &[&str] = &[$($case),+];

        $(
            #[tokio::test]
            async fn $test() {
                let report = report_on(|| Arc::new(Subtle($slip))).await;
                assert_eq!(report.failures(), [$case], "{report}");
            }
        )+
    };
}

seen_by_one! {
    only_a_look_at_the_answer_sees_a_silent_probe: Slip::ProbeSaysNothing => "probe-accepts";
    only_an_odd_request_sees_an_option_too_many: Slip::OptionTooMany => "unknown-option";
    only_comparing_keys_sees_a_unit_renamed: Slip::UnitRenamed => "prepare-covers";
    only_planning_twice_sees_another_plan: Slip::PlanTwice => "take-plan-pure";
    only_three_disks_see_the_third_mistaken: Slip::ThirdDisk => "several-disks";
    only_reading_between_writes_sees_a_stale_cache: Slip::StaleCache => "content-edges";
    only_zeroing_sees_zeroes_missed: Slip::MissesZeroes => "content-zeroes";
    only_writing_all_sees_an_overflow: Slip::Overflows => "content-overwrite";
    only_the_older_first_sees_the_newer_spoilt: Slip::SpoilsNewer => "two-older-first";
    only_the_newer_first_sees_the_older_spoilt: Slip::SpoilsOlder => "two-newer-first";
    only_the_same_instant_sees_content_shared: Slip::SharesTheSame => "at-once";
    only_the_domain_sees_its_disk_touched: Slip::DeleteTouches => "domain-goes-on";
    only_the_capabilities_tell_a_merge_too_many: Slip::OffersToMerge => "access-fits";
    only_the_sizes_tell_a_wrong_one: Slip::SizeWrong => "access-fits";
    only_a_look_at_the_deleted_sees_it_called_broken: Slip::GoneIsBroken => "inspect-truth";
    only_damage_shows_who_is_blind_to_it: Slip::BlindToDamage => "damage-is-told";
    only_a_lost_answer_shows_litter_of_prepare: Slip::Litters(Call::Prepare, Mishap::Error) => "create-call-fails";
    only_a_disconnect_shows_litter_of_prepare: Slip::Litters(Call::Prepare, Mishap::Disconnect) => "create-disconnected";
    only_a_kill_shows_litter_of_prepare: Slip::Litters(Call::Prepare, Mishap::Kill) => "create-killed";
    only_a_lost_answer_shows_litter_of_delete: Slip::Litters(Call::Delete, Mishap::Error) => "delete-call-fails";
    only_a_disconnect_shows_litter_of_delete: Slip::Litters(Call::Delete, Mishap::Disconnect) => "delete-disconnected";
    only_a_kill_shows_litter_of_delete: Slip::Litters(Call::Delete, Mishap::Kill) => "delete-killed";
    only_a_lost_answer_shows_litter_of_revert: Slip::Litters(Call::Revert, Mishap::Error) => "revert-call-fails";
    only_a_disconnect_shows_litter_of_revert: Slip::Litters(Call::Revert, Mishap::Disconnect) => "revert-disconnected";
    only_a_kill_shows_litter_of_revert: Slip::Litters(Call::Revert, Mishap::Kill) => "revert-killed";
}

/// The same for the plainer faults above.
macro_rules! caught_by_one {
    ($($test:ident: $provider:expr => $case:literal;)+) => {
        const ALONE_TOO: &[&str] = &[$($case),+];

        $(
            #[tokio::test]
            async fn $test() {
                let report = report_on(|| Arc::new($provider)).await;
                assert_eq!(report.failures(), [$case], "{report}");
            }
        )+
    };
}

caught_by_one! {
    only_the_control_needs_to_reject_who_rejects_all: Broken::new(Fault::RejectsAll) => "control";
    only_the_description_shows_an_option_twice: Broken::new(Fault::OptionTwice) => "describes-itself";
    only_the_expected_list_shows_a_capability_lost: Broken::new(Fault::CapabilityLost) => "capabilities";
    only_an_unfit_disk_shows_it_as_an_error: Broken::new(Fault::UnfitIsError) => "probe-unfit";
    only_preparing_again_shows_a_nonce: Broken::new(Fault::PrepareDiffers) => "prepare-again";
    only_aborting_twice_shows_who_hates_it: Broken::new(Fault::AbortOnce) => "abort-twice";
    only_others_show_who_aborts_all: Broken::new(Fault::AbortTakesAll) => "abort-spares-others";
    only_the_second_revert_shows_content_shared: Broken::new(Fault::RevertSpoils) => "revert-content";
    only_others_show_who_forgets_peers: Subtle(Slip::Reverts(Hands::WithoutPeers)) => "revert-spares-others";
}

/// These fail with others: what they look for is looked for in passing elsewhere too, or is core's to see to. They
/// say by their name what is wrong where a longer case would say it at some point of many.
const NEVER_ALONE: [(&str, Fault); 7] = [
    // Every case gives each call a new instance.
    ("stateless", Fault::StateInInstance),
    // Every failed create aborts: with the record, without it, and before anything.
    ("abort-undoes", Fault::AbortLeaks),
    ("abort-without-record", Fault::AbortNeedsRecord),
    ("abort-before-anything", Fault::AbortLeaks),
    // A kill after a delete repeats it.
    ("delete-twice", Fault::DeleteOnce),
    // The provider is not called the second time: this is core's promise, on this provider's snapshots.
    ("name-twice", Fault::Stale),
    ("id-twice", Fault::Stale),
];

/// A new case comes with a provider that it catches.
#[test]
fn every_case_is_seen_to_catch_something() {
    let never = NEVER_ALONE.map(|(case, _)| case);
    let mut proven: Vec<&str> = [ALONE, ALONE_TOO, &never].concat();
    proven.extend(COMPARING.iter().flat_map(|(_, cases)| *cases));
    let mut cases: Vec<&str> = disksnap_conformance::cases().map(|(name, _)| name).collect();
    proven.sort_unstable();
    proven.dedup();
    cases.sort_unstable();
    assert_eq!(proven, cases);
}

#[tokio::test]
async fn those_never_alone_catch_something_too() {
    for (case, fault) in NEVER_ALONE {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let fixture = fixture(dir.path(), move || Arc::new(Broken::new(fault)));
        let report = run(fixture, Some(case)).await;
        assert_eq!(report.failures(), [case], "{report}");
    }
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
