//! How full groups may be: moved by the share of requests that keep the SLO.

use serde::{Deserialize, Serialize};

use crate::counters::{Increment, Window};
use crate::fleet::Interval;
use crate::time::Time;

/// Seconds between two moves.
const EVERY_S: f64 = 300.0;
/// Seconds of requests that a move looks at.
const WINDOW_S: f64 = 1800.0;
/// Requests that a move needs.
const NEEDS: f64 = 200.0;
/// Lowest and highest share, unless the settings start beyond them.
const RANGE: (f64, f64) = (0.45, 0.90);
/// Least and greatest step down, and the step as a share of what is missing.
const DOWN: (f64, f64, f64) = (0.01, 0.05, 0.5);
/// Step up.
const UP: f64 = 0.005;

/// The share ρ, and what it is moved by. Fast to add room, slow to take it away.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trim {
    rho: Option<f64>,
    moved: Option<Time>,
    finished: Window,
    within: Window,
}

impl Trim {
    /// Forgets when things happened, but not the share: the clock went back.
    #[must_use]
    pub fn without_times(&self) -> Self {
        Self {
            rho: self.rho,
            ..Self::default()
        }
    }

    /// Takes in requests that finished. Groups that count only one of the two are left out.
    pub fn observe(&mut self, intervals: &[Interval], now: Time, span_s: f64) {
        let both = |i: &Interval| i.finished.zip(i.within_slo);
        let (mut finished, mut within) = (0.0, 0.0);
        for (all, good) in intervals.iter().filter_map(both) {
            finished += all;
            within += good.min(all);
        }
        if finished > 0.0 && span_s > 0.0 {
            self.finished.push(Increment {
                end: now,
                span_s,
                amount: finished,
            });
            self.within.push(Increment {
                end: now,
                span_s,
                amount: within,
            });
        }
    }

    /// The share for now, moved each five minutes: down by half of what the share of good
    /// requests misses (0.01 to 0.05), up by 0.005 when it is better than half way from `target`
    /// to 1. Nothing moves while `frozen`, nor with under 200 requests.
    pub fn rho(&mut self, start: f64, target: f64, frozen: bool, now: Time) -> f64 {
        let rho = *self.rho.get_or_insert(start);
        let moved = *self.moved.get_or_insert(now);
        if now.since(moved) < EVERY_S {
            return rho;
        }
        self.moved = Some(now);
        let (finished, _) = self.finished.sum(now, WINDOW_S);
        let (within, _) = self.within.sum(now, WINDOW_S);
        if frozen || finished < NEEDS {
            return rho;
        }
        let attained = within / finished;
        let next = if attained < target {
            rho - (DOWN.2 * (target - attained)).max(DOWN.0).min(DOWN.1)
        } else if attained > target + (1.0 - target) / 2.0 {
            rho + UP
        } else {
            rho
        };
        let next = next.max(RANGE.0.min(start)).min(RANGE.1.max(start));
        self.rho = Some(next);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::plain;

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    /// ρ after `seconds` with ten requests each five seconds, `share` of them good.
    fn after(seconds: u32, share: f64, frozen: bool) -> f64 {
        let mut trim = Trim::default();
        let mut rho = 0.0;
        for tick in 0..=seconds / 5 {
            let now = at(f64::from(tick) * 5.0);
            let mut interval = plain("a", now, 5.0);
            (interval.finished, interval.within_slo) = (Some(10.0), Some(10.0 * share));
            trim.observe(&[interval], now, 5.0);
            rho = trim.rho(0.8, 0.99, frozen, now);
        }
        rho
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got}, expected {expected}");
    }

    #[test]
    fn steps_are_those_computed_by_hand() {
        close(after(299, 0.5, false), 0.80);
        close(after(300, 0.95, false), 0.80 - 0.02); // 0.5 * 0.04
        close(after(300, 0.985, false), 0.80 - 0.01); // at least
        close(after(300, 0.5, false), 0.80 - 0.05); // at most
        close(after(300, 0.992, false), 0.80); // good enough, not better than 0.995
        close(after(300, 1.0, false), 0.805);
    }

    #[test]
    fn the_range_is_kept_and_frozen_means_unmoved() {
        close(after(9000, 0.5, false), 0.45);
        close(after(9000, 1.0, false), 0.90);
        close(after(9000, 0.5, true), 0.80);
    }

    #[test]
    fn few_requests_move_nothing() {
        let mut trim = Trim::default();
        for tick in 0..100 {
            let now = at(f64::from(tick) * 60.0);
            let mut interval = plain("a", now, 60.0);
            (interval.finished, interval.within_slo) = (Some(5.0), Some(0.0));
            trim.observe(&[interval], now, 60.0);
            close(trim.rho(0.8, 0.99, false, now), 0.8);
        }
    }
}
