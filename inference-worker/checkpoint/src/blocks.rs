//! How the keys and values of a sequence lie in blocks of the KV cache (Kwon et al.
//! 2023): by whom they are kept, in which block, and at which place of it.

use serde::{Deserialize, Serialize};

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;

/// The layers that keep the same tokens, and so share block tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KvGroup {
    /// Those that attend to all tokens.
    All = 0,
    /// Those that attend within chunks of fixed length.
    Chunk = 1,
}

impl KvGroup {
    /// Both, in the order of their numbers.
    pub const EACH: [Self; 2] = [Self::All, Self::Chunk];
}

/// Number of blocks, by [`KvGroup`].
pub type KvBlocks = [usize; 2];

/// What a KV cache has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvCapacity {
    /// Sequences at a time.
    pub slots: u32,
    /// Blocks of layers that attend to all tokens.
    pub blocks: u32,
    /// Blocks of layers that attend within chunks.
    pub chunk_blocks: u32,
}

impl KvCapacity {
    /// What both have room for.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            slots: self.slots.min(other.slots),
            blocks: self.blocks.min(other.blocks),
            chunk_blocks: self.chunk_blocks.min(other.chunk_blocks),
        }
    }

    /// The blocks by [`KvGroup`].
    pub fn by_group(self) -> KvBlocks {
        [self.blocks as usize, self.chunk_blocks as usize]
    }
}

/// Where tokens lie. The table of a sequence counts its blocks from its first token
/// on; each chunk begins a block of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGeometry {
    chunk: Option<usize>,
}

impl BlockGeometry {
    /// For a model whose chunks have `chunk` tokens, where it has them.
    pub fn new(chunk: Option<usize>) -> Self {
        Self {
            chunk: chunk.filter(|chunk| *chunk > 0),
        }
    }

    /// Tokens of a chunk in the layers of `group`.
    fn chunk(&self, group: KvGroup) -> Option<usize> {
        self.chunk.filter(|_| group == KvGroup::Chunk)
    }

    /// Whether the layers of `group` exist.
    pub fn has(&self, group: KvGroup) -> bool {
        group == KvGroup::All || self.chunk.is_some()
    }

    /// The groups whose layers exist.
    pub fn groups(self) -> impl Iterator<Item = KvGroup> {
        KvGroup::EACH
            .into_iter()
            .filter(move |group| self.has(*group))
    }

    /// Whether a block of either group holds the same tokens, so that both can be
    /// found by what a sequence begins with.
    pub fn is_aligned(&self) -> bool {
        self.chunk.is_none_or(|chunk| chunk % BLOCK_TOKENS == 0)
    }

    /// The place of the token at `position` among those that it can attend to.
    pub fn place(&self, group: KvGroup, position: usize) -> usize {
        self.chunk(group).map_or(position, |chunk| position % chunk)
    }

    /// The first block that the token at `position` can attend to.
    pub fn first_block(&self, group: KvGroup, position: usize) -> usize {
        self.chunk(group)
            .map_or(0, |chunk| position / chunk * chunk.div_ceil(BLOCK_TOKENS))
    }

    /// The block of the token at `position`.
    pub fn block(&self, group: KvGroup, position: usize) -> usize {
        self.first_block(group, position) + self.place(group, position) / BLOCK_TOKENS
    }

    /// The end of the table of a sequence of `tokens`.
    pub fn end(&self, group: KvGroup, tokens: usize) -> usize {
        match tokens {
            _ if !self.has(group) => 0,
            0 => 0,
            tokens => self.block(group, tokens - 1) + 1,
        }
    }

    /// Blocks that hold all that a sequence of `tokens` attends to, and the tokens
    /// that one step of `step` tokens adds.
    pub fn needed(&self, tokens: usize, step: usize) -> KvBlocks {
        KvGroup::EACH.map(|group| {
            let all = self.end(group, tokens);
            match self.chunk(group) {
                // While a step crosses into further chunks, the one before is kept.
                Some(chunk) => {
                    let added = step.div_ceil(BLOCK_TOKENS) + step / chunk + 1;
                    all.min(chunk.div_ceil(BLOCK_TOKENS) + added)
                }
                None => all,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_lie_in_blocks_of_their_chunk() {
        let geometry = BlockGeometry::new(Some(80));
        for (position, place, first, block) in [
            (0, 0, 0, 0),
            (31, 31, 0, 0),
            (32, 32, 0, 1),
            (79, 79, 0, 2),
            (80, 0, 3, 3),
            (240, 0, 9, 9),
            (300, 60, 9, 10),
        ] {
            let group = KvGroup::Chunk;
            assert_eq!(geometry.place(group, position), place);
            assert_eq!(geometry.first_block(group, position), first);
            assert_eq!(geometry.block(group, position), block);
            let group = KvGroup::All;
            assert_eq!(geometry.place(group, position), position);
            assert_eq!(geometry.block(group, position), position / BLOCK_TOKENS);
        }
        assert!(!geometry.is_aligned() && BlockGeometry::new(Some(64)).is_aligned());
        assert_eq!(geometry.needed(1000, 1), [32, 5]);
        assert_eq!(geometry.needed(81, 100), [3, 4]);
        assert_eq!(BlockGeometry::new(None).needed(33, 8), [2, 0]);
        assert_eq!(BlockGeometry::new(None).end(KvGroup::All, 0), 0);
    }
}
