//! What status and events say, case by case.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use k8s_openapi::api::core::v1::{ContainerStateTerminated, PodCondition};
use llama_contract::FailureCategory;
use llama_crds::v1alpha1::{ConditionType, LlamaDeploymentStatus, MAX_TEXT, Reason};
use llama_operator::reconcile::apply::Applied;
use llama_operator::reconcile::notices::notices;
use llama_operator::reconcile::observe::Claim;
use llama_operator::reconcile::status::{find, is_only_progress, of_invalid, of_plan};
use serde_json::{Value, json};
use support::{Cluster, deployment, report};

const TYPES: [ConditionType; 7] = ConditionType::ALL;

/// `status/reason` of all seven conditions.
fn table(cluster: &Cluster) -> Vec<String> {
    TYPES
        .iter()
        .map(|type_| cluster.condition(*type_).0)
        .collect()
}

fn from_image() -> Value {
    let image = json!({"reference": "models:1", "path": "/m.gguf"});
    json!({"model": {"source": {"pvc": null, "image": image}}})
}

/// A deployment whose pods exist and have a node.
fn scheduled(changes: &Value) -> Cluster {
    let mut cluster = Cluster::new(deployment(changes));
    cluster.settle();
    cluster.schedule();
    cluster.settle();
    cluster
}

#[test]
fn from_nothing_to_serving() {
    let mut cluster = Cluster::new(deployment(&json!({"replicas": 2})));
    cluster.round();
    let starting = [
        "False/GroupsStarting",
        "False/NoGroupReady",
        "True/GroupsStarting",
        "False/AsExpected",
        "Unknown/ModelLoading",
    ];
    assert_eq!(table(&cluster)[..5], starting);
    assert_eq!(table(&cluster)[5], "Unknown/NoPods");
    cluster.settle();
    assert_eq!(table(&cluster)[5], "Unknown/GroupsStarting");
    cluster.schedule();
    cluster.start();
    cluster.settle();
    assert_eq!(table(&cluster)[..5], starting);
    assert_eq!(table(&cluster)[5], "True/AllPodsScheduled");
    let (_, message) = cluster.condition(ConditionType::Ready);
    assert_eq!(
        message,
        "0 of 2 groups ready; group m-0: pod m-0-0 on node node-1 is loading weights"
    );
    cluster.make_ready();
    cluster.settle();
    assert_eq!(
        table(&cluster),
        [
            "True/AllGroupsReady",
            "True/AsExpected",
            "False/Settled",
            "False/AsExpected",
            "True/ModelLoaded",
            "True/AllPodsScheduled",
            "Unknown/PlanDisabled",
        ]
    );
    let status = cluster.status();
    assert_eq!((status.replicas, status.ready_replicas), (2, 2));
    assert_eq!(status.url.as_deref(), Some("http://m.team.svc:8000/v1"));
    assert_eq!(status.observed_generation, Some(1));
}

/// What may be told a moment later, and what may not.
#[test]
fn only_the_way_to_ready_can_wait() {
    let mut cluster = Cluster::new(deployment(
        &json!({"parallelism": {"tensor": 2, "nodes": 2}}),
    ));
    let nothing = cluster.status();
    cluster.settle();
    let waiting = cluster.status();
    assert!(!is_only_progress(&nothing, &waiting), "it was taken up");
    cluster.schedule();
    cluster.settle();
    let scheduled = cluster.status();
    assert_ne!(waiting, scheduled);
    assert!(is_only_progress(&waiting, &scheduled));
    cluster.start();
    cluster.settle();
    let started = cluster.status();
    assert_ne!(scheduled, started);
    assert!(is_only_progress(&scheduled, &started));
    cluster.make_ready();
    cluster.settle();
    let ready = cluster.status();
    assert!(!is_only_progress(&started, &ready));
    cluster.fail("m-0-1", &report(FailureCategory::RankDied, Some(1)));
    cluster.round_until(1);
    assert!(!is_only_progress(&ready, &cluster.status()));
    let mut stuck = scheduled.clone();
    let ready = &mut stuck.conditions[0];
    ready.reason = Reason::WorkerImagePullFailed.to_string();
    assert!(!is_only_progress(&scheduled, &stuck));
}

