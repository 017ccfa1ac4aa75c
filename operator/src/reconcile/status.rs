//! Step 5: what status should say. Pure; `write_status` in `mod.rs` does the I/O.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_crds::v1alpha1::{
    ConditionType, DrainReason, GroupPhase, GroupStatus, LlamaDeploymentStatus, MAX_GROUP_ENTRIES,
    Reason, RolloutStatus,
};

use super::apply::Applied;
use super::compare;
pub use super::condition::find;
use super::condition::{Verdict, conditions, of_groups, shortened};
use super::failure;
use super::fit::Holdup;
use super::groups::GroupPlan;
use super::plan::Plan;
use super::validate::ValidDeployment;
use super::waiting::Obstacle;
use crate::{labels, names};

/// Status of a deployment that cannot be planned, or not even read. What runs already
/// goes on, so everything but the conditions is kept.
pub fn of_invalid(
    reason: Reason,
    message: &str,
    previous: &LlamaDeploymentStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaDeploymentStatus {
    let mut verdicts = vec![
        (ConditionType::Ready, Verdict::new("False", reason, message)),
        (
            ConditionType::Reconciling,
            Verdict::new("False", reason, "Waiting for the spec to be corrected."),
        ),
        (
            ConditionType::Stalled,
            Verdict::new("True", reason, message),
        ),
    ];
    for kept in [
        ConditionType::Available,
        ConditionType::ModelReady,
        ConditionType::Scheduled,
        ConditionType::Planned,
    ] {
        let old = find(previous, kept);
        let verdict = old.map_or_else(
            || Verdict::new("Unknown", reason, "Not known while the spec is not valid."),
            |old| match old.status.as_str() {
                "True" => Verdict::new("True", &old.reason, &old.message),
                "False" => Verdict::new("False", &old.reason, &old.message),
                _ => Verdict::new("Unknown", &old.reason, &old.message),
            },
        );
        verdicts.push((kept, verdict));
    }
    LlamaDeploymentStatus {
        observed_generation: generation,
        conditions: conditions(verdicts, previous, generation, now),
        ..previous.clone()
    }
}

/// Status of a deployment that the operator was asked to leave alone.
pub fn of_paused(
    previous: &LlamaDeploymentStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaDeploymentStatus {
    let message = format!(
        "The annotation {} is true: nothing is changed, and what fails stays as it is.",
        labels::PAUSE
    );
    let mut verdicts: Vec<_> = previous
        .conditions
        .iter()
        .filter_map(|old| {
            let type_ = ConditionType::ALL
                .into_iter()
                .find(|type_| type_.as_str() == old.type_)?;
            let status = ["True", "False"]
                .into_iter()
                .find(|status| *status == old.status)
                .unwrap_or("Unknown");
            Some((type_, Verdict::new(status, &old.reason, &old.message)))
        })
        .filter(|(type_, _)| *type_ != ConditionType::Reconciling)
        .collect();
    let paused = Verdict::new("False", Reason::Paused, message);
    verdicts.push((ConditionType::Reconciling, paused));
    LlamaDeploymentStatus {
        conditions: conditions(verdicts, previous, generation, now),
        ..previous.clone()
    }
}

/// Status of a deployment that was planned and applied.
pub fn of_plan(
    deployment: &ValidDeployment,
    plan: &Plan,
    applied: &Applied,
    previous: &LlamaDeploymentStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaDeploymentStatus {
    let view = View::new(deployment, plan, applied);
    let verdicts = vec![
        (ConditionType::Ready, view.ready()),
        (ConditionType::Available, view.available()),
        (ConditionType::Reconciling, view.reconciling()),
        (ConditionType::Stalled, view.stalled()),
        (ConditionType::ModelReady, view.model_ready()),
        (ConditionType::Scheduled, view.scheduled()),
        (ConditionType::Planned, view.planned()),
    ];
    let count = |groups: usize| i32::try_from(groups).unwrap_or(i32::MAX);
    LlamaDeploymentStatus {
        observed_generation: generation,
        conditions: conditions(verdicts, previous, generation, now),
        replicas: count(
            plan.groups
                .iter()
                .filter(|group| group.has_pods || !group.create.is_empty())
                .count(),
        ),
        ready_replicas: count(view.serving),
        updated_replicas: count(view.updated().count()),
        current_revision: view.current_revision(previous),
        updated_revision: Some(plan.course.wanted.clone()),
        rollout: view.rollout(previous, now),
        self_tests: plan.self_tests.clone(),
        adapters: plan.adapters.clone(),
        selector: Some(labels::one_pod_a_group(&deployment.name)),
        url: Some(names::url(&deployment.name, &deployment.namespace)),
        served_name: Some(deployment.served_name.clone()),
        plan: plan.fit.plan.clone(),
        inspection: plan.fit.inspection.clone(),
        groups: entries(&plan.groups),
    }
}

/// Whether `after` tells no more than `before` but how far groups are that are starting,
/// which may be told a moment later, together with what comes next.
pub fn is_only_progress(before: &LlamaDeploymentStatus, after: &LlamaDeploymentStatus) -> bool {
    let is_starting = |group: &GroupStatus| {
        matches!(
            group.phase,
            GroupPhase::Waiting
                | GroupPhase::Scheduling
                | GroupPhase::Fetching
                | GroupPhase::LoadingWeights
        )
    };
    let mut told = after.clone();
    for (group, old) in told.groups.iter_mut().zip(&before.groups) {
        if is_starting(group) && is_starting(old) {
            group.phase = old.phase;
            group.message.clone_from(&old.message);
            group.nodes.clone_from(&old.nodes);
            group.progress.clone_from(&old.progress);
        }
    }
    let reasons = [Reason::GroupsStarting, Reason::SomeGroupsReady];
    let is_under_way = |reason: &str| reasons.iter().any(|known| known.as_str() == reason);
    for (condition, old) in told.conditions.iter_mut().zip(&before.conditions) {
        let is_same = condition.type_ == old.type_ && condition.status == old.status;
        let under_way = is_under_way(&condition.reason) && is_under_way(&old.reason);
        let is_placed = condition.type_ == ConditionType::Scheduled.as_str()
            && condition.status != "False"
            && old.status == "Unknown";
        if (is_same && under_way) || is_placed {
            condition.clone_from(old);
        }
    }
    told == *before
}

/// The entries of status: all groups, or as many as it may hold, first those with a
/// history that must not be forgotten.
fn entries(groups: &[GroupPlan]) -> Vec<GroupStatus> {
    let mut entries: Vec<_> = groups.iter().map(|group| group.status.clone()).collect();
    entries.sort_by_key(|entry| {
        let history = entry.epoch > 0 || entry.last_failure.is_some() || entry.drain.is_some();
        (!history, entry.index)
    });
    entries.truncate(MAX_GROUP_ENTRIES);
    entries.sort_by_key(|entry| entry.index);
    entries
}

/// The plan with what the conditions need to know of it.
struct View<'a> {
    deployment: &'a ValidDeployment,
    plan: &'a Plan,
    applied: &'a Applied,
    wanted: usize,
    serving: usize,
    /// Wanted groups that serve at the current revision.
    settled: usize,
}

impl<'a> View<'a> {
    fn new(deployment: &'a ValidDeployment, plan: &'a Plan, applied: &'a Applied) -> Self {
        let ready = |group: &&GroupPlan| group.is_wanted() && group.is_ready();
        let serving = plan.groups.iter().filter(ready).count();
        let updated = plan
            .groups
            .iter()
            .filter(ready)
            .filter(|group| group.status.revision == plan.course.wanted)
            .count();
        let wanted = usize::try_from(deployment.wanted_groups()).unwrap_or(usize::MAX);
        let kept = (serving - updated).min(deployment.change.rollout.partition);
        Self {
            deployment,
            plan,
            applied,
            wanted,
            serving,
            settled: (updated + kept).min(wanted),
        }
    }

    fn wanted_groups(&self) -> impl Iterator<Item = &'a GroupPlan> + use<'a> {
        self.plan.groups.iter().filter(|group| group.is_wanted())
    }

    /// Groups of the revision that the spec asks for.
    fn updated(&self) -> impl Iterator<Item = &'a GroupPlan> + use<'a> {
        let wanted = &self.plan.course.wanted;
        self.wanted_groups()
            .filter(move |group| group.status.revision == *wanted)
    }

    fn ending(&self) -> usize {
        let ending = |group: &&GroupPlan| !group.is_wanted();
        self.plan.groups.iter().filter(ending).count()
    }

    /// What holds new pods up, where any are missing.
    fn holdup(&self) -> Option<&'a Holdup> {
        let holdup = self.plan.fit.holdup.as_ref();
        holdup.filter(|_| self.settled < self.wanted)
    }

    /// A group that failed for good and is not about to be replaced.
    fn failed(&self) -> Option<&'a GroupPlan> {
        if self.holdup().is_some() {
            return None;
        }
        self.wanted_groups()
            .find(|group| group.status.phase == GroupPhase::Failed)
    }

    /// The revision that serves as a whole, or did last.
    fn current_revision(&self, previous: &LlamaDeploymentStatus) -> Option<String> {
        let all = self.updated().filter(|group| group.is_ready()).count();
        let is_whole = self.wanted > 0 && all >= self.wanted && self.wanted_groups().count() == all;
        if is_whole && self.plan.course.is_proven {
            return Some(self.plan.course.wanted.clone());
        }
        previous.current_revision.clone()
    }

    fn outdated(&self) -> usize {
        self.wanted_groups().count() - self.updated().count()
    }

    fn rollout(&self, previous: &LlamaDeploymentStatus, now: Timestamp) -> Option<RolloutStatus> {
        let (course, decision) = (&self.plan.course, &self.plan.decision);
        let groups = self.plan.groups.iter();
        let mut drains = groups.filter_map(|group| group.status.drain.as_ref());
        let replaced = drains.any(|drain| drain.reason == DrainReason::Replaced);
        let moves = self.outdated() > 0 || course.failure.is_some() || replaced;
        let watched =
            course.comparison.is_some() && self.current_revision(previous) == course.stable;
        if !moves && !watched && decision.message.is_empty() {
            return None;
        }
        let ready = self.updated().filter(|group| group.is_ready()).count();
        let updated_ready = i32::try_from(ready).unwrap_or(i32::MAX);
        let before = previous
            .rollout
            .as_ref()
            .filter(|_| previous.updated_revision.as_ref() == Some(&course.wanted));
        let progressed_at = before
            .filter(|before| before.updated_ready >= updated_ready)
            .map_or(Some(Time(now)), |before| before.progressed_at.clone());
        let mut message = self.rollout_message();
        if let (Some(compared), None) = (&course.comparison, &course.failure) {
            if message.is_empty() {
                let since = progressed_at.as_ref().map(|since| since.0);
                message = compare::watch(since, self.deployment.answers_within());
            }
            message = format!("{message}; {}", compare::summary(compared));
        }
        Some(RolloutStatus {
            mode: decision.mode,
            message: shortened(&message),
            updated_ready,
            progressed_at,
            failure: course.failure.clone(),
            comparison: course.comparison.clone(),
        })
    }

    fn rollout_message(&self) -> String {
        let course = &self.plan.course;
        let Some(failure) = &course.failure else {
            return self.plan.decision.message.clone();
        };
        let stable = course.stable.as_deref().unwrap_or("(none)");
        let what = format!(
            "revision {} failed ({}): {}",
            failure.revision,
            failure.reason,
            failure.message.trim_end_matches('.')
        );
        if course.target == course.wanted && self.outdated() == 0 {
            return format!("halted after all groups have moved, {what}; correct the spec");
        }
        if course.target == course.wanted {
            return format!(
                "halted, {what}; {} of revision {stable} stay as they are; correct the spec",
                of_groups(self.outdated(), self.wanted)
            );
        }
        format!("rolled back to revision {stable}, {what}; correct the spec to try again")
    }

    /// Every verdict but one of success begins with how many groups serve.
    fn counted(&self, text: &str) -> String {
        let of = of_groups(self.serving, self.wanted);
        shortened(&format!("{of} ready; {text}"))
    }

    fn name(&self, group: &GroupPlan) -> String {
        format!("group {}-{}", self.deployment.name, group.status.index)
    }

    /// What stands in the way, the most telling first.
    fn obstacle(&self) -> Option<(String, String)> {
        if let [first, rest @ ..] = self.applied.refused.as_slice() {
            let more = match rest.len() {
                0 => String::new(),
                count => format!(" ({count} more were refused)"),
            };
            let reason = Reason::CreationRefused.to_string();
            return Some((reason, format!("{first}{more}")));
        }
        if self.settled == self.wanted {
            return None;
        }
        if let Some(claim) = &self.plan.claim {
            return Some((claim.reason.to_string(), claim.message.clone()));
        }
        if self.plan.course.failure.is_some() {
            let back = self.plan.course.target != self.plan.course.wanted;
            let reason = if back {
                Reason::RolledBack
            } else {
                Reason::RolloutHalted
            };
            return Some((reason.to_string(), self.rollout_message()));
        }
        if let Some(holdup) = self.holdup() {
            return Some((holdup.reason.clone(), holdup.message.clone()));
        }
        if let Some(group) = self.failed() {
            let failure = group.status.last_failure.as_ref();
            let reason = failure.map_or_else(
                || Reason::ContainerExited.to_string(),
                |failure| failure.reason.clone(),
            );
            let message = group.status.message.as_deref().unwrap_or_default();
            return Some((reason, format!("{}: {message}", self.name(group))));
        }
        let (index, obstacle) = self
            .plan
            .obstacles
            .iter()
            .min_by_key(|(index, found)| (waits_for_node(found.reason), *index))?;
        let message = format!(
            "group {}-{index}: {}",
            self.deployment.name, obstacle.message
        );
        Some((obstacle.reason.to_string(), message))
    }

    fn ready(&self) -> Verdict {
        let Self { wanted, .. } = self;
        if self.deployment.suspend {
            let message = match self.ending() {
                0 => "Suspended: no group runs. Set spec.suspend to false to serve.".to_owned(),
                count => format!("Suspended: {count} groups are ending."),
            };
            return Verdict::new("False", Reason::Suspended, message);
        }
        if let Some((reason, message)) = self.obstacle() {
            return Verdict::new("False", reason, self.counted(&message));
        }
        if self.settled < self.wanted {
            let (reason, message) = self.progress();
            return Verdict::new("False", reason, self.counted(&message));
        }
        if self.wanted == 0 {
            return Verdict::new("True", Reason::ScaledToZero, "spec.replicas is 0.");
        }
        let ending = match self.ending() {
            0 => String::new(),
            count => format!(" {count} more are ending."),
        };
        let message = format!("{} ready.{ending}", of_groups(*wanted, *wanted));
        Verdict::new("True", Reason::AllGroupsReady, message)
    }

    /// What is under way, when nothing stands in the way.
    fn progress(&self) -> (Reason, String) {
        let not_ready = self.wanted_groups().find(|group| !group.is_ready());
        let tell = |group: &GroupPlan| {
            let message = group.status.message.as_deref().unwrap_or_default();
            format!("{}: {message}", self.name(group))
        };
        let restarting = self
            .wanted_groups()
            .find(|group| group.status.phase == GroupPhase::Restarting);
        if let Some(group) = restarting {
            return (Reason::GroupRestarting, tell(group));
        }
        // One that ends before another may start is waited for too.
        let ending = || self.plan.groups.iter().find(|group| !group.is_wanted());
        let waited_for = not_ready.or_else(ending);
        let next = || "the next group is about to be created".to_owned();
        let outdated = self.outdated();
        if outdated > 0 {
            let reason = if self.deployment.change.rollout.paused {
                Reason::RolloutPaused
            } else {
                Reason::RollingUpdate
            };
            let decided = &self.plan.decision.message;
            let text = match (decided.is_empty(), waited_for) {
                (false, _) => decided.clone(),
                (true, Some(group)) => tell(group),
                (true, None) => "the next of them is about to be replaced".to_owned(),
            };
            let message = format!("{outdated} still have the old revision; {text}");
            return (reason, message);
        }
        let reason = if self.serving > 0 {
            Reason::SomeGroupsReady
        } else {
            Reason::GroupsStarting
        };
        (reason, waited_for.map_or_else(next, tell))
    }

    fn available(&self) -> Verdict {
        if self.serving > 0 {
            let message = format!("{} serving.", of_groups(self.serving, self.wanted));
            return Verdict::new("True", Reason::AsExpected, message);
        }
        Verdict::new("False", Reason::NoGroupReady, "No group serves.")
    }

    fn reconciling(&self) -> Verdict {
        let busy =
            self.settled < self.wanted || self.ending() > 0 || !self.applied.refused.is_empty();
        if !busy || self.is_stalled() {
            return Verdict::new("False", Reason::Settled, "Nothing is under way.");
        }
        if self.settled == self.wanted && self.ending() > 0 {
            let message = format!("{} groups are ending.", self.ending());
            return Verdict::new("True", Reason::GroupsEnding, message);
        }
        let (reason, message) = self.progress();
        Verdict::new("True", reason, shortened(&message))
    }

    /// A permanent failure, and nothing else that still moves.
    fn is_stalled(&self) -> bool {
        self.failed().is_some()
            || self.plan.course.failure.is_some()
            || self.holdup().is_some_and(|holdup| holdup.is_stalled)
    }

    fn planned(&self) -> Verdict {
        let planned = &self.plan.fit.planned;
        Verdict::new(planned.status, planned.reason, shortened(&planned.message))
    }

    fn stalled(&self) -> Verdict {
        if let Some(holdup) = self.holdup().filter(|holdup| holdup.is_stalled) {
            return Verdict::new("True", &holdup.reason, shortened(&holdup.message));
        }
        match self.failed().and_then(|group| {
            let failure = group.status.last_failure.as_ref()?;
            let message = group.status.message.as_deref().unwrap_or_default();
            let message = format!("{}: {message}", self.name(group));
            Some(Verdict::new("True", &failure.reason, shortened(&message)))
        }) {
            Some(verdict) => verdict,
            None => match &self.plan.course.failure {
                Some(failure) => {
                    let message = shortened(&self.rollout_message());
                    Verdict::new("True", &failure.reason, message)
                }
                None => Verdict::new("False", Reason::AsExpected, "Nothing has failed for good."),
            },
        }
    }

    fn model_ready(&self) -> Verdict {
        let obstacles = self.plan.obstacles.iter().map(|(_, found)| found);
        let in_the_way = self
            .plan
            .claim
            .iter()
            .chain(obstacles)
            .find(|found| Obstacle::concerns_model(found));
        let failed = self.failed().and_then(|group| {
            let failure = group.status.last_failure.as_ref()?;
            failure::concerns_model(&failure.reason).then_some(failure)
        });
        if let Some(failure) = failed {
            return Verdict::new("False", &failure.reason, &failure.message);
        }
        if let Some(holdup) = self.holdup().filter(|holdup| holdup.concerns_model) {
            return Verdict::new("False", &holdup.reason, shortened(&holdup.message));
        }
        if let Some(found) = in_the_way {
            return Verdict::new("False", found.reason, shortened(&found.message));
        }
        if self.settled > 0 {
            let message = format!("Loaded by {}.", of_groups(self.settled, self.wanted));
            return Verdict::new("True", Reason::ModelLoaded, message);
        }
        if self.wanted == 0 {
            return Verdict::new("Unknown", Reason::NoPods, "No group is wanted.");
        }
        Verdict::new(
            "Unknown",
            Reason::ModelLoading,
            "No group has loaded it yet.",
        )
    }

    fn scheduled(&self) -> Verdict {
        let mut stuck: Vec<_> = self
            .plan
            .obstacles
            .iter()
            .filter(|(_, found)| waits_for_node(found.reason))
            .collect();
        stuck.sort();
        if let Some((index, found)) = stuck.first() {
            let pods = stuck.len();
            let mut groups: Vec<_> = stuck.iter().map(|(index, _)| index).collect();
            groups.dedup();
            let reason = found.reason;
            let message = format!(
                "{pods} pods of {} groups have no node; group {}-{index}: {}",
                groups.len(),
                self.deployment.name,
                found.message
            );
            return Verdict::new("False", reason, shortened(&message));
        }
        let phases: Vec<_> = self
            .wanted_groups()
            .map(|group| group.status.phase)
            .collect();
        let without =
            |phase: &GroupPhase| matches!(phase, GroupPhase::Waiting | GroupPhase::Restarting);
        if phases.iter().all(without) {
            return Verdict::new("Unknown", Reason::NoPods, "No pod exists.");
        }
        let waiting = |phase: &GroupPhase| without(phase) || *phase == GroupPhase::Scheduling;
        if phases.iter().any(waiting) {
            let message = "Some pods have yet to get a node.";
            return Verdict::new("Unknown", Reason::GroupsStarting, message);
        }
        Verdict::new("True", Reason::AllPodsScheduled, "Every pod has a node.")
    }
}

/// Whether `reason` keeps pods from getting a node.
fn waits_for_node(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Unschedulable | Reason::InsufficientRoom | Reason::WaitingForQuota
    )
}
