//! From an HTTP request to an HTTP answer, whole or as server-sent events.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::Request;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use serde_json::Value;

use super::generate::{self, TextEvent, TextStream};
use super::{Front, MAX_BODY_BYTES, unix_seconds};
use crate::openai::response::{Answer, Endpoint};
use crate::openai::{ApiError, ValidRequest};

/// What ends a stream in OpenAI's protocol.
const DONE: &str = "[DONE]";
/// How often an idle stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Answers one request. A failure before the first token has a status of its
/// own; a later one is the stream's last event.
pub(super) async fn answer(
    front: Arc<Front>,
    endpoint: Endpoint,
    request: Request,
) -> Result<Response, ApiError> {
    front.admit()?;
    let body = to_bytes(request.into_body(), MAX_BODY_BYTES)
        .await
        .map_err(|_too_long| ApiError::body_too_long(MAX_BODY_BYTES))?;
    let request = match endpoint {
        Endpoint::Chat => ValidRequest::chat(&body)?,
        Endpoint::Completion => ValidRequest::completion(&body)?,
    };
    let answer = Answer {
        endpoint,
        id: format!(
            "{}{:016x}",
            endpoint.id_prefix(),
            RandomState::new().hash_one(body.len())
        ),
        created: unix_seconds(),
        model: request.model.clone(),
    };
    let (stream, include_usage) = (request.stream, request.include_usage);
    let mut text = generate::start(&front, request).await?;
    if !stream {
        return whole(&answer, &mut text).await;
    }
    let first = text.next().await;
    if let TextEvent::Failed(error) = first {
        return Err(error);
    }
    let events = Events {
        answer,
        text,
        include_usage,
        front,
        next: Next::Opening(first),
    };
    Ok(Sse::new(events.into_stream())
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response())
}

async fn whole(answer: &Answer, text: &mut TextStream) -> Result<Response, ApiError> {
    let mut content = String::new();
    loop {
        match text.next().await {
            TextEvent::Piece(piece) => content.push_str(&piece),
            TextEvent::Finished(reason) => {
                let body = answer.whole(&content, reason, text.usage());
                return Ok(axum::Json(body).into_response());
            }
            TextEvent::Failed(error) => return Err(error),
        }
    }
}

/// What a stream sends next.
enum Next {
    Opening(TextEvent),
    Text(TextEvent),
    Wait,
    Usage,
    Done,
    Nothing,
}

/// A streamed answer.
struct Events {
    answer: Answer,
    text: TextStream,
    include_usage: bool,
    front: Arc<Front>,
    next: Next,
}

impl Events {
    fn into_stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        futures::stream::unfold(self, |mut events| async move {
            let event = events.next_event().await?;
            Some((Ok(event), events))
        })
    }

    async fn next_event(&mut self) -> Option<Event> {
        loop {
            match std::mem::replace(&mut self.next, Next::Wait) {
                Next::Opening(first) => {
                    self.next = Next::Text(first);
                    if let Some(opening) = self.answer.opening() {
                        return Some(data(&opening));
                    }
                }
                Next::Wait => self.next = Next::Text(self.text.next().await),
                Next::Text(TextEvent::Piece(piece)) => {
                    return Some(data(&self.answer.piece(&piece)));
                }
                Next::Text(TextEvent::Finished(reason)) => {
                    self.next = if self.include_usage {
                        Next::Usage
                    } else {
                        Next::Done
                    };
                    return Some(data(&self.answer.closing(reason)));
                }
                Next::Text(TextEvent::Failed(error)) => {
                    self.front.metrics.refused(error.status);
                    self.next = Next::Nothing;
                    return Some(data(&error.body()));
                }
                Next::Usage => {
                    self.next = Next::Done;
                    return Some(data(&self.answer.usage(self.text.usage())));
                }
                Next::Done => {
                    self.next = Next::Nothing;
                    return Some(Event::default().data(DONE));
                }
                Next::Nothing => {
                    self.next = Next::Nothing;
                    return None;
                }
            }
        }
    }
}

fn data(body: &Value) -> Event {
    Event::default().data(body.to_string())
}
