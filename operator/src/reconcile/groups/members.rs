//! Which groups exist, and which revision they move to.

use std::time::Duration;

use llama_crds::v1alpha1::{
    DrainReason, GroupPhase, GroupStatus, LlamaDeploymentStatus, Reason, RevisionComparison,
    RolloutFailure, RolloutStatus,
};

use super::{GroupPlan, NewPods, Situation};
use crate::reconcile::compare;
use crate::reconcile::kueue;
use crate::reconcile::policy::RolloutPolicy;
use crate::reconcile::rollout::{Condition, Decision, Member, Question, Room, decide as step};
use crate::reconcile::waiting;

/// Which revision groups move to, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Course {
    /// The revision that the spec asks for.
    pub wanted: String,
    /// The revision that groups move to: another one after a rollback.
    pub target: String,
    /// The revision that served last as a whole.
    pub stable: Option<String>,
    /// Why the wanted revision was given up.
    pub failure: Option<RolloutFailure>,
    /// Whether nothing moves.
    pub halted: bool,
    /// How the answers of the wanted revision compare with those of the one before.
    pub comparison: Option<RevisionComparison>,
    /// Whether the wanted revision, once all groups have it, is what a rollback goes to.
    pub is_proven: bool,
}

impl Course {
    /// When to look again at how answers compare.
    pub fn wake_after(&self) -> Option<Duration> {
        let is_compared = self.comparison.is_some() && self.failure.is_none();
        is_compared.then_some(compare::COMPARED_EVERY)
    }

    pub(super) fn of(situation: &Situation<'_>) -> Self {
        let previous = situation.previous;
        let wanted = situation.templates.target.clone();
        let failure = previous
            .rollout
            .as_ref()
            .and_then(|rollout| rollout.failure.clone())
            .filter(|failure| failure.revision == wanted);
        Self {
            target: wanted.clone(),
            wanted,
            stable: previous.current_revision.clone(),
            failure: None,
            halted: false,
            comparison: None,
            is_proven: true,
        }
        .with_failure(situation, failure)
    }

    fn with_failure(mut self, situation: &Situation<'_>, failure: Option<RolloutFailure>) -> Self {
        let known = self
            .stable
            .as_deref()
            .filter(|stable| situation.templates.of(stable).is_some());
        let rolls_back = situation.deployment.change.rollout.rolls_back;
        self.target.clone_from(&self.wanted);
        self.halted = failure.is_some();
        self.is_proven &= failure.is_none();
        if let (Some(stable), true, true) = (known, rolls_back, failure.is_some()) {
            self.target = stable.to_owned();
            self.halted = false;
        }
        self.failure = failure;
        self
    }

    /// The same after a look at how the groups of the wanted revision do.
    pub(super) fn judged(mut self, situation: &Situation<'_>, plans: &[GroupPlan]) -> Self {
        let stable = self.stable.clone().filter(|stable| *stable != self.wanted);
        let Some(stable) = stable else {
            return self.with_failure(situation, None);
        };
        self.compare(situation, plans, &stable);
        if self.answered_worse() {
            let failure = self.failure.clone();
            return self.with_failure(situation, failure);
        }
        let of_wanted = || {
            plans
                .iter()
                .filter(|plan| plan.is_wanted() && plan.status.revision == self.wanted)
        };
        let found = of_wanted()
            .find_map(|plan| self.fault(situation, plan))
            .or_else(|| self.worse(situation));
        let recovered = of_wanted().any(GroupPlan::is_ready) && found.is_none();
        let failure = match (found, recovered) {
            (Some(found), _) => Some(found),
            (None, true) => None,
            (None, false) => self.failure.clone(),
        };
        self.with_failure(situation, failure)
    }

    /// Compares answers, where that is asked for, as long as the revision is not given up.
    fn compare(&mut self, situation: &Situation<'_>, plans: &[GroupPlan], stable: &str) {
        let before = situation.previous.rollout.as_ref();
        let compared = before.and_then(|before| before.comparison.as_ref());
        let Some(limits) = situation.deployment.change.rollout.answers else {
            // Nobody asks any more how it answers.
            if self.answered_worse() {
                self.failure = None;
            }
            return;
        };
        let of_wanted = situation.previous.updated_revision.as_ref() == Some(&self.wanted);
        self.is_proven = before
            .filter(|_| of_wanted)
            .is_some_and(|before| self.was_watched(situation, plans, before, limits.window));
        self.comparison = if self.failure.is_some() {
            compared.cloned()
        } else {
            let revisions = (stable, self.wanted.as_str());
            let (observed, now) = (situation.observed, situation.now);
            Some(compare::compare(compared, revisions, plans, observed, now))
        };
    }

