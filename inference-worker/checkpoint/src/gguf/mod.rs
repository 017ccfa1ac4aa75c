//! GGUF files: header, metadata and tensor bytes.

mod header;
mod texts;
mod types;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use texts::Texts;
pub use types::{GgmlType, TensorInfo, Value};

pub use header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC};

use crate::error::ModelError;
use crate::foreign;
use crate::map::Mapping;

/// Where the header counts tensors.
const TENSOR_COUNT: Range<usize> = 8..16;
/// Extension of GGUF files.
const EXTENSION: &str = "gguf";
/// How many files a message names.
const LISTED_FILES: usize = 8;

/// An open GGUF whose header is read and whose tensors are known to lie inside
/// the file. Reading weights touches the file only then.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file_len: u64,
    metadata_end: usize,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Opens the GGUF at `path`, or the only one in the folder `path`.
    ///
    /// # Errors
    /// `ModelNotFound` when there is no such file or several to choose from,
    /// `ModelTruncated` when a tensor would lie behind the end of the file,
    /// `ModelInvalid` and `ModelUnsupported` when the header is not GGUF 2 or 3.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let path = locate(path)?;
        let io = |source| ModelError::Io {
            path: path.display().to_string(),
            source,
        };
        let (file, len) = foreign::open(&path)?;
        if len == 0 {
            return Err(ModelError::Truncated(format!(
                "{} is cut short: it is empty",
                path.display()
            )));
        }
        let mapping = Mapping::new(&file).map_err(io)?;
        let header = header::parse(&path.display().to_string(), mapping.bytes())?;
        let mut by_name = HashMap::new();
        for (index, tensor) in header.tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(ModelError::Invalid(format!(
                    "{} is damaged: tensor {} occurs twice",
                    path.display(),
                    tensor.name
                )));
            }
        }
        Ok(Self {
            path,
            metadata_end: header.metadata_end,
            file_len: mapping.bytes().len() as u64,
            metadata: header.metadata,
            tensors: header.tensors,
            by_name,
        })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// A GGUF with the metadata of this one and no tensors.
    ///
    /// # Errors
    /// When the file cannot be read any more.
    pub fn without_tensors(&self) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; self.metadata_end];
        File::open(&self.path)
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(|source| ModelError::Io {
                path: self.path.display().to_string(),
                source,
            })?;
        bytes[TENSOR_COUNT].fill(0);
        Ok(bytes)
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The value of `key` as an unsigned integer, `None` when it is absent.
    ///
    /// # Errors
    /// `ModelInvalid` when it has another type.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) if *value >= 0 => Ok(Some(value.unsigned_abs())),
            Some(other) => Err(self.mistyped(key, "an unsigned integer", other)),
        }
    }

    /// The value of `key` as a float, `None` when it is absent.
    ///
    /// # Errors
    /// `ModelInvalid` when it has another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mistyped(key, "a float", other)),
        }
    }

    /// The value of `key` as a truth value, `None` when it is absent.
    ///
    /// # Errors
    /// `ModelInvalid` when it has another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.mistyped(key, "a bool", other)),
        }
    }

    /// The value of `key` as text, `None` when it is absent.
    ///
    /// # Errors
    /// `ModelInvalid` when it has another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(key, "a string", other)),
        }
    }

    /// The value of `key` as texts, `None` when it is absent.
    ///
    /// # Errors
    /// `ModelInvalid` when it has another type.
    pub fn texts(&self, key: &str) -> Result<Option<&Texts>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::TextList(value)) => Ok(Some(value)),
            Some(other) => Err(self.mistyped(key, "a list of strings", other)),
        }
    }

    fn mistyped(&self, key: &str, expected: &str, found: &Value) -> ModelError {
        self.invalid(&format!(
            "metadata {key} is {}, expected {expected}",
            found.kind()
        ))
    }

    /// A `ModelInvalid` error about this file.
    pub fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.path.display()))
    }

    /// A `ModelUnsupported` error about this file.
    pub fn unsupported(&self, what: &str) -> ModelError {
        ModelError::Unsupported(format!("{}: {what}", self.path.display()))
    }
}

/// The file that `path` means: itself, or the only GGUF in that folder.
fn locate(path: &Path) -> Result<PathBuf, ModelError> {
    let shown = path.display();
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            let mut files = ggufs_in(path).map_err(|source| ModelError::Io {
                path: shown.to_string(),
                source,
            })?;
            match files.len() {
                0 => Err(ModelError::NotFound(format!(
                    "no .gguf file in the folder {shown}"
                ))),
                1 => Ok(path.join(files.remove(0))),
                count => Err(ModelError::NotFound(format!(
                    "the folder {shown} holds {count} .gguf files, name one of them: {}",
                    list(&files)
                ))),
            }
        }
        Ok(_) => Ok(path.to_owned()),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| folder.is_dir());
            let files = folder.and_then(|folder| ggufs_in(folder).ok());
            Err(ModelError::NotFound(match files {
                None => format!("no file {shown}; its folder does not exist either"),
                Some(files) if files.is_empty() => {
                    format!("no file {shown}; the folder holds no .gguf file")
                }
                Some(files) => format!("no file {shown}; the folder holds {}", list(&files)),
            }))
        }
        Err(source) => Err(ModelError::Io {
            path: shown.to_string(),
            source,
        }),
    }
}

/// Names of the GGUF files in `folder`, sorted.
fn ggufs_in(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in folder.read_dir()? {
        let path = entry?.path();
        let is_gguf = path.extension().is_some_and(|ext| ext == EXTENSION);
        if let (true, Some(name)) = (is_gguf && path.is_file(), path.file_name()) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn list(names: &[String]) -> String {
    let mut text = names[..names.len().min(LISTED_FILES)].join(", ");
    if names.len() > LISTED_FILES {
        text.push_str(", …");
    }
    text
}
