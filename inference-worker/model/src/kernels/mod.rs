//! CPU kernels: quantised rows times f32 activations, and the few vector
//! functions around them.
//!
//! Activations stay f32, weights are widened to f32 in registers, and the sum of
//! one output value is always taken in the same order, however many activation
//! rows are computed together. So a token's result depends neither on the batch
//! it is in nor on how its prompt was cut into steps.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod simd;
mod vector;

#[cfg(target_arch = "x86_64")]
#[path = "x86.rs"]
mod arch;
#[cfg(not(target_arch = "x86_64"))]
#[path = "portable.rs"]
mod arch;

pub(crate) use arch::{matmul, silu_mul, softmax, weighted_sum};
pub(crate) use vector::mean_square;

use crate::gguf::GgmlType;

/// Values that every kernel takes at a time; also the block length of the
/// supported quantised types. Matrix columns come in multiples of it.
pub const BLOCK: usize = 32;

/// A storage type that the kernels compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// `d·(q − 8)`: an f16 `d`, then 32 nibbles; byte j holds values j (low) and
    /// j + 16 (high).
    Q4_0,
    /// `d·q + m`: f16 `d` and `m`, then nibbles as in Q4_0.
    Q4_1,
    /// `d·q`: an f16 `d`, then 32 signed bytes.
    Q8_0,
}

impl Format {
    /// Every format, with its ggml number.
    pub const ALL: [(Self, GgmlType); 6] = [
        (Self::F32, GgmlType::F32),
        (Self::F16, GgmlType::F16),
        (Self::Bf16, GgmlType::BF16),
        (Self::Q4_0, GgmlType::Q4_0),
        (Self::Q4_1, GgmlType::Q4_1),
        (Self::Q8_0, GgmlType::Q8_0),
    ];

    /// The format of a ggml type, `None` when no kernel knows it.
    pub fn from_ggml(ggml_type: GgmlType) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(_, known)| *known == ggml_type)
            .map(|(format, _)| *format)
    }

    /// Bytes of [`BLOCK`] values.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * BLOCK,
            Self::F16 | Self::Bf16 => 2 * BLOCK,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of a row of `columns` values, a multiple of [`BLOCK`].
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / BLOCK * self.block_bytes()
    }

    /// Widens whole blocks to f32.
    pub fn unpack(self, bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes
            .chunks_exact(self.block_bytes())
            .zip(out.chunks_exact_mut(BLOCK))
        {
            scalar::unpack_block(self, block, out);
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

/// Rows of a weight matrix, as they lie in the file.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Storage type.
    pub format: Format,
    /// The rows, one after another.
    pub bytes: &'a [u8],
    /// Values in a row, a multiple of [`BLOCK`].
    pub columns: usize,
    /// A row's products are summed over stretches of this many columns (a
    /// multiple of [`BLOCK`]) and the sums added in order, which is how ranks
    /// that hold one stretch each add theirs.
    pub stretch: usize,
}

impl Rows<'_> {
    /// Number of rows.
    pub fn count(&self) -> usize {
        self.bytes.len() / self.format.row_bytes(self.columns)
    }

    /// Checks what the kernels take for granted, as bounds of their pointers:
    /// whole blocks, and `x` and `out` large enough.
    fn check(&self, x: &[f32], out: &[f32], out_stride: usize) {
        let batch = x.len() / self.columns;
        assert!(
            self.columns.is_multiple_of(BLOCK) && self.stretch.is_multiple_of(BLOCK),
            "whole blocks"
        );
        assert!(self.stretch > 0, "a stretch has columns");
        assert_eq!(
            self.count() * self.format.row_bytes(self.columns),
            self.bytes.len(),
            "whole rows"
        );
        assert_eq!(batch * self.columns, x.len(), "whole activation rows");
        assert!(self.count() <= out_stride || batch <= 1, "rows of output");
        assert!(
            batch == 0 || out.len() >= (batch - 1) * out_stride + self.count(),
            "room for the output"
        );
    }
}

#[cfg(test)]
mod tests;
