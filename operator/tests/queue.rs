//! What pods carry for Kueue, what is said while it lets them wait, and what it takes back.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use llama_crds::v1alpha1::{ConditionType, GroupPhase};
use serde_json::{Value, json};
use support::{Cluster, deployment};

/// One group of two pods in the queue `team-a`, in a cluster with Kueue.
fn queued(changes: &Value) -> Cluster {
    let mut spec = json!({
        "parallelism": {"tensor": 2, "nodes": 2},
        "placement": {"queueName": "team-a"},
    });
    for (key, value) in changes.as_object().expect("an object") {
        spec["placement"][key] = value.clone();
    }
    let mut cluster = Cluster::new(deployment(&spec));
    cluster.nodes(&[]);
    cluster.observed.has_kueue = true;
    cluster
}

/// Kueue's webhook has seen the pods.
fn managed(cluster: &mut Cluster) {
    for pod in &mut cluster.pods {
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert("kueue.x-k8s.io/managed".to_owned(), "true".to_owned());
    }
}

fn condition(type_: &str, status: &str, message: &str) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: "Test".to_owned(),
        message: message.to_owned(),
        last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
        observed_generation: None,
    }
}

#[test]
fn the_pods_of_a_group_are_one_pod_group() {
    let cluster = queued(&json!({"topology": {"required": "rack"}}));
    let pods = cluster.plan().create;
    let meta = |index: usize| pods[index].metadata.clone();
    let label = |index: usize, key: &str| meta(index).labels.expect("labels")[key].clone();
    let note = |index: usize, key: &str| meta(index).annotations.expect("notes")[key].clone();
    for index in [0, 1] {
        assert_eq!(label(index, "kueue.x-k8s.io/queue-name"), "team-a");
        assert_eq!(note(index, "kueue.x-k8s.io/pod-group-total-count"), "2");
        assert_eq!(
            note(index, "kueue.x-k8s.io/podset-required-topology"),
            "rack"
        );
        let spec = pods[index].spec.as_ref().expect("a spec");
        let gates = spec.scheduling_gates.as_ref().expect("gates");
        let names: Vec<_> = gates.iter().map(|gate| gate.name.as_str()).collect();
        assert_eq!(names, ["kueue.x-k8s.io/admission"], "not the operator's");
    }
    let group = label(0, "kueue.x-k8s.io/pod-group-name");
    assert_eq!(label(1, "kueue.x-k8s.io/pod-group-name"), group);
    assert!(group.starts_with("m-0-0-") && group.len() <= 63, "{group}");
    // The first pod has a port more, and is of the same kind to Kueue nevertheless.
    let role = "kueue.x-k8s.io/role-hash";
    assert_eq!(note(0, role), note(1, role));
    let near = queued(&json!({"topology": {"preferred": "rack"}}))
        .plan()
        .create;
    let notes = near[0].metadata.annotations.as_ref().expect("notes");
    assert_eq!(notes["kueue.x-k8s.io/podset-preferred-topology"], "rack");
}

#[test]
fn auto_is_kueue_only_where_it_is_served() {
    let mut cluster = queued(&json!({}));
    cluster.observed.has_kueue = false;
    let pods = cluster.plan().create;
    assert_eq!(pods[0].metadata.annotations, None);
    let spec = pods[0].spec.as_ref().expect("a spec");
    let gates = spec.scheduling_gates.as_ref().expect("gates");
    assert_eq!(gates[0].name, "llmops.dev/gang");
}

#[test]
fn kueue_that_is_asked_for_and_missing_is_said() {
    let mut cluster = queued(&json!({"gang": {"provider": "Kueue"}}));
    cluster.observed.has_kueue = false;
    cluster.settle();
    assert!(cluster.pod_names().is_empty());
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/KueueNotInstalled");
    assert!(said.contains("install Kueue"), "{said}");
    assert!(
        cluster
            .plan()
            .wake_after()
            .is_some_and(|time| time.as_secs() <= 10)
    );
    cluster.observed.has_kueue = true;
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-0-1"]);
}

#[test]
fn what_is_waited_for_is_told_in_kueues_words() {
    let mut cluster = queued(&json!({}));
    cluster.settle();
    let said = |cluster: &mut Cluster| {
        cluster.settle();
        let (scheduled, said) = cluster.condition(ConditionType::Scheduled);
        assert_eq!(scheduled, "False/WaitingForQuota");
        assert!(
            said.starts_with("2 pods of 1 groups have no node"),
            "{said}"
        );
        said
    };
    assert!(said(&mut cluster).contains("which does not manage this pod"));
    managed(&mut cluster);
    assert!(said(&mut cluster).ends_with("waits for LocalQueue team-a of Kueue"));
    let labels = cluster.pod_mut("m-0-0").metadata.labels.clone();
    let group = labels.expect("labels")["kueue.x-k8s.io/pod-group-name"].clone();
    let tell = |cluster: &mut Cluster, conditions: Vec<Condition>| {
        cluster.observed.workloads.insert(group.clone(), conditions);
        said(cluster)
    };
    let why = "couldn't assign flavors: insufficient quota for nvidia.com/gpu, 4 more needed";
    let pending = vec![condition("QuotaReserved", "False", why)];
    assert!(tell(&mut cluster, pending).ends_with(&format!("team-a of Kueue: {why}")));
    let checked = vec![
        condition("QuotaReserved", "True", "reserved"),
        condition("Admitted", "False", "provisioning"),
    ];
    assert!(tell(&mut cluster, checked).contains("admission checks are under way (provisioning)"));
    assert_eq!(cluster.status().groups[0].phase, GroupPhase::Scheduling);
}

#[test]
fn what_kueue_takes_back_queues_again_and_has_not_failed() {
    let mut cluster = queued(&json!({}));
    cluster.settle();
    for pod in &mut cluster.pods {
        pod.spec.as_mut().expect("a spec").scheduling_gates = None;
    }
    cluster.bring_up();
    assert_eq!(cluster.status().groups[0].phase, GroupPhase::Ready);
    cluster.delete("m-0-1", None);
    let pod = cluster.pod_mut("m-0-1");
    let status = pod.status.get_or_insert_with(PodStatus::default);
    status
        .conditions
        .get_or_insert_default()
        .push(PodCondition {
            type_: "TerminationTarget".to_owned(),
            status: "True".to_owned(),
            reason: Some("WorkloadEvictedDueToPreempted".to_owned()),
            message: Some("Preempted to accommodate a workload".to_owned()),
            ..PodCondition::default()
        });
    let plan = cluster.plan();
    let group = &plan.groups[0];
    assert!(group.failure.is_none());
    let taken = group.taken.as_ref().expect("what was taken");
    assert_eq!(taken.epoch, 0);
    assert!(
        taken.note.contains("WorkloadEvictedDueToPreempted"),
        "{}",
        taken.note
    );
    cluster.settle();
    cluster.finish_deletions();
    cluster.settle();
    cluster.finish_deletions();
    cluster.settle();
    let group = &cluster.status().groups[0];
    assert_eq!((group.epoch, group.restarts), (1, 0));
    assert!(group.last_failure.is_none() && group.recent_failures.is_empty());
    let labels = cluster.pod_mut("m-0-0").metadata.labels.clone();
    let name = labels.expect("labels")["kueue.x-k8s.io/pod-group-name"].clone();
    assert!(name.starts_with("m-0-1-"), "another Workload: {name}");
}
