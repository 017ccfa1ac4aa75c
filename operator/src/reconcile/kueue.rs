//! Groups whose nodes are Kueue's to give: what their pods carry, what they wait for, and
//! what Kueue takes back. Pure.
//!
//! A pod group of Kueue's is one incarnation of a group. Its pods are not replaced one by
//! one, so it ends with them, and the next incarnation queues anew.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSchedulingGate};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use llama_crds::v1alpha1::{GangProvider, Placement, Reason};

use super::condition::cut;
use super::fit::Holdup;
use super::observe::Observed;
use super::plan::fnv1a;
use super::pods::PodView;
use super::validate::ValidDeployment;
use crate::{labels, names};

/// Finalizer with which Kueue keeps pods, and the label by which it says that it manages
/// them.
pub const MANAGED: &str = "kueue.x-k8s.io/managed";
/// Label with the name of the `LocalQueue`.
const QUEUE: &str = "kueue.x-k8s.io/queue-name";
/// Label with the name of the pod group, which is its Workload's too.
const POD_GROUP: &str = "kueue.x-k8s.io/pod-group-name";
/// Gate that Kueue takes off once the whole pod group has its quota.
const GATE: &str = "kueue.x-k8s.io/admission";
const TOTAL_COUNT: &str = "kueue.x-k8s.io/pod-group-total-count";
const RETRIABLE: &str = "kueue.x-k8s.io/retriable-in-group";
const ROLE: &str = "kueue.x-k8s.io/role-hash";
const REQUIRED_TOPOLOGY: &str = "kueue.x-k8s.io/podset-required-topology";
const PREFERRED_TOPOLOGY: &str = "kueue.x-k8s.io/podset-preferred-topology";
const INDEX_LABEL: &str = "kueue.x-k8s.io/pod-group-pod-index-label";
/// Condition of a pod that Kueue stops.
const STOPPED: &str = "TerminationTarget";
/// Longest text of Kueue's in a message, in characters.
const TEXT_LIMIT: usize = 700;

/// The `LocalQueue` that gives groups their nodes; `None` where the operator chooses.
pub fn queue(placement: &Placement, is_served: bool) -> Option<&str> {
    let name = placement.queue_name.as_deref()?;
    match provider(placement) {
        GangProvider::Builtin => None,
        GangProvider::Kueue => Some(name),
        GangProvider::Auto => is_served.then_some(name),
    }
}

fn provider(placement: &Placement) -> GangProvider {
    let gang = placement.gang.as_ref();
    gang.map_or(GangProvider::Auto, |gang| gang.provider)
}

/// What keeps pods from being made where Kueue is asked for by name and is not there.
pub fn holdup(deployment: &ValidDeployment, is_served: bool) -> Option<Holdup> {
    let is_missing = provider(&deployment.placement) == GangProvider::Kueue && !is_served;
    is_missing.then(|| Holdup {
        reason: Reason::KueueNotInstalled.to_string(),
        message: "spec.placement.gang.provider is Kueue, and the API server does not serve \
                  LocalQueues of kueue.x-k8s.io: install Kueue, or set the provider to Auto and \
                  the operator chooses nodes until Kueue is there"
            .to_owned(),
        is_stalled: true,
        concerns_model: false,
    })
}

