//! Step 4: makes the cluster match the plan. Writes only, and puts each answer into the
//! caches.

mod checks;

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions, Request};
use kube::{Api, Resource, ResourceExt};
use llama_crds::v1alpha1::NodePool;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::canonical;
use super::groups::{Deletion, GroupPlan, Hook, Placing, Unplaced};
use super::placement::{self, Assignment, HOSTNAME, Need, Seat};
use super::plan::{Plan, TOKEN_KEY};
use super::{Error, observe::Observed};
use crate::cluster::kinds::{OwnBudget, OwnService, PlacedPod, StoredRevision, WorkerPod};
use crate::cluster::store::Store;
use crate::context::Context;
use crate::labels::{self, FIELD_MANAGER};
use crate::names;

/// Bytes of a rendezvous token before it is written as text.
const TOKEN_BYTES: usize = 32;

/// What came of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Objects that the API server refused, with its words: quota, admission, Pod
    /// Security. Trying again helps only once somebody has acted.
    pub refused: Vec<String>,
    /// Children that somebody had changed and that are as planned again.
    pub restored: Vec<String>,
    /// Children that nobody owned and that were taken over.
    pub adopted: Vec<String>,
    /// Why groups have no place, by index.
    pub no_room: BTreeMap<u32, String>,
    /// The first pod of groups for which nodes were chosen, by index.
    pub placed: BTreeMap<u32, String>,
    /// Writes made.
    pub writes: usize,
}

impl Applied {
    /// Whether something came of it that the plan does not say.
    pub fn needs_telling(&self) -> bool {
        !self.refused.is_empty() || !self.restored.is_empty()
    }
}

/// Makes the cluster match `plan`: the revision and the Service that gives pods names first,
/// then labels and deletions, then the Secret and the pods that need it, then nodes for groups
/// that wait.
pub async fn apply(
    context: &Context,
    namespace: &str,
    plan: &Plan,
    observed: &Observed,
    now: Timestamp,
) -> Result<Applied, Error> {
    let cluster = &context.cluster;
    let mut work = Work {
        context,
        namespace,
        applied: Applied::default(),
    };
    if let Some(revision) = &plan.keep_revision {
        work.create("ControllerRevision", revision, &cluster.revisions)
            .await?;
    }
    work.ensure_service(&plan.ranks_service, observed).await?;
    for hook in plan.groups.iter().filter_map(|group| group.hook.as_ref()) {
        work.hook(hook).await?;
    }
    let of_groups = plan.groups.iter().flat_map(|group| &group.delete);
    for deletion in of_groups.chain(&plan.fit.delete) {
        work.delete("Pod", deletion, &cluster.pods).await?;
    }
    if let Some(secret) = &plan.secret {
        work.create_secret(secret).await?;
    }
    for budget in &plan.budgets {
        work.take_off_maximum(budget, observed).await?;
        let live = observed.budgets.iter().map(AsRef::as_ref);
        work.ensure::<_, OwnBudget>("PodDisruptionBudget", budget, live, &cluster.budgets)
            .await?;
    }
    for pod in plan.fit.create.iter().chain(&plan.create) {
        if work.keeps_volumes(pod).await? {
            work.create("Pod", pod, &cluster.pods).await?;
        }
    }
    for group in &plan.groups {
        if let Some(placing) = &group.place {
            work.place(plan, group, placing, now).await?;
        }
    }
    for deletion in &plan.drop_budgets {
        work.delete("PodDisruptionBudget", deletion, &cluster.budgets)
            .await?;
    }
    for deletion in &plan.drop_revisions {
        work.delete("ControllerRevision", deletion, &cluster.revisions)
            .await?;
    }
    Ok(work.applied)
}

/// Deletes and creates pods that are of no group, which `store` has.
pub(crate) async fn apply_pods(
    context: &Context,
    namespace: &str,
    store: &Store<WorkerPod>,
    delete: &[Deletion],
    create: &[Pod],
) -> Result<Applied, Error> {
    let mut work = Work {
        context,
        namespace,
        applied: Applied::default(),
    };
    for deletion in delete {
        work.delete("Pod", deletion, store).await?;
    }
    for pod in create {
        work.create("Pod", pod, store).await?;
    }
    Ok(work.applied)
}

/// Makes the Service of clients as planned, and adds what came of it to `applied`. After
/// everything else: the API server gives out addresses of Services one at a time, and where
/// many are created at once this one waits for all before it.
pub async fn apply_client_service(
    context: &Context,
    namespace: &str,
    plan: &Plan,
    observed: &Observed,
    applied: &mut Applied,
) -> Result<(), Error> {
    let mut work = Work {
        context,
        namespace,
        applied: std::mem::take(applied),
    };
    let result = work.ensure_service(&plan.client_service, observed).await;
    *applied = work.applied;
    result
}

