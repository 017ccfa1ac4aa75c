//! Models from an S3-compatible store in the cluster: fetched once, checked, and shared by
//! all pods that use the same cache.

mod support;

use anyhow::ensure;
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use support::store::STORE;
use support::supplied::{self, digest, fetched, make_cache, start_store};
use support::{MODEL_FILE, Place, SAID_WITHIN, condition, place};

/// One rank with the model from the store, asked for with the key of `secret`.
fn from_store(name: &str, secret: &str, digest: &str, size: &str) -> Value {
    supplied::one_rank(name, supplied::from_store(secret, digest, size))
}

/// Waits until the operator says all of `words` about `name`.
async fn said(place: &Place, name: &str, kind: &str, words: &[&str]) -> anyhow::Result<()> {
    let what = format!("{words:?} of {name}");
    place
        .wait_for(name, &what, SAID_WITHIN, |object| {
            let text = condition(object, kind);
            words.iter().all(|word| text.contains(word))
        })
        .await?;
    place.kubectl(["delete", "ld", name]).await?;
    Ok(())
}

#[tokio::test]
async fn three_deployments_fetch_a_model_once() -> anyhow::Result<()> {
    let Some(place) = place("e2e-supply").await? else {
        return Ok(());
    };
    start_store(&place).await?;
    make_cache(&place).await?;
    let digest = digest().await?;
    let names = ["a", "b", "c"];
    for name in names {
        place
            .apply(from_store(name, STORE, &digest, "200Mi"))
            .await?;
    }
    let mut fetches = 0;
    for name in names {
        place.wait_ready(name, 1).await?;
        let text = fetched(&place, name).await?;
        fetches += i32::from(!text.contains("the cache has the model"));
    }
    ensure!(fetches == 1, "{fetches} pods fetched the model");
    let forward = place.forward("c").await?;
    let answer = forward.complete("c", "The capital of France is", 4).await?;
    ensure!(answer.contains("Paris"), "{answer:?}");

    // While the model is in use nothing takes its place.
    let other = "0".repeat(64);
    place
        .apply(from_store("greater", STORE, &other, "100Mi"))
        .await?;
    let words = ["InsufficientStorage", "the cache may hold 100.0 MiB"];
    said(&place, "greater", "Ready", &words).await?;
    // With room it is fetched, and is not what the digest says.
    place
        .apply(from_store("damaged", STORE, &other, "300Mi"))
        .await?;
    let words = ["DigestMismatch", MODEL_FILE, digest.as_str()];
    said(&place, "damaged", "ModelReady", &words).await?;
    place
        .apply(from_store("refused", "wrong", &digest, "200Mi"))
        .await?;
    let words = ["SourceUnauthorized", "403", "Secret"];
    said(&place, "refused", "Ready", &words).await?;
    place
        .apply(from_store("keyless", "none", &digest, "200Mi"))
        .await?;
    said(&place, "keyless", "Ready", &["\"none\" not found"]).await?;
    for name in names {
        place
            .kubectl(["delete", "ld", name, "--wait=false"])
            .await?;
    }
    place
        .cluster
        .wait_for("e2e-supply", "no worker", SAID_WITHIN, async || match place
            .get(["pods", "--selector", "llmops.dev/group"])
            .await
        {
            Ok(pods) if pods["items"] == json!([]) => Look::Done(()),
            Ok(pods) => Look::NotYet(pods["items"][0]["metadata"]["name"].to_string()),
            Err(error) => Look::NotYet(error.to_string()),
        })
        .await?;
    place.remove_namespace().await
}
