//! The API in front of a tiny model.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use llama_model::EmbeddingCheckpoint;
use llama_model::fixture::TinyBert;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{EmbeddingFront, EmbeddingFrontParts, Loaded, router};
use crate::metrics::Metrics;
use crate::server::Admission;

/// Requests that may be open.
const OPEN: usize = 2;
/// Tokens that may wait.
const TOKENS: usize = 64;

struct Api {
    front: Arc<EmbeddingFront>,
    admission: watch::Sender<Admission>,
}

impl Api {
    fn starting() -> Self {
        let (admission, admitted) = watch::channel(Admission::Starting);
        let front = Arc::new(EmbeddingFront::new(EmbeddingFrontParts {
            served_name: "m".to_owned(),
            dimensions: TinyBert::DIMENSIONS,
            max_tokens: 16,
            open_requests: OPEN,
            waiting_tokens: TOKENS,
            admission: admitted,
            metrics: Arc::new(Metrics::new("m")),
        }));
        Self { front, admission }
    }

    fn serving() -> Self {
        let api = Self::starting();
        let folder = tempfile::tempdir().expect("a folder");
        TinyBert::write(folder.path()).expect("writes");
        let checkpoint = EmbeddingCheckpoint::open(folder.path()).expect("opens");
        let loaded = Loaded::new(&checkpoint.expect("is one"), 1).expect("loads");
        api.front.set_loaded(loaded);
        api.admission.send_replace(Admission::Serving);
        api
    }

    async fn send(&self, method: &str, path: &str, body: Body) -> Response {
        let request = Request::builder().method(method).uri(path).body(body);
        let routes = TowerToHyperService::new(router(Arc::clone(&self.front)));
        let answer = routes.call(request.expect("a request")).await;
        answer.expect("an answer")
    }

    async fn ask(&self, body: &Value) -> (u16, Value) {
        read(
            self.send("POST", "/v1/embeddings", body.to_string().into())
                .await,
        )
        .await
    }

    async fn input(&self, input: Value) -> (u16, Value) {
        self.ask(&json!({"model": "m", "input": input})).await
    }
}

async fn read(answer: Response) -> (u16, Value) {
    let status = answer.status().as_u16();
    let body = answer
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

#[tokio::test]
async fn vectors_come_as_numbers_or_bytes_in_the_order_of_texts() {
    let api = Api::serving();
    let (status, whole) = api.input(json!(["hello", "a, bc", "hello"])).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!(
        (&whole["object"], &whole["model"]),
        (&json!("list"), &json!("m"))
    );
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 12, "total_tokens": 12})
    );
    let vector = |index: usize| &whole["data"][index]["embedding"];
    assert_eq!(vector(0), vector(2));
    assert_ne!(vector(0), vector(1));
    let body = json!({"model": "m", "input": [2, 8, 3], "encoding_format": "base64"});
    let (_, bytes) = api.ask(&body).await;
    let bytes = bytes["data"][0]["embedding"].as_str().expect("base64");
    let bytes = STANDARD.decode(bytes).expect("base64");
    assert_eq!(bytes.len(), 4 * TinyBert::DIMENSIONS);
    let numbers = vector(0).as_array().expect("numbers");
    for (four, number) in bytes.chunks_exact(4).zip(numbers) {
        let four = four.try_into().expect("four bytes");
        // Written as the shortest number that is read as the same.
        let read: f32 = number.to_string().parse().expect("a number");
        assert_eq!(f32::from_le_bytes(four).to_bits(), read.to_bits());
    }
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let api = Api::serving();
    let (status, error) = api.input(json!("a ".repeat(15))).await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
    for input in [json!([[2, 12]]), json!(vec!["a "; 22])] {
        let (status, error) = api.input(input).await;
        assert_eq!(
            (status, &error["error"]["param"]),
            (400, &json!("input")),
            "{error}"
        );
    }
    let cut = json!({"model": "m", "input": "a ".repeat(15), "truncate_prompt_tokens": 4});
    let (_, cut) = api.ask(&cut).await;
    let (_, short) = api.input(json!("a a")).await;
    assert_eq!(cut["data"], short["data"]);
}

#[tokio::test]
async fn requests_beyond_the_bounds_wait_outside() {
    let api = Api::serving();
    // Bodies that do not come keep their places.
    let silent = || Body::from_stream(futures::stream::pending::<std::io::Result<Vec<u8>>>());
    let mut held = Vec::new();
    for _ in 0..OPEN {
        let mut pending = Box::pin(api.send("POST", "/v1/embeddings", silent()));
        let waited = tokio::time::timeout(Duration::from_millis(20), pending.as_mut()).await;
        assert!(waited.is_err(), "waits for its body");
        held.push(pending);
    }
    let stats = api.front.stats();
    assert_eq!((stats.running, stats.waiting), (1, 1));
    let body = json!({"model": "m", "input": "a"}).to_string();
    let answer = api.send("POST", "/v1/embeddings", body.into()).await;
    assert_eq!(answer.status(), 429);
    assert!(answer.headers().contains_key("retry-after"));
    drop(held);
    assert_eq!(api.front.open(), 0);
    assert_eq!(api.input(json!("a")).await.0, 200);
    // Tokens that others wait with leave no room.
    let waiting = api.front.desk.wait_with(TOKENS).expect("there is room");
    assert_eq!(api.input(json!("a")).await.0, 429);
    drop(waiting);
    assert_eq!(api.input(json!("a")).await.0, 200);
}

#[tokio::test]
async fn answers_that_nobody_reads_keep_their_room() {
    let api = Api::serving();
    let body = json!({"model": "m", "input": "a"}).to_string();
    let unread = api.send("POST", "/v1/embeddings", body.into()).await;
    let left = super::ANSWER_VALUES - TinyBert::DIMENSIONS;
    assert!(api.front.desk.answer_with(left + 1).is_err());
    assert_eq!(read(unread).await.0, 200);
    assert!(api.front.desk.answer_with(left + 1).is_ok());
}

#[tokio::test]
async fn a_model_that_loads_or_drains_takes_nothing() {
    let api = Api::starting();
    assert_eq!(api.input(json!("a")).await.0, 503);
    assert_eq!(
        api.send("GET", "/health", Body::empty()).await.status(),
        503
    );
    let api = Api::serving();
    assert_eq!(
        api.send("GET", "/health", Body::empty()).await.status(),
        200
    );
    api.admission.send_replace(Admission::Draining);
    assert_eq!(api.input(json!("a")).await.0, 503);
    assert_eq!(
        api.send("GET", "/v1/embeddings", Body::empty())
            .await
            .status(),
        405
    );
    assert_eq!(api.send("GET", "/none", Body::empty()).await.status(), 404);
}
