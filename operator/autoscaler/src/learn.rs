//! Learns what the engine's time goes to, from samples of groups that were busy.
//!
//! Busy-time accounting: a group that was busy all through an interval spent it on
//! `Δt = a Δsteps + b Δprompt + c Δgeneration + d mean(K) Δsteps / 1000`. Recursive least squares
//! finds the four factors by which the prior's coefficients are off.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fleet::Interval;
use crate::model::{Coefficients, Mix, Service};
use crate::time::Time;

/// Seconds after which a group that became ready is learned from: first passes are slow.
const WARM_UP_S: f64 = 120.0;
/// What a sample's weight is multiplied by for each later one.
const FORGETTING: f64 = 0.9998;
/// Variance of a factor before anything was learned.
const PRIOR_VARIANCE: f64 = 0.25;
/// Range of a factor. It keeps coefficients from being negative, too.
const FACTOR: (f64, f64) = (0.25, 4.0);
/// Square of the innovation over its variance above which a sample is refused (0.6 % of good
/// ones: the 99.4 % quantile of χ² with one degree of freedom).
const INNOVATION_GATE: f64 = 7.4;
/// Variance of a sample's relative error: at first, at least and at most. It follows the errors
/// that are seen, those of refused samples too, so that an engine that really became slower is
/// believed after some minutes.
const NOISE: (f64, f64, f64) = (0.0025, 1e-4, 0.05);
/// Weight of the newest error in it.
const NOISE_WEIGHT: f64 = 0.01;
/// By how much a factor may change in a day, once it has settled.
const DAILY: f64 = 0.30;
/// Seconds of a day.
const DAY_S: f64 = 86_400.0;
/// Samples and seconds of learning after which factors have settled.
const SETTLED: (u64, f64) = (500, 3600.0);
/// A group that takes this many times the median for the same work is slow.
const SLOW: f64 = 1.3;
/// Seconds that it must be so.
const SLOW_S: f64 = 300.0;
/// Weight of the newest interval in a group's slowness.
const SLOWNESS_WEIGHT: f64 = 0.2;

/// How much longer a group takes than is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Slowness {
    /// Time taken over time predicted, averaged.
    ratio: f64,
    /// Since when it is far above the median.
    above_since: Option<Time>,
}

/// What was learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Learner {
    /// Factors of a, b, c and d.
    factors: [f64; 4],
    /// Their covariance.
    covariance: [[f64; 4]; 4],
    noise: f64,
    accepted: u64,
    /// When the first sample was accepted.
    first: Option<Time>,
    /// When the day of the daily limit began, and the factors then.
    day: Option<(Time, [f64; 4])>,
    slowness: BTreeMap<String, Slowness>,
}

impl Default for Learner {
    fn default() -> Self {
        let mut covariance = [[0.0; 4]; 4];
        for (row, line) in covariance.iter_mut().enumerate() {
            line[row] = PRIOR_VARIANCE;
        }
        Self {
            factors: [1.0; 4],
            covariance,
            noise: NOISE.0,
            accepted: 0,
            first: None,
            day: None,
            slowness: BTreeMap::new(),
        }
    }
}

impl Learner {
    /// Forgets when things happened, but not what was learned: the clock went back.
    #[must_use]
    pub fn without_times(&self) -> Self {
        Self {
            first: None,
            day: None,
            slowness: BTreeMap::new(),
            ..self.clone()
        }
    }

    /// Takes in what groups did since the last tick. `exists` tells which groups still do.
    pub fn observe(
        &mut self,
        prior: &Coefficients,
        intervals: &[Interval],
        exists: impl Fn(&str) -> bool,
        now: Time,
    ) {
        self.slowness.retain(|id, _| exists(id));
        let rows: Vec<_> = intervals
            .iter()
            .filter_map(|interval| Some((interval, row(prior, interval)?)))
            .collect();
        for (interval, row) in &rows {
            let predicted = dot(row, &self.factors).max(1e-3);
            let slowness = self
                .slowness
                .entry(interval.id.clone())
                .or_insert(Slowness {
                    ratio: 1.0 / predicted,
                    above_since: None,
                });
            slowness.ratio += SLOWNESS_WEIGHT * (1.0 / predicted - slowness.ratio);
        }
        self.mark_slow(now);
        for (interval, row) in &rows {
            let suspect = self
                .slowness
                .get(&interval.id)
                .is_some_and(|s| s.above_since.is_some());
            if !suspect {
                self.update(row, now);
            }
        }
    }

