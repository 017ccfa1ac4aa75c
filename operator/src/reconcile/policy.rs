//! What happens when things change or fail, as numbers. Pure.

use std::time::Duration;

use llama_contract::LONGEST_WINDOW;
use llama_crds::v1alpha1::{
    self as api, LlamaDeploymentSpec, MAX_RESTARTS, OnRolloutFailure, RollbackOn, Rollout,
    RolloutStrategy,
};

use super::validate::{ValidationError, in_range};
use crate::backoff::doubled;

/// Shortest and longest time that a field may name, where it has no bounds of its own.
const ANY: [(Duration, &str); 2] = [(Duration::ZERO, "0s"), (Duration::from_hours(24), "24h")];
/// Likewise spec.rollout.rollbackOn.window.
const WINDOW: [(Duration, &str); 2] = [(Duration::from_mins(1), "1m"), (LONGEST_WINDOW, "1h")];

/// Likewise spec.preflight.selfTestInterval, besides none.
const SELF_TEST: [(Duration, &str); 2] = [(Duration::from_secs(10), "10s"), ANY[1]];
/// Likewise spec.failure.hangTimeout.
const HANG: [(Duration, &str); 2] = [
    (Duration::from_secs(5), "5s"),
    (Duration::from_hours(1), "1h"),
];

/// What happens when things change or fail. None of it is part of a revision: a change
/// needs no new pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangePolicy {
    /// How groups move to a new revision.
    pub rollout: RolloutPolicy,
    /// How often, and how fast, a group that failed is created again.
    pub restarts: RestartPolicy,
    /// Time that running answers get to finish; the operator's own default when absent.
    pub drain: Option<Duration>,
    /// Time that the pods of a group get to reach the nodes chosen for them.
    pub gang_timeout: Duration,
    /// Old revisions that are kept although no group has them.
    pub history: usize,
}

/// How groups move to a new revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutPolicy {
    /// What takes the place of what.
    pub strategy: RolloutStrategy,
    /// Groups that must go on serving.
    pub min_available: usize,
    /// Groups that stay on the old revision.
    pub partition: usize,
    /// Whether nothing moves.
    pub paused: bool,
    /// Time in which a group of the new revision must serve.
    pub progress_deadline: Duration,
    /// Whether groups go back when the new revision fails.
    pub rolls_back: bool,
    /// How much worse than the old one a new revision may answer, if that is looked at.
    pub answers: Option<AnswerLimits>,
}

/// How much worse than the old one a new revision may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerLimits {
    /// Percent of answers that may fail more.
    pub failed_percent: Option<u32>,
    /// Percent that answers may take longer.
    pub slower_percent: Option<u32>,
    /// Answers of this last while count.
    pub window: Duration,
}

/// How often, and how fast, a group that failed is created again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Failures within the window after which it is not.
    pub most: usize,
    /// The window.
    pub window: Duration,
    /// First pause.
    pub first_pause: Duration,
    /// Longest pause.
    pub longest_pause: Duration,
    /// Failures on a node after which it is avoided; `None` for never.
    pub avoid_node_after: Option<usize>,
}

impl RestartPolicy {
    /// Pause before a group that failed `failures` times in a row is created again.
    pub fn pause(&self, failures: i32) -> Duration {
        let failures = u32::try_from(failures).unwrap_or(0);
        doubled(self.first_pause, self.longest_pause, failures)
    }
}

/// Reads the policy of `spec`.
///
/// # Errors
/// The first field that cannot be.
pub(super) fn change(spec: &LlamaDeploymentSpec) -> Result<ChangePolicy, ValidationError> {
    let rollout = spec.rollout.clone().unwrap_or_default();
    let failure = spec.failure.clone().unwrap_or_default();
    let (restart, avoid) = (failure.group_restart, failure.avoid_node_after);
    let gang = spec
        .placement
        .as_ref()
        .and_then(|placement| placement.gang.clone())
        .unwrap_or_default();
    let restarts = RestartPolicy {
        most: count(
            "spec.failure.groupRestart.maxRestarts",
            restart.max_restarts,
            MAX_RESTARTS,
        )?,
        window: time("spec.failure.groupRestart.window", &restart.window)?,
        first_pause: time(
            "spec.failure.groupRestart.initialBackoff",
            &restart.initial_backoff,
        )?,
        longest_pause: time("spec.failure.groupRestart.maxBackoff", &restart.max_backoff)?,
        avoid_node_after: Some(count("spec.failure.avoidNodeAfter", avoid, MAX_RESTARTS)?)
            .filter(|count| *count > 0),
    };
    let drain = spec
        .drain
        .as_ref()
        .map(|drain| time("spec.drain.timeout", &drain.timeout))
        .transpose()?;
    Ok(ChangePolicy {
        rollout: rollout_policy(spec, &rollout)?,
        restarts,
        drain,
        gang_timeout: time("spec.placement.gang.timeout", &gang.timeout)?,
        history: count("spec.revisionHistoryLimit", spec.revision_history_limit, 20)?,
    })
}

