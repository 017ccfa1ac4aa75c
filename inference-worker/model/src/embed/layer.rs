//! One layer of a BERT, with its norms behind what they normalise.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};

use super::attention::SelfAttention;
use crate::kernels::{self, Isa};
use crate::linear::Linear;
use crate::ops::{AddTo, values_mut};
use crate::threads::Threads;

/// Rows that one thread takes at a time.
const ROWS_PER_PIECE: usize = 16;

/// A matrix and what is added to its products.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) linear: Linear,
    pub(super) bias: AddBias,
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.linear.forward(x)?;
        out.inplace_op1(&self.bias)?;
        Ok(out)
    }
}

/// Adds a vector to each row, and may apply GELU then.
#[derive(Debug)]
pub(super) struct AddBias {
    pub(super) bias: Vec<f32>,
    /// `x · Φ(x)` (Hendrycks and Gimpel 2016) behind it.
    pub(super) gelu: bool,
    pub(super) isa: Isa,
    pub(super) threads: Arc<Threads>,
}

impl InplaceOp1 for AddBias {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = self.bias.len();
        let rows = values_mut(storage, layout)?;
        self.threads
            .each_chunk(rows, ROWS_PER_PIECE * width, |part| {
                for row in part.chunks_exact_mut(width) {
                    for (value, bias) in row.iter_mut().zip(&self.bias) {
                        *value += bias;
                    }
                }
                if self.gelu {
                    kernels::gelu(self.isa, part);
                }
            });
        Ok(())
    }
}

/// Layer norm (Ba et al. 2016): each row without its mean, divided by its standard
/// deviation, times a weight a column, plus a bias a column.
#[derive(Debug)]
pub(super) struct LayerNorm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) epsilon: f32,
}

impl InplaceOp1 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        for row in values_mut(storage, layout)?.chunks_exact_mut(self.weight.len()) {
            let mean = kernels::sum(row) / row.len() as f32;
            for value in row.iter_mut() {
                *value -= mean;
            }
            let scale = 1.0 / (kernels::mean_square(row) + self.epsilon).sqrt();
            for ((value, weight), bias) in row.iter_mut().zip(&self.weight).zip(&self.bias) {
                *value = *value * scale * weight + bias;
            }
        }
        Ok(())
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) heads: usize,
    pub(super) output: Projection,
    pub(super) attention_norm: LayerNorm,
    pub(super) up: Projection,
    pub(super) down: Projection,
    pub(super) output_norm: LayerNorm,
}

impl Layer {
    /// The layer of `[tokens, hidden]`, rows of the texts in `ranges`.
    pub(super) fn forward(&self, x: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
        let (q, k, v) = (
            self.query.forward(x)?,
            self.key.forward(x)?,
            self.value.forward(x)?,
        );
        let attention = SelfAttention {
            heads: self.heads,
            ranges,
            isa: self.query.bias.isa,
            threads: &self.query.bias.threads,
        };
        let attended = q.apply_op3_no_bwd(&k, &v, &attention)?;
        let out = self.output.forward(&attended)?;
        out.inplace_op2(x, &AddTo)?;
        out.inplace_op1(&self.attention_norm)?;
        let network = self.down.forward(&self.up.forward(&out)?)?;
        network.inplace_op2(&out, &AddTo)?;
        network.inplace_op1(&self.output_norm)?;
        Ok(network)
    }
}
