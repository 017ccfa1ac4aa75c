//! The tokenizers of Llama 3 and Llama 4 against Meta's reference, and against the
//! test vectors of llama.cpp.

#![allow(clippy::expect_used, reason = "tests may fail")]

#[path = "../common/tokenizers.rs"]
mod tokenizers;

mod strings;

use llama_model::text::{Detokenizer, ModelText, Special, Tokenizer};
use proptest::prelude::*;

use strings::{FNV, LLAMA3_CONTROL, LLAMA4_CONTROL, Source, fnv};
use tokenizers::test_file;

const STRINGS: u64 = 10_000;
const LLAMA3_HASHES: &str = include_str!("llama3.hashes");
const LLAMA4_HASHES: &str = include_str!("llama4.hashes");

fn open(name: &str) -> Option<Tokenizer> {
    let path = test_file(name)?;
    Some(ModelText::open(&path).expect("opens").tokenizer)
}

/// All strings have the tokens of the reference.
fn check_strings(
    tokenizer: &Tokenizer,
    control: &'static [&'static str],
    first_control: u32,
    hashes: &str,
) {
    let (strings, ids) = hashes.split_once('\n').expect("two parts");
    let ids: String = ids.split_whitespace().collect();
    let source = Source {
        vocabulary: (0..first_control)
            .map(|id| tokenizer.token_bytes(id))
            .collect(),
        control,
    };
    let mut all = FNV;
    let mut different = None;
    for number in 0..STRINGS {
        let text = source.string(number);
        all = fnv(text.bytes().chain([0xFF]), all);
        let encode = |special| tokenizer.encode(&text, special).expect("encodes");
        let mut both = encode(Special::Plain);
        both.push(u32::MAX);
        both.extend(encode(Special::Parse));
        let hash = fnv(both.iter().flat_map(|id| id.to_le_bytes()), FNV);
        let at = usize::try_from(number).expect("small") * 10;
        if format!("{:010x}", hash & 0xFF_FFFF_FFFF) != ids[at..at + 10] && different.is_none() {
            different = Some((number, text));
        }
    }
    assert_eq!(
        format!("{all:016x}"),
        strings,
        "both sides made the same strings"
    );
    assert_eq!(different, None);
}

#[test]
fn llama_3_is_metas_reference() {
    let Some(tokenizer) = open("llama3/tokenizer.model") else {
        return;
    };
    assert_eq!(tokenizer.vocab_size(), 128_256);
    assert_eq!(tokenizer.eos_ids(), [128_001, 128_008, 128_009]);
    assert_eq!(tokenizer.bos_id(), Some(128_000));
    check_strings(&tokenizer, &LLAMA3_CONTROL, 128_000, LLAMA3_HASHES);
}

#[test]
fn llama_4_is_metas_reference() {
    let Some(tokenizer) = open("llama4/tokenizer.model") else {
        return;
    };
    assert_eq!(tokenizer.vocab_size(), 202_048);
    assert_eq!(tokenizer.eos_ids(), [200_001, 200_007, 200_008]);
    assert_eq!(tokenizer.bos_id(), Some(200_000));
    check_strings(&tokenizer, &LLAMA4_CONTROL, 200_000, LLAMA4_HASHES);
}

#[test]
fn tokenizer_json_of_llama_3_is_metas_reference() {
    let Some(tokenizer) = open("llama3-json/tokenizer.json") else {
        return;
    };
    assert_eq!(tokenizer.vocab_size(), 128_256);
    assert_eq!(tokenizer.eos_ids(), [128_001, 128_009]);
    assert_eq!(tokenizer.bos_id(), Some(128_000));
    check_strings(&tokenizer, &LLAMA3_CONTROL, 128_000, LLAMA3_HASHES);
    let prompt = tokenizer.encode_prompt("Hello", Special::Parse);
    assert_eq!(prompt.expect("encodes"), [128_000, 9906]);
}

#[test]
fn gguf_of_llama_3_is_metas_reference() {
    let Some(tokenizer) = open("llama-bpe/ggml-vocab-llama-bpe.gguf") else {
        return;
    };
    assert_eq!(tokenizer.vocab_size(), 128_256);
    check_strings(&tokenizer, &LLAMA3_CONTROL, 128_000, LLAMA3_HASHES);
}

#[test]
fn llama_cpps_vectors_hold() {
    let Some(path) = test_file("llama-bpe/ggml-vocab-llama-bpe.gguf") else {
        return;
    };
    let read = |extension| {
        let path = path.with_extension(extension);
        std::fs::read_to_string(path).expect("is beside the GGUF")
    };
    let (texts, expected) = (read("gguf.inp"), read("gguf.out"));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let expected: Vec<Vec<u32>> = expected
        .lines()
        .map(|line| line.split(' ').filter_map(|id| id.parse().ok()).collect())
        .collect();
    assert!(texts.len() > 40 && expected.len() >= texts.len() - 1);
    for name in [
        "llama-bpe/ggml-vocab-llama-bpe.gguf",
        "llama3/tokenizer.model",
        "llama3-json/tokenizer.json",
    ] {
        let Some(tokenizer) = open(name) else { return };
        for (text, ids) in texts.iter().zip(&expected) {
            let encoded = tokenizer.encode(text, Special::Plain).expect("encodes");
            assert_eq!(&encoded, ids, "{name}: {text:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1, ..ProptestConfig::default() })]
    #[test]
    fn what_was_encoded_comes_back(texts in proptest::collection::vec(
        r"(\PC|[ \n\t]|<\|eot_id\|>|<\|eot\|>|[a-z]{1,9}){0,24}|.{0,40}", 400)) {
        for name in [
            "llama3/tokenizer.model",
            "llama4/tokenizer.model",
            "llama3-json/tokenizer.json",
            "llama-bpe/ggml-vocab-llama-bpe.gguf",
        ] {
            let Some(tokenizer) = open(name) else { return Ok(()) };
            for text in &texts {
                let ids = tokenizer.encode(text, Special::Plain).expect("encodes");
                let mut detokenizer = Detokenizer::default();
                let mut back = String::new();
                for id in &ids {
                    prop_assert!(!tokenizer.is_control(*id));
                    back += &detokenizer.push(&tokenizer, *id);
                }
                back += &detokenizer.finish();
                prop_assert_eq!(&back, text);
                let ids = tokenizer.encode(text, Special::Parse).expect("encodes");
                let bytes: Vec<u8> = ids
                    .iter()
                    .flat_map(|id| tokenizer.token_bytes(*id).to_vec())
                    .collect();
                prop_assert_eq!(bytes, text.as_bytes());
            }
        }
    }
}
