//! What the user asks for.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adapters::Adapters;
use super::change::{Drain, FailurePolicy, Preflight, Restart, Rollout};
use super::model::Model;
use super::placement::Placement;
use super::{LlamaDeploymentStatus, PlanPolicy};

/// Longest name of a LlamaDeployment: `<name>-<group>-<node>` must be a host name
/// with room to spare, and `<name>-rendezvous` a Secret's name.
pub const MAX_NAME_LENGTH: usize = 40;
/// Most groups of one LlamaDeployment.
pub const MAX_GROUPS: i32 = 256;
/// Most ranks of one group.
pub const MAX_RANKS: u32 = 256;
/// Least memory of a GPU that the schema lets through, in bytes.
pub const MIN_GPU_MEMORY_BYTES: u64 = 1 << 30;
/// Least memory of a pod that the schema lets through, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 32 << 20;

/// What to serve, how it is laid out, and how many groups of it.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "llmops.dev",
    version = "v1alpha1",
    kind = "LlamaDeployment",
    plural = "llamadeployments",
    shortname = "ld",
    category = "llama",
    namespaced,
    status = "LlamaDeploymentStatus",
    derive = "PartialEq",
    doc = "LlamaDeployment serves one Llama model with groups of worker pods. A group holds one copy of the model, split over its ranks.",
    validation = Rule::new("size(self.metadata.name) <= 40").message("metadata.name must have at most 40 characters: pod and Secret names are built from it"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name must start with a letter and have only lower-case letters, digits and '-': it becomes the name of a Service"),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether all desired groups serve."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "Why they do or do not."
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".spec.replicas",
        description = "Groups asked for."
    ),
    printcolumn(
        name = "Up",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Groups that serve."
    ),
    printcolumn(
        name = "Tensor",
        type_ = "integer",
        json_path = ".spec.parallelism.tensor",
        description = "Ranks that share each layer."
    ),
    printcolumn(
        name = "Model",
        type_ = "string",
        json_path = ".status.servedName",
        description = "Name that clients send as model."
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "Time since creation."
    ),
    printcolumn(
        name = "URL",
        type_ = "string",
        json_path = ".status.url",
        priority = 1,
        description = "Base URL of the OpenAI API inside the cluster."
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
    validation = Rule::new("self.resources.accelerator == 'Cpu' || !has(self.context) || !has(self.context.kvCache) || self.context.kvCache.dtype == 'F16'").message("context.kvCache.dtype Int8 is for accelerator Cpu only").field_path(".context.kvCache.dtype")
)]
pub struct LlamaDeploymentSpec {
    /// What to serve and where the file is.
    pub model: Model,

    /// How one copy of the model is split over ranks and pods.
    #[serde(default)]
    pub parallelism: Parallelism,

    /// What each pod of a group gets.
    pub resources: Resources,

    /// Limits on the length of a conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<Context>,

    /// Whether pods are created only where the model fits their memory. The plan is made
    /// from the headers of the model's files by a small pod that runs first; status.plan
    /// shows it.
    #[serde(default)]
    pub plan_policy: PlanPolicy,

    /// LoRA adapters that groups serve beside the model. Absent, no memory is kept for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Adapters>,

    /// Groups, not pods: each group is one more copy of the model that serves by itself.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 256))]
    pub replicas: i32,

    /// Which nodes the pods may run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,

    /// How groups move to a new revision of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,

    /// How a group ends whose answers are still under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,

    /// What happens when a group fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailurePolicy>,

    /// What a group must show before it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preflight: Option<Preflight>,

    /// A restart that somebody asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,

    /// Old revisions that are kept, besides those that groups still have.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 20))]
    pub revision_history_limit: i32,

    /// Stop all groups and give their resources back, but keep this object.
    #[serde(default)]
    pub suspend: bool,
}

fn one() -> i32 {
    1
}

fn five() -> i32 {
    5
}

/// How one copy of the model is split.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.tensor * self.pipeline % self.nodes == 0").message("tensor times pipeline must be a multiple of nodes: every pod of a group runs the same number of ranks").field_path(".nodes"),
    validation = Rule::new("self.tensor * self.pipeline <= 256").message("tensor times pipeline is the number of ranks of a group, at most 256").field_path(".pipeline")
)]
pub struct Parallelism {
    /// Ranks that share each layer. It must divide the model's attention heads and its
    /// key/value heads.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub tensor: i32,

    /// Stages of consecutive layers, each computed by `tensor` ranks of its own: a group
    /// has tensor times pipeline ranks.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub pipeline: i32,

    /// Pods of a group. The ranks are shared out evenly among them, stage by stage.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub nodes: i32,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self {
            tensor: one(),
            pipeline: one(),
            nodes: one(),
        }
    }
}

/// What each pod of a group gets.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.accelerator == 'Gpu' || !has(self.gpu)").message("gpu is only for accelerator Gpu").field_path(".gpu")
)]
pub struct Resources {
    /// Where the ranks compute: Cpu runs them on CPU cores, Gpu gives each rank a GPU.
    pub accelerator: Accelerator,

    /// How GPUs are asked for. Only with accelerator Gpu.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,

    /// CPU that each pod asks for (a request, not a limit), over all its ranks.
    #[schemars(schema_with = "crate::schema::quantity")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).isGreaterThan(quantity('0'))").message("resources.cpu must be more than 0, for example 2 or 600m")
    )]
    pub cpu: Quantity,

    /// Memory of each pod, request and limit, over all its ranks. Weights, caches and
    /// buffers are planned to fit it before anything is loaded.
    #[schemars(schema_with = "crate::schema::quantity")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('32Mi')) >= 0").message("resources.memory must be at least 32Mi, for example 1Gi (512m is half a byte, 512Mi is meant)")
    )]
    pub memory: Quantity,
}

/// Where ranks compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Accelerator {
    /// CPU cores.
    Cpu,
    /// GPUs, one a rank.
    Gpu,
}

/// How GPUs are asked for.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// Extended resource of the device plugin. Each pod asks for one for each of its ranks.
    #[serde(default = "nvidia_gpu")]
    #[schemars(
        length(min = 3, max = 253),
        regex(
            pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
        )
    )]
    pub resource_name: String,

    /// Memory of each GPU, for example 80Gi, for the memory plan. Read from the label
    /// nvidia.com/gpu.memory of the nodes that placement allows when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::schema::quantity")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1Gi')) >= 0").message("resources.gpu.memory must be at least 1Gi, for example 80Gi")
    )]
    pub memory: Option<Quantity>,
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            resource_name: nvidia_gpu(),
            memory: None,
        }
    }
}

fn nvidia_gpu() -> String {
    "nvidia.com/gpu".to_owned()
}

/// Limits on the length of a conversation.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Context {
    /// Longest sequence, prompt and answer together, in tokens. The model's own limit when
    /// absent. Memory for at least one such sequence is reserved.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_tokens: Option<i32>,

    /// Sequences of maxTokens that each group must hold at the same time, else the memory
    /// plan says NotFit. 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub min_concurrent_sequences: Option<i32>,

    /// How keys and values of tokens are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCache>,
}

/// How keys and values of tokens are kept.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KvCache {
    /// Their precision. Int8 has room for nearly twice the tokens of F16, on CPU cores only.
    #[serde(default)]
    pub dtype: KvCacheDtype,
}

/// Precision of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KvCacheDtype {
    /// Half precision.
    #[default]
    F16,
    /// 8-bit integers with a scale for every 32 of them.
    Int8,
}
