//! Chooses kernels by the instructions that an x86-64 CPU has.

#![allow(
    unsafe_code,
    reason = "calls functions that are built for chosen instructions"
)]

use std::ops::Range;

use super::avx2::{self, Avx2};
use super::avx512::{self, Avx512};
use super::cached::{self, Int8};
use super::int8::Int8Rows;
use super::{Activations, Format, Isa, Level, Rows, Values, scalar, simd, vector};

/// See [`Isa::available`].
pub(super) fn available() -> Vec<Isa> {
    let mut found = vec![Isa(Level::Scalar)];
    if std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("fma")
        && std::arch::is_x86_feature_detected!("f16c")
    {
        found.push(Isa(Level::Avx2));
        if std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512vnni")
        {
            found.push(Isa(Level::Avx512));
        }
    }
    found
}

/// Calls the functions of one instruction set for the format of `$rows`.
macro_rules! by_format {
    ($widened:ident, $int8:ident, $formats:ident, ($rows:expr, $x:expr, $range:expr, $out:expr, $stride:expr)) => {
        // SAFETY: an `Isa` exists only where its instructions do; sizes are checked.
        unsafe {
            match ($x, $rows.format) {
                (Activations::Int8(x), Format::Q4_0) => {
                    $int8::<$formats::Q4_0>($rows, x, $range, $out, $stride)
                }
                (Activations::Int8(x), Format::Q4_1) => {
                    $int8::<$formats::Q4_1>($rows, x, $range, $out, $stride)
                }
                (Activations::Int8(x), Format::Q8_0) => {
                    $int8::<$formats::Q8_0>($rows, x, $range, $out, $stride)
                }
                (Activations::F32(x), format) => {
                    let x = &x[$range.start * $rows.columns..$range.end * $rows.columns];
                    match format {
                        Format::F32 => $widened::<$formats::F32>($rows, x, $out, $stride),
                        Format::F16 => $widened::<$formats::F16>($rows, x, $out, $stride),
                        Format::Bf16 => $widened::<$formats::Bf16>($rows, x, $out, $stride),
                        Format::F8E4M3 => $widened::<$formats::F8E4M3>($rows, x, $out, $stride),
                        _ => scalar::matmul($rows, $x, $range, ($out, $stride)),
                    }
                }
                _ => scalar::matmul($rows, $x, $range, ($out, $stride)),
            }
        }
    };
}

/// Multiplies the activation rows `range` with every row of `rows`:
/// `out[m · out_stride + n]` is the product of the m-th of them and weight row n.
pub(crate) fn matmul(
    isa: Isa,
    rows: &Rows<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    (out, out_stride): (&mut [f32], usize),
) {
    rows.check(x, &range, out, out_stride);
    if range.is_empty() {
        return;
    }
    match isa.0 {
        Level::Scalar => scalar::matmul(rows, x, range, (out, out_stride)),
        Level::Avx2 => by_format!(
            widened_avx2,
            int8_avx2,
            avx2,
            (rows, x, range, out, out_stride)
        ),
        Level::Avx512 => by_format!(
            widened_avx512,
            int8_avx512,
            avx512,
            (rows, x, range, out, out_stride)
        ),
    }
}

/// Quantises activation rows of `columns`.
pub(super) fn quantize(isa: Isa, x: &[f32], columns: usize) -> Int8Rows {
    match isa.0 {
        Level::Scalar => Int8Rows::quantize(x, columns),
        // SAFETY: an `Isa` exists only where its instructions do.
        Level::Avx2 => unsafe { quantize_avx2(x, columns) },
        // SAFETY: likewise.
        Level::Avx512 => unsafe { quantize_avx512(x, columns) },
    }
}

/// Adds to each of the `M` rows of `out` the rows of `values`, weighted by its
/// own weights, in order.
pub(crate) fn weighted_sum<const M: usize>(
    isa: Isa,
    weights: [&[f32]; M],
    values: Values<'_>,
    out: &mut [f32],
) {
    let width = out.len() / M;
    assert!(
        width > 0 && width.is_multiple_of(super::BLOCK) && width * M == out.len(),
        "whole blocks"
    );
    let count = match values {
        Values::F16(values) => values.len() / width,
        Values::F32(values) => values.len() / width,
        Values::Int8(values) => values.len() / Format::Q8_0.row_bytes(width),
    };
    assert!(
        weights.iter().all(|weights| weights.len() >= count),
        "a weight for every value"
    );
    // SAFETY: an `Isa` exists only where its instructions do; sizes are checked.
    unsafe {
        match (isa.0, values) {
            (Level::Scalar, values) => scalar::weighted_sum(weights, values, out),
            (Level::Avx2, Values::F16(values)) => weighted_sum_avx2(weights, values, out),
            (Level::Avx2, Values::F32(values)) => weighted_sum_avx2(weights, values, out),
            (Level::Avx512, Values::F16(values)) => weighted_sum_avx512(weights, values, out),
            (Level::Avx512, Values::F32(values)) => weighted_sum_avx512(weights, values, out),
            (Level::Avx2, Values::Int8(values)) => weighted_sum_avx2(weights, Int8(values), out),
            (Level::Avx512, Values::Int8(values)) => {
                weighted_sum_avx512(weights, Int8(values), out);
            }
        }
    }
}

