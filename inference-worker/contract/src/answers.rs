//! How the answers of a group did lately, as its first pod tells it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Parameter of the query of [`crate::STATE_PATH`] with the number of seconds whose answers
/// [`crate::StateReport::answers`] is to be about.
pub const ANSWERS_WITHIN: &str = "answersWithin";
/// Longest time that can be asked about; a worker remembers no more.
pub const LONGEST_WINDOW: Duration = Duration::from_hours(1);

/// Times are kept in whole units of ten microseconds, fine enough for the time between two
/// tokens, and coarse enough for squares of minutes.
const UNIT_MICROS: u64 = 10;

/// Answers that ended within some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AnswersReport {
    /// Those that came to their end.
    pub finished: u32,
    /// Those that failed by no fault of the client: with a status of 500 and more, or broken
    /// off by an error. A worker that ends fails nothing.
    pub failed: u32,
    /// From request to first token, of each answer that came to its end.
    pub first_token: Spread,
    /// Between tokens, on average of each answer of several tokens that came to its end.
    pub between_tokens: Spread,
}

impl AnswersReport {
    /// This and `other` together.
    #[must_use]
    pub fn with(self, other: &Self) -> Self {
        Self {
            finished: self.finished.saturating_add(other.finished),
            failed: self.failed.saturating_add(other.failed),
            first_token: self.first_token.with(&other.first_token),
            between_tokens: self.between_tokens.with(&other.between_tokens),
        }
    }
}

/// Times, as far as their average and their deviation need it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// How many.
    count: u32,
    /// Their sum, in units of ten microseconds.
    sum: u64,
    /// The sum of their squares, in squares of that unit.
    squares: u64,
}

impl Spread {
    /// Takes one more time.
    pub fn observe(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let units = micros / UNIT_MICROS;
        *self = self.with(&Self {
            count: 1,
            sum: units,
            squares: units.saturating_mul(units),
        });
    }

    /// How many times were taken.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Average in microseconds; 0 of none.
    pub fn average_micros(&self) -> u64 {
        let sum = self.sum.saturating_mul(UNIT_MICROS);
        sum.checked_div(self.count.into()).unwrap_or(0)
    }

    /// Standard deviation in microseconds; 0 of fewer than two.
    pub fn deviation_micros(&self) -> u64 {
        let (count, sum) = (u128::from(self.count), u128::from(self.sum));
        // By units of a microsecond, or the root of a small one would be none.
        let scale = u128::from(UNIT_MICROS * UNIT_MICROS);
        let spread = (u128::from(self.squares) * count).saturating_sub(sum.saturating_mul(sum));
        let variance = spread
            .saturating_mul(scale)
            .checked_div(count * count.saturating_sub(1));
        u64::try_from(variance.unwrap_or(0).isqrt()).unwrap_or(u64::MAX)
    }

    fn with(&self, other: &Self) -> Self {
        Self {
            count: self.count.saturating_add(other.count),
            sum: self.sum.saturating_add(other.sum),
            squares: self.squares.saturating_add(other.squares),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_and_deviations_are_those_of_the_times() {
        let mut spread = Spread::default();
        assert_eq!((spread.average_micros(), spread.deviation_micros()), (0, 0));
        for millis in [100, 200, 300] {
            spread.observe(Duration::from_millis(millis));
        }
        let together = AnswersReport {
            first_token: spread,
            finished: 3,
            ..AnswersReport::default()
        };
        let twice = together.with(&together);
        assert_eq!((twice.finished, twice.first_token.count()), (6, 6));
        assert_eq!(spread.average_micros(), 200_000);
        assert_eq!(spread.deviation_micros(), 100_000);
        assert_eq!(twice.first_token.deviation_micros(), 89_442);
        // A time without end does no harm.
        spread.observe(Duration::MAX);
        assert!(spread.average_micros() > 0);
        assert_eq!(spread.with(&spread).count(), 8);
    }
}
