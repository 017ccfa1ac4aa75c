//! Adapters that come and go while groups serve, without a new pod.

mod support;

use std::path::Path;

use anyhow::ensure;
use serde_json::{Value, json};
use support::small::{NAME, small};
use support::{SAID_WITHIN, make_claim, place};

/// The shape of `SmolLM2`.
const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const RANK: usize = 4;
const PROMPT: &str = "The capital of France is a city";
const TOKENS: usize = 8;

/// Writes an adapter of the query projections with numbers that `seed` decides.
fn write_adapter(folder: &Path, seed: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let high = u16::try_from(state >> 48).unwrap_or_default();
        0.2 * (f32::from(high) / 32_768.0 - 1.0)
    };
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for layer in 0..LAYERS {
        for (half, shape) in [("A", [RANK, HIDDEN]), ("B", [HIDDEN, RANK])] {
            let start = data.len();
            for _ in 0..shape[0] * shape[1] {
                data.extend(noise().to_le_bytes());
            }
            header.insert(
                format!(
                    "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight"
                ),
                json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
            );
        }
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(folder.join("adapter_model.safetensors"), bytes)?;
    let settings = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK});
    std::fs::write(folder.join("adapter_config.json"), settings.to_string())?;
    Ok(())
}

/// Two groups with room for two adapters, and these of them.
fn with(loaded: &Value) -> Value {
    small(2, |object| {
        object["spec"]["adapters"] = json!({
            "claimName": "loras", "places": 2, "maxRank": RANK, "loaded": loaded,
        });
        object["spec"]["planPolicy"] = json!("Enforce");
    })
}

#[tokio::test]
async fn adapters_come_and_go_without_a_new_pod() -> anyhow::Result<()> {
    let Some(place) = place("e2e-adapters").await? else {
        return Ok(());
    };
    let Some(volumes) = place.cluster.volumes.clone() else {
        eprintln!("skipped: this cluster shares no folder with its node");
        return Ok(());
    };
    let folder = volumes.here.join("e2e-adapters");
    for (seed, name) in (1..).zip(["first", "second"]) {
        write_adapter(&folder.join(name), seed)?;
    }
    let on_node = volumes.on_node.join("e2e-adapters");
    make_claim(&place, "loras", &on_node.to_string_lossy()).await?;

    place
        .apply(with(&json!([{"name": "legal", "path": "first"}])))
        .await?;
    let object = place.wait_ready(NAME, 2).await?;
    ensure!(
        object["status"]["plan"]["perRank"]["adapterBytes"] != 0,
        "{object}"
    );
    let served = |object: &Value, adapters: &Value| {
        let told = object["status"]["adapters"].as_array();
        let told = told
            .into_iter()
            .flatten()
            .map(|told| json!([told["name"], told["groups"]]));
        Value::Array(told.collect()) == *adapters
    };
    let on_record = async |adapters: Value| {
        let what = format!("{adapters} on record");
        place
            .wait_for(NAME, &what, SAID_WITHIN, |object| served(object, &adapters))
            .await
    };
    on_record(json!([["legal", 2]])).await?;
    let pods = place.kubectl(["get", "pods", "-o", "name"]).await?;

    let forward = place.forward(NAME).await?;
    let plain = forward.complete(NAME, PROMPT, TOKENS).await?;
    let first = forward.complete("legal", PROMPT, TOKENS).await?;
    ensure!(first != plain, "the adapter changes nothing: {plain:?}");

    let both = json!([{"name": "legal", "path": "second"}, {"name": "old", "path": "first"}]);
    place.apply(with(&both)).await?;
    on_record(json!([["legal", 2], ["old", 2]])).await?;
    ensure!(forward.complete("old", PROMPT, TOKENS).await? == first);
    ensure!(forward.complete("legal", PROMPT, TOKENS).await? != first);

    // One at fault is named, and ends nothing.
    let wrong = json!([{"name": "legal", "path": "second"}, {"name": "lost", "path": "nowhere"}]);
    place.apply(with(&wrong)).await?;
    place
        .wait_for(NAME, "what is wrong with it", SAID_WITHIN, |object| {
            let message = object["status"]["adapters"][1]["message"].as_str();
            message.is_some_and(|message| message.contains("nowhere"))
        })
        .await?;
    on_record(json!([["legal", 2], ["lost", 0]])).await?;

    place.apply(with(&json!([]))).await?;
    on_record(json!([])).await?;
    ensure!(forward.complete("legal", PROMPT, TOKENS).await.is_err());
    ensure!(forward.complete(NAME, PROMPT, TOKENS).await? == plain);
    ensure!(place.kubectl(["get", "pods", "-o", "name"]).await? == pods);
    place.remove_namespace().await?;
    place.kubectl(["delete", "pv", "e2e-loras"]).await?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
