//! The life of groups: which should exist, which incarnation of each, and what to create
//! and delete for it. Pure.
//!
//! `status.groups` is the intent: that a group failed, or that it is to end, is written
//! there before any of its pods is deleted. So a failure is on record before its evidence
//! goes, and an operator that is stopped between any two writes goes on where it was.

mod ending;
mod life;
mod members;

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_crds::v1alpha1::{DrainStatus, GroupPhase, GroupStatus, LlamaDeploymentStatus};

use super::failure::Cause;
use super::observe::{Observed, PodState};
use super::pods::PodView;
use super::rollout::{Decision, Room};
use super::template::{Template, Templates};
use super::validate::ValidDeployment;
use crate::names;

pub use life::waits_for_node;
pub use members::{Course, needs_loads, needs_room};

/// A group that served this long has a clean record again.
pub const STABLE_AFTER: Duration = Duration::from_mins(10);
/// Grace of pods whose group has failed: no answer of theirs can be finished.
const FAILED_GRACE_SECONDS: u32 = 10;
/// Grace of pods whose answers have not finished in time. The worker is told to end them
/// within [`HURRIED_SECONDS`], so that each gets an error and none is cut off.
const OVERDUE_GRACE_SECONDS: u32 = 10;
/// What answers get of that grace; the rest is for errors to reach clients.
pub const HURRIED_SECONDS: u32 = 5;

/// Whether pods of the revision that the spec asks for may be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewPods {
    /// Yes.
    Allowed,
    /// Not now; the sentence says why. Groups that exist go on as they are.
    Held(String),
}

/// An object that should go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// Name.
    pub name: String,
    /// UID that must still be the object's.
    pub uid: String,
    /// Grace in seconds; the object's own when absent.
    pub grace: Option<u32>,
}

/// The label by which clients are sent to a pod, to be put on or taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The pod.
    pub pod: String,
    /// UID that must still be the pod's.
    pub uid: String,
    /// On or off.
    pub on: bool,
}

/// A pod that waits for a node to be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Unplaced {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Gates of others, which stay on it.
    pub gates: Vec<String>,
    /// Taints that it tolerates, with those that admission added.
    pub tolerations: Vec<Toleration>,
}

/// Pods that wait for nodes to be chosen for all of them together.
#[derive(Clone, Debug, PartialEq)]
pub struct Placing {
    /// The pods, in their order in the group.
    pub pods: Vec<Unplaced>,
    /// Revision of the group.
    pub revision: String,
    /// Nodes to be used only where there are no others.
    pub avoid: BTreeSet<String>,
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

/// Kueue took the quota of a group back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The incarnation that had it.
    pub epoch: i64,
    /// In a sentence.
    pub note: String,
}

/// What should become of one group.
#[derive(Clone, Debug)]
pub struct GroupPlan {
    /// Its entry in status.
    pub status: GroupStatus,
    /// Pods to create, by their place in the group.
    pub create: Vec<u32>,
    /// Nodes that its new pods avoid.
    pub avoid: BTreeSet<String>,
    /// Pods to delete.
    pub delete: Vec<Deletion>,
    /// UID of the first pod, where it is to be told before that its answers get
    /// [`HURRIED_SECONDS`] only.
    pub hurry: Option<String>,
    /// Whether clients are sent to it.
    pub hook: Option<Hook>,
    /// Pods that wait for nodes.
    pub place: Option<Placing>,
    /// A failure seen for the first time.
    pub failure: Option<NewFailure>,
    /// What Kueue took from it, seen for the first time.
    pub taken: Option<Taken>,
    /// When to look again without an event.
    pub wake_after: Option<Duration>,
    /// Whether it has any pod now.
    pub has_pods: bool,
    /// Whether none of its pods is being deleted.
    pub can_stay: bool,
    /// Requests that it works on, where that is known.
    pub load: Option<u32>,
    /// UID of the pod that is to be asked how far it is.
    pub waits_for: Option<String>,
}

impl GroupPlan {
    /// Whether it serves.
    pub fn is_ready(&self) -> bool {
        self.status.phase == GroupPhase::Ready
    }

