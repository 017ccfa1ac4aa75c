//! Version `v1alpha1` of the API.

#![allow(
    clippy::doc_markdown,
    reason = "the comments are the descriptions that `kubectl explain` prints"
)]
#![allow(clippy::struct_field_names, reason = "fields that hold bytes say so")]
#![allow(
    unreachable_pub,
    reason = "the KubeSchema derive copies each struct into a function"
)]

mod adapters;
mod change;
mod comparison;
mod duration;
mod llama_model;
mod model;
mod placement;
mod plan;
mod spec;
mod status;

pub use adapters::{Adapter, AdapterStatus, Adapters, MAX_ADAPTER_RANK, MAX_ADAPTERS};
pub use change::{
    Drain, FailurePolicy, GroupRestart, MAX_RESTARTS, OnRolloutFailure, Preflight, Restart,
    Rollout, RolloutStrategy, SelfTestPolicy,
};
pub use comparison::{RevisionComparison, RevisionFigures, RollbackOn, TimeFigures};
pub use duration::Duration;
pub use llama_model::{
    ANY_NODE, Copies, LlamaModel, LlamaModelSpec, LlamaModelStatus, MAX_CONCURRENT_FETCHES,
    MAX_MODEL_NODES, MAX_MODEL_USERS, ModelNodePhase, ModelNodeStatus, ModelNodes, ModelReason,
};
pub use model::{
    HttpSource, HuggingFaceSource, ImageMount, ImagePullPolicy, ImageSource, KeyReference,
    MIN_CACHE_BYTES, Model, ModelCache, ModelFile, ModelSource, NameReference, PvcSource, S3Source,
};
pub use placement::{Gang, GangProvider, MAX_POOLS, NodePool, Placement, Topology};
pub use plan::{
    AlternativeContext, AlternativeResources, AlternativeSpec, DeploymentPlan, FailedInspection,
    PlanAlternative, PlanMeasured, PlanPolicy, PlannedLayout, PlannedModel, PlannedShare,
};
pub use spec::{
    Accelerator, Context, Gpu, KvCache, KvCacheDtype, LlamaDeployment, LlamaDeploymentSpec,
    MAX_GROUPS, MAX_NAME_LENGTH, MAX_RANKS, MIN_GPU_MEMORY_BYTES, MIN_MEMORY_BYTES, Parallelism,
    Resources,
};
pub use status::{
    ConditionType, DrainReason, DrainStatus, FailureMark, GroupFailure, GroupPhase, GroupProgress,
    GroupStatus, LlamaDeploymentStatus, MAX_GROUP_ENTRIES, MAX_SELF_TESTS, MAX_TEXT, Reason,
    RolloutFailure, RolloutStatus, SelfTestRecord,
};
