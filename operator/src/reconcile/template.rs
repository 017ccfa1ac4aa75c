//! What the pods of each revision are made from. Pure.
//!
//! A group that fails while a rollout is under way, or after one has halted, is made
//! again at its own revision, so what that is must outlive the spec that it came from: it
//! is kept in a `ControllerRevision`. The worker image is kept with it, so that a new
//! version of the operator moves no group.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use kube::ResourceExt;
use kube::api::ObjectMeta;
use llama_crds::v1alpha1::{LlamaDeployment, LlamaDeploymentSpec, LlamaDeploymentStatus};
use serde::{Deserialize, Serialize};

use super::canonical;
use super::groups::Deletion;
use super::observe::Observed;
use super::plan::{WorkerSettings, revision};
use super::validate::{ValidDeployment, validate};
use crate::cluster::kinds::StoredRevision;
use crate::{labels, names};

/// What the pods of one revision are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    /// The spec of that revision, with today's replicas and policies.
    pub deployment: ValidDeployment,
    /// The worker image of that revision.
    pub worker: WorkerSettings,
}

/// The templates of all revisions that are known.
#[derive(Clone, Debug, PartialEq)]
pub struct Templates {
    /// Hash of what the spec asks for.
    pub target: String,
    /// By hash.
    by_revision: BTreeMap<String, Template>,
    /// The revision to keep, where it is not kept yet.
    pub missing: Option<ControllerRevision>,
}

/// What a `ControllerRevision` holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    spec: LlamaDeploymentSpec,
    #[serde(flatten)]
    worker: Worker,
}

/// The part of it that the spec does not have.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Worker {
    worker_image: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    worker_image_pull_policy: Option<String>,
}

impl Worker {
    fn settings(self, settings: &WorkerSettings, deployment: &ValidDeployment) -> WorkerSettings {
        WorkerSettings {
            image: self.worker_image,
            pull_policy: self.worker_image_pull_policy,
            ..with_drain(settings, deployment)
        }
    }
}

impl Templates {
    /// The templates of `object`, whose spec reads as `deployment` and whose status was
    /// `previous`: of what it asks for, and of the kept revisions that a group has or
    /// that served last. Others are kept for nothing to be read.
    pub fn new(
        object: &LlamaDeployment,
        deployment: &ValidDeployment,
        settings: &WorkerSettings,
        observed: &Observed,
        previous: &LlamaDeploymentStatus,
    ) -> Self {
        let target = revision(deployment);
        let in_use = in_use(observed, previous);
        let mut by_revision = BTreeMap::new();
        for stored in own(&observed.revisions, &deployment.uid) {
            let Some(hash) = stored.labels().get(labels::REVISION) else {
                continue;
            };
            let template = if *hash == target {
                read_target(deployment, settings, stored)
            } else if in_use.contains(hash.as_str()) {
                read(object, deployment, settings, observed, stored)
            } else {
                None
            };
            if let Some(template) = template {
                by_revision.insert(hash.clone(), template);
            }
        }
        let missing = (!by_revision.contains_key(&target)).then(|| {
            let template = Template {
                deployment: deployment.clone(),
                worker: with_drain(settings, deployment),
            };
            by_revision.insert(target.clone(), template);
            store(object, deployment, settings, observed, &target)
        });
        Self {
            target,
            by_revision,
            missing,
        }
    }

    /// What pods of `revision` are made from; `None` when that is not kept any more.
    pub fn of(&self, revision: &str) -> Option<&Template> {
        self.by_revision.get(revision)
    }
}

/// Revisions that may go: of those that no group has and no rollback needs, all but the
/// latest `limit`.
pub fn outlived(
    revisions: &[Arc<StoredRevision>],
    uid: &str,
    needed: &BTreeSet<&str>,
    limit: usize,
) -> Vec<Deletion> {
    let is_needed = |stored: &StoredRevision| {
        let hash = stored.labels().get(labels::REVISION);
        hash.is_some_and(|hash| needed.contains(hash.as_str()))
    };
    let mut idle: Vec<_> = own(revisions, uid)
        .filter(|stored| !is_needed(stored) && stored.metadata.deletion_timestamp.is_none())
        .collect();
    idle.sort_by_key(|stored| std::cmp::Reverse(stored.revision));
    idle.iter()
        .skip(limit)
        .map(|stored| Deletion {
            name: stored.name_any(),
            uid: stored.uid().unwrap_or_default(),
            grace: None,
        })
        .collect()
}

