//! The kernels in plain Rust: what the others are tested against, and what runs
//! where there is nothing better.

use std::ops::Range;

use half::{bf16, f16};

use super::int8::Int8Rows;
use super::{Activations, BLOCK, Format, LANES, Rows, Values};
use crate::order;

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// An FP8 value: its exponent and mantissa at the place of those of an f32, whose
/// exponent counts from 127 and not from 7.
fn f8e4m3(byte: u8) -> f32 {
    /// 2^120.
    const REBIAS: f32 = f32::from_bits((127 + 120) << 23);
    let (sign, magnitude) = (u32::from(byte & 0x80), u32::from(byte & 0x7F));
    if magnitude == 0x7F {
        return f32::NAN;
    }
    f32::from_bits(sign << 24 | magnitude << 20) * REBIAS
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
        Format::F8E4M3 => {
            for (out, byte) in out.iter_mut().zip(block) {
                *out = f8e4m3(*byte);
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

/// Sum of lanes, as [`super::simd::Simd::sums`] takes it.
fn sum(lanes: [f32; LANES]) -> f32 {
    let quarter = |q: usize| {
        let at = 4 * q;
        (lanes[at] + lanes[at + 2]) + (lanes[at + 1] + lanes[at + 3])
    };
    (quarter(0) + quarter(2)) + (quarter(1) + quarter(3))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    sum(lanes)
}

/// See [`super::matmul`].
pub(super) fn matmul(
    rows: &Rows<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    (out, out_stride): (&mut [f32], usize),
) {
    let mut weights = vec![0.0; rows.columns];
    let mut sums = Vec::with_capacity(rows.ends.len());
    let row_bytes = rows.format.row_bytes(rows.columns);
    for (n, row) in rows.bytes.chunks_exact(row_bytes).enumerate() {
        super::unpack(rows.format, row, None, &mut weights);
        let scale = rows.scales.map_or(1.0, |scales| scales[n]);
        for m in range.clone() {
            let mut start = 0;
            sums.clear();
            for &end in rows.ends {
                let columns = start..end;
                start = end;
                let sum = match x {
                    Activations::F32(x) => {
                        let x = &x[m * rows.columns..(m + 1) * rows.columns];
                        dot(&weights[columns.clone()], &x[columns])
                    }
                    Activations::Int8(x) => int8_dot(rows.format, row, columns, (x, m)),
                };
                sums.push(sum * scale);
            }
            order::sum_rows(&mut sums, 1);
            out[(m - range.start) * out_stride + n] = sums[0];
        }
    }
}

/// The product of some `columns` of a quantised row with those of activation row
/// `m`.
fn int8_dot(format: Format, row: &[u8], columns: Range<usize>, (x, m): (&Int8Rows, usize)) -> f32 {
    let bytes = format.block_bytes();
    let mut lanes = [0.0; LANES];
    let first = columns.start / BLOCK;
    for block in first..columns.end / BLOCK {
        // Every second block has the upper lanes, four values each.
        let lanes = &mut lanes[(block - first) % 2 * (LANES / 2)..][..LANES / 2];
        let weights = &row[block * bytes..(block + 1) * bytes];
        let at = m * x.blocks + block;
        let values = &x.values[at * BLOCK..(at + 1) * BLOCK];
        for (lane, sum) in lanes.iter_mut().enumerate() {
            let products = (4 * lane..4 * lane + 4)
                .map(|i| integer(format, weights, i) * i32::from(values[i]));
            let scaled = products.sum::<i32>() as f32 * x.scales[at];
            *sum = scaled.mul_add(half_at(weights, 0), *sum);
        }
        if format == Format::Q4_1 {
            lanes[0] = half_at(weights, 2).mul_add(x.sums[at], lanes[0]);
        }
    }
    sum(lanes)
}

/// The integer of value `i` in a quantised block.
fn integer(format: Format, block: &[u8], i: usize) -> i32 {
    let nibble = |packed: &[u8]| {
        let byte = packed[i % (BLOCK / 2)];
        i32::from(if i < BLOCK / 2 { byte & 0xF } else { byte >> 4 })
    };
    match format {
        Format::Q4_1 => nibble(&block[4..]),
        Format::Q4_0 => nibble(&block[2..]) - 8,
        _ => i32::from(i8::from_le_bytes([block[2 + i]])),
    }
}

/// See [`super::weighted_sum`].
pub(super) fn weighted_sum<const M: usize>(
    weights: [&[f32]; M],
    values: Values<'_>,
    out: &mut [f32],
) {
    match values {
        Values::F16(values) => add_weighted(weights, values, f16::to_f32, out),
        Values::F32(values) => add_weighted(weights, values, |value| value, out),
        Values::Int8(bytes) => {
            let block = Format::Q8_0.block_bytes();
            let mut values = vec![0.0; bytes.len() / block * BLOCK];
            for (bytes, values) in bytes.chunks(block).zip(values.chunks_mut(BLOCK)) {
                unpack_block(Format::Q8_0, bytes, values);
            }
            add_weighted(weights, &values, |value| value, out);
        }
    }
}

fn add_weighted<const M: usize, V: Copy>(
    weights: [&[f32]; M],
    values: &[V],
    widen: impl Fn(V) -> f32,
    out: &mut [f32],
) {
    let width = out.len() / M;
    for (weights, out) in weights.iter().zip(out.chunks_exact_mut(width)) {
        for (weight, value) in weights.iter().zip(values.chunks_exact(width)) {
            for (out, value) in out.iter_mut().zip(value) {
                *out = weight.mul_add(widen(*value), *out);
            }
        }
    }
}
