//! The KV cache of one rank.

use half::f16;
use half::slice::HalfFloatSliceExt;
use llama_checkpoint::config::LlamaConfig;
use llama_checkpoint::memory::{KvFormat, PAGE_TOKENS};
use llama_checkpoint::shard::Shard;

use crate::kernels::Values;

/// Which half of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Keys = 0,
    Values = 1,
}

/// Keys and values of the tokens of several sequences, for the layers and the KV
/// heads of this rank. Memory is taken in pages of [`PAGE_TOKENS`] as sequences
/// grow, and goes from sequence to sequence; there are never more pages than
/// `slots` full sequences need.
///
/// Layers that attend in chunks keep one chunk of each sequence: a token of the
/// next chunk takes the place of the one that stood there in the chunk before.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// By layer of this rank: whether it keeps chunks, and its number among those
    /// that keep alike.
    layers: Vec<(Kept, usize)>,
    kv_heads: usize,
    head_dim: usize,
    format: KvFormat,
    max_tokens: usize,
    chunk: Option<usize>,
    slots: Vec<Slot>,
    free: [Vec<Page>; 2],
    /// Values of a page.
    page_len: [usize; 2],
}

/// Which tokens a layer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    All = 0,
    Chunk = 1,
}

#[derive(Debug, Default)]
struct Slot {
    /// Each `[layer][half][KV head][token][head_dim]`, by [`Kept`].
    pages: [Vec<Page>; 2],
    tokens: usize,
}

#[derive(Debug)]
enum Page {
    F16(Box<[f16]>),
    F32(Box<[f32]>),
}

impl Page {
    fn new(format: KvFormat, len: usize) -> Self {
        match format {
            KvFormat::F16 => Self::F16(vec![f16::ZERO; len].into_boxed_slice()),
            KvFormat::F32 => Self::F32(vec![0.0; len].into_boxed_slice()),
        }
    }
}

impl KvCache {
    /// An empty cache for `slots` sequences of up to `max_tokens`.
    pub(crate) fn new(
        config: &LlamaConfig,
        shard: &Shard,
        format: KvFormat,
        (slots, max_tokens): (usize, usize),
    ) -> Self {
        let mut counts = [0; 2];
        let layers = config.layers[shard.layers.clone()]
            .iter()
            .map(|kind| {
                let kept = match config.chunk {
                    Some(_) if kind.chunked => Kept::Chunk,
                    _ => Kept::All,
                };
                let index = counts[kept as usize];
                counts[kept as usize] += 1;
                (kept, index)
            })
            .collect();
        let layer = 2 * shard.kv_heads.len() * PAGE_TOKENS * config.head_dim;
        Self {
            layers,
            kv_heads: shard.kv_heads.len(),
            head_dim: config.head_dim,
            format,
            max_tokens,
            chunk: config.chunk,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            free: Default::default(),
            page_len: counts.map(|layers| layers * layer),
        }
    }

    /// How keys and values are kept.
    pub(crate) fn format(&self) -> KvFormat {
        self.format
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
        let place = &mut self.slots[slot];
        place.tokens = keep + add;
        for kept in [Kept::All, Kept::Chunk] {
            let len = self.page_len[kept as usize];
            let tokens = match (kept, self.chunk) {
                (Kept::Chunk, Some(chunk)) => place.tokens.min(chunk),
                _ => place.tokens,
            };
            let needed = if len == 0 {
                0
            } else {
                tokens.div_ceil(PAGE_TOKENS)
            };
            let (pages, free) = (
                &mut place.pages[kept as usize],
                &mut self.free[kept as usize],
            );
            while pages.len() > needed {
                free.extend(pages.pop());
            }
            while pages.len() < needed {
                let page = free.pop();
                pages.push(page.unwrap_or_else(|| Page::new(self.format, len)));
            }
        }
    }

    /// The place of the token at `position` in the layer's pages: how many tokens
    /// of its sequence, or of its chunk, lie before it.
    pub(crate) fn place(&self, layer: usize, position: usize) -> usize {
        match (self.layers[layer].0, self.chunk) {
            (Kept::Chunk, Some(chunk)) => position % chunk,
            _ => position,
        }
    }

