//! `LlamaModels`: what the schema refuses, and what rounds write.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::error_boundary::DeserializeGuard;
use kube::runtime::watcher::Event;
use llama_crds::v1alpha1::{LlamaModel, LlamaModelStatus, ModelNodePhase};
use llama_operator::models::{reconcile, status};
use llama_operator::names;
use serde_json::{Value, json};

use super::{NAMESPACE, Place};

fn spec() -> Value {
    json!({
        "source": {"http": {
            "url": "https://models.example/a",
            "files": [{"name": "m.gguf", "sha256": "0".repeat(64)}],
        }},
        "cache": {"claimName": "ahead", "size": "1Gi"},
    })
}

async fn create(place: &Place, name: &str, spec: &Value) -> Result<LlamaModel, kube::Error> {
    let resource = ApiResource::erase::<LlamaModel>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(place.client.clone(), NAMESPACE, &resource);
    let object = json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaModel",
        "metadata": {"name": name},
        "spec": spec,
    });
    let object: DynamicObject = serde_json::from_value(object).expect("an object");
    let created = api.create(&PostParams::default(), &object).await?;
    Ok(created.try_parse().expect("what was accepted can be read"))
}

pub(super) async fn bad_models_are_refused(place: &Place) -> anyhow::Result<()> {
    let claim = json!({"pvc": {"claimName": "c", "path": "m.gguf"}});
    let image = json!({"image": {"reference": "models:1", "path": "/m.gguf"}});
    let listed = json!({"s3": {"uri": "s3://models/a"}});
    let mut two = spec()["source"].clone();
    two["pvc"] = claim["pvc"].clone();
    let known = "whose bytes are known beforehand";
    for (field, value, words) in [
        ("/source", claim, known),
        ("/source", image, known),
        ("/source", listed, known),
        ("/source", two, "exactly one of"),
        ("/source", Value::Null, "source"),
        ("/cache", Value::Null, "cache"),
        ("/cache/size", json!("1k"), "at least 1Mi"),
        ("/copies", json!("Many"), "copies"),
        ("/maxConcurrentFetches", json!(0), "maxConcurrentFetches"),
        ("/maxConcurrentFetches", json!(65), "maxConcurrentFetches"),
        ("/recheckEvery", json!("1s"), "recheckEvery must be"),
        ("/recheckEvery", json!("721h"), "recheckEvery must be"),
        ("/recheckEvery", json!("daily"), "recheckEvery"),
        (
            "/nodes",
            json!({"tolerations": [{"operator": "Is"}]}),
            "operator",
        ),
    ] {
        let mut spec = spec();
        let (parent, last) = field.rsplit_once('/').context("a pointer")?;
        let parent = spec.pointer_mut(parent).and_then(Value::as_object_mut);
        let parent = parent.with_context(|| format!("{field} has no parent"))?;
        match value {
            Value::Null => parent.remove(last),
            value => parent.insert(last.to_owned(), value),
        };
        let error = create(place, "bad", &spec).await.err();
        let error = error
            .with_context(|| format!("{field} was accepted"))?
            .to_string();
        ensure!(error.contains(words), "{field}: {error}");
    }
    let long = create(place, &"a".repeat(64), &spec()).await.err();
    let error = long.context("a long name was accepted")?.to_string();
    ensure!(error.contains("at most 63 characters"), "{error}");
    Ok(())
}

/// One round, as the controller would call it, once the caches know what the test did.
async fn round(place: &Place, name: &str) -> anyhow::Result<LlamaModelStatus> {
    let key = (NAMESPACE.to_owned(), name.to_owned());
    let selector = format!("llmops.dev/model={name}");
    let selector = kube::api::ListParams::default().labels(&selector);
    place
        .until("the caches catch up", async || {
            let pods = place.api::<Pod>().list(&selector).await?;
            let fetchers = &place.context.cluster.fetchers;
            let known = fetchers.of(&key)?;
            Ok(
                fetchers.is_synced()
                    && super::versions_of(&pods.items) == super::versions_of(known),
            )
        })
        .await?;
    let models = place.api::<LlamaModel>();
    let object = models.get(name).await?;
    let object = Arc::new(DeserializeGuard(Ok(object)));
    reconcile(object, Arc::clone(&place.context)).await?;
    models.get(name).await?.status.context("a status")
}

