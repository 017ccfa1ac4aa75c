//! What the operator reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DeploymentPlan, FailedInspection};

/// Most entries of `status.groups`: it bounds the size of the object.
pub const MAX_GROUP_ENTRIES: usize = 64;

/// What the operator reports of a LlamaDeployment.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LlamaDeploymentStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready, Available, Reconciling, Stalled, ModelReady, Scheduled and Planned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Groups that have at least one pod.
    #[serde(default)]
    pub replicas: i32,

    /// Groups that serve.
    #[serde(default)]
    pub ready_replicas: i32,

    /// Selects one pod of each group (rank 0), for autoscalers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,

    /// Base URL of the OpenAI API inside the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub url: Option<String>,

    /// Name that clients send as `model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub served_name: Option<String>,

    /// What the model takes, learnt before pods exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<DeploymentPlan>,

    /// Why there is no plan yet, where the model could not be inspected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspection: Option<FailedInspection>,

    /// One entry a group, by index. Beyond 64 groups, those that have failed before come first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["index".into()]))]
    pub groups: Vec<GroupStatus>,
}

/// One group of worker pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// Place of the group, from 0. Its pods are named `<name>-<index>-<node>`.
    #[schemars(range(min = 0, max = 255))]
    pub index: i32,

    /// Hash of what the group's pods are made from.
    #[schemars(length(max = 32))]
    pub revision: String,

    /// Incarnation of the group: one more each time it is recreated.
    #[schemars(range(min = 0))]
    pub epoch: i64,

    /// What the group is doing.
    pub phase: GroupPhase,

    /// The same in a sentence, with names and numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,

    /// Nodes that run the group's pods, in order of the pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub nodes: Vec<String>,

    /// Failures in a row: back to 0 after ten minutes of serving or a new revision.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub restarts: i32,

    /// The last failure, kept while the group serves again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<GroupFailure>,
}

/// Why a group ended: the first failure among its ranks and pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupFailure {
    /// The rank that failed first, when one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 63))]
    pub rank: Option<i32>,

    /// The node that ran it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,

    /// The kind of failure in one word, for example RankDied or OOMKilled.
    #[schemars(length(max = 64))]
    pub reason: String,

    /// What happened, in a sentence.
    #[schemars(length(max = 1024))]
    pub message: String,

    /// When the operator saw it.
    pub time: Time,
}

/// What a group is doing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum GroupPhase {
    /// Its pods are not created yet.
    Waiting,
    /// Its pods wait for nodes.
    Scheduling,
    /// Images or the model are being fetched.
    Fetching,
    /// The ranks are reading their slices of the weights.
    LoadingWeights,
    /// It serves.
    Ready,
    /// It served, and one of its pods answers no longer.
    Unready,
    /// It ends, and finishes the answers that are under way.
    Draining,
    /// It failed and will be created anew.
    Restarting,
    /// It failed in a way that a new try would repeat. Its failed pods are kept.
    Failed,
}

impl GroupPhase {
    /// Every phase, for metrics and documentation.
    pub const ALL: [Self; 9] = [
        Self::Waiting,
        Self::Scheduling,
        Self::Fetching,
        Self::LoadingWeights,
        Self::Ready,
        Self::Unready,
        Self::Draining,
        Self::Restarting,
        Self::Failed,
    ];

    /// The name used in status and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "Waiting",
            Self::Scheduling => "Scheduling",
            Self::Fetching => "Fetching",
            Self::LoadingWeights => "LoadingWeights",
            Self::Ready => "Ready",
            Self::Unready => "Unready",
            Self::Draining => "Draining",
            Self::Restarting => "Restarting",
            Self::Failed => "Failed",
        }
    }
}

