//! The operations of a layer as candle's own tensor operations, which run on any
//! of its devices.

use candle_core::{D, DType, Device, Result, Tensor};

use super::attention::{self, TensorRows};
use super::cache::TensorCache;
use super::matrix::Matrix;
use super::operations::{AttentionRules, Choice, Operations, Sequence};

/// [`Operations`] on a candle device.
#[derive(Clone, Debug)]
pub struct TensorOperations {
    device: Device,
    /// Angle a position of each pair of a head.
    steps: Vec<f64>,
}

impl TensorOperations {
    /// For `device`; `steps` holds the angle a position by which rotary embedding
    /// turns each pair of a head.
    pub fn new(device: &Device, steps: Vec<f64>) -> Self {
        Self {
            device: device.clone(),
            steps,
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn indices(&self, rows: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(rows, rows.len(), &self.device)
    }
}

/// Every vector along the last dimension divided by its root mean square.
pub(super) fn root_mean_square_norm(x: &Tensor, epsilon: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(epsilon))?.sqrt()?)
}

impl Operations for TensorOperations {
    type Matrix = Matrix;
    type Rows = TensorRows;
    type Cache = TensorCache;

    fn rows(&self, sequences: &[Sequence]) -> Result<TensorRows> {
        TensorRows::new(&self.steps, sequences, &self.device)
    }

    fn linear(&self, x: &Tensor, weight: &Matrix) -> Result<Tensor> {
        weight.forward(x)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        root_mean_square_norm(x, epsilon)?.broadcast_mul(weight)
    }

    fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        gate.silu()? * up
    }

    fn add(&self, x: &Tensor, part: &Tensor) -> Result<Tensor> {
        x + part
    }

    fn attend(
        &self,
        layer: (usize, &AttentionRules),
        qkv: [&Tensor; 3],
        rows: &TensorRows,
        cache: &mut TensorCache,
    ) -> Result<Tensor> {
        attention::attend(layer, qkv, rows, cache)
    }

    fn choose(&self, scores: &Tensor) -> Result<Vec<Choice>> {
        let scores = scores.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        Ok(scores.iter().map(|row| best(row)).collect())
    }

    fn take_rows(&self, x: &Tensor, rows: &[u32], weights: &[f32]) -> Result<Tensor> {
        let weights = Tensor::from_slice(weights, (weights.len(), 1), &self.device)?;
        x.index_select(&self.indices(rows)?, 0)?
            .broadcast_mul(&weights)
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], part: &Tensor) -> Result<Tensor> {
        x.index_add(&self.indices(rows)?, part, 0)
    }
}

/// The first of the largest scores, and its sigmoid.
fn best(scores: &[f32]) -> Choice {
    let (expert, score) = scores
        .iter()
        .copied()
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
        .unwrap_or((0, f32::NEG_INFINITY));
    Choice {
        expert,
        weight: 1.0 / (1.0 + (-score).exp()),
    }
}

#[cfg(test)]
mod tests;
