//! The arithmetic of the Kubernetes `HorizontalPodAutoscaler` v2.

use std::collections::VecDeque;

use super::{Decision, Observation, Phase, Policy, ceil_ratio};
use crate::count;

/// Seconds between two decisions.
pub(super) const SYNC_SECONDS: f64 = 15.0;

/// Tolerance, stabilisation and rates, with the defaults of Kubernetes.
#[derive(Clone, Debug)]
pub struct HpaCore {
    min: usize,
    max: usize,
    recommendations: VecDeque<(f64, usize)>,
    /// Groups added and removed, with the time.
    added: VecDeque<(f64, usize)>,
    removed: VecDeque<(f64, usize)>,
}

/// The answers to a Pods metric.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodsMetric {
    /// Of the ready pods that have it.
    pub values: Vec<f64>,
    /// Pods that run and have none: such as those that load a model.
    pub missing: usize,
    /// Pods that are pending.
    pub ignored: usize,
}

impl HpaCore {
    const TOLERANCE: f64 = 0.1;
    const DOWN_STABILISATION_SECONDS: f64 = 300.0;
    const POLICY_SECONDS: f64 = 15.0;
    const UP_PODS: usize = 4;
    const UP_FACTOR: usize = 2;

    /// Without recommendations yet: its first decision records the replicas.
    pub fn new(min: usize, max: usize) -> Self {
        Self {
            min,
            max,
            recommendations: VecDeque::new(),
            added: VecDeque::new(),
            removed: VecDeque::new(),
        }
    }

    fn within_tolerance(ratio: f64) -> bool {
        // Written so that 11 for 10 is within, as it is there: 1 - 1.1 is not quite -0.1.
        (1.0 - Self::TOLERANCE..=1.0 + Self::TOLERANCE).contains(&ratio)
    }

    /// External or Object metric, `AverageValue`: absolute, whatever is ready.
    pub fn average_value(sum: f64, target: f64, replicas: usize) -> usize {
        if Self::within_tolerance(sum / (target * replicas as f64)) {
            replicas
        } else {
            ceil_ratio(sum, target)
        }
    }

    /// External or Object metric, Value: relative to what is ready, so that
    /// it compounds while what it started is not ready.
    pub fn value(value: f64, target: f64, ready: usize, replicas: usize) -> usize {
        let ratio = value / target;
        if replicas == 0 {
            count::ceil(ratio)
        } else if Self::within_tolerance(ratio) {
            replicas
        } else {
            ceil_ratio(ratio * ready as f64, 1.0)
        }
    }

    /// Pods metric. None without any answer.
    pub fn pods(metric: &PodsMetric, target: f64, replicas: usize) -> Option<usize> {
        let ready = metric.values.len();
        if ready == 0 {
            return None;
        }
        let sum: f64 = metric.values.iter().sum();
        let ratio = sum / ready as f64 / target;
        let pending = if ratio > 1.0 { metric.ignored } else { 0 };
        if pending == 0 && metric.missing == 0 {
            return Some(if Self::within_tolerance(ratio) {
                replicas
            } else {
                count::ceil(ratio * ready as f64)
            });
        }
        // What is missing counts against the change: as nothing on the way
        // up, as on target on the way down.
        let assumed = if ratio < 1.0 {
            metric.missing as f64 * target
        } else {
            0.0
        };
        let pods = (ready + metric.missing + pending) as f64;
        let new_ratio = (sum + assumed) / pods / target;
        let turned = (ratio < 1.0) != (new_ratio < 1.0);
        if Self::within_tolerance(new_ratio) || turned {
            return Some(replicas);
        }
        let wanted = count::ceil(new_ratio * pods);
        let against = if new_ratio < 1.0 {
            wanted > replicas
        } else {
            wanted < replicas
        };
        Some(if against { replicas } else { wanted })
    }

    /// What is done of a recommendation; none is an invalid metric, which
    /// changes nothing.
    pub fn apply(&mut self, now: f64, replicas: usize, desired: Option<usize>) -> usize {
        if self.recommendations.is_empty() {
            self.recommendations.push_back((now, replicas));
        }
        let Some(desired) = desired else {
            return replicas;
        };
        let stabilised = self.stabilise(now, replicas, desired);
        let wanted = self
            .limit(now, replicas, stabilised)
            .clamp(self.min, self.max);
        if wanted > replicas {
            self.added.push_back((now, wanted - replicas));
        } else if wanted < replicas {
            self.removed.push_back((now, replicas - wanted));
        }
        wanted
    }

    /// Going down, the greatest recommendation of the last five minutes.
    fn stabilise(&mut self, now: f64, replicas: usize, desired: usize) -> usize {
        let oldest = now - Self::DOWN_STABILISATION_SECONDS;
        while self
            .recommendations
            .front()
            .is_some_and(|(at, _)| *at < oldest)
        {
            self.recommendations.pop_front();
        }
        self.recommendations.push_back((now, desired));
        let greatest = self
            .recommendations
            .iter()
            .map(|(_, wanted)| *wanted)
            .max()
            .unwrap_or(desired);
        if desired > replicas {
            desired
        } else {
            replicas.min(greatest)
        }
    }

    /// At most four groups or as many again in 15 s, whichever is more; down
    /// as far as wanted.
    fn limit(&mut self, now: f64, replicas: usize, wanted: usize) -> usize {
        let recent = |changes: &mut VecDeque<(f64, usize)>| {
            while changes
                .front()
                .is_some_and(|(at, _)| *at <= now - Self::POLICY_SECONDS)
            {
                changes.pop_front();
            }
            changes.iter().map(|(_, change)| *change).sum::<usize>()
        };
        let added = recent(&mut self.added);
        let removed = recent(&mut self.removed);
        if wanted > replicas {
            let start = (replicas + removed).saturating_sub(added);
            let most = (start + Self::UP_PODS).max(start * Self::UP_FACTOR);
            wanted.min(most.max(replicas))
        } else {
            wanted
        }
    }
}

