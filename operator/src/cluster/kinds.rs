//! Kubernetes kinds, reduced to what decides anything here. What is left out is never
//! decoded: a full pod takes ten times the memory.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ContainerStateTerminated, ContainerStateWaiting, PodCondition, ServicePort, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::Resource;
use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer, Serialize};

/// Metadata without `managedFields`, which decide nothing and are longer than all the rest.
pub(super) fn lean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let meta = Lean::deserialize(deserializer)?;
    Ok(ObjectMeta {
        annotations: meta.annotations,
        creation_timestamp: meta.creation_timestamp,
        deletion_grace_period_seconds: meta.deletion_grace_period_seconds,
        deletion_timestamp: meta.deletion_timestamp,
        finalizers: meta.finalizers,
        generation: meta.generation,
        labels: meta.labels,
        name: meta.name,
        namespace: meta.namespace,
        owner_references: meta.owner_references,
        resource_version: meta.resource_version,
        uid: meta.uid,
        ..ObjectMeta::default()
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lean {
    annotations: Option<BTreeMap<String, String>>,
    creation_timestamp: Option<Time>,
    deletion_grace_period_seconds: Option<i64>,
    deletion_timestamp: Option<Time>,
    finalizers: Option<Vec<String>>,
    generation: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    name: Option<String>,
    namespace: Option<String>,
    owner_references: Option<Vec<OwnerReference>>,
    resource_version: Option<String>,
    uid: Option<String>,
}

macro_rules! resource {
    ($type:ident, $scope:ty, $kind:literal, $group:literal, $version:literal, $plural:literal) => {
        impl Resource for $type {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> Cow<'_, str> {
                $kind.into()
            }

            fn group((): &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> Cow<'_, str> {
                $version.into()
            }

            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

/// One of our pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerPod {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// What it asks for.
    #[serde(default)]
    pub spec: WorkerPodSpec,
    /// How it is.
    #[serde(default)]
    pub status: WorkerPodStatus,
}

/// What a pod asks for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", from = "WholePodSpec")]
pub struct WorkerPodSpec {
    /// The node that it was bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// What keeps the scheduler from looking at it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scheduling_gates: Vec<SchedulingGate>,
    /// Taints that it tolerates, while something keeps the scheduler from looking at it:
    /// whoever chooses its node may add some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WholePodSpec {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    scheduling_gates: Vec<SchedulingGate>,
    #[serde(default)]
    tolerations: Vec<Toleration>,
}

impl From<WholePodSpec> for WorkerPodSpec {
    fn from(whole: WholePodSpec) -> Self {
        let tolerations = if whole.scheduling_gates.is_empty() {
            Vec::new()
        } else {
            whole.tolerations
        };
        Self {
            node_name: whole.node_name,
            scheduling_gates: whole.scheduling_gates,
            tolerations,
        }
    }
}

/// A name that keeps the scheduler from looking at a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulingGate {
    /// The name.
    pub name: String,
}

/// How a pod is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerPodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Why it ended, where the kubelet or the control plane ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Its address.
    #[serde(default, rename = "podIP", skip_serializing_if = "Option::is_none")]
    pub pod_ip: Option<String>,
    /// Its conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<PodCondition>,
    /// Its containers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub container_statuses: Vec<ContainerView>,
    /// Its containers of initialization.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub init_container_statuses: Vec<ContainerView>,
}

/// How a container is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerView {
    /// Its name.
    pub name: String,
    /// Its image.
    #[serde(default)]
    pub image: String,
    /// What it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ContainerViewState>,
}

/// What a container does, unless it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerViewState {
    /// Why it has yet to start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<ContainerStateWaiting>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminated: Option<ContainerStateTerminated>,
}

resource!(WorkerPod, NamespaceResourceScope, "Pod", "", "v1", "pods");

/// One of our Services.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnService {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// What it asks for.
    #[serde(default)]
    pub spec: OwnServiceSpec,
}

/// The fields of a Service that we set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnServiceSpec {
    /// `ClusterIP`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<String>,
    /// `None` for a headless Service.
    #[serde(default, rename = "clusterIP", skip_serializing_if = "Option::is_none")]
    pub cluster_ip: Option<String>,
    /// Whether pods that are not ready have a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish_not_ready_addresses: Option<bool>,
    /// Which pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub selector: BTreeMap<String, String>,
    /// Which ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePort>,
}

