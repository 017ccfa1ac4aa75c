//! A cluster in memory: an API server that keeps what a plan writes, and a kubelet that
//! moves pods on when told to.

#![allow(
    dead_code,
    clippy::expect_used,
    clippy::panic,
    reason = "each test program uses its part, and stops where it cannot go on"
)]

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, Pod, PodCondition, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::{AnswersReport, FailureCategory, FailureReport};
use llama_crds::v1alpha1::{
    ConditionType, DrainReason, GroupPhase, LlamaDeployment, LlamaDeploymentStatus,
};
use llama_operator::cluster::capacity::{Amounts, NodeRoom};
use llama_operator::reconcile::apply::Applied;
use llama_operator::reconcile::bounds::bounded;
use llama_operator::reconcile::observe::{Claim, Observed, PodState};
use llama_operator::reconcile::plan::{
    self, INSPECT_CONTAINER, Plan, WORKER_CONTAINER, WorkerSettings,
};
use llama_operator::reconcile::status;
use llama_operator::reconcile::validate::{ValidDeployment, validate};
use serde_json::{Value, json};

/// Settings of every test.
pub(crate) fn settings() -> WorkerSettings {
    WorkerSettings {
        image: "llama-operator/worker:test".to_owned(),
        pull_policy: Some("IfNotPresent".to_owned()),
        drain_seconds: 120,
    }
}

/// A deployment `m` in namespace `team` whose spec has `changes` merged in.
pub(crate) fn deployment(changes: &Value) -> LlamaDeployment {
    let mut object = json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": "m", "namespace": "team", "uid": "uid-m", "generation": 1},
        "spec": {
            "model": {"source": {"pvc": {"claimName": "models", "path": "m.gguf"}}},
            "resources": {"accelerator": "Cpu", "cpu": "2", "memory": "1Gi"},
            "planPolicy": "Disabled",
        },
    });
    merge(&mut object["spec"], changes);
    serde_json::from_value(object).expect("the test's object is valid")
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

/// A bound claim.
pub(crate) fn bound_claim() -> Claim {
    Claim::Found(Box::new(
        serde_json::from_value(json!({
            "metadata": {"name": "models"},
            "status": {"phase": "Bound"},
        }))
        .expect("a claim"),
    ))
}

/// The cluster.
pub(crate) struct Cluster {
    /// The deployment, with its status.
    pub(crate) object: LlamaDeployment,
    /// Its pods.
    pub(crate) pods: Vec<Pod>,
    /// Everything else.
    pub(crate) observed: Observed,
    /// The time.
    pub(crate) now: Timestamp,
    /// The golden answer that first pods tell.
    pub(crate) answer: Option<String>,
    /// Worker image of the operator.
    pub(crate) worker_image: String,
    next_uid: u32,
}

impl Cluster {
    /// A cluster that holds `object` and its claim.
    pub(crate) fn new(object: LlamaDeployment) -> Self {
        Self {
            object,
            pods: Vec::new(),
            observed: Observed {
                claim: bound_claim(),
                ..Observed::default()
            },
            now: Timestamp::from_second(1_800_000_000).expect("a time"),
            answer: None,
            worker_image: settings().image,
            next_uid: 0,
        }
    }

    /// What a round would see.
    pub(crate) fn observed(&self) -> Observed {
        Observed {
            pods: self
                .pods
                .iter()
                .map(|pod| Arc::new(as_cached(pod)))
                .collect(),
            ..self.observed.clone()
        }
    }

    pub(crate) fn valid(&self) -> ValidDeployment {
        validate(&self.object, &self.observed()).expect("the test's deployment is valid")
    }

    pub(crate) fn status(&self) -> LlamaDeploymentStatus {
        self.object.status.clone().unwrap_or_default()
    }

    pub(crate) fn plan(&self) -> Plan {
        let (previous, valid) = (self.status(), self.valid());
        plan::plan(
            &self.object,
            &valid,
            &WorkerSettings {
                image: self.worker_image.clone(),
                ..settings()
            },
            &self.observed(),
            &previous,
            self.now,
        )
    }

