//! Telling whether ranks of different pods opened the same model.

use std::fs::File;
use std::io::{self, Read};

use llama_model::{Checkpoint, ModelError};

/// Hash of everything before the weights: the length of each file, metadata, tensor
/// names, shapes and places. The weights themselves are not read.
///
/// # Errors
/// When a file cannot be read any more.
pub(crate) fn digest(checkpoint: &Checkpoint) -> Result<String, ModelError> {
    let mut hasher = blake3::Hasher::new();
    // Two models may have the same headers, such as none, and other constants.
    hasher.update(format!("{:?}", checkpoint.config()).as_bytes());
    for file in checkpoint.files() {
        hasher.update(&file.len.to_le_bytes());
        let read = File::open(&file.path)
            .map(|opened| opened.take(file.header))
            .and_then(|mut header| io::copy(&mut header, &mut hasher));
        if let Err(source) = read {
            return Err(ModelError::Io {
                path: file.path.display().to_string(),
                source,
            });
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
