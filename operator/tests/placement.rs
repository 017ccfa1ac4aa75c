//! Which nodes take a group, and what is said where none do.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use llama_crds::v1alpha1::{ConditionType, Placement};
use llama_operator::cluster::capacity::{Amounts, NodeRoom};
use llama_operator::reconcile::placement::{Need, place};
use serde_json::{Value, json};
use support::{Cluster, deployment};

/// A node of this kind and rack with so many free GPUs.
fn node(name: &str, kind: &str, rack: &str, gpus: u64) -> NodeRoom {
    let labels = [("gpu", kind), ("rack", rack)].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let taint = json!({"key": "gpu", "value": kind, "effect": "NoSchedule"});
    NodeRoom {
        name: name.to_owned(),
        labels: Arc::new(BTreeMap::from(labels)),
        taints: Arc::new(vec![serde_json::from_value(taint).expect("a taint")]),
        free: Amounts::from([
            ("nvidia.com/gpu".to_owned(), gpus * 1000),
            ("cpu".to_owned(), 8000),
        ]),
    }
}

fn tolerates(kind: &str) -> Value {
    json!([{"key": "gpu", "value": kind, "effect": "NoSchedule"}])
}

/// First h100, then a100.
fn pools() -> Value {
    json!(["h100", "a100"].map(|kind| json!({
        "name": kind, "nodeSelector": {"gpu": kind}, "tolerations": tolerates(kind),
    })))
}

/// The pool and the nodes of a group of `pods` that want eight GPUs each, or what is missing.
fn placed(placement: &Value, pods: usize, avoid: &[&str], nodes: &[NodeRoom]) -> String {
    let placement: Placement = serde_json::from_value(placement.clone()).expect("a placement");
    let need = Need {
        pods,
        each: Amounts::from([
            ("nvidia.com/gpu".to_owned(), 8000),
            ("cpu".to_owned(), 4000),
        ]),
        placement: &placement,
        avoid: avoid.iter().map(|name| (*name).to_owned()).collect(),
    };
    match place(&need, nodes) {
        Err(why) => why.0,
        Ok(found) => {
            let pool = found.pool.map_or("any", |pool| &pool.name);
            let names: Vec<_> = found.seats.into_iter().map(|seat| seat.node).collect();
            format!("{pool}: {}", names.join(" "))
        }
    }
}

#[test]
fn a_group_lies_wholly_in_the_first_pool_that_takes_it() {
    let placement = json!({"pools": pools()});
    let mut nodes = vec![
        node("a1", "a100", "r1", 8),
        node("a2", "a100", "r1", 8),
        node("h1", "h100", "r2", 8),
    ];
    // One of each pool would do if pools could be mixed.
    assert_eq!(placed(&placement, 2, &[], &nodes), "a100: a1 a2");
    assert_eq!(placed(&placement, 1, &[], &nodes), "h100: h1");
    nodes.push(node("h2", "h100", "r2", 8));
    assert_eq!(placed(&placement, 2, &[], &nodes), "h100: h1 h2");
}

#[test]
fn a_node_that_is_to_be_avoided_is_worse_than_the_next_pool() {
    let placement = json!({"pools": pools()});
    let nodes = [node("a1", "a100", "r1", 8), node("h1", "h100", "r2", 8)];
    assert_eq!(placed(&placement, 1, &["h1"], &nodes), "a100: a1");
    assert_eq!(placed(&placement, 1, &["h1", "a1"], &nodes), "h100: h1");
}

#[test]
fn labels_and_taints_of_all_pools_count_besides_those_of_one() {
    let nodes = [node("h1", "h100", "r1", 8), node("h2", "h100", "r2", 8)];
    let both = json!({"pools": pools(), "nodeSelector": {"rack": "r2"}});
    assert_eq!(placed(&both, 1, &[], &nodes), "h100: h2");
    let outside = json!({
        "tolerations": tolerates("h100"),
        "pools": [{"name": "any"}],
    });
    assert_eq!(placed(&outside, 1, &[], &nodes), "any: h1");
    let intolerant = json!({"pools": [{"name": "any"}]});
    let why = placed(&intolerant, 1, &[], &nodes);
    assert_eq!(
        why,
        "1 pod needs 8 nvidia.com/gpu free on its node; pool any: none of the 2 nodes that are \
         ready matches it"
    );
}

#[test]
fn what_each_pool_lacks_is_said() {
    let near = json!({"pools": pools(), "topology": {"required": "rack"}});
    let nodes = [
        node("h1", "h100", "r3", 8),
        node("h2", "h100", "r3", 6),
        node("h3", "h100", "r4", 5),
        node("a1", "a100", "r1", 4),
        node("a2", "a100", "r1", 0),
    ];
    assert_eq!(
        placed(&near, 2, &[], &nodes),
        "2 pods each need 8 nvidia.com/gpu free on their node within one rack; pool h100: best is \
         r3 with 8 and 6; pool a100: none has 8, a1 has 4"
    );
    let anywhere = json!({"pools": pools()});
    assert_eq!(
        placed(&anywhere, 2, &[], &nodes),
        "2 pods each need 8 nvidia.com/gpu free on their node; pool h100: h1 has 8, h2 has 6, h3 \
         has 5; pool a100: none has 8, a1 has 4"
    );
    let mut busy = node("a1", "a100", "r1", 8);
    busy.free.insert("cpu".to_owned(), 1000);
    let nodes = [node("h1", "h100", "r3", 2), busy];
    assert_eq!(
        placed(&anywhere, 1, &[], &nodes),
        "1 pod needs 8 nvidia.com/gpu free on its node; pool h100: none has 8, h1 has 2; pool \
         a100: none has 4 CPU, a1 has 1"
    );
}

