//! Killing, stopping and cutting off each rank at each phase of a step.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use harness::{MODEL, Net, Worker, is_stopped, kill, namespaces, turn};
use llama_contract::{FailureCategory, FailureReport};
use llama_model::fixture::TinyLlama;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Pods that are watched at a time; most of their time they wait.
const AT_A_TIME: usize = 4;
/// Steps with tokens before the fault.
const AFTER: u32 = 10;

/// Tensor parallel 2 in 2 stages of a layer each: the operations of a step of each rank.
/// Plan, header, embedding (or what the stage before sends), attention, feed-forward,
/// what the next stage gets (in the first), logits.
const OPERATIONS: [u32; 4] = [7, 7, 6, 6];

struct Tiny {
    folder: TempDir,
    model: PathBuf,
}

impl Tiny {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let model = folder.path().join("tiny.gguf");
        TinyLlama::default().gguf().write(&model).unwrap();
        Self { folder, model }
    }
}

fn request() -> Value {
    json!({
        "model": MODEL, "prompt": "the thing at the inn", "max_tokens": 300, "temperature": 0,
        "ignore_eos": true, "stream": true,
    })
}

/// What a group answers that meets no fault.
fn answer(worker: &Worker) -> String {
    let (text, _) = worker.stream("/v1/completions", &request()).text();
    assert!(text.len() > 100, "{text}");
    text
}

/// The fault's description, and the file that arms it.
fn fault(folder: &Path, rank: usize, operation: u32, signal: &str) -> (String, PathBuf) {
    let armed = folder.join(format!("{rank}-{operation}-{signal}"));
    let fault = format!("{rank}:{operation}:{signal}:{AFTER}:{}", armed.display());
    (fault, armed)
}

/// Arms the fault, and returns what a client is told.
fn meet(worker: &Worker, armed: &Path, expected: &str) -> Value {
    let stream = worker.stream("/v1/completions", &request());
    std::fs::write(armed, "").unwrap();
    let (text, error) = stream.text_and_error();
    assert!(
        expected.starts_with(&text),
        "{text:?} is no part of {expected:?}"
    );
    error
}

const PARALLEL: [&str; 2] = ["--tensor-parallel=2", "--pipeline-parallel=2"];

fn at_each_phase(signal: &str, category: FailureCategory) {
    let (_turn, tiny) = (turn(), Tiny::new());
    let expected = answer(&Worker::serving(&tiny.model, &PARALLEL));
    let cases = (0..4).flat_map(|rank| (0..OPERATIONS[rank]).map(move |at| (rank, at)));
    let cases = Mutex::new(cases);
    let work = || {
        loop {
            let case = cases.lock().unwrap().next();
            let Some((rank, operation)) = case else {
                return;
            };
            let (fault, armed) = fault(tiny.folder.path(), rank, operation, signal);
            let environment = [("LLAMA_TEST_FAULT", fault.as_str())];
            let net = Net::loopback(1);
            let mut worker = Worker::start_at(&net, &tiny.model, &PARALLEL, &environment);
            worker.wait_until_ready();
            let error = meet(&worker, &armed, &expected);
            let (code, report) = worker.failure();
            let what = format!("{signal} of rank {rank} at {operation}: {error} {report:?}");
            assert_eq!(code, 70, "{what}");
            assert_eq!(report.category, category, "{what}");
            assert_eq!(report.rank, u32::try_from(rank).ok(), "{what}");
            assert_eq!(error["code"], category.as_str(), "{what}");
        }
    };
    std::thread::scope(|scope| {
        let watchers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(work)).collect();
        for watcher in watchers {
            watcher.join().unwrap();
        }
    });
    // The next incarnation answers as if nothing had been.
    let flags = [&PARALLEL[..], &["--epoch=1"]].concat();
    assert_eq!(answer(&Worker::serving(&tiny.model, &flags)), expected);
}

