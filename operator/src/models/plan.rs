//! Step 3: which pods should fetch and which should go, and how each copy is. Pure: same
//! input, same plan.
//!
//! `status.nodes` is the memory. That a copy is whole, or that a fetch failed, is written
//! there before the pod that told so is deleted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_crds::v1alpha1::{
    Copies, GroupPhase, LlamaModelStatus, MAX_MODEL_NODES, MAX_TEXT, ModelNodePhase,
    ModelNodeStatus, Reason,
};

use super::validate::ValidModel;
use crate::backoff::doubled;
use crate::cluster::kinds::WorkerPod;
use crate::cluster::known::KnownNode;
use crate::labels;
use crate::names;
use crate::reconcile::condition::cut;
use crate::reconcile::failure;
use crate::reconcile::groups::{Deletion, deletions};
use crate::reconcile::observe::{Claim, PodState};
use crate::reconcile::placement::is_tolerated;
use crate::reconcile::plan::WorkerSettings;
use crate::reconcile::plan::fetching::{self, FETCHING_MEMORY};
use crate::reconcile::pods::PodView;
use crate::reconcile::progress;
use crate::reconcile::source::Source;
use crate::reconcile::waiting::{self, Obstacle};

/// Fetches of a copy that fail in a row before it takes `recheckEvery` to try again.
pub const MOST_FAILURES: i32 = 8;
/// First and longest pause before a fetch is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));
/// Time between two looks at how far a fetch is.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Time between two looks at a claim that does not exist.
const CLAIM_EVERY: Duration = Duration::from_secs(10);

/// What the cluster holds for one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Pods with the model's label, whoever owns them.
    pub pods: Vec<Arc<WorkerPod>>,
    /// What pods said, by their UID.
    pub states: BTreeMap<String, PodState>,
    /// Every node; `None` where the operator may not see them.
    pub nodes: Option<Vec<KnownNode>>,
    /// The claim of the cache.
    pub claim: Claim,
    /// Deployments that use the model.
    pub users: Vec<String>,
}

/// What should be done, and what status should hold.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Pods to create.
    pub create: Vec<Pod>,
    /// Pods to delete.
    pub delete: Vec<Deletion>,
    /// Every copy, by the node's name.
    pub nodes: Vec<ModelNodeStatus>,
    /// Nodes whose fetch has just failed.
    pub failed: Vec<String>,
    /// What is wrong with the claim.
    pub claim: Option<Obstacle>,
    /// Whether nodes would have to be seen and may not.
    pub is_blind: bool,
    /// Nodes that match and are too many for one status.
    pub left_out: usize,
    /// Deployments that use the model.
    pub users: Vec<String>,
    /// What the API server did not let happen, once that was tried.
    pub refused: Option<String>,
    /// When to look again without an event.
    pub wake_after: Option<Duration>,
}

/// What is to be done about one copy.
#[derive(Debug, Default)]
struct Step {
    pod: PodStep,
    /// Whether its pod fetches, or soon will.
    is_busy: bool,
    /// Whether a failure is seen for the first time.
    failed: bool,
    wake_after: Option<Duration>,
}

/// What is to be done about its pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum PodStep {
    #[default]
    Leave,
    Create,
    Delete,
}

impl PodStep {
    /// `self`, where `condition` holds.
    fn only_if(self, condition: bool) -> Self {
        if condition { self } else { Self::Leave }
    }
}

/// One copy that there should be.
struct Copy<'a> {
    /// Name of its entry.
    name: &'a str,
    /// The node; `None` for the copy of all.
    node: Option<&'a KnownNode>,
    /// What status said of it, as far as that still holds.
    before: Option<&'a ModelNodeStatus>,
}

