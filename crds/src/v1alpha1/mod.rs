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

mod plan;
mod spec;
mod status;

pub use plan::{
    AlternativeContext, AlternativeResources, AlternativeSpec, DeploymentPlan, FailedInspection,
    PlanAlternative, PlanMeasured, PlanPolicy, PlannedLayout, PlannedModel, PlannedShare,
};
pub use spec::{
    Accelerator, Context, Gpu, ImagePullPolicy, ImageSource, LlamaDeployment, LlamaDeploymentSpec,
    MAX_GROUPS, MAX_NAME_LENGTH, MAX_RANKS, MIN_GPU_MEMORY_BYTES, MIN_MEMORY_BYTES, Model,
    ModelSource, Parallelism, Placement, PvcSource, Resources,
};
pub use status::{
    ConditionType, GroupFailure, GroupPhase, GroupStatus, LlamaDeploymentStatus, MAX_GROUP_ENTRIES,
    Reason,
};