/// The conditions of a LlamaDeployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// Every group that was asked for serves, at the current revision.
    Ready,
    /// At least one group serves.
    Available,
    /// The operator is still working towards the spec (abnormal when true).
    Reconciling,
    /// Nothing will change until somebody acts (abnormal when true).
    Stalled,
    /// The model was found, read and loaded.
    ModelReady,
    /// Every pod has a node.
    Scheduled,
    /// The model fits the memory of its pods.
    Planned,
}

impl ConditionType {
    /// Every condition, in the order in which status holds them.
    pub const ALL: [Self; 7] = [
        Self::Ready,
        Self::Available,
        Self::Reconciling,
        Self::Stalled,
        Self::ModelReady,
        Self::Scheduled,
        Self::Planned,
    ];

    /// The condition's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Available => "Available",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
            Self::ModelReady => "ModelReady",
            Self::Scheduled => "Scheduled",
            Self::Planned => "Planned",
        }
    }

    /// What the condition means, for the reference page.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Ready => "Every group that was asked for serves, at the current revision.",
            Self::Available => "At least one group serves.",
            Self::Reconciling => "The operator is still working towards the spec.",
            Self::Stalled => {
                "Nothing will change until somebody acts; the message says what to do."
            }
            Self::ModelReady => "The model was found, read and loaded.",
            Self::Scheduled => "Every pod has a node.",
            Self::Planned => "The model fits the memory of its pods, from its headers.",
        }
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// Reasons of conditions. A group that fails for good puts the worker's failure
        /// category (for example `ModelNotFound`) in their place.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The name used in conditions.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What the reason means, for the reference page.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// All groups serve.
    AllGroupsReady,
    /// Some groups serve, others do not yet.
    SomeGroupsReady,
    /// No group serves.
    NoGroupReady,
    /// Zero groups were asked for.
    ScaledToZero,
    /// spec.suspend is set.
    Suspended,
    /// Groups are being created.
    GroupsStarting,
    /// Groups are ending.
    GroupsEnding,
    /// Groups of an older revision are being replaced, one after the other.
    RollingUpdate,
    /// A group failed and is being created anew.
    GroupRestarting,
    /// Nothing is left to do.
    Settled,
    /// Nothing stands in the way.
    AsExpected,
    /// The model is being fetched or read.
    ModelLoading,
    /// The model was loaded by at least one group.
    ModelLoaded,
    /// Not known while no pod runs.
    NoPods,
    /// Every pod has a node.
    AllPodsScheduled,
    /// No node has room, or none matches the placement.
    Unschedulable,
    /// The claim of spec.model.source.pvc does not exist.
    PersistentVolumeClaimNotFound,
    /// The claim exists but has no volume.
    PersistentVolumeClaimPending,
    /// The claim is being deleted or has lost its volume.
    PersistentVolumeClaimLost,
    /// A model image cannot be pulled.
    ModelImagePullFailed,
    /// The worker image cannot be pulled.
    WorkerImagePullFailed,
    /// A container cannot be set up.
    ContainerNotStarting,
    /// The API server refused to create a pod, a Service or a Secret.
    CreationRefused,
    /// A Service or a pod of a needed name belongs to something else.
    NameConflict,
    /// The spec asks for something that cannot be done.
    InvalidSpec,
    /// A pod of a group was deleted by somebody.
    PodDeleted,
    /// A pod of a group was evicted.
    PodEvicted,
    /// The node of a pod does not answer.
    NodeLost,
    /// The kernel stopped a container that used more than its memory limit.
    OOMKilled,
    /// A container ended with an exit code and no report.
    ContainerExited,
    /// The model fits.
    Fits,
    /// The model does not fit; the message says what would.
    NotFit,
    /// The model is being inspected.
    Planning,
    /// The model could not be inspected; the message says why.
    InspectionFailed,
    /// The model was inspected, but the memory of the GPUs is not known.
    GPUMemoryUnknown,
    /// spec.planPolicy is Off.
    PlanOff,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Reason> for String {
    fn from(reason: Reason) -> Self {
        reason.as_str().to_owned()
    }
}
