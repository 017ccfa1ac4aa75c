//! A model, a cluster of nodes, and rounds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use llama_contract::{FailureCategory, LoadProgress, WorkerPhase};
use llama_crds::v1alpha1::{LlamaModel, LlamaModelStatus, ModelNodeStatus};
use llama_operator::cluster::kinds::WorkerPod;
use llama_operator::cluster::known::KnownNode;
use llama_operator::events::Notice;
use llama_operator::models::plan::{self, Plan, Seen};
use llama_operator::models::{status, validate};
use llama_operator::names;
use llama_operator::reconcile::observe::{Claim, PodState};
use serde_json::{Value, json};

use super::support::{bound_claim, report, settings};

/// A model `m`, a cluster of nodes, and a kubelet that moves pods on when told to.
pub(crate) struct Story {
    pub(crate) object: LlamaModel,
    pub(crate) pods: Vec<Pod>,
    pub(crate) nodes: Option<Vec<KnownNode>>,
    pub(crate) claim: Claim,
    pub(crate) states: BTreeMap<String, PodState>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) now: Timestamp,
    next_uid: u32,
}

pub(crate) fn spec() -> Value {
    json!({
        "source": {"http": {
            "url": "https://models.example/a",
            "files": [{"name": "m.gguf", "sha256": "0".repeat(64)}],
        }},
        "cache": {"claimName": "models", "size": "2Ti"},
    })
}

pub(crate) fn object(spec: &Value) -> LlamaModel {
    serde_json::from_value(json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaModel",
        "metadata": {"name": "m", "namespace": "team", "uid": "uid-m", "generation": 1},
        "spec": spec,
    }))
    .expect("the test's object is valid")
}

pub(crate) fn node(name: &str) -> KnownNode {
    KnownNode {
        name: name.to_owned(),
        open: true,
        ..KnownNode::default()
    }
}

pub(crate) fn nodes(count: usize) -> Vec<KnownNode> {
    (0..count)
        .map(|index| node(&format!("node-{index:03}")))
        .collect()
}

/// `object` as the caches hold it.
fn as_cached(pod: &Pod) -> WorkerPod {
    let value = serde_json::to_value(pod).expect("an object");
    serde_json::from_value(value).expect("an object of the cache")
}

impl Story {
    pub(crate) fn new(spec: &Value, nodes: Vec<KnownNode>) -> Self {
        Self {
            object: object(spec),
            pods: Vec::new(),
            nodes: Some(nodes),
            claim: bound_claim(),
            states: BTreeMap::new(),
            notices: Vec::new(),
            now: Timestamp::from_second(1_800_000_000).expect("a time"),
            next_uid: 0,
        }
    }

    fn seen(&self) -> Seen {
        Seen {
            pods: self
                .pods
                .iter()
                .map(|pod| Arc::new(as_cached(pod)))
                .collect(),
            states: self.states.clone(),
            nodes: self.nodes.clone(),
            claim: self.claim.clone(),
            users: vec!["chat".to_owned()],
        }
    }

    pub(crate) fn plan(&self) -> Plan {
        let model = validate::validate(&self.object).expect("the test's model is valid");
        plan::plan(&model, &settings(), &self.seen(), &self.status(), self.now)
    }

    /// One round; whether it wrote anything.
    pub(crate) fn round(&mut self) -> bool {
        let (plan, previous) = (self.plan(), self.status());
        let model = validate::validate(&self.object).expect("valid");
        for deletion in &plan.delete {
            let uid = Some(&deletion.uid);
            self.pods.retain(|pod| pod.metadata.uid.as_ref() != uid);
        }
        for pod in &plan.create {
            let name = &pod.metadata.name;
            assert!(
                self.pods.iter().all(|live| live.metadata.name != *name),
                "{name:?} exists"
            );
            self.next_uid += 1;
            let mut pod = pod.clone();
            pod.metadata.uid = Some(format!("uid-{}", self.next_uid));
            self.pods.push(pod);
        }
        let status = status::of_plan(&model, &plan, &previous, Some(1), self.now);
        let notices = status::notices(Some(&plan), &previous, &status, self.now);
        self.notices.extend(notices);
        let wrote = status != previous || !plan.delete.is_empty() || !plan.create.is_empty();
        self.object.status = Some(status);
        wrote
    }