#[test]
fn a_rank_killed_at_any_phase_is_named_and_no_wrong_token_is_sent() {
    at_each_phase("KILL", FailureCategory::RankDied);
}

#[test]
fn a_rank_stopped_at_any_phase_is_named_and_no_wrong_token_is_sent() {
    at_each_phase("STOP", FailureCategory::RankSilent);
}

#[test]
fn a_rank_that_lives_and_does_nothing_is_named_after_the_hang_timeout() {
    let (_turn, tiny) = (turn(), Tiny::new());
    let flags = [&PARALLEL[..], &["--hang-timeout=3"]].concat();
    let expected = answer(&Worker::serving(&tiny.model, &flags));
    let (fault, armed) = fault(tiny.folder.path(), 1, 3, "HANG");
    let environment = [("LLAMA_TEST_FAULT", fault.as_str())];
    let mut worker = Worker::start_at(&Net::loopback(1), &tiny.model, &flags, &environment);
    worker.wait_until_ready();
    let error = meet(&worker, &armed, &expected);
    assert_eq!(error["code"], "RankSilent", "{error}");
    let (code, report) = worker.failure();
    assert_eq!((code, report.rank), (70, Some(1)), "{report:?}");
    // Longer than a rank without signs of life has, and less than without the flag.
    let said = report.message.rsplit_once(" ms").expect("a time").0;
    let millis: u64 = said.rsplit(' ').next().unwrap().parse().unwrap();
    assert!((3000..60_000).contains(&millis), "{report:?}");
}

const TOKEN: (&str, &str) = (llama_contract::RENDEZVOUS_TOKEN_ENV, "secret");

/// Two pods of a rank each in two namespaces, the first of which meets `fault`.
fn far_apart(nets: &[Net; 2], model: &Path, fault: &str) -> [Worker; 2] {
    let rendezvous = format!("--rendezvous={}", nets[0].free_address());
    let mut pods = [1, 0].map(|index: usize| {
        let number = format!("--node-index={index}");
        let flags = ["--tensor-parallel=2", "--nodes=2", &rendezvous, &number];
        let environment = [TOKEN, ("LLAMA_TEST_FAULT", fault)];
        Worker::start_at(&nets[index], model, &flags, &environment)
    });
    pods.reverse();
    for pod in &mut pods {
        pod.wait_until_ready();
    }
    pods
}

fn lost(report: &FailureReport) -> bool {
    matches!(
        report.category,
        FailureCategory::PeerLost | FailureCategory::RankSilent
    )
}

#[test]
fn a_cable_cut_at_any_phase_is_noticed_by_both_ends() {
    let (_turn, tiny) = (turn(), Tiny::new());
    let expected = answer(&Worker::serving(&tiny.model, &["--tensor-parallel=2"]));
    for (rank, operation) in [(0, 0), (1, 1), (0, 2), (1, 4), (0, 7)] {
        let Some([near, far]) = namespaces::pair() else {
            return;
        };
        let nets = [Net::inside(&near, 0), Net::inside(&far, 0)];
        let (fault, armed) = fault(tiny.folder.path(), rank, operation, "STOP");
        let mut pods = far_apart(&nets, &tiny.model, &fault);
        let pid = pods[rank].state().ranks[0].pid;
        let error = std::thread::scope(|scope| {
            let told = scope.spawn(|| meet(&pods[0], &armed, &expected));
            let stopped = (0..10_000).any(|_| {
                std::thread::sleep(std::time::Duration::from_millis(2));
                is_stopped(pid)
            });
            assert!(stopped, "no fault at {operation}");
            near.cut();
            kill(pid, Signal::CONT);
            told.join().unwrap()
        });
        for pod in &mut pods {
            let (code, report) = pod.failure();
            assert_eq!(code, 70, "at {operation}: {report:?}");
            assert!(lost(&report), "at {operation}: {error} {report:?}");
        }
    }
}
