//! One answer on its way: what the engine says becomes pieces of text.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures::Stream;
use tokio::sync::OwnedSemaphorePermit;

use super::group_failed;
use super::writer::{Writer, Written};
use crate::engine::{Generation, GenerationEvent, TokenLogprobs};
use crate::metrics::Metrics;
use crate::openai::ApiError;
use crate::openai::response::Piece;
use crate::scheduler::{Finish, Refusal};
use crate::tools::{ToolDelta, ToolStream};

/// What an answer does next.
#[derive(Debug)]
pub(super) enum ChoiceEvent {
    /// More of it.
    Piece(Piece),
    /// The end.
    Finished(Ended),
    /// It cannot be completed.
    Failed(ApiError),
}

/// How an answer ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) reason: Finish,
    /// Tokens of the answer.
    pub(super) tokens: usize,
    /// Tokens of its prompt that did not have to be computed.
    pub(super) cached_tokens: usize,
}

/// An answer on its way: a stream of its place among the answers of the request and
/// what it does next. Dropping it cancels it.
#[derive(Debug)]
pub(super) struct Choice {
    index: usize,
    /// `None` once the answer is over.
    generation: Option<Generation>,
    writer: Writer,
    /// The prompt, until it was shown with its probabilities.
    prompt: Option<ShownPrompt>,
    /// Whether only the prompt was asked for.
    hides_answer: bool,
    /// Reads calls, where the model may call.
    calls: Option<ToolStream>,
    /// What is to be told before anything new is taken.
    ready: VecDeque<Piece>,
    ending: Option<Finish>,
    tokens: usize,
    cached_tokens: usize,
    metrics: Arc<Metrics>,
    /// The field to blame when the prompt is too long.
    prompt_field: &'static str,
    begun: Instant,
    /// When the first token came, and the last.
    first_token: Option<Instant>,
    last_token: Instant,
    /// Held until the answer is over.
    _permit: OwnedSemaphorePermit,
}

/// A prompt that is shown before its answer, with the probabilities of its tokens.
#[derive(Debug)]
pub(super) struct ShownPrompt {
    pub(super) tokens: Arc<[u32]>,
    pub(super) text: String,
    pub(super) logprobs: Vec<TokenLogprobs>,
}

/// What a [`Choice`] is made of besides its generation.
pub(super) struct ChoiceParts {
    pub(super) index: usize,
    pub(super) writer: Writer,
    pub(super) prompt: Option<ShownPrompt>,
    pub(super) hides_answer: bool,
    pub(super) calls: Option<ToolStream>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) prompt_field: &'static str,
    pub(super) begun: Instant,
    pub(super) permit: OwnedSemaphorePermit,
}

impl Choice {
    pub(super) fn new(generation: Generation, parts: ChoiceParts) -> Self {
        Self {
            index: parts.index,
            generation: Some(generation),
            writer: parts.writer,
            prompt: parts.prompt,
            hides_answer: parts.hides_answer,
            calls: parts.calls,
            ready: VecDeque::new(),
            ending: None,
            tokens: 0,
            cached_tokens: 0,
            metrics: parts.metrics,
            prompt_field: parts.prompt_field,
            begun: parts.begun,
            first_token: None,
            last_token: parts.begun,
            _permit: parts.permit,
        }
    }

