//! How much memory ranks need, from the headers of a checkpoint alone.

use std::ops::Range;

use serde::Serialize;

use crate::adapter::AdapterRoom;
use crate::advice::Limit;
use crate::blocks::{BLOCK_TOKENS, BlockGeometry, KvBlocks, KvCapacity};
use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::format::Format;
use crate::gguf::{Gguf, Value};
use crate::layout::Layout;
use crate::shard::Shard;
use crate::slices::ModelSlices;

const MIB: u64 = 1 << 20;
/// Tokens of a sequence whose attention is computed together.
pub const ATTENTION_TILE_TOKENS: usize = 16;
/// A rank with nothing loaded: allocator, stacks, runtime, its share of the memory
/// between ranks. Measured: 1 to 3 MiB.
const RANK_BYTES: u64 = 3 * MIB;
/// The process that answers requests, likewise, with what open requests take.
const SUPERVISOR_BYTES: u64 = 12 * MIB;
/// How often an open header holds its metadata at most, while lists grow. A rank drops it
/// before it computes.
const HEADER_COPIES: u64 = 2;
/// The tokenizer, likewise. Measured: 146.
const TOKENIZER_ENTRY_BYTES: u64 = 180;
/// The KV cache takes at most this many times what its sequences can hold at once.
const MOST_KEPT: u64 = 16;
/// Sequences are admitted as long as each can have this part of the longest.
const LEAST_SHARE: u64 = 8;
/// Copies of a row of logits between the output head and the sampler.
const LOGITS_COPIES: u64 = 4;
/// The form of keys and values in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// Half precision.
    #[default]
    F16,
    /// Full precision, for comparisons.
    F32,
    /// 8-bit integers with a scale for every 32 of them ([`Format::Q8_0`]).
    Int8,
}

impl KvFormat {
    /// Bytes of a head's key or value of `head_dim` values, a multiple of
    /// [`BLOCK`](crate::BLOCK).
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F16 => Format::F16.row_bytes(head_dim),
            Self::F32 => Format::F32.row_bytes(head_dim),
            Self::Int8 => Format::Q8_0.row_bytes(head_dim),
        }
    }

    /// Its name, as in flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// Where ranks compute, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Processes on CPU cores, all of a pod in one memory limit.
    Cpu {
        /// Threads of each rank.
        threads: usize,
    },
    /// One device a rank.
    Device {
        /// What context, communication, activations and graphs take of each.
        runtime: u64,
    },
}

/// What a plan is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// How the ranks divide the model.
    pub layout: Layout,
    /// The ranks to plan: those of one pod, or all.
    pub ranks: Range<usize>,
    /// Where they compute.
    pub target: Target,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// Tokens that one step computes at most.
    pub step_tokens: usize,
    /// The form of keys and values.
    pub kv: KvFormat,
    /// Room for adapters.
    pub adapters: AdapterRoom,
}

/// Memory of one rank. Bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RankPlan {
    /// The rank.
    pub rank: usize,
    /// Weights that it keeps.
    pub weights: u64,
    /// Weights that it reads from files.
    pub read: u64,
    /// KV cache of each token in layers that attend to all tokens.
    pub kv_bytes_per_token: u64,
    /// KV cache of each token in layers that attend in chunks; they keep one
    /// chunk at most.
    pub chunked_kv_bytes_per_token: u64,
    /// What one sequence takes besides its KV cache.
    pub sequence_overhead: u64,
    /// Process and activations.
    pub reserve: u64,
    /// Room for adapters.
    pub adapters: u64,
}

/// Memory of the ranks of one pod, or of a whole group. Pages of files are not in
/// it: the kernel takes them back when it needs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// By rank.
    pub ranks: Vec<RankPlan>,
    /// The process that starts the ranks and answers requests.
    pub supervisor: u64,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// Tokens that one step computes at most.
    pub step_tokens: usize,
    /// Tokens of an attention chunk, where layers attend in chunks.
    pub chunk: Option<usize>,
    /// Ranks of a stage that hold the same KV head.
    pub kv_replicas: usize,
    /// Whether one rank would compute the same bits.
    pub is_canonical: bool,
}

impl RankPlan {
    fn new(
        checkpoint: &Checkpoint,
        request: &MemoryRequest,
        rank: usize,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let shard = Shard::new(config, request.layout, rank)?;
        let slices = ModelSlices::locate(checkpoint, &shard)?;
        let (full, chunked) = kv_bytes_per_token(config, &shard, request.kv);
        let sees_logits = shard.is_last_stage() || rank == 0;
        let logits = LOGITS_COPIES * (config.vocab * size_of::<f32>()) as u64;
        let reserve = match request.target {
            Target::Cpu { threads } => {
                let header = HEADER_COPIES * header_bytes(checkpoint);
                RANK_BYTES + activation_bytes(config, &shard, request, threads).max(header)
            }
            Target::Device { runtime } => runtime,
        };
        Ok(Self {
            rank,
            weights: slices.bytes(),
            read: slices.read_bytes(),
            kv_bytes_per_token: full,
            chunked_kv_bytes_per_token: chunked,
            sequence_overhead: match request.target {
                Target::Cpu { .. } if sees_logits => logits,
                Target::Cpu { .. } | Target::Device { .. } => 0,
            },
            reserve,
            adapters: request.adapters.bytes(config, &shard),
        })
    }

