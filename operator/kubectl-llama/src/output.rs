//! How an answer is written.

use serde::Serialize;

use crate::args::Form;
use crate::error::Error;

/// `value` in `form`, with a line break at the end.
pub fn formed(value: &impl Serialize, form: Form) -> Result<String, Error> {
    let mut text = match form {
        Form::Json => serde_json::to_string_pretty(value).map_err(|error| Error::Form {
            form: "JSON",
            problem: error.to_string(),
        })?,
        Form::Yaml => yaml(value)?,
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// `value` as YAML.
pub fn yaml(value: &impl Serialize) -> Result<String, Error> {
    serde_saphyr::to_string(value).map_err(|error| Error::Form {
        form: "YAML",
        problem: error.to_string(),
    })
}
