//! A transformer layer of Llama 3 or Llama 4, written over [`Operations`].

use candle_core::Tensor;
use llama_checkpoint::adapter::Target;

use super::adapters::{Parts, StepAdapters};
use super::collective::TensorCollective;
use super::operations::{AttentionRules, Choice, Operations};
use crate::step::StepError;

/// One rank's part of a layer; `M` is a weight matrix.
#[derive(Clone, Debug)]
pub struct Layer<M> {
    /// Weight of the norm before attention.
    pub attn_norm: Tensor,
    /// Query projection, the rows of this rank's heads.
    pub q: M,
    /// Key projection, likewise.
    pub k: M,
    /// Value projection, likewise.
    pub v: M,
    /// Output projection, the columns of this rank's heads.
    pub o: M,
    /// How it attends.
    pub attention: AttentionRules,
    /// Weight of the norm before the feed-forward network.
    pub ffn_norm: Tensor,
    /// The feed-forward network.
    pub feed_forward: FeedForward<M>,
}

/// One rank's part of a feed-forward network.
#[derive(Clone, Debug)]
pub enum FeedForward<M> {
    /// One network for every token.
    Dense(Gated<M>),
    /// For every token the expert that the router likes best, and one that all
    /// tokens share.
    Experts(Experts<M>),
}

/// `down(silu(gate(x)) · up(x))`.
#[derive(Clone, Debug)]
pub struct Gated<M> {
    /// Gate projection, some of its rows.
    pub gate: M,
    /// Up projection, the same rows.
    pub up: M,
    /// Down projection, the columns that fit.
    pub down: M,
}

/// Llama 4's mixture of experts.
#[derive(Clone, Debug)]
pub struct Experts<M> {
    /// Scores of the experts; every rank has it whole.
    pub router: M,
    /// The experts, a part of each.
    pub experts: Vec<Gated<M>>,
    /// The expert of all tokens.
    pub shared: Gated<M>,
}

/// What a layer needs beside its weights.
pub(super) struct Pass<'a, O: Operations> {
    pub(super) operations: &'a O,
    pub(super) rows: &'a O::Rows,
    pub(super) cache: &'a mut O::Cache,
    pub(super) epsilon: f32,
    pub(super) adapters: &'a StepAdapters<'a, O::Matrix>,
    pub(super) collective: &'a mut dyn TensorCollective,
}

impl<M> Layer<M> {
    /// The residual stream `x` after this layer, the `number`-th of the rank.
    pub(super) fn forward<O: Operations<Matrix = M>>(
        &self,
        number: usize,
        x: &Tensor,
        pass: &mut Pass<'_, O>,
    ) -> Result<Tensor, StepError> {
        let (operations, adapters) = (pass.operations, pass.adapters);
        let parts = self.attend(number, x, pass).map_err(StepError::Compute)?;
        let place = (number, Target::Output);
        let sum = adapters.sum(operations, place, parts, pass.collective)?;
        let x = operations.add(x, &sum).map_err(StepError::Compute)?;
        let normed = operations
            .rms_norm(&x, &self.ffn_norm, pass.epsilon)
            .map_err(StepError::Compute)?;
        let parts = match &self.feed_forward {
            FeedForward::Dense(network) => network
                .changed(number, &normed, pass)
                .map_err(StepError::Compute)?,
            FeedForward::Experts(experts) => experts.forward(number, &normed, pass)?,
        };
        let place = (number, Target::Down);
        let sum = adapters.sum(operations, place, parts, pass.collective)?;
        operations.add(&x, &sum).map_err(StepError::Compute)
    }

    /// This rank's part of the attention output.
    fn attend<O: Operations<Matrix = M>>(
        &self,
        number: usize,
        x: &Tensor,
        pass: &mut Pass<'_, O>,
    ) -> candle_core::Result<Parts> {
        let (operations, adapters) = (pass.operations, pass.adapters);
        let x = operations.rms_norm(x, &self.attn_norm, pass.epsilon)?;
        let linear = |target, matrix| adapters.linear(operations, (number, target), (&x, matrix));
        let q = linear(Target::Query, &self.q)?;
        let k = linear(Target::Key, &self.k)?;
        let v = linear(Target::Value, &self.v)?;
        let rules = (number, &self.attention);
        let attended = operations.attend(rules, [&q, &k, &v], pass.rows, pass.cache)?;
        adapters.parts(operations, (number, Target::Output), (&attended, &self.o))
    }
}

impl<M> Gated<M> {
    /// This rank's part of the output, for layer `number` of the rank, as adapters
    /// change it.
    fn changed<O: Operations<Matrix = M>>(
        &self,
        number: usize,
        x: &Tensor,
        pass: &Pass<'_, O>,
    ) -> candle_core::Result<Parts> {
        let (operations, adapters) = (pass.operations, pass.adapters);
        let gate = adapters.linear(operations, (number, Target::Gate), (x, &self.gate))?;
        let up = adapters.linear(operations, (number, Target::Up), (x, &self.up))?;
        let inner = operations.silu_mul(&gate, &up)?;
        adapters.parts(operations, (number, Target::Down), (&inner, &self.down))
    }

    /// This rank's part of the output.
    fn forward<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        x: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let gate = operations.linear(x, &self.gate)?;
        let up = operations.linear(x, &self.up)?;
        operations.linear(&operations.silu_mul(&gate, &up)?, &self.down)
    }
}

impl<M> Experts<M> {
    /// This rank's part of the output. The router's weight multiplies an expert's
    /// input, not its output.
    fn forward<O: Operations<Matrix = M>>(
        &self,
        number: usize,
        x: &Tensor,
        pass: &mut Pass<'_, O>,
    ) -> Result<Parts, StepError> {
        let operations = pass.operations;
        let scores = operations
            .linear(x, &self.router)
            .map_err(StepError::Compute)?;
        // Reading the scores waits for the device, and so for the sum before them.
        pass.collective.settle()?;
        let compute = || {
            let choices = operations.choose(&scores)?;
            let shared = self.shared.changed(number, x, pass)?;
            shared.with(|shared| self.add_to(shared, x, &choices, operations))
        };
        compute().map_err(StepError::Compute)
    }

    /// `out` with what each row's expert makes of it added.
    fn add_to<O: Operations<Matrix = M>>(
        &self,
        mut out: Tensor,
        x: &Tensor,
        choices: &[Choice],
        operations: &O,
    ) -> candle_core::Result<Tensor> {
        for (number, expert) in self.experts.iter().enumerate() {
            let (mut rows, mut weights) = (Vec::new(), Vec::new());
            for (row, choice) in (0_u32..).zip(choices) {
                if choice.expert == number {
                    rows.push(row);
                    weights.push(choice.weight);
                }
            }
            if rows.is_empty() {
                continue;
            }
            let x = operations.take_rows(x, &rows, &weights)?;
            let part = expert.forward(operations, &x)?;
            out = operations.add_rows(&out, &rows, &part)?;
        }
        Ok(out)
    }
}
