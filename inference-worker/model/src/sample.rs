//! Choosing the next token from a row of logits.

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SamplingParams {
    /// 0 takes the most likely token; 1 draws by the model's own probabilities.
    pub temperature: f32,
    /// Draws among the most likely tokens that together reach this probability
    /// (nucleus sampling, Holtzman et al. 2019).
    pub top_p: f32,
    /// The same seed, prompt and parameters draw the same tokens.
    pub seed: u64,
}

impl SamplingParams {
    /// Always the most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
    };
}

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
}

/// First size of the head that is sorted in search of the nucleus.
const FIRST_HEAD: usize = 64;
/// How much longer the head gets when it does not reach `top_p`.
const HEAD_GROWTH: usize = 16;

/// Draws tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    drawn: u64,
}

impl Sampler {
    /// A sampler at the start of its sequence.
    pub fn new(params: SamplingParams) -> Self {
        Self { params, drawn: 0 }
    }

    /// The next token. Among equal logits the lowest id counts as the likelier.
    ///
    /// # Errors
    /// When `logits` is empty or holds a NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        if let Some(token) = logits.iter().position(|logit| logit.is_nan()) {
            return Err(SampleError::NotANumber { token });
        }
        let best = argmax(logits).ok_or(SampleError::Empty)?;
        if self.params.temperature <= 0.0 {
            return Ok(best.0);
        }
        let uniform = uniform(self.params.seed, self.drawn);
        self.drawn += 1;
        let weights = weights(logits, best.1, self.params.temperature);
        Ok(if self.params.top_p < 1.0 {
            draw_from_nucleus(weights, f64::from(self.params.top_p), uniform)
        } else {
            draw(
                &weights,
                weights.iter().map(|(_, weight)| weight).sum(),
                uniform,
            )
        }
        .unwrap_or(best.0))
    }
}

fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    (0_u32..)
        .zip(logits.iter().copied())
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
}

/// Unnormalized probability of each token, 1 for the most likely.
fn weights(logits: &[f32], best: f32, temperature: f32) -> Vec<(u32, f64)> {
    let scale = 1.0 / f64::from(temperature);
    (0_u32..)
        .zip(logits)
        .map(|(id, &logit)| {
            // Two infinite logits have no difference; they are equally likely.
            let below = if logit < best {
                f64::from(logit) - f64::from(best)
            } else {
                0.0
            };
            (id, (below * scale).exp())
        })
        .collect()
}

fn draw_from_nucleus(mut weights: Vec<(u32, f64)>, top_p: f64, uniform: f64) -> Option<u32> {
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0));
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let wanted = total * top_p.max(0.0);
    let mut head = FIRST_HEAD.min(weights.len());
    loop {
        if head < weights.len() {
            weights.select_nth_unstable_by(head, order);
        }
        weights[..head].sort_unstable_by(order);
        let mut reached = 0.0;
        for count in 1..=head {
            reached += weights[count - 1].1;
            if reached >= wanted || count == weights.len() {
                return draw(&weights[..count], reached, uniform);
            }
        }
        if head == weights.len() {
            return None;
        }
        head = (head * HEAD_GROWTH).min(weights.len());
    }
}

/// The token at `uniform` of the way through `weights`, whose sum is `total`.
fn draw(weights: &[(u32, f64)], total: f64, uniform: f64) -> Option<u32> {
    let mut left = uniform * total;
    for (id, weight) in weights {
        left -= weight;
        if left < 0.0 {
            return Some(*id);
        }
    }
    // Rounding can leave a trace of the sum over: the last possible token has it.
    weights
        .iter()
        .rfind(|(_, weight)| *weight > 0.0)
        .map(|(id, _)| *id)
}

/// The `index`-th number in [0, 1) of the sequence that `seed` names: `SplitMix64`
/// (Steele, Lea, Flood 2014), which needs no state but its counter.
fn uniform(seed: u64, index: u64) -> f64 {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    // The seed is mixed first, so that neighbouring seeds do not share numbers.
    let mixed = mix(mix(seed).wrapping_add(index.wrapping_add(1).wrapping_mul(STEP)));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn params(temperature: f32, top_p: f32, seed: u64) -> SamplingParams {
        SamplingParams {
            temperature,
            top_p,
            seed,
        }
    }

    #[test]
    fn greedy_takes_the_best_and_the_lowest_of_equals() {
        let mut sampler = Sampler::new(SamplingParams::GREEDY);
        assert_eq!(sampler.sample(&[0.0, 3.0, 3.0, -1.0]), Ok(1));
        assert_eq!(
            sampler.sample(&[f32::NEG_INFINITY, f32::NEG_INFINITY]),
            Ok(0)
        );
    }

    #[test]
    fn bad_rows_are_named() {
        let mut sampler = Sampler::new(SamplingParams::GREEDY);
        assert_eq!(sampler.sample(&[]), Err(SampleError::Empty));
        assert_eq!(
            sampler.sample(&[0.0, f32::NAN]),
            Err(SampleError::NotANumber { token: 1 })
        );
    }

    #[test]
    fn draws_follow_the_probabilities() {
        // softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8
        let logits = [1_f32.ln(), 2_f32.ln(), 5_f32.ln()];
        let mut sampler = Sampler::new(params(1.0, 1.0, 7));
        let mut counts = [0_u32; 3];
        for _ in 0..80_000 {
            counts[sampler.sample(&logits).expect("draws") as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000.0, 20_000.0, 50_000.0]) {
            assert!((f64::from(count) - expected).abs() < 600.0, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn a_nucleus_holds_only_the_likeliest(
            logits in proptest::collection::vec(-8.0_f32..8.0, 1..400),
            top_p in 0.0_f32..1.0,
            temperature in 0.1_f32..2.0,
            seed in any::<u64>(),
        ) {
            let token = Sampler::new(params(temperature, top_p, seed)).sample(&logits).expect("draws");
            let best = argmax(&logits).expect("not empty").1;
            let all = weights(&logits, best, temperature);
            let total: f64 = all.iter().map(|(_, weight)| weight).sum();
            let mine = all[token as usize].1;
            let likelier: f64 = all.iter().map(|(_, weight)| *weight).filter(|weight| *weight > mine).sum();
            prop_assert!(likelier <= total * f64::from(top_p) * (1.0 + 1e-9));
        }

        #[test]
        fn a_seed_repeats_its_tokens(logits in proptest::collection::vec(-4.0_f32..4.0, 2..200), seed in any::<u64>()) {
            let mut first = Sampler::new(params(1.0, 0.9, seed));
            let mut second = Sampler::new(params(1.0, 0.9, seed));
            for _ in 0..8 {
                prop_assert_eq!(first.sample(&logits), second.sample(&logits));
            }
        }

        #[test]
        fn infinities_do_no_harm(at in 0_usize..5, seed in any::<u64>(), top_p in 0.1_f32..=1.0) {
            let mut logits = [0.0_f32, 1.0, f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
            let token = Sampler::new(params(1.0, top_p, seed)).sample(&logits).expect("draws");
            prop_assert!(logits[token as usize].is_finite());
            logits[at] = f32::INFINITY;
            prop_assert_eq!(Sampler::new(params(1.0, top_p, seed)).sample(&logits), Ok(u32::try_from(at).expect("small")));
        }
    }
}
