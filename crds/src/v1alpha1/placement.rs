//! Which nodes the pods may run on, and how a group gets them together.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::Duration;

/// Most pools of one LlamaDeployment.
pub const MAX_POOLS: usize = 8;

/// Which nodes the pods may run on.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.nodeSelector) || !has(self.pools) || self.pools.all(pool, !has(pool.nodeSelector) || pool.nodeSelector.all(key, !(key in self.nodeSelector) || self.nodeSelector[key] == pool.nodeSelector[key]))").message("a pool must not ask for another value of a label than placement.nodeSelector: no node has both").field_path(".pools"),
    validation = Rule::new("!has(self.pools) || !has(self.queueName)").message("at most one of pools and queueName may be set: Kueue's flavors are its pools").field_path(".queueName"),
    validation = Rule::new("!has(self.gang) || self.gang.provider != 'Kueue' || has(self.queueName)").message("gang.provider Kueue needs queueName, the LocalQueue").field_path(".queueName"),
    validation = Rule::new("!has(self.gang) || self.gang.provider != 'Builtin' || !has(self.queueName)").message("queueName is for gang.provider Auto and Kueue").field_path(".queueName")
)]
pub struct Placement {
    /// Labels that a node must have, in every pool.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "crate::schema::node_selector")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the pods tolerate, in every pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::tolerations")]
    pub tolerations: Vec<Toleration>,

    /// Pools of unlike nodes, the best first. Each group lies wholly in one pool, the
    /// first in which all its pods find room now; where none has room it waits, and status
    /// says what each pool lacks. The memory plan counts the smallest GPU of all pools.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(
        merge_strategy = ListMerge::Atomic,
        validation = Rule::new("self.all(pool, self.exists_one(other, other.name == pool.name))").message("names of pools must differ")
    )]
    pub pools: Vec<NodePool>,

    /// PriorityClass of the pods. The cluster's default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// Keep the pods of a group near each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,

    /// How the pods of a group get their nodes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gang: Option<Gang>,

    /// LocalQueue of Kueue, in the namespace of this object, from which each group gets its
    /// quota and its nodes. Without Kueue in the cluster, gang.provider Auto goes on
    /// without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub queue_name: Option<String>,
}

/// Nodes that are alike.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePool {
    /// Name of the pool in status, and value of the label llmops.dev/pool of its pods.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,

    /// Labels that a node of the pool has, besides those of placement.nodeSelector.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "crate::schema::node_selector")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that pods tolerate in this pool, besides those of placement.tolerations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::tolerations")]
    pub tolerations: Vec<Toleration>,
}

/// Keep the pods of a group near each other. At most one of the two.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.required) && has(self.preferred))").message("at most one of required and preferred may be set")
)]
pub struct Topology {
    /// Label of nodes, such as topology.kubernetes.io/rack: all pods of a group run on
    /// nodes with one value of it, or not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub required: Option<String>,

    /// The same where there is room, and anywhere else where there is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub preferred: Option<String>,
}

/// How the pods of a group get their nodes together.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gang {
    /// Who chooses the nodes of a group: Auto is Kueue where queueName is set and the
    /// cluster has Kueue, and the operator otherwise.
    #[serde(default)]
    pub provider: GangProvider,

    /// Time that the pods of a group get to reach the nodes chosen for them; then the
    /// nodes are given back and others are chosen.
    #[serde(default = "Duration::ten_minutes")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub timeout: Duration,
}

impl Default for Gang {
    fn default() -> Self {
        Self {
            provider: GangProvider::default(),
            timeout: Duration::ten_minutes(),
        }
    }
}

/// Who chooses the nodes of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GangProvider {
    /// Kueue where queueName is set and the cluster has it, otherwise the operator.
    #[default]
    Auto,
    /// The operator.
    Builtin,
    /// Kueue.
    Kueue,
}
