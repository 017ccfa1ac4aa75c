//! What the schema refuses and what it fills in.

use std::path::Path;

use anyhow::{Context as _, ensure};
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, PostParams};
use llama_crds::v1alpha1::{LlamaDeployment, LlamaModel};
use serde_json::{Value, json};

use super::{NAMESPACE, Place, object, spec};

/// Tries to create `spec` with `value` at the pointer `field` (`null` takes the field
/// away); the API server must refuse it in `words`.
async fn refused_with(
    place: &Place,
    mut spec: Value,
    field: &str,
    value: Value,
    words: &str,
) -> anyhow::Result<()> {
    let (parent, last) = field.rsplit_once('/').context("a pointer")?;
    let parent = spec.pointer_mut(parent);
    let parent = parent.and_then(Value::as_object_mut);
    let parent = parent.with_context(|| format!("{field} has no parent"))?;
    match value {
        Value::Null => parent.remove(last),
        value => parent.insert(last.to_owned(), value),
    };
    let error = place.create(object("bad", &spec)).await.err();
    let error = error
        .with_context(|| format!("{field} was accepted"))?
        .to_string();
    ensure!(error.contains(words), "{field}: {error}");
    Ok(())
}

#[expect(clippy::too_many_lines, reason = "a table of cases")]
pub(super) async fn bad_specs_are_refused(place: &Place) -> anyhow::Result<()> {
    let both = json!({"claimName": "c", "path": "m.gguf"});
    let cases = [
        (
            "/model/source/pvc",
            both,
            "exactly one of pvc, image, http, s3 and huggingFace",
        ),
        (
            "/failure",
            json!({"hangTimeout": "4s"}),
            "hangTimeout must be 5s to 1h",
        ),
        (
            "/preflight",
            json!({"selfTestInterval": "5s"}),
            "selfTestInterval must be 0s or 10s to 24h",
        ),
        (
            "/rollout",
            json!({"rollbackOn": {}}),
            "one of errorRatePercent and latencyRegressionPercent must be set",
        ),
        (
            "/rollout",
            json!({"rollbackOn": {"errorRatePercent": 1, "window": "30s"}}),
            "window must be 1m to 1h",
        ),
        (
            "/context",
            json!({"kvCache": {"dtype": "FP8"}}),
            "spec.context.kvCache.dtype",
        ),
        (
            "/model/source/image",
            Value::Null,
            "exactly one of pvc, image, http, s3 and huggingFace",
        ),
        (
            "/model/source/image/path",
            json!("m.gguf"),
            "must start with '/'",
        ),
        (
            "/model/source/image/path",
            json!("/a/../m.gguf"),
            "'.' or '..' parts",
        ),
        (
            "/model/source/image/pullPolicy",
            json!("Sometimes"),
            "pullPolicy",
        ),
        ("/model/servedName", json!("a b"), "servedName"),
        (
            "/parallelism",
            json!({"tensor": 3, "nodes": 2}),
            "multiple of nodes",
        ),
        (
            "/placement",
            json!({"pools": [{"name": "a"}, {"name": "a"}]}),
            "names of pools must differ",
        ),
        (
            "/placement",
            json!({"nodeSelector": {"z": "1"}, "pools": [{"name": "a", "nodeSelector": {"z": "2"}}]}),
            "no node has both",
        ),
        (
            "/placement",
            json!({"pools": [{"name": "a"}], "queueName": "q"}),
            "at most one of pools and queueName",
        ),
        (
            "/placement",
            json!({"gang": {"provider": "Kueue"}}),
            "gang.provider Kueue needs queueName",
        ),
        (
            "/placement",
            json!({"gang": {"provider": "Builtin"}, "queueName": "q"}),
            "queueName is for gang.provider Auto and Kueue",
        ),
        (
            "/parallelism",
            json!({"tensor": 3, "pipeline": 3, "nodes": 2}),
            "multiple of nodes",
        ),
        (
            "/parallelism",
            json!({"tensor": 64, "pipeline": 5}),
            "at most 256",
        ),
        ("/parallelism", json!({"tensor": 65}), "tensor"),
        ("/parallelism", json!({"pipeline": 0}), "pipeline"),
        ("/replicas", json!(257), "replicas"),
        (
            "/adapters",
            json!({"claimName": "c", "places": 1, "loaded": [
                {"name": "a", "path": "a"}, {"name": "b", "path": "b"},
            ]}),
            "more adapters than there are places",
        ),
        (
            "/adapters",
            json!({"claimName": "c", "loaded": [{"name": "a", "path": "/a"}]}),
            "must not start with '/'",
        ),
        (
            "/adapters",
            json!({"claimName": "c", "loaded": [
                {"name": "a", "path": "a"}, {"name": "a", "path": "b"},
            ]}),
            "Duplicate value",
        ),
        (
            "/adapters",
            json!({"claimName": "c", "places": 65}),
            "places",
        ),
        ("/resources/memory", json!("0"), "at least 32Mi"),
        ("/resources/memory", json!("512m"), "at least 32Mi"),
        ("/resources/memory", json!("-1Gi"), "memory"),
        ("/resources/cpu", json!(0), "more than 0"),
        ("/resources/accelerator", Value::Null, "accelerator"),
        (
            "/resources/gpu",
            json!({}),
            "gpu is only for accelerator Gpu",
        ),
        ("/context", json!({"maxTokens": 0}), "maxTokens"),
        (
            "/context",
            json!({"minConcurrentSequences": 0}),
            "minConcurrentSequences",
        ),
        ("/planPolicy", json!("Ask"), "planPolicy"),
        (
            "/resources",
            json!({"accelerator": "Gpu", "gpu": {"memory": "80"}, "cpu": 1, "memory": "1Gi"}),
            "at least 1Gi",
        ),
    ];
    for (field, value, words) in cases {
        refused_with(place, spec(), field, value, words).await?;
    }
    for name in ["a.b", "1a", &"a".repeat(41)] {
        let error = place.create(object(name, &spec())).await.err();
        let error = error
            .with_context(|| format!("{name} was accepted"))?
            .to_string();
        ensure!(error.contains("metadata.name must"), "{name}: {error}");
    }
    Ok(())
}

