//! Demand when groups asked for now would serve, and how wrong such forecasts were.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::counters::{History, SAME_S};
use crate::decision::{Demand, Margins};
use crate::time::Time;

/// Seconds between forecasts that are remembered.
const EVERY_S: f64 = 30.0;
/// Seconds that a forecast is remembered for comparison: more than any horizon that is planned.
const REMEMBER_S: f64 = 3600.0;
/// Seconds of errors that the margin comes from.
const ERRORS_S: f64 = 4.0 * 3600.0;
/// Seconds of errors that there must be; until then the margin is a share of demand.
const ERRORS_NEED_S: f64 = 120.0;
/// That share.
const MARGIN_AT_FIRST: f64 = 0.15;
/// Forecasts of the first seconds are not remembered: demand is not known well yet.
const LEARN_S: f64 = 300.0;

/// What is expected.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Forecast {
    /// Demand in `horizon_s`, in replica-equivalents.
    pub expected: f64,
    /// Rise per second that it counts with.
    pub trend_per_s: f64,
    /// What to add for its errors and for bursts.
    pub margins: Margins,
}

/// Forecasts made and how wrong they were.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forecaster {
    first: Option<Time>,
    history: History,
    /// When a forecast was made, and what was expected.
    made: VecDeque<(Time, f64)>,
    /// When a forecast came due, and by how much demand was above it.
    errors: VecDeque<(Time, f64)>,
}

/// How to forecast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Method {
    /// Seconds ahead: a cold start and 15 s (H).
    pub horizon_s: f64,
    /// Share of a rising trend that is believed (φ).
    pub trend: f64,
    /// Quantile of errors (qtl).
    pub quantile: f64,
    /// Whether the shortest window counts, too.
    pub panic: bool,
}

impl Forecaster {
    /// `F = base + φ max(0, slope) H` with `base = max(D60, D300)`, in a panic D15 too; the
    /// margins are a quantile of `D60(t) - F(t - H)` over four hours and the deviation of
    /// demand in 10 s windows over ten minutes.
    pub fn forecast(&mut self, demand: &Demand, d10: f64, method: &Method, now: Time) -> Forecast {
        let first = *self.first.get_or_insert(now);
        self.history.push(now, d10, demand.d60);
        let mut base = demand.d60.max(demand.d300);
        if method.panic {
            base = base.max(demand.d15);
        }
        let trend_per_s = method.trend * self.history.slope(now).unwrap_or(0.0).max(0.0);
        let expected = base + trend_per_s * method.horizon_s;
        self.judge(demand.d60, method.horizon_s, now);
        let due = self
            .made
            .back()
            .is_none_or(|last| now.since(last.0) >= EVERY_S - SAME_S);
        if due && now.since(first) >= LEARN_S {
            self.made.push_back((now, expected));
        }
        let conformal = self
            .quantile(method.quantile)
            .unwrap_or(MARGIN_AT_FIRST * base);
        let margins = Margins {
            conformal: conformal.max(0.0),
            burst: self.history.deviation(),
        };
        Forecast {
            expected,
            trend_per_s,
            margins,
        }
    }

    /// Compares demand with the forecast made a horizon ago.
    fn judge(&mut self, d60: f64, horizon_s: f64, now: Time) {
        let oldest = now.before(REMEMBER_S.max(2.0 * horizon_s));
        while self.made.front().is_some_and(|made| made.0 < oldest) {
            self.made.pop_front();
        }
        let oldest = now.before(ERRORS_S);
        while self.errors.front().is_some_and(|error| error.0 < oldest) {
            self.errors.pop_front();
        }
        if self
            .errors
            .back()
            .is_some_and(|last| now.since(last.0) < EVERY_S - SAME_S)
        {
            return;
        }
        let then = now.before(horizon_s);
        let made = self.made.iter().rev().find(|made| made.0 <= then);
        if let Some((_, expected)) = made.filter(|made| then.since(made.0) <= EVERY_S) {
            self.errors.push_back((now, d60 - expected));
        }
    }

    fn quantile(&self, quantile: f64) -> Option<f64> {
        let (first, last) = (self.errors.front()?, self.errors.back()?);
        if last.0.since(first.0) < ERRORS_NEED_S {
            return None;
        }
        let mut errors: Vec<f64> = self.errors.iter().map(|error| error.1).collect();
        errors.sort_by(f64::total_cmp);
        // The least error that is not below a share `quantile` of all.
        let below = errors
            .iter()
            .enumerate()
            .find(|(index, _)| (*index as f64 + 1.0) >= quantile * errors.len() as f64);
        below.map(|(_, error)| *error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHOD: Method = Method {
        horizon_s: 315.0,
        trend: 0.5,
        quantile: 0.9,
        panic: false,
    };

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    fn flat(level: f64) -> Demand {
        Demand {
            d15: level,
            d60: level,
            d300: level,
        }
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-6, "{got}, expected {expected}");
    }

    #[test]
    fn flat_demand_is_forecast_flat_and_its_margin_goes_to_zero() {
        let mut forecaster = Forecaster::default();
        for tick in 0..400 {
            let t = f64::from(tick) * 5.0;
            let forecast = forecaster.forecast(&flat(4.0), 4.0, &METHOD, at(t));
            close(forecast.expected, 4.0);
            // Forecasts count from 300 s, come due 315 s later, and two minutes are needed.
            close(
                forecast.margins.conformal,
                if t < 735.0 { 0.6 } else { 0.0 },
            );
            close(forecast.margins.burst, 0.0);
        }
    }

    #[test]
    fn half_of_a_rise_is_believed_and_the_rest_becomes_the_margin() {
        let mut forecaster = Forecaster::default();
        let mut last = Forecast::default();
        for tick in 0..600 {
            let t = f64::from(tick) * 5.0;
            let level = 2.0 + 0.001 * t;
            last = forecaster.forecast(&flat(level), level, &METHOD, at(t));
        }
        let level = 2.0 + 0.001 * 2995.0;
        close(last.trend_per_s, 0.0005);
        close(last.expected, level + 0.0005 * 315.0);
        // Errors are the other half, and all of it for forecasts before 500 s of history.
        assert!(last.margins.conformal >= 0.0005 * 315.0 - 0.001, "{last:?}");
        assert!(last.margins.conformal <= 0.001 * 330.0 + 0.001, "{last:?}");
    }

    #[test]
    fn a_fall_is_not_forecast() {
        let mut forecaster = Forecaster::default();
        for tick in 0..200 {
            let level = 5.0 - 0.004 * f64::from(tick) * 5.0;
            let forecast =
                forecaster.forecast(&flat(level), level, &METHOD, at(f64::from(tick) * 5.0));
            close(forecast.expected, level);
        }
    }

    #[test]
    fn only_a_panic_counts_the_shortest_window() {
        let burst = Demand {
            d15: 9.0,
            d60: 4.0,
            d300: 3.0,
        };
        let of = |panic| {
            let method = Method { panic, ..METHOD };
            Forecaster::default()
                .forecast(&burst, 9.0, &method, at(0.0))
                .expected
        };
        close(of(false), 4.0);
        close(of(true), 9.0);
    }

    #[test]
    fn the_quantile_is_that_of_the_errors() {
        let mut forecaster = Forecaster::default();
        for index in 0..10 {
            forecaster
                .errors
                .push_back((at(f64::from(index) * 30.0), f64::from(9 - index)));
        }
        assert_eq!(forecaster.quantile(0.9), Some(8.0));
        assert_eq!(forecaster.quantile(0.5), Some(4.0));
        assert_eq!(forecaster.quantile(1.0), Some(9.0));
    }
}
