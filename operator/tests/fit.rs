//! Whether the model fits, before pods exist.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use k8s_openapi::api::core::v1::{Node, Pod};
use llama_contract::{
    FailureCategory, FittingChange, GroupShape, InspectionReport, MemoryShare, RankMemory, Room,
};
use llama_crds::v1alpha1::{ConditionType, GroupPhase, Placement};
use llama_operator::reconcile::fit::{MOST_FAILURES, least_gpu_memory};
use llama_operator::reconcile::observe::PodState;
use serde_json::{Value, json};
use support::{Cluster, deployment, report};

const MIB: u64 = 1 << 20;

/// A deployment under `planPolicy: Enforce`, changed by `changes`.
fn enforced(changes: &Value) -> Cluster {
    let mut object = deployment(changes);
    if changes.get("planPolicy").is_none() {
        object.spec.plan_policy = llama_crds::v1alpha1::PlanPolicy::Enforce;
    }
    Cluster::new(object)
}

fn change(cluster: &mut Cluster, changes: &Value) {
    let status = cluster.object.status.take();
    let generation = cluster.object.metadata.generation;
    cluster.object = enforced(changes).object;
    cluster.object.status = status;
    cluster.object.metadata.generation = generation.map(|number| number + 1);
}

fn inspected(memory: Option<u64>, fits: bool) -> InspectionReport {
    let share = MemoryShare {
        weight_bytes: 98 * MIB,
        reserve_bytes: 60 * MIB,
        adapter_bytes: 0,
        kv_cache_bytes: 360 * MIB,
    };
    InspectionReport {
        max_tokens: 8192,
        rank: share,
        pod: share,
        kv_bytes_per_token: 46_080,
        kv_head_replication: 1,
        needed_bytes: 518 * MIB,
        room: memory.map(|memory_bytes| Room {
            memory_bytes,
            sequences: if fits { 4 } else { 0 },
            total_tokens: if fits { 32_768 } else { 0 },
            fits,
        }),
        alternatives: Vec::new(),
        ..InspectionReport::default()
    }
}

fn does_not_fit() -> InspectionReport {
    InspectionReport {
        alternatives: vec![
            FittingChange {
                max_tokens: Some(2880),
                sequences: 1,
                ..FittingChange::default()
            },
            FittingChange {
                memory_bytes: Some(518 * MIB),
                sequences: 1,
                ..FittingChange::default()
            },
            FittingChange {
                layout: Some(GroupShape {
                    tensor: 3,
                    pipeline: 1,
                    nodes: 3,
                }),
                sequences: 2,
                ..FittingChange::default()
            },
        ],
        ..inspected(Some(256 * MIB), false)
    }
}

fn answer(cluster: &mut Cluster, report: &InspectionReport) {
    cluster.end_inspection(0, report.to_termination_message());
    cluster.settle();
}

fn said(cluster: &Cluster, type_: ConditionType) -> String {
    cluster.condition(type_).0
}

#[test]
fn pods_come_once_the_model_fits_and_it_is_inspected_once() {
    let mut cluster = enforced(&json!({"replicas": 2}));
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-inspect"]);
    assert_eq!(said(&cluster, ConditionType::Planned), "Unknown/Planning");
    assert_eq!(said(&cluster, ConditionType::Ready), "False/Planning");
    assert_eq!(said(&cluster, ConditionType::Stalled), "False/AsExpected");
    cluster.end_inspection(0, inspected(Some(1 << 30), true).to_termination_message());
    cluster.round();
    assert!(
        cluster.pod_names().contains(&"m-inspect".to_owned()),
        "status has the result first"
    );
    assert!(cluster.status().plan.is_some());
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0"]);
    let (verdict, message) = cluster.condition(ConditionType::Planned);
    assert_eq!(verdict, "True/Fits");
    assert_eq!(
        message,
        "4 sequences of 8192 tokens fit each group at the same time; needs 518 MiB for 1 sequence \
         of 8192 tokens (weights 98 MiB, KV cache 360 MiB, reserve 60 MiB), spec.resources.memory \
         is 1Gi"
    );
    cluster.bring_up();
    change(&mut cluster, &json!({"replicas": 3}));
    cluster.bring_up();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0", "m-2-0"]);
    // Every round is that of an operator that has just started; a group that fails is
    // made anew without an inspection.
    cluster.fail("m-0-0", &report(FailureCategory::RankDied, Some(0)));
    cluster.settle();
    cluster.advance(10);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0", "m-2-0"]);
}

