//! The header of one safetensors file.
//!
//! Format: <https://github.com/huggingface/safetensors#format>.

use std::fmt;

use safetensors::Dtype;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::ModelError;
use crate::foreign::{ByTensor, parser_said};
use crate::format::Format;
use crate::stored::{StoredTensor, StoredType};

/// Bytes of the header's length, before the header.
const LENGTH_BYTES: u64 = 8;
/// As much as the format allows.
const HEADER_LIMIT: u64 = 100_000_000;
/// More dimensions than any tensor of a Llama has.
const MAX_DIMS: usize = 8;

/// What the header says of a tensor.
#[derive(Debug, Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Sizes, outermost first.
#[derive(Debug)]
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
        let mut sizes = Vec::new();
        while let Some(size) = list.next_element()? {
            if sizes.len() == MAX_DIMS {
                return Err(A::Error::custom(format_args!(
                    "a tensor of more than {MAX_DIMS} dimensions"
                )));
            }
            sizes.push(size);
        }
        Ok(Shape(sizes))
    }
}

impl Entry {
    /// Bytes that the shape takes, where they are whole and can be counted.
    fn bytes(&self) -> Option<u64> {
        let bits = self
            .shape
            .0
            .iter()
            .try_fold(self.dtype.bitsize() as u64, |product, size| {
                product.checked_mul(*size as u64)
            })?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Reads the header of `bytes`, the file number `file` of a checkpoint, and says
/// where the data begins. The tensors fill the rest of the file, one behind the
/// other, so that no later arithmetic on their places can overflow.
pub(super) fn parse(
    path: &str,
    bytes: &[u8],
    file: usize,
) -> Result<(u64, Vec<StoredTensor>), ModelError> {
    let len = bytes.len() as u64;
    let Some(header) = bytes.first_chunk().map(|len| u64::from_le_bytes(*len)) else {
        return Err(ModelError::Truncated(format!(
            "{path} is cut short: it has {len} bytes"
        )));
    };
    if header > HEADER_LIMIT {
        return Err(ModelError::Invalid(format!(
            "{path} is not a safetensors file: it announces a header of {header} bytes"
        )));
    }
    let data = LENGTH_BYTES + header;
    let text = usize::try_from(data)
        .ok()
        .and_then(|end| bytes.get(size_of::<u64>()..end));
    let Some(text) = text else {
        return Err(ModelError::Truncated(format!(
            "{path} is cut short: its header of {header} bytes does not end in its {len} bytes"
        )));
    };
    let ByTensor(entries) = serde_json::from_slice::<ByTensor<Entry>>(text).map_err(|error| {
        ModelError::Invalid(format!(
            "{path} has a damaged header: {}",
            parser_said(&error)
        ))
    })?;
    let mut entries: Vec<(String, Entry)> = entries.into_iter().collect();
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    check_places(path, &entries, len - data)?;
    let tensors = entries.into_iter().map(|(name, entry)| {
        let (start, end) = entry.data_offsets;
        StoredTensor {
            name,
            shape: entry.shape.0,
            stored: stored_type(entry.dtype),
            file,
            start: data + start,
            bytes: end - start,
        }
    });
    Ok((data, tensors.collect()))
}

/// Checks that `entries`, which are sorted, fill `len` bytes without gaps.
fn check_places(path: &str, entries: &[(String, Entry)], len: u64) -> Result<(), ModelError> {
    let damaged = |what: String| Err(ModelError::Invalid(format!("{path} is damaged: {what}")));
    let mut next = 0;
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        if start != next {
            return damaged(format!(
                "tensor {name} begins {start} bytes behind the header, but the tensors before it end at {next}"
            ));
        }
        let (dtype, shape) = (entry.dtype, &entry.shape.0);
        match entry.bytes() {
            Some(bytes) if start.checked_add(bytes) == Some(end) => {}
            Some(bytes) => {
                return damaged(format!(
                    "tensor {name} lies in bytes {start} to {end}, but {dtype} of the shape {shape:?} takes {bytes} bytes"
                ));
            }
            None => {
                return damaged(format!(
                    "tensor {name} has the impossible shape {shape:?} of {dtype}"
                ));
            }
        }
        if end > len {
            return Err(ModelError::Truncated(format!(
                "{path} is cut short: tensor {name} ends {end} bytes behind the header but {len} are there"
            )));
        }
        next = end;
    }
    if next < len {
        return damaged(format!(
            "its tensors end {next} bytes behind the header but {len} are there"
        ));
    }
    Ok(())
}

fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::Format(Format::F32),
        Dtype::F16 => StoredType::Format(Format::F16),
        Dtype::BF16 => StoredType::Format(Format::Bf16),
        Dtype::F8_E4M3 => StoredType::Format(Format::F8E4M3),
        Dtype::I8 => StoredType::Int8,
        Dtype::I32 => StoredType::Int32,
        Dtype::U8 => StoredType::Bytes,
        Dtype::F64 => StoredType::Other("F64"),
        Dtype::I64 => StoredType::Other("I64"),
        Dtype::F8_E5M2 => StoredType::Other("F8_E5M2"),
        _ => StoredType::Other("another type"),
    }
}
