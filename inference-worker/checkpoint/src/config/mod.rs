//! Shape and constants of a Llama model, from `config.json` or from the metadata
//! of a GGUF.

pub(crate) mod bert;
mod check;
mod fields;
mod gguf;
mod hugging_face;
pub mod quantization;

use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::format::BLOCK;
use crate::order;

pub(crate) use gguf::{ARCHITECTURE_KEY, ROPE_FACTORS, from_gguf};
pub(crate) use hugging_face::{HuggingFace, parse};

/// No model comes near these; larger numbers are damage, and arithmetic on
/// anything smaller cannot overflow.
pub(crate) const MAX_SIZE: u64 = 1 << 24;
/// Layers that a model may have: each costs memory before any weight is read.
pub(crate) const MAX_LAYERS: usize = 1024;
/// Experts that all layers together may have, likewise.
const MAX_EXPERTS: usize = 1 << 15;
/// Query heads that a layer may have, likewise.
const MAX_HEADS: usize = 1024;
/// Width that a head may have.
const MAX_HEAD_DIM: usize = 4096;
/// Weights that a model may have.
const MAX_WEIGHTS: u128 = 1 << 50;
/// Partial sums of a product across a layer: tensor parallel 1, 2, 4 and 8 agree
/// to the bit where the heads divide so.
const PARTIAL_SUMS: usize = 8;

/// Shape and constants of a Llama model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network of layers without experts.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// What each layer computes, in order.
    pub layers: Vec<LayerKind>,
    /// Rotary position embedding of the layers that have it.
    pub rope: Rope,
    /// Mixture of experts, where layers have one.
    pub experts: Option<Experts>,
    /// Tokens of an attention chunk, where layers attend in chunks: a token sees
    /// only tokens of its own chunk (Llama 4).
    pub chunk: Option<usize>,
    /// Whether queries and keys of rotary layers are normalised a head, without
    /// weights, after they turned (Llama 4 Scout).
    pub qk_norm: bool,
    /// Growth of queries with their position in layers without rotary embedding.
    pub temperature: Option<Temperature>,
    /// Added to the mean square in `RMSNorm`.
    pub rms_epsilon: f32,
    /// Tokens that the model was trained to attend over.
    pub context_length: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Whether the token embedding is also the output head.
    pub tied: bool,
}

/// What one layer computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerKind {
    /// Whether queries and keys turn with their position.
    pub rope: bool,
    /// Whether attention stays inside chunks.
    pub chunked: bool,
    /// Whether the feed-forward network is a mixture of experts.
    pub experts: bool,
}

impl LayerKind {
    /// A layer of Llama 3.
    pub const PLAIN: Self = Self {
        rope: true,
        chunked: false,
        experts: false,
    };
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Leading dimensions of a head that turn.
    pub dim: usize,
    /// Base of the frequencies.
    pub base: f64,
    /// Which dimensions turn together.
    pub pairs: RopePairs,
    /// How frequencies are lowered for long contexts.
    pub scaling: RopeScaling,
}

/// Which dimensions of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RopePairs {
    /// 2j and 2j + 1 (GGUF, Llama 4).
    Neighbours,
    /// j and j + dim / 2 (Hugging Face's Llama).
    Halves,
}

/// How frequencies are lowered for long contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by one factor.
    Linear(f64),
    /// Low ones by a factor, high ones not, with a band between (Llama 3.1 model card).
    Llama3(Llama3Scaling),
    /// By the divisors in the tensor `rope_freqs.weight`.
    Factors,
}

/// Constants of Llama 3's scaling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Llama3Scaling {
    /// Divisor of low frequencies.
    pub factor: f64,
    /// Wavelengths of more than `original / low` are low frequencies.
    pub low: f64,
    /// Wavelengths of less than `original / high` stay.
    pub high: f64,
    /// Context length before scaling.
    pub original: f64,
}

/// A mixture of experts of which each token takes the likeliest (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of a layer.
    pub count: usize,
    /// Width of an expert's feed-forward network.
    pub ffn: usize,
    /// Width of the network that every token passes beside its expert's.
    pub shared_ffn: usize,
}

/// Queries grow by `1 + scale · ln(1 + floor((position + 1) / floor_scale))`
/// (Llama 4 model card; Nakanishi 2025).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Temperature {
    /// Tokens of a step.
    pub floor_scale: f64,
    /// Weight of the logarithm.
    pub scale: f64,
}

impl Temperature {
    /// The factor of a query at `position`.
    #[expect(clippy::cast_possible_truncation, reason = "queries are f32")]
    pub fn factor(&self, position: usize) -> f32 {
        let steps = ((position as f64 + 1.0) / self.floor_scale).floor();
        ((1.0 + steps).ln() * self.scale + 1.0) as f32
    }
}

impl LlamaConfig {
    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The family of models, as GGUF calls it.
    pub fn architecture(&self) -> &'static str {
        let is_llama4 = self.experts.is_some() || self.chunk.is_some() || self.qk_norm;
        if is_llama4 { "llama4" } else { "llama" }
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Partial sums in which products over `units` heads, or blocks of columns, are
    /// taken, whatever the number of ranks.
    pub(crate) fn partial_sums(&self, units: usize) -> usize {
        let sums = if self.heads <= PARTIAL_SUMS {
            self.heads
        } else if self.heads.is_multiple_of(PARTIAL_SUMS) {
            PARTIAL_SUMS
        } else {
            self.kv_heads
        };
        sums.min(units)
    }

    /// Whether `tensor` ranks compute the same bits as one: the partial sums of
    /// every layer are cut as [`order::agrees`] wants it.
    pub fn agrees(&self, tensor: usize) -> bool {
        let experts = self
            .experts
            .map(|experts| [experts.ffn, experts.shared_ffn]);
        let widths = experts.into_iter().flatten().chain([self.ffn]);
        widths
            .map(|width| width / BLOCK)
            .chain([self.heads])
            .all(|units| order::agrees(self.partial_sums(units), tensor))
    }

    /// Checks what every kind of header must hold. Arithmetic on what passes does
    /// not overflow.
    pub(crate) fn check(self, file: &str) -> Result<Self, ModelError> {
        check::check(&self, file)?;
        Ok(self)
    }
}