#[test]
fn transition_times_change_with_the_status_only() {
    let mut cluster = scheduled(&json!({}));
    let time = |cluster: &Cluster, type_| {
        let status = cluster.status();
        find(&status, type_)
            .expect("set")
            .last_transition_time
            .clone()
    };
    let (ready, stalled) = (
        time(&cluster, ConditionType::Ready),
        time(&cluster, ConditionType::Stalled),
    );
    cluster.advance(100);
    cluster.start();
    cluster.settle();
    assert_eq!(
        time(&cluster, ConditionType::Ready),
        ready,
        "only the message changed"
    );
    cluster.make_ready();
    cluster.settle();
    assert_ne!(time(&cluster, ConditionType::Ready), ready);
    assert_eq!(time(&cluster, ConditionType::Stalled), stalled);
}

#[test]
fn a_claim_that_is_not_there_is_named() {
    let bound = |phase: &str, deleting: bool| {
        let mut claim = json!({"metadata": {"name": "models"}, "status": {"phase": phase}});
        if deleting {
            claim["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Claim::Found(Box::new(serde_json::from_value(claim).expect("a claim")))
    };
    for (claim, reason) in [
        (Claim::Missing, Reason::PersistentVolumeClaimNotFound),
        (
            bound("Pending", false),
            Reason::PersistentVolumeClaimPending,
        ),
        (bound("Lost", false), Reason::PersistentVolumeClaimLost),
        (bound("Bound", true), Reason::PersistentVolumeClaimLost),
    ] {
        let mut cluster = Cluster::new(deployment(&json!({})));
        cluster.observed.claim = claim;
        cluster.settle();
        for type_ in [ConditionType::Ready, ConditionType::ModelReady] {
            let (said, message) = cluster.condition(type_);
            assert_eq!(said, format!("False/{reason}"));
            assert!(
                message.contains("PersistentVolumeClaim models"),
                "{message}"
            );
        }
    }
}

#[test]
fn what_keeps_containers_from_starting_is_named() {
    let cases = [
        (
            "fetch-model",
            "ImagePullBackOff",
            "False/ModelImagePullFailed",
            true,
        ),
        (
            "fetch-model",
            "ErrImageNeverPull",
            "False/ModelImagePullFailed",
            true,
        ),
        (
            "fetch-model",
            "InvalidImageName",
            "False/ModelImagePullFailed",
            true,
        ),
        (
            "worker",
            "ErrImagePull",
            "False/WorkerImagePullFailed",
            false,
        ),
        (
            "install-model-copy",
            "ErrImagePull",
            "False/WorkerImagePullFailed",
            false,
        ),
        (
            "worker",
            "CreateContainerConfigError",
            "False/ContainerNotStarting",
            false,
        ),
        (
            "worker",
            "RunContainerError",
            "False/ContainerNotStarting",
            false,
        ),
    ];
    for (container, waiting, expected, concerns_model) in cases {
        let mut cluster = scheduled(&from_image());
        cluster.wait("m-0-0", container, waiting, "no such thing");
        cluster.settle();
        let (said, message) = cluster.condition(ConditionType::Ready);
        assert_eq!(said, expected, "{container} {waiting}");
        assert!(
            message.contains("no such thing") && message.contains("node-1"),
            "{message}"
        );
        let model = cluster.condition(ConditionType::ModelReady).0;
        assert_eq!(model.starts_with("False"), concerns_model, "{model}");
    }
}

#[test]
fn backing_off_and_trying_again_read_the_same() {
    let mut cluster = scheduled(&from_image());
    cluster.wait("m-0-0", "fetch-model", "ErrImagePull", "not found");
    cluster.settle();
    cluster.wait(
        "m-0-0",
        "fetch-model",
        "ImagePullBackOff",
        "Back-off pulling image \"models:1\": ErrImagePull: not found",
    );
    assert_eq!(cluster.round(), 0);
}

#[test]
fn of_a_mounted_image_the_text_says_which_cannot_be_pulled() {
    let mut spec = from_image();
    spec["model"]["source"]["image"]["mount"] = json!("Volume");
    let mut cluster = scheduled(&spec);
    for (text, reason) in [
        (
            "failed to pull image \"models:1\": not found",
            "ModelImagePullFailed",
        ),
        (
            "failed to pull image \"worker:1\": not found",
            "WorkerImagePullFailed",
        ),
    ] {
        cluster.wait("m-0-0", "worker", "ErrImagePull", text);
        cluster.settle();
        let (said, _) = cluster.condition(ConditionType::Ready);
        assert_eq!(said, format!("False/{reason}"));
    }
}

#[test]
fn pods_without_a_node_are_counted() {
    let mut cluster = Cluster::new(deployment(&json!({"replicas": 3})));
    cluster.settle();
    for pod in ["m-0-0", "m-2-0"] {
        let status = cluster.pod_mut(pod).status.get_or_insert_default();
        status.conditions = Some(vec![PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "False".to_owned(),
            reason: Some("Unschedulable".to_owned()),
            message: Some("0/1 nodes are available: 1 Insufficient cpu.".to_owned()),
            ..PodCondition::default()
        }]);
    }
    cluster.settle();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "False/Unschedulable"
    );
    let (said, message) = cluster.condition(ConditionType::Scheduled);
    assert_eq!(said, "False/Unschedulable");
    assert_eq!(
        message,
        "2 pods of 2 groups have no node; group m-0: 0/1 nodes are available: 1 Insufficient cpu."
    );
}

