//! What the suite found.

use std::fmt;

/// The suite's findings on one method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The method's name.
    pub method: String,
    /// Every case that was chosen, in the order it was run.
    pub results: Vec<CaseResult>,
}

/// One case and how it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseResult {
    /// The case's name.
    pub case: &'static str,
    /// What it is for, in one line.
    pub purpose: &'static str,
    /// How it went.
    pub outcome: Outcome,
}

/// How a case went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The provider does as the contract says.
    Passed,
    /// It does not, and in what way.
    Failed(String),
    /// The control failed, so that this case would prove nothing.
    NotRun,
}

impl Report {
    /// How many cases passed.
    #[must_use]
    pub fn passed(&self) -> usize {
        self.count(|outcome| *outcome == Outcome::Passed)
    }

    /// How many cases failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// Whether every case was run and passed, and there was more than the control.
    #[must_use]
    pub fn conforms(&self) -> bool {
        self.results.len() > 1 && self.passed() == self.results.len()
    }

    /// The names of the cases that failed.
    #[must_use]
    pub fn failures(&self) -> Vec<&'static str> {
        let failed = self
            .results
            .iter()
            .filter(|r| matches!(r.outcome, Outcome::Failed(_)));
        failed.map(|r| r.case).collect()
    }

    /// The totals as one line: `35 passed, 0 failed`.
    #[must_use]
    pub fn summary(&self) -> String {
        let not_run = self.count(|outcome| *outcome == Outcome::NotRun);
        let totals = format!("{} passed, {} failed", self.passed(), self.failed());
        match not_run {
            0 => totals,
            n => format!("{totals}, {n} not run because the control failed"),
        }
    }

    fn count(&self, which: impl Fn(&Outcome) -> bool) -> usize {
        self.results.iter().filter(|r| which(&r.outcome)).count()
    }
}

/// A table of the cases, with why each failed one did, and a line of totals.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.results.iter().map(|r| r.case.len()).max().unwrap_or(0);
        for CaseResult {
            case,
            purpose,
            outcome,
        } in &self.results
        {
            match outcome {
                Outcome::Passed => writeln!(f, "{case:width$}  ok      {purpose}")?,
                Outcome::NotRun => writeln!(f, "{case:width$}  not run {purpose}")?,
                Outcome::Failed(why) => {
                    writeln!(f, "{case:width$}  FAILED  {purpose}")?;
                    for line in why.lines() {
                        writeln!(f, "{:width$}          {line}", "")?;
                    }
                }
            }
        }
        writeln!(f, "{}: {}", self.method, self.summary())
    }
}
