//! Step 3: what should exist and what should go. Pure: same input, same plan.

pub(crate) mod inspection;
mod pod;
mod revision;
mod secret;
mod service;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use llama_crds::v1alpha1::GroupStatus;

use super::fit::Fit;
use super::groups::{self, GroupPlan};
use super::observe::Observed;
use super::pods::PodView;
use super::validate::ValidDeployment;
use super::waiting::{self, Obstacle};

pub use inspection::{INSPECT_CONTAINER, INSPECTION_MEMORY};
pub use pod::{FETCH_CONTAINER, INSTALL_CONTAINER, WORKER_CONTAINER};
pub(crate) use revision::fnv1a;
pub use revision::revision;
pub use secret::TOKEN_KEY;

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
    /// The Services, always both.
    pub services: Vec<Service>,
    /// The rendezvous Secret, without its token, when pods need it.
    pub secret: Option<Secret>,
    /// Pods to create.
    pub create: Vec<Pod>,
    /// Every group.
    pub groups: Vec<GroupPlan>,
    /// Hash of what new pods are made from.
    pub revision: String,
    /// What keeps pods from starting, with the index of the group.
    pub obstacles: Vec<(u32, Obstacle)>,
    /// What is wrong with the model's claim.
    pub claim: Option<Obstacle>,
    /// What is known of the model's memory.
    pub fit: Fit,
}

impl Plan {
    /// When to look again without an event; `None` when only events matter.
    pub fn wake_after(&self) -> Option<Duration> {
        self.groups
            .iter()
            .filter_map(|group| group.wake_after)
            .chain(self.fit.wake_after)
            .min()
    }
}

/// Plans `deployment`, given what the cluster holds and what status said before.
pub fn plan(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    observed: &Observed,
    previous: &[GroupStatus],
    fit: Fit,
    now: Timestamp,
) -> Plan {
    let revision = revision(deployment, settings);
    let views: Vec<_> = observed.pods.iter().filter_map(PodView::read).collect();
    let groups = groups::plan(
        deployment,
        &revision,
        previous,
        &views,
        &fit.new_pods(),
        now,
    );
    let mut create = Vec::new();
    for group in &groups {
        let Ok(index) = u32::try_from(group.status.index) else {
            continue;
        };
        for node in &group.create {
            let place = pod::Place {
                group: index,
                node: *node,
                epoch: group.status.epoch,
                revision: &group.status.revision,
            };
            create.push(pod::pod(deployment, settings, &place));
        }
    }
    let live: Vec<_> = views
        .iter()
        .filter(|pod| pod.is_owned_by(&deployment.uid) && !pod.is_over() && !pod.is_deleting())
        .collect();
    let mut obstacles = Vec::new();
    for pod in &live {
        let found = [
            waiting::of_scheduling(pod),
            waiting::of_containers(pod, deployment),
        ];
        obstacles.extend(found.into_iter().flatten().map(|found| (pod.group, found)));
    }
    // A Secret that went missing shows as a container that cannot be set up.
    let needs_secret = deployment.nodes > 1
        && (!create.is_empty()
            || obstacles.iter().any(|(_, found)| {
                found.reason == llama_crds::v1alpha1::Reason::ContainerNotStarting
            }));
    Plan {
        services: vec![service::client(deployment), service::ranks(deployment)],
        secret: needs_secret.then(|| secret::rendezvous(deployment)),
        create,
        groups,
        revision,
        obstacles,
        claim: waiting::of_claim(deployment, &observed.claim),
        fit,
    }
}
