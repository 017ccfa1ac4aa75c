//! LlamaDeployments in the states that pages tell of.

#![allow(
    dead_code,
    clippy::expect_used,
    reason = "each test program uses its part, and stops where it cannot go on"
)]

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use llama_crds::v1alpha1::LlamaDeployment;
use serde_json::{Value, json};

/// When pages are written: 2027-01-15T08:00:00Z.
pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("a time")
}

/// The time so many seconds before [`now`].
pub(crate) fn ago(seconds: i64) -> String {
    let time = Timestamp::from_second(1_800_000_000 - seconds).expect("a time");
    time.to_string()
}

pub(crate) fn condition(type_: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({
        "type": type_, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": ago(720), "observedGeneration": 3,
    })
}

/// Two groups of two pods of two ranks each, all serving.
pub(crate) fn healthy() -> Value {
    let group = |index: u32| {
        json!({
            "index": index, "revision": "7f9c", "epoch": 1, "phase": "Ready", "restarts": 0,
            "nodes": [format!("node-{}", 2 * index), format!("node-{}", 2 * index + 1)],
        })
    };
    json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {
            "name": "chat", "namespace": "team", "uid": "uid-chat", "generation": 3,
            "creationTimestamp": ago(90_000),
        },
        "spec": {
            "model": {
                "servedName": "llama-3.1-8b",
                "source": {"pvc": {"claimName": "models", "path": "llama-3.1-8b"}},
            },
            "parallelism": {"tensor": 4, "pipeline": 1, "nodes": 2},
            "resources": {"accelerator": "Cpu", "cpu": "8", "memory": "12Gi"},
            "context": {"maxTokens": 8192},
            "replicas": 2,
        },
        "status": {
            "observedGeneration": 3,
            "conditions": [
                condition("Ready", "True", "AllGroupsReady", "2 of 2 groups ready."),
                condition("Available", "True", "AsExpected", "2 groups serve."),
                condition("Reconciling", "False", "Settled", "Nothing is left to do."),
                condition("Stalled", "False", "AsExpected", "Nothing stands in the way."),
                condition("ModelReady", "True", "ModelLoaded", "The model was loaded."),
                condition("Scheduled", "True", "AllPodsScheduled", "4 of 4 pods have a node."),
                condition("Planned", "True", "Fits", "It fits."),
            ],
            "replicas": 2, "readyReplicas": 2, "updatedReplicas": 2,
            "currentRevision": "7f9c", "updatedRevision": "7f9c",
            "url": "http://chat.team.svc:8000/v1",
            "servedName": "llama-3.1-8b",
            "selfTests": [
                {"key": "k1", "answer": "d41d8cd9", "revision": "7f9c", "time": ago(80_000)},
            ],
            "plan": plan(),
            "groups": [group(0), group(1)],
        },
    })
}

/// The plan of [`healthy`].
pub(crate) fn plan() -> Value {
    json!({
        "inputs": "abcd",
        "model": {
            "architecture": "llama", "layers": 32, "heads": 32, "kvHeads": 8,
            "weightBytes": 16_060_522_496_i64, "maxTokens": 131_072,
        },
        "layout": {"tensor": 4, "pipeline": 1, "nodes": 2},
        "maxTokens": 8192,
        "perRank": {
            "weightBytes": 4_015_130_624_i64, "reserveBytes": 134_217_728, "adapterBytes": 0,
            "kvCacheBytes": 268_435_456,
        },
        "perPod": {
            "weightBytes": 8_030_261_248_i64, "reserveBytes": 268_435_456, "adapterBytes": 0,
            "kvCacheBytes": 536_870_912,
        },
        "kvBytesPerToken": 131_072,
        "kvHeadReplication": 1,
        "neededBytes": 8_835_567_616_i64,
        "memoryBytes": 12_884_901_888_i64,
        "fits": true,
        "maxSequencesAtMaxTokens": 8,
        "totalTokens": 69_632,
    })
}

/// Merges `changes` into `object`: objects by key, everything else replaced.
pub(crate) fn merged(mut object: Value, changes: &Value) -> Value {
    merge(&mut object, changes);
    object
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}

pub(crate) fn deployment(value: Value) -> LlamaDeployment {
    serde_json::from_value(value).expect("the test's object is valid")
}

/// Group 1 lost rank 3 and is tried again.
pub(crate) fn failing() -> Value {
    let message = "1 of 2 groups ready; group chat-1: rank 3 died";
    merged(
        healthy(),
        &json!({"status": {
            "readyReplicas": 1,
            "conditions": [
                condition("Ready", "False", "GroupRestarting", message),
                condition("Available", "True", "AsExpected", "1 group serves."),
                condition("Reconciling", "True", "GroupRestarting", message),
                condition("Stalled", "False", "AsExpected", "Nothing stands in the way."),
            ],
            "groups": [
                {
                    "index": 0, "revision": "7f9c", "epoch": 1, "phase": "Ready", "restarts": 0,
                    "nodes": ["node-0", "node-1"],
                },
                {
                    "index": 1, "revision": "7f9c", "epoch": 4, "phase": "Restarting",
                    "message": "is created again in 4s", "restarts": 3,
                    "lastFailure": {
                        "rank": 3, "node": "node-3", "reason": "RankDied",
                        "message": "rank 3 of group chat-1 ended with signal 9",
                        "time": ago(75),
                    },
                },
            ],
        }}),
    )
}

