//! A group of three pods with one rank each, over TCP on loopback.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::Path;
use std::time::Instant;

use harness::{Worker, model};
use llama_contract::{FailureCategory, WorkerPhase};
use rustix::process::Signal;

const TOKEN: (&str, &str) = (llama_contract::RENDEZVOUS_TOKEN_ENV, "secret");

fn pod(model: &Path, port: u16, index: u8, more: &[&str]) -> Worker {
    let (rendezvous, index_flag) = (
        format!("--rendezvous=127.0.0.1:{port}"),
        format!("--node-index={index}"),
    );
    let mut flags = vec!["--tensor-parallel=3", "--nodes=3", &rendezvous, &index_flag];
    flags.extend(more);
    Worker::start_at([127, 0, 0, 1 + index], model, &flags, &[TOKEN])
}

fn rendezvous_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn group(model: &Path) -> [Worker; 3] {
    let port = rendezvous_port();
    let mut pods = [2, 1, 0].map(|index| pod(model, port, index, &[]));
    pods.reverse();
    for pod in &mut pods {
        pod.wait_until_ready();
    }
    pods
}

#[test]
fn three_pods_answer_as_one_and_end_together() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let question = "What is the capital of France?";
    let alone = Worker::serving(&model, &[]).chat(question, 16);
    let mut pods = group(&model);
    assert_eq!(pods[0].chat(question, 16), alone);
    for (index, pod) in (0..).zip(&pods) {
        let state = pod.state();
        assert_eq!((state.node_index, state.phase), (index, WorkerPhase::Ready));
        assert_eq!(state.ranks[0].rank, index);
    }
    for pod in &pods {
        pod.signal(Signal::TERM);
    }
    for pod in &mut pods {
        assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
    }
}

/// Hits the rank of pod `index` during an answer; every pod must name it.
fn fault(signal: Signal, index: usize, own: FailureCategory, others: FailureCategory) {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut pods = group(&model);
    let stream = pods[0].long_stream();
    let started = Instant::now();
    pods[index].signal_rank(0, signal);
    let error = stream.error();
    eprintln!(
        "{signal:?} of rank {index}: told after {:?}",
        started.elapsed()
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(&format!("rank {index}")), "{error}");
    assert!(message.contains("test-node"), "{error}");
    for (place, pod) in pods.iter_mut().enumerate() {
        let (code, report) = pod.failure();
        let expected = if place == index { own } else { others };
        assert_eq!(code, 70, "{report:?}");
        assert_eq!(report.category, expected, "pod {place}: {report:?}");
        assert_eq!(
            report.rank,
            u32::try_from(index).ok(),
            "pod {place}: {report:?}"
        );
        assert_eq!(report.node.as_deref(), Some("test-node"));
    }
}

#[test]
fn a_killed_rank_of_another_pod_is_named() {
    fault(
        Signal::KILL,
        1,
        FailureCategory::RankDied,
        FailureCategory::PeerLost,
    );
}

#[test]
fn a_killed_rank_0_is_named_by_the_other_pods() {
    fault(
        Signal::KILL,
        0,
        FailureCategory::RankDied,
        FailureCategory::PeerLost,
    );
}

#[test]
fn a_stopped_rank_of_another_pod_is_named() {
    fault(
        Signal::STOP,
        2,
        FailureCategory::RankSilent,
        FailureCategory::RankSilent,
    );
}

#[test]
fn pods_of_another_revision_do_not_join() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let port = rendezvous_port();
    let mut first = pod(&model, port, 0, &[]);
    let mut stranger = pod(&model, port, 1, &["--epoch=3"]);
    let (code, report) = stranger.failure();
    assert_eq!(
        (code, report.category),
        (70, FailureCategory::RendezvousFailed)
    );
    assert!(report.message.contains("epoch"), "{report:?}");
    assert_eq!(first.state().phase, WorkerPhase::Rendezvous);
    let mut other = pod(&model, port, 2, &["--revision=b"]);
    for pod in [&mut first, &mut other] {
        let (code, report) = pod.failure();
        assert_eq!(
            (code, report.category),
            (70, FailureCategory::RendezvousFailed)
        );
        assert!(report.message.contains("revision"), "{report:?}");
        assert_eq!(report.rank, Some(2));
    }
}
