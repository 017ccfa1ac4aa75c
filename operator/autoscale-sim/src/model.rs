//! How long a step of a served model takes, and what a group can do with it.

use serde::Serialize;

/// Share of the KV cache up to which new requests are admitted.
pub const ADMISSION_SHARE: f64 = 0.97;

/// Coefficients of one model on one group:
/// `t = a + b·P + c·n + d·K/1000` milliseconds for a step with `P` prompt
/// tokens, `n` decoding sequences and `K` tokens of their context.
#[derive(Clone, Debug, PartialEq)]
pub struct ServingModel {
    /// Name on the command line.
    pub name: &'static str,
    /// `a`: milliseconds of a step whatever it holds.
    pub step_ms: f64,
    /// `b`: milliseconds of a prompt token.
    pub prompt_token_ms: f64,
    /// `c`: milliseconds of a decoding sequence.
    pub sequence_ms: f64,
    /// `d`: milliseconds of a thousand tokens of context.
    pub kilotoken_ms: f64,
    /// Tokens that the KV cache of a group holds.
    pub kv_tokens: u64,
    /// Most tokens of a step: prompt chunks and one for each decoding sequence.
    pub chunk_tokens: u64,
    /// Most sequences that run at once.
    pub max_sequences: u64,
    /// GPUs of a group.
    pub gpus: u32,
    standard: Slo,
    strict: Slo,
}

/// Which of a model's objectives requests are measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SloLevel {
    /// A server's.
    Standard,
    /// An interactive one's.
    Strict,
}

/// What a request must get to count as served well.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    /// Most seconds to the first token of a prompt of up to 4096 tokens.
    pub ttft_seconds: f64,
    /// Most seconds between tokens, on average over the request.
    pub tpot_seconds: f64,
}

impl Slo {
    const LONG_PROMPT_TOKENS: u32 = 4096;
    const SECONDS_PER_TOKEN_ABOVE: f64 = 0.000_25;

    /// Most seconds to the first token of a prompt this long.
    pub fn ttft_limit_seconds(&self, input_tokens: u32) -> f64 {
        let above = input_tokens.saturating_sub(Self::LONG_PROMPT_TOKENS);
        self.ttft_seconds + f64::from(above) * Self::SECONDS_PER_TOKEN_ABOVE
    }
}

/// Mean request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mix {
    /// Prompt tokens.
    pub input: f64,
    /// Prompt tokens that are in a prefix cache already.
    pub cached: f64,
    /// Tokens of the answer.
    pub output: f64,
}

/// What one group can do with a mix of requests at an inter-token limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Capacity {
    /// `n*`: sequences in flight at the limit.
    pub sequences: f64,
    /// `t*`: seconds of a step at the limit.
    pub step_seconds: f64,
    /// `rps*`: requests a second at the limit.
    pub requests_per_second: f64,
    /// Tokens a second at the limit, prompts and answers together.
    pub tokens_per_second: f64,
}

impl ServingModel {
    /// Llama 3.1 405B in FP8 on eight H100. Fitted to public throughput
    /// tables; the fixed part and the KV cache are assumed.
    pub fn llama_405b_tp8() -> Self {
        Self {
            name: "405b-tp8",
            step_ms: 24.0,
            prompt_token_ms: 0.1163,
            sequence_ms: 0.1343,
            kilotoken_ms: 0.0310,
            kv_tokens: 600_000,
            chunk_tokens: 8192,
            max_sequences: 512,
            gpus: 8,
            standard: Slo {
                ttft_seconds: 6.0,
                tpot_seconds: 0.175,
            },
            strict: Slo {
                ttft_seconds: 2.0,
                tpot_seconds: 0.1,
            },
        }
    }

    /// Llama 3.3 70B in FP8 on two H100, fitted likewise.
    pub fn llama_70b_tp2() -> Self {
        Self {
            name: "70b-tp2",
            step_ms: 16.0,
            prompt_token_ms: 0.0686,
            sequence_ms: 0.0709,
            kilotoken_ms: 0.0284,
            kv_tokens: 400_000,
            chunk_tokens: 8192,
            max_sequences: 512,
            gpus: 2,
            standard: Slo {
                ttft_seconds: 2.0,
                tpot_seconds: 0.2,
            },
            strict: Slo {
                ttft_seconds: 0.45,
                tpot_seconds: 0.04,
            },
        }
    }