    /// One round that stops before its write number `limit`, as a process that is killed
    /// there. Gives the writes made.
    pub(crate) fn round_until(&mut self, limit: usize) -> usize {
        let (valid, plan, previous) = (self.valid(), self.plan(), self.status());
        let (mut writes, mut stopped) = (0, false);
        let mut may_write = || {
            stopped |= writes >= limit;
            writes += usize::from(!stopped);
            !stopped
        };
        let revision = plan.keep_revision.iter().filter(|_| may_write());
        let kept: Vec<_> = revision
            .map(|revision| Arc::new(as_cached(revision)))
            .collect();
        self.observed.revisions.extend(kept);
        for service in [&plan.ranks_service, &plan.client_service] {
            let live = &mut self.observed.services;
            let name = &service.metadata.name;
            if live.iter().all(|live| live.metadata.name != *name) && may_write() {
                live.push(Arc::new(as_cached(service)));
            }
        }
        for hook in plan.groups.iter().filter_map(|group| group.hook.as_ref()) {
            if may_write() {
                self.hook(&hook.pod, hook.on);
            }
        }
        let of_groups = plan.groups.iter().flat_map(|group| &group.delete);
        for deletion in of_groups.chain(&plan.fit.delete) {
            if may_write() {
                self.delete(&deletion.name, Some(&deletion.uid));
            }
        }
        for pod in plan.fit.create.iter().chain(&plan.create) {
            let name = &pod.metadata.name;
            if self.pods.iter().all(|live| live.metadata.name != *name) && may_write() {
                self.next_uid += 1;
                let mut pod = pod.clone();
                pod.metadata.uid = Some(format!("uid-{}", self.next_uid));
                self.pods.push(pod);
            }
        }
        for deletion in &plan.drop_revisions {
            if may_write() {
                let gone = Some(deletion.name.as_str());
                let revisions = &mut self.observed.revisions;
                revisions.retain(|live| live.metadata.name.as_deref() != gone);
            }
        }
        let applied = Applied::default();
        let generation = self.object.metadata.generation;
        let status = status::of_plan(&valid, &plan, &applied, &previous, generation, self.now);
        let status = bounded(status);
        if status != previous && may_write() {
            self.object.status = Some(status);
        }
        writes
    }

    /// A whole round. Gives the writes made.
    pub(crate) fn round(&mut self) -> usize {
        self.round_until(usize::MAX)
    }

    /// Rounds until nothing is written any more.
    pub(crate) fn settle(&mut self) {
        for _ in 0..50 {
            if self.round() == 0 {
                return;
            }
        }
        panic!("rounds keep writing: {:#?}", self.status());
    }

    /// The first pod `name` of a group said `age` seconds ago that it works on `load` requests.
    pub(crate) fn says(&mut self, name: &str, load: u32, age: u64) {
        let uid = self.pod_mut(name).metadata.uid.clone().expect("a UID");
        let age = std::time::Duration::from_secs(age);
        let answer = self.answer.clone();
        self.observed.states.insert(
            uid,
            PodState {
                load,
                answer,
                age,
                ..PodState::default()
            },
        );
    }

    /// The first pod `name` of a group said just now how its answers did.
    pub(crate) fn tells(&mut self, name: &str, answers: AnswersReport) {
        self.says(name, 0, 0);
        let uid = self.pod_mut(name).metadata.uid.clone().expect("a UID");
        let state = self.observed.states.get_mut(&uid).expect("it said so");
        state.answers = Some(answers);
    }

    /// Nodes with so many free CPUs each, and as much memory as there may be.
    pub(crate) fn nodes(&mut self, free: &[u64]) {
        let room = |(index, cpus): (usize, &u64)| {
            let amounts = Amounts::from([
                ("cpu".to_owned(), cpus * 1000),
                ("memory".to_owned(), 1000 << 40),
                ("pods".to_owned(), 110_000),
            ]);
            NodeRoom {
                name: format!("node-{index}"),
                free: amounts,
                ..NodeRoom::default()
            }
        };
        self.observed.sees_nodes = true;
        self.observed.nodes = Some(free.iter().enumerate().map(room).collect());
    }