/// Replaces `gate` by `silu(gate) · up`.
pub(crate) fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    match isa.0 {
        Level::Scalar => vector::silu_mul(gate, up),
        // SAFETY: an `Isa` exists only where its instructions do.
        Level::Avx2 => unsafe { silu_mul_avx2(gate, up) },
        // SAFETY: likewise.
        Level::Avx512 => unsafe { silu_mul_avx512(gate, up) },
    }
}

/// Replaces each value by `gelu(value)`.
pub(crate) fn gelu(isa: Isa, values: &mut [f32]) {
    match isa.0 {
        Level::Scalar => vector::gelu(values),
        // SAFETY: an `Isa` exists only where its instructions do.
        Level::Avx2 => unsafe { gelu_avx2(values) },
        // SAFETY: likewise.
        Level::Avx512 => unsafe { gelu_avx512(values) },
    }
}

/// Replaces `scores` by `softmax(scale · scores)`.
pub(crate) fn softmax(isa: Isa, scores: &mut [f32], scale: f32) {
    match isa.0 {
        Level::Scalar => vector::softmax(scores, scale),
        // SAFETY: an `Isa` exists only where its instructions do.
        Level::Avx2 => unsafe { softmax_avx2(scores, scale) },
        // SAFETY: likewise.
        Level::Avx512 => unsafe { softmax_avx512(scores, scale) },
    }
}

/// The functions of one instruction set.
macro_rules! build_for {
    ($features:literal, $simd:ty, $widened:ident, $int8:ident, $quantize:ident, $weighted_sum:ident, $silu_mul:ident, $gelu:ident, $softmax:ident) => {
        /// One function a format: together they would be too much for the
        /// register allocator.
        #[target_feature(enable = $features)]
        fn $widened<U: simd::Unpack<$simd>>(
            rows: &Rows<'_>,
            x: &[f32],
            out: &mut [f32],
            stride: usize,
        ) {
            // SAFETY: this function is built for the instructions, and `matmul`
            // has checked the sizes.
            unsafe { simd::matmul::<$simd, U>(rows, x, out, stride) }
        }

        #[target_feature(enable = $features)]
        fn $int8<D: simd::Dot<$simd>>(
            rows: &Rows<'_>,
            x: &Int8Rows,
            range: Range<usize>,
            out: &mut [f32],
            stride: usize,
        ) {
            // SAFETY: as above.
            unsafe { simd::matmul_int8::<$simd, D>(rows, (x, range), out, stride) }
        }

        #[target_feature(enable = $features)]
        fn $quantize(x: &[f32], columns: usize) -> Int8Rows {
            Int8Rows::quantize(x, columns)
        }

        #[target_feature(enable = $features)]
        fn $weighted_sum<C: cached::Cached<$simd>, const M: usize>(
            weights: [&[f32]; M],
            values: C,
            out: &mut [f32],
        ) {
            // SAFETY: as above.
            unsafe { cached::weighted_sum::<$simd, C, M>(weights, values, out) }
        }

        #[target_feature(enable = $features)]
        fn $silu_mul(gate: &mut [f32], up: &[f32]) {
            vector::silu_mul(gate, up);
        }

        #[target_feature(enable = $features)]
        fn $gelu(values: &mut [f32]) {
            vector::gelu(values);
        }

        #[target_feature(enable = $features)]
        fn $softmax(scores: &mut [f32], scale: f32) {
            vector::softmax(scores, scale);
        }
    };
}

build_for!(
    "avx2,fma,f16c",
    Avx2,
    widened_avx2,
    int8_avx2,
    quantize_avx2,
    weighted_sum_avx2,
    silu_mul_avx2,
    gelu_avx2,
    softmax_avx2
);
build_for!(
    "avx512f,avx512bw,avx512vnni,avx2,fma,f16c",
    Avx512,
    widened_avx512,
    int8_avx512,
    quantize_avx512,
    weighted_sum_avx512,
    silu_mul_avx512,
    gelu_avx512,
    softmax_avx512
);
