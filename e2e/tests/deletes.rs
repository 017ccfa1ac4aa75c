//! However it is deleted: what is being answered is answered, everything goes, and
//! nothing comes back.

mod support;

use anyhow::ensure;
use llama_e2e::wait::Look;
use serde_json::json;
use support::births::Births;
use support::small::{NAME, small};
use support::{GONE_WITHIN, Place, READY_WITHIN, place};

const LONG: &str = "Tell me a very long story about the sea and a lighthouse.";
const TOKENS: u32 = 200;

#[tokio::test]
async fn a_foreground_deletion_amid_a_rollout_cuts_no_answer() -> anyhow::Result<()> {
    let Some(place) = place("e2e-delete").await? else {
        return Ok(());
    };
    place.apply(small(1, |_| ())).await?;
    place.wait_ready(NAME, 1).await?;
    let forward = place.forward(NAME).await?;
    place
        .apply(small(1, |object| {
            object["spec"]["restart"] = json!({"id": "again"});
        }))
        .await?;
    place
        .wait_for(NAME, "a second group", READY_WITHIN, |object| {
            object["status"]["replicas"] == 2
        })
        .await?;
    let mut question = forward.ask(NAME, LONG, TOKENS)?;
    question.begun().await?;

    let births = Births::begin(&place).await?;
    let deletion = ["delete", "ld", NAME, "--cascade=foreground", "--wait=false"];
    place.kubectl(deletion).await?;
    let (answered, _, said) = question.end().await?;
    ensure!(answered, "{said}");
    place.wait_gone(NAME).await?;
    births.none().await?;
    place.remove_namespace().await
}

#[tokio::test]
async fn a_namespace_goes_with_all_that_is_in_it() -> anyhow::Result<()> {
    let Some(place) = place("e2e-namespace").await? else {
        return Ok(());
    };
    // One serves, one has yet to.
    place.apply(small(1, |_| ())).await?;
    place.wait_ready(NAME, 1).await?;
    place
        .apply(small(1, |object| {
            object["metadata"]["name"] = json!("other");
            object["spec"]["parallelism"] = json!({"pipeline": 2, "nodes": 2});
        }))
        .await?;
    place
        .wait_for("other", "pods", READY_WITHIN, |object| {
            object["status"]["replicas"] == 1
        })
        .await?;

    let births = Births::begin(&place).await?;
    let deletion = ["delete", "namespace", "e2e-namespace", "--wait=false"];
    place.kubectl(deletion).await?;
    namespace_is_gone(&place).await?;
    births.none().await
}

async fn namespace_is_gone(place: &Place) -> anyhow::Result<()> {
    let look = async || {
        let found = ["namespace", &place.namespace, "--ignore-not-found"];
        match place
            .cluster
            .kubectl(["get"].into_iter().chain(found))
            .await
        {
            Ok(said) if said.is_empty() => Look::Done(()),
            Ok(said) => Look::NotYet(said),
            Err(error) => Look::NotYet(error.to_string()),
        }
    };
    let what = "end of the namespace";
    let waiting = place
        .cluster
        .wait_for(&place.namespace, what, GONE_WITHIN, look);
    Ok(waiting.await?)
}

#[tokio::test]
async fn a_younger_object_of_the_name_waits_for_the_pods_of_the_older() -> anyhow::Result<()> {
    let Some(place) = place("e2e-younger").await? else {
        return Ok(());
    };
    place.apply(small(1, |_| ())).await?;
    let older = place.wait_ready(NAME, 1).await?;
    place
        .kubectl(["delete", "ld", NAME, "--cascade=background", "--wait=false"])
        .await?;
    place.apply(small(1, |_| ())).await?;
    let younger = place.wait_ready(NAME, 1).await?;
    ensure!(younger["metadata"]["uid"] != older["metadata"]["uid"]);
    let group = &younger["status"]["groups"][0];
    ensure!(
        group["restarts"] == 0 && group["lastFailure"].is_null(),
        "{group}"
    );
    place.remove_namespace().await
}
