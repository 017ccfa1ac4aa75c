//! Why a model cannot be run.

use std::fmt;

/// The few kinds of [`ModelError`], each a category of the worker's contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelErrorCategory {
    /// The model file is not where the spec says.
    ModelNotFound,
    /// The model file is shorter than its own header says.
    ModelTruncated,
    /// The model file cannot be read as what it claims to be.
    ModelInvalid,
    /// The model is well formed but of a kind that this crate does not run.
    ModelUnsupported,
    /// The model cannot be split over this many ranks.
    InvalidLayout,
    /// Weights and cache do not fit the memory limit.
    InsufficientMemory,
    /// A file could not be written.
    OutputFailed,
}

impl ModelErrorCategory {
    /// The CamelCase name, as it stands in conditions and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ModelNotFound => "ModelNotFound",
            Self::ModelTruncated => "ModelTruncated",
            Self::ModelInvalid => "ModelInvalid",
            Self::ModelUnsupported => "ModelUnsupported",
            Self::InvalidLayout => "InvalidLayout",
            Self::InsufficientMemory => "InsufficientMemory",
            Self::OutputFailed => "OutputFailed",
        }
    }
}

impl fmt::Display for ModelErrorCategory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A model that cannot be opened, planned or loaded. Every message is a
/// sentence that names the file, tensor or setting and the numbers involved.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// There is no such file, or no single one to choose.
    #[error("{0}")]
    NotFound(String),
    /// The file ends before the data that its header announces.
    #[error("{0}")]
    Truncated(String),
    /// The file breaks its format, or its parts contradict each other.
    #[error("{0}")]
    Invalid(String),
    /// The file is in order, but this crate does not compute such a model.
    #[error("{0}")]
    Unsupported(String),
    /// The model cannot be split as asked.
    #[error("{0}")]
    Layout(String),
    /// The model does not fit the memory limit.
    #[error("{0}")]
    Memory(String),
    /// The operating system refused to write a file.
    #[error("write {path}")]
    Write {
        /// The file or folder.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refused to read the file.
    #[error("read {path}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl ModelError {
    /// The category of this error.
    pub fn category(&self) -> ModelErrorCategory {
        match self {
            Self::NotFound(_) => ModelErrorCategory::ModelNotFound,
            Self::Truncated(_) => ModelErrorCategory::ModelTruncated,
            Self::Invalid(_) => ModelErrorCategory::ModelInvalid,
            Self::Unsupported(_) => ModelErrorCategory::ModelUnsupported,
            Self::Layout(_) => ModelErrorCategory::InvalidLayout,
            Self::Write { .. } => ModelErrorCategory::OutputFailed,
            Self::Memory(_) => ModelErrorCategory::InsufficientMemory,
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => ModelErrorCategory::ModelNotFound,
                _ => ModelErrorCategory::ModelInvalid,
            },
        }
    }
}
