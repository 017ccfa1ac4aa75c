//! The golden answer that ranks give before they serve.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::time::Duration;

use harness::{MODEL_ENV, Net, Worker, chat, model};
use llama_contract::{FailureCategory, FailureReport};
use rustix::process::Signal;
use serde_json::json;

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

/// Often enough for a test.
const EACH_SECOND: &str = "--self-test-interval=1";

fn repeats(worker: &Worker) -> u32 {
    worker.state().self_test.expect("it was tested").repeats
}

#[test]
fn a_group_at_rest_gives_its_golden_answer_again() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut never = Worker::serving(&model, &["--tensor-parallel=3", "--self-test-interval=0"]);
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3", EACH_SECOND]);
    let golden = answer(&worker);
    for _ in 0..100 {
        if repeats(&worker) >= 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(repeats(&worker) >= 2, "{}", worker.log());
    assert_eq!(answer(&worker), golden);
    // All of it was computed: nothing was looked for in the cache, and nothing is held.
    assert_eq!(count(&worker, "vllm:prefix_cache_queries_total"), 0);
    assert_eq!(repeats(&never), 0);
    for worker in [&mut worker, &mut never] {
        worker.signal(Signal::TERM);
        assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
    }
}

fn count(worker: &Worker, metric: &str) -> u64 {
    // Metrics are whole numbers here.
    format!("{:.0}", worker.metric(metric)).parse().unwrap()
}

#[test]
fn a_request_at_the_moment_of_a_test_is_answered_the_same() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut body = chat("Name three colours.", 8);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    let ask = |worker: &Worker| {
        let (status, answer) = worker.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0].clone()
    };
    let expected = ask(&Worker::serving(&model, &["--self-test-interval=0"]));
    let worker = Worker::serving(&model, &["--tensor-parallel=3", EACH_SECOND]);
    let mut met = 0;
    for _ in 0..5 {
        let before = repeats(&worker);
        let is_asked = (0..2000).any(|_| {
            std::thread::sleep(Duration::from_millis(2));
            worker.state().running > 0
        });
        assert!(is_asked, "{}", worker.log());
        met += u32::from(repeats(&worker) == before);
        assert_eq!(ask(&worker), expected);
    }
    assert!(met > 0, "no request met a test");
    assert!(repeats(&worker) >= 4, "{}", worker.log());
}

/// Ends a group by a fault of the kind while it rests.
fn fault_at_rest(operation: u32, kind: &str) -> FailureReport {
    let (model, _turn) = model().expect("there is one");
    let folder = tempfile::tempdir().unwrap();
    let armed = folder.path().join("armed");
    let fault = format!("1:{operation}:{kind}:0:{}", armed.display());
    let environment = [("LLAMA_TEST_FAULT", fault.as_str())];
    let flags = ["--tensor-parallel=3", EACH_SECOND];
    let mut worker = Worker::start_at(&Net::loopback(1), &model, &flags, &environment);
    worker.wait_until_ready();
    std::fs::write(&armed, "").unwrap();
    let (code, report) = worker.failure();
    assert_eq!(code, 70, "{report:?}");
    assert_eq!(report.category, FailureCategory::SelfTestMismatch);
    report
}

#[test]
fn a_bit_that_changes_while_a_group_rests_is_found() {
    if std::env::var_os(MODEL_ENV).is_none() {
        return;
    }
    // All ranks agree on what is wrong: the attention of the first layer.
    let report = fault_at_rest(3, "FLIP");
    assert!(report.message.contains("has changed"), "{report:?}");
    // One rank gets other logits than the others, behind 30 layers of two sums each.
    let report = fault_at_rest(63, "GARBLE");
    assert_eq!(report.rank, Some(1), "{report:?}");
}
