//! How long an engine takes for its work, and what one group can do.
//!
//! An iteration with P prompt tokens, n decoding sequences and K tokens in the KV cache takes
//! `t = a + b P + c n + d K / 1000` milliseconds. All capacities follow from these four.

use serde::{Deserialize, Serialize};

/// The four coefficients of an iteration's time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Coefficients {
    /// a: milliseconds of an iteration, whatever is in it.
    pub step_ms: f64,
    /// b: milliseconds per prompt token.
    pub prompt_token_ms: f64,
    /// c: milliseconds per decoding sequence.
    pub sequence_ms: f64,
    /// d: milliseconds per 1000 tokens in the KV cache.
    pub kv_kilotoken_ms: f64,
}

/// Limits of a group's engine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// M: tokens that the KV cache holds.
    pub kv_tokens: f64,
    /// Sequences in a batch at most.
    pub sequences: f64,
    /// B: tokens of an iteration at most, those of prompts and of sequences.
    pub step_tokens: f64,
}

/// A kind of group that was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prior {
    /// Its iteration's coefficients.
    pub coefficients: Coefficients,
    /// Its limits.
    pub limits: Limits,
}

/// Llama 3.1 405B in FP8 on eight H100: fitted to ten rows of TensorRT-LLM's published
/// throughput (mean error 4.6 %); a and M are assumed.
pub const LLAMA_405B_TP8: Prior = Prior {
    coefficients: Coefficients {
        step_ms: 24.0,
        prompt_token_ms: 0.1163,
        sequence_ms: 0.1343,
        kv_kilotoken_ms: 0.0310,
    },
    limits: Limits {
        kv_tokens: 600_000.0,
        sequences: 1024.0,
        step_tokens: 8192.0,
    },
};

/// Llama 3.3 70B in FP8 on two H100: fitted like the 405B (mean error 2.7 %).
pub const LLAMA_70B_TP2: Prior = Prior {
    coefficients: Coefficients {
        step_ms: 16.0,
        prompt_token_ms: 0.0686,
        sequence_ms: 0.0709,
        kv_kilotoken_ms: 0.0284,
    },
    limits: Limits {
        kv_tokens: 400_000.0,
        sequences: 1024.0,
        step_tokens: 8192.0,
    },
};

/// What is known of a model and its GPUs where nothing was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Roofline {
    /// Parameters of the model.
    pub parameters: f64,
    /// Bytes of its weights.
    pub weight_bytes: f64,
    /// Bytes of a token in the KV cache, over all GPUs.
    pub kv_token_bytes: f64,
    /// GPUs of a group.
    pub gpus: f64,
    /// Bytes per second that one GPU reads.
    pub gpu_bytes_per_s: f64,
    /// Operations per second of one GPU at the weights' precision.
    pub gpu_flops: f64,
}

/// Share of a GPU's bandwidth that decoding reaches.
const BANDWIDTH_SHARE: f64 = 0.7;
/// Share of a GPU's operations that prefill reaches.
const FLOPS_SHARE: f64 = 0.38;
/// Milliseconds of an iteration besides reading weights.
const STEP_OVERHEAD_MS: f64 = 5.0;

impl Roofline {
    /// a = weights read once at 70 % of the bandwidth, and 5 ms; b = two operations per
    /// parameter at 38 % of the peak; c is taken for b (a decoding token costs the same
    /// operations); d = KV cache read at 70 % of the bandwidth.
    pub fn coefficients(&self) -> Coefficients {
        let bytes_per_ms = self.gpus * self.gpu_bytes_per_s * BANDWIDTH_SHARE / 1000.0;
        let flops_per_ms = self.gpus * self.gpu_flops * FLOPS_SHARE / 1000.0;
        let token_ms = 2.0 * self.parameters / flops_per_ms;
        Coefficients {
            step_ms: self.weight_bytes / bytes_per_ms + STEP_OVERHEAD_MS,
            prompt_token_ms: token_ms,
            sequence_ms: token_ms,
            kv_kilotoken_ms: 1000.0 * self.kv_token_bytes / bytes_per_ms,
        }
    }
}

/// What requests look like on average.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mix {
    /// I: prompt tokens.
    pub prompt: f64,
    /// O: output tokens.
    pub output: f64,
    /// h: share of prompt tokens that come from the prefix cache.
    pub cache_hit: f64,
}

