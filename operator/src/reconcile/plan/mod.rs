//! Step 3: what should exist and what should go. Pure: same input, same plan.

mod budget;
pub(crate) mod fetching;
pub(crate) mod inspection;
mod model;
mod pod;
mod revision;
mod secret;
mod service;

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use llama_crds::v1alpha1::{
    AdapterStatus, LlamaDeployment, LlamaDeploymentStatus, Reason, SelfTestRecord,
};

use super::adapters;
use super::apply::Applied;
use super::fit::{self, Fit};
use super::golden;
use super::groups::{self, Course, Deletion, GroupPlan, Situation};
use super::kueue;
use super::measured;
use super::observe::Observed;
use super::placement::{self, Need};
use super::pods::PodView;
use super::rollout::{Decision, Room};
use super::template::{self, Templates};
use super::validate::ValidDeployment;
use super::waiting::{self, Obstacle};

pub use inspection::{INSPECT_CONTAINER, INSPECTION_MEMORY};
pub use model::{FETCH_CONTAINER, INSTALL_CONTAINER};
pub use pod::WORKER_CONTAINER;
pub(crate) use revision::fnv1a;
pub use revision::revision;
pub use secret::TOKEN_KEY;

/// Time between two looks for room that a rollout or a closed node waits for.
const ROOM_EVERY: Duration = Duration::from_secs(5);

/// Time between two looks whether what pods need to be placed is there.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// What all worker pods of this operator share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSettings {
    /// Image of the worker.
    pub image: String,
    /// When nodes pull it; Kubernetes' default when absent.
    pub pull_policy: Option<String>,
    /// Seconds that running answers get to finish when a pod is asked to end.
    pub drain_seconds: u32,
}

/// What should exist and what should go.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The Service that gives pods host names.
    pub ranks_service: Service,
    /// The Service of clients.
    pub client_service: Service,
    /// The rendezvous Secret, without its token, when pods need it.
    pub secret: Option<Secret>,
    /// The revision to keep, when it is not kept yet.
    pub keep_revision: Option<ControllerRevision>,
    /// Revisions that may go.
    pub drop_revisions: Vec<Deletion>,
    /// `PodDisruptionBudgets`, one for each group.
    pub budgets: Vec<PodDisruptionBudget>,
    /// `PodDisruptionBudgets` of groups that are over.
    pub drop_budgets: Vec<Deletion>,
    /// Pods to create.
    pub create: Vec<Pod>,
    /// Every group.
    pub groups: Vec<GroupPlan>,
    /// The step that was decided.
    pub decision: Decision,
    /// Which revision groups move to.
    pub course: Course,
    /// What pods are made from.
    pub templates: Templates,
    /// The golden answers on record.
    pub self_tests: Vec<SelfTestRecord>,
    /// The adapters of the spec, and those that have to go.
    pub adapters: Vec<AdapterStatus>,
    /// What keeps pods from starting, with the index of the group.
    pub obstacles: Vec<(u32, Obstacle)>,
    /// What is wrong with the model's claim.
    pub claim: Option<Obstacle>,
    /// What is known of the model's memory.
    pub fit: Fit,
}

impl Plan {
    /// Says of groups that wait for nodes what came of it.
    pub fn note_places(&mut self, applied: &Applied) {
        for (index, why) in &applied.no_room {
            if let Some(group) = self.group_mut(*index) {
                group.status.message = Some(format!("waits for room: {why}"));
            }
            let reason = Reason::InsufficientRoom;
            let message = why.clone();
            self.obstacles.push((*index, Obstacle { reason, message }));
        }
        for (index, pod) in &applied.placed {
            if let Some(group) = self.group_mut(*index) {
                group.status.message = Some(groups::waits_for_node(pod));
            }
        }
    }

    fn group_mut(&mut self, index: u32) -> Option<&mut GroupPlan> {
        let mut groups = self.groups.iter_mut();
        groups.find(|group| u32::try_from(group.status.index) == Ok(index))
    }

    /// Whether it creates pods that wait for nodes to be chosen, and does nothing that has
    /// to be told before anything else is done.
    pub fn made_gated_pods(&self) -> bool {
        let gated = |pod: &Pod| {
            let spec = pod.spec.as_ref();
            spec.is_some_and(|spec| spec.scheduling_gates.is_some())
        };
        let quiet = |group: &GroupPlan| {
            group.failure.is_none() && group.delete.is_empty() && group.hook.is_none()
        };
        self.create.iter().any(gated) && self.groups.iter().all(quiet)
    }

    /// When to look again without an event; `None` when only events matter.
    pub fn wake_after(&self) -> Option<Duration> {
        self.groups
            .iter()
            .filter_map(|group| group.wake_after)
            .chain(self.fit.wake_after)
            .chain(self.course.wake_after())
            .chain(self.decision.waits_for_room.then_some(ROOM_EVERY))
            .min()
    }
}

