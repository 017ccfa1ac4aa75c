//! A `LlamaModel` brings a model to the node before any worker needs it.

mod support;

use anyhow::{Context as _, ensure};
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use support::store::STORE;
use support::supplied::{digest, fetched, from_store, make_cache, one_rank, start_store};
use support::{MODEL_FILE, Place, READY_WITHIN, condition, place};

fn model(name: &str, digest: &str) -> Value {
    json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaModel",
        "metadata": {"name": name},
        "spec": from_store(STORE, digest, "300Mi"),
    })
}

/// Waits until the `LlamaModel` `name` is as `look` wants it, and returns it.
async fn wait_model(
    place: &Place,
    name: &str,
    what: &str,
    look: impl Fn(&Value) -> bool,
) -> anyhow::Result<Value> {
    let found = place
        .cluster
        .wait_for(&place.namespace, what, READY_WITHIN, async || {
            match place.get(["lm", name]).await {
                Ok(object) if look(&object) => Look::Done(object),
                Ok(object) => Look::NotYet(object["status"].to_string()),
                Err(error) => Look::NotYet(error.to_string()),
            }
        })
        .await?;
    Ok(found)
}

/// Names of the pods that fetch for the `LlamaModel` `name`.
async fn pods_of(place: &Place, name: &str) -> anyhow::Result<String> {
    let selector = format!("llmops.dev/model={name}");
    place
        .kubectl(["get", "pods", "--selector", &selector, "--output", "name"])
        .await
}

#[tokio::test]
async fn a_worker_finds_what_was_fetched_ahead() -> anyhow::Result<()> {
    let Some(place) = place("e2e-ahead").await? else {
        return Ok(());
    };
    start_store(&place).await?;
    make_cache(&place).await?;
    let digest = digest().await?;
    place.apply(model("ahead", &digest)).await?;
    let ready = wait_model(&place, "ahead", "a copy on each node", |object| {
        condition(object, "Ready").starts_with("True Fetched")
    })
    .await?;
    let nodes = place.get(["nodes"]).await?;
    let nodes = nodes["items"].as_array().context("nodes")?.len();
    let status = &ready["status"];
    ensure!(status["readyCopies"] == json!(nodes), "{status}");
    ensure!(status["desiredCopies"] == json!(nodes), "{status}");
    let what = "pods that are done go";
    place
        .cluster
        .wait_for(
            &place.namespace,
            what,
            READY_WITHIN,
            async || match pods_of(&place, "ahead").await {
                Ok(pods) if pods.is_empty() => Look::Done(()),
                Ok(pods) => Look::NotYet(pods),
                Err(error) => Look::NotYet(error.to_string()),
            },
        )
        .await?;

    // Other bytes than the digest says: told by name, and the pod stays for its log.
    place.apply(model("damaged", &"0".repeat(64))).await?;
    let damaged = wait_model(&place, "damaged", "a failure", |object| {
        let nodes = object["status"]["nodes"].as_array();
        nodes.is_some_and(|nodes| {
            let failed = |node: &Value| node["phase"] == "Failed";
            !nodes.is_empty() && nodes.iter().all(failed)
        })
    })
    .await?;
    let told = condition(&damaged, "Ready");
    for word in ["False DigestMismatch", MODEL_FILE, digest.as_str()] {
        ensure!(told.contains(word), "{word} is not in {told}");
    }
    let entry = &damaged["status"]["nodes"][0];
    ensure!(entry["reason"] == "DigestMismatch", "{entry}");
    ensure!(entry["stopped"] == true, "{entry}");
    ensure!(!pods_of(&place, "damaged").await?.is_empty());
    place.kubectl(["delete", "lm", "damaged"]).await?;

    // Nothing can be fetched any more, and nothing has to be.
    place.kubectl(["delete", "pod", STORE]).await?;
    let mut worker = one_rank("worker", from_store(STORE, &digest, "300Mi"));
    worker["spec"]["planPolicy"] = json!("Disabled");
    place.apply(worker).await?;
    place.wait_ready("worker", 1).await?;
    let text = fetched(&place, "worker").await?;
    ensure!(text.contains("the cache has the model"), "{text}");
    wait_model(&place, "ahead", "its user", |object| {
        object["status"]["usedBy"] == json!(["worker"])
    })
    .await?;
    place.kubectl(["delete", "lm", "ahead"]).await?;
    let forward = place.forward("worker").await?;
    let answer = forward
        .complete("worker", "The capital of France is", 4)
        .await?;
    ensure!(answer.contains("Paris"), "{answer:?}");
    place.remove_namespace().await
}