    /// Whether as many groups of the wanted revision as serve now have served for `window`.
    fn was_watched(
        &self,
        situation: &Situation<'_>,
        plans: &[GroupPlan],
        before: &RolloutStatus,
        window: Duration,
    ) -> bool {
        let serves = |plan: &&GroupPlan| plan.is_ready() && plan.is_wanted();
        let ready = plans
            .iter()
            .filter(serves)
            .filter(|plan| plan.status.revision == self.wanted);
        let since = before.progressed_at.as_ref().map(|since| since.0);
        let passed = since.map(|since| situation.now.duration_since(since));
        let passed = passed.and_then(|passed| Duration::try_from(passed).ok());
        usize::try_from(before.updated_ready) == Ok(ready.count())
            && passed.is_some_and(|passed| passed >= window)
    }

    /// Whether the wanted revision was given up because of its answers. Unlike a group that
    /// does not serve it cannot recover: nobody asks it anything, or all is as it was.
    fn answered_worse(&self) -> bool {
        let reasons = [Reason::ErrorRateExceeded, Reason::LatencyRegression];
        self.failure.as_ref().is_some_and(|failure| {
            let mut reasons = reasons.iter();
            reasons.any(|reason| reason.as_str() == failure.reason)
        })
    }

    /// Whether the wanted revision answers worse than the one before.
    fn worse(&self, situation: &Situation<'_>) -> Option<RolloutFailure> {
        let limits = situation.deployment.change.rollout.answers.as_ref()?;
        let (reason, message) = compare::worse(self.comparison.as_ref()?, limits)?;
        Some(RolloutFailure {
            revision: self.wanted.clone(),
            reason: reason.to_string(),
            message,
        })
    }

    /// What is wrong with a group of the wanted revision.
    fn fault(&self, situation: &Situation<'_>, plan: &GroupPlan) -> Option<RolloutFailure> {
        let of = |reason: &str, message: &str| RolloutFailure {
            revision: self.wanted.clone(),
            reason: reason.to_owned(),
            message: message.to_owned(),
        };
        let last = plan.status.last_failure.as_ref();
        let tells_wrong =
            |reason: &str| reason == llama_contract::FailureCategory::SelfTestMismatch.as_str();
        match (plan.status.phase, last) {
            (GroupPhase::Ready, _) => None,
            (GroupPhase::Failed, Some(last)) => Some(of(&last.reason, &last.message)),
            (_, Some(last)) if plan.status.restarts > 0 && tells_wrong(&last.reason) => {
                Some(of(&last.reason, &last.message))
            }
            _ => {
                let limit = situation.deployment.change.rollout.progress_deadline;
                let since = situation
                    .previous
                    .rollout
                    .as_ref()?
                    .progressed_at
                    .as_ref()?;
                let passed = situation.now.duration_since(since.0);
                let passed = std::time::Duration::try_from(passed).unwrap_or_default();
                (passed >= limit).then(|| {
                    let message = plan.status.message.as_deref().unwrap_or("not ready");
                    of(
                        Reason::ProgressDeadlineExceeded.as_str(),
                        &format!(
                            "group {} does not serve after {} s \
                             (spec.rollout.progressDeadline): {message}",
                            plan.status.index,
                            limit.as_secs()
                        ),
                    )
                })
            }
        }
    }

    /// The revision of a group that is created now.
    pub(super) fn revision_of_new(
        &self,
        situation: &Situation<'_>,
        decision: &Decision,
        plans: &[GroupPlan],
    ) -> String {
        let known = |revision: &&str| situation.templates.of(revision).is_some();
        let others = || {
            plans
                .iter()
                .filter(|plan| plan.is_wanted())
                .map(|plan| plan.status.revision.as_str())
                .find(|revision| *revision != self.target && known(revision))
        };
        if decision.as_before {
            let stable = self.stable.as_deref().filter(known);
            if let Some(before) = stable.or_else(others) {
                return before.to_owned();
            }
        }
        self.target.clone()
    }
}