#[test]
fn without_pools_the_words_are_of_all_nodes() {
    let everywhere = json!({"tolerations": [{"operator": "Exists"}]});
    let nodes = [node("h1", "h100", "r3", 6), node("a1", "a100", "r1", 2)];
    assert_eq!(
        placed(&everywhere, 2, &[], &nodes),
        "2 pods each need 8 nvidia.com/gpu free on their node; free now: h1 has 6, a1 has 2"
    );
}

fn with_pools(changes: &Value) -> Cluster {
    let mut spec = json!({"placement": {"pools": pools()}});
    let into = spec.as_object_mut().expect("an object");
    into.extend(changes.as_object().expect("an object").clone());
    Cluster::new(deployment(&spec))
}

#[test]
fn a_pod_alone_waits_for_its_pool_to_be_chosen() {
    let mut cluster = with_pools(&json!({}));
    cluster.nodes(&[]);
    let plan = cluster.plan();
    let spec = plan.create[0].spec.as_ref().expect("a spec");
    let gates = spec.scheduling_gates.as_ref().expect("gates");
    assert_eq!(gates[0].name, "llmops.dev/gang");
    assert_eq!(spec.node_selector, None, "the pool's comes with it");
}

#[test]
fn an_operator_that_sees_no_nodes_says_that_it_cannot_choose() {
    let mut cluster = with_pools(&json!({}));
    cluster.settle();
    assert!(cluster.pod_names().is_empty());
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/NodesNotVisible");
    assert!(said.contains("spec.placement.pools"), "{said}");
    assert_eq!(
        cluster.condition(ConditionType::Stalled).0,
        "True/NodesNotVisible"
    );
}

#[test]
fn the_pool_of_a_group_stands_in_status() {
    let mut cluster = with_pools(&json!({}));
    cluster.nodes(&[]);
    cluster.settle();
    assert_eq!(cluster.status().groups[0].pool, None);
    let labels = cluster.pod_mut("m-0-0").metadata.labels.as_mut();
    let labels = labels.expect("labels");
    labels.insert("llmops.dev/pool".to_owned(), "a100".to_owned());
    cluster.settle();
    assert_eq!(cluster.status().groups[0].pool.as_deref(), Some("a100"));
}

#[test]
fn the_pod_that_inspects_runs_in_any_pool() {
    let mut cluster = with_pools(&json!({"planPolicy": "Enforce"}));
    cluster.nodes(&[]);
    let pod = cluster.plan().fit.create.expect("an inspection pod");
    let spec = serde_json::to_value(pod.spec).expect("a spec");
    let terms = &spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        ["nodeSelectorTerms"];
    let values: BTreeSet<_> = terms
        .as_array()
        .expect("terms")
        .iter()
        .map(|term| term["matchExpressions"][0]["values"][0].as_str())
        .collect();
    assert_eq!(values, BTreeSet::from([Some("h100"), Some("a100")]));
    assert_eq!(spec["tolerations"].as_array().map(Vec::len), Some(2));
}

#[test]
fn room_for_a_further_group_is_looked_for_in_every_pool() {
    let spec = |restart: &str| json!({"placement": {"pools": pools()}, "restart": {"id": restart}});
    let room = |kind: &str, cpus: u64| {
        let mut room = node(kind, kind, "r1", 0);
        room.free = Amounts::from([
            ("cpu".to_owned(), cpus * 1000),
            ("memory".to_owned(), 1000 << 40),
            ("pods".to_owned(), 110_000),
        ]);
        room
    };
    let changed = |cpus: u64| {
        let mut cluster = Cluster::new(deployment(&spec("1")));
        cluster.observed.sees_nodes = true;
        cluster.observed.nodes = Some(vec![room("h100", 0), room("a100", cpus)]);
        cluster.settle();
        let pod = cluster.pod_mut("m-0-0").spec.as_mut().expect("a spec");
        pod.scheduling_gates = None;
        cluster.bring_up();
        cluster.set(&spec("2"));
        cluster.round();
        cluster
    };
    assert_eq!(
        changed(8).pod_names(),
        ["m-0-0", "m-1-0"],
        "a new group first"
    );
    let full = changed(0);
    assert_eq!(full.pod_names(), ["m-0-0"]);
    let said = full.status().rollout.expect("a rollout").message;
    assert!(said.contains("pool h100: none has 2; pool a100"), "{said}");
}
