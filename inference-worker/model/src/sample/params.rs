//! How tokens are drawn.

use serde::{Deserialize, Serialize};

/// How the tokens of one answer are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 takes the most likely token; 1 draws by the model's own probabilities.
    pub temperature: f32,
    /// Draws among the most likely tokens that together reach this probability
    /// (nucleus sampling, Holtzman et al. 2019).
    pub top_p: f32,
    /// Draws among this many of the most likely tokens; 0 sets no limit.
    pub top_k: u32,
    /// Draws among the tokens that are at least this likely, beside the most likely
    /// one at 1.
    pub min_p: f32,
    /// Taken off the logit of every token that the answer already holds.
    pub presence_penalty: f32,
    /// Taken off a token's logit for each time that the answer already holds it.
    pub frequency_penalty: f32,
    /// Makes tokens of the prompt and the answer less likely where it is above 1:
    /// divides logits above zero, multiplies those below (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that are drawn before one of `end_ids` may be.
    pub min_tokens: u32,
    /// What `min_tokens` keeps from being drawn.
    pub end_ids: Vec<u32>,
    /// The same seed, prompt and parameters draw the same tokens.
    pub seed: u64,
    /// Whether the logarithms of probabilities are told, and of how many of the most
    /// likely tokens beside the one drawn.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Always the most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        logit_bias: Vec::new(),
        min_tokens: 0,
        end_ids: Vec::new(),
        seed: 0,
        logprobs: None,
    };

    pub(super) fn repeats(&self) -> bool {
        is_set(self.repetition_penalty, 1.0)
    }

    /// Whether what the answer holds changes what is drawn next.
    pub(super) fn counts_answer(&self) -> bool {
        self.repeats() || is_set(self.presence_penalty, 0.0) || is_set(self.frequency_penalty, 0.0)
    }
}

fn is_set(value: f32, neutral: f32) -> bool {
    (value - neutral).abs() > 0.0
}
