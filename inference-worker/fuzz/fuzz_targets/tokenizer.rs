//! A `tokenizer.json`, or, where it does not begin like one, a GGUF with a
//! tokenizer.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llama_fuzz::{folder, refused, write};
use llama_model::text::{ModelText, Special};
use tempfile::TempDir;

static JSON: LazyLock<TempDir> = LazyLock::new(folder);
static GGUF: LazyLock<TempDir> = LazyLock::new(folder);
const TEXT: &str = "Grüße, <|im_start|>world<|im_end|>\u{1F980} 12345\n\n  the end\0";

fuzz_target!(|data: &[u8]| {
    let (folder, name) = match data.first() {
        Some(b'{') => (JSON.path(), "tokenizer.json"),
        _ => (GGUF.path(), "model.gguf"),
    };
    write(&folder.join(name), &[data], 0);
    let tokenizer = match ModelText::open(&folder.join(name)) {
        Ok(text) => text.tokenizer,
        Err(error) => return refused(folder, &error),
    };
    for special in [Special::Parse, Special::Plain] {
        let Ok(ids) = tokenizer.encode_prompt(TEXT, special) else {
            continue;
        };
        for id in ids {
            assert!((id as usize) < tokenizer.vocab_size(), "token {id}");
            tokenizer.token_bytes(id);
        }
    }
});
