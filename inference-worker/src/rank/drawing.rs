//! How rank 0 draws the tokens of one answer.

use llama_model::sample::{SampleError, Sampler, logprobs};

use crate::engine::{Submit, TokenLogprobs};
use crate::scheduler::Awaited;
use crate::structured::{Constraint, ConstraintError};

/// An answer that cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum DrawError {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error("the required form: {0}")]
    Constraint(#[from] ConstraintError),
}

/// Draws the tokens of one answer.
#[derive(Debug)]
pub(super) struct Drawing {
    sampler: Sampler,
    constraint: Option<Constraint>,
    /// Whether ranks compare their logits for it.
    pub(super) is_compared: bool,
    /// Likely tokens that are told at each place of the prompt.
    prompt_logprobs: Option<u32>,
}

/// Tokens, and their logprobs where they were asked for.
pub(super) type Drawn = (Vec<u32>, Vec<TokenLogprobs>);

impl Drawing {
    /// Of an answer that is held to `constraint`.
    pub(super) fn new(submit: &Submit, constraint: Option<Constraint>) -> Self {
        Self {
            sampler: Sampler::new(submit.sampling.clone(), &submit.tokens),
            constraint,
            is_compared: submit.is_compared,
            prompt_logprobs: submit.prompt_logprobs,
        }
    }

    /// The probabilities of the tokens of the prompt before which `rows` are the logits,
    /// without those that were told before.
    pub(super) fn prompt(
        &self,
        rows: &[Vec<f32>],
        awaited: &Awaited<'_>,
    ) -> Result<Vec<TokenLogprobs>, DrawError> {
        let Some(count) = self.prompt_logprobs else {
            return Ok(Vec::new());
        };
        let fresh = rows.iter().zip(awaited.prompt).skip(awaited.told);
        fresh
            .map(|(row, token)| {
                let (logprob, top) = logprobs(row, *token, count as usize)?;
                Ok(TokenLogprobs { logprob, top })
            })
            .collect()
    }

    /// The token behind the last of a sequence, and those behind guesses that were right.
    /// `rows` holds the logits before each guess and behind the last.
    pub(super) fn draw(
        &mut self,
        rows: &[Vec<f32>],
        awaited: &Awaited<'_>,
    ) -> Result<Drawn, DrawError> {
        let (mut tokens, mut logprobs) = (Vec::with_capacity(rows.len()), Vec::new());
        for (row, number) in rows.iter().zip(0_u32..) {
            let constraint = self.constraint.as_mut();
            let mask = constraint.map(Constraint::mask).transpose()?;
            let drawn = self.sampler.sample(row, awaited.answered + number, mask)?;
            if let Some(constraint) = &mut self.constraint {
                constraint.accept(drawn.token)?;
            }
            self.sampler.accept(drawn.token);
            tokens.push(drawn.token);
            logprobs.extend(drawn.logprob.map(|logprob| TokenLogprobs {
                logprob,
                top: drawn.top,
            }));
            if awaited.guesses.get(number as usize) != Some(&drawn.token) {
                break;
            }
        }
        Ok((tokens, logprobs))
    }
}
