//! Choosing the next token from a row of logits.

mod adjust;
mod params;
mod random;
mod row;
#[cfg(test)]
mod tests;
mod weights;

pub use params::SamplingParams;

use adjust::Seen;
use random::uniform;
use row::Row;
use weights::Weights;

/// The logarithm that stands for a probability of zero, which JSON has no word for.
pub const NO_CHANCE: f32 = -9999.0;

/// A row of logits that no token can be drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// There are no logits.
    #[error("a row of logits is empty")]
    Empty,
    /// A logit is not a number.
    #[error("the logit of token {token} is not a number")]
    NotANumber {
        /// The first such token.
        token: usize,
    },
    /// The mask leaves nothing to draw.
    #[error("no token is allowed here")]
    NothingAllowed,
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// The logarithm of its probability, where it was asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and the logarithms of their probabilities, the
    /// likeliest first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Draws tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    seen: Seen,
    accepted: u32,
}

impl Sampler {
    /// A sampler for the answer to `prompt`.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let seen = Seen::new(&params, prompt);
        Self {
            params,
            seen,
            accepted: 0,
        }
    }

    /// The answer's `index`-th token, from 0. Among equal logits the lowest id counts
    /// as the likelier. Nothing but the parameters, the tokens accepted so far where
    /// there are penalties, and the arguments decides what is drawn.
    ///
    /// A token may be drawn only if its bit in `mask` is set, the lowest of the first
    /// word being token 0. Logarithms of probabilities are those of the model under
    /// the mask, before everything else.
    ///
    /// # Errors
    /// When `logits` is empty or holds a NaN, or the mask allows nothing.
    pub fn sample(
        &mut self,
        logits: &[f32],
        index: u32,
        mask: Option<&[u32]>,
    ) -> Result<Drawn, SampleError> {
        let allowed = adjust::masked(logits, mask);
        let row = Row::new(&allowed)?;
        if mask.is_some() && row.most == f32::NEG_INFINITY {
            return Err(SampleError::NothingAllowed);
        }
        let adjusted = adjust::adjusted(&self.params, &self.seen, &allowed, index);
        let token = match &adjusted {
            Some(adjusted) => self.draw(&Row::new(adjusted)?, index),
            None => self.draw(&row, index),
        };
        let mut drawn = Drawn {
            token,
            logprob: None,
            top: Vec::new(),
        };
        if let Some(count) = self.params.logprobs {
            let logprobs = Logprobs::new(&row);
            let logit = allowed.get(token as usize);
            drawn.logprob = logit.map(|logit| logprobs.of(*logit));
            let head = row.head(count as usize).into_iter();
            drawn.top = head
                .map(|(token, logit)| (token, logprobs.of(logit)))
                .collect();
        }
        Ok(drawn)
    }

    /// The answer goes on with `token`.
    pub fn accept(&mut self, token: u32) {
        self.accepted = self.accepted.saturating_add(1);
        if self.params.counts_answer() {
            self.seen.count(token);
        }
    }

    /// Tokens accepted so far, which is the index of the next.
    pub fn accepted(&self) -> u32 {
        self.accepted
    }

    fn draw(&self, row: &Row<'_>, index: u32) -> u32 {
        let params = &self.params;
        if params.temperature <= 0.0 {
            return row.best;
        }
        let weights = Weights::new(row.most, params.temperature, params.min_p);
        let uniform = uniform(params.seed, index);
        let limit = match params.top_k {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let drawn = if limit < row.logits.len() || params.top_p < 1.0 {
            weights.draw_from_head(row, limit, params.top_p, uniform)
        } else {
            weights.draw(row, uniform)
        };
        drawn.unwrap_or(row.best)
    }
}

/// The logarithm of the probability that the model gives `token`, and the `count` most
/// likely tokens with theirs, the likeliest first.
///
/// # Errors
/// When `logits` is empty or holds a NaN.
pub fn logprobs(
    logits: &[f32],
    token: u32,
    count: usize,
) -> Result<(f32, Vec<(u32, f32)>), SampleError> {
    let row = Row::new(logits)?;
    let logprobs = Logprobs::new(&row);
    let own = logits.get(token as usize);
    let own = own.map_or(NO_CHANCE, |logit| logprobs.of(*logit));
    let head = row.head(count).into_iter();
    let top = head.map(|(token, logit)| (token, logprobs.of(logit)));
    Ok((own, top.collect()))
}

/// Logarithms of the model's probabilities.
struct Logprobs {
    weights: Weights,
    total: f64,
}

impl Logprobs {
    fn new(row: &Row<'_>) -> Self {
        let weights = Weights::new(row.most, 1.0, 0.0);
        Self {
            weights,
            total: weights.total(row.logits),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the logarithm needs no more digits than the logit has"
    )]
    fn of(&self, logit: f32) -> f32 {
        let ln = self.weights.ln_probability(logit, self.total) as f32;
        ln.max(NO_CHANCE)
    }
}
