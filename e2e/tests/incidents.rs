//! A group of two pods with one rank each, of which something fails: one recreation an
//! incident, the first cause by name, and an end to trying.

mod support;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cluster::NodeProcess;
use serde_json::{Value, json};
use support::small::{NAME, small};
use support::{Place, READY_WITHIN, condition, place};

/// Failures after which the group is made again.
const MOST: i64 = 3;
/// How long a group that was given up is watched.
const QUIET_FOR: Duration = Duration::from_secs(10);

#[tokio::test]
async fn each_incident_is_one_recreation_until_there_were_too_many() -> anyhow::Result<()> {
    let Some(place) = place("e2e-incidents").await? else {
        return Ok(());
    };
    place.apply(small(1, two_pods)).await?;
    place.wait_ready(NAME, 1).await?;

    for (rank, signal, reason) in [
        (0, "KILL", "RankDied"),
        (1, "KILL", "RankDied"),
        (1, "STOP", "RankSilent"),
    ] {
        if signal == "STOP" {
            // A Secret that somebody deletes is there again when pods need it.
            let secret = format!("{NAME}-rendezvous");
            place.kubectl(["delete", "secret", &secret]).await?;
        }
        let before = place.get(["ld", NAME]).await?;
        strike(&place, rank, signal).await?;
        recreated_once(&place, &before, rank, reason).await?;
    }
    given_up(&place).await?;
    place.remove_namespace().await
}

fn two_pods(object: &mut Value) {
    object["spec"]["parallelism"] = json!({"pipeline": 2, "nodes": 2});
    object["spec"]["failure"] = json!({"groupRestart": {
        "maxRestarts": MOST, "initialBackoff": "1s", "maxBackoff": "1s",
    }});
}

/// Sends a signal to the process of a rank, which is alone in its pod.
async fn strike(place: &Place, rank: i64, signal: &str) -> anyhow::Result<()> {
    let pod = format!("{NAME}-0-{rank}");
    let object = place.get(["pod", &pod]).await?;
    let node = object["spec"]["nodeName"].as_str().context("a node")?;
    let process = rank_process(place, &pod, rank).await?;
    place.cluster.signal(node, &process, signal).await?;
    Ok(())
}

async fn rank_process(place: &Place, pod: &str, rank: i64) -> anyhow::Result<NodeProcess> {
    let processes = place
        .cluster
        .processes(&place.namespace, pod, "worker")
        .await?;
    let wanted = format!("--rank={rank}");
    let found = processes
        .iter()
        .find(|process| process.arguments.contains(&wanted));
    found
        .cloned()
        .with_context(|| format!("rank {rank} in {processes:?}"))
}

/// Waits until the group serves again, one epoch later, and checks what is told of it.
async fn recreated_once(
    place: &Place,
    before: &Value,
    rank: i64,
    reason: &str,
) -> anyhow::Result<()> {
    let epoch = |object: &Value| object["status"]["groups"][0]["epoch"].as_i64();
    let next = epoch(before).map(|epoch| epoch + 1);
    let object = place
        .wait_for(NAME, "the next epoch", READY_WITHIN, |object| {
            epoch(object) >= next && condition(object, "Ready").starts_with("True")
        })
        .await?;
    let group = &object["status"]["groups"][0];
    ensure!(epoch(&object) == next, "more than one recreation: {group}");
    let failure = &group["lastFailure"];
    ensure!(
        failure["rank"] == rank && failure["reason"] == reason,
        "rank {rank}, {reason}: {failure}"
    );
    ensure!(failure["node"].is_string(), "{failure}");
    let marks = |object: &Value| {
        let marks = &object["status"]["groups"][0]["recentFailures"];
        marks.as_array().map_or(0, Vec::len)
    };
    ensure!(marks(&object) == marks(before) + 1, "{group}");

    let forward = place.forward(NAME).await?;
    let answer = forward
        .complete(NAME, "The capital of France is", 4)
        .await?;
    ensure!(answer.contains("Paris"), "{answer:?}");
    Ok(())
}

/// One failure more than may be: what failed stays as it ended, and no other pods come.
async fn given_up(place: &Place) -> anyhow::Result<()> {
    let before = pods(place).await?;
    strike(place, 1, "KILL").await?;
    let object = place
        .wait_for(NAME, "the end of trying", READY_WITHIN, |object| {
            object["status"]["groups"][0]["phase"] == "Failed"
        })
        .await?;
    for (kind, status) in [("Ready", "False"), ("Stalled", "True")] {
        let said = condition(&object, kind);
        ensure!(
            said.starts_with(&format!("{status} RankDied"))
                && said.contains("rank 1")
                && said.contains(&format!("maxRestarts is {MOST}")),
            "{kind}: {said}"
        );
    }
    tokio::time::sleep(QUIET_FOR).await;
    let after = pods(place).await?;
    // The pod that failed is kept. One that still ran when the group was given up is not.
    let failed = format!("{NAME}-0-1");
    ensure!(
        after.iter().all(|pod| before.contains(pod)) && after.iter().any(|pod| pod.0 == failed),
        "{before:?} became {after:?}"
    );
    let kept = place.get(["pods"]).await?;
    for pod in kept["items"].as_array().context("pods")? {
        ensure!(pod["status"]["phase"] == "Failed", "{}", pod["status"]);
    }
    Ok(())
}

/// Names and UIDs of all pods.
async fn pods(place: &Place) -> anyhow::Result<Vec<(String, String)>> {
    let pods = place.get(["pods"]).await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let items = pods["items"].as_array().context("pods")?.iter();
    Ok(items
        .map(|pod| {
            (
                text(&pod["metadata"]["name"]),
                text(&pod["metadata"]["uid"]),
            )
        })
        .collect())
}
