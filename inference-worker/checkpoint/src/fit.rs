//! Whether a whole group has room for a model, pod by pod as its workers check it, and
//! what would fit instead.

use crate::advice::{Limit, layouts};
use crate::blocks::{BLOCK_TOKENS, BlockGeometry};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::layout::Layout;
use crate::memory::{MemoryPlan, MemoryRequest};

const MIB: u64 = 1 << 20;
/// Alternatives that are told.
pub const MOST_ALTERNATIVES: usize = 3;
/// Devices of a usual node: pods of other layouts are not given more.
const DEVICES_OF_A_NODE: usize = 8;
/// Ranks that share a layer, at most, in a layout that is told.
const MOST_TENSOR: usize = 64;
/// No pod has more memory.
const MOST_MIB: u64 = 1 << 30;

/// What a group is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRequest {
    /// Layout, context and what else decides about memory. Its ranks do not count: all
    /// of the layout are planned.
    pub memory: MemoryRequest,
    /// Pods, among which the ranks are shared out evenly.
    pub pods: usize,
    /// Sequences of the longest length that must have room at the same time.
    pub sequences: usize,
    /// Sequences that a worker computes at a time, at most.
    pub slots: usize,
}

/// What the ranks of every pod hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPlan {
    /// By pod.
    pub pods: Vec<MemoryPlan>,
    sequences: usize,
    slots: usize,
}

/// Something that would fit. What is absent stays as it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alternative {
    /// Another layout, and its pods.
    pub layout: Option<(Layout, usize)>,
    /// Shorter sequences.
    pub max_tokens: Option<usize>,
    /// More memory for each pod, in whole MiB.
    pub memory: Option<u64>,
    /// Sequences of the longest length that have room then.
    pub sequences: usize,
}

impl GroupPlan {
    /// Plans every pod.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`], and `InvalidLayout` where the ranks cannot be shared out
    /// evenly.
    pub fn new(checkpoint: &Checkpoint, request: &GroupRequest) -> Result<Self, ModelError> {
        let (world, pods) = (request.memory.layout.world(), request.pods);
        if pods == 0 || !world.is_multiple_of(pods) {
            return Err(ModelError::Layout(format!(
                "{world} ranks cannot be spread evenly over {pods} pods"
            )));
        }
        let each = world / pods;
        let plan = |pod: usize| {
            let memory = MemoryRequest {
                ranks: pod * each..(pod + 1) * each,
                ..request.memory.clone()
            };
            MemoryPlan::new(checkpoint, &memory)
        };
        Ok(Self {
            pods: (0..pods).map(plan).collect::<Result<_, _>>()?,
            sequences: request.sequences.max(1),
            slots: request.slots,
        })
    }

    /// Sequences of the longest length that the workers' KV cache holds at the same
    /// time, of those that they compute at a time. `limit` is of each pod, or of each
    /// device.
    pub fn sequences_within(&self, limit: Limit) -> usize {
        let of_pod = |plan: &MemoryPlan| {
            let counted = limit.sequences(plan, plan.max_tokens);
            let Some(capacity) = plan.capacity(limit, self.slots).filter(|_| counted > 0) else {
                return 0;
            };
            let needed = BlockGeometry::new(plan.chunk).needed(plan.max_tokens, plan.step_tokens);
            let blocks = capacity.by_group();
            (0..2)
                .filter_map(|group| blocks[group].checked_div(needed[group]))
                .chain([counted, capacity.slots as usize])
                .min()
                .unwrap_or(0)
        };
        self.pods.iter().map(of_pod).min().unwrap_or(0)
    }

    /// Whether the sequences that were asked for have room.
    pub fn fits(&self, limit: Limit) -> bool {
        self.sequences_within(limit) >= self.sequences
    }

    /// Tokens that the workers' KV cache holds, over all sequences.
    pub fn tokens_within(&self, limit: Limit) -> u64 {
        let of_pod = |plan: &MemoryPlan| {
            let capacity = plan.capacity(limit, self.slots);
            capacity.map_or(0, |capacity| {
                u64::from(capacity.blocks) * BLOCK_TOKENS as u64
            })
        };
        self.pods.iter().map(of_pod).min().unwrap_or(0)
    }

    /// Bytes in whole MiB with which the sequences that were asked for have room;
    /// `limit_of` says what limit so many bytes are.
    pub fn needed(&self, limit_of: impl Fn(u64) -> Limit) -> u64 {
        let fits = |mib: u64| self.fits(limit_of(mib * MIB));
        let (mut short, mut enough) = (0, 1);
        while !fits(enough) && enough < MOST_MIB {
            (short, enough) = (enough, enough * 2);
        }
        while enough - short > 1 {
            let middle = u64::midpoint(short, enough);
            if fits(middle) {
                enough = middle;
            } else {
                short = middle;
            }
        }
        enough * MIB
    }