/// Seconds of rest after which a group gives its golden answer again; 0 for never.
///
/// # Errors
/// When the field cannot be read.
pub(super) fn self_test_interval(spec: &LlamaDeploymentSpec) -> Result<u32, ValidationError> {
    let preflight = spec.preflight.clone().unwrap_or_default();
    let interval = &preflight.self_test_interval;
    if interval.parse() == Some(Duration::ZERO) {
        return Ok(0);
    }
    time_within("spec.preflight.selfTestInterval", interval, SELF_TEST).map(whole_seconds)
}

/// Seconds that a rank may keep others waiting.
///
/// # Errors
/// When the field cannot be read.
pub(super) fn hang_timeout(spec: &LlamaDeploymentSpec) -> Result<u32, ValidationError> {
    let failure = spec.failure.clone().unwrap_or_default();
    time_within("spec.failure.hangTimeout", &failure.hang_timeout, HANG).map(whole_seconds)
}

fn whole_seconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

fn rollout_policy(
    spec: &LlamaDeploymentSpec,
    rollout: &Rollout,
) -> Result<RolloutPolicy, ValidationError> {
    let default = usize::try_from(spec.replicas.saturating_sub(1)).unwrap_or(0);
    let min_available = rollout
        .min_available
        .map(|groups| count("spec.rollout.minAvailable", groups, Rollout::MOST))
        .transpose()?;
    Ok(RolloutPolicy {
        strategy: rollout.strategy,
        min_available: min_available.unwrap_or(default),
        partition: count("spec.rollout.partition", rollout.partition, Rollout::MOST)?,
        paused: rollout.paused,
        progress_deadline: time("spec.rollout.progressDeadline", &rollout.progress_deadline)?,
        rolls_back: rollout.on_failure == OnRolloutFailure::Rollback,
        answers: rollout
            .rollback_on
            .as_ref()
            .map(answer_limits)
            .transpose()?,
    })
}

fn answer_limits(limits: &RollbackOn) -> Result<AnswerLimits, ValidationError> {
    let percent = |field, value: Option<i32>, least, most| {
        value
            .map(|value| in_range(field, value, least, most))
            .transpose()
    };
    Ok(AnswerLimits {
        failed_percent: percent(
            "spec.rollout.rollbackOn.errorRatePercent",
            limits.error_rate_percent,
            0,
            100,
        )?,
        slower_percent: percent(
            "spec.rollout.rollbackOn.latencyRegressionPercent",
            limits.latency_regression_percent,
            1,
            1000,
        )?,
        window: time_within("spec.rollout.rollbackOn.window", &limits.window, WINDOW)?,
    })
}

fn count(field: &'static str, value: i32, most: i32) -> Result<usize, ValidationError> {
    let value = in_range(field, value, 0, most)?;
    Ok(usize::try_from(value).unwrap_or(usize::MAX))
}

fn time(field: &'static str, value: &api::Duration) -> Result<Duration, ValidationError> {
    time_within(field, value, ANY)
}

fn time_within(
    field: &'static str,
    value: &api::Duration,
    [least, most]: [(Duration, &'static str); 2],
) -> Result<Duration, ValidationError> {
    match value.parse() {
        Some(time) if time >= least.0 && time <= most.0 => Ok(time),
        _ => Err(ValidationError::BadDuration {
            field,
            value: value.0.clone(),
            least: least.1,
            most: most.1,
        }),
    }
}
