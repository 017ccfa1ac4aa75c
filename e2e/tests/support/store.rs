//! An S3-compatible store in the cluster, and a cache for what is fetched from it.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cache::Cache;
use llama_e2e::{components, image};
use serde_json::{Value, json};
use tokio::process::Command;

use super::{Place, repository};

const IMAGE: &str = "llama-operator/object-store:dev";
/// Name of the store's pod, its Service, and the Secret with its key.
pub(crate) const STORE: &str = "store";
/// Folder of the volume that holds the bucket's objects.
pub(crate) const BUCKET: &str = "models";
/// Name of the volume with the buckets.
pub(crate) const DATA: &str = "data";
/// Name of the cache's claim and folder.
pub(crate) const CACHE: &str = "cache";
const PORT: u16 = 7070;
/// User that workers and the store run as.
const WORKER_USER: u32 = 65532;
const STORE_WITHIN: Duration = Duration::from_mins(2);

/// Makes the image of the store known to the cluster.
async fn load_image(place: &Place) -> anyhow::Result<()> {
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

/// A key to the store.
pub(crate) fn secret(name: &str, key: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": name},
        "stringData": {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": key},
    })
}

/// A container of the store's pod.
pub(crate) fn container(name: &str, image: &str, command: &Value, mounts: &Value) -> Value {
    json!({
        "name": name, "image": image, "imagePullPolicy": "Never", "command": command,
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
        },
    })
}

/// Starts the store over the volume `data`, once the containers `init` have ended.
pub(crate) async fn start(place: &Place, data: &Value, init: &Value) -> anyhow::Result<()> {
    load_image(place).await?;
    let from_secret = |name: &str, key: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": STORE, "key": key}}});
    let mut serve = container(
        "store",
        IMAGE,
        &json!(["/versitygw", "--port", format!(":{PORT}"), "posix", "/data"]),
        &json!([{"name": DATA, "mountPath": "/data"}]),
    );
    serve["env"] = json!([
        from_secret("ROOT_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        from_secret("ROOT_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"),
    ]);
    serve["readinessProbe"] = json!({"tcpSocket": {"port": PORT}, "periodSeconds": 1});
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": STORE, "labels": {"app": STORE}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": WORKER_USER, "fsGroup": WORKER_USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": init,
            "containers": [serve],
            "volumes": [data],
        },
    });
    if let Some(first) = place.cluster.nodes.first() {
        // As the operator: any other node can be lost.
        pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": first.name});
    }
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": STORE},
        "spec": {"selector": {"app": STORE}, "ports": [{"port": PORT}]},
    });
    for object in [secret(STORE, "a-secret-of-tests"), service, pod] {
        place.apply(object).await?;
    }
    let ready = "--for=condition=Ready";
    let timeout = format!("--timeout={}s", STORE_WITHIN.as_secs());
    place
        .kubectl(["wait", "pod", STORE, ready, &timeout])
        .await?;
    Ok(())
}

/// `spec.model`: the object `file` of the store, asked for with the key of `secret`, and
/// kept in a cache of `size`.
pub(crate) fn model(file: &str, digest: &str, secret: &str, size: &str) -> Value {
    json!({
        "source": {"s3": {
            "uri": format!("s3://{BUCKET}"),
            "endpoint": format!("http://{STORE}:{PORT}"),
            "files": [{"name": file, "sha256": digest}],
            "secretRef": {"name": secret},
        }},
        "cache": {"claimName": CACHE, "size": size},
    })
}

/// The SHA-256 of a file.
pub(crate) async fn digest(file: &Path) -> anyhow::Result<String> {
    let output = Command::new("sha256sum").arg(file).output().await?;
    ensure!(output.status.success(), "sha256sum {}", file.display());
    let text = String::from_utf8(output.stdout)?;
    Ok(text
        .split_whitespace()
        .next()
        .context("a digest")?
        .to_owned())
}

/// An empty folder that pods may write to, without what an earlier run left.
pub(crate) fn empty_cache(folder: &Path) -> anyhow::Result<()> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder)?;
    chown(folder, Some(WORKER_USER), Some(WORKER_USER))?;
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o770))?;
    Ok(())
}
