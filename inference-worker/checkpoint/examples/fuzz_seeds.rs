//! Writes what the fuzz targets begin with, out of the models that tests use.
//!
//!     fuzz_seeds FOLDER

#[path = "../tests/hostile/gguf.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "tests use more of it, and may fail"
)]
mod gguf;

use std::error::Error;
use std::path::{Path, PathBuf};

use gguf::{Header, text};
use serde_json::{Map, json};

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tests/reference");

fn main() -> Result<(), Box<dyn Error>> {
    let corpus: PathBuf = std::env::args_os()
        .nth(1)
        .ok_or("usage: fuzz_seeds FOLDER")?
        .into();
    let put = |target: &str, name: &str, bytes: &[u8]| -> std::io::Result<()> {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(name), bytes)
    };
    for entry in Path::new(MODELS).read_dir()? {
        let folder = entry?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let (config, model) = (folder.join("config.json"), folder.join("model.safetensors"));
        if config.is_file() {
            put("config", &name, &std::fs::read(config)?)?;
        }
        if model.is_file() {
            put("safetensors", &name, header(&std::fs::read(model)?)?)?;
        }
    }
    for (name, header) in [("llama", Header::llama()), ("llama4", Header::llama4())] {
        put("gguf", name, &header.to_bytes().0)?;
    }
    put("tokenizer", "gguf", &tokenizer().to_bytes().0)?;
    put("tokenizer", "json", tokenizer_json().as_bytes())?;
    Ok(())
}

/// The header of a safetensors file.
fn header(file: &[u8]) -> Result<&[u8], Box<dyn Error>> {
    let (len, rest) = file.split_first_chunk().ok_or("a file without a header")?;
    let len = usize::try_from(u64::from_le_bytes(*len))?;
    Ok(rest.get(..len).ok_or("a header that is cut short")?)
}

/// Metadata with a tokenizer, and no tensors.
fn tokenizer() -> Header {
    let mut header = Header::llama();
    header.tensors.clear();
    let texts = |list: &[&str]| {
        let mut out = [
            8_u32.to_le_bytes().as_slice(),
            &(list.len() as u64).to_le_bytes(),
        ]
        .concat();
        for item in list {
            out.extend(text(item));
        }
        out
    };
    let tokens = [
        "t",
        "h",
        "e",
        "Ġ",
        "Ċ",
        "th",
        "the",
        "Ġthe",
        "1",
        "2",
        "<|im_end|>",
    ];
    let mut types = [5_u32.to_le_bytes().as_slice(), &11_u64.to_le_bytes()].concat();
    for id in 0..11 {
        types.extend(if id == 10 { 3_i32 } else { 1 }.to_le_bytes());
    }
    header.set("tokenizer.ggml.model", 8, text("gpt2"));
    header.set("tokenizer.ggml.pre", 8, text("llama-bpe"));
    header.set("tokenizer.ggml.tokens", 9, texts(&tokens));
    header.set("tokenizer.ggml.token_type", 9, types);
    header.set("tokenizer.ggml.merges", 9, texts(&["t h", "th e", "Ġ the"]));
    header.set_size("tokenizer.ggml.eos_token_id", 10);
    header.set("tokenizer.ggml.add_bos_token", 7, [0]);
    header.set(
        "tokenizer.chat_template",
        8,
        text("{{ messages[0].content }}"),
    );
    header
}

/// A `tokenizer.json` of all bytes, two merges and a control token.
fn tokenizer_json() -> String {
    let mut vocabulary = Map::new();
    let mut next = 256;
    for byte in 0..256_u32 {
        // Bytes that print stand for themselves, the others for what follows.
        let is_plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if is_plain { byte } else { next };
        next += u32::from(!is_plain);
        let character = char::from_u32(code).unwrap_or_default();
        vocabulary.insert(character.to_string(), json!(byte));
    }
    vocabulary.insert("th".to_owned(), json!(256));
    vocabulary.insert("the".to_owned(), json!(257));
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 258, "content": "<|im_end|>", "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+(?!\\S)"},
                "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "trim_offsets": true},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["t", "h"], ["th", "e"]],
            "ignore_merges": true},
    })
    .to_string()
}