fn own<'a>(
    revisions: &'a [Arc<StoredRevision>],
    uid: &'a str,
) -> impl Iterator<Item = &'a StoredRevision> {
    revisions
        .iter()
        .map(Arc::as_ref)
        .filter(move |stored| stored.owner_references().iter().any(|of| of.uid == uid))
}

/// Hashes of revisions that pods may have to be made from, besides the one that the spec
/// asks for.
fn in_use<'a>(observed: &'a Observed, previous: &'a LlamaDeploymentStatus) -> BTreeSet<&'a str> {
    let of_groups = previous.groups.iter().map(|group| group.revision.as_str());
    let of_pods = observed.pods.iter();
    let of_pods = of_pods.filter_map(|pod| pod.labels().get(labels::REVISION));
    of_groups
        .chain(of_pods.map(String::as_str))
        .chain(previous.current_revision.as_deref())
        .collect()
}

/// The revision that the spec asks for has that spec; only its worker is kept.
fn read_target(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    stored: &StoredRevision,
) -> Option<Template> {
    Some(Template {
        deployment: deployment.clone(),
        worker: Worker::deserialize(&stored.data)
            .ok()?
            .settings(settings, deployment),
    })
}

/// `None` when this version cannot make pods from it: its groups stay, and are replaced
/// when they fail.
fn read(
    object: &LlamaDeployment,
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    observed: &Observed,
    stored: &StoredRevision,
) -> Option<Template> {
    let data = Data::deserialize(&stored.data).ok()?;
    let then = LlamaDeployment {
        metadata: object.metadata.clone(),
        spec: data.spec,
        status: None,
    };
    let then = validate(&then, observed).ok()?;
    let worker = data.worker.settings(settings, deployment);
    Some(Template {
        deployment: ValidDeployment {
            replicas: deployment.replicas,
            suspend: deployment.suspend,
            checks_answers: deployment.checks_answers,
            change: deployment.change.clone(),
            adapters: then
                .adapters
                .map(|set| set.with_list_of(deployment.adapters.as_ref())),
            ..then
        },
        worker,
    })
}

fn with_drain(settings: &WorkerSettings, deployment: &ValidDeployment) -> WorkerSettings {
    let drain = deployment.change.drain;
    let seconds = drain.and_then(|drain| u32::try_from(drain.as_secs()).ok());
    WorkerSettings {
        drain_seconds: seconds.unwrap_or(settings.drain_seconds),
        ..settings.clone()
    }
}

fn store(
    object: &LlamaDeployment,
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    observed: &Observed,
    hash: &str,
) -> ControllerRevision {
    let latest = own(&observed.revisions, &deployment.uid)
        .map(|stored| stored.revision)
        .max();
    let data = Data {
        spec: object.spec.clone(),
        worker: Worker {
            worker_image: settings.image.clone(),
            worker_image_pull_policy: settings.pull_policy.clone(),
        },
    };
    let mut all = labels::common(&deployment.name);
    all.insert(labels::REVISION.to_owned(), hash.to_owned());
    ControllerRevision {
        metadata: ObjectMeta {
            name: Some(names::revision(&deployment.name, hash)),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(all),
            owner_references: Some(vec![deployment.owner.clone()]),
            ..ObjectMeta::default()
        },
        // Plain fields and maps with text keys always serialize.
        data: serde_json::to_value(&data)
            .ok()
            .map(canonical::sorted)
            .map(k8s_openapi::apimachinery::pkg::runtime::RawExtension),
        revision: latest.unwrap_or(0) + 1,
    }
}
