//! Keys and values of the labels on what the operator creates.

use std::collections::BTreeMap;

/// Field manager of every write, reporter of events, and value of [`MANAGED_BY`].
pub const FIELD_MANAGER: &str = "llama-operator";

/// Who manages the object.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Name of the `LlamaDeployment` that the object belongs to.
pub const DEPLOYMENT: &str = "llmops.dev/deployment";
/// Index of the group that a pod belongs to.
pub const GROUP: &str = "llmops.dev/group";
/// Place of a pod in its group.
pub const NODE: &str = "llmops.dev/node";
/// Hash of what a pod was made from.
pub const REVISION: &str = "llmops.dev/revision";
/// Incarnation of the group that a pod belongs to.
pub const EPOCH: &str = "llmops.dev/epoch";
/// `true` on the pod that holds rank 0 and answers the API.
pub const RANK0: &str = "llmops.dev/rank0";

/// `true` on the pod that clients may be sent to: taken off before a group ends.
pub const SERVING: &str = "llmops.dev/serving";
/// Scheduling gate of pods that wait until nodes are chosen for their whole group.
pub const GANG_GATE: &str = "llmops.dev/gang";
/// Name of the pool that was chosen for a pod.
pub const POOL: &str = "llmops.dev/pool";
/// Annotation with the node that was chosen for a pod.
pub const ASSIGNED_NODE: &str = "llmops.dev/assigned-node";
/// Annotation with the time at which it was chosen.
pub const ASSIGNED_AT: &str = "llmops.dev/assigned-at";

/// Annotation of a LlamaDeployment: with the value `true` the operator leaves it and all
/// that it is made of alone.
pub const PAUSE: &str = "llmops.dev/paused";

/// Hash of what an inspection pod was made from; only such pods have it.
pub const INSPECTION: &str = "llmops.dev/inspection";

/// Name of the `LlamaModel` that a fetching pod belongs to; only such pods have it.
pub const MODEL: &str = "llmops.dev/model";

const COMPONENT: &str = "app.kubernetes.io/component";
const PART_OF: &str = "app.kubernetes.io/part-of";
/// What the pods of groups are.
const INFERENCE: &str = "inference";

/// Value of [`PAUSE`], [`RANK0`] and [`SERVING`].
pub const TRUE: &str = "true";

/// Labels of everything that belongs to the deployment `name`.
pub fn common(name: &str) -> BTreeMap<String, String> {
    labelled(DEPLOYMENT, name, INFERENCE)
}

/// Labels of the pods that fetch for the `LlamaModel` `name`.
pub fn fetching(name: &str) -> BTreeMap<String, String> {
    labelled(MODEL, name, "model")
}

/// Labels of what belongs to `name`, which is what `owner` says.
fn labelled(owner: &str, name: &str, component: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "llama-worker"),
        ("app.kubernetes.io/instance", name),
        (COMPONENT, component),
        (PART_OF, FIELD_MANAGER),
        (MANAGED_BY, FIELD_MANAGER),
        (owner, name),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Labels of the pod that inspects the model of the deployment `name`.
pub fn inspection(name: &str) -> BTreeMap<String, String> {
    let mut all = common(name);
    all.insert(COMPONENT.to_owned(), "inspection".to_owned());
    all
}

/// Selector of the pods of the groups of the deployment `name`.
pub fn group_pods(name: &str) -> BTreeMap<String, String> {
    [(DEPLOYMENT, name), (COMPONENT, INFERENCE)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// Selector of what belongs to `LlamaDeployments`.
pub fn managed() -> String {
    format!("{MANAGED_BY}={FIELD_MANAGER},{DEPLOYMENT}")
}

/// Selector of what belongs to `LlamaModels`.
pub fn of_models() -> String {
    format!("{MANAGED_BY}={FIELD_MANAGER},{MODEL}")
}

/// Selector of the Deployments that run operators: the chart gives them these labels.
pub fn operators() -> String {
    format!("{PART_OF}={FIELD_MANAGER},{COMPONENT}=operator")
}

/// Selector of the pods of the deployment `name`.
pub fn of_deployment(name: &str) -> String {
    format!("{MANAGED_BY}={FIELD_MANAGER},{DEPLOYMENT}={name}")
}

/// Selector of one pod a group of the deployment `name`: what `/scale` reports.
pub fn one_pod_a_group(name: &str) -> String {
    format!("{DEPLOYMENT}={name},{RANK0}={TRUE}")
}
