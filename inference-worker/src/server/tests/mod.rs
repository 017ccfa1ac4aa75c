//! The API port over real connections, in front of an engine that says what a test
//! wants.

mod answers;
mod connections;
mod hostile;
mod responses;
mod text;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use llama_model::Gguf;
use llama_model::adapter::AdapterRoom;
use llama_model::fixture::TinyLlama;
use llama_model::text::{ModelText, Special, Tokenizer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{AdapterRack, Admission, Front, FrontParts, Loading, PortLimits, router, serve};
use crate::engine::{EngineClient, FromEngine, Submit, ToEngine, TokenLogprobs, frames};
use crate::metrics::Metrics;
use crate::scheduler::Finish;

/// Answers that may be open at once.
const PLACES: usize = 4;
/// Longest sequence.
const MAX_TOKENS: u32 = 64;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An API port and what its engine heard.
struct Api {
    address: SocketAddr,
    heard: mpsc::UnboundedReceiver<ToEngine>,
    tokenizer: Arc<Tokenizer>,
    closing: CancellationToken,
    admit: watch::Sender<Admission>,
    metrics: Arc<Metrics>,
}

/// What came back.
#[derive(Debug)]
struct Reply {
    status: u16,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    /// The field at fault of a 400.
    fn field(&self) -> String {
        assert_eq!(self.status, 400, "{}", self.body);
        let param = self.json()["error"]["param"].take();
        param.as_str().expect("names a field").to_owned()
    }

    /// The events of a stream, without the last, which must be the end.
    fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter()
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect()
    }
}

impl Api {
    /// An API whose engine says `script(submit)` of each sequence, as soon as `batch`
    /// of them have come, a message of each in turn.
    async fn start(batch: usize, script: fn(&Tokenizer, &Submit) -> Vec<FromEngine>) -> Self {
        Self::with_limits(batch, script, PortLimits::default()).await
    }

    async fn with_limits(
        batch: usize,
        script: fn(&Tokenizer, &Submit) -> Vec<FromEngine>,
        limits: PortLimits,
    ) -> Self {
        let (front, mut rank) = UnixStream::pair().expect("pair");
        let (engine, carry) = EngineClient::start(front);
        tokio::spawn(carry);
        let (tell, heard) = mpsc::unbounded_channel();
        let tokenizer = Arc::new(model_text().tokenizer);
        let scripted = Arc::clone(&tokenizer);
        tokio::spawn(async move {
            let mut waiting = Vec::new();
            while let Some(message) = hear(&mut rank).await {
                if let ToEngine::Submit(submit) = &message {
                    waiting.push(script(&scripted, submit).into_iter());
                }
                // A test that has ended hears nothing.
                let _ = tell.send(message);
                if waiting.len() < batch {
                    continue;
                }
                let mut all: Vec<_> = std::mem::take(&mut waiting);
                while !all.is_empty() {
                    all.retain_mut(|says| says.len() > 0);
                    for said in all.iter_mut().filter_map(Iterator::next) {
                        let frame = frames::encode(&said).expect("encodes");
                        rank.write_all(&frame).await.expect("writes");
                    }
                }
            }
        });
        let (admit, admission) = watch::channel(Admission::Serving);
        let metrics = Arc::new(Metrics::new("m"));
        let text = model_text();
        let adapters = AdapterRack::new(
            engine.clone(),
            "m".to_owned(),
            AdapterRoom::NONE,
            Loading::Fixed,
        );
        let front = Front::new(FrontParts {
            served_name: "m".to_owned(),
            max_tokens: MAX_TOKENS,
            open_requests: PLACES,
            tokenizer: text.tokenizer,
            template: text.template,
            engine,
            rack: adapters,
            admission: admission.clone(),
            metrics: Arc::clone(&metrics),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("has one");
        let closing = CancellationToken::new();
        let routes = router(Arc::new(front));
        tokio::spawn(serve(listener, routes, admission, closing.clone(), limits));
        Self {
            address,
            heard,
            tokenizer,
            closing,
            admit,
            metrics,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connects")
    }

    /// Sends a request and leaves its answer to be read.
    async fn open(&self, path: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        let head = format!(
            "POST {path} HTTP/1.0\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.expect("writes");
        stream.write_all(body).await.expect("writes");
        stream
    }

    async fn send(&self, path: &str, body: &[u8]) -> Reply {
        read(self.open(path, body).await).await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(path, body.to_string().as_bytes()).await
    }

    async fn chat(&self, change: Value) -> Reply {
        let message = json!([{"role": "user", "content": "hi"}]);
        let body = json!({"model": "m", "messages": message});
        self.post("/v1/chat/completions", &changed(body, change))
            .await
    }

    async fn completion(&self, change: Value) -> Reply {
        let body = json!({"model": "m", "prompt": "hi"});
        self.post("/v1/completions", &changed(body, change)).await
    }

    /// The next message to the engine.
    async fn next(&mut self) -> ToEngine {
        let next = tokio::time::timeout(PATIENCE, self.heard.recv());
        next.await.expect("in time").expect("a message")
    }

    async fn next_submit(&mut self) -> Submit {
        match self.next().await {
            ToEngine::Submit(submit) => *submit,
            other => panic!("{other:?} is no submit"),
        }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer
            .encode(text, Special::Parse)
            .expect("encodes")
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

fn changed(mut body: Value, mut change: Value) -> Value {
    for (name, value) in change.as_object_mut().expect("an object") {
        body[name.as_str()] = value.take();
    }
    body
}

/// Reads an answer to the end of its connection.
async fn read(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    let all = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes));
    all.await.expect("in time").expect("reads");
    let text = String::from_utf8(bytes).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Reply {
        status: status.expect("a status"),
        body: body.to_owned(),
    }
}

async fn hear(rank: &mut UnixStream) -> Option<ToEngine> {
    let mut header = [0; 4];
    rank.read_exact(&mut header).await.ok()?;
    let mut body = vec![0; frames::body_len(header).expect("fits")];
    rank.read_exact(&mut body).await.ok()?;
    Some(serde_json::from_slice(&body).expect("a message"))
}

fn model_text() -> ModelText {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    TinyLlama::default().gguf().write(&path).expect("writes");
    ModelText::from_gguf(&Gguf::open(&path).expect("opens")).expect("has text")
}

/// Says `text` token by token, with probabilities where they were asked for.
fn say(tokenizer: &Tokenizer, submit: &Submit, text: &str) -> Vec<FromEngine> {
    let id = submit.id;
    let tokens = tokenizer.encode(text, Special::Parse).expect("encodes");
    let asked = submit.sampling.logprobs;
    let said = tokens.into_iter().map(|token| FromEngine::Token {
        id,
        token,
        cached_tokens: 2,
        logprobs: asked.map(|count| TokenLogprobs {
            logprob: -0.5,
            top: vec![(token, -0.5), (0, -1.5)][..(count as usize).min(2)].to_vec(),
        }),
    });
    let end = FromEngine::Finished {
        id,
        reason: Finish::Stop,
        cached_tokens: 2,
    };
    said.chain([end]).collect()
}