fn ready(status: &LlamaModelStatus) -> String {
    let ready = status::ready(status).expect("the condition is set");
    format!("{}/{}: {}", ready.status, ready.reason, ready.message)
}

pub(super) async fn claim(place: &Place) -> anyhow::Result<()> {
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "ahead"},
        "spec": {
            "accessModes": ["ReadWriteMany"], "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }))?;
    place.api().create(&PostParams::default(), &claim).await?;
    Ok(())
}

pub(super) async fn a_model_is_fetched_ahead(place: &Place) -> anyhow::Result<()> {
    create(place, "ahead", &spec()).await?;
    for name in ["node-a", "node-b"] {
        let node = json!({
            "metadata": {"name": name},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        let node = serde_json::from_value(node)?;
        place
            .context
            .cluster
            .capacity
            .take_node(Event::InitApply(node));
    }
    place.context.cluster.capacity.take_node(Event::InitDone);
    let told = ready(&round(place, "ahead").await?);
    ensure!(
        told.contains("False/PersistentVolumeClaimNotFound"),
        "{told}"
    );
    claim(place).await?;
    let status = round(place, "ahead").await?;
    let told = ready(&status);
    // It has no volume, which a pod may be what it waits for.
    ensure!(told.contains("PersistentVolumeClaimPending"), "{told}");
    let (first, second) = (
        names::fetch("ahead", "node-a"),
        names::fetch("ahead", "node-b"),
    );
    let pods = place.api::<Pod>();
    let made = pods.get(&first).await?;
    ensure!(pods.get_opt(&second).await?.is_some());
    ensure!(made.owner_references().len() == 1, "{:?}", made.metadata);
    for name in [&first, &second] {
        place
            .set_pod_status(name, json!({"phase": "Succeeded"}))
            .await?;
    }
    let status = round(place, "ahead").await?;
    ensure!(
        (status.desired_copies, status.ready_copies) == (2, 2),
        "{status:?}"
    );
    ensure!(
        ready(&status) == "True/Fetched: 2 of 2 nodes hold it",
        "{}",
        ready(&status)
    );
    round(place, "ahead").await?;
    place.end_deleted_pods().await?;
    place
        .until("the pods are gone", async || {
            Ok(pods.get_opt(&first).await?.is_none() && pods.get_opt(&second).await?.is_none())
        })
        .await?;
    let before = place
        .api::<LlamaModel>()
        .get("ahead")
        .await?
        .resource_version();
    let status = round(place, "ahead").await?;
    let after = place
        .api::<LlamaModel>()
        .get("ahead")
        .await?
        .resource_version();
    ensure!(before == after, "nothing has changed");
    let phases: Vec<_> = status.nodes.iter().map(|node| node.phase).collect();
    ensure!(phases == [ModelNodePhase::Ready; 2], "{phases:?}");
    let delete = DeleteParams::default();
    place.api::<LlamaModel>().delete("ahead", &delete).await?;
    Ok(())
}

/// The whole program sees a node appear, and fetches to it; the garbage collector removes
/// what is left of a model that is deleted.
pub(super) async fn the_program_fetches_to_a_new_node(place: &Place) -> anyhow::Result<()> {
    create(place, "p", &spec()).await?;
    let models = place.api::<LlamaModel>();
    let told = async || -> anyhow::Result<String> {
        let status = models.get("p").await?.status.unwrap_or_default();
        Ok(status::ready(&status).map_or_else(String::new, |_| ready(&status)))
    };
    place
        .until("no node", async || Ok(told().await?.contains("NoNodes")))
        .await?;
    let nodes: Api<Node> = Api::all(place.client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": "new"}}))?;
    nodes.create(&PostParams::default(), &node).await?;
    let patch = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let params = PatchParams::default();
    nodes
        .patch_status("new", &params, &Patch::Merge(patch))
        .await?;
    let taints = Patch::Merge(json!({"spec": {"taints": null}}));
    nodes.patch("new", &params, &taints).await?;
    let (name, pods) = (names::fetch("p", "new"), place.api::<Pod>());
    place
        .until("a pod", async || Ok(pods.get_opt(&name).await?.is_some()))
        .await?;
    models.delete("p", &DeleteParams::default()).await?;
    place
        .until("everything is gone", async || {
            place.end_deleted_pods().await?;
            Ok(pods.get_opt(&name).await?.is_none())
        })
        .await
}
