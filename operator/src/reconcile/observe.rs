//! Step 1: what the cluster holds for one deployment. Reads only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::ListParams;
use kube::{Api, Client};
use llama_contract::{AdapterReport, AnswersReport, LoadProgress, RankMemory, WorkerPhase};
use llama_crds::v1alpha1::LlamaDeployment;

use super::pods::PodView;
use super::{Error, fit, kueue, source};
use crate::cluster::capacity::NodeRoom;
use crate::cluster::kinds::{OwnBudget, OwnService, StoredRevision, WorkerPod};
use crate::context::Context;

/// The claim that holds the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Claim {
    /// The spec names none.
    #[default]
    NotNeeded,
    /// The spec names one that does not exist.
    Missing,
    /// It exists.
    Found(Box<PersistentVolumeClaim>),
}

/// What a pod said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodState {
    /// What it is doing.
    pub phase: WorkerPhase,
    /// How far the model is fetched or loaded.
    pub progress: LoadProgress,
    /// Requests that it works on or that wait.
    pub load: u32,
    /// What each of its ranks has taken of memory, once all have told.
    pub memory: Option<Vec<RankMemory>>,
    /// The adapters that it was told to have.
    pub adapters: Vec<AdapterReport>,
    /// Digest of its golden answer, once it has given one.
    pub answer: Option<String>,
    /// How its answers did lately, where that was asked.
    pub answers: Option<AnswersReport>,
    /// How long ago it said so.
    pub age: Duration,
}

/// What the cluster holds for one deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Pods with the deployment's label, whoever owns them.
    pub pods: Vec<Arc<WorkerPod>>,
    /// Services of the names that the deployment needs, whoever owns them.
    pub services: Vec<Arc<OwnService>>,
    /// `PodDisruptionBudgets` with the deployment's label.
    pub budgets: Vec<Arc<OwnBudget>>,
    /// Its revisions.
    pub revisions: Vec<Arc<StoredRevision>>,
    /// The claim that holds the model.
    pub claim: Claim,
    /// What pods said, by their UID: first pods, and those that others wait for.
    pub states: BTreeMap<String, PodState>,
    /// Whether the operator may see what nodes have free.
    pub sees_nodes: bool,
    /// Nodes that take no new pods.
    pub closed_nodes: BTreeSet<String>,
    /// What nodes have free, where that was needed and may be seen.
    pub nodes: Option<Vec<NodeRoom>>,
    /// Bytes of the smallest GPU that pods may get, where it had to be looked for.
    pub gpu_memory: Option<u64>,
    /// Whether the API server serves Kueue's objects, where that was needed.
    pub has_kueue: bool,
    /// Conditions of Kueue's Workloads, by name, of groups that wait for it.
    pub workloads: BTreeMap<String, Vec<Condition>>,
}

impl Observed {
    /// Whether any pod waits for nodes to be chosen.
    pub fn has_gated(&self) -> bool {
        let views = self.pods.iter().filter_map(|pod| PodView::read(pod));
        views.into_iter().any(|pod| pod.is_gated())
    }
}

/// Collects everything that planning needs, from caches that our own writes are in.
pub async fn observe(
    context: &Context,
    namespace: &str,
    name: &str,
    object: &LlamaDeployment,
) -> Result<Observed, Error> {
    let cluster = &context.cluster;
    let claim = match source::claim_of(&object.spec) {
        None => Claim::NotNeeded,
        Some(claim) => {
            let of = format!("LlamaDeployment {namespace}/{name}");
            read_claim(context, namespace, claim, &of).await?
        }
    };
    let gpu_memory = gpu_memory(&context.client, object).await;
    let gpu_memory = gpu_memory.map_err(|source| {
        let attempt = format!("read the nodes with GPUs for LlamaDeployment {namespace}/{name}");
        Error::api("observe", attempt, source)
    })?;
    let mut observed = Observed {
        claim,
        sees_nodes: cluster.capacity.is_synced(),
        closed_nodes: cluster.capacity.closed(),
        gpu_memory,
        ..Observed::default()
    };
    refresh(&mut observed, context, namespace, name)?;
    if asks_for_kueue(object, &observed) {
        let served = cluster.kueue.version(&context.client).await;
        let served = served.map_err(|source| {
            let attempt = "see whether the API server serves kueue.x-k8s.io".to_owned();
            Error::api("observe", attempt, source)
        })?;
        observed.has_kueue = served.is_some();
    }
    Ok(observed)
}

