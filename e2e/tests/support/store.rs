//! An S3-compatible store in the cluster with the real model, and a cache on the node.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cache::Cache;
use llama_e2e::{components, image};
use serde_json::{Value, json};
use tokio::process::Command;

use super::{MODEL_FILE, Place, repository};

const STORE_IMAGE: &str = "llama-operator/object-store:dev";
const MODEL_IMAGE: &str = "llama-operator/smollm2-135m-instruct:q4_1";
const WORKER_IMAGE: &str = "llama-operator/worker:dev";
/// Name of the store's pod, its Service, and the Secret with its key.
pub(crate) const STORE: &str = "store";
const BUCKET: &str = "models";
/// Name of the claim.
pub(crate) const CACHE: &str = "cache";
const PORT: u16 = 7070;
/// User that workers run as.
const WORKER_USER: u32 = 65532;
const STORE_WITHIN: Duration = Duration::from_mins(2);

/// Makes the image of the store known to the cluster.
async fn load_store_image(place: &Place) -> anyhow::Result<()> {
    let cache = Cache::from_environment()?;
    let programs = components::build(&cache, &[components::OBJECT_STORE]).await?;
    let inputs = BTreeMap::from([("versitygw".to_owned(), programs.path("versitygw"))]);
    let folder = tempfile::tempdir()?;
    let archive = folder.path().join("object-store.tar");
    image::build(
        &repository().join("deploy/images/object-store.yaml"),
        &inputs,
        &archive,
    )?;
    Ok(place.cluster.load_image(&archive).await?)
}

fn mount(name: &str, path: &str, inside: &str) -> Value {
    json!({"name": name, "mountPath": path, "subPath": inside})
}

/// The store with the real model in its bucket, copied out of the model's image.
pub(crate) async fn start_store(place: &Place) -> anyhow::Result<()> {
    load_store_image(place).await?;
    let secret = |name: &str, key: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": name},
            "stringData": {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": key},
        })
    };
    let security = json!({
        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": true,
    });
    let container = |name: &str, image: &str, command: Value, mounts: Value| {
        json!({
            "name": name, "image": image, "imagePullPolicy": "Never", "command": command,
            "volumeMounts": mounts, "securityContext": security,
        })
    };
    let from_secret = |name: &str, key: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": STORE, "key": key}}});
    let copy = "/usr/local/bin/llama-model-copy";
    let mut serve = container(
        "store",
        STORE_IMAGE,
        json!(["/versitygw", "--port", format!(":{PORT}"), "posix", "/data"]),
        json!([{"name": "data", "mountPath": "/data"}]),
    );
    serve["env"] = json!([
        from_secret("ROOT_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        from_secret("ROOT_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"),
    ]);
    serve["readinessProbe"] = json!({"tcpSocket": {"port": PORT}, "periodSeconds": 1});
    let from = format!("/models/{MODEL_FILE}");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": STORE, "labels": {"app": STORE}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": WORKER_USER, "fsGroup": WORKER_USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [
                container("install", WORKER_IMAGE, json!([copy, "install", "--to", "/tools"]),
                    json!([mount("data", "/tools", "tools")])),
                container("copy", MODEL_IMAGE,
                    json!(["/tools/llama-model-copy", "copy", "--from", from, "--to", "/bucket"]),
                    json!([mount("data", "/tools", "tools"), mount("data", "/bucket", BUCKET)])),
            ],
            "containers": [serve],
            "volumes": [{"name": "data", "emptyDir": {}}],
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": STORE},
        "spec": {"selector": {"app": STORE}, "ports": [{"port": PORT}]},
    });
    for object in [
        secret(STORE, "a-secret-of-tests"),
        secret("wrong", "another"),
        service,
        pod,
    ] {
        place.apply(object).await?;
    }
    let ready = "--for=condition=Ready";
    let timeout = format!("--timeout={}s", STORE_WITHIN.as_secs());
    place
        .kubectl(["wait", "pod", STORE, ready, &timeout])
        .await?;
    Ok(())
}

/// A folder of the node's own, as a claim that pods may write to.
pub(crate) async fn make_cache(place: &Place) -> anyhow::Result<()> {
    let volumes = place.cluster.volumes.as_ref().context("volumes")?;
    let host = volumes.here.join(CACHE);
    // What an earlier run left.
    let _ = std::fs::remove_dir_all(&host);
    std::fs::create_dir_all(&host)?;
    chown(&host, Some(WORKER_USER), Some(WORKER_USER))?;
    std::fs::set_permissions(&host, PermissionsExt::from_mode(0o770))?;
    let volume_name = "e2e-cache";
    place
        .kubectl(["delete", "pv", volume_name, "--ignore-not-found"])
        .await?;
    let modes = json!(["ReadWriteMany"]);
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume_name},
        "spec": {
            "accessModes": modes, "capacity": {"storage": "1Gi"},
            "hostPath": {"path": volumes.on_node.join(CACHE)},
        },
    });
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CACHE},
        "spec": {
            "accessModes": modes, "storageClassName": "", "volumeName": volume_name,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    });
    place.cluster.apply(&volume.to_string()).await?;
    place.apply(claim).await
}

/// The SHA-256 of the real model's file.
pub(crate) async fn digest() -> anyhow::Result<String> {
    let file = Cache::from_environment()?
        .folder()
        .join("models")
        .join(MODEL_FILE);
    let output = Command::new("sha256sum").arg(&file).output().await?;
    ensure!(output.status.success(), "sha256sum {}", file.display());
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .next()
        .context("a digest")?
        .to_owned())
}

/// The model in the store, asked for with the key of `secret`, and its cache: fields of a
/// `LlamaModel`'s spec, and of a `LlamaDeployment`'s `model`.
pub(crate) fn from_store(secret: &str, digest: &str, size: &str) -> Value {
    json!({
        "source": {"s3": {
            "uri": format!("s3://{BUCKET}"),
            "endpoint": format!("http://{STORE}:{PORT}"),
            "files": [{"name": MODEL_FILE, "sha256": digest}],
            "secretRef": {"name": secret},
        }},
        "cache": {"claimName": CACHE, "size": size},
    })
}

/// One rank with that model.
pub(crate) fn one_rank(name: &str, model: Value) -> Value {
    super::deployment(name, |object| {
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
