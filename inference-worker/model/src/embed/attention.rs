//! Attention of every token to every token of its text.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape};
use llama_checkpoint::memory::ATTENTION_TILE_TOKENS;

use crate::kernels::{self, Activations, Format, Isa, Rows, Values};
use crate::ops::values;
use crate::threads::Threads;

/// `softmax(Q·Kᵀ / √d)·V` of each head (Vaswani et al. 2017), of tensors
/// `[tokens, hidden]`, in each text.
#[derive(Clone, Copy, Debug)]
pub(super) struct SelfAttention<'a> {
    pub(super) heads: usize,
    /// Rows of each text.
    pub(super) ranges: &'a [Range<usize>],
    pub(super) isa: Isa,
    pub(super) threads: &'a Threads,
}

impl CustomOp3 for SelfAttention<'_> {
    fn name(&self) -> &'static str {
        "self-attention"
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
        let (tokens, hidden) = q_layout.shape().dims2()?;
        let all = [
            values(q, q_layout)?,
            values(k, k_layout)?,
            values(v, v_layout)?,
        ];
        let width = hidden / self.heads;
        let texts = self.ranges.iter();
        let heads = texts.flat_map(|range| (0..self.heads).map(move |head| (range, head)));
        let heads: Vec<(&Range<usize>, usize)> = heads.collect();
        let parts = self.threads.map(&heads, |(range, head)| {
            let of_text = all.map(|rows| &rows[range.start * hidden..range.end * hidden]);
            let [queries, keys, values] = of_text.map(|rows| columns(rows, hidden, *head, width));
            self.attend(&queries, &keys, &values, width)
        });
        let mut out = vec![0.0; tokens * hidden];
        for ((range, head), part) in heads.iter().zip(&parts) {
            let rows = out[range.start * hidden..range.end * hidden].chunks_exact_mut(hidden);
            for (row, part) in rows.zip(part.chunks_exact(width)) {
                row[head * width..][..width].copy_from_slice(part);
            }
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }
}

impl SelfAttention<'_> {
    /// What one head attends to, `[tokens, width]`.
    fn attend(&self, queries: &[f32], keys: &[f32], values: &[f32], width: usize) -> Vec<f32> {
        let tokens = keys.len() / width;
        let rows = Rows {
            format: Format::F32,
            bytes: bytemuck::cast_slice(keys),
            columns: width,
            ends: &[width],
            scales: None,
        };
        let scale = 1.0 / (width as f32).sqrt();
        let mut out = vec![0.0; queries.len()];
        let mut scores = vec![0.0; ATTENTION_TILE_TOKENS * tokens];
        let tiles = queries.chunks(ATTENTION_TILE_TOKENS * width);
        for (queries, out) in tiles.zip(out.chunks_mut(ATTENTION_TILE_TOKENS * width)) {
            let count = queries.len() / width;
            let scores = &mut scores[..count * tokens];
            let x = Activations::F32(queries);
            kernels::matmul(self.isa, &rows, &x, 0..count, (scores, tokens));
            for (scores, out) in scores.chunks_mut(tokens).zip(out.chunks_mut(width)) {
                kernels::softmax(self.isa, scores, scale);
                kernels::weighted_sum(self.isa, [&*scores], Values::F32(values), out);
            }
        }
        out
    }
}

/// The columns of `head` of rows of `hidden`.
fn columns(rows: &[f32], hidden: usize, head: usize, width: usize) -> Vec<f32> {
    let rows = rows.chunks_exact(hidden);
    rows.flat_map(|row| &row[head * width..][..width])
        .copied()
        .collect()
}
