//! Every instruction set against plain arithmetic, every format against candle.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::gguf::GgmlType;
use crate::order;

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
        Format::F8E4M3 => return values.iter().map(|v| nearest_f8(*v)).collect(),
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q8_0 => GgmlDType::Q8_0,
    };
    let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).expect("tensor");
    let quantized = QTensor::quantize(&tensor, dtype).expect("quantizes");
    quantized.data().expect("bytes").into_owned()
}

/// The byte of the FP8 value nearest to `value`.
fn nearest_f8(value: f32) -> u8 {
    let mut all = [0.0; 256];
    let bytes: Vec<u8> = (0..=255).collect();
    unpack(Format::F8E4M3, &bytes, None, &mut all);
    let distance = |byte: &u8| (all[usize::from(*byte)] - value).abs();
    let numbers = bytes.into_iter().filter(|byte| byte & 0x7F != 0x7F);
    numbers
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .expect("there are some")
}

/// Ends of the chunks of `blocks` blocks, cut behind each whose bit is set.
fn ends(blocks: usize, cuts: u32) -> Vec<usize> {
    (1..=blocks)
        .filter(|end| *end == blocks || cuts >> (end % 32) & 1 == 1)
        .map(|end| end * BLOCK)
        .collect()
}

/// The columns `range` of every row.
fn columns_of(rows: &Rows<'_>, range: Range<usize>) -> Vec<u8> {
    let bytes = rows.format.row_bytes(range.start)..rows.format.row_bytes(range.end);
    rows.bytes
        .chunks(rows.format.row_bytes(rows.columns))
        .flat_map(|row| row[bytes.clone()].to_vec())
        .collect()
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
        unpack(format, &quantized.data().expect("bytes"), None, &mut ours);
        assert_eq!(ours, theirs, "{format:?}");
    }
}

#[test]
fn formats_and_ggml_types_match() {
    for format in Format::ALL {
        if let Some(ggml_type) = GgmlType::of(format) {
            assert_eq!(ggml_type.format(), Some(format));
            let bytes = format.block_bytes() as u64;
            let len = ggml_type.block_len().expect("known");
            assert_eq!(ggml_type.block_bytes(), Some(bytes * len / BLOCK as u64));
        }
    }
    assert_eq!(GgmlType::of(Format::F8E4M3), None);
    assert_eq!(GgmlType(12).format(), None, "Q4_K");
}

/// Bits, with one pattern for all that are not a number.
fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |value: &f32| {
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    };
    values.iter().map(bits).collect()
}

#[test]
fn every_fp8_value_widens_exactly() {
    let bytes: Vec<u8> = (0..=255).collect();
    let theirs: Vec<f32> = Tensor::from_raw_buffer(&bytes, DType::F8E4M3, &[256], &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32)?.to_vec1())
        .expect("widens");
    let mut ours = vec![0.0; 256];
    unpack(Format::F8E4M3, &bytes, None, &mut ours);
    assert_eq!(bits(&ours), bits(&theirs));
    assert_eq!(
        bits(&[ours[1], ours[0x7E], ours[0x88]]),
        bits(&[1.0 / 512.0, 448.0, -1.0 / 64.0])
    );
    assert!(ours[0x7F].is_nan() && ours[0xFF].is_nan());

    // A row for each value, which stands alone in it; +0.0 where the value is -0.0.
    let mut matrix = vec![0; 256 * BLOCK];
    for (row, byte) in matrix.chunks_exact_mut(BLOCK).zip(&bytes) {
        row[usize::from(byte % 32)] = *byte;
    }
    ours[0x80] = 0.0;
    let rows = Rows {
        format: Format::F8E4M3,
        bytes: &matrix,
        columns: BLOCK,
        ends: &[BLOCK],
        scales: None,
    };
    let x = vec![1.0; 7 * BLOCK];
    for isa in Isa::available() {
        for batch in [1, 7] {
            let mut out = vec![0.5; batch * 256];
            let x = Activations::new(isa, rows.format, &x[..batch * BLOCK], BLOCK);
            matmul(isa, &rows, &x, 0..batch, (&mut out, 256));
            for out in out.chunks(256) {
                assert_eq!(bits(out), bits(&ours), "{}", isa.name());
            }
        }
    }
}

