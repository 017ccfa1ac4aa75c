//! How much of a file is its head: what says what the rest is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Bytes that say how long the header of a safetensors file is.
pub const START_BYTES: u64 = 8;
/// No safetensors header is longer: its readers refuse more than 100 MB.
const SAFETENSORS_LIMIT: u64 = 128 << 20;
/// Texts, such as an index or a list of shards, are copied whole up to here.
const TEXT_LIMIT: u64 = 256 << 20;
/// The head of anything else. That of a GGUF with 400,000 words has about 20 MB.
const OTHER_LIMIT: u64 = 64 << 20;

/// Bytes at the start of the file at `path`, which has `bytes`, that readers of headers
/// look at.
///
/// # Errors
/// What the system says of the file.
pub fn bytes(path: &Path, bytes: u64) -> io::Result<u64> {
    let mut start = Vec::new();
    if is_told(path) {
        File::open(path)?
            .take(START_BYTES)
            .read_to_end(&mut start)?;
    }
    Ok(from_start(path, bytes, &start))
}

/// Whether a file of this name tells in its first [`START_BYTES`] how long its head is.
pub fn is_told(name: &Path) -> bool {
    name.extension()
        .is_some_and(|extension| extension == "safetensors")
}

/// The same as [`bytes`], of a file `name` of which the first [`START_BYTES`] are at hand
/// where [`is_told`] says so. The length is as the file tells it, be it true or not.
pub fn from_start(name: &Path, bytes: u64, start: &[u8]) -> u64 {
    let limit = match name.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => match <[u8; 8]>::try_from(start) {
            Ok(length) => u64::from_le_bytes(length)
                .saturating_add(START_BYTES)
                .min(SAFETENSORS_LIMIT),
            // Whoever reads it will say that it is too short.
            Err(_) => START_BYTES,
        },
        Some("json" | "jinja" | "txt") => TEXT_LIMIT,
        _ => OTHER_LIMIT,
    };
    limit.min(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_of_safetensors_is_as_long_as_it_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let head = |length: u64, bytes_in_file: u64| {
            std::fs::write(&path, length.to_le_bytes()).unwrap();
            bytes(&path, bytes_in_file).unwrap()
        };
        assert_eq!(head(1000, 1 << 40), 1008);
        assert_eq!(head(1000, 500), 500, "no more than there is");
        assert_eq!(head(u64::MAX, 1 << 40), SAFETENSORS_LIMIT);
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(bytes(&path, 3).unwrap(), 3);
    }

    #[test]
    fn other_files_have_a_bounded_head() {
        for (name, most) in [
            ("m.gguf", OTHER_LIMIT),
            ("consolidated.00.pth", OTHER_LIMIT),
            ("tokenizer.model", OTHER_LIMIT),
            ("model.safetensors.index.json", TEXT_LIMIT),
        ] {
            assert_eq!(bytes(name.as_ref(), 1 << 40).unwrap(), most, "{name}");
            assert_eq!(bytes(name.as_ref(), 77).unwrap(), 77, "{name}");
        }
    }
}
