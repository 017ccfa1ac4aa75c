//! `llama-worker logits`: the logits after every token of a sequence, for anyone
//! who validates a checkpoint. The ranks of this pod are threads; those of other
//! pods meet them as in serving.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use llama_contract::{FailureCategory, RENDEZVOUS_PORT};
use llama_model::adapter::AdapterRoom;
use llama_model::blocks::KvCapacity;
use llama_model::{
    Checkpoint, Llama, LoadOptions, ModelError, Segment, StepModel, Wanted, memory::KvFormat,
};
use safetensors::{Dtype, tensor::TensorView};

use crate::adapters::AdapterArgs;
use crate::comm::board::Board;
use crate::comm::placement::Placement;
use crate::comm::region::Region;
use crate::comm::rendezvous::{Identity, Mesh, Party, RENDEZVOUS_DEADLINE};
use crate::comm::seat::Seat;
use crate::comm::shm::ShmLink;
use crate::comm::{HEARTBEAT_PERIOD, LOAD_DEADLINE, Link, STEP_DEADLINE};
use crate::digest::digest;
use crate::failure::{Failure, of_model};
use crate::plan::{DtypeArg, ModelArgs};

/// Name of the tensor that is written.
const LOGITS: &str = "logits";

/// Flags of `llama-worker logits`.
#[derive(Args, Clone, Debug)]
pub struct LogitsArgs {
    /// What to compute with, and on how many ranks.
    #[command(flatten)]
    pub model: ModelArgs,
    /// A JSON list of token ids.
    #[arg(long)]
    pub tokens: PathBuf,
    /// The safetensors file to write: `logits`, one row a token, in F32.
    #[arg(long)]
    pub out: PathBuf,
    /// Precision of keys and values.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeArg,
    /// Tokens that one step computes.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub step_tokens: u32,
    /// Compute threads of each rank.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads_per_rank: u32,
    /// Refuses weights that do not have the digests which `shard` wrote beside them.
    #[arg(long)]
    pub verify_digests: bool,
    /// Pods that the ranks are spread over.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: u32,
    /// This pod's place, from 0. Pod 0 writes the file.
    #[arg(long, default_value_t = 0)]
    pub node_index: u32,
    /// Where rank 0 waits for the ranks of other pods, `host:port`.
    #[arg(long)]
    pub rendezvous: Option<String>,
    /// Address on which other pods reach this one.
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST.into())]
    pub pod_ip: IpAddr,
}

/// Computes the logits and writes them.
///
/// # Errors
/// The first failure of any rank, input or output, with its category.
pub fn run(args: &LogitsArgs, token: Option<&str>) -> Result<(), Failure> {
    let model_error = |error: ModelError| of_model(&error);
    let checkpoint = args.model.open().map_err(model_error)?;
    let vocab = checkpoint.config().vocab;
    let tokens = read_tokens(args, vocab)?;
    let job = Job::new(args, &checkpoint, &tokens, token)?;
    let rows = job.run()?;
    if args.node_index == 0 {
        write(args, vocab, &rows)?;
        tracing::info!(tokens = rows.len(), vocab, out = %args.out.display(), "logits written");
    }
    Ok(())
}

fn configuration(message: String) -> Failure {
    Failure::new(FailureCategory::InvalidConfiguration, message)
}

/// The token ids, all of them in the vocabulary.
fn read_tokens(args: &LogitsArgs, vocab: usize) -> Result<Vec<u32>, Failure> {
    let path = args.tokens.display();
    let text = std::fs::read_to_string(&args.tokens)
        .map_err(|error| configuration(format!("read --tokens {path}: {error}")))?;
    let tokens: Vec<u32> = serde_json::from_str(&text).map_err(|error| {
        configuration(format!(
            "--tokens {path} is no JSON list of token ids: {error}"
        ))
    })?;
    if tokens.is_empty() {
        return Err(configuration(format!("--tokens {path} holds no token ids")));
    }
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(token) => Err(configuration(format!(
            "--tokens {path} holds {token}, which is not in the vocabulary of {vocab}"
        ))),
        None => Ok(tokens),
    }
}