/// The model takes more than there is.
pub(crate) fn refused() -> Value {
    let message = "needs 16.8 GiB in each pod and has 12.0 GiB";
    merged(
        healthy(),
        &json!({"status": {
            "readyReplicas": 0, "updatedReplicas": 0, "replicas": 0,
            "selfTests": [], "groups": [], "currentRevision": null,
            "conditions": [
                condition("Ready", "False", "NotFit", message),
                condition("Stalled", "True", "NotFit", message),
                condition("Planned", "False", "NotFit", message),
            ],
            "plan": {
                "fits": false, "neededBytes": 17_985_175_552_i64,
                "perRank": {"weightBytes": 8_589_934_592_i64},
                "perPod": {"weightBytes": 17_179_869_184_i64},
                "maxSequencesAtMaxTokens": 0, "totalTokens": 0,
                "alternatives": [
                    {"spec": {"resources": {"memory": "17Gi"}}, "sequences": 1},
                    {"spec": {"parallelism": {"tensor": 8, "pipeline": 1, "nodes": 4}}, "sequences": 12},
                    {"spec": {"context": {"maxTokens": 2048}}, "sequences": 2},
                ],
            },
        }}),
    )
}

/// Half of the groups moved to a new revision; then somebody paused the rollout.
pub(crate) fn paused_rollout() -> Value {
    let message = "1 of 2 groups are of the new revision";
    merged(
        healthy(),
        &json!({
            "spec": {"rollout": {"paused": true}},
            "status": {
                "updatedReplicas": 1, "updatedRevision": "b210",
                "conditions": [
                    condition("Ready", "False", "RolloutPaused", message),
                    condition("Stalled", "True", "RolloutPaused", "spec.rollout.paused is set."),
                ],
                "rollout": {
                    "mode": "Surge", "message": "spec.rollout.paused is set", "updatedReady": 1,
                    "progressedAt": ago(300),
                },
            },
        }),
    )
}

/// Group 1 ends because one group is enough.
pub(crate) fn draining() -> Value {
    merged(
        healthy(),
        &json!({
            "spec": {"replicas": 1},
            "status": {"groups": [
                {
                    "index": 0, "revision": "7f9c", "epoch": 1, "phase": "Ready", "restarts": 0,
                    "nodes": ["node-0", "node-1"],
                },
                {
                    "index": 1, "revision": "7f9c", "epoch": 1, "phase": "Draining",
                    "message": "2 answers are under way", "restarts": 0,
                    "nodes": ["node-2", "node-3"],
                    "drain": {"reason": "ScaleDown", "since": ago(40)},
                },
            ]},
        }),
    )
}

/// Pod `node` of `group`, with `changes` merged in.
pub(crate) fn pod(group: u32, node: u32, changes: &Value) -> Pod {
    let pod = json!({
        "metadata": {
            "name": format!("chat-{group}-{node}"), "namespace": "team",
            "uid": format!("uid-{group}-{node}"),
            "labels": {
                "llmops.dev/deployment": "chat", "llmops.dev/group": group.to_string(),
                "llmops.dev/node": node.to_string(), "llmops.dev/revision": "7f9c",
                "llmops.dev/epoch": "1",
            },
        },
        "spec": {
            "nodeName": format!("node-{}", 2 * group + node),
            "containers": [{"name": "worker", "image": "worker:1"}],
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{
                "name": "worker", "image": "worker:1", "imageID": "", "ready": true,
                "restartCount": 0, "state": {"running": {}},
            }],
        },
    });
    serde_json::from_value(merged(pod, changes)).expect("a pod")
}

/// All pods of [`healthy`].
pub(crate) fn pods() -> Vec<Pod> {
    [(0, 0), (0, 1), (1, 0), (1, 1)]
        .map(|(group, node)| pod(group, node, &json!({})))
        .into()
}

/// A warning about the object `name` of `kind`, told `times` times.
pub(crate) fn warning(kind: &str, name: &str, reason: &str, seconds: i64, times: i32) -> Event {
    serde_json::from_value(json!({
        "metadata": {"name": format!("{name}.{reason}"), "namespace": "team"},
        "involvedObject": {"kind": kind, "name": name, "namespace": "team"},
        "type": "Warning", "reason": reason,
        "message": format!("{reason} of\n{name}"),
        "lastTimestamp": ago(seconds), "count": times,
    }))
    .expect("an event")
}
