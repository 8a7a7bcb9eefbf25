//! Which points the rules keep.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use disksnap_backup::{Reason, Retention};
use proptest::prelude::*;

const NONE: Retention = Retention {
    last: 0,
    hourly: 0,
    daily: 0,
    weekly: 0,
    monthly: 0,
    yearly: 0,
};

fn at(text: &str) -> SystemTime {
    text.parse::<jiff::Timestamp>().unwrap().into()
}

/// The instants that are kept, each with its reasons.
fn kept(rules: &Retention, instants: &[&str]) -> Vec<String> {
    let times: Vec<SystemTime> = instants.iter().map(|text| at(text)).collect();
    let kept = rules
        .keep(&times)
        .into_iter()
        .zip(instants)
        .filter(|(reasons, _)| !reasons.is_empty());
    let words = |reasons: Vec<Reason>| {
        reasons
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("+")
    };
    kept.map(|(reasons, instant)| format!("{} {}", &instant[..16], words(reasons)))
        .collect()
}

const TABLE: [&str; 11] = [
    "2024-12-30T02:15:00Z", // a Monday of 2025's first ISO week
    "2025-12-28T02:15:00Z", // a Sunday
    "2025-12-29T02:15:00Z", // a Monday of 2026's first ISO week
    "2026-01-01T02:15:00Z",
    "2026-01-31T23:59:59Z",
    "2026-02-01T00:00:00Z",
    "2026-02-14T02:15:00Z",
    "2026-02-15T02:15:00Z",
    "2026-02-15T02:45:00Z",
    "2026-02-15T14:00:00Z",
    "2026-02-16T02:15:00Z",
];

#[test]
fn each_rule_by_itself() {
    let of = |rules| kept(&rules, &TABLE);
    assert_eq!(
        of(Retention { last: 2, ..NONE }),
        ["2026-02-15T14:00 last", "2026-02-16T02:15 last"]
    );
    assert_eq!(
        of(Retention { hourly: 3, ..NONE }),
        [
            "2026-02-15T02:45 hourly",
            "2026-02-15T14:00 hourly",
            "2026-02-16T02:15 hourly"
        ]
    );
    assert_eq!(
        of(Retention { daily: 4, ..NONE }),
        [
            "2026-02-01T00:00 daily",
            "2026-02-14T02:15 daily",
            "2026-02-15T14:00 daily",
            "2026-02-16T02:15 daily"
        ],
        "days without a point do not count"
    );
    assert_eq!(
        of(Retention { weekly: 5, ..NONE }),
        [
            "2025-12-28T02:15 weekly",
            "2026-01-01T02:15 weekly",
            "2026-02-01T00:00 weekly",
            "2026-02-15T14:00 weekly",
            "2026-02-16T02:15 weekly"
        ],
        "the week of New Year is one, Sunday is a week's last day"
    );
    assert_eq!(
        of(Retention { monthly: 3, ..NONE }),
        [
            "2025-12-29T02:15 monthly",
            "2026-01-31T23:59 monthly",
            "2026-02-16T02:15 monthly"
        ]
    );
    assert_eq!(
        of(Retention { yearly: 9, ..NONE }),
        [
            "2024-12-30T02:15 yearly",
            "2025-12-29T02:15 yearly",
            "2026-02-16T02:15 yearly"
        ]
    );
}

#[test]
fn rules_unite() {
    let rules = Retention {
        last: 1,
        daily: 2,
        monthly: 2,
        ..NONE
    };
    assert_eq!(
        kept(&rules, &TABLE),
        [
            "2026-01-31T23:59 monthly",
            "2026-02-15T14:00 daily",
            "2026-02-16T02:15 last+daily+monthly"
        ]
    );
    assert!(kept(&NONE, &TABLE).is_empty());
    assert!(NONE.is_empty() && !rules.is_empty());
}

#[test]
fn instants_come_in_any_order_and_may_be_equal_or_out_of_bounds() {
    let times = [
        at("2026-01-02T00:00:00Z"),
        at("2026-01-01T00:00:00Z"),
        at("2026-01-02T00:00:00Z"),
    ];
    let keep = Retention { daily: 1, ..NONE }.keep(&times);
    assert_eq!(keep, [vec![], vec![], vec![Reason::Daily]]);
    let far = [
        SystemTime::UNIX_EPOCH - Duration::from_secs(1 << 50),
        SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 50),
    ];
    assert_eq!(
        Retention { yearly: 9, ..NONE }.keep(&far),
        [vec![Reason::Yearly], vec![Reason::Yearly]]
    );
}

fn rules() -> impl Strategy<Value = Retention> {
    let few = || prop_oneof![Just(0_u32), 1_u32..5, Just(u32::MAX)];
    (few(), few(), few(), few(), few(), few()).prop_map(|(last, hourly, daily, weekly, monthly, yearly)| {
        Retention {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
        }
    })
}

/// What names the period of each rule, by text alone.
fn period(rule: &Reason, instant: SystemTime) -> String {
    let zoned = jiff::Timestamp::try_from(instant)
        .unwrap()
        .to_zoned(jiff::tz::TimeZone::UTC);
    let form = match rule {
        Reason::Hourly => "%Y-%m-%d %H",
        Reason::Daily => "%Y-%m-%d",
        Reason::Weekly => "%G-%V",
        Reason::Monthly => "%Y-%m",
        Reason::Yearly => "%Y",
        _ => "%s %N",
    };
    zoned.strftime(form).to_string()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_is_the_newest_of_the_newest_periods(
        // Different seconds over some three years: crowded enough for periods of all kinds.
        seconds in proptest::collection::btree_set(1_700_000_000_u64..1_800_000_000, 1..60),
        rules in rules(),
    ) {
        let times: Vec<SystemTime> = seconds.iter().map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(*s)).collect();
        let keep = rules.keep(&times);
        prop_assert_eq!(keep.len(), times.len());
        let each = [
            (Reason::Last, rules.last),
            (Reason::Hourly, rules.hourly),
            (Reason::Daily, rules.daily),
            (Reason::Weekly, rules.weekly),
            (Reason::Monthly, rules.monthly),
            (Reason::Yearly, rules.yearly),
        ];
        for (rule, most) in each {
            let has: Vec<bool> = keep.iter().map(|reasons| reasons.contains(&rule)).collect();
            let mut expected = vec![false; times.len()];
            let mut seen = BTreeSet::new();
            for n in (0..times.len()).rev() {
                let new = seen.insert(period(&rule, times[n]));
                expected[n] = new && seen.len() <= most as usize;
            }
            prop_assert_eq!(has, expected, "{}", rule);
        }
    }

    #[test]
    fn more_is_kept_by_more(
        seconds in proptest::collection::btree_set(1_700_000_000_u64..1_710_000_000, 1..40),
        rules in rules(),
    ) {
        let times: Vec<SystemTime> = seconds.iter().map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(*s)).collect();
        let more = Retention { last: rules.last.saturating_add(1), daily: rules.daily.saturating_add(1), ..rules };
        for (less, more) in rules.keep(&times).iter().zip(more.keep(&times)) {
            prop_assert!(less.is_empty() || !more.is_empty());
        }
        prop_assert!(!more.keep(&times).last().unwrap().is_empty(), "the newest is kept by any rule");
    }
}
