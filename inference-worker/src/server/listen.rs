//! The API port: HTTP/1.1 within bounds that a hostile client cannot pass.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Admission;
use super::stall::Drained;

/// Connections that are open at once; more wait until one closes.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send a request's header, and how long a connection
/// may stay open without one.
const HEADER_DEADLINE: Duration = Duration::from_secs(30);
/// How long a client may take nothing of what is sent to it.
const WRITE_DEADLINE: Duration = Duration::from_mins(1);
/// How long a connection is kept for further requests. A client that keeps its own would
/// never hear that the Service has other pods, or that this one is to end.
const KEPT_FOR: Duration = Duration::from_secs(3);
/// Longest header, in bytes.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Pause after a failure to accept, which is mostly a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Bounds of a port.
#[derive(Clone, Copy, Debug)]
pub struct PortLimits {
    /// Connections that are open at once; more wait until one closes.
    pub connections: usize,
    /// How long a client may take to send a request's header.
    pub header_deadline: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_deadline: Duration,
    /// How long a connection is kept: the first answer that begins later is its last.
    pub kept_for: Duration,
}

impl Default for PortLimits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            header_deadline: HEADER_DEADLINE,
            write_deadline: WRITE_DEADLINE,
            kept_for: KEPT_FOR,
        }
    }
}

/// Answers the connections of `listener` until `closing`, then lets those that are
/// open finish what they were asked. Once `admission` is that of a pod which is about to
/// end, no connection is kept.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    admission: watch::Receiver<Admission>,
    closing: CancellationToken,
    limits: PortLimits,
) {
    allow_files();
    let places = Arc::new(Semaphore::new(limits.connections));
    let open = TaskTracker::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_deadline)
        .max_buf_size(MAX_HEADER_BYTES);
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = closing.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Tokens are small and must not wait for each other.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection delays small packets");
        }
        let stream = Drained::new(stream, limits.write_deadline);
        let closing = closing.clone();
        let leaving = leaving(admission.clone());
        let ending = async move {
            tokio::select! {
                () = leaving => {}
                () = closing.cancelled() => {}
            }
        };
        let keep = Keep {
            until: Instant::now() + limits.kept_for,
            admission: admission.clone(),
        };
        let connection = carry(http.clone(), stream, routes.clone(), ending, keep);
        open.spawn(async move {
            let _place = place;
            connection.await;
        });
    }
    open.close();
    open.wait().await;
}

/// Lets the process open as many files as it may: connections are files, and the limit that
/// processes begin with is often lower than their number.
fn allow_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?limit, "the number of open files stays limited");
    }
}

/// Waits until the pod becomes one that is about to end. Never for a connection that came
/// later: it gets one answer, which says that it is the last.
async fn leaving(mut admission: watch::Receiver<Admission>) {
    let drains = |admission: &Admission| *admission == Admission::Draining;
    let came_late = drains(&admission.borrow());
    if came_late || admission.wait_for(drains).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// How long a connection is kept for further requests.
struct Keep {
    until: Instant,
    /// No longer than the pod goes on.
    admission: watch::Receiver<Admission>,
}

impl Keep {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until || *self.admission.borrow() == Admission::Draining
    }
}

async fn carry(
    http: http1::Builder,
    stream: Drained<TcpStream>,
    routes: Router,
    ending: impl Future<Output = ()>,
    keep: Keep,
) {
    let (keep, routes) = (Arc::new(keep), TowerToHyperService::new(routes));
    let service = service_fn(move |request| {
        let (answer, keep) = (routes.call(request), Arc::clone(&keep));
        async move {
            let mut response = answer.await?;
            if keep.is_over() {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = ending => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}
