//! One rank of a group: a child process of the pod's supervisor.

pub mod adapters;
pub mod args;
mod compute;
pub mod drawing;
pub mod engine;
mod fault;
pub mod forms;
pub mod plan;
pub mod throughput;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, RENDEZVOUS_PORT, RankPhase};
use llama_model::blocks::KvCapacity;
use llama_model::checkpoint::LoadFormat;
use llama_model::text::ModelText;
use llama_model::{Checkpoint, LoadOptions, ModelError, StepModel};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use self::adapters::AdapterDesk;
use self::args::{RankArgs, kv_format};
use self::compute::Compute;
use self::engine::{Engine, EngineError};
use self::forms::Forms;
use self::plan::Stepper;
use crate::comm::board::Board;
use crate::comm::placement::Placement;
use crate::comm::region::Region;
use crate::comm::rendezvous::{Identity, Mesh, Party, RENDEZVOUS_DEADLINE};
use crate::comm::seat::{Seat, SeatError};
use crate::comm::shm::ShmLink;
use crate::comm::{HEARTBEAT_PERIOD, LOAD_DEADLINE, Link};
use crate::engine::{ToEngine, frames};
use crate::failure::{Failure, of_model};
use crate::scheduler::{Limits, Scheduler};
use crate::structured::Vocabulary;

/// Tokens that one step computes at most.
pub const STEP_TOKENS: u32 = 256;
/// Messages of the front that rank 0 reads ahead.
const INBOX: usize = 1024;
/// How long the front may take no token before rank 0 gives up.
const FRONT_LIMIT: Duration = Duration::from_secs(10);

/// A rank that ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// This rank knows why.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The group was already over.
    #[error("the group is over")]
    Aborted,
}

impl RankError {
    fn of_engine(rank: u32, step: u64, error: &EngineError) -> Self {
        let failure = match error {
            EngineError::Step(error) => Failure::of_step(rank, step, error),
            EngineError::Front(_) => Some(
                Failure::from_error(FailureCategory::Internal, error)
                    .at_rank(rank)
                    .at_step(step),
            ),
        };
        failure.map_or(Self::Aborted, Self::Failed)
    }
}

/// Runs a rank until the group ends.
///
/// # Errors
/// When this rank or a peer fails. The cause is on the pod's board by then.
pub fn run(args: &RankArgs, token: Option<String>) -> Result<(), RankError> {
    follow_the_supervisor(args)?;
    let ranks = args.ranks_here();
    let internal = |error: &(dyn std::error::Error + 'static)| {
        Failure::from_error(FailureCategory::Internal, error)
    };
    let region = Region::from_inherited(args.shared_memory, ShmLink::bytes(ranks))
        .map_err(|error| internal(&error))?;
    let region = Arc::new(region);
    let board = Board::new(Arc::clone(&region), ranks)
        .ok_or_else(|| Failure::new(FailureCategory::Internal, "the shared memory is too small"))?;
    let placement = args.placement().ok_or_else(|| {
        Failure::new(
            FailureCategory::InvalidLayout,
            format!(
                "rank {} is in no pod: {} ranks, {} nodes",
                args.rank,
                args.launch.ranks(),
                args.launch.nodes
            ),
        )
    })?;
    let process = RankProcess {
        args,
        placement,
        board,
        region,
        local: args.local(),
    };
    process.start_heartbeat()?;
    let result = process.serve(token);
    if let Err(error) = &result {
        if let RankError::Failed(failure) = error {
            process.board.fail(failure);
        }
        process.board.set_phase(process.local, RankPhase::Failed);
    }
    result
}

/// Makes the kernel end this process with its supervisor.
fn follow_the_supervisor(args: &RankArgs) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::from_error(FailureCategory::Internal, &error))?;
    // It may have ended before the call above.
    let parent = getppid().map(rustix::process::Pid::as_raw_nonzero);
    if parent.is_some_and(|parent| parent.get() == args.supervisor) {
        return Ok(());
    }
    let message = format!("rank {} has lost its supervisor", args.rank);
    Err(Failure::new(FailureCategory::Internal, message))
}

struct RankProcess<'a> {
    args: &'a RankArgs,
    placement: Placement,
    board: Board,
    region: Arc<Region>,
    local: usize,
}

