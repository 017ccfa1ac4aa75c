//! Whole commands, against a server with fixed answers.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "support/stub.rs"]
mod stub;
mod support;

use std::time::Duration;

use anyhow::ensure;
use clap::Parser as _;
use kubectl_llama::args::Args;
use kubectl_llama::{Health, run};
use serde_json::{Value, json};
use stub::{Answer, Stub};
use support::{failing, healthy, pods};

const DEPLOYMENT: &str = "GET /apis/llmops.dev/v1alpha1/namespaces/team/llamadeployments/chat";
const DEPLOYMENTS: &str = "GET /apis/llmops.dev/v1alpha1/namespaces/team/llamadeployments?";
const PODS: &str = "GET /api/v1/namespaces/team/pods?";
const EVENTS: &str = "GET /api/v1/namespaces/team/events?";
const CHATS: &str = "POST /api/v1/namespaces/team/services/chat:http/proxy/v1/chat/completions";

fn ok(begins: &'static str, body: impl Into<String>) -> Answer {
    Answer {
        begins,
        status: 200,
        body: body.into(),
    }
}

fn list(kind: &str, items: &Value) -> String {
    json!({"apiVersion": "v1", "kind": kind, "metadata": {}, "items": items}).to_string()
}

fn all_pods() -> String {
    list("PodList", &serde_json::to_value(pods()).expect("JSON"))
}

/// Runs `line` against `stub`: what was written, and the verdict or the error.
async fn kubectl_llama(
    stub: &Stub,
    line: &str,
) -> anyhow::Result<(String, Result<Health, String>)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", stub.address)}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
    });
    std::fs::write(&path, config.to_string())?;
    let path = path.display().to_string();
    let begin = ["kubectl-llama", "--kubeconfig", &path];
    let args = Args::try_parse_from(begin.into_iter().chain(line.split(' ')))?;
    let mut out = Vec::new();
    let result = tokio::time::timeout(Duration::from_mins(1), run(args, &mut out)).await?;
    let result = result.map_err(|error| error.to_string());
    Ok((String::from_utf8(out)?, result))
}

