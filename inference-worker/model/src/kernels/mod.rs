//! CPU kernels: quantised rows times f32 activations, and the few vector
//! functions around them.
//!
//! Float weights are widened to f32 and multiply f32 activations. Quantised
//! weights multiply activations that are int8 with a scale for each block of 32,
//! as in ggml, except that the scale stays f32.
//!
//! The sum of one output value is always taken in the same order, with whatever
//! instructions and however many activation rows are computed together. So a
//! token's result depends neither on the CPU, nor on the batch it is in, nor on
//! how its prompt was cut into steps.

#![allow(
    clippy::inline_always,
    clippy::needless_range_loop,
    clippy::many_single_char_names,
    reason = "kernels are inlined into functions built for their instructions, unroll by index, and speak of rows a to d"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod cached;
pub(crate) mod int8;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod simd;
#[cfg(target_arch = "x86_64")]
mod sums;
mod vector;

#[cfg(target_arch = "x86_64")]
#[path = "x86.rs"]
mod arch;
#[cfg(not(target_arch = "x86_64"))]
#[path = "portable.rs"]
mod arch;

pub(crate) use arch::{gelu, matmul, silu_mul, softmax, weighted_sum};
pub(crate) use vector::{mean_square, sum};

use std::ops::Range;

use half::f16;

use int8::Int8Rows;
pub use llama_checkpoint::{BLOCK, Format};

/// Partial sums that a product is taken in, side by side. Part of the arithmetic:
/// every instruction set keeps this many, so that all give the same bits.
const LANES: usize = 16;

/// Widens values to f32, whole blocks or any number of floats, and multiplies them
/// by the scale of their row, where it has one.
pub fn unpack(format: Format, bytes: &[u8], scale: Option<f32>, out: &mut [f32]) {
    for (block, out) in bytes
        .chunks(format.block_bytes())
        .zip(out.chunks_mut(BLOCK))
    {
        scalar::unpack_block(format, block, out);
    }
    if let Some(scale) = scale {
        for value in out {
            *value *= scale;
        }
    }
}

/// Rows of a KV cache.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// IEEE half precision.
    F16(&'a [f16]),
    /// 32-bit floats.
    F32(&'a [f32]),
    /// Blocks of [`Format::Q8_0`].
    Int8(&'a [u8]),
}

impl<'a> From<&'a [f16]> for Values<'a> {
    fn from(values: &'a [f16]) -> Self {
        Self::F16(values)
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

/// Activation rows in the form that a weight format multiplies.
#[derive(Clone, Debug)]
pub(crate) enum Activations<'a> {
    /// For float weights.
    F32(&'a [f32]),
    /// For quantised weights.
    Int8(Int8Rows),
}

impl<'a> Activations<'a> {
    /// Rows of `columns`, for weights in `format`.
    pub(crate) fn new(isa: Isa, format: Format, x: &'a [f32], columns: usize) -> Self {
        match format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::F8E4M3 => Self::F32(x),
            Format::Q4_0 | Format::Q4_1 | Format::Q8_0 => {
                Self::Int8(arch::quantize(isa, x, columns))
            }
        }
    }
}

/// A set of CPU instructions that this machine has. Values come only from
/// [`Isa::available`] and [`Isa::best`], so that a kernel never meets a CPU
/// without its instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Scalar,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only x86-64 has it")
    )]
    Avx2,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only x86-64 has it")
    )]
    Avx512,
}

impl Isa {
    /// What this machine has, slowest first; plain Rust is always there.
    pub fn available() -> Vec<Self> {
        arch::available()
    }

    /// The fastest that this machine has.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Level::Scalar))
    }

    /// Its name, for logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }
}

/// Rows of a weight matrix, as they lie in memory.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Storage type.
    pub format: Format,
    /// The rows, one after another.
    pub bytes: &'a [u8],
    /// Values in a row, a multiple of [`BLOCK`].
    pub columns: usize,
    /// Where chunks of the columns end, ascending multiples of [`BLOCK`], the last
    /// of them `columns`. A row's products are summed chunk by chunk, and the sums
    /// added in the order of [`crate::order`], which is how ranks that hold some
    /// chunks each add theirs.
    pub ends: &'a [usize],
    /// A scale for each row, which multiplies the sum over each chunk.
    pub scales: Option<&'a [f32]>,
}

/// Whether `ends` cut `columns` into chunks of whole blocks, none of them empty.
pub(crate) fn cut_columns(ends: &[usize], columns: usize) -> bool {
    let mut start = 0;
    let ascend = ends.iter().all(|&end| {
        let is_chunk = end > start && end.is_multiple_of(BLOCK);
        start = end;
        is_chunk
    });
    ascend && !ends.is_empty() && start == columns
}

impl Rows<'_> {
    /// Number of rows.
    pub fn count(&self) -> usize {
        self.bytes.len() / self.format.row_bytes(self.columns)
    }

    /// The rows `range` of these.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        let row_bytes = self.format.row_bytes(self.columns);
        Self {
            bytes: &self.bytes[range.start * row_bytes..range.end * row_bytes],
            scales: self.scales.map(|scales| &scales[range]),
            ..*self
        }
    }

    /// Widens row `row` to f32, scaled.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        let Self { bytes, scales, .. } = self.part(row..row + 1);
        unpack(self.format, bytes, scales.map(|scales| scales[0]), out);
    }

    /// Checks what the kernels take for granted, as bounds of their pointers:
    /// whole blocks, and scales, `x` and `out` large enough.
    fn check(&self, x: &Activations<'_>, range: &Range<usize>, out: &[f32], out_stride: usize) {
        assert!(
            cut_columns(self.ends, self.columns),
            "chunks are whole blocks"
        );
        assert_eq!(
            self.count() * self.format.row_bytes(self.columns),
            self.bytes.len(),
            "whole rows"
        );
        assert!(
            self.scales
                .is_none_or(|scales| scales.len() == self.count()),
            "a scale a row"
        );
        let batch = match x {
            Activations::F32(x) => x.len() / self.columns,
            Activations::Int8(x) => {
                assert_eq!(x.blocks * BLOCK, self.columns, "rows of one length");
                x.count()
            }
        };
        assert!(
            range.start <= range.end && range.end <= batch,
            "activation rows"
        );
        assert!(
            range.len() <= 1 || self.count() <= out_stride,
            "rows of output do not overlap"
        );
        assert!(
            range.is_empty() || out.len() >= (range.len() - 1) * out_stride + self.count(),
            "room for the output"
        );
    }
}

#[cfg(test)]
mod tests;
