//! Kernels for CPUs that have no vector kernels here: plain Rust.

use std::ops::Range;

use super::int8::Int8Rows;
use super::{Activations, Isa, Level, Rows, Values, scalar, vector};

/// See [`Isa::available`].
pub(super) fn available() -> Vec<Isa> {
    vec![Isa(Level::Scalar)]
}

/// Multiplies the activation rows `range` with every row of `rows`:
/// `out[m · out_stride + n]` is the product of the m-th of them and weight row n.
pub(crate) fn matmul(
    _isa: Isa,
    rows: &Rows<'_>,
    x: &Activations<'_>,
    range: Range<usize>,
    (out, out_stride): (&mut [f32], usize),
) {
    rows.check(x, &range, out, out_stride);
    scalar::matmul(rows, x, range, (out, out_stride));
}

/// Quantises activation rows of `columns`.
pub(super) fn quantize(_isa: Isa, x: &[f32], columns: usize) -> Int8Rows {
    Int8Rows::quantize(x, columns)
}

/// Adds to each of the `M` rows of `out` the rows of `values`, weighted by its
/// own weights, in order.
pub(crate) fn weighted_sum<const M: usize>(
    _isa: Isa,
    weights: [&[f32]; M],
    values: Values<'_>,
    out: &mut [f32],
) {
    scalar::weighted_sum(weights, values, out);
}

/// Replaces `gate` by `silu(gate) · up`.
pub(crate) fn silu_mul(_isa: Isa, gate: &mut [f32], up: &[f32]) {
    vector::silu_mul(gate, up);
}

/// Replaces each value by `gelu(value)`.
pub(crate) fn gelu(_isa: Isa, values: &mut [f32]) {
    vector::gelu(values);
}

/// Replaces `scores` by `softmax(scale · scores)`.
pub(crate) fn softmax(_isa: Isa, scores: &mut [f32], scale: f32) {
    vector::softmax(scores, scale);
}
