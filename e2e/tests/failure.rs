//! A rank dies in the middle of an answer.

mod support;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use support::{Place, READY_WITHIN, SAID_WITHIN, condition, deployment, place};

const NAME: &str = "smollm2";
const RANKS: i64 = 3;
const LONG: &str = "Tell me a very long story about the sea and a lighthouse.";

#[tokio::test]
async fn any_rank_may_be_killed_and_the_group_comes_back() -> anyhow::Result<()> {
    let Some(place) = place("e2e-failure").await? else {
        return Ok(());
    };
    place.apply(deployment(NAME, |_| ())).await?;
    let mut object = place.wait_ready(NAME, 1).await?;
    for rank in 0..RANKS {
        let epoch = object["status"]["groups"][0]["epoch"].as_i64();
        kill_during_an_answer(&place, rank).await?;
        object = recreated(&place, rank, epoch).await?;
        an_event_names(&place, rank).await?;

        let forward = place.forward(NAME).await?;
        let (answered, answer, said) = forward.ask(NAME, "What is 2+2?", 24)?.end().await?;
        ensure!(answered, "after rank {rank} died: {answer} {said}");
    }
    place.remove_namespace().await
}

async fn kill_during_an_answer(place: &Place, rank: i64) -> anyhow::Result<()> {
    let pod = format!("{NAME}-0-0");
    let object = place.get(["pod", &pod]).await?;
    let node = object["spec"]["nodeName"].as_str().context("a node")?;
    let processes = place
        .cluster
        .processes(&place.namespace, &pod, "worker")
        .await?;
    let wanted = format!("--rank={rank}");
    let process = processes
        .iter()
        .find(|process| process.arguments.contains(&wanted))
        .with_context(|| format!("rank {rank} in {processes:?}"))?;

    let forward = place.forward(NAME).await?;
    let mut question = forward.ask(NAME, LONG, 1900)?;
    question.begun().await?;
    place.cluster.signal(node, process, "KILL").await?;
    let (answered, _, said) = question.end().await?;
    ensure!(
        !answered,
        "the answer ended well although rank {rank} was killed"
    );
    ensure!(
        said.contains(&format!("rank {rank}")) && said.contains(node),
        "the client was told: {said}"
    );
    Ok(())
}

/// Waits until the group serves again in a later epoch, and checks what status says.
async fn recreated(place: &Place, rank: i64, before: Option<i64>) -> anyhow::Result<Value> {
    let object = place
        .wait_for(NAME, "the next epoch", READY_WITHIN, |object| {
            object["status"]["groups"][0]["epoch"].as_i64() > before
                && condition(object, "Ready").starts_with("True")
        })
        .await?;
    let failure = &object["status"]["groups"][0]["lastFailure"];
    ensure!(failure["rank"] == rank, "{failure}");
    ensure!(failure["reason"] == "RankDied", "{failure}");
    ensure!(
        failure["node"]
            .as_str()
            .is_some_and(|node| !node.is_empty()),
        "{failure}"
    );
    ensure!(
        failure["message"]
            .as_str()
            .is_some_and(|message| message.contains("SIGKILL")),
        "{failure}"
    );
    Ok(object)
}

async fn an_event_names(place: &Place, rank: i64) -> anyhow::Result<()> {
    let wanted = format!("rank {rank}");
    place
        .cluster
        .wait_for(
            &place.namespace,
            "an event about the rank",
            SAID_WITHIN,
            async || {
                let notes: Vec<String> = match place.get(["events"]).await {
                    Ok(events) => events["items"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .filter(|event| event["type"] == "Warning")
                        .filter_map(|event| event["message"].as_str().map(str::to_owned))
                        .collect(),
                    Err(error) => vec![error.to_string()],
                };
                if notes.iter().any(|note| note.contains(&wanted)) {
                    llama_e2e::wait::Look::Done(())
                } else {
                    llama_e2e::wait::Look::NotYet(format!("{notes:?}"))
                }
            },
        )
        .await?;
    Ok(())
}
