//! How much memory an embedding model takes, from its headers alone.

use serde::Serialize;

use super::{EmbeddingCheckpoint, EmbeddingSlices};
use crate::error::ModelError;
use crate::memory::ATTENTION_TILE_TOKENS;

const MIB: u64 = 1 << 20;
/// The process with nothing loaded, and what open requests take besides their vectors.
const PROCESS_BYTES: u64 = 16 * MIB;
/// The tokenizer, for each token of the vocabulary, while it is read. Measured with the
/// process: 680.
const TOKENIZER_ENTRY_BYTES: u64 = 512;
/// Tokens of several short texts that are computed together.
pub const PACKED_TOKENS: usize = 512;
/// A value of a vector that waits to be sent, as text beside the number.
const ANSWER_VALUE_BYTES: u64 = 20;

/// What a plan is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddingRequest {
    /// Tokens that a text may have.
    pub max_tokens: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Values of vectors that may wait to be sent.
    pub answer_values: usize,
}

/// Memory of the one process of an embedding model. Bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EmbeddingMemory {
    /// Weights.
    pub weights: u64,
    /// Activations of the longest text, or of as many short ones as are computed
    /// together.
    pub activations: u64,
    /// Vectors that wait to be sent.
    pub answers: u64,
    /// Process and tokenizer.
    pub reserve: u64,
    /// Tokens that a text may have.
    pub max_tokens: usize,
}

impl EmbeddingMemory {
    /// Plans the process.
    ///
    /// # Errors
    /// `InvalidLayout` for texts that the model does not take, and as
    /// [`EmbeddingSlices::locate`].
    pub fn new(
        checkpoint: &EmbeddingCheckpoint,
        request: EmbeddingRequest,
    ) -> Result<Self, ModelError> {
        let (config, tokens) = (checkpoint.config(), request.max_tokens);
        if !(3..=config.max_tokens).contains(&tokens) {
            return Err(ModelError::Layout(format!(
                "texts of {tokens} tokens: the model takes 3 to {}",
                config.max_tokens
            )));
        }
        // The residual stream twice; queries, keys, values, copies of them by head and
        // what is attended to, or the network before and behind its function.
        let row = 2 * config.hidden + (8 * config.hidden).max(2 * config.ffn + config.hidden);
        let scores = request.threads.max(1) * ATTENTION_TILE_TOKENS * tokens;
        let packed = tokens.max(PACKED_TOKENS);
        Ok(Self {
            weights: EmbeddingSlices::locate(checkpoint)?.bytes(),
            activations: ((packed * row + scores) * size_of::<f32>()) as u64,
            answers: request.answer_values as u64 * ANSWER_VALUE_BYTES,
            reserve: PROCESS_BYTES + config.vocab as u64 * TOKENIZER_ENTRY_BYTES,
            max_tokens: tokens,
        })
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.activations + self.answers + self.reserve
    }

    /// Whether it fits `limit` bytes.
    ///
    /// # Errors
    /// `InsufficientMemory`, with the numbers.
    pub fn check(&self, limit: u64) -> Result<(), ModelError> {
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let needed = self.total();
        if needed <= limit {
            return Ok(());
        }
        Err(ModelError::Memory(format!(
            "needs {} MiB (weights {} MiB, activations {} MiB, answers {} MiB, reserve {} MiB), \
             the limit is {} MiB; raise spec.resources.memory to {}Mi",
            mib(needed),
            mib(self.weights),
            mib(self.activations),
            mib(self.answers),
            mib(self.reserve),
            limit / MIB,
            mib(needed),
        )))
    }
}
