//! What becomes of a `LlamaModel`, round by round: which pods fetch, and what status says.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod story;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::FailureCategory;
use llama_crds::v1alpha1::MAX_MODEL_NODES;
use llama_operator::cluster::known::KnownNode;
use llama_operator::models::{plan, status, validate};
use llama_operator::reconcile::observe::Claim;
use serde_json::{Value, json};
use story::{Story, node, nodes, object, spec};
use support::bound_claim;

fn table(rows: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
    let row = |(name, phase): &(&str, &'static str)| ((*name).to_owned(), *phase);
    rows.iter().map(row).collect()
}

#[test]
fn the_pod_runs_what_a_worker_s_init_container_does_on_one_node() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/samples");
    let text = std::fs::read(folder.join("llama-model.yaml")).expect("a sample");
    let mut sample: Value = serde_yaml::from_slice(&text).expect("YAML");
    sample["metadata"]["namespace"] = json!("team");
    sample["metadata"]["uid"] = json!("uid-m");
    let mut story = Story::new(&spec(), Vec::new());
    story.object = serde_json::from_value(sample).expect("a LlamaModel");
    let labels = &story
        .object
        .spec
        .nodes
        .clone()
        .expect("given")
        .node_selector;
    story.nodes = Some(vec![KnownNode {
        labels: Arc::new(labels.clone()),
        ..node("node-a")
    }]);
    insta::assert_yaml_snapshot!(story.plan().create);
}

#[test]
fn nodes_fetch_some_at_a_time_and_their_pods_go_when_they_are_done() {
    let mut story = Story::new(&spec(), nodes(6));
    story.settle();
    assert_eq!(story.pods.len(), 4);
    for index in 0..4 {
        story.runs(&format!("node-00{index}"));
    }
    story.succeeds("node-001");
    story.round();
    // Told first: who is stopped here looks at the same pod again.
    assert!(story.has_pod("node-001"));
    assert_eq!(story.entry("node-001").phase.as_str(), "Ready");
    story.settle();
    assert!(!story.has_pod("node-001") && story.has_pod("node-004"));
    assert_eq!(story.pods.len(), 4);
    story.bring_up();
    assert!(story.pods.is_empty());
    let (condition, message) = story.ready();
    assert_eq!(condition, "True/Fetched");
    assert_eq!(message, "6 of 6 nodes hold it");
    let status = story.status();
    assert_eq!((status.desired_copies, status.ready_copies), (6, 6));
    assert_eq!(status.used_by, ["chat"]);
    assert_eq!(status.identity.map(|text| text.len()), Some(32));
    let told: Vec<_> = story.notices.iter().map(|notice| &notice.reason).collect();
    assert_eq!(told, ["Fetched"]);
}

#[test]
fn status_says_how_far_each_node_is() {
    let mut story = Story::new(&spec(), nodes(3));
    story.settle();
    assert_eq!(story.ready().0, "False/Fetching");
    story.succeeds("node-000");
    story.runs("node-001");
    story.says("node-001", 61, 100);
    story.settle();
    let entry = story.entry("node-001");
    assert_eq!(entry.progress.map(|progress| progress.percent), Some(61));
    let message = entry.message.expect("a message");
    assert!(
        message.contains("on node node-001 is fetching the model: 61 %"),
        "{message}"
    );
    let (_, message) = story.ready();
    let expected = "1 of 3 nodes hold it; node-001 has fetched 61 % (1.00 GiB/s, about 22 s left); \
                    node-002 pod m-fetch-";
    assert!(message.starts_with(expected), "{message}");
    assert_eq!(story.plan().wake_after, Some(Duration::from_secs(5)));
}

