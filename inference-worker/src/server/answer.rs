//! From an HTTP request to an HTTP answer, whole or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use serde_json::Value;

use super::choice::{Choice, ChoiceEvent, Ended};
use super::generate::{self, Started};
use super::{Front, unix_seconds};
use crate::openai::request::Shown;
use crate::openai::response::{Answer, Complete, Endpoint, Piece, Usage};
use crate::openai::{ApiError, ValidRequest};
use crate::scheduler::Finish;

/// What ends a stream in OpenAI's protocol.
const DONE: &str = "[DONE]";
/// How often an idle stream says that it is alive.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Answers one request. A failure before the first token has a status of its
/// own; a later one is the stream's last event.
pub(super) async fn answer(
    front: Arc<Front>,
    endpoint: Endpoint,
    request: Request,
) -> Result<Response, ApiError> {
    front.admit()?;
    let body = front.room.read(request).await?;
    let request = match endpoint {
        Endpoint::Chat => ValidRequest::chat(&body.bytes)?,
        Endpoint::Completion => ValidRequest::completion(&body.bytes)?,
    };
    let mut answer = Answer {
        endpoint,
        id: format!(
            "{}{:016x}",
            endpoint.id_prefix(),
            RandomState::new().hash_one(body.bytes.len())
        ),
        created: unix_seconds(),
        model: request.model.clone(),
        choices: request.choices as usize,
        logprobs: request.sampling.logprobs.is_some(),
        prompt_ids: None,
        include_usage: request.shown.include_usage,
    };
    let shown = request.shown;
    let started = generate::start(&front, endpoint.prompt_field(), request).await?;
    drop(body);
    if shown.token_ids {
        answer.prompt_ids = Some(started.prompts.clone());
    }
    if shown.stream {
        stream(front, answer, started, shown).await
    } else {
        whole(&answer, started).await
    }
}

/// Counts tokens as answers end.
#[derive(Clone, Copy, Debug)]
struct Tally {
    usage: Usage,
    /// Answers to each prompt.
    choices: usize,
}

impl Tally {
    fn new(answer: &Answer, started: &Started) -> Self {
        let prompt_tokens = started.prompts.iter().map(|prompt| prompt.len()).sum();
        Self {
            usage: Usage {
                prompt_tokens,
                ..Usage::default()
            },
            choices: answer.choices.max(1),
        }
    }

    fn ended(&mut self, index: usize, ended: Ended) {
        self.usage.completion_tokens += ended.tokens;
        // Each prompt counts once, however many answers it gets.
        if index.is_multiple_of(self.choices) {
            self.usage.cached_tokens += ended.cached_tokens;
        }
    }
}

async fn whole(answer: &Answer, mut started: Started) -> Result<Response, ApiError> {
    let mut tally = Tally::new(answer, &started);
    let mut parts: Vec<Complete> = (0..started.count)
        .map(|index| Complete {
            piece: Piece {
                text: echo(answer, &started.echoes, index).unwrap_or_default(),
                ..Piece::default()
            },
            reason: Finish::Length,
        })
        .collect();
    while let Some((index, event)) = started.choices.next().await {
        let Some(part) = parts.get_mut(index) else {
            continue;
        };
        match event {
            ChoiceEvent::Piece(piece) => part.piece.extend(piece),
            ChoiceEvent::Finished(ended) => {
                part.reason = ended.reason;
                tally.ended(index, ended);
            }
            ChoiceEvent::Failed(error) => return Err(error),
        }
    }
    Ok(axum::Json(answer.whole(&parts, tally.usage)).into_response())
}

/// What stands before an answer.
fn echo(answer: &Answer, echoes: &[String], index: usize) -> Option<String> {
    echoes.get(index / answer.choices.max(1)).cloned()
}

async fn stream(
    front: Arc<Front>,
    answer: Answer,
    mut started: Started,
    shown: Shown,
) -> Result<Response, ApiError> {
    let first = match started.choices.next().await {
        Some((_, ChoiceEvent::Failed(error))) => return Err(error),
        first => first,
    };
    let mut events = Events {
        tally: Tally::new(&answer, &started),
        answer,
        choices: started.choices,
        shown,
        front,
        ready: VecDeque::new(),
        is_over: false,
    };
    for index in 0..started.count {
        if let Some(opening) = events.answer.opening(index) {
            events.tell(&opening);
        }
        if let Some(text) = echo(&events.answer, &started.echoes, index) {
            let piece = Piece {
                text,
                ..Piece::default()
            };
            let event = events.answer.piece(index, &piece);
            events.tell(&event);
        }
    }
    events.take(first);
    Ok(Sse::new(events.into_stream())
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response())
}

/// A streamed response.
struct Events {
    answer: Answer,
    choices: SelectAll<Choice>,
    tally: Tally,
    shown: Shown,
    front: Arc<Front>,
    /// What is to be sent before anything new is waited for.
    ready: VecDeque<Event>,
    /// Whether nothing follows what is ready.
    is_over: bool,
}

impl Events {
    fn into_stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        futures::stream::unfold(self, |mut events| async move {
            loop {
                if let Some(event) = events.ready.pop_front() {
                    return Some((Ok(event), events));
                }
                if events.is_over {
                    return None;
                }
                let next = events.choices.next().await;
                events.take(next);
            }
        })
    }

    /// Makes events of what one of the answers did; `None` when all are over.
    fn take(&mut self, event: Option<(usize, ChoiceEvent)>) {
        match event {
            Some((index, ChoiceEvent::Piece(piece))) => {
                let event = self.answer.piece(index, &piece);
                self.tell(&event);
            }
            Some((index, ChoiceEvent::Finished(ended))) => {
                self.tally.ended(index, ended);
                let event = self.answer.closing(index, ended.reason);
                self.tell(&event);
            }
            Some((_, ChoiceEvent::Failed(error))) => {
                self.front.metrics.refused(&error);
                self.ready.push_back(data(&error.body()));
                // Cancels the others.
                self.choices.clear();
                self.is_over = true;
            }
            None => {
                if self.shown.include_usage {
                    let usage = self.answer.usage(self.tally.usage);
                    self.ready.push_back(data(&usage));
                }
                self.ready.push_back(Event::default().data(DONE));
                self.is_over = true;
            }
        }
    }

    fn tell(&mut self, event: &Value) {
        self.ready.push_back(data(event));
    }
}

fn data(body: &Value) -> Event {
    Event::default().data(body.to_string())
}
