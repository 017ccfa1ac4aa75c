//! Keys and values as tensors on a device.

use candle_core::{DType, Device, Result, Tensor};

/// Tokens by which a sequence's tensors grow at least.
const GROWTH: usize = 256;

/// Shape of a [`TensorCache`].
#[derive(Clone, Debug)]
pub struct CacheShape {
    /// Sequences that there is a place for.
    pub slots: usize,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The chunk of each layer that attends within chunks. Such a layer keeps the
    /// tokens of one chunk only.
    pub chunks: Vec<Option<usize>>,
}

/// Keys and values of the sequences in their slots, for every layer of this rank.
/// The tensors of a layer grow as its sequence does, at least by half, and stay
/// for the next sequence in the slot.
#[derive(Debug)]
pub struct TensorCache {
    shape: CacheShape,
    dtype: DType,
    device: Device,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    tokens: usize,
    layers: Vec<Option<Buffers>>,
}

/// Keys and values, each `[KV heads, capacity, width]`.
#[derive(Clone, Debug)]
struct Buffers {
    keys: Tensor,
    values: Tensor,
}

impl TensorCache {
    /// An empty cache that stores `dtype`.
    pub fn new(shape: CacheShape, dtype: DType, device: &Device) -> Self {
        let layers = shape.chunks.len();
        let slots = (0..shape.slots).map(|_| Slot {
            tokens: 0,
            layers: vec![None; layers],
        });
        Self {
            slots: slots.collect(),
            shape,
            dtype,
            device: device.clone(),
        }
    }

    /// Its shape.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Tokens of the sequence in `slot`.
    pub fn tokens(&self, slot: usize) -> usize {
        self.slots[slot].tokens
    }

    /// Says that the sequence in `slot` has `tokens` tokens from now on; the
    /// caller writes those that are new.
    pub(super) fn set_tokens(&mut self, slot: usize, tokens: usize) {
        self.slots[slot].tokens = tokens;
    }

    /// Puts `keys` and `values`, `[KV heads, tokens, width]`, at place `at` of a
    /// layer, and returns those of places 0 to the last one written.
    pub(super) fn append(
        &mut self,
        (layer, slot): (usize, usize),
        at: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let end = at + keys.dim(1)?;
        let buffers = self.room(layer, slot, end)?;
        buffers
            .keys
            .slice_set(&keys.to_dtype(self.dtype)?.contiguous()?, 1, at)?;
        buffers
            .values
            .slice_set(&values.to_dtype(self.dtype)?.contiguous()?, 1, at)?;
        Ok((
            buffers.keys.narrow(1, 0, end)?,
            buffers.values.narrow(1, 0, end)?,
        ))
    }

    /// The tensors of a layer, with places for `needed` tokens.
    fn room(&mut self, layer: usize, slot: usize, needed: usize) -> Result<Buffers> {
        let most = self.shape.chunks[layer].map_or(self.shape.max_tokens, |chunk| {
            chunk.min(self.shape.max_tokens)
        });
        if needed > most {
            candle_core::bail!("{needed} tokens for a layer that keeps {most}");
        }
        let place = &mut self.slots[slot].layers[layer];
        let capacity = place.as_ref().map_or(Ok(0), |old| old.keys.dim(1))?;
        if let Some(buffers) = place.as_ref().filter(|_| needed <= capacity) {
            return Ok(buffers.clone());
        }
        let grown = needed
            .max(capacity + capacity / 2)
            .next_multiple_of(GROWTH)
            .min(most);
        let shape = (self.shape.kv_heads, grown, self.shape.head_dim);
        let new = Buffers {
            keys: Tensor::zeros(shape, self.dtype, &self.device)?,
            values: Tensor::zeros(shape, self.dtype, &self.device)?,
        };
        if let Some(old) = place.take() {
            new.keys.slice_set(&old.keys, 1, 0)?;
            new.values.slice_set(&old.values, 1, 0)?;
        }
        *place = Some(new.clone());
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(chunk: Option<usize>) -> TensorCache {
        let shape = CacheShape {
            slots: 2,
            max_tokens: 1000,
            kv_heads: 2,
            head_dim: 4,
            chunks: vec![None, chunk],
        };
        TensorCache::new(shape, DType::F32, &Device::Cpu)
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
    fn what_was_written_stays_while_the_tensors_grow() {
        let mut cache = cache(None);
        let mut at = 0;
        for len in [1, 7, 300, 1, 500, 191] {
            let new = ramp(at, len);
            let (keys, values) = cache
                .append((0, 1), at, &new, &(&new * 2.0).expect("scales"))
                .expect("room");
            at += len;
            assert!(same(&keys, &ramp(0, at)), "{at}");
            assert!(same(&values, &(ramp(0, at) * 2.0).expect("scales")), "{at}");
        }
        assert_eq!(at, 1000);
        let error = cache.append((0, 1), at, &ramp(at, 1), &ramp(at, 1));
        let error = error.expect_err("no room").to_string();
        assert!(
            error.starts_with("1001 tokens for a layer that keeps 1000"),
            "{error}"
        );
    }

    #[test]
    fn memory_is_taken_as_sequences_grow_and_never_beyond_the_limit() {
        let mut cache = cache(Some(64));
        let capacity = |cache: &TensorCache, layer: usize| {
            let buffers = cache.slots[0].layers[layer].as_ref();
            buffers.map_or(0, |buffers| buffers.keys.dims()[1])
        };
        assert_eq!((capacity(&cache, 0), capacity(&cache, 1)), (0, 0));
        for (at, expected) in [(0, 256), (256, 512), (512, 768), (999, 1000)] {
            cache
                .append((0, 0), at, &ramp(at, 1), &ramp(at, 1))
                .expect("room");
            assert_eq!(capacity(&cache, 0), expected);
        }
        cache
            .append((1, 0), 0, &ramp(0, 1), &ramp(0, 1))
            .expect("room");
        assert_eq!(capacity(&cache, 1), 64, "a chunk is all that is kept");
    }
}
