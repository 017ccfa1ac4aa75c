//! A LlamaDeployment that is deleted without its children and created again.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams, PropagationPolicy};
use kube::{Resource, ResourceExt};
use llama_crds::v1alpha1::LlamaDeployment;
use serde::de::DeserializeOwned;

use super::{Place, object};

/// Names of the children of kind `K` of the deployment `name`, each with its UID and that
/// of its owner.
async fn children<K>(
    place: &Place,
    name: &str,
) -> anyhow::Result<BTreeMap<String, (String, Option<String>)>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
    let found = place.api::<K>().list(&selector).await?;
    let described = found.iter().map(|child| {
        let owner = child.owner_references().first();
        let owner = owner.map(|owner| owner.uid.clone());
        let uid = child.uid().unwrap_or_default();
        (
            format!("{} {}", K::kind(&()), child.name_any()),
            (uid, owner),
        )
    });
    Ok(described.collect())
}

async fn all(place: &Place) -> anyhow::Result<BTreeMap<String, (String, Option<String>)>> {
    let mut all = children::<Pod>(place, "m").await?;
    all.extend(children::<Service>(place, "m").await?);
    all.extend(children::<PodDisruptionBudget>(place, "m").await?);
    all.extend(children::<ControllerRevision>(place, "m").await?);
    Ok(all)
}

pub(super) async fn orphans_find_their_owner_again(place: &Place) -> anyhow::Result<()> {
    let api = place.api::<LlamaDeployment>();
    let before = place.get("m").await?;
    let made = all(place).await?;
    ensure!(made.len() >= 7, "{made:?}");
    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    api.delete("m", &orphan).await?;
    place
        .until(
            "the deployment is gone and nothing has an owner",
            async || {
                let left = all(place).await?;
                let is_gone = api.get_opt("m").await?.is_none();
                Ok(is_gone && left.values().all(|(_, owner)| owner.is_none()))
            },
        )
        .await?;
    place.caught_up("m").await?;

    let spec = serde_json::to_value(&before.spec)?;
    let again = place.create(object("m", &spec)).await?;
    let owner = again.uid().context("a UID")?;
    place.round("m").await?;
    let adopted = all(place).await?;
    ensure!(adopted.keys().eq(made.keys()), "{adopted:?}\n{made:?}");
    for (name, (uid, of)) in &adopted {
        ensure!(*uid == made[name].0, "{name} was made anew");
        ensure!(of.as_ref() == Some(&owner), "{name} belongs to {of:?}");
    }
    let status = place.get("m").await?.status.context("a status")?;
    ensure!(status.groups.len() == 2, "{:?}", status.groups);
    Ok(())
}