/// Plans `model`, given what the cluster holds and what status said before.
pub fn plan(
    model: &ValidModel,
    settings: &WorkerSettings,
    seen: &Seen,
    previous: &LlamaModelStatus,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan {
        claim: waiting::of_named_claim(
            &model.cache.claim,
            "spec.cache",
            &model.namespace,
            &seen.claim,
        ),
        is_blind: model.copies == Copies::PerNode && seen.nodes.is_none(),
        users: seen.users.clone(),
        ..Plan::default()
    };
    if plan.is_blind {
        return plan;
    }
    let situation = Situation {
        model,
        seen,
        previous,
        now,
    };
    let (copies, left_out) = situation.copies();
    plan.left_out = left_out;
    let views: Vec<_> = seen.pods.iter().filter_map(|pod| view(pod)).collect();
    let mut waiting = Vec::new();
    let mut busy = 0;
    for copy in &copies {
        let pod_name = names::fetch(&model.name, copy.name);
        let pod = views.iter().find(|pod| pod.name == pod_name);
        let mut entry = copy.before.cloned().unwrap_or_else(|| fresh(copy.name));
        let step = situation.step(copy, pod, &mut entry);
        busy += usize::from(step.is_busy);
        plan.wake_after = plan.wake_after.into_iter().chain(step.wake_after).min();
        if let Some(pod) = pod.filter(|_| step.pod == PodStep::Delete) {
            plan.delete.extend(deletions(&[*pod], None));
        }
        if step.failed {
            plan.failed.push(copy.name.to_owned());
        }
        if step.pod == PodStep::Create {
            waiting.push((entry.phase == ModelNodePhase::Ready, copy));
        }
        plan.nodes.push(entry);
    }
    let wanted: Vec<_> = copies
        .iter()
        .map(|copy| names::fetch(&model.name, copy.name))
        .collect();
    let needless = views
        .iter()
        .filter(|pod| !wanted.iter().any(|name| name == pod.name));
    let needless: Vec<_> = needless
        .copied()
        .filter(|pod| situation.may_delete(pod))
        .collect();
    plan.delete.extend(deletions(&needless, None));
    if plan.claim.as_ref().is_some_and(|obstacle| {
        // A claim that waits for its first pod gets one.
        obstacle.reason != Reason::PersistentVolumeClaimPending
    }) {
        plan.wake_after = plan.wake_after.into_iter().chain([CLAIM_EVERY]).min();
        return plan;
    }
    // Copies that nobody has come before those that are only looked after.
    waiting.sort_by_key(|(is_held, _)| *is_held);
    let free = model.most.saturating_sub(busy);
    plan.create = waiting
        .into_iter()
        .take(free)
        .map(|(_, copy)| fetching::pod(model, settings, copy.node.map(|node| node.name.as_str())))
        .collect();
    plan
}

/// One of our pods.
fn view(pod: &WorkerPod) -> Option<PodView<'_>> {
    PodView::alone(pod, labels::REVISION)
}

fn fresh(name: &str) -> ModelNodeStatus {
    ModelNodeStatus {
        name: name.to_owned(),
        phase: ModelNodePhase::Waiting,
        message: None,
        progress: None,
        reason: None,
        failures: 0,
        stopped: false,
        checked: None,
        pod: None,
    }
}

/// Pause before a fetch is tried again.
fn pause(failures: i32) -> Duration {
    doubled(BACKOFF.0, BACKOFF.1, u32::try_from(failures).unwrap_or(0))
}

struct Situation<'a> {
    model: &'a ValidModel,
    seen: &'a Seen,
    previous: &'a LlamaModelStatus,
    now: Timestamp,
}

impl<'a> Situation<'a> {
    /// The copies that there should be, by name, and how many more there should be.
    fn copies(&self) -> (Vec<Copy<'a>>, usize) {
        if self.model.copies == Copies::Shared {
            let name = self.model.entry_of(None);
            let before = self.before(name, None);
            let copy = Copy {
                name,
                node: None,
                before,
            };
            return (vec![copy], 0);
        }
        let nodes = self.seen.nodes.iter().flatten();
        let mut copies: Vec<_> = nodes
            .filter_map(|node| {
                let before = self.before(&node.name, Some(node));
                self.takes(node, before).then_some(Copy {
                    name: &node.name,
                    node: Some(node),
                    before,
                })
            })
            .collect();
        // Nodes that are on record stay there, whatever the names of new ones are.
        copies.sort_by_key(|copy| (copy.before.is_none(), copy.name));
        let left_out = copies.len().saturating_sub(MAX_MODEL_NODES);
        copies.truncate(MAX_MODEL_NODES);
        copies.sort_by_key(|copy| copy.name);
        (copies, left_out)
    }