    /// Changes the spec.
    pub(crate) fn set(&mut self, changes: &Value) {
        let status = self.object.status.take();
        let generation = self.object.metadata.generation;
        self.object = deployment(changes);
        self.object.status = status;
        self.object.metadata.generation = generation.map(|number| number + 1);
    }

    /// Groups by index, with their revision, whether they serve and why they end.
    pub(crate) fn table(&self) -> Vec<(i32, String, bool, Option<DrainReason>)> {
        let groups = self.status().groups;
        groups
            .into_iter()
            .map(|group| {
                let serves = group.phase == GroupPhase::Ready;
                let reason = group.drain.map(|drain| drain.reason);
                (group.index, group.revision, serves, reason)
            })
            .collect()
    }

    /// Puts the label by which clients are sent to a pod on it, or takes it off.
    fn hook(&mut self, pod: &str, on: bool) {
        let labels = self.pod_mut(pod).metadata.labels.get_or_insert_default();
        if on {
            labels.insert("llmops.dev/serving".to_owned(), "true".to_owned());
        } else {
            labels.remove("llmops.dev/serving");
        }
    }

    /// Moves the clock.
    pub(crate) fn advance(&mut self, seconds: i64) {
        self.now = self
            .now
            .checked_add(SignedDuration::from_secs(seconds))
            .expect("a time");
    }

    /// Somebody deletes a pod: one that runs has to be ended by the kubelet.
    pub(crate) fn delete(&mut self, name: &str, uid: Option<&str>) {
        let now = self.now;
        let Some(pod) = self.pods.iter_mut().find(|pod| {
            pod.metadata.name.as_deref() == Some(name)
                && uid.is_none_or(|uid| pod.metadata.uid.as_deref() == Some(uid))
        }) else {
            return;
        };
        if phase(pod) == "Running" {
            pod.metadata.deletion_timestamp.get_or_insert(Time(now));
            pod.metadata.deletion_grace_period_seconds = Some(0);
        } else {
            self.pods
                .retain(|pod| pod.metadata.name.as_deref() != Some(name));
        }
    }

    /// The kubelet ends every pod that is being deleted.
    pub(crate) fn finish_deletions(&mut self) {
        self.pods
            .retain(|pod| pod.metadata.deletion_timestamp.is_none());
    }

    /// Every pod gets a node.
    pub(crate) fn schedule(&mut self) {
        for pod in &mut self.pods {
            let spec = pod.spec.as_mut().expect("pods have a spec");
            spec.node_name.get_or_insert_with(|| "node-1".to_owned());
        }
    }

    /// The pod `name` gets this node.
    pub(crate) fn place_on(&mut self, name: &str, node: &str) {
        let spec = self.pod_mut(name).spec.as_mut().expect("pods have a spec");
        spec.node_name = Some(node.to_owned());
    }

    /// Every pod with a node runs.
    pub(crate) fn start(&mut self) {
        for pod in &mut self.pods {
            let placed = pod
                .spec
                .as_ref()
                .is_some_and(|spec| spec.node_name.is_some());
            if placed && phase(pod) == "Pending" {
                let running = ContainerState {
                    running: Some(ContainerStateRunning::default()),
                    ..ContainerState::default()
                };
                pod.status = Some(pod_status("Running", running));
            }
        }
    }

    /// Every pod that runs is ready.
    pub(crate) fn make_ready(&mut self) {
        let now = self.now;
        for pod in &mut self.pods {
            if phase(pod) == "Running" && pod.metadata.deletion_timestamp.is_none() {
                let status = pod.status.as_mut().expect("pods that run have a status");
                status.conditions.get_or_insert_with(|| {
                    vec![PodCondition {
                        type_: "Ready".to_owned(),
                        status: "True".to_owned(),
                        last_transition_time: Some(Time(now)),
                        ..PodCondition::default()
                    }]
                });
            }
        }
    }

