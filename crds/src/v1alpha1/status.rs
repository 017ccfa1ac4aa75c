//! What the operator reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adapters::AdapterStatus;
use super::change::RolloutStrategy;
use super::comparison::RevisionComparison;
use super::{DeploymentPlan, FailedInspection};

/// Most entries of `status.groups`: it bounds the size of the object.
pub const MAX_GROUP_ENTRIES: usize = 64;

/// Longest text of status, in characters, besides those of conditions.
pub const MAX_TEXT: usize = 1024;

/// Most golden answers on record.
pub const MAX_SELF_TESTS: usize = 8;

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

    /// Groups of the revision that the spec asks for.
    #[serde(default)]
    pub updated_replicas: i32,

    /// The revision that served last as a whole: what a rollback goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub current_revision: Option<String>,

    /// The revision that the spec asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub updated_revision: Option<String>,

    /// The rollout that is under way or has halted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,

    /// Golden answers on record. Every further group of the same model, layout and worker
    /// image must give the same before it serves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["key".into()]))]
    pub self_tests: Vec<SelfTestRecord>,

    /// The adapters of the spec, and how many groups serve them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub adapters: Vec<AdapterStatus>,

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

/// What the first group of a model, layout and worker image answered to a fixed text.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelfTestRecord {
    /// Hash of model source, layout, context length and worker image.
    #[schemars(length(max = 32))]
    pub key: String,

    /// Digest of the answer's tokens and probabilities.
    #[schemars(length(max = 64))]
    pub answer: String,

    /// Revision of the group that gave it.
    #[schemars(length(max = 32))]
    pub revision: String,

    /// When it was put on record.
    pub time: Time,
}

/// One group of worker pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// Place of the group, from 0. Its pods are named `<name>-<index>-<node>`.
    #[schemars(range(min = 0, max = 511))]
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

    /// How far the pod is that the group waits for, while it fetches the model or loads
    /// weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<GroupProgress>,

    /// The pool of spec.placement.pools in which the group lies, once it was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub pool: Option<String>,

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

    /// Failures within the window of spec.failure.groupRestart, the latest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub recent_failures: Vec<FailureMark>,

    /// Why and since when the group ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
}

/// How far a pod is.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupProgress {
    /// Share of the bytes that are there, in percent.
    #[schemars(range(min = 0, max = 100))]
    pub percent: i32,

    /// Bytes that came in a second, on average since it began.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub bytes_per_second: i64,

    /// Seconds until all are there at that rate, where one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub seconds_left: Option<i64>,
}

/// A failure, as far as later decisions need it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureMark {
    /// When the operator saw it.
    pub time: Time,

    /// The node on which it began, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,

    /// Whether it counts towards maxRestarts: pods that somebody took away do not.
    #[serde(default)]
    pub counts: bool,
}

/// The end of a group.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainStatus {
    /// Why it ends.
    pub reason: DrainReason,

    /// Since when it takes no new requests.
    pub since: Time,
}

/// Why a group ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DrainReason {
    /// Fewer groups are wanted.
    ScaleDown,
    /// A group of another revision takes its place.
    Replaced,
    /// spec.suspend is set.
    Suspended,
}

impl DrainReason {
    /// The name used in status and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ScaleDown => "ScaleDown",
            Self::Replaced => "Replaced",
            Self::Suspended => "Suspended",
        }
    }
}

/// How far a rollout is.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// How groups are replaced: what Auto chose, or what the spec says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<RolloutStrategy>,

    /// What is going on and why, in a sentence.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub message: String,

    /// Groups of the new revision that serve.
    #[serde(default)]
    pub updated_ready: i32,

    /// When a group of the new revision last began to serve, or the rollout began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progressed_at: Option<Time>,

    /// Why the revision was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<RolloutFailure>,

    /// How the answers of the two revisions compare, with spec.rollout.rollbackOn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<RevisionComparison>,
}

/// Why a revision was given up.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutFailure {
    /// The revision.
    #[schemars(length(max = 32))]
    pub revision: String,

    /// The kind of failure in one word.
    #[schemars(length(max = 64))]
    pub reason: String,

    /// What happened, in a sentence.
    #[schemars(length(max = 1024))]
    pub message: String,
}

/// Why a group ended: the first failure among its ranks and pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupFailure {
    /// The rank that failed first, when one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 255))]
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
    /// No nodes are free for all pods of a group together.
    InsufficientRoom,
    /// A group waits until Kueue gives it its quota.
    WaitingForQuota,
    /// Kueue took the quota of a group back; the group queues again.
    QuotaTaken,
    /// spec.placement.gang.provider is Kueue, and the cluster has no Kueue.
    KueueNotInstalled,
    /// spec.placement.pools is set, and the operator may not see nodes to choose a pool.
    NodesNotVisible,
    /// spec.rollout.paused is set, and groups of the old revision are left.
    RolloutPaused,
    /// A group of the new revision failed; the others stay as they are.
    RolloutHalted,
    /// A group of the new revision failed; the old revision serves again.
    RolledBack,
    /// A group of the new revision did not serve in time.
    ProgressDeadlineExceeded,
    /// More answers of the new revision failed than spec.rollout.rollbackOn allows.
    ErrorRateExceeded,
    /// Answers of the new revision took longer than spec.rollout.rollbackOn allows.
    LatencyRegression,
    /// The operator was asked to leave the object alone.
    Paused,
    /// Objects of the operator's that nobody owned belong to the LlamaDeployment again.
    Adopted,
    /// Something that the operator made was changed by somebody, and is as before again.
    Restored,
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
    /// spec.planPolicy is Disabled.
    PlanDisabled,
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