#[test]
fn what_does_not_fit_gets_no_pods_and_is_told_what_would() {
    let mut cluster = enforced(&json!({"resources": {"memory": "256Mi"}}));
    cluster.settle();
    answer(&mut cluster, &does_not_fit());
    assert_eq!(cluster.pod_names(), [""; 0]);
    for (type_, verdict) in [
        (ConditionType::Planned, "False/NotFit"),
        (ConditionType::Ready, "False/NotFit"),
        (ConditionType::Stalled, "True/NotFit"),
        (ConditionType::Reconciling, "False/Settled"),
    ] {
        let (said, message) = cluster.condition(type_);
        assert_eq!(said, verdict, "{type_:?}");
        if type_ != ConditionType::Reconciling {
            assert!(
                message.ends_with(
                    "needs 518 MiB for 1 sequence of 8192 tokens (weights 98 MiB, KV cache 360 \
                     MiB, reserve 60 MiB), spec.resources.memory is 256Mi; set context.maxTokens \
                     to at most 2880, or resources.memory to at least 518Mi, or parallelism to \
                     tensor 3, pipeline 1, nodes 3"
                ),
                "{message}"
            );
        }
    }
    let plan = cluster.status().plan.expect("a plan");
    let specs = serde_json::to_value(&plan.alternatives).expect("serializes");
    assert_eq!(
        specs,
        json!([
            {"spec": {"context": {"maxTokens": 2880}}, "sequences": 1},
            {"spec": {"resources": {"memory": "518Mi"}}, "sequences": 1},
            {"spec": {"parallelism": {"tensor": 3, "pipeline": 1, "nodes": 3}}, "sequences": 2},
        ])
    );
    cluster.advance(3600);
    assert_eq!(cluster.round(), 0, "nothing more is written");
    change(&mut cluster, &json!({"resources": {"memory": "518Mi"}}));
    cluster.settle();
    assert_eq!(said(&cluster, ConditionType::Planned), "Unknown/Planning");
    assert_eq!(said(&cluster, ConditionType::Stalled), "False/AsExpected");
    answer(&mut cluster, &inspected(Some(518 * MIB), true));
    assert_eq!(cluster.pod_names(), ["m-0-0"]);
}

#[test]
fn what_serves_goes_on_while_a_change_is_inspected_or_refused() {
    let mut cluster = enforced(&json!({"replicas": 2}));
    cluster.settle();
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    cluster.bring_up();
    let serving = cluster.pod_names();
    let uids = |cluster: &Cluster| -> Vec<Option<String>> {
        let pods = cluster.pods.iter();
        pods.filter(|pod| pod.metadata.name.as_deref() != Some("m-inspect"))
            .map(|pod: &Pod| pod.metadata.uid.clone())
            .collect()
    };
    let before = uids(&cluster);
    change(
        &mut cluster,
        &json!({"replicas": 2, "resources": {"memory": "256Mi"}}),
    );
    cluster.bring_up();
    assert_eq!(uids(&cluster), before, "while it is inspected");
    assert_eq!(said(&cluster, ConditionType::Available), "True/AsExpected");
    assert!(
        cluster.status().plan.is_some(),
        "the old plan stays meanwhile"
    );
    answer(&mut cluster, &does_not_fit());
    cluster.bring_up();
    assert_eq!(uids(&cluster), before, "and while it is refused");
    assert_eq!(said(&cluster, ConditionType::Ready), "False/NotFit");
    assert_eq!(said(&cluster, ConditionType::Available), "True/AsExpected");
    change(&mut cluster, &json!({"replicas": 2}));
    cluster.settle();
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    assert_eq!(cluster.pod_names(), serving);
    assert_eq!(uids(&cluster), before);
    assert_eq!(said(&cluster, ConditionType::Ready), "True/AllGroupsReady");
}

#[test]
fn a_warning_holds_nothing_up() {
    let little = json!({"planPolicy": "Warn", "resources": {"memory": "256Mi"}});
    let mut cluster = enforced(&little);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-inspect"]);
    answer(&mut cluster, &does_not_fit());
    assert_eq!(said(&cluster, ConditionType::Planned), "False/NotFit");
    assert_eq!(said(&cluster, ConditionType::Ready), "False/GroupsStarting");
    cluster.bring_up();
    assert_eq!(said(&cluster, ConditionType::Ready), "True/AllGroupsReady");
    change(
        &mut cluster,
        &json!({"planPolicy": "Disabled", "resources": {"memory": "256Mi"}}),
    );
    cluster.settle();
    assert_eq!(
        said(&cluster, ConditionType::Planned),
        "Unknown/PlanDisabled"
    );
}

