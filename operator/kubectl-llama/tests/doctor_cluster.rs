//! What the check-up finds about the cluster: definition, operator, lease, nodes, GPUs.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "support/check_up.rs"]
mod check_up;
mod support;

use check_up::{crd, facts, node, operator, shown, subject, with_operator, with_subject, wrong};
use k8s_openapi::api::apps::v1::Deployment;
use kubectl_llama::Health;
use kubectl_llama::doctor::checks;
use kubectl_llama::doctor::facts::{Facts, Seen, Subject, lease_of};
use kubectl_llama::doctor::finding::health;
use llama_operator::cluster::kinds::PlacedPod;
use serde_json::{Value, json};
use support::{ago, healthy, merged, now};

#[test]
fn what_may_not_be_seen_is_skipped() {
    let hidden = || "cannot list it: forbidden".to_owned();
    let facts = Facts {
        crd: Seen::Hidden(hidden()),
        operators: Seen::Hidden(hidden()),
        nodes: Seen::Hidden(hidden()),
        placed: Seen::Hidden(hidden()),
        ..facts()
    };
    let findings = checks::all(&facts, now());
    assert_eq!(health(&findings), Health::Good);
    assert_eq!(
        wrong(&facts),
        [
            "Skip operator: cannot list it: forbidden",
            "Skip nodes: cannot list it: forbidden",
        ]
    );
    assert!(
        shown(&findings[0]).ends_with("the API server serves llamadeployments.llmops.dev v1alpha1"),
        "what can be listed is served"
    );
}

#[test]
fn the_definition_is_looked_at() {
    let with = |crd: Option<Value>| {
        let crd = crd.map(|crd| serde_json::from_value(crd).expect("a definition"));
        wrong(&Facts {
            crd: Seen::Known(crd),
            ..facts()
        })
    };
    assert!(with(None)[0].contains("llamadeployments.llmops.dev is not installed"));
    let mut other = crd();
    other["spec"]["versions"][0]["name"] = json!("v1");
    assert!(with(Some(other))[0].contains("does not serve v1alpha1"));
    let mut young = crd();
    young["status"] = Value::Null;
    assert!(with(Some(young))[0].contains("is not established"));
    let fields = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let mut old = crd();
    let known = old.pointer_mut(fields).and_then(Value::as_object_mut);
    known.expect("fields").remove("drain");
    let said = with(Some(old));
    assert!(
        said[0].starts_with("Warn CustomResourceDefinition")
            && said[0]
                .contains("lacks fields that this plugin knows: spec.drain, spec.drain.timeout"),
        "{said:?}"
    );
    let mut new = crd();
    let known = new.pointer_mut(fields).and_then(Value::as_object_mut);
    known
        .expect("fields")
        .insert("gateway".to_owned(), json!({"type": "string"}));
    let said = with(Some(new));
    assert!(said[0].contains("does not know: spec.gateway"), "{said:?}");
}

#[test]
fn an_operator_without_pods_or_lease_is_found() {
    let mut none = operator();
    none.deployment.status = None;
    let said = wrong(&with_operator(none));
    assert!(said[0].starts_with("Fail operator: Deployment llama-system/llama-operator: 0 of 2"));

    let mut gone = operator();
    gone.lease = Some(Seen::Known(None));
    let said = wrong(&with_operator(gone));
    assert!(
        said[0].contains("Lease llama-system/leader does not exist"),
        "{said:?}"
    );

    for (change, problem) in [
        (
            json!({"holderIdentity": ""}),
            "nobody holds Lease llama-system/leader",
        ),
        (
            json!({"renewTime": null}),
            "llama-operator-7d9 has never renewed",
        ),
        (
            json!({"renewTime": ago(16).replace('Z', ".000000Z")}),
            "renewed 16s ago (it lasts 15s): it is over",
        ),
    ] {
        let mut stale = operator();
        let Some(Seen::Known(Some(lease))) = &stale.lease else {
            unreachable!("the operator has a lease");
        };
        let value = serde_json::to_value(lease).expect("JSON");
        let value = merged(value, &json!({"spec": change}));
        let lease = serde_json::from_value(value).expect("a Lease");
        stale.lease = Some(Seen::Known(Some(lease)));
        let said = wrong(&with_operator(stale));
        assert!(said.len() == 1 && said[0].contains(problem), "{said:?}");
    }
}

