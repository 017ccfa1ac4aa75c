//! Models from an S3-compatible store in the cluster: fetched once, checked, and shared by
//! all pods that use the same cache.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cache::Cache;
use llama_e2e::wait::Look;
use llama_e2e::{components, image};
use serde_json::{Value, json};
use support::{MODEL_FILE, Place, SAID_WITHIN, condition, deployment, place, repository};
use tokio::process::Command;

const STORE_IMAGE: &str = "llama-operator/object-store:dev";
const MODEL_IMAGE: &str = "llama-operator/smollm2-135m-instruct:q4_1";
const WORKER_IMAGE: &str = "llama-operator/worker:dev";
/// Name of the store's pod, its Service, and the Secret with its key.
const STORE: &str = "store";
const BUCKET: &str = "models";
const CACHE: &str = "cache";
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
async fn start_store(place: &Place) -> anyhow::Result<()> {
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
async fn make_cache(place: &Place) -> anyhow::Result<()> {
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
async fn digest() -> anyhow::Result<String> {
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

/// One rank with the model from the store, asked for with the key of `secret`.
fn from_store(name: &str, secret: &str, digest: &str, size: &str) -> Value {
    deployment(name, |object| {
        let spec = &mut object["spec"];
        spec["model"] = json!({
            "source": {"s3": {
                "uri": format!("s3://{BUCKET}"),
                "endpoint": format!("http://{STORE}:{PORT}"),
                "files": [{"name": MODEL_FILE, "sha256": digest}],
                "secretRef": {"name": secret},
            }},
            "cache": {"claimName": CACHE, "size": size},
        });
        spec["parallelism"] = json!({"tensor": 1});
        spec["resources"] = json!({"accelerator": "Cpu", "cpu": "100m", "memory": "600Mi"});
    })
}

/// What the fetching container of `name`'s first pod said.
async fn fetched(place: &Place, name: &str) -> anyhow::Result<String> {
    let pod = format!("{name}-0-0");
    place
        .kubectl(["logs", &pod, "--container", "fetch-model"])
        .await
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
