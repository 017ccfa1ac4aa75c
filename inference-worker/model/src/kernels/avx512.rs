//! Vectors of 16 f32 and 64 int8 (AVX-512 with VNNI).

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _MM_HINT_T0, _mm_castpd_ps, _mm_cvtph_ps, _mm_load_sd,
    _mm_loadu_si128, _mm_prefetch, _mm_set_epi32, _mm_setzero_si128, _mm_storeu_ps,
    _mm256_loadu_si256, _mm256_setzero_si256, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps128_ps512, _mm512_castps512_ps128, _mm512_castsi128_si512, _mm512_castsi256_si512,
    _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cmpeq_epi16_mask, _mm512_cvtepi8_epi16,
    _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_dpbusd_epi32, _mm512_extracti64x4_epi64, _mm512_fmadd_ps, _mm512_inserti32x4,
    _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_set1_epi16,
    _mm512_maskz_permutexvar_ps, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_set_epi32,
    _mm512_set_epi64, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_shuffle_i32x4, _mm512_shuffle_ps,
    _mm512_slli_epi16, _mm512_slli_epi32, _mm512_srlv_epi64, _mm512_storeu_ps, _mm512_sub_epi8,
    _mm512_sub_epi32, _mm512_unpackhi_ps, _mm512_unpacklo_ps, _mm512_xor_si512,
};

use half::f16;

use super::simd::{Dot, Simd, Unpack};

/// AVX-512F, BW and VNNI, with F16C for single halves.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    const TILE_BATCH: usize = 6;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const f16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(words_16(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller's promise; prefetching reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: the caller's promise; `out` has room for four values.
        unsafe {
            // Pairs of lanes of a and b, of c and d, then of all four, leave in
            // each 128-bit quarter one partial sum of each vector.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let quarters = _mm512_add_ps(movelh(ab, cd), movehl(ab, cd));
            let halves = _mm512_add_ps(
                quarters,
                _mm512_shuffle_f32x4::<0b01_00_11_10>(quarters, quarters),
            );
            let whole = _mm512_add_ps(
                halves,
                _mm512_shuffle_f32x4::<0b10_11_00_01>(halves, halves),
            );
            _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(whole));
        }
        out
    }
}

/// In each quarter the lower halves of `a` and `b`.
#[inline(always)]
unsafe fn movelh(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_shuffle_ps::<0b01_00_01_00>(a, b) }
}

/// In each quarter the upper halves of `a` and `b`.
#[inline(always)]
unsafe fn movehl(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_shuffle_ps::<0b11_10_11_10>(a, b) }
}

/// 16 16-bit values.
#[inline(always)]
unsafe fn words_16(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise: 32 bytes at `at`.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// A storage type whose blocks widen to two vectors.
trait Halves {
    const BYTES: usize;
    const PLAIN: bool = false;

    /// # Safety
    /// The CPU has AVX-512F and F16C, and `block` points to a block.
    unsafe fn halves(block: *const u8) -> (__m512, __m512);
}

impl<T: Halves> Unpack<Avx512> for T {
    const BLOCK_BYTES: usize = T::BYTES;
    const IS_F32: bool = T::PLAIN;

    #[inline(always)]
    unsafe fn multiply(block: *const u8, x: *const f32, sum: __m512) -> __m512 {
        // SAFETY: the caller's promise: a block, and 32 values of `x`.
        unsafe {
            let (low, high) = T::halves(block);
            let sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(x), sum);
            _mm512_fmadd_ps(high, _mm512_loadu_ps(x.add(16)), sum)
        }
    }

    #[inline(always)]
    unsafe fn unpack(block: *const u8, out: *mut f32) {
        // SAFETY: the caller's promise: a block, and room for 32 values.
        unsafe {
            let (low, high) = T::halves(block);
            _mm512_storeu_ps(out, low);
            _mm512_storeu_ps(out.add(16), high);
        }
    }
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct F8E4M3;

impl Halves for F32 {
    const BYTES: usize = 128;
    const PLAIN: bool = true;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            (
                _mm512_loadu_ps(block.cast()),
                _mm512_loadu_ps(block.add(64).cast()),
            )
        }
    }
}

impl Halves for F16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            (
                _mm512_cvtph_ps(words_16(block)),
                _mm512_cvtph_ps(words_16(block.add(32))),
            )
        }
    }
}

impl Halves for Bf16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let low = _mm512_cvtepu16_epi32(words_16(block));
            let high = _mm512_cvtepu16_epi32(words_16(block.add(32)));
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)),
            )
        }
    }
}

impl Halves for F8E4M3 {
    const BYTES: usize = 32;

    /// The values become halves first, whose exponent counts from 15 and not from
    /// 7: a conversion of small halves is as fast as any, a product of small floats
    /// is not.
    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let words = _mm512_cvtepi8_epi16(words_16(block));
            let magnitude = _mm512_set1_epi16(0x007F);
            let is_nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, magnitude), magnitude);
            // The sign was extended to all upper bits; one of them is kept.
            let sign_and_magnitude = _mm512_set1_epi16(!0x407F);
            let halves = _mm512_and_si512(_mm512_slli_epi16::<7>(words), sign_and_magnitude);
            let halves = _mm512_mask_set1_epi16(halves, is_nan, -1);
            let rebias = _mm512_set1_ps(256.0);
            let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves));
            (_mm512_mul_ps(low, rebias), _mm512_mul_ps(high, rebias))
        }
    }
}

