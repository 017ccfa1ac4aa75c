//! Rotary embedding and causal attention over the KV cache.

use std::cell::RefCell;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape};
use half::f16;

use crate::config::LlamaConfig;
use crate::kernels::{self, Activations, Format, Isa, Rows};
use crate::kv::{ATTENTION_TILE_TOKENS, CHUNK_TOKENS, Half, KvCache};
use crate::ops::values;
use crate::threads::Threads;

/// Rotary position embedding (Su et al. 2021) in the layout of GGUF: dimensions
/// 2j and 2j+1 of a head turn together.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// Angle a position, for each pair.
    steps: Vec<f64>,
}

impl Rope {
    /// `factors` divide the frequency of each pair: Llama 3's scaling, which its
    /// GGUF carries as the tensor `rope_freqs.weight`.
    pub(crate) fn new(config: &LlamaConfig, factors: Option<&[f32]>) -> Self {
        let width = config.rope_dim as f64;
        let steps = (0..config.rope_dim / 2)
            .map(|pair| {
                let factor = factors.map_or(1.0, |factors| f64::from(factors[pair]));
                let frequency = config.rope_base.powf(-2.0 * pair as f64 / width);
                frequency / (factor * config.rope_scale)
            })
            .collect();
        Self { steps }
    }

    /// Cosine and sine of each pair at `position`.
    #[expect(clippy::cast_possible_truncation, reason = "angles are turned in f32")]
    fn turns(&self, position: usize) -> impl Iterator<Item = (f32, f32)> {
        self.steps.iter().map(move |step| {
            let (sin, cos) = (position as f64 * step).sin_cos();
            (cos as f32, sin as f32)
        })
    }
}

/// Turns the leading pairs of one head.
fn turn(head: &mut [f32], turns: &[(f32, f32)]) {
    for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
        let [x, y] = *pair;
        *pair = [x * cos - y * sin, x * sin + y * cos];
    }
}

/// The rows of a step: which token of which sequence each is.
#[derive(Debug)]
pub(crate) struct StepRows {
    /// Slot and position of each row.
    places: Vec<(usize, usize)>,
    /// First row and number of rows of stretches of consecutive positions.
    tiles: Vec<(usize, usize)>,
    /// Rotary turns of each row, one a pair.
    turns: Vec<(f32, f32)>,
}

impl StepRows {
    /// Rows for `sequences`, each a slot, a first position and a length.
    pub(crate) fn new(sequences: impl Iterator<Item = (usize, usize, usize)>, rope: &Rope) -> Self {
        let mut rows = Self {
            places: Vec::new(),
            tiles: Vec::new(),
            turns: Vec::new(),
        };
        for (slot, start, len) in sequences {
            for offset in (0..len).step_by(ATTENTION_TILE_TOKENS) {
                let tokens = ATTENTION_TILE_TOKENS.min(len - offset);
                rows.tiles.push((rows.places.len(), tokens));
                for position in start + offset..start + offset + tokens {
                    rows.places.push((slot, position));
                    rows.turns.extend(rope.turns(position));
                }
            }
        }
        rows
    }

    fn turns(&self, row: usize) -> &[(f32, f32)] {
        let pairs = self.turns.len() / self.places.len();
        &self.turns[row * pairs..(row + 1) * pairs]
    }
}

/// Attention of one layer: takes queries, keys and values of a step's rows, puts
/// keys and values into the cache, and returns what the queries attend to.
pub(crate) struct Attend<'a> {
    pub(crate) cache: RefCell<&'a mut KvCache>,
    pub(crate) rows: &'a StepRows,
    pub(crate) layer: usize,
    pub(crate) head_dim: usize,
    pub(crate) threads: &'a Threads,
    pub(crate) isa: Isa,
}

impl Attend<'_> {
    fn store(&self, keys: &[f32], values: &[f32], kv_heads: usize) {
        let mut cache = self.cache.borrow_mut();
        let width = kv_heads * self.head_dim;
        let mut turned = vec![0.0; self.head_dim];
        for (row, place) in self.rows.places.iter().enumerate() {
            for head in 0..kv_heads {
                let start = row * width + head * self.head_dim;
                let range = start..start + self.head_dim;
                turned.copy_from_slice(&keys[range.clone()]);
                turn(&mut turned, self.rows.turns(row));
                cache.write((self.layer, Half::Keys, head), *place, &turned);
                cache.write((self.layer, Half::Values, head), *place, &values[range]);
            }
        }
    }
}

