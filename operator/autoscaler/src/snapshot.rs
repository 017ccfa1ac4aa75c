//! What is seen at one tick: the only input that changes. A caller fills it and records it for
//! replays.
//!
//! A series that does not exist is `None`, which is not 0; NaN, infinities and negative numbers
//! are taken for `None` too.

use serde::{Deserialize, Serialize};

use crate::time::Time;

/// All that is known of a model's groups at one tick.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Snapshot {
    /// Every group that has pods, in any order. Ids are unique.
    pub groups: Vec<Group>,
    /// What the gateway counted, `None` where it did not answer.
    pub gateway: Option<Gateway>,
    /// How many groups more the cluster or a quota has room for now. `None`: not known, or
    /// nodes are added on demand; then it is no limit.
    pub free_groups: Option<u32>,
    /// The least number of groups that a schedule asks for now; 0 without one.
    pub floor: u32,
    /// Names the engine's image and arguments. When it changes, what was learned of the old
    /// engine is forgotten.
    pub engine: String,
}

/// One group: the unit of scale, of drain and of cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// A name that no later group gets.
    pub id: String,
    /// How far it is.
    pub phase: Phase,
    /// Whether a pod of it waits for a node.
    #[serde(default)]
    pub pending: bool,
    /// The last answer of its leader, `None` where there is none yet.
    #[serde(default)]
    pub sample: Option<Sample>,
}

/// How far a group is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Phase {
    /// Its pods exist and it does not serve yet.
    Starting {
        /// When its pods were created.
        since: Time,
        /// Seconds from now until it serves, where the caller knows; else it is estimated.
        eta_s: Option<f64>,
    },
    /// It serves.
    Ready {
        /// When it began to serve.
        since: Time,
    },
    /// It gets no new requests and ends when those that it has are done.
    Draining,
}

/// What a group's leader said of its engine. Totals only grow, until the engine restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sample {
    /// Seconds between the answer and the tick.
    pub age_s: f64,
    /// Iterations of the engine.
    pub steps_total: Option<f64>,
    /// Prompt tokens of requests that were taken up, those from the prefix cache included.
    pub prompt_tokens_total: Option<f64>,
    /// Prompt tokens of these that came from the prefix cache. `None`: none did.
    pub cached_tokens_total: Option<f64>,
    /// Tokens generated.
    pub generation_tokens_total: Option<f64>,
    /// Requests in the batch now.
    pub running: Option<f64>,
    /// Requests that wait in the engine now.
    pub waiting: Option<f64>,
    /// Prompt tokens of the requests that wait. `None`: estimated from the mean prompt.
    pub waiting_tokens: Option<f64>,
    /// Tokens in the KV cache now.
    pub kv_tokens_used: Option<f64>,
    /// Requests thrown out of the batch for want of KV cache.
    pub preemptions_total: Option<f64>,
    /// Requests finished.
    pub finished_total: Option<f64>,
    /// Requests finished that kept both times of the SLO.
    pub finished_within_slo_total: Option<f64>,
}

/// What the gateway counted over all groups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Gateway {
    /// Seconds between the answer and the tick.
    pub age_s: f64,
    /// Requests that arrived.
    pub requests_total: Option<f64>,
    /// Prompt tokens of the requests that arrived. `None`: estimated from the mean prompt.
    pub prompt_tokens_total: Option<f64>,
    /// Requests that wait in the gateway now.
    pub held: Option<f64>,
    /// Prompt tokens of the requests that wait. `None`: estimated from the mean prompt.
    pub held_tokens: Option<f64>,
    /// Seconds that the oldest request held has waited, `None` where none is held.
    pub oldest_held_s: Option<f64>,
}

/// A reading that can be counted with: finite and not negative.
pub(crate) fn reading(value: Option<f64>) -> Option<f64> {
    value.filter(|v| v.is_finite() && *v >= 0.0)
}
