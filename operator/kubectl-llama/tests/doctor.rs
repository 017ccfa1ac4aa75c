//! What the check-up finds about LlamaDeployments: facts in, findings out.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "support/check_up.rs"]
mod check_up;
mod support;

use std::collections::BTreeMap;

use check_up::{claim, facts, subject, with_subject, wrong};
use kubectl_llama::Health;
use kubectl_llama::doctor::checks;
use kubectl_llama::doctor::facts::{Reference, Seen, Target, references};
use kubectl_llama::doctor::finding::{Finding, health, page};
use serde_json::{Value, json};
use support::{ago, deployment, failing, healthy, merged, now, pod, refused};

#[test]
fn all_is_well() {
    let findings = checks::all(&facts(), now());
    assert_eq!(health(&findings), Health::Good);
    insta::assert_snapshot!(page(&findings));
}

#[test]
fn failures_and_warnings_have_a_next_step() {
    let mut facts = with_subject(subject(failing()));
    facts.operators = Seen::Known(Vec::new());
    let findings = checks::all(&facts, now());
    assert_eq!(health(&findings), Health::Bad);
    insta::assert_snapshot!(page(&findings));
}

#[test]
fn what_the_status_says_is_wrong_is_found() {
    let case = |object: Value, expected: &str| {
        let said = wrong(&with_subject(subject(object)));
        assert!(
            said.len() == 1 && said[0].contains(expected),
            "{expected}: {said:?}"
        );
    };
    case(
        merged(
            healthy(),
            &json!({"metadata": {"annotations": {"llmops.dev/paused": "true"}}}),
        ),
        "Warn team/chat: the annotation llmops.dev/paused",
    );
    case(
        merged(healthy(), &json!({"metadata": {"generation": 4}})),
        "Fail team/chat: its status does not speak of its spec",
    );
    case(
        merged(
            healthy(),
            &json!({"metadata": {
                "deletionTimestamp": ago(1200), "finalizers": ["foregroundDeletion"],
            }}),
        ),
        "Fail team/chat: is being deleted for 20m, held by the finalizers foregroundDeletion",
    );
    case(
        refused(),
        "Fail team/chat: NotFit: needs 16.8 GiB in each pod and has 12.0 GiB -> kubectl llama -n team plan chat",
    );
    case(
        merged(
            support::paused_rollout(),
            &json!({"status": {"conditions": []}}),
        ),
        "Warn team/chat: its rollout is paused: spec.rollout.paused is set",
    );
    case(
        merged(
            healthy(),
            &json!({"status": {"rollout": {"failure": {
                "revision": "b210", "reason": "RankDied", "message": "rank 0 died",
            }}}}),
        ),
        "Fail team/chat: revision b210 was given up: RankDied: rank 0 died",
    );
    case(
        merged(healthy(), &json!({"spec": {"parallelism": {"nodes": 3}}})),
        "Fail team/chat: spec.parallelism.tensor 4 times pipeline 1 is not a multiple of nodes 3",
    );
}

#[test]
fn groups_that_failed_are_told_with_cause_and_next_step() {
    let mut object = failing();
    let said = wrong(&with_subject(subject(object.clone())));
    assert_eq!(
        said,
        [
            "Warn team/chat: failed 3 times in a row and is tried again: group chat-1: rank 3: RankDied, pod chat-1-1, node node-3, 75s ago: rank 3 of group chat-1 ended with signal 9 -> kubectl llama -n team logs chat --group 1"
        ]
    );
    object["status"]["groups"][1]["phase"] = json!("Failed");
    object["status"]["groups"][1]["lastFailure"]["reason"] = json!("OOMKilled");
    let said = wrong(&with_subject(subject(object)));
    assert!(
        said[0].starts_with(
            "Fail team/chat: failed and is not tried again: group chat-1: rank 3: OOMKilled"
        ) && said[0].ends_with("raise spec.resources.memory; kubectl llama -n team plan chat"),
        "{said:?}"
    );
}

#[test]
fn a_deletion_that_has_just_begun_is_no_finding() {
    let object = merged(
        healthy(),
        &json!({"metadata": {"deletionTimestamp": ago(5)}}),
    );
    assert_eq!(wrong(&with_subject(subject(object))), [""; 0]);
}