    /// What it takes before the first sequence.
    fn fixed(&self) -> u64 {
        self.weights + self.adapters + self.reserve
    }

    /// KV cache of a sequence of `tokens`.
    pub fn kv_bytes(&self, tokens: usize, chunk: Option<usize>) -> u64 {
        let pages = |tokens: usize| tokens.next_multiple_of(BLOCK_TOKENS) as u64;
        let kept = chunk.map_or(tokens, |chunk| tokens.min(chunk));
        pages(tokens) * self.kv_bytes_per_token + pages(kept) * self.chunked_kv_bytes_per_token
    }
}

impl MemoryPlan {
    /// Plans the ranks.
    ///
    /// # Errors
    /// Whatever loading the model would refuse: an unsupported model, a layout
    /// that does not divide it, sequences longer than its context.
    pub fn new(checkpoint: &Checkpoint, request: &MemoryRequest) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        check_context(config, request.max_tokens)?;
        let ranks = request
            .ranks
            .clone()
            .map(|rank| RankPlan::new(checkpoint, request, rank))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            ranks,
            supervisor: match request.target {
                Target::Cpu { .. } => {
                    SUPERVISOR_BYTES + text_entries(checkpoint) * TOKENIZER_ENTRY_BYTES
                }
                Target::Device { .. } => 0,
            },
            max_tokens: request.max_tokens,
            step_tokens: request.step_tokens,
            chunk: config.chunk,
            kv_replicas: Shard::new(config, request.layout, 0)?.kv_replicas(config),
            is_canonical: config.agrees(request.layout.tensor),
        })
    }

    /// Weights of all ranks.
    pub fn weights(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.weights).sum()
    }

    /// Processes, tokenizer and activations of all ranks.
    pub fn reserve(&self) -> u64 {
        self.supervisor + self.ranks.iter().map(|rank| rank.reserve).sum::<u64>()
    }

    /// KV cache of one sequence of `tokens`, over all ranks.
    pub fn kv_bytes(&self, tokens: usize) -> u64 {
        let ranks = self.ranks.iter();
        ranks.map(|rank| rank.kv_bytes(tokens, self.chunk)).sum()
    }

    /// Room for adapters, over all ranks.
    pub fn adapters(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.adapters).sum()
    }

    /// What is taken before the first sequence.
    fn fixed(&self) -> u64 {
        self.supervisor + self.ranks.iter().map(RankPlan::fixed).sum::<u64>()
    }

    /// What one sequence takes besides its KV cache, over all ranks.
    pub fn sequence_overhead(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.sequence_overhead).sum()
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        self.kv_bytes(tokens) + self.sequence_overhead()
    }

    /// Bytes for `sequences` of the longest length.
    pub fn total(&self, sequences: usize) -> u64 {
        let each = self.sequence_bytes(self.max_tokens);
        self.fixed() + sequences as u64 * each
    }

    /// Sequences of `tokens` that fit a memory of `limit` bytes for all ranks.
    pub fn sequences_within(&self, limit: u64, tokens: usize) -> usize {
        let left = limit.saturating_sub(self.fixed());
        count(left, self.sequence_bytes(tokens))
    }

    /// Sequences of `tokens` that fit where each rank has `limit` bytes of its own.
    pub fn sequences_within_each(&self, limit: u64, tokens: usize) -> usize {
        let of_rank = |rank: &RankPlan| {
            let left = limit.saturating_sub(rank.fixed());
            count(
                left,
                rank.kv_bytes(tokens, self.chunk) + rank.sequence_overhead,
            )
        };
        self.ranks.iter().map(of_rank).min().unwrap_or(0)
    }

    /// Tokens, in whole pages, that fit where each rank has `limit` bytes of its
    /// own and layers keep all tokens of a sequence.
    pub fn tokens_within_each(&self, limit: u64) -> u64 {
        let of_rank = |rank: &RankPlan| {
            let left = limit.saturating_sub(rank.fixed());
            let page = rank.kv_bytes(BLOCK_TOKENS, None);
            left.checked_div(page).unwrap_or(u64::MAX)
        };
        let pages = self.ranks.iter().map(of_rank).min().unwrap_or(0);
        pages.saturating_mul(BLOCK_TOKENS as u64)
    }

    /// What the KV cache has room for within `limit`: up to `most` sequences that share
    /// the blocks. One longest sequence always fits; of several, each can have an
    /// eighth of that at least. Nothing if not one fits.
    pub fn capacity(&self, limit: Limit, most: usize) -> Option<KvCapacity> {
        let geometry = BlockGeometry::new(self.chunk);
        let needed = geometry.needed(self.max_tokens, self.step_tokens);
        let room = |ranks: &[RankPlan], left: u64| {
            let group_bytes = |of: fn(&RankPlan) -> u64| ranks.iter().map(of).sum::<u64>();
            let token = [
                group_bytes(|rank| rank.kv_bytes_per_token),
                group_bytes(|rank| rank.chunked_kv_bytes_per_token),
            ];
            let one = (0..2).map(|group| (needed[group] * BLOCK_TOKENS) as u64 * token[group]);
            let overhead = group_bytes(|rank| rank.sequence_overhead);
            share(left, one.sum(), overhead, (needed, most))
        };
        match limit {
            // Not a promise of so much memory.
            Limit::Together(u64::MAX) => room(&self.ranks, u64::MAX),
            Limit::Together(limit) => room(&self.ranks, limit.checked_sub(self.fixed())?),
            Limit::Each(limit) => {
                let rooms = self.ranks.iter().map(|rank| {
                    let left = limit.checked_sub(rank.fixed())?;
                    room(std::slice::from_ref(rank), left)
                });
                rooms
                    .collect::<Option<Vec<_>>>()?
                    .into_iter()
                    .reduce(KvCapacity::min)
            }
        }
    }

    /// Sequences that fit `limit` bytes, at least one.
    ///
    /// # Errors
    /// `InsufficientMemory` when not one fits, with the numbers and with what
    /// would.
    pub fn check(&self, limit: u64) -> Result<usize, ModelError> {
        match self.sequences_within(limit, self.max_tokens) {
            0 => Err(ModelError::Memory(self.refusal(limit))),
            sequences => Ok(sequences),
        }
    }

    fn refusal(&self, limit: u64) -> String {
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let needed = mib(self.total(1));
        let ranks = match self.ranks.len() {
            1 => "1 rank".to_owned(),
            ranks => format!("{ranks} ranks"),
        };
        let shorter = match Limit::Together(limit).longest(self, self.max_tokens) {
            0 => String::new(),
            tokens => format!(" or lower spec.context.maxTokens to {tokens}"),
        };
        let adapters = match self.adapters() {
            0 => String::new(),
            bytes => format!("adapters {} MiB, ", mib(bytes)),
        };
        format!(
            "needs {needed} MiB ({ranks}: weights {} MiB, {adapters}KV cache of one sequence of {} tokens {} MiB, reserve {} MiB), the limit is {} MiB; raise spec.resources.memory to {needed}Mi{shorter}",
            mib(self.weights()),
            self.max_tokens,
            mib(self.kv_bytes(self.max_tokens)),
            mib(self.reserve() + self.sequence_overhead()),
            limit / MIB,
        )
    }
}

