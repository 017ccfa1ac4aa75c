//! Process 1 of a worker pod: checks the input, starts the pod's ranks, watches
//! them, and on the first pod answers the API.

pub mod args;
mod cause;
mod children;
mod devices;
mod drain;
mod embedding;
mod idle;
mod memory;
mod model_lock;
mod preflight;
mod rehearsal;
mod retest;
mod self_test;
mod serving;
mod state;

use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, FailureReport, SelfTestReport};
use llama_model::EmbeddingCheckpoint;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};

use self::args::ServeArgs;
use self::cause::{Sight, first_cause, is_hearsay_of};
use self::children::Children;
use self::drain::DrainTime;
use self::preflight::Prepared;
use self::retest::Retest;
use self::self_test::Question;
use self::serving::Servers;
use self::state::PodState;
use crate::cgroup::Cgroup;
use crate::comm::HEARTBEAT_PERIOD;
use crate::comm::board::Board;
use crate::comm::region::Region;
use crate::comm::shm::ShmLink;
use crate::comm::silence::SilenceWatch;
use crate::engine::EngineClient;
use crate::failure::{Failure, of_model};
use crate::metrics::Metrics;
use crate::rank::args::RankArgs;
use crate::server::internal::Inspect;
use crate::server::{AdapterRack, Admission, Front, FrontParts, router};
use crate::telemetry::LogFormat;
use crate::termination;

pub(crate) use self::devices::{RUNTIME_BYTES, usable};
pub(crate) use self::preflight::context;

/// How long a cause that only a peer has told may still be bettered by the end
/// of the rank it is about.
const SETTLE: Duration = Duration::from_millis(100);
/// How long ranks get to tell the ranks of other pods why the group is over.
const FAREWELL: Duration = Duration::from_millis(300);
/// How long clients get to read the end of their answers.
const FLUSH: Duration = Duration::from_millis(1700);
/// How long ranks get to end once asked.
const RANKS_END: Duration = Duration::from_secs(5);

/// Runs the pod until the group ends. Returns the exit code.
///
/// Must be called on the main thread: ranks end with the thread that started
/// them.
pub fn run(args: &ServeArgs, log_format: LogFormat, token: Option<&str>) -> u8 {
    let lock = args.launch.model_lock.as_deref().map(model_lock::hold);
    // Held until this function ends.
    let ended = match lock.transpose() {
        Ok(_lock) => run_model(args, log_format, token),
        Err(failure) => Err(failure),
    };
    match ended {
        Ok(Ended::Asked) => 0,
        Ok(Ended::Failed(report)) => report.category.exit_code(),
        Err(failure) => {
            let report = failure.report(None, args.launch.epoch);
            tell_kubernetes(&report, &args.termination_log);
            report.category.exit_code()
        }
    }
}

fn run_model(
    args: &ServeArgs,
    log_format: LogFormat,
    token: Option<&str>,
) -> Result<Ended, Failure> {
    let cgroup = Cgroup::default();
    match EmbeddingCheckpoint::open(&args.launch.model).map_err(|error| of_model(&error))? {
        Some(model) => embedding::run(args, model, &cgroup).map(|()| Ended::Asked),
        None => run_ranks(args, cgroup, log_format, token),
    }
}

/// Runs a pod of ranks, which write text.
fn run_ranks(
    args: &ServeArgs,
    cgroup: Cgroup,
    log_format: LogFormat,
    token: Option<&str>,
) -> Result<Ended, Failure> {
    preflight::prepare(args, token.is_some(), &cgroup)
        .and_then(|prepared| Pod::start(args, prepared, cgroup, log_format))
        .and_then(|(pod, front)| {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .map_err(|error| internal(&error))?;
            let ended = runtime.block_on(pod.serve(front));
            // Answers that nobody reads must not hold the process.
            runtime.shutdown_background();
            Ok(ended)
        })
}

fn internal(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureCategory::Internal, error)
}

/// Logs `report` and leaves it as the container's termination message.
fn tell_kubernetes(report: &FailureReport, path: &Path) {
    tracing::error!(
        category = report.category.as_str(),
        rank = report.rank,
        node = report.node,
        step = report.step,
        epoch = report.epoch,
        "{}",
        report.message
    );
    termination::write(path, &report.to_termination_message());
}

