//! A pod whose model makes vectors: one process, without ranks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llama_contract::{
    Device, FailureCategory, LaunchArgs, LoadProgress, RankPhase, RankReport, StateReport,
    WorkerPhase,
};
use llama_model::EmbeddingCheckpoint;
use llama_model::embedding::{EmbeddingMemory, EmbeddingRequest};
use tokio::sync::watch;

use super::args::ServeArgs;
use super::drain::DrainTime;
use super::serving::Servers;
use super::{FLUSH, Signals, internal};
use crate::cgroup::{Cgroup, usable_cores};
use crate::comm::HEARTBEAT_PERIOD;
use crate::embedding::{self, ANSWER_VALUES, EmbeddingFront, EmbeddingFrontParts, Loaded};
use crate::engine::EngineStats;
use crate::failure::{Failure, of_model};
use crate::metrics::Metrics;
use crate::server::Admission;
use crate::server::internal::Inspect;

/// What is left to decide once the input is in order.
#[derive(Clone, Copy, Debug)]
struct Prepared {
    max_tokens: u32,
    threads: usize,
}

/// Runs the pod until it is asked to end.
///
/// # Errors
/// The failure that ended it.
pub(super) fn run(
    args: &ServeArgs,
    checkpoint: EmbeddingCheckpoint,
    cgroup: &Cgroup,
) -> Result<(), Failure> {
    let prepared = prepare(args, &checkpoint, cgroup)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| internal(&error))?;
    let ended = runtime.block_on(serve(args, checkpoint, prepared));
    // Answers that nobody reads must not hold the process.
    runtime.shutdown_background();
    ended
}

/// Checks flags and memory.
fn prepare(
    args: &ServeArgs,
    checkpoint: &EmbeddingCheckpoint,
    cgroup: &Cgroup,
) -> Result<Prepared, Failure> {
    check_flags(args)?;
    let longest = checkpoint.config().max_tokens;
    let max_tokens = args.launch.max_tokens.map_or(longest, |most| most as usize);
    let cores = usable_cores(cgroup);
    let threads = args.launch.threads_per_rank.map_or(cores, |t| t as usize);
    let request = EmbeddingRequest {
        max_tokens,
        threads,
        answer_values: ANSWER_VALUES,
    };
    let memory = EmbeddingMemory::new(checkpoint, request).map_err(|error| of_model(&error))?;
    // Without a limit the machine's memory is nobody's promise.
    let limit = args.memory_limit_bytes.or_else(|| cgroup.memory_limit());
    if let Some(limit) = limit {
        memory.check(limit).map_err(|error| of_model(&error))?;
    }
    tracing::info!(
        layers = checkpoint.config().layers,
        dimensions = checkpoint.config().hidden,
        max_tokens,
        threads,
        "the embedding model fits"
    );
    Ok(Prepared {
        max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
        threads,
    })
}

/// Refuses what an embedding model does not do.
fn check_flags(args: &ServeArgs) -> Result<(), Failure> {
    let launch = &args.launch;
    for (flag, value) in [
        ("--tensor-parallel", launch.tensor_parallel),
        ("--pipeline-parallel", launch.pipeline_parallel),
        ("--nodes", launch.nodes),
    ] {
        if value != 1 {
            let message = format!("{flag}={value}: an embedding model is not split, only 1 works");
            return Err(Failure::new(FailureCategory::InvalidLayout, message));
        }
    }
    for (flag, set) in [
        ("--node-index", launch.node_index != 0),
        ("--device=cuda", launch.device != Device::Cpu),
        ("--no-prefix-caching", args.no_prefix_caching),
        ("--speculative-tokens", args.speculative_tokens != 0),
        ("--verify-digests", args.verify_digests),
    ] {
        if set {
            let message = format!("{flag} does not apply to an embedding model");
            return Err(Failure::new(FailureCategory::InvalidConfiguration, message));
        }
    }
    Ok(())
}

/// What the internal port shows.
#[derive(Debug)]
struct EmbeddingState {
    launch: LaunchArgs,
    front: Arc<EmbeddingFront>,
    admission: watch::Sender<Admission>,
    metrics: Arc<Metrics>,
    /// How long answers get once the pod is asked to end.
    drain: DrainTime,
    /// Bytes of the files.
    bytes: u64,
    is_loaded: AtomicBool,
}

