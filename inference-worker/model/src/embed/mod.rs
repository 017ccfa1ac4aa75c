//! Vectors of texts: BERT encoders (Devlin et al. 2018) that are pooled as
//! sentence-transformers does it (Reimers and Gurevych 2019).
//!
//! Texts are computed without padding, several short ones together: their rows share the
//! way through the weights, and each text attends to itself alone. The kernels give each
//! row the same bits in any company, so a vector depends on nothing but its text's
//! tokens: not on what else is in the request, nor on the number of threads.

mod attention;
mod layer;
mod load;
mod tokenizer;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use llama_checkpoint::EmbeddingCheckpoint;
use llama_checkpoint::embedding::{BertConfig, Pooling};

use self::layer::{Layer, LayerNorm};
use crate::error::ModelError;
use crate::kernels::Isa;
use crate::linear::Matrix;
use crate::threads::Threads;

pub use tokenizer::{EmbeddingTokenizer, TokenizeError};

/// Least length that a vector is divided by, as in `PyTorch`'s `normalize`.
const LEAST_LENGTH: f32 = 1e-12;

/// Tokens of which no vector can be made.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    /// There are none, or too many.
    #[error("a text of {tokens} tokens; the model takes 1 to {most}")]
    Length {
        /// How many came.
        tokens: usize,
        /// How many the model takes.
        most: usize,
    },
    /// One is not in the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A tensor operation failed.
    #[error("compute a vector")]
    Compute(#[from] candle_core::Error),
    /// The weights give no numbers for these tokens.
    #[error("the vector of a text of {tokens} tokens holds what is no number")]
    NotANumber {
        /// Tokens of the text.
        tokens: usize,
    },
}

/// An embedding model in memory.
#[derive(Debug)]
pub struct Embedder {
    config: BertConfig,
    words: Matrix,
    positions: Matrix,
    /// The embedding of the first kind of segments, of which all texts are.
    segment: Vec<f32>,
    norm: LayerNorm,
    layers: Vec<Layer>,
    threads: Arc<Threads>,
}

impl Embedder {
    /// Loads the model, to compute on `threads` threads.
    ///
    /// # Errors
    /// Whatever reading the weights refuses.
    pub fn load(checkpoint: &EmbeddingCheckpoint, threads: usize) -> Result<Self, ModelError> {
        load::load(checkpoint, Arc::new(Threads::new(threads)?), Isa::best())
    }

    /// The model's shape.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The vectors of texts, `hidden` long each. What they take of memory grows with the
    /// tokens of all of them.
    ///
    /// # Errors
    /// For a text of no tokens, too many or unknown ones.
    pub fn embed<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let (mut all, mut ranges) = (Vec::new(), Vec::new());
        for text in texts {
            self.check(text.as_ref())?;
            ranges.push(all.len()..all.len() + text.as_ref().len());
            all.extend_from_slice(text.as_ref());
        }
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let x = self.threads.run(|| self.forward(&all, &ranges))?;
        let rows: Vec<f32> = x.flatten_all()?.to_vec1()?;
        let hidden = self.config.hidden;
        let vectors = ranges.into_iter().map(|range| {
            let vector = self.pool(&rows[range.start * hidden..range.end * hidden]);
            if vector.iter().all(|value| value.is_finite()) {
                Ok(vector)
            } else {
                let tokens = range.len();
                Err(EmbedError::NotANumber { tokens })
            }
        });
        vectors.collect()
    }

    fn check(&self, tokens: &[u32]) -> Result<(), EmbedError> {
        let most = self.config.max_tokens;
        if !(1..=most).contains(&tokens.len()) {
            let tokens = tokens.len();
            return Err(EmbedError::Length { tokens, most });
        }
        let vocab = self.config.vocab;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            None => Ok(()),
            Some(&token) => Err(EmbedError::Token { token, vocab }),
        }
    }

    /// The vectors of tokens, `[tokens, hidden]`, of the texts in `ranges` of them.
    fn forward(&self, tokens: &[u32], ranges: &[Range<usize>]) -> candle_core::Result<Tensor> {
        let hidden = self.config.hidden;
        let (words, positions) = (self.words.rows(), self.positions.rows());
        let mut rows = vec![0.0; tokens.len() * hidden];
        let mut word = vec![0.0; hidden];
        let places = ranges.iter().flat_map(|range| 0..range.len());
        for ((position, token), row) in places.zip(tokens).zip(rows.chunks_mut(hidden)) {
            words.unpack_row(*token as usize, &mut word);
            positions.unpack_row(position, row);
            for ((sum, word), segment) in row.iter_mut().zip(&word).zip(&self.segment) {
                // In the order of the reference.
                *sum += word + segment;
            }
        }
        let x = Tensor::from_vec(rows, (tokens.len(), hidden), &Device::Cpu)?;
        x.inplace_op1(&self.norm)?;
        let mut layers = self.layers.iter();
        layers.try_fold(x, |x, layer| layer.forward(&x, ranges))
    }

    /// One vector of those of the tokens.
    fn pool(&self, rows: &[f32]) -> Vec<f32> {
        let hidden = self.config.hidden;
        let mut vector = rows[..hidden].to_vec();
        if self.config.pooling == Pooling::Mean {
            for row in rows.chunks_exact(hidden).skip(1) {
                for (sum, value) in vector.iter_mut().zip(row) {
                    *sum += value;
                }
            }
            let count = (rows.len() / hidden) as f32;
            for value in &mut vector {
                *value /= count;
            }
        }
        if self.config.normalize {
            let squares: f32 = vector.iter().map(|value| value * value).sum();
            let length = squares.sqrt().max(LEAST_LENGTH);
            for value in &mut vector {
                *value /= length;
            }
        }
        vector
    }
}