pub(super) async fn defaults_are_filled_in(place: &Place) -> anyhow::Result<()> {
    let mut small = spec();
    small["resources"]["accelerator"] = json!("Gpu");
    small["resources"]["gpu"] = json!({});
    small["resources"]["cpu"] = json!(2);
    let created = place.create(object("defaults", &small)).await?;
    let spec = created.spec;
    let parallelism = spec.parallelism;
    assert_eq!(
        (parallelism.tensor, parallelism.pipeline, parallelism.nodes),
        (1, 1, 1)
    );
    assert_eq!((spec.replicas, spec.suspend), (1, false));
    assert_eq!(
        spec.resources.gpu.expect("set").resource_name,
        "nvidia.com/gpu"
    );
    place
        .api::<LlamaDeployment>()
        .delete("defaults", &DeleteParams::default())
        .await?;
    Ok(())
}

/// A spec with one source of each kind that is fetched.
fn fetched(source: &Value) -> Value {
    let mut spec = spec();
    spec["model"] = json!({"source": source, "cache": {"claimName": "c", "size": "1Gi"}});
    spec
}

pub(super) async fn bad_sources_are_refused(place: &Place) -> anyhow::Result<()> {
    let digest = "0".repeat(64);
    let files = json!([{"name": "q/m.gguf", "sha256": digest}]);
    let http = fetched(&json!({"http": {"url": "https://models.example/a", "files": files}}));
    let store = fetched(&json!({"s3": {"uri": "s3://models/a", "files": files}}));
    let commit = "0".repeat(40);
    let hub = fetched(&json!({"huggingFace": {"repo": "a/b", "revision": commit}}));
    for good in [&http, &store, &hub] {
        let made = place.create(object("good", good)).await?;
        let source = made.spec.model.source;
        if let Some(s3) = source.s3 {
            ensure!(s3.region == "us-east-1", "{s3:?}");
        }
        if let Some(hub) = source.hugging_face {
            ensure!(hub.endpoint.starts_with("https://"), "{hub:?}");
        }
        let delete = DeleteParams::default();
        place
            .api::<LlamaDeployment>()
            .delete("good", &delete)
            .await?;
    }
    let source = "/model/source";
    for (good, field, value, words) in [
        (&http, "http/url", json!("ftp://models.example"), "http.url"),
        (&http, "http/url", json!("https://a/b?key=1"), "http.url"),
        (&http, "http/files", json!([]), "http.files"),
        (&http, "http/files/0/name", json!("../m.gguf"), "name"),
        (&http, "http/files/0/sha256", json!("abc"), "sha256"),
        (&store, "s3/uri", json!("models/a"), "s3.uri"),
        (
            &store,
            "s3/files",
            Value::Null,
            "bytes are known beforehand",
        ),
        (&hub, "huggingFace/revision", json!("main"), "revision"),
        (&hub, "huggingFace/repo", json!("llama"), "repo"),
        (&hub, "huggingFace/path", json!("m.bin"), "path"),
        (
            &hub,
            "huggingFace/tokenSecretRef",
            json!({"name": "hub"}),
            "key",
        ),
    ] {
        refused_with(
            place,
            good.clone(),
            &format!("{source}/{field}"),
            value,
            words,
        )
        .await?;
    }
    let size = "/model/cache/size";
    refused_with(place, hub, size, json!("1k"), "at least 1Mi").await?;
    let cache = json!({"claimName": "c", "size": "1Gi"});
    let words = "cache is for models that are fetched";
    refused_with(place, spec(), "/model/cache", cache, words).await
}

/// Every sample, as the API server takes it.
pub(super) async fn samples_are_accepted(place: &Place) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/samples");
    let mut count = 0;
    for file in std::fs::read_dir(&folder)? {
        let path = file?.path();
        let sample: DynamicObject = serde_yaml::from_slice(&std::fs::read(&path)?)
            .with_context(|| path.display().to_string())?;
        let kind = sample.types.as_ref().map(|types| types.kind.as_str());
        let resource = match kind {
            Some("LlamaModel") => ApiResource::erase::<LlamaModel>(&()),
            _ => ApiResource::erase::<LlamaDeployment>(&()),
        };
        let api: Api<DynamicObject> =
            Api::namespaced_with(place.client.clone(), NAMESPACE, &resource);
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let created = api.create(&params, &sample).await;
        created.with_context(|| path.display().to_string())?;
        count += 1;
    }
    ensure!(count > 0, "{} holds no sample", folder.display());
    Ok(())
}