#[test]
fn a_refusal_is_quoted() {
    let cluster = Cluster::new(deployment(&json!({})));
    let (valid, plan) = (cluster.valid(), cluster.plan());
    let applied = Applied {
        refused: vec!["exceeded quota".to_owned(), "again".to_owned()],
        writes: 2,
        ..Applied::default()
    };
    let previous = LlamaDeploymentStatus::default();
    let status = of_plan(&valid, &plan, &applied, &previous, Some(1), cluster.now);
    let ready = find(&status, ConditionType::Ready).expect("set");
    assert_eq!(ready.reason, "CreationRefused");
    assert!(
        ready
            .message
            .contains("exceeded quota (1 more were refused)"),
        "{}",
        ready.message
    );
}

#[test]
fn a_spec_that_became_invalid_keeps_what_serves() {
    let mut cluster = scheduled(&json!({}));
    cluster.bring_up();
    let before = cluster.status();
    let after = of_invalid(Reason::InvalidSpec, "why", &before, Some(2), cluster.now);
    let said = |type_| {
        let found = find(&after, type_).expect("set");
        format!("{}/{}", found.status, found.reason)
    };
    assert_eq!(said(ConditionType::Ready), "False/InvalidSpec");
    assert_eq!(said(ConditionType::Stalled), "True/InvalidSpec");
    assert_eq!(said(ConditionType::Available), "True/AsExpected");
    assert_eq!((after.groups, after.ready_replicas), (before.groups, 1));
}

#[test]
fn containers_without_a_report_are_described() {
    for (code, reason, expected, words) in [
        (137, "Error", "ContainerExited", "exit code 137 (signal 9)"),
        (
            1,
            "Error",
            "ContainerExited",
            "exit code 1 and left no report",
        ),
        (137, "OOMKilled", "OOMKilled", "memory limit of 1Gi"),
    ] {
        let mut cluster = scheduled(&json!({}));
        cluster.bring_up();
        let terminated = ContainerStateTerminated {
            exit_code: code,
            reason: Some(reason.to_owned()),
            ..ContainerStateTerminated::default()
        };
        cluster.end("m-0-0", terminated);
        cluster.round();
        let failure = cluster.status().groups[0]
            .last_failure
            .clone()
            .expect("a failure");
        assert_eq!(failure.reason, expected);
        assert!(failure.message.contains(words), "{}", failure.message);
        assert_eq!(failure.node.as_deref(), Some("node-1"));
    }
}

#[test]
fn only_so_many_groups_stand_in_status() {
    let mut cluster = Cluster::new(deployment(&json!({"replicas": 70})));
    cluster.bring_up();
    assert_eq!(cluster.status().groups.len(), 64);
    assert_eq!(cluster.status().ready_replicas, 70);
    cluster.fail("m-69-0", &report(FailureCategory::RankDied, Some(0)));
    cluster.round();
    let groups = cluster.status().groups;
    assert_eq!(groups.len(), 64);
    let last = groups.last().expect("some");
    assert_eq!(
        (last.index, last.epoch),
        (69, 1),
        "what failed is not forgotten"
    );
}