/// Groups that exist: they have pods, or status knows of them.
pub(super) fn indices(situation: &Situation<'_>) -> Vec<u32> {
    let owned = |uid: &str| {
        situation
            .pods
            .iter()
            .filter(move |pod| pod.is_owned_by(uid))
            .map(|pod| pod.group)
            .collect::<Vec<_>>()
    };
    let mut indices = owned(&situation.deployment.uid);
    let known = situation.previous.groups.iter();
    indices.extend(known.filter_map(|status| u32::try_from(status.index).ok()));
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// The first incarnation of a new group: later than any that a stray process may be of.
pub(super) fn next_epoch(situation: &Situation<'_>, plans: &[GroupPlan]) -> i64 {
    let known = situation.previous.groups.iter().map(|status| status.epoch);
    let pods = situation.pods.iter().map(|pod| pod.epoch);
    let latest = known.chain(pods).max();
    let fresh = plans
        .iter()
        .all(|plan| plan.status.epoch == 0 && plan.is_wanted());
    match latest {
        Some(latest) if !fresh => latest + 1,
        _ => 0,
    }
}

/// Decides the next step of all groups.
pub(super) fn decide(
    situation: &Situation<'_>,
    course: &Course,
    plans: &[GroupPlan],
    room: &Room,
) -> Decision {
    let deployment = situation.deployment;
    let members: Vec<_> = plans
        .iter()
        .map(|plan| member(situation, course, plan))
        .collect();
    let goes_back = course.target != course.wanted;
    let policy = RolloutPolicy {
        partition: if goes_back {
            0
        } else {
            deployment.change.rollout.partition
        },
        ..deployment.change.rollout.clone()
    };
    step(&Question {
        wanted: usize::try_from(deployment.wanted_groups()).unwrap_or(usize::MAX),
        suspended: deployment.suspend,
        policy: &policy,
        room,
        halted: course.halted,
        held: match situation.new_pods {
            NewPods::Held(why) if course.target == course.wanted => Some(why),
            _ => None,
        },
        members: &members,
    })
}

fn member(situation: &Situation<'_>, course: &Course, plan: &GroupPlan) -> Member {
    let status = &plan.status;
    let condition = match status.phase {
        GroupPhase::Failed => Condition::Failed,
        GroupPhase::Restarting => Condition::Restarting,
        GroupPhase::Scheduling if is_on_its_way(situation, status) => Condition::Starting,
        GroupPhase::Waiting | GroupPhase::Scheduling => Condition::Unplaced,
        GroupPhase::Fetching | GroupPhase::LoadingWeights | GroupPhase::Draining => {
            Condition::Starting
        }
        GroupPhase::Unready => Condition::Unready,
        GroupPhase::Ready => Condition::Ready,
    };
    let deleted = status.last_failure.as_ref().is_some_and(|failure| {
        failure.reason == Reason::PodDeleted.as_str() && status.phase == GroupPhase::Restarting
    });
    let closed = &situation.observed.closed_nodes;
    Member {
        index: u32::try_from(status.index).unwrap_or_default(),
        is_updated: status.revision == course.target,
        condition,
        leaving: status.drain.as_ref().map(|drain| drain.reason),
        can_stay: plan.can_stay && plan.has_pods,
        load: plan.load,
        evacuate: status
            .nodes
            .iter()
            .find(|node| plan.is_ready() && closed.contains(*node))
            .cloned(),
        was_deleted: deleted,
    }
}

/// Whether nobody has found that there is no node for a pod of the group. What its pods
/// need may count as taken already, since nodes are heard of before pods are.
fn is_on_its_way(situation: &Situation<'_>, status: &GroupStatus) -> bool {
    situation
        .pods
        .iter()
        .filter(|pod| u32::try_from(status.index) == Ok(pod.group) && pod.epoch == status.epoch)
        .all(|pod| {
            let waits = pod.is_gated() || kueue::waits(pod);
            !waits && waiting::of_scheduling(pod).is_none()
        })
}

/// Whether it matters how busy groups are, or how they answer: one of several is to end, one
/// that ends may still be answering, or a new revision is compared with the old one.
pub fn needs_loads(status: &LlamaDeploymentStatus, target: &str, wanted: u32) -> bool {
    let staying = status.groups.iter().filter(|group| group.drain.is_none());
    let surplus = staying.count() > usize::try_from(wanted).unwrap_or(usize::MAX);
    let moves = |group: &GroupStatus| group.drain.is_some() || group.revision != target;
    let compared = status
        .rollout
        .as_ref()
        .is_some_and(|rollout| rollout.comparison.is_some() && rollout.failure.is_none());
    surplus || compared || status.groups.iter().any(moves)
}

/// Whether a further group may be asked for, so that what nodes have free matters.
pub fn needs_room(status: &LlamaDeploymentStatus, target: &str, gated: bool, closed: bool) -> bool {
    let moving = |group: &GroupStatus| {
        group.revision != target
            || group
                .drain
                .as_ref()
                .is_some_and(|drain| drain.reason == DrainReason::Replaced)
    };
    gated || closed || status.groups.iter().any(moving)
}
