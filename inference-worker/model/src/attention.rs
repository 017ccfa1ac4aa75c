//! Attention over the KV cache.

use std::cell::RefCell;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape};
use half::f16;
use llama_checkpoint::blocks::BLOCK_TOKENS;
use llama_checkpoint::config::Temperature;
use llama_checkpoint::memory::{ATTENTION_TILE_TOKENS, KvFormat};

use crate::kernels::{self, Activations, Format, Isa, Rows, Values};
use crate::kv::{Half, KvCache};
use crate::ops::values;
use crate::rope::Rope;
use crate::threads::Threads;

/// The rows of a step: which token of which sequence each is.
#[derive(Debug)]
pub(crate) struct StepRows {
    /// Slot and position of each row.
    places: Vec<(usize, usize)>,
    /// All rows, for layers that attend to all tokens.
    whole: [Phase; 1],
    /// The rows of one chunk of each sequence at a time, for layers that attend in
    /// chunks.
    chunks: Vec<Phase>,
    /// Rotary turns of each row, one a pair.
    turns: Vec<(f32, f32)>,
}

/// Rows whose keys and values are stored, and which then attend: first row and
/// number of rows of stretches of consecutive positions.
type Phase = Vec<(usize, usize)>;

impl StepRows {
    /// Rows for `sequences`, each a slot, a first position and a length.
    pub(crate) fn new(
        sequences: impl Iterator<Item = (usize, usize, usize)>,
        rope: &Rope,
        chunk: Option<usize>,
    ) -> Self {
        let mut rows = Self {
            places: Vec::new(),
            whole: [Vec::new()],
            chunks: Vec::new(),
            turns: Vec::new(),
        };
        for (slot, start, len) in sequences {
            let first = rows.places.len();
            for position in start..start + len {
                rows.places.push((slot, position));
                rows.turns.extend(rope.turns(position));
            }
            tile(&mut rows.whole[0], first, len);
            let Some(chunk) = chunk else { continue };
            let (mut done, mut phase) = (0, 0);
            while done < len {
                let part = (len - done).min(chunk - (start + done) % chunk);
                if rows.chunks.len() == phase {
                    rows.chunks.push(Vec::new());
                }
                tile(&mut rows.chunks[phase], first + done, part);
                done += part;
                phase += 1;
            }
        }
        rows
    }

    fn turns(&self, row: usize) -> &[(f32, f32)] {
        let pairs = self.turns.len() / self.places.len();
        &self.turns[row * pairs..(row + 1) * pairs]
    }
}

/// Cuts `len` rows from `first` on into tiles.
fn tile(phase: &mut Phase, first: usize, len: usize) {
    for offset in (0..len).step_by(ATTENTION_TILE_TOKENS) {
        phase.push((first + offset, ATTENTION_TILE_TOKENS.min(len - offset)));
    }
}

/// What a layer does to queries and keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionForm {
    /// Whether they turn.
    pub(crate) rope: bool,
    /// Whether they attend in chunks.
    pub(crate) chunked: bool,
    /// Normalises each head, with this added to the mean square.
    pub(crate) norm: Option<f32>,
    /// Growth of queries with their position.
    pub(crate) temperature: Option<Temperature>,
}

/// Attention of one layer: takes queries, keys and values of a step's rows, puts
/// keys and values into the cache, and returns what the queries attend to.
pub(crate) struct Attend<'a> {
    pub(crate) cache: RefCell<&'a mut KvCache>,
    pub(crate) step: LayerStep<'a>,
}

/// A layer's part of a step.
#[derive(Clone, Copy)]
pub(crate) struct LayerStep<'a> {
    pub(crate) rows: &'a StepRows,
    pub(crate) rope: &'a Rope,
    pub(crate) form: AttentionForm,
    /// Number of the layer in the cache.
    pub(crate) layer: usize,
    pub(crate) head_dim: usize,
    pub(crate) threads: &'a Threads,
    pub(crate) isa: Isa,
}

