//! How many tokens a second a group can compute, learned from its steps.
//!
//! A step is taken to last `fixed + prompt · p + answer · a` for p tokens of prompts and a
//! of answers. The three costs are fitted by recursive least squares with forgetting
//! (Ljung, System Identification, section 11.2), so that they follow what the group does
//! now. What it could do at most follows from them: a step full of prompts, and a step
//! with an answer in every slot.

use serde::{Deserialize, Serialize};

/// Weight of what was known before, at each step.
const MEMORY: f64 = 0.998;
/// Variance of costs of which nothing is known.
const UNKNOWN: f64 = 1e6;
/// That of the fixed cost. As long as all steps are alike their time is taken for that
/// of their tokens, since more of them at once may not come cheaper.
const UNKNOWN_FIXED: f64 = 1.0;
/// Steps of a kind before its rate is told.
const LEAST_STEPS: u32 = 8;
/// Tokens are counted in this unit, so that all three numbers are of one size.
const UNIT: f64 = 64.0;

/// What is known of a group's steps.
#[derive(Clone, Debug)]
pub struct Throughput {
    costs: [f64; 3],
    covariance: [[f64; 3]; 3],
    prompt_steps: u32,
    answer_steps: u32,
}

/// What a group can do at most, in tokens a second; `None` as long as it has not done
/// enough of the kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Saturated {
    /// Of prompts.
    pub prompt: Option<f64>,
    /// Of answers.
    pub answer: Option<f64>,
}

impl Default for Throughput {
    fn default() -> Self {
        let mut covariance = [[0.0; 3]; 3];
        for (i, row) in covariance.iter_mut().enumerate() {
            row[i] = if i == 0 { UNKNOWN_FIXED } else { UNKNOWN };
        }
        Self {
            costs: [0.0; 3],
            covariance,
            prompt_steps: 0,
            answer_steps: 0,
        }
    }
}

impl Throughput {
    /// A step of `prompt` and `answer` tokens took `seconds`.
    pub fn observe(&mut self, prompt: usize, answer: usize, seconds: f64) {
        self.prompt_steps = self.prompt_steps.saturating_add(u32::from(prompt > 0));
        self.answer_steps = self.answer_steps.saturating_add(u32::from(answer > 0));
        let x = [1.0, prompt as f64 / UNIT, answer as f64 / UNIT];
        let spread = self.covariance.map(|row| dot(&row, &x));
        let scale = MEMORY + dot(&spread, &x);
        let surprise = seconds - dot(&self.costs, &x);
        for (cost, spread) in self.costs.iter_mut().zip(spread) {
            *cost += spread / scale * surprise;
        }
        for (row, of_row) in self.covariance.iter_mut().zip(spread) {
            for (value, of_column) in row.iter_mut().zip(spread) {
                // Of what no step tells, no more can be unknown than at first.
                *value = ((*value - of_row * of_column / scale) / MEMORY).clamp(-UNKNOWN, UNKNOWN);
            }
        }
    }

    /// What the group can do with `prompt` tokens a step, and `answers` answers at once.
    pub fn saturated(&self, prompt: u32, answers: u32) -> Saturated {
        let rate = |steps: u32, cost: f64, tokens: u32| {
            let tokens = f64::from(tokens);
            let seconds = self.costs[0].max(0.0) + cost.max(0.0) * tokens / UNIT;
            (steps >= LEAST_STEPS && seconds > 0.0).then(|| tokens / seconds)
        };
        Saturated {
            prompt: rate(self.prompt_steps, self.costs[1], prompt),
            answer: rate(self.answer_steps, self.costs[2], answers),
        }
    }
}

fn dot(a: &[f64; 3], b: &[f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of a group with these costs, and noise of a tenth.
    fn learn(throughput: &mut Throughput, (fixed, prompt, answer): (f64, f64, f64), steps: usize) {
        for step in 0..steps {
            let (prompts, answers) = (step * 37 % 200 * (step % 3), step * 13 % 60);
            let noise = 0.9 + (step * 7919 % 101) as f64 / 500.0;
            let seconds = fixed + prompt * prompts as f64 + answer * answers as f64;
            throughput.observe(prompts, answers, seconds * noise);
        }
    }

    fn close(found: Option<f64>, expected: f64) -> bool {
        found.is_some_and(|found| (found / expected - 1.0).abs() < 0.1)
    }

    #[test]
    fn costs_are_learned_and_followed() {
        let mut throughput = Throughput::default();
        assert_eq!(throughput.saturated(256, 64), Saturated::default());
        learn(&mut throughput, (0.02, 0.003, 0.005), 2000);
        let found = throughput.saturated(256, 64);
        assert!(
            close(found.prompt, 256.0 / (0.02 + 256.0 * 0.003)),
            "{found:?}"
        );
        assert!(
            close(found.answer, 64.0 / (0.02 + 64.0 * 0.005)),
            "{found:?}"
        );
        // The group has half of its cores from now on.
        learn(&mut throughput, (0.04, 0.006, 0.01), 4000);
        let found = throughput.saturated(256, 64);
        assert!(
            close(found.prompt, 256.0 / (0.04 + 256.0 * 0.006)),
            "{found:?}"
        );
    }

    #[test]
    fn steps_that_are_all_alike_tell_no_nonsense() {
        let mut throughput = Throughput::default();
        for _ in 0..100_000 {
            throughput.observe(0, 1, 0.01);
        }
        let found = throughput.saturated(256, 64);
        assert_eq!(found.prompt, None);
        let answer = found.answer.expect("enough steps");
        assert!((99.0..=110.0).contains(&answer), "{answer}");
    }
}
