//! A group that is wanted: created, watched, created again when it failed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_crds::v1alpha1::{FailureMark, GroupPhase, GroupStatus, MAX_RESTARTS, Reason};

use super::ending::hook;
use super::{
    FAILED_GRACE_SECONDS, Group, GroupPlan, NewFailure, Placing, STABLE_AFTER, Taken, Unplaced,
    deletions, ending_message, nodes, sentence,
};
use crate::labels;
use crate::reconcile::failure::{self, Cause};
use crate::reconcile::kueue;
use crate::reconcile::placement::HOSTNAME;
use crate::reconcile::pods::PodView;
use crate::reconcile::progress;

/// A pod that is younger is not asked how far it is: most are ready by then.
const QUICK_START: Duration = Duration::from_secs(5);
/// Time between two questions how far a pod is.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Time between two looks at what a group waits for in Kueue.
const QUOTA_EVERY: Duration = Duration::from_secs(10);
/// Time between two tries to find room for a group.
const ROOM_EVERY: Duration = Duration::from_secs(2);

/// How long a cause that only a peer has told may be bettered by the pod that it is about,
/// and the time between two looks.
const HEAR_WITHIN: Duration = Duration::from_secs(10);
const HEAR_EVERY: Duration = Duration::from_secs(1);

impl Group<'_> {
    /// The group is wanted.
    pub(super) fn keep(&self, mut status: GroupStatus) -> GroupPlan {
        let (mine, old): (Vec<_>, Vec<_>) = self
            .pods
            .iter()
            .partition(|pod| pod.epoch == status.epoch && pod.revision == status.revision);
        let pods = if mine.is_empty() { &old } else { &mine };
        status.nodes = nodes(pods);
        status.pool = pods.iter().find_map(PodView::pool).map(str::to_owned);
        self.forget_old_failures(&mut status);
        let mut plan = GroupPlan::new(status, &self.pods);
        if !old.is_empty() {
            return self.clear(plan, &old);
        }
        if mine.is_empty() {
            return self.start(plan);
        }
        let is_over = plan.status.phase == GroupPhase::Failed;
        if let Some(why) = kueue::taken_back(&mine).filter(|_| !is_over) {
            return self.queue_again(plan, &why);
        }
        let memory = &self.situation.deployment.memory;
        match failure::cause(&mine, memory).or_else(|| self.hole(&plan.status, &mine)) {
            Some(cause) if self.may_hear_more(&cause, &mine) => {
                plan.wake_after = Some(HEAR_EVERY);
                let message = format!("{} The cause is yet to be told.", sentence(&cause.message));
                plan.in_phase(GroupPhase::Unready, message)
            }
            Some(cause) => self.fail(plan, &mine, cause),
            None => self.run(plan, &mine),
        }
    }

    /// Whether only a peer has told of a failure, and pods that run may know its cause: they
    /// end a moment later.
    fn may_hear_more(&self, cause: &Cause, mine: &[PodView<'_>]) -> bool {
        let runs = mine.iter().any(|pod| !pod.has_ended());
        cause.is_hearsay() && runs && self.since(&Time(cause.at)) < HEAR_WITHIN
    }

    fn forget_old_failures(&self, status: &mut GroupStatus) {
        let window = self.situation.deployment.change.restarts.window;
        status
            .recent_failures
            .retain(|failure| self.since(&failure.time) < window);
    }

    /// Pods of an earlier incarnation have to go first.
    fn clear(&self, mut plan: GroupPlan, old: &[PodView<'_>]) -> GroupPlan {
        let failed = matches!(plan.status.phase, GroupPhase::Restarting);
        plan.delete = deletions(old, failed.then_some(FAILED_GRACE_SECONDS));
        let phase = if failed {
            GroupPhase::Restarting
        } else {
            GroupPhase::Waiting
        };
        plan.wake_after = Some(Duration::from_mins(1));
        plan.in_phase(phase, ending_message(old, self.situation.now))
    }

    /// There are no pods: create them all, when it is time.
    pub(super) fn start(&self, mut plan: GroupPlan) -> GroupPlan {
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
            // Somebody deleted the evidence of a failure for good: try once more.
            GroupPhase::Failed => begin_again(&mut plan.status),
            GroupPhase::Scheduling
            | GroupPhase::Fetching
            | GroupPhase::LoadingWeights
            | GroupPhase::Ready
            | GroupPhase::Unready => {
                let cause = failure::vanished(&self.pod_name(0));
                return self.restart(plan, &cause);
            }
        }
        let revision = &plan.status.revision;
        let never_made = plan.status.phase == GroupPhase::Waiting
            && self.course.stable.as_ref() != Some(revision);
        if never_made || self.template(revision).is_none() {
            // Nothing is lost with it, or what it was made from is not known any more.
            self.course.target.clone_into(&mut plan.status.revision);
        }
        let Some(template) = self.template(&plan.status.revision) else {
            return plan.in_phase(GroupPhase::Waiting, "its revision is not known");
        };
        let wait = self.pause_left(&plan.status);
        if wait > Duration::ZERO {
            plan.wake_after = Some(wait);
            let failures = plan.status.restarts;
            let reason = plan
                .status
                .last_failure
                .as_ref()
                .map_or("a failure", |failure| failure.reason.as_str());
            let pause = self.situation.deployment.change.restarts.pause(failures);
            let pause = pause.as_secs();
            let message = format!(
                "recreating the group {pause} s after failure {failures} in a row ({reason})"
            );
            return plan.in_phase(GroupPhase::Restarting, message);
        }
        if let Some(why) = self.held(&plan.status.revision) {
            return plan.in_phase(GroupPhase::Waiting, why);
        }
        plan.create = (0..template.deployment.nodes).collect();
        plan.avoid = self.avoided(&plan.status);
        let count = plan.create.len();
        plan.in_phase(GroupPhase::Waiting, format!("creating {count} pods"))
    }

    /// Nodes on which the group has failed too often.
    fn avoided(&self, status: &GroupStatus) -> BTreeSet<String> {
        let Some(limit) = self.situation.deployment.change.restarts.avoid_node_after else {
            return BTreeSet::new();
        };
        let mut failures: BTreeMap<&str, usize> = BTreeMap::new();
        for failure in &status.recent_failures {
            if let Some(node) = &failure.node {
                *failures.entry(node).or_default() += 1;
            }
        }
        failures
            .into_iter()
            .filter(|(_, count)| *count >= limit)
            .map(|(node, _)| node.to_owned())
            .collect()
    }

    fn pause_left(&self, status: &GroupStatus) -> Duration {
        let (Some(failure), true) = (&status.last_failure, status.restarts > 0) else {
            return Duration::ZERO;
        };
        let pause = self
            .situation
            .deployment
            .change
            .restarts
            .pause(status.restarts);
        pause.saturating_sub(self.since(&failure.time))
    }

    /// A pod is missing although others of the group run already: the missing one ran too.
    fn hole(&self, status: &GroupStatus, mine: &[PodView<'_>]) -> Option<Cause> {
        let running = mine.iter().any(|pod| pod.phase() == "Running");
        let missing = self.missing(status, mine).first().copied()?;
        running.then(|| failure::vanished(&self.pod_name(missing)))
    }

    fn missing(&self, status: &GroupStatus, mine: &[PodView<'_>]) -> Vec<u32> {
        let Some(template) = self.template(&status.revision) else {
            return Vec::new();
        };
        (0..template.deployment.nodes)
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
                let message = ending_message(mine, self.situation.now);
                return plan.in_phase(GroupPhase::Waiting, message);
            }
            GroupPhase::Failed if evidence.is_empty() => {
                begin_again(&mut plan.status);
                plan.wake_after = Some(Duration::ZERO);
                return plan.in_phase(GroupPhase::Waiting, "trying again".to_owned());
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
        self.judge(&plan.status, &mut cause);
        if cause.permanent && !evidence.is_empty() {
            plan.failure = Some(self.new_failure(&plan, &cause));
            self.record(&mut plan.status, &cause);
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

    /// Whether the history of the group makes a failure one for good.
    fn judge(&self, status: &GroupStatus, cause: &mut Cause) {
        let killed = cause.reason == Reason::OOMKilled.as_str();
        let before = status.last_failure.as_ref();
        let again = before.is_some_and(|last| last.reason == cause.reason);
        if killed && status.restarts > 0 && again {
            cause.permanent = true;
            cause.message = format!(
                "{}, twice in a row; raise spec.resources.memory",
                cause.message
            );
            return;
        }
        let policy = &self.situation.deployment.change.restarts;
        let counted = status.recent_failures.iter().filter(|mark| mark.counts);
        let failures = counted.count() + 1;
        if !cause.permanent && !cause.is_disruption && failures > policy.most {
            cause.permanent = true;
            let minutes = policy.window.as_secs() / 60;
            cause.message = format!(
                "{}; that is failure {failures} within {minutes} minutes, and \
                 spec.failure.groupRestart.maxRestarts is {}; correct what makes it fail",
                cause.message.trim_end_matches('.'),
                policy.most
            );
        }
    }

    fn record(&self, status: &mut GroupStatus, cause: &Cause) {
        let failure = cause.to_status(self.situation.now);
        status.recent_failures.push(FailureMark {
            time: Time(self.situation.now),
            node: failure.node.clone(),
            counts: !cause.is_disruption,
        });
        let most = usize::try_from(MAX_RESTARTS).unwrap_or_default() + 1;
        let surplus = status.recent_failures.len().saturating_sub(most);
        status.recent_failures.drain(..surplus);
        status.last_failure = Some(failure);
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
        self.record(&mut plan.status, cause);
        plan.failure = Some(failure);
        plan.wake_after = Some(Duration::ZERO);
        let message = format!("{} The group is recreated.", sentence(&cause.message));
        plan.in_phase(GroupPhase::Restarting, message)
    }

    /// Nothing has failed: see how far the group is.
    fn run(&self, mut plan: GroupPlan, mine: &[PodView<'_>]) -> GroupPlan {
        if self.held(&plan.status.revision).is_none() {
            plan.create = self.missing(&plan.status, mine);
        }
        if !plan.create.is_empty() {
            plan.avoid = self.avoided(&plan.status);
            let message = format!("creating {} pods", plan.create.len());
            return plan.in_phase(GroupPhase::Waiting, message);
        }
        if mine.iter().any(PodView::is_gated) {
            return self.wait_for_room(plan, mine);
        }
        if let Some(pod) = mine.iter().find(|pod| kueue::waits(pod)) {
            plan.wake_after = Some(QUOTA_EVERY);
            let message = kueue::waited_for(pod, self.situation.observed);
            return plan.in_phase(GroupPhase::Scheduling, message);
        }
        if let Some(pod) = mine.iter().find(|pod| pod.node_name().is_none()) {
            if self.gives_back(mine) {
                return self.give_back(plan, pod);
            }
            return plan.in_phase(GroupPhase::Scheduling, waits_for_node(pod.name));
        }
        if let Some(pod) = mine.iter().find(|pod| pod.phase() != "Running") {
            return self.start_up(plan, pod, GroupPhase::Fetching);
        }
        if let Some(pod) = mine.iter().find(|pod| pod.ready_since().is_none()) {
            if matches!(plan.status.phase, GroupPhase::Ready | GroupPhase::Unready) {
                let node = pod.node_name().unwrap_or("(none)");
                let message = format!(
                    "pod {} on node {node} served and answers no longer",
                    pod.name
                );
                return plan.in_phase(GroupPhase::Unready, message);
            }
            return self.start_up(plan, pod, GroupPhase::LoadingWeights);
        }
        self.note_stability(&mut plan, mine);
        if let Some(pod) = mine.iter().find(|pod| pod.node == 0 && !pod.is_hooked()) {
            // Somebody took the label off, or the group was to end and is wanted again.
            plan.hook = Some(hook(pod, true));
        }
        let name = self.name();
        plan.in_phase(GroupPhase::Ready, format!("group {name} serves"))
    }

    /// The group waits for `pod`, which is asked how far it is once it takes some time.
    fn start_up(&self, mut plan: GroupPlan, pod: &PodView<'_>, phase: GroupPhase) -> GroupPlan {
        let created = pod.pod.metadata.creation_timestamp.as_ref();
        let age = created.map_or(Duration::MAX, |time| self.since(time));
        if age < QUICK_START {
            plan.wake_after = Some(QUICK_START.saturating_sub(age));
        } else {
            plan.wake_after = Some(PROGRESS_EVERY);
            plan.waits_for = Some(pod.uid.to_owned());
        }
        let told = self.situation.observed.states.get(pod.uid);
        let message = progress::sentence(pod, phase, told);
        let mut plan = plan.in_phase(phase, message);
        plan.status.progress = told.and_then(progress::status);
        plan
    }

    /// The scheduler does not look at the pods before there are nodes for all of them.
    fn wait_for_room(&self, mut plan: GroupPlan, mine: &[PodView<'_>]) -> GroupPlan {
        let others = |pod: &PodView<'_>| {
            let gates = pod.pod.spec.scheduling_gates.iter();
            gates
                .map(|gate| gate.name.clone())
                .filter(|name| name != labels::GANG_GATE)
                .collect()
        };
        let mut pods: Vec<_> = mine.to_vec();
        pods.sort_by_key(|pod| pod.node);
        let unplaced = |pod: &PodView<'_>| Unplaced {
            name: pod.name.to_owned(),
            uid: pod.uid.to_owned(),
            gates: others(pod),
            tolerations: pod.pod.spec.tolerations.clone(),
        };
        plan.place = Some(Placing {
            pods: pods.iter().map(unplaced).collect(),
            revision: plan.status.revision.clone(),
            avoid: self.avoided(&plan.status),
        });
        plan.wake_after = Some(ROOM_EVERY);
        let message = match mine {
            [pod] => format!("pod {} waits for a node to be chosen", pod.name),
            pods => format!(
                "{} pods wait for nodes to be chosen for all of them",
                pods.len()
            ),
        };
        plan.in_phase(GroupPhase::Scheduling, message)
    }

    /// Kueue took the nodes of the group for something else: it queues again at once, and
    /// nothing has failed.
    fn queue_again(&self, mut plan: GroupPlan, why: &str) -> GroupPlan {
        let epoch = plan.status.epoch;
        plan.status.epoch += 1;
        plan.wake_after = Some(Duration::ZERO);
        let message = format!("Kueue took its quota back and it queues again ({why})");
        plan.taken = Some(Taken {
            epoch,
            note: format!("group {}: {message}", self.name()),
        });
        plan.in_phase(GroupPhase::Waiting, message)
    }

    /// Whether nodes were chosen for the pods and not all have reached theirs in time.
    fn gives_back(&self, mine: &[PodView<'_>]) -> bool {
        let limit = self.situation.deployment.change.gang_timeout;
        mine.iter()
            .filter_map(PodView::assigned_at)
            .any(|since| self.since(&Time(since)) >= limit)
    }

    fn give_back(&self, mut plan: GroupPlan, pod: &PodView<'_>) -> GroupPlan {
        let limit = self.situation.deployment.change.gang_timeout.as_secs();
        let node = pod
            .pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(labels::ASSIGNED_NODE));
        plan.status.epoch += 1;
        plan.wake_after = Some(Duration::ZERO);
        let message = format!(
            "pod {} did not reach node {} ({HOSTNAME}) within {limit} s \
             (spec.placement.gang.timeout): the nodes are given back and others are chosen",
            pod.name,
            node.map_or("(none)", String::as_str)
        );
        plan.in_phase(GroupPhase::Waiting, message)
    }

    /// Clears the record of a group that has served long enough.
    fn note_stability(&self, plan: &mut GroupPlan, mine: &[PodView<'_>]) {
        if plan.status.restarts == 0 {
            return;
        }
        let Some(since) = mine
            .iter()
            .filter_map(PodView::ready_since)
            .max_by_key(|time| time.0)
        else {
            return;
        };
        let served = self.since(since);
        if served >= STABLE_AFTER {
            plan.status.restarts = 0;
        } else {
            plan.wake_after = Some(STABLE_AFTER.saturating_sub(served));
        }
    }
}

/// What is said of a group whose pod `name` has yet to be bound to a node.
pub fn waits_for_node(name: &str) -> String {
    format!("pod {name} waits for a node")
}

/// The next incarnation, with a clean record.
fn begin_again(status: &mut GroupStatus) {
    status.epoch += 1;
    status.restarts = 0;
    status.recent_failures.clear();
}
