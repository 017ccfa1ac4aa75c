//! The KV cache of one rank.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use llama_checkpoint::blocks::{BLOCK_TOKENS, BlockGeometry, KvBlocks, KvGroup};
use llama_checkpoint::config::LlamaConfig;
use llama_checkpoint::memory::KvFormat;
use llama_checkpoint::shard::Shard;

use crate::kernels::{Format, Values, int8};
use crate::step::{Segment, StepError};
use crate::tables::BlockTables;

/// Which half of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Keys = 0,
    Values = 1,
}

/// Keys and values of the tokens of several sequences, for the layers and the KV
/// heads of this rank, in blocks that sequences share where they begin alike. The
/// memory of a block is taken when it is first used.
///
/// Layers that attend in chunks have blocks of their own, of which a sequence keeps
/// those of its last chunk.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// By layer of this rank: what it keeps, and its number among those that keep
    /// alike.
    layers: Vec<(KvGroup, usize)>,
    kv_heads: usize,
    head_dim: usize,
    format: KvFormat,
    tables: BlockTables,
    /// Each `[layer][half][KV head][token][head_dim]`, by [`KvGroup`].
    blocks: [Vec<Option<Block>>; 2],
    /// Values of a block.
    block_len: [usize; 2],
    /// Bytes of the blocks that were used at least once.
    bytes: u64,
}

#[derive(Debug)]
enum Block {
    F16(Box<[f16]>),
    F32(Box<[f32]>),
    Int8(Box<[u8]>),
}

impl Block {
    fn new(format: KvFormat, len: usize) -> Self {
        match format {
            KvFormat::F16 => Self::F16(vec![f16::ZERO; len].into_boxed_slice()),
            KvFormat::F32 => Self::F32(vec![0.0; len].into_boxed_slice()),
            KvFormat::Int8 => {
                let bytes = Format::Q8_0.row_bytes(len);
                Self::Int8(vec![0; bytes].into_boxed_slice())
            }
        }
    }
}

impl KvCache {
    /// An empty cache for `slots` sequences of up to `max_tokens`, of `blocks`; each
    /// slot has its own where that is `None`.
    pub(crate) fn new(
        config: &LlamaConfig,
        shard: &Shard,
        format: KvFormat,
        (slots, max_tokens): (usize, usize),
        blocks: Option<KvBlocks>,
    ) -> Self {
        let mut counts = [0; 2];
        let layers = config.layers[shard.layers.clone()]
            .iter()
            .map(|kind| {
                let group = match config.chunk {
                    Some(_) if kind.chunked => KvGroup::Chunk,
                    _ => KvGroup::All,
                };
                let index = counts[group as usize];
                counts[group as usize] += 1;
                (group, index)
            })
            .collect();
        let layer = 2 * shard.kv_heads.len() * BLOCK_TOKENS * config.head_dim;
        let tables = BlockTables::new(
            BlockGeometry::new(config.chunk),
            (slots, max_tokens),
            blocks,
        );
        Self {
            layers,
            kv_heads: shard.kv_heads.len(),
            head_dim: config.head_dim,
            format,
            blocks: tables.blocks().map(|count| {
                let mut blocks = Vec::new();
                blocks.resize_with(count, || None);
                blocks
            }),
            tables,
            block_len: counts.map(|layers| layers * layer),
            bytes: 0,
        }
    }

    /// Bytes that its blocks have taken so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How keys and values are kept.
    pub(crate) fn format(&self) -> KvFormat {
        self.format
    }

    /// See [`BlockTables::check`].
    pub(crate) fn check(&self, segments: &[Segment], vocab: usize) -> Result<(), StepError> {
        self.tables.check(segments, vocab)
    }

    /// Makes room for a checked segment's tokens, which the caller writes next.
    pub(crate) fn extend(&mut self, segment: &Segment) {
        let (blocks, format, lens) = (&mut self.blocks, self.format, self.block_len);
        let bytes = &mut self.bytes;
        self.tables.apply(segment, |group, block| {
            let len = lens[group as usize];
            if len > 0 {
                blocks[group as usize][block].get_or_insert_with(|| {
                    *bytes += format.row_bytes(len) as u64;
                    Block::new(format, len)
                });
            }
        });
    }

    /// What the token at `position` attends to in a layer: the first block, and how
    /// many tokens of it lie before.
    pub(crate) fn seen(&self, layer: usize, position: usize) -> (usize, usize) {
        let (group, geometry) = (self.layers[layer].0, self.tables.geometry());
        (
            geometry.first_block(group, position),
            geometry.place(group, position),
        )
    }

