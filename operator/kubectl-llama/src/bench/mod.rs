//! `kubectl llama bench`: streaming chats through the API server, measured.

pub mod chunk;
pub mod figures;

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use futures::{AsyncBufReadExt as _, AsyncReadExt as _, TryStreamExt as _};
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderValue, Request};
use http_body_util::BodyExt as _;
use kube::client::Body;
use kube::{Client, ResourceExt};
use llama_contract::API_PORT_NAME;
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::names;
use serde_json::json;

use chunk::Chunk;
use figures::{Chat, Figures, Outcome};

use crate::Health;
use crate::args::BenchFlags;
use crate::cluster::Cluster;
use crate::error::{Error, problem};
use crate::output::formed;

/// Longest chat, unless flags say another.
const DEADLINE: Duration = Duration::from_mins(5);
/// Most bytes of one line of a stream.
const LINE: u64 = 1 << 20;

/// What is sent, and where to.
struct Load {
    client: Client,
    uri: String,
    model: String,
    prompt_words: u32,
    max_tokens: u32,
    deadline: Duration,
}

/// Measures the LlamaDeployment that `flags` name.
pub async fn run(
    cluster: &Cluster,
    flags: &BenchFlags,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    let deployment = cluster.deployment(&flags.name).await?;
    let load = Load {
        client: cluster.plain_client()?,
        uri: uri(&deployment),
        model: served_name(&deployment),
        prompt_words: flags.prompt_tokens,
        max_tokens: flags.max_tokens,
        deadline: cluster.request_timeout.unwrap_or(DEADLINE),
    };
    let begun = Instant::now();
    let next = AtomicU32::new(0);
    let lanes = u32::from(flags.concurrency).min(flags.requests);
    let lanes = (0..lanes).map(|_| lane(&load, flags, &next, begun));
    let outcomes = join_all(lanes).await.concat();
    let figures = Figures::of(&outcomes, begun.elapsed());
    let text = match flags.output {
        Some(form) => formed(&figures, form)?,
        None => figures.page(),
    };
    out.write_all(text.as_bytes())?;
    Ok(Health::of(figures.errors.is_empty()))
}

/// One chat after the other, until all were begun.
async fn lane(load: &Load, flags: &BenchFlags, next: &AtomicU32, begun: Instant) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let is_late = flags.duration.is_some_and(|most| begun.elapsed() >= most);
        if number >= flags.requests || is_late {
            return outcomes;
        }
        let chat = tokio::time::timeout(load.deadline, chat(load, number)).await;
        let late = || {
            format!(
                "not answered within {:?} (--request-timeout)",
                load.deadline
            )
        };
        outcomes.push(chat.unwrap_or_else(|_| Err(late())));
    }
}

async fn chat(load: &Load, number: u32) -> Outcome {
    let sent = Instant::now();
    let answer = load.client.send(request(load, number)?).await;
    let answer = answer.map_err(|error| problem(&error))?;
    let status = answer.status();
    let body = answer.into_body().into_data_stream();
    let mut stream = std::pin::pin!(body.map_err(std::io::Error::other).into_async_read());
    if !status.is_success() {
        // kube would look for a Status of the API server in what is the worker's answer.
        let mut text = Vec::new();
        let read = (&mut stream).take(LINE).read_to_end(&mut text).await;
        read.map_err(|error| format!("{}: no body: {error}", status.as_u16()))?;
        return Err(chunk::refusal(
            status.as_u16(),
            &String::from_utf8_lossy(&text),
        ));
    }
    let mut chat = Chat::default();
    loop {
        let mut line = String::new();
        let mut bounded = (&mut stream).take(LINE);
        let read = bounded.read_line(&mut line).await;
        if read.map_err(|error| format!("the stream broke: {error}"))? == 0 {
            return Err("the stream ended before the answer did".to_owned());
        }
        match chunk::read(line.trim_end()) {
            Chunk::Text => chat.texts.push(sent.elapsed()),
            Chunk::Usage { prompt, answer } => {
                (chat.prompt_tokens, chat.answer_tokens) = (prompt, answer);
            }
            Chunk::Failed(message) => return Err(message),
            Chunk::Done => return Ok(chat),
            Chunk::Other => {}
        }
    }
}

fn request(load: &Load, number: u32) -> Result<Request<Body>, String> {
    let body = json!({
        "model": load.model,
        "messages": [{"role": "user", "content": prompt(number, load.prompt_words)}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut request = Request::post(&load.uri)
        .body(Body::from(body.to_string().into_bytes()))
        .map_err(|error| format!("{} is no address: {error}", load.uri))?;
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
    Ok(request)
}

/// The API server's way to the chats of `deployment`.
fn uri(deployment: &LlamaDeployment) -> String {
    format!(
        "/api/v1/namespaces/{}/services/{}:{API_PORT_NAME}/proxy/v1/chat/completions",
        deployment.namespace().unwrap_or_default(),
        names::client_service(&deployment.name_any())
    )
}

fn served_name(deployment: &LlamaDeployment) -> String {
    let status = deployment.status.as_ref();
    let served = status.and_then(|status| status.served_name.clone());
    served.unwrap_or_else(|| deployment.name_any())
}

/// The text of chat `number`, of `words` words. Each begins differently: what a worker has
/// cached of one does not help it with another.
fn prompt(number: u32, words: u32) -> String {
    const WORDS: [&str; 12] = [
        "the", "river", "runs", "past", "an", "old", "mill", "and", "then", "to", "the", "sea",
    ];
    let word = |place: u32| match place {
        0 => number.to_string(),
        place => {
            let index = (place + number) as usize % WORDS.len();
            WORDS[index].to_owned()
        }
    };
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_their_length_and_begin_differently() {
        assert_eq!(prompt(3, 5).split(' ').count(), 5);
        assert!(prompt(3, 5).starts_with("3 ") && prompt(4, 5).starts_with("4 "));
    }

    #[test]
    fn chats_go_through_the_service_proxy() {
        let deployment: LlamaDeployment = serde_json::from_value(json!({
            "metadata": {"name": "m", "namespace": "team"},
            "spec": {
                "model": {"source": {}},
                "resources": {"accelerator": "Cpu", "cpu": "1", "memory": "1Gi"},
            },
        }))
        .expect("a deployment");
        assert_eq!(
            uri(&deployment),
            "/api/v1/namespaces/team/services/m:http/proxy/v1/chat/completions"
        );
        assert_eq!(served_name(&deployment), "m");
    }
}
