//! Every instruction set against plain arithmetic, every format against candle.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

/// Bytes of `values` in `format`, written by candle where it can.
fn packed(format: Format, values: &[f32]) -> Vec<u8> {
    let dtype = match format {
        Format::F32 => return values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Format::F16 => {
            return values
                .iter()
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect();
        }
        Format::Bf16 => {
            return values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect();
        }
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q8_0 => GgmlDType::Q8_0,
    };
    let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).expect("tensor");
    let quantized = QTensor::quantize(&tensor, dtype).expect("quantizes");
    quantized.data().expect("bytes").into_owned()
}

fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn formats_widen_as_candle_does() {
    for (format, dtype) in [
        (Format::F32, GgmlDType::F32),
        (Format::F16, GgmlDType::F16),
        (Format::Bf16, GgmlDType::BF16),
        (Format::Q4_0, GgmlDType::Q4_0),
        (Format::Q4_1, GgmlDType::Q4_1),
        (Format::Q8_0, GgmlDType::Q8_0),
    ] {
        let values = noise(7, 1024);
        let tensor = Tensor::from_slice(&values, values.len(), &Device::Cpu).expect("tensor");
        let quantized = QTensor::quantize(&tensor, dtype).expect("quantizes");
        let theirs: Vec<f32> = quantized
            .dequantize(&Device::Cpu)
            .and_then(|tensor| tensor.to_vec1())
            .expect("widens");
        let mut ours = vec![0.0; values.len()];
        format.unpack(&quantized.data().expect("bytes"), &mut ours);
        assert_eq!(ours, theirs, "{format:?}");
    }
}

/// The values that the kernels see: f32, or what int8 and its scale stand for.
fn seen(activations: &Activations<'_>) -> Vec<f32> {
    match activations {
        Activations::F32(x) => x.to_vec(),
        Activations::Int8(x) => x
            .values
            .chunks(BLOCK)
            .zip(&x.scales)
            .flat_map(|(values, scale)| values.iter().map(move |v| f32::from(*v) * scale))
            .collect(),
    }
}

/// The same product in f64, and a bound for the rounding of an f32 sum.
fn exact(weights: &[f32], x: &[f32]) -> (f64, f64) {
    let products = weights
        .iter()
        .zip(x)
        .map(|(w, x)| f64::from(*w) * f64::from(*x));
    let magnitude: f64 = products.clone().map(f64::abs).sum();
    (products.sum(), magnitude * 1e-5 + 1e-30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_are_right_and_do_not_depend_on_the_batch(
        seed in any::<u32>(),
        count in 1_usize..11,
        blocks in 1_usize..8,
        stretch in 1_usize..9,
        batch in 1_usize..15,
        format in prop::sample::select(Format::ALL.map(|(format, _)| format).to_vec()),
    ) {
        let columns = blocks * BLOCK;
        let bytes = packed(format, &noise(seed, count * columns));
        let x = noise(!seed, batch * columns);
        let rows = Rows { format, bytes: &bytes, columns, stretch: stretch * BLOCK };
        let mut weights = vec![0.0; count * columns];
        format.unpack(&bytes, &mut weights);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let activations = Activations::new(isa, format, &x, columns);
            let seen = seen(&activations);
            let mut out = vec![f32::NAN; batch * count];
            matmul(isa, &rows, &activations, 0..batch, (&mut out, count));
            prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{}", isa.name());
            for m in 0..batch {
                let seen = &seen[m * columns..][..columns];
                let mut alone = vec![f32::NAN; count];
                matmul(isa, &rows, &activations, m..m + 1, (&mut alone, count));
                prop_assert_eq!(&alone, &out[m * count..][..count], "batch of {}", isa.name());
                for n in 0..count {
                    let (expected, bound) = exact(&weights[n * columns..][..columns], seen);
                    let found = f64::from(alone[n]);
                    prop_assert!((found - expected).abs() <= bound, "{}: {found} for {expected}", isa.name());
                }
            }
        }
    }

    #[test]
    fn weighted_sums_and_vector_functions_agree(seed in any::<u32>(), count in 0_usize..40, blocks in 1_usize..5) {
        let width = blocks * BLOCK;
        let values: Vec<f16> = noise(seed, count * width).into_iter().map(f16::from_f32).collect();
        let weights = noise(seed ^ 9, 3 * count);
        let row = |m: usize| &weights[m * count..][..count];
        let start = noise(seed ^ 5, 3 * width);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let mut out = start.clone();
            weighted_sum(isa, [row(0), row(1), row(2)], &values, &mut out);
            for m in 0..3 {
                for i in 0..width {
                    let column: Vec<f32> = values.chunks(width).map(|row| row[i].to_f32()).collect();
                    let (sum, bound) = exact(&column, row(m));
                    let expected = sum + f64::from(start[m * width + i]);
                    prop_assert!((f64::from(out[m * width + i]) - expected).abs() <= bound + 1e-6);
                }
            }
            let mut scores = weights.clone();
            softmax(isa, &mut scores, 3.0);
            let total: f64 = weights.iter().map(|w| (3.0 * f64::from(*w)).exp()).sum();
            for (found, weight) in scores.iter().zip(&weights) {
                let expected = (3.0 * f64::from(*weight)).exp() / total;
                prop_assert!((f64::from(*found) - expected).abs() < 1e-6 * expected + 1e-9);
            }
            let mut gate: Vec<f32> = weights.iter().map(|w| w * 60.0).collect();
            let before = gate.clone();
            silu_mul(isa, &mut gate, &weights);
            for ((found, gate), up) in gate.iter().zip(before).zip(&weights) {
                let expected = f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(*up);
                prop_assert!((f64::from(*found) - expected).abs() < 1e-6 * expected.abs() + 1e-9);
            }
            let all = [out, scores, gate].concat();
            prop_assert_eq!(first.get_or_insert_with(|| all.clone()), &all, "{}", isa.name());
        }
    }
}
