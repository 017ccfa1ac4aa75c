//! What pods say of themselves.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use llama_contract::{
    ADAPTERS_PATH, ANSWERS_WITHIN, AdapterList, DRAIN_PATH, DRAIN_SECONDS, INTERNAL_PORT,
    RankMemory, STATE_PATH, StateReport,
};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::reconcile::observe::PodState;

/// Longest wait for one answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// A word older than this is not passed on.
const FRESH_FOR: Duration = Duration::from_secs(15);
/// Least time between two early questions to a pod.
const EARLY_EVERY: Duration = Duration::from_secs(4);
/// Questions without an answer after which a pod is asked no more for some time.
const PATIENCE: u32 = 3;
/// A pod that told nothing of its memory is asked for it again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// How long what a pod said, or did not say, is remembered.
const FORGOTTEN_AFTER: Duration = Duration::from_mins(10);
/// Pods that are asked at the same time.
const AT_ONCE: usize = 32;
/// Longest answer.
const MOST_BYTES: usize = 1 << 20;

/// What pods said, by their UID.
#[derive(Debug)]
pub struct States {
    told: Mutex<HashMap<String, Told>>,
    places: Arc<Semaphore>,
}

#[derive(Debug)]
struct Told {
    /// The last answer, and when it came.
    state: Option<(PodState, Instant)>,
    /// When it last told what its ranks take of memory.
    measured: Option<Instant>,
    /// Questions in a row without an answer.
    failures: u32,
    asked: Instant,
}

impl Told {
    fn at(asked: Instant) -> Self {
        Self {
            state: None,
            measured: None,
            failures: 0,
            asked,
        }
    }
}

impl Default for States {
    fn default() -> Self {
        Self {
            told: Mutex::default(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }
}

/// A question to one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// UID of the pod.
    pub uid: String,
    /// Its address.
    pub address: IpAddr,
    /// Of which last time it shall tell how its answers did.
    pub answers_within: Option<Duration>,
}

impl States {
    /// What the pod `uid` said last, if that is not long ago.
    pub fn get(&self, uid: &str) -> Option<PodState> {
        let told = self.lock();
        let (state, at) = told.get(uid)?.state.as_ref()?;
        let age = at.elapsed();
        (age < FRESH_FOR).then(|| PodState {
            age,
            ..state.clone()
        })
    }

    /// Whether the pod `uid` has not answered often enough to be asked no more for now.
    pub fn is_silent(&self, uid: &str) -> bool {
        let told = self.lock();
        told.get(uid).is_some_and(|told| told.failures >= PATIENCE)
    }

    /// Whether the pod `uid` told within `time` what its ranks take of memory, or was asked
    /// a moment ago.
    pub fn was_measured(&self, uid: &str, time: Duration) -> bool {
        let told = self.lock();
        told.get(uid).is_some_and(|told| {
            let measured = told.measured.is_some_and(|at| at.elapsed() < time);
            measured || told.asked.elapsed() < ASK_AGAIN
        })
    }

    /// Asks one pod that may not be able to answer yet, so that silence is not held against
    /// it, and keeps its answer: not more often
    /// than a round looks for it, and not while many others are asked, since many pods that
    /// start at once would make a long queue.
    pub async fn ask_early(&self, question: &Question) {
        let Ok(_place) = self.places.try_acquire() else {
            return;
        };
        if self.note_question(&question.uid) {
            self.put(question, 0).await;
        }
    }

    /// Notes that the pod `uid` is asked early, unless it was just asked.
    fn note_question(&self, uid: &str) -> bool {
        let mut told = self.lock();
        let now = Instant::now();
        if let Some(told) = told.get_mut(uid) {
            let is_due = now.duration_since(told.asked) >= EARLY_EVERY;
            if is_due {
                told.asked = now;
            }
            return is_due;
        }
        told.insert(uid.to_owned(), Told::at(now));
        true
    }

    /// Asks one pod and keeps its answer.
    pub async fn ask(&self, question: &Question) {
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        self.put(question, 1).await;
    }

    /// Tells one pod which adapters to have, and keeps what it says then.
    pub async fn tell(&self, question: &Question, list: &AdapterList) {
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        let socket = SocketAddr::new(question.address, INTERNAL_PORT);
        match tokio::time::timeout(ANSWER_WITHIN, send_adapters(socket, list)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let uid = &question.uid;
                tracing::warn!(uid, error, "a worker did not take its list of adapters");
            }
            Err(_) => tracing::warn!(uid = question.uid, "a worker was not told its adapters"),
        }
        self.put(question, 1).await;
    }

