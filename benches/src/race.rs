//! The harness: contenders take turns in rounds on the same machine, and only ratios within a round count.
//!
//! What a machine does at one moment differs from what it does a minute later; what two contenders do one
//! right after the other differs by the contenders. So every round runs each of them once, beginning with
//! another one each time, and a figure is the median over the rounds of the ratio within the round.

use std::collections::BTreeMap;

use anyhow::Result;

/// What one turn measured, by name: seconds, or anything else that is greater than zero.
pub(crate) type Measures = BTreeMap<&'static str, f64>;

/// Somebody who takes a turn in every round.
pub(crate) struct Contender<'a> {
    name: String,
    turn: Box<dyn FnMut() -> Result<Measures> + 'a>,
}

impl<'a> Contender<'a> {
    pub(crate) fn new(name: impl Into<String>, turn: impl FnMut() -> Result<Measures> + 'a) -> Self {
        Self {
            name: name.into(),
            turn: Box::new(turn),
        }
    }
}

/// What all contenders measured in all rounds.
#[derive(Debug)]
pub(crate) struct Rounds {
    /// By contender, then by round.
    turns: BTreeMap<String, Vec<Measures>>,
}

/// Runs the rounds, after one that does not count: it fills caches and opens what is opened once.
pub(crate) fn race(rounds: usize, mut contenders: Vec<Contender<'_>>) -> Result<Rounds> {
    let mut turns: BTreeMap<String, Vec<Measures>> = BTreeMap::new();
    for round in 0..=rounds {
        for contender in &mut contenders {
            let measures = (contender.turn)()?;
            if round > 0 {
                turns.entry(contender.name.clone()).or_default().push(measures);
            }
        }
        contenders.rotate_left(1);
    }
    Ok(Rounds { turns })
}

impl Rounds {
    /// What was measured elsewhere, by contender.
    pub(crate) fn of(turns: impl IntoIterator<Item = (String, Vec<Measures>)>) -> Self {
        Self {
            turns: turns.into_iter().collect(),
        }
    }

    /// The ratio of one measure of one contender to one of another, round by round.
    pub(crate) fn ratio(&self, of: (&str, &str), to: (&str, &str)) -> Spread {
        let (of, to) = (self.values(of), self.values(to));
        Spread::of(of.into_iter().zip(to).map(|(a, b)| a / b).collect())
    }

    /// By how much one measure of one contender exceeds another, taken so many times, round by round.
    pub(crate) fn excess(&self, of: (&str, &str), times: f64, to: (&str, &str)) -> Spread {
        let (of, to) = (self.values(of), self.values(to));
        Spread::of(of.into_iter().zip(to).map(|(a, b)| a - times * b).collect())
    }

    /// The ratio of the best that each did in any round: what is left where other programs had the processor
    /// in most of them.
    pub(crate) fn best(&self, of: (&str, &str), to: (&str, &str)) -> f64 {
        let [of, to] = [of, to].map(|who| Spread::of(self.values(who)).least);
        of / to
    }

    /// The median of one measure of one contender.
    pub(crate) fn middle(&self, name: &str, measure: &str) -> f64 {
        Spread::of(self.values((name, measure))).median
    }

    /// What was not measured counts as zero: a phase that did not take place.
    pub(crate) fn values(&self, (name, measure): (&str, &str)) -> Vec<f64> {
        let turns = self.turns.get(name).map(Vec::as_slice).unwrap_or_default();
        let value = |turn: &Measures| turn.get(measure).copied().unwrap_or_default();
        turns.iter().map(value).collect()
    }

    /// What was measured of one contender, as shares of one of its measures.
    pub(crate) fn shares(&self, name: &str, of_what: &str, measures: &[&str]) -> Vec<Spread> {
        let share = |measure: &&str| self.ratio((name, measure), (name, of_what));
        measures.iter().map(share).collect()
    }
}

/// The middle of some values, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    /// Half of the values lie between these two.
    pub(crate) quartiles: (f64, f64),
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            median: quantile(&values, 0.5),
            least: quantile(&values, 0.0),
            most: quantile(&values, 1.0),
            quartiles: (quantile(&values, 0.25), quantile(&values, 0.75)),
        }
    }
}

/// Between the two values nearest to it, in proportion.
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    #[expect(clippy::cast_precision_loss, reason = "there are a few dozen values")]
    let place = at * last as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between zero and the number of values"
    )]
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "these values are exact in binary")]
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn the_spread_of_known_values() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0, 5.0]);
        assert_eq!((spread.least, spread.median, spread.most), (1.0, 3.0, 5.0));
        assert_eq!(spread.quartiles, (2.0, 4.0));
        assert_eq!(Spread::of(vec![1.0, 2.0]).median, 1.5);
        assert!(Spread::of(Vec::new()).median.is_nan());
    }

    #[test]
    fn a_ratio_is_taken_within_the_round_whoever_began_it() {
        let mut turn = 0.0;
        // The machine becomes slower from round to round; the ratio does not change.
        let slow = |factor: f64| {
            let mut round = 0.0;
            move || {
                round += 1.0;
                Ok(Measures::from([("time", factor * round)]))
            }
        };
        let mut counted = || {
            turn += 1.0;
            Ok(Measures::from([("time", turn)]))
        };
        let rounds = race(
            4,
            vec![
                Contender::new("a", slow(3.0)),
                Contender::new("b", slow(2.0)),
                Contender::new("n", &mut counted),
            ],
        )
        .unwrap();
        let ratio = rounds.ratio(("a", "time"), ("b", "time"));
        assert_eq!((ratio.least, ratio.median, ratio.most), (1.5, 1.5, 1.5));
        assert_eq!(rounds.best(("a", "time"), ("b", "time")), 1.5);
        // One turn in the round that does not count.
        assert_eq!(turn, 5.0);
    }
}
