//! Why a group ended: the first cause among its pods. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ContainerStateTerminated;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::{FailureCategory, FailureReport};
use llama_crds::v1alpha1::{GroupFailure, Reason};

use super::condition::cut;
use super::pods::PodView;
use crate::cluster::kinds::ContainerView;

/// Longest message kept in status, in characters.
const MESSAGE_LIMIT: usize = 900;

/// Why a group ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    /// The kind in one word.
    pub reason: String,
    /// What happened.
    pub message: String,
    /// The rank that failed first.
    pub rank: Option<u32>,
    /// The node that ran it.
    pub node: Option<String>,
    /// The pod that told.
    pub pod: String,
    /// Whether the same spec would fail the same way again.
    pub permanent: bool,
    /// Whether somebody took the pod away: no fault of the group.
    pub is_disruption: bool,
    /// When it happened.
    pub at: Timestamp,
}

impl Cause {
    /// Whether only a peer tells of it: the pod where it happened may have more to say.
    pub fn is_hearsay(&self) -> bool {
        self.reason == FailureCategory::PeerLost.as_str()
    }

    /// The cause as status holds it.
    pub fn to_status(&self, now: Timestamp) -> GroupFailure {
        GroupFailure {
            rank: self.rank.and_then(|rank| i32::try_from(rank).ok()),
            node: self.node.clone(),
            reason: self.reason.clone(),
            message: self.message.clone(),
            time: Time(now),
        }
    }
}

