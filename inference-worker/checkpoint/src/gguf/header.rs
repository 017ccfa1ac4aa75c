//! Reading the header of a GGUF (versions 2 and 3, little-endian) out of bytes.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;

use super::types::{GgmlType, TensorInfo, Value};
use crate::error::ModelError;

/// First four bytes of every GGUF.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata key of the alignment of tensor data.
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment where the file does not name one.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// More dimensions than ggml has.
const MAX_DIMS: u32 = 4;

/// What the header of a GGUF says.
#[derive(Debug, PartialEq)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: Vec<TensorInfo>,
    /// Bytes before the tensor list.
    pub(crate) metadata_end: usize,
}

/// A place in the header. Every read checks its bounds; running out of bytes is
/// [`ModelError::Truncated`].
struct Reader<'a> {
    path: &'a str,
    bytes: &'a [u8],
    at: usize,
    part: &'static str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], ModelError> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(ModelError::Truncated(format!(
                "{} is cut short: its {} needs {len} bytes at byte {} but the file has {} bytes",
                self.path,
                self.part,
                self.at,
                self.bytes.len()
            ))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!(
            "{} is damaged: {what} (in its {}, before byte {})",
            self.path, self.part, self.at
        ))
    }

    fn text(&mut self) -> Result<String, ModelError> {
        let len = self.u64()?;
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.invalid("a string is not UTF-8")),
        }
    }

    /// Reads `count` items. Nothing is reserved up front, because `count` may be
    /// damaged; the bytes that are there bound what is read.
    fn list<T>(
        &mut self,
        count: u64,
        mut item: impl FnMut(&mut Self) -> Result<T, ModelError>,
    ) -> Result<Vec<T>, ModelError> {
        let mut out = Vec::new();
        for _ in 0..count {
            out.push(item(self)?);
        }
        Ok(out)
    }

    fn value(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Unsigned(self.unsigned(kind)?),
            1 | 3 | 5 | 11 => Value::Signed(self.signed(kind)?),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.list_value()?,
            other => return Err(self.invalid(&format!("unknown metadata type {other}"))),
        })
    }

    fn list_value(&mut self) -> Result<Value, ModelError> {
        let kind = self.u32()?;
        let count = self.u64()?;
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::UnsignedList(self.list(count, |r| r.unsigned(kind))?),
            1 | 3 | 5 | 11 => Value::SignedList(self.list(count, |r| r.signed(kind))?),
            6 => Value::FloatList(self.list(count, |r| Ok(f32::from_le_bytes(r.array()?)))?),
            7 => Value::BoolList(self.list(count, |r| Ok(r.array::<1>()?[0] != 0))?),
            8 => Value::TextList(self.list(count, Self::text)?),
            other => {
                return Err(self.invalid(&format!("unknown type {other} of a metadata list")));
            }
        })
    }

    fn unsigned(&mut self, kind: u32) -> Result<u64, ModelError> {
        Ok(match kind {
            0 => u64::from(self.array::<1>()?[0]),
            2 => u64::from(u16::from_le_bytes(self.array()?)),
            4 => u64::from(self.u32()?),
            _ => self.u64()?,
        })
    }

    fn signed(&mut self, kind: u32) -> Result<i64, ModelError> {
        Ok(match kind {
            1 => i64::from(i8::from_le_bytes(self.array()?)),
            3 => i64::from(i16::from_le_bytes(self.array()?)),
            5 => i64::from(i32::from_le_bytes(self.array()?)),
            _ => i64::from_le_bytes(self.array()?),
        })
    }

    /// A tensor's entry; its `start` is still counted from the tensor data.
    fn tensor(&mut self) -> Result<TensorInfo, ModelError> {
        let name = self.text()?;
        let rank = self.u32()?;
        if rank > MAX_DIMS {
            return Err(self.invalid(&format!("tensor {name} has {rank} dimensions")));
        }
        let dims = self.list(u64::from(rank), Self::u64)?;
        let ggml_type = GgmlType(self.u32()?);
        let start = self.u64()?;
        let (Some(block_len), Some(block_bytes)) = (ggml_type.block_len(), ggml_type.block_bytes())
        else {
            return Err(ModelError::Unsupported(format!(
                "{}: tensor {name} is stored as ggml {ggml_type}, which this worker does not know",
                self.path
            )));
        };
        let columns = dims.first().copied().unwrap_or(1);
        if !columns.is_multiple_of(block_len) {
            return Err(self.invalid(&format!(
                "tensor {name} has {columns} columns, which {ggml_type} cannot hold in blocks of {block_len}"
            )));
        }
        let bytes = dims
            .iter()
            .try_fold(1_u64, |product, &dim| product.checked_mul(dim))
            .and_then(|values| (values / block_len).checked_mul(block_bytes));
        let Some(bytes) = bytes else {
            return Err(self.invalid(&format!("tensor {name} has impossible sizes {dims:?}")));
        };
        Ok(TensorInfo {
            name,
            dims,
            ggml_type,
            start,
            bytes,
        })
    }
}

