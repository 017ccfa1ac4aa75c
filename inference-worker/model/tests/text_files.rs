//! Tokenizer files of a model folder: what is read from which file, and how damaged
//! and hostile ones are refused.

#![allow(clippy::expect_used, clippy::panic, reason = "tests may fail")]

#[path = "common/tokenizers.rs"]
mod tokenizers;

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use llama_model::text::{Detokenizer, ModelText, Special};
use llama_model::{ModelError, ModelErrorCategory};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use tokenizers::{tiny_json, tiny_tiktoken};

/// Far longer than any refusal takes; what this catches takes minutes.
const LONG: Duration = Duration::from_secs(10);

const CONTROL: [&str; 3] = ["<|begin|>", "<|end|>", "<|eot_id|>"];

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, content) in files {
        fs::write(folder.path().join(name), content).expect("writes");
    }
    folder
}

/// Opens `path`, which must not take long, whatever it holds.
fn open(path: &Path) -> Result<ModelText, ModelError> {
    let begun = Instant::now();
    let opened = ModelText::open(path);
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    opened
}

fn json_model(tokenizer: &Value, others: &[(&str, Value)]) -> Result<ModelText, ModelError> {
    let mut files = vec![("tokenizer.json", tokenizer.to_string())];
    files.extend(
        others
            .iter()
            .map(|(name, value)| (*name, value.to_string())),
    );
    let files: Vec<_> = files
        .iter()
        .map(|(name, content)| (*name, content.as_bytes()))
        .collect();
    open(folder(&files).path())
}

#[test]
fn a_file_a_folder_and_a_file_beside_it_are_the_same_model() {
    let both = folder(&[
        ("tokenizer.json", tiny_json(&CONTROL).to_string().as_bytes()),
        ("tokenizer.model", tiny_tiktoken().as_bytes()),
        ("config.json", br#"{"model_type": "llama"}"#),
        ("model-00001-of-00002.safetensors", b""),
    ]);
    let of = |name: &str| {
        let text = open(&both.path().join(name)).expect("opens");
        text.tokenizer.vocab_size()
    };
    assert_eq!(of(""), 258 + 3);
    assert_eq!(of("tokenizer.json"), 258 + 3);
    assert_eq!(of("model-00001-of-00002.safetensors"), 258 + 3);
    assert_eq!(of("tokenizer.model"), 257 + 256);
}

#[test]
fn ends_and_begin_come_from_the_files_beside_it() {
    let post = json!({"type": "Sequence", "processors": [
        {"type": "ByteLevel", "trim_offsets": false},
        {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [258], "tokens": ["<|begin|>"]}}}]});
    let mut tokenizer = tiny_json(&CONTROL);
    let text = json_model(&tokenizer, &[]).expect("opens").tokenizer;
    assert_eq!((text.bos_id(), text.eos_id()), (None, None));
    assert_eq!(text.eos_ids(), [259, 260], "known names end an answer");
    assert_eq!(
        text.encode_prompt("ab", Special::Parse).expect("encodes"),
        [256]
    );

    tokenizer["post_processor"] = post;
    let text = json_model(&tokenizer, &[]).expect("opens").tokenizer;
    assert_eq!(text.bos_id(), Some(258));
    assert_eq!(
        text.encode_prompt("ab", Special::Parse).expect("encodes"),
        [258, 256]
    );
    let led = text.encode_prompt("<|begin|>ab", Special::Parse);
    assert_eq!(led.expect("encodes"), [258, 256]);

    let config = json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|eot_id|>", "special": true},
        "add_bos_token": false});
    let files = [
        ("tokenizer_config.json", config),
        ("generation_config.json", json!({"eos_token_id": [259, 97]})),
        ("config.json", json!({"text_config": {"eos_token_id": 98}})),
    ];
    let text = json_model(&tokenizer, &files).expect("opens").tokenizer;
    assert_eq!((text.bos_id(), text.eos_id()), (Some(258), Some(260)));
    assert_eq!(text.eos_ids(), [97, 98, 259, 260]);
    assert_eq!(
        text.encode_prompt("ab", Special::Parse).expect("encodes"),
        [256]
    );
}

#[test]
fn control_tokens_are_text_unless_they_are_parsed() {
    let mut tokenizer = tiny_json(&CONTROL);
    tokenizer["added_tokens"][1]["special"] = json!(false);
    // A word of the vocabulary that is a control token comes out of no text.
    tokenizer["model"]["vocab"]["ab"] = json!(300);
    tokenizer["model"]["vocab"]["ba"] = json!(256);
    tokenizer["model"]["merges"] = json!(["b a"]);
    tokenizer["added_tokens"][2]["content"] = json!("ab");
    tokenizer["added_tokens"][2]["id"] = json!(300);
    tokenizer["model"]["ignore_merges"] = json!(true);
    tokenizer["model"]["vocab"]
        .as_object_mut()
        .expect("an object")
        .remove("Ġab");
    let text = json_model(&tokenizer, &[]).expect("opens").tokenizer;
    let ids = |special| {
        text.encode("ab<|begin|><|end|>ba", special)
            .expect("encodes")
    };
    assert_eq!(ids(Special::Parse), [300, 258, 259, 256]);
    let plain = ids(Special::Plain);
    assert_eq!(
        plain[..2],
        [u32::from(b'a'), u32::from(b'b')].map(|byte| byte - 33 + rank_of(b'!', &text))
    );
    assert_eq!(
        plain[plain.len() - 2..],
        [259, 256],
        "words are matched always"
    );
    assert!(!plain.contains(&258) && !plain.contains(&300));
    assert_eq!((text.is_control(258), text.is_control(259)), (true, false));
    assert_eq!(text.token_bytes(280), b"", "an id between tokens");
}