/// The first cause among `pods`, if one of them ended or is being deleted.
///
/// A cause that would repeat comes before others, then what is no hearsay, then one that
/// names a rank, then the earliest: ranks that lose a peer also end, and must not hide it.
pub fn cause(pods: &[PodView<'_>], memory: &str) -> Option<Cause> {
    pods.iter()
        .filter_map(|pod| of_pod(pod, memory))
        .min_by_key(|cause| {
            let hearsay = cause.is_hearsay();
            (!cause.permanent, hearsay, cause.rank.is_none(), cause.at)
        })
}

/// Whether a failure recorded in status is of the model itself.
pub fn concerns_model(reason: &str) -> bool {
    category(reason).is_some_and(FailureCategory::concerns_model)
}

fn category(reason: &str) -> Option<FailureCategory> {
    FailureCategory::ALL
        .into_iter()
        .find(|category| category.as_str() == reason)
}

fn of_pod(pod: &PodView<'_>, memory: &str) -> Option<Cause> {
    let ended = pod.containers().find_map(|container| {
        let terminated = container.state.as_ref()?.terminated.as_ref()?;
        let counts = terminated.exit_code != 0 || pod.is_over();
        // Init containers end well before the pod starts to serve.
        let is_init = container.name != super::plan::WORKER_CONTAINER;
        (counts && !(is_init && terminated.exit_code == 0)).then_some((container, terminated))
    });
    if let Some((container, terminated)) = ended
        && (!pod.is_deleting()
            || FailureReport::from_termination_message(text(terminated)).is_some())
    {
        return Some(of_container(pod, container, terminated, memory));
    }
    if pod.is_deleting() {
        return Some(of_deletion(pod));
    }
    pod.is_over().then(|| of_pod_status(pod))
}

fn text(terminated: &ContainerStateTerminated) -> &str {
    terminated.message.as_deref().unwrap_or_default()
}

fn of_container(
    pod: &PodView<'_>,
    container: &ContainerView,
    terminated: &ContainerStateTerminated,
    memory: &str,
) -> Cause {
    let at = terminated
        .finished_at
        .as_ref()
        .map_or(Timestamp::MAX, |time| time.0);
    let killed_for_memory = terminated.reason.as_deref() == Some("OOMKilled");
    let report = FailureReport::from_termination_message(text(terminated));
    let on = on_node(pod);
    let (name, code) = (&container.name, terminated.exit_code);
    let limit = format!("a container of the pod used more than its memory limit of {memory}");
    let (reason, message) = match &report {
        Some(report) if killed_for_memory && !report.category.is_permanent() => (
            Reason::OOMKilled.as_str(),
            format!("{}; {limit}", report.message),
        ),
        Some(report) => (report.category.as_str(), report.message.clone()),
        None if killed_for_memory => (
            Reason::OOMKilled.as_str(),
            format!(
                "container {name} of pod {}{on} was killed: {limit}",
                pod.name
            ),
        ),
        None => {
            let signal = match code {
                129..=192 => format!(" (signal {})", code - 128),
                _ => String::new(),
            };
            let pod = pod.name;
            (
                Reason::ContainerExited.as_str(),
                format!(
                    "container {name} of pod {pod}{on} ended with exit code {code}{signal} and left no report"
                ),
            )
        }
    };
    let category = report.as_ref().map(|report| report.category);
    let permanent = category.is_some_and(FailureCategory::is_permanent);
    Cause {
        reason: reason.to_owned(),
        message: cut(&message, MESSAGE_LIMIT),
        rank: report.as_ref().and_then(|report| report.rank),
        node: report
            .and_then(|report| report.node)
            .or_else(|| pod.node_name().map(str::to_owned)),
        pod: pod.name.to_owned(),
        permanent,
        is_disruption: false,
        at,
    }
}

fn of_deletion(pod: &PodView<'_>) -> Cause {
    let meta = &pod.pod.metadata;
    let grace = meta.deletion_grace_period_seconds.unwrap_or(0);
    let deadline = meta
        .deletion_timestamp
        .as_ref()
        .map_or(Timestamp::MAX, |time| time.0);
    let asked = deadline
        .checked_sub(jiff::SignedDuration::from_secs(grace))
        .unwrap_or(deadline);
    let on = on_node(pod);
    let disruption = pod
        .condition("DisruptionTarget")
        .filter(|condition| condition.status == "True");
    let (reason, message) = match disruption {
        Some(condition) => {
            let why = condition.reason.as_deref().unwrap_or("unknown reason");
            let reason = match why {
                "DeletionByTaintManager" | "DeletionByPodGC" => Reason::NodeLost,
                _ => Reason::PodEvicted,
            };
            let text = condition.message.as_deref().unwrap_or_default();
            (
                reason,
                format!("pod {}{on} was taken away ({why}): {text}", pod.name),
            )
        }
        None => (
            Reason::PodDeleted,
            format!("pod {}{on} was deleted by somebody", pod.name),
        ),
    };
    Cause {
        reason: reason.as_str().to_owned(),
        message: cut(&message, MESSAGE_LIMIT),
        rank: None,
        node: pod.node_name().map(str::to_owned),
        pod: pod.name.to_owned(),
        permanent: false,
        is_disruption: true,
        at: asked,
    }
}

/// A pod that the kubelet or the control plane ended without a container's word.
fn of_pod_status(pod: &PodView<'_>) -> Cause {
    let status = &pod.pod.status;
    let text = status.message.as_deref().unwrap_or("no message");
    let (reason, is_disruption) = match status.reason.as_deref() {
        Some("Evicted" | "Preempted") => (Reason::PodEvicted.as_str(), true),
        Some("NodeLost" | "NodeShutdown" | "Shutdown" | "Terminated") => {
            (Reason::NodeLost.as_str(), true)
        }
        Some(other) => (other, false),
        None => (Reason::ContainerExited.as_str(), false),
    };
    Cause {
        reason: reason.to_owned(),
        message: cut(
            &format!("pod {}{} ended: {text}", pod.name, on_node(pod)),
            MESSAGE_LIMIT,
        ),
        rank: None,
        node: pod.node_name().map(str::to_owned),
        pod: pod.name.to_owned(),
        permanent: false,
        is_disruption,
        at: Timestamp::MAX,
    }
}

/// A pod of a group that is gone without a trace.
pub fn vanished(pod: &str) -> Cause {
    Cause {
        reason: Reason::PodDeleted.as_str().to_owned(),
        message: format!("pod {pod} is gone: somebody deleted it"),
        rank: None,
        node: None,
        pod: pod.to_owned(),
        permanent: false,
        is_disruption: true,
        at: Timestamp::MAX,
    }
}

fn on_node(pod: &PodView<'_>) -> String {
    pod.node_name()
        .map(|node| format!(" on node {node}"))
        .unwrap_or_default()
}
