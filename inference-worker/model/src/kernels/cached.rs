//! Weighted sums of cached values.

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use half::f16;

use super::simd::{Load, Simd};
use super::{BLOCK, LANES};

/// Vectors of a block.
const VECTORS: usize = BLOCK / LANES;
/// Bytes of a scale, before the values of its block.
const SCALE: usize = 2;

/// Rows of values, in the instructions of `S`.
pub(super) trait Cached<S: Simd>: Copy {
    /// Rows of `width` values, a multiple of [`BLOCK`].
    fn rows(self, width: usize) -> usize;

    /// The block `number` of a row.
    ///
    /// # Safety
    /// The CPU has the instructions, and there are such a row and block.
    unsafe fn block(self, width: usize, row: usize, number: usize) -> [S::V; VECTORS];
}

impl<S: Simd, V: Load<S>> Cached<S> for &[V] {
    #[inline(always)]
    fn rows(self, width: usize) -> usize {
        self.len() / width
    }

    #[inline(always)]
    unsafe fn block(self, width: usize, row: usize, number: usize) -> [S::V; VECTORS] {
        // SAFETY: the caller's promise: the block's values lie in the slice.
        unsafe {
            let first = self.as_ptr().add(row * width + number * BLOCK);
            let mut values = [S::zero(); VECTORS];
            for (v, value) in values.iter_mut().enumerate() {
                *value = V::load(first.add(v * LANES));
            }
            values
        }
    }
}

/// Blocks of `Q8_0`: a scale, then 8-bit integers.
#[derive(Clone, Copy)]
pub(super) struct Int8<'a>(pub(super) &'a [u8]);

impl<S: Simd> Cached<S> for Int8<'_> {
    #[inline(always)]
    fn rows(self, width: usize) -> usize {
        self.0.len() / (width / BLOCK * (SCALE + BLOCK))
    }

    #[inline(always)]
    unsafe fn block(self, width: usize, row: usize, number: usize) -> [S::V; VECTORS] {
        // SAFETY: the caller's promise: the block's bytes lie in the slice.
        unsafe {
            let at = (row * (width / BLOCK) + number) * (SCALE + BLOCK);
            let block = self.0.as_ptr().add(at);
            let scale = S::splat(f16::from_le_bytes([*block, *block.add(1)]).to_f32());
            let bytes = block.add(SCALE).cast::<i8>();
            let mut values = [S::zero(); VECTORS];
            for (v, value) in values.iter_mut().enumerate() {
                // An integer times its scale is exact in f32.
                *value = S::fma(S::load_bytes(bytes.add(v * LANES)), scale, S::zero());
            }
            values
        }
    }
}

/// See [`super::weighted_sum`]: `M` rows of `out`, each plus the values weighted
/// by its own weights, value by value in order.
///
/// # Safety
/// The CPU has the instructions; `values` are whole rows as wide as those of `out`, a
/// multiple of [`BLOCK`], and there is a weight for each in every list.
#[inline(always)]
pub(super) unsafe fn weighted_sum<S: Simd, C: Cached<S>, const M: usize>(
    weights: [&[f32]; M],
    values: C,
    out: &mut [f32],
) {
    let width = out.len() / M;
    let count = values.rows(width);
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
                let value = values.block(width, t, number);
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
