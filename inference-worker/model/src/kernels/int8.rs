//! Activations for quantised weights: each block of 32 becomes 32 signed bytes and
//! a scale, so that a block's products are summed as integers, exactly.

use half::f16;

use super::{BLOCK, Format, LANES};

/// 8-bit integers go this far on both sides of zero.
const MOST: f32 = 127.0;

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

/// Writes `values`, a multiple of [`BLOCK`], as blocks of `Q8_0`.
pub(crate) fn store(values: &[f32], out: &mut [u8]) {
    let blocks = out.chunks_exact_mut(Format::Q8_0.block_bytes());
    for (values, block) in values.chunks_exact(BLOCK).zip(blocks) {
        let largest = values
            .iter()
            .fold(0.0_f32, |largest, x| largest.max(x.abs()));
        store_block(values, f16::from_f32(largest / MOST), block);
    }
}

/// Writes [`BLOCK`] values as a block of `Q8_0` with this scale.
#[expect(clippy::cast_possible_truncation, reason = "rounded and in range")]
pub(crate) fn store_block(values: &[f32], scale: f16, block: &mut [u8]) {
    let inverse = match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    };
    let (head, bytes) = block.split_at_mut(size_of::<f16>());
    head.copy_from_slice(&scale.to_le_bytes());
    for (byte, value) in bytes.iter_mut().zip(values) {
        let rounded = (value * inverse).round().clamp(-MOST, MOST);
        *byte = (rounded as i8).to_le_bytes()[0];
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
