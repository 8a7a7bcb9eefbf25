//! Which points are kept, and dropping the others.
//!
//! The rules are those of restic and borg: each keeps the last point of each of so many hours, days, weeks, … that have one,
//! counted from the newest back; a point that any rule keeps is kept. Hours, days and the rest are UTC's, weeks are ISO 8601's.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::time::SystemTime;

use disksnap::{Error, ErrorKind, Result};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::merging::{Merger, journal};
use crate::repository::{Line, again};
use crate::{DomainFolder, Manifest, Repository, Watcher};

/// How many points are to be kept, by each rule. 0: the rule keeps none; `u32::MAX`: of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// The last ones.
    pub last: u32,
    /// The last one of each hour.
    pub hourly: u32,
    /// The last one of each day.
    pub daily: u32,
    /// The last one of each week, from Monday on.
    pub weekly: u32,
    /// The last one of each month.
    pub monthly: u32,
    /// The last one of each year.
    pub yearly: u32,
}

/// Why a point is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Reason {
    /// It is one of the last.
    Last,
    /// It is the last of its hour.
    Hourly,
    /// It is the last of its day.
    Daily,
    /// It is the last of its week.
    Weekly,
    /// It is the last of its month.
    Monthly,
    /// It is the last of its year.
    Yearly,
    /// It is the last one of a disk, which the next increment is over. Kept whatever the rules say.
    LatestOf {
        /// The disk's target.
        disk: String,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::LatestOf { disk } => return write!(f, "latest of {disk}"),
        })
    }
}

/// A point that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The point.
    pub point: String,
    /// Why; at least one reason.
    pub reasons: Vec<Reason>,
}

/// A point that no rule looked at, since it cannot be restored: it is neither counted nor dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Doubtful {
    /// The point.
    pub point: String,
    /// What is wrong with it.
    pub what: String,
}

/// A point that no rule keeps, and that stays all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Held {
    /// The point.
    pub point: String,
    /// The later points that may be built on it: nobody knows what they are built on.
    pub by: Vec<String>,
}

/// What a prune did, or would do. Points are in their order in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pruned {
    /// The points that are kept, and why.
    pub kept: Vec<Kept>,
    /// The points that were dropped.
    pub dropped: Vec<String>,
    /// The points that were left alone.
    pub doubtful: Vec<Doubtful>,
    /// The points that no rule keeps, and that stay because one of those may be built on them.
    pub held: Vec<Held>,
    /// How much less the images take now, in bytes; an estimate where nothing was done. Negative where they take more.
    pub freed: i64,
    /// Nothing was done.
    pub dry_run: bool,
}

impl Retention {
    /// Whether no rule keeps anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Why each of these instants, in any order, is kept; nothing for one that is not.
    ///
    /// Of several in one period the newest is kept; of equal ones the one that stands last.
    #[must_use]
    pub fn keep(&self, instants: &[SystemTime]) -> Vec<Vec<Reason>> {
        let mut order: Vec<usize> = (0..instants.len()).collect();
        order.sort_by_key(|n| (instants[*n], *n));
        let mut kept = vec![Vec::new(); instants.len()];
        for (reason, most, period) in self.rules() {
            let mut periods = BTreeSet::new();
            for (age, n) in order.iter().rev().enumerate() {
                if periods.len() >= most as usize {
                    break;
                }
                if periods.insert(period(age, utc(instants[*n]))) {
                    kept[*n].push(reason.clone());
                }
            }
        }
        kept
    }

    fn rules(&self) -> [(Reason, u32, Period); 6] {
        [
            (Reason::Last, self.last, |age, _| {
                (i64::try_from(age).unwrap_or(i64::MAX), 0)
            }),
            (Reason::Hourly, self.hourly, |_, at| (day(at), at.hour().into())),
            (Reason::Daily, self.daily, |_, at| (day(at), 0)),
            (Reason::Weekly, self.weekly, |_, at| {
                let week = at.date().iso_week_date();
                (week.year().into(), week.week().into())
            }),
            (Reason::Monthly, self.monthly, |_, at| {
                (at.year().into(), at.month().into())
            }),
            (Reason::Yearly, self.yearly, |_, at| (at.year().into(), 0)),
        ]
    }
}

/// What period an instant lies in, as a number that no other has; the first argument is how many are newer.
type Period = fn(usize, DateTime) -> (i64, i64);

fn day(at: DateTime) -> i64 {
    i64::from(at.year()) * 1000 + i64::from(at.day_of_year())
}

fn utc(instant: SystemTime) -> DateTime {
    let before = instant < SystemTime::UNIX_EPOCH;
    let nearest = if before { Timestamp::MIN } else { Timestamp::MAX };
    TimeZone::UTC.to_datetime(Timestamp::try_from(instant).unwrap_or(nearest))
}

