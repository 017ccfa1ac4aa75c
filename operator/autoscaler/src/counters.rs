//! Rates from counters that restart, have gaps or are not there, in bounded memory.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::snapshot::reading;
use crate::time::Time;

/// Two readings closer than this, in seconds, are the same answer seen twice.
pub(crate) const SAME_S: f64 = 0.5;
/// Seconds that a window remembers.
const KEEP_S: f64 = 1800.0;
/// Spans shorter than this, in seconds, are joined.
const JOIN_S: f64 = 4.0;
/// Seconds that must be covered before a rate is believed, for windows that are longer.
const LEAST_S: f64 = 10.0;

/// Growth of a counter between two readings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Increment {
    /// When it ended.
    pub end: Time,
    /// How long it took, in seconds, above 0.
    pub span_s: f64,
    /// By how much it grew, at least 0.
    pub amount: f64,
}

/// A counter: something that only grows until it starts anew.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counter {
    last: Option<(Time, f64)>,
}

impl Counter {
    /// Whether it was ever there.
    pub fn known(&self) -> bool {
        self.last.is_some()
    }

    /// Takes the reading of `at`, and tells growth since the last one that could be counted
    /// with. A gap makes a longer span. A lower value is a restart: growth since then is not
    /// known, and its time counts as not seen. A missing value, NaN and an answer seen before
    /// change nothing.
    pub fn advance(&mut self, at: Time, value: Option<f64>) -> Option<Increment> {
        let value = reading(value)?;
        let Some((before, last)) = self.last else {
            self.last = Some((at, value));
            return None;
        };
        let span_s = at.since(before);
        if span_s < SAME_S {
            return None;
        }
        self.last = Some((at, value));
        (value >= last).then_some(Increment {
            end: at,
            span_s,
            amount: value - last,
        })
    }
}

/// Growth over the last half hour, from which rates over shorter windows are taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// End, length in seconds and amount of each span, oldest first.
    spans: VecDeque<(Time, f64, f64)>,
}

impl Window {
    /// Adds growth. Spans of a few seconds are joined, so that memory is bounded.
    pub fn push(&mut self, increment: Increment) {
        let Increment {
            end,
            span_s,
            amount,
        } = increment;
        match self.spans.back_mut() {
            Some(last) if last.1 + span_s <= JOIN_S && end >= last.0 => {
                *last = (end, last.1 + span_s, last.2 + amount);
            }
            _ => self.spans.push_back((end, span_s, amount)),
        }
        let oldest = end.before(KEEP_S);
        while self.spans.front().is_some_and(|span| span.0 < oldest) {
            self.spans.pop_front();
        }
    }

    /// Adds a value that held for `span_s` seconds; [`Self::rate`] is its mean then.
    pub fn push_value(&mut self, end: Time, span_s: f64, value: f64) {
        if span_s > 0.0 && value.is_finite() {
            self.push(Increment {
                end,
                span_s,
                amount: value * span_s,
            });
        }
    }

    /// What was counted in the last `window_s` seconds, and how many of them were seen.
    pub fn sum(&self, now: Time, window_s: f64) -> (f64, f64) {
        let (mut amount, mut covered) = (0.0, 0.0);
        let begin = now.before(window_s);
        for &(end, span_s, part) in self.spans.iter().rev() {
            let after_begin = end.since(begin);
            if after_begin <= 0.0 {
                break;
            }
            let overlap = span_s.min(after_begin);
            amount += part * overlap / span_s;
            covered += overlap;
        }
        (amount, covered)
    }

    /// Growth per second over the part of the last `window_s` seconds that was seen; `None`
    /// where hardly any was.
    pub fn rate(&self, now: Time, window_s: f64) -> Option<f64> {
        let (amount, covered) = self.sum(now, window_s);
        (covered >= LEAST_S.min(window_s / 2.0)).then(|| (amount / covered).max(0.0))
    }
}

/// Seconds between points of a history.
const POINT_S: f64 = 10.0;
/// Seconds that a history remembers.
const HISTORY_S: f64 = 600.0;
/// Seconds of history that a slope needs: 10 s windows of less would be taken for trends.
const SLOPE_NEEDS_S: f64 = 500.0;
/// Points that a deviation needs.
const DEVIATION_NEEDS: usize = 6;

/// Demand of the last ten minutes: one point each ten seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// When, demand over 10 s and demand over 60 s, oldest first.
    points: VecDeque<(Time, f64, f64)>,
}

impl History {
    /// Adds a point, unless the last one is too near.
    pub fn push(&mut self, now: Time, d10: f64, d60: f64) {
        let near = |last: &(Time, f64, f64)| now.since(last.0) < POINT_S - SAME_S;
        if self.points.back().is_some_and(near) {
            return;
        }
        self.points.push_back((now, d10, d60));
        let oldest = now.before(HISTORY_S);
        while self.points.front().is_some_and(|point| point.0 < oldest) {
            self.points.pop_front();
        }
    }

    /// Least-squares slope of demand over 60 s, per second; `None` with less than 500 s.
    pub fn slope(&self, now: Time) -> Option<f64> {
        let first = self.points.front()?.0;
        if now.since(first) < SLOPE_NEEDS_S {
            return None;
        }
        let count = self.points.len() as f64;
        let at = |point: &(Time, f64, f64)| point.0.since(first);
        let mean_at = self.points.iter().map(at).sum::<f64>() / count;
        let mean = self.points.iter().map(|point| point.2).sum::<f64>() / count;
        let (mut product, mut square) = (0.0, 0.0);
        for point in &self.points {
            let from_mean = at(point) - mean_at;
            product += from_mean * (point.2 - mean);
            square += from_mean * from_mean;
        }
        (square > 0.0).then_some(product / square)
    }

