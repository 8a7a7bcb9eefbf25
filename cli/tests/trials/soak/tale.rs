//! What has been done in a soak, counted; and what was learned on the way, for the next kills to fall where something happens.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use disksnap_test_support::pattern::Random;

/// The tale of all domains.
#[derive(Debug, Default)]
pub(crate) struct Tale(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    deeds: BTreeMap<&'static str, Deeds>,
    kills: BTreeMap<&'static str, u64>,
    /// Why something was refused, and how often.
    refusals: BTreeMap<String, u64>,
    checks: BTreeMap<&'static str, u64>,
    failures: Vec<String>,
    points: BTreeMap<&'static str, Vec<String>>,
}

/// How often something was done.
#[derive(Debug, Default, Clone, Copy)]
struct Deeds {
    done: u64,
    refused: u64,
    killed: u64,
    /// Of those that were done, in all.
    took: Duration,
}

impl Tale {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn done(&self, kind: &'static str, took: Duration) {
        let mut told = self.told();
        let deeds = told.deeds.entry(kind).or_default();
        deeds.done += 1;
        deeds.took += took;
    }

    pub(crate) fn refused(&self, kind: &'static str, why: &str) {
        let mut told = self.told();
        told.deeds.entry(kind).or_default().refused += 1;
        *told.refusals.entry(format!("{kind}: {why}")).or_default() += 1;
    }

    pub(crate) fn killed(&self, kind: &'static str, how: &'static str) {
        let mut told = self.told();
        told.deeds.entry(kind).or_default().killed += 1;
        *told.kills.entry(how).or_default() += 1;
    }

    /// Something else than the command was killed.
    pub(crate) fn struck(&self, what: &'static str) {
        *self.told().kills.entry(what).or_default() += 1;
    }

    pub(crate) fn checked(&self, what: &'static str) {
        *self.told().checks.entry(what).or_default() += 1;
    }

    pub(crate) fn failed(&self, what: String) {
        self.told().failures.push(what);
    }

    pub(crate) fn failures(&self) -> usize {
        self.told().failures.len()
    }

    /// How long such a deed takes.
    pub(crate) fn typical(&self, kind: &'static str) -> Duration {
        let deeds = self.told().deeds.get(kind).copied().unwrap_or_default();
        match u32::try_from(deeds.done) {
            Ok(done) if done > 0 => deeds.took / done,
            _ => Duration::from_millis(500),
        }
    }

    /// The points that such a deed has passed.
    pub(crate) fn learn(&self, kind: &'static str, log: &str) {
        let mut passed: BTreeMap<&str, u32> = BTreeMap::new();
        let mut points = Vec::new();
        for name in log.lines() {
            let k = passed.entry(name).or_default();
            *k += 1;
            points.push(format!("{name}:{k}"));
        }
        let mut told = self.told();
        let known = told.points.entry(kind).or_default();
        for point in points {
            if !known.contains(&point) {
                known.push(point);
            }
        }
    }

    /// One of them.
    pub(crate) fn point(&self, kind: &'static str, random: &mut Random) -> Option<String> {
        let told = self.told();
        let points = told.points.get(kind).filter(|points| !points.is_empty())?;
        let at = random.below(points.len() as u64);
        points.get(usize::try_from(at).ok()?).cloned()
    }

    /// All of it, for people.
    pub(crate) fn text(&self) -> String {
        let told = self.told();
        let mut out = format!(
            "{:<24}{:>8}{:>9}{:>8}\n",
            "OPERATION", "DONE", "REFUSED", "KILLED"
        );
        let mut all = Deeds::default();
        for (kind, deeds) in &told.deeds {
            let _ = writeln!(
                out,
                "{kind:<24}{:>8}{:>9}{:>8}",
                deeds.done, deeds.refused, deeds.killed
            );
            all.done += deeds.done;
            all.refused += deeds.refused;
            all.killed += deeds.killed;
        }
        let _ = writeln!(
            out,
            "{:<24}{:>8}{:>9}{:>8}\n",
            "all", all.done, all.refused, all.killed
        );
        let _ = writeln!(out, "{:<32}{:>8}", "KILLED", "TIMES");
        for (how, times) in &told.kills {
            let _ = writeln!(out, "{how:<32}{times:>8}");
        }
        let _ = writeln!(out, "\n{:<32}{:>8}", "CHECKED", "TIMES");
        for (what, times) in &told.checks {
            let _ = writeln!(out, "{what:<32}{times:>8}");
        }
        if !told.refusals.is_empty() {
            let _ = writeln!(out, "\nREFUSED");
            for (why, times) in &told.refusals {
                let _ = writeln!(out, "{times:>6}  {why}");
            }
        }
        let _ = writeln!(out, "\nfailures: {}", told.failures.len());
        for failure in &told.failures {
            let _ = writeln!(out, "\nFAILED {failure}");
        }
        out
    }
}