impl Inspect for EmbeddingState {
    fn state(&self) -> StateReport {
        let is_loaded = self.is_loaded.load(Ordering::Relaxed);
        let stats = self.stats();
        StateReport {
            group: self.launch.group.clone(),
            revision: self.launch.revision.clone(),
            epoch: self.launch.epoch,
            node_index: self.launch.node_index,
            phase: match &*self.admission.borrow() {
                Admission::Failed(_) => WorkerPhase::Failed,
                Admission::Draining => WorkerPhase::Draining,
                Admission::Serving => WorkerPhase::Ready,
                Admission::Starting => WorkerPhase::LoadingWeights,
            },
            load: LoadProgress {
                bytes_done: if is_loaded { self.bytes } else { 0 },
                bytes_total: self.bytes,
                ..LoadProgress::default()
            },
            ranks: vec![RankReport {
                pid: std::process::id(),
                phase: if is_loaded {
                    RankPhase::Ready
                } else {
                    RankPhase::LoadingWeights
                },
                ..RankReport::default()
            }],
            running: stats.running,
            waiting: stats.waiting,
            self_test: None,
            adapters: Vec::new(),
            answers: None,
            failure: None,
        }
    }

    fn limit_drain(&self, time: Duration) {
        self.drain.limit(time);
    }

    fn admission(&self) -> Admission {
        self.admission.borrow().clone()
    }

    fn stats(&self) -> EngineStats {
        self.front.stats()
    }

    fn metrics(&self) -> Arc<Metrics> {
        // This process answers, so its one rank lives.
        self.metrics.rank(0, Duration::ZERO, 0);
        Arc::clone(&self.metrics)
    }
}

async fn serve(
    args: &ServeArgs,
    checkpoint: EmbeddingCheckpoint,
    prepared: Prepared,
) -> Result<(), Failure> {
    let mut signals = Signals::new().map_err(|error| internal(&error))?;
    let launch = &args.launch;
    let metrics = Arc::new(Metrics::new(&launch.served_name));
    let (admission, admitted) = watch::channel(Admission::Starting);
    let front = Arc::new(EmbeddingFront::new(EmbeddingFrontParts {
        served_name: launch.served_name.clone(),
        dimensions: checkpoint.config().hidden,
        max_tokens: prepared.max_tokens,
        open_requests: 1 + usize::from(args.max_waiting),
        waiting_tokens: args.max_waiting_tokens as usize,
        admission: admitted,
        metrics: Arc::clone(&metrics),
    }));
    let state = Arc::new(EmbeddingState {
        launch: launch.clone(),
        front: Arc::clone(&front),
        admission,
        metrics,
        drain: DrainTime::new(launch.drain_seconds),
        bytes: checkpoint.files().iter().map(|file| file.len).sum(),
        is_loaded: AtomicBool::new(false),
    });
    let routes = embedding::router(Arc::clone(&front));
    let inspect = Arc::clone(&state) as Arc<dyn Inspect>;
    let admitted = state.admission.subscribe();
    let servers = Servers::open(args, Some(routes), admitted, inspect).await?;
    let loading = tokio::task::spawn_blocking(move || Loaded::new(&checkpoint, prepared.threads));
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = signals.asked() => return Ok(()),
    };
    let loaded = loaded.map_err(|error| internal(&error))?;
    front.set_loaded(loaded.map_err(|error| of_model(&error))?);
    state.is_loaded.store(true, Ordering::Relaxed);
    state.admission.send_replace(Admission::Serving);
    tracing::info!("the embedding model is ready");

    signals.asked().await;
    let drain = state.drain.get();
    tracing::info!(seconds = drain.as_secs(), "finish what is asked, then end");
    state.admission.send_replace(Admission::Draining);
    tokio::select! {
        () = drained(&front, Instant::now() + drain) => {}
        // Twice means at once.
        () = signals.asked() => {}
    }
    front.close();
    servers.close(FLUSH).await;
    Ok(())
}

/// Waits until nothing is open, but not past `deadline`.
async fn drained(front: &EmbeddingFront, deadline: Instant) {
    while front.open() > 0 {
        if Instant::now() >= deadline {
            tracing::warn!("the drain deadline has passed, unfinished answers end");
            return;
        }
        tokio::time::sleep(HEARTBEAT_PERIOD).await;
    }
}
