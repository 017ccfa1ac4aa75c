//! The golden answer that ranks give before they serve.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use harness::{Worker, model};
use llama_contract::FailureCategory;

fn answer(worker: &Worker) -> String {
    let report = worker.state().self_test.expect("it was tested");
    assert_eq!(report.tokens, 8);
    report.answer
}

#[test]
fn the_golden_answer_is_that_of_the_weights() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let golden = answer(&Worker::serving(&model, &[]));
    let expects = format!("--self-test-answer={golden}");
    for flags in [
        &["--tensor-parallel=3", "--pipeline-parallel=2"][..],
        &["--speculative-tokens=4", "--max-tokens=64"],
    ] {
        let flags = [flags, &[expects.as_str()]].concat();
        assert_eq!(answer(&Worker::serving(&model, &flags)), golden);
    }

    // One bit of one weight.
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("model.gguf");
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&damaged, bytes).unwrap();
    let mut worker = Worker::start(&damaged, &["--tensor-parallel=3", &expects]);
    let (code, report) = worker.failure();
    assert_eq!(code, 70);
    assert_eq!(report.category, FailureCategory::SelfTestMismatch);
    let expected = format!("expected {golden}");
    assert!(report.message.contains(&expected), "{report:?}");
}
