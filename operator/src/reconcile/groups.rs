//! The life of groups: which incarnation of each should exist, what to create and what
//! to delete for it. Pure.
//!
//! `status.groups` is the intent: an incarnation (revision and epoch) is written there
//! before the pods of an older one are deleted. So a failure is on record before its
//! evidence goes, and an operator that is stopped between any two writes goes on where
//! it was.

use std::time::Duration;

use jiff::Timestamp;
use llama_crds::v1alpha1::{GroupPhase, GroupStatus, Reason};

use super::failure::{self, Cause};
use super::pods::PodView;
use super::validate::ValidDeployment;
use crate::names;

/// A group that served this long has a clean record again.
pub const STABLE_AFTER: Duration = Duration::from_mins(10);
/// Grace of pods whose group has failed: no answer of theirs can be finished.
const FAILED_GRACE_SECONDS: u32 = 10;
/// First and longest pause before a failed group is created again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(5));

/// Whether pods of the current revision may be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewPods {
    /// Yes.
    Allowed,
    /// Not now; the sentence says why. Groups that exist go on as they are.
    Held(String),
}

/// A pod that should go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Name.
    pub name: String,
    /// UID that must still be the pod's.
    pub uid: String,
    /// Grace in seconds; the pod's own when absent.
    pub grace: Option<u32>,
}

/// A failure that was not on record yet.
#[derive(Clone, Debug, PartialEq)]
pub struct NewFailure {
    /// The group.
    pub group: u32,
    /// The incarnation that failed.
    pub epoch: i64,
    /// Why.
    pub cause: Cause,
    /// Failures in a row, with this one.
    pub restarts: i32,
}

/// What should become of one group.
#[derive(Clone, Debug)]
pub struct GroupPlan {
    /// Its entry in status.
    pub status: GroupStatus,
    /// Whether it should exist.
    pub wanted: bool,
    /// Pods to create, by their place in the group.
    pub create: Vec<u32>,
    /// Pods to delete.
    pub delete: Vec<Deletion>,
    /// A failure seen for the first time.
    pub failure: Option<NewFailure>,
    /// When to look again without an event.
    pub wake_after: Option<Duration>,
    /// Whether it has any pod now.
    pub has_pods: bool,
}

impl GroupPlan {
    /// Whether it serves.
    pub fn is_ready(&self) -> bool {
        self.status.phase == GroupPhase::Ready
    }

    fn new(status: GroupStatus, pods: &[PodView<'_>]) -> Self {
        Self {
            status,
            wanted: true,
            create: Vec::new(),
            delete: Vec::new(),
            failure: None,
            wake_after: None,
            has_pods: !pods.is_empty(),
        }
    }

    fn in_phase(mut self, phase: GroupPhase, message: impl Into<String>) -> Self {
        self.status.phase = phase;
        self.status.message = Some(message.into());
        self
    }
}

/// Pause before a group that failed `restarts` times in a row is created again.
pub fn pause(restarts: i32) -> Duration {
    let doublings = u32::try_from(restarts.saturating_sub(1))
        .unwrap_or(0)
        .min(16);
    (BACKOFF.0 * 2_u32.pow(doublings)).min(BACKOFF.1)
}

/// Plans every group that is wanted, has pods or stands in status.
///
/// `pods` are all pods with the deployment's label, `previous` the groups of status and
/// `revision` what new pods are made from.
pub fn plan(
    deployment: &ValidDeployment,
    revision: &str,
    previous: &[GroupStatus],
    pods: &[PodView<'_>],
    new_pods: &NewPods,
    now: Timestamp,
) -> Vec<GroupPlan> {
    let wanted = deployment.wanted_groups();
    let mut indices: Vec<u32> = (0..wanted).collect();
    indices.extend(pods.iter().map(|pod| pod.group));
    indices.sort_unstable();
    indices.dedup();
    let mut plans: Vec<GroupPlan> = indices
        .into_iter()
        .filter_map(|index| {
            let (mine, others): (Vec<_>, Vec<_>) = pods
                .iter()
                .copied()
                .filter(|pod| pod.group == index)
                .partition(|pod| pod.is_owned_by(&deployment.uid));
            if index >= wanted && mine.is_empty() {
                return None;
            }
            let group = Group {
                deployment,
                revision,
                index,
                previous: previous
                    .iter()
                    .find(|entry| u32::try_from(entry.index) == Ok(index)),
                pods: &mine,
                strangers: &others,
                new_pods,
                now,
            };
            Some(if index < wanted {
                group.keep()
            } else {
                group.end()
            })
        })
        .collect();
    if *new_pods == NewPods::Allowed {
        roll_out(&mut plans, revision);
    }
    plans
}

/// Moves groups of an older revision to `revision`: those that do not serve at once,
/// the others one at a time and only while all others serve.
fn roll_out(plans: &mut [GroupPlan], revision: &str) {
    let mut all_ready = plans
        .iter()
        .filter(|group| group.wanted)
        .all(GroupPlan::is_ready);
    for group in plans.iter_mut().filter(|group| group.wanted) {
        if group.status.revision == revision {
            continue;
        }
        if group.is_ready() && !all_ready {
            continue;
        }
        all_ready = false;
        let phase = if group.has_pods {
            GroupPhase::Draining
        } else {
            GroupPhase::Waiting
        };
        group.status = GroupStatus {
            revision: revision.to_owned(),
            epoch: group.status.epoch + 1,
            restarts: 0,
            phase,
            message: Some("moving to the new revision of the spec".to_owned()),
            ..group.status.clone()
        };
        // The pods go once this is on record.
        group.create.clear();
        group.wake_after = Some(Duration::ZERO);
    }
}

/// One group with everything that decides about it.
struct Group<'a> {
    deployment: &'a ValidDeployment,
    revision: &'a str,
    index: u32,
    previous: Option<&'a GroupStatus>,
    pods: &'a [PodView<'a>],
    strangers: &'a [PodView<'a>],
    new_pods: &'a NewPods,
    now: Timestamp,
}

