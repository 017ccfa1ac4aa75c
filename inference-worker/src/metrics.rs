//! Metrics of a worker pod. Names begin with `llama_`; those that dashboards of
//! this field already know begin with `vllm:` and mean what they mean there.

mod engine;
mod lately;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use llama_contract::AnswersReport;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use self::engine::EngineMetrics;
use self::lately::Lately;
use crate::engine::EngineStats;
use crate::openai::ApiError;
use crate::scheduler::Finish;

/// Content type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds; from one cached token to a long prompt on a busy machine.
const TTFT_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0,
];
const ITL_BUCKETS: [f64; 12] = [
    0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 1.0, 4.0,
];
const LATENCY_BUCKETS: [f64; 12] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabels {
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RankLabels {
    rank: u32,
}

/// All metrics of one pod.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rendering: Mutex<()>,
    engine: EngineMetrics,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: Family<FinishLabels, Counter>,
    refused: Family<StatusLabels, Counter>,
    first_token: Histogram,
    inter_token: Histogram,
    whole_answer: Histogram,
    heartbeat_age: Family<RankLabels, Gauge<f64, std::sync::atomic::AtomicU64>>,
    rank_step: Family<RankLabels, Gauge>,
    lately: Lately,
}

impl Metrics {
    /// Metrics of a pod that serves `served_name`, all at zero.
    pub fn new(served_name: &str) -> Self {
        let mut registry = Registry::default();
        let labelled =
            registry.sub_registry_with_label(("model_name".into(), served_name.to_owned().into()));
        let histogram = |buckets: &[f64]| Histogram::new(buckets.iter().copied());
        Self {
            rendering: Mutex::new(()),
            lately: Lately::default(),
            engine: EngineMetrics::register(labelled),
            prompt_tokens: add(
                labelled,
                "vllm:prompt_tokens",
                "Tokens of prompts taken",
                Counter::default(),
            ),
            generation_tokens: add(
                labelled,
                "vllm:generation_tokens",
                "Tokens generated",
                Counter::default(),
            ),
            success: add(
                labelled,
                "vllm:request_success",
                "Answers completed",
                Family::default(),
            ),
            refused: add(
                labelled,
                "llama_request_errors",
                "Requests answered with an error, by HTTP status",
                Family::default(),
            ),
            first_token: add(
                labelled,
                "vllm:time_to_first_token_seconds",
                "From request to first token",
                histogram(&TTFT_BUCKETS),
            ),
            inter_token: add(
                labelled,
                "vllm:inter_token_latency_seconds",
                "Between tokens of one answer",
                histogram(&ITL_BUCKETS),
            ),
            whole_answer: add(
                labelled,
                "vllm:e2e_request_latency_seconds",
                "From request to last token",
                histogram(&LATENCY_BUCKETS),
            ),
            heartbeat_age: add(
                labelled,
                "llama_rank_heartbeat_age_seconds",
                "Time since a rank's last heartbeat",
                Family::default(),
            ),
            rank_step: add(
                labelled,
                "llama_rank_step",
                "Last step that a rank finished",
                Family::default(),
            ),
            registry,
        }
    }

    /// The metrics as text, with the engine's numbers as they are now.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub fn render(&self, stats: EngineStats) -> Result<String, std::fmt::Error> {
        // One at a time, since counters are raised by what they lack.
        let _alone = self
            .rendering
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.engine.set(stats);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Adapters that there is room for, and names of those of running and of waiting
    /// requests.
    pub fn adapters(&self, most: usize, [running, waiting]: [&[String]; 2]) {
        self.engine.set_adapters(most, [running, waiting]);
    }

