//! How much memory a pod of a group needs, from the header of the model file
//! alone.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::{Gguf, Value};
use crate::kernels::BLOCK;
use crate::kv::{self, CHUNK_TOKENS};
use crate::llama::check_context;
use crate::shard::Shard;
use crate::weights::ModelSlices;

const MIB: u64 = 1 << 20;
/// One process with nothing loaded: allocator, stacks, runtime, its share of the
/// memory between ranks.
const PROCESS_BYTES: u64 = 12 * MIB;
/// The open header, for each token and merge of the vocabulary. Measured: 62.
const HEADER_ENTRY_BYTES: u64 = 80;
/// The tokenizer, likewise. Measured: 132.
const TOKENIZER_ENTRY_BYTES: u64 = 180;
/// Copies of a row of logits between the output head and the sampler.
const LOGITS_COPIES: u64 = 4;
/// Activations that are alive at once, in rows of each width (see
/// [`activation_bytes`]), half as much again for what the allocator keeps.
const ALLOCATOR_SHARE: (u64, u64) = (3, 2);

/// What a plan is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Ranks of the group.
    pub world: usize,
    /// Those of this pod.
    pub ranks: Range<usize>,
    /// Threads of each rank.
    pub threads: usize,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// Tokens that one step computes at most.
    pub step_tokens: usize,
}

/// Memory of one pod. Pages of the model file itself (token embeddings are read
/// from there) are not in it: the kernel takes them back when it needs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights of the pod's ranks together.
    pub weights: u64,
    /// KV cache for one token, over the pod's ranks.
    pub kv_bytes_per_token: u64,
    /// What one sequence takes besides its KV cache.
    pub sequence_overhead: u64,
    /// Processes, tokenizer and activations.
    pub reserve: u64,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    ranks: usize,
}

impl MemoryPlan {
    /// Plans the pod.
    ///
    /// # Errors
    /// Whatever loading the model would refuse: an unsupported model, a layout
    /// that does not divide it, sequences longer than its context.
    pub fn new(gguf: &Gguf, request: &MemoryRequest) -> Result<Self, ModelError> {
        let config = LlamaConfig::from_gguf(gguf)?;
        check_context(&config, request.max_tokens)?;
        let entries = vocabulary_entries(gguf);
        let mut plan = Self {
            weights: 0,
            kv_bytes_per_token: 0,
            sequence_overhead: 0,
            // The process that starts the ranks and answers requests.
            reserve: PROCESS_BYTES + entries * (HEADER_ENTRY_BYTES + TOKENIZER_ENTRY_BYTES),
            max_tokens: request.max_tokens,
            ranks: request.ranks.len(),
        };
        for rank in request.ranks.clone() {
            let shard = Shard::new(&config, rank, request.world, BLOCK)?;
            plan.weights += ModelSlices::locate(gguf, &config, &shard)?.bytes();
            plan.kv_bytes_per_token += kv::bytes_per_token(&config, &shard);
            plan.sequence_overhead += LOGITS_COPIES * (config.vocab * size_of::<f32>()) as u64;
            plan.reserve += PROCESS_BYTES + entries * HEADER_ENTRY_BYTES;
            plan.reserve += activation_bytes(&config, &shard, request);
        }
        Ok(plan)
    }

    /// Bytes for `sequences` of `max_tokens`.
    pub fn total(&self, sequences: usize) -> u64 {
        self.weights + self.reserve + sequences as u64 * self.sequence_bytes(self.max_tokens)
    }

    /// Sequences of `max_tokens` that fit `limit` bytes.
    pub fn sequences_within(&self, limit: u64) -> usize {
        let left = limit.saturating_sub(self.weights + self.reserve);
        usize::try_from(left / self.sequence_bytes(self.max_tokens)).unwrap_or(usize::MAX)
    }

    /// Sequences that fit `limit` bytes, at least one.
    ///
    /// # Errors
    /// `InsufficientMemory` when not one fits, with the numbers and with what
    /// would.
    pub fn check(&self, limit: u64) -> Result<usize, ModelError> {
        match self.sequences_within(limit) {
            0 => Err(ModelError::Memory(self.refusal(limit))),
            sequences => Ok(sequences),
        }
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        let tokens = tokens.next_multiple_of(CHUNK_TOKENS) as u64;
        tokens * self.kv_bytes_per_token + self.sequence_overhead
    }

    /// The longest sequence of which one fits, in whole chunks.
    fn tokens_within(&self, limit: u64) -> u64 {
        let left = limit.saturating_sub(self.weights + self.reserve + self.sequence_overhead);
        let chunk = self.kv_bytes_per_token * CHUNK_TOKENS as u64;
        left / chunk * CHUNK_TOKENS as u64
    }

    fn refusal(&self, limit: u64) -> String {
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let needed = mib(self.total(1));
        let ranks = match self.ranks {
            1 => "1 rank".to_owned(),
            ranks => format!("{ranks} ranks"),
        };
        let shorter = match self.tokens_within(limit) {
            0 => String::new(),
            tokens => format!(" or lower spec.context.maxTokens to {tokens}"),
        };
        format!(
            "needs {needed} MiB ({ranks}: weights {} MiB, KV cache of one sequence of {} tokens {} MiB, reserve {} MiB), the limit is {} MiB; raise spec.resources.memory to {needed}Mi{shorter}",
            mib(self.weights),
            self.max_tokens,
            mib(self.sequence_bytes(self.max_tokens) - self.sequence_overhead),
            mib(self.reserve + self.sequence_overhead),
            limit / MIB,
        )
    }
}

/// Strings of the vocabulary and its merges.
fn vocabulary_entries(gguf: &Gguf) -> u64 {
    gguf.metadata()
        .values()
        .map(|value| match value {
            Value::TextList(list) => list.len() as u64,
            _ => 0,
        })
        .sum()
}

/// Activations of the widest point of a layer, and the scores of the attention
/// tiles that the threads compute.
fn activation_bytes(config: &LlamaConfig, shard: &Shard, request: &MemoryRequest) -> u64 {
    let query = shard.heads.len() * config.head_dim;
    let kv = shard.kv_heads.len() * config.head_dim;
    let row = 4 * config.hidden + 3 * query + 3 * kv + 4 * shard.ffn.len();
    let group = config.heads / config.kv_heads;
    let scores = request.threads * kv::ATTENTION_TILE_TOKENS * group * request.max_tokens;
    let bytes = ((request.step_tokens * row + scores) * size_of::<f32>()) as u64;
    bytes * ALLOCATOR_SHARE.0 / ALLOCATOR_SHARE.1
}