impl Group<'_> {
    /// The incarnation that should exist: what status says, unless a pod is newer (its
    /// creation came before the status write that never came).
    fn current(&self) -> GroupStatus {
        let fresh = || GroupStatus {
            index: i32::try_from(self.index).unwrap_or(i32::MAX),
            revision: self.revision.to_owned(),
            epoch: 0,
            phase: GroupPhase::Waiting,
            message: None,
            nodes: Vec::new(),
            restarts: 0,
            last_failure: None,
        };
        let mut status = self.previous.cloned().unwrap_or_else(fresh);
        let newest = self.pods.iter().max_by_key(|pod| pod.epoch);
        if let Some(newest) = newest
            && (newest.epoch > status.epoch || self.previous.is_none())
        {
            status.epoch = newest.epoch;
            newest.revision.clone_into(&mut status.revision);
            status.phase = GroupPhase::Waiting;
        }
        status
    }

    fn name(&self) -> String {
        names::group(&self.deployment.name, self.index)
    }

    fn pod_name(&self, node: u32) -> String {
        names::pod(&self.deployment.name, self.index, node)
    }

    /// The group is wanted.
    fn keep(&self) -> GroupPlan {
        let mut status = self.current();
        let (mine, old): (Vec<_>, Vec<_>) = self
            .pods
            .iter()
            .partition(|pod| pod.epoch == status.epoch && pod.revision == status.revision);
        status.nodes = nodes(if mine.is_empty() { &old } else { &mine });
        let plan = GroupPlan::new(status, self.pods);
        if !old.is_empty() {
            return self.clear(plan, &old);
        }
        if mine.is_empty() {
            return self.start(plan);
        }
        match failure::cause(&mine, &self.deployment.memory).or_else(|| self.hole(&mine)) {
            Some(cause) => self.fail(plan, &mine, cause),
            None => self.run(plan, &mine),
        }
    }

    /// The group is not wanted any more.
    fn end(&self) -> GroupPlan {
        let mut status = self.current();
        status.nodes = nodes(self.pods);
        let mut plan = GroupPlan::new(status, self.pods);
        plan.wanted = false;
        plan.delete = deletions(self.pods, None);
        let names = list(self.pods);
        plan.in_phase(GroupPhase::Draining, format!("ending {names}"))
    }

    /// Pods of an earlier incarnation have to go first.
    fn clear(&self, mut plan: GroupPlan, old: &[PodView<'_>]) -> GroupPlan {
        let failed = matches!(plan.status.phase, GroupPhase::Restarting);
        plan.delete = deletions(old, failed.then_some(FAILED_GRACE_SECONDS));
        let phase = if failed {
            GroupPhase::Restarting
        } else {
            GroupPhase::Draining
        };
        let lost: Vec<_> = old
            .iter()
            .filter(|pod| pod.is_deleting() && overdue(pod, self.now))
            .collect();
        let message = match lost.first() {
            None => format!("waiting for {} to end", list(old)),
            Some(pod) => format!(
                "pod {} should have ended, but its node {} does not answer; repair or remove the \
                 node, or delete the pod with --force --grace-period=0",
                pod.name,
                pod.node_name().unwrap_or("(none)")
            ),
        };
        plan.wake_after = Some(Duration::from_mins(1));
        plan.in_phase(phase, message)
    }

    /// There are no pods: create them all, when it is time.
    fn start(&self, mut plan: GroupPlan) -> GroupPlan {
        if let Some(stranger) = self.strangers.first() {
            plan.wake_after = Some(Duration::from_secs(10));
            let message = format!(
                "pod {} of an earlier LlamaDeployment of this name has yet to end",
                stranger.name
            );
            return plan.in_phase(GroupPhase::Waiting, message);
        }
        match plan.status.phase {
            GroupPhase::Waiting | GroupPhase::Restarting | GroupPhase::Draining => {}
            // Somebody deleted the evidence of a permanent failure: try once more.
            GroupPhase::Failed => {
                plan.status.epoch += 1;
                plan.status.restarts = 0;
            }
            GroupPhase::Scheduling
            | GroupPhase::Fetching
            | GroupPhase::LoadingWeights
            | GroupPhase::Ready
            | GroupPhase::Unready => {
                let cause = failure::vanished(&self.pod_name(0));
                return self.restart(plan, &cause);
            }
        }
        let wait = self.pause_left(&plan.status);
        if wait > Duration::ZERO {
            plan.wake_after = Some(wait);
            let failures = plan.status.restarts;
            let reason = plan
                .status
                .last_failure
                .as_ref()
                .map_or("a failure", |failure| failure.reason.as_str());
            let pause = pause(failures).as_secs();
            let message = format!(
                "recreating the group {pause} s after failure {failures} in a row ({reason})"
            );
            return plan.in_phase(GroupPhase::Restarting, message);
        }
        if let NewPods::Held(why) = self.new_pods {
            return plan.in_phase(GroupPhase::Waiting, why.clone());
        }
        plan.create = (0..self.deployment.nodes).collect();
        // Another revision may be wanted by now; its pods are made from this one's inputs.
        self.revision.clone_into(&mut plan.status.revision);
        let count = plan.create.len();
        plan.in_phase(GroupPhase::Waiting, format!("creating {count} pods"))
    }

    fn pause_left(&self, status: &GroupStatus) -> Duration {
        let (Some(failure), true) = (&status.last_failure, status.restarts > 0) else {
            return Duration::ZERO;
        };
        let since = self.now.duration_since(failure.time.0);
        let since = Duration::try_from(since).unwrap_or_default();
        pause(status.restarts).saturating_sub(since)
    }

    /// A pod is missing although others of the group run already: the missing one ran too.
    fn hole(&self, mine: &[PodView<'_>]) -> Option<Cause> {
        let running = mine.iter().any(|pod| pod.phase() == "Running");
        let missing = self.missing(mine).first().copied()?;
        running.then(|| failure::vanished(&self.pod_name(missing)))
    }

    fn missing(&self, mine: &[PodView<'_>]) -> Vec<u32> {
        (0..self.deployment.nodes)
            .filter(|node| !mine.iter().any(|pod| pod.node == *node))
            .collect()
    }

    /// A pod of the current incarnation ended or is going away.
    fn fail(&self, mut plan: GroupPlan, mine: &[PodView<'_>], mut cause: Cause) -> GroupPlan {
        let evidence: Vec<_> = mine
            .iter()
            .filter(|pod| pod.has_ended() && !pod.is_deleting())
            .collect();
        match plan.status.phase {
            // We asked for it ourselves, and then the group was wanted again.
            GroupPhase::Draining if mine.iter().any(PodView::is_deleting) => {
                plan.status.epoch += 1;
                plan.wake_after = Some(Duration::ZERO);
                let message = format!("waiting for {} to end", list(mine));
                return plan.in_phase(GroupPhase::Draining, message);
            }
            GroupPhase::Failed if evidence.is_empty() => {
                plan.status.epoch += 1;
                plan.status.restarts = 0;
                plan.wake_after = Some(Duration::ZERO);
                return plan.in_phase(GroupPhase::Draining, "trying again".to_owned());
            }
            // Keep the evidence, free what still runs.
            GroupPhase::Failed => {
                let running: Vec<_> = mine
                    .iter()
                    .filter(|pod| !pod.has_ended())
                    .copied()
                    .collect();
                plan.delete = deletions(&running, Some(FAILED_GRACE_SECONDS));
                return plan;
            }
            _ => {}
        }
        let repeated = cause.reason == Reason::OOMKilled.as_str()
            && plan.status.restarts > 0
            && plan
                .status
                .last_failure
                .as_ref()
                .is_some_and(|last| last.reason == cause.reason);
        if repeated {
            cause.permanent = true;
            cause.message = format!(
                "{}, twice in a row; raise spec.resources.memory",
                cause.message
            );
        }
        if cause.permanent && !evidence.is_empty() {
            plan.failure = Some(self.new_failure(&plan, &cause));
            plan.status.last_failure = Some(cause.to_status(self.now));
            plan.wake_after = Some(Duration::ZERO);
            let message = format!(
                "{} Then change the spec, or delete pod {} to try again.",
                sentence(&cause.message),
                cause.pod
            );
            return plan.in_phase(GroupPhase::Failed, message);
        }
        self.restart(plan, &cause)
    }

    fn new_failure(&self, plan: &GroupPlan, cause: &Cause) -> NewFailure {
        NewFailure {
            group: self.index,
            epoch: plan.status.epoch,
            cause: cause.clone(),
            restarts: plan.status.restarts.saturating_add(1),
        }
    }

    /// Puts the failure on record and the next incarnation in its place. The pods go in
    /// the next round.
    fn restart(&self, mut plan: GroupPlan, cause: &Cause) -> GroupPlan {
        let failure = self.new_failure(&plan, cause);
        plan.status.restarts = failure.restarts;
        plan.status.epoch += 1;
        plan.status.last_failure = Some(cause.to_status(self.now));
        plan.failure = Some(failure);
        plan.wake_after = Some(Duration::ZERO);
        let message = format!("{} The group is recreated.", sentence(&cause.message));
        plan.in_phase(GroupPhase::Restarting, message)
    }

    /// Nothing has failed: see how far the group is.
    fn run(&self, mut plan: GroupPlan, mine: &[PodView<'_>]) -> GroupPlan {
        plan.create = self.missing(mine);
        let held = *self.new_pods != NewPods::Allowed;
        if !plan.create.is_empty() && (held || plan.status.revision != self.revision) {
            // A half-made group of an older revision cannot be completed.
            plan.create.clear();
        }
        let name = self.name();
        let (phase, message) = if !plan.create.is_empty() {
            (
                GroupPhase::Waiting,
                format!("creating {} pods", plan.create.len()),
            )
        } else if let Some(pod) = mine.iter().find(|pod| pod.node_name().is_none()) {
            (
                GroupPhase::Scheduling,
                format!("pod {} waits for a node", pod.name),
            )
        } else if let Some(pod) = mine.iter().find(|pod| pod.phase() != "Running") {
            let node = pod.node_name().unwrap_or("(none)");
            (
                GroupPhase::Fetching,
                format!(
                    "pod {} is fetching images and the model on node {node}",
                    pod.name
                ),
            )
        } else if let Some(pod) = mine.iter().find(|pod| pod.ready_since().is_none()) {
            let node = pod.node_name().unwrap_or("(none)");
            let served = matches!(plan.status.phase, GroupPhase::Ready | GroupPhase::Unready);
            if served {
                (
                    GroupPhase::Unready,
                    format!(
                        "pod {} on node {node} served and answers no longer",
                        pod.name
                    ),
                )
            } else {
                (
                    GroupPhase::LoadingWeights,
                    format!("pod {} on node {node} is loading weights", pod.name),
                )
            }
        } else {
            self.note_stability(&mut plan, mine);
            (GroupPhase::Ready, format!("group {name} serves"))
        };
        plan.in_phase(phase, message)
    }

    /// Clears the record of a group that has served long enough.
    fn note_stability(&self, plan: &mut GroupPlan, mine: &[PodView<'_>]) {
        if plan.status.restarts == 0 {
            return;
        }
        let Some(since) = mine
            .iter()
            .filter_map(PodView::ready_since)
            .map(|time| time.0)
            .max()
        else {
            return;
        };
        let served = Duration::try_from(self.now.duration_since(since)).unwrap_or_default();
        if served >= STABLE_AFTER {
            plan.status.restarts = 0;
        } else {
            plan.wake_after = Some(STABLE_AFTER.saturating_sub(served));
        }
    }
}

/// Whether a pod should have been gone for a minute.
fn overdue(pod: &PodView<'_>, now: Timestamp) -> bool {
    let deadline = pod.pod.metadata.deletion_timestamp.as_ref();
    deadline.is_some_and(|time| now.duration_since(time.0).as_secs() > 60)
}

fn deletions(pods: &[PodView<'_>], grace: Option<u32>) -> Vec<Deletion> {
    pods.iter()
        .filter(|pod| !pod.is_deleting())
        .map(|pod| Deletion {
            name: pod.name.to_owned(),
            uid: pod.uid.to_owned(),
            grace,
        })
        .collect()
}

fn nodes(pods: &[PodView<'_>]) -> Vec<String> {
    let mut pods: Vec<_> = pods.to_vec();
    pods.sort_by_key(|pod| pod.node);
    pods.iter()
        .filter_map(|pod| pod.node_name().map(str::to_owned))
        .collect()
}

fn list(pods: &[PodView<'_>]) -> String {
    match pods {
        [] => "no pod".to_owned(),
        [pod] => format!("pod {}", pod.name),
        [first, rest @ ..] => format!("pod {} and {} more", first.name, rest.len()),
    }
}

/// `text` with a full stop.
fn sentence(text: &str) -> String {
    let text = text.trim_end();
    if text.ends_with(['.', '!', '?', '…']) {
        text.to_owned()
    } else {
        format!("{text}.")
    }
}