#[test]
fn what_would_repeat_is_kept_and_named_until_somebody_acts() {
    let mut story = Story::new(&spec(), nodes(2));
    story.settle();
    story.fails("node-000", FailureCategory::DigestMismatch);
    story.settle();
    let entry = story.entry("node-000");
    assert_eq!((entry.failures, entry.stopped), (1, true));
    let (condition, message) = story.ready();
    assert_eq!(condition, "False/DigestMismatch");
    assert!(
        message.contains("node-000: DigestMismatch was seen in the test"),
        "{message}"
    );
    assert_eq!(story.notices.len(), 1, "{:?}", story.notices);
    story.advance(Duration::from_hours(2));
    story.settle();
    assert!(story.has_pod("node-000"), "the evidence stays");
    // Somebody deletes it: another try.
    let failed = story.pod("node-000").metadata.uid.clone();
    story.pods.retain(|pod| pod.metadata.uid != failed);
    story.settle();
    assert_ne!(story.pod("node-000").metadata.uid, failed);
    let entry = story.entry("node-000");
    assert_eq!((entry.failures, entry.stopped), (0, false));
    // Nobody does: another try a day later.
    story.fails("node-000", FailureCategory::InsufficientStorage);
    story.settle();
    let failed = story.pod("node-000").metadata.uid.clone();
    story.advance(Duration::from_hours(25));
    story.settle();
    assert_ne!(story.pod("node-000").metadata.uid, failed);
}

#[test]
fn other_failures_are_tried_again_with_pauses_and_not_for_ever() {
    let mut story = Story::new(&spec(), nodes(1));
    let mut pauses = Vec::new();
    for failures in 1..=plan::MOST_FAILURES {
        story.settle();
        story.fails("node-000", FailureCategory::SourceUnreachable);
        story.settle();
        assert_eq!(story.entry("node-000").failures, failures);
        assert!(story.has_pod("node-000"), "the last one is kept");
        let left = story.plan().wake_after.expect("a time");
        story.advance(left);
        pauses.push(left.as_secs());
    }
    assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300, 24 * 3600]);
    // A success starts over.
    story.settle();
    story.succeeds("node-000");
    story.settle();
    let entry = story.entry("node-000");
    assert_eq!((entry.failures, entry.phase.as_str()), (0, "Ready"));
    assert_eq!(entry.message, None);
}

#[test]
fn nodes_come_and_go() {
    let mut story = Story::new(&spec(), nodes(2));
    story.bring_up();
    let mut more = nodes(3);
    // A node that takes no pods keeps what it has, and one that has nothing gets nothing.
    more[0].open = false;
    more.push(KnownNode {
        open: false,
        ..node("node-closed")
    });
    // Another machine of the same name has nothing.
    more[1].created = Some(
        story
            .now
            .checked_add(SignedDuration::from_secs(1))
            .expect("a time"),
    );
    story.nodes = Some(more);
    story.settle();
    let expected = [
        ("node-000", "Ready"),
        ("node-001", "Waiting"),
        ("node-002", "Waiting"),
    ];
    assert_eq!(story.phases(), table(&expected));
    assert!(!story.has_pod("node-000") && story.has_pod("node-001"));
    story.advance(Duration::from_secs(5));
    story.nodes = Some(nodes(1));
    story.bring_up();
    assert_eq!(story.phases(), table(&[("node-000", "Ready")]));
    assert!(story.pods.is_empty(), "pods of nodes that are gone go");
    story.nodes = Some(Vec::new());
    story.settle();
    assert_eq!(story.ready().0, "False/NoNodes");
}

#[test]
fn a_fetch_goes_on_while_its_node_takes_no_pods() {
    let mut story = Story::new(&spec(), nodes(1));
    story.settle();
    story.runs("node-000");
    story.settle();
    let closed = KnownNode {
        open: false,
        ..node("node-000")
    };
    story.nodes = Some(vec![closed]);
    story.settle();
    assert!(story.has_pod("node-000"));
    story.pods.clear();
    story.settle();
    assert!(story.pods.is_empty() && story.status().nodes.is_empty());
    story.nodes = Some(nodes(1));
    story.bring_up();
    assert_eq!(story.phases(), table(&[("node-000", "Ready")]));
}

#[test]
fn one_that_is_to_be_left_alone_keeps_its_word() {
    let mut story = Story::new(&spec(), nodes(1));
    story.bring_up();
    let paused = status::of_paused(&story.status(), Some(2), story.now);
    assert_eq!(paused.nodes, story.status().nodes);
    let ready = status::ready(&paused).expect("the condition is set");
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_str()),
        ("True", "Paused")
    );
    assert!(
        ready.message.contains("llmops.dev/paused"),
        "{}",
        ready.message
    );
}