#[test]
fn an_event_names_rank_node_and_cause() {
    let mut cluster = scheduled(&json!({}));
    cluster.bring_up();
    let before = cluster.status();
    let mut told = report(FailureCategory::RankDied, Some(1));
    told.message = "a process was killed by SIGKILL".to_owned();
    cluster.fail("m-0-0", &told);
    let plan = cluster.plan();
    cluster.round();
    let all = notices(
        "m",
        Some((&plan, &Applied::default())),
        &before,
        &cluster.status(),
        cluster.now,
    );
    let notice = all.iter().find(|notice| notice.warning).expect("a warning");
    assert_eq!(
        (notice.reason.as_str(), notice.occurrence.as_str()),
        ("RankDied", "0-0")
    );
    assert_eq!(
        notice.note,
        "group m-0: rank 1 on node node-1: a process was killed by SIGKILL; recreating the group \
         (restart 1)"
    );
}

#[test]
fn serving_is_an_event_and_happens_once() {
    let mut cluster = scheduled(&json!({}));
    cluster.start();
    cluster.settle();
    cluster.make_ready();
    let (before, plan) = (cluster.status(), cluster.plan());
    cluster.round();
    let after = cluster.status();
    let all = notices(
        "m",
        Some((&plan, &Applied::default())),
        &before,
        &after,
        cluster.now,
    );
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].reason, "GroupReady");
    assert_eq!(
        notices(
            "m",
            Some((&cluster.plan(), &Applied::default())),
            &after,
            &after,
            cluster.now
        ),
        []
    );
}

/// A rank's own words, the number of failures and what to do about it are more than the
/// schema takes; the API server would refuse the whole status, and with it the failure.
#[test]
fn no_text_is_longer_than_the_schema_takes() {
    let changes = json!({"failure": {"groupRestart": {"maxRestarts": 0}}});
    let mut cluster = scheduled(&changes);
    cluster.start();
    let mut failed = report(FailureCategory::RankDied, Some(1));
    failed.message = "rank 1 ended with signal 11; ".repeat(100);
    cluster.fail("m-0-0", &failed);
    cluster.round();
    let status = cluster.status();
    let group = &status.groups[0];
    let failure = group.last_failure.as_ref().expect("a failure");
    for text in [group.message.as_deref(), Some(failure.message.as_str())] {
        let length = text.expect("a text").chars().count();
        assert!((900..=MAX_TEXT).contains(&length), "{length} characters");
    }
}

/// A deployment that serves.
fn serving(changes: &Value) -> Cluster {
    let mut cluster = Cluster::new(deployment(changes));
    cluster.bring_up();
    cluster
}

#[test]
fn what_only_a_peer_tells_waits_for_the_pod_that_knows() {
    let spec = json!({"parallelism": {"tensor": 4, "nodes": 2}});
    let reason = |cluster: &Cluster| {
        let failure = cluster.status().groups[0].last_failure.clone();
        failure.map(|failure| (failure.reason, failure.rank))
    };
    let mut cluster = serving(&spec);
    cluster.fail("m-0-0", &report(FailureCategory::PeerLost, Some(3)));
    cluster.round();
    assert_eq!(reason(&cluster), None, "the other pod has yet to tell");
    assert_eq!(cluster.status().ready_replicas, 0);
    cluster.advance(2);
    cluster.fail("m-0-1", &report(FailureCategory::RankDied, Some(3)));
    cluster.round();
    let died = Some(("RankDied".to_owned(), Some(3)));
    assert_eq!(reason(&cluster), died);

    let mut cluster = serving(&spec);
    cluster.fail("m-0-0", &report(FailureCategory::PeerLost, Some(3)));
    cluster.advance(10);
    cluster.round();
    let lost = Some(("PeerLost".to_owned(), Some(3)));
    assert_eq!(reason(&cluster), lost, "it is not waited for any longer");
}