/// Reads the header and checks that every tensor lies inside the file.
pub(crate) fn parse(path: &str, bytes: &[u8]) -> Result<Header, ModelError> {
    let mut reader = Reader {
        path,
        bytes,
        at: 0,
        part: "first line",
    };
    if bytes.len() < MAGIC.len() && MAGIC.starts_with(bytes) {
        return Err(ModelError::Truncated(format!(
            "{path} is cut short: it has {} bytes",
            bytes.len()
        )));
    }
    let start = &bytes[..bytes.len().min(MAGIC.len())];
    if start != MAGIC {
        return Err(ModelError::Invalid(format!(
            "{path} is not a GGUF file: it starts with \"{}\"",
            start.escape_ascii()
        )));
    }
    reader.at = MAGIC.len();
    let version = reader.u32()?;
    if version != 2 && version != 3 {
        return Err(ModelError::Unsupported(format!(
            "{path} is GGUF version {version}; this worker reads versions 2 and 3, little-endian"
        )));
    }
    let tensor_count = reader.u64()?;
    let metadata_count = reader.u64()?;
    reader.part = "metadata";
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.text()?;
        let kind = reader.u32()?;
        let value = reader.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.invalid(&format!("metadata key {key} occurs twice")));
        }
    }
    let metadata_end = reader.at;
    reader.part = "tensor list";
    let mut tensors = reader.list(tensor_count, Reader::tensor)?;
    let alignment = alignment(path, &metadata)?;
    let data_start = (reader.at as u64).next_multiple_of(alignment);
    place(path, &mut tensors, data_start, bytes.len() as u64)?;
    Ok(Header {
        metadata,
        tensors,
        metadata_end,
    })
}

fn alignment(path: &str, metadata: &BTreeMap<String, Value>) -> Result<u64, ModelError> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(alignment))
            if alignment.is_power_of_two() && *alignment <= 1 << 20 =>
        {
            Ok(*alignment)
        }
        Some(other) => Err(ModelError::Invalid(format!(
            "{path}: {ALIGNMENT_KEY} is {other:?}, expected a power of two"
        ))),
    }
}

/// Turns offsets into places in the file and checks each against its length.
fn place(
    path: &str,
    tensors: &mut [TensorInfo],
    data_start: u64,
    file_len: u64,
) -> Result<(), ModelError> {
    for tensor in tensors {
        let name = &tensor.name;
        let end = data_start
            .checked_add(tensor.start)
            .and_then(|start| start.checked_add(tensor.bytes).map(|end| (start, end)));
        let Some((start, end)) = end else {
            return Err(ModelError::Invalid(format!(
                "{path} is damaged: tensor {name} lies at offset {}",
                tensor.start
            )));
        };
        if end > file_len {
            return Err(ModelError::Truncated(format!(
                "{path} is cut short: tensor {name} ends at byte {end} but the file has {file_len} bytes"
            )));
        }
        tensor.start = start;
    }
    Ok(())
}
