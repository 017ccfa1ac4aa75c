//! What does not fit is refused before any pod of it exists, and what is told instead
//! serves.

mod support;

use std::time::Instant;

use anyhow::{Context as _, ensure};
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use support::{Place, SAID_WITHIN, condition, deployment, place};

async fn worker_pods(place: &Place, name: &str) -> anyhow::Result<Vec<Value>> {
    let selector = format!("llmops.dev/deployment={name},llmops.dev/group");
    let pods = place.get(["pods", "--selector", &selector]).await?;
    Ok(pods["items"].as_array().context("pods")?.clone())
}

/// Applies the LlamaDeployment `m` with too little memory; gives it as it was refused.
async fn refuse(place: &Place) -> anyhow::Result<Value> {
    let little = |object: &mut Value| {
        object["spec"]["resources"]["memory"] = json!("160Mi");
        object["spec"]["context"] = json!({"maxTokens": 8192});
    };
    let begun = Instant::now();
    place.apply(deployment("m", little)).await?;
    let refused = place
        .wait_for("m", "the refusal", SAID_WITHIN, |object| {
            condition(object, "Planned").starts_with("False NotFit")
        })
        .await?;
    // On a machine that does nothing else it is about four seconds, one for each container
    // of the inspection.
    eprintln!("refused {} ms after apply", begun.elapsed().as_millis());
    Ok(refused)
}

#[tokio::test]
async fn too_little_memory_is_refused_and_the_alternative_serves() -> anyhow::Result<()> {
    let Some(place) = place("e2e-fit").await? else {
        return Ok(());
    };
    let refused = refuse(&place).await?;
    for kind in ["Ready", "Stalled", "Planned"] {
        let said = condition(&refused, kind);
        for words in [
            "NotFit",
            "8192 tokens",
            "spec.resources.memory is 160Mi",
            "at least ",
        ] {
            ensure!(said.contains(words), "{kind}: {said}");
        }
    }
    ensure!(worker_pods(&place, "m").await?.is_empty());
    let plan = &refused["status"]["plan"];
    ensure!(
        plan["fits"] == false && plan["model"]["layers"] == 30,
        "{plan}"
    );
    ensure!(plan["perPod"]["kvCacheBytes"] == 8192 * 23_040, "{plan}");

    // The plan stays where the operator starts anew, and no pod comes.
    let inputs = plan["inputs"].clone();
    let deployments = ["deployment/llama-operator", "--namespace=llama-system"];
    place
        .kubectl(["rollout", "restart", deployments[0], deployments[1]])
        .await?;
    place
        .kubectl([
            "rollout",
            "status",
            deployments[0],
            deployments[1],
            "--timeout=60s",
        ])
        .await?;
    let selector = "llmops.dev/deployment=m";
    place
        .cluster
        .wait_for("e2e-fit", "no pod", SAID_WITHIN, async || {
            match place.get(["pods", "--selector", selector]).await {
                Ok(pods) if pods["items"] == json!([]) => Look::Done(()),
                Ok(pods) => Look::NotYet(pods["items"][0]["metadata"]["name"].to_string()),
                Err(error) => Look::NotYet(error.to_string()),
            }
        })
        .await?;
    let object = place.get(["ld", "m"]).await?;
    ensure!(object["status"]["plan"] == *plan, "{}", object["status"]);

    let alternative = plan["alternatives"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|alternative| alternative["spec"]["resources"].is_object())
        .context("more memory would do")?;
    let patch = json!({"spec": alternative["spec"]}).to_string();
    place
        .kubectl(["patch", "ld", "m", "--type=merge", "--patch", &patch])
        .await?;
    let ready = place.wait_ready("m", 1).await?;
    let said = condition(&ready, "Planned");
    ensure!(said.starts_with("True Fits"), "{said}");
    ensure!(ready["status"]["plan"]["inputs"] != inputs);
    let forward = place.forward("m").await?;
    let answer = forward.complete("m", "The capital of France is", 4).await?;
    ensure!(answer.contains("Paris"), "{answer:?}");
    let pods = worker_pods(&place, "m").await?;
    ensure!(pods.len() == 1, "{} worker pods", pods.len());
    place.remove_namespace().await
}
