//! How far a pod is that its group waits for, in words and numbers. Pure.

use llama_contract::{LoadProgress, WorkerPhase};
use llama_crds::v1alpha1::{GroupPhase, GroupProgress};

use super::fit_words;
use super::observe::PodState;
use super::pods::PodView;

/// What `pod` of a group in `phase` is doing, by what it told last.
pub fn sentence(pod: &PodView<'_>, phase: GroupPhase, told: Option<&PodState>) -> String {
    let node = pod.node_name().unwrap_or("(none)");
    let doing = match (phase, told.map(|state| state.phase)) {
        (GroupPhase::Fetching, Some(WorkerPhase::Fetching)) => "is fetching the model",
        (GroupPhase::Fetching, _) => "is fetching images and the model",
        (_, Some(WorkerPhase::Starting)) => "is reading the headers of the model",
        (_, Some(WorkerPhase::Rendezvous)) => "waits for the ranks of the other pods",
        (_, Some(WorkerPhase::SelfTest)) => "computes the golden answer",
        _ => "is loading weights",
    };
    let mut text = format!("pod {} on node {node} {doing}", pod.name);
    if let Some(far) = told.and_then(far) {
        text.push_str(": ");
        text.push_str(&far);
    }
    text
}

/// The same in numbers, as far as they are known.
pub fn status(told: &PodState) -> Option<GroupProgress> {
    let LoadProgress {
        bytes_per_second,
        seconds_left,
        ..
    } = counted(told)?;
    Some(GroupProgress {
        percent: i32::try_from(percent(told)).unwrap_or(100),
        bytes_per_second: i64::try_from(bytes_per_second).unwrap_or(i64::MAX),
        seconds_left: seconds_left.and_then(|seconds| i64::try_from(seconds).ok()),
    })
}

/// "61 % (1.2 GiB/s, about 22 s left)".
pub(crate) fn short(progress: &GroupProgress) -> String {
    let left = progress.seconds_left.map_or_else(String::new, |seconds| {
        let seconds = u64::try_from(seconds).unwrap_or_default();
        format!(", about {} left", duration(seconds))
    });
    let rate = fit_words::size(progress.bytes_per_second);
    format!("{} % ({rate}/s{left})", progress.percent)
}

/// Where bytes are counted now, and how many there will be is known.
fn counted(told: &PodState) -> Option<LoadProgress> {
    let counts = matches!(
        told.phase,
        WorkerPhase::Fetching | WorkerPhase::LoadingWeights
    );
    (counts && told.progress.bytes_total > 0).then_some(told.progress)
}

fn percent(told: &PodState) -> u64 {
    let progress = told.progress;
    let percent = u128::from(progress.bytes_done) * 100 / u128::from(progress.bytes_total.max(1));
    u64::try_from(percent.min(100)).unwrap_or(100)
}

fn far(told: &PodState) -> Option<String> {
    let progress = counted(told)?;
    let left = progress.seconds_left.map_or_else(String::new, |seconds| {
        format!(", about {} left", duration(seconds))
    });
    Some(format!(
        "{} % of {}, {}/s{left}",
        percent(told),
        size(progress.bytes_total),
        size(progress.bytes_per_second)
    ))
}

fn size(bytes: u64) -> String {
    fit_words::size(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// A length of time for people.
pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3600)),
    }
}
