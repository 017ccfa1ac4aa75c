//! The project's own autoscaler, the code itself.

use llama_autoscaler::decide::{State, decide};
use llama_autoscaler::model::{Coefficients, Limits, Slo};
use llama_autoscaler::settings::{Settings, SettingsError};
use llama_autoscaler::snapshot::{self, Gateway, Sample, Snapshot};
use llama_autoscaler::time::Time;

use super::{Decision, GroupObservation, Observation, Phase, Policy};
use crate::engine::Config;

/// Simulated time starts an hour after the epoch: groups of the start are no
/// older than it.
const EPOCH_SECONDS: f64 = 3600.0;

/// Decides from token work with the autoscaler's defaults. It knows the
/// model's coefficients and the median cold start, nothing of the trace.
#[derive(Debug)]
pub struct Token {
    settings: Settings,
    state: State,
}

impl Token {
    /// For this share of requests within the SLO.
    pub fn new(slo_target: f64, config: &Config) -> Result<Self, SettingsError> {
        let model = &config.model;
        let count = |groups: usize| u32::try_from(groups).unwrap_or(u32::MAX);
        let settings = Settings {
            min: count(config.min_groups),
            max: count(config.max_groups),
            gpus_per_group: model.gpus,
            prior: Coefficients {
                step_ms: model.step_ms,
                prompt_token_ms: model.prompt_token_ms,
                sequence_ms: model.sequence_ms,
                kv_kilotoken_ms: model.kilotoken_ms,
            },
            limits: Limits {
                kv_tokens: model.kv_tokens as f64,
                sequences: model.max_sequences as f64,
                step_tokens: model.chunk_tokens as f64,
            },
            slo: Slo {
                ttft_s: config.slo.ttft_seconds,
                itl_ms: config.slo.tpot_seconds * 1000.0,
            },
            // Starting at once is no start of 0 s to it.
            cold_start_s: config.cold_start_seconds.max(1.0),
            slo_target,
            ..Settings::default()
        };
        settings.check()?;
        Ok(Self {
            settings,
            state: State::default(),
        })
    }
}

fn time(seconds: f64) -> Time {
    Time::from_secs(EPOCH_SECONDS + seconds)
}

fn group(group: &GroupObservation, age_s: f64) -> snapshot::Group {
    let total = |value: u64| Some(value as f64);
    snapshot::Group {
        id: group.id.to_string(),
        phase: match group.phase {
            Phase::Starting => snapshot::Phase::Starting {
                since: time(group.created_seconds),
                eta_s: None,
            },
            Phase::Ready => snapshot::Phase::Ready {
                since: time(group.ready_seconds.unwrap_or(group.created_seconds)),
            },
            Phase::Draining => snapshot::Phase::Draining,
        },
        pending: false,
        sample: group.metrics.map(|metrics| Sample {
            age_s,
            steps_total: total(metrics.steps_total),
            prompt_tokens_total: total(metrics.prompt_tokens_total + metrics.cached_tokens_total),
            cached_tokens_total: total(metrics.cached_tokens_total),
            generation_tokens_total: total(metrics.generation_tokens_total),
            running: total(metrics.running),
            waiting: total(metrics.waiting),
            waiting_tokens: total(metrics.waiting_tokens),
            kv_tokens_used: total(metrics.kv_tokens_used),
            preemptions_total: total(metrics.preemptions_total),
            finished_total: total(metrics.finished_total),
            finished_within_slo_total: total(metrics.finished_within_slo_total),
        }),
    }
}

fn snapshot(observation: &Observation) -> Snapshot {
    let age_s = observation.now_seconds - observation.scraped_seconds;
    Snapshot {
        groups: observation
            .groups
            .iter()
            .map(|seen| group(seen, age_s))
            .collect(),
        gateway: observation.gateway.map(|metrics| Gateway {
            age_s,
            requests_total: Some(metrics.requests_total as f64),
            prompt_tokens_total: Some(metrics.prompt_tokens_total as f64),
            held: Some(metrics.held as f64),
            held_tokens: Some(metrics.held_tokens as f64),
            oldest_held_s: metrics.oldest_held_seconds,
        }),
        free_groups: None,
        floor: 0,
        engine: String::new(),
    }
}

impl Policy for Token {
    /// The autoscaler's tick.
    fn period_seconds(&self) -> f64 {
        5.0
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        let now = time(observation.now_seconds);
        let (state, decision) = decide(&self.settings, &self.state, &snapshot(observation), now);
        self.state = state;
        Decision {
            replicas: usize::try_from(decision.desired).unwrap_or(usize::MAX),
            take_back_draining: true,
            cancel_at_most: usize::try_from(decision.actions.cancel).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ServingModel, SloLevel};
    use crate::policy::{GatewayMetrics, GroupMetrics};

    fn config() -> Config {
        let model = ServingModel::llama_405b_tp8();
        let slo = model.slo(SloLevel::Standard);
        Config::new(model, slo)
    }

    #[test]
    fn what_is_seen_is_passed_on() {
        let seen = Observation {
            now_seconds: 100.0,
            scraped_seconds: 85.0,
            groups: vec![GroupObservation {
                id: 7,
                phase: Phase::Ready,
                created_seconds: 10.0,
                ready_seconds: Some(60.0),
                metrics: Some(GroupMetrics {
                    prompt_tokens_total: 100,
                    cached_tokens_total: 900,
                    ..GroupMetrics::default()
                }),
            }],
            gateway: Some(GatewayMetrics {
                held: 3,
                ..GatewayMetrics::default()
            }),
            replicas: 1,
        };
        let passed = snapshot(&seen);
        let sample = passed.groups[0].sample.unwrap();
        assert_eq!(
            passed.groups[0].phase,
            snapshot::Phase::Ready { since: time(60.0) }
        );
        assert_eq!(sample.prompt_tokens_total, Some(1000.0));
        assert_eq!(sample.cached_tokens_total, Some(900.0));
        assert!((sample.age_s - 15.0).abs() < 1e-9);
        assert_eq!(passed.gateway.unwrap().held, Some(3.0));
        assert_eq!(
            snapshot(&Observation {
                gateway: None,
                ..seen
            })
            .gateway,
            None
        );
    }

    #[test]
    fn a_share_above_one_is_refused() {
        assert!(Token::new(0.99, &config()).is_ok());
        let error = Token::new(1.5, &config()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sloTarget is 1.5, expected a number above 0 and at most 1"
        );
    }
}