#[test]
fn a_model_at_fault_is_told_as_its_worker_would_tell_it() {
    let mut cluster = enforced(&json!({}));
    cluster.settle();
    let missing = report(FailureCategory::ModelNotFound, None);
    cluster.end_inspection(64, missing.to_termination_message());
    cluster.settle();
    for (type_, verdict) in [
        (ConditionType::Planned, "False/InspectionFailed"),
        (ConditionType::Ready, "False/ModelNotFound"),
        (ConditionType::Stalled, "True/ModelNotFound"),
        (ConditionType::ModelReady, "False/ModelNotFound"),
    ] {
        let (said, message) = cluster.condition(type_);
        assert_eq!(said, verdict);
        assert!(
            message.ends_with(
                "ModelNotFound was seen in the test. Then change the spec, or delete pod \
                 m-inspect to try again."
            ),
            "{message}"
        );
    }
    cluster.advance(3600);
    assert_eq!(cluster.round(), 0, "the evidence is kept, nothing is tried");
    assert_eq!(cluster.pod_names(), ["m-inspect"]);
    cluster.delete("m-inspect", None);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-inspect"], "tried once more");
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    assert_eq!(cluster.status().inspection, None);
    assert_eq!(cluster.pod_names(), ["m-0-0"]);
}

#[test]
fn other_failures_are_tried_again_so_many_times() {
    let mut cluster = enforced(&json!({}));
    cluster.settle();
    for failure in 1..MOST_FAILURES {
        cluster.end_inspection(137, String::new());
        cluster.settle();
        assert_eq!(cluster.pod_names(), [""; 0], "after {failure} failures");
        let (said, message) = cluster.condition(ConditionType::Planned);
        assert_eq!(said, "Unknown/InspectionFailed");
        assert!(message.contains("exit code 137"), "{message}");
        assert!(
            message.contains(&format!("attempt {} of 8", failure + 1)),
            "{message}"
        );
        cluster.advance(9);
        cluster.settle();
        assert_eq!(cluster.pod_names(), [""; 0], "too early");
        cluster.advance(300);
        cluster.settle();
        assert_eq!(cluster.pod_names(), ["m-inspect"]);
    }
    cluster.end_inspection(137, String::new());
    cluster.settle();
    cluster.advance(3600);
    assert_eq!(cluster.round(), 0);
    assert_eq!(cluster.pod_names(), ["m-inspect"], "kept as evidence");
    assert_eq!(
        said(&cluster, ConditionType::Stalled),
        "True/ContainerExited"
    );
    change(&mut cluster, &json!({"context": {"maxTokens": 7}}));
    cluster.settle();
    cluster.settle();
    assert_eq!(said(&cluster, ConditionType::Planned), "Unknown/Planning");
    assert_eq!(cluster.status().inspection, None);
}

#[test]
fn a_pod_that_cannot_start_is_told() {
    let image = json!({"reference": "models:1", "path": "/m.gguf"});
    let mut cluster = enforced(&json!({"model": {"source": {"pvc": null, "image": image}}}));
    cluster.settle();
    cluster.schedule();
    cluster.wait("m-inspect", "fetch-model", "ErrImagePull", "not found");
    cluster.settle();
    let (verdict, message) = cluster.condition(ConditionType::Ready);
    assert_eq!(verdict, "False/ModelImagePullFailed");
    assert!(
        message.contains("pod m-inspect") && message.contains("models:1"),
        "{message}"
    );
    assert_eq!(
        said(&cluster, ConditionType::Planned),
        "Unknown/InspectionFailed"
    );
    assert_eq!(
        said(&cluster, ConditionType::ModelReady),
        "False/ModelImagePullFailed"
    );
}

#[test]
fn gpus_of_unknown_size_are_planned_without_a_verdict() {
    let gpus = json!({"resources": {"accelerator": "Gpu"}});
    let mut cluster = enforced(&gpus);
    cluster.settle();
    let args = |cluster: &mut Cluster| {
        let pod = cluster.pod_mut("m-inspect").clone();
        let spec = pod.spec.expect("a spec");
        spec.containers[0]
            .args
            .clone()
            .expect("arguments")
            .join(" ")
    };
    assert!(!args(&mut cluster).contains("--memory-bytes"));
    answer(&mut cluster, &inspected(None, false));
    let (verdict, message) = cluster.condition(ConditionType::Planned);
    assert_eq!(verdict, "Unknown/GPUMemoryUnknown");
    assert!(message.contains("spec.resources.gpu.memory"), "{message}");
    assert_eq!(cluster.pod_names(), ["m-0-0"], "pods are created");

    // Labels come later: it is inspected with them, and then whatever they say.
    cluster.observed.gpu_memory = Some(80 << 30);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-inspect"]);
    assert!(args(&mut cluster).contains("--memory-bytes=85899345920"));
    answer(&mut cluster, &inspected(Some(80 << 30), true));
    assert_eq!(said(&cluster, ConditionType::Planned), "True/Fits");
    for seen in [None, Some(40 << 30)] {
        cluster.observed.gpu_memory = seen;
        assert_eq!(cluster.round(), 0, "{seen:?}");
    }
}

