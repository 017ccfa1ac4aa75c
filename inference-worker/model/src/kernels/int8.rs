//! Activations for quantised weights: each block of 32 becomes 32 signed bytes and
//! a scale, so that a block's products are summed as integers, exactly.

use super::{BLOCK, LANES};

/// Activation rows in int8.
#[derive(Clone, Debug)]
pub(crate) struct Int8Rows {
    pub(super) blocks: usize,
    /// Signed bytes from −127 on, [`BLOCK`] a block.
    pub(super) values: Vec<i8>,
    /// Scale of each block.
    pub(super) scales: Vec<f32>,
    /// Sum of each block, which the minimum of a weight block is multiplied by.
    pub(super) sums: Vec<f32>,
}

/// Blocks that a kernel may read behind the last row.
const PADDING: usize = 1;

impl Int8Rows {
    /// Quantises rows of `columns`, a multiple of [`BLOCK`].
    #[inline(always)]
    pub(super) fn quantize(x: &[f32], columns: usize) -> Self {
        let all = x.len() / BLOCK + PADDING;
        let mut rows = Self {
            blocks: columns / BLOCK,
            values: vec![0; all * BLOCK],
            scales: vec![0.0; all],
            sums: vec![0.0; all],
        };
        let places = rows.scales.iter_mut().zip(&mut rows.sums);
        for ((x, values), (scale, sum)) in x
            .as_chunks::<BLOCK>()
            .0
            .iter()
            .zip(rows.values.as_chunks_mut::<BLOCK>().0)
            .zip(places)
        {
            let (step, total) = quantize_block(x, values);
            *scale = step;
            *sum = step * total;
        }
        rows
    }

    /// Number of rows.
    pub(super) fn count(&self) -> usize {
        (self.scales.len() - PADDING) / self.blocks
    }
}

/// Writes 127 times `x` over its largest magnitude, rounded; returns the scale
/// that undoes this, and the sum of what was written.
#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], values: &mut [i8; BLOCK]) -> (f32, f32) {
    /// 1.5 · 2^23: adding it leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let mut lanes = [0.0_f32; LANES];
    for i in 0..BLOCK {
        let magnitude = x[i].abs();
        let lane = &mut lanes[i % LANES];
        *lane = if magnitude > *lane { magnitude } else { *lane };
    }
    let mut largest = 0.0;
    for lane in lanes {
        largest = if lane > largest { lane } else { largest };
    }
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut total = 0_i32;
    for i in 0..BLOCK {
        let bits = (x[i] * inverse + ROUND).to_bits();
        // The low byte is the integer, in two's complement.
        let value = i8::from_le_bytes([bits.to_le_bytes()[0]]);
        values[i] = value;
        total += i32::from(value);
    }
    (largest / 127.0, total as f32)
}
