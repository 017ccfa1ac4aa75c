//! Sums of cached values that are 8-bit integers.

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use half::f16;

use super::simd::Simd;
use super::{BLOCK, LANES};

/// Bytes of a block's scale, before its values.
const SCALE: usize = 2;

/// As `simd::weighted_sum`, of values in blocks of `Q8_0`. An integer times its scale is
/// exact in f32.
///
/// # Safety
/// The CPU has the instructions of `S`; `values` are whole rows as long as those of
/// `out`, a multiple of [`BLOCK`], and there is a weight for each in every list.
pub(super) unsafe fn weighted_sum_int8<S: Simd, const M: usize>(
    weights: [&[f32]; M],
    values: &[u8],
    out: &mut [f32],
) {
    const VECTORS: usize = BLOCK / LANES;
    let width = out.len() / M;
    let block_bytes = SCALE + BLOCK;
    let row_bytes = width / BLOCK * block_bytes;
    let count = values.len() / row_bytes;
    for number in 0..width / BLOCK {
        // SAFETY: block `number` of a row lies in `values` and in each row of `out`.
        unsafe {
            let mut sums = [[S::zero(); VECTORS]; M];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    let at = m * width + number * BLOCK + v * LANES;
                    *sum = S::load(out.as_ptr().add(at));
                }
            }
            for t in 0..count {
                let block = values.as_ptr().add(t * row_bytes + number * block_bytes);
                let scale = S::splat(f16::from_le_bytes([*block, *block.add(1)]).to_f32());
                let bytes = block.add(SCALE).cast::<i8>();
                let mut value = [S::zero(); VECTORS];
                for (v, value) in value.iter_mut().enumerate() {
                    let integers = S::load_bytes(bytes.add(v * LANES));
                    *value = S::fma(integers, scale, S::zero());
                }
                for m in 0..M {
                    let weight = S::splat(*weights[m].get_unchecked(t));
                    for v in 0..VECTORS {
                        sums[m][v] = S::fma(weight, value[v], sums[m][v]);
                    }
                }
            }
            for (m, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let at = m * width + number * BLOCK + v * LANES;
                    S::store(out.as_mut_ptr().add(at), sum);
                }
            }
        }
    }
}
