//! One forward pass over tokens of several sequences.

use std::collections::BTreeSet;
use std::ops::Range;

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

/// What the segments of a step must keep to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepLimits {
    /// Places in the KV cache.
    pub(crate) slots: usize,
    /// Tokens that a sequence may have.
    pub(crate) max_tokens: usize,
    /// Size of the vocabulary.
    pub(crate) vocab: usize,
    /// Tokens of an attention chunk; layers that attend in chunks keep one.
    pub(crate) chunk: Option<usize>,
}

impl StepLimits {
    /// Refuses what no rank may begin, before the first collective. `tokens_of`
    /// tells how many tokens a slot has.
    pub(crate) fn check(
        &self,
        segments: &[Segment],
        tokens_of: impl Fn(usize) -> usize,
    ) -> Result<(), StepError> {
        let invalid = |text: String| Err(StepError::Invalid(text));
        let mut slots = BTreeSet::new();
        for segment in segments {
            let (slot, start) = (segment.slot as usize, segment.start as usize);
            let tokens = &segment.tokens;
            if slot >= self.slots {
                return invalid(format!("slot {slot} of {}", self.slots));
            }
            if !slots.insert(slot) {
                return invalid(format!("slot {slot} occurs twice"));
            }
            if tokens.is_empty() {
                return invalid(format!("no tokens for slot {slot}"));
            }
            let known = tokens_of(slot);
            if !self.goes_on(known, start) {
                return invalid(format!(
                    "slot {slot} goes on at position {start} but has {known} tokens{}",
                    self.kept()
                ));
            }
            let end = start + tokens.len();
            if end > self.max_tokens {
                return invalid(format!(
                    "slot {slot} would have {end} tokens, the limit is {}",
                    self.max_tokens
                ));
            }
            if let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab) {
                return invalid(format!(
                    "token {token} is not in the vocabulary of {}",
                    self.vocab
                ));
            }
        }
        Ok(())
    }

    /// Whether a sequence of `tokens` tokens can go on behind its first `keep`: all
    /// that the next token attends to must still be there.
    pub(crate) fn goes_on(&self, tokens: usize, keep: usize) -> bool {
        let is_there = |chunk: usize| {
            keep.is_multiple_of(chunk) || keep / chunk == (tokens.max(1) - 1) / chunk
        };
        keep <= tokens && self.chunk.is_none_or(is_there)
    }

    fn kept(&self) -> String {
        self.chunk.map_or_else(String::new, |chunk| {
            format!(", of which some layers keep the last chunk of {chunk}")
        })
    }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_goes_on_where_its_keys_still_are() {
        let mut limits = StepLimits {
            slots: 1,
            max_tokens: 64,
            vocab: 1,
            chunk: Some(16),
        };
        for (tokens, keep, goes_on) in [
            (40, 0, true),
            (40, 16, true),
            (40, 20, false),
            (40, 31, false),
            (40, 32, true),
            (40, 40, true),
            (40, 41, false),
            (32, 32, true),
            (32, 20, true),
            (32, 10, false),
            (0, 0, true),
        ] {
            assert_eq!(limits.goes_on(tokens, keep), goes_on, "{keep} of {tokens}");
        }
        limits.chunk = None;
        assert!(limits.goes_on(40, 20) && !limits.goes_on(40, 41));
    }

    #[test]
    fn parts_of_rows_are_joined() {
        let all = [1.0, 2.0, 5.0, 6.0, 3.0, 7.0];
        let rows = join_columns(&all, &[0..0, 0..2, 2..3], 2);
        assert_eq!(rows, [[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]);
    }
}
