//! Headers of safetensors files, single or several with an index.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use crate::error::ModelError;
use crate::format::Format;
use crate::map::Mapping;
use crate::stored::{StoredTensor, StoredType};

/// The index of a checkpoint of several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint of one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Bytes of the header's length, before the header.
const LENGTH_BYTES: usize = 8;
/// More than any index of names needs.
const INDEX_LIMIT: u64 = 256 << 20;
/// As much as the format allows.
const HEADER_LIMIT: u64 = 100_000_000;
/// Files of a checkpoint.
const FILE_LIMIT: usize = 10_000;

/// A file of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// Bytes of its header; what lies behind is weights.
    pub header: u64,
}

/// The files of a checkpoint and the tensors in them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tensors {
    pub(crate) files: Vec<WeightFile>,
    pub(crate) by_name: BTreeMap<String, StoredTensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Reads the header of one more file.
    pub(crate) fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let (file, tensors) = read(path, self.files.len())?;
        for tensor in tensors {
            let name = tensor.name.clone();
            if let Some(other) = self.by_name.insert(name.clone(), tensor) {
                return Err(ModelError::Invalid(format!(
                    "tensor {name} is in {} and in {}",
                    self.files[other.file].path.display(),
                    path.display()
                )));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Reads the headers of all files that the index `path` names.
    pub(crate) fn from_index(path: &Path) -> Result<Self, ModelError> {
        let text = read_text(path, INDEX_LIMIT)?;
        let index: Index = serde_json::from_str(&text).map_err(|error| {
            ModelError::Invalid(format!("{} is not an index: {error}", path.display()))
        })?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        if names.len() > FILE_LIMIT {
            return Err(ModelError::Invalid(format!(
                "{} names {} files, more than {FILE_LIMIT}",
                path.display(),
                names.len()
            )));
        }
        let mut tensors = Self::default();
        for name in names {
            if Path::new(name).components().count() != 1 || name.starts_with('.') {
                return Err(ModelError::Invalid(format!(
                    "{} names the file \"{}\", expected a name in the same folder",
                    path.display(),
                    name.escape_debug()
                )));
            }
            let file = folder.join(name);
            if !file.exists() {
                return Err(ModelError::NotFound(format!(
                    "{} names {}, which does not exist",
                    path.display(),
                    file.display()
                )));
            }
            tensors.add(&file)?;
        }
        for (tensor, name) in &index.weight_map {
            let found = tensors.by_name.get(tensor);
            let file = found.map(|found| tensors.files[found.file].path.file_name());
            if file != Some(Some(name.as_ref())) {
                return Err(ModelError::Invalid(format!(
                    "{} says that tensor {tensor} is in {name}, but it is not",
                    path.display()
                )));
            }
        }
        Ok(tensors)
    }
}

/// The text of a small file.
///
/// # Errors
/// `ModelNotFound` without it, `ModelInvalid` when it is longer than `limit` or
/// not text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let io = |source: io::Error| ModelError::Io {
        path: path.display().to_string(),
        source,
    };
    let len = path.metadata().map_err(io)?.len();
    if len > limit {
        return Err(ModelError::Invalid(format!(
            "{} has {len} bytes, more than {limit}",
            path.display()
        )));
    }
    std::fs::read_to_string(path).map_err(io)
}

/// The file at `path`, which will be number `file`, and its tensors.
fn read(path: &Path, file: usize) -> Result<(WeightFile, Vec<StoredTensor>), ModelError> {
    let io = |source| ModelError::Io {
        path: path.display().to_string(),
        source,
    };
    let opened = File::open(path).map_err(io)?;
    let len = opened.metadata().map_err(io)?.len();
    if len < LENGTH_BYTES as u64 {
        return Err(ModelError::Truncated(format!(
            "{} is cut short: it has {len} bytes",
            path.display()
        )));
    }
    let mapping = Mapping::new(&opened).map_err(io)?;
    check_ends(path, mapping.bytes())?;
    let (header, metadata) =
        SafeTensors::read_metadata(mapping.bytes()).map_err(|error| refusal(path, &error))?;
    let data = (LENGTH_BYTES + header) as u64;
    let tensors = stored(&metadata, file, data);
    let header = data;
    let path = path.to_owned();
    Ok((WeightFile { path, len, header }, tensors))
}

fn stored(metadata: &Metadata, file: usize, data: u64) -> Vec<StoredTensor> {
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            StoredTensor {
                name,
                shape: info.shape.clone(),
                stored: stored_type(info.dtype),
                file,
                start: data + start as u64,
                bytes: (end - start) as u64,
            }
        })
        .collect()
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

/// Checks that the header and every tensor lie inside the file, so that no later
/// arithmetic on their places can overflow.
fn check_ends(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let shown = path.display();
    let (len, header) = (bytes.len() as u64, header_len(bytes));
    if header > HEADER_LIMIT {
        return Err(ModelError::Invalid(format!(
            "{shown} is not a safetensors file: it announces a header of {header} bytes"
        )));
    }
    let data = LENGTH_BYTES as u64 + header;
    let Some(header) = usize::try_from(data)
        .ok()
        .and_then(|end| bytes.get(LENGTH_BYTES..end))
    else {
        return Err(ModelError::Truncated(format!(
            "{shown} is cut short: its header of {header} bytes does not end in its {len} bytes"
        )));
    };
    let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header)
        .map_err(|error| ModelError::Invalid(format!("{shown} has a damaged header: {error}")))?;
    for (name, entry) in &entries {
        let Some(end) = entry["data_offsets"][1].as_u64() else {
            continue;
        };
        if end > len - data {
            return Err(ModelError::Truncated(format!(
                "{shown} is cut short: tensor {name} ends {end} bytes behind the header but {} are there",
                len - data
            )));
        }
    }
    Ok(())
}

/// Says what is wrong with a header in words of this project.
fn refusal(path: &Path, error: &SafeTensorError) -> ModelError {
    let path = path.display();
    ModelError::Invalid(match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("{path} is damaged: its tensors end before the file does")
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("{path} is damaged: the bytes of tensor {name} overlap others or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo | SafeTensorError::ValidationOverflow => {
            format!("{path} is damaged: the bytes of a tensor do not match its shape and type")
        }
        other => format!("{path} has a damaged header: {other}"),
    })
}

fn header_len(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |len| u64::from_le_bytes(*len))
}
