//! Groups in a queue of Kueue's: the real API server, scheduler and Kueue, nodes without a
//! kubelet. Runs where Kueue was built (`llama-cluster build --with-kueue`).

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "support/control_plane.rs"]
mod control_plane;
#[path = "support/groups.rs"]
mod groups;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use control_plane::{ControlPlane, control_plane, free_port, programs, run};
use groups::{
    NAMESPACE, bound, create_with, end_deleted_pods, install_crd, make_node, remove, scheduled,
    until,
};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt};
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::args::Args;
use serde::Deserialize as _;
use serde_json::{Value, json};

/// Beside the programs: Kueue's own definitions.
const MANIFESTS: &str = "kueue-manifests";
const QUEUE: &str = "team-a";

#[tokio::test]
async fn of_two_groups_one_gets_the_quota_and_the_other_waits_whole() -> anyhow::Result<()> {
    let Some(programs) = programs() else {
        return Ok(());
    };
    if !programs.join("kueue").exists() {
        eprintln!("skipped: Kueue is not built; `llama-cluster build --with-kueue` builds it");
        return Ok(());
    }
    let mut plane = control_plane(&programs).await?;
    plane.start_scheduler(&programs)?;
    let client = plane.client.clone();
    install_crd(&client).await?;
    for name in ["gpu-0", "gpu-1", "gpu-2", "gpu-3"] {
        make_node(&client, name, "r1").await?;
    }
    let args = Args::try_parse_from([
        "llama-operator",
        "--worker-image=llama-operator/worker:test",
        "--listen=127.0.0.1:0",
    ])?;
    let program = llama_operator::run::run_with(client.clone(), args);
    let story = async {
        without_kueue_that_is_said(&client).await?;
        start_kueue(&mut plane, &programs).await?;
        make_queue(&client).await?;
        quota_is_given_to_whole_groups(&client).await?;
        what_is_preempted_has_not_failed(&client).await?;
        nothing_is_left(&client).await
    };
    let result = tokio::select! {
        ended = program => bail!("the operator ended: {ended:?}"),
        result = story => result,
    };
    result.with_context(|| format!("Kueue said last:\n{}", plane.last_words("unshare")))
}

async fn without_kueue_that_is_said(client: &Client) -> anyhow::Result<()> {
    let placement = json!({"queueName": QUEUE, "gang": {"provider": "Kueue"}});
    create_with(client, "z", 2, placement).await?;
    let said = until("it is said that Kueue is missing", async || {
        let said = condition(client, "z", "Ready").await?;
        Ok(said.starts_with("False/KueueNotInstalled").then_some(said))
    })
    .await?;
    ensure!(said.contains("install Kueue"), "{said}");
    ensure!(pods(client, "z").await?.is_empty());
    remove(client, "z").await
}

/// Two groups of twelve GPUs each, and a queue with twelve.
async fn quota_is_given_to_whole_groups(client: &Client) -> anyhow::Result<()> {
    let by_name = json!({"queueName": QUEUE, "gang": {"provider": "Kueue"}});
    create_with(client, "a", 2, by_name).await?;
    until("the first runs", async || {
        Ok((bound(client, "a").await?.len() == 2).then_some(()))
    })
    .await?;
    // That Kueue is there is known by now, so that Auto is Kueue.
    create_with(client, "b", 2, json!({"queueName": QUEUE})).await?;
    let said = until("the second waits", async || {
        let said = scheduled(client, "b").await?;
        let whole = said.starts_with("False/WaitingForQuota") && said.contains("more needed");
        Ok(whole.then_some(said))
    })
    .await?;
    ensure!(said.contains("LocalQueue team-a of Kueue"), "{said}");
    ensure!(said.contains("nvidia.com/gpu in flavor h100"), "{said}");
    ensure!(bound(client, "b").await?.is_empty());
    let waiting = pods(client, "b").await?;
    ensure!(waiting.len() == 2);
    for pod in waiting {
        let gates = pod.spec.and_then(|spec| spec.scheduling_gates);
        let names: Vec<_> = gates.iter().flatten().map(|gate| &gate.name).collect();
        ensure!(names.contains(&&"kueue.x-k8s.io/admission".to_owned()));
        ensure!(!names.contains(&&"llmops.dev/gang".to_owned()), "{names:?}");
    }
    remove(client, "a").await?;
    until("the second gets the quota", async || {
        Ok((bound(client, "b").await?.len() == 2).then_some(()))
    })
    .await
}

