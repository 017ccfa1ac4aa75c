//! Causal attention over a [`TensorCache`] by plain tensor operations.

use candle_core::{D, DType, Device, Result, Tensor};
use llama_checkpoint::config::{RopePairs, Temperature};

use super::cache::TensorCache;
use super::operations::{AttentionRules, Sequence};
use super::rotary::Turns;
use super::tensors::root_mean_square_norm;

/// Queries that attend together at most.
const TILE_TOKENS: usize = 256;
/// Products of queries with keys that are held at a time, a bound on scratch
/// memory: 256 MiB in f32.
const TILE_SCORES: usize = 1 << 26;

/// The rows of a step on a device.
#[derive(Debug)]
pub struct TensorRows {
    sequences: Vec<Sequence>,
    positions: Vec<usize>,
    turns: Turns,
    /// Minus infinity above the diagonal, zero elsewhere; large enough for every
    /// tile. Its corner is the mask of a smaller tile.
    triangle: Tensor,
    device: Device,
}

impl TensorRows {
    /// `steps` holds the angle a position of each pair of a head.
    pub(super) fn new(steps: &[f64], sequences: &[Sequence], device: &Device) -> Result<Self> {
        let positions: Vec<usize> = sequences
            .iter()
            .flat_map(|sequence| sequence.start..sequence.start + sequence.len)
            .collect();
        let longest = sequences.iter().map(|sequence| sequence.len).max();
        Ok(Self {
            sequences: sequences.to_vec(),
            triangle: triangle(longest.unwrap_or(0).min(TILE_TOKENS), device)?,
            turns: Turns::new(steps, &positions, device)?,
            positions,
            device: device.clone(),
        })
    }

    /// Turns heads, `[rows, heads, width]`, by the angles of their rows.
    pub(super) fn turn(&self, heads: &Tensor, pairs: RopePairs) -> Result<Tensor> {
        self.turns.turn(heads, pairs)
    }

    /// Factors of the queries, `[rows, 1, 1]`.
    fn temperatures(&self, temperature: Temperature) -> Result<Tensor> {
        let factors: Vec<f32> = self
            .positions
            .iter()
            .map(|position| temperature.factor(*position))
            .collect();
        Tensor::from_vec(factors, (self.positions.len(), 1, 1), &self.device)
    }

    /// Runs of rows that see one stretch of the cache: whole sequences, or their
    /// parts in one chunk each. A run's places in the cache are counted from the
    /// start of that stretch, so that plain causal attention is all that is left.
    fn runs(&self, chunk: Option<usize>) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut row = 0;
        for sequence in &self.sequences {
            let end = sequence.start + sequence.len;
            let mut start = sequence.start;
            while start < end {
                let origin = chunk.map_or(0, |chunk| start / chunk * chunk);
                let stop = chunk.map_or(end, |chunk| end.min(origin + chunk));
                runs.push(Run {
                    slot: sequence.slot,
                    start,
                    at: start - origin,
                    row,
                    len: stop - start,
                });
                row += stop - start;
                start = stop;
            }
        }
        runs
    }
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    slot: usize,
    /// Position of the first token.
    start: usize,
    /// How many tokens that it attends to lie before.
    at: usize,
    /// The first row.
    row: usize,
    len: usize,
}

/// See [`super::operations::Operations::attend`].
pub(super) fn attend(
    (layer, rules): (usize, &AttentionRules),
    [q, k, v]: [&Tensor; 3],
    rows: &TensorRows,
    cache: &mut TensorCache,
) -> Result<Tensor> {
    let (count, width) = q.dims2()?;
    let (kv_heads, head_dim) = (cache.shape().kv_heads, cache.shape().head_dim);
    let mut q = q.reshape((count, width / head_dim, head_dim))?;
    let mut k = k.reshape((count, kv_heads, head_dim))?;
    let v = v.reshape((count, kv_heads, head_dim))?;
    if let Some(pairs) = rules.rotary {
        (q, k) = (rows.turn(&q, pairs)?, rows.turn(&k, pairs)?);
    }
    if let Some(epsilon) = rules.qk_norm {
        q = root_mean_square_norm(&q, epsilon)?;
        k = root_mean_square_norm(&k, epsilon)?;
    }
    if let Some(temperature) = rules.temperature {
        q = q.broadcast_mul(&rows.temperatures(temperature)?)?;
    }
    let mut parts = Vec::new();
    for run in rows.runs(rules.chunk) {
        let of_run = |x: &Tensor| x.narrow(0, run.row, run.len)?.transpose(0, 1);
        let place = (layer, run.slot);
        let (keys, values) = cache.append(place, run.start, &of_run(&k)?, &of_run(&v)?)?;
        let run = AttendRun {
            keys,
            values,
            at: run.at,
            triangle: &rows.triangle,
        };
        parts.push(run.attend(&of_run(&q)?, TILE_SCORES)?);
    }
    Tensor::cat(&parts, 0)?.reshape((count, width))
}