/// What the ranks of this pod compute.
struct Job<'a> {
    args: &'a LogitsArgs,
    checkpoint: &'a Checkpoint,
    tokens: &'a [u32],
    placement: Placement,
    region: Arc<Region>,
    board: Board,
    token: Option<&'a str>,
    digest: String,
}

impl<'a> Job<'a> {
    fn new(
        args: &'a LogitsArgs,
        checkpoint: &'a Checkpoint,
        tokens: &'a [u32],
        token: Option<&'a str>,
    ) -> Result<Self, Failure> {
        let layout = args.model.layout();
        let placement = Placement::new(layout, args.nodes as usize).ok_or_else(|| {
            configuration(format!(
                "{} ranks cannot be spread evenly over --nodes={}",
                layout.world(),
                args.nodes
            ))
        })?;
        if args.node_index >= args.nodes {
            return Err(configuration(format!(
                "--node-index={} is outside --nodes={}",
                args.node_index, args.nodes
            )));
        }
        let ranks = placement.ranks_per_pod;
        let internal = |error: &(dyn std::error::Error + 'static)| {
            Failure::from_error(FailureCategory::Internal, error)
        };
        let region = Region::create(ShmLink::bytes(ranks)).map_err(|error| internal(&error))?;
        let region = Arc::new(region);
        let board = Board::new(Arc::clone(&region), ranks).ok_or_else(|| {
            Failure::new(FailureCategory::Internal, "the shared memory is too small")
        })?;
        Ok(Self {
            args,
            checkpoint,
            tokens,
            placement,
            region,
            board,
            token,
            digest: digest(checkpoint).map_err(|error| of_model(&error))?,
        })
    }