    /// The prior's coefficients times what was learned.
    pub fn coefficients(&self, prior: &Coefficients) -> Coefficients {
        Coefficients {
            step_ms: prior.step_ms * self.factors[0],
            prompt_token_ms: prior.prompt_token_ms * self.factors[1],
            sequence_ms: prior.sequence_ms * self.factors[2],
            kv_kilotoken_ms: prior.kv_kilotoken_ms * self.factors[3],
        }
    }

    /// Whether anything was learned.
    pub fn learned(&self) -> bool {
        self.accepted > 0
    }

    /// How sure the time of an iteration at capacity is: 0 at the prior's variance, near 1 when
    /// the factors are known in the direction that counts.
    pub fn confidence(&self, prior: &Coefficients, service: &Service, mix: &Mix) -> f64 {
        let sequences = service.sequences;
        let parts = [
            prior.step_ms,
            prior.prompt_token_ms * sequences * mix.computed_prompt() / mix.output.max(1.0),
            prior.sequence_ms * sequences,
            prior.kv_kilotoken_ms * sequences * mix.context() / 1000.0,
        ];
        let before = PRIOR_VARIANCE * dot(&parts, &parts);
        let now = dot(&parts, &times(&self.covariance, &parts));
        (1.0 - (now / before).max(0.0).sqrt()).clamp(0.0, 1.0)
    }

    /// Groups that have been slow for five minutes.
    pub fn slow(&self, now: Time) -> Vec<String> {
        let slow = |s: &Slowness| {
            s.above_since
                .is_some_and(|since| now.since(since) >= SLOW_S)
        };
        self.slowness
            .iter()
            .filter(|(_, s)| slow(s))
            .map(|(id, _)| id.clone())
            .collect()
    }

    fn mark_slow(&mut self, now: Time) {
        let mut ratios: Vec<f64> = self.slowness.values().map(|s| s.ratio).collect();
        ratios.sort_by(f64::total_cmp);
        // Of two groups the faster is the measure; one alone has none.
        let Some(median) = ratios.len().checked_sub(1).map(|last| ratios[last / 2]) else {
            return;
        };
        for slowness in self.slowness.values_mut() {
            if slowness.ratio > SLOW * median {
                slowness.above_since.get_or_insert(now);
            } else {
                slowness.above_since = None;
            }
        }
    }

    /// One step of recursive least squares on `row · factors = 1`.
    fn update(&mut self, row: &[f64; 4], now: Time) {
        let error = 1.0 - dot(row, &self.factors);
        let toward = times(&self.covariance, row);
        let spread = dot(row, &toward);
        let variance = spread + self.noise;
        let innovation = error * error / variance;
        let seen = error * error;
        let clipped = seen.min(INNOVATION_GATE * variance);
        self.noise += NOISE_WEIGHT * (clipped - self.noise);
        self.noise = self.noise.clamp(NOISE.1, NOISE.2);
        if innovation > INNOVATION_GATE || !innovation.is_finite() {
            return;
        }
        let weight = FORGETTING * self.noise + spread;
        let limits = self.limits(now);
        for (index, factor) in self.factors.iter_mut().enumerate() {
            let (least, most) = limits[index];
            *factor = (*factor + toward[index] / weight * error)
                .max(least)
                .min(most);
        }
        for (line, left) in self.covariance.iter_mut().zip(toward) {
            for (cell, right) in line.iter_mut().zip(toward) {
                *cell -= left * right / weight;
            }
        }
        // Forgetting must not make anything less sure than the prior.
        let widest = (0..4).map(|i| self.covariance[i][i]).fold(0.0, f64::max);
        if widest / FORGETTING <= PRIOR_VARIANCE {
            self.covariance
                .iter_mut()
                .flatten()
                .for_each(|cell| *cell /= FORGETTING);
        }
        self.accepted += 1;
        self.first.get_or_insert(now);
    }

    /// The range of each factor: the whole one, and once settled 30 % around the day's first.
    fn limits(&mut self, now: Time) -> [(f64, f64); 4] {
        let settled = self.accepted >= SETTLED.0
            && self
                .first
                .is_some_and(|first| now.since(first) >= SETTLED.1);
        if settled && self.day.is_none_or(|(begin, _)| now.since(begin) >= DAY_S) {
            self.day = Some((now, self.factors));
        }
        let mut limits = [FACTOR; 4];
        if let Some((_, begin)) = self.day {
            for (limit, factor) in limits.iter_mut().zip(begin) {
                limit.0 = limit.0.max(factor * (1.0 - DAILY));
                limit.1 = limit.1.min(factor * (1.0 + DAILY));
            }
        }
        limits
    }
}

