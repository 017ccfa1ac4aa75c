//! Children that nobody owns, as a deletion with `--cascade=orphan` leaves them: whoever
//! creates the LlamaDeployment again gets them back, and what serves goes on serving.

use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::Error;
use super::observe::Observed;
use super::validate::ValidDeployment;
use crate::cluster::store::Store;
use crate::context::Context;
use crate::labels::{self, FIELD_MANAGER};

/// Whether an object is the operator's own work and belongs to nobody.
pub fn is_orphan(meta: &ObjectMeta) -> bool {
    let labels = meta.labels.as_ref();
    let manager = labels.and_then(|labels| labels.get(labels::MANAGED_BY));
    manager.is_some_and(|manager| manager == FIELD_MANAGER)
        && meta.owner_references.as_ref().is_none_or(Vec::is_empty)
        && meta.deletion_timestamp.is_none()
}

/// Makes `deployment` the owner of every orphan among `observed`. Returns their kinds and
/// names.
///
/// # Errors
/// When the API server cannot be asked. An object that went or got an owner meanwhile is
/// left alone.
pub async fn adopt(
    context: &Context,
    deployment: &ValidDeployment,
    observed: &Observed,
) -> Result<Vec<String>, Error> {
    let cluster = &context.cluster;
    let mut work = Work {
        context,
        deployment,
        adopted: Vec::new(),
    };
    work.take(
        "ControllerRevision",
        &observed.revisions,
        &cluster.revisions,
    )
    .await?;
    work.take("Service", &observed.services, &cluster.services)
        .await?;
    work.take("PodDisruptionBudget", &observed.budgets, &cluster.budgets)
        .await?;
    work.take("Pod", &observed.pods, &cluster.pods).await?;
    Ok(work.adopted)
}

struct Work<'a> {
    context: &'a Context,
    deployment: &'a ValidDeployment,
    adopted: Vec<String>,
}

impl Work<'_> {
    async fn take<K>(
        &mut self,
        kind: &str,
        objects: &[Arc<K>],
        store: &Store<K>,
    ) -> Result<(), Error>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + Serialize
            + DeserializeOwned,
    {
        let namespace = &self.deployment.namespace;
        let api: Api<K> = Api::namespaced(self.context.client.clone(), namespace);
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        for meta in objects.iter().map(|object| object.meta()) {
            let (Some(name), Some(uid)) = (&meta.name, &meta.uid) else {
                continue;
            };
            if !is_orphan(meta) {
                continue;
            }
            // With the versions of what was seen: one that got an owner meanwhile is kept.
            let patch = json!({"metadata": {
                "uid": uid,
                "resourceVersion": meta.resource_version,
                "ownerReferences": [self.deployment.owner],
            }});
            match api.patch(name, &params, &Patch::Merge(&patch)).await {
                Ok(written) => {
                    store.wrote(&written);
                    self.adopted.push(format!("{kind} {name}"));
                }
                Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => {}
                Err(source) => {
                    let attempt = format!("adopt {kind} {name}");
                    return Err(Error::api("adopt", attempt, source));
                }
            }
        }
        Ok(())
    }
}
