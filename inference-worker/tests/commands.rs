//! The commands for checkpoints: `plan`, `logits` and `shard`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use harness::{Net, namespaces};
use llama_contract::{FailureCategory, FailureReport, InspectionReport};
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_llama-worker");

/// A small random model with eight heads, of which four share a KV head.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("model/tests/reference")
        .join(name)
}

fn run(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The folder of a test, with a list of tokens in it.
struct Work(TempDir);

impl Work {
    fn new(vocab: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let tokens: Vec<u32> = (0..70).map(|i| i * 29 % vocab).collect();
        let text = serde_json::to_string(&tokens).unwrap();
        std::fs::write(folder.path().join("tokens.json"), text).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Flags that compute the logits into the file `name`.
    fn flags(&self, model: &Path, name: &str, (tensor, pipeline): (usize, usize)) -> Vec<String> {
        vec![
            "logits".to_owned(),
            format!("--model={}", model.display()),
            format!("--tokens={}", self.path("tokens.json")),
            format!("--out={}", self.path(name)),
            format!("--tensor-parallel={tensor}"),
            format!("--pipeline-parallel={pipeline}"),
            "--step-tokens=33".to_owned(),
        ]
    }

    /// The logits of ranks in one pod.
    fn logits(&self, model: &Path, layout: (usize, usize)) -> Vec<u8> {
        let flags = self.flags(model, "one.safetensors", layout);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let output = run(&flags);
        assert!(output.status.success(), "{layout:?}: {}", said(&output));
        std::fs::read(self.0.path().join("one.safetensors")).unwrap()
    }

    /// The logits of ranks spread over one pod in each of `nets`.
    fn logits_over(&self, model: &Path, layout: (usize, usize), nets: &[Net]) -> Vec<u8> {
        let rendezvous = nets[0].free_address();
        let pods: Vec<_> = nets
            .iter()
            .enumerate()
            .map(|(index, net)| {
                net.command(PROGRAM)
                    .args(self.flags(model, "pods.safetensors", layout))
                    .arg(format!("--nodes={}", nets.len()))
                    .arg(format!("--node-index={index}"))
                    .arg(format!("--rendezvous={rendezvous}"))
                    .arg(format!("--pod-ip={}", net.ip()))
                    .env(llama_contract::RENDEZVOUS_TOKEN_ENV, "secret")
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for pod in pods {
            let output = pod.wait_with_output().unwrap();
            assert!(output.status.success(), "{layout:?}: {}", said(&output));
        }
        let path = self.0.path().join("pods.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        bytes
    }
}

#[test]
fn every_layout_gives_the_same_logits_through_shared_memory() {
    for (name, vocab) in [("llama-sharded", 80), ("llama4-eight-heads", 96)] {
        let (work, model) = (Work::new(vocab), fixture(name));
        let one = work.logits(&model, (1, 1));
        for layout in [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (8, 2)] {
            assert!(one == work.logits(&model, layout), "{name}: {layout:?}");
        }
    }
}

#[test]
fn pods_of_one_rank_give_the_same_logits_over_tcp() {
    let (work, model) = (Work::new(80), fixture("llama-sharded"));
    let one = work.logits(&model, (1, 1));
    for layout in [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2)] {
        let pods = u8::try_from(layout.0 * layout.1).unwrap();
        let nets: Vec<Net> = (0..pods).map(|pod| Net::loopback(2 + pod)).collect();
        assert!(one == work.logits_over(&model, layout, &nets), "{layout:?}");
    }
}

#[test]
fn pods_of_several_ranks_in_two_network_namespaces_give_the_same_logits() {
    let Some(pair) = namespaces::pair() else {
        return;
    };
    let (work, model) = (Work::new(80), fixture("llama-sharded"));
    let one = work.logits(&model, (1, 1));
    for layout in [(4, 1), (8, 1), (2, 2), (4, 2), (8, 2)] {
        let nets = [Net::inside(&pair[0], 0), Net::inside(&pair[1], 0)];
        assert!(one == work.logits_over(&model, layout, &nets), "{layout:?}");
    }
}

#[test]
fn the_real_model_gives_the_same_logits_on_one_and_three_ranks() {
    let Some((model, _alone)) = harness::model() else {
        return;
    };
    let work = Work::new(40_000);
    let one = work.logits(&model, (1, 1));
    assert!(one == work.logits(&model, (3, 1)), "tensor parallel 3");
    assert!(one == work.logits(&model, (3, 2)), "and two stages");
}

#[test]
fn a_model_cut_for_its_ranks_gives_the_same_logits() {
    let (work, model) = (Work::new(80), fixture("llama-sharded"));
    let (cut, out) = (work.path("cut"), format!("--out={}", work.path("cut")));
    let from = format!("--model={}", model.display());
    let flags = ["--tensor-parallel=4", "--pipeline-parallel=2"];
    let output = run(&["shard", &from, &out, flags[0], flags[1]]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(work.logits(Path::new(&cut), (4, 2)) == work.logits(&model, (1, 1)));

    let again = run(&["shard", &from, &out, flags[0], flags[1]]);
    assert!(
        said(&again).ends_with("is not empty; name a new one\n"),
        "{}",
        said(&again)
    );
    assert_ne!(again.status.code(), Some(0));
}

#[test]
fn random_weights_need_no_more_than_a_config() {
    let (work, folder) = (Work::new(80), TempDir::new().unwrap());
    let config = fixture("llama-sharded").join("config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    let mut flags = work.flags(folder.path(), "dummy.safetensors", (2, 2));
    flags.push("--load-format=dummy".to_owned());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let output = run(&flags);
    assert!(output.status.success(), "{}", said(&output));
    let without = run(&flags[..flags.len() - 1]);
    assert!(said(&without).contains("neither model.safetensors.index.json nor model.safetensors"));
    assert_eq!(without.status.code(), Some(64));
}

#[test]
fn a_plan_says_what_fits_and_what_would() {
    let model = format!("--model={}", fixture("llama-sharded").display());
    let output = run(&["plan", &model, "--tensor-parallel=4", "--json"]);
    assert!(output.status.success(), "{}", said(&output));
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["plan"]["ranks"].as_array().unwrap().len(), 4);
    assert_eq!(plan["plan"]["kv_replicas"], 2);
    assert_eq!(plan["plan"]["is_canonical"], true);
    assert_eq!(plan["fits"], true);

    let flags = [
        "--device-memory=700Ki",
        "--device-runtime=1Ki",
        "--device-utilization=1",
    ];
    let output = run(&["plan", &model, flags[0], flags[1], flags[2]]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(64), "{table}");
    assert!(
        table.contains("does not fit: not one sequence of"),
        "{table}"
    );
    assert!(table.contains("would fit: --tensor-parallel="), "{table}");
    // What is said to fit does.
    let words = table
        .lines()
        .find(|line| line.contains("--tensor-parallel="))
        .unwrap();
    let advice: Vec<&str> = words
        .split(' ')
        .filter(|word| word.starts_with("--"))
        .collect();
    let output = run(&[
        "plan", &model, flags[0], flags[1], flags[2], advice[0], advice[1],
    ]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );

    let output = run(&["plan", &model, "--tensor-parallel=3"]);
    assert_eq!(output.status.code(), Some(64));
    assert_eq!(
        said(&output),
        "llama-worker: InvalidLayout: tensor parallel 3 does not divide 8 attention heads (2 KV heads); 1, 2, 4 or 8 would\n"
    );
    let output = run(&["plan", &model, "--memory=lots"]);
    assert!(said(&output).contains("expected an amount of memory such as 16Gi"));
}

#[test]
fn wrong_tokens_are_named() {
    let work = Work::new(80);
    let model = fixture("llama-sharded");
    for (text, words) in [
        (
            "[1, 2, 9999]",
            "holds 9999, which is not in the vocabulary of",
        ),
        ("[]", "holds no token ids"),
        ("{\"a\": 1}", "is no JSON list of token ids"),
        ("[-1]", "is no JSON list of token ids"),
    ] {
        std::fs::write(work.path("tokens.json"), text).unwrap();
        let flags = work.flags(&model, "x.safetensors", (1, 1));
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let output = run(&flags);
        assert!(said(&output).contains(words), "{text}: {}", said(&output));
        assert!(!Path::new(&work.path("x.safetensors")).exists());
    }
    std::fs::write(work.path("tokens.json"), "[1]").unwrap();
    let flags = work.flags(&model, "x.safetensors", (2, 1));
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.push("--nodes=3");
    let output = run(&flags);
    let expected = "2 ranks cannot be spread evenly over --nodes=3";
    assert!(said(&output).contains(expected), "{}", said(&output));
}

/// Runs `inspect` as its pod does; gives what it left as the termination message.
fn inspect(flags: &[&str]) -> (Output, String) {
    let folder = TempDir::new().unwrap();
    let log = folder.path().join("termination");
    std::fs::write(&log, "").unwrap();
    let log_flag = format!("--termination-log={}", log.display());
    let output = run(&[&["inspect", &log_flag], flags].concat());
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(
        text.len() <= llama_contract::TERMINATION_LOG_LIMIT,
        "{text}"
    );
    (output, text)
}

#[test]
fn the_real_model_is_inspected_from_its_header() {
    let Some((model, _alone)) = harness::model() else {
        return;
    };
    let folder = TempDir::new().unwrap();
    // As the copy of heads leaves it.
    let head = folder.path().join("m.gguf");
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&head, &bytes[..8 << 20]).unwrap();
    let file = std::fs::File::options().write(true).open(&head).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    let report = |model: &Path, more: &[&str]| {
        let model = format!("--model={}", model.display());
        let (output, text) = inspect(&[&[model.as_str(), "--tensor-parallel=3"], more].concat());
        assert!(output.status.success(), "{}", said(&output));
        InspectionReport::from_termination_message(&text).unwrap()
    };
    let unknown = report(&model, &[]);
    assert_eq!(report(&head, &[]), unknown);
    assert_eq!(unknown.room, None);
    assert_eq!(unknown.model.architecture, "llama");
    let facts = &unknown.model;
    assert_eq!((facts.layers, facts.heads, facts.kv_heads), (30, 9, 3));
    assert_eq!((facts.max_tokens, unknown.max_tokens), (8192, 8192));
    assert_eq!(unknown.kv_bytes_per_token, 30 * 2 * 3 * 64 * 2);
    let small = report(&model, &["--kv-cache-dtype=int8"]);
    assert_eq!(small.kv_bytes_per_token, 30 * 2 * 3 * (64 + 2 * 2));
    assert_eq!(unknown.kv_head_replication, 1);
    assert_eq!(
        unknown.pod.kv_cache_bytes,
        8192 * unknown.kv_bytes_per_token
    );

    let needed = unknown.needed_bytes;
    let flag = |bytes: u64| format!("--memory-bytes={bytes}");
    let enough = report(&head, &[&flag(needed)]);
    let room = enough.room.unwrap();
    assert!(room.fits && room.sequences == 1 && enough.alternatives.is_empty());
    assert!(room.total_tokens >= 8192);
    let short = report(&head, &[&flag(needed - (1 << 20))]);
    assert!(!short.room.unwrap().fits);
    assert_eq!(short.alternatives[1].memory_bytes, Some(needed));
    let tokens = short.alternatives[0].max_tokens.unwrap();
    let shorter = report(
        &head,
        &[&flag(needed - (1 << 20)), &format!("--max-tokens={tokens}")],
    );
    assert!(shorter.room.unwrap().fits);
    let two = report(&head, &[&flag(needed), "--sequences=2"]);
    assert!(!two.room.unwrap().fits && two.needed_bytes > needed);
}

/// The worker's own check of the same memory says the same, to the byte.
#[test]
fn a_verdict_is_the_workers_own() {
    let Some((model, _alone)) = harness::model() else {
        return;
    };
    let model = format!("--model={}", model.display());
    for ranks in ["--tensor-parallel=1", "--tensor-parallel=3"] {
        let fits = |bytes: u64| {
            let memory = format!("--memory-bytes={bytes}");
            let (_, text) = inspect(&[&model, ranks, "--threads-per-rank=2", &memory]);
            let report = InspectionReport::from_termination_message(&text).unwrap();
            report.room.unwrap().fits
        };
        let (mut short, mut enough) = (1_u64 << 12, 1 << 20);
        while enough - short > 1 {
            let middle = u64::midpoint(short, enough);
            if fits(middle * 4096) {
                enough = middle;
            } else {
                short = middle;
            }
        }
        // An address that is not this machine's ends the pod, after the check of memory.
        let starts = |bytes: u64| {
            let memory = format!("--memory-limit-bytes={bytes}");
            let flags = [
                "serve",
                &model,
                ranks,
                "--served-name=m",
                "--threads-per-rank=2",
                "--bind=192.0.2.1",
                &memory,
            ];
            let words = said(&run(&flags));
            assert!(
                words.contains("the model fits") || words.contains("InsufficientMemory"),
                "{words}"
            );
            !words.contains("InsufficientMemory")
        };
        assert!(starts(enough * 4096) && !starts(short * 4096), "{ranks}");
    }
}

#[test]
fn what_cannot_be_inspected_is_a_failure_report() {
    let model = format!("--model={}", fixture("llama-sharded").display());
    for (flags, category, words) in [
        (
            vec!["--model=/nowhere/m.gguf"],
            FailureCategory::ModelNotFound,
            "/nowhere/m.gguf",
        ),
        (
            vec![&model, "--tensor-parallel=3"],
            FailureCategory::InvalidLayout,
            "1, 2, 4 or 8 would",
        ),
        (
            vec![&model, "--max-tokens=99999999"],
            FailureCategory::InvalidConfiguration,
            "--max-tokens=99999999",
        ),
    ] {
        let (output, text) = inspect(&flags);
        assert_eq!(output.status.code(), Some(category.exit_code().into()));
        let report = FailureReport::from_termination_message(&text).unwrap();
        assert_eq!(report.category, category);
        assert!(report.message.contains(words), "{report:?}");
    }
}
