//! Whether a new revision answers worse than the old one. Pure.
//!
//! Answers differ and so do requests, so a difference counts only where chance does not
//! explain it: it is looked at every few seconds, and a rollout must not end by bad luck.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::{AnswersReport, Spread};
use llama_crds::v1alpha1::{Reason, RevisionComparison, RevisionFigures, TimeFigures};

use super::groups::{GroupPlan, pods_of};
use super::observe::Observed;
use super::policy::AnswerLimits;

/// Fewer answers than these tell nothing.
pub const LEAST_ANSWERS: i64 = 50;
/// How often figures are brought up to date: each time is a write of status.
pub const COMPARED_EVERY: Duration = Duration::from_secs(10);
/// Standard deviations beyond which chance explains nothing: one look in a thousand.
const BEYOND_CHANCE: f64 = 3.0;

/// What is compared of revision `new`, to which groups move, and `old`, from which.
pub fn compare(
    before: Option<&RevisionComparison>,
    (old, new): (&str, &str),
    groups: &[GroupPlan],
    observed: &Observed,
    now: Timestamp,
) -> RevisionComparison {
    let before = before.filter(|before| before.old.revision == old && before.new.revision == new);
    let is_fresh = |before: &&RevisionComparison| {
        let age = now.duration_since(before.time.0);
        Duration::try_from(age).is_ok_and(|age| age < COMPARED_EVERY)
    };
    if let Some(fresh) = before.filter(is_fresh) {
        return fresh.clone();
    }
    RevisionComparison {
        time: Time(now),
        old: remembered(
            before.map(|before| &before.old),
            told(old, groups, observed),
        ),
        new: told(new, groups, observed),
    }
}

/// What the first pods of all groups of `revision` tell together.
fn told(revision: &str, groups: &[GroupPlan], observed: &Observed) -> RevisionFigures {
    let reports = groups
        .iter()
        .filter(|group| group.status.revision == revision)
        .flat_map(|group| pods_of(group, observed).filter(|pod| pod.node == 0))
        .filter_map(|pod| observed.states.get(pod.uid)?.answers.as_ref());
    let sum = reports.fold(AnswersReport::default(), AnswersReport::with);
    let times = |spread: &Spread| TimeFigures {
        answers: spread.count().into(),
        average_micros: saturating(spread.average_micros()),
        deviation_micros: saturating(spread.deviation_micros()),
    };
    RevisionFigures {
        revision: revision.to_owned(),
        answers: i64::from(sum.finished) + i64::from(sum.failed),
        failed: sum.failed.into(),
        first_token: times(&sum.first_token),
        between_tokens: times(&sum.between_tokens),
    }
}

fn saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// What is known of the old revision, whose groups end one after the other: what they told
/// last when it was enough.
fn remembered(before: Option<&RevisionFigures>, now: RevisionFigures) -> RevisionFigures {
    let tells_more =
        |before: &&RevisionFigures| now.answers < LEAST_ANSWERS && now.answers < before.answers;
    before.filter(tells_more).cloned().unwrap_or(now)
}

/// Why the new revision is to be given up, in a word and in a sentence with numbers.
pub fn worse(compared: &RevisionComparison, limits: &AnswerLimits) -> Option<(Reason, String)> {
    fails_more(compared, limits).or_else(|| is_slower(compared, limits))
}

fn fails_more(compared: &RevisionComparison, limits: &AnswerLimits) -> Option<(Reason, String)> {
    let percent = limits.failed_percent?;
    let RevisionComparison { old, new, .. } = compared;
    if new.answers < LEAST_ANSWERS {
        return None;
    }
    // An old revision that nobody asked anything has not failed.
    let before = if old.answers < LEAST_ANSWERS {
        0.0
    } else {
        share(old)
    };
    let allowed = before + f64::from(percent) / 100.0;
    let is_worse = least_share(new.failed as f64, new.answers as f64) > allowed;
    is_worse.then(|| {
        let message = format!(
            "{}; the limit is {percent} % more (spec.rollout.rollbackOn.errorRatePercent)",
            failures(compared)
        );
        (Reason::ErrorRateExceeded, message)
    })
}

