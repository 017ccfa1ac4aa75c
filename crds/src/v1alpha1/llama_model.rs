//! A model that is fetched ahead into a cache.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::Duration;
use super::model::{ModelCache, ModelSource};
use super::status::GroupProgress;

/// Most entries of a LlamaModel's `status.nodes`: it bounds the size of the object, and so
/// the nodes that one LlamaModel serves.
pub const MAX_MODEL_NODES: usize = 256;
/// Most names in a LlamaModel's `status.usedBy`.
pub const MAX_MODEL_USERS: usize = 64;
/// Greatest value of `maxConcurrentFetches`.
pub const MAX_CONCURRENT_FETCHES: i32 = 64;
/// Name of the one entry of `status.nodes` where all nodes share a copy.
pub const ANY_NODE: &str = "any";

/// Which model to fetch ahead, and where to.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "llmops.dev",
    version = "v1alpha1",
    kind = "LlamaModel",
    plural = "llamamodels",
    shortname = "lm",
    category = "llama",
    namespaced,
    status = "LlamaModelStatus",
    derive = "PartialEq",
    doc = "LlamaModel fetches a model into a cache before pods need it, and tells on which nodes it is. A LlamaDeployment of the same source and cache finds it there.",
    validation = Rule::new("size(self.metadata.name) <= 63").message("metadata.name must have at most 63 characters: it becomes a label of pods"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether the model is everywhere where it should be."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "Why it is or is not."
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".status.desiredCopies",
        description = "Copies that there should be."
    ),
    printcolumn(
        name = "Held",
        type_ = "integer",
        json_path = ".status.readyCopies",
        description = "Copies that are whole."
    ),
    printcolumn(
        name = "Claim",
        type_ = "string",
        json_path = ".spec.cache.claimName",
        description = "The cache."
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "Time since creation."
    ),
    printcolumn(
        name = "Identity",
        type_ = "string",
        json_path = ".status.identity",
        priority = 1,
        description = "The model's folder in the cache."
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1,
        description = "What is going on, in a sentence."
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.source.http) || has(self.source.huggingFace) || has(self.source.s3) && self.source.s3.files.size() > 0").message("source must be one whose bytes are known beforehand and that is fetched: http, huggingFace, or s3 with files").field_path(".source")
)]
pub struct LlamaModelSpec {
    /// Where the model comes from: one of http, huggingFace, and s3 with files. A
    /// LlamaDeployment whose files have the same digests, or that names the same commit,
    /// finds the same copy.
    pub source: ModelSource,

    /// Where it is kept.
    pub cache: ModelCache,

    /// Whether each node has a copy of its own, or all share one: what the claim's volume is.
    #[serde(default)]
    pub copies: Copies,

    /// Which nodes: all that take pods when absent. With copies Shared, which nodes the one
    /// pod may run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<ModelNodes>,

    /// Nodes that fetch at the same time.
    #[serde(default = "four")]
    #[schemars(range(min = 1, max = 64))]
    pub max_concurrent_fetches: i32,

    /// Time after which it is looked whether a copy is still there, and after which one
    /// that failed for good is tried again: 1m to 720h.
    #[serde(default = "Duration::day")]
    #[schemars(schema_with = "crate::schema::duration")]
    #[x_kube(
        validation = Rule::new("duration(self) >= duration('1m') && duration(self) <= duration('720h')").message("recheckEvery must be 1m to 720h")
    )]
    pub recheck_every: Duration,
}

fn four() -> i32 {
    4
}

/// Who has a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Copies {
    /// Each node: the claim is a folder of each node's own (hostPath, local).
    #[default]
    PerNode,
    /// All nodes together: the claim is one volume that all of them mount. One pod fetches.
    Shared,
}

/// Which nodes get the model.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelNodes {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "crate::schema::node_selector")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the fetching pods tolerate. Nodes with others get no copy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::tolerations")]
    pub tolerations: Vec<Toleration>,
}

/// What the operator reports of a LlamaModel.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LlamaModelStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready: whether every copy that there should be is whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Digest over the names and digests of the model's files, or of its commit. The
    /// model's folder in the cache has this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub identity: Option<String>,

    /// The claim that the entries of nodes speak of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub claim_name: Option<String>,

    /// Hash of what fetching pods are made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub revision: Option<String>,

    /// Copies that there should be: one a node, or one.
    #[serde(default)]
    pub desired_copies: i32,

    /// Copies that are whole.
    #[serde(default)]
    pub ready_copies: i32,

    /// One entry a node, or one named any where all share a copy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub nodes: Vec<ModelNodeStatus>,

    /// LlamaDeployments of this namespace with the same model and cache.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub used_by: Vec<String>,
}

/// The model on one node.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelNodeStatus {
    /// Name of the node, or any.
    #[schemars(length(max = 253))]
    pub name: String,

    /// How the copy is.
    pub phase: ModelNodePhase,

    /// The same in a sentence, with names and numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,

    /// How far the fetch is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<GroupProgress>,

    /// The kind of the last failure in one word, for example DigestMismatch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,

    /// Failures in a row.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub failures: i32,

    /// Whether the failure is not tried again before recheckEvery has passed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,

    /// When the operator last saw that the copy is whole, or that the fetch failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked: Option<Time>,

    /// UID of the pod that told so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub pod: Option<String>,
}

/// How the copy of a node is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum ModelNodePhase {
    /// Its pod does not run yet.
    Waiting,
    /// A pod fetches it.
    Fetching,
    /// It is whole.
    Ready,
    /// The last fetch failed; the message says when it is tried again.
    Failed,
}

impl ModelNodePhase {
    /// Every phase, for documentation.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Fetching, Self::Ready, Self::Failed];

    /// The name used in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "Waiting",
            Self::Fetching => "Fetching",
            Self::Ready => "Ready",
            Self::Failed => "Failed",
        }
    }
}

/// Reasons of a LlamaModel's condition Ready, besides [`super::Reason`] and the categories
/// of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelReason {
    /// Every copy is whole.
    Fetched,
    /// Copies are being fetched, or wait for their turn.
    Fetching,
    /// No node matches.
    NoNodes,
    /// The operator may not see nodes.
    NodesNotVisible,
}

impl ModelReason {
    /// Every reason, for documentation.
    pub const ALL: [Self; 4] = [
        Self::Fetched,
        Self::Fetching,
        Self::NoNodes,
        Self::NodesNotVisible,
    ];

    /// The name used in conditions.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fetched => "Fetched",
            Self::Fetching => "Fetching",
            Self::NoNodes => "NoNodes",
            Self::NodesNotVisible => "NodesNotVisible",
        }
    }

    /// What the reason means, for the reference page.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Fetched => "Every copy that there should be is whole.",
            Self::Fetching => "Copies are being fetched, or wait for their turn.",
            Self::NoNodes => "No node takes pods and matches spec.nodes.",
            Self::NodesNotVisible => {
                "The operator watches one namespace and may not see nodes: copies must be Shared."
            }
        }
    }
}
