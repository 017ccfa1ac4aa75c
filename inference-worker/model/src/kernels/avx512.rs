//! Vectors of 16 f32 (AVX-512F).

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32,
    _mm_loadu_si128, _mm_storeu_ps, _mm256_loadu_si256, _mm512_add_ps, _mm512_castps512_ps128,
    _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32,
    _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps,
    _mm512_permutexvar_ps, _mm512_set_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_unpackhi_ps,
    _mm512_unpacklo_ps,
};

use super::simd::{Simd, Unpack};

/// AVX-512F, with F16C for single halves.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
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
    unsafe fn store(to: *mut f32, value: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(to, value) }
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

/// The half at `at`, in every lane.
#[inline(always)]
unsafe fn splat_half(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise: two bytes at `at`.
    unsafe {
        let bits = i32::from(at.cast::<u16>().read_unaligned());
        _mm512_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))))
    }
}

/// 16 bytes, each in its own lane.
#[inline(always)]
unsafe fn bytes_16(at: *const u8) -> __m128i {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe { _mm_loadu_si128(at.cast()) }
}

/// 16 16-bit values.
#[inline(always)]
unsafe fn words_16(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise: 32 bytes at `at`.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// 0 to 15.
#[inline(always)]
unsafe fn nibble_values() -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_set_ps(
            15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0,
        )
    }
}

/// Looks the low, then the high nibbles of 16 bytes up in a table of the 16
/// values that a nibble can stand for. The lookup reads four bits of each lane
/// only, so that nothing needs masking.
#[inline(always)]
unsafe fn look_up(nibbles: *const u8, table: __m512) -> (__m512, __m512) {
    // SAFETY: the caller's promise: 16 bytes at `nibbles`.
    unsafe {
        let lanes: __m512i = _mm512_cvtepu8_epi32(bytes_16(nibbles));
        (
            _mm512_permutexvar_ps(lanes, table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(lanes), table),
        )
    }
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
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q8_0;

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

impl Halves for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let centred = _mm512_add_ps(nibble_values(), _mm512_set1_ps(-8.0));
            let table = _mm512_mul_ps(centred, splat_half(block));
            look_up(block.add(2), table)
        }
    }
}

impl Halves for Q4_1 {
    const BYTES: usize = 20;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let scaled = _mm512_mul_ps(nibble_values(), splat_half(block));
            let table = _mm512_add_ps(scaled, splat_half(block.add(2)));
            look_up(block.add(4), table)
        }
    }
}

impl Halves for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    unsafe fn halves(block: *const u8) -> (__m512, __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = splat_half(block);
            let low = _mm512_cvtepi8_epi32(bytes_16(block.add(2)));
            let high = _mm512_cvtepi8_epi32(bytes_16(block.add(18)));
            (
                _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale),
                _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale),
            )
        }
    }
}