    /// Takes what the engine said.
    fn take(&mut self, event: Option<GenerationEvent>) -> Result<(), ApiError> {
        let mut piece = match &event {
            Some(GenerationEvent::Token { .. } | GenerationEvent::Finished { .. }) => {
                self.show_prompt()
            }
            _ => Piece::default(),
        };
        let (written, reason) = match event {
            Some(GenerationEvent::Prompt(logprobs)) => {
                if let Some(prompt) = &mut self.prompt {
                    prompt.logprobs.extend(logprobs);
                }
                return Ok(());
            }
            // The engine answers with one token at least.
            Some(GenerationEvent::Token { .. }) if self.hides_answer => {
                self.ready.push_back(piece);
                return Ok(());
            }
            Some(GenerationEvent::Token {
                token,
                cached_tokens,
                logprobs,
            }) => {
                self.cached_tokens = cached_tokens as usize;
                let now = Instant::now();
                self.metrics
                    .token(self.tokens == 0, now.duration_since(self.last_token));
                self.last_token = now;
                self.first_token.get_or_insert(now);
                self.tokens += 1;
                (self.writer.push(token, logprobs), None)
            }
            Some(GenerationEvent::Finished {
                reason,
                cached_tokens,
            }) => {
                self.cached_tokens = cached_tokens as usize;
                let reason = if self.hides_answer {
                    Finish::Length
                } else {
                    reason
                };
                (self.writer.finish(), Some(reason))
            }
            Some(GenerationEvent::Refused(refusal)) => return Err(self.refused(&refusal)),
            Some(GenerationEvent::Failed(message)) => {
                return Err(ApiError::failed(message, "generation_failed"));
            }
            Some(GenerationEvent::GroupFailed(report)) => return Err(group_failed(&report)),
            None => {
                return Err(ApiError::shutting_down(" and did not finish the answer"));
            }
        };
        let Written {
            piece: more,
            stopped,
        } = written;
        piece.extend(more);
        self.ending = if stopped { Some(Finish::Stop) } else { reason };
        if self.ending.is_some() {
            // Cancels what the engine may still compute.
            self.generation = None;
        }
        self.read_calls(piece);
        Ok(())
    }

    /// Counts the answer, which is complete, and how fast it was.
    fn note_end(&self, reason: Finish) {
        let first = self.first_token;
        let gaps = u32::try_from(self.tokens.saturating_sub(1)).unwrap_or(u32::MAX);
        let between = first
            .filter(|_| gaps > 0)
            .map(|first| self.last_token.duration_since(first) / gaps);
        self.metrics.finished(
            reason,
            self.begun.elapsed(),
            first.map(|first| first.duration_since(self.begun)),
            between,
        );
    }

    /// The prompt, where it is shown and was not yet.
    fn show_prompt(&mut self) -> Piece {
        let prompt = self.prompt.take();
        prompt.map_or_else(Piece::default, |prompt| {
            self.writer
                .prompt(&prompt.tokens, prompt.text, prompt.logprobs)
        })
    }

    /// Takes calls out of the text of a piece. Text behind a call makes a new piece.
    fn read_calls(&mut self, mut piece: Piece) {
        let Some(calls) = &mut self.calls else {
            self.ready.push_back(piece);
            return;
        };
        let text = std::mem::take(&mut piece.text);
        let mut deltas = calls.push(&text);
        if let Some(reason) = &mut self.ending {
            deltas.extend(calls.finish());
            if *reason == Finish::Stop && calls.calls() > 0 {
                *reason = Finish::ToolCalls;
            }
        }
        for delta in deltas {
            match delta {
                ToolDelta::Content(text) => {
                    if !piece.calls.is_empty() {
                        self.ready.push_back(std::mem::take(&mut piece));
                    }
                    piece.text.push_str(&text);
                }
                call => piece.calls.push(call),
            }
        }
        self.ready.push_back(piece);
    }

    fn refused(&self, refusal: &Refusal) -> ApiError {
        match refusal {
            Refusal::QueueFull { .. } | Refusal::QueueTokens { .. } => {
                ApiError::overloaded(refusal.to_string())
            }
            Refusal::Length { .. } => {
                ApiError::context_length(self.prompt_field, refusal.to_string())
            }
        }
    }
}

impl Stream for Choice {
    type Item = (usize, ChoiceEvent);

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(piece) = this.ready.pop_front() {
                if piece.is_empty() {
                    continue;
                }
                return Poll::Ready(Some((this.index, ChoiceEvent::Piece(piece))));
            }
            if let Some(reason) = this.ending.take() {
                this.note_end(reason);
                let ended = Ended {
                    reason,
                    tokens: this.tokens,
                    cached_tokens: this.cached_tokens,
                };
                return Poll::Ready(Some((this.index, ChoiceEvent::Finished(ended))));
            }
            let Some(generation) = &mut this.generation else {
                return Poll::Ready(None);
            };
            let said = ready!(generation.poll_next(context));
            if let Err(error) = this.take(said) {
                this.generation = None;
                return Poll::Ready(Some((this.index, ChoiceEvent::Failed(error))));
            }
        }
    }
}
