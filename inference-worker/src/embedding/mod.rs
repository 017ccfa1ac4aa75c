//! The API of an embedding model: `/v1/embeddings` in place of chats and completions.
//!
//! Such a model is small and runs in the supervisor's own process, on its threads. Texts
//! are computed a few of each request in turn; what waits is bounded in requests, tokens
//! and values.

mod answer;
mod compute;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use llama_contract::HEALTH_PATH;
use llama_model::embed::{Embedder, EmbeddingTokenizer};
use llama_model::{EmbeddingCheckpoint, ModelError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::compute::Desk;
use crate::engine::EngineStats;
use crate::metrics::Metrics;
use crate::openai::response::ModelCard;
use crate::openai::{ApiError, TokenizeRequest, response};
use crate::server::body::Room;
use crate::server::{Admission, counted, method_not_allowed, unix_seconds, unknown_path, version};

/// Values of all vectors that may wait to be sent: those of the largest request.
pub const ANSWER_VALUES: usize = 4 << 20;

/// A model that is loaded.
#[derive(Debug)]
pub struct Loaded {
    tokenizer: EmbeddingTokenizer,
    embedder: Embedder,
}

impl Loaded {
    /// Loads the model, to compute on `threads` threads.
    ///
    /// # Errors
    /// Whatever reading tokenizer and weights refuses.
    pub fn new(checkpoint: &EmbeddingCheckpoint, threads: usize) -> Result<Self, ModelError> {
        let vocab = checkpoint.config().vocab;
        Ok(Self {
            tokenizer: EmbeddingTokenizer::open(checkpoint.path(), vocab)?,
            embedder: Embedder::load(checkpoint, threads)?,
        })
    }
}

/// The parts of an [`EmbeddingFront`].
#[derive(Debug)]
pub struct EmbeddingFrontParts {
    /// Name that clients send as `model`.
    pub served_name: String,
    /// Length of a vector.
    pub dimensions: usize,
    /// Most tokens of a text.
    pub max_tokens: u32,
    /// Requests that may be open at once; more get 429.
    pub open_requests: usize,
    /// Tokens of the texts that may wait; more get 429.
    pub waiting_tokens: usize,
    /// Whether requests are taken.
    pub admission: watch::Receiver<Admission>,
    /// Where requests are counted.
    pub metrics: Arc<Metrics>,
}

/// What the API needs to answer.
#[derive(Debug)]
pub struct EmbeddingFront {
    served_name: String,
    dimensions: usize,
    max_tokens: u32,
    created: u64,
    admission: watch::Receiver<Admission>,
    metrics: Arc<Metrics>,
    /// Empty until the model is loaded.
    loaded: OnceLock<Arc<Loaded>>,
    desk: Desk,
    room: Room,
    /// Set when what is not answered is answered no more.
    closed: CancellationToken,
}

impl EmbeddingFront {
    /// A front, made now, whose model is still to come.
    pub fn new(parts: EmbeddingFrontParts) -> Self {
        Self {
            served_name: parts.served_name,
            dimensions: parts.dimensions,
            max_tokens: parts.max_tokens,
            created: unix_seconds(),
            admission: parts.admission,
            metrics: parts.metrics,
            loaded: OnceLock::new(),
            desk: Desk::new(parts.open_requests, parts.waiting_tokens),
            room: Room::default(),
            closed: CancellationToken::new(),
        }
    }

    /// Ends what is not answered with an error.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// The model is here.
    pub fn set_loaded(&self, loaded: Loaded) {
        // It is loaded once.
        let _ = self.loaded.set(Arc::new(loaded));
    }

    /// Requests that are not answered yet.
    pub fn open(&self) -> usize {
        self.desk.open()
    }

    /// How busy the model is.
    pub fn stats(&self) -> EngineStats {
        let open = u32::try_from(self.open()).unwrap_or(u32::MAX);
        let running = open.min(1);
        EngineStats {
            running,
            waiting: open - running,
            slots: 1,
            ..EngineStats::default()
        }
    }

    fn loaded(&self) -> Result<&Arc<Loaded>, ApiError> {
        self.admission.borrow().check()?;
        self.loaded.get().ok_or_else(ApiError::loading)
    }

    fn check_model(&self, asked: &str) -> Result<(), ApiError> {
        if asked == self.served_name {
            Ok(())
        } else {
            Err(ApiError::model_not_found(asked, &self.served_name))
        }
    }
}

/// Routes of the API port.
pub fn router(front: Arc<EmbeddingFront>) -> Router {
    Router::new()
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/chat/completions", post(other_kind))
        .route("/v1/completions", post(other_kind))
        .route("/v1/responses", post(other_kind))
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize))
        .route("/version", get(version))
        .route(HEALTH_PATH, get(health))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(front)
}

async fn embeddings(State(front): State<Arc<EmbeddingFront>>, request: Request) -> Response {
    let metrics = Arc::clone(&front.metrics);
    let answer = tokio::select! {
        answer = answer::answer(&front, request) => answer,
        () = front.closed.cancelled() => {
            Err(ApiError::shutting_down(" and did not finish the answer"))
        }
    };
    counted(&metrics, answer)
}

/// What only a model that writes could answer.
async fn other_kind(State(front): State<Arc<EmbeddingFront>>, request: Request) -> Response {
    let message = format!(
        "\"{}\" is an embedding model, which answers /v1/embeddings and not {}",
        front.served_name,
        request.uri().path()
    );
    counted(
        &front.metrics,
        Err(ApiError::invalid_field("model", &message)),
    )
}

async fn models(State(front): State<Arc<EmbeddingFront>>) -> Response {
    let body = response::models(&[ModelCard {
        id: front.served_name.clone(),
        created: front.created,
        max_tokens: front.max_tokens,
        parent: None,
    }]);
    axum::Json(body).into_response()
}

async fn tokenize(State(front): State<Arc<EmbeddingFront>>, request: Request) -> Response {
    let answer = async {
        let loaded = Arc::clone(front.loaded()?);
        let body = front.room.read(request).await?;
        let request = TokenizeRequest::read(&body.bytes)?;
        if let Some(model) = &request.model {
            front.check_model(model)?;
        }
        let body = front
            .desk
            .tokenize(loaded, request, front.max_tokens)
            .await?;
        Ok(axum::Json(body).into_response())
    };
    let answer = answer.await;
    counted(&front.metrics, answer)
}

async fn health(State(front): State<Arc<EmbeddingFront>>) -> Response {
    match front.loaded() {
        Ok(_) => StatusCode::OK.into_response(),
        Err(error) => error.into_response(),
    }
}