    /// A prompt was taken.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
    }

    /// A token came, `since` its request or the token before.
    pub(crate) fn token(&self, is_first: bool, since: Duration) {
        self.generation_tokens.inc();
        let histogram = if is_first {
            &self.first_token
        } else {
            &self.inter_token
        };
        histogram.observe(since.as_secs_f64());
    }

    /// An answer is complete, `since` its request. Its first token came `first_token` after
    /// the request, and the others each `between` after the one before, on average.
    pub(crate) fn finished(
        &self,
        reason: Finish,
        since: Duration,
        first_token: Option<Duration>,
        between: Option<Duration>,
    ) {
        let finished_reason = reason.as_str();
        self.lately.note(|answers| {
            answers.finished = answers.finished.saturating_add(1);
            if let Some(time) = first_token {
                answers.first_token.observe(time);
            }
            if let Some(time) = between {
                answers.between_tokens.observe(time);
            }
        });
        self.success
            .get_or_create(&FinishLabels { finished_reason })
            .inc();
        self.whole_answer.observe(since.as_secs_f64());
    }

    /// A request was answered with an error.
    pub(crate) fn refused(&self, error: &ApiError) {
        let status = error.status;
        if error.is_fault() {
            self.lately
                .note(|answers| answers.failed = answers.failed.saturating_add(1));
        }
        self.refused.get_or_create(&StatusLabels { status }).inc();
    }

    /// How the answers did that ended `within` this time.
    pub fn answers(&self, within: Duration) -> AnswersReport {
        self.lately.within(within)
    }

    /// A rank of this pod was looked at.
    pub fn rank(&self, rank: u32, heartbeat_age: Duration, step: u64) {
        let labels = RankLabels { rank };
        self.heartbeat_age
            .get_or_create(&labels)
            .set(heartbeat_age.as_secs_f64());
        self.rank_step.get_or_create(&labels).set(saturating(step));
    }
}

/// Registers `metric` and gives it back.
fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Work;
    use crate::rank::throughput::Saturated;
    use crate::scheduler::CacheUse;

    #[test]
    fn names_are_those_that_dashboards_know() {
        let metrics = Metrics::new("m");
        metrics.prompt(3);
        metrics.token(true, Duration::from_millis(20));
        metrics.token(false, Duration::from_millis(10));
        metrics.finished(Finish::Stop, Duration::from_millis(40), None, None);
        metrics.rank(1, Duration::from_millis(50), 9);
        let stats = EngineStats {
            running: 2,
            waiting: 1,
            blocks: 8,
            held_blocks: 2,
            cache: CacheUse {
                queried_tokens: 100,
                found_tokens: 64,
                preemptions: 3,
            },
            work: Work {
                steps: 5,
                micros: 2_500_000,
                ..Work::default()
            },
            saturated: Saturated {
                prompt: Some(250.5),
                answer: None,
            },
            ..EngineStats::default()
        };
        let text = metrics.render(stats).expect("renders");
        for line in [
            "vllm:num_requests_running{model_name=\"m\"} 2",
            "vllm:num_requests_waiting{model_name=\"m\"} 1",
            "vllm:prompt_tokens_total{model_name=\"m\"} 3",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25",
            "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0.25",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 100",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 64",
            "vllm:num_preemptions_total{model_name=\"m\"} 3",
            "vllm:cache_config_info{block_size=\"32\",num_gpu_blocks=\"8\",model_name=\"m\"} 1",
            "llama_engine_steps_total{model_name=\"m\"} 5",
            "llama_engine_step_seconds_total{model_name=\"m\"} 2.5",
            "llama_saturated_prompt_tokens_per_second{model_name=\"m\"} 250.5",
            "vllm:generation_tokens_total{model_name=\"m\"} 2",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 1",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 1",
            "vllm:e2e_request_latency_seconds_count{model_name=\"m\"} 1",
            "llama_rank_step{rank=\"1\",model_name=\"m\"} 9",
        ] {
            let sorted = |line: &str| {
                let mut parts: Vec<_> = line.split(['{', ',', '}']).map(str::to_owned).collect();
                parts.sort();
                parts
            };
            assert!(
                text.lines().any(|found| sorted(found) == sorted(line)),
                "{line} not in\n{text}"
            );
        }
    }
}