    /// Writes one head's key or value of the token at `position`.
    pub(crate) fn write(
        &mut self,
        (layer, half, head): (usize, Half, usize),
        (slot, position): (usize, usize),
        values: &[f32],
    ) {
        let (first, place) = self.seen(layer, position);
        let start = self.head_start(layer, half, head) + place % BLOCK_TOKENS * self.head_dim;
        let range = start..start + self.head_dim;
        let group = self.layers[layer].0;
        let block = self.tables.block(group, slot, first + place / BLOCK_TOKENS);
        match &mut self.blocks[group as usize][block] {
            Some(Block::F16(block)) => block[range].convert_from_f32_slice(values),
            Some(Block::F32(block)) => block[range].copy_from_slice(values),
            Some(Block::Int8(block)) => int8::store(values, &mut block[in_bytes(&range)]),
            // `extend` has taken the memory of every block of a table.
            None => {}
        }
    }

    /// One head's keys or values of the first `count` tokens of a block of a
    /// sequence, `[count, head_dim]`.
    pub(crate) fn read(
        &self,
        (layer, half, head): (usize, Half, usize),
        (slot, index): (usize, usize),
        count: usize,
    ) -> Values<'_> {
        let start = self.head_start(layer, half, head);
        let range = start..start + count * self.head_dim;
        let group = self.layers[layer].0;
        let block = self.tables.block(group, slot, index);
        match &self.blocks[group as usize][block] {
            Some(Block::F16(block)) => Values::F16(&block[range]),
            Some(Block::F32(block)) => Values::F32(&block[range]),
            Some(Block::Int8(block)) => Values::Int8(&block[in_bytes(&range)]),
            None => Values::F32(&[]),
        }
    }

    fn head_start(&self, layer: usize, half: Half, head: usize) -> usize {
        let (_, layer) = self.layers[layer];
        ((layer * 2 + half as usize) * self.kv_heads + head) * BLOCK_TOKENS * self.head_dim
    }

    /// Blocks whose memory was taken.
    #[cfg(test)]
    fn taken(&self, group: KvGroup) -> usize {
        self.blocks[group as usize].iter().flatten().count()
    }
}

/// Where values that are kept as integers lie. Heads are whole blocks.
fn in_bytes(range: &Range<usize>) -> Range<usize> {
    Format::Q8_0.row_bytes(range.start)..Format::Q8_0.row_bytes(range.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::Wanted;
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
        KvCache::new(&config, &shard, format, (slots, max_tokens), None)
    }

    fn segment(slot: usize, start: usize, len: usize) -> Segment {
        Segment {
            slot: u32::try_from(slot).expect("small"),
            start: u32::try_from(start).expect("small"),
            tokens: vec![0; len],
            logits: Wanted::None,
            adapter: None,
            tables: None,
        }
    }

    proptest! {
        #[test]
        fn memory_follows_use_and_never_exceeds_the_plan(
            steps in proptest::collection::vec((0_usize..3, 1_usize..200), 1..40),
        ) {
            let mut cache = cache(KvFormat::F16, 2, 3, 200);
            let (mut held, mut most) = ([0; 3], 0);
            for (slot, tokens) in steps {
                cache.extend(&segment(slot, 0, tokens));
                held[slot] = tokens.div_ceil(BLOCK_TOKENS);
                most = most.max(held.iter().sum::<usize>());
                prop_assert_eq!(cache.taken(KvGroup::All), most);
                prop_assert!(cache.taken(KvGroup::Chunk) <= 3 * 3 * 3);
            }
        }
    }

    #[test]
    fn sequences_and_layers_do_not_mix() {
        for format in [KvFormat::F16, KvFormat::F32, KvFormat::Int8] {
            let mut cache = cache(format, 1, 2, 100);
            let mut places = Vec::new();
            for slot in 0..2 {
                cache.extend(&segment(slot, 0, 70));
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
                let block = (slot, position / BLOCK_TOKENS);
                let at = position % BLOCK_TOKENS * 64;
                let found = match cache.read(what, block, BLOCK_TOKENS) {
                    Values::F16(values) => values[at..at + 64].to_f32_vec(),
                    Values::F32(values) => values[at..at + 64].to_vec(),
                    Values::Int8(bytes) => {
                        let row = &bytes[in_bytes(&(at..at + 64))];
                        let mut values = vec![0.0; 64];
                        crate::kernels::unpack(Format::Q8_0, row, None, &mut values);
                        values
                    }
                };
                for value in found {
                    assert!((value - number as f32).abs() < 1e-3 * number as f32 + 1e-9);
                }
            }
        }
    }

    #[test]
    fn a_chunk_begins_a_block_of_its_own() {
        let mut cache = cache(KvFormat::F32, 1, 1, 300);
        cache.extend(&segment(0, 0, 100));
        assert_eq!((cache.seen(0, 99), cache.seen(1, 99)), ((0, 99), (3, 3)));
    }
}
