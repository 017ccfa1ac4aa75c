//! Text and files that others wrote: bounded before it is kept or shown.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::ModelError;

/// Tensors of a checkpoint. The greatest that is known has 20,000.
pub(crate) const MAX_TENSORS: usize = 1 << 18;
/// Bytes of a name in a header.
pub(crate) const MAX_NAME: usize = 256;
/// Free text beside the tensors of a safetensors header and of an index.
const METADATA: &str = "__metadata__";
/// Characters of a parser's message that are shown.
const PARSER_CHARACTERS: usize = 200;
/// Characters of a value that are shown.
const VALUE_CHARACTERS: usize = 60;

/// A value for a message: on one line, and cut off where it grows long.
pub(crate) fn shown(text: &str) -> String {
    shorten(text, VALUE_CHARACTERS)
}

/// What a parser of JSON said. It repeats what it met.
pub(crate) fn parser_said(error: &serde_json::Error) -> String {
    shorten(&error.to_string(), PARSER_CHARACTERS)
}

fn shorten(text: &str, most: usize) -> String {
    let mut out = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == most {
            out.push('…');
            break;
        }
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

/// Whether a message may hold `name` as it is.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.contains(char::is_control)
}

/// A JSON object whose keys name tensors, each once.
#[derive(Debug)]
pub(crate) struct ByTensor<T>(pub(crate) BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ByTensor<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ByTensorVisitor(BTreeMap::new()))
    }
}

struct ByTensorVisitor<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ByTensorVisitor<T> {
    type Value = ByTensor<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the names of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = self.0;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if !is_name(&name) {
                return Err(A::Error::custom(format_args!(
                    "\"{}\" is no name of a tensor: such have 1 to {MAX_NAME} bytes",
                    shown(&name)
                )));
            }
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format_args!("tensor {name} occurs twice")));
            }
            if entries.len() == MAX_TENSORS {
                return Err(A::Error::custom(format_args!(
                    "more than {MAX_TENSORS} tensors"
                )));
            }
            entries.insert(name, map.next_value()?);
        }
        Ok(ByTensor(entries))
    }
}

/// Opens the file at `path` and says how long it is. Anything else, such as a
/// pipe, is refused: reading it might wait for ever.
pub(crate) fn open(path: &Path) -> Result<(File, u64), ModelError> {
    let io = |source| io_error(path, source);
    let metadata = path.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(ModelError::Invalid(format!(
            "{} is not a file",
            path.display()
        )));
    }
    Ok((File::open(path).map_err(io)?, metadata.len()))
}

/// The text of a small file.
///
/// # Errors
/// `ModelNotFound` without it, `ModelInvalid` when it is longer than `limit` or
/// not text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let (file, len) = open(path)?;
    if len > limit {
        return Err(ModelError::Invalid(format!(
            "{} has {len} bytes, more than {limit}",
            path.display()
        )));
    }
    let mut bytes = Vec::new();
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(|source| io_error(path, source))?;
    String::from_utf8(bytes)
        .map_err(|error| ModelError::Invalid(format!("{} is not text: {error}", path.display())))
}

/// The file `name` that `list` names, which must lie beside it.
pub(crate) fn listed(list: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let file = list.with_file_name(name);
    if name.starts_with('.') || Path::new(name).file_name() != Some(name.as_ref()) {
        return Err(ModelError::Invalid(format!(
            "{} names the file \"{}\", expected a name in the same folder",
            list.display(),
            shown(name)
        )));
    }
    if !file.exists() {
        return Err(ModelError::NotFound(format!(
            "{} names {}, which does not exist",
            list.display(),
            shown(name)
        )));
    }
    Ok(file)
}

fn io_error(path: &Path, source: io::Error) -> ModelError {
    ModelError::Io {
        path: path.display().to_string(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_shown_on_one_line_and_cut_off() {
        assert_eq!(shown("two\nlines\u{1b}[31m"), "two\\nlines\\u{1b}[31m");
        assert_eq!(shown(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shown(&"é".repeat(61)), format!("{}…", "é".repeat(60)));
    }

    #[test]
    fn names_fit_messages() {
        assert!(is_name("model.embed_tokens.weight") && is_name(&"n".repeat(MAX_NAME)));
        for name in ["", "a\nb", "\u{7f}", &"n".repeat(MAX_NAME + 1)] {
            assert!(!is_name(name), "{name:?}");
        }
    }
}
