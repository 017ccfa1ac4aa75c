//! What changes logits before a token is drawn from them.

use std::borrow::Cow;

use ahash::AHashMap;

use super::SamplingParams;

/// The tokens that penalties are about, each with how often the answer holds it.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(AHashMap<u32, u32>);

impl Seen {
    /// What `params` must know of a prompt before the answer begins.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        if params.repeats() {
            Self(prompt.iter().map(|token| (*token, 0)).collect())
        } else {
            Self::default()
        }
    }

    /// The answer holds `token` once more.
    pub(super) fn count(&mut self, token: u32) {
        *self.0.entry(token).or_insert(0) += 1;
    }

    fn penalize(&self, params: &SamplingParams, row: &mut [f32]) {
        for (token, count) in &self.0 {
            let Some(logit) = row.get_mut(*token as usize) else {
                continue;
            };
            if params.repeats() {
                *logit = if *logit > 0.0 {
                    *logit / params.repetition_penalty
                } else {
                    *logit * params.repetition_penalty
                };
            }
            if *count > 0 {
                *logit -= params.presence_penalty + params.frequency_penalty * *count as f32;
            }
        }
    }
}

/// `logits` with everything at minus infinity whose bit in `mask` is not set.
pub(super) fn masked<'a>(logits: &'a [f32], mask: Option<&[u32]>) -> Cow<'a, [f32]> {
    let Some(mask) = mask else {
        return Cow::Borrowed(logits);
    };
    let mut row = vec![f32::NEG_INFINITY; logits.len()];
    for ((from, to), word) in logits.chunks(32).zip(row.chunks_mut(32)).zip(mask) {
        match *word {
            0 => {}
            u32::MAX => to.copy_from_slice(from),
            word => {
                for (bit, (from, to)) in from.iter().zip(to).enumerate() {
                    if word >> bit & 1 == 1 {
                        *to = *from;
                    }
                }
            }
        }
    }
    Cow::Owned(row)
}

/// `logits` as the answer's `index`-th token is drawn from them; `None` where they
/// stay as they are.
pub(super) fn adjusted(
    params: &SamplingParams,
    seen: &Seen,
    logits: &[f32],
    index: u32,
) -> Option<Vec<f32>> {
    let bans_ends = index < params.min_tokens && !params.end_ids.is_empty();
    if !bans_ends && params.logit_bias.is_empty() && seen.0.is_empty() {
        return None;
    }
    let mut row = logits.to_vec();
    if bans_ends {
        ban(&params.end_ids, &mut row);
        if row.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            // A mask that leaves nothing but an end outranks the wish for more.
            row.copy_from_slice(logits);
        }
    }
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    seen.penalize(params, &mut row);
    Some(row)
}

fn ban(tokens: &[u32], row: &mut [f32]) {
    for token in tokens {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}