#[test]
fn claims_and_secrets_must_be_there_and_fit() {
    let models = || Reference::Claim("models".to_owned());
    for (target, expected) in [
        (
            Target::Missing,
            Some("Fail team/chat: PersistentVolumeClaim models does not exist in namespace team"),
        ),
        (
            claim("Pending", &["ReadOnlyMany"]),
            Some("Fail team/chat: PersistentVolumeClaim models is not bound to a volume yet"),
        ),
        (
            claim("Bound", &["ReadWriteOnce"]),
            Some(
                "Warn team/chat: PersistentVolumeClaim models has the access modes ReadWriteOnce, which 4 pods",
            ),
        ),
        (
            claim("Bound", &["ReadWriteOncePod"]),
            Some(
                "Fail team/chat: PersistentVolumeClaim models has the access modes ReadWriteOncePod",
            ),
        ),
        (claim("Bound", &["ReadWriteMany"]), None),
    ] {
        let mut subject = subject(healthy());
        subject.targets = BTreeMap::from([(models(), Seen::Known(target))]);
        let said = wrong(&with_subject(subject));
        match expected {
            None => assert_eq!(said, [""; 0]),
            Some(text) => assert!(said.len() == 1 && said[0].starts_with(text), "{said:?}"),
        }
    }
    let mut with_secrets = subject(healthy());
    let secret = |name: &str| Reference::Secret(name.to_owned());
    with_secrets.targets = BTreeMap::from([
        (secret("a"), Seen::Known(Target::There)),
        (secret("b"), Seen::Known(Target::Missing)),
        (
            secret("c"),
            Seen::Hidden("cannot read Secret team/c".to_owned()),
        ),
    ]);
    let said = wrong(&with_subject(with_secrets));
    assert!(said[0].starts_with("Fail team/chat: Secret b does not exist in namespace team"));
    assert_eq!(said[1], "Skip team/chat: cannot read Secret team/c");
}

/// A model on a store, kept in a cache.
fn fetched() -> Value {
    let mut object = healthy();
    object["spec"]["model"] = json!({
        "source": {"s3": {
            "uri": "s3://models/chat.gguf",
            "files": [{"name": "chat.gguf", "sha256": "0".repeat(64)}],
            "secretRef": {"name": "store"}, "caConfigMapRef": {"name": "trust", "key": "ca.crt"},
        }},
        "cache": {"claimName": "cache", "size": "10Gi"},
    });
    object
}

#[test]
fn what_a_source_refers_to_is_known_before_there_are_pods() {
    let all: Vec<_> = references(&deployment(fetched()), &[])
        .iter()
        .map(|one| format!("{}/{}", one.kind(), one.name()))
        .collect();
    assert_eq!(
        all,
        [
            "Secret/store",
            "ConfigMap/trust",
            "PersistentVolumeClaim/cache"
        ]
    );
}

#[test]
fn a_cache_must_be_writable_by_all_pods() {
    let cache = Reference::Claim("cache".to_owned());
    let with = |modes: &[&str]| {
        let mut subject = subject(fetched());
        let text = serde_json::to_value(match claim("Bound", modes) {
            Target::Claim(claim) => claim,
            other => unreachable!("{other:?} is no claim"),
        });
        let named = merged(text.expect("JSON"), &json!({"metadata": {"name": "cache"}}));
        let target = Target::Claim(serde_json::from_value(named).expect("a claim"));
        subject.targets = BTreeMap::from([(cache.clone(), Seen::Known(target))]);
        wrong(&with_subject(subject))
    };
    assert_eq!(with(&["ReadWriteMany"]), [""; 0]);
    let said = with(&["ReadOnlyMany"]);
    assert!(
        said[0].starts_with("Fail") && said[0].contains("must be written to"),
        "{said:?}"
    );
    let said = with(&["ReadWriteOnce", "ReadOnlyMany"]);
    assert!(
        said[0].starts_with("Warn") && said[0].contains("4 pods"),
        "{said:?}"
    );
}