    /// Rounds and a kubelet that does its best, until everything serves.
    pub(crate) fn bring_up(&mut self) {
        for _ in 0..12 {
            self.settle();
            if self
                .status()
                .groups
                .iter()
                .any(|group| group.drain.is_some())
            {
                self.advance(4);
                self.settle();
            }
            self.finish_deletions();
            self.schedule();
            self.start();
            self.make_ready();
        }
        self.settle();
    }

    /// The worker of pod `name` ends with `report`.
    pub(crate) fn fail(&mut self, name: &str, report: &FailureReport) {
        let terminated = ContainerStateTerminated {
            exit_code: i32::from(report.category.exit_code()),
            message: Some(report.to_termination_message()),
            reason: Some("Error".to_owned()),
            finished_at: Some(Time(self.now)),
            ..ContainerStateTerminated::default()
        };
        self.end(name, terminated);
    }

    /// The inspection pod ends with exit code `code` and leaves `message`.
    pub(crate) fn end_inspection(&mut self, code: i32, message: String) {
        let state = ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: code,
                message: Some(message),
                finished_at: Some(Time(self.now)),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        };
        let mut status = pod_status(if code == 0 { "Succeeded" } else { "Failed" }, state);
        let containers = status.container_statuses.as_mut().expect("one container");
        INSPECT_CONTAINER.clone_into(&mut containers[0].name);
        self.pod_mut("m-inspect").status = Some(status);
    }

    /// The worker of pod `name` ends.
    pub(crate) fn end(&mut self, name: &str, terminated: ContainerStateTerminated) {
        let state = ContainerState {
            terminated: Some(terminated),
            ..ContainerState::default()
        };
        self.pod_mut(name).status = Some(pod_status("Failed", state));
    }

    /// The container `container` of pod `name` waits.
    pub(crate) fn wait(&mut self, name: &str, container: &str, reason: &str, message: &str) {
        let state = ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
            }),
            ..ContainerState::default()
        };
        let mut status = pod_status("Pending", state);
        let containers = status.container_statuses.as_mut().expect("one container");
        container.clone_into(&mut containers[0].name);
        self.pod_mut(name).status = Some(status);
    }

    pub(crate) fn pod_mut(&mut self, name: &str) -> &mut Pod {
        self.pods
            .iter_mut()
            .find(|pod| pod.metadata.name.as_deref() == Some(name))
            .expect("the pod exists")
    }

    pub(crate) fn pod_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .pods
            .iter()
            .filter_map(|pod| pod.metadata.name.clone())
            .collect();
        names.sort();
        names
    }

    /// `status/reason` of a condition, and its message.
    pub(crate) fn condition(&self, type_: ConditionType) -> (String, String) {
        let status = self.status();
        let found = status::find(&status, type_).expect("the condition is set");
        (
            format!("{}/{}", found.status, found.reason),
            found.message.clone(),
        )
    }
}

/// `object` as the caches hold it.
fn as_cached<P: serde::Serialize, K: serde::de::DeserializeOwned>(object: &P) -> K {
    let value = serde_json::to_value(object).expect("an object");
    serde_json::from_value(value).expect("an object of the cache")
}

fn phase(pod: &Pod) -> &str {
    let status = pod.status.as_ref();
    status
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("Pending")
}

fn pod_status(phase: &str, state: ContainerState) -> PodStatus {
    PodStatus {
        phase: Some(phase.to_owned()),
        container_statuses: Some(vec![ContainerStatus {
            name: WORKER_CONTAINER.to_owned(),
            image: "llama-operator/worker:test".to_owned(),
            state: Some(state),
            ..ContainerStatus::default()
        }]),
        ..PodStatus::default()
    }
}

/// A report of `category` that names `rank`.
pub(crate) fn report(category: FailureCategory, rank: Option<u32>) -> FailureReport {
    FailureReport {
        category,
        message: format!("{category} was seen in the test"),
        rank,
        node: rank.map(|_| "node-1".to_owned()),
        step: Some(7),
        epoch: 0,
    }
}
