//! Keys and values as tensors on a device.

use candle_core::{DType, Device, Result, Tensor};
use llama_checkpoint::blocks::{BLOCK_TOKENS, BlockGeometry, KvBlocks, KvGroup};

use crate::step::{Segment, StepError};
use crate::tables::BlockTables;

/// Shape of a [`TensorCache`].
#[derive(Clone, Debug)]
pub struct CacheShape {
    /// Sequences that there is a place for.
    pub slots: usize,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// Blocks that the sequences share; each slot has its own where that is `None`.
    pub blocks: Option<KvBlocks>,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of a chunk of the layers that attend within chunks.
    pub chunk: Option<usize>,
    /// What each layer keeps.
    pub layers: Vec<KvGroup>,
}

/// Keys and values of the sequences in their slots, for every layer of this rank, in
/// blocks. All memory is taken at once.
#[derive(Debug)]
pub struct TensorCache {
    shape: CacheShape,
    dtype: DType,
    tables: BlockTables,
    layers: Vec<Buffers>,
}

/// Keys and values of a layer, each `[blocks, tokens, KV heads × width]`.
#[derive(Debug)]
struct Buffers {
    keys: Tensor,
    values: Tensor,
}

impl TensorCache {
    /// An empty cache that stores `dtype`.
    ///
    /// # Errors
    /// When the device does not have the memory.
    pub fn new(shape: CacheShape, dtype: DType, device: &Device) -> Result<Self> {
        let tables = BlockTables::new(
            BlockGeometry::new(shape.chunk),
            (shape.slots, shape.max_tokens),
            shape.blocks,
        );
        let width = shape.kv_heads * shape.head_dim;
        let buffer = |group: KvGroup| {
            let blocks = tables.blocks()[group as usize];
            Tensor::zeros((blocks * BLOCK_TOKENS, width), dtype, device)
        };
        let layers = shape.layers.iter().map(|&group| {
            Ok(Buffers {
                keys: buffer(group)?,
                values: buffer(group)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            shape,
            dtype,
            tables,
        })
    }

    /// Bytes that it has taken.
    pub fn bytes(&self) -> u64 {
        let tensors = self
            .layers
            .iter()
            .flat_map(|layer| [&layer.keys, &layer.values]);
        let values: usize = tensors.map(Tensor::elem_count).sum();
        (values * self.dtype.size_in_bytes()) as u64
    }

    /// Its shape.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// See [`BlockTables::check`].
    pub(super) fn check(
        &self,
        segments: &[Segment],
        vocab: usize,
    ) -> std::result::Result<(), StepError> {
        self.tables.check(segments, vocab)
    }

    /// Makes room for a checked segment's tokens, which the caller writes next.
    pub(super) fn extend(&mut self, segment: &Segment) {
        self.tables.apply(segment, |_, _| {});
    }

    /// Puts `keys` and `values`, `[KV heads, tokens, width]`, of the tokens from
    /// `position` on, which a layer sees together, and returns those of all that the
    /// last of them attends to.
    pub(super) fn append(
        &mut self,
        (layer, slot): (usize, usize),
        position: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let len = keys.dim(1)?;
        let (group, geometry) = (self.shape.layers[layer], self.tables.geometry());
        let (first, place) = (
            geometry.first_block(group, position),
            geometry.place(group, position),
        );
        let end = place + len;
        let ids: Vec<usize> = (0..end.div_ceil(BLOCK_TOKENS))
            .map(|index| self.tables.block(group, slot, first + index))
            .collect();
        let buffers = &self.layers[layer];
        let both = [(&buffers.keys, keys), (&buffers.values, values)];
        let [keys, values] = both.map(|(buffer, new)| {
            self.write(buffer, new, &ids, place)?;
            self.gather(buffer, &ids, end)
        });
        Ok((keys?, values?))
    }

    /// Writes `[KV heads, tokens, width]` behind `place` tokens of the blocks `ids`.
    fn write(&self, buffer: &Tensor, new: &Tensor, ids: &[usize], place: usize) -> Result<()> {
        let rows = new.transpose(0, 1)?.contiguous()?.flatten_from(1)?;
        let rows = rows.to_dtype(self.dtype)?;
        let (mut done, len) = (0, rows.dim(0)?);
        while done < len {
            let at = place + done;
            let count = (BLOCK_TOKENS - at % BLOCK_TOKENS).min(len - done);
            let row = ids[at / BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS;
            buffer.slice_set(&rows.narrow(0, done, count)?.contiguous()?, 0, row)?;
            done += count;
        }
        Ok(())
    }

    /// The first `count` tokens of the blocks `ids`, `[KV heads, tokens, width]`.
    fn gather(&self, buffer: &Tensor, ids: &[usize], count: usize) -> Result<Tensor> {
        let first = ids.first().copied().unwrap_or(0);
        let is_run = ids.iter().zip(first..).all(|(id, next)| *id == next);
        let rows = if is_run {
            buffer.narrow(0, first * BLOCK_TOKENS, count)?
        } else {
            let ids: Vec<u32> = ids
                .iter()
                .map(|id| u32::try_from(*id).unwrap_or(u32::MAX))
                .collect();
            let ids = Tensor::from_slice(&ids, ids.len(), buffer.device())?;
            let (rows, width) = buffer.dims2()?;
            buffer
                .reshape((rows / BLOCK_TOKENS, BLOCK_TOKENS * width))?
                .index_select(&ids, 0)?
                .reshape(((), width))?
                .narrow(0, 0, count)?
        };
        rows.reshape((count, self.shape.kv_heads, self.shape.head_dim))?
            .transpose(0, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{TableChange, Wanted};

    fn cache(blocks: Option<KvBlocks>) -> TensorCache {
        let shape = CacheShape {
            slots: 2,
            max_tokens: 1000,
            blocks,
            kv_heads: 2,
            head_dim: 4,
            chunk: Some(64),
            layers: vec![KvGroup::All, KvGroup::Chunk],
        };
        TensorCache::new(shape, DType::F32, &Device::Cpu).expect("small")
    }

    fn segment(start: usize, len: usize, tables: Option<[TableChange; 2]>) -> Segment {
        Segment {
            slot: 1,
            start: u32::try_from(start).expect("small"),
            tokens: vec![0; len],
            logits: Wanted::None,
            adapter: None,
            tables,
        }
    }

    fn ramp(from: usize, len: usize) -> Tensor {
        let value = |head: usize, at: usize, i: usize| (head * 10_000 + (from + at) * 4 + i) as f32;
        let all: Vec<f32> = (0..2)
            .flat_map(|head| (0..len).flat_map(move |at| (0..4).map(move |i| value(head, at, i))))
            .collect();
        Tensor::from_vec(all, (2, len, 4), &Device::Cpu).expect("a tensor")
    }

    fn same(a: &Tensor, b: &Tensor) -> bool {
        let flat = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>());
        a.dims() == b.dims() && flat(a).expect("values") == flat(b).expect("values")
    }

    #[test]
    fn what_was_written_stays_while_the_sequence_grows() {
        let mut cache = cache(None);
        let mut at = 0;
        for len in [1, 7, 300, 1, 500, 191] {
            cache.extend(&segment(at, len, None));
            let new = ramp(at, len);
            let (keys, values) = cache
                .append((0, 1), at, &new, &(&new * 2.0).expect("scales"))
                .expect("room");
            at += len;
            assert!(same(&keys, &ramp(0, at)), "{at}");
            assert!(same(&values, &(ramp(0, at) * 2.0).expect("scales")), "{at}");
        }
    }

    #[test]
    fn scattered_blocks_are_read_in_the_order_of_the_table() {
        let mut cache = cache(Some([40, 40]));
        let add = |blocks: &[u32]| TableChange {
            add: blocks.to_vec(),
            ..TableChange::default()
        };
        cache.extend(&segment(0, 70, Some([add(&[9, 3, 20]), add(&[1, 0, 7])])));
        let (keys, _) = cache
            .append((0, 1), 0, &ramp(0, 70), &ramp(0, 70))
            .expect("room");
        assert!(same(&keys, &ramp(0, 70)));
        // The layer that attends in chunks sees the first chunk, then the second.
        let (keys, _) = cache
            .append((1, 1), 0, &ramp(0, 64), &ramp(0, 64))
            .expect("room");
        assert!(same(&keys, &ramp(0, 64)));
        let (keys, _) = cache
            .append((1, 1), 64, &ramp(64, 6), &ramp(64, 6))
            .expect("room");
        assert!(same(&keys, &ramp(64, 6)));
    }
}