#[test]
fn labels_and_taints_say_which_nodes() {
    let mut spec = spec();
    spec["nodes"] = json!({
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    });
    let taint = |key: &str| {
        let taint = json!({"key": key, "effect": "NoSchedule"});
        Arc::new(vec![serde_json::from_value(taint).expect("a taint")])
    };
    let labels = Arc::new(BTreeMap::from([("pool".to_owned(), "gpu".to_owned())]));
    let of = |name: &str, key: &str| KnownNode {
        labels: Arc::clone(&labels),
        taints: taint(key),
        ..node(name)
    };
    let all = vec![of("a", "gpu"), of("b", "other"), node("c")];
    let mut story = Story::new(&spec, all);
    story.bring_up();
    assert_eq!(story.phases(), table(&[("a", "Ready")]));
    assert_eq!(story.ready().1, "1 of 1 node holds it");
}

#[test]
fn a_copy_is_looked_after_once_in_a_while() {
    let mut story = Story::new(&spec(), nodes(1));
    story.bring_up();
    assert_eq!(story.plan().wake_after, Some(Duration::from_hours(24)));
    story.advance(Duration::from_hours(24));
    story.settle();
    story.runs("node-000");
    story.says("node-000", 0, 0);
    story.settle();
    assert_eq!(story.ready().0, "True/Fetched", "it is only looked at");
    // It is not there any more.
    story.says("node-000", 10, 100);
    story.settle();
    assert_eq!(story.entry("node-000").phase.as_str(), "Fetching");
    assert_eq!(story.ready().0, "False/Fetching");
    story.succeeds("node-000");
    story.settle();
    assert!(story.pods.is_empty());
    assert_eq!(story.plan().wake_after, Some(Duration::from_hours(24)));
}

#[test]
fn another_model_is_fetched_anew_and_the_same_from_elsewhere_is_not() {
    let mut story = Story::new(&spec(), nodes(2));
    story.bring_up();
    let identity = story.status().identity;
    let mut elsewhere = spec();
    elsewhere["source"]["http"]["url"] = json!("https://mirror.example");
    story.object.spec = object(&elsewhere).spec;
    story.settle();
    assert!(story.pods.is_empty());
    assert_eq!(story.ready().0, "True/Fetched");
    let mut other = spec();
    other["source"]["http"]["files"][0]["sha256"] = json!("1".repeat(64));
    story.object.spec = object(&other).spec;
    story.settle();
    assert_ne!(story.status().identity, identity);
    let expected = [("node-000", "Waiting"), ("node-001", "Waiting")];
    assert_eq!(story.phases(), table(&expected));
    // While they fetch, the spec changes again: the old pods make way.
    let old = story.pods.len();
    let mut third = other.clone();
    third["cache"]["claimName"] = json!("others");
    story.object.spec = object(&third).spec;
    story.round();
    story.settle();
    assert_eq!(story.pods.len(), old);
    let text = serde_json::to_string(&story.pods).expect("JSON");
    assert!(text.contains("others") && !text.contains("\"models\""));
}

#[test]
fn what_waits_for_somebody_keeps_no_other_node_from_fetching() {
    let mut story = Story::new(&spec(), nodes(6));
    story.settle();
    let stuck = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/6 nodes are available: 1 Insufficient memory."});
    story.set(
        "node-000",
        json!({"phase": "Pending", "conditions": [stuck]}),
    );
    story.settle();
    assert_eq!(story.pods.len(), 5);
    let entry = story.entry("node-000");
    assert_eq!(entry.phase.as_str(), "Waiting");
    let message = entry.message.expect("a message");
    assert!(message.contains("Insufficient memory"), "{message}");
}