    /// The objective of this model.
    pub fn slo(&self, level: SloLevel) -> Slo {
        match level {
            SloLevel::Standard => self.standard,
            SloLevel::Strict => self.strict,
        }
    }

    /// Milliseconds of a step with this many prompt tokens, decoding
    /// sequences and tokens of their context.
    pub fn step_time_ms(&self, prompt_tokens: u64, sequences: u64, context: u64) -> f64 {
        self.step_ms
            + self.prompt_token_ms * prompt_tokens as f64
            + self.sequence_ms * sequences as f64
            + self.kilotoken_ms * context as f64 / 1000.0
    }

    /// Milliseconds that one more sequence of this mix adds to every step.
    fn sequence_share_ms(&self, mix: &Mix) -> f64 {
        self.prompt_token_ms * (mix.input - mix.cached) / mix.output
            + self.sequence_ms
            + self.kilotoken_ms * (mix.input + mix.output / 2.0) / 1000.0
    }

    /// What a group can do with this mix when steps may take `itl_seconds`.
    pub fn capacity(&self, mix: &Mix, itl_seconds: f64) -> Capacity {
        let share = self.sequence_share_ms(mix);
        let context = mix.input + mix.output / 2.0;
        let sequences = ((itl_seconds * 1000.0 - self.step_ms) / share)
            .min(0.9 * self.kv_tokens as f64 / context)
            .min(self.max_sequences as f64)
            .min(self.chunk_tokens as f64 * mix.output / (mix.input - mix.cached + mix.output))
            .max(1.0);
        let step_seconds = (self.step_ms + share * sequences) / 1000.0;
        let requests_per_second = sequences / (mix.output * step_seconds);
        Capacity {
            sequences,
            step_seconds,
            requests_per_second,
            tokens_per_second: requests_per_second * (mix.input + mix.output),
        }
    }

    /// Seconds of a group's time that one request takes at this capacity.
    /// That of the mean request is one over the requests a second.
    pub fn work_seconds(&self, request: &Mix, capacity: &Capacity) -> f64 {
        let token_ms = self.step_ms / capacity.sequences
            + self.sequence_ms
            + self.kilotoken_ms * (request.input + request.output / 2.0) / 1000.0;
        (self.prompt_token_ms * (request.input - request.cached) + request.output * token_ms)
            / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: Mix = Mix {
        input: 1155.0,
        cached: 0.0,
        output: 211.0,
    };

    #[test]
    fn a_step_takes_what_its_parts_take() {
        let model = ServingModel::llama_405b_tp8();
        // 24 + 0.1163·1000 + 0.1343·100 + 0.0310·50
        assert!((model.step_time_ms(1000, 100, 50_000) - 155.28).abs() < 1e-9);
        assert!((model.step_time_ms(0, 0, 0) - 24.0).abs() < 1e-9);
        let model = ServingModel::llama_70b_tp2();
        // 16 + 0.0709·50 + 0.0284·262.5
        assert!((model.step_time_ms(0, 50, 262_500) - 27.0).abs() < 1e-9);
    }

    #[test]
    fn capacity_is_the_closed_form() {
        let model = ServingModel::llama_405b_tp8();
        let capacity = model.capacity(&CHAT, 0.175);
        // k = 0.1163·1155/211 + 0.1343 + 0.031·1.2605 = 0.80999; n* = 151/k
        assert!((capacity.sequences - 186.42).abs() < 0.05, "{capacity:?}");
        assert!((capacity.step_seconds - 0.175).abs() < 1e-9);
        assert!((capacity.requests_per_second - 186.42 / (211.0 * 0.175)).abs() < 0.01);
        let work = model.work_seconds(&CHAT, &capacity);
        assert!((work * capacity.requests_per_second - 1.0).abs() < 1e-9);
    }

    #[test]
    fn long_contexts_are_bound_by_the_cache() {
        let model = ServingModel::llama_405b_tp8();
        let mix = Mix {
            input: 1271.0,
            cached: 0.0,
            output: 1525.0,
        };
        let capacity = model.capacity(&mix, 0.175);
        assert!((capacity.sequences - 540_000.0 / 2033.5).abs() < 1e-6);
    }

    #[test]
    fn long_prompts_may_wait_longer() {
        let slo = ServingModel::llama_405b_tp8().slo(SloLevel::Standard);
        assert!((slo.ttft_limit_seconds(4096) - 6.0).abs() < 1e-9);
        assert!((slo.ttft_limit_seconds(12_096) - 8.0).abs() < 1e-9);
    }
}
