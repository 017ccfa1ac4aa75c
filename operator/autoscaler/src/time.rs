//! Instants without a clock.

use serde::{Deserialize, Serialize};

/// Milliseconds since any epoch, the same one in every call. Only differences count, except
/// that a day of the seasonal term and an hour of the fail-static rule start at multiples of
/// theirs.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// The instant `seconds` after the epoch; what is not a number, or before it, is the epoch.
    pub fn from_secs(seconds: f64) -> Self {
        Self(millis(seconds))
    }

    /// Seconds from `earlier` to this instant, 0 where `earlier` is later.
    pub fn since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1000.0
    }

    /// The instant `seconds` before this one, at least the epoch.
    #[must_use]
    pub fn before(self, seconds: f64) -> Self {
        Self(self.0.saturating_sub(millis(seconds)))
    }

    /// The instant `seconds` after this one.
    #[must_use]
    pub fn after(self, seconds: f64) -> Self {
        Self(self.0.saturating_add(millis(seconds)))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of a float saturates, which is what is wanted of times out of range"
)]
fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_never_go_below_zero() {
        let t = Time::from_secs(12.5);
        assert_eq!(t, Time(12_500));
        assert!((t.since(Time(10_000)) - 2.5).abs() < 1e-12);
        assert!(Time(1).since(t).abs() < 1e-12);
        assert_eq!(t.before(20.0), Time(0));
        assert_eq!(t.after(0.5), Time(13_000));
        assert_eq!(Time::from_secs(f64::NAN), Time(0));
    }
}