    /// Rounds until nothing is written any more.
    pub(crate) fn settle(&mut self) {
        for _ in 0..20 {
            if !self.round() {
                return;
            }
        }
        assert!(!self.round(), "rounds keep writing: {:#?}", self.status());
    }

    pub(crate) fn status(&self) -> LlamaModelStatus {
        self.object.status.clone().unwrap_or_default()
    }

    pub(crate) fn entry(&self, name: &str) -> ModelNodeStatus {
        let nodes = self.status().nodes;
        let found = nodes.into_iter().find(|entry| entry.name == name);
        found.expect("the node has an entry")
    }

    /// Phase of each node, by name.
    pub(crate) fn phases(&self) -> Vec<(String, &'static str)> {
        let nodes = self.status().nodes;
        let phase = |node: ModelNodeStatus| (node.name, node.phase.as_str());
        nodes.into_iter().map(phase).collect()
    }

    /// Status, reason and message of Ready.
    pub(crate) fn ready(&self) -> (String, String) {
        let status = self.status();
        let ready = status::ready(&status).expect("the condition is set");
        (
            format!("{}/{}", ready.status, ready.reason),
            ready.message.clone(),
        )
    }

    pub(crate) fn pod(&mut self, node: &str) -> &mut Pod {
        let name = Some(names::fetch("m", node));
        let mut pods = self.pods.iter_mut();
        pods.find(|pod| pod.metadata.name == name).expect("a pod")
    }

    pub(crate) fn has_pod(&self, node: &str) -> bool {
        let name = Some(names::fetch("m", node));
        self.pods.iter().any(|pod| pod.metadata.name == name)
    }

    pub(crate) fn set(&mut self, node: &str, status: Value) {
        let place = if node == "any" { "node-9" } else { node };
        let place = Some(place.to_owned());
        let pod = self.pod(node);
        pod.spec.as_mut().expect("a spec").node_name = place;
        pod.status = Some(serde_json::from_value(status).expect("a status"));
    }

    pub(crate) fn runs(&mut self, node: &str) {
        self.set(node, json!({"phase": "Running", "podIP": "10.0.0.1"}));
    }

    pub(crate) fn succeeds(&mut self, node: &str) {
        self.set(node, json!({"phase": "Succeeded"}));
    }

    pub(crate) fn fails(&mut self, node: &str, category: FailureCategory) {
        let message = report(category, None).to_termination_message();
        let terminated = json!({"exitCode": category.exit_code(), "message": message});
        let container = json!({
            "name": "fetch-model", "image": "i", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"terminated": terminated},
        });
        self.set(
            node,
            json!({"phase": "Failed", "containerStatuses": [container]}),
        );
    }

    pub(crate) fn says(&mut self, node: &str, done: u64, total: u64) {
        let uid = self.pod(node).metadata.uid.clone().expect("a UID");
        let progress = LoadProgress {
            bytes_done: done,
            bytes_total: total,
            bytes_per_second: 1 << 30,
            seconds_left: Some(22),
        };
        let state = PodState {
            phase: WorkerPhase::Fetching,
            progress,
            ..PodState::default()
        };
        self.states.insert(uid, state);
    }

    pub(crate) fn advance(&mut self, time: Duration) {
        let time = SignedDuration::try_from(time).expect("short");
        self.now = self.now.checked_add(time).expect("a time");
    }

    /// Every node fetches and succeeds.
    pub(crate) fn bring_up(&mut self) {
        for _ in 0..100 {
            self.settle();
            let waiting: Vec<_> = self.phases();
            let waiting = waiting.iter().filter(|(name, _)| self.has_pod(name));
            let waiting: Vec<_> = waiting.map(|(name, _)| name.clone()).collect();
            for name in &waiting {
                self.succeeds(name);
            }
            if waiting.is_empty() {
                return;
            }
        }
    }
}