/// The interval's parts by the prior, each over the time that it took, if it can be learned from.
fn row(prior: &Coefficients, interval: &Interval) -> Option<[f64; 4]> {
    let warm = interval.end.since(interval.ready_since?) > WARM_UP_S + interval.span_s;
    let busy = interval.running.0 > 0.0 && interval.running.1 > 0.0;
    let steps = interval.steps.filter(|steps| *steps > 0.0)?;
    let calm = interval.preemptions? <= 0.0;
    if !(warm && busy && calm) {
        return None;
    }
    let took_ms = interval.span_s * 1000.0;
    let computed = interval.prompt - interval.cached;
    let row = [
        prior.step_ms * steps / took_ms,
        prior.prompt_token_ms * computed / took_ms,
        prior.sequence_ms * interval.generation / took_ms,
        prior.kv_kilotoken_ms * interval.kv_tokens? * steps / 1000.0 / took_ms,
    ];
    // Whatever the factors, they could not explain this: it was idle, or counts are wrong.
    let sum: f64 = row.iter().sum();
    (sum * FACTOR.1 > 1.0 && sum * FACTOR.0 < 1.0).then_some(row)
}

fn dot(left: &[f64; 4], right: &[f64; 4]) -> f64 {
    left.iter().zip(right).map(|(l, r)| l * r).sum()
}