impl CustomOp3 for Attend<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = q_layout.shape().dims2()?;
        let kv_heads = k_layout.shape().dims2()?.1 / self.head_dim;
        self.store(values(k, k_layout)?, values(v, v_layout)?, kv_heads);
        let cache = self.cache.borrow();
        let tiles: Vec<Tile<'_>> = self
            .rows
            .tiles
            .iter()
            .flat_map(|&(first, tokens)| (0..kv_heads).map(move |head| (first, tokens, head)))
            .map(|(first, tokens, head)| Tile {
                rows: self.rows,
                cache: &cache,
                layer: self.layer,
                head_dim: self.head_dim,
                group: width / self.head_dim / kv_heads,
                first,
                tokens,
                head,
                isa: self.isa,
            })
            .collect();
        let queries = values(q, q_layout)?;
        let results = self.threads.map(&tiles, |tile| tile.attend(queries, width));
        let mut out = vec![0.0; queries.len()];
        for (tile, result) in tiles.iter().zip(results) {
            let group = tile.group * self.head_dim;
            for (token, result) in result.chunks_exact(group).enumerate() {
                let start = (tile.first + token) * width + tile.head * group;
                out[start..start + group].copy_from_slice(result);
            }
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }
}

/// Consecutive tokens of one sequence, and the query heads that share a KV head.
struct Tile<'a> {
    rows: &'a StepRows,
    cache: &'a KvCache,
    layer: usize,
    head_dim: usize,
    /// Query heads a KV head.
    group: usize,
    /// First row.
    first: usize,
    tokens: usize,
    /// KV head.
    head: usize,
    isa: Isa,
}

impl Tile<'_> {
    /// The attended values, `[tokens][group][head_dim]`.
    fn attend(&self, queries: &[f32], width: usize) -> Vec<f32> {
        let group_width = self.group * self.head_dim;
        let mut tile = Vec::with_capacity(self.tokens * group_width);
        for row in self.first..self.first + self.tokens {
            let start = row * width + self.head * group_width;
            tile.extend_from_slice(&queries[start..start + group_width]);
            let turned = tile.len() - group_width;
            for head in tile[turned..].chunks_exact_mut(self.head_dim) {
                turn(head, self.rows.turns(row));
                // As precise as the keys, which is how ggml multiplies f16.
                for value in head {
                    *value = f16::from_f32(*value).to_f32();
                }
            }
        }
        let (slot, start) = self.rows.places[self.first];
        let seen = start + self.tokens;
        let mut scores = self.scores(&tile, slot, seen);
        let stride = scores.len() / (self.tokens * self.group);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        tile.fill(0.0);
        for (token, (scores, out)) in scores
            .chunks_exact_mut(self.group * stride)
            .zip(tile.chunks_exact_mut(group_width))
            .enumerate()
        {
            let visible = start + token + 1;
            for scores in scores.chunks_exact_mut(stride) {
                kernels::softmax(self.isa, &mut scores[..visible], scale);
            }
            self.weigh(scores, stride, visible, slot, out);
        }
        tile
    }

    /// Products of every query of the tile with the first `seen` keys.
    fn scores(&self, queries: &[f32], slot: usize, seen: usize) -> Vec<f32> {
        let stride = seen.next_multiple_of(CHUNK_TOKENS);
        let mut scores = vec![0.0; queries.len() / self.head_dim * stride];
        for chunk in 0..seen.div_ceil(CHUNK_TOKENS) {
            let keys = self
                .cache
                .read((self.layer, Half::Keys, self.head), (slot, chunk));
            let count = CHUNK_TOKENS.min(seen - chunk * CHUNK_TOKENS);
            let rows = Rows {
                format: Format::F16,
                bytes: bytemuck::cast_slice(&keys[..count * self.head_dim]),
                columns: self.head_dim,
                ends: &[self.head_dim],
                scales: None,
            };
            let out = &mut scores[chunk * CHUNK_TOKENS..];
            let all = 0..queries.len() / self.head_dim;
            let x = Activations::F32(queries);
            kernels::matmul(self.isa, &rows, &x, all, (out, stride));
        }
        scores
    }

    /// Adds to each head of one token the values, weighted by its scores.
    fn weigh(&self, scores: &[f32], stride: usize, visible: usize, slot: usize, out: &mut [f32]) {
        for chunk in 0..visible.div_ceil(CHUNK_TOKENS) {
            let values = self
                .cache
                .read((self.layer, Half::Values, self.head), (slot, chunk));
            let start = chunk * CHUNK_TOKENS;
            let count = CHUNK_TOKENS.min(visible - start);
            let values = &values[..count * self.head_dim];
            let mut head = 0;
            while head < self.group {
                let scores = &scores[head * stride + start..];
                let out = &mut out[head * self.head_dim..];
                head += match self.group - head {
                    1 => self.weigh_heads::<1>(scores, stride, values, out),
                    2 => self.weigh_heads::<2>(scores, stride, values, out),
                    3 => self.weigh_heads::<3>(scores, stride, values, out),
                    _ => self.weigh_heads::<4>(scores, stride, values, out),
                };
            }
        }
    }

    /// `M` heads that read the same values; returns `M`.
    fn weigh_heads<const M: usize>(
        &self,
        scores: &[f32],
        stride: usize,
        values: &[f16],
        out: &mut [f32],
    ) -> usize {
        let count = values.len() / self.head_dim;
        let weights: [&[f32]; M] = std::array::from_fn(|head| &scores[head * stride..][..count]);
        let out = &mut out[..M * self.head_dim];
        kernels::weighted_sum(self.isa, weights, values.into(), out);
        M
    }
}