    /// What status said of an entry, unless it speaks of another model, of another cache, or
    /// of another machine of the same name.
    fn before(&self, name: &str, node: Option<&KnownNode>) -> Option<&'a ModelNodeStatus> {
        let (previous, model) = (self.previous, self.model);
        let found = previous.nodes.iter().find(|entry| entry.name == name)?;
        let same_copy = previous.identity.as_ref() == Some(&model.cache.entry)
            && previous.claim_name.as_ref() == Some(&model.cache.claim);
        let same_revision = previous.revision.as_ref() == Some(&model.revision);
        let created = node.and_then(|node| node.created);
        let checked = found.checked.as_ref().map(|time| time.0);
        let is_older =
            matches!((created, checked), (Some(created), Some(checked)) if checked < created);
        let holds = same_revision || found.phase == ModelNodePhase::Ready;
        (same_copy && holds && !is_older).then_some(found)
    }

    /// Whether `node` should have a copy. While it takes no pods it keeps the one that it has,
    /// and a fetch that is under way goes on.
    fn takes(&self, node: &KnownNode, before: Option<&ModelNodeStatus>) -> bool {
        let wanted = &self.model.nodes;
        let has = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
        let tolerates = || {
            let mut taints = node.taints.iter();
            taints.all(|taint| is_tolerated(taint, &wanted.tolerations))
        };
        let holds = before.is_some_and(|entry| {
            matches!(
                entry.phase,
                ModelNodePhase::Ready | ModelNodePhase::Fetching
            )
        });
        wanted.node_selector.iter().all(has) && (holds || node.open && tolerates())
    }

    /// Whether `pod` is ours, or nobody's.
    fn may_delete(&self, pod: &PodView<'_>) -> bool {
        let owners = pod.pod.metadata.owner_references.as_ref();
        pod.is_owned_by(&self.model.uid) || owners.is_none_or(Vec::is_empty)
    }

    /// What to do about `copy`, whose pod is `pod`. `entry` is made to say how it is.
    fn step(
        &self,
        copy: &Copy<'_>,
        pod: Option<&PodView<'_>>,
        entry: &mut ModelNodeStatus,
    ) -> Step {
        let Some(pod) = pod else {
            return self.absent(copy, entry);
        };
        let is_ours = pod.is_owned_by(&self.model.uid) && pod.revision == self.model.revision;
        if pod.is_deleting() || !is_ours {
            if entry.phase != ModelNodePhase::Ready {
                wait(entry, &format!("waits for pod {} to end", pod.name));
            }
            return Step {
                is_busy: true,
                pod: PodStep::Delete.only_if(self.may_delete(pod)),
                wake_after: Some(BACKOFF.0),
                ..Step::default()
            };
        }
        let is_told = entry.pod.as_deref() == Some(pod.uid);
        if pod.phase() == "Succeeded" {
            if !is_told {
                *entry = ModelNodeStatus {
                    phase: ModelNodePhase::Ready,
                    checked: Some(Time(self.now)),
                    pod: Some(pod.uid.to_owned()),
                    ..fresh(copy.name)
                };
            }
            return Step {
                pod: PodStep::Delete.only_if(is_told),
                ..Step::default()
            };
        }
        match (pod.has_ended(), is_told) {
            (false, _) => self.alive(pod, entry),
            (true, true) => {
                let left = self.left(entry);
                Step {
                    pod: PodStep::Delete.only_if(left.is_zero()),
                    wake_after: Some(left).filter(|left| !left.is_zero()),
                    ..Step::default()
                }
            }
            (true, false) => self.failed(pod, entry),
        }
    }

    /// Time until what `entry` says is looked at again.
    fn left(&self, entry: &ModelNodeStatus) -> Duration {
        let time = match entry.phase {
            ModelNodePhase::Failed if !entry.stopped => pause(entry.failures),
            _ => self.model.recheck,
        };
        let since = entry
            .checked
            .as_ref()
            .map(|time| self.now.duration_since(time.0));
        let since = since.and_then(|since| Duration::try_from(since).ok());
        since.map_or(Duration::ZERO, |since| time.saturating_sub(since))
    }

    /// There is no pod: create one, when it is time. A pod that failed stays until then, so
    /// that one that is gone before was deleted by somebody who wants another try.
    fn absent(&self, copy: &Copy<'_>, entry: &mut ModelNodeStatus) -> Step {
        let is_open = copy.node.is_none_or(|node| node.open);
        if entry.phase == ModelNodePhase::Ready {
            let left = self.left(entry);
            return Step {
                pod: PodStep::Create.only_if(left.is_zero() && is_open),
                wake_after: Some(left).filter(|left| !left.is_zero()),
                ..Step::default()
            };
        }
        if entry.stopped {
            *entry = fresh(copy.name);
        }
        wait(entry, "waits for its turn");
        Step {
            pod: PodStep::Create.only_if(is_open),
            ..Step::default()
        }
    }

    /// The pod waits or runs.
    fn alive(&self, pod: &PodView<'_>, entry: &mut ModelNodeStatus) -> Step {
        let was_ready = entry.phase == ModelNodePhase::Ready;
        let source = Source::Fetched(Box::new(self.model.fetched.clone()));
        let obstacle = waiting::of_scheduling(pod).or_else(|| waiting::of_containers(pod, &source));
        if let Some(obstacle) = obstacle {
            if !was_ready {
                let why = format!("pod {} waits: {}", pod.name, obstacle.message);
                wait(entry, &why);
                entry.reason = Some(obstacle.reason.to_string());
            }
            // What waits for somebody keeps no other node from fetching.
            return Step::default();
        }
        let step = Step {
            is_busy: true,
            wake_after: Some(PROGRESS_EVERY),
            ..Step::default()
        };
        let told = self.seen.states.get(pod.uid);
        // Bytes are counted only where the copy is not whole.
        let is_fetching = told.is_some_and(|state| state.progress.bytes_total > 0);
        if was_ready && !is_fetching {
            return step;
        }
        entry.stopped = false;
        entry.reason = None;
        if pod.phase() == "Running" {
            entry.phase = ModelNodePhase::Fetching;
            let sentence = progress::sentence(pod, GroupPhase::Fetching, told);
            entry.message = Some(cut(&sentence, MAX_TEXT));
            entry.progress = told.and_then(progress::status);
        } else {
            let name = pod.name;
            let why = match pod.node_name() {
                None => format!("pod {name} waits for a node"),
                Some(node) => format!("pod {name} starts on node {node}"),
            };
            wait(entry, &why);
        }
        step
    }

    /// The pod has failed, which status does not know yet.
    fn failed(&self, pod: &PodView<'_>, entry: &mut ModelNodeStatus) -> Step {
        let Some(cause) = failure::cause(&[*pod], FETCHING_MEMORY) else {
            return Step::default();
        };
        let failures = entry.failures + i32::from(!cause.is_disruption);
        let stopped = cause.permanent || failures >= MOST_FAILURES;
        let what = cause.message.trim_end_matches('.');
        let next = if stopped {
            format!(
                "Tried again when the spec changes, when pod {} is deleted, or {} later",
                pod.name,
                progress::duration(self.model.recheck.as_secs())
            )
        } else {
            format!(
                "Attempt {} of {MOST_FAILURES} follows in {} s",
                failures + 1,
                pause(failures).as_secs()
            )
        };
        *entry = ModelNodeStatus {
            phase: ModelNodePhase::Failed,
            message: Some(cut(&format!("{what}. {next}."), MAX_TEXT - 1)),
            reason: Some(cause.reason),
            failures,
            stopped,
            checked: Some(Time(self.now)),
            pod: Some(pod.uid.to_owned()),
            ..fresh(&entry.name)
        };
        Step {
            failed: true,
            ..Step::default()
        }
    }
}

/// Makes `entry` say that it waits, and why.
fn wait(entry: &mut ModelNodeStatus, why: &str) {
    entry.phase = ModelNodePhase::Waiting;
    entry.message = Some(cut(why, MAX_TEXT - 1));
    entry.progress = None;
    entry.reason = None;
}
