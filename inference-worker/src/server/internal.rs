//! The internal port: state, metrics and probes, on every pod of a group.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use llama_contract::{
    ADAPTERS_PATH, ANSWERS_WITHIN, AdapterList, DRAIN_PATH, DRAIN_SECONDS, HEALTH_PATH, LIVE_PATH,
    METRICS_PATH, STATE_PATH, StateReport,
};

use super::{AdapterError, Admission};
use crate::engine::EngineStats;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::openai::ApiError;

/// Where the internal port's answers come from.
pub trait Inspect: Send + Sync + fmt::Debug {
    /// The pod as it is now, without its answers.
    fn state(&self) -> StateReport;
    /// Answers get no more than `time` once the pod is asked to end.
    fn limit_drain(&self, time: Duration);
    /// Whether the pod serves, or can take part in serving.
    fn admission(&self) -> Admission;
    /// The engine's numbers; zeros on pods without rank 0.
    fn stats(&self) -> EngineStats;
    /// The pod's metrics, with rank gauges brought up to date.
    fn metrics(&self) -> Arc<Metrics>;
    /// Has the group load and forget adapters until it has those of `list`.
    ///
    /// # Errors
    /// When it was not started so, or has too little room.
    fn want_adapters(&self, list: AdapterList) -> Result<(), AdapterError> {
        let _ = list;
        Err(AdapterError::NotManaged)
    }
}

/// Routes of the internal port.
pub fn router(inspect: Arc<dyn Inspect>) -> Router {
    Router::new()
        .route(STATE_PATH, get(state))
        .route(DRAIN_PATH, post(drain))
        .route(METRICS_PATH, get(metrics))
        .route(ADAPTERS_PATH, put(adapters))
        .route(HEALTH_PATH, get(health))
        .route(LIVE_PATH, get(async || StatusCode::OK))
        .with_state(inspect)
}

async fn state(State(inspect): State<Arc<dyn Inspect>>, RawQuery(query): RawQuery) -> Response {
    let mut state = inspect.state();
    let asked = query
        .as_deref()
        .and_then(|query| seconds(query, ANSWERS_WITHIN));
    // Clients are answered by the first pod.
    if let Some(within) = asked.filter(|_| state.node_index == 0) {
        state.answers = Some(inspect.metrics().answers(within));
    }
    Json(state).into_response()
}

async fn drain(State(inspect): State<Arc<dyn Inspect>>, RawQuery(query): RawQuery) -> Response {
    let Some(time) = query
        .as_deref()
        .and_then(|query| seconds(query, DRAIN_SECONDS))
    else {
        let message = "must be a whole number of seconds in the query";
        return ApiError::invalid_field(DRAIN_SECONDS, message).into_response();
    };
    inspect.limit_drain(time);
    StatusCode::NO_CONTENT.into_response()
}

/// The time that the parameter `name` of a query is, in seconds.
fn seconds(query: &str, name: &str) -> Option<Duration> {
    let mut parts = query.split('&').filter_map(|part| part.split_once('='));
    let (_, seconds) = parts.find(|(found, _)| *found == name)?;
    seconds.parse().ok().map(Duration::from_secs)
}

async fn adapters(
    State(inspect): State<Arc<dyn Inspect>>,
    list: Result<Json<AdapterList>, JsonRejection>,
) -> Response {
    let Json(list) = match list {
        Ok(list) => list,
        Err(error) => return ApiError::invalid(error.body_text()).into_response(),
    };
    match inspect.want_adapters(list) {
        Ok(()) => StatusCode::ACCEPTED.into_response(),
        Err(error) => ApiError::invalid(error.to_string()).into_response(),
    }
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
