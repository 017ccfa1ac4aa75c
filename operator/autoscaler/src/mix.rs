//! What requests look like: prompt, output and share from the prefix cache, slowly averaged.

use serde::{Deserialize, Serialize};

use crate::fleet::Interval;
use crate::model::Mix;

/// Seconds after which an arrival counts 1/e for the mean prompt.
const PROMPT_S: f64 = 300.0;
/// Seconds after which tokens count 1/e for the mean output. Long: requests that finish first
/// after a start are short ones.
const OUTPUT_S: f64 = 600.0;
/// Seconds after which prompts count 1/e for the share from the prefix cache, slow and fast.
/// The lesser of both counts, since new groups begin with an empty cache.
const CACHE_S: [f64; 2] = [600.0, 60.0];
/// Requests that the mix of the settings counts as at the start.
const SEED: f64 = 50.0;

/// A ratio of two sums that fade.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ratio {
    amount: f64,
    of: f64,
}

impl Ratio {
    /// Fades by `seconds` of a time constant, but never below `least` in the lower sum, so that
    /// a pause does not lose what was known.
    fn fade(&mut self, seconds: f64, constant_s: f64, least: f64) {
        let factor = (-seconds / constant_s).exp();
        if self.of * factor >= least {
            self.amount *= factor;
            self.of *= factor;
        }
    }

    fn add(&mut self, amount: f64, of: f64) {
        if amount.is_finite() && of.is_finite() && self.of + of > 0.0 {
            self.amount = (self.amount + amount).max(0.0);
            self.of += of;
        }
    }

    fn value(&self) -> Option<f64> {
        (self.of > 0.0).then(|| self.amount / self.of)
    }
}

/// Running estimate of the mix.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MixEstimate {
    seeded: bool,
    prompts: Ratio,
    outputs: Ratio,
    cached: [Ratio; 2],
}

impl MixEstimate {
    /// Fades what is known by `seconds`, and starts from `prior` the first time.
    pub fn fade(&mut self, seconds: f64, prior: &Mix) {
        if !self.seeded {
            self.seeded = true;
            self.prompts.add(SEED * prior.prompt, SEED);
            self.outputs.add(SEED * prior.output, SEED);
            for cached in &mut self.cached {
                cached.add(SEED * prior.prompt * prior.cache_hit, SEED * prior.prompt);
            }
        }
        self.prompts.fade(seconds, PROMPT_S, 1.0);
        self.outputs.fade(seconds, OUTPUT_S, 1.0);
        for (cached, constant_s) in self.cached.iter_mut().zip(CACHE_S) {
            cached.fade(seconds, constant_s, prior.prompt);
        }
    }

    /// Takes in requests that arrived and their prompt tokens.
    pub fn arrived(&mut self, requests: f64, prompt: f64) {
        self.prompts.add(prompt, requests);
    }

    /// Takes in what a group generated. Requests in the batch count as half done: of those that
    /// only just began no end was counted, though their tokens were.
    pub fn generated(&mut self, interval: &Interval) {
        if let Some(finished) = interval.finished {
            let begun = interval.running.1 - interval.running.0;
            self.outputs
                .add(interval.generation, finished + begun / 2.0);
        }
        for cached in &mut self.cached {
            cached.add(interval.cached, interval.prompt);
        }
    }

    /// The mix of now.
    pub fn mix(&self, prior: &Mix) -> Mix {
        let hit = |ratio: &Ratio| ratio.value().unwrap_or(prior.cache_hit);
        Mix {
            prompt: self.prompts.value().unwrap_or(prior.prompt).max(1.0),
            output: self.outputs.value().unwrap_or(prior.output).max(1.0),
            cache_hit: hit(&self.cached[0])
                .min(hit(&self.cached[1]))
                .clamp(0.0, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::tests::plain;
    use crate::time::Time;

    const PRIOR: Mix = Mix {
        prompt: 1000.0,
        output: 200.0,
        cache_hit: 0.0,
    };

    fn interval(finished: f64, generation: f64, prompt: f64, cached: f64) -> Interval {
        Interval {
            prompt,
            cached,
            generation,
            finished: Some(finished),
            ..plain("a", Time(0), 5.0)
        }
    }

    #[test]
    fn the_mix_moves_to_what_is_seen_and_survives_a_pause() {
        let mut mix = MixEstimate::default();
        mix.fade(0.0, &PRIOR);
        assert_eq!(mix.mix(&PRIOR), PRIOR);
        for _ in 0..1000 {
            mix.fade(5.0, &PRIOR);
            mix.arrived(10.0, 30_000.0);
            mix.generated(&interval(10.0, 4000.0, 30_000.0, 18_000.0));
        }
        let seen = mix.mix(&PRIOR);
        assert!((seen.prompt - 3000.0).abs() < 30.0, "{seen:?}");
        assert!((seen.output - 400.0).abs() < 4.0, "{seen:?}");
        assert!((seen.cache_hit - 0.6).abs() < 0.01, "{seen:?}");
        for _ in 0..20_000 {
            mix.fade(5.0, &PRIOR);
        }
        assert_eq!(
            mix.mix(&PRIOR),
            mix.mix(&Mix::default()),
            "nothing is left of the prior"
        );
        assert!((mix.mix(&PRIOR).output - seen.output).abs() < 1e-6);
    }

    #[test]
    fn a_cache_that_went_cold_is_believed_within_minutes() {
        let mut mix = MixEstimate::default();
        for tick in 0..500 {
            mix.fade(5.0, &PRIOR);
            let cached = if tick < 476 { 6000.0 } else { 0.0 };
            mix.generated(&interval(10.0, 2000.0, 10_000.0, cached));
        }
        assert!(mix.mix(&PRIOR).cache_hit < 0.1, "{:?}", mix.mix(&PRIOR));
    }
}
