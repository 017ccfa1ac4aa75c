//! Reading the header of a GGUF (versions 2 and 3, little-endian) out of bytes.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;

use super::texts::Texts;
use super::types::{GgmlType, TensorInfo, Value};
use crate::error::ModelError;
use crate::foreign::{MAX_NAME, MAX_TENSORS, is_name, shown};

/// First four bytes of every GGUF.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata key of the alignment of tensor data.
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment where the file does not name one.
pub const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// More dimensions than ggml has.
const MAX_DIMS: u32 = 4;
/// Bytes of a header. A vocabulary of 200,000 tokens takes ten million.
const HEADER_LIMIT: usize = 64 << 20;
/// Entries of all lists of the metadata together. A vocabulary of 200,000 tokens
/// takes a million, with merges, scores and types.
const MAX_ENTRIES: u64 = 1 << 22;
/// Keys of the metadata.
const MAX_KEYS: u64 = 1 << 16;

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
    /// The file, up to where a header must end.
    bytes: &'a [u8],
    file_len: usize,
    at: usize,
    part: &'static str,
    /// Entries that lists may still have.
    entries: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], ModelError> {
        let rest = &self.bytes[self.at..];
        if let Some(taken) = usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            self.at += taken.len();
            return Ok(taken);
        }
        if len <= (self.file_len - self.at) as u64 {
            return Err(self.invalid(&format!(
                "{len} bytes of a header of at most {HEADER_LIMIT}"
            )));
        }
        Err(ModelError::Truncated(format!(
            "{} is cut short: its {} needs {len} bytes at byte {} but the file has {} bytes",
            self.path, self.part, self.at, self.file_len
        )))
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

    fn text(&mut self) -> Result<&'a str, ModelError> {
        let len = self.u64()?;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.invalid("a string is not UTF-8"))
    }

    fn texts(&mut self, count: u64) -> Result<Texts, ModelError> {
        let mut texts = Texts::default();
        for _ in 0..count {
            let text = self.text()?;
            if !texts.push(text) {
                return Err(self.invalid("a list of strings has more than 4 GiB"));
            }
        }
        texts.shrink();
        Ok(texts)
    }

    /// What a tensor or a key is called.
    fn name(&mut self) -> Result<String, ModelError> {
        let name = self.text()?;
        if is_name(name) {
            return Ok(name.to_owned());
        }
        Err(self.invalid(&format!(
            "\"{}\" is no name: such have 1 to {MAX_NAME} bytes",
            shown(name)
        )))
    }

    /// Refuses more than `most` of what the header announces.
    fn announced(&self, count: u64, most: u64, what: &str) -> Result<(), ModelError> {
        if count > most {
            return Err(self.invalid(&format!("{count} {what}, expected at most {most}")));
        }
        Ok(())
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
            8 => Value::Text(self.text()?.to_owned()),
            9 => self.list_value()?,
            other => return Err(self.invalid(&format!("unknown metadata type {other}"))),
        })
    }

    fn list_value(&mut self) -> Result<Value, ModelError> {
        let kind = self.u32()?;
        let count = self.u64()?;
        self.announced(count, self.entries, "more entries of lists")?;
        self.entries -= count;
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::UnsignedList(self.list(count, |r| r.unsigned(kind))?),
            1 | 3 | 5 | 11 => Value::SignedList(self.list(count, |r| r.signed(kind))?),
            6 => Value::FloatList(self.list(count, |r| Ok(f32::from_le_bytes(r.array()?)))?),
            7 => Value::BoolList(self.list(count, |r| Ok(r.array::<1>()?[0] != 0))?),
            8 => Value::TextList(self.texts(count)?),
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
        let name = self.name()?;
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
        bytes: &bytes[..bytes.len().min(HEADER_LIMIT)],
        file_len: bytes.len(),
        at: 0,
        part: "first line",
        entries: MAX_ENTRIES,
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
    reader.announced(tensor_count, MAX_TENSORS as u64, "tensors")?;
    reader.announced(metadata_count, MAX_KEYS, "metadata keys")?;
    reader.part = "metadata";
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = reader.name()?;
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
    place(
        path,
        &mut tensors,
        (data_start, alignment),
        bytes.len() as u64,
    )?;
    Ok(Header {
        metadata,
        tensors,
        metadata_end,
    })
}

fn alignment(path: &str, metadata: &BTreeMap<String, Value>) -> Result<u64, ModelError> {
    let found = match metadata.get(ALIGNMENT_KEY) {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(alignment))
            if alignment.is_power_of_two() && *alignment <= MAX_ALIGNMENT =>
        {
            return Ok(*alignment);
        }
        Some(Value::Unsigned(alignment)) => alignment.to_string(),
        Some(other) => other.kind().to_owned(),
    };
    Err(ModelError::Invalid(format!(
        "{path}: {ALIGNMENT_KEY} is {found}, expected a power of two up to {MAX_ALIGNMENT}"
    )))
}

/// Turns offsets into places in the file. Tensors lie one behind the other, each
/// aligned, as ggml demands it.
fn place(
    path: &str,
    tensors: &mut [TensorInfo],
    (data_start, alignment): (u64, u64),
    file_len: u64,
) -> Result<(), ModelError> {
    let damaged = |what: String| Err(ModelError::Invalid(format!("{path} is damaged: {what}")));
    let mut next = 0;
    for tensor in tensors {
        let TensorInfo { name, start, .. } = tensor;
        if *start != next {
            return damaged(format!(
                "tensor {name} begins {start} bytes behind the header, but the tensors before it end at {next}"
            ));
        }
        let end = start.checked_add(tensor.bytes).and_then(|end| {
            Some((
                end.checked_add(data_start)?,
                end.checked_next_multiple_of(alignment)?,
            ))
        });
        let Some((end, behind)) = end else {
            return damaged(format!(
                "tensor {name} has impossible sizes {:?}",
                tensor.dims
            ));
        };
        if end > file_len {
            return Err(ModelError::Truncated(format!(
                "{path} is cut short: tensor {name} ends at byte {end} but the file has {file_len} bytes"
            )));
        }
        tensor.start += data_start;
        next = behind;
    }
    Ok(())
}
