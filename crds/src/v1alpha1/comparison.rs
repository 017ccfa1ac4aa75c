//! How the answers of a new revision are compared with those of the old one.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::duration::Duration;

/// When a revision is given up whose groups serve and answer worse than those of the old one.
/// Differences that chance explains, and those among fewer than 50 answers, decide nothing.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.errorRatePercent) || has(self.latencyRegressionPercent)").message("one of errorRatePercent and latencyRegressionPercent must be set"),
    validation = Rule::new("duration(self.window) >= duration('1m') && duration(self.window) <= duration('1h')").message("window must be 1m to 1h")
)]
pub struct RollbackOn {
    /// How many percent of the answers may fail beyond the share that fails with the old
    /// revision. What counts are errors of the worker (status 500 and more, streams broken off),
    /// not those of clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub error_rate_percent: Option<i32>,

    /// How many percent longer answers may take to their first token, or from token to token,
    /// on average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub latency_regression_percent: Option<i32>,

    /// Answers of this last while count, and this long after its last group began to serve a
    /// new revision can still be given up. From 1m to 1h.
    #[serde(default = "Duration::ten_minutes")]
    #[schemars(schema_with = "crate::schema::duration")]
    pub window: Duration,
}

/// What was compared of two revisions.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevisionComparison {
    /// When. It is brought up to date every ten seconds.
    pub time: Time,

    /// The old revision, as it was last when enough of its groups served to tell.
    pub old: RevisionFigures,

    /// The new one.
    pub new: RevisionFigures,
}

/// How the answers of a revision did within the window of spec.rollout.rollbackOn.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevisionFigures {
    /// The revision.
    #[schemars(length(max = 32))]
    pub revision: String,

    /// Answers that ended, those that failed included.
    #[schemars(range(min = 0))]
    pub answers: i64,

    /// Answers that failed by a fault of the worker.
    #[schemars(range(min = 0))]
    pub failed: i64,

    /// Time from request to first token.
    pub first_token: TimeFigures,

    /// Time from token to token, on average of each answer.
    pub between_tokens: TimeFigures,
}

/// Times of answers.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TimeFigures {
    /// How many answers.
    #[schemars(range(min = 0))]
    pub answers: i64,

    /// Their average, in microseconds.
    #[schemars(range(min = 0))]
    pub average_micros: i64,

    /// Their standard deviation, in microseconds.
    #[schemars(range(min = 0))]
    pub deviation_micros: i64,
}
