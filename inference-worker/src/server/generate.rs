//! From a checked request to pieces of text.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use llama_model::text::{Conversation, Detokenizer, Special, TextError, Tokenizer};
use tokio::sync::OwnedSemaphorePermit;

use super::{Front, group_failed};
use crate::engine::{Generation, GenerationEvent, Submit, SubmitError};
use crate::metrics::Metrics;
use crate::openai::response::Usage;
use crate::openai::{ApiError, Prompt, StopMatcher, ValidRequest};
use crate::scheduler::{Finish, Refusal};

/// What an answer's text does next.
#[derive(Debug)]
pub(super) enum TextEvent {
    /// More text.
    Piece(String),
    /// The end.
    Finished(Finish),
    /// The answer cannot be completed.
    Failed(ApiError),
}

/// An answer on its way.
#[derive(Debug)]
pub(super) struct TextStream {
    generation: Generation,
    tokenizer: Arc<Tokenizer>,
    metrics: Arc<Metrics>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Text to show before the end, and the end.
    ending: Option<Finish>,
    usage: Usage,
    max_tokens: u32,
    begun: Instant,
    last_token: Instant,
    /// Held until the answer is over.
    _permit: OwnedSemaphorePermit,
}

/// Hands `request` to the engine.
///
/// # Errors
/// When it names another model, does not fit the context, or too many requests
/// are open.
pub(super) async fn start(
    front: &Arc<Front>,
    request: ValidRequest,
) -> Result<TextStream, ApiError> {
    let begun = Instant::now();
    if request.model != front.served_name {
        return Err(ApiError::model_not_found(
            &request.model,
            &front.served_name,
        ));
    }
    let permit = Arc::clone(&front.permits)
        .try_acquire_owned()
        .map_err(|_none_left| ApiError::overloaded("too many requests are open; try again soon"))?;
    let sampling = request.sampling(RandomState::new().hash_one(begun));
    let (wanted, stops) = (request.max_tokens, request.stop);
    let tokens = tokenize(front, request.prompt).await?;
    let max_new_tokens = answer_limit(tokens.len(), wanted, front.max_tokens)?;
    let usage = Usage {
        prompt_tokens: tokens.len(),
        completion_tokens: 0,
    };
    let stop_ids = front.tokenizer.eos_ids().to_vec();
    let generation = front
        .engine
        .submit(Submit {
            id: 0,
            tokens,
            sampling,
            max_new_tokens,
            stop_ids,
            priority: 0,
            cache_salt: None,
        })
        .map_err(|error| match error {
            SubmitError::GroupFailed(report) => group_failed(&report),
            SubmitError::Busy => ApiError::overloaded(error.to_string()),
            SubmitError::Closed => ApiError::unavailable(error.to_string()),
        })?;
    front.metrics.prompt(usage.prompt_tokens);
    Ok(TextStream {
        generation,
        tokenizer: Arc::clone(&front.tokenizer),
        metrics: Arc::clone(&front.metrics),
        detokenizer: Detokenizer::default(),
        stops: StopMatcher::new(stops),
        ending: None,
        usage,
        max_tokens: front.max_tokens,
        begun,
        last_token: begun,
        _permit: permit,
    })
}

/// Token ids of a prompt, off the threads that carry requests.
async fn tokenize(front: &Arc<Front>, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    if let Prompt::Tokens(tokens) = &prompt {
        let vocabulary = front.tokenizer.vocab_size();
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            let message = format!("token {token} is outside the vocabulary of {vocabulary}");
            return Err(ApiError::invalid_field("prompt", &message));
        }
    }
    let front = Arc::clone(front);
    tokio::task::spawn_blocking(move || match prompt {
        Prompt::Chat(messages) => {
            let conversation = Conversation::new(messages, SystemTime::now());
            let prompt = front.template.render(&conversation)?;
            prompt.encode(&front.tokenizer)
        }
        Prompt::Text(text) => front.tokenizer.encode_prompt(&text, Special::Parse),
        Prompt::Tokens(tokens) => Ok(tokens),
    })
    .await
    .map_err(|_ended| ApiError::failed("the tokenizer failed", "tokenizer_failed"))?
    .map_err(|error| match error {
        TextError::NoChatTemplate | TextError::Refused(_) => {
            ApiError::invalid_field("messages", &error.to_string())
        }
        TextError::Tokenize { .. } | TextError::Template(_) => {
            ApiError::failed(crate::failure::chain(&error), "tokenizer_failed")
        }
    })
}

