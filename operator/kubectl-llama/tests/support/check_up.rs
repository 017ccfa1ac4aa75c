//! Facts of a cluster in which all is well, to be made worse.

#![allow(
    dead_code,
    clippy::expect_used,
    reason = "each test program uses its part, and stops where it cannot go on"
)]

use std::collections::BTreeMap;

use kubectl_llama::doctor::checks;
use kubectl_llama::doctor::facts::{Facts, Operator, Reference, Seen, Subject, Target};
use kubectl_llama::doctor::finding::{Finding, Level};
use llama_operator::cluster::kinds::ClusterNode;
use serde_json::{Value, json};

use crate::support::{ago, deployment, healthy, merged, now, pods};

pub(crate) fn crd() -> Value {
    let mut crd = serde_json::to_value(llama_crds::crd()).expect("JSON");
    crd["status"] = json!({
        "conditions": [{"type": "Established", "status": "True"}],
    });
    crd
}

pub(crate) fn operator() -> Operator {
    let deployment = json!({
        "metadata": {"name": "llama-operator", "namespace": "llama-system"},
        "spec": {
            "replicas": 2, "selector": {},
            "template": {"spec": {"containers": [{"name": "operator", "args": [
                "--lease-namespace=llama-system", "--lease-name=leader", "--identity=$(POD_NAME)",
            ]}]}},
        },
        "status": {"availableReplicas": 2},
    });
    let lease = json!({
        "metadata": {"name": "leader"},
        "spec": {
            "holderIdentity": "llama-operator-7d9", "leaseDurationSeconds": 15,
            "renewTime": ago(1).replace('Z', ".000000Z"),
        },
    });
    Operator {
        deployment: serde_json::from_value(deployment).expect("a Deployment"),
        lease: Some(Seen::Known(Some(
            serde_json::from_value(lease).expect("a Lease"),
        ))),
    }
}

pub(crate) fn node(name: &str, changes: &Value) -> ClusterNode {
    let node = json!({
        "metadata": {"name": name},
        "status": {
            "allocatable": {"cpu": "8", "pods": "110"},
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": "True"},
            ],
        },
    });
    serde_json::from_value(merged(node, changes)).expect("a node")
}

pub(crate) fn claim(phase: &str, modes: &[&str]) -> Target {
    let claim = json!({
        "metadata": {"name": "models", "namespace": "team"},
        "spec": {"accessModes": modes}, "status": {"phase": phase},
    });
    Target::Claim(Box::new(serde_json::from_value(claim).expect("a claim")))
}

pub(crate) fn subject(object: Value) -> Subject {
    let target = Seen::Known(claim("Bound", &["ReadOnlyMany"]));
    Subject {
        deployment: deployment(object),
        pods: pods(),
        targets: BTreeMap::from([(Reference::Claim("models".to_owned()), target)]),
    }
}

/// A cluster in which all is well.
pub(crate) fn facts() -> Facts {
    Facts {
        crd: Seen::Known(Some(serde_json::from_value(crd()).expect("a definition"))),
        operators: Seen::Known(vec![operator()]),
        nodes: Seen::Known(
            (0..4)
                .map(|number| node(&format!("node-{number}"), &json!({})))
                .collect(),
        ),
        placed: Seen::Known(Vec::new()),
        subjects: Seen::Known(vec![subject(healthy())]),
    }
}

pub(crate) fn with_subject(subject: Subject) -> Facts {
    Facts {
        subjects: Seen::Known(vec![subject]),
        ..facts()
    }
}

pub(crate) fn with_operator(operator: Operator) -> Facts {
    Facts {
        operators: Seen::Known(vec![operator]),
        ..facts()
    }
}

/// What is not well, as `LEVEL about: message -> next`.
pub(crate) fn wrong(facts: &Facts) -> Vec<String> {
    let all = checks::all(facts, now());
    let lines = all.iter().filter(|finding| finding.level != Level::Ok);
    lines.map(shown).collect()
}

pub(crate) fn shown(finding: &Finding) -> String {
    let Finding {
        level,
        about,
        message,
        next,
    } = finding;
    match next {
        Some(next) => format!("{level:?} {about}: {message} -> {next}"),
        None => format!("{level:?} {about}: {message}"),
    }
}