    /// Whether it should exist.
    pub fn is_wanted(&self) -> bool {
        self.status.drain.is_none()
    }

    fn new(status: GroupStatus, pods: &[PodView<'_>]) -> Self {
        Self {
            status,
            create: Vec::new(),
            avoid: BTreeSet::new(),
            delete: Vec::new(),
            hurry: None,
            hook: None,
            place: None,
            failure: None,
            taken: None,
            wake_after: None,
            has_pods: !pods.is_empty(),
            can_stay: pods.iter().all(|pod| !pod.is_deleting()),
            load: None,
            waits_for: None,
        }
    }

    fn in_phase(mut self, phase: GroupPhase, message: impl Into<String>) -> Self {
        self.status.phase = phase;
        self.status.progress = None;
        self.status.message = Some(message.into());
        self
    }

    fn wake_within(&mut self, time: Duration) {
        self.wake_after = Some(self.wake_after.map_or(time, |known| known.min(time)));
    }
}

/// Everything that decides about groups.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What is wanted.
    pub deployment: &'a ValidDeployment,
    /// What pods are made from.
    pub templates: &'a Templates,
    /// What the cluster holds.
    pub observed: &'a Observed,
    /// Its pods, read.
    pub pods: &'a [PodView<'a>],
    /// What status said before.
    pub previous: &'a LlamaDeploymentStatus,
    /// Whether pods of the revision that is wanted may be created.
    pub new_pods: &'a NewPods,
    /// The time.
    pub now: Timestamp,
}

/// What should become of all groups.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Each group.
    pub plans: Vec<GroupPlan>,
    /// The step that was decided.
    pub decision: Decision,
    /// Which revision groups move to, and what came of it.
    pub course: Course,
}

/// Plans every group that is wanted, has pods or stands in status.
pub fn plan(situation: &Situation<'_>, room: &Room) -> Groups {
    let course = Course::of(situation);
    let mut plans: Vec<GroupPlan> = members::indices(situation)
        .into_iter()
        .filter_map(|index| Group::new(situation, &course, index).plan())
        .collect();
    let course = course.judged(situation, &plans);
    let decision = members::decide(situation, &course, &plans, room);
    for index in &decision.keep {
        if let Some(plan) = find(&mut plans, *index) {
            plan.status.drain = None;
            plan.delete.clear();
            plan.hook = None;
            plan.wake_within(Duration::ZERO);
        }
    }
    for (index, reason) in &decision.drain {
        if let Some(plan) = find(&mut plans, *index) {
            plan.status.drain = Some(DrainStatus {
                reason: *reason,
                since: Time(situation.now),
            });
            // Nothing is done to its pods before this is on record.
            plan.create.clear();
            plan.delete.clear();
            plan.place = None;
            plan.status.phase = GroupPhase::Draining;
            plan.status.message = Some("is to end".to_owned());
            plan.wake_within(Duration::ZERO);
        }
    }
    for index in &decision.create {
        let revision = course.revision_of_new(situation, &decision, &plans);
        let epoch = members::next_epoch(situation, &plans);
        let group = Group::new(situation, &course, *index);
        plans.push(group.begin(revision, epoch));
    }
    plans.sort_by_key(|plan| plan.status.index);
    Groups {
        plans,
        decision,
        course,
    }
}

fn find(plans: &mut [GroupPlan], index: u32) -> Option<&mut GroupPlan> {
    plans
        .iter_mut()
        .find(|plan| u32::try_from(plan.status.index) == Ok(index))
}

/// One group with everything that decides about it.
struct Group<'a> {
    situation: &'a Situation<'a>,
    course: &'a Course,
    index: u32,
    previous: Option<&'a GroupStatus>,
    pods: Vec<PodView<'a>>,
    /// Pods of this name and of another owner.
    strangers: Vec<PodView<'a>>,
}

impl<'a> Group<'a> {
    fn new(situation: &'a Situation<'a>, course: &'a Course, index: u32) -> Self {
        let (pods, strangers): (Vec<_>, Vec<_>) = situation
            .pods
            .iter()
            .copied()
            .filter(|pod| pod.group == index)
            .partition(|pod| pod.is_owned_by(&situation.deployment.uid));
        Self {
            situation,
            course,
            index,
            previous: situation
                .previous
                .groups
                .iter()
                .find(|status| u32::try_from(status.index) == Ok(index)),
            pods,
            strangers,
        }
    }