    /// The rows of this pod's first rank.
    fn run(&self) -> Result<Vec<Vec<f32>>, Failure> {
        let ranks = self.placement.ranks_of(self.args.node_index as usize);
        let over = AtomicBool::new(false);
        let results: Vec<Result<Vec<Vec<f32>>, Failure>> = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    (0..ranks.len()).for_each(|local| self.board.beat(local));
                    std::thread::sleep(HEARTBEAT_PERIOD);
                }
            });
            let threads: Vec<_> = ranks
                .clone()
                .map(|rank| scope.spawn(move || self.watched(rank)))
                .collect();
            let results = threads.into_iter().map(|thread| {
                let ended = Failure::new(FailureCategory::Internal, "a rank's thread ended");
                thread.join().unwrap_or(Err(ended))
            });
            let results = results.collect();
            over.store(true, Ordering::Relaxed);
            results
        });
        if let Some(cause) = self.board.cause() {
            return Err(cause);
        }
        let mut all = results.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(if all.is_empty() {
            Vec::new()
        } else {
            all.swap_remove(0)
        })
    }

    /// Computes as `rank`, and tells the others when that fails.
    fn watched(&self, rank: usize) -> Result<Vec<Vec<f32>>, Failure> {
        let result = self.compute(rank);
        if let Err(failure) = &result {
            self.board.fail(failure);
        }
        result
    }

    fn compute(&self, rank: usize) -> Result<Vec<Vec<f32>>, Failure> {
        let number = u32::try_from(rank).unwrap_or(u32::MAX);
        let connections = match self.placement.pods() {
            1 => Vec::new(),
            _ => self.meet(number)?.connections,
        };
        let seat = Seat {
            placement: self.placement,
            rank,
            region: Arc::clone(&self.region),
            board: self.board.clone(),
            own_cores: false,
        };
        let mut link = seat
            .link(connections)
            .map_err(|error| Failure::from_error(FailureCategory::PeerLost, &error))?;
        let options = LoadOptions {
            layout: self.placement.layout,
            rank,
            threads: self.args.threads_per_rank as usize,
            slots: 1,
            blocks: None,
            max_tokens: self.tokens.len(),
            kv: KvFormat::from(self.args.dtype),
            verify: self.args.verify_digests,
            adapters: AdapterRoom::NONE,
        };
        let mut model = Llama::load(self.checkpoint, &options, &|_, _| {})
            .map_err(|error| of_model(&error).at_rank(number))?;
        link.set_deadline(LOAD_DEADLINE);
        let aborted = |error: llama_model::CollectiveError| {
            Failure::of_collective(&error)
                .unwrap_or_else(|| Failure::new(FailureCategory::Internal, "the group is over"))
        };
        link.gather_words([0; 3]).map_err(aborted)?;
        link.set_deadline(STEP_DEADLINE);
        let rows = self.steps(number, &mut model, link.as_mut())?;
        link.expect_close();
        link.gather_words([1; 3]).map_err(aborted)?;
        Ok(rows)
    }

    fn steps(
        &self,
        rank: u32,
        model: &mut Llama,
        link: &mut dyn Link,
    ) -> Result<Vec<Vec<f32>>, Failure> {
        let mut rows = Vec::new();
        let mut start = 0_u32;
        for (step, tokens) in (1..).zip(self.tokens.chunks(self.args.step_tokens as usize)) {
            let segment = Segment {
                slot: 0,
                start,
                tokens: tokens.to_vec(),
                logits: Wanted::All,
                adapter: None,
                tables: None,
            };
            let computed = model.step(&[segment], link);
            let computed = computed.map_err(|error| {
                Failure::of_step(rank, step, &error)
                    .unwrap_or_else(|| Failure::new(FailureCategory::Internal, "the group is over"))
            })?;
            if rank == 0 {
                rows.extend(computed);
            }
            start += u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        }
        Ok(rows)
    }

    /// Meets the ranks of the other pods.
    fn meet(&self, rank: u32) -> Result<Mesh, Failure> {
        let address = self.args.rendezvous.as_deref().ok_or_else(|| {
            configuration("--rendezvous is needed when --nodes is above 1".to_owned())
        })?;
        let token = self.token.ok_or_else(|| {
            configuration(format!(
                "{} must hold the rendezvous token when --nodes is above 1",
                llama_contract::RENDEZVOUS_TOKEN_ENV
            ))
        })?;
        let dtype = format!("{:?}", self.args.dtype);
        let party = Party {
            token: token.to_owned(),
            identity: Identity {
                group: LOGITS.to_owned(),
                revision: "none".to_owned(),
                epoch: 0,
                placement: self.placement,
                digest: self.digest.clone(),
                max_tokens: u32::try_from(self.tokens.len()).unwrap_or(u32::MAX),
                compute: "f32".to_owned(),
                kv: dtype.to_lowercase(),
                adapters: AdapterArgs::default(),
                build: env!("CARGO_PKG_VERSION").to_owned(),
            },
            rank,
            node: format!("pod {}", self.args.node_index),
            capacity: KvCapacity {
                slots: 1,
                blocks: 0,
                chunk_blocks: 0,
            },
            ip: self.args.pod_ip,
            deadline: RENDEZVOUS_DEADLINE,
        };
        let mesh = if rank == 0 {
            let port = address
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse().ok());
            party.host(port.unwrap_or(RENDEZVOUS_PORT))
        } else {
            party.join(address)
        };
        mesh.map_err(|error| Failure::from_error(FailureCategory::RendezvousFailed, &error))
    }
}

/// Writes the rows as one tensor.
fn write(args: &LogitsArgs, vocab: usize, rows: &[Vec<f32>]) -> Result<(), Failure> {
    let out = args.out.display();
    let bytes: Vec<u8> = rows
        .iter()
        .flatten()
        .flat_map(|logit| logit.to_le_bytes())
        .collect();
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new(
            FailureCategory::Internal,
            format!("write --out {out}: {error}"),
        )
    };
    let view = TensorView::new(Dtype::F32, vec![rows.len(), vocab], &bytes)
        .map_err(|error| failed(&error))?;
    safetensors::serialize_to_file(HashMap::from([(LOGITS, view)]), None, &args.out)
        .map_err(|error| failed(&error))
}
