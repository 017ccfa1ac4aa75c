//! Safetensors files, single or several with an index.

mod header;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::ModelError;
use crate::foreign::{self, ByTensor, MAX_TENSORS, listed, parser_said, read_text, shown};
use crate::map::Mapping;
use crate::stored::StoredTensor;

/// The index of a checkpoint of several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint of one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// More than any index of names needs.
const INDEX_LIMIT: u64 = 64 << 20;
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
    weight_map: ByTensor<String>,
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
        if self.by_name.len() > MAX_TENSORS {
            return Err(ModelError::Invalid(format!(
                "{} is one of files with more than {MAX_TENSORS} tensors",
                path.display()
            )));
        }
        Ok(())
    }

    /// Reads the headers of all files that the index `path` names.
    pub(crate) fn from_index(path: &Path) -> Result<Self, ModelError> {
        let invalid = |what: String| ModelError::Invalid(format!("{} {what}", path.display()));
        let text = read_text(path, INDEX_LIMIT)?;
        let Index {
            weight_map: ByTensor(weight_map),
        } = serde_json::from_str(&text)
            .map_err(|error| invalid(format!("is not an index: {}", parser_said(&error))))?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        if names.len() > FILE_LIMIT {
            return Err(invalid(format!(
                "names {} files, more than {FILE_LIMIT}",
                names.len()
            )));
        }
        let mut tensors = Self::default();
        for name in names {
            tensors.add(&listed(path, name)?)?;
        }
        for (tensor, name) in &weight_map {
            let found = tensors.by_name.get(tensor);
            let file = found.map(|found| tensors.files[found.file].path.file_name());
            if file != Some(Some(name.as_ref())) {
                return Err(invalid(format!(
                    "says that tensor {tensor} is in {}, but it is not",
                    shown(name)
                )));
            }
        }
        Ok(tensors)
    }
}

/// The file at `path`, which will be number `file`, and its tensors.
fn read(path: &Path, file: usize) -> Result<(WeightFile, Vec<StoredTensor>), ModelError> {
    let io = |source| ModelError::Io {
        path: path.display().to_string(),
        source,
    };
    let (opened, len) = foreign::open(path)?;
    let shown = path.display().to_string();
    if len == 0 {
        return Err(ModelError::Truncated(format!(
            "{shown} is cut short: it is empty"
        )));
    }
    let mapping = Mapping::new(&opened).map_err(io)?;
    let (header, tensors) = header::parse(&shown, mapping.bytes(), file)?;
    let file = WeightFile {
        path: path.to_owned(),
        len: mapping.bytes().len() as u64,
        header,
    };
    Ok((file, tensors))
}
