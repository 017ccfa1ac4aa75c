//! Which blocks of the KV cache are free, held, or kept for sequences that begin
//! alike.
//!
//! A complete block is found again by the hash of all tokens up to its end (a chain of
//! BLAKE3 hashes from a root that names who may share), so that no sequence meets keys
//! of another text. Blocks that nobody holds stay until their room is needed; those
//! that nobody asked for longest go first.

use std::collections::{BTreeMap, HashMap};

use llama_model::blocks::{BLOCK_TOKENS, BlockGeometry, KvBlocks, KvGroup};

use crate::adapters::AdapterUse;

/// What a sequence's tokens up to the end of a block hash to.
pub(super) type BlockHash = [u8; 32];

/// The root of the chains of all sequences that may share blocks: those of one salt and
/// one adapter, or of none.
pub(super) fn root(salt: &str, adapter: Option<AdapterUse>) -> BlockHash {
    let Some(AdapterUse { load, .. }) = adapter else {
        return blake3::derive_key("llama-operator 2026-11 kv block chain", salt.as_bytes());
    };
    let material = [&load.to_le_bytes(), salt.as_bytes()].concat();
    blake3::derive_key(
        "llama-operator 2026-11 kv block chain of an adapter",
        &material,
    )
}

/// The hash of a block behind that of the block before it.
pub(super) fn chain(parent: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hasher = blake3::Hasher::new_keyed(parent);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The blocks of one group of layers.
#[derive(Clone, Debug, Default)]
struct Pool {
    /// Sequences that hold each block.
    holders: Vec<u32>,
    hashes: Vec<Option<BlockHash>>,
    known: HashMap<BlockHash, u32>,
    /// Blocks without holders in the order in which they are given out: those that
    /// cannot be found again, then by when they were let go of.
    idle: BTreeMap<(bool, u64), u32>,
    /// The place of each block in `idle`.
    places: Vec<(bool, u64)>,
    clock: u64,
}

impl Pool {
    fn new(count: usize) -> Self {
        let mut pool = Self {
            holders: vec![0; count],
            hashes: vec![None; count],
            places: vec![(false, 0); count],
            ..Self::default()
        };
        for block in 0..u32::try_from(count).unwrap_or(u32::MAX) {
            pool.rest(block);
        }
        pool
    }

    fn rest(&mut self, block: u32) {
        self.clock += 1;
        let place = (self.hashes[block as usize].is_some(), self.clock);
        self.places[block as usize] = place;
        self.idle.insert(place, block);
    }

    /// A block for new tokens.
    fn take(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        if let Some(hash) = self.hashes[block as usize].take() {
            self.known.remove(&hash);
        }
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// One more holder of the block known by `hash`.
    fn share(&mut self, hash: &BlockHash) -> Option<u32> {
        let block = *self.known.get(hash)?;
        let holders = &mut self.holders[block as usize];
        if *holders == 0 {
            self.idle.remove(&self.places[block as usize]);
        }
        *holders += 1;
        Some(block)
    }

    fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        if *holders == 0 {
            self.rest(block);
        }
    }

    /// Lets a complete block be found. Of two with the same tokens the first is.
    fn publish(&mut self, block: u32, hash: BlockHash) {
        if self.hashes[block as usize].is_none() && !self.known.contains_key(&hash) {
            self.known.insert(hash, block);
            self.hashes[block as usize] = Some(hash);
        }
    }
}

/// The blocks that a sequence holds, by [`KvGroup`].
pub(super) type Held = [HeldBlocks; 2];

/// Blocks `first..first + blocks.len()` of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HeldBlocks {
    /// Number of the first in the sequence.
    pub(super) first: usize,
    /// The blocks.
    pub(super) blocks: Vec<u32>,
}

impl HeldBlocks {
    /// The number behind the last.
    pub(super) fn end(&self) -> usize {
        self.first + self.blocks.len()
    }
}

/// All blocks of the KV cache.
#[derive(Clone, Debug)]
pub(super) struct BlockCache {
    geometry: BlockGeometry,
    pools: [Pool; 2],
    shares: bool,
}

impl BlockCache {
    /// A cache of `blocks`, all free. Sequences share blocks if `shares`.
    pub(super) fn new(geometry: BlockGeometry, blocks: KvBlocks, shares: bool) -> Self {
        Self {
            geometry,
            pools: blocks.map(Pool::new),
            shares: shares && geometry.is_aligned(),
        }
    }

