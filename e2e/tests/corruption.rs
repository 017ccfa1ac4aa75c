//! Weights that changed under way: what answers otherwise than the group before never
//! serves.

mod support;

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use support::small::{NAME, small};
use support::{MODEL_FILE, Place, READY_WITHIN, SAID_WITHIN, condition, make_claim, place};

/// Bytes that are changed, spread over the second half of the file, which is all weights.
const FLIPPED: usize = 1000;

#[tokio::test]
async fn flipped_weights_halt_the_rollout_and_what_serves_goes_on() -> anyhow::Result<()> {
    let Some(place) = place("e2e-flipped").await? else {
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
    let folder = volumes.here.join("e2e-flipped");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join(MODEL_FILE);
    std::fs::copy(&model, &file)?;
    let on_node = volumes.on_node.join("e2e-flipped");
    make_claim(&place, "flipped", &on_node.to_string_lossy()).await?;

    place.apply(small(1, from_claim)).await?;
    let object = place.wait_ready(NAME, 1).await?;
    let first = object["status"]["currentRevision"].clone();
    place
        .wait_for(NAME, "the golden answer on record", SAID_WITHIN, |object| {
            object["status"]["selfTests"][0]["answer"].is_string()
        })
        .await?;

    flip(&file)?;
    a_further_group_is_refused(&place).await?;
    the_rollout_halts(&place, &first).await?;

    // The same bytes again: what was given up goes on by itself.
    flip(&file)?;
    let object = place.wait_ready(NAME, 1).await?;
    ensure!(object["status"]["currentRevision"] != first, "{object}");

    place.remove_namespace().await?;
    place.kubectl(["delete", "pv", "e2e-flipped"]).await?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

fn from_claim(object: &mut Value) {
    object["spec"]["model"]["source"] =
        json!({"pvc": {"claimName": "flipped", "path": MODEL_FILE}});
    // A group that answers wrongly is tried again soon, and for as long as the test takes.
    object["spec"]["failure"] = json!({"groupRestart": {
        "maxRestarts": 15, "initialBackoff": "1s", "maxBackoff": "2s",
    }});
}

/// Flips bits of many bytes. Doing it twice gives the file as it was.
fn flip(file: &Path) -> anyhow::Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(file)?;
    let size = file.metadata()?.len();
    let step = usize::try_from(size / 2)? / FLIPPED;
    for place in (size / 2..size).step_by(step) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place)?;
        byte[0] ^= 0x10;
        file.write_all_at(&byte, place)?;
    }
    Ok(())
}

/// One more group of the same revision, with the weights as they are now.
async fn a_further_group_is_refused(place: &Place) -> anyhow::Result<()> {
    place.apply(small(2, from_claim)).await?;
    let object = place
        .wait_for(NAME, "a wrong answer", READY_WITHIN, |object| {
            object["status"]["groups"][1]["lastFailure"].is_object()
        })
        .await?;
    let failure = &object["status"]["groups"][1]["lastFailure"];
    ensure!(failure["reason"] == "SelfTestMismatch", "{failure}");
    let message = failure["message"].as_str().context("a message")?;
    let answer = object["status"]["selfTests"][0]["answer"]
        .as_str()
        .context("an answer")?;
    ensure!(message.contains(answer), "{message}");
    ensure!(object["status"]["readyReplicas"] == 1, "{object}");
    Ok(())
}

async fn the_rollout_halts(place: &Place, first: &Value) -> anyhow::Result<()> {
    place
        .apply(small(1, |object| {
            from_claim(object);
            object["spec"]["restart"] = json!({"id": "flipped"});
        }))
        .await?;
    let object = place
        .wait_for(NAME, "a halted rollout", READY_WITHIN, |object| {
            condition(object, "Ready").starts_with("False RolloutHalted")
        })
        .await?;
    let failure = &object["status"]["rollout"]["failure"];
    ensure!(failure["reason"] == "SelfTestMismatch", "{failure}");
    let said = condition(&object, "Ready");
    ensure!(said.contains("SelfTestMismatch"), "{said}");
    let available = condition(&object, "Available");
    ensure!(available.starts_with("True"), "{available}");
    ensure!(object["status"]["currentRevision"] == *first, "{object}");

    let forward = place.forward(NAME).await?;
    let answer = forward
        .complete(NAME, "The capital of France is", 4)
        .await?;
    ensure!(answer.contains("Paris"), "{answer:?}");
    Ok(())
}
