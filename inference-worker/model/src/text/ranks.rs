//! BPE by rank: of all neighbours that form a token, those that form the one of
//! lowest rank are joined first. The rank of a token is its id.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ahash::AHashMap;

use super::split::Splitter;

/// A byte-level BPE without a list of merges.
#[derive(Debug)]
pub(super) struct RankedBpe {
    ranks: AHashMap<Vec<u8>, u32>,
    splitter: Splitter,
}

impl RankedBpe {
    /// A BPE of `ranks`, which must hold every single byte.
    pub(super) fn new(ranks: AHashMap<Vec<u8>, u32>, splitter: Splitter) -> Self {
        Self { ranks, splitter }
    }

    /// Appends the tokens of `text` to `ids`.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        for piece in self.splitter.pieces(text) {
            match self.ranks.get(piece.as_bytes()) {
                Some(&id) => ids.push(id),
                None => self.merge(piece.as_bytes(), ids),
            }
        }
    }

    fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut parts = Parts::new(piece.len());
        let mut heap = BinaryHeap::new();
        let candidate = |start: usize, end: usize| {
            let rank = self.ranks.get(&piece[start..end])?;
            Some(Reverse((*rank, start, end)))
        };
        for start in 0..piece.len() - 1 {
            heap.extend(candidate(start, start + 2));
        }
        while let Some(Reverse((_, start, end))) = heap.pop() {
            if !parts.join(start, end) {
                continue;
            }
            if let Some(before) = parts.before(start) {
                heap.extend(candidate(before, end));
            }
            if let Some(behind) = parts.end_of(end) {
                heap.extend(candidate(start, behind));
            }
        }
        let mut start = 0;
        while let Some(end) = parts.end_of(start) {
            ids.extend(self.ranks.get(&piece[start..end]));
            start = end;
        }
    }
}

/// The parts of a piece, each known by its first byte.
struct Parts {
    /// End of the part that begins here; 0 where none begins.
    ends: Vec<usize>,
    /// Start of the part that ends here.
    starts: Vec<usize>,
}

impl Parts {
    /// One part for each byte.
    fn new(len: usize) -> Self {
        Self {
            ends: (1..=len).collect(),
            starts: (0..=len).map(|end| end.saturating_sub(1)).collect(),
        }
    }

    /// End of the part that begins at `start`.
    fn end_of(&self, start: usize) -> Option<usize> {
        self.ends.get(start).copied().filter(|&end| end > 0)
    }

    /// Start of the part that ends at `end`.
    fn before(&self, end: usize) -> Option<usize> {
        (end > 0).then(|| self.starts[end])
    }

    /// Makes one part of the two that reach from `start` to `end`; `false` when
    /// there are no such two any more.
    fn join(&mut self, start: usize, end: usize) -> bool {
        let Some(middle) = self.end_of(start) else {
            return false;
        };
        if self.end_of(middle) != Some(end) {
            return false;
        }
        self.ends[middle] = 0;
        self.ends[start] = end;
        self.starts[end] = start;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::split::LLAMA3;
    use proptest::prelude::*;

    /// The rule word for word: look through all neighbours, join the first pair
    /// of lowest rank, begin again.
    fn naive(ranks: &AHashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|byte| vec![*byte]).collect();
        loop {
            let best = (1..parts.len())
                .filter_map(|at| Some((*ranks.get(&parts[at - 1..=at].concat())?, at)))
                .min();
            let Some((_, at)) = best else {
                return parts.iter().map(|part| ranks[part]).collect();
            };
            let second = parts.remove(at);
            parts[at - 1].extend(second);
        }
    }

    fn vocabulary(words: &[String]) -> AHashMap<Vec<u8>, u32> {
        let mut ranks = AHashMap::new();
        let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        for token in bytes.chain(words.iter().map(|word| word.clone().into_bytes())) {
            let next = u32::try_from(ranks.len()).expect("small");
            ranks.entry(token).or_insert(next);
        }
        ranks
    }

    proptest! {
        #[test]
        fn merges_are_those_of_the_rule(
            words in proptest::collection::vec("[ab]{2,5}|[abcä]{2,3}", 0..24),
            piece in "[ab]{2,40}|[abcä]{2,24}",
        ) {
            let ranks = vocabulary(&words);
            let bpe = RankedBpe::new(ranks.clone(), Splitter::new(LLAMA3).expect("parses"));
            let mut ids = Vec::new();
            bpe.merge(piece.as_bytes(), &mut ids);
            prop_assert_eq!(ids, naive(&ranks, piece.as_bytes()));
        }
    }
}
