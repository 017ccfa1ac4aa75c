//! Checkpoints of embedding models: BERTs that make vectors of texts, as
//! sentence-transformers writes them.

mod memory;
mod slices;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::checkpoint::{CONFIG, CONFIG_LIMIT};
use crate::config::bert::{self, Files};
use crate::error::ModelError;
use crate::foreign::read_text;
use crate::safetensors::{INDEX, SINGLE, Tensors, WeightFile};
use crate::stored::StoredTensor;

pub use crate::config::bert::{BertConfig, Pooling};
pub use memory::{EmbeddingMemory, EmbeddingRequest, PACKED_TOKENS};
pub use slices::{EmbeddingLayerSlices, EmbeddingSlices, NormSlices, ProjectionSlices};

/// How the parts of a sentence-transformers model follow each other.
const MODULES: &str = "modules.json";
/// What it says of the transformer.
const TRANSFORMER: &str = "sentence_bert_config.json";
/// What it says of prompts.
const PROMPTS: &str = "config_sentence_transformers.json";

/// An open embedding model. Its headers are read and checked, its weights are not.
#[derive(Debug)]
pub struct EmbeddingCheckpoint {
    path: PathBuf,
    config: BertConfig,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, StoredTensor>,
}

impl EmbeddingCheckpoint {
    /// Opens the folder `path`, or that of the file `path`, where its `config.json` is
    /// of an embedding model; `None` where anything else lies there.
    ///
    /// # Errors
    /// `ModelNotFound` when there are no weights, `ModelTruncated` when a tensor would
    /// lie behind the end of a file, `ModelInvalid` and `ModelUnsupported` when files
    /// are damaged, contradict each other, or ask for what is not computed.
    pub fn open(path: &Path) -> Result<Option<Self>, ModelError> {
        let extension = path.extension();
        let is_part = extension.is_some_and(|ext| ext == "safetensors" || ext == "json");
        let folder = path.parent().filter(|_| is_part).unwrap_or(path);
        let Some(config) = read(folder, CONFIG)? else {
            return Ok(None);
        };
        if !bert::is_embedding_model(&config.1) {
            return Ok(None);
        }
        let config = BertConfig::read(&files(folder, config)?)?;
        let mut tensors = Tensors::default();
        if folder.join(INDEX).is_file() {
            tensors = Tensors::from_index(&folder.join(INDEX))?;
        } else if folder.join(SINGLE).is_file() {
            tensors.add(&folder.join(SINGLE))?;
        } else {
            return Err(ModelError::NotFound(format!(
                "the folder {} holds {CONFIG} but neither {INDEX} nor {SINGLE}",
                folder.display()
            )));
        }
        let checkpoint = Self {
            path: folder.to_owned(),
            config,
            files: tensors.files,
            tensors: tensors.by_name,
        };
        EmbeddingSlices::locate(&checkpoint)?;
        Ok(Some(checkpoint))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The files that hold weights.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// Every tensor by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    pub(crate) fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.path.display()))
    }

    pub(crate) fn unsupported(&self, what: &str) -> ModelError {
        ModelError::Unsupported(format!("{}: {what}", self.path.display()))
    }
}

/// Everything that says how vectors are made.
fn files(folder: &Path, config: (String, String)) -> Result<Files, ModelError> {
    let modules = read(folder, MODULES)?;
    let mut pooling = BTreeMap::new();
    if let Some(modules) = &modules {
        for name in bert::pooling_folders(modules)? {
            // A folder beside the file, and nothing further away.
            if Path::new(&name).file_name() != Some(name.as_ref()) {
                return Err(ModelError::Invalid(format!(
                    "{} names the folder \"{}\", expected a name in the same folder",
                    modules.0,
                    crate::foreign::shown(&name)
                )));
            }
            if let Some(file) = read(&folder.join(&name), CONFIG)? {
                pooling.insert(name, file);
            }
        }
    }
    Ok(Files {
        config,
        modules,
        pooling,
        transformer: read(folder, TRANSFORMER)?,
        prompts: read(folder, PROMPTS)?,
    })
}

/// Path and text of the file `name`, `None` where there is none.
fn read(folder: &Path, name: &str) -> Result<Option<(String, String)>, ModelError> {
    let path = folder.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_text(&path, CONFIG_LIMIT)?;
    Ok(Some((path.display().to_string(), text)))
}