#[tokio::test]
async fn status_tells_what_is_ready_by_its_exit_code() -> anyhow::Result<()> {
    let both = list("LlamaDeploymentList", &json!([healthy(), failing()]));
    let events = list("EventList", &json!([]));
    let stub = Stub::start(vec![
        ok(DEPLOYMENTS, both),
        ok(DEPLOYMENT, healthy().to_string()),
        ok(PODS, all_pods()),
        ok(EVENTS, events),
    ])
    .await?;
    let (text, health) = kubectl_llama(&stub, "status chat").await?;
    assert_eq!(health, Ok(Health::Good));
    ensure!(
        text.starts_with("LlamaDeployment team/chat: ready"),
        "{text}"
    );
    let (text, health) = kubectl_llama(&stub, "status").await?;
    assert_eq!((health, text.lines().count()), (Ok(Health::Bad), 3));
    let (text, _) = kubectl_llama(&stub, "status chat -o json").await?;
    let value: Value = serde_json::from_str(&text)?;
    assert_eq!(value["deployment"]["metadata"]["name"], "chat");
    assert_eq!(value["pods"].as_array().map(Vec::len), Some(4));
    let (text, _) = kubectl_llama(&stub, "status -o yaml").await?;
    ensure!(text.contains("name: chat"), "{text}");
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_named() -> anyhow::Result<()> {
    let stub = Stub::start(Vec::new()).await?;
    for command in ["status", "plan", "logs", "doctor", "bench"] {
        let (text, failed) = kubectl_llama(&stub, &format!("{command} other")).await?;
        let failed = failed.expect_err(command);
        assert_eq!(text, "");
        assert_eq!(
            failed,
            "cannot read LlamaDeployment team/other: it is not there (NotFound)"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_silent_ends_the_command() -> anyhow::Result<()> {
    // It takes connections, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let mut stub = Stub::start(Vec::new()).await?;
    stub.address = silent.local_addr()?;
    let (_, failed) = kubectl_llama(&stub, "status chat --request-timeout=1s").await?;
    assert_eq!(
        failed.expect_err("nobody answers"),
        "cannot read LlamaDeployment team/chat: no answer within 1s (--request-timeout)"
    );
    Ok(())
}

#[tokio::test]
async fn an_alternative_is_a_patch() -> anyhow::Result<()> {
    let stub = Stub::start(vec![ok(DEPLOYMENT, support::refused().to_string())]).await?;
    let (text, health) = kubectl_llama(&stub, "plan chat --alternative 1").await?;
    assert_eq!(
        (&*text, health),
        ("spec:\n  resources:\n    memory: 17Gi\n", Ok(Health::Good))
    );
    let (_, failed) = kubectl_llama(&stub, "plan chat -o json").await?;
    assert_eq!(failed, Ok(Health::Bad));
    let stub = Stub::start(vec![ok(DEPLOYMENT, healthy().to_string())]).await?;
    let (_, failed) = kubectl_llama(&stub, "plan chat --alternative 2").await?;
    assert_eq!(
        failed.expect_err("it has none"),
        "--alternative is 2, but the plan of LlamaDeployment chat has 0 alternatives"
    );
    Ok(())
}

#[tokio::test]
async fn logs_have_prefixes_and_the_failed_rank_comes_first() -> anyhow::Result<()> {
    let log = |begins, text: &str| ok(begins, text);
    let answers = vec![
        ok(DEPLOYMENT, failing().to_string()),
        log(
            "GET /api/v1/namespaces/team/pods/chat-1-1/log?",
            "one\ntwo\n",
        ),
        log("GET /api/v1/namespaces/team/pods/chat-", "three"),
        ok(PODS, all_pods()),
    ];
    let stub = Stub::start(answers).await?;
    let (text, health) = kubectl_llama(&stub, "logs chat --group 1 --since 10m --tail 5").await?;
    assert_eq!(health, Ok(Health::Good));
    assert_eq!(text, "[1/1] one\n[1/1] two\n[1/0] three\n");
    let asked = stub.asked();
    let first = asked
        .iter()
        .find(|asked| asked.contains("/log?"))
        .expect("one");
    for word in ["container=worker", "sinceSeconds=600", "tailLines=5"] {
        ensure!(first.contains(word), "{first}");
    }
    ensure!(!first.contains("follow"), "{first}");
    let (text, _) = kubectl_llama(&stub, "logs chat -f").await?;
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "[0/0] three",
            "[0/1] three",
            "[1/0] three",
            "[1/1] one",
            "[1/1] two"
        ]
    );
    Ok(())
}

fn stream(end: &str) -> String {
    let text = |word: &str| {
        format!(
            "data: {}\n\n",
            json!({"choices": [{"delta": {"content": word}}]})
        )
    };
    format!("{}{}{}{end}", text(""), text("a"), text("b"))
}

#[tokio::test]
async fn bench_measures_every_chat() -> anyhow::Result<()> {
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 2}});
    let good = stream(&format!("data: {usage}\n\ndata: [DONE]\n\n"));
    let stub = Stub::start(vec![ok(DEPLOYMENT, healthy().to_string()), ok(CHATS, good)]).await?;
    let line = "bench chat --requests 7 --concurrency 3 --prompt-tokens 30 --max-tokens 2 -o json";
    let (text, health) = kubectl_llama(&stub, line).await?;
    assert_eq!(health, Ok(Health::Good));
    let figures: Value = serde_json::from_str(&text)?;
    assert_eq!(
        (&figures["requests"], &figures["answered"]),
        (&json!(7), &json!(7))
    );
    assert_eq!(
        (&figures["promptTokens"], &figures["answerTokens"]),
        (&json!(40.0), &json!(2.0))
    );
    ensure!(figures["firstTextMs"]["p99"].is_number(), "{figures}");
    let sent: Vec<Value> = stub
        .asked()
        .iter()
        .filter_map(|asked| asked.strip_prefix(CHATS)?.trim().parse().ok())
        .collect();
    assert_eq!(sent.len(), 7);
    assert_eq!(sent[0]["model"], "llama-3.1-8b");
    assert_eq!(sent[0]["max_tokens"], 2);
    Ok(())
}

#[tokio::test]
async fn bench_counts_errors_and_says_them() -> anyhow::Result<()> {
    let cases = [
        (200, stream(""), "2 times: the stream ended before the answer did"),
        (
            200,
            stream("data: {\"error\": {\"message\": \"rank 1 died\"}}\n\n"),
            "2 times: rank 1 died",
        ),
        (
            429,
            json!({"kind": "Status", "status": "Failure", "message": "busy", "reason": "TooManyRequests", "code": 429}).to_string(),
            "2 times: 429: busy",
        ),
        (
            400,
            json!({"error": {"message": "the prompt is too long", "type": "x"}}).to_string(),
            "2 times: 400: the prompt is too long",
        ),
        (502, "bad\ngateway".to_owned(), "2 times: 502: bad gateway"),
    ];
    for (status, body, expected) in cases {
        let chats = Answer {
            begins: CHATS,
            status,
            body,
        };
        let stub = Stub::start(vec![ok(DEPLOYMENT, healthy().to_string()), chats]).await?;
        let (text, health) = kubectl_llama(&stub, "bench chat --requests 2").await?;
        assert_eq!(health, Ok(Health::Bad));
        ensure!(
            text.contains(expected) && text.starts_with("0 of 2 chats"),
            "{text}"
        );
        assert_eq!(stub.asked().len(), 3, "nothing is sent twice");
    }
    Ok(())
}
