//! A LlamaDeployment from `kubectl apply` to its end, with the real model.

mod support;

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use support::{OPENAI_PYTHON_VARIABLE, Place, deployment, place, repository};
use tokio::process::Command;

const NAME: &str = "smollm2";
/// The prompts whose greedy answer does not hang on the last bit of a logit.
const STABLE_CASES: usize = 3;

#[tokio::test]
async fn three_ranks_serve_chat_scale_and_leave_nothing() -> anyhow::Result<()> {
    let Some(place) = place("e2e-serving").await? else {
        return Ok(());
    };
    place.apply(deployment(NAME, |_| ())).await?;
    place.wait_ready(NAME, 1).await?;

    one_look_tells_what_runs(&place).await?;
    three_processes_compute(&place).await?;
    every_field_is_explained(&place).await?;
    greedy_answers_are_the_golden_ones(&place).await?;
    the_openai_client_chats(&place).await?;
    the_openai_client_gets_responses(&place).await?;
    scale_makes_and_removes_groups(&place).await?;

    place
        .kubectl(["delete", "ld", NAME, "--wait=false"])
        .await?;
    place.wait_gone(NAME).await?;
    place.remove_namespace().await
}

#[tokio::test]
async fn foreground_deletion_leaves_nothing_either() -> anyhow::Result<()> {
    let Some(place) = place("e2e-foreground").await? else {
        return Ok(());
    };
    place.apply(deployment(NAME, |_| ())).await?;
    place.wait_ready(NAME, 1).await?;
    place
        .kubectl([
            "delete",
            "ld",
            NAME,
            "--cascade=foreground",
            "--timeout=100s",
        ])
        .await?;
    place.wait_gone(NAME).await?;
    place.remove_namespace().await
}

async fn one_look_tells_what_runs(place: &Place) -> anyhow::Result<()> {
    let table = place.kubectl(["get", "ld"]).await?;
    let words: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure!(words.len() == 2, "{table}");
    ensure!(
        words[0]
            == [
                "NAME", "READY", "REASON", "DESIRED", "UP", "TENSOR", "MODEL", "AGE"
            ],
        "{table}"
    );
    ensure!(
        words[1][..2] == [NAME, "True"] && words[1][3..7] == ["1", "1", "3", NAME],
        "{table}"
    );
    Ok(())
}

async fn three_processes_compute(place: &Place) -> anyhow::Result<()> {
    let processes = place
        .cluster
        .processes(&place.namespace, &format!("{NAME}-0-0"), "worker")
        .await?;
    let ranks = processes
        .iter()
        .filter(|process| process.arguments.get(1).is_some_and(|word| word == "rank"))
        .count();
    ensure!(ranks == 3, "{processes:?}");
    Ok(())
}

async fn every_field_is_explained(place: &Place) -> anyhow::Result<()> {
    for field in [
        "ld.spec",
        "ld.spec.model.source.image.path",
        "ld.status.groups.lastFailure.rank",
    ] {
        let page = place.kubectl(["explain", field]).await?;
        ensure!(
            !page.contains("<empty>") && !page.contains("<no description>"),
            "{page}"
        );
    }
    Ok(())
}