async fn what_is_preempted_has_not_failed(client: &Client) -> anyhow::Result<()> {
    let urgent = json!({
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
        "metadata": {"name": "urgent"}, "value": 1000, "preemptionPolicy": "Never",
    });
    apply(client, &urgent).await?;
    let placement = json!({"queueName": QUEUE, "priorityClassName": "urgent"});
    create_with(client, "c", 2, placement).await?;
    until("the urgent one takes the quota", async || {
        end_deleted_pods(client).await?;
        Ok((bound(client, "c").await?.len() == 2).then_some(()))
    })
    .await?;
    until("the other queues again", async || {
        end_deleted_pods(client).await?;
        let said = scheduled(client, "b").await?;
        Ok(said.starts_with("False/WaitingForQuota").then_some(()))
    })
    .await?;
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    let status = deployments.get("b").await?.status.unwrap_or_default();
    let group = status.groups.first().context("a group")?;
    ensure!(group.epoch == 1, "{group:?}");
    ensure!(
        group.restarts == 0 && group.last_failure.is_none(),
        "{group:?}"
    );
    ensure!(group.recent_failures.is_empty(), "{group:?}");
    Ok(())
}

/// Pods that Kueue keeps go with their LlamaDeployment, those that wait as well.
async fn nothing_is_left(client: &Client) -> anyhow::Result<()> {
    remove(client, "b").await?;
    remove(client, "c").await?;
    let workloads = kueue(client, "Workload");
    until("no Workload is left", async || {
        let left = workloads.list(&ListParams::default()).await?;
        Ok(left.items.is_empty().then_some(()))
    })
    .await
}

async fn pods(client: &Client, name: &str) -> anyhow::Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
    Ok(pods.list(&selector).await?.items)
}

async fn condition(client: &Client, name: &str, type_: &str) -> anyhow::Result<String> {
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    let status = deployments.get(name).await?.status.unwrap_or_default();
    let found = status.conditions.iter().find(|found| found.type_ == type_);
    Ok(found.map_or_else(String::new, |found| {
        format!("{}/{}: {}", found.status, found.reason, found.message)
    }))
}

/// Kueue with its own definitions and webhooks, and certificates made here.
async fn start_kueue(plane: &mut ControlPlane, programs: &Path) -> anyhow::Result<()> {
    let client = plane.client.clone();
    let manifests = programs.join(MANIFESTS);
    for entry in std::fs::read_dir(manifests.join("crd/bases"))? {
        for object in objects(&entry?.path())? {
            apply(&client, &object).await?;
            let name = object["metadata"]["name"].as_str().context("a name")?;
            let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
            await_condition(crds, name, conditions::is_crd_established()).await?;
        }
    }
    let folder = plane.kubeconfig().with_file_name("kueue");
    std::fs::create_dir(&folder)?;
    let path = |name: &str| folder.join(name).display().to_string();
    let (key, certificate) = (path("tls.key"), path("tls.crt"));
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=kueue",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            &key,
            "-out",
            &certificate,
        ],
    )?;
    let port = free_port()?;
    let settings = json!({
        "apiVersion": "config.kueue.x-k8s.io/v1beta2", "kind": "Configuration",
        "namespace": "kueue-system",
        "health": {"healthProbeBindAddress": format!("127.0.0.1:{}", free_port()?)},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": path("")},
        "leaderElection": {"leaderElect": false},
        "internalCertManagement": {"enable": false},
        "integrations": {"frameworks": ["pod"]},
    });
    std::fs::write(path("config.yaml"), settings.to_string())?;
    // It reads the certificate of its metrics, which nobody asks for, from one place only:
    // it is shown an /etc with that in it.
    let certificates = folder.join("etc/kueue/metrics/certs");
    std::fs::create_dir_all(&certificates)?;
    for file in ["tls.key", "tls.crt"] {
        std::fs::copy(folder.join(file), certificates.join(file))?;
    }
    let shown = "mount -t overlay kueue -o lowerdir=\"$0\":/etc /etc && exec \"$@\"";
    let is_root = std::fs::metadata("/proc/self")?.uid() == 0;
    let mut args = vec!["--mount".to_owned()];
    args.extend((!is_root).then(|| "--map-root-user".to_owned()));
    args.extend(["sh", "-c", shown].map(str::to_owned));
    args.extend([
        path("etc"),
        programs.join("kueue").display().to_string(),
        format!("--config={}", path("config.yaml")),
        format!("--kubeconfig={}", plane.kubeconfig().display()),
        "--feature-gates=VisibilityOnDemand=false".to_owned(),
    ]);
    plane.start(Path::new("unshare"), &args)?;
    register(&client, &manifests, port, &certificate).await
}

