//! The file that an error about text is told of.

use std::fmt::Display;
use std::path::Path;

use crate::error::ModelError;

/// Longest excerpt of a file in a message, in characters.
const EXCERPT: usize = 40;

/// A file that describes a tokenizer or a template.
#[derive(Debug)]
pub(super) struct Origin(String);

impl Origin {
    /// The file at `path`.
    pub(super) fn new(path: &Path) -> Self {
        Self(path.display().to_string())
    }

    /// A `ModelInvalid` error about this file.
    pub(super) fn invalid(&self, what: impl Display) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.0))
    }

    /// A `ModelUnsupported` error about this file.
    pub(super) fn unsupported(&self, what: impl Display) -> ModelError {
        ModelError::Unsupported(format!("{}: {what}", self.0))
    }
}

/// The beginning of `text`, with unprintable characters escaped.
pub(crate) fn excerpt(text: &str) -> String {
    let cut: String = text.chars().take(EXCERPT).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("\"{}{more}\"", cut.escape_debug())
}
