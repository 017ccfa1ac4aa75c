//! `llama-worker inspect`: what a model would take in a layout, for the operator. Reads
//! headers only.

use std::path::PathBuf;

use clap::Args;
use llama_contract::{
    Device, FittingChange, GroupShape, InspectArgs, InspectionReport, MemoryShare, ModelFacts,
    Room, TERMINATION_LOG,
};
use llama_model::advice::Limit;
use llama_model::checkpoint::LoadFormat;
use llama_model::embedding::{EmbeddingMemory, EmbeddingRequest};
use llama_model::fit::{self, Alternative, GroupPlan, GroupRequest};
use llama_model::memory::{RankPlan, Target};
use llama_model::{Checkpoint, EmbeddingCheckpoint, Layout, MemoryPlan, MemoryRequest, ModelError};

use crate::adapters::room;
use crate::embedding::ANSWER_VALUES;
use crate::failure::{Failure, of_model};
use crate::rank::STEP_TOKENS;
use crate::rank::args::kv_format;
use crate::supervisor::args::MAX_SEQUENCES;
use crate::supervisor::{RUNTIME_BYTES, context, usable};
use crate::termination;

const MIB: u64 = 1 << 20;
/// The kernel keeps memory limits in whole pages.
const PAGE: u64 = 4096;

/// Flags of `llama-worker inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectCommand {
    /// What operator and worker agree on.
    #[command(flatten)]
    pub inspect: InspectArgs,
    /// File for the answer; written only where it exists, as it does in a pod.
    #[arg(long, hide = true, default_value = TERMINATION_LOG)]
    pub termination_log: PathBuf,
}

impl InspectCommand {
    /// Leaves the answer, or why there is none, as the termination message. Returns the
    /// answer.
    ///
    /// # Errors
    /// Whatever would keep a worker from loading the model, but for want of memory.
    pub fn run(&self) -> Result<InspectionReport, Failure> {
        let result = inspect(&self.inspect);
        let message = match &result {
            Ok(report) => report.to_termination_message(),
            Err(failure) => failure.report(None, 0).to_termination_message(),
        };
        termination::write(&self.termination_log, &message);
        result
    }
}

/// What `args` ask for.
///
/// # Errors
/// Whatever would keep a worker from loading the model, but for want of memory.
pub fn inspect(args: &InspectArgs) -> Result<InspectionReport, Failure> {
    match EmbeddingCheckpoint::open(&args.model).map_err(|error| of_model(&error))? {
        Some(checkpoint) => embedding(args, &checkpoint),
        None => text(args),
    }
}

fn text(args: &InspectArgs) -> Result<InspectionReport, Failure> {
    let checkpoint =
        Checkpoint::open(&args.model, LoadFormat::Auto).map_err(|error| of_model(&error))?;
    let config = checkpoint.config();
    let max_tokens = context(args.max_tokens, config)?;
    let request = GroupRequest {
        memory: MemoryRequest {
            layout: Layout {
                tensor: args.tensor_parallel as usize,
                pipeline: args.pipeline_parallel as usize,
            },
            ranks: 0..0,
            target: match args.device {
                Device::Cpu => Target::Cpu {
                    threads: args.threads_per_rank as usize,
                },
                Device::Cuda => Target::Device {
                    runtime: RUNTIME_BYTES,
                },
            },
            max_tokens: max_tokens as usize,
            step_tokens: STEP_TOKENS as usize,
            kv: kv_format(args.kv_cache_dtype),
            adapters: room(args.adapters),
        },
        pods: args.nodes as usize,
        sequences: args.sequences as usize,
        slots: MAX_SEQUENCES.into(),
    };
    let plan = GroupPlan::new(&checkpoint, &request).map_err(|error| of_model(&error))?;
    let weights = checkpoint.files().iter();
    let model = ModelFacts {
        architecture: config.architecture().to_owned(),
        layers: small(config.layers.len()),
        heads: small(config.heads),
        kv_heads: small(config.kv_heads),
        weight_bytes: weights
            .map(|file| file.len - file.header.min(file.len))
            .sum(),
        max_tokens: small(config.context_length),
    };
    let limit_of = limit_of(args.device);
    let mut report = report(&plan, model, max_tokens);
    report.needed_bytes = plan.needed(limit_of);
    if let Some(memory) = args.memory_bytes {
        let limit = limit_of(memory);
        let sequences = plan.sequences_within(limit);
        report.room = Some(Room {
            memory_bytes: memory,
            sequences: small(sequences),
            total_tokens: plan.tokens_within(limit),
            fits: plan.fits(limit),
        });
        if !plan.fits(limit) {
            report.alternatives = fit::alternatives(&checkpoint, &request, &plan, limit)
                .map_err(|error| of_model(&error))?
                .iter()
                .map(change)
                .collect();
        }
    }
    Ok(report)
}

