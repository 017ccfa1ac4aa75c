//! The KV cache of one rank.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::config::LlamaConfig;
use crate::shard::Shard;

/// Tokens for which memory is taken at a time.
pub const CHUNK_TOKENS: usize = 64;

/// Tokens of a sequence whose attention is computed together.
pub(crate) const ATTENTION_TILE_TOKENS: usize = 16;

/// Which half of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Keys = 0,
    Values = 1,
}

/// Keys and values of the tokens of several sequences, for every layer and the
/// KV heads of this rank, in f16. Memory is taken in chunks of
/// [`CHUNK_TOKENS`] as sequences grow, and goes from sequence to sequence; there
/// are never more chunks than `slots` full sequences need.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    max_tokens: usize,
    slots: Vec<Slot>,
    free: Vec<Box<[f16]>>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Each `[layer][half][KV head][token][head_dim]`.
    chunks: Vec<Box<[f16]>>,
    tokens: usize,
}

/// Bytes of the cache for one token on the rank of `shard`.
pub(crate) fn bytes_per_token(config: &LlamaConfig, shard: &Shard) -> u64 {
    let values = config.layers * 2 * shard.kv_heads.len() * config.head_dim;
    (values * size_of::<f16>()) as u64
}

impl KvCache {
    /// An empty cache for `slots` sequences of up to `max_tokens`.
    pub(crate) fn new(
        config: &LlamaConfig,
        shard: &Shard,
        slots: usize,
        max_tokens: usize,
    ) -> Self {
        Self {
            layers: config.layers,
            kv_heads: shard.kv_heads.len(),
            head_dim: config.head_dim,
            max_tokens,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            free: Vec::new(),
        }
    }

    /// Sequences that there is a place for.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Tokens that a sequence may have.
    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Tokens of the sequence in `slot`.
    pub(crate) fn tokens(&self, slot: usize) -> usize {
        self.slots[slot].tokens
    }

    /// Keeps the first `keep` tokens of `slot` and makes room for `add` behind
    /// them, which the caller writes next.
    pub(crate) fn extend(&mut self, slot: usize, keep: usize, add: usize) {
        let values = self.layers * 2 * self.kv_heads * CHUNK_TOKENS * self.head_dim;
        let needed = (keep + add).div_ceil(CHUNK_TOKENS);
        let place = &mut self.slots[slot];
        place.tokens = keep + add;
        while place.chunks.len() > needed {
            self.free.extend(place.chunks.pop());
        }
        while place.chunks.len() < needed {
            let chunk = self.free.pop();
            place
                .chunks
                .push(chunk.unwrap_or_else(|| vec![f16::ZERO; values].into_boxed_slice()));
        }
    }

    /// Writes one head's key or value of the token at `position`.
    pub(crate) fn write(
        &mut self,
        (layer, half, head): (usize, Half, usize),
        (slot, position): (usize, usize),
        values: &[f32],
    ) {
        let start = self.head_start(layer, half, head);
        let start = start + position % CHUNK_TOKENS * self.head_dim;
        self.slots[slot].chunks[position / CHUNK_TOKENS][start..start + self.head_dim]
            .convert_from_f32_slice(values);
    }

    /// One head's keys or values of the tokens from `chunk · CHUNK_TOKENS` on,
    /// `[CHUNK_TOKENS, head_dim]`.
    pub(crate) fn read(
        &self,
        (layer, half, head): (usize, Half, usize),
        (slot, chunk): (usize, usize),
    ) -> &[f16] {
        let start = self.head_start(layer, half, head);
        &self.slots[slot].chunks[chunk][start..start + CHUNK_TOKENS * self.head_dim]
    }

    fn head_start(&self, layer: usize, half: Half, head: usize) -> usize {
        ((layer * 2 + half as usize) * self.kv_heads + head) * CHUNK_TOKENS * self.head_dim
    }

    #[cfg(test)]
    fn chunks(&self) -> usize {
        self.free.len()
            + self
                .slots
                .iter()
                .map(|slot| slot.chunks.len())
                .sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> LlamaConfig {
        LlamaConfig {
            layers: 2,
            hidden: 64,
            ffn: 64,
            heads: 2,
            kv_heads: 2,
            head_dim: 32,
            rope_dim: 32,
            rope_base: 1e4,
            rope_scale: 1.0,
            rms_epsilon: 1e-5,
            context_length: 256,
            vocab: 16,
        }
    }

    proptest! {
        #[test]
        fn memory_follows_use_and_never_exceeds_the_plan(
            steps in proptest::collection::vec((0_usize..3, 0_usize..200), 1..40),
        ) {
            let config = config();
            let shard = Shard::new(&config, 1, 2, 32).expect("splits");
            let mut cache = KvCache::new(&config, &shard, 3, 200);
            let mut most = 0;
            for (slot, tokens) in steps {
                cache.extend(slot, 0, tokens);
                let used: usize = (0..3).map(|slot| cache.tokens(slot).div_ceil(CHUNK_TOKENS)).sum();
                most = most.max(used);
                prop_assert_eq!(cache.chunks(), most);
                prop_assert!(most <= 3 * 200_usize.div_ceil(CHUNK_TOKENS));
            }
        }
    }

    #[test]
    fn sequences_and_layers_do_not_mix() {
        let config = config();
        let shard = Shard::new(&config, 0, 1, 32).expect("splits");
        let mut cache = KvCache::new(&config, &shard, 2, 100);
        let mut places = Vec::new();
        for slot in 0..2 {
            cache.extend(slot, 0, 70);
            for layer in 0..2 {
                for half in [Half::Keys, Half::Values] {
                    for head in 0..2 {
                        for position in [0, 63, 64, 69] {
                            places.push(((layer, half, head), (slot, position)));
                        }
                    }
                }
            }
        }
        for (number, &(what, place)) in places.iter().enumerate() {
            cache.write(what, place, &[number as f32; 32]);
        }
        for (number, &(what, (slot, position))) in places.iter().enumerate() {
            let chunk = cache.read(what, (slot, position / CHUNK_TOKENS));
            let token = &chunk[position % CHUNK_TOKENS * 32..][..32];
            assert_eq!(token, [f16::from_f32(number as f32); 32]);
        }
    }
}
