//! Types of tensors and metadata values in a GGUF.

use std::fmt;

use super::texts::Texts;
use crate::format::Format;

/// Storage type of a tensor, as numbered by ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GgmlType(pub u32);

impl GgmlType {
    /// 32-bit floats.
    pub const F32: Self = Self(0);
    /// IEEE half precision.
    pub const F16: Self = Self(1);
    /// Blocks of 32 4-bit values with one scale.
    pub const Q4_0: Self = Self(2);
    /// Blocks of 32 4-bit values with a scale and a minimum.
    pub const Q4_1: Self = Self(3);
    /// Blocks of 32 5-bit values with one scale.
    pub const Q5_0: Self = Self(6);
    /// Blocks of 32 5-bit values with a scale and a minimum.
    pub const Q5_1: Self = Self(7);
    /// Blocks of 32 8-bit values with one scale.
    pub const Q8_0: Self = Self(8);
    /// Super-blocks of 256 2-bit values.
    pub const Q2_K: Self = Self(10);
    /// Super-blocks of 256 3-bit values.
    pub const Q3_K: Self = Self(11);
    /// Super-blocks of 256 4-bit values.
    pub const Q4_K: Self = Self(12);
    /// Super-blocks of 256 5-bit values.
    pub const Q5_K: Self = Self(13);
    /// Super-blocks of 256 6-bit values.
    pub const Q6_K: Self = Self(14);
    /// The upper half of a 32-bit float.
    pub const BF16: Self = Self(30);

    /// Name and (values, bytes) of one block, for every type whose layout is
    /// fixed in ggml; `None` for numbers that ggml does not define.
    fn layout(self) -> Option<(&'static str, u64, u64)> {
        Some(match self.0 {
            0 => ("F32", 1, 4),
            1 => ("F16", 1, 2),
            2 => ("Q4_0", 32, 18),
            3 => ("Q4_1", 32, 20),
            6 => ("Q5_0", 32, 22),
            7 => ("Q5_1", 32, 24),
            8 => ("Q8_0", 32, 34),
            9 => ("Q8_1", 32, 36),
            10 => ("Q2_K", 256, 84),
            11 => ("Q3_K", 256, 110),
            12 => ("Q4_K", 256, 144),
            13 => ("Q5_K", 256, 176),
            14 => ("Q6_K", 256, 210),
            15 => ("Q8_K", 256, 292),
            16 => ("IQ2_XXS", 256, 66),
            17 => ("IQ2_XS", 256, 74),
            18 => ("IQ3_XXS", 256, 98),
            19 => ("IQ1_S", 256, 50),
            20 => ("IQ4_NL", 32, 18),
            21 => ("IQ3_S", 256, 110),
            22 => ("IQ2_S", 256, 82),
            23 => ("IQ4_XS", 256, 136),
            24 => ("I8", 1, 1),
            25 => ("I16", 1, 2),
            26 => ("I32", 1, 4),
            27 => ("I64", 1, 8),
            28 => ("F64", 1, 8),
            29 => ("IQ1_M", 256, 56),
            30 => ("BF16", 1, 2),
            34 => ("TQ1_0", 256, 54),
            35 => ("TQ2_0", 256, 66),
            39 => ("MXFP4", 32, 17),
            _ => return None,
        })
    }

    /// The form in which the kernels multiply it, `None` when they do not.
    pub fn format(self) -> Option<Format> {
        Format::ALL
            .into_iter()
            .find(|format| Self::of(*format) == Some(self))
    }

    /// The type that stores `format`; `None` for one that ggml does not have.
    pub fn of(format: Format) -> Option<Self> {
        Some(match format {
            Format::F32 => Self::F32,
            Format::F16 => Self::F16,
            Format::Bf16 => Self::BF16,
            Format::F8E4M3 => return None,
            Format::Q4_0 => Self::Q4_0,
            Format::Q4_1 => Self::Q4_1,
            Format::Q8_0 => Self::Q8_0,
        })
    }

    /// Values in one block; `None` for an unknown type.
    pub fn block_len(self) -> Option<u64> {
        self.layout().map(|(_, len, _)| len)
    }

    /// Bytes of one block; `None` for an unknown type.
    pub fn block_bytes(self) -> Option<u64> {
        self.layout().map(|(_, _, bytes)| bytes)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layout() {
            Some((name, ..)) => f.write_str(name),
            None => write!(f, "type {}", self.0),
        }
    }
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A 32- or 64-bit float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Unsigned integers.
    UnsignedList(Vec<u64>),
    /// Signed integers.
    SignedList(Vec<i64>),
    /// Floats.
    FloatList(Vec<f32>),
    /// Truth values.
    BoolList(Vec<bool>),
    /// Texts.
    TextList(Texts),
}

impl Value {
    /// Bytes that it takes on the heap.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Self::Unsigned(_) | Self::Signed(_) | Self::Float(_) | Self::Bool(_) => 0,
            Self::Text(text) => text.len(),
            Self::UnsignedList(list) => size_of_val(list.as_slice()),
            Self::SignedList(list) => size_of_val(list.as_slice()),
            Self::FloatList(list) => size_of_val(list.as_slice()),
            Self::BoolList(list) => list.len(),
            Self::TextList(list) => list.bytes(),
        }
    }

    /// What kind of value this is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) => "an unsigned integer",
            Self::Signed(_) => "a signed integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::Text(_) => "a string",
            Self::UnsignedList(_) => "a list of unsigned integers",
            Self::SignedList(_) => "a list of signed integers",
            Self::FloatList(_) => "a list of floats",
            Self::BoolList(_) => "a list of bools",
            Self::TextList(_) => "a list of strings",
        }
    }
}

/// Where a tensor lies and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Sizes, innermost first: a matrix is `[columns, rows]`.
    pub dims: Vec<u64>,
    /// Storage type.
    pub ggml_type: GgmlType,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}