struct Work<'a> {
    context: &'a Context,
    namespace: &'a str,
    applied: Applied,
}

/// A kind that is cached as `Self`, whatever it was written as.
trait Cached: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
where
    Self: Sized + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
}

impl Cached for WorkerPod {}
impl Cached for OwnService {}
impl Cached for OwnBudget {}
impl Cached for StoredRevision {}

impl Work<'_> {
    fn api<K: Cached>(&self) -> Api<K> {
        Api::namespaced(self.context.client.clone(), self.namespace)
    }

    async fn ensure_service(
        &mut self,
        service: &Service,
        observed: &Observed,
    ) -> Result<(), Error> {
        let live = observed.services.iter().map(AsRef::as_ref);
        let store = &self.context.cluster.services;
        self.ensure::<_, OwnService>("Service", service, live, store)
            .await
    }

    /// Server-side apply, unless the live object already has every field as planned.
    async fn ensure<'a, P, K>(
        &mut self,
        kind: &str,
        planned: &P,
        mut live: impl Iterator<Item = &'a K>,
        store: &Store<K>,
    ) -> Result<(), Error>
    where
        P: Resource<DynamicType = ()> + Serialize,
        K: Cached + Serialize + 'a,
    {
        let name = planned.meta().name.clone().unwrap_or_default();
        let wanted = full(planned)?;
        let found = live.find(|live| live.name_any() == name);
        let ours = match found {
            None => None,
            Some(found) => Some(serde_json::to_value(found).map_err(Error::Encode)?),
        };
        if ours.as_ref().is_some_and(|live| includes(live, &wanted)) {
            return Ok(());
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let result = self
            .api::<K>()
            .patch(&name, &params, &Patch::Apply(&wanted))
            .await;
        let written = self.settle(result, &format!("apply {kind}"), &name)?;
        if let Some(object) = written {
            if ours.is_some() {
                self.applied.restored.push(format!("{kind} {name}"));
            }
            store.wrote(&object);
        }
        Ok(())
    }

    /// Creates `object`; one that exists already stays as it is. Not server-side apply:
    /// that would change a pod of this name that is about to end, or is somebody else's.
    async fn create<P, K>(&mut self, kind: &str, object: &P, store: &Store<K>) -> Result<(), Error>
    where
        P: Resource<DynamicType = ()> + Serialize,
        K: Cached,
    {
        let name = object.meta().name.clone().unwrap_or_default();
        let body = serde_json::to_string(&full(object)?).map_err(Error::Encode)?;
        let body = canonical::escaped(&body).into_bytes();
        let attempt = format!("create {kind}");
        let url = K::url_path(&(), Some(self.namespace));
        let request = Request::new(url)
            .create(&post(), body)
            .map_err(|source| Error::Request(attempt.clone(), source))?;
        let result = self.context.client.request::<K>(request).await;
        if let Err(kube::Error::Api(status)) = &result
            && status.is_already_exists()
        {
            return Ok(());
        }
        if let Some(written) = self.settle(result, &attempt, &name)? {
            store.wrote(&written);
        }
        Ok(())
    }

    /// Deletes the very object that was observed, and no later one of the same name.
    async fn delete<K: Cached>(
        &mut self,
        kind: &str,
        deletion: &Deletion,
        store: &Store<K>,
    ) -> Result<(), Error> {
        let mut params = DeleteParams::background().preconditions(Preconditions {
            uid: Some(deletion.uid.clone()),
            resource_version: None,
        });
        params.grace_period_seconds = deletion.grace;
        match self.api::<K>().delete(&deletion.name, &params).await {
            Ok(answer) => {
                self.applied.writes += 1;
                if let Some(object) = answer.left() {
                    let meta = object.meta();
                    // With a grace the kubelet has yet to end it, and a finalizer keeps it.
                    let has_grace = meta
                        .deletion_grace_period_seconds
                        .is_some_and(|time| time > 0);
                    let is_kept = meta.finalizers.as_ref().is_some_and(|all| !all.is_empty());
                    if has_grace || is_kept {
                        store.wrote(&object);
                    } else {
                        store.removed(&object);
                    }
                }
                Ok(())
            }
            // Gone already, or a younger object has the name: both are what was wanted.
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
                Ok(())
            }
            Err(source) => {
                let attempt = format!("delete {kind} {}", deletion.name);
                Err(Error::api("apply", attempt, source))
            }
        }
    }

    /// Sends clients to a pod, or not any more.
    async fn hook(&mut self, hook: &Hook) -> Result<(), Error> {
        let value = if hook.on {
            json!(labels::TRUE)
        } else {
            Value::Null
        };
        let patch = json!({"metadata": {
            "uid": hook.uid,
            "labels": {labels::SERVING: value},
        }});
        let attempt = if hook.on {
            "send clients to pod"
        } else {
            "send clients away from pod"
        };
        if let Some(written) = self.patch_pod(&hook.pod, &patch, attempt).await? {
            self.context.cluster.pods.wrote(&read(&written)?);
        }
        Ok(())
    }

    /// Chooses nodes for the pods of a group, all of them, and lets the scheduler look.
    async fn place(
        &mut self,
        plan: &Plan,
        group: &GroupPlan,
        placing: &Placing,
        now: Timestamp,
    ) -> Result<(), Error> {
        let Some(template) = plan.templates.of(&placing.revision) else {
            return Ok(());
        };
        let context = self.context;
        let capacity = &context.cluster.capacity;
        let index = u32::try_from(group.status.index).unwrap_or_default();
        let need = Need::of(&template.deployment, placing.avoid.clone());
        let uids = placing.pods.iter().map(|pod| pod.uid.clone()).collect();
        let chosen = capacity.reserve(uids, &need.each, |nodes| placement::place(&need, nodes));
        match chosen {
            None => Ok(()),
            // Taken until the pods say so themselves.
            Some(Ok((assignment, _reservation))) => {
                self.open_gates(placing, &assignment, now).await?;
                let first = placing.pods.first().map(|pod| pod.name.clone());
                self.applied.placed.extend(first.map(|name| (index, name)));
                Ok(())
            }
            Some(Err(why)) => {
                self.applied.no_room.insert(index, why.0);
                Ok(())
            }
        }
    }

    async fn open_gates(
        &mut self,
        placing: &Placing,
        assignment: &Assignment<'_>,
        now: Timestamp,
    ) -> Result<(), Error> {
        for (pod, seat) in placing.pods.iter().zip(&assignment.seats) {
            let patch = opening(pod, seat, assignment.pool, now);
            let written = self
                .patch_pod(&pod.name, &patch, "choose a node for pod")
                .await?;
            if let Some(written) = written {
                let cluster = &self.context.cluster;
                cluster.capacity.wrote(&read::<PlacedPod>(&written)?);
                cluster.pods.wrote(&read(&written)?);
            }
        }
        Ok(())
    }

    /// A merge patch of a pod; `None` when the pod is gone or the API server refused.
    async fn patch_pod(
        &mut self,
        name: &str,
        patch: &Value,
        attempt: &str,
    ) -> Result<Option<Value>, Error> {
        let url = WorkerPod::url_path(&(), Some(self.namespace));
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let request = Request::new(url)
            .patch(name, &params, &Patch::Merge(patch))
            .map_err(|source| Error::Request(format!("{attempt} {name}"), source))?;
        match self.context.client.request::<Value>(request).await {
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {
                Ok(None)
            }
            result => self.settle(result, attempt, name),
        }
    }

    /// Creates the Secret with a new token; one that exists keeps its token.
    async fn create_secret(&mut self, planned: &Secret) -> Result<(), Error> {
        let deployment = planned.labels().get(labels::DEPLOYMENT);
        let deployment = deployment.cloned().unwrap_or_default();
        let ranks = names::ranks_service(&deployment);
        let key = (self.namespace.to_owned(), deployment);
        let services = self
            .context
            .cluster
            .services
            .of(&key)
            .map_err(Error::Encode)?;
        let ranks = services.iter().find(|service| service.name_any() == ranks);
        let Some(owner) = ranks.and_then(|service| service.owner_ref(&())) else {
            // It was refused, which status tells; the next round tries both again.
            return Ok(());
        };
        let secret = Secret {
            metadata: ObjectMeta {
                owner_references: Some(vec![owner]),
                ..planned.metadata.clone()
            },
            data: Some(BTreeMap::from([(
                TOKEN_KEY.to_owned(),
                ByteString(token()?),
            )])),
            ..planned.clone()
        };
        let secrets: Api<Secret> = Api::namespaced(self.context.client.clone(), self.namespace);
        match secrets.create(&post(), &secret).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            result => {
                self.settle(result.map(|_| ()), "create Secret", &secret.name_any())?;
            }
        }
        Ok(())
    }

    /// Counts a write, keeps a refusal for status, and passes everything else on.
    fn settle<T>(
        &mut self,
        result: Result<T, kube::Error>,
        attempt: &str,
        name: &str,
    ) -> Result<Option<T>, Error> {
        match result {
            Ok(written) => {
                self.applied.writes += 1;
                Ok(Some(written))
            }
            Err(kube::Error::Api(status)) if status.is_forbidden() || status.is_invalid() => {
                let text = format!(
                    "the API server refused to {attempt} {name}: {}",
                    status.message
                );
                self.applied.refused.push(text);
                Ok(None)
            }
            Err(source) => Err(Error::api("apply", format!("{attempt} {name}"), source)),
        }
    }
}

