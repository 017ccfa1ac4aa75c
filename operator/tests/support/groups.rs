//! Groups on a real control plane, with nodes that have no kubelet.

#![allow(dead_code, reason = "each test program uses its part")]

use std::time::{Duration, Instant};

use anyhow::ensure;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt};
use llama_crds::v1alpha1::{ConditionType, LlamaDeployment};
use llama_operator::reconcile::status;
use serde_json::{Value, json};

pub(crate) const NAMESPACE: &str = "default";
const WITHIN: Duration = Duration::from_mins(1);

pub(crate) async fn install_crd(client: &Client) -> anyhow::Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in llama_crds::crds() {
        let name = crd.name_any();
        let params = PatchParams::apply("test");
        crds.patch(&name, &params, &Patch::Apply(&crd)).await?;
        let established = await_condition(crds.clone(), &name, conditions::is_crd_established());
        tokio::time::timeout(WITHIN, established).await??;
    }
    Ok(())
}

pub(crate) async fn make_node(client: &Client, name: &str, rack: &str) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let amounts = json!({
        "cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": "8",
    });
    let labels = json!({"kubernetes.io/hostname": name, "example.com/rack": rack});
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels},
    });
    nodes
        .create(&PostParams::default(), &serde_json::from_value(node)?)
        .await?;
    let ready = json!([{"type": "Ready", "status": "True", "reason": "Test", "message": "",
        "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let status = json!({"status": {
        "capacity": amounts, "allocatable": amounts, "conditions": ready,
    }});
    nodes
        .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await?;
    // Admission gives new nodes a taint that the node controller would take off.
    let open = json!({"spec": {"taints": null}});
    nodes
        .patch(name, &PatchParams::default(), &Patch::Merge(open))
        .await?;
    Ok(())
}

/// A group of `pods` that want six GPUs each.
pub(crate) async fn create_with(
    client: &Client,
    name: &str,
    pods: i32,
    placement: Value,
) -> anyhow::Result<()> {
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    let object = json!({
        "apiVersion": "llmops.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": {"image": {"reference": "models:1", "path": "/m.gguf"}}},
            "planPolicy": "Disabled",
            "parallelism": {"tensor": 6, "pipeline": pods, "nodes": pods},
            "resources": {"accelerator": "Gpu", "cpu": "1", "memory": "1Gi"},
            "placement": placement,
        },
    });
    deployments
        .create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    Ok(())
}

/// Nodes to which the scheduler bound pods of the deployment `name`.
pub(crate) async fn bound(client: &Client, name: &str) -> anyhow::Result<Vec<String>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
    let mut nodes: Vec<_> = pods
        .list(&selector)
        .await?
        .items
        .into_iter()
        .filter_map(|pod| pod.spec?.node_name)
        .collect();
    nodes.sort();
    Ok(nodes)
}

/// The condition Scheduled, with its message.
pub(crate) async fn scheduled(client: &Client, name: &str) -> anyhow::Result<String> {
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    let status = deployments.get(name).await?.status.unwrap_or_default();
    let found = status::find(&status, ConditionType::Scheduled);
    Ok(found.map_or_else(String::new, |found| {
        format!("{}/{}: {}", found.status, found.reason, found.message)
    }))
}

pub(crate) async fn remove(client: &Client, name: &str) -> anyhow::Result<()> {
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    deployments.delete(name, &DeleteParams::default()).await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
    until("its pods are gone", async || {
        end_deleted_pods(client).await?;
        Ok(pods.list(&selector).await?.items.is_empty().then_some(()))
    })
    .await
}

/// The kubelet: pods that are being deleted end at once.
pub(crate) async fn end_deleted_pods(client: &Client) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    for pod in pods.list(&ListParams::default()).await? {
        if pod.metadata.deletion_timestamp.is_some() {
            let now = DeleteParams::default().grace_period(0);
            let _ = pods.delete(&pod.name_any(), &now).await;
        }
    }
    Ok(())
}

pub(crate) async fn until<T>(
    what: &str,
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + WITHIN;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "{what}: not within {WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