async fn greedy_answers_are_the_golden_ones(place: &Place) -> anyhow::Result<()> {
    let file = repository().join("inference-worker/model/tests/golden/smollm2-135m-q4_1.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(file)?)?;
    let forward = place.forward(NAME).await?;
    let mut equal = 0;
    for case in golden["cases"].as_array().context("cases")? {
        let prompt = case["prompt"].as_str().context("a prompt")?;
        let tokens = case["greedy_ids"].as_array().context("ids")?.len();
        let text = forward.complete(NAME, prompt, tokens).await?;
        equal += usize::from(case["text"] == text);
    }
    ensure!(
        equal >= STABLE_CASES,
        "only {equal} answers are the golden ones"
    );
    Ok(())
}

/// What a script of `e2e/clients` says of the deployment; `None` where no Python has the
/// openai package.
async fn openai_client(place: &Place, script: &str) -> anyhow::Result<Option<Value>> {
    let Ok(python) = std::env::var(OPENAI_PYTHON_VARIABLE) else {
        eprintln!("skipped: {OPENAI_PYTHON_VARIABLE} names no Python with the openai package");
        return Ok(None);
    };
    let forward = place.forward(NAME).await?;
    let output = Command::new(python)
        .arg(repository().join("e2e/clients").join(script))
        .args([&forward.url(), NAME])
        .output()
        .await?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

async fn the_openai_client_gets_responses(place: &Place) -> anyhow::Result<()> {
    let Some(said) = openai_client(place, "openai_responses.py").await? else {
        return Ok(());
    };
    let whole = said["whole"].as_str().context("an answer")?;
    ensure!(whole.contains("Paris"), "{said}");
    for same in ["pieces", "accumulated", "told"] {
        ensure!(said[same] == whole, "{said}");
    }
    let events = said["events"].as_array().context("events")?;
    ensure!(
        events.first() == Some(&json!("response.created"))
            && events.last() == Some(&json!("response.completed")),
        "{said}"
    );
    ensure!(
        said["numbers"] == json!((0..events.len()).collect::<Vec<_>>()),
        "{said}"
    );
    ensure!(
        said["stream_usage"]["input_tokens_details"]["cached_tokens"]
            .as_u64()
            .is_some_and(|cached| cached > 0),
        "{said}"
    );
    ensure!(
        said["cut"] == json!(["incomplete", "max_output_tokens"]),
        "{said}"
    );
    let call = &said["call"];
    ensure!(
        call[0] == "function_call" && call[1] == "get_weather" && call[2]["city"].is_string(),
        "{said}"
    );
    ensure!(
        said["call_pieces"] == true && said["store"] == false,
        "{said}"
    );
    ensure!(
        !said["answered"].is_null() && said["cat"]["age"].is_u64(),
        "{said}"
    );
    ensure!(
        said["refusals"] == json!(["background", "previous_response_id"]),
        "{said}"
    );
    Ok(())
}

async fn the_openai_client_chats(place: &Place) -> anyhow::Result<()> {
    let Some(said) = openai_client(place, "openai_chat.py").await? else {
        return Ok(());
    };
    let whole = said["whole"].as_str().context("an answer")?;
    let pieces: Vec<&str> = said["pieces"]
        .as_array()
        .context("pieces")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    ensure!(whole.contains("Paris"), "{said}");
    ensure!(pieces.len() > 1 && pieces.concat() == whole, "{said}");
    let (usage, streamed) = (&said["usage"], &said["stream_usage"]);
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        ensure!(
            usage[count].is_u64() && usage[count] == streamed[count],
            "{said}"
        );
    }
    // The second request begins as the first did.
    let cached = &streamed["prompt_tokens_details"]["cached_tokens"];
    ensure!(cached.as_u64().is_some_and(|cached| cached > 0), "{said}");
    ensure!(said["finish_reason"] == "stop", "{said}");
    ensure!(said["models"] == json!([NAME]), "{said}");
    ensure!(
        said["completion"]
            .as_str()
            .is_some_and(|text| text.contains("Paris")),
        "{said}"
    );
    ensure!(
        said["refusal"]
            .as_str()
            .is_some_and(|why| why.contains("no-such-model")),
        "{said}"
    );
    Ok(())
}

async fn scale_makes_and_removes_groups(place: &Place) -> anyhow::Result<()> {
    place
        .kubectl(["scale", "ld/smollm2", "--replicas=2"])
        .await?;
    let object = place.wait_ready(NAME, 2).await?;
    let selector = object["status"]["selector"]
        .as_str()
        .context("a selector")?;
    let leaders = place.get(["pods", "--selector", selector]).await?;
    let names: BTreeSet<&str> = leaders["items"]
        .as_array()
        .context("pods")?
        .iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .collect();
    ensure!(
        names == BTreeSet::from(["smollm2-0-0", "smollm2-1-0"]),
        "{names:?}"
    );
    place
        .kubectl(["scale", "ld/smollm2", "--replicas=1"])
        .await?;
    place.wait_ready(NAME, 1).await?;
    Ok(())
}