/// The claim `claim` of `of`.
pub(crate) async fn read_claim(
    context: &Context,
    namespace: &str,
    claim: &str,
    of: &str,
) -> Result<Claim, Error> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), namespace);
    let found = claims.get_opt(claim).await;
    let found =
        found.map_err(|source| Error::api("observe", format!("read the claim of {of}"), source))?;
    Ok(found.map_or(Claim::Missing, |claim| Claim::Found(Box::new(claim))))
}

/// Whether the spec names a queue, or pods are in one.
fn asks_for_kueue(object: &LlamaDeployment, observed: &Observed) -> bool {
    let placement = object.spec.placement.as_ref();
    let mut views = observed.pods.iter().filter_map(|pod| PodView::read(pod));
    placement.is_some_and(|placement| placement.queue_name.is_some())
        || views.any(|pod| kueue::workload(&pod).is_some())
}

/// Asks for the Workloads of pods that wait for Kueue. What cannot be read is left out: it
/// only makes words.
pub async fn workloads(observed: &mut Observed, context: &Context, namespace: &str) {
    let views = observed.pods.iter().filter_map(|pod| PodView::read(pod));
    let waiting = views.filter(|pod| kueue::waits(pod) && !pod.is_deleting());
    let names: BTreeSet<_> = waiting.filter_map(|pod| kueue::workload(&pod)).collect();
    if names.is_empty() {
        return;
    }
    let cluster = &context.cluster;
    let found = cluster.kueue.workloads(&context.client, namespace, &names);
    observed.workloads = found.await;
}

/// Looks into the caches again, after writes of ours.
pub fn refresh(
    observed: &mut Observed,
    context: &Context,
    namespace: &str,
    name: &str,
) -> Result<(), Error> {
    let cluster = &context.cluster;
    let key = (namespace.to_owned(), name.to_owned());
    observed.services = cluster.services.of(&key).map_err(Error::Encode)?;
    observed.budgets = cluster.budgets.of(&key).map_err(Error::Encode)?;
    observed.revisions = cluster.revisions.of(&key).map_err(Error::Encode)?;
    observed.pods = cluster.pods.of(&key).map_err(Error::Encode)?;
    observed.states = states(context, &observed.pods);
    Ok(())
}

/// What `pods` said last.
pub fn states(context: &Context, pods: &[Arc<WorkerPod>]) -> BTreeMap<String, PodState> {
    pods.iter()
        .filter_map(|pod| {
            let uid = pod.metadata.uid.clone()?;
            let state = context.cluster.states.get(&uid)?;
            Some((uid, state))
        })
        .collect()
}

/// Bytes of the smallest GPU among the nodes that the placement allows, where that has to
/// be known. An operator that watches only some namespaces may not read nodes.
async fn gpu_memory(client: &Client, object: &LlamaDeployment) -> Result<Option<u64>, kube::Error> {
    let (spec, generation) = (&object.spec, object.metadata.generation);
    if !fit::needs_nodes(spec, object.status.as_ref(), generation) {
        return Ok(None);
    }
    let labelled = ListParams::default().labels(fit::GPU_MEMORY_LABEL);
    match Api::<Node>::all(client.clone()).list(&labelled).await {
        Ok(nodes) => Ok(fit::least_gpu_memory(&nodes.items, spec.placement.as_ref())),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(error),
    }
}