fn times(matrix: &[[f64; 4]; 4], vector: &[f64; 4]) -> [f64; 4] {
    matrix.map(|line| dot(&line, vector))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LLAMA_405B_TP8, Slo};

    const PRIOR: Coefficients = LLAMA_405B_TP8.coefficients;
    const CHAT: Mix = Mix {
        prompt: 1155.0,
        output: 211.0,
        cache_hit: 0.0,
    };

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    /// Five seconds of a group with `sequences` in its batch, at `truth` times `slower`.
    fn interval(id: &str, t: f64, truth: &Coefficients, sequences: f64, slower: f64) -> Interval {
        let prompt = sequences * CHAT.prompt / CHAT.output;
        let kv = sequences * CHAT.context();
        let step_ms = slower
            * (truth.step_ms
                + truth.prompt_token_ms * prompt
                + truth.sequence_ms * sequences
                + truth.kv_kilotoken_ms * kv / 1000.0);
        let steps = 5000.0 / step_ms;
        Interval {
            id: id.into(),
            end: at(t),
            span_s: 5.0,
            ready_since: Some(at(0.0)),
            steps: Some(steps),
            prompt: prompt * steps,
            cached: 0.0,
            generation: sequences * steps,
            finished: Some(sequences * steps / CHAT.output),
            within_slo: None,
            preemptions: Some(0.0),
            running: (sequences, sequences),
            arrived: None,
            arrived_prompt: 0.0,
            kv_tokens: Some(kv),
        }
    }

    fn capacity(coefficients: &Coefficients) -> f64 {
        let slo = Slo {
            ttft_s: 6.0,
            itl_ms: 175.0,
        };
        Service::new(coefficients, &LLAMA_405B_TP8.limits, &slo, &CHAT).requests_per_s
    }

    /// A load that goes up and down between 10 and 130 sequences, with 2 % of noise.
    fn load(tick: u32) -> (f64, f64) {
        let wave = (f64::from(tick) / 60.0).sin();
        let noise = f64::from((tick * 7919) % 101) / 100.0 - 0.5;
        (70.0 + 60.0 * wave, 1.0 + 0.04 * noise)
    }

    fn learn(learner: &mut Learner, truth: &Coefficients, ticks: std::ops::Range<u32>) {
        for tick in ticks {
            let (sequences, noise) = load(tick);
            let t = 200.0 + f64::from(tick) * 5.0;
            let interval = interval("a", t, truth, sequences, noise);
            learner.observe(&PRIOR, &[interval], |_| true, at(t));
        }
    }

    #[test]
    fn wrong_priors_are_learned_away() {
        for factor in [0.7_f64, 1.4] {
            let truth = Coefficients {
                step_ms: PRIOR.step_ms * factor.sqrt(),
                prompt_token_ms: PRIOR.prompt_token_ms * factor,
                sequence_ms: PRIOR.sequence_ms * factor,
                kv_kilotoken_ms: PRIOR.kv_kilotoken_ms / factor,
            };
            let mut learner = Learner::default();
            let off = capacity(&PRIOR) / capacity(&truth) - 1.0;
            assert!(off.abs() > 0.25, "the prior is {off} off to begin with");
            learn(&mut learner, &truth, 0..720);
            let off = capacity(&learner.coefficients(&PRIOR)) / capacity(&truth) - 1.0;
            assert!(
                off.abs() < 0.03,
                "{off} off after an hour with factor {factor}"
            );
            let slo = Slo {
                ttft_s: 6.0,
                itl_ms: 175.0,
            };
            let service = Service::new(&truth, &LLAMA_405B_TP8.limits, &slo, &CHAT);
            let confidence = learner.confidence(&PRIOR, &service, &CHAT);
            assert!(confidence > 0.8, "{confidence}");
            assert!(Learner::default().confidence(&PRIOR, &service, &CHAT).abs() < 1e-9);
        }
    }

    #[test]
    fn gates_keep_bad_samples_out() {
        let good = interval("a", 200.0, &PRIOR, 50.0, 1.2);
        let learned = |change: &dyn Fn(&mut Interval)| {
            let mut learner = Learner::default();
            let mut interval = good.clone();
            change(&mut interval);
            learner.observe(&PRIOR, &[interval], |_| true, at(200.0));
            learner.learned()
        };
        assert!(learned(&|_| ()));
        assert!(!learned(&|i| i.ready_since = Some(at(90.0))), "warm-up");
        assert!(!learned(&|i| i.ready_since = None), "draining");
        assert!(!learned(&|i| i.preemptions = Some(1.0)));
        assert!(!learned(&|i| i.preemptions = None));
        assert!(!learned(&|i| i.running = (50.0, 0.0)), "idle at the end");
        assert!(!learned(&|i| i.steps = Some(0.0)));
        assert!(!learned(&|i| i.kv_tokens = None));
        assert!(
            !learned(&|i| i.steps = Some(1e9)),
            "an impossible innovation"
        );
    }

    #[test]
    fn one_wild_sample_moves_nothing_once_settled() {
        let mut learner = Learner::default();
        learn(&mut learner, &PRIOR, 0..400);
        let before = learner.factors;
        let wild = interval("a", 2500.0, &PRIOR, 60.0, 2.0);
        learner.observe(&PRIOR, &[wild], |_| true, at(2500.0));
        let moved = learner
            .factors
            .iter()
            .zip(before)
            .map(|(is, was)| (is - was).abs())
            .sum::<f64>();
        assert!(moved < 1e-12, "{moved}");
    }

    #[test]
    fn factors_stay_in_range_and_change_by_at_most_a_third_a_day_once_settled() {
        let mut learner = Learner::default();
        learn(&mut learner, &PRIOR, 0..900);
        let settled = learner.factors;
        let scale = |by: f64| Coefficients {
            step_ms: PRIOR.step_ms * by,
            prompt_token_ms: PRIOR.prompt_token_ms * by,
            sequence_ms: PRIOR.sequence_ms * by,
            kv_kilotoken_ms: PRIOR.kv_kilotoken_ms * by,
        };
        learn(&mut learner, &scale(8.0), 900..2900);
        for (factor, was) in learner.factors.iter().zip(settled) {
            assert!(
                *factor <= was * 1.31 && *factor >= was * 0.69,
                "{factor} from {was}"
            );
        }
        let mut anew = Learner::default();
        learn(&mut anew, &scale(8.0), 0..720);
        assert!(
            anew.factors
                .iter()
                .all(|factor| (0.25..=4.0).contains(factor))
        );
    }

    #[test]
    fn a_slow_group_is_named_after_five_minutes_and_not_learned_from() {
        let mut learner = Learner::default();
        for tick in 0..200_u32 {
            let t = 200.0 + f64::from(tick) * 5.0;
            let (sequences, noise) = load(tick);
            let slower = |id: &str| if id == "c" && t >= 500.0 { 1.4 } else { 1.0 };
            let intervals: Vec<_> = ["a", "b", "c"]
                .iter()
                .map(|id| interval(id, t, &PRIOR, sequences, noise * slower(id)))
                .collect();
            learner.observe(&PRIOR, &intervals, |_| true, at(t));
            let slow = learner.slow(at(t));
            assert!(slow.is_empty() || t >= 800.0, "{slow:?} at {t}");
        }
        assert_eq!(learner.slow(at(1195.0)), ["c"]);
        let off = capacity(&learner.coefficients(&PRIOR)) / capacity(&PRIOR) - 1.0;
        assert!(off.abs() < 0.04, "{off}");
        learner.observe(&PRIOR, &[], |id| id != "c", at(1200.0));
        assert!(learner.slow(at(1200.0)).is_empty(), "it is gone");
    }
}
