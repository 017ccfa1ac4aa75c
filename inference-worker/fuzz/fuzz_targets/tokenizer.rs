//! The tokenizer in the metadata of a GGUF.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use llama_fuzz::{folder, refused, write};
use llama_model::Gguf;
use llama_model::text::{ChatTemplate, Special, Tokenizer};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);
const TEXT: &str = "Grüße, <|im_start|>world<|im_end|>\u{1F980} 12345\n\n  the end\0";

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    write(&path, &[data], 0);
    let read = Gguf::open(&path).and_then(|gguf| {
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        Ok((tokenizer, template))
    });
    let tokenizer = match read {
        Ok((tokenizer, _)) => tokenizer,
        Err(error) => return refused(FOLDER.path(), &error),
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
