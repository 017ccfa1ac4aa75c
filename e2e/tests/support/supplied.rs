//! The real model in a store in the cluster, and a cache on the node.

use anyhow::Context as _;
use llama_e2e::cache::Cache;
use serde_json::{Value, json};

use super::{MODEL_FILE, Place, deployment, make_claim_of, store};

const MODEL_IMAGE: &str = "llama-operator/smollm2-135m-instruct:q4_1";
const WORKER_IMAGE: &str = "llama-operator/worker:dev";

/// The store with the real model in its bucket, copied out of the model's image.
pub(crate) async fn start_store(place: &Place) -> anyhow::Result<()> {
    let copy = "/usr/local/bin/llama-model-copy";
    let from = format!("/models/{MODEL_FILE}");
    let mount = |path: &str, inside: &str| json!({"name": store::DATA, "mountPath": path, "subPath": inside});
    let tools = mount("/tools", "tools");
    let install = store::container(
        "install",
        WORKER_IMAGE,
        &json!([copy, "install", "--to", "/tools"]),
        &json!([tools]),
    );
    let copy = store::container(
        "copy",
        MODEL_IMAGE,
        &json!([
            "/tools/llama-model-copy",
            "copy",
            "--from",
            from,
            "--to",
            "/bucket"
        ]),
        &json!([tools, mount("/bucket", store::BUCKET)]),
    );
    let data = json!({"name": store::DATA, "emptyDir": {}});
    place.apply(store::secret("wrong", "another")).await?;
    store::start(place, &data, &json!([install, copy])).await
}

/// A folder that all nodes share, as a claim that pods may write to.
pub(crate) async fn make_cache(place: &Place) -> anyhow::Result<()> {
    let volumes = place.cluster.volumes.as_ref().context("volumes")?;
    store::empty_cache(&volumes.here.join(store::CACHE))?;
    let folder = volumes.on_node.join(store::CACHE);
    let folder = folder.to_string_lossy();
    make_claim_of(place, store::CACHE, &folder, "ReadWriteMany").await
}

/// The SHA-256 of the real model's file.
pub(crate) async fn digest() -> anyhow::Result<String> {
    let models = Cache::from_environment()?.folder().join("models");
    store::digest(&models.join(MODEL_FILE)).await
}

/// The model in the store, asked for with the key of `secret`, and its cache: fields of a
/// `LlamaModel`'s spec, and of a `LlamaDeployment`'s `model`.
pub(crate) fn from_store(secret: &str, digest: &str, size: &str) -> Value {
    store::model(MODEL_FILE, digest, secret, size)
}

/// One rank with that model.
pub(crate) fn one_rank(name: &str, model: Value) -> Value {
    deployment(name, |object| {
        let spec = &mut object["spec"];
        spec["model"] = model;
        spec["parallelism"] = json!({"tensor": 1});
        spec["resources"] = json!({"accelerator": "Cpu", "cpu": "100m", "memory": "600Mi"});
    })
}

/// What the fetching container of `name`'s first pod said.
pub(crate) async fn fetched(place: &Place, name: &str) -> anyhow::Result<String> {
    let pod = format!("{name}-0-0");
    place
        .kubectl(["logs", &pod, "--container", "fetch-model"])
        .await
}