    /// What becomes of a group that exists; `None` when it is over.
    fn plan(&self) -> Option<GroupPlan> {
        let status = self.current();
        if status.drain.is_some() {
            return self.end(status);
        }
        let mut plan = self.keep(status);
        plan.load = self.leader().map(|state| state.load);
        Some(plan)
    }

    /// A new group at this index.
    fn begin(&self, revision: String, epoch: i64) -> GroupPlan {
        let plan = GroupPlan::new(self.fresh(revision, epoch), &[]);
        self.start(plan)
    }

    fn fresh(&self, revision: String, epoch: i64) -> GroupStatus {
        GroupStatus {
            index: i32::try_from(self.index).unwrap_or(i32::MAX),
            revision,
            epoch,
            phase: GroupPhase::Waiting,
            message: None,
            pool: None,
            nodes: Vec::new(),
            restarts: 0,
            last_failure: None,
            recent_failures: Vec::new(),
            drain: None,
            progress: None,
        }
    }

    /// The incarnation that should exist: what status says, unless a pod is newer (its
    /// creation came before the status write that never came).
    fn current(&self) -> GroupStatus {
        let fresh = || self.fresh(self.course.target.clone(), 0);
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

    fn template(&self, revision: &str) -> Option<&'a Template> {
        self.situation.templates.of(revision)
    }

    /// Why pods of `revision` may not be created now, if they may not.
    fn held(&self, revision: &str) -> Option<&'a str> {
        match self.situation.new_pods {
            NewPods::Held(why) if revision == self.course.wanted => Some(why),
            _ => None,
        }
    }

    fn name(&self) -> String {
        names::group(&self.situation.deployment.name, self.index)
    }

    fn pod_name(&self, node: u32) -> String {
        names::pod(&self.situation.deployment.name, self.index, node)
    }

    /// What the first pod of the group said last.
    fn leader(&self) -> Option<&'a PodState> {
        let leader = self.pods.iter().find(|pod| pod.node == 0)?;
        self.situation.observed.states.get(leader.uid)
    }

    fn since(&self, time: &Time) -> Duration {
        let passed = self.situation.now.duration_since(time.0);
        Duration::try_from(passed).unwrap_or_default()
    }
}

/// The pods of the incarnation that `plan` is of.
pub fn pods_of<'a>(
    plan: &GroupPlan,
    observed: &'a Observed,
) -> impl Iterator<Item = PodView<'a>> + use<'a> {
    let (index, epoch) = (u32::try_from(plan.status.index), plan.status.epoch);
    let views = observed.pods.iter().filter_map(|pod| PodView::read(pod));
    views.filter(move |pod| index == Ok(pod.group) && pod.epoch == epoch)
}

/// A group of the wanted revision that serves.
pub fn serving<'a>(plans: &'a [GroupPlan], course: &Course) -> Option<&'a GroupPlan> {
    plans
        .iter()
        .find(|plan| plan.is_ready() && plan.is_wanted() && plan.status.revision == course.wanted)
}

/// Whether a pod should have been gone for a minute.
fn overdue(pod: &PodView<'_>, now: Timestamp) -> bool {
    let deadline = pod.pod.metadata.deletion_timestamp.as_ref();
    deadline.is_some_and(|time| now.duration_since(time.0).as_secs() > 60)
}

pub(crate) fn deletions(pods: &[PodView<'_>], grace: Option<u32>) -> Vec<Deletion> {
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

/// What is waited for when pods do not end.
fn ending_message(pods: &[PodView<'_>], now: Timestamp) -> String {
    let lost = pods
        .iter()
        .find(|pod| pod.is_deleting() && overdue(pod, now));
    match lost {
        None => format!("waiting for {} to end", list(pods)),
        Some(pod) => format!(
            "pod {} should have ended, but its node {} does not answer; repair or remove the \
             node, or delete the pod with --force --grace-period=0",
            pod.name,
            pod.node_name().unwrap_or("(none)")
        ),
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
