//! What a layer of a Llama model asks of the device that computes it.

use candle_core::{Result, Tensor};
use llama_checkpoint::config::{RopePairs, Temperature};

/// How one layer attends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionRules {
    /// Which dimensions of queries and keys turn together; `None` in Llama 4's layers
    /// without rotary embedding.
    pub rotary: Option<RopePairs>,
    /// Tokens attend only within their own chunk of so many positions: 0 to
    /// chunk − 1, chunk to 2 · chunk − 1, and so on.
    pub chunk: Option<usize>,
    /// Queries and keys are divided by their root mean square, head by head and
    /// after they are turned; the epsilon of that.
    pub qk_norm: Option<f32>,
    /// Applied to queries.
    pub temperature: Option<Temperature>,
}

impl AttentionRules {
    /// Those of Llama 3: rotary embedding and full causal attention.
    pub fn causal(rotary: RopePairs) -> Self {
        Self {
            rotary: Some(rotary),
            chunk: None,
            qk_norm: None,
            temperature: None,
        }
    }
}

/// Tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its place in the KV cache.
    pub slot: usize,
    /// Position of the first of the tokens.
    pub start: usize,
    /// Number of tokens, at least one.
    pub len: usize,
}

/// The expert that a row is sent to, and the weight of its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Number of the expert.
    pub expert: usize,
    /// Sigmoid of its score.
    pub weight: f32,
}

/// The operations of a layer, on the tensors of one kind of device.
///
/// Activations are f32 tensors of shape `[rows, columns]`, one row a token.
pub trait Operations {
    /// A weight matrix, ready to multiply.
    type Matrix;
    /// The rows of a step: what is the same in all layers, prepared once.
    type Rows;
    /// Keys and values of the sequences.
    type Cache;

    /// Prepares a step over `sequences`, whose rows come one sequence after
    /// another.
    ///
    /// # Errors
    /// When the device refuses.
    fn rows(&self, sequences: &[Sequence]) -> Result<Self::Rows>;

    /// `x · weightᵀ`.
    ///
    /// # Errors
    /// When the shapes do not fit or the device refuses.
    fn linear(&self, x: &Tensor, weight: &Self::Matrix) -> Result<Tensor>;

    /// Each row divided by its root mean square, times `weight` a column.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor>;

    /// `silu(gate) · up`.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor>;

    /// `x + part`.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn add(&self, x: &Tensor, part: &Tensor) -> Result<Tensor>;

    /// Puts keys and values into the cache, and returns what the queries attend to.
    /// `layer` is the layer's number on this rank and its rules; `qkv` are queries,
    /// keys and values as the projections give them.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn attend(
        &self,
        layer: (usize, &AttentionRules),
        qkv: [&Tensor; 3],
        rows: &Self::Rows,
        cache: &mut Self::Cache,
    ) -> Result<Tensor>;

    /// The best expert of each row of `scores`, the first of equals. Waits for the
    /// device.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn choose(&self, scores: &Tensor) -> Result<Vec<Choice>>;

    /// The rows `rows` of `x`, each times its weight.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn take_rows(&self, x: &Tensor, rows: &[u32], weights: &[f32]) -> Result<Tensor>;

    /// `x` with the rows of `part` added to its rows `rows`.
    ///
    /// # Errors
    /// As [`Operations::linear`].
    fn add_rows(&self, x: &Tensor, rows: &[u32], part: &Tensor) -> Result<Tensor>;
}