/// Shares `left` bytes out among sequences of which the longest needs `one` for its
/// `needed` blocks, each with an `overhead` besides. `u64::MAX` stands for memory of which
/// nobody said how much there is.
fn share(
    left: u64,
    one: u64,
    overhead: u64,
    (needed, most): (KvBlocks, usize),
) -> Option<KvCapacity> {
    let most = most.max(1) as u64;
    let mut slots = left
        .checked_div(one / LEAST_SHARE + overhead)
        .unwrap_or(most)
        .min(most);
    while slots > 1 && left.saturating_sub(slots * overhead) < one {
        slots -= 1;
    }
    let for_blocks = left.checked_sub(slots.max(1) * overhead)?;
    if slots == 0 || for_blocks < one {
        return None;
    }
    // As many of both kinds as sequences of the longest length use of them. Beyond what
    // the sequences can hold at once they keep what others may begin with.
    let kept = if left == u64::MAX { 1 } else { MOST_KEPT };
    let count = |needed: usize| {
        let count = u128::from(for_blocks) * needed as u128;
        let count = count.checked_div(u128::from(one)).unwrap_or(u128::MAX);
        let most = u128::from(slots * kept) * needed as u128;
        u32::try_from(count.min(most)).unwrap_or(u32::MAX)
    };
    Some(KvCapacity {
        slots: u32::try_from(slots).unwrap_or(u32::MAX),
        blocks: count(needed[0]),
        chunk_blocks: count(needed[1]),
    })
}