impl RankProcess<'_> {
    fn start_heartbeat(&self) -> Result<(), Failure> {
        let (board, local) = (self.board.clone(), self.local);
        let beat = move || {
            loop {
                board.beat(local);
                std::thread::sleep(HEARTBEAT_PERIOD);
            }
        };
        std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(beat)
            .map(drop)
            .map_err(|error| Failure::from_error(FailureCategory::Internal, &error))
    }

    fn serve(&self, token: Option<String>) -> Result<(), RankError> {
        let model_error = |error: ModelError| of_model(&error).at_rank(self.args.rank);
        let model = &self.args.launch.model;
        let checkpoint = Checkpoint::open(model, LoadFormat::Auto).map_err(model_error)?;
        let compute = Compute::open(self.args.launch.device, self.local)
            .map_err(|failure| failure.at_rank(self.args.rank))?;
        let (link, capacity) = self.connect(&compute, token)?;
        let mut link = fault::wrap(compute.connect(link, &self.board)?);
        self.board.set_phase(self.local, RankPhase::LoadingWeights);
        let mut model = self
            .load(&compute, &checkpoint, capacity)
            .map_err(model_error)?;
        let chunk = checkpoint.config().chunk;
        drop(checkpoint);

        // Ranks load at their own pace; nobody computes before all are there.
        let aborted = |error| match Failure::of_collective(&error) {
            Some(failure) => RankError::Failed(failure),
            None => RankError::Aborted,
        };
        link.set_deadline(LOAD_DEADLINE);
        link.gather_words([self.args.launch.epoch, 0, 0])
            .map_err(aborted)?;
        let hang = Duration::from_secs(self.args.launch.hang_timeout.into());
        link.set_deadline(hang);
        compute
            .watch_memory(&self.board, self.local)
            .map_err(|error| Failure::from_error(FailureCategory::Internal, &error))?;
        self.board.set_phase(self.local, RankPhase::Ready);
        tracing::info!(rank = self.args.rank, ?capacity, "rank is ready");

        let stepper = Stepper {
            model: model.as_mut(),
            link: link.as_mut(),
            board: &self.board,
            local: self.local,
            epoch: self.args.launch.epoch,
            step: 0,
            desk: AdapterDesk::default(),
            settled: None,
        };
        let result = if self.args.rank == 0 {
            self.lead(stepper, self.limits(capacity, chunk))
        } else {
            self.follow(stepper)
        };
        if let Err(RankError::Failed(failure)) = &result {
            // Before the link closes, so that it can pass the cause on.
            self.board.fail(failure);
        }
        result
    }

    /// The link that fits the group's shape, and what all pods have memory for.
    fn connect(
        &self,
        compute: &Compute,
        token: Option<String>,
    ) -> Result<(Box<dyn Link>, KvCapacity), Failure> {
        let (mut capacity, mut connections) = (self.args.capacity(), Vec::new());
        if self.args.launch.nodes > 1 {
            let mesh = self.meet(compute, token)?;
            capacity = mesh.capacity().unwrap_or(capacity);
            tracing::info!(
                rank = self.args.rank,
                ?capacity,
                "all ranks have come together"
            );
            let nodes = mesh.members.into_iter().map(|member| member.node).collect();
            self.board.set_nodes(nodes);
            connections = mesh.connections;
        }
        let seat = Seat {
            placement: self.placement,
            rank: self.args.rank as usize,
            region: Arc::clone(&self.region),
            board: self.board.clone(),
            own_cores: self.args.own_cores,
        };
        let link = seat.link(connections).map_err(|error| {
            let category = match error {
                SeatError::Memory { .. } => FailureCategory::Internal,
                SeatError::Connection(_) => FailureCategory::PeerLost,
            };
            Failure::from_error(category, &error)
        })?;
        Ok((link, capacity))
    }

    /// Meets the ranks of the other pods.
    fn meet(&self, compute: &Compute, token: Option<String>) -> Result<Mesh, Failure> {
        let launch = &self.args.launch;
        let configuration = |what: &str| Failure::new(FailureCategory::InvalidConfiguration, what);
        let address = launch
            .rendezvous
            .as_deref()
            .ok_or_else(|| configuration("--rendezvous is needed when --nodes is above 1"))?;
        let party = Party {
            token: token.ok_or_else(|| configuration("the rendezvous token is missing"))?,
            identity: Identity {
                group: launch.group.clone(),
                revision: launch.revision.clone(),
                epoch: launch.epoch,
                placement: self.placement,
                digest: self.args.digest.clone(),
                max_tokens: launch.max_tokens.unwrap_or(0),
                compute: compute.name().to_owned(),
                kv: kv_format(self.args.launch.kv_cache_dtype)
                    .as_str()
                    .to_owned(),
                adapters: self.args.launch.adapters,
                build: env!("CARGO_PKG_VERSION").to_owned(),
            },
            rank: self.args.rank,
            node: self.args.node.clone(),
            capacity: self.args.capacity(),
            ip: self.args.ip,
            deadline: RENDEZVOUS_DEADLINE,
        };
        let mesh = if self.args.rank == 0 {
            let port = address
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse().ok())
                .unwrap_or(RENDEZVOUS_PORT);
            party.host(port)
        } else {
            party.join(address)
        };
        mesh.map_err(|error| {
            let failure = Failure::from_error(FailureCategory::RendezvousFailed, &error);
            match error.rank() {
                Some(rank) => failure.at_rank(rank),
                None => failure,
            }
        })
    }

    fn load(
        &self,
        compute: &Compute,
        checkpoint: &Checkpoint,
        capacity: KvCapacity,
    ) -> Result<Box<dyn StepModel>, ModelError> {
        let launch = &self.args.launch;
        let options = LoadOptions {
            layout: self.placement.layout,
            rank: self.args.rank as usize,
            threads: launch.threads_per_rank.unwrap_or(1) as usize,
            slots: capacity.slots as usize,
            blocks: Some(capacity.by_group()),
            max_tokens: launch.max_tokens.unwrap_or(1) as usize,
            kv: kv_format(self.args.launch.kv_cache_dtype),
            verify: self.args.verify_digests,
            adapters: crate::adapters::room(self.args.launch.adapters),
        };
        let (board, started) = (&self.board, Instant::now());
        compute.load(checkpoint, &options, &|done, total| {
            board.set_load(self.local, done, total, started.elapsed());
        })
    }

    /// What bounds the scheduler.
    fn limits(&self, capacity: KvCapacity, chunk: Option<usize>) -> Limits {
        Limits {
            slots: capacity.slots,
            step_tokens: STEP_TOKENS,
            queue: self.args.queue,
            queue_tokens: self.args.queue_tokens,
            max_tokens: self.args.launch.max_tokens.unwrap_or(1),
            blocks: capacity.by_group(),
            chunk,
            prefix_caching: !self.args.no_prefix_caching,
            speculation: self.args.speculative_tokens,
        }
    }

    fn lead(&self, stepper: Stepper<'_>, limits: Limits) -> Result<(), RankError> {
        let scheduler = Scheduler::new(limits);
        let front =
            front().map_err(|error| Failure::from_error(FailureCategory::Internal, &error))?;
        let (from_front, mut to_front) = front;
        let tell = |messages: &[crate::engine::FromEngine]| {
            let mut bytes = Vec::new();
            for message in messages {
                frames::write(&mut bytes, message)?;
            }
            std::io::Write::write_all(&mut to_front, &bytes)
        };
        let (model, width) = (self.args.launch.model.clone(), stepper.model.vocab_size());
        let forms = Forms::new(move || {
            let text = ModelText::open(&model).map_err(|error| error.to_string())?;
            Vocabulary::new(Arc::new(text.tokenizer), width).map_err(|error| error.to_string())
        });
        let mut engine = Engine::new(stepper, scheduler, forms, from_front, tell);
        engine
            .run()
            .map_err(|error| RankError::of_engine(self.args.rank, engine.step() + 1, &error))
    }

    fn follow(&self, mut stepper: Stepper<'_>) -> Result<(), RankError> {
        loop {
            match stepper.follow() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    return Err(RankError::of_engine(
                        self.args.rank,
                        stepper.step + 1,
                        &error.into(),
                    ));
                }
            }
        }
    }
}

/// Rank 0's connection to the front, which is its standard input: what comes in
/// through a thread, and the stream to answer on.
fn front() -> std::io::Result<(Receiver<ToEngine>, UnixStream)> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    let stream = UnixStream::from(stdin);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(FRONT_LIMIT))?;
    let mut incoming = stream.try_clone()?;
    let (send, receive) = mpsc::sync_channel(INBOX);
    std::thread::Builder::new()
        .name("from-front".to_owned())
        .spawn(move || {
            loop {
                match frames::read(&mut incoming) {
                    Ok(Some(message)) => {
                        if send.send(message).is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => {
                        tracing::error!(%error, "read from the front");
                        return;
                    }
                }
            }
        })?;
    Ok((receive, stream))
}
