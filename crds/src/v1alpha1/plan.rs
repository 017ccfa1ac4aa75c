//! What the operator has learnt of the model before it creates pods.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What to do where the memory plan says that the model does not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanPolicy {
    /// Create no pods before the plan is made, and none that cannot fit.
    #[default]
    Enforce,
    /// Say so, and create the pods all the same.
    Warn,
    /// Make no plan.
    Disabled,
}

/// What the model takes in the layout of the spec, from the headers of its files. Fields
/// that end in Bytes are bytes.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentPlan {
    /// Hash of what the plan was made from. It is made anew when that changes.
    #[schemars(length(max = 32))]
    pub inputs: String,

    /// What the model is.
    pub model: PlannedModel,

    /// Ranks and pods of a group.
    pub layout: PlannedLayout,

    /// Longest sequence that was planned, in tokens.
    #[schemars(range(min = 0))]
    pub max_tokens: i64,

    /// What the rank that holds most holds.
    pub per_rank: PlannedShare,

    /// What the pod that holds most holds, over all its ranks.
    pub per_pod: PlannedShare,

    /// KV cache of one token, over all ranks of a group.
    #[schemars(range(min = 0))]
    pub kv_bytes_per_token: i64,

    /// Ranks of a stage that hold the same key/value head: above 1 the KV cache is kept
    /// several times.
    #[schemars(range(min = 0))]
    pub kv_head_replication: i32,

    /// Memory that each pod needs on CPU cores, or each GPU, for minConcurrentSequences
    /// sequences of maxTokens.
    #[schemars(range(min = 0))]
    pub needed_bytes: i64,

    /// Memory that each pod has on CPU cores, or each GPU. Absent where that of the GPUs
    /// is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub memory_bytes: Option<i64>,

    /// Whether the model fits memoryBytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<bool>,

    /// Sequences of maxTokens that a group holds at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub max_sequences_at_max_tokens: Option<i64>,

    /// Tokens that the KV cache of a group holds, over all sequences.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub total_tokens: Option<i64>,

    /// What would fit, where it does not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub alternatives: Vec<PlanAlternative>,

    /// What the rank that takes most really takes, once ranks have told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<PlanMeasured>,
}

/// Planned and measured memory of the rank that takes most.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanMeasured {
    /// What it takes: memory of its process that is not pages of files, or what its GPU
    /// says is used.
    #[schemars(range(min = 0))]
    pub used_bytes: i64,
    /// The part of it that the KV cache has taken so far.
    #[schemars(range(min = 0))]
    pub kv_cache_bytes: i64,
    /// What the plan says of such a rank with as much in its KV cache.
    #[schemars(range(min = 0))]
    pub planned_bytes: i64,
    /// By how much the plan is above what was measured, or below where negative.
    pub error_percent: i32,
}

/// What a model is, from the headers of its files.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedModel {
    /// Family of the model, for example llama or llama4.
    #[schemars(length(max = 64))]
    pub architecture: String,
    /// Layers, over all stages.
    #[schemars(range(min = 0))]
    pub layers: i32,
    /// Attention heads.
    #[schemars(range(min = 0))]
    pub heads: i32,
    /// Key/value heads.
    #[schemars(range(min = 0))]
    pub kv_heads: i32,
    /// Weights in its files.
    #[schemars(range(min = 0))]
    pub weight_bytes: i64,
    /// Longest sequence that it was trained for, in tokens.
    #[schemars(range(min = 0))]
    pub max_tokens: i64,
}

/// Ranks and pods of a group.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedLayout {
    /// Ranks that share each layer.
    #[schemars(range(min = 1, max = 64))]
    pub tensor: i32,
    /// Stages of consecutive layers.
    #[schemars(range(min = 1, max = 64))]
    pub pipeline: i32,
    /// Pods of a group.
    #[schemars(range(min = 1, max = 64))]
    pub nodes: i32,
}

/// What something holds with one sequence of maxTokens.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedShare {
    /// Weights of the model.
    #[schemars(range(min = 0))]
    pub weight_bytes: i64,
    /// Processes, tokenizer, activations, logits; on GPUs what the runtime takes.
    #[schemars(range(min = 0))]
    pub reserve_bytes: i64,
    /// Room for adapters.
    #[schemars(range(min = 0))]
    pub adapter_bytes: i64,
    /// KV cache of one sequence of maxTokens.
    #[schemars(range(min = 0))]
    pub kv_cache_bytes: i64,
}

/// A change of the spec that would fit.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanAlternative {
    /// Fields to merge into the spec.
    pub spec: AlternativeSpec,
    /// Sequences of maxTokens that a group holds at the same time then.
    #[schemars(range(min = 0))]
    pub sequences: i64,
}

/// Fields of the spec that would fit.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AlternativeSpec {
    /// Another layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<PlannedLayout>,
    /// Shorter sequences.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<AlternativeContext>,
    /// More memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<AlternativeResources>,
}

/// Shorter sequences.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AlternativeContext {
    /// Longest sequence, in tokens.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_tokens: i32,
}

/// More memory.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AlternativeResources {
    /// Memory of each pod.
    #[schemars(schema_with = "crate::schema::quantity")]
    pub memory: Quantity,
}

/// An inspection of the model that has failed. It is absent once a plan is made.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedInspection {
    /// Hash of what the plan was to be made from.
    #[schemars(length(max = 32))]
    pub inputs: String,
    /// UID of the pod that failed last.
    #[schemars(length(max = 64))]
    pub pod: String,
    /// Failures in a row.
    #[schemars(range(min = 0))]
    pub failures: i32,
    /// The kind of failure in one word, for example ModelNotFound.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// What happened, in a sentence.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Whether it is not tried again by itself.
    pub stopped: bool,
    /// When the operator saw it.
    pub time: Time,
}
