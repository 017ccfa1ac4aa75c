//! What cannot work is said by name, and nothing crash-loops.

mod support;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use support::{MODEL_FILE, Place, SAID_WITHIN, condition, deployment, make_claim, place};

/// How long a refused group is watched for restarts.
const QUIET_FOR: Duration = Duration::from_secs(12);

/// What a case changes in a good LlamaDeployment.
type Change = fn(&mut Value);

#[tokio::test]
async fn the_api_server_refuses_what_the_schema_can_tell() -> anyhow::Result<()> {
    let Some(place) = place("e2e-schema").await? else {
        return Ok(());
    };
    let cases: [(&str, Change, &str); 6] = [
        (
            "two sources",
            |object| {
                object["spec"]["model"]["source"]["pvc"] =
                    json!({"claimName": "c", "path": "m.gguf"});
            },
            "exactly one",
        ),
        (
            "no source",
            |object| {
                object["spec"]["model"]["source"] = json!({});
            },
            "exactly one",
        ),
        (
            "ranks that do not divide",
            |object| {
                object["spec"]["parallelism"] = json!({"tensor": 3, "nodes": 2});
            },
            "nodes",
        ),
        (
            "no memory",
            |object| {
                object["spec"]["resources"]["memory"] = json!("0");
            },
            "memory",
        ),
        (
            "a GPU on CPU",
            |object| {
                object["spec"]["resources"]["gpu"] = json!({"resourceName": "nvidia.com/gpu"});
            },
            "gpu",
        ),
        (
            "no accelerator",
            |object| {
                object["spec"]["resources"]["accelerator"] = json!("Tpu");
            },
            "accelerator",
        ),
    ];
    for (what, change, word) in cases {
        let refused = place.apply(deployment("refused", change)).await;
        let error = refused
            .err()
            .with_context(|| format!("{what} was accepted"))?;
        ensure!(format!("{error:#}").contains(word), "{what}: {error:#}");
    }
    place.remove_namespace().await
}

#[tokio::test]
async fn the_operator_says_what_the_schema_cannot_tell() -> anyhow::Result<()> {
    let Some(place) = place("e2e-refusals").await? else {
        return Ok(());
    };
    let cases: [(&str, Change, &str, &[&str]); 5] = [
        (
            "layout",
            |object| {
                object["spec"]["parallelism"]["tensor"] = json!(2);
            },
            "InvalidLayout",
            &["2", "9"],
        ),
        (
            "missing-file",
            |object| {
                object["spec"]["model"]["source"]["image"]["path"] = json!("/models/none.gguf");
            },
            "ModelNotFound",
            &["/models/none.gguf", MODEL_FILE],
        ),
        (
            "little-memory",
            |object| {
                object["spec"]["resources"]["memory"] = json!("160Mi");
            },
            "NotFit",
            &["memory is 160Mi"],
        ),
        (
            "missing-image",
            |object| {
                object["spec"]["model"]["source"]["image"]["reference"] =
                    json!("llama-operator/none:0");
            },
            "",
            &["llama-operator/none:0"],
        ),
        (
            "missing-claim",
            |object| {
                object["spec"]["model"]["source"] =
                    json!({"pvc": {"claimName": "nowhere", "path": "m.gguf"}});
            },
            "",
            &["nowhere"],
        ),
    ];
    for (name, change, _, _) in &cases {
        place.apply(deployment(name, change)).await?;
    }
    for (name, _, reason, words) in cases {
        place
            .wait_for(
                name,
                &format!("the reason of {name}"),
                SAID_WITHIN,
                |object| {
                    let said = condition(object, "Ready");
                    said.starts_with("False")
                        && said.contains(reason)
                        && words.iter().all(|word| said.contains(word))
                },
            )
            .await?;
    }
    nothing_restarts(&place).await?;
    place.remove_namespace().await
}

#[tokio::test]
async fn a_model_cut_short_is_named_from_a_volume() -> anyhow::Result<()> {
    let Some(place) = place("e2e-volume").await? else {
        return Ok(());
    };
    let Some(volumes) = place.cluster.volumes.clone() else {
        eprintln!("skipped: this cluster shares no folder with its node");
        return Ok(());
    };
    let Ok(model) = std::env::var("LLAMA_TEST_MODEL") else {
        eprintln!("skipped: LLAMA_TEST_MODEL names no model");
        return Ok(());
    };
    let folder = volumes.here.join("e2e-volume");
    std::fs::create_dir_all(&folder)?;
    std::fs::copy(&model, folder.join("whole.gguf"))?;
    let half = std::fs::metadata(&model)?.len() / 2;
    std::fs::copy(&model, folder.join("short.gguf"))?;
    std::fs::File::options()
        .write(true)
        .open(folder.join("short.gguf"))?
        .set_len(half)?;

    make_claim(
        &place,
        "models",
        &volumes.on_node.join("e2e-volume").to_string_lossy(),
    )
    .await?;
    let from_claim = |path: &'static str| {
        move |object: &mut Value| {
            object["spec"]["model"]["source"] =
                json!({"pvc": {"claimName": "models", "path": path}});
        }
    };
    place
        .apply(deployment("short", from_claim("short.gguf")))
        .await?;
    place
        .wait_for(
            "short",
            "the reason of a short file",
            SAID_WITHIN,
            |object| {
                let said = condition(object, "Ready");
                said.contains("ModelTruncated") && said.contains("short.gguf")
            },
        )
        .await?;
    nothing_restarts(&place).await?;
    place.kubectl(["delete", "ld", "short"]).await?;

    place
        .apply(deployment("whole", from_claim("whole.gguf")))
        .await?;
    place.wait_ready("whole", 1).await?;
    place.remove_namespace().await?;
    place.kubectl(["delete", "pv", "e2e-models"]).await?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

/// Watches for a while that no pod is replaced and no container restarts.
async fn nothing_restarts(place: &Place) -> anyhow::Result<()> {
    let uids = async || -> anyhow::Result<Vec<String>> {
        let pods = place.get(["pods"]).await?;
        let items = pods["items"].as_array().context("pods")?.clone();
        for pod in &items {
            for container in pod["status"]["containerStatuses"]
                .as_array()
                .into_iter()
                .flatten()
            {
                ensure!(container["restartCount"] == 0, "{container}");
            }
        }
        Ok(items
            .iter()
            .map(|pod| pod["metadata"]["uid"].to_string())
            .collect())
    };
    let before = uids().await?;
    tokio::time::sleep(QUIET_FOR).await;
    let after = uids().await?;
    // One that has inspected a model may go.
    ensure!(
        after.iter().all(|uid| before.contains(uid)),
        "pods were replaced: {before:?} became {after:?}"
    );
    Ok(())
}
