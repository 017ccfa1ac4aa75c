//! Vectors of 8 f32 (AVX2 with FMA).

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_add_ps, _mm_and_si128, _mm_cvtph_ps, _mm_cvtsi32_si128,
    _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128, _mm_set1_epi8, _mm_srli_epi16, _mm_srli_si128,
    _mm_storeu_ps, _mm256_add_ps, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32,
    _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_hadd_ps, _mm256_loadu_ps,
    _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::simd::{Simd, Unpack};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_BATCH: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m256) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: the caller's promise; `out` has room for four values.
        unsafe {
            let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let whole = _mm_add_ps(
                _mm256_castps256_ps128(halves),
                _mm256_extractf128_ps::<1>(halves),
            );
            _mm_storeu_ps(out.as_mut_ptr(), whole);
        }
        out
    }
}

/// The half at `at`, in every lane.
#[inline(always)]
unsafe fn splat_half(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise: two bytes at `at`.
    unsafe {
        let bits = i32::from(at.cast::<u16>().read_unaligned());
        _mm256_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))))
    }
}

/// 8 16-bit values, each in its own lane.
#[inline(always)]
unsafe fn words_8(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())) }
}

/// The 32 nibbles of 16 bytes as floats, low ones first.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> [__m256; 4] {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe {
        let mask = _mm_set1_epi8(0x0F);
        let bytes = _mm_loadu_si128(at.cast());
        let low = _mm_and_si128(bytes, mask);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
        [
            unsigned_bytes(low),
            unsigned_bytes(_mm_srli_si128::<8>(low)),
            unsigned_bytes(high),
            unsigned_bytes(_mm_srli_si128::<8>(high)),
        ]
    }
}

#[inline(always)]
unsafe fn unsigned_bytes(bytes: __m128i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)) }
}

/// A storage type whose blocks widen to four vectors.
trait Quarters {
    const BYTES: usize;
    const PLAIN: bool = false;

    /// # Safety
    /// The CPU has AVX2 and F16C, and `block` points to a block.
    unsafe fn quarters(block: *const u8) -> [__m256; 4];
}

impl<T: Quarters> Unpack<Avx2> for T {
    const BLOCK_BYTES: usize = T::BYTES;
    const IS_F32: bool = T::PLAIN;

    #[inline(always)]
    unsafe fn multiply(block: *const u8, x: *const f32, mut sum: __m256) -> __m256 {
        // SAFETY: the caller's promise: a block, and 32 values of `x`.
        unsafe {
            let [a, b, c, d] = T::quarters(block);
            sum = _mm256_fmadd_ps(a, _mm256_loadu_ps(x), sum);
            sum = _mm256_fmadd_ps(b, _mm256_loadu_ps(x.add(8)), sum);
            sum = _mm256_fmadd_ps(c, _mm256_loadu_ps(x.add(16)), sum);
            sum = _mm256_fmadd_ps(d, _mm256_loadu_ps(x.add(24)), sum);
        }
        sum
    }

    #[inline(always)]
    unsafe fn unpack(block: *const u8, out: *mut f32) {
        // SAFETY: the caller's promise: a block, and room for 32 values.
        unsafe {
            let [a, b, c, d] = T::quarters(block);
            _mm256_storeu_ps(out, a);
            _mm256_storeu_ps(out.add(8), b);
            _mm256_storeu_ps(out.add(16), c);
            _mm256_storeu_ps(out.add(24), d);
        }
    }
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q8_0;

impl Quarters for F32 {
    const BYTES: usize = 128;
    const PLAIN: bool = true;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            [
                _mm256_loadu_ps(block.cast()),
                _mm256_loadu_ps(block.add(32).cast()),
                _mm256_loadu_ps(block.add(64).cast()),
                _mm256_loadu_ps(block.add(96).cast()),
            ]
        }
    }
}

impl Quarters for F16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(block.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(block.add(16).cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(block.add(32).cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(block.add(48).cast())),
            ]
        }
    }
}

impl Quarters for Bf16 {
    const BYTES: usize = 64;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words_8(block))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words_8(block.add(16)))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words_8(block.add(32)))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words_8(block.add(48)))),
            ]
        }
    }
}

impl Quarters for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = splat_half(block);
            let mut values = nibbles(block.add(2));
            for value in &mut values {
                *value = _mm256_mul_ps(_mm256_add_ps(*value, _mm256_set1_ps(-8.0)), scale);
            }
            values
        }
    }
}

impl Quarters for Q4_1 {
    const BYTES: usize = 20;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let (scale, minimum) = (splat_half(block), splat_half(block.add(2)));
            let mut values = nibbles(block.add(4));
            for value in &mut values {
                *value = _mm256_add_ps(_mm256_mul_ps(*value, scale), minimum);
            }
            values
        }
    }
}

impl Quarters for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = splat_half(block);
            let mut values = [scale; 4];
            for (i, value) in values.iter_mut().enumerate() {
                let bytes = _mm_loadl_epi64(block.add(2 + 8 * i).cast());
                let widened = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                *value = _mm256_mul_ps(widened, scale);
            }
            values
        }
    }
}