/// How a pod ended.
enum Ended {
    /// SIGTERM, or rank 0 has ended the group in order.
    Asked,
    /// The group failed and has told so.
    Failed(FailureReport),
}

/// Whether the pod is to end.
#[derive(Clone, Copy, Debug)]
enum Stopping {
    No,
    /// Running answers are finished until then.
    Draining(Instant),
    /// Ranks were asked to end by then.
    Ending(Instant),
}

/// What the API's start takes from the pod.
struct FrontStart {
    stream: std::os::unix::net::UnixStream,
    tokenizer: llama_model::text::Tokenizer,
    template: llama_model::text::ChatTemplate,
    slots: u32,
    max_tokens: u32,
}

struct Pod<'a> {
    args: &'a ServeArgs,
    children: Children,
    board: Board,
    first_rank: u32,
    cgroup: Cgroup,
    kills_before: u64,
    watches: Vec<SilenceWatch>,
    stopping: Stopping,
    /// What the ranks are asked before requests are taken.
    question: Option<Question>,
    /// What comes of it.
    rehearsal: Option<oneshot::Receiver<Result<SelfTestReport, Failure>>>,
    /// Asks it again, once requests are taken and as long as they are.
    retest: Option<Retest>,
}

impl<'a> Pod<'a> {
    /// Starts the ranks.
    fn start(
        args: &'a ServeArgs,
        prepared: Prepared,
        cgroup: Cgroup,
        log_format: LogFormat,
    ) -> Result<(Self, Option<FrontStart>), Failure> {
        let ranks = prepared.ranks_here as usize;
        let region = Region::create(ShmLink::bytes(ranks)).map_err(|error| internal(&error))?;
        let region = Arc::new(region);
        let board = Board::new(Arc::clone(&region), ranks).ok_or_else(|| {
            Failure::new(FailureCategory::Internal, "the shared memory is too small")
        })?;
        let mut pod = Self {
            args,
            children: Children::new(log_format),
            board,
            first_rank: prepared.launch.node_index * prepared.ranks_here,
            kills_before: cgroup.out_of_memory_kills(),
            cgroup,
            watches: vec![SilenceWatch::default(); ranks],
            stopping: Stopping::No,
            question: None,
            rehearsal: None,
            retest: None,
        };
        let front = pod.start_ranks(prepared, &region)?;
        Ok((pod, front))
    }

    fn start_ranks(
        &mut self,
        prepared: Prepared,
        region: &Region,
    ) -> Result<Option<FrontStart>, Failure> {
        let program = std::env::current_exe().map_err(|error| internal(&error))?;
        let (capacity, max_tokens) = (prepared.capacity, prepared.max_tokens);
        let mut rank_args = RankArgs {
            launch: prepared.launch,
            rank: 0,
            supervisor: rustix::process::getpid().as_raw_nonzero().get(),
            shared_memory: region.raw_fd(),
            slots: capacity.slots,
            blocks: capacity.blocks,
            chunk_blocks: capacity.chunk_blocks,
            queue: self.args.max_waiting.into(),
            queue_tokens: self.args.max_waiting_tokens as usize,
            no_prefix_caching: self.args.no_prefix_caching,
            speculative_tokens: self.args.speculative_tokens.into(),
            own_cores: prepared.own_cores,
            verify_digests: self.args.verify_digests,
            digest: prepared.digest,
            node: self.args.node_name.clone(),
            ip: self.args.pod_ip,
        };
        let mut front = None;
        if let Some((tokenizer, template)) = prepared.text {
            let (near, far) =
                std::os::unix::net::UnixStream::pair().map_err(|error| internal(&error))?;
            self.question = Some(self_test::question(&tokenizer, max_tokens)?);
            let start = FrontStart {
                stream: near,
                tokenizer,
                template,
                slots: capacity.slots,
                max_tokens,
            };
            front = Some((start, far));
        }
        let (front, mut far) = front.unzip();
        for rank in self.first_rank..self.first_rank + prepared.ranks_here {
            rank_args.rank = rank;
            self.children
                .start(&program, rank, rank_args.to_args(), far.take())
                .map_err(|error| internal(&error))?;
        }
        Ok(front)
    }

    /// Serves until the group ends.
    async fn serve(mut self, front: Option<FrontStart>) -> Ended {
        match self.open(front).await {
            Ok((state, servers, mut signals)) => {
                let ended = self.watch(&state, &mut signals).await;
                self.close(ended, &state, servers).await
            }
            Err(failure) => {
                let report = failure.report(Some(&self.args.node_name), self.args.launch.epoch);
                tell_kubernetes(&report, &self.args.termination_log);
                Ended::Failed(report)
            }
        }
    }