    /// Writes one head's key or value of the token at `position`.
    pub(crate) fn write(
        &mut self,
        (layer, half, head): (usize, Half, usize),
        (slot, position): (usize, usize),
        values: &[f32],
    ) {
        let place = self.place(layer, position);
        let start = self.head_start(layer, half, head) + place % PAGE_TOKENS * self.head_dim;
        let range = start..start + self.head_dim;
        let kept = self.layers[layer].0;
        match &mut self.slots[slot].pages[kept as usize][place / PAGE_TOKENS] {
            Page::F16(page) => page[range].convert_from_f32_slice(values),
            Page::F32(page) => page[range].copy_from_slice(values),
        }
    }

    /// One head's keys or values of the first `count` tokens of a page,
    /// `[count, head_dim]`.
    pub(crate) fn read(
        &self,
        (layer, half, head): (usize, Half, usize),
        (slot, page): (usize, usize),
        count: usize,
    ) -> Values<'_> {
        let start = self.head_start(layer, half, head);
        let range = start..start + count * self.head_dim;
        let kept = self.layers[layer].0;
        match &self.slots[slot].pages[kept as usize][page] {
            Page::F16(page) => Values::F16(&page[range]),
            Page::F32(page) => Values::F32(&page[range]),
        }
    }

    fn head_start(&self, layer: usize, half: Half, head: usize) -> usize {
        let (_, layer) = self.layers[layer];
        ((layer * 2 + half as usize) * self.kv_heads + head) * PAGE_TOKENS * self.head_dim
    }

    #[cfg(test)]
    fn pages(&self, kept: Kept) -> usize {
        let used = self
            .slots
            .iter()
            .map(|slot| slot.pages[kept as usize].len());
        self.free[kept as usize].len() + used.sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_checkpoint::Layout;
    use llama_checkpoint::config::LayerKind;
    use llama_checkpoint::fixture::config;
    use proptest::prelude::*;

    /// Two layers, of which one attends in chunks of 96.
    fn shape() -> LlamaConfig {
        LlamaConfig {
            layers: vec![
                LayerKind::PLAIN,
                LayerKind {
                    chunked: true,
                    ..LayerKind::PLAIN
                },
            ],
            chunk: Some(96),
            ..config(2, 2, 64, 64)
        }
    }

    fn cache(format: KvFormat, tensor: usize, slots: usize, max_tokens: usize) -> KvCache {
        let config = shape();
        let shard = Shard::new(&config, Layout::tensor(tensor), 0).expect("splits");
        KvCache::new(&config, &shard, format, (slots, max_tokens))
    }

    proptest! {
        #[test]
        fn memory_follows_use_and_never_exceeds_the_plan(
            steps in proptest::collection::vec((0_usize..3, 0_usize..200), 1..40),
        ) {
            let mut cache = cache(KvFormat::F16, 2, 3, 200);
            let (mut most, mut most_chunked) = (0, 0);
            for (slot, tokens) in steps {
                cache.extend(slot, 0, tokens);
                let pages = |limit: usize| -> usize {
                    (0..3).map(|slot| cache.tokens(slot).min(limit).div_ceil(PAGE_TOKENS)).sum()
                };
                most = most.max(pages(200));
                most_chunked = most_chunked.max(pages(96));
                prop_assert_eq!(cache.pages(Kept::All), most);
                prop_assert_eq!(cache.pages(Kept::Chunk), most_chunked);
                prop_assert!(most <= 3 * 200_usize.div_ceil(PAGE_TOKENS));
                prop_assert!(most_chunked <= 3 * 96_usize.div_ceil(PAGE_TOKENS));
            }
        }
    }

    #[test]
    fn sequences_and_layers_do_not_mix() {
        for format in [KvFormat::F16, KvFormat::F32] {
            let mut cache = cache(format, 1, 2, 100);
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
                cache.write(what, place, &[number as f32; 64]);
            }
            for (number, &(what, (slot, position))) in places.iter().enumerate() {
                let page = (slot, position / PAGE_TOKENS);
                let at = position % PAGE_TOKENS * 64;
                let found = match cache.read(what, page, PAGE_TOKENS) {
                    Values::F16(values) => values[at..at + 64].to_f32_vec(),
                    Values::F32(values) => values[at..at + 64].to_vec(),
                };
                assert_eq!(found, [number as f32; 64]);
            }
        }
    }

    #[test]
    fn a_chunk_takes_the_place_of_the_one_before() {
        let mut cache = cache(KvFormat::F32, 1, 1, 300);
        cache.extend(0, 0, 100);
        assert_eq!((cache.place(0, 99), cache.place(1, 99)), (99, 3));
    }
}