/// Counters of tokens at one scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenTotals {
    at_seconds: f64,
    prompts: u64,
    /// By group, in the order of their numbers.
    answers: Vec<(u64, u64)>,
}

/// Where an HPA's number comes from.
#[derive(Clone, Debug)]
pub enum HpaMetric {
    /// Prompt tokens that arrive at the gateway and answer tokens of the
    /// groups, a second, as an External metric with `AverageValue`.
    Tokens {
        /// Tokens a second and group.
        target: f64,
        /// Totals of the last minute.
        history: VecDeque<TokenTotals>,
    },
    /// Used share of the KV cache, as a Pods metric.
    KvShare {
        /// Mean share.
        target: f64,
        /// Tokens of a group's cache.
        kv_tokens: u64,
    },
    /// Waiting requests of groups and gateway, External with `AverageValue`.
    WaitingAverage {
        /// Requests a group.
        target: f64,
    },
    /// The same with Value.
    WaitingValue {
        /// Requests in all.
        target: f64,
    },
    /// Running and waiting requests of groups and gateway, `AverageValue`.
    InFlightAverage {
        /// Requests a group.
        target: f64,
    },
}

/// Waiting requests of the groups and at the gateway.
fn waiting(observation: &Observation) -> Option<f64> {
    let held = observation.gateway?.held as f64;
    Some(observation.sum(|metrics| metrics.waiting).unwrap_or(0.0) + held)
}

/// Running and waiting requests of the groups, and those at the gateway.
pub(super) fn in_flight(observation: &Observation) -> Option<f64> {
    let held = observation.gateway?.held as f64;
    let groups = observation.sum(|metrics| metrics.running + metrics.waiting);
    Some(groups.unwrap_or(0.0) + held)
}

impl HpaMetric {
    const RATE_SECONDS: f64 = 60.0;

    /// Tokens a second and group.
    pub fn tokens(target: f64) -> Self {
        Self::Tokens {
            target,
            history: VecDeque::new(),
        }
    }

    /// The number of replicas that it asks for; none while it is unknown.
    fn desired(&mut self, observation: &Observation) -> Option<usize> {
        let replicas = observation.replicas;
        match self {
            Self::Tokens { target, history } => {
                let rate = token_rate(history, observation)?;
                Some(HpaCore::average_value(rate, *target, replicas))
            }
            Self::KvShare { target, kv_tokens } => {
                HpaCore::pods(&kv_shares(observation, *kv_tokens), *target, replicas)
            }
            Self::WaitingAverage { target } => Some(HpaCore::average_value(
                waiting(observation)?,
                *target,
                replicas,
            )),
            Self::WaitingValue { target } => {
                let ready = observation.count(Phase::Ready);
                Some(HpaCore::value(
                    waiting(observation)?,
                    *target,
                    ready,
                    replicas,
                ))
            }
            Self::InFlightAverage { target } => Some(HpaCore::average_value(
                in_flight(observation)?,
                *target,
                replicas,
            )),
        }
    }
}

fn kv_shares(observation: &Observation, kv_tokens: u64) -> PodsMetric {
    let mut metric = PodsMetric::default();
    // Pods that are being deleted do not count.
    for group in observation
        .groups
        .iter()
        .filter(|group| group.phase != Phase::Draining)
    {
        match group.metrics {
            Some(metrics) => {
                metric
                    .values
                    .push(metrics.kv_tokens_used as f64 / kv_tokens as f64);
            }
            None => metric.missing += 1,
        }
    }
    metric
}

/// Tokens a second since about a minute ago. A group's share begins with its
/// second scrape, and ends with its last.
fn token_rate(history: &mut VecDeque<TokenTotals>, observation: &Observation) -> Option<f64> {
    let now = TokenTotals {
        at_seconds: observation.scraped_seconds,
        prompts: observation.gateway?.prompt_tokens_total,
        answers: observation
            .groups
            .iter()
            .filter_map(|group| Some((group.id, group.metrics?.generation_tokens_total)))
            .collect(),
    };
    let oldest = now.at_seconds - HpaMetric::RATE_SECONDS;
    while history
        .get(1)
        .is_some_and(|second| second.at_seconds <= oldest)
    {
        history.pop_front();
    }
    let rate = history
        .front()
        .filter(|then| then.at_seconds < now.at_seconds)
        .map(|then| {
            let before = |id: &u64| {
                // A counter that is new began at nothing.
                let at = then.answers.binary_search_by_key(id, |(id, _)| *id);
                at.map_or(0, |at| then.answers[at].1)
            };
            let answered: u64 = now
                .answers
                .iter()
                .map(|(id, total)| total.saturating_sub(before(id)))
                .sum();
            let tokens = now.prompts.saturating_sub(then.prompts) + answered;
            tokens as f64 / (now.at_seconds - then.at_seconds)
        });
    history.push_back(now);
    rate
}

/// An HPA with one metric.
#[derive(Clone, Debug)]
pub struct Hpa {
    core: HpaCore,
    metric: HpaMetric,
}

impl Hpa {
    /// With the defaults of Kubernetes.
    pub fn new(core: HpaCore, metric: HpaMetric) -> Self {
        Self { core, metric }
    }
}

impl Policy for Hpa {
    fn period_seconds(&self) -> f64 {
        SYNC_SECONDS
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        let desired = self.metric.desired(observation);
        let replicas = self
            .core
            .apply(observation.now_seconds, observation.replicas, desired);
        Decision::replicas(replicas)
    }
}

#[cfg(test)]
mod tests;