impl LayerStep<'_> {
    /// Turns and normalises one head of row `row`.
    fn prepare(&self, head: &mut [f32], row: usize) {
        if self.form.rope {
            self.rope.turn(head, self.rows.turns(row));
        }
        if let Some(epsilon) = self.form.norm {
            let scale = 1.0 / (kernels::mean_square(head) + epsilon).sqrt();
            for value in head {
                *value *= scale;
            }
        }
    }
}

impl Attend<'_> {
    fn store(&self, phase: &Phase, keys: &[f32], values: &[f32], kv_heads: usize) {
        let (step, mut cache) = (&self.step, self.cache.borrow_mut());
        let width = kv_heads * step.head_dim;
        let mut key = vec![0.0; step.head_dim];
        for row in phase
            .iter()
            .flat_map(|(first, count)| *first..first + count)
        {
            let place = step.rows.places[row];
            for head in 0..kv_heads {
                let start = row * width + head * step.head_dim;
                let range = start..start + step.head_dim;
                key.copy_from_slice(&keys[range.clone()]);
                step.prepare(&mut key, row);
                cache.write((step.layer, Half::Keys, head), place, &key);
                cache.write((step.layer, Half::Values, head), place, &values[range]);
            }
        }
    }

    fn attend(&self, phase: &Phase, queries: &[f32], kv_heads: usize, out: &mut [f32]) {
        let (step, cache) = (&self.step, self.cache.borrow());
        let width = queries.len() / step.rows.places.len();
        let tiles: Vec<Tile<'_>> = phase
            .iter()
            .flat_map(|&(first, tokens)| (0..kv_heads).map(move |head| (first, tokens, head)))
            .map(|(first, tokens, head)| Tile {
                step,
                cache: &cache,
                group: width / step.head_dim / kv_heads,
                first,
                tokens,
                head,
            })
            .collect();
        let results = step.threads.map(&tiles, |tile| tile.attend(queries, width));
        for (tile, result) in tiles.iter().zip(results) {
            let group = tile.group * step.head_dim;
            for (token, result) in result.chunks_exact(group).enumerate() {
                let start = (tile.first + token) * width + tile.head * group;
                out[start..start + group].copy_from_slice(result);
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
        let kv_heads = k_layout.shape().dims2()?.1 / self.step.head_dim;
        let (keys, stored) = (values(k, k_layout)?, values(v, v_layout)?);
        let queries = values(q, q_layout)?;
        let mut out = vec![0.0; queries.len()];
        let phases: &[Phase] = if self.step.form.chunked {
            &self.step.rows.chunks
        } else {
            &self.step.rows.whole
        };
        for phase in phases {
            self.store(phase, keys, stored, kv_heads);
            self.attend(phase, queries, kv_heads, &mut out);
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }
}

/// Consecutive tokens of one sequence, and the query heads that share a KV head.
struct Tile<'a> {
    step: &'a LayerStep<'a>,
    cache: &'a KvCache,
    /// Query heads a KV head.
    group: usize,
    /// First row.
    first: usize,
    tokens: usize,
    /// KV head.
    head: usize,
}

impl Tile<'_> {
    /// The queries of the tile, `[tokens][group][head_dim]`, ready to meet keys.
    fn queries(&self, queries: &[f32], width: usize) -> Vec<f32> {
        let head_dim = self.step.head_dim;
        let group_width = self.group * head_dim;
        let mut tile = Vec::with_capacity(self.tokens * group_width);
        for row in self.first..self.first + self.tokens {
            let start = row * width + self.head * group_width;
            tile.extend_from_slice(&queries[start..start + group_width]);
            let fresh = tile.len() - group_width;
            let (_, position) = self.step.rows.places[row];
            let temperature = self.step.form.temperature;
            let factor = temperature.map_or(1.0, |temperature| temperature.factor(position));
            for head in tile[fresh..].chunks_exact_mut(head_dim) {
                self.step.prepare(head, row);
                for value in head {
                    *value *= factor;
                    if self.cache.format() == KvFormat::F16 {
                        // As precise as the keys, which is how ggml multiplies f16.
                        *value = f16::from_f32(*value).to_f32();
                    }
                }
            }
        }
        tile
    }

    /// The attended values, `[tokens][group][head_dim]`.
    fn attend(&self, queries: &[f32], width: usize) -> Vec<f32> {
        let head_dim = self.step.head_dim;
        let group_width = self.group * head_dim;
        let mut tile = self.queries(queries, width);
        let (slot, position) = self.step.rows.places[self.first];
        let (block, start) = self.cache.seen(self.step.layer, position);
        let seen = start + self.tokens;
        let mut scores = self.scores(&tile, (slot, block), seen);
        let stride = scores.len() / (self.tokens * self.group);
        let scale = 1.0 / (head_dim as f32).sqrt();
        tile.fill(0.0);
        for (token, (scores, out)) in scores
            .chunks_exact_mut(self.group * stride)
            .zip(tile.chunks_exact_mut(group_width))
            .enumerate()
        {
            let visible = start + token + 1;
            for scores in scores.chunks_exact_mut(stride) {
                kernels::softmax(self.step.isa, &mut scores[..visible], scale);
            }
            self.weigh((scores, stride), visible, (slot, block), out);
        }
        tile
    }

    /// Products of every query of the tile with `seen` keys of the sequence in `slot`
    /// from its block `first` on.
    fn scores(&self, queries: &[f32], (slot, first): (usize, usize), seen: usize) -> Vec<f32> {
        let head_dim = self.step.head_dim;
        let stride = seen.next_multiple_of(BLOCK_TOKENS);
        let mut scores = vec![0.0; queries.len() / head_dim * stride];
        let format = match self.cache.format() {
            KvFormat::F16 | KvFormat::F32 => Format::F32,
            KvFormat::Int8 => Format::Q8_0,
        };
        let x = Activations::new(self.step.isa, format, queries, head_dim);
        for block in 0..seen.div_ceil(BLOCK_TOKENS) {
            let count = BLOCK_TOKENS.min(seen - block * BLOCK_TOKENS);
            let what = (self.step.layer, Half::Keys, self.head);
            let (format, bytes) = match self.cache.read(what, (slot, first + block), count) {
                Values::F16(keys) => (Format::F16, bytemuck::cast_slice(keys)),
                Values::F32(keys) => (Format::F32, bytemuck::cast_slice(keys)),
                Values::Int8(keys) => (Format::Q8_0, keys),
            };
            let rows = Rows {
                format,
                bytes,
                columns: head_dim,
                ends: &[head_dim],
                scales: None,
            };
            let out = &mut scores[block * BLOCK_TOKENS..];
            let all = 0..queries.len() / head_dim;
            kernels::matmul(self.step.isa, &rows, &x, all, (out, stride));
        }
        scores
    }

    /// Adds to each head of one token the values, weighted by its scores.
    fn weigh(
        &self,
        (scores, stride): (&[f32], usize),
        visible: usize,
        (slot, first): (usize, usize),
        out: &mut [f32],
    ) {
        for block in 0..visible.div_ceil(BLOCK_TOKENS) {
            let start = block * BLOCK_TOKENS;
            let count = BLOCK_TOKENS.min(visible - start);
            let what = (self.step.layer, Half::Values, self.head);
            let values = self.cache.read(what, (slot, first + block), count);
            let mut head = 0;
            while head < self.group {
                let scores = &scores[head * stride + start..];
                let out = &mut out[head * self.step.head_dim..];
                let place = (scores, stride, count);
                head += match self.group - head {
                    1 => self.weigh_heads::<1>(place, values, out),
                    2 => self.weigh_heads::<2>(place, values, out),
                    3 => self.weigh_heads::<3>(place, values, out),
                    _ => self.weigh_heads::<4>(place, values, out),
                };
            }
        }
    }

    /// `M` heads that read the same values; returns `M`.
    fn weigh_heads<const M: usize>(
        &self,
        (scores, stride, count): (&[f32], usize, usize),
        values: Values<'_>,
        out: &mut [f32],
    ) -> usize {
        let weights: [&[f32]; M] = std::array::from_fn(|head| &scores[head * stride..][..count]);
        let out = &mut out[..M * self.step.head_dim];
        kernels::weighted_sum(self.step.isa, weights, values, out);
        M
    }
}
