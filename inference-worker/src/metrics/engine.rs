//! What the engine tells, as metrics.

use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use llama_model::blocks::BLOCK_TOKENS;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

use super::{add, saturating};
use crate::engine::EngineStats;

type Number = Gauge<f64, AtomicU64>;
type Seconds = Counter<f64, AtomicU64>;

/// The shape of the KV cache, under the names that routers look for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    block_size: usize,
    num_gpu_blocks: u32,
}

/// Adapters in use, as routers read them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdapterLabels {
    max_lora: usize,
    running_lora_adapters: String,
    waiting_lora_adapters: String,
}

/// The engine's numbers, as it last told them.
#[derive(Debug)]
pub(super) struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    cached_tokens: Gauge,
    cache_use: [Number; 2],
    cache_config: Family<CacheLabels, Gauge>,
    queried: Counter,
    found: Counter,
    preemptions: Counter,
    step: Gauge,
    steps: Counter,
    step_seconds: Seconds,
    model_seconds: Seconds,
    computed_prompt: Counter,
    computed_answer: Counter,
    saturated_prompt: Number,
    saturated_answer: Number,
    adapters: Family<AdapterLabels, Number>,
}

impl EngineMetrics {
    pub(super) fn register(to: &mut Registry) -> Self {
        let cache_use = "Part of the KV cache's blocks that requests hold";
        Self {
            running: new(to, "vllm:num_requests_running", "Requests being computed"),
            waiting: new(to, "vllm:num_requests_waiting", "Requests waiting for room"),
            cached_tokens: new(
                to,
                "llama_kv_cache_tokens",
                "Tokens of running requests in the KV cache",
            ),
            // Routers know one name or the other.
            cache_use: ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]
                .map(|name| new(to, name, cache_use)),
            cache_config: new(to, "vllm:cache_config_info", "Shape of the KV cache"),
            queried: new(
                to,
                "vllm:prefix_cache_queries",
                "Tokens looked for in the prefix cache",
            ),
            found: new(
                to,
                "vllm:prefix_cache_hits",
                "Tokens found in the prefix cache",
            ),
            preemptions: new(
                to,
                "vllm:num_preemptions",
                "Times that a request gave up its place in the KV cache",
            ),
            step: new(
                to,
                "llama_engine_step",
                "Last step that the engine finished",
            ),
            steps: new(to, "llama_engine_steps", "Steps that computed tokens"),
            step_seconds: new(
                to,
                "llama_engine_step_seconds",
                "Time that steps with tokens took",
            ),
            model_seconds: new(
                to,
                "llama_engine_model_seconds",
                "Time of steps in which ranks computed",
            ),
            computed_prompt: new(
                to,
                "llama_engine_prompt_tokens",
                "Tokens of prompts computed, again after a preemption",
            ),
            computed_answer: new(
                to,
                "llama_engine_generation_tokens",
                "Tokens of answers computed, wrong guesses included",
            ),
            saturated_prompt: new(
                to,
                "llama_saturated_prompt_tokens_per_second",
                "Prompt tokens a second that the group can compute, as learned; 0 if unknown",
            ),
            adapters: new(
                to,
                "vllm:lora_requests_info",
                "Adapters in use, since when it is told, in seconds since 1970",
            ),
            saturated_answer: new(
                to,
                "llama_saturated_generation_tokens_per_second",
                "Answer tokens a second that the group can compute, as learned; 0 if unknown",
            ),
        }
    }

    pub(super) fn set(&self, stats: EngineStats) {
        self.running.set(stats.running.into());
        self.waiting.set(stats.waiting.into());
        self.cached_tokens.set(saturating(stats.cached_tokens));
        let used = f64::from(stats.held_blocks) / f64::from(stats.blocks.max(1));
        for gauge in &self.cache_use {
            gauge.set(used);
        }
        if stats.blocks > 0 {
            let labels = CacheLabels {
                block_size: BLOCK_TOKENS,
                num_gpu_blocks: stats.blocks,
            };
            self.cache_config.get_or_create(&labels).set(1);
        }
        raise(&self.queried, stats.cache.queried_tokens);
        raise(&self.found, stats.cache.found_tokens);
        raise(&self.preemptions, stats.cache.preemptions);
        self.step.set(saturating(stats.step));
        raise(&self.steps, stats.work.steps);
        raise_seconds(&self.step_seconds, stats.work.micros);
        raise_seconds(&self.model_seconds, stats.work.model_micros);
        raise(&self.computed_prompt, stats.work.prompt_tokens);
        raise(&self.computed_answer, stats.work.answer_tokens);
        self.saturated_prompt
            .set(stats.saturated.prompt.unwrap_or(0.0));
        self.saturated_answer
            .set(stats.saturated.answer.unwrap_or(0.0));
    }
}

impl EngineMetrics {
    pub(super) fn set_adapters(&self, most: usize, [running, waiting]: [&[String]; 2]) {
        let labels = AdapterLabels {
            max_lora: most,
            running_lora_adapters: running.join(","),
            waiting_lora_adapters: waiting.join(","),
        };
        // Only what is so now is shown.
        self.adapters.clear();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs_f64();
        self.adapters.get_or_create(&labels).set(now);
    }
}

fn new<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    add(registry, name, help, M::default())
}

/// Raises a counter to a total that was counted elsewhere.
fn raise(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn raise_seconds(counter: &Seconds, micros: u64) {
    counter.inc_by((micros as f64 / 1e6 - counter.get()).max(0.0));
}
