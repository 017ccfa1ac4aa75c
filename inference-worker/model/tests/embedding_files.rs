//! Embedding models that are not as they should be, made from a tiny one.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "tests may fail on what they did not expect"
)]

use std::path::Path;

use llama_model::embed::{Embedder, EmbeddingTokenizer};
use llama_model::fixture::TinyBert;
use llama_model::{EmbeddingCheckpoint, ModelErrorCategory};
use serde_json::{Value, json};

fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    TinyBert::write(folder.path()).expect("writes");
    folder
}

/// Sets a field of a JSON file; null removes it.
fn set(folder: &Path, file: &str, pointer: &str, value: &Value) {
    let path = folder.join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let mut json: Value = serde_json::from_str(&text).expect("JSON");
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
    let parent = json.pointer_mut(parent).expect("the parent is there");
    match parent {
        Value::Array(list) => list[name.parse::<usize>().expect("a number")] = value.clone(),
        parent => parent[name] = value.clone(),
    }
    std::fs::write(path, json.to_string()).expect("writes");
}

#[test]
fn a_tiny_model_makes_vectors_of_length_one() {
    let folder = tiny();
    let opened = EmbeddingCheckpoint::open(folder.path()).expect("opens");
    let checkpoint = opened.expect("is an embedding model");
    let tokenizer = EmbeddingTokenizer::open(folder.path(), 12).expect("opens");
    let ids = tokenizer
        .encode("Hello, World! bc x", true, None)
        .expect("encodes");
    assert_eq!(ids, [2, 8, 11, 9, 10, 6, 7, 1, 3]);
    assert_eq!(tokenizer.token_text(7), "##c");
    let embedder = Embedder::load(&checkpoint, 2).expect("loads");
    let vector = embedder.embed(&[ids]).expect("computes").remove(0);
    let length: f32 = vector.iter().map(|value| value * value).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    // Of one of its files as well, but not of whatever lies beside them.
    let gguf = folder.path().join("other.gguf");
    std::fs::write(&gguf, "GGUF").expect("writes");
    assert!(EmbeddingCheckpoint::open(&gguf).expect("looks").is_none());
    let file = folder.path().join("model.safetensors");
    assert!(EmbeddingCheckpoint::open(&file).expect("opens").is_some());
}

#[test]
fn pooling_and_length_are_as_the_files_say() {
    let folder = tiny();
    let embed = |tokens: &[u32]| {
        let checkpoint = EmbeddingCheckpoint::open(folder.path()).expect("opens");
        let embedder = Embedder::load(&checkpoint.expect("is one"), 1).expect("loads");
        embedder.embed(&[tokens]).expect("computes").remove(0)
    };
    let mean = embed(&[2, 5, 3]);
    set(
        folder.path(),
        "1_Pooling/config.json",
        "/pooling_mode_mean_tokens",
        &json!(false),
    );
    set(
        folder.path(),
        "1_Pooling/config.json",
        "/pooling_mode_cls_token",
        &json!(true),
    );
    let first = embed(&[2, 5, 3]);
    assert_ne!(first, mean);
    let modules = std::fs::read_to_string(folder.path().join("modules.json")).expect("reads");
    let mut modules: Vec<Value> = serde_json::from_str(&modules).expect("JSON");
    modules.pop();
    let modules = Value::from(modules).to_string();
    std::fs::write(folder.path().join("modules.json"), modules).expect("writes");
    let plain = embed(&[2, 5, 3]);
    let length = plain.iter().map(|value| value * value).sum::<f32>().sqrt();
    assert!((length - 1.0).abs() > 0.1, "{length}");
    for (plain, first) in plain.iter().zip(&first) {
        assert!((plain / length - first).abs() < 1e-6);
    }
}

#[test]
fn other_models_are_not_taken_for_one() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(
        EmbeddingCheckpoint::open(folder.path())
            .expect("looks")
            .is_none()
    );
    for config in ["{", "[]", "{\"model_type\": \"llama\"}"] {
        std::fs::write(folder.path().join("config.json"), config).expect("writes");
        let found = EmbeddingCheckpoint::open(folder.path()).expect("looks");
        assert!(found.is_none(), "{config}");
    }
}

/// A model that is refused once a field of one of its files has another value, and a
/// word of the message.
type Case = (&'static str, Value, &'static str);

