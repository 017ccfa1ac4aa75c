//! Input that can never work: the pod ends at once, by name, with exit code 64.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::Path;

use harness::{Worker, model};
use llama_contract::FailureCategory;

fn refused(model: &Path, flags: &[&str], category: FailureCategory, words: &[&str]) {
    let mut worker = Worker::start(model, flags);
    let (code, report) = worker.failure();
    assert_eq!(report.category, category, "{report:?}");
    assert_eq!(code, 64, "{report:?}");
    for word in words {
        assert!(report.message.contains(word), "no {word} in {report:?}");
    }
    let log = worker.log();
    assert!(log.contains(category.as_str()), "{log}");
}

#[test]
fn a_missing_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("other.gguf"), "x").unwrap();
    let path = folder.path().join("model.gguf");
    let words = ["model.gguf", "other.gguf"];
    refused(&path, &[], FailureCategory::ModelNotFound, &words);
}

#[test]
fn a_file_of_another_kind_is_invalid() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, "no model at all, but long enough for a header").unwrap();
    refused(&path, &[], FailureCategory::ModelInvalid, &["model.gguf"]);
}

#[test]
fn a_model_cut_short_is_truncated() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let bytes = std::fs::read(model).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refused(&path, &[], FailureCategory::ModelTruncated, &["model.gguf"]);
}

#[test]
fn wrong_layouts_name_what_would_do() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let layout = FailureCategory::InvalidLayout;
    refused(
        &model,
        &["--tensor-parallel=2"],
        layout,
        &["2", "1, 3 or 9"],
    );
    let flags = ["--tensor-parallel=3", "--nodes=2", "--rendezvous=a:1"];
    refused(&model, &flags, layout, &["3 ranks", "2 nodes"]);
    let flags = [&flags[..], &["--pipeline-parallel=3"]].concat();
    refused(&model, &flags, layout, &["9 ranks", "2 nodes"]);
}

#[test]
fn too_little_memory_names_the_numbers() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let flags = ["--tensor-parallel=3", "--memory-limit-bytes=100000000"];
    refused(
        &model,
        &flags,
        FailureCategory::InsufficientMemory,
        &["MiB"],
    );
}

#[test]
fn flags_that_cannot_be_met_are_named() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let category = FailureCategory::InvalidConfiguration;
    refused(&model, &["--device=cuda"], category, &["CUDA"]);
    refused(
        &model,
        &["--max-tokens=99999"],
        category,
        &["99999", "8192"],
    );
}