    /// Standard deviation of demand over 10 s, 0 with hardly any.
    pub fn deviation(&self) -> f64 {
        if self.points.len() < DEVIATION_NEEDS {
            return 0.0;
        }
        let count = self.points.len() as f64;
        let mean = self.points.iter().map(|point| point.1).sum::<f64>() / count;
        let square = self
            .points
            .iter()
            .map(|point| (point.1 - mean).powi(2))
            .sum::<f64>();
        (square / count).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got}, expected {expected}");
    }

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    /// Reads `values`, one each five seconds, into a window.
    fn window(values: &[Option<f64>]) -> Window {
        let (mut counter, mut window) = (Counter::default(), Window::default());
        for (tick, value) in values.iter().enumerate() {
            if let Some(increment) = counter.advance(at(tick as f64 * 5.0), *value) {
                window.push(increment);
            }
        }
        window
    }

    #[test]
    fn a_steady_counter_has_its_rate_over_every_window() {
        let values: Vec<_> = (0..61).map(|tick| Some(f64::from(tick) * 50.0)).collect();
        let window = window(&values);
        for seconds in [15.0, 60.0, 300.0] {
            close(window.rate(at(300.0), seconds).unwrap(), 10.0);
        }
    }

    #[test]
    fn a_restart_is_neither_negative_nor_a_burst() {
        // 10 a second; at 30 s the counter starts anew, with 40 that came since.
        let mut values: Vec<_> = (0..6)
            .map(|tick| Some(1e9 + f64::from(tick) * 50.0))
            .collect();
        values.extend((0..7).map(|tick| Some(40.0 + f64::from(tick) * 50.0)));
        let window = window(&values);
        close(window.rate(at(60.0), 60.0).unwrap(), 10.0);
        let (amount, covered) = window.sum(at(60.0), 60.0);
        close(amount, 550.0);
        close(covered, 55.0);
    }

    #[test]
    fn a_gap_is_a_longer_span_and_not_zero() {
        let mut values: Vec<_> = (0..6).map(|tick| Some(f64::from(tick) * 50.0)).collect();
        values.extend([
            None,
            Some(f64::NAN),
            Some(f64::INFINITY),
            Some(-3.0),
            None,
            None,
        ]);
        assert_eq!(
            window(&values).rate(at(55.0), 15.0),
            None,
            "nothing was seen for 30 s"
        );
        close(window(&values).rate(at(55.0), 60.0).unwrap(), 10.0);
        values.push(Some(600.0));
        close(window(&values).rate(at(60.0), 15.0).unwrap(), 10.0);
        close(window(&values).rate(at(60.0), 60.0).unwrap(), 10.0);
    }

    #[test]
    fn a_series_that_is_not_there_has_no_rate() {
        assert_eq!(window(&[None; 40]).rate(at(200.0), 60.0), None);
        let flat = window(&[Some(7.0); 40]);
        close(flat.rate(at(195.0), 60.0).unwrap(), 0.0);
    }

    #[test]
    fn an_answer_seen_twice_counts_once() {
        let mut counter = Counter::default();
        assert_eq!(counter.advance(at(0.0), Some(1.0)), None);
        assert_eq!(counter.advance(at(0.001), Some(1.0)), None);
        assert_eq!(
            counter.advance(at(-20.0), Some(0.0)),
            None,
            "an older answer"
        );
        let increment = counter.advance(at(10.0), Some(21.0)).unwrap();
        close(increment.amount, 20.0);
        close(increment.span_s, 10.0);
    }

    #[test]
    fn memory_is_bounded_whatever_the_tick() {
        let (mut counter, mut window, mut history) =
            (Counter::default(), Window::default(), History::default());
        for tick in 0..40_000 {
            let now = at(f64::from(tick));
            if let Some(increment) = counter.advance(now, Some(f64::from(tick))) {
                window.push(increment);
            }
            history.push(now, 1.0, 1.0);
        }
        assert!(window.spans.len() <= 451, "{}", window.spans.len());
        assert!(history.points.len() <= 62, "{}", history.points.len());
        close(window.rate(at(39_999.0), 60.0).unwrap(), 1.0);
    }

    #[test]
    fn slope_needs_its_history_and_is_exact_on_a_line() {
        let mut history = History::default();
        for tick in 0..=60 {
            let now = at(f64::from(tick) * 10.0);
            history.push(now, 0.0, 2.0 + 0.003 * f64::from(tick) * 10.0);
            let known = history.slope(now);
            assert_eq!(known.is_some(), tick >= 50, "after {tick} points");
            if let Some(slope) = known {
                close(slope, 0.003);
            }
        }
    }

    #[test]
    fn deviation_is_of_ten_second_windows() {
        let mut history = History::default();
        for tick in 0..40 {
            history.push(
                at(f64::from(tick) * 10.0),
                if tick % 2 == 0 { 1.0 } else { 3.0 },
                2.0,
            );
        }
        close(history.deviation(), 1.0);
    }
}