/// The patch that sends `pod` to `seat` in `pool` and lets the scheduler look at it.
fn opening(pod: &Unplaced, seat: &Seat, pool: Option<&NodePool>, now: Timestamp) -> Value {
    let gates: Vec<_> = pod.gates.iter().map(|gate| json!({"name": gate})).collect();
    let mut patch = json!({
        "metadata": {
            "uid": pod.uid,
            "annotations": {
                labels::ASSIGNED_NODE: seat.node,
                labels::ASSIGNED_AT: now.to_string(),
            },
        },
        "spec": {"schedulingGates": gates},
    });
    let mut selector = BTreeMap::new();
    if let Some(pool) = pool {
        patch["metadata"]["labels"] = json!({labels::POOL: pool.name});
        selector.extend(pool.node_selector.clone());
        // A merge patch replaces the list, and the API server takes only a longer one.
        let mut tolerations = pod.tolerations.clone();
        tolerations.extend(pool.tolerations.iter().cloned());
        if !pool.tolerations.is_empty() {
            patch["spec"]["tolerations"] = json!(tolerations);
        }
    }
    selector.insert(HOSTNAME.to_owned(), seat.hostname.clone());
    patch["spec"]["nodeSelector"] = json!(selector);
    patch
}

fn post() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// `object` with its kind, as the API server wants it.
fn full<P: Resource<DynamicType = ()> + Serialize>(object: &P) -> Result<Value, Error> {
    let mut value = serde_json::to_value(object).map_err(Error::Encode)?;
    value["apiVersion"] = json!(P::api_version(&()));
    value["kind"] = json!(P::kind(&()));
    Ok(value)
}