#[test]
fn a_lease_is_that_of_the_flags() {
    let place = lease_of(&operator().deployment).expect("it has one");
    assert_eq!(place, ("llama-system".to_owned(), "leader".to_owned()));
    let mut lone = operator();
    let value = serde_json::to_value(&lone.deployment).expect("JSON");
    let none = json!({"spec": {"template": {"spec": {"containers": [{"name": "operator"}]}}}});
    lone.deployment = serde_json::from_value::<Deployment>(merged(value, &none)).expect("one");
    lone.lease = None;
    assert_eq!(lease_of(&lone.deployment), None);
    let said = wrong(&with_operator(lone));
    assert!(
        said[0].contains("2 replicas without leader election"),
        "{said:?}"
    );
}

#[test]
fn two_operators_of_everything_are_rivals() {
    let facts = Facts {
        operators: Seen::Known(vec![operator(), operator()]),
        ..facts()
    };
    assert!(wrong(&facts)[0].contains("2 operators watch all namespaces"));
}

#[test]
fn nodes_that_are_not_well_count_more_where_pods_are() {
    let ill = json!({"status": {"conditions": [
        {"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": "Unknown"},
    ]}});
    let closed = json!({"spec": {"unschedulable": true}});
    let facts = Facts {
        nodes: Seen::Known(vec![
            node("node-0", &ill),
            node("spare", &ill),
            node("node-1", &closed),
        ]),
        ..facts()
    };
    assert_eq!(
        wrong(&facts),
        [
            "Fail nodes: node node-0, which has pods of a LlamaDeployment: not Ready, DiskPressure -> kubectl describe node node-0",
            "Warn nodes: node spare: not Ready, DiskPressure -> kubectl describe node spare",
            "Warn nodes: node node-1 is closed (cordoned) and has pods of a LlamaDeployment -> wait until its groups have moved, or kubectl uncordon node-1",
        ]
    );
}

fn on_gpus(tolerations: &Value) -> Subject {
    subject(merged(
        healthy(),
        &json!({"spec": {
            "resources": {"accelerator": "Gpu"}, "placement": {"tolerations": tolerations},
        }}),
    ))
}

#[test]
fn gpus_are_counted_and_taints_that_nobody_tolerates_named() {
    let gpus = |name: &str| {
        let tainted = json!({
            "spec": {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]},
            "status": {"allocatable": {"nvidia.com/gpu": "8"}},
        });
        node(name, &tainted)
    };
    let taken: PlacedPod = serde_json::from_value(json!({
        "metadata": {"name": "x", "uid": "x"},
        "spec": {"nodeName": "a", "containers": [
            {"resources": {"requests": {"nvidia.com/gpu": "5"}}},
        ]},
    }))
    .expect("a pod");
    let mut facts = with_subject(on_gpus(&json!([])));
    facts.nodes = Seen::Known(vec![gpus("a"), gpus("b")]);
    facts.placed = Seen::Known(vec![taken]);
    let all: Vec<_> = checks::all(&facts, now()).iter().map(shown).collect();
    let free = "Ok GPUs: 16 nvidia.com/gpu on 2 nodes, 11 free on nodes that take pods: a 3, b 8";
    assert!(all.contains(&free.to_owned()), "{all:?}");
    assert_eq!(
        wrong(&facts),
        [
            "Warn taints: no LlamaDeployment with nvidia.com/gpu tolerates the taint gpu=yes:NoSchedule of nodes a, b -> add it to spec.placement.tolerations if these nodes are meant for it",
        ]
    );
    let tolerating = on_gpus(&json!([{"key": "gpu", "operator": "Exists"}]));
    facts.subjects = Seen::Known(vec![tolerating]);
    assert_eq!(wrong(&facts), [""; 0]);
    facts.nodes = Seen::Known(vec![node("a", &json!({}))]);
    let said = wrong(&facts);
    assert!(
        said[0].contains("no node has nvidia.com/gpu, for which team/chat asks"),
        "{said:?}"
    );
}

#[test]
fn operators_are_found_by_labels_that_the_chart_gives() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/llama-operator");
    let read = |path: &str| std::fs::read_to_string(format!("{folder}/{path}")).expect(path);
    let labels = read("templates/_names.tpl");
    let chart = read("Chart.yaml");
    let name = chart.lines().find_map(|line| line.strip_prefix("name: "));
    let labels = labels.replace("{{ .Chart.Name }}", name.expect("the chart has a name"));
    for pair in llama_operator::labels::operators().split(',') {
        let line = pair.replace('=', ": ");
        assert!(labels.lines().any(|given| given == line), "{line}");
    }
}
