//! Turning stored bytes into rows that the kernels multiply. Arithmetic only.

use std::ops::Range;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
use half::{bf16, f16};
use llama_checkpoint::gguf::GgmlType;
use llama_checkpoint::{BLOCK, Format, ModelError};

use crate::kernels;

/// Bytes of an f16.
const HALF: usize = 2;
/// 8-bit integers go this far on both sides of zero.
const INT8_MAX: f32 = 127.0;

/// 8-bit integers as `Q8_0` blocks whose scale is 1. −128, which a `Q8_0` block
/// may hold as well, stays what it is.
pub(super) fn int8(values: &[u8], out: &mut [u8]) {
    let one = f16::ONE.to_le_bytes();
    let blocks = out.chunks_exact_mut(HALF + BLOCK);
    for (values, block) in values.chunks_exact(BLOCK).zip(blocks) {
        block[..HALF].copy_from_slice(&one);
        block[HALF..].copy_from_slice(values);
    }
}

/// How rows of packed 4-bit integers are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    /// How a scale is stored.
    pub(super) scale_format: Format,
    /// Columns that share a scale.
    pub(super) group: usize,
    /// Columns of the first group that lie before the rows begin.
    pub(super) offset: usize,
    /// Columns of a row.
    pub(super) columns: usize,
}

/// Packed 4-bit integers, the lowest bits first and 8 added to each, with a scale a
/// group, as `Q4_0` blocks.
pub(super) fn int4(
    name: &str,
    words: &[u8],
    scales: &[u8],
    packing: Packing,
    out: &mut [u8],
) -> Result<(), ModelError> {
    let Packing { columns, group, .. } = packing;
    let groups = (packing.offset + columns).div_ceil(group);
    let scale_bytes = super::value_bytes(packing.scale_format);
    let mut row_scales = vec![0.0; groups];
    let rows = words
        .chunks_exact(columns / 2)
        .zip(scales.chunks_exact(groups * scale_bytes))
        .zip(out.chunks_exact_mut(Format::Q4_0.row_bytes(columns)));
    for ((words, scales), out) in rows {
        kernels::unpack(packing.scale_format, scales, None, &mut row_scales);
        let blocks = out.chunks_exact_mut(Format::Q4_0.block_bytes());
        for (number, (values, block)) in words.chunks_exact(BLOCK / 2).zip(blocks).enumerate() {
            let scale = row_scales[(packing.offset + number * BLOCK) / group];
            block[..HALF].copy_from_slice(&half_scale(name, scale)?);
            // Two values a byte, side by side, become values half a block apart.
            let value = |at: usize| values[at / 2] >> (4 * (at % 2)) & 0xF;
            for (at, byte) in block[HALF..].iter_mut().enumerate() {
                *byte = value(at) | value(at + BLOCK / 2) << 4;
            }
        }
    }
    Ok(())
}

/// A scale as an f16, which must hold it.
fn half_scale(name: &str, scale: f32) -> Result<[u8; HALF], ModelError> {
    let half = f16::from_f32(scale);
    if !half.is_finite() {
        return Err(ModelError::Invalid(format!(
            "tensor {name} has the scale {scale}, expected a number that fits half precision"
        )));
    }
    Ok(half.to_le_bytes())
}

/// Blocks that no kernel multiplies, `rows` rows of them, of which the columns
/// `part` become `Q8_0` blocks.
pub(super) fn requantize(
    name: &str,
    kind: GgmlType,
    (blocks, rows): (&[u8], usize),
    part: Range<usize>,
    out: &mut [u8],
) -> Result<(), ModelError> {
    let refuse = |error: candle_core::Error| ModelError::Invalid(format!("tensor {name}: {error}"));
    let dtype = dtype_of(kind).ok_or_else(|| {
        ModelError::Unsupported(format!(
            "tensor {name} is stored as {kind}, which is not read"
        ))
    })?;
    let columns = blocks.len() / rows.max(1) / dtype.type_size() * dtype.block_size();
    let widened = qtensor_from_ggml(dtype, blocks, vec![rows, columns], &Device::Cpu)
        .and_then(|blocks| blocks.dequantize(&Device::Cpu))
        .and_then(|values| values.flatten_all()?.to_vec1::<f32>())
        .map_err(refuse)?;
    let outs = out.chunks_exact_mut(Format::Q8_0.row_bytes(part.len()));
    for (row, out) in widened.chunks_exact(columns).zip(outs) {
        quantize(name, &row[part.clone()], out)?;
    }
    Ok(())
}