fn read<K: DeserializeOwned>(value: &Value) -> Result<K, Error> {
    K::deserialize(value).map_err(Error::Encode)
}

/// Whether every field of `planned` has its value in `live`, whatever else that has. A
/// selector must have nothing else: each further label leaves pods out.
fn includes(live: &Value, planned: &Value) -> bool {
    use Value::{Array, Object};
    match (live, planned) {
        (Object(live), Object(planned)) => planned
            .iter()
            .filter(|(key, _)| !matches!(key.as_str(), "apiVersion" | "kind"))
            .all(|(key, value)| match live.get(key) {
                Some(live) if key == "selector" => live == value,
                Some(live) => includes(live, value),
                None => false,
            }),
        (Array(live), Array(planned)) => {
            live.len() == planned.len()
                && live
                    .iter()
                    .zip(planned)
                    .all(|(live, value)| includes(live, value))
        }
        (live, planned) => live == planned,
    }
}

/// Sixty-four hexadecimal digits from the kernel's random numbers.
fn token() -> Result<Vec<u8>, Error> {
    let mut bytes = [0_u8; TOKEN_BYTES];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
    Ok(bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_the_api_server_are_no_difference() {
        let planned = json!({"a": 1, "list": [{"x": 1}]});
        assert!(includes(
            &json!({"a": 1, "b": 2, "list": [{"x": 1, "y": 2}]}),
            &planned
        ));
        assert!(!includes(&json!({"a": 2, "list": [{"x": 1}]}), &planned));
        assert!(!includes(&json!({"a": 1, "list": []}), &planned));
        assert!(!includes(&json!({"list": [{"x": 1}]}), &planned));
    }

    #[test]
    fn a_label_more_in_a_selector_is_a_difference() {
        let planned = json!({"spec": {"selector": {"a": "1"}}});
        assert!(includes(&planned, &planned));
        let more = json!({"spec": {"selector": {"a": "1", "b": "2"}}});
        assert!(!includes(&more, &planned));
    }

    #[test]
    fn tokens_differ() {
        let (one, other) = (token().expect("random"), token().expect("random"));
        assert_eq!(one.len(), 2 * TOKEN_BYTES);
        assert_ne!(one, other);
    }
}