fn count(left: u64, each: u64) -> usize {
    let count = left.checked_div(each).unwrap_or(u64::MAX);
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// Bytes of the cache for one token on the rank of `shard`: in the layers that
/// attend to all tokens, and in those that attend in chunks.
pub fn kv_bytes_per_token(config: &LlamaConfig, shard: &Shard, kv: KvFormat) -> (u64, u64) {
    let layer = 2 * shard.kv_heads.len() * kv.row_bytes(config.head_dim);
    let layers = &config.layers[shard.layers.clone()];
    let chunked = layers.iter().filter(|kind| kind.chunked).count();
    (
        ((layers.len() - chunked) * layer) as u64,
        (chunked * layer) as u64,
    )
}

/// A sequence longer than the model was trained for would be answered with
/// nonsense.
///
/// # Errors
/// `InvalidLayout`.
pub fn check_context(config: &LlamaConfig, max_tokens: usize) -> Result<(), ModelError> {
    if max_tokens == 0 || max_tokens > config.context_length {
        return Err(ModelError::Layout(format!(
            "sequences of {max_tokens} tokens: the model takes 1 to {}",
            config.context_length
        )));
    }
    Ok(())
}

/// What an open header keeps: most of all a GGUF's vocabulary and merges.
fn header_bytes(checkpoint: &Checkpoint) -> u64 {
    let metadata = checkpoint.gguf().into_iter().flat_map(Gguf::metadata);
    metadata.map(|(_, value)| value.heap_bytes() as u64).sum()
}

/// Strings that a tokenizer keeps. Vocabularies of byte-level BPE have about as
/// many merges as tokens.
fn text_entries(checkpoint: &Checkpoint) -> u64 {
    checkpoint
        .gguf()
        .map_or_else(|| 2 * checkpoint.config().vocab as u64, gguf_entries)
}

fn gguf_entries(gguf: &Gguf) -> u64 {
    gguf.metadata()
        .values()
        .map(|value| match value {
            Value::TextList(list) => list.len() as u64,
            _ => 0,
        })
        .sum()
}

/// Activations of the widest point of a layer: the residual stream before and after (as
/// parts too, where several threads compute it), its norm, and gate, up, their product and
/// the 8-bit form in which it is multiplied, or queries, keys, values and what is attended
/// to. And the scores of the attention tiles that the threads compute.
fn activation_bytes(
    config: &LlamaConfig,
    shard: &Shard,
    request: &MemoryRequest,
    threads: usize,
) -> u64 {
    let query = shard.heads.len() * config.head_dim;
    let kv = shard.kv_heads.len() * config.head_dim;
    let experts = shard.expert_ffn.len() + shard.shared_ffn.len();
    let inner = shard.ffn.len().max(experts);
    let streams = if threads > 1 { 4 } else { 3 };
    let row = streams * config.hidden + (3 * inner + inner / 3).max(3 * query + 3 * kv);
    let scores = threads * ATTENTION_TILE_TOKENS * config.group() * request.max_tokens;
    ((request.step_tokens * row + scores) * size_of::<f32>()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cache_fits_its_memory_and_takes_what_there_is(
            left in 0_u64..1 << 40,
            needed in (1_usize..5000, 0_usize..300),
            block_bytes in (1_u64..1 << 22, 1_u64..1 << 22),
            overhead in 0_u64..1 << 22,
            most in 1_usize..300,
        ) {
            let needed = [needed.0, needed.1];
            let bytes = |blocks: [u64; 2]| blocks[0] * block_bytes.0 + blocks[1] * block_bytes.1;
            let one = bytes(needed.map(|needed| needed as u64));
            let Some(capacity) = share(left, one, overhead, (needed, most)) else {
                prop_assert!(left < one + overhead);
                return Ok(());
            };
            let slots = u64::from(capacity.slots);
            let blocks = [u64::from(capacity.blocks), u64::from(capacity.chunk_blocks)];
            prop_assert!((1..=most as u64).contains(&slots));
            prop_assert!(blocks.iter().zip(needed).all(|(blocks, needed)| *blocks >= needed as u64));
            let taken = bytes(blocks) + slots * overhead;
            prop_assert!(taken <= left);
            if slots > 1 {
                prop_assert!(slots * (one / LEAST_SHARE + overhead) <= left);
            }
            let is_full = blocks[0] == MOST_KEPT * slots * needed[0] as u64;
            prop_assert!(is_full || left - taken < one / needed[0] as u64 + block_bytes.0 + block_bytes.1);
        }
    }

    #[test]
    fn memory_without_a_limit_holds_the_longest_sequences() {
        let capacity = share(u64::MAX, 1 << 30, 1 << 20, ([256, 9], 64));
        let expected = KvCapacity {
            slots: 64,
            blocks: 64 * 256,
            chunk_blocks: 64 * 9,
        };
        assert_eq!(capacity, Some(expected));
        assert_eq!(
            share(u64::MAX, 0, 0, ([0, 0], 3)).map(|capacity| capacity.slots),
            Some(3)
        );
    }
}