fn dtype_of(kind: GgmlType) -> Option<GgmlDType> {
    Some(match kind {
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        _ => return None,
    })
}

/// `values` as `Q8_0` blocks.
fn quantize(name: &str, values: &[f32], out: &mut [u8]) -> Result<(), ModelError> {
    let blocks = out.chunks_exact_mut(Format::Q8_0.block_bytes());
    for (values, block) in values.chunks_exact(BLOCK).zip(blocks) {
        // No number at all is too large a number.
        let largest = values.iter().fold(0.0_f32, |largest, value| {
            if value.is_nan() {
                f32::INFINITY
            } else {
                largest.max(value.abs())
            }
        });
        let scale = half_scale(name, largest / INT8_MAX)?;
        kernels::int8::store_block(values, f16::from_le_bytes(scale), block);
    }
    Ok(())
}

/// Writes the columns `range` of a matrix of `width` columns, which lie one behind
/// the other in `block`, into its rows `out`. Values are `size` bytes.
pub(super) fn turn(
    block: &[u8],
    size: usize,
    (width, range): (usize, Range<usize>),
    out: &mut [u8],
) {
    let rows = block.len() / size / range.len().max(1);
    for (row, out) in out.chunks_exact_mut(width * size).enumerate() {
        let part = &mut out[range.start * size..range.end * size];
        for (column, value) in part.chunks_exact_mut(size).enumerate() {
            let at = (column * rows + row) * size;
            value.copy_from_slice(&block[at..at + size]);
        }
    }
}

/// Random numbers for the `rows` and `columns` of a matrix of `width` columns, which
/// depend on its name and on their place in it, so that every layout has the same.
/// Products keep about the size of what they multiply.
pub(super) fn random(
    name: &str,
    format: Format,
    (rows, columns, width): (Range<usize>, Range<usize>, usize),
    out: &mut [u8],
) {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let size = (3.0 / width as f32).sqrt();
    let places = rows.flat_map(|row| columns.clone().map(move |column| row * width + column));
    let values = places.map(|place| size * uniform(seed, place as u64));
    match format {
        Format::F32 => put(values, f32::to_le_bytes, out),
        Format::F16 => put(values.map(f16::from_f32), f16::to_le_bytes, out),
        _ => put(values.map(bf16::from_f32), bf16::to_le_bytes, out),
    }
}

fn put<T, const N: usize>(
    values: impl Iterator<Item = T>,
    bytes: impl Fn(T) -> [u8; N],
    out: &mut [u8],
) {
    for (out, value) in out.chunks_exact_mut(N).zip(values) {
        out.copy_from_slice(&bytes(value));
    }
}