/// Weights of two blocks, the second all zeros where there is none.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    /// Signed bytes.
    values: __m512i,
    /// −128 times the sum of each four of `values`.
    offset: __m512i,
    /// The first block's scale in the lower, the second's in the upper lanes.
    scales: __m512,
    /// The first block's minimum in lane 0, the second's in lane 8.
    minima: __m512,
}

/// Activations of two blocks.
#[derive(Clone, Copy)]
pub(super) struct PairValues {
    /// Bytes plus 128.
    values: __m512i,
    scales: __m512,
    sums: __m512,
}

/// A quantised type whose blocks are a scale, maybe a minimum, and bytes or
/// nibbles.
trait Blocks {
    const BYTES: usize;
    /// Whether a minimum follows the scale.
    const HAS_MINIMUM: bool = false;

    /// Signed bytes of a block and, where there are `BOTH`, of the next.
    /// # Safety
    /// The CPU has AVX-512BW, and `at` points to the blocks.
    unsafe fn values<const BOTH: bool>(at: *const u8) -> __m512i;
}

impl<T: Blocks> Dot<Avx512> for T {
    const BLOCK_BYTES: usize = T::BYTES;
    const TILE_BATCH: usize = 4;
    type Weights = Pair;
    type Values = PairValues;
    type Wide = T;

    #[inline(always)]
    unsafe fn weights<const BOTH: bool>(at: *const u8) -> Pair {
        // SAFETY: the caller's promise; a second block is read only where there
        // is one.
        unsafe {
            let values = T::values::<BOTH>(at);
            // A block begins with its scale and, where it has one, its minimum.
            let first = i32::from_le(at.cast::<i32>().read_unaligned());
            let second = if BOTH {
                i32::from_le(at.add(T::BYTES).cast::<i32>().read_unaligned())
            } else {
                0
            };
            let heads = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_set_epi32(0, 0, second, first)));
            let minima = if T::HAS_MINIMUM {
                let lanes = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1);
                _mm512_maskz_permutexvar_ps(0x0101, lanes, heads)
            } else {
                _mm512_setzero_ps()
            };
            let lanes = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
            let zero = _mm512_setzero_si512();
            let offset = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(-128), values);
            Pair {
                values,
                offset: _mm512_sub_epi32(zero, offset),
                scales: _mm512_permutexvar_ps(lanes, heads),
                minima,
            }
        }
    }

    #[inline(always)]
    unsafe fn values(values: *const i8, scales: *const f32, sums: *const f32) -> PairValues {
        // SAFETY: the caller's promise: 64 bytes, two scales, two sums.
        unsafe {
            PairValues {
                values: _mm512_xor_si512(_mm512_loadu_si512(values.cast()), _mm512_set1_epi8(-128)),
                scales: spread(scales),
                sums: if T::HAS_MINIMUM {
                    spread(sums)
                } else {
                    _mm512_setzero_ps()
                },
            }
        }
    }

    #[inline(always)]
    unsafe fn step(weights: Pair, x: PairValues, sum: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let products = _mm512_dpbusd_epi32(weights.offset, x.values, weights.values);
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products), x.scales);
            let sum = _mm512_fmadd_ps(scaled, weights.scales, sum);
            if T::HAS_MINIMUM {
                _mm512_fmadd_ps(weights.minima, x.sums, sum)
            } else {
                sum
            }
        }
    }
}

/// The first of two values in the lower lanes, the second in the upper.
#[inline(always)]
unsafe fn spread(two: *const f32) -> __m512 {
    // SAFETY: the caller's promise: two values.
    unsafe {
        let lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        let two = _mm_castpd_ps(_mm_load_sd(two.cast()));
        _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(two))
    }
}

/// The nibbles of 16 bytes at `at`, low ones before high ones, and, where there
/// are `BOTH`, those of 16 bytes `distance` behind likewise.
#[inline(always)]
unsafe fn nibbles<const BOTH: bool>(at: *const u8, distance: usize) -> __m512i {
    // SAFETY: the caller's promise: 16 bytes each.
    unsafe {
        let first = _mm512_castsi128_si512(_mm_loadu_si128(at.cast()));
        let second = if BOTH {
            _mm_loadu_si128(at.add(distance).cast())
        } else {
            _mm_setzero_si128()
        };
        let two = _mm512_inserti32x4::<1>(first, second);
        let twice = _mm512_shuffle_i32x4::<0b01_01_00_00>(two, two);
        let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
        _mm512_and_si512(_mm512_srlv_epi64(twice, shifts), _mm512_set1_epi8(0x0F))
    }
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q8_0;

impl Blocks for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    unsafe fn values<const BOTH: bool>(at: *const u8) -> __m512i {
        // SAFETY: the caller's promise. Without a second block its scale is 0.
        unsafe {
            let nibbles = nibbles::<BOTH>(at.add(2), Self::BYTES);
            _mm512_sub_epi8(nibbles, _mm512_set1_epi8(8))
        }
    }
}

impl Blocks for Q4_1 {
    const BYTES: usize = 20;
    const HAS_MINIMUM: bool = true;

    #[inline(always)]
    unsafe fn values<const BOTH: bool>(at: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { nibbles::<BOTH>(at.add(4), Self::BYTES) }
    }
}

impl Blocks for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    unsafe fn values<const BOTH: bool>(at: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(at.add(2).cast()));
            let second = if BOTH {
                _mm256_loadu_si256(at.add(Self::BYTES + 2).cast())
            } else {
                _mm256_setzero_si256()
            };
            _mm512_inserti64x4::<1>(first, second)
        }
    }
}
