//! The kernels in plain Rust: what the others are tested against, and what runs
//! where there is nothing better.

use half::{bf16, f16};

use super::{BLOCK, Format, Rows};

/// Values that one partial sum takes at a time.
const LANES: usize = 8;

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Widens one block to f32, with the roundings of ggml's own routines.
pub(super) fn unpack_block(format: Format, block: &[u8], out: &mut [f32]) {
    let nibbles = |out: &mut [f32], packed: &[u8], value: &dyn Fn(u8) -> f32| {
        for (j, byte) in packed.iter().enumerate() {
            out[j] = value(byte & 0xF);
            out[j + BLOCK / 2] = value(byte >> 4);
        }
    };
    match format {
        Format::F32 => {
            for (out, bytes) in out.iter_mut().zip(block.chunks_exact(4)) {
                *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        Format::F16 => {
            for (out, bytes) in out.iter_mut().zip(block.chunks_exact(2)) {
                *out = half_at(bytes, 0);
            }
        }
        Format::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(block.chunks_exact(2)) {
                *out = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        }
        Format::Q4_0 => {
            let scale = half_at(block, 0);
            nibbles(out, &block[2..], &|q| (f32::from(q) - 8.0) * scale);
        }
        Format::Q4_1 => {
            let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
            nibbles(out, &block[4..], &|q| f32::from(q) * scale + minimum);
        }
        Format::Q8_0 => {
            let scale = half_at(block, 0);
            for (out, byte) in out.iter_mut().zip(&block[2..]) {
                *out = f32::from(i8::from_le_bytes([*byte])) * scale;
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum()
}

/// See [`super::matmul`].
pub(super) fn matmul(rows: &Rows<'_>, x: &[f32], out: &mut [f32], out_stride: usize) {
    let mut weights = vec![0.0; rows.columns];
    let row_bytes = rows.format.row_bytes(rows.columns);
    for (n, row) in rows.bytes.chunks_exact(row_bytes).enumerate() {
        rows.format.unpack(row, &mut weights);
        for (m, x) in x.chunks_exact(rows.columns).enumerate() {
            out[m * out_stride + n] = weights
                .chunks(rows.stretch)
                .zip(x.chunks(rows.stretch))
                .map(|(weights, x)| dot(weights, x))
                .reduce(|sum, next| sum + next)
                .unwrap_or_default();
        }
    }
}

/// See [`super::weighted_sum`].
pub(super) fn weighted_sum<const M: usize>(weights: [&[f32]; M], values: &[f32], out: &mut [f32]) {
    let width = out.len() / M;
    for (weights, out) in weights.iter().zip(out.chunks_exact_mut(width)) {
        for (weight, value) in weights.iter().zip(values.chunks_exact(width)) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
}