/// Between −1 and 1 (`SplitMix64`).
fn uniform(seed: u64, place: u64) -> f32 {
    let mut z = seed.wrapping_add(place.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(format: Format, bytes: &[u8], count: usize) -> Vec<f32> {
        let mut values = vec![0.0; count];
        kernels::unpack(format, bytes, None, &mut values);
        values
    }

    #[test]
    fn integers_become_blocks_of_the_same_values() {
        let values: Vec<i8> = (-32..32).collect();
        let bytes: Vec<u8> = values.iter().map(|value| value.to_le_bytes()[0]).collect();
        let mut out = vec![0; Format::Q8_0.row_bytes(64)];
        int8(&bytes, &mut out);
        let expected: Vec<f32> = values.iter().map(|value| f32::from(*value)).collect();
        assert_eq!(unpack(Format::Q8_0, &out, 64), expected);
    }

    #[test]
    fn packed_integers_become_blocks_with_the_scale_of_their_group() {
        // Two rows of 64 columns from column 32 of groups of 64 on: each row meets
        // the second half of one group and the first half of the next.
        let nibbles: Vec<u8> = (0..128_u8).map(|i| i.wrapping_mul(7) % 16).collect();
        let words: Vec<u8> = nibbles
            .chunks(2)
            .map(|pair| pair[0] | pair[1] << 4)
            .collect();
        let scales = [0.5_f32, 2.0, 0.25, 4.0];
        let bytes: Vec<u8> = scales
            .iter()
            .flat_map(|scale| scale.to_le_bytes())
            .collect();
        let packing = Packing {
            scale_format: Format::F32,
            group: 64,
            offset: 32,
            columns: 64,
        };
        let mut out = vec![0; 2 * Format::Q4_0.row_bytes(64)];
        int4("x", &words, &bytes, packing, &mut out).expect("fits");
        let expected: Vec<f32> = nibbles
            .iter()
            .enumerate()
            .map(|(at, nibble)| scales[at / 32] * (f32::from(*nibble) - 8.0))
            .collect();
        assert_eq!(unpack(Format::Q4_0, &out, 128), expected);

        for scale in [f32::NAN, 1e6] {
            let bytes = [scale; 4].map(f32::to_le_bytes).concat();
            let error = int4("x", &words, &bytes, packing, &mut out).expect_err("no f16");
            assert!(
                error.to_string().contains("tensor x has the scale"),
                "{error}"
            );
        }
    }

    #[test]
    fn columns_become_rows() {
        // Three columns of a matrix of two rows and five columns.
        let block: Vec<u8> = [[1_u16, 6], [2, 7], [3, 8]]
            .concat()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let mut out = vec![0; 20];
        turn(&block, 2, (5, 1..4), &mut out);
        let rows: Vec<u16> = out
            .chunks(2)
            .map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
            .collect();
        assert_eq!(rows, [0, 1, 2, 3, 0, 0, 6, 7, 8, 0]);
    }

    #[test]
    fn requantised_blocks_keep_seven_bits() {
        use candle_core::quantized::QTensor;
        use candle_core::{Device, Tensor};
        let values: Vec<f32> = (0..1024)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0)
            .collect();
        let tensor = Tensor::from_vec(values, (2, 512), &Device::Cpu).expect("a tensor");
        for (kind, dtype) in [
            (GgmlType::Q4_K, GgmlDType::Q4K),
            (GgmlType::Q6_K, GgmlDType::Q6K),
            (GgmlType::Q5_0, GgmlDType::Q5_0),
        ] {
            let blocks = QTensor::quantize(&tensor, dtype).expect("quantises");
            let widened = blocks.dequantize(&Device::Cpu).expect("widens");
            let widened: Vec<f32> = widened
                .flatten_all()
                .and_then(|t| t.to_vec1())
                .expect("f32");
            let bytes = blocks.data().expect("in memory");
            let mut out = vec![0; 2 * Format::Q8_0.row_bytes(96)];
            requantize("x", kind, (&bytes, 2), 32..128, &mut out).expect("converts");
            let found = unpack(Format::Q8_0, &out, 192);
            for (at, found) in found.iter().enumerate() {
                let expected = widened[at / 96 * 512 + 32 + at % 96];
                assert!(
                    (found - expected).abs() <= 2.0 / 127.0,
                    "{kind}: {found} for {expected}"
                );
            }
        }
    }

    #[test]
    fn random_numbers_do_not_depend_on_the_part() {
        let mut whole = vec![0; 4 * 64 * 4];
        random("a", Format::F32, (0..4, 0..64, 64), &mut whole);
        let mut part = vec![0; 2 * 32 * 4];
        random("a", Format::F32, (1..3, 32..64, 64), &mut part);
        assert_eq!(part[..128], whole[(64 + 32) * 4..(64 + 64) * 4]);
        let mut other = vec![0; part.len()];
        random("b", Format::F32, (1..3, 32..64, 64), &mut other);
        assert_ne!(part, other);
        let values = unpack(Format::F32, &whole, 256);
        let mean_square = values.iter().map(|value| value * value).sum::<f32>() / 256.0;
        assert!((mean_square * 64.0 - 1.0).abs() < 0.2, "{mean_square}");
    }
}
