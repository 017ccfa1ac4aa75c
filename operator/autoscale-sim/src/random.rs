//! Random numbers of the distributions that traces and cold starts need.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A generator for one purpose: another purpose draws other numbers from the
/// same seed, so that adding one changes none of the others.
pub fn generator(seed: u64, purpose: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed ^ purpose.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Uniform in (0, 1): never 0, which has no logarithm.
fn open(rng: &mut SmallRng) -> f64 {
    1.0 - rng.random::<f64>()
}

/// Standard normal.
pub fn normal(rng: &mut SmallRng) -> f64 {
    let radius = (-2.0 * open(rng).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

/// Lognormal with this median.
pub fn lognormal(rng: &mut SmallRng, median: f64, sigma: f64) -> f64 {
    median * (sigma * normal(rng)).exp()
}

/// Exponential with mean 1.
pub fn exponential(rng: &mut SmallRng) -> f64 {
    -open(rng).ln()
}

/// Gamma, after Marsaglia and Tsang.
pub fn gamma(rng: &mut SmallRng, shape: f64, scale: f64) -> f64 {
    if shape < 1.0 {
        let boost = open(rng).powf(1.0 / shape);
        return gamma(rng, shape + 1.0, scale) * boost;
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && open(rng).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v * scale;
        }
    }
}

/// Weibull.
pub fn weibull(rng: &mut SmallRng, shape: f64, scale: f64) -> f64 {
    scale * exponential(rng).powf(1.0 / shape)
}

/// The gamma function from 1 up, after Lanczos: a Weibull distribution of
/// this shape has a mean of its scale times Γ(1 + 1/shape).
pub fn gamma_function(x: f64) -> f64 {
    const G: f64 = 7.0;
    const TERMS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let sum = TERMS[0]
        + (1_u32..)
            .zip(&TERMS[1..])
            .map(|(at, term)| term / (x + f64::from(at)))
            .sum::<f64>();
    let t = x + G + 0.5;
    std::f64::consts::TAU.sqrt() * t.powf(x + 0.5) * (-t).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gamma_function_goes_through_the_factorials() {
        for (x, expected) in [(1.0, 1.0), (1.5, 0.886_226_925_452_758), (5.0, 24.0)] {
            assert!(
                (gamma_function(x) - expected).abs() < 1e-9 * expected,
                "{x}"
            );
        }
    }

    fn mean_and_deviation(mut draw: impl FnMut(&mut SmallRng) -> f64) -> (f64, f64) {
        let mut rng = generator(1, 1);
        let values: Vec<f64> = (0..200_000).map(|_| draw(&mut rng)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f64>()
            / values.len() as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn distributions_have_their_moments() {
        for (name, draw, mean, deviation) in [
            ("normal", &normal as &dyn Fn(&mut SmallRng) -> f64, 0.0, 1.0),
            ("exponential", &exponential, 1.0, 1.0),
            ("gamma", &|rng| gamma(rng, 4.0, 0.5), 2.0, 1.0),
            ("small gamma", &|rng| gamma(rng, 0.25, 4.0), 1.0, 2.0),
            // Γ(1 + 1/2) = 0.8862; standard deviation 0.4633 of the scale.
            ("weibull", &|rng| weibull(rng, 2.0, 1.0), 0.8862, 0.4633),
            ("lognormal", &|rng| lognormal(rng, 1.0, 0.3), 1.0460, 0.3210),
        ] {
            let (got_mean, got_deviation) = mean_and_deviation(draw);
            assert!((got_mean - mean).abs() < 0.03, "{name}: mean {got_mean}");
            assert!(
                (got_deviation - deviation).abs() < 0.05,
                "{name}: {got_deviation}"
            );
        }
    }

    #[test]
    fn purposes_draw_different_numbers() {
        assert!(
            (exponential(&mut generator(1, 1)) - exponential(&mut generator(1, 2))).abs() > 1e-9
        );
    }
}
