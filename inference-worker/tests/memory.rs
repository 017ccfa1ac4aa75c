//! What ranks take of memory is what was planned.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::process::Command;

use harness::{MODEL, Worker, model};
use serde_json::{Value, json};

/// Both are measured on the rank that takes most.
const WITHIN: f64 = 0.05;
/// Some more than the longest step, so that each matrix met a whole one.
const PROMPT_WORDS: usize = 900;
const MAX_TOKENS: usize = 1024;

#[test]
fn ranks_take_what_was_planned() {
    let Some((model, _turn)) = model() else {
        return;
    };
    for (tensor, pipeline) in [(1, 1), (3, 1), (1, 3), (3, 2)] {
        let flags = [
            format!("--tensor-parallel={tensor}"),
            format!("--pipeline-parallel={pipeline}"),
            format!("--max-tokens={MAX_TOKENS}"),
            "--threads-per-rank=1".to_owned(),
        ];
        let output = Command::new(env!("CARGO_BIN_EXE_llama-worker"))
            .args(["plan", "--json", "--memory=4Gi", "--model"])
            .arg(&model)
            .args(&flags)
            .output()
            .expect("runs");
        let plan: Value = serde_json::from_slice(&output.stdout).expect("a plan");

        let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        flags.push("--max-sequences=4");
        let worker = Worker::serving(&model, &flags);
        let prompt = " word".repeat(PROMPT_WORDS);
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 4});
        let (status, answer) = worker.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");

        let ranks = worker.state().ranks;
        let planned = plan["plan"]["ranks"].as_array().expect("ranks");
        assert_eq!(planned.len(), ranks.len());
        let (planned, used) = planned
            .iter()
            .zip(&ranks)
            .map(|(plan, rank)| {
                let memory = rank.memory.as_ref().expect("it is ready");
                let fixed = ["weights", "reserve", "adapters"]
                    .map(|part| plan[part].as_u64().expect("bytes"));
                let planned = fixed.iter().sum::<u64>() + memory.kv_cache_bytes;
                (planned as f64, memory.used_bytes as f64)
            })
            .max_by(|one, other| one.1.total_cmp(&other.1))
            .expect("there is one");
        let error = planned / used - 1.0;
        eprintln!("{tensor}x{pipeline}: planned {planned}, used {used}, error {error:.3}");
        assert!(error.abs() <= WITHIN, "{tensor}x{pipeline}: {error:.3}");
    }
}
