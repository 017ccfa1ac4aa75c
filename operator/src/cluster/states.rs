//! What the first pods of groups say of themselves.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use llama_contract::{INTERNAL_PORT, STATE_PATH, StateReport};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::reconcile::observe::LeaderState;

/// Longest wait for one answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// A word older than this is not passed on.
const FRESH_FOR: Duration = Duration::from_secs(15);
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
    load: u32,
    at: Instant,
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
}

impl States {
    /// What the pod `uid` said last, if that is not long ago.
    pub fn get(&self, uid: &str) -> Option<LeaderState> {
        let told = self.lock();
        let told = told.get(uid)?;
        let age = told.at.elapsed();
        let load = told.load;
        (age < FRESH_FOR).then_some(LeaderState { load, age })
    }

    /// Asks one pod and keeps its answer.
    pub async fn ask(&self, question: &Question) {
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        let answer = tokio::time::timeout(ANSWER_WITHIN, fetch(question.address)).await;
        let load = match answer {
            Ok(Ok(report)) => Some(report.running.saturating_add(report.waiting)),
            Ok(Err(error)) => {
                tracing::debug!(uid = question.uid, error, "a worker did not tell its state");
                None
            }
            Err(_) => None,
        };
        let mut told = self.lock();
        told.retain(|_, told| told.at.elapsed() < FRESH_FOR);
        if let Some(load) = load {
            let at = Instant::now();
            told.insert(question.uid.clone(), Told { load, at });
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Told>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One `GET` of a worker's state.
async fn fetch(address: IpAddr) -> Result<StateReport, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let socket = SocketAddr::new(address, INTERNAL_PORT);
    let stream = TcpStream::connect(socket).await.map_err(|e| text(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| text(&e))?;
    let connection = tokio::spawn(connection);
    let request = Request::get(STATE_PATH)
        .header("host", socket.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|e| text(&e))?;
    let response = sender.send_request(request).await.map_err(|e| text(&e))?;
    let body = Limited::new(response.into_body(), MOST_BYTES);
    let body = body.collect().await.map_err(|e| text(&e))?.to_bytes();
    connection.abort();
    serde_json::from_slice(&body).map_err(|e| text(&e))
}