impl Mix {
    /// I' = I (1 - h): prompt tokens that must be computed.
    pub fn computed_prompt(&self) -> f64 {
        self.prompt * (1.0 - self.cache_hit)
    }

    /// I + O / 2: tokens in the KV cache of a sequence, on average over its life.
    pub fn context(&self) -> f64 {
        self.prompt + self.output / 2.0
    }
}

/// Times that requests are to keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Slo {
    /// Seconds to the first token.
    pub ttft_s: f64,
    /// Milliseconds from token to token (`S_itl`).
    pub itl_ms: f64,
}

/// What one group does at the ITL limit with a given mix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Service {
    /// n*: sequences in the batch.
    pub sequences: f64,
    /// k: milliseconds that each sequence adds to an iteration.
    pub per_sequence_ms: f64,
    /// t*: milliseconds of an iteration with n* sequences.
    pub step_ms: f64,
    /// rps*: requests per second.
    pub requests_per_s: f64,
    /// Milliseconds of group time per prompt token computed: b.
    pub prompt_token_ms: f64,
    /// Milliseconds of group time per output token: a / n* + c + d (I + O/2) / 1000.
    pub output_token_ms: f64,
    /// Milliseconds of group time per request of the mix: 1000 / rps*.
    pub request_ms: f64,
    /// Prompt tokens computed per second at rps*.
    pub prefill_tokens_per_s: f64,
    /// Output tokens per second at rps*.
    pub output_tokens_per_s: f64,
}

/// Share of the KV cache that is planned with.
const KV_SHARE: f64 = 0.9;

impl Service {
    /// Capacity of one group:
    /// `k = b I'/O + c + d (I + O/2)/1000`,
    /// `n* = min((S - a)/k, 0.9 M/(I + O/2), max sequences, B O/(I' + O))`, at least 1,
    /// `t* = a + k n*`, `rps* = 1000 n*/(O t*)`,
    /// `w = b I' + O (a/n* + c + d (I + O/2)/1000)`.
    pub fn new(engine: &Coefficients, limits: &Limits, slo: &Slo, mix: &Mix) -> Self {
        let output = mix.output.max(1.0);
        let (prompt, context) = (mix.computed_prompt(), mix.context().max(1.0));
        let b = engine.prompt_token_ms;
        let decode = engine.sequence_ms + engine.kv_kilotoken_ms * context / 1000.0;
        let k = b * prompt / output + decode;
        let sequences = ((slo.itl_ms - engine.step_ms) / k)
            .min(KV_SHARE * limits.kv_tokens / context)
            .min(limits.sequences)
            .min(limits.step_tokens * output / (prompt + output))
            .max(1.0);
        let step_ms = engine.step_ms + k * sequences;
        let requests_per_s = 1000.0 * sequences / (output * step_ms);
        let output_token_ms = engine.step_ms / sequences + decode;
        Self {
            sequences,
            per_sequence_ms: k,
            step_ms,
            requests_per_s,
            prompt_token_ms: b,
            output_token_ms,
            request_ms: b * prompt + output * output_token_ms,
            prefill_tokens_per_s: requests_per_s * prompt,
            output_tokens_per_s: requests_per_s * output,
        }
    }

