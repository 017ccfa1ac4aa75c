//! How far the fetch is, told on stderr and to whoever asks for the state.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::routing::get;
use axum::{Json, Router};
use llama_contract::{LoadProgress, STATE_PATH, StateReport, WorkerPhase};
use llama_model_copy::progress;
use tokio::net::TcpListener;

/// Time between two lines of progress.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Counts bytes.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes that are there, whoever brought them.
    done: AtomicU64,
    /// Bytes that came since the start.
    came: AtomicU64,
    /// Bytes that there will be; 0 as long as that is not known.
    total: AtomicU64,
    start: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            done: AtomicU64::new(0),
            came: AtomicU64::new(0),
            total: AtomicU64::new(0),
            start: Instant::now(),
        }
    }

    pub(crate) fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Bytes that were there before, or that another brings.
    pub(crate) fn has(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that came.
    pub(crate) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.came.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that are there no more.
    pub(crate) fn lost(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What another brings: `done` bytes are there.
    pub(crate) fn watch(&self, done: u64) {
        let before = self.done.swap(done, Ordering::Relaxed);
        let came = if before == 0 {
            0
        } else {
            done.saturating_sub(before)
        };
        self.came.fetch_add(came, Ordering::Relaxed);
    }

    fn load(&self) -> LoadProgress {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        progress_of(
            of(&self.done),
            of(&self.came),
            of(&self.total),
            self.start.elapsed(),
        )
    }

    /// One line on stderr.
    pub(crate) fn tell(&self) {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(done);
        let line = progress::line(done, total, self.start.elapsed());
        eprintln!("{}: {line}", crate::PROGRAM);
    }

    pub(crate) async fn tell_for_ever(&self) {
        loop {
            tokio::time::sleep(TELL_EVERY).await;
            self.tell();
        }
    }
}

fn progress_of(done: u64, came: u64, total: u64, elapsed: Duration) -> LoadProgress {
    let millis = u64::try_from(elapsed.as_millis())
        .unwrap_or(u64::MAX)
        .max(1);
    let rate = came.saturating_mul(1000) / millis;
    let left = total.saturating_sub(done);
    LoadProgress {
        bytes_done: done,
        bytes_total: total,
        bytes_per_second: rate,
        seconds_left: (rate > 0 && total > 0).then(|| left / rate),
    }
}

/// Tells the state on `port` until the program ends. Without the port the fetch goes on:
/// only nobody sees how far it is.
pub(crate) async fn serve(port: u16, progress: Arc<Progress>) {
    let report = move || {
        std::future::ready(Json(StateReport {
            phase: WorkerPhase::Fetching,
            load: progress.load(),
            ..StateReport::default()
        }))
    };
    let app = Router::new().route(STATE_PATH, get(report));
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let result = match TcpListener::bind(address).await {
        // Where there is no IPv6.
        Err(_) => TcpListener::bind(("0.0.0.0", port)).await,
        bound => bound,
    };
    match result {
        Ok(listener) => {
            // Ends with the program.
            let _ = axum::serve(listener, app).await;
        }
        Err(error) => eprintln!("{}: no state on port {port}: {error}", crate::PROGRAM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_of_what_came_and_the_rest_follows_from_it() {
        let load = progress_of(600, 100, 1000, Duration::from_secs(2));
        assert_eq!((load.bytes_per_second, load.seconds_left), (50, Some(8)));
        let load = progress_of(600, 0, 1000, Duration::from_secs(2));
        assert_eq!((load.bytes_per_second, load.seconds_left), (0, None));
        let load = progress_of(600, 100, 0, Duration::from_secs(2));
        assert_eq!(load.seconds_left, None, "how much there is, is not known");
    }

    #[test]
    fn what_another_brings_counts_from_the_first_look() {
        let progress = Progress::new();
        for done in [500, 700, 900] {
            progress.watch(done);
        }
        assert_eq!(progress.came.load(Ordering::Relaxed), 400);
        assert_eq!(progress.done.load(Ordering::Relaxed), 900);
    }
}
