//! One transformer layer on one rank.

use candle_core::{Result, Tensor};
use llama_checkpoint::adapter::Target;

use crate::attention::{Attend, AttentionForm};
use crate::experts::Experts;
use crate::kernels::Isa;
use crate::linear::Linear;
use crate::lora::rows::{LayerAdapters, Parts};
use crate::ops::{AddTo, Reduce, RmsNorm, SiluMul};
use crate::step::StepError;

/// A layer's part of one rank.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: RmsNorm,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) form: AttentionForm,
    pub(crate) feed_forward_norm: RmsNorm,
    pub(crate) feed_forward: FeedForward,
}

/// The feed-forward part of a layer.
#[derive(Debug)]
pub(crate) enum FeedForward {
    /// One network for all tokens.
    Dense(Network),
    /// One for all tokens and, beside it, one of several for each.
    Experts { shared: Network, experts: Experts },
}

/// `down(silu(gate) · up)` (`SwiGLU`, Shazeer 2020).
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

impl Network {
    /// This rank's part of the output.
    fn forward(&self, x: &Tensor, isa: Isa, adapters: LayerAdapters<'_>) -> Result<Parts> {
        let gate = adapters.forward(Target::Gate, &self.gate, x)?;
        let up = adapters.forward(Target::Up, &self.up, x)?;
        let inner = gate.apply_op2_no_bwd(&up, &SiluMul(isa))?;
        adapters.parts(Target::Down, &self.down, &inner)
    }
}

impl Layer {
    /// Adds to `x` what the layer computes of it, together with the other ranks of
    /// its stage.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        attend: &Attend<'_>,
        adapters: LayerAdapters<'_>,
        reduce: &Reduce<'_>,
    ) -> std::result::Result<(), StepError> {
        let parts = self
            .attention(x, attend, adapters)
            .map_err(StepError::Compute)?;
        let sum = adapters.sum(Target::Output, parts, reduce)?;
        x.inplace_op2(&sum, &AddTo).map_err(StepError::Compute)?;
        let parts = self
            .feed_forward(x, attend.step.isa, adapters)
            .map_err(StepError::Compute)?;
        let sums = adapters.sum(Target::Down, parts, reduce)?;
        self.add_parts(x, &sums).map_err(StepError::Compute)
    }

    /// This rank's part of the attention output.
    fn attention(
        &self,
        x: &Tensor,
        attend: &Attend<'_>,
        adapters: LayerAdapters<'_>,
    ) -> Result<Parts> {
        let x = self.attention_norm.forward(x)?;
        let (q, k, v) = (
            adapters.forward(Target::Query, &self.query, &x)?,
            adapters.forward(Target::Key, &self.key, &x)?,
            adapters.forward(Target::Value, &self.value, &x)?,
        );
        let attended = q.apply_op3_no_bwd(&k, &v, attend)?;
        adapters.parts(Target::Output, &self.output, &attended)
    }

    /// This rank's part of the feed-forward output. With experts it is twice as
    /// high as `x`: the shared network's part above the experts'. They are summed
    /// over ranks side by side, since the sum of sums would depend on how many
    /// ranks take it.
    fn feed_forward(&self, x: &Tensor, isa: Isa, adapters: LayerAdapters<'_>) -> Result<Parts> {
        let x = self.feed_forward_norm.forward(x)?;
        match &self.feed_forward {
            FeedForward::Dense(network) => network.forward(&x, isa, adapters),
            FeedForward::Experts { shared, experts } => {
                let mut parts = shared.forward(&x, isa, adapters)?;
                parts.product = Tensor::cat(&[&parts.product, &experts.forward(&x)?], 0)?;
                Ok(parts)
            }
        }
    }

    fn add_parts(&self, x: &Tensor, parts: &Tensor) -> Result<()> {
        let rows = x.dim(0)?;
        if let FeedForward::Experts { .. } = self.feed_forward {
            let shared = parts.narrow(0, 0, rows)?;
            shared.inplace_op2(&parts.narrow(0, rows, rows)?.copy()?, &AddTo)?;
            return x.inplace_op2(&shared, &AddTo);
        }
        x.inplace_op2(parts, &AddTo)
    }
}
