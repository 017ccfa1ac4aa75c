//! A worker whose model makes vectors: what clients see of the real all-MiniLM-L6-v2.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{MODEL, Worker, chat, model};
use llama_contract::{FailureCategory, RankPhase, WorkerPhase};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Environment variable with the folder of all-MiniLM-L6-v2.
const EMBEDDING_MODEL_ENV: &str = "LLAMA_TEST_EMBEDDING_MODEL";

fn embedding_model() -> Option<PathBuf> {
    let model = std::env::var_os(EMBEDDING_MODEL_ENV).map(PathBuf::from);
    if model.is_none() {
        eprintln!("{EMBEDDING_MODEL_ENV} names no model: nothing was tested");
    }
    model
}

fn golden() -> Value {
    let text = include_str!("../model/tests/golden/all-minilm-l6-v2.json");
    serde_json::from_str(text).unwrap()
}

fn ask(worker: &Worker, input: &Value) -> Value {
    let (status, body) = worker.post("/v1/embeddings", &json!({"model": MODEL, "input": input}));
    assert_eq!(status, 200, "{body}");
    body
}

fn refused(worker: &Worker, path: &str, body: &Value) -> (u16, Value) {
    let (status, body) = worker.post(path, body);
    (status, body["error"].clone())
}

#[test]
fn texts_and_tokens_alone_and_together_have_the_same_vectors() {
    let Some(model) = embedding_model() else {
        return;
    };
    let worker = Worker::serving(&model, &[]);
    let cases = golden()["cases"].as_array().unwrap().clone();
    let texts: Vec<&Value> = cases.iter().map(|case| &case["text"]).collect();
    let ids: Vec<&Value> = cases.iter().map(|case| &case["ids"]).collect();
    let together = ask(&worker, &json!(texts));
    assert_eq!(together["usage"]["prompt_tokens"], 40);
    assert_eq!(ask(&worker, &json!(ids))["data"], together["data"]);
    for (index, case) in cases.iter().enumerate() {
        let alone = ask(&worker, &case["text"]);
        let vector = &alone["data"][0]["embedding"];
        assert_eq!(*vector, together["data"][index]["embedding"]);
        assert_eq!(together["data"][index]["index"], index);
        let expected = case["embedding"].as_array().unwrap();
        for (value, expected) in vector.as_array().unwrap().iter().zip(expected) {
            let off = (value.as_f64().unwrap() - expected.as_f64().unwrap()).abs();
            assert!(off < 5e-6, "off by {off}");
        }
    }
    let (_, tokens) = worker.post("/tokenize", &json!({"prompt": texts[0]}));
    assert_eq!(tokens["tokens"], *ids[0]);
    assert_eq!(tokens["max_model_len"], 256);
    let models = worker.get("/v1/models").unwrap().1;
    assert!(models.contains("\"max_model_len\":256"), "{models}");
    assert!((worker.metric("vllm:prompt_tokens_total") - 120.0).abs() < 0.5);
}

#[test]
fn long_texts_are_refused_or_cut() {
    let Some(model) = embedding_model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--max-tokens=16"]);
    let long = "word ".repeat(20);
    let body =
        |cut: Value| json!({"model": MODEL, "input": ["a", long], "truncate_prompt_tokens": cut});
    let (status, error) = refused(&worker, "/v1/embeddings", &body(Value::Null));
    assert_eq!(
        (status, &error["code"]),
        (400, &json!("context_length_exceeded"))
    );
    assert_eq!(error["param"], "input");
    let (status, answer) = worker.post("/v1/embeddings", &body(json!(-1)));
    assert_eq!(
        (status, &answer["usage"]["prompt_tokens"]),
        (200, &json!(3 + 16))
    );
    let short = ask(&worker, &json!("word ".repeat(14)));
    assert_eq!(
        answer["data"][1]["embedding"],
        short["data"][0]["embedding"]
    );
    let tokens = json!({"model": MODEL, "input": [[101, 30_522]]});
    let (status, error) = refused(&worker, "/v1/embeddings", &tokens);
    assert_eq!((status, &error["param"]), (400, &json!("input")));
}

