//! One forward pass over tokens of several sequences.

use serde::{Deserialize, Serialize};

use crate::collective::{Collective, CollectiveError};

/// Tokens of one sequence that a step computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The sequence's place in the KV cache.
    pub slot: u32,
    /// Position of the first of `tokens` in its sequence. 0 starts the slot
    /// anew; otherwise positions `0..start` must already be in the cache.
    pub start: u32,
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Which logits are wanted.
    pub logits: Wanted,
}

/// After which tokens of a segment logits are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// After none: a prefill that goes on in a later step.
    #[default]
    None,
    /// After the last.
    Last,
    /// After each.
    All,
}

/// A step that could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A peer failed; the group is over.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A tensor operation failed.
    #[error("compute a step")]
    Compute(#[source] candle_core::Error),
    /// The plan breaks a rule of [`Segment`].
    #[error("invalid step: {0}")]
    Invalid(String),
}

/// One rank's shard of a model together with its KV cache.
pub trait StepModel: Send {
    /// Size of the vocabulary, which is the length of a logits row.
    fn vocab_size(&self) -> usize;

    /// Computes `segments` and returns one row of logits, `vocab_size` long, for
    /// each token whose logits are wanted, in order; the same rows on every rank.
    ///
    /// # Errors
    /// When a peer fails or a segment is out of range.
    fn step(
        &mut self,
        segments: &[Segment],
        collective: &mut dyn Collective,
    ) -> Result<Vec<Vec<f32>>, StepError>;
}