/// Most tokens that the answer may have.
fn answer_limit(prompt: usize, wanted: Option<u32>, max_tokens: u32) -> Result<u32, ApiError> {
    if prompt == 0 {
        return Err(ApiError::invalid("the prompt is empty"));
    }
    let room = u32::try_from(prompt)
        .ok()
        .and_then(|prompt| max_tokens.checked_sub(prompt));
    match (room, wanted) {
        (None | Some(0), _) => Err(ApiError::context_length(prompt, max_tokens)),
        (Some(room), Some(wanted)) if wanted > room => Err(ApiError {
            message: format!(
                "the prompt has {prompt} tokens and max_tokens is {wanted}; together a sequence may have {max_tokens}"
            ),
            ..ApiError::context_length(prompt, max_tokens)
        }),
        (Some(room), wanted) => Ok(wanted.unwrap_or(room)),
    }
}

impl TextStream {
    /// Token counts so far.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// What the text does next; nothing follows an end or a failure.
    pub(super) async fn next(&mut self) -> TextEvent {
        loop {
            if let Some(reason) = self.ending.take() {
                self.metrics.finished(reason, self.begun.elapsed());
                return TextEvent::Finished(reason);
            }
            let text = match self.generation.next().await {
                Some(GenerationEvent::Token { token, .. }) => self.take_token(token),
                Some(GenerationEvent::Finished { reason, .. }) => self.finish(reason),
                Some(GenerationEvent::Refused(refusal)) => {
                    return TextEvent::Failed(self.refused(&refusal));
                }
                Some(GenerationEvent::Failed(message)) => {
                    return TextEvent::Failed(ApiError::failed(message, "generation_failed"));
                }
                Some(GenerationEvent::GroupFailed(report)) => {
                    return TextEvent::Failed(group_failed(&report));
                }
                None => {
                    return TextEvent::Failed(ApiError::unavailable(
                        "this worker is shutting down and did not finish the answer",
                    ));
                }
            };
            if !text.is_empty() {
                return TextEvent::Piece(text);
            }
        }
    }

    fn take_token(&mut self, token: u32) -> String {
        let now = Instant::now();
        self.metrics
            .token(self.usage.completion_tokens == 0, now - self.last_token);
        self.last_token = now;
        self.usage.completion_tokens += 1;
        let piece = self.detokenizer.push(&self.tokenizer, token);
        let passed = self.stops.push(&piece);
        if passed.stopped {
            self.ending = Some(Finish::Stop);
        }
        passed.text
    }

    /// The text that was held back. A stop string may still be in it.
    fn finish(&mut self, reason: Finish) -> String {
        let rest = self.detokenizer.finish();
        let mut passed = self.stops.push(&rest);
        if passed.stopped {
            self.ending = Some(Finish::Stop);
        } else {
            passed.text.push_str(&self.stops.finish());
            self.ending = Some(reason);
        }
        passed.text
    }

    fn refused(&self, refusal: &Refusal) -> ApiError {
        match refusal {
            Refusal::QueueFull { .. } | Refusal::QueueTokens { .. } => {
                ApiError::overloaded(refusal.to_string())
            }
            Refusal::Length { .. } => {
                ApiError::context_length(self.usage.prompt_tokens, self.max_tokens)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_gets_the_room_that_is_left() {
        assert_eq!(answer_limit(10, None, 16), Ok(6));
        assert_eq!(answer_limit(10, Some(6), 16), Ok(6));
        let too_much = answer_limit(10, Some(7), 16).expect_err("refused");
        assert_eq!(too_much.code, Some("context_length_exceeded"));
        assert!(
            too_much.message.contains("10 tokens and max_tokens is 7"),
            "{too_much}"
        );
        assert_eq!(answer_limit(16, None, 16).expect_err("refused").status, 400);
        assert_eq!(answer_limit(0, None, 16).expect_err("refused").status, 400);
    }
}