resource!(
    OwnService,
    NamespaceResourceScope,
    "Service",
    "",
    "v1",
    "services"
);

/// One of our `PodDisruptionBudgets`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnBudget {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// What it asks for.
    #[serde(default)]
    pub spec: serde_json::Value,
}

resource!(
    OwnBudget,
    NamespaceResourceScope,
    "PodDisruptionBudget",
    "policy",
    "v1",
    "poddisruptionbudgets"
);

/// A revision of a deployment, with what its pods are made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoredRevision {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// The spec, and the worker image that goes with it.
    #[serde(default)]
    pub data: serde_json::Value,
    /// One more than the revision before.
    #[serde(default)]
    pub revision: i64,
}

resource!(
    StoredRevision,
    NamespaceResourceScope,
    "ControllerRevision",
    "apps",
    "v1",
    "controllerrevisions"
);

/// Any pod of the cluster, with what it takes of its node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct PlacedPod {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// What it asks for.
    #[serde(default)]
    pub spec: PlacedPodSpec,
    /// How it is.
    #[serde(default)]
    pub status: PlacedPodStatus,
}

/// What a pod takes of its node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacedPodSpec {
    /// The node that it was bound to.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Its containers.
    #[serde(default)]
    pub containers: Vec<Requests>,
    /// Its containers of initialization.
    #[serde(default)]
    pub init_containers: Vec<Requests>,
    /// What its runtime takes beside its containers.
    #[serde(default)]
    pub overhead: BTreeMap<String, Quantity>,
    /// What keeps the scheduler from looking at it.
    #[serde(default)]
    pub scheduling_gates: Vec<SchedulingGate>,
}

/// What a container asks for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requests {
    /// Requests and limits.
    #[serde(default)]
    pub resources: RequestedResources,
    /// `Always` for one of initialization that goes on beside the others.
    #[serde(default)]
    pub restart_policy: Option<String>,
}

/// Requests of a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct RequestedResources {
    /// By resource.
    #[serde(default)]
    pub requests: BTreeMap<String, Quantity>,
}

/// How a pod is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct PlacedPodStatus {
    /// Its phase.
    #[serde(default)]
    pub phase: Option<String>,
}

resource!(PlacedPod, NamespaceResourceScope, "Pod", "", "v1", "pods");

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ClusterNode {
    /// Its metadata.
    #[serde(default, deserialize_with = "lean")]
    pub metadata: ObjectMeta,
    /// What keeps pods off it.
    #[serde(default)]
    pub spec: ClusterNodeSpec,
    /// What it has.
    #[serde(default)]
    pub status: ClusterNodeStatus,
}

/// What keeps pods off a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ClusterNodeSpec {
    /// Whether it was cordoned.
    #[serde(default)]
    pub unschedulable: bool,
    /// Its taints.
    #[serde(default)]
    pub taints: Vec<Taint>,
}

/// What a node has.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ClusterNodeStatus {
    /// By resource.
    #[serde(default)]
    pub allocatable: BTreeMap<String, Quantity>,
    /// Its conditions, by type and status.
    #[serde(default)]
    pub conditions: Vec<NodeCondition>,
}

/// A condition of a node. Without its times, which change every few seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NodeCondition {
    /// The type.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

resource!(ClusterNode, ClusterResourceScope, "Node", "", "v1", "nodes");

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_is_read_but_for_what_decides_nothing() {
        let owner = json!({"apiVersion": "v1", "kind": "K", "name": "o", "uid": "u"});
        let mut all = json!({
            "annotations": {"a": "b"},
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "deletionGracePeriodSeconds": 30,
            "deletionTimestamp": "2026-01-02T03:04:06Z",
            "finalizers": ["f"],
            "generation": 2,
            "labels": {"c": "d"},
            "name": "n",
            "namespace": "team",
            "ownerReferences": [owner],
            "resourceVersion": "7",
            "uid": "1",
        });
        let expected: ObjectMeta = serde_json::from_value(all.clone()).expect("metadata");
        all["managedFields"] = json!([{"manager": "kubectl", "operation": "Update"}]);
        assert_eq!(lean(all).expect("metadata"), expected);
    }
}