/// A matrix with one scale a row is kept as blocks whose own scale is 1.
#[test]
fn int8_rows_with_a_scale_are_exact() {
    const COLUMNS: usize = 5 * BLOCK;
    let mut integers: Vec<i8> = (0..=255_u8)
        .cycle()
        .zip(0..6 * COLUMNS)
        .map(|(byte, i)| byte.rotate_left(u32::from(i % 7 == 0)).cast_signed())
        .collect();
    // The largest products there are.
    integers[..COLUMNS].fill(-128);
    let bytes: Vec<u8> = integers
        .chunks(BLOCK)
        .flat_map(|block| {
            let values = block.iter().map(|q| q.cast_unsigned());
            f16::ONE.to_le_bytes().into_iter().chain(values)
        })
        .collect();
    let scales = [0.3, 1e-3, 7.5, 0.011, 2.0, 1.0];
    let rows = Rows {
        format: Format::Q8_0,
        bytes: &bytes,
        columns: COLUMNS,
        ends: &[COLUMNS],
        scales: Some(&scales),
    };
    for (row, integers) in integers.chunks(COLUMNS).enumerate() {
        let mut values = vec![0.0; COLUMNS];
        rows.unpack_row(row, &mut values);
        let expected = integers.iter().map(|q| f32::from(*q) * scales[row]);
        assert_eq!(values, expected.collect::<Vec<f32>>());
    }
    // Integers up to 127, so that activations are quantised with a scale of 1.
    let mut x: Vec<i16> = (0..3 * COLUMNS)
        .map(|i| i16::try_from(i * 89 % 128).expect("small") - 64)
        .zip((0..BLOCK).cycle())
        .map(|(x, i)| if i == 0 { 127 } else { x })
        .collect();
    x[..COLUMNS].fill(127);
    x[COLUMNS..2 * COLUMNS].fill(-127);
    let floats: Vec<f32> = x.iter().map(|x| f32::from(*x)).collect();
    for isa in Isa::available() {
        let activations = Activations::new(isa, rows.format, &floats, COLUMNS);
        let mut out = vec![f32::NAN; 3 * 6];
        matmul(isa, &rows, &activations, 0..3, (&mut out, 6));
        let mut alone = vec![f32::NAN; 6];
        matmul(isa, &rows, &activations, 1..2, (&mut alone, 6));
        assert_eq!(alone, out[6..12], "{}", isa.name());
        for (out, x) in out.chunks(6).zip(x.chunks(COLUMNS)) {
            let expected = integers.chunks(COLUMNS).zip(scales).map(|(row, scale)| {
                let products = row
                    .iter()
                    .zip(x)
                    .map(|(q, x)| i32::from(*q) * i32::from(*x));
                products.sum::<i32>() as f32 * scale
            });
            assert_eq!(out, expected.collect::<Vec<f32>>(), "{}", isa.name());
        }
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
        blocks in 1_usize..10,
        cuts in any::<u32>(),
        batch in 1_usize..15,
        format in prop::sample::select(&Format::ALL),
        scaled in any::<bool>(),
    ) {
        let columns = blocks * BLOCK;
        let bytes = packed(format, &noise(seed, count * columns));
        let x = noise(!seed, batch * columns);
        let ends = ends(blocks, cuts);
        let scales = noise(seed ^ 0x4D, count);
        let rows = Rows {
            format,
            bytes: &bytes,
            columns,
            ends: &ends,
            scales: scaled.then_some(scales.as_slice()),
        };
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
                    let mut weights = vec![0.0; columns];
                    rows.unpack_row(n, &mut weights);
                    let (expected, bound) = exact(&weights, seen);
                    let found = f64::from(alone[n]);
                    prop_assert!((found - expected).abs() <= bound, "{}: {found} for {expected}", isa.name());
                }
            }
        }
    }

    #[test]
    fn parts_of_the_columns_add_up_to_the_whole(
        seed in any::<u32>(),
        count in 1_usize..6,
        holders in 1_usize..5,
        each in 1_usize..5,
        batch in 1_usize..6,
        format in prop::sample::select(&Format::ALL),
    ) {
        let chunks = holders * each;
        prop_assume!(order::agrees(chunks, holders));
        let mut end = 0;
        let ends: Vec<usize> = (0..chunks)
            .map(|chunk| {
                end += BLOCK * (1 + (seed >> (chunk % 16 * 2) & 3) as usize);
                end
            })
            .collect();
        let columns = end;
        let bytes = packed(format, &noise(seed, count * columns));
        let scales = noise(seed ^ 0x4D, count);
        let scales = Some(scales.as_slice());
        let whole = Rows { format, bytes: &bytes, columns, ends: &ends, scales };
        let x = noise(!seed, batch * columns);
        for isa in Isa::available() {
            let product = |rows: &Rows<'_>, x: &[f32]| {
                let mut out = vec![f32::NAN; batch * count];
                let x = Activations::new(isa, format, x, rows.columns);
                matmul(isa, rows, &x, 0..batch, (&mut out, count));
                out
            };
            let mut parts = Vec::new();
            for holder in 0..holders {
                let start = if holder == 0 { 0 } else { ends[holder * each - 1] };
                let ends = &ends[holder * each..(holder + 1) * each];
                let bytes = columns_of(&whole, start..ends[each - 1]);
                let ends: Vec<usize> = ends.iter().map(|end| end - start).collect();
                let columns = ends[each - 1];
                let x: Vec<f32> = x
                    .chunks(whole.columns)
                    .flat_map(|x| x[start..start + columns].to_vec())
                    .collect();
                let rows = Rows { format, bytes: &bytes, columns, ends: &ends, scales };
                parts.extend(product(&rows, &x));
            }
            order::sum_rows(&mut parts, batch * count);
            parts.truncate(batch * count);
            prop_assert_eq!(parts, product(&whole, &x), "{}", isa.name());
        }
    }

    #[test]
    fn weighted_sums_and_vector_functions_agree(seed in any::<u32>(), count in 0_usize..40, blocks in 1_usize..5) {
        let width = blocks * BLOCK;
        let halves: Vec<f16> = noise(seed, count * width).into_iter().map(f16::from_f32).collect();
        let floats: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
        let mut integers = vec![0; Format::Q8_0.row_bytes(count * width)];
        int8::store(&floats, &mut integers);
        let mut same_integers = vec![0.0; floats.len()];
        unpack(Format::Q8_0, &integers, None, &mut same_integers);
        for (found, value) in same_integers.iter().zip(&floats) {
            prop_assert!((found - value).abs() < 1.0 / 127.0);
        }
        let weights = noise(seed ^ 9, 3 * count);
        let row = |m: usize| &weights[m * count..][..count];
        let start = noise(seed ^ 5, 3 * width);
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let mut out = start.clone();
            weighted_sum(isa, [row(0), row(1), row(2)], floats.as_slice().into(), &mut out);
            let mut of_halves = start.clone();
            weighted_sum(isa, [row(0), row(1), row(2)], halves.as_slice().into(), &mut of_halves);
            prop_assert_eq!(&of_halves, &out, "{}", isa.name());
            let mut of_integers = start.clone();
            let all = [row(0), row(1), row(2)];
            weighted_sum(isa, all, Values::Int8(&integers), &mut of_integers);
            let mut widened = start.clone();
            weighted_sum(isa, all, same_integers.as_slice().into(), &mut widened);
            prop_assert_eq!(&of_integers, &widened, "{}", isa.name());
            for m in 0..3 {
                for i in 0..width {
                    let column: Vec<f32> = floats.chunks(width).map(|row| row[i]).collect();
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
