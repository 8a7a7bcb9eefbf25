//! The cases, in the order in which they are run. Each gets a fresh setting.

mod compare;
mod content;
mod contract;
mod life;
mod mishaps;
mod paint;
mod phases;
mod revert;

use std::pin::Pin;
use std::sync::Arc;

use crate::Fixture;
use crate::stage::Verdict;

type Running = Pin<Box<dyn Future<Output = Verdict> + Send>>;

/// A case: its name, what it is for, and how it is run.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) purpose: &'static str,
    pub(crate) run: fn(Arc<dyn Fixture>) -> Running,
}

macro_rules! case {
    ($name:literal, $purpose:literal, $room:ident :: $function:ident $(, $argument:expr)?) => {
        Case {
            name: $name,
            purpose: $purpose,
            run: |fixture| Box::pin(async move { $room::$function(&fixture $(, $argument)?).await }),
        }
    };
}

/// Proves that the fixture works and the provider makes snapshots at all: whoever rejects everything fails here.
pub(crate) const CONTROL: Case = case!(
    "control",
    "one snapshot is made, seen, read and deleted",
    life::control
);

/// All others.
pub(crate) const CASES: &[Case] = &[
    case!(
        "stateless",
        "each call may come from another process, which has only the records",
        life::stateless
    ),
    case!(
        "describes-itself",
        "name, summary and options are fit for lists and help",
        contract::describes_itself
    ),
    case!(
        "capabilities",
        "they are those that the fixture expects, no more and no fewer",
        contract::capabilities
    ),
    case!(
        "probe-accepts",
        "suitable disks are found fit, again and again, and nothing is changed",
        contract::probe_accepts
    ),
    case!(
        "probe-unfit",
        "an unsuitable disk is told as unfit, not as an error, beside suitable ones",
        contract::probe_unfit
    ),
    case!(
        "unknown-option",
        "an option that the method does not have is refused, and nothing is made",
        contract::unknown_option
    ),
    case!(
        "prepare-covers",
        "every disk is in exactly one prepared unit, the one that probe named",
        phases::prepare_covers
    ),
    case!(
        "prepare-again",
        "the same id gives the same answer, and nothing twice",
        phases::prepare_again
    ),
    case!(
        "take-plan-pure",
        "the plan follows from the record alone",
        phases::take_plan_pure
    ),
    case!(
        "abort-undoes",
        "abort after prepare leaves nothing",
        phases::abort_undoes
    ),
    case!(
        "abort-twice",
        "the second abort is as good as the first",
        phases::abort_twice
    ),
    case!(
        "abort-without-record",
        "abort finds what a killed prepare made, from the id alone",
        phases::abort_without_record
    ),
    case!(
        "abort-before-anything",
        "abort of a request that never began is fine",
        phases::abort_before_anything
    ),
    case!(
        "abort-spares-others",
        "abort leaves another request's preparations and snapshots alone",
        phases::abort_spares_others
    ),
    case!(
        "content-edges",
        "the snapshot keeps its content while the domain writes at cluster edges and into holes",
        content::edges
    ),
    case!(
        "content-zeroes",
        "the snapshot keeps its content while the domain zeroes ranges",
        content::zeroes
    ),
    case!(
        "content-overwrite",
        "the snapshot keeps its content while the domain overwrites the whole disk, tail included",
        content::overwrite
    ),
    case!(
        "several-disks",
        "several disks in one create, each with its own content",
        content::several_disks
    ),
    case!(
        "two-older-first",
        "two snapshots of one disk, the older deleted first, each right until it is deleted",
        content::two_snapshots,
        content::First::Older
    ),
    case!(
        "two-newer-first",
        "two snapshots of one disk, the newer deleted first, each right until it is deleted",
        content::two_snapshots,
        content::First::Newer
    ),
    case!(
        "domain-goes-on",
        "the domain's own writes arrive before, during and after a snapshot",
        content::domain_goes_on
    ),
    case!(
        "access-fits",
        "a snapshot is read, put back and merged as the capabilities promise, and has the disk's size",
        life::access_fits
    ),
    case!(
        "inspect-truth",
        "a snapshot is active until it is deleted, and gone after",
        life::inspect_truth
    ),
    case!(
        "damage-is-told",
        "a spoilt snapshot is not called active, is not read, and can be deleted",
        life::damage_is_told
    ),
    case!(
        "delete-twice",
        "the second delete is as good as the first",
        life::delete_twice
    ),
    case!(
        "name-twice",
        "a name in use is refused, and its snapshot is not touched",
        life::name_twice
    ),
    case!(
        "id-twice",
        "the same request again answers with the same snapshot",
        life::id_twice
    ),
    case!(
        "at-once",
        "two requests for one disk at the same time both succeed, and two deletes, beside a third snapshot",
        life::at_once
    ),
    case!(
        "revert-content",
        "a snapshot put back is the disk again, as often as asked; where that cannot be, nothing changes",
        revert::content
    ),
    case!(
        "revert-spares-others",
        "beside other snapshots a revert changes the disk alone, or is refused",
        revert::spares_others
    ),
    case!(
        "compare-content",
        "what two snapshots differ in is told, zeroes and the tail included, whichever is the earlier; and nothing where nothing is",
        compare::content
    ),
    case!(
        "compare-outlives",
        "the same once the disk was overwritten, a snapshot in between deleted, and a third taken",
        compare::outlives
    ),
    case!(
        "create-call-fails",
        "whichever call of a create fails, nothing is left, the guest runs, and the request works again",
        mishaps::create_fails,
        mishaps::ERROR
    ),
    case!(
        "create-disconnected",
        "the same where the monitor's connection ends, once recovered",
        mishaps::create_fails,
        mishaps::DISCONNECT
    ),
    case!(
        "create-killed",
        "killed at whichever call, recover leaves nothing or a whole snapshot, and the request works again",
        mishaps::create_killed
    ),
    case!(
        "delete-call-fails",
        "whichever call of a delete fails, the delete can be repeated",
        mishaps::delete_fails,
        mishaps::ERROR
    ),
    case!(
        "delete-disconnected",
        "the same where the monitor's connection ends",
        mishaps::delete_fails,
        mishaps::DISCONNECT
    ),
    case!(
        "delete-killed",
        "killed at whichever call, recover finishes the delete",
        mishaps::delete_killed
    ),
    case!(
        "revert-call-fails",
        "whichever call of a revert fails, the revert can be repeated",
        revert::fails,
        mishaps::ERROR
    ),
    case!(
        "revert-disconnected",
        "the same where the monitor's connection ends",
        revert::fails,
        mishaps::DISCONNECT
    ),
    case!(
        "revert-killed",
        "killed at whichever call, recover finishes the revert",
        revert::killed
    ),
];