/// The limit that so many bytes of a pod, or of a device, are to a worker.
fn limit_of(device: Device) -> fn(u64) -> Limit {
    match device {
        Device::Cpu => |bytes| Limit::Together(bytes / PAGE * PAGE),
        Device::Cuda => |bytes| Limit::Each(usable(bytes)),
    }
}

fn report(plan: &GroupPlan, model: ModelFacts, max_tokens: u32) -> InspectionReport {
    let of_rank = |pod: &MemoryPlan, rank: &RankPlan| MemoryShare {
        weight_bytes: rank.weights,
        reserve_bytes: rank.reserve + rank.sequence_overhead,
        adapter_bytes: rank.adapters,
        kv_cache_bytes: rank.kv_bytes(pod.max_tokens, pod.chunk),
    };
    let of_pod = |pod: &MemoryPlan| MemoryShare {
        weight_bytes: pod.weights(),
        reserve_bytes: pod.reserve() + pod.sequence_overhead(),
        adapter_bytes: pod.adapters(),
        kv_cache_bytes: pod.kv_bytes(pod.max_tokens),
    };
    let ranks = plan.pods.iter().flat_map(|pod| {
        let shares = pod.ranks.iter();
        shares.map(move |rank| of_rank(pod, rank))
    });
    let kv_of = |rank: &RankPlan| rank.kv_bytes_per_token + rank.chunked_kv_bytes_per_token;
    let all = plan.pods.iter().flat_map(|pod| &pod.ranks);
    InspectionReport {
        model,
        max_tokens,
        rank: ranks.max_by_key(total).unwrap_or_default(),
        pod: plan
            .pods
            .iter()
            .map(of_pod)
            .max_by_key(total)
            .unwrap_or_default(),
        kv_bytes_per_token: all.map(kv_of).sum(),
        kv_head_replication: plan.pods.first().map_or(1, |pod| small(pod.kv_replicas)),
        ..InspectionReport::default()
    }
}

fn total(share: &MemoryShare) -> u64 {
    share.weight_bytes + share.reserve_bytes + share.adapter_bytes + share.kv_cache_bytes
}

fn change(alternative: &Alternative) -> FittingChange {
    FittingChange {
        layout: alternative.layout.map(|(layout, pods)| GroupShape {
            tensor: small(layout.tensor),
            pipeline: small(layout.pipeline),
            nodes: small(pods),
        }),
        max_tokens: alternative.max_tokens.map(small),
        memory_bytes: alternative.memory,
        sequences: small(alternative.sequences),
    }
}

/// An embedding model is one process that computes one text at a time.
fn embedding(
    args: &InspectArgs,
    checkpoint: &EmbeddingCheckpoint,
) -> Result<InspectionReport, Failure> {
    if (args.tensor_parallel, args.pipeline_parallel, args.nodes) != (1, 1, 1) {
        let path = checkpoint.path().display();
        return Err(of_model(&ModelError::Layout(format!(
            "{path} is an embedding model, which is not split: only one rank works"
        ))));
    }
    if args.device != Device::Cpu {
        let path = checkpoint.path().display();
        return Err(of_model(&ModelError::Unsupported(format!(
            "{path} is an embedding model, which is computed on CPU cores only"
        ))));
    }
    let config = checkpoint.config();
    let plan = |max_tokens: usize| {
        let request = EmbeddingRequest {
            max_tokens,
            threads: args.threads_per_rank as usize,
            answer_values: ANSWER_VALUES,
        };
        EmbeddingMemory::new(checkpoint, request).map_err(|error| of_model(&error))
    };
    let max_tokens = args
        .max_tokens
        .map_or(config.max_tokens, |most| most as usize);
    let memory = plan(max_tokens)?;
    let share = MemoryShare {
        weight_bytes: memory.weights,
        reserve_bytes: memory.reserve + memory.activations + memory.answers,
        ..MemoryShare::default()
    };
    let weights = checkpoint.files().iter();
    let needed = memory.total().div_ceil(MIB) * MIB;
    let mut report = InspectionReport {
        model: ModelFacts {
            architecture: "bert".to_owned(),
            layers: small(config.layers),
            heads: small(config.heads),
            kv_heads: small(config.heads),
            weight_bytes: weights
                .map(|file| file.len - file.header.min(file.len))
                .sum(),
            max_tokens: small(config.max_tokens),
        },
        max_tokens: small(max_tokens),
        rank: share,
        pod: share,
        kv_head_replication: 1,
        needed_bytes: needed,
        ..InspectionReport::default()
    };
    if let Some(bytes) = args.memory_bytes {
        let fits = memory.total() <= bytes / PAGE * PAGE;
        report.room = Some(Room {
            memory_bytes: bytes,
            sequences: args.sequences * u32::from(fits),
            total_tokens: 0,
            fits,
        });
        if !fits {
            report.alternatives.push(FittingChange {
                memory_bytes: Some(needed),
                sequences: args.sequences,
                ..FittingChange::default()
            });
        }
    }
    Ok(report)
}

fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
