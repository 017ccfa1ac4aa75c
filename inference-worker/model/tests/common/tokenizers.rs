//! Where the real tokenizers and chat templates lie that may not be committed.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "each test file uses a part, and tests may fail"
)]

use std::path::PathBuf;

/// Environment variable with the folder that `e2e/fetch-tokenizers.sh` filled.
const VARIABLE: &str = "LLAMA_TEST_TOKENIZERS";

/// A file of that folder, or `None` with a notice where there is none.
pub fn test_file(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os(VARIABLE).map(PathBuf::from) else {
        eprintln!("not run: {VARIABLE} does not name the folder with {name}");
        return None;
    };
    let file = folder.join(name);
    if !file.exists() {
        eprintln!("not run: there is no {}", file.display());
        return None;
    }
    Some(file)
}

/// A `tokenizer.json` with a token for each byte, for `ab` and for ` ab`, and the
/// control tokens `control` behind them.
pub fn tiny_json(control: &[&str]) -> serde_json::Value {
    let mut vocabulary: Vec<String> = byte_characters().map(String::from).collect();
    vocabulary.extend(["ab".to_owned(), "Ġab".to_owned()]);
    let first = vocabulary.len();
    let added: Vec<_> = control
        .iter()
        .zip(first..)
        .map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let vocabulary: serde_json::Map<_, _> = vocabulary
        .into_iter()
        .zip(0..)
        .map(|(token, id): (String, u32)| (token, id.into()))
        .collect();
    serde_json::json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["Ġ", "ab"]], "ignore_merges": false},
    })
}

/// A tiktoken file with a token for each byte and for `ab`.
pub fn tiny_tiktoken() -> String {
    use base64::Engine as _;
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let lines: Vec<String> = bytes
        .chain([b"ab".to_vec()])
        .enumerate()
        .map(|(rank, token)| {
            let token = base64::engine::general_purpose::STANDARD.encode(token);
            format!("{token} {rank}")
        })
        .collect();
    lines.join("\n")
}

/// The characters that stand for the bytes 0 to 255.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut spare = (256..).filter_map(char::from_u32);
    (0..=u8::MAX)
        .map(move |byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => Some(char::from(byte)),
            _ => spare.next(),
        })
        .map(|character| character.expect("there are enough"))
}