/// Drops the points of a domain that no rule keeps. What they held and a kept one needs becomes part of that one, as
/// [`merge`](crate::merge) does it. The last point of each disk is always kept.
///
/// A point whose manifest cannot be trusted may be built on any before it: those are held until it is put back or dropped by
/// name, and what is younger is dropped all the same.
///
/// A prune that was cut short is finished by the next one, or by the next merge.
///
/// # Errors
/// `Invalid` for rules that keep nothing; as [`merge`](crate::merge).
pub async fn prune(
    repository: &Repository,
    folder: &DomainFolder,
    rules: &Retention,
    dry_run: bool,
    watcher: &dyn Watcher,
) -> Result<Pruned> {
    let told = |error: Error| error.during("backup prune").with("domain", &folder.id);
    if rules.is_empty() {
        let error = Error::new(ErrorKind::Invalid, "the rules keep no point at all");
        return Err(told(
            error.hint("Say what is to be kept, such as --keep-daily 7 --keep-weekly 5."),
        ));
    }
    let _lock = repository.lock(folder, dry_run).await.map_err(told)?;
    let line = repository.line(folder).await.map_err(told)?;
    let earlier = journal(repository, folder).await.map_err(told)?;
    let earlier = earlier.map(|journal| journal.drop).unwrap_or_default();
    let (kept, doubtful) = sort_out(repository, folder, &line, rules, &earlier);
    let (held, drops) = drops(&line, &kept, &doubtful);
    let mut merger = Merger::new(repository, folder, line, watcher);
    let mut pruned = Pruned {
        kept,
        dropped: drops.iter().cloned().collect(),
        doubtful,
        held,
        freed: 0,
        dry_run,
    };
    pruned.freed = if dry_run {
        merger.plan(&drops).await.map_err(told)?.freed
    } else {
        merger.run(&drops).await.map_err(told)?.freed
    };
    Ok(pruned)
}

/// What is kept of the points that are not on their way out, and what cannot be judged.
fn sort_out(
    repository: &Repository,
    folder: &DomainFolder,
    line: &Line,
    rules: &Retention,
    leaving: &BTreeSet<String>,
) -> (Vec<Kept>, Vec<Doubtful>) {
    let (mut good, mut doubtful) = (Vec::new(), Vec::new());
    for (name, manifest) in line.all().filter(|(name, _)| !leaving.contains(*name)) {
        match whole(repository, folder, line, manifest) {
            Ok(manifest) => good.push(manifest),
            Err(e) => doubtful.push(Doubtful {
                point: name.to_owned(),
                what: e.to_string(),
            }),
        }
    }
    let instants: Vec<SystemTime> = good.iter().map(|manifest| manifest.created).collect();
    let mut reasons = rules.keep(&instants);
    let mut disks = BTreeSet::new();
    for (n, manifest) in good.iter().enumerate().rev() {
        let latest = manifest.disks.iter().filter(|disk| disks.insert(&disk.target));
        reasons[n].extend(latest.map(|disk| Reason::LatestOf {
            disk: disk.target.clone(),
        }));
    }
    let kept = good
        .iter()
        .zip(reasons)
        .filter(|(_, reasons)| !reasons.is_empty());
    let kept = kept.map(|(manifest, reasons)| Kept {
        point: manifest.point.clone(),
        reasons,
    });
    (kept.collect(), doubtful)
}

/// A point of which every disk has a whole chain.
fn whole<'a>(
    repository: &Repository,
    folder: &DomainFolder,
    line: &Line,
    manifest: &'a Result<Manifest>,
) -> Result<&'a Manifest> {
    let manifest = manifest.as_ref().map_err(again)?;
    for disk in &manifest.disks {
        line.chain(repository, folder, &manifest.point, &disk.target)?;
    }
    Ok(manifest)
}

/// The points that no rule keeps: those that must stay all the same, and those that go.
fn drops(line: &Line, kept: &[Kept], doubtful: &[Doubtful]) -> (Vec<Held>, BTreeSet<String>) {
    let stays = |name: &str| {
        kept.iter().any(|kept| kept.point == name) || doubtful.iter().any(|doubtful| doubtful.point == name)
    };
    // Of the others it is known what they are built on.
    let unread = line.all().filter(|(_, manifest)| manifest.is_err());
    let mut later: VecDeque<String> = unread.map(|(name, _)| name.to_owned()).collect();
    let (mut held, mut drops) = (Vec::new(), BTreeSet::new());
    for (name, _) in line.all() {
        if later.front().is_some_and(|unread| unread == name) {
            later.pop_front();
        }
        if stays(name) {
            continue;
        }
        if later.is_empty() {
            drops.insert(name.to_owned());
        } else {
            let (point, by) = (name.to_owned(), later.iter().cloned().collect());
            held.push(Held { point, by });
        }
    }
    (held, drops)
}
