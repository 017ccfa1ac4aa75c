//! The internal port: state, metrics and probes, on every pod of a group.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use llama_contract::{HEALTH_PATH, LIVE_PATH, METRICS_PATH, STATE_PATH, StateReport};

use super::Admission;
use crate::engine::EngineStats;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::openai::ApiError;

/// Where the internal port's answers come from.
pub trait Inspect: Send + Sync + fmt::Debug {
    /// The pod as it is now.
    fn state(&self) -> StateReport;
    /// Whether the pod serves, or can take part in serving.
    fn admission(&self) -> Admission;
    /// The engine's numbers; zeros on pods without rank 0.
    fn stats(&self) -> EngineStats;
    /// The pod's metrics, with rank gauges brought up to date.
    fn metrics(&self) -> Arc<Metrics>;
}

/// Routes of the internal port.
pub fn router(inspect: Arc<dyn Inspect>) -> Router {
    Router::new()
        .route(STATE_PATH, get(state))
        .route(METRICS_PATH, get(metrics))
        .route(HEALTH_PATH, get(health))
        .route(LIVE_PATH, get(async || StatusCode::OK))
        .with_state(inspect)
}

async fn state(State(inspect): State<Arc<dyn Inspect>>) -> Response {
    axum::Json(inspect.state()).into_response()
}

async fn health(State(inspect): State<Arc<dyn Inspect>>) -> Response {
    match inspect.admission().check() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => error.into_response(),
    }
}

async fn metrics(State(inspect): State<Arc<dyn Inspect>>) -> Response {
    match inspect.metrics().render(inspect.stats()) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(_error) => {
            ApiError::failed("the metrics cannot be written", "metrics_failed").into_response()
        }
    }
}