/// Opens the tiny model, or its tokenizer, with each change.
fn check_refused(category: ModelErrorCategory, cases: &[Case]) {
    for (field, value, word) in cases {
        let (file, pointer) = field.split_once(' ').expect("a file and a field");
        let folder = tiny();
        set(folder.path(), file, pointer, value);
        let error = if file == "tokenizer.json" {
            EmbeddingTokenizer::open(folder.path(), 12).map(drop)
        } else {
            EmbeddingCheckpoint::open(folder.path()).map(drop)
        };
        let error = error.expect_err(field);
        assert_eq!(error.category(), category, "{error}");
        assert!(error.to_string().contains(word), "{word} not in: {error}");
    }
}

#[test]
fn what_would_change_the_vectors_is_refused_by_name() {
    let masked = json!(["BertForMaskedLM"]);
    let relative = json!("relative_key");
    let max = "pooling_mode_max_tokens";
    let first = "pooling_mode_cls_token";
    check_refused(
        ModelErrorCategory::ModelUnsupported,
        &[
            ("config.json /architectures", masked, "BertForMaskedLM"),
            ("config.json /hidden_act", json!("relu"), "hidden_act"),
            (
                "config.json /position_embedding_type",
                relative,
                "\"absolute\"",
            ),
            (
                "config.json /num_attention_heads",
                json!(4),
                "multiples of 32",
            ),
            ("config.json /num_attention_heads", json!(3), "3 heads"),
            ("config.json /max_position_embeddings", json!(9000), "9000"),
            (
                "config.json /num_hidden_layers",
                json!(1),
                "belong to no part",
            ),
            ("config.json /is_decoder", json!(true), "is_decoder"),
            ("modules.json /2/type", json!("x.Dense"), "Dense"),
            ("modules.json /1/path", json!("none"), "Pooling"),
            (
                "1_Pooling/config.json /pooling_mode_max_tokens",
                json!(true),
                max,
            ),
            (
                "1_Pooling/config.json /pooling_mode_cls_token",
                json!(true),
                first,
            ),
            (
                "sentence_bert_config.json /do_lower_case",
                json!(true),
                "do_lower_case",
            ),
            (
                "config_sentence_transformers.json /default_prompt_name",
                json!("query"),
                "default_prompt_name",
            ),
        ],
    );
}

#[test]
fn impossible_and_missing_files_are_refused_by_name() {
    check_refused(
        ModelErrorCategory::ModelInvalid,
        &[
            ("config.json /hidden_size", json!(128), "hidden_size is 128"),
            (
                "config.json /num_hidden_layers",
                json!(3),
                "encoder.layer.2",
            ),
            ("config.json /layer_norm_eps", json!(0), "layer_norm_eps"),
            ("config.json /vocab_size", json!(13), "word_embeddings"),
            (
                "modules.json /1/path",
                json!("../1_Pooling"),
                "../1_Pooling",
            ),
            (
                "1_Pooling/config.json /word_embedding_dimension",
                json!(32),
                "32",
            ),
            ("sentence_bert_config.json /max_seq_length", json!(17), "17"),
        ],
    );
    for (file, category) in [
        ("model.safetensors", ModelErrorCategory::ModelNotFound),
        ("modules.json", ModelErrorCategory::ModelUnsupported),
    ] {
        let folder = tiny();
        std::fs::remove_file(folder.path().join(file)).expect("removes");
        let error = EmbeddingCheckpoint::open(folder.path()).expect_err(file);
        assert_eq!(error.category(), category, "{error}");
    }
}

#[test]
fn other_tokenizers_are_refused_by_name() {
    let bare = json!([{"Sequence": {"id": "A", "type_id": 0}}]);
    check_refused(
        ModelErrorCategory::ModelUnsupported,
        &[
            ("tokenizer.json /model/type", json!("BPE"), "BPE"),
            ("tokenizer.json /normalizer/type", json!("NFC"), "NFC"),
            (
                "tokenizer.json /pre_tokenizer",
                Value::Null,
                "pre_tokenizer",
            ),
            (
                "tokenizer.json /post_processor/type",
                json!("ByteLevel"),
                "ByteLevel",
            ),
            (
                "tokenizer.json /post_processor/single",
                bare,
                "0 tokens around",
            ),
        ],
    );
    check_refused(
        ModelErrorCategory::ModelInvalid,
        &[
            ("tokenizer.json /model/vocab/x", json!(12), "token 12"),
            ("tokenizer.json /model/vocab", json!([]), "tokenizer.json"),
        ],
    );
    let folder = tiny();
    std::fs::remove_file(folder.path().join("tokenizer.json")).expect("removes");
    let error = EmbeddingTokenizer::open(folder.path(), 12).expect_err("is gone");
    assert_eq!(
        error.category(),
        ModelErrorCategory::ModelNotFound,
        "{error}"
    );
}