#[test]
fn the_smallest_gpu_of_the_nodes_that_pods_may_run_on_counts() {
    let node = |mib: &str, pool: &str, taint: Option<Value>| -> Node {
        serde_json::from_value(json!({
            "metadata": {"labels": {"nvidia.com/gpu.memory": mib, "pool": pool}},
            "spec": {"taints": taint.into_iter().collect::<Vec<_>>()},
        }))
        .expect("a node")
    };
    let taint = json!({"key": "gpu", "value": "yes", "effect": "NoSchedule"});
    let nodes = [
        node("81559", "a", None),
        node("40000", "b", None),
        node("24000", "a", Some(taint)),
        node("lots", "a", None),
    ];
    let least = |placement: Value| {
        let placement: Placement = serde_json::from_value(placement).expect("a placement");
        least_gpu_memory(&nodes, Some(&placement)).map(|bytes| bytes >> 20)
    };
    assert_eq!(least(json!({})), Some(40_000));
    let pool = json!({"pool": "a"});
    assert_eq!(least(json!({"nodeSelector": pool})), Some(81_559));
    let (first, open) = (json!({"pool": "a"}), json!([{"operator": "Exists"}]));
    let of = |name: &str, selector: &Value, tolerations: Value| json!({"name": name, "nodeSelector": selector, "tolerations": tolerations});
    let (a, b) = (
        of("a", &first, json!([])),
        of("b", &json!({"pool": "b"}), json!([])),
    );
    assert_eq!(least(json!({"pools": [a, b]})), Some(40_000));
    assert_eq!(least(json!({"pools": [a]})), Some(81_559));
    assert_eq!(
        least(json!({"pools": [b, of("c", &first, open)]})),
        Some(24_000)
    );
    assert_eq!(least(json!({"nodeSelector": {"pool": "c"}})), None);
    for (toleration, expected) in [
        (json!({"key": "gpu", "operator": "Exists"}), 24_000),
        (json!({"operator": "Exists"}), 24_000),
        (json!({"key": "gpu", "value": "yes"}), 24_000),
        (json!({"key": "gpu", "value": "no"}), 81_559),
        (
            json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}),
            81_559,
        ),
    ] {
        let placement = json!({"nodeSelector": pool, "tolerations": [toleration]});
        assert_eq!(least(placement), Some(expected), "{toleration}");
    }
}

#[test]
fn what_ranks_take_stands_beside_what_was_planned() {
    let two = json!({"parallelism": {"tensor": 3, "nodes": 3}, "planPolicy": "Enforce"});
    let mut cluster = enforced(&two);
    cluster.settle();
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    cluster.bring_up();
    let tell = |cluster: &mut Cluster, name: &str, used: u64, kept: u64| {
        let uid = cluster.pod_mut(name).metadata.uid.clone();
        let memory = Some(vec![RankMemory {
            used_bytes: used * MIB,
            kv_cache_bytes: kept * MIB,
        }]);
        let state = PodState {
            memory,
            ..PodState::default()
        };
        let states = &mut cluster.observed.states;
        states.insert(uid.expect("a UID"), state);
        cluster.settle();
        cluster.status().plan.expect("a plan").measured
    };
    assert_eq!(tell(&mut cluster, "m-0-0", 150, 10), None);
    assert_eq!(tell(&mut cluster, "m-0-1", 190, 42), None, "one is missing");
    // 98 of weights, 60 in reserve and 42 in the cache.
    let found = tell(&mut cluster, "m-0-2", 180, 42).expect("all have told");
    assert_eq!(found.used_bytes, 190 << 20);
    assert_eq!(found.planned_bytes, 200 << 20);
    assert_eq!((found.kv_cache_bytes, found.error_percent), (42 << 20, 5));
    // A little more is no news, and less is none either.
    assert_eq!(tell(&mut cluster, "m-0-0", 193, 42), Some(found));
    assert_eq!(tell(&mut cluster, "m-0-1", 20, 0), Some(found));
    let more = tell(&mut cluster, "m-0-0", 250, 92).expect("all have told");
    assert_eq!((more.used_bytes, more.error_percent), (250 << 20, 0));
}

#[test]
fn a_group_half_made_before_the_plan_changed_is_not_completed() {
    let two = json!({"parallelism": {"tensor": 2, "nodes": 2}});
    let mut cluster = enforced(&two);
    cluster.settle();
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    cluster.delete("m-0-1", None);
    let more =
        json!({"parallelism": {"tensor": 2, "nodes": 2}, "context": {"minConcurrentSequences": 9}});
    change(&mut cluster, &more);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-inspect"]);
    assert_eq!(cluster.status().groups[0].phase, GroupPhase::Scheduling);
    answer(&mut cluster, &inspected(Some(1 << 30), true));
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-0-1"]);
}