    /// Opens the ports.
    async fn open(
        &self,
        front: Option<FrontStart>,
    ) -> Result<(Arc<PodState>, Servers, Signals), Failure> {
        let signals = Signals::new().map_err(|error| internal(&error))?;
        let launch = &self.args.launch;
        let metrics = Arc::new(Metrics::new(&launch.served_name));
        let (admission, admitted) = watch::channel(Admission::Starting);
        let mut engine = None;
        let mut api = None;
        let mut racks = None;
        if let Some(start) = front {
            let stream = start.stream;
            stream
                .set_nonblocking(true)
                .map_err(|error| internal(&error))?;
            let stream =
                tokio::net::UnixStream::from_std(stream).map_err(|error| internal(&error))?;
            let (client, carry) = EngineClient::start(stream);
            tokio::spawn(async move {
                // Rank 0's end reaches the clients through the supervisor's watch.
                if let Err(error) = carry.await {
                    tracing::warn!(%error, "the connection to rank 0 broke");
                }
            });
            let rack = AdapterRack::new(
                client.clone(),
                launch.served_name.clone(),
                crate::adapters::room(launch.adapters),
                self.args.loading(),
            );
            racks = Some(rack.clone());
            api = Some(Front::new(FrontParts {
                served_name: launch.served_name.clone(),
                max_tokens: start.max_tokens,
                open_requests: start.slots as usize + usize::from(self.args.max_waiting),
                tokenizer: start.tokenizer,
                template: start.template,
                engine: client.clone(),
                rack,
                admission: admitted,
                metrics: Arc::clone(&metrics),
            }));
            engine = Some(client);
        }
        let state = Arc::new(PodState {
            launch: launch.clone(),
            board: self.board.clone(),
            first_rank: self.first_rank,
            pids: self.children.pids(),
            memory: memory::PeakMemory::default(),
            admission,
            engine,
            rack: racks,
            self_test: OnceLock::new(),
            repeats: AtomicU32::new(0),
            drain: DrainTime::new(launch.drain_seconds),
            metrics,
            silences: Mutex::default(),
        });
        let routes = api.map(|front| router(Arc::new(front)));
        let inspect = Arc::clone(&state) as Arc<dyn Inspect>;
        let admitted = state.admission.subscribe();
        let servers = Servers::open(self.args, routes, admitted, inspect).await?;
        Ok((state, servers, signals))
    }

    /// Watches the ranks until the group fails (`Some`) or ends in order.
    async fn watch(&mut self, state: &PodState, signals: &mut Signals) -> Option<Failure> {
        let mut tick = tokio::time::interval(HEARTBEAT_PERIOD);
        loop {
            let asked = tokio::select! {
                _ = tick.tick() => false,
                _ = signals.child.recv() => false,
                _ = signals.terminate.recv() => true,
                _ = signals.interrupt.recv() => true,
            };
            if asked {
                self.stop(state);
            }
            if let Some(failure) = self.look(state) {
                if self.is_farewell(&failure) {
                    return None;
                }
                return Some(self.settle(failure, state).await);
            }
            if self.has_ended(state) {
                return None;
            }
        }
    }

    /// SIGTERM: once to drain, twice to end.
    fn stop(&mut self, state: &PodState) {
        let now = Instant::now();
        // What is asked now is taken back.
        self.retest = None;
        let drain = state.drain.get();
        self.stopping = match self.stopping {
            Stopping::No => {
                tracing::info!(
                    seconds = drain.as_secs(),
                    "finish running answers, then end"
                );
                Stopping::Draining(now + drain)
            }
            Stopping::Draining(_) => Stopping::Draining(now),
            Stopping::Ending(_) => Stopping::Ending(now),
        };
        if *state.admission.borrow() == Admission::Starting {
            // There is nothing to finish, and ranks that load hear nothing.
            self.stopping = Stopping::Ending(now);
        }
        state.admission.send_replace(Admission::Draining);
    }