    /// Share of n* in the batch at a share `load` of rps*:
    /// `load a / (a + (1 - load) k n*)`. It is convex: half of the load is an eighth of the
    /// sequences, which is why thresholds on sequences or KV cache come too late.
    pub fn sequence_share(&self, load: f64) -> f64 {
        let own = self.step_ms - self.per_sequence_ms * self.sequences;
        load * own / (own + (1.0 - load) * self.per_sequence_ms * self.sequences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Means of the chat trace of Azure, 2023.
    const CHAT: Mix = Mix {
        prompt: 1155.0,
        output: 211.0,
        cache_hit: 0.0,
    };

    fn close(got: f64, expected: f64, within: f64) {
        assert!(
            (got - expected).abs() <= within,
            "{got}, expected {expected}"
        );
    }

    fn service(prior: &Prior, itl_ms: f64, mix: &Mix) -> Service {
        Service::new(
            &prior.coefficients,
            &prior.limits,
            &Slo {
                ttft_s: 6.0,
                itl_ms,
            },
            mix,
        )
    }

    #[test]
    fn capacity_of_405b_is_that_computed_by_hand() {
        let s = service(&LLAMA_405B_TP8, 175.0, &CHAT);
        // k = 0.1163*1155/211 + 0.1343 + 0.031*1.2605 = 0.63662 + 0.1343 + 0.03908
        close(s.per_sequence_ms, 0.80999, 1e-4);
        close(s.sequences, 151.0 / 0.80999, 0.05); // 186.4
        close(s.step_ms, 175.0, 1e-9);
        close(s.requests_per_s, 5.049, 2e-3); // 186.42 / (211 * 0.175)
        close(s.prefill_tokens_per_s, 5831.0, 2.0);
        close(s.output_tokens_per_s, 1065.3, 1.0);
        close(s.request_ms * s.requests_per_s, 1000.0, 1e-6);
    }

    #[test]
    fn weights_of_tokens_come_out_of_the_model() {
        let slow = service(&LLAMA_405B_TP8, 175.0, &CHAT);
        close(slow.prompt_token_ms, 0.116, 5e-4);
        close(slow.output_token_ms, 0.30, 5e-3);
        close(slow.output_token_ms / slow.prompt_token_ms, 2.6, 0.05);
        // At 60 ms the iteration's own 24 ms are shared by fewer: 36/0.81 = 44.4 sequences.
        let fast = service(&LLAMA_405B_TP8, 60.0, &CHAT);
        close(fast.sequences, 44.45, 0.05);
        close(fast.output_token_ms / fast.prompt_token_ms, 6.0, 0.2);
    }

    #[test]
    fn sequences_are_convex_in_load() {
        let s = service(&LLAMA_405B_TP8, 175.0, &CHAT);
        // 0.5*24/(24 + 0.5*151), 0.7*24/(24 + 0.3*151), 0.88*24/(24 + 0.12*151)
        close(s.sequence_share(0.5), 0.1206, 1e-4);
        close(s.sequence_share(0.7), 0.2424, 1e-4);
        close(s.sequence_share(0.88), 0.5014, 1e-4);
        close(s.sequence_share(1.0), 1.0, 1e-12);
    }

    #[test]
    fn each_limit_binds_where_it_is_least() {
        let long = Mix {
            prompt: 100_000.0,
            output: 1000.0,
            cache_hit: 0.99,
        };
        let by_kv = service(&LLAMA_405B_TP8, 1000.0, &long);
        close(by_kv.sequences, 540_000.0 / 100_500.0, 1e-9);
        let mut few = LLAMA_405B_TP8;
        few.limits.sequences = 32.0;
        close(service(&few, 175.0, &CHAT).sequences, 32.0, 1e-12);
        let mut narrow = LLAMA_405B_TP8;
        narrow.limits.step_tokens = 512.0;
        close(
            service(&narrow, 175.0, &CHAT).sequences,
            512.0 * 211.0 / 1366.0,
            1e-9,
        );
        // An ITL below the iteration's own time still leaves one sequence.
        let alone = service(&LLAMA_405B_TP8, 20.0, &CHAT);
        close(alone.sequences, 1.0, 1e-12);
        assert!(alone.step_ms > 24.0);
    }

    #[test]
    fn cached_prompts_cost_no_prefill_but_keep_their_context() {
        let none = service(&LLAMA_70B_TP2, 200.0, &CHAT);
        let half = service(
            &LLAMA_70B_TP2,
            200.0,
            &Mix {
                cache_hit: 0.5,
                ..CHAT
            },
        );
        assert!(half.requests_per_s > 1.5 * none.requests_per_s);
        close(half.prefill_tokens_per_s, half.requests_per_s * 577.5, 1e-6);
    }

    #[test]
    fn the_roofline_is_near_the_fit_of_405b() {
        // H100: 3.35 TB/s, 1979 TFLOPS in FP8; 126 layers, 8 KV heads of 128, two bytes, K and V.
        let roofline = Roofline {
            parameters: 405e9,
            weight_bytes: 405e9,
            kv_token_bytes: 126.0 * 8.0 * 128.0 * 2.0 * 2.0,
            gpus: 8.0,
            gpu_bytes_per_s: 3.35e12,
            gpu_flops: 1979e12,
        };
        let c = roofline.coefficients();
        close(c.step_ms, 26.59, 0.01); // 405e9/(8*3.35e9*0.7) + 5
        close(c.prompt_token_ms, 0.1346, 1e-4); // 810e9/(8*1.979e12*0.38)
        close(c.kv_kilotoken_ms, 0.0275, 1e-4);
    }
}