    /// Tells a pod that its answers get no more than `seconds` once it is asked to end. One
    /// that does not hear it is ended all the same, and its clients are cut off.
    pub async fn hurry(&self, pod: &Question, seconds: u32) {
        let socket = SocketAddr::new(pod.address, INTERNAL_PORT);
        let path = format!("{DRAIN_PATH}?{DRAIN_SECONDS}={seconds}");
        let told = tokio::time::timeout(
            ANSWER_WITHIN,
            send(socket, Method::POST, &path, Bytes::new()),
        )
        .await;
        let error = match told {
            Ok(Ok((status, _))) if status.is_success() => return,
            Ok(Ok((status, _))) => status.to_string(),
            Ok(Err(error)) => error,
            Err(_) => "it does not answer".to_owned(),
        };
        tracing::warn!(
            uid = pod.uid,
            error,
            "a worker was not told to end its answers"
        );
    }

    /// Without an answer the pod has `blame` more failures.
    async fn put(&self, question: &Question, blame: u32) {
        let asked = Instant::now();
        let socket = SocketAddr::new(question.address, INTERNAL_PORT);
        let answer =
            tokio::time::timeout(ANSWER_WITHIN, fetch(socket, question.answers_within)).await;
        let now = Instant::now();
        let mut told = self.lock();
        told.retain(|_, told| told.asked.elapsed() < FORGOTTEN_AFTER);
        let entry = told
            .entry(question.uid.clone())
            .or_insert_with(|| Told::at(asked));
        entry.asked = asked;
        match answer {
            Ok(Ok(report)) => {
                let state = PodState {
                    phase: report.phase,
                    progress: report.load,
                    load: report.running.saturating_add(report.waiting),
                    memory: memory(&report),
                    adapters: report.adapters,
                    answer: report.self_test.map(|test| test.answer),
                    answers: report.answers,
                    age: Duration::ZERO,
                };
                if state.memory.is_some() {
                    entry.measured = Some(now);
                }
                entry.state = Some((state, now));
                entry.failures = 0;
            }
            Ok(Err(error)) => {
                tracing::debug!(uid = question.uid, error, "a worker did not tell its state");
                entry.failures += blame;
            }
            Err(_) => entry.failures += blame,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What each rank has taken of memory; nothing as long as there are no ranks.
fn memory(report: &StateReport) -> Option<Vec<RankMemory>> {
    let ranks = report.ranks.iter().map(|rank| rank.memory);
    let all: Vec<_> = ranks.collect::<Option<_>>()?;
    (!all.is_empty()).then_some(all)
}

/// One `GET` of a worker's state.
async fn fetch(socket: SocketAddr, within: Option<Duration>) -> Result<StateReport, String> {
    let path = match within {
        Some(time) => format!("{STATE_PATH}?{ANSWERS_WITHIN}={}", time.as_secs()),
        None => STATE_PATH.to_owned(),
    };
    let (_, body) = send(socket, Method::GET, &path, Bytes::new()).await?;
    serde_json::from_slice(&body).map_err(|error| error.to_string())
}

/// One `PUT` of the adapters that a group should have.
async fn send_adapters(socket: SocketAddr, list: &AdapterList) -> Result<(), String> {
    let body = serde_json::to_vec(list).map_err(|error| error.to_string())?;
    let (status, answer) = send(socket, Method::PUT, ADAPTERS_PATH, body.into()).await?;
    if status == StatusCode::ACCEPTED {
        return Ok(());
    }
    Err(format!("{status}: {}", String::from_utf8_lossy(&answer)))
}

/// One request to a worker. The connection ends with it.
async fn send(
    socket: SocketAddr,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let stream = TcpStream::connect(socket).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| text(&e))?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", socket.to_string())
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|e| text(&e))?;
    let response = sender.send_request(request).await.map_err(|e| text(&e))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST_BYTES);
    let body = body.collect().await.map_err(|e| text(&e))?.to_bytes();
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    #[tokio::test]
    async fn nothing_stays_open_to_a_worker_that_does_not_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let socket = listener.local_addr().expect("an address");
        let within = Duration::from_mins(10);
        let asked = tokio::spawn(timeout(
            Duration::from_millis(300),
            fetch(socket, Some(within)),
        ));
        let (mut stream, _) = listener.accept().await.expect("a connection");
        asked.await.expect("ran").expect_err("no answer");
        let mut request = Vec::new();
        let end = timeout(Duration::from_secs(10), stream.read_to_end(&mut request)).await;
        end.expect("the connection has ended")
            .expect("as it should");
        let line = b"GET /state?answersWithin=600 HTTP/1.1\r\n";
        assert!(request.starts_with(line), "{request:?}");
    }

    #[tokio::test]
    async fn early_questions_have_bounds() {
        let states = States::default();
        assert!(states.note_question("a"));
        assert!(!states.note_question("a"), "it was just asked");
        assert!(states.note_question("b"));
        let question = Question {
            uid: "c".to_owned(),
            address: [127, 0, 0, 1].into(),
            answers_within: None,
        };
        let places = u32::try_from(AT_ONCE).expect("few");
        let all = states.places.acquire_many(places).await.expect("open");
        states.ask_early(&question).await;
        assert!(states.note_question("c"), "it waits for no place");
        drop(all);
    }
}