/// Plans `deployment`, given what the cluster holds and what status said before.
pub fn plan(
    object: &LlamaDeployment,
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    observed: &Observed,
    previous: &LlamaDeploymentStatus,
    now: Timestamp,
) -> Plan {
    let mut fit = fit::fit(deployment, settings, observed, previous, now);
    let cannot_be_placed = placement::holdup(deployment, observed.sees_nodes)
        .or_else(|| kueue::holdup(deployment, observed.has_kueue));
    if let Some(holdup) = cannot_be_placed {
        fit.holdup = Some(holdup);
        let wake = fit.wake_after.unwrap_or(LOOK_AGAIN);
        fit.wake_after = Some(wake.min(LOOK_AGAIN));
    }
    let new_pods = fit.new_pods();
    let templates = Templates::new(object, deployment, settings, observed, previous);
    let views: Vec<_> = observed
        .pods
        .iter()
        .filter_map(|pod| PodView::read(pod))
        .collect();
    let situation = Situation {
        deployment,
        templates: &templates,
        observed,
        pods: &views,
        previous,
        new_pods: &new_pods,
        now,
    };
    let groups = groups::plan(&situation, &room(deployment, observed));
    if let (Some(made), Some(group)) = (&fit.plan, groups::serving(&groups.plans, &groups.course)) {
        fit.plan = Some(measured::noted(made, group, observed));
    }
    let self_tests = golden::records(previous, &groups.plans, &templates, observed, now);
    let adapters = adapters::statuses(
        deployment.adapters.as_ref(),
        &groups.plans,
        &templates,
        observed,
        &previous.adapters,
    );
    let create = pods(&templates, observed, previous, &groups.plans);
    let live: Vec<_> = views
        .iter()
        .filter(|pod| pod.is_owned_by(&deployment.uid) && !pod.is_over() && !pod.is_deleting())
        .collect();
    let mut obstacles = Vec::new();
    for pod in &live {
        let found = [
            waiting::of_kueue(pod, observed),
            waiting::of_scheduling(pod),
            waiting::of_containers(pod, &deployment.source),
        ];
        obstacles.extend(found.into_iter().flatten().map(|found| (pod.group, found)));
    }
    // A Secret that went missing shows as a container that cannot be set up.
    let several = groups.plans.iter().any(|group| {
        let template = templates.of(&group.status.revision);
        template.is_some_and(|template| template.deployment.nodes > 1)
    });
    let needs_secret = several
        && (!create.is_empty()
            || obstacles
                .iter()
                .any(|(_, found)| found.reason == Reason::ContainerNotStarting));
    let (budgets, drop_budgets) =
        budget::of_groups(deployment, &templates, observed, &groups.plans);
    Plan {
        ranks_service: service::ranks(deployment),
        client_service: service::client(deployment),
        secret: needs_secret.then(|| secret::rendezvous(deployment)),
        keep_revision: templates.missing.clone(),
        drop_revisions: outlived(deployment, observed, &groups),
        budgets,
        drop_budgets,
        create,
        groups: groups.plans,
        decision: groups.decision,
        self_tests,
        adapters,
        course: groups.course,
        templates,
        obstacles,
        claim: waiting::of_claim(deployment, &observed.claim),
        fit,
    }
}

/// Whether a further group would find a place now.
fn room(deployment: &ValidDeployment, observed: &Observed) -> Room {
    let Some(nodes) = observed
        .nodes
        .as_ref()
        .filter(|_| deployment.queue.is_none())
    else {
        return Room::Unknown;
    };
    match placement::place(&Need::of(deployment, BTreeSet::new()), nodes) {
        Ok(_) => Room::Fits,
        Err(why) => Room::Full(why.0),
    }
}

fn pods(
    templates: &Templates,
    observed: &Observed,
    status: &LlamaDeploymentStatus,
    groups: &[GroupPlan],
) -> Vec<Pod> {
    let mut create = Vec::new();
    for group in groups {
        let revision = &group.status.revision;
        let (Ok(index), Some(template)) =
            (u32::try_from(group.status.index), templates.of(revision))
        else {
            continue;
        };
        let answer = golden::expected(status, template);
        for node in &group.create {
            let place = pod::Place {
                group: index,
                node: *node,
                epoch: group.status.epoch,
                revision,
                avoid: &group.avoid,
                answer: answer.as_deref(),
                gated: placement::is_chosen_here(&template.deployment, observed.sees_nodes),
            };
            create.push(pod::pod(&template.deployment, &template.worker, &place));
        }
    }
    create
}

fn outlived(
    deployment: &ValidDeployment,
    observed: &Observed,
    groups: &groups::Groups,
) -> Vec<Deletion> {
    let mut needed: BTreeSet<&str> = groups
        .plans
        .iter()
        .map(|plan| plan.status.revision.as_str())
        .collect();
    let course = &groups.course;
    needed.extend([course.wanted.as_str(), course.target.as_str()]);
    needed.extend(course.stable.as_deref());
    let limit = deployment.change.history;
    template::outlived(&observed.revisions, &deployment.uid, &needed, limit)
}
