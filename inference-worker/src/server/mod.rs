//! The group's front: the OpenAI API on one port, what operators ask on another.

mod adapter_list;
mod adapters;
mod answer;
pub(crate) mod body;
mod choice;
mod generate;
pub mod internal;
mod listen;
mod prompt;
mod responses;
mod stall;
#[cfg(test)]
mod tests;
mod text;
mod writer;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use llama_contract::{FailureReport, HEALTH_PATH};
use llama_model::text::{ChatTemplate, Tokenizer};
use tokio::sync::{Semaphore, watch};

pub use self::adapters::{AdapterError, AdapterRack, Loading};
pub use self::listen::{PortLimits, serve};

use self::body::Room;
use crate::adapters::AdapterUse;
use crate::engine::EngineClient;
use crate::metrics::Metrics;
use crate::openai::ApiError;
use crate::openai::response::{self, Endpoint, ModelCard};
use crate::tools::ToolFormat;

/// Whether requests are taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Admission {
    /// The ranks are not ready yet.
    #[default]
    Starting,
    /// Yes.
    Serving,
    /// The pod is about to end; running answers are finished.
    Draining,
    /// The group is over.
    Failed(Arc<FailureReport>),
}

impl Admission {
    /// Whether a request may start now.
    ///
    /// # Errors
    /// 503 with the reason why not.
    pub fn check(&self) -> Result<(), ApiError> {
        match self {
            Self::Serving => Ok(()),
            Self::Starting => Err(ApiError::loading()),
            Self::Draining => Err(ApiError::shutting_down("")),
            Self::Failed(report) => Err(group_failed(report)),
        }
    }
}

/// 503 that names the rank, its node and the cause.
fn group_failed(report: &FailureReport) -> ApiError {
    let place = match (report.rank, &report.node) {
        (Some(rank), Some(node)) => format!("rank {rank} on node {node}"),
        (Some(rank), None) => format!("rank {rank}"),
        _ => "the worker".to_owned(),
    };
    ApiError {
        code: Some(report.category.as_str()),
        ..ApiError::unavailable(format!("the group failed ({place}): {}", report.message))
    }
}

/// What the API needs to answer.
#[derive(Debug)]
pub struct Front {
    served_name: String,
    max_tokens: u32,
    created: u64,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    /// How the model writes calls of tools.
    tool_format: ToolFormat,
    /// Whether prompts can tell the model of tools.
    takes_tools: bool,
    engine: EngineClient,
    rack: AdapterRack,
    admission: watch::Receiver<Admission>,
    metrics: Arc<Metrics>,
    /// Answers that may be open at once.
    open_requests: usize,
    /// One for each of them.
    permits: Arc<Semaphore>,
    /// One for each text that may become tokens at once.
    tokenizing: Arc<Semaphore>,
    /// Bytes of the longest token.
    longest_token: usize,
    room: Room,
}

/// The parts of a [`Front`].
#[derive(Debug)]
pub struct FrontParts {
    /// Name that clients send as `model`.
    pub served_name: String,
    /// Longest sequence, prompt and answer.
    pub max_tokens: u32,
    /// Answers that may be open at once; requests for more get 429.
    pub open_requests: usize,
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// The model's chat template.
    pub template: ChatTemplate,
    /// The way to rank 0.
    pub engine: EngineClient,
    /// The group's adapters.
    pub rack: AdapterRack,
    /// Whether requests are taken.
    pub admission: watch::Receiver<Admission>,
    /// Where requests are counted.
    pub metrics: Arc<Metrics>,
}

impl Front {
    /// A front, made now.
    pub fn new(parts: FrontParts) -> Self {
        let ids = 0..u32::try_from(parts.tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let lengths = ids.map(|id| parts.tokenizer.token_bytes(id).len());
        let longest_token = lengths.max().unwrap_or(0);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            served_name: parts.served_name,
            max_tokens: parts.max_tokens,
            created: unix_seconds(),
            tokenizer: Arc::new(parts.tokenizer),
            tool_format: ToolFormat::of_template(parts.template.tool_source()),
            // Formats that are built in can.
            takes_tools: parts
                .template
                .tool_source()
                .is_none_or(|source| source.contains("tools")),
            template: parts.template,
            engine: parts.engine,
            rack: parts.rack,
            admission: parts.admission,
            metrics: parts.metrics,
            open_requests: parts.open_requests,
            permits: Arc::new(Semaphore::new(parts.open_requests)),
            tokenizing: Arc::new(Semaphore::new(cores)),
            longest_token,
            room: Room::default(),
        }
    }

