//! The two ends: one that never scales, and one that knows what is to come.

use super::{Decision, Observation, Policy, ceil_ratio};
use crate::count;
use crate::engine::Config;
use crate::trace::Trace;

/// A fixed number of groups.
#[derive(Clone, Debug)]
pub struct Static {
    groups: usize,
}

impl Static {
    const WINDOW_SECONDS: f64 = 60.0;

    /// Groups for this share of the greatest minute's work.
    pub fn new(share: f64, trace: &Trace, config: &Config) -> Self {
        let peak = config
            .work_by_window(trace, Self::WINDOW_SECONDS)
            .into_iter()
            .fold(0.0, f64::max);
        let groups = count::ceil(share * peak / Self::WINDOW_SECONDS);
        Self {
            groups: groups.clamp(config.min_groups, config.max_groups),
        }
    }

    /// How many there are.
    pub fn groups(&self) -> usize {
        self.groups
    }
}

impl Policy for Static {
    fn period_seconds(&self) -> f64 {
        60.0
    }

    fn decide(&mut self, _: &Observation) -> Decision {
        Decision::replicas(self.groups)
    }
}

/// Knows the work that arrives until what it starts now is ready, and two
/// minutes more. A reference, not an optimum.
#[derive(Clone, Debug)]
pub struct Oracle {
    windows: Vec<f64>,
    utilisation: f64,
    horizon_seconds: f64,
}

impl Oracle {
    const WINDOW_SECONDS: f64 = 20.0;
    const BEYOND_COLD_START_SECONDS: f64 = 120.0;

    /// Groups for the greatest window's work at this utilisation.
    pub fn new(utilisation: f64, trace: &Trace, config: &Config) -> Self {
        Self {
            windows: config.work_by_window(trace, Self::WINDOW_SECONDS),
            utilisation,
            horizon_seconds: config.cold_start_seconds + Self::BEYOND_COLD_START_SECONDS,
        }
    }
}

impl Policy for Oracle {
    fn period_seconds(&self) -> f64 {
        Self::WINDOW_SECONDS
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        let now = observation.now_seconds;
        let first = count::index(now / Self::WINDOW_SECONDS);
        let last = count::index((now + self.horizon_seconds) / Self::WINDOW_SECONDS);
        let work = self
            .windows
            .iter()
            .take(last + 1)
            .skip(first)
            .copied()
            .fold(0.0, f64::max);
        Decision::replicas(ceil_ratio(work, Self::WINDOW_SECONDS * self.utilisation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ServingModel, SloLevel};
    use crate::trace::Request;

    fn config() -> Config {
        let model = ServingModel::llama_405b_tp8();
        let slo = model.slo(SloLevel::Standard);
        Config::new(model, slo)
    }

    /// At one moment `count` requests of 1155 and 211 tokens: 4.9 a group and second.
    fn at(seconds: f64, count: usize) -> Vec<Request> {
        vec![
            Request {
                arrival_seconds: seconds,
                input: 1155,
                cached: 0,
                output: 211
            };
            count
        ]
    }

    #[test]
    fn the_oracle_looks_a_cold_start_and_two_minutes_ahead() {
        let requests = [at(0.0, 10), at(1000.0, 900)].concat();
        let trace = Trace { requests };
        let mut oracle = Oracle::new(0.8, &trace, &config());
        let mut decide = |now_seconds| {
            oracle
                .decide(&Observation {
                    now_seconds,
                    ..Observation::default()
                })
                .replicas
        };
        assert_eq!(decide(100.0), 0);
        assert_eq!(decide(560.0), 0);
        // 900 requests in 20 s are 45 a second: over 5.048·0.8, 12 groups.
        assert_eq!(decide(580.0), 12);
        assert_eq!(decide(1000.0), 12);
        assert_eq!(decide(1020.0), 0);
    }

    #[test]
    fn static_is_a_share_of_the_greatest_minute() {
        let requests = [at(0.0, 10), at(70.0, 1500)].concat();
        let trace = Trace { requests };
        // 25 a second over 5.048.
        assert_eq!(Static::new(1.0, &trace, &config()).groups(), 5);
        assert_eq!(Static::new(0.6, &trace, &config()).groups(), 3);
    }
}
