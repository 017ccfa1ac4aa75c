//! `/v1/responses`: from an HTTP request to a response, whole or as typed events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use axum::extract::Request;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use serde_json::Value;

use super::answer::KEEP_ALIVE;
use super::choice::{Choice, ChoiceEvent};
use super::{Front, generate, unix_seconds};
use crate::openai::response::Usage;
use crate::openai::responses::{GrowingResponse, ResponseParts};
use crate::openai::{ApiError, ResponsesRequest};

/// Answers one request. A failure before the first token has a status of its own; a
/// later one is the stream's last event.
pub(super) async fn answer(front: Arc<Front>, request: Request) -> Result<Response, ApiError> {
    front.admit()?;
    let body = front.room.read(request).await?;
    let ResponsesRequest { request, repeated } = ResponsesRequest::read(&body.bytes)?;
    let parts = ResponseParts {
        name: format!("{:016x}", RandomState::new().hash_one(body.bytes.len())),
        created: unix_seconds(),
        model: request.model.clone(),
        repeated,
        logprobs: request.sampling.logprobs.is_some(),
    };
    let stream = request.shown.stream;
    let mut started = generate::start(&front, "input", request).await?;
    drop(body);
    let first = match started.choices.next().await {
        Some((_, ChoiceEvent::Failed(error))) => return Err(error),
        first => first.map(|(_, event)| event),
    };
    let prompt_tokens = started.prompts.iter().map(|prompt| prompt.len()).sum();
    let mut growth = Growth {
        front,
        response: GrowingResponse::new(parts),
        choices: started.choices,
        prompt_tokens,
        whole: None,
        is_over: false,
    };
    growth.take(first)?;
    if stream {
        return Ok(Sse::new(events(growth))
            .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
            .into_response());
    }
    while !growth.is_over {
        growth.response.events();
        growth.next().await?;
    }
    let cut = || ApiError::failed("the answer has no end", "generation_failed");
    Ok(axum::Json(growth.whole.ok_or_else(cut)?).into_response())
}

/// A response and the answer that it grows by.
struct Growth {
    front: Arc<Front>,
    response: GrowingResponse,
    choices: SelectAll<Choice>,
    prompt_tokens: usize,
    /// The response, once it is complete.
    whole: Option<Value>,
    is_over: bool,
}

impl Growth {
    async fn next(&mut self) -> Result<(), ApiError> {
        let next = self.choices.next().await;
        self.take(next.map(|(_, event)| event))
    }

    /// Takes what the answer did.
    fn take(&mut self, event: Option<ChoiceEvent>) -> Result<(), ApiError> {
        match event {
            Some(ChoiceEvent::Piece(piece)) => self.response.grow(piece),
            Some(ChoiceEvent::Finished(ended)) => {
                let usage = Usage {
                    prompt_tokens: self.prompt_tokens,
                    completion_tokens: ended.tokens,
                    cached_tokens: ended.cached_tokens,
                };
                self.whole = Some(self.response.finish(ended.reason, usage));
                self.is_over = true;
            }
            Some(ChoiceEvent::Failed(error)) => {
                self.is_over = true;
                return Err(error);
            }
            None => self.is_over = true,
        }
        Ok(())
    }
}

/// The events of a response until it is over.
fn events(growth: Growth) -> impl Stream<Item = Result<Event, Infallible>> {
    let ready = VecDeque::new();
    futures::stream::unfold((growth, ready), |(mut growth, mut ready)| async move {
        loop {
            ready.extend(growth.response.events());
            if let Some(event) = ready.pop_front() {
                return Some((Ok(named(&event)), (growth, ready)));
            }
            if growth.is_over {
                return None;
            }
            if let Err(error) = growth.next().await {
                growth.front.metrics.refused(&error);
                growth.response.fail(&error);
            }
        }
    })
}

/// An event under its own name.
fn named(event: &Value) -> Event {
    let name = event["type"].as_str().unwrap_or_default();
    Event::default().event(name).data(event.to_string())
}