#[test]
fn references_are_those_that_pods_cannot_do_without() {
    let pod = pod(
        0,
        0,
        &json!({"spec": {
            "volumes": [
                {"name": "a", "secret": {"secretName": "s1"}},
                {"name": "b", "secret": {"secretName": "s2", "optional": true}},
                {"name": "c", "configMap": {"name": "m1"}},
                {"name": "d", "persistentVolumeClaim": {"claimName": "cache"}},
            ],
            "initContainers": [{"name": "i", "envFrom": [
                {"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "m2", "optional": true}},
            ]}],
            "containers": [{"name": "worker", "env": [
                {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s4", "key": "k"}}},
                {"name": "Y", "valueFrom": {"configMapKeyRef": {"name": "m3", "key": "k"}}},
                {"name": "Z", "value": "z"},
            ]}],
        }}),
    );
    let all = references(&deployment(healthy()), &[pod]);
    let names: Vec<_> = all
        .iter()
        .map(|one| format!("{}/{}", one.kind(), one.name()))
        .collect();
    assert_eq!(
        names,
        [
            "Secret/s1",
            "Secret/s3",
            "Secret/s4",
            "ConfigMap/m1",
            "ConfigMap/m3",
            "PersistentVolumeClaim/cache",
            "PersistentVolumeClaim/models",
        ]
    );
}

#[test]
fn pods_that_do_not_run_are_told_with_why() {
    let container = |state: Value| {
        json!({"status": {"phase": "Pending", "containerStatuses": [{
            "name": "worker", "image": "worker:1", "imageID": "", "ready": false,
            "restartCount": 0, "state": state,
        }]}})
    };
    let unschedulable = json!({
        "spec": {"nodeName": null},
        "status": {"phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/4 nodes are available: insufficient memory.",
        }]},
    });
    let gated = json!({"spec": {
        "nodeName": null, "schedulingGates": [{"name": "llmops.dev/gang"}],
    }});
    let evicted = json!({"status": {
        "phase": "Failed", "reason": "Evicted", "message": "low on memory",
        "containerStatuses": null,
    }});
    for (changes, expected) in [
        (
            container(json!({"waiting": {"reason": "ErrImagePull", "message": "not found"}})),
            "Fail team/chat: pod chat-0-0: worker image worker:1 cannot be pulled on node node-0 (ErrImagePull): not found -> kubectl -n team describe pod chat-0-0",
        ),
        (
            container(json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})),
            "Fail team/chat: pod chat-0-0: OOMKilled: container worker of pod chat-0-0 on node node-0 was killed: a container of the pod used more than its memory limit of 12Gi -> raise spec.resources.memory; kubectl llama -n team plan chat",
        ),
        (
            unschedulable,
            "Fail team/chat: pod chat-0-0: cannot be scheduled: 0/4 nodes are available: insufficient memory. -> free or add nodes, or change spec.placement or spec.resources",
        ),
        (
            gated,
            "Warn team/chat: pod chat-0-0: waits until there are nodes for all pods of its group -> kubectl llama -n team status chat",
        ),
        (
            evicted,
            "Fail team/chat: pod chat-0-0: PodEvicted: pod chat-0-0 on node node-0 ended: low on memory -> kubectl llama -n team logs chat --group 0",
        ),
        (
            json!({"metadata": {"deletionTimestamp": ago(300)}}),
            "Fail team/chat: pod chat-0-0: should be gone for 5m, and is not; its node is node-0 -> see whether the node answers: kubectl get node node-0; where it is lost for good, delete the Node",
        ),
    ] {
        let mut subject = subject(healthy());
        subject.pods = vec![pod(0, 0, &changes)];
        assert_eq!(wrong(&with_subject(subject)), [expected]);
    }
    let mut going = subject(healthy());
    going.pods = vec![pod(
        0,
        0,
        &json!({"metadata": {"deletionTimestamp": ago(30)}}),
    )];
    assert_eq!(wrong(&with_subject(going)), [""; 0]);
}

#[test]
fn pods_of_which_the_same_is_to_be_said_share_a_line() {
    let gated = json!({"spec": {
        "nodeName": null, "schedulingGates": [{"name": "llmops.dev/gang"}],
    }});
    let mut subject = subject(healthy());
    subject.pods = (0..6).map(|group| pod(group, 0, &gated)).collect();
    let said = wrong(&with_subject(subject));
    assert_eq!(said.len(), 1);
    assert!(
        said[0].contains("pod chat-0-0, chat-1-0, chat-2-0, chat-3-0, 2 more: waits"),
        "{said:?}"
    );
}

#[test]
fn findings_are_data_too() {
    let finding = Finding::warn("team/chat", "is paused", "go on");
    let value = serde_json::to_value([finding, Finding::ok("nodes", "all well")]).expect("JSON");
    assert_eq!(
        value,
        json!([
            {"level": "WARN", "about": "team/chat", "message": "is paused", "next": "go on"},
            {"level": "OK", "about": "nodes", "message": "all well"},
        ])
    );
}
