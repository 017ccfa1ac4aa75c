//! Functions of a vector, written so that the compiler can use whatever
//! instructions the calling function is built for.

use super::LANES;

/// `exp(x)` for x ≤ 88, within two units in the last place; 0 below −87.
///
/// `exp(x) = 2^n · exp(r)` with n the integer nearest to x/ln 2 and
/// |r| ≤ ln 2 / 2, where the Taylor polynomial of degree 7 is exact to f32.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// 1.5 · 2^23: adding it leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first with so few bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut sum = 1.0 / 5040.0;
    sum = sum * r + 1.0 / 720.0;
    sum = sum * r + 1.0 / 120.0;
    sum = sum * r + 1.0 / 24.0;
    sum = sum * r + 1.0 / 6.0;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    let power = rounded
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    let result = sum * f32::from_bits(power);
    if x < -87.0 { 0.0 } else { result }
}

/// Replaces `gate` by `silu(gate) · up`, where `silu(x) = x / (1 + exp(−x))`.
#[inline(always)]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = *gate;
        // exp of −|x| cannot overflow; both branches are the same function.
        let small = exp(-x.abs());
        let numerator = if x < 0.0 { small } else { 1.0 };
        *gate = x * (numerator / (1.0 + small)) * up;
    }
}

/// Replaces each x by `gelu(x) = x/2 · (1 + erf(x/√2))` (Hendrycks and Gimpel 2016),
/// with the error function within 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
#[inline(always)]
pub(super) fn gelu(values: &mut [f32]) {
    const SLOPE: f32 = 0.327_591_1;
    for value in values {
        let x = *value;
        let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + SLOPE * z);
        let mut sum = 1.061_405_4 * t;
        sum = (sum - 1.453_152_1) * t;
        sum = (sum + 1.421_413_8) * t;
        sum = (sum - 0.284_496_74) * t;
        sum = (sum + 0.254_829_6) * t;
        // 1 − erf(z), without cancellation where it is small.
        let beyond = sum * exp(-z * z);
        let doubled = if x < 0.0 { beyond } else { 2.0 - beyond };
        *value = 0.5 * x * doubled;
    }
}

/// Replaces `scores` by `softmax(scale · scores)`.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32], scale: f32) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] {
                chunk[lane]
            } else {
                lanes[lane]
            };
        }
    }
    let max = lanes.iter().chain(rest).copied().fold(f32::MIN, f32::max);
    for score in scores.iter_mut() {
        *score = exp((*score - max) * scale);
    }
    let inverse = 1.0 / sum(scores);
    for score in scores.iter_mut() {
        *score *= inverse;
    }
}

/// Sum in one fixed order.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// Mean of the squares of `values`.
pub(crate) fn mean_square(values: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane] * chunk[lane];
        }
    }
    let total = lanes.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>();
    total / values.len() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut x = -87.0_f32;
        while x < 88.0 {
            let relative = (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
            assert!(relative < 2.5e-7, "exp({x}) is off by {relative:e}");
            x += 0.013;
        }
        assert_eq!(exp(-88.0).to_bits(), 0);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert!((exp(0.0) - 1.0).abs() < f32::EPSILON);
    }

    #[test]
    fn gelu_is_close_everywhere() {
        // x, and x·Φ(x) of it to ten digits.
        for (x, expected) in [
            (0.0, 0.0),
            (1.0, 0.841_344_746),
            (-1.0, -0.158_655_254),
            (0.25, 0.149_676_642),
            (-3.0, -0.004_049_694),
            (2.5, 2.484_475_837),
            (-9.0, -1.015_29e-18),
            (20.0, 20.0),
        ] {
            let mut value = [x];
            gelu(&mut value);
            let off = (f64::from(value[0]) - expected).abs();
            assert!(
                off < 4e-7 * f64::from(x).abs().max(1.0),
                "gelu({x}) is off by {off:e}"
            );
        }
    }
}