    /// The adapter that the model `asked` for is, if it is one.
    fn check_model(&self, asked: &str) -> Result<Option<AdapterUse>, ApiError> {
        if asked == self.served_name {
            return Ok(None);
        }
        let adapter = self.rack.find(asked);
        adapter.map_or_else(
            || Err(ApiError::model_not_found(asked, &self.served_name)),
            |adapter| Ok(Some(adapter)),
        )
    }

    fn admit(&self) -> Result<(), ApiError> {
        self.admission.borrow().check()
    }
}

/// Routes of the API port.
pub fn router(front: Arc<Front>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/responses", post(respond_in_items))
        .route("/v1/embeddings", post(no_embeddings))
        .route("/v1/models", get(models))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/version", get(version))
        .route(HEALTH_PATH, get(health))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(front)
}

async fn chat(State(front): State<Arc<Front>>, request: Request) -> Response {
    respond(front, Endpoint::Chat, request).await
}

async fn completion(State(front): State<Arc<Front>>, request: Request) -> Response {
    respond(front, Endpoint::Completion, request).await
}

async fn respond(front: Arc<Front>, endpoint: Endpoint, request: Request) -> Response {
    let metrics = Arc::clone(&front.metrics);
    counted(&metrics, answer::answer(front, endpoint, request).await)
}

async fn respond_in_items(State(front): State<Arc<Front>>, request: Request) -> Response {
    let metrics = Arc::clone(&front.metrics);
    counted(&metrics, responses::answer(front, request).await)
}

async fn tokenize(State(front): State<Arc<Front>>, request: Request) -> Response {
    counted(&front.metrics, text::tokenize(&front, request).await)
}

async fn detokenize(State(front): State<Arc<Front>>, request: Request) -> Response {
    counted(&front.metrics, text::detokenize(&front, request).await)
}

/// What only an embedding model could answer.
async fn no_embeddings(State(front): State<Arc<Front>>) -> Response {
    let message = format!(
        "\"{}\" is a model that writes text and makes no embeddings; a BERT served by a worker of \
         its own does",
        front.served_name
    );
    counted(
        &front.metrics,
        Err(ApiError::invalid_field("model", &message)),
    )
}

pub(crate) async fn version() -> Response {
    axum::Json(response::version()).into_response()
}

/// The answer, or the error as one, which is counted.
pub(crate) fn counted(metrics: &Metrics, answer: Result<Response, ApiError>) -> Response {
    answer.unwrap_or_else(|error| {
        metrics.refused(&error);
        error.into_response()
    })
}

async fn models(State(front): State<Arc<Front>>) -> Response {
    let mut cards = vec![ModelCard {
        id: front.served_name.clone(),
        created: front.created,
        max_tokens: front.max_tokens,
        parent: None,
    }];
    cards.extend(front.rack.cards(front.max_tokens));
    axum::Json(response::models(&cards)).into_response()
}

async fn tokenizer_info(State(front): State<Arc<Front>>) -> Response {
    let (tokenizer, max_tokens) = (&front.tokenizer, front.max_tokens);
    let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
    let control = [text(tokenizer.bos_id()), text(tokenizer.eos_id())];
    let template = front.template.tool_source();
    axum::Json(response::tokenizer_info(&control, template, max_tokens)).into_response()
}

async fn health(State(front): State<Arc<Front>>) -> Response {
    match front.admit() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => error.into_response(),
    }
}

pub(crate) async fn unknown_path(request: Request) -> ApiError {
    ApiError::unknown_path(request.uri().path())
}

pub(crate) async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
