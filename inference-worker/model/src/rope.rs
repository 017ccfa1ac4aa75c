//! Rotary position embedding (Su et al. 2021).

use llama_checkpoint::config::{Llama3Scaling, LlamaConfig, RopePairs, RopeScaling};

/// Angles of the rotary embedding.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// Angle a position, for each pair.
    steps: Vec<f64>,
    pairs: RopePairs,
}

impl Rope {
    /// `factors` divide the frequency of each pair where the model's scaling is
    /// [`RopeScaling::Factors`].
    pub(crate) fn new(config: &LlamaConfig, factors: Option<&[f32]>) -> Self {
        let rope = &config.rope;
        let width = rope.dim as f64;
        let steps = (0..rope.dim / 2)
            .map(|pair| {
                let frequency = rope.base.powf(-2.0 * pair as f64 / width);
                match &rope.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear(factor) => frequency / factor,
                    RopeScaling::Llama3(scaling) => llama3(scaling, frequency),
                    RopeScaling::Factors => {
                        let factor = factors.and_then(|factors| factors.get(pair));
                        frequency / factor.map_or(1.0, |factor| f64::from(*factor))
                    }
                }
            })
            .collect();
        Self {
            steps,
            pairs: rope.pairs,
        }
    }

    /// Angle a position, for each pair.
    pub(crate) fn steps(&self) -> &[f64] {
        &self.steps
    }

    /// Cosine and sine of each pair at `position`.
    #[expect(clippy::cast_possible_truncation, reason = "heads are turned in f32")]
    pub(crate) fn turns(&self, position: usize) -> impl Iterator<Item = (f32, f32)> {
        self.steps.iter().map(move |step| {
            let (sin, cos) = (position as f64 * step).sin_cos();
            (cos as f32, sin as f32)
        })
    }

    /// Turns the leading dimensions of one head.
    pub(crate) fn turn(&self, head: &mut [f32], turns: &[(f32, f32)]) {
        match self.pairs {
            RopePairs::Neighbours => {
                for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                    let [x, y] = *pair;
                    *pair = [x * cos - y * sin, x * sin + y * cos];
                }
            }
            RopePairs::Halves => {
                let (left, rest) = head.split_at_mut(turns.len());
                for ((x, y), (cos, sin)) in left.iter_mut().zip(rest).zip(turns) {
                    (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
                }
            }
        }
    }
}

/// Llama 3.1's scaling of one frequency (model card; `transformers`
/// `modeling_rope_utils`). Where both bounds are one wavelength, nothing lies
/// between them.
fn llama3(scaling: &Llama3Scaling, frequency: f64) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength < scaling.original / scaling.high {
        return frequency;
    }
    if wavelength > scaling.original / scaling.low || scaling.high <= scaling.low {
        return frequency / scaling.factor;
    }
    let share = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low);
    (1.0 - share) * frequency / scaling.factor + share * frequency
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA31: Llama3Scaling = Llama3Scaling {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 8192.0,
    };

    fn frequency(wavelength: f64) -> f64 {
        2.0 * std::f64::consts::PI / wavelength
    }

    #[test]
    fn short_waves_stay_long_ones_stretch_and_the_band_goes_between() {
        let ratio = |scaling: &Llama3Scaling, wavelength: f64| {
            frequency(wavelength) / llama3(scaling, frequency(wavelength))
        };
        assert!((ratio(&LLAMA31, 2047.0) - 1.0).abs() < 1e-12);
        assert!((ratio(&LLAMA31, 8193.0) - 8.0).abs() < 1e-12);
        // Half-way in 1 / wavelength: half the frequency plus half of its eighth.
        let middle = ratio(&LLAMA31, 8192.0 / 2.5);
        assert!((middle - 1.0 / 0.5625).abs() < 1e-12, "{middle}");
        // Scout's bounds meet: no band, and no division of zero by zero.
        let scout = Llama3Scaling {
            factor: 16.0,
            high: 1.0,
            ..LLAMA31
        };
        assert!((ratio(&scout, 8192.0) - 16.0).abs() < 1e-12);
        assert!((ratio(&scout, 8191.0) - 1.0).abs() < 1e-12);
    }
}