#[test]
fn a_shared_copy_needs_one_pod_and_no_look_at_nodes() {
    let mut shared = spec();
    shared["copies"] = json!("Shared");
    let mut story = Story::new(&shared, Vec::new());
    story.nodes = None;
    story.settle();
    assert_eq!(story.pods.len(), 1);
    assert_eq!(story.pods[0].spec.as_ref().expect("a spec").affinity, None);
    story.runs("any");
    story.says("any", 1, 4);
    story.settle();
    let (_, message) = story.ready();
    assert!(
        message.starts_with("the copy is not whole; it has fetched 25 %"),
        "{message}"
    );
    story.succeeds("any");
    story.settle();
    assert_eq!(
        story.ready(),
        ("True/Fetched".to_owned(), "the copy is whole".to_owned())
    );

    let mut story = Story::new(&spec(), Vec::new());
    story.nodes = None;
    story.settle();
    let (condition, message) = story.ready();
    assert_eq!(condition, "False/NodesNotVisible");
    assert!(message.contains("spec.copies"), "{message}");
}

#[test]
fn without_a_claim_no_pod_is_made() {
    let mut story = Story::new(&spec(), nodes(2));
    story.claim = Claim::Missing;
    story.settle();
    assert!(story.pods.is_empty());
    let (condition, message) = story.ready();
    assert_eq!(condition, "False/PersistentVolumeClaimNotFound");
    assert!(
        message.contains("PersistentVolumeClaim models of spec.cache"),
        "{message}"
    );
    assert_eq!(story.plan().wake_after, Some(Duration::from_secs(10)));
    story.claim = bound_claim();
    story.settle();
    assert_eq!(story.pods.len(), 2);
}

#[test]
fn a_status_never_grows_beyond_its_bound() {
    let mut story = Story::new(&spec(), nodes(MAX_MODEL_NODES + 4));
    story.bring_up();
    let (condition, message) = story.ready();
    assert_eq!(condition, "True/Fetched");
    assert!(message.contains("4 more nodes match"), "{message}");
    // Who is on record stays there.
    let mut more = vec![node("a-new-one")];
    more.extend(nodes(MAX_MODEL_NODES));
    story.nodes = Some(more);
    story.settle();
    assert!(story.pods.is_empty());
    assert_eq!(story.status().nodes.len(), MAX_MODEL_NODES);
}

#[test]
fn pods_of_an_earlier_object_of_the_name_make_way() {
    let mut story = Story::new(&spec(), nodes(1));
    story.settle();
    let pod = story.pod("node-000");
    let owners = pod.metadata.owner_references.as_mut().expect("owners");
    owners[0].uid = "uid-before".to_owned();
    pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    story.settle();
    assert_eq!(story.pods.len(), 1);
    let message = story.entry("node-000").message.expect("a message");
    assert!(message.starts_with("waits for pod m-fetch-"), "{message}");
    // Nobody's: the garbage collector leaves it, and we do not.
    let pod = story.pod("node-000");
    pod.metadata.owner_references = None;
    pod.metadata.deletion_timestamp = None;
    let uid = pod.metadata.uid.clone();
    story.settle();
    assert_ne!(story.pod("node-000").metadata.uid, uid);
}

#[test]
fn bad_specs_are_refused_by_the_name_of_the_field() {
    let digest = "0".repeat(64);
    for (field, value, words) in [
        (
            "/source",
            json!({"pvc": {"claimName": "c", "path": "m"}}),
            "spec.source must be one",
        ),
        (
            "/source",
            json!({"s3": {"uri": "s3://b/p"}}),
            "spec.source must be one",
        ),
        ("/cache/size", json!("1k"), "spec.cache.size"),
        (
            "/source/http/files",
            json!([{"name": "../m", "sha256": digest}]),
            "spec.source.http.files",
        ),
        ("/recheckEvery", json!("1s"), "spec.recheckEvery"),
        (
            "/maxConcurrentFetches",
            json!(0),
            "spec.maxConcurrentFetches",
        ),
    ] {
        let mut spec = spec();
        let (parent, last) = field.rsplit_once('/').expect("a pointer");
        spec.pointer_mut(parent).expect("a parent")[last] = value;
        let error = validate::validate(&object(&spec)).expect_err(field);
        let error = error.to_string();
        assert!(error.contains(words), "{field}: {error}");
    }
}