    fn weights(&self) -> u64 {
        self.pods.iter().map(MemoryPlan::weights).sum()
    }
}

/// What would fit in place of `request`, whose `plan` does not fit `limit`: shorter
/// sequences, and more memory or more pods where the ranks of a pod share one memory,
/// or other layouts where each has its own. Each was planned anew and fits.
///
/// # Errors
/// When the checkpoint cannot be planned at all.
pub fn alternatives(
    checkpoint: &Checkpoint,
    request: &GroupRequest,
    plan: &GroupPlan,
    limit: Limit,
) -> Result<Vec<Alternative>, ModelError> {
    let mut found: Vec<Alternative> = shorter(checkpoint, request, limit)?.into_iter().collect();
    match limit {
        Limit::Together(_) => {
            let memory = plan.needed(Limit::Together);
            let sequences = plan.sequences_within(Limit::Together(memory));
            if sequences >= plan.sequences {
                found.push(Alternative {
                    memory: Some(memory),
                    sequences,
                    ..Alternative::default()
                });
            }
            found.extend(more_pods(checkpoint, request, limit)?);
        }
        Limit::Each(memory) => {
            let room = MOST_ALTERNATIVES.saturating_sub(found.len());
            let lightest = plan.weights() / 2;
            found.extend(other_layouts(
                checkpoint,
                request,
                (memory, lightest),
                room.min(2),
            )?);
        }
    }
    found.truncate(MOST_ALTERNATIVES);
    Ok(found)
}

/// The longest sequences, in whole pages, of which as many as are asked for fit.
fn shorter(
    checkpoint: &Checkpoint,
    request: &GroupRequest,
    limit: Limit,
) -> Result<Option<Alternative>, ModelError> {
    let sequences = |pages: usize| {
        let mut request = request.clone();
        request.memory.max_tokens = pages * BLOCK_TOKENS;
        GroupPlan::new(checkpoint, &request).map(|plan| {
            let sequences = plan.sequences_within(limit);
            (sequences >= plan.sequences).then_some(sequences)
        })
    };
    let (mut fitting, mut best) = (0, None);
    let mut over = request.memory.max_tokens.div_ceil(BLOCK_TOKENS);
    while over - fitting > 1 {
        let middle = usize::midpoint(fitting, over);
        match sequences(middle)? {
            Some(count) => (fitting, best) = (middle, Some(count)),
            None => over = middle,
        }
    }
    Ok(best.map(|sequences| Alternative {
        max_tokens: Some(fitting * BLOCK_TOKENS),
        sequences,
        ..Alternative::default()
    }))
}

/// The same ranks on as few more pods as fit.
fn more_pods(
    checkpoint: &Checkpoint,
    request: &GroupRequest,
    limit: Limit,
) -> Result<Option<Alternative>, ModelError> {
    let layout = request.memory.layout;
    let world = layout.world();
    for pods in (request.pods + 1..=world.min(MOST_TENSOR)).filter(|n| world.is_multiple_of(*n)) {
        let request = GroupRequest {
            pods,
            ..request.clone()
        };
        let plan = GroupPlan::new(checkpoint, &request)?;
        let sequences = plan.sequences_within(limit);
        if sequences >= plan.sequences {
            return Ok(Some(Alternative {
                layout: Some((layout, pods)),
                sequences,
                ..Alternative::default()
            }));
        }
    }
    Ok(None)
}

/// The smallest groups that fit devices of `memory` bytes, at most `room` of different
/// sizes. Where even an equal share of the `lightest` weights would not fit, nothing
/// else is looked at.
fn other_layouts(
    checkpoint: &Checkpoint,
    request: &GroupRequest,
    (memory, lightest): (u64, u64),
    room: usize,
) -> Result<Vec<Alternative>, ModelError> {
    let most_of_a_pod = (request.memory.layout.world() / request.pods).max(DEVICES_OF_A_NODE);
    let mut found: Vec<Alternative> = Vec::new();
    for layout in layouts(checkpoint) {
        let world = layout.world();
        let told = found.iter().filter_map(|told| told.layout);
        if found.len() == room || told.clone().any(|(told, _)| told.world() == world) {
            continue;
        }
        if layout.tensor > MOST_TENSOR || lightest / world as u64 > memory {
            continue;
        }
        let fewest = |pods: &usize| world.is_multiple_of(*pods) && world / pods <= most_of_a_pod;
        let Some(pods) = (1..=world).find(fewest) else {
            continue;
        };
        let mut request = request.clone();
        (request.memory.layout, request.pods) = (layout, pods);
        let plan = GroupPlan::new(checkpoint, &request)?;
        let sequences = plan.sequences_within(Limit::Each(memory));
        if sequences >= plan.sequences {
            found.push(Alternative {
                layout: Some((layout, pods)),
                sequences,
                ..Alternative::default()
            });
        }
    }
    Ok(found)
}