fn rank_of(byte: u8, text: &llama_model::text::Tokenizer) -> u32 {
    (0..256)
        .find(|id| text.token_bytes(*id) == [byte])
        .expect("there is a token for each byte")
}

/// How a good file is refused once `value` stands at `pointer`.
fn refusal(pointer: &str, value: Value) -> ModelError {
    let mut tokenizer = tiny_json(&CONTROL);
    let (parent, name) = pointer.rsplit_once('/').expect("a path");
    let parent = tokenizer.pointer_mut(parent).expect("is in the file");
    match parent.as_array_mut() {
        Some(list) => list[0] = value,
        None => parent[name] = value,
    }
    json_model(&tokenizer, &[]).expect_err("is refused")
}

#[test]
fn a_tokenizer_json_that_is_not_byte_level_bpe_is_refused_by_name() {
    for (pointer, value, words) in [
        ("/model/type", json!("WordPiece"), "\"WordPiece\""),
        ("/model/vocab", json!([["a", -1.5]]), "\"Unigram\""),
        ("/model/byte_fallback", json!(true), "byte_fallback"),
        ("/model/dropout", json!(0.1), "dropout"),
        (
            "/model/end_of_word_suffix",
            json!("</w>"),
            "end_of_word_suffix",
        ),
        ("/normalizer", json!({"type": "NFC"}), "normalizer \"NFC\""),
        ("/pre_tokenizer", Value::Null, "ByteLevel"),
        ("/pre_tokenizer", json!({"type": "Metaspace"}), "ByteLevel"),
        (
            "/pre_tokenizer/add_prefix_space",
            json!(true),
            "adds a space",
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": false}]}),
            "\"Whitespace\" is not built in",
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false}]}),
            "removes text",
        ),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x".repeat(5000)}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false}]}),
            "too long a pattern",
        ),
        (
            "/post_processor",
            json!({"type": "BertProcessing"}),
            "\"BertProcessing\"",
        ),
        (
            "/post_processor",
            json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]}),
            "\"<|end|>\" behind the text",
        ),
        (
            "/added_tokens/0/rstrip",
            json!(true),
            "\"<|begin|>\" is matched with rstrip",
        ),
    ] {
        let error = refusal(pointer, value);
        assert_eq!(
            error.category(),
            ModelErrorCategory::ModelUnsupported,
            "{error}"
        );
        let message = error.to_string();
        assert!(message.contains("tokenizer.json: "), "{message}");
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_tokenizer_json_that_contradicts_itself_is_refused_by_name() {
    let deep = "[".repeat(100_000);
    let cases: [(&str, Value, &str); 10] = [
        (
            "/model/vocab/a",
            json!(4_000_000_000_u32),
            "the highest token id is 4000000000",
        ),
        ("/model/vocab/a", json!(256), "token id 256 is given to"),
        ("/model/vocab/a", json!(-1), "invalid value"),
        (
            "/model/vocab",
            json!({"a": 0}),
            "no token for the byte 0x0A",
        ),
        (
            "/model/merges",
            json!([["ab", "Ġab"]]),
            "the merge of \"ab\" and \"Ġab\"",
        ),
        ("/model/merges", json!([["a", "x"]]), "disagree"),
        ("/model/merges", json!([["a"]]), "a merge of two tokens"),
        ("/model/merges", json!(["ab"]), "a merge of two tokens"),
        ("/added_tokens/0/id", json!(0), "token id 0 is given to"),
        (
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false}]}),
            "pre_tokenizer is damaged",
        ),
    ];
    for (pointer, value, words) in cases {
        let error = refusal(pointer, value);
        let message = error.to_string();
        assert!(message.contains(words), "{message}");
    }
    for bytes in [b"".as_slice(), b"{}", b"[]", b"\xff", deep.as_bytes()] {
        let error = open(folder(&[("tokenizer.json", bytes)]).path()).expect_err("is refused");
        assert_eq!(
            error.category(),
            ModelErrorCategory::ModelInvalid,
            "{error}"
        );
        assert!(
            error.to_string().contains("tokenizer.json: not a"),
            "{error}"
        );
    }
}

