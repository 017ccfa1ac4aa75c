//! A group of three pods with one rank each, over TCP.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::Path;
use std::time::Instant;

use harness::{Net, Worker, model, namespaces};
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
    Worker::start_at(&Net::loopback(1 + index), model, &flags, &[TOKEN])
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

#[test]
fn pods_in_two_network_namespaces_answer_as_one() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let Some([near, far]) = namespaces::pair() else {
        return;
    };
    let nets = [
        Net::inside(&near, 0),
        Net::inside(&near, 1),
        Net::inside(&far, 0),
    ];
    let rendezvous = format!("--rendezvous={}", nets[0].free_address());
    let mut pods: Vec<_> = (0..)
        .zip(&nets)
        .map(|(index, net)| {
            let index = format!("--node-index={index}");
            let flags = ["--tensor-parallel=3", "--nodes=3", &rendezvous, &index];
            Worker::start_at(net, &model, &flags, &[TOKEN])
        })
        .collect();
    for pod in &mut pods {
        pod.wait_until_ready();
    }
    let question = "What is the capital of France?";
    let alone = Worker::serving(&model, &[]).chat(question, 16);
    assert_eq!(pods[0].chat(question, 16), alone);
    for pod in &pods {
        pod.signal(Signal::TERM);
    }
    for pod in &mut pods {
        assert_eq!(pod.wait().code(), Some(0), "{}", pod.log());
    }
}

#[test]
fn a_leader_worker_set_says_who_is_who() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let address = format!("127.0.0.1:{}", rendezvous_port());
    let mut pods = [2_u8, 1, 0].map(|index| {
        let number = index.to_string();
        let environment = [
            TOKEN,
            (llama_contract::LWS_LEADER_ADDRESS_ENV, &address),
            (llama_contract::LWS_GROUP_SIZE_ENV, "3"),
            (llama_contract::LWS_WORKER_INDEX_ENV, &number),
        ];
        let net = Net::loopback(1 + index);
        Worker::start_at(&net, &model, &["--tensor-parallel=3"], &environment)
    });
    pods.reverse();
    for (index, pod) in (0..).zip(&mut pods) {
        pod.wait_until_ready();
        assert_eq!(pod.state().node_index, index);
    }
    assert!(!pods[0].chat("Hello", 4).is_empty());
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
