//! A node is closed and drained: its group moves where another node has room, and stays
//! and serves where none has.

mod support;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::command;
use llama_e2e::provider::Provider;
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use support::small::{NAME, small};
use support::{Place, SAID_WITHIN, condition, place};
use tokio::process::Command;

const POD: &str = "smollm2-0-0";
/// The group that takes its place.
const NEXT_POD: &str = "smollm2-1-0";
/// A node whose kubelet is this test.
const SPARE: &str = "e2e-spare";
const EVICTED_WITHIN: Duration = Duration::from_secs(20);
const DRAIN_WITHIN: Duration = Duration::from_mins(1);

#[tokio::test]
async fn a_closed_node_keeps_its_group_until_another_has_room() -> anyhow::Result<()> {
    let Some(place) = place("e2e-nodes").await? else {
        return Ok(());
    };
    if place.cluster.provider != Provider::Local {
        eprintln!("skipped: only the local cluster is known to have one node");
        return Ok(());
    }
    remove_spare(&place).await?;
    place.apply(small(1, |_| ())).await?;
    place.wait_ready(NAME, 1).await?;
    let pod = place.get(["pod", POD]).await?;
    let node = pod["spec"]["nodeName"].as_str().context("a node")?;

    let outcome = closed(&place, node, &pod).await;
    // Whatever happened: other tests need the node.
    place.kubectl(["uncordon", node]).await?;
    remove_spare(&place).await?;
    outcome?;
    place.remove_namespace().await
}

async fn closed(place: &Place, node: &str, pod: &Value) -> anyhow::Result<()> {
    place.kubectl(["cordon", node]).await?;
    let object = place
        .wait_for(NAME, "why the group stays", SAID_WITHIN, |object| {
            let said = object["status"]["rollout"]["message"].as_str();
            said.is_some_and(|said| said.contains(node) && said.contains("no other has room"))
        })
        .await?;
    ensure!(condition(&object, "Ready").starts_with("True"), "{object}");
    eviction_is_refused(place).await?;
    let now = place.get(["pod", POD]).await?;
    ensure!(now["metadata"]["uid"] == pod["metadata"]["uid"], "{now}");
    let forward = place.forward(NAME).await?;
    let answer = forward
        .complete(NAME, "The capital of France is", 4)
        .await?;
    ensure!(answer.contains("Paris"), "{answer:?}");
    drop(forward);

    place.kubectl(["uncordon", node]).await?;
    place
        .wait_for(NAME, "no word of the node", SAID_WITHIN, |object| {
            object["status"]["rollout"].is_null()
        })
        .await?;

    // `kubectl drain` tries again and again until the operator has moved the group.
    let drain = place
        .cluster
        .kubectl_command()
        .args(["drain", node, "--delete-emptydir-data", "--force"])
        .args(["--pod-selector", "llmops.dev/deployment=smollm2"])
        .args(["--timeout", &format!("{}s", DRAIN_WITHIN.as_secs())])
        .kill_on_drop(true)
        .output();
    let move_over = async {
        add_spare(place).await?;
        start_on_spare(place).await
    };
    let (drained, moved) = tokio::join!(drain, move_over);
    moved?;
    let drained = drained?;
    ensure!(
        drained.status.success(),
        "{}",
        String::from_utf8_lossy(&drained.stderr)
    );
    let object = place.wait_ready(NAME, 1).await?;
    let group = &object["status"]["groups"][0];
    ensure!(
        group["index"] == 1 && group["nodes"] == json!([SPARE]),
        "{group}"
    );
    Ok(())
}

async fn eviction_is_refused(place: &Place) -> anyhow::Result<()> {
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": POD, "namespace": place.namespace},
    });
    let path = format!("/api/v1/namespaces/{}/pods/{POD}/eviction", place.namespace);
    let mut kubectl: Command = place.cluster.kubectl_command();
    kubectl.args(["create", "--raw", &path, "-f", "-"]);
    let eviction = eviction.to_string();
    let said = command::run_with_input(&mut kubectl, &eviction, EVICTED_WITHIN).await;
    let Err(refusal) = said else {
        anyhow::bail!("the pod was evicted");
    };
    let refusal = refusal.to_string();
    ensure!(refusal.contains("disruption budget"), "{refusal}");
    Ok(())
}

/// A second node, with room.
async fn add_spare(place: &Place) -> anyhow::Result<()> {
    let labels = json!({"kubernetes.io/hostname": SPARE});
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": SPARE, "labels": labels},
    });
    place.cluster.apply(&node.to_string()).await?;
    // Without a new time of its own it would be taken for a node that died.
    let now = place.get(["node", SPARE]).await?["metadata"]["creationTimestamp"].clone();
    let capacity = json!({"cpu": "2", "memory": "8Gi", "pods": "10"});
    let status = json!({"status": {
        "capacity": capacity, "allocatable": capacity,
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "Test", "message": "",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }],
    }});
    patch_status(place, "node", SPARE, &status).await?;
    Ok(())
}

/// Says what a kubelet would of the new group's pod, once it has the node.
async fn start_on_spare(place: &Place) -> anyhow::Result<()> {
    let pod = place
        .cluster
        .wait_for(
            &place.namespace,
            "a pod elsewhere",
            SAID_WITHIN,
            async || match place.get(["pod", NEXT_POD]).await {
                Ok(pod) if pod["spec"]["nodeName"] == SPARE => Look::Done(pod),
                Ok(pod) => Look::NotYet(pod["status"].to_string()),
                Err(error) => Look::NotYet(error.to_string()),
            },
        )
        .await?;
    let running = json!({
        "name": "worker", "ready": true, "restartCount": 0, "image": "", "imageID": "",
        "started": true, "state": {"running": {}},
    });
    let status = json!({"status": {
        "phase": "Running",
        "conditions": [{
            "type": "Ready", "status": "True",
            "lastTransitionTime": pod["metadata"]["creationTimestamp"],
        }],
        "containerStatuses": [running],
    }});
    patch_status(place, "pod", NEXT_POD, &status).await
}

async fn patch_status(place: &Place, kind: &str, name: &str, patch: &Value) -> anyhow::Result<()> {
    place
        .kubectl([
            "patch",
            kind,
            name,
            "--subresource=status",
            "--type=merge",
            "--patch",
            &patch.to_string(),
        ])
        .await?;
    Ok(())
}

async fn remove_spare(place: &Place) -> anyhow::Result<()> {
    place
        .kubectl(["delete", "node", SPARE, "--ignore-not-found"])
        .await?;
    // Nobody there would end it.
    place
        .kubectl([
            "delete",
            "pod",
            NEXT_POD,
            "--force",
            "--grace-period=0",
            "--ignore-not-found",
        ])
        .await?;
    Ok(())
}
