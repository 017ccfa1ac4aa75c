//! A mixture of experts of which each token takes the likeliest (Llama 4).

use std::collections::BTreeMap;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::kernels::{self, Isa};
use crate::layer::Network;
use crate::linear::Linear;
use crate::ops::values;

/// The router and the experts of a layer.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(crate) router: Linear,
    pub(crate) networks: Vec<Network>,
    pub(crate) isa: Isa,
}

impl Experts {
    /// What each row's expert makes of it, `[m, hidden]`: this rank's part.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// Rows by expert, each with its weight: the sigmoid of its score.
    fn choose(&self, x: &[f32]) -> BTreeMap<usize, Vec<(usize, f32)>> {
        let scores = self.router.multiply(x);
        let mut chosen: BTreeMap<usize, Vec<(usize, f32)>> = BTreeMap::new();
        for (row, scores) in scores.chunks_exact(self.networks.len()).enumerate() {
            let (expert, score) = likeliest(scores);
            let weight = 1.0 / (1.0 + (-score).exp());
            chosen.entry(expert).or_default().push((row, weight));
        }
        chosen
    }
}

/// The largest score and its place, the first of equals.
fn likeliest(scores: &[f32]) -> (usize, f32) {
    let first = (0, scores.first().copied().unwrap_or_default());
    scores.iter().copied().enumerate().fold(
        first,
        |best, next| if next.1 > best.1 { next } else { best },
    )
}

impl CustomOp1 for Experts {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let x = values(storage, layout)?;
        let mut out = vec![0.0; rows * width];
        for (expert, rows) in self.choose(x) {
            // The weight multiplies what goes in, not what comes out.
            let mut part = Vec::with_capacity(rows.len() * width);
            for (row, weight) in &rows {
                let row = &x[row * width..(row + 1) * width];
                part.extend(row.iter().map(|value| value * weight));
            }
            let network = &self.networks[expert];
            let mut inner = network.gate.multiply(&part);
            kernels::silu_mul(self.isa, &mut inner, &network.up.multiply(&part));
            let results = network.down.multiply(&inner);
            for ((row, _), result) in rows.iter().zip(results.chunks_exact(width)) {
                out[row * width..(row + 1) * width].copy_from_slice(result);
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_scores_is_taken() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0, -2.0]), (1, 3.0));
        assert_eq!(likeliest(&[-1.0]), (0, -1.0));
    }
}
