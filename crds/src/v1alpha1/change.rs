//! What the user asks for when things change or fail.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::comparison::RollbackOn;
use super::duration::Duration;

/// Most groups that may be kept on the old revision.
const MAX_PARTITION: i32 = 256;
/// Most failures of a group within the window; status keeps one entry for each.
pub const MAX_RESTARTS: i32 = 15;

/// How groups move to a new revision of the spec.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// How a group of the new revision takes the place of one of the old.
    #[serde(default)]
    pub strategy: RolloutStrategy,

    /// Groups that must go on serving during a rollout. One less than spec.replicas when
    /// absent. With as many as spec.replicas, a rollout needs room for one more group and
    /// waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 256))]
    pub min_available: Option<i32>,

    /// Groups that stay on the old revision: a canary by count. 0 moves all.
    #[serde(default)]
    #[schemars(range(min = 0, max = 256))]
    pub partition: i32,

    /// Stop moving groups. Groups that fail are still recreated, each at its revision.
    #[serde(default)]
    pub paused: bool,

    /// Time in which a group of the new revision must serve; then the rollout halts.
    #[serde(default = "Duration::rollout")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub progress_deadline: Duration,

    /// What becomes of groups that moved already when the new revision fails.
    #[serde(default)]
    pub on_failure: OnRolloutFailure,

    /// Give the new revision up as well when it serves and answers worse than the old one.
    /// Answers are not compared when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_on: Option<RollbackOn>,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            strategy: RolloutStrategy::default(),
            min_available: None,
            partition: 0,
            paused: false,
            progress_deadline: Duration::rollout(),
            on_failure: OnRolloutFailure::default(),
            rollback_on: None,
        }
    }
}

impl Rollout {
    /// Greatest value of `partition` and `minAvailable`.
    pub const MOST: i32 = MAX_PARTITION;
}

/// How a group of the new revision takes the place of one of the old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutStrategy {
    /// Surge when a whole further group fits now, else DrainThenReplace.
    #[default]
    Auto,
    /// Start the new group first; wait for room if there is none.
    Surge,
    /// End an old group first, and start the new one in its room.
    DrainThenReplace,
    /// Replace a group only when somebody deletes its pods.
    OnDelete,
}

impl RolloutStrategy {
    /// The name used in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Surge => "Surge",
            Self::DrainThenReplace => "DrainThenReplace",
            Self::OnDelete => "OnDelete",
        }
    }
}

/// What becomes of groups that moved already when the new revision fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnRolloutFailure {
    /// Groups of the new revision go back to the old one until the spec changes. The
    /// group that failed is replaced as well.
    Rollback,
    /// The rollout halts: what serves goes on, and what failed is kept for a look.
    #[default]
    Pause,
}

/// How a group ends whose answers are still under way.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Time that running answers get to finish, after the group takes no new ones. What has
    /// not finished five seconds later ends with an error. A change needs no new pods.
    #[schemars(schema_with = "crate::schema::duration")]
    pub timeout: Duration,
}

/// What happens when a group fails.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("duration(self.hangTimeout) >= duration('5s') && duration(self.hangTimeout) <= duration('1h')").message("hangTimeout must be 5s to 1h")
)]
pub struct FailurePolicy {
    /// How often, and how fast, a group that failed is created again.
    #[serde(default)]
    pub group_restart: GroupRestart,

    /// A node on which a group failed this often within the window is avoided by that
    /// group where another node has room. 0 never avoids.
    #[serde(default = "two")]
    #[schemars(range(min = 0, max = 15))]
    pub avoid_node_after: i32,

    /// Time that a rank which shows signs of life may keep the others waiting in a step; then
    /// the group fails (RankSilent) and is created again. A rank without signs of life is
    /// given up after two seconds. Groups of one rank have nobody who waits. From 5s to 1h; a
    /// change makes a new revision.
    #[serde(default = "Duration::minute")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub hang_timeout: Duration,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self {
            group_restart: GroupRestart::default(),
            avoid_node_after: two(),
            hang_timeout: Duration::minute(),
        }
    }
}

fn two() -> i32 {
    2
}

/// How often, and how fast, a group that failed is created again.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupRestart {
    /// Failures within the window after which the group is created no more and its last
    /// pods are kept. Pods that were evicted, deleted or lost with their node do not count.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 15))]
    pub max_restarts: i32,

    /// The window.
    #[serde(default = "Duration::hour")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub window: Duration,

    /// Pause before the first restart in a row; it doubles each time.
    #[serde(default = "Duration::second")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub initial_backoff: Duration,

    /// Longest pause.
    #[serde(default = "Duration::five_minutes")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub max_backoff: Duration,
}

fn five() -> i32 {
    5
}

impl Default for GroupRestart {
    fn default() -> Self {
        Self {
            max_restarts: five(),
            window: Duration::hour(),
            initial_backoff: Duration::second(),
            max_backoff: Duration::five_minutes(),
        }
    }
}

/// A restart that somebody asks for.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restart {
    /// Any text, for example a date. Each new text replaces all groups as a change of the
    /// spec would, with the worker image that the operator has now.
    #[schemars(length(min = 1, max = 64))]
    pub id: String,
}

/// What a group must show before it serves, and again when it has nothing to do.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("duration(self.selfTestInterval) == duration('0s') || (duration(self.selfTestInterval) >= duration('10s') && duration(self.selfTestInterval) <= duration('24h'))").message("selfTestInterval must be 0s or 10s to 24h")
)]
pub struct Preflight {
    /// Whether the golden answer of a group is compared with the one on record in
    /// status.selfTests. In any case all ranks of a group must agree on it.
    #[serde(default)]
    pub self_test: SelfTestPolicy,

    /// Time without requests after which a group must give its golden answer again, bit by
    /// bit as before it served; a group that does not fails (SelfTestMismatch). It must too
    /// after an answer that could not be computed, and after a rank that showed no signs of
    /// life for a moment. 0s for never, else from 10s to 24h; a change makes a new revision.
    /// Embedding models have no golden answer.
    #[serde(default = "Duration::ten_minutes")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub self_test_interval: Duration,
}

impl Default for Preflight {
    fn default() -> Self {
        Self {
            self_test: SelfTestPolicy::default(),
            self_test_interval: Duration::ten_minutes(),
        }
    }
}

/// Whether the golden answer of a group is compared with the one on record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelfTestPolicy {
    /// A group that answers anything else never serves (SelfTestMismatch).
    #[default]
    Enforce,
    /// Whatever the ranks agree on will do, for example after the file of a volume was
    /// replaced in its place.
    Disabled,
}
