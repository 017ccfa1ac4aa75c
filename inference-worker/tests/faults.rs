//! Killing and stopping ranks while an answer is on its way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::time::Instant;

use harness::{Worker, chat, model};
use llama_contract::{FailureCategory, WorkerPhase};
use rustix::process::Signal;

/// Sends `signal` to a rank during an answer and checks what everybody is told.
fn fault(signal: Signal, rank: usize, category: FailureCategory) {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3", "--epoch=7"]);
    let stream = worker.long_stream();
    let started = Instant::now();
    worker.signal_rank(rank, signal);
    let error = stream.error();
    let told = started.elapsed();
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&format!("rank {rank}")), "{error}");
    assert!(message.contains("test-node"), "{error}");
    assert_eq!(error["code"], category.as_str(), "{error}");

    let (code, report) = worker.failure();
    eprintln!(
        "{category} of rank {rank}: told after {told:?}, ended after {:?}",
        started.elapsed()
    );
    assert_eq!(code, 70);
    assert_eq!(report.category, category, "{report:?}");
    assert_eq!(report.rank, u32::try_from(rank).ok());
    assert_eq!(report.node.as_deref(), Some("test-node"));
    assert_eq!(report.epoch, 7);
    assert!(report.step.is_some_and(|step| step > 0), "{report:?}");
}

#[test]
fn killing_rank_0_is_told_to_the_client() {
    fault(Signal::KILL, 0, FailureCategory::RankDied);
}

#[test]
fn killing_rank_1_is_told_to_the_client() {
    fault(Signal::KILL, 1, FailureCategory::RankDied);
}

#[test]
fn killing_rank_2_is_told_to_the_client() {
    fault(Signal::KILL, 2, FailureCategory::RankDied);
}

#[test]
fn stopping_rank_0_is_told_to_the_client() {
    fault(Signal::STOP, 0, FailureCategory::RankSilent);
}

#[test]
fn stopping_rank_2_is_told_to_the_client() {
    fault(Signal::STOP, 2, FailureCategory::RankSilent);
}

#[test]
fn an_idle_group_notices_a_killed_rank_and_serves_no_more() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    worker.signal_rank(1, Signal::KILL);
    // Between the failure and the end of the process requests get 503; which
    // of the two this one meets is a matter of luck.
    while let Some((status, body)) = worker.internal("/state") {
        assert_eq!(status, 200);
        let state: llama_contract::StateReport = serde_json::from_str(&body).unwrap();
        if state.phase == WorkerPhase::Failed {
            assert_eq!(state.failure.unwrap().rank, Some(1));
            if let Some((status, _)) = worker.internal("/health") {
                assert_eq!(status, 503);
            }
            break;
        }
    }
    let (code, report) = worker.failure();
    assert_eq!((code, report.rank), (70, Some(1)));
}

#[test]
fn whole_answers_fail_with_a_status_of_their_own() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let (status, body) = std::thread::scope(|scope| {
        let answer =
            scope.spawn(|| worker.post("/v1/chat/completions", &chat("Count to 900.", 2000)));
        while worker.state().running == 0 {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        worker.signal_rank(1, Signal::KILL);
        answer.join().unwrap()
    });
    assert_eq!(status, 503, "{body}");
    assert_eq!(body["error"]["code"], "RankDied", "{body}");
    assert_eq!(worker.failure().0, 70);
}

#[test]
fn ranks_end_with_their_supervisor() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let pids: Vec<_> = worker.state().ranks.iter().map(|rank| rank.pid).collect();
    worker.signal(Signal::KILL);
    worker.wait();
    let is_alive = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    };
    for _ in 0..250 {
        if !pids.iter().any(is_alive) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{pids:?} still run");
}
