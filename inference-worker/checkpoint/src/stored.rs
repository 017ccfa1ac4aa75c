//! Tensors as a checkpoint stores them.

use std::fmt;

use crate::format::Format;
use crate::gguf::GgmlType;

/// How values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// In a form that the kernels multiply.
    Format(Format),
    /// 8-bit integers.
    Int8,
    /// 32-bit integers, each eight 4-bit values.
    Int32,
    /// Plain bytes.
    Bytes,
    /// Blocks of ggml that the kernels do not multiply.
    Ggml(GgmlType),
    /// Anything else, by its name in the header.
    Other(&'static str),
}

impl StoredType {
    /// Bytes of `columns` values; `None` where they fill no whole blocks, or where
    /// values of this type are never read.
    pub(crate) fn row_bytes(self, columns: usize) -> Option<u64> {
        let columns = columns as u64;
        match self {
            Self::Format(format) => match format.value_bytes() {
                Some(bytes) => Some(columns * bytes as u64),
                None => blocks(
                    columns,
                    crate::format::BLOCK as u64,
                    format.block_bytes() as u64,
                ),
            },
            Self::Int8 | Self::Bytes => Some(columns),
            Self::Int32 => Some(columns * 4),
            Self::Ggml(kind) => blocks(columns, kind.block_len()?, kind.block_bytes()?),
            Self::Other(_) => None,
        }
    }
}

fn blocks(columns: u64, len: u64, bytes: u64) -> Option<u64> {
    columns.is_multiple_of(len).then(|| columns / len * bytes)
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format(format) => f.write_str(format.name()),
            Self::Int8 => f.write_str("I8"),
            Self::Int32 => f.write_str("I32"),
            Self::Bytes => f.write_str("U8"),
            Self::Ggml(kind) => kind.fmt(f),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// Where a tensor lies and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name in the header.
    pub name: String,
    /// Sizes, outermost first: a matrix is `[rows, columns]`.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub stored: StoredType,
    /// Which of the checkpoint's files it lies in.
    pub file: usize,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Evenly spaced stretches of a file: `count` of `len` bytes each, the first at
/// `start`, each `stride` behind the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First byte of the first stretch.
    pub start: u64,
    /// Bytes of a stretch.
    pub len: u64,
    /// Bytes from the start of a stretch to the start of the next.
    pub stride: u64,
    /// Number of stretches.
    pub count: u64,
}

impl Region {
    /// One stretch.
    pub fn one(start: u64, len: u64) -> Self {
        Self {
            start,
            len,
            stride: len,
            count: 1,
        }
    }

    /// `count` stretches, as one where nothing lies between them.
    pub fn new(start: u64, len: u64, stride: u64, count: u64) -> Self {
        if len == stride {
            Self::one(start, len * count)
        } else {
            Self {
                start,
                len,
                stride,
                count,
            }
        }
    }

    /// Bytes of all stretches.
    pub fn bytes(self) -> u64 {
        self.len * self.count
    }

    /// The stretches, as ranges of the file.
    pub fn stretches(self) -> impl Iterator<Item = std::ops::Range<u64>> {
        (0..self.count).map(move |number| {
            let start = self.start + number * self.stride;
            start..start + self.len
        })
    }
}
