//! One forward pass over tokens of several sequences.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::collective::{Collective, CollectiveError};
use crate::lora::{AdapterLoader, LoadedAdapter};

/// Tokens of one sequence that a step computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The sequence's place in the KV cache.
    pub slot: u32,
    /// Position of the first of `tokens` in its sequence; positions `0..start` must
    /// already be in its blocks.
    pub start: u32,
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Which logits are wanted.
    pub logits: Wanted,
    /// Place of the adapter that changes the model for these tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<u32>,
    /// How the sequence's block tables change before, by
    /// [`KvGroup`](crate::blocks::KvGroup). `None` where each slot has blocks of its
    /// own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<[TableChange; 2]>,
}

/// A change of the list of blocks that hold a sequence's keys and values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableChange {
    /// Blocks before this number are let go of.
    pub first: u32,
    /// So are those from this number on.
    pub keep: u32,
    /// Blocks that follow then. Those of a prefix that is in the cache already are
    /// complete; the step writes the others.
    pub add: Vec<u32>,
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
    /// Ranks that should have computed the same did not.
    #[error("rank {rank} computed other logits than rank 0")]
    Disagreement {
        /// The first that differs.
        rank: usize,
    },
    /// The plan breaks a rule of [`Segment`].
    #[error("invalid step: {0}")]
    Invalid(String),
}

/// Rows of the tokens whose logits are wanted.
pub(crate) fn wanted_rows(segments: &[Segment]) -> Vec<u32> {
    let mut wanted = Vec::new();
    let mut start = 0_u32;
    for segment in segments {
        let end = start + u32::try_from(segment.tokens.len()).unwrap_or(u32::MAX);
        match segment.logits {
            Wanted::None => {}
            Wanted::Last => wanted.push(end - 1),
            Wanted::All => wanted.extend(start..end),
        }
        start = end;
    }
    wanted
}

/// Rows out of `all`, which holds one part after another: `rows` rows of the
/// columns `ranges[r]` for rank r.
pub(crate) fn join_columns(all: &[f32], ranges: &[Range<usize>], rows: usize) -> Vec<Vec<f32>> {
    let columns = ranges.iter().map(ExactSizeIterator::len).sum();
    let mut whole = vec![Vec::with_capacity(columns); rows];
    let mut rest = all;
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let (part, behind) = rest.split_at(range.len() * rows);
        for (row, part) in whole.iter_mut().zip(part.chunks_exact(range.len())) {
            row.extend_from_slice(part);
        }
        rest = behind;
    }
    whole
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

    /// Bytes that the blocks of the KV cache have taken so far.
    fn kv_cache_bytes(&self) -> u64;

    /// What loads adapters for [`StepModel::put_adapter`], on another thread if need be.
    fn adapter_loader(&self) -> AdapterLoader;

    /// Takes an adapter, which segments name by `place` from now on, in place of an
    /// earlier one.
    ///
    /// # Errors
    /// When the adapter was not loaded for this model.
    fn put_adapter(&mut self, place: u32, adapter: LoadedAdapter) -> Result<(), StepError>;

    /// Forgets the adapter at `place`.
    fn drop_adapter(&mut self, place: u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_rows_are_joined() {
        let all = [1.0, 2.0, 5.0, 6.0, 3.0, 7.0];
        let rows = join_columns(&all, &[0..0, 0..2, 2..3], 2);
        assert_eq!(rows, [[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]);
    }
}