    /// Whether complete blocks are found again.
    pub(super) fn shares(&self) -> bool {
        self.shares
    }

    /// Blocks without a holder, by group.
    pub(super) fn free(&self) -> KvBlocks {
        self.pools.each_ref().map(|pool| pool.idle.len())
    }

    /// Blocks in all, by group.
    pub(super) fn total(&self) -> KvBlocks {
        self.pools.each_ref().map(|pool| pool.holders.len())
    }

    /// The longest prefix, in tokens, of which the blocks that its successor attends
    /// to are all known; `hashes` are those of the sequence's complete blocks.
    pub(super) fn longest_prefix(&self, hashes: &[BlockHash]) -> usize {
        let known = |group: KvGroup, block: usize| {
            self.pools[group as usize]
                .known
                .contains_key(&hashes[block])
        };
        let count = (0..hashes.len())
            .take_while(|block| known(KvGroup::All, *block))
            .count();
        let is_whole = |blocks: &usize| {
            let first = self
                .geometry
                .first_block(KvGroup::Chunk, blocks * BLOCK_TOKENS);
            !self.geometry.has(KvGroup::Chunk)
                || (first..*blocks).all(|block| known(KvGroup::Chunk, block))
        };
        (0..=count).rev().find(is_whole).unwrap_or(0) * BLOCK_TOKENS
    }

    /// Holds the blocks of a prefix of `tokens`, as [`Self::longest_prefix`] found it.
    pub(super) fn hold_prefix(&mut self, hashes: &[BlockHash], tokens: usize) -> Held {
        let mut held = Held::default();
        for group in self.geometry.groups() {
            let first = self.geometry.first_block(group, tokens);
            let blocks = hashes[..tokens / BLOCK_TOKENS].iter().skip(first);
            let pool = &mut self.pools[group as usize];
            held[group as usize] = HeldBlocks {
                first,
                blocks: blocks.filter_map(|hash| pool.share(hash)).collect(),
            };
        }
        held
    }

    /// Takes what is missing for a sequence of `tokens`; nothing if not all is there.
    /// Returns whether it was.
    pub(super) fn extend(&mut self, held: &mut Held, tokens: usize) -> bool {
        let missing = self.missing(held, tokens);
        if missing
            .iter()
            .zip(self.free())
            .any(|(missing, free)| *missing > free)
        {
            return false;
        }
        for group in self.geometry.groups() {
            for _ in 0..missing[group as usize] {
                let block = self.pools[group as usize].take();
                held[group as usize].blocks.extend(block);
            }
        }
        true
    }

    /// Blocks that are missing for a sequence of `tokens`, by group.
    pub(super) fn missing(&self, held: &Held, tokens: usize) -> KvBlocks {
        KvGroup::EACH.map(|group| {
            self.geometry
                .end(group, tokens)
                .saturating_sub(held[group as usize].end())
        })
    }

    /// Lets go of the blocks that the token at `position` and those behind it do not
    /// attend to.
    pub(super) fn let_go_before(&mut self, held: &mut Held, position: usize) {
        for group in self.geometry.groups() {
            let held = &mut held[group as usize];
            let first = self.geometry.first_block(group, position);
            let count = first.saturating_sub(held.first).min(held.blocks.len());
            for block in held.blocks.drain(..count).rev() {
                self.pools[group as usize].release(block);
            }
            held.first = held.first.max(first);
        }
    }

    /// Lets the complete blocks `from..to` of a sequence be found.
    pub(super) fn publish(
        &mut self,
        held: &Held,
        hashes: &[BlockHash],
        blocks: std::ops::Range<usize>,
    ) {
        if !self.shares {
            return;
        }
        for group in self.geometry.groups() {
            let held = &held[group as usize];
            for number in blocks.clone().filter(|number| *number >= held.first) {
                if let Some(block) = held.blocks.get(number - held.first) {
                    self.pools[group as usize].publish(*block, hashes[number]);
                }
            }
        }
    }

    /// Lets go of all blocks of a sequence, the last first: they are the least likely
    /// to be asked for again.
    pub(super) fn release(&mut self, held: &mut Held) {
        for group in self.geometry.groups() {
            let held = std::mem::take(&mut held[group as usize]);
            for block in held.blocks.into_iter().rev() {
                self.pools[group as usize].release(block);
            }
        }
    }
}
