//! A `config.json`, beside the weights of one model and beside none.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llama_checkpoint::checkpoint::LoadFormat;
use llama_fuzz::{model, open, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = llama_fuzz::folder();
    let (header, weights) = model();
    let len = (header.len() as u64).to_le_bytes();
    let path = folder.path().join("model.safetensors");
    write(&path, &[&len, header], weights);
    folder
});

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    write(&folder.join("config.json"), &[data], 0);
    open(folder, folder, LoadFormat::Auto);
    if let Ok(text) = std::str::from_utf8(data)
        && !text.contains("quantization_config")
    {
        dummy(folder);
    }
});

/// Random weights need no file; what is refused is refused by name.
fn dummy(folder: &std::path::Path) {
    if let Err(error) = llama_checkpoint::Checkpoint::open(folder, LoadFormat::Dummy) {
        llama_fuzz::refused(folder, &error);
    }
}
