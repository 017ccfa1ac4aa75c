//! A deployment that serves is left alone, by the operator too.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use support::small::{NAME, small};
use support::{CHILDREN, Place, SAID_WITHIN, number_from, place};

/// Seconds in which nothing may be written, unless the variable says otherwise.
const REST_SECONDS: u32 = 60;
const MOST_REST_SECONDS: u32 = 3600;
const REST_VARIABLE: &str = "LLAMA_TEST_REST_SECONDS";
/// What the operator writes.
const WRITTEN: [&str; 6] = [
    "llamadeployments",
    "pods",
    "services",
    "secrets",
    "poddisruptionbudgets",
    "controllerrevisions",
];

#[tokio::test]
async fn at_rest_nothing_is_written_and_foreign_edits_are_undone_once() -> anyhow::Result<()> {
    let Some(place) = place("e2e-rest").await? else {
        return Ok(());
    };
    // Two pods, so that there is a Secret too, and a plan.
    place
        .apply(small(1, |object| {
            object["spec"]["parallelism"] = json!({"pipeline": 2, "nodes": 2});
            object["spec"]["planPolicy"] = json!("Enforce");
        }))
        .await?;
    place.wait_ready(NAME, 1).await?;
    for (kind, name, edit, field) in [
        (
            "Service",
            NAME,
            json!({"spec": {"selector": {"app": "other"}}}),
            "/spec/selector/app",
        ),
        (
            "PodDisruptionBudget",
            "smollm2-0",
            // Beside it no minAvailable would be valid.
            json!({"spec": {"minAvailable": null, "maxUnavailable": 1}}),
            "/spec/maxUnavailable",
        ),
    ] {
        undone(&place, kind, name, &edit, field).await?;
    }
    place
        .wait_for(
            NAME,
            "what ranks have told on record",
            SAID_WITHIN,
            |object| {
                object["status"]["selfTests"][0].is_object()
                    && object["status"]["plan"]["measured"].is_object()
            },
        )
        .await?;

    let (before, requests) = (versions(&place).await?, writes(&place).await?);
    let rest = number_from(REST_VARIABLE, REST_SECONDS, MOST_REST_SECONDS)?;
    tokio::time::sleep(Duration::from_secs(rest.into())).await;
    let (after, later) = (versions(&place).await?, writes(&place).await?);
    ensure!(before.len() > WRITTEN.len(), "{before:?}");
    ensure!(before == after, "{before:?} became {after:?}");
    ensure!(requests == later, "{requests:?} became {later:?}");
    for kind in ["Service", "PodDisruptionBudget"] {
        let told = told(&place, kind).await?;
        ensure!(told.len() == 1, "{kind}: {told:?}");
    }
    place.remove_namespace().await
}

/// Edits a child as somebody else would, and waits until it is as before.
async fn undone(
    place: &Place,
    kind: &str,
    name: &str,
    edit: &Value,
    field: &str,
) -> anyhow::Result<()> {
    let before = place.get([kind, name]).await?["spec"].clone();
    place
        .kubectl([
            "patch",
            kind,
            name,
            "--type=merge",
            "--patch",
            &edit.to_string(),
        ])
        .await?;
    let what = format!("{kind} {name} as it was");
    place
        .cluster
        .wait_for(&place.namespace, &what, SAID_WITHIN, async || {
            match place.get([kind, name]).await {
                Ok(object) if object["spec"] == before => Look::Done(()),
                Ok(object) => Look::NotYet(format!("{field}: {}", object["spec"])),
                Err(error) => Look::NotYet(error.to_string()),
            }
        })
        .await?;
    Ok(())
}

/// Events that tell of an edit that was undone.
async fn told(place: &Place, kind: &str) -> anyhow::Result<Vec<String>> {
    let events = place.get(["events"]).await?;
    let wanted = format!("{kind} smollm2");
    Ok(events["items"]
        .as_array()
        .context("events")?
        .iter()
        .filter(|event| event["reason"] == "Restored")
        .filter_map(|event| event["message"].as_str())
        .filter(|message| message.starts_with(&wanted))
        .map(str::to_owned)
        .collect())
}

/// Resource versions of the deployment and its children.
async fn versions(place: &Place) -> anyhow::Result<BTreeMap<String, String>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let selector = format!("llmops.dev/deployment={NAME}");
    let children = place.get([CHILDREN, "--selector", &selector]).await?;
    let itself = place.get(["ld", NAME]).await?;
    Ok(children["items"]
        .as_array()
        .context("objects")?
        .iter()
        .chain([&itself])
        .map(|object| {
            let meta = &object["metadata"];
            let name = format!("{} {}", text(&object["kind"]), text(&meta["name"]));
            (name, text(&meta["resourceVersion"]))
        })
        .collect())
}

/// Writing requests that the API server has taken, by what they wrote. A write that changes
/// nothing leaves no other trace.
async fn writes(place: &Place) -> anyhow::Result<BTreeMap<String, u64>> {
    let metrics = place.kubectl(["get", "--raw", "/metrics"]).await?;
    let mut writes = BTreeMap::new();
    for line in metrics.lines() {
        let Some((labels, count)) = line
            .strip_prefix("apiserver_request_total{")
            .and_then(|rest| rest.split_once("} "))
        else {
            continue;
        };
        let is = |name: &str, value: &str| labels.contains(&format!("{name}=\"{value}\""));
        let resource = WRITTEN.iter().find(|resource| is("resource", resource));
        let writing = ["APPLY", "PATCH", "POST", "PUT", "DELETE"];
        if let (Some(resource), true) = (resource, writing.iter().any(|verb| is("verb", verb))) {
            let count: f64 = count.trim().parse()?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a counter"
            )]
            let count = count as u64;
            *writes.entry((*resource).to_owned()).or_default() += count;
        }
    }
    ensure!(
        writes.contains_key("llamadeployments"),
        "no counter of writes"
    );
    Ok(writes)
}