#[test]
fn a_hostile_pattern_takes_no_time() {
    for pattern in [
        r"(?:(?:(?:\p{L}{999}){999}){999}){999}",
        r"(?=x)(?:(?:(?:\p{L}{999}){999}){999}){999}",
        r"(?:(?:(?:(?=x)\p{L}{999}){999}){999}){999}",
        &"(".repeat(4000),
        &format!("{}x{}", "(?:".repeat(900), "(?=y))".repeat(900)),
    ] {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut tokenizer = tiny_json(&CONTROL);
        tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            split, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true}]});
        if let Ok(text) = json_model(&tokenizer, &[]) {
            let ids = text.tokenizer.encode("ab", Special::Plain);
            assert_eq!(ids.expect("encodes"), [256], "{pattern}");
        }
    }
}

#[test]
fn settings_that_contradict_the_tokenizer_are_refused_by_name() {
    let tokenizer = tiny_json(&CONTROL);
    for (name, value, words) in [
        (
            "generation_config.json",
            json!({"eos_token_id": 5000}),
            "the end token is 5000, but there are 261",
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": ["x"]}),
            "eos_token_id",
        ),
        ("config.json", json!([1]), "\"[1]\" is not an object"),
        (
            "tokenizer_config.json",
            json!({"bos_token": "<|none|>"}),
            "\"<|none|>\"",
        ),
        (
            "tokenizer_config.json",
            json!({"bos_token": 7}),
            "bos_token",
        ),
        (
            "tokenizer_config.json",
            json!({"add_bos_token": "yes"}),
            "add_bos_token",
        ),
        (
            "tokenizer_config.json",
            json!({"chat_template": [{}]}),
            "chat_template",
        ),
        (
            "tokenizer_config.json",
            json!({"chat_template": "{% if %}"}),
            "the chat template does not parse",
        ),
    ] {
        let error = json_model(&tokenizer, &[(name, value)]).expect_err("is refused");
        let message = error.to_string();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_folder_without_a_tokenizer_and_a_huge_file_are_refused_by_name() {
    let empty = folder(&[]);
    let error = open(empty.path()).expect_err("is refused");
    assert_eq!(error.category(), ModelErrorCategory::ModelNotFound);
    assert!(
        error.to_string().contains("neither tokenizer.json nor"),
        "{error}"
    );
    for name in ["tokenizer.json", "tokenizer.model"] {
        let huge = folder(&[]);
        let file = File::create(huge.path().join(name)).expect("creates");
        file.set_len(1 << 40).expect("is sparse");
        let message = open(huge.path()).expect_err("is refused").to_string();
        assert!(message.contains("has 1099511627776 bytes"), "{message}");
    }
    let sentence_piece = folder(&[("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\xc0\xc0")]);
    let message = open(sentence_piece.path())
        .expect_err("is refused")
        .to_string();
    assert!(message.contains("line 3 is not text"), "{message}");
    assert!(message.contains("SentencePiece"), "{message}");
}

/// `file` with `cut` bytes off its end and some bytes replaced.
fn damaged(file: &str, cut: usize, changes: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = file.as_bytes().to_vec();
    for (at, byte) in changes {
        let at = at % bytes.len();
        bytes[at] = *byte;
    }
    bytes.truncate(bytes.len() - cut % bytes.len());
    bytes
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        cut in prop_oneof![Just(0), 0_usize..8000],
        changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        text in ".{0,20}",
    ) {
        let json = tiny_json(&CONTROL).to_string();
        for (name, file) in [("tokenizer.json", json), ("tokenizer.model", tiny_tiktoken())] {
            let bytes = damaged(&file, cut, &changes);
            let folder = folder(&[(name, &bytes), ("config.json", br#"{"model_type": "llama4"}"#)]);
            match open(folder.path()) {
                Ok(opened) => {
                    opened.tokenizer.encode(&text, Special::Parse).expect("encodes");
                }
                Err(error) => prop_assert!(error.to_string().contains(name), "{}", error),
            }
        }
    }

    #[test]
    fn what_was_encoded_comes_back(text in r"(\PC|[ab \n]{1,6}|<\|eot_id\|>){0,20}") {
        let json = tiny_json(&CONTROL).to_string();
        for (name, file) in [("tokenizer.json", json), ("tokenizer.model", tiny_tiktoken())] {
            let folder = folder(&[(name, file.as_bytes()), ("config.json", br#"{"model_type": "llama"}"#)]);
            let tokenizer = open(folder.path()).expect("opens").tokenizer;
            let mut detokenizer = Detokenizer::default();
            let mut back = String::new();
            for id in tokenizer.encode(&text, Special::Plain).expect("encodes") {
                prop_assert!(!tokenizer.is_control(id));
                back += &detokenizer.push(&tokenizer, id);
            }
            back += &detokenizer.finish();
            prop_assert_eq!(&back, &text);
            let parsed = tokenizer.encode(&text, Special::Parse).expect("encodes");
            let control = parsed.iter().filter(|id| tokenizer.is_control(**id)).count();
            prop_assert_eq!(control, text.matches("<|eot_id|>").count());
        }
    }
}
