//! What is decided, with every number that it came from.

use serde::{Deserialize, Serialize};

use crate::model::Mix;
use crate::time::Time;

/// What kept `desired` from being another number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BoundBy {
    /// Token work that is forecast, over ρ or with its margins.
    Work,
    /// Sequences in flight.
    Slots,
    /// Work that queues and will still be there when groups have started.
    Backlog,
    /// The least number, or a schedule's.
    Min,
    /// The greatest number, or that of GPUs.
    Max,
    /// No room in the cluster or quota for more groups.
    Quota,
    /// The limit on groups added within a cold start.
    Surge,
    /// Groups that were asked for do not start.
    Unschedulable,
    /// Fewer would do, and a rule of scaling down holds them.
    Stabilization,
    /// Some figures are missing: fewer would do, but are not believed.
    Partial,
    /// Too many figures are missing to decide anything.
    Stale,
    /// No request for so long that the last group goes, or none yet at zero.
    Idle,
}

impl BoundBy {
    /// The word for metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Work => "work",
            Self::Slots => "slots",
            Self::Backlog => "backlog",
            Self::Min => "min",
            Self::Max => "max",
            Self::Quota => "quota",
            Self::Surge => "surge",
            Self::Unschedulable => "unschedulable",
            Self::Stabilization => "stabilization",
            Self::Partial => "partial",
            Self::Stale => "stale",
            Self::Idle => "idle",
        }
    }
}

/// How many figures are there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Freshness {
    /// Enough for every decision.
    #[default]
    Fresh,
    /// Enough to add groups, not to remove some.
    Partial,
    /// Too few to decide anything.
    Stale,
}

/// Which figures are there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metrics {
    /// How many figures are there.
    pub state: Freshness,
    /// Since when it is so.
    pub since: Time,
    /// Ready groups with a sample that can be counted with.
    pub fresh: u32,
    /// Ready groups that should have one.
    pub expected: u32,
    /// Whether the gateway's counts can be counted with.
    pub gateway: bool,
}

/// Demand in replica-equivalents over windows of this many seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Demand {
    /// 15 s: bursts.
    pub d15: f64,
    /// 60 s.
    pub d60: f64,
    /// 300 s.
    pub d300: f64,
}

/// What is added to the forecast, in replica-equivalents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Margins {
    /// A quantile of past errors of the forecast.
    pub conformal: f64,
    /// Standard deviations of demand in 10 s windows.
    pub burst: f64,
}

/// What one group can do at the ITL limit, with the mix of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Prompt tokens per second, those from the prefix cache left out.
    pub prefill_tokens_per_s: f64,
    /// Output tokens per second.
    pub output_tokens_per_s: f64,
    /// Requests per second.
    pub requests_per_s: f64,
    /// Sequences in the batch (n*).
    pub sequences: f64,
    /// Whether samples of the engine were learned from, else it is the prior.
    pub learned: bool,
    /// How sure it is, from 0 (the prior) to 1.
    pub confidence: f64,
}

/// What to do to get from `current` to `desired`. The four never contradict each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Actions {
    /// Draining groups to take back, which is instant.
    pub undrain: u32,
    /// Groups to start.
    pub start: u32,
    /// Starting groups to give up, those that would take longest first.
    pub cancel: u32,
    /// Ready groups to drain.
    pub drain: u32,
}

/// Something that an operator of the cluster should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Notice {
    /// Groups that take over 30 % longer for the same work than the median.
    SlowGroups {
        /// Their ids.
        ids: Vec<String>,
    },
    /// Groups that have waited for nodes for over 120 s, or take far longer to start than usual.
    Unschedulable {
        /// Their ids.
        ids: Vec<String>,
    },
    /// Too few figures for a decision for over 5 min.
    MetricsStale,
    /// Fewer groups would do, and why they stay.
    ScaleDownBlocked {
        /// What would do.
        wanted: u32,
        /// The rule, in words with numbers.
        rule: String,
    },
}

/// How many groups there are to be, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// How many groups there are to be.
    pub desired: u32,
    /// Ready and starting groups.
    pub current: u32,
    /// Ready groups.
    pub ready: u32,
    /// Starting groups.
    pub starting: u32,
    /// Draining groups.
    pub draining: u32,
    /// What kept `desired` from being another number.
    pub bound_by: BoundBy,
    /// What demand asks for within `min` and `max`, before rules of stabilisation, room and
    /// missing figures: `ceil(raw - 0.05)`. `None` while nothing is known of demand.
    pub want: Option<u32>,
    /// max(work, slots, backlog), in groups.
    pub raw: f64,
    /// max(forecast / rho, forecast + margins), in groups.
    pub work: f64,
    /// Sequences in flight over those that groups may have, in groups; 0 where it is left out.
    pub slots: f64,
    /// Demand, and what drains the queue that remains, in groups.
    pub backlog: f64,
    /// The least number that holds now.
    pub min: u32,
    /// The greatest number that holds now.
    pub max: u32,
    /// Demand measured.
    pub demand: Demand,
    /// Demand in `horizon_s`.
    pub forecast: f64,
    /// Seconds until a group asked for now would serve.
    pub horizon_s: f64,
    /// Rise of demand per second that the forecast counts with, already times φ.
    pub trend_per_s: f64,
    /// What is added to the forecast.
    pub margins: Margins,
    /// Share of a group's capacity that is filled.
    pub rho: f64,
    /// Work that queues now, in replica-seconds.
    pub queue_s: f64,
    /// Work that will queue when groups asked for now serve, in replica-seconds.
    pub queue_later_s: f64,
    /// Seconds over which the greatest number wanted counts.
    pub stabilization_s: f64,
    /// Whether a burst is on: the shortest window counts, and nothing is scaled down.
    pub panic: bool,
    /// Requests as they are now.
    pub mix: Mix,
    /// Prompt tokens that arrive per second, over 60 s.
    pub prompt_tokens_per_s: f64,
    /// Output tokens generated per second, over 60 s.
    pub output_tokens_per_s: f64,
    /// Requests that arrive per second, over 60 s.
    pub requests_per_s: f64,
    /// What one group can do.
    pub capacity: Capacity,
    /// Which figures are there.
    pub metrics: Metrics,
    /// What to do.
    pub actions: Actions,
    /// What someone should know.
    pub notices: Vec<Notice>,
    /// All of this in one sentence, for events and logs.
    pub reason: String,
}
