//! What goes into the scheduler and what comes out.

use llama_model::blocks::KvBlocks;
use serde::{Deserialize, Serialize};

use crate::adapters::AdapterUse;

/// What bounds the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that can be computed at once.
    pub slots: u32,
    /// Tokens that one step computes at most.
    pub step_tokens: u32,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Tokens of the prompts that may wait, unless it is only one.
    pub queue_tokens: usize,
    /// Longest sequence, prompt and answer, in tokens.
    pub max_tokens: u32,
    /// Blocks of the KV cache; at least those of one longest sequence.
    pub blocks: KvBlocks,
    /// Tokens of an attention chunk, where layers attend in chunks.
    pub chunk: Option<usize>,
    /// Whether sequences that begin alike share blocks.
    pub prefix_caching: bool,
    /// Tokens that are guessed ahead of an answer at most.
    pub speculation: u32,
}

/// A request in tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Its name, unique among the requests that are open.
    pub id: u64,
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens to answer with at most, at least one.
    pub max_answer: u32,
    /// Tokens that end the answer.
    pub stop_ids: Vec<u32>,
    /// Lower ones go first.
    pub priority: i32,
    /// Only requests of the same salt share blocks.
    pub salt: String,
    /// The adapter that changes the model for it; only requests of the same one share
    /// blocks.
    pub adapter: Option<AdapterUse>,
    /// Whether the logits before every token of the prompt are wanted but the first.
    pub prompt_logits: bool,
    /// Whether it is computed all anew, and shares no block with anybody.
    pub is_private: bool,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// As many tokens wait as may.
    #[error("prompts of {waiting} tokens are waiting already, of at most {limit}")]
    QueueTokens {
        /// How many wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
    /// Prompt and answer are longer than a sequence may be, or one of them is empty.
    #[error("a prompt of {prompt} tokens and an answer of {answer} do not fit {max_tokens} tokens")]
    Length {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        answer: u32,
        /// What a sequence may have.
        max_tokens: u32,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It reached its limit.
    Length,
    /// The model ended it behind calls of tools. Only the front, which reads them, says
    /// so.
    ToolCalls,
}

impl Finish {
    /// The word of the OpenAI API, which is also the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// A request of which a step brings logits: the rows for `prompt`, then, if it `draws`,
/// those for `guesses` and the one behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Awaited<'a> {
    /// The request.
    pub id: u64,
    /// Tokens of its answer so far.
    pub answered: u32,
    /// Tokens of its prompt that follow the rows, where it wants their logits.
    pub prompt: &'a [u32],
    /// How many of them a step has brought before: the first are computed again.
    pub told: usize,
    /// Whether the next token of the answer is to be drawn.
    pub draws: bool,
    /// Tokens that were guessed to follow: the first row of logits is that before
    /// them, and there is one more after each.
    pub guesses: &'a [u32],
}

impl Awaited<'_> {
    /// Rows of logits that the step brings.
    pub fn rows(&self) -> usize {
        let drawn = if self.draws {
            self.guesses.len() + 1
        } else {
            0
        };
        self.prompt.len() + drawn
    }
}

/// What a sampled token did to its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The request.
    pub id: u64,
    /// The token, `None` when it only ended the answer.
    pub token: Option<u32>,
    /// Set when the answer is over.
    pub finish: Option<Finish>,
    /// Tokens of the prompt that were in the cache when the request began.
    pub cached_tokens: u32,
}

/// What the KV cache did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheUse {
    /// Tokens that were looked for.
    pub queried_tokens: u64,
    /// Those of them that were found.
    pub found_tokens: u64,
    /// Times that a sequence gave its blocks up.
    pub preemptions: u64,
}
