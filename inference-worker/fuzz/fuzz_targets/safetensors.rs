//! A header of a safetensors file, or, where it does not begin like one, the file.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llama_checkpoint::checkpoint::LoadFormat;
use llama_fuzz::{CONFIG, model, open, write};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = llama_fuzz::folder();
    write(&folder.path().join("config.json"), &[CONFIG], 0);
    folder
});

fuzz_target!(|data: &[u8]| {
    let folder = FOLDER.path();
    let path = folder.join("model.safetensors");
    if data.first() == Some(&b'{') {
        let len = (data.len() as u64).to_le_bytes();
        write(&path, &[&len, data], model().1);
    } else {
        write(&path, &[data], 0);
    }
    open(folder, folder, LoadFormat::Auto);
});