fn share(figures: &RevisionFigures) -> f64 {
    figures.failed as f64 / figures.answers.max(1) as f64
}

/// The lowest share of failures that makes `failed` of `answers` no surprise (the lower end
/// of Wilson's interval).
fn least_share(failed: f64, answers: f64) -> f64 {
    let (share, z) = (failed / answers, BEYOND_CHANCE);
    let weight = z * z / answers;
    let middle = share + weight / 2.0;
    let half = z * (share * (1.0 - share) / answers + weight / (4.0 * answers)).sqrt();
    (middle - half) / (1.0 + weight)
}

fn is_slower(compared: &RevisionComparison, limits: &AnswerLimits) -> Option<(Reason, String)> {
    let percent = limits.slower_percent?;
    let (old, new) = (&compared.old, &compared.new);
    let mut times = [
        ("to the first token", old.first_token, new.first_token),
        (
            "from token to token",
            old.between_tokens,
            new.between_tokens,
        ),
    ]
    .into_iter();
    let (what, before, after) =
        times.find(|(_, before, after)| takes_longer(before, after, percent))?;
    let more = (after.average_micros as f64 / before.average_micros as f64 - 1.0) * 100.0;
    let message = format!(
        "revision {} takes {} {what} on average of {} answers, {} {} of {}: {more:.0} % more; the \
         limit is {percent} % (spec.rollout.rollbackOn.latencyRegressionPercent)",
        new.revision,
        millis(&after),
        after.answers,
        old.revision,
        millis(&before),
        before.answers,
    );
    Some((Reason::LatencyRegression, message))
}

/// Whether `after` is longer than `before` by more than `percent`, beyond chance.
fn takes_longer(before: &TimeFigures, after: &TimeFigures, percent: u32) -> bool {
    let too_few = before.answers < LEAST_ANSWERS || after.answers < LEAST_ANSWERS;
    if too_few || before.average_micros == 0 {
        return false;
    }
    let allowed = 1.0 + f64::from(percent) / 100.0;
    let average = |times: &TimeFigures| times.average_micros as f64;
    let variance = |times: &TimeFigures| {
        let deviation = times.deviation_micros as f64;
        deviation * deviation / times.answers as f64
    };
    let chance = (variance(after) + allowed * allowed * variance(before)).sqrt();
    average(after) - allowed * average(before) > BEYOND_CHANCE * chance
}

/// What is said when all groups have moved, the last one at `since`, and answers are still
/// compared.
pub fn watch(since: Option<Timestamp>, window: Option<Duration>) -> String {
    let until = since.and_then(|since| since.checked_add(window.unwrap_or_default()).ok());
    let until = until.map_or_else(String::new, |until| format!(" until {until}"));
    format!(
        "all groups have moved; the revision can still be given up for its answers{until} \
         (spec.rollout.rollbackOn.window)"
    )
}

/// What was compared, in a sentence.
pub fn summary(compared: &RevisionComparison) -> String {
    let (old, new) = (&compared.old, &compared.new);
    let against = |before: &TimeFigures, after: &TimeFigures| match (before.answers, after.answers)
    {
        (0, _) | (_, 0) => None,
        _ => Some(format!("{} against {}", millis(after), millis(before))),
    };
    let first = against(&old.first_token, &new.first_token)
        .map(|times| format!("to the first token {times}"));
    let between = against(&old.between_tokens, &new.between_tokens)
        .map(|times| format!("from token to token {times}"));
    let parts: Vec<_> = [Some(failures(compared)), first, between]
        .into_iter()
        .flatten()
        .collect();
    parts.join(", ")
}

fn failures(compared: &RevisionComparison) -> String {
    let (old, new) = (&compared.old, &compared.new);
    format!(
        "revision {} failed {} of {} answers ({:.1} %), {} {} of {} ({:.1} %)",
        new.revision,
        new.failed,
        new.answers,
        share(new) * 100.0,
        old.revision,
        old.failed,
        old.answers,
        share(old) * 100.0,
    )
}

fn millis(times: &TimeFigures) -> String {
    format!("{:.1} ms", times.average_micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests;
