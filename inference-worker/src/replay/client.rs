//! One request to an OpenAI endpoint, and what came when.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, Uri, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::events::{EventReader, EventTooLong};
use super::trace::Replayed;

/// Where requests go.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) uri: Uri,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) model: String,
    pub(super) key: Option<String>,
    pub(super) deadline: Duration,
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answer {
    /// Seconds from request to the first piece of text.
    pub(super) first: Option<f64>,
    /// Seconds between pieces.
    pub(super) between: Vec<f64>,
    /// Seconds from request to the end.
    pub(super) whole: f64,
    /// As the server counted.
    pub(super) prompt_tokens: u64,
    /// Those of them that it had in its cache.
    pub(super) cached_tokens: u64,
    /// As the server counted.
    pub(super) completion_tokens: u64,
}

/// Why there is no answer, in few words, to be counted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    #[error("cannot connect")]
    Connect,
    #[error("status {0}")]
    Status(u16),
    #[error("the connection broke")]
    Broken,
    #[error("the answer is not a stream of events")]
    Malformed,
    #[error("the stream ended with an error")]
    Failed,
    #[error("no end within the deadline")]
    Deadline,
}

impl From<EventTooLong> for RequestError {
    fn from(_: EventTooLong) -> Self {
        Self::Malformed
    }
}

/// Sends `request` and reads the answer to its end.
pub(super) async fn ask(endpoint: &Endpoint, request: &Replayed) -> Result<Answer, RequestError> {
    tokio::time::timeout(endpoint.deadline, stream(endpoint, request))
        .await
        .unwrap_or(Err(RequestError::Deadline))
}

async fn stream(endpoint: &Endpoint, request: &Replayed) -> Result<Answer, RequestError> {
    let begun = Instant::now();
    let address = (endpoint.host.as_str(), endpoint.port);
    let socket = TcpStream::connect(address)
        .await
        .map_err(|_| RequestError::Connect)?;
    let broken = |_: hyper::Error| RequestError::Broken;
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
        .await
        .map_err(broken)?;
    let connection = tokio::spawn(connection);
    let response = sender
        .send_request(http_request(endpoint, request)?)
        .await
        .map_err(broken)?;
    if !response.status().is_success() {
        return Err(RequestError::Status(response.status().as_u16()));
    }
    let mut events = Events::new(begun);
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(broken)?.into_data() {
            events.push(&data)?;
        }
    }
    connection.abort();
    events.finish()
}

fn http_request(
    endpoint: &Endpoint,
    request: &Replayed,
) -> Result<Request<Full<Bytes>>, RequestError> {
    let body = json!({
        "model": endpoint.model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut builder = Request::post(endpoint.uri.clone())
        .header(header::HOST, format!("{}:{}", endpoint.host, endpoint.port))
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = &endpoint.key {
        builder = builder.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    builder
        .body(Full::new(Bytes::from(body.to_string())))
        .map_err(|_| RequestError::Malformed)
}

/// Server-sent events of one answer.
struct Events {
    reader: EventReader,
    record: Record,
}

/// What the events of an answer came to.
struct Record {
    begun: Instant,
    last: Option<Instant>,
    answer: Answer,
    is_done: bool,
}

impl Events {
    fn new(begun: Instant) -> Self {
        Self {
            reader: EventReader::default(),
            record: Record {
                begun,
                last: None,
                answer: Answer::default(),
                is_done: false,
            },
        }
    }

    fn push(&mut self, data: &[u8]) -> Result<(), RequestError> {
        let Self { reader, record } = self;
        reader.push(data, |event| record.take(event, Instant::now()))
    }

    fn finish(self) -> Result<Answer, RequestError> {
        if self.record.is_done {
            Ok(self.record.answer)
        } else {
            Err(RequestError::Broken)
        }
    }
}

impl Record {
    fn take(&mut self, event: &[u8], now: Instant) -> Result<(), RequestError> {
        let event = event.trim_ascii();
        if event == b"[DONE]" {
            self.is_done = true;
            self.answer.whole = (now - self.begun).as_secs_f64();
            return Ok(());
        }
        let event: Value = serde_json::from_slice(event).map_err(|_| RequestError::Malformed)?;
        if !event["error"].is_null() {
            return Err(RequestError::Failed);
        }
        let usage = &event["usage"];
        if let Some(tokens) = usage["completion_tokens"].as_u64() {
            self.answer.completion_tokens = tokens;
            self.answer.prompt_tokens = usage["prompt_tokens"].as_u64().unwrap_or(0);
            let details = &usage["prompt_tokens_details"];
            self.answer.cached_tokens = details["cached_tokens"].as_u64().unwrap_or(0);
        }
        let text = event["choices"][0]["text"].as_str();
        if text.is_some_and(|text| !text.is_empty()) {
            match self.last.replace(now) {
                None => self.answer.first = Some((now - self.begun).as_secs_f64()),
                Some(last) => self.answer.between.push((now - last).as_secs_f64()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(pieces: &[&str]) -> Result<Answer, RequestError> {
        let mut events = Events::new(Instant::now());
        for piece in pieces {
            events.push(piece.as_bytes())?;
        }
        events.finish()
    }

    #[test]
    fn events_are_counted_wherever_they_are_cut() {
        let text = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n\
            data: {\"choices\":[{\"text\":\"\"}]}\r\n\r\n\
            : comment\n\n\
            data: {\"choices\":[{\"text\":\"b\"}]}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\
            \"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\ndata: [DONE]\n\n";
        for cut in 0..text.len() {
            let (before, behind) = text.split_at(cut);
            let answer = answer(&[before, behind]).expect("whole");
            let tokens = (
                answer.prompt_tokens,
                answer.cached_tokens,
                answer.completion_tokens,
            );
            assert_eq!(tokens, (9, 8, 2));
            assert!(answer.first.is_some() && answer.between.len() == 1);
        }
    }

    #[test]
    fn what_is_no_answer_is_named() {
        assert_eq!(answer(&["data: {}\n\n"]), Err(RequestError::Broken));
        assert_eq!(answer(&["data: x\n\n"]), Err(RequestError::Malformed));
        assert_eq!(
            answer(&["data: {\"error\":{}}\n\n"]),
            Err(RequestError::Failed)
        );
    }
}