/// Makes `pod` of `deployment`, in the incarnation `epoch` of the group `index`, one of a pod
/// group that gets its nodes from `queue`.
pub fn enqueue(pod: &mut Pod, deployment: &ValidDeployment, queue: &str, index: u32, epoch: i64) {
    let meta = &mut pod.metadata;
    let all = meta.labels.get_or_insert_default();
    let revision = all.get(labels::REVISION).cloned().unwrap_or_default();
    let group = pod_group(deployment, index, epoch);
    all.insert(QUEUE.to_owned(), queue.to_owned());
    all.insert(POD_GROUP.to_owned(), group);
    let mut notes = BTreeMap::from([
        (TOTAL_COUNT, deployment.nodes.to_string()),
        // The pod group is over when its pods are: one that was given up holds no quota.
        (RETRIABLE, "false".to_owned()),
        // All pods are of one kind to Kueue, although the first has more ports: kinds are
        // placed each by itself.
        (ROLE, revision),
    ]);
    let topology = deployment.placement.topology.as_ref();
    let near = topology.and_then(|topology| match (&topology.required, &topology.preferred) {
        (Some(key), _) => Some((REQUIRED_TOPOLOGY, key)),
        (None, Some(key)) => Some((PREFERRED_TOPOLOGY, key)),
        (None, None) => None,
    });
    if let Some((annotation, key)) = near {
        notes.insert(annotation, key.clone());
        notes.insert(INDEX_LABEL, labels::NODE.to_owned());
    }
    let annotations = meta.annotations.get_or_insert_default();
    annotations.extend(
        notes
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value)),
    );
    // Kueue puts it on too. Where it does not manage the pods of the namespace, they wait
    // and say so, instead of being scheduled one by one.
    let gate = PodSchedulingGate {
        name: GATE.to_owned(),
    };
    let spec = pod.spec.get_or_insert_default();
    spec.scheduling_gates.get_or_insert_default().push(gate);
}

/// A name that no other incarnation of any group has, so that no Workload of the past is
/// taken for its own.
fn pod_group(deployment: &ValidDeployment, index: u32, epoch: i64) -> String {
    let group = names::group(&deployment.name, index);
    let hash = fnv1a(deployment.uid.as_bytes());
    format!(
        "{group}-{epoch}-{:08x}",
        (hash >> 32) ^ (hash & 0xffff_ffff)
    )
}

/// Whether `pod` waits for Kueue to give its pod group nodes.
pub fn waits(pod: &PodView<'_>) -> bool {
    let gates = &pod.pod.spec.scheduling_gates;
    gates.iter().any(|gate| gate.name == GATE)
}

/// The Workload of `pod`'s pod group, if it has one.
pub fn workload<'a>(pod: &PodView<'a>) -> Option<&'a str> {
    let labels = pod.pod.metadata.labels.as_ref()?;
    labels.get(POD_GROUP).map(String::as_str)
}

/// What `pod`, which waits for Kueue, waits for.
pub fn waited_for(pod: &PodView<'_>, observed: &Observed) -> String {
    let label = |key: &str| pod.pod.metadata.labels.as_ref()?.get(key);
    let queue = label(QUEUE).map_or("(none)", String::as_str);
    if label(MANAGED).is_none() {
        return format!(
            "waits for LocalQueue {queue} of Kueue, which does not manage this pod: see that \
             Kueue runs, has the pod integration, and its managedJobsNamespaceSelector matches \
             the namespace"
        );
    }
    let conditions = workload(pod).and_then(|name| observed.workloads.get(name));
    let why = conditions.and_then(|conditions| unmet(conditions));
    match why {
        None => format!("waits for LocalQueue {queue} of Kueue"),
        Some(why) => format!(
            "waits for LocalQueue {queue} of Kueue: {}",
            cut(&why, TEXT_LIMIT)
        ),
    }
}

/// What a Workload with these conditions has yet to get.
fn unmet(conditions: &[Condition]) -> Option<String> {
    let find = |type_: &str| conditions.iter().find(|condition| condition.type_ == type_);
    let reserved = find("QuotaReserved")?;
    if reserved.status != "True" {
        return Some(reserved.message.clone());
    }
    let admitted = find("Admitted").filter(|admitted| admitted.status != "True");
    let text = admitted.map_or("", |admitted| &admitted.message);
    Some(if text.is_empty() {
        "it has its quota, and admission checks are under way".to_owned()
    } else {
        format!("it has its quota, and admission checks are under way ({text})")
    })
}

/// Why Kueue stops the group of `pods`, if it does: it is no fault of the group.
pub fn taken_back(pods: &[PodView<'_>]) -> Option<String> {
    let stopped = pods.iter().find_map(|pod| {
        let condition = pod.condition(STOPPED)?;
        (pod.is_deleting() && condition.status == "True").then_some(condition)
    })?;
    let reason = stopped.reason.as_deref().unwrap_or("no reason");
    let text = stopped.message.as_deref().unwrap_or_default();
    Some(format!("{reason}: {}", cut(text, TEXT_LIMIT)))
}
