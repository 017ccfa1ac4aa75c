//! Conditions from what is to be said: their times, and the words that they share. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use llama_crds::v1alpha1::{ConditionType, LlamaDeploymentStatus};

/// Longest condition message, in characters; the API's own limit is 32,768.
const MESSAGE_LIMIT: usize = 2000;

/// A condition before its times are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) status: &'static str,
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl Verdict {
    pub(crate) fn new(
        status: &'static str,
        reason: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            reason: reason.into(),
            message: message.into(),
        }
    }
}

/// The condition of type `type_` in `status`.
pub fn find(status: &LlamaDeploymentStatus, type_: ConditionType) -> Option<&Condition> {
    status
        .conditions
        .iter()
        .find(|condition| condition.type_ == type_.as_str())
}

/// Adds times: a condition whose status stays keeps the time of its last transition.
pub(super) fn conditions(
    mut verdicts: Vec<(ConditionType, Verdict)>,
    previous: &LlamaDeploymentStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    verdicts.sort_by_key(|(type_, _)| *type_);
    verdicts
        .into_iter()
        .map(|(type_, verdict)| {
            let old = find(previous, type_);
            condition(type_.as_str(), verdict, old, generation, now)
        })
        .collect()
}

/// Adds the time to what the condition `type_` is to say, which `old` said before.
pub(crate) fn condition(
    type_: &str,
    verdict: Verdict,
    old: Option<&Condition>,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let since = old
        .filter(|old| old.status == verdict.status)
        .map_or_else(|| Time(now), |old| old.last_transition_time.clone());
    Condition {
        type_: type_.to_owned(),
        status: verdict.status.to_owned(),
        reason: verdict.reason,
        message: verdict.message,
        observed_generation: generation,
        last_transition_time: since,
    }
}

/// "1 of 2 groups", in the grammar of the total.
pub(super) fn of_groups(count: impl std::fmt::Display, total: usize) -> String {
    let noun = if total == 1 { "group" } else { "groups" };
    format!("{count} of {total} {noun}")
}

pub(crate) fn shortened(text: &str) -> String {
    cut(text, MESSAGE_LIMIT)
}

/// The first `most` characters of `text`, and a sign where there were more.
pub(crate) fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}
