//! How far pods are that a group waits for.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::{LoadProgress, WorkerPhase};
use llama_crds::v1alpha1::GroupPhase;
use llama_operator::reconcile::observe::PodState;
use serde_json::json;
use support::{Cluster, deployment};

/// One group of one pod that has a node.
fn scheduled() -> Cluster {
    let mut cluster = Cluster::new(deployment(&json!({})));
    cluster.settle();
    let now = cluster.now;
    cluster.pod_mut("m-0-0").metadata.creation_timestamp = Some(Time(now));
    cluster.schedule();
    cluster.settle();
    cluster
}

fn tells(cluster: &mut Cluster, phase: WorkerPhase, done: u64, rate: u64, left: Option<u64>) {
    let uid = cluster.pod_mut("m-0-0").metadata.uid.clone();
    let progress = LoadProgress {
        bytes_done: done,
        bytes_total: 100 << 30,
        bytes_per_second: rate,
        seconds_left: left,
    };
    let state = PodState {
        phase,
        progress,
        ..PodState::default()
    };
    cluster.observed.states.insert(uid.expect("a UID"), state);
    cluster.settle();
}

fn message(cluster: &Cluster) -> String {
    let status = cluster.status();
    status.groups[0].message.clone().unwrap_or_default()
}

#[test]
fn a_pod_that_takes_long_is_asked_how_far_it_is() {
    let mut cluster = scheduled();
    let group = &cluster.plan().groups[0];
    assert_eq!(group.waits_for, None, "most pods are ready soon");
    assert_eq!(group.wake_after, Some(Duration::from_secs(5)));
    cluster.advance(6);
    let group = &cluster.plan().groups[0];
    let uid = cluster.pod_mut("m-0-0").metadata.uid.clone();
    assert_eq!(group.waits_for, uid);
    cluster.start();
    cluster.settle();
    assert_eq!(
        cluster.plan().groups[0].waits_for,
        uid,
        "while it loads too"
    );
    cluster.make_ready();
    cluster.settle();
    assert_eq!(cluster.plan().groups[0].waits_for, None);
}

#[test]
fn what_it_tells_stands_in_status() {
    let mut cluster = scheduled();
    assert_eq!(
        message(&cluster),
        "pod m-0-0 on node node-1 is fetching images and the model"
    );
    tells(
        &mut cluster,
        WorkerPhase::Fetching,
        25 << 30,
        3 << 30,
        Some(25),
    );
    assert_eq!(
        message(&cluster),
        "pod m-0-0 on node node-1 is fetching the model: 25 % of 100.00 GiB, 3.00 GiB/s, about \
         25 s left"
    );
    let progress = cluster.status().groups[0].progress.expect("progress");
    assert_eq!((progress.percent, progress.seconds_left), (25, Some(25)));
    assert_eq!(progress.bytes_per_second, 3 << 30);

    cluster.start();
    tells(&mut cluster, WorkerPhase::Rendezvous, 0, 0, None);
    assert!(message(&cluster).ends_with("waits for the ranks of the other pods"));
    assert_eq!(cluster.status().groups[0].progress, None);
    tells(
        &mut cluster,
        WorkerPhase::LoadingWeights,
        1 << 30,
        1 << 20,
        Some(5400),
    );
    assert!(
        message(&cluster)
            .ends_with("is loading weights: 1 % of 100.00 GiB, 1 MiB/s, about 90 min left"),
        "{}",
        message(&cluster)
    );
    tells(
        &mut cluster,
        WorkerPhase::SelfTest,
        100 << 30,
        1 << 30,
        None,
    );
    assert!(message(&cluster).ends_with("computes the golden answer"));
    cluster.make_ready();
    cluster.settle();
    let status = cluster.status();
    assert_eq!(status.groups[0].phase, GroupPhase::Ready);
    assert_eq!(status.groups[0].progress, None);
}
