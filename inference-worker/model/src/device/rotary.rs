//! Rotary position embedding by plain tensor operations.

use candle_core::{D, Device, Result, Tensor};

use llama_checkpoint::config::RopePairs;

/// Cosines and sines of the rows of a step, `[rows, 1, pairs]`.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    cos: Tensor,
    sin: Tensor,
}

impl Turns {
    /// For one row at each of `positions`; `steps` holds the angle a position of
    /// each pair. Angles are taken in f64: a position of a million times a step
    /// has no exact f32.
    #[expect(clippy::cast_possible_truncation, reason = "heads are turned in f32")]
    pub(super) fn new(steps: &[f64], positions: &[usize], device: &Device) -> Result<Self> {
        let count = positions.len() * steps.len();
        let (mut cos, mut sin) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for position in positions {
            for step in steps {
                let (s, c) = (*position as f64 * step).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let shape = (positions.len(), 1, steps.len());
        Ok(Self {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }

    /// Turns the leading dimensions of every head of `x`, `[rows, heads, width]`.
    pub(super) fn turn(&self, x: &Tensor, pairs: RopePairs) -> Result<Tensor> {
        let (rows, heads, width) = x.dims3()?;
        let count = self.cos.dim(D::Minus1)?;
        let turned = x.narrow(2, 0, 2 * count)?;
        let turned = match pairs {
            RopePairs::Neighbours => {
                let turned = turned.reshape((rows, heads, count, 2))?;
                let (a, b) = (turned.narrow(3, 0, 1)?, turned.narrow(3, 1, 1)?);
                let (a, b) = self.rotate(&a.squeeze(3)?, &b.squeeze(3)?)?;
                Tensor::stack(&[a, b], 3)?.reshape((rows, heads, 2 * count))?
            }
            RopePairs::Halves => {
                let (a, b) = (turned.narrow(2, 0, count)?, turned.narrow(2, count, count)?);
                let (a, b) = self.rotate(&a, &b)?;
                Tensor::cat(&[a, b], 2)?
            }
        };
        if 2 * count == width {
            return Ok(turned);
        }
        let rest = x.narrow(2, 2 * count, width - 2 * count)?;
        Tensor::cat(&[turned, rest], 2)
    }

    fn rotate(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (a_cos, a_sin) = (a.broadcast_mul(&self.cos)?, a.broadcast_mul(&self.sin)?);
        let (b_cos, b_sin) = (b.broadcast_mul(&self.cos)?, b.broadcast_mul(&self.sin)?);
        Ok(((a_cos - b_sin)?, (a_sin + b_cos)?))
    }
}