    /// Looks at the ranks once.
    fn look(&mut self, state: &PodState) -> Option<Failure> {
        self.children.poll();
        let now = Instant::now();
        let exits = self.children.exits();
        let sights: Vec<Sight> = (self.first_rank..)
            .zip(exits.iter().zip(&mut self.watches).enumerate())
            .map(|(rank, (local, (exit, watch)))| Sight {
                rank,
                exit: *exit,
                silent: watch.observe(self.board.heartbeat(local), now),
                step: self.board.step(local),
            })
            .collect();
        let silences: Vec<_> = sights.iter().map(|sight| sight.silent).collect();
        let silence = silences.iter().max().copied().unwrap_or_default();
        *state
            .silences
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = silences;
        if *state.admission.borrow() == Admission::Starting && state.is_ready() {
            match self.rehearsed(state) {
                None => {}
                Some(Ok(())) => {
                    state.memory.begin(&state.pids);
                    tracing::info!("all ranks of this pod are ready");
                    state.admission.send_replace(Admission::Serving);
                }
                Some(Err(failure)) => return Some(failure),
            }
        }
        // Rank 0 ends the group by a last step; other pods see only that.
        let may_end =
            self.args.launch.node_index > 0 || matches!(self.stopping, Stopping::Ending(_));
        let memory_kills = self.cgroup.out_of_memory_kills() - self.kills_before;
        let told = self.board.cause();
        first_cause(told.as_ref(), &sights, may_end, memory_kills)
            .or_else(|| self.retested(state, silence))
    }

    /// Whether a failure is only the first pod's end as another pod sees it,
    /// while all of them are being ended.
    fn is_farewell(&self, failure: &Failure) -> bool {
        self.args.launch.node_index > 0
            && !matches!(self.stopping, Stopping::No)
            && failure.category == FailureCategory::PeerLost
    }

    /// Looks again where only a peer has told of a failure here.
    async fn settle(&mut self, failure: Failure, state: &PodState) -> Failure {
        let is_hearsay = failure
            .rank
            .is_some_and(|rank| is_hearsay_of(&failure, rank));
        if !is_hearsay {
            return failure;
        }
        tokio::time::sleep(SETTLE).await;
        self.look(state).unwrap_or(failure)
    }

    /// Takes the steps of an orderly end; returns whether it is reached.
    fn has_ended(&mut self, state: &PodState) -> bool {
        let now = Instant::now();
        let all_ended = self.children.exits().iter().all(Option::is_some);
        match self.stopping {
            _ if all_ended => true,
            Stopping::No => false,
            Stopping::Draining(deadline) => {
                let is_done = match &state.engine {
                    Some(engine) => engine.open() == 0,
                    // The first pod ends the group; wait for that.
                    None => false,
                };
                if is_done || now >= deadline {
                    if !is_done {
                        tracing::warn!("the drain deadline has passed, unfinished answers end");
                    }
                    self.stopping = Stopping::Ending(now + RANKS_END);
                    if let Some(engine) = &state.engine {
                        engine.close();
                        if let Err(error) = engine.stop() {
                            tracing::warn!(%error, "ask the ranks to end");
                        }
                    }
                }
                false
            }
            Stopping::Ending(deadline) => now >= deadline,
        }
    }

    /// Tells everybody how it ended, lets clients read, and ends the ranks.
    async fn close(
        &mut self,
        failure: Option<Failure>,
        state: &PodState,
        servers: Servers,
    ) -> Ended {
        let ended = match failure {
            None => {
                if let Some(engine) = &state.engine {
                    engine.close();
                }
                Ended::Asked
            }
            Some(failure) => {
                let here = self.node_of(failure.rank);
                let report = failure.report(here, self.args.launch.epoch);
                tell_kubernetes(&report, &self.args.termination_log);
                state
                    .admission
                    .send_replace(Admission::Failed(Arc::new(report.clone())));
                if let Some(engine) = &state.engine {
                    engine.fail(report.clone());
                }
                self.board.fail(&failure);
                tokio::time::sleep(FAREWELL).await;
                Ended::Failed(report)
            }
        };
        servers.close(FLUSH).await;
        self.children.kill();
        ended
    }

    /// Our node when `rank` is one of ours.
    fn node_of(&self, rank: Option<u32>) -> Option<&'a str> {
        let local = rank?.checked_sub(self.first_rank)?;
        ((local as usize) < self.board.ranks()).then_some(self.args.node_name.as_str())
    }
}

/// The signals that a supervisor hears.
struct Signals {
    child: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            child: signal(SignalKind::child())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the request to end.
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
