//! The forms in which weights lie in memory.

/// Values that every kernel takes at a time; also the block length of the
/// quantised formats. Matrix columns come in multiples of it.
pub const BLOCK: usize = 32;

/// A form that the kernels multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// 8-bit floats with 4 bits of exponent and 3 of mantissa, without infinities
    /// (OCP 8-bit floating point, E4M3), with a scale a row.
    F8E4M3,
    /// `d·(q − 8)`: an f16 `d`, then 32 nibbles; byte j holds values j (low) and
    /// j + 16 (high).
    Q4_0,
    /// `d·q + m`: f16 `d` and `m`, then nibbles as in `Q4_0`.
    Q4_1,
    /// `d·q`: an f16 `d`, then 32 signed bytes.
    Q8_0,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 7] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::F8E4M3,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q8_0,
    ];

    /// Its name, as in GGUF and safetensors headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// Bytes of [`BLOCK`] values.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * BLOCK,
            Self::F16 | Self::Bf16 => 2 * BLOCK,
            Self::F8E4M3 => BLOCK,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of one value where values stand alone; `None` for blocks.
    pub fn value_bytes(self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::F8E4M3 => Some(1),
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => None,
        }
    }

    /// Bytes of a row of `columns` values, a multiple of [`BLOCK`].
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / BLOCK * self.block_bytes()
    }
}
