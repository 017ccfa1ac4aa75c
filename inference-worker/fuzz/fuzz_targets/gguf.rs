//! A header of a GGUF, with a hole in place of its weights.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llama_checkpoint::checkpoint::LoadFormat;
use llama_fuzz::{folder, open, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);
const WEIGHTS: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    write(&path, &[data], WEIGHTS);
    open(FOLDER.path(), &path, LoadFormat::Auto);
});
