//! Pods of a group as planning sees them. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::cluster::kinds::{ContainerView, WorkerPod};
use crate::labels;

/// One of our pods, read into what decides about its group.
#[derive(Clone, Copy, Debug)]
pub struct PodView<'a> {
    /// The pod.
    pub pod: &'a WorkerPod,
    /// Its name.
    pub name: &'a str,
    /// Its UID.
    pub uid: &'a str,
    /// Index of its group.
    pub group: u32,
    /// Place in its group.
    pub node: u32,
    /// What it was made from.
    pub revision: &'a str,
    /// Incarnation of its group.
    pub epoch: i64,
}

impl<'a> PodView<'a> {
    /// Reads `pod`; `None` when it does not carry the labels that we give.
    pub fn read(pod: &'a WorkerPod) -> Option<Self> {
        let meta = &pod.metadata;
        let labels = meta.labels.as_ref()?;
        let label = |key: &str| labels.get(key).map(String::as_str);
        Some(Self {
            pod,
            name: meta.name.as_deref()?,
            uid: meta.uid.as_deref()?,
            group: label(labels::GROUP)?.parse().ok()?,
            node: label(labels::NODE)?.parse().ok()?,
            revision: label(labels::REVISION)?,
            epoch: label(labels::EPOCH)?.parse().ok()?,
        })
    }

    /// Reads `pod`, which is of no group; its label `revision` says what it was made from.
    pub fn alone(pod: &'a WorkerPod, revision: &str) -> Option<Self> {
        let meta = &pod.metadata;
        Some(Self {
            pod,
            name: meta.name.as_deref()?,
            uid: meta.uid.as_deref()?,
            group: 0,
            node: 0,
            revision: meta.labels.as_ref()?.get(revision)?,
            epoch: 0,
        })
    }

    /// Whether `owner` (a UID) owns the pod.
    pub fn is_owned_by(&self, owner: &str) -> bool {
        let owners = self.pod.metadata.owner_references.as_deref();
        owners
            .unwrap_or_default()
            .iter()
            .any(|reference| reference.uid == owner)
    }

    /// Whether somebody asked for its deletion.
    pub fn is_deleting(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    pub fn phase(&self) -> &'a str {
        self.pod.status.phase.as_deref().unwrap_or("Pending")
    }

    /// Whether all its containers are over.
    pub fn is_over(&self) -> bool {
        matches!(self.phase(), "Failed" | "Succeeded")
    }

    /// Whether it will not run again: it is over, or a container of it failed. The
    /// kubelet tells of the container first and of the pod a moment later, and our pods
    /// never restart a container.
    pub fn has_ended(&self) -> bool {
        self.is_over()
            || self.containers().any(|container| {
                let state = container.state.as_ref();
                state
                    .and_then(|state| state.terminated.as_ref())
                    .is_some_and(|terminated| terminated.exit_code != 0)
            })
    }

    /// The node that runs it.
    pub fn node_name(&self) -> Option<&'a str> {
        self.pod.spec.node_name.as_deref()
    }

    /// Whether it waits for nodes to be chosen for its whole group.
    pub fn is_gated(&self) -> bool {
        let gates = &self.pod.spec.scheduling_gates;
        gates.iter().any(|gate| gate.name == labels::GANG_GATE)
    }

    /// The pool that was chosen for it.
    pub fn pool(&self) -> Option<&'a str> {
        let labels = self.pod.metadata.labels.as_ref()?;
        labels.get(labels::POOL).map(String::as_str)
    }

    /// When a node was chosen for it that it has not reached yet.
    pub fn assigned_at(&self) -> Option<Timestamp> {
        if self.node_name().is_some() {
            return None;
        }
        let annotations = self.pod.metadata.annotations.as_ref()?;
        annotations.get(labels::ASSIGNED_AT)?.parse().ok()
    }

    /// Whether the Service of clients selects it.
    pub fn is_hooked(&self) -> bool {
        let labels = self.pod.metadata.labels.as_ref();
        labels.is_some_and(|labels| labels.contains_key(labels::SERVING))
    }

    /// The condition of type `type_`.
    pub fn condition(&self, type_: &str) -> Option<&'a PodCondition> {
        let conditions = &self.pod.status.conditions;
        conditions.iter().find(|condition| condition.type_ == type_)
    }

    /// Since when it is ready; `None` when it is not.
    pub fn ready_since(&self) -> Option<&'a Time> {
        let ready = self.condition("Ready")?;
        (ready.status == "True" && !self.is_deleting() && !self.is_over())
            .then_some(ready.last_transition_time.as_ref())
            .flatten()
    }

    /// Statuses of its containers, those of initialization first.
    pub fn containers(&self) -> impl Iterator<Item = &'a ContainerView> + use<'a> {
        let status = &self.pod.status;
        status
            .init_container_statuses
            .iter()
            .chain(&status.container_statuses)
    }
}