#[test]
fn each_kind_of_model_says_which_it_is() {
    let Some(embedding) = embedding_model() else {
        return;
    };
    let worker = Worker::serving(&embedding, &[]);
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let (status, error) = refused(&worker, path, &chat("hi", 1));
        assert_eq!((status, &error["param"]), (400, &json!("model")));
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("is an embedding model")
        );
    }
    let body = json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}]});
    assert_eq!(refused(&worker, "/tokenize", &body).0, 400);
    let other = json!({"model": "other", "input": "a"});
    assert_eq!(refused(&worker, "/v1/embeddings", &other).0, 404);
    let Some((llama, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&llama, &[]);
    let body = json!({"model": MODEL, "input": "a"});
    let (status, error) = refused(&worker, "/v1/embeddings", &body);
    assert_eq!((status, &error["param"]), (400, &json!("model")));
    assert!(error["message"].as_str().unwrap().contains("writes text"));
}

#[test]
fn what_does_not_apply_ends_the_pod_with_its_name() {
    let Some(model) = embedding_model() else {
        return;
    };
    let check = |model: &Path, flag: &str, category, word: &str| {
        let (code, report) = Worker::start(model, &[flag]).failure();
        assert_eq!(
            (code, report.category),
            (64, category),
            "{}",
            report.message
        );
        assert!(report.message.contains(word), "{}", report.message);
    };
    let layout = FailureCategory::InvalidLayout;
    check(&model, "--tensor-parallel=2", layout, "--tensor-parallel=2");
    check(
        &model,
        "--pipeline-parallel=2",
        layout,
        "--pipeline-parallel",
    );
    check(&model, "--max-tokens=257", layout, "256");
    let configuration = FailureCategory::InvalidConfiguration;
    check(
        &model,
        "--speculative-tokens=2",
        configuration,
        "--speculative-tokens",
    );
    let memory = FailureCategory::InsufficientMemory;
    check(
        &model,
        "--memory-limit-bytes=100000000",
        memory,
        "weights 87 MiB",
    );
}

#[test]
fn plans_tell_what_it_takes() {
    let Some(model) = embedding_model() else {
        return;
    };
    let plan = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_llama-worker"))
            .args(["plan", "--json"])
            .arg(format!("--model={}", model.display()))
            .args(flags)
            .output()
            .unwrap();
        (
            output.status.code(),
            serde_json::from_slice::<Value>(&output.stdout).ok(),
        )
    };
    let (code, planned) = plan(&[]);
    let planned = planned.unwrap();
    assert_eq!((code, &planned["fits"]), (Some(0), &json!(true)));
    assert_eq!(planned["weights"], 4 * 22_565_376);
    assert_eq!(plan(&["--memory=64Mi"]).0, Some(64));
    assert_eq!(plan(&["--tensor-parallel=2"]).0, Some(64));
}

#[test]
fn a_pod_tells_its_state_and_ends_in_order() {
    let Some(model) = embedding_model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &[]);
    let state = worker.state();
    assert_eq!(state.phase, WorkerPhase::Ready);
    assert_eq!(state.load.bytes_done, state.load.bytes_total);
    assert_eq!(
        (state.ranks.len(), state.ranks[0].phase),
        (1, RankPhase::Ready)
    );
    worker.signal(Signal::TERM);
    assert!(worker.wait().success());
}

#[test]
fn what_the_grace_cannot_finish_ends_with_an_error() {
    let Some(model) = embedding_model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--drain-seconds=600"]);
    assert_eq!(worker.order("/drain?seconds=0"), 204);
    // Far more than can be computed before the signal.
    let text = "the quick brown fox jumps over the lazy dog ".repeat(20);
    let body = json!({"model": MODEL, "input": vec![text; 2000]});
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| worker.post("/v1/embeddings", &body));
        while worker.state().running == 0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        worker.signal(Signal::TERM);
        let (status, answer) = answer.join().unwrap();
        assert_eq!(status, 503, "{answer}");
        assert_eq!(answer["error"]["code"], "shutting_down");
    });
    assert!(worker.wait().success());
}
