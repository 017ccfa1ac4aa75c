//! What the fuzz targets share: a folder for the files of a process, and what must
//! hold of every checkpoint and of every refusal.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use llama_checkpoint::checkpoint::LoadFormat;
use llama_checkpoint::slices::ModelSlices;
use llama_checkpoint::{Checkpoint, Layout, ModelError, Shard};
use tempfile::TempDir;

/// Shape of the model whose header is fuzzed.
pub const CONFIG: &[u8] = include_bytes!("../../model/tests/reference/llama-plain/config.json");
/// The model itself.
const MODEL: &[u8] = include_bytes!("../../model/tests/reference/llama-plain/model.safetensors");
/// Longest message that still is a sentence.
const MAX_MESSAGE: usize = 1000;

/// A folder that goes with the process. In memory, where the system has that.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        TempDir::new_in(memory)
    } else {
        TempDir::new()
    };
    folder.expect("a folder")
}

/// The header of the model, and how many bytes of weights lie behind it.
pub fn model() -> (&'static [u8], u64) {
    let (len, rest) = MODEL.split_first_chunk().expect("has a length");
    let len = usize::try_from(u64::from_le_bytes(*len)).expect("fits");
    (&rest[..len], (rest.len() - len) as u64)
}

/// Writes `parts` and, behind them, a hole of `rest` bytes.
pub fn write(path: &Path, parts: &[&[u8]], rest: u64) {
    let mut file = File::create(path).expect("creates");
    for part in parts {
        file.write_all(part).expect("writes");
    }
    let len: usize = parts.iter().map(|part| part.len()).sum();
    file.set_len(len as u64 + rest).expect("grows");
}

/// Opens the checkpoint at `path`. What opens is read inside its files only; what
/// does not is refused in one line that names a file in `folder`.
pub fn open(folder: &Path, path: &Path, format: LoadFormat) {
    let checkpoint = match Checkpoint::open(path, format) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(folder, &error),
    };
    let shard = Shard::new(checkpoint.config(), Layout::tensor(1), 0).expect("was checked");
    let slices = ModelSlices::locate(&checkpoint, &shard).expect("was checked");
    for place in slices.places() {
        let len = checkpoint.files()[place.file].len;
        let end = place.region.stretches().last().map_or(0, |last| last.end);
        assert!(end <= len, "{place:?} of a file of {len} bytes");
    }
}

/// Checks the message of an error.
pub fn refused(folder: &Path, error: &ModelError) {
    let sentence = error.to_string();
    let folder = folder.display().to_string();
    assert!(sentence.contains(&folder), "names no file: {sentence}");
    assert!(sentence.len() <= MAX_MESSAGE, "is long: {sentence}");
    assert!(
        !sentence.contains(char::is_control),
        "has lines: {sentence:?}"
    );
}
