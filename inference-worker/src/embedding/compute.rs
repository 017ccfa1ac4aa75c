//! Who may compute, when, and how much may wait.

use std::sync::Arc;

use llama_model::embedding::PACKED_TOKENS;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

use super::{ANSWER_VALUES, Loaded};
use crate::failure::chain;
use crate::openai::{ApiError, Prompt, TokenizeRequest, response};

/// Bounds of what is computed and what waits.
#[derive(Debug)]
pub(super) struct Desk {
    /// One: texts are computed by all threads. Given out in the order of asking, so that
    /// requests take turns.
    turn: Arc<Semaphore>,
    /// One for each request that may be open.
    places: Arc<Semaphore>,
    open_requests: usize,
    /// One for each token that may wait.
    tokens: Arc<Semaphore>,
    waiting_tokens: usize,
    /// One for each value that may wait to be sent.
    values: Arc<Semaphore>,
    /// One for each request whose texts may become tokens at once.
    tokenizing: Arc<Semaphore>,
}

impl Desk {
    pub(super) fn new(open_requests: usize, waiting_tokens: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let waiting_tokens = waiting_tokens.min(Semaphore::MAX_PERMITS);
        Self {
            turn: Arc::new(Semaphore::new(1)),
            places: Arc::new(Semaphore::new(open_requests)),
            open_requests,
            tokens: Arc::new(Semaphore::new(waiting_tokens)),
            waiting_tokens,
            values: Arc::new(Semaphore::new(ANSWER_VALUES)),
            tokenizing: Arc::new(Semaphore::new(cores)),
        }
    }

    /// Requests that hold a place.
    pub(super) fn open(&self) -> usize {
        self.open_requests - self.places.available_permits()
    }

    /// A place for one more request.
    ///
    /// # Errors
    /// 429 when there is none.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_full| ApiError::overloaded("too many requests are open; try again soon"))
    }

    /// Room for `count` tokens to wait. A request that alone has more than all of it is
    /// refused for good.
    ///
    /// # Errors
    /// 400, or 429 when there is no room now.
    pub(super) fn wait_with(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        if count > self.waiting_tokens {
            let message = format!(
                "has {count} tokens; at most {} are taken together",
                self.waiting_tokens
            );
            return Err(ApiError::invalid_field("input", &message));
        }
        take(&self.tokens, count)
            .ok_or_else(|| ApiError::overloaded("too many tokens are waiting; try again soon"))
    }

    /// Room for the vectors of a request, `values` numbers.
    ///
    /// # Errors
    /// As [`Desk::wait_with`].
    pub(super) fn answer_with(&self, values: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        if values > ANSWER_VALUES {
            let message = format!(
                "asks for {values} numbers in all vectors; at most {ANSWER_VALUES} are sent"
            );
            return Err(ApiError::invalid_field("input", &message));
        }
        take(&self.values, values)
            .ok_or_else(|| ApiError::overloaded("too many answers wait to be sent; try again soon"))
    }

    /// Does `work` on the texts off the threads that carry requests.
    pub(super) async fn on_texts<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<R, ApiError> + Send + 'static,
    ) -> Result<R, ApiError> {
        let turn = Arc::clone(&self.tokenizing).acquire_owned().await;
        let turn = turn.map_err(|_closed| ended("tokenizer"))?;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        done.await
            .map_err(|_panicked: JoinError| ended("tokenizer"))?
    }

    /// The vectors of texts in tokens. Every few texts others have their turn; a request
    /// that is given up computes no more.
    pub(super) async fn vectors(
        &self,
        loaded: &Arc<Loaded>,
        texts: Vec<Vec<u32>>,
    ) -> Result<Vec<Vec<f32>>, ApiError> {
        let mut vectors = Vec::with_capacity(texts.len());
        let mut texts = texts.into_iter().peekable();
        while texts.peek().is_some() {
            let (mut some, mut tokens) = (Vec::new(), 0);
            while let Some(text) = texts.next_if(|text| fits_turn(tokens, text.len())) {
                tokens += text.len();
                some.push(text);
            }
            let turn = Arc::clone(&self.turn).acquire_owned().await;
            let turn = turn.map_err(|_closed| ended("model"))?;
            let loaded = Arc::clone(loaded);
            let done = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                loaded.embedder.embed(&some)
            });
            let done = done.await.map_err(|_panicked: JoinError| ended("model"))?;
            vectors
                .extend(done.map_err(|error| ApiError::failed(chain(&error), "embedding_failed"))?);
        }
        Ok(vectors)
    }

    /// The body of `/tokenize`.
    pub(super) async fn tokenize(
        &self,
        loaded: Arc<Loaded>,
        request: TokenizeRequest,
        max_tokens: u32,
    ) -> Result<Value, ApiError> {
        let Prompt::Text(text) = request.prompt else {
            let message = "are no input of an embedding model";
            return Err(ApiError::invalid_field("messages", message));
        };
        self.on_texts(move || {
            let tokenizer = &loaded.tokenizer;
            let tokens = tokenizer
                .encode(&text, request.adds_lead, None)
                .map_err(|error| ApiError::failed(chain(&error), "tokenizer_failed"))?;
            let texts = request.token_texts.then(|| {
                let tokens = tokens.iter();
                tokens
                    .map(|token| tokenizer.token_text(*token))
                    .collect::<Vec<_>>()
            });
            Ok(response::tokenized(&tokens, texts.as_deref(), max_tokens))
        })
        .await
    }
}

/// Whether a text of `len` joins `tokens` that a request computes before the next has
/// its turn.
fn fits_turn(tokens: usize, len: usize) -> bool {
    tokens == 0 || tokens + len <= PACKED_TOKENS
}

fn take(room: &Arc<Semaphore>, count: usize) -> Option<OwnedSemaphorePermit> {
    let count = u32::try_from(count).ok()?;
    Arc::clone(room).try_acquire_many_owned(count).ok()
}

/// A part of this program broke.
fn ended(what: &str) -> ApiError {
    ApiError::failed(format!("the {what} failed"), "internal")
}