/// What the queries of one run attend to.
struct AttendRun<'a> {
    /// `[KV heads, seen, width]`.
    keys: Tensor,
    values: Tensor,
    /// Place of the run's first token; it sees one key more.
    at: usize,
    triangle: &'a Tensor,
}

impl AttendRun<'_> {
    /// What `q`, `[heads, tokens, width]`, attends to, `[tokens, heads, width]`; at
    /// most `scores` products at a time, or those of one token.
    fn attend(&self, q: &Tensor, scores: usize) -> Result<Tensor> {
        let (heads, tokens, _) = q.dims3()?;
        let tile = (scores / (heads * self.keys.dim(1)?)).clamp(1, TILE_TOKENS);
        let parts = (0..tokens)
            .step_by(tile)
            .map(|first| self.attend_tile(q, first, tile.min(tokens - first)))
            .collect::<Result<Vec<_>>>()?;
        Tensor::cat(&parts, 0)
    }

    fn attend_tile(&self, q: &Tensor, first: usize, len: usize) -> Result<Tensor> {
        let (heads, _, head_dim) = q.dims3()?;
        let kv_heads = self.keys.dim(0)?;
        let together = heads / kv_heads * len;
        let seen = self.at + first + len;
        let keys = self.keys.narrow(1, 0, seen)?;
        let values = self.values.narrow(1, 0, seen)?;
        let q = q
            .narrow(1, first, len)?
            .reshape((kv_heads, together, head_dim))?
            .to_dtype(keys.dtype())?;
        let scores = q.matmul(&keys.t()?)?.to_dtype(DType::F32)?;
        let scores = (scores / (head_dim as f64).sqrt())?.reshape((heads, len, seen))?;
        let weights = softmax(&self.hide_later(&scores)?)?
            .reshape((kv_heads, together, seen))?
            .to_dtype(values.dtype())?;
        weights
            .matmul(&values)?
            .to_dtype(DType::F32)?
            .reshape((heads, len, head_dim))?
            .transpose(0, 1)
    }

    /// Hides from each of the last keys' queries, `[heads, tokens, seen]`, the keys
    /// that come after it.
    fn hide_later(&self, scores: &Tensor) -> Result<Tensor> {
        let (_, tokens, seen) = scores.dims3()?;
        if tokens == 1 {
            return Ok(scores.clone());
        }
        let mask = self.triangle.narrow(0, 0, tokens)?.narrow(1, 0, tokens)?;
        scores.broadcast_add(&mask.pad_with_zeros(1, seen - tokens, 0)?.unsqueeze(0)?)
    }
}

fn triangle(size: usize, device: &Device) -> Result<Tensor> {
    let hidden = |is_hidden: bool| if is_hidden { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..size)
        .flat_map(|token| (0..size).map(move |key| hidden(key > token)))
        .collect();
    Tensor::from_vec(mask, (size, size), device)
}

/// Softmax over the last dimension.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let most = scores.max_keepdim(D::Minus1)?;
    let powers = scores.broadcast_sub(&most)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(sequences: &[Sequence]) -> TensorRows {
        TensorRows::new(&[1.0], sequences, &Device::Cpu).expect("rows")
    }

    #[test]
    fn small_tiles_change_nothing() {
        let noise = |seed: usize, shape: (usize, usize, usize)| {
            let count = shape.0 * shape.1 * shape.2;
            let values: Vec<f32> = (0..count)
                .map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0)
                .collect();
            Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
        };
        let triangle = triangle(13, &Device::Cpu).expect("a mask");
        let run = AttendRun {
            keys: noise(1, (2, 20, 8)),
            values: noise(2, (2, 20, 8)),
            at: 7,
            triangle: &triangle,
        };
        let q = noise(3, (6, 13, 8));
        let whole = run.attend(&q, usize::MAX).expect("attends");
        assert_eq!(whole.dims(), [13, 6, 8]);
        for scores in [0, 250, 600] {
            let tiled = run.attend(&q, scores).expect("attends");
            let difference = (&tiled - &whole)
                .and_then(|difference| difference.abs()?.max_all()?.to_scalar::<f32>());
            let difference = difference.expect("one shape");
            assert!(difference < 1e-6, "{scores}: {difference}");
        }
    }

    #[test]
    fn chunks_cut_sequences_where_positions_say_so() {
        let sequence = |slot, start, len| Sequence { slot, start, len };
        let rows = rows(&[sequence(3, 6, 9), sequence(0, 16, 1)]);
        let run = |slot, (start, at), row, len| Run {
            slot,
            start,
            at,
            row,
            len,
        };
        assert_eq!(
            rows.runs(None),
            [run(3, (6, 6), 0, 9), run(0, (16, 16), 9, 1)]
        );
        assert_eq!(
            rows.runs(Some(8)),
            [
                run(3, (6, 6), 0, 2),
                run(3, (8, 0), 2, 7),
                run(0, (16, 0), 9, 1)
            ]
        );
    }
}