/// Makes the API server ask Kueue's webhooks at `port`.
async fn register(
    client: &Client,
    manifests: &Path,
    port: u16,
    certificate: &str,
) -> anyhow::Result<()> {
    let bundle = ByteString(std::fs::read(certificate)?);
    for mut object in objects(&manifests.join("webhook/manifests.yaml"))? {
        let webhooks = object["webhooks"].as_array_mut().context("webhooks")?;
        webhooks.retain(|webhook| {
            let group = webhook["rules"][0]["apiGroups"][0].as_str();
            group.is_some_and(|group| group.is_empty() || group == "kueue.x-k8s.io")
        });
        for webhook in webhooks {
            let path = webhook["clientConfig"]["service"]["path"].as_str();
            let url = format!("https://127.0.0.1:{port}{}", path.context("a path")?);
            webhook["clientConfig"] = json!({"url": url, "caBundle": bundle});
        }
        apply(client, &object).await?;
    }
    Ok(())
}

async fn make_queue(client: &Client) -> anyhow::Result<()> {
    let flavor = json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor",
        "metadata": {"name": "h100"}, "spec": {},
    });
    let quota = |name: &str, amount: &str| json!({"name": name, "nominalQuota": amount});
    let resources = [
        quota("cpu", "100"),
        quota("memory", "100Gi"),
        quota("nvidia.com/gpu", "12"),
    ];
    let queue = json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ClusterQueue",
        "metadata": {"name": "gpus"},
        "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [{
                "coveredResources": ["cpu", "memory", "nvidia.com/gpu"],
                "flavors": [{"name": "h100", "resources": resources}],
            }],
        },
    });
    let local = json!({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue",
        "metadata": {"name": QUEUE, "namespace": NAMESPACE},
        "spec": {"clusterQueue": "gpus"},
    });
    for object in [flavor, queue, local] {
        // Its webhooks answer once it has started.
        until("Kueue takes its queues", async || {
            Ok(apply(client, &object).await.ok())
        })
        .await?;
    }
    until("the queue is active", async || {
        let queue = kueue(client, "LocalQueue").get(QUEUE).await?;
        let text = queue.data["status"]["conditions"].to_string();
        Ok(text.contains("\"status\":\"True\"").then_some(()))
    })
    .await
}

fn kueue(client: &Client, kind: &str) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("kueue.x-k8s.io", "v1beta2", kind);
    Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk(&kind))
}

fn objects(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path)?;
    let documents = serde_yaml::Deserializer::from_str(&text);
    let read = documents.map(|document| Value::deserialize(document).map_err(Into::into));
    let all: anyhow::Result<Vec<_>> = read.collect();
    Ok(all?.into_iter().filter(Value::is_object).collect())
}

async fn apply(client: &Client, object: &Value) -> anyhow::Result<()> {
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let types = object.types.clone().context("a kind")?;
    let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
    let name = object.name_any();
    let objects: Api<DynamicObject> = match object.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let params = PatchParams::apply("test").force();
    objects
        .patch(&name, &params, &Patch::Apply(&object))
        .await?;
    Ok(())
}
