//! Vectors of 16 f32 in two registers (AVX2 with FMA).

#![allow(
    unsafe_code,
    reason = "vector instructions that are chosen at run time"
)]

use std::arch::x86_64::{
    __m128, __m256, __m256i, _MM_HINT_T0, _mm_add_ps, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_load_ss,
    _mm_loadu_si128, _mm_move_ss, _mm_movehdup_ps, _mm_prefetch, _mm_setzero_ps, _mm_srli_epi16,
    _mm_store_ss, _mm_storeu_ps, _mm_unpackhi_epi64, _mm256_abs_epi8, _mm256_add_ps,
    _mm256_and_si256, _mm256_broadcast_ss, _mm256_broadcastss_ps, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmpeq_epi16, _mm256_cvtepi8_epi16,
    _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_or_si256,
    _mm256_set_m128i, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_shuffle_ps, _mm256_sign_epi8, _mm256_slli_epi16, _mm256_slli_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_epi8, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    _mm256_zextps128_ps256,
};

use half::f16;

use super::simd::{Dot, Simd, Unpack};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// 16 values in two registers.
#[derive(Clone, Copy)]
pub(super) struct Two(__m256, __m256);

impl Simd for Avx2 {
    type V = Two;
    const TILE_BATCH: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Two {
        // SAFETY: the caller's promise.
        unsafe { Two(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Two {
        // SAFETY: the caller's promise.
        unsafe { Two(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_halves(from: *const f16) -> Two {
        // SAFETY: the caller's promise.
        unsafe {
            Two(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Two {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            let high = _mm_unpackhi_epi64(bytes, bytes);
            Two(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Two) {
        // SAFETY: the caller's promise.
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller's promise; prefetching reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Two {
        // SAFETY: the caller's promise.
        unsafe { Two(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn fma(a: Two, b: Two, c: Two) -> Two {
        // SAFETY: the caller's promise.
        unsafe {
            Two(
                _mm256_fmadd_ps(a.0, b.0, c.0),
                _mm256_fmadd_ps(a.1, b.1, c.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn sums([a, b, c, d]: [Two; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: the caller's promise; `out` has room for four values.
        unsafe {
            let halves = _mm256_add_ps(quarters(a.0, b.0, c.0, d.0), quarters(a.1, b.1, c.1, d.1));
            let whole = _mm_add_ps(
                _mm256_castps256_ps128(halves),
                _mm256_extractf128_ps::<1>(halves),
            );
            _mm_storeu_ps(out.as_mut_ptr(), whole);
        }
        out
    }
}

/// In each half the sums of that half of `a`, `b`, `c` and `d`, as
/// (v0 + v2) + (v1 + v3).
#[inline(always)]
unsafe fn quarters(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        _mm256_add_ps(
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
        )
    }
}

/// 8 16-bit values, each in its own lane.
#[inline(always)]
unsafe fn words_8(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())) }
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
    unsafe fn multiply(block: *const u8, x: *const f32, sum: Two) -> Two {
        // SAFETY: the caller's promise: a block, and 32 values of `x`.
        unsafe {
            let [a, b, c, d] = T::quarters(block);
            let low = _mm256_fmadd_ps(a, _mm256_loadu_ps(x), sum.0);
            let high = _mm256_fmadd_ps(b, _mm256_loadu_ps(x.add(8)), sum.1);
            Two(
                _mm256_fmadd_ps(c, _mm256_loadu_ps(x.add(16)), low),
                _mm256_fmadd_ps(d, _mm256_loadu_ps(x.add(24)), high),
            )
        }
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
pub(super) struct F8E4M3;

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

impl Quarters for F8E4M3 {
    const BYTES: usize = 32;

    #[inline(always)]
    unsafe fn quarters(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let [a, b] = eighths(block);
            let [c, d] = eighths(block.add(16));
            [a, b, c, d]
        }
    }
}

/// 16 FP8 values. They become halves first, whose exponent counts from 15 and not
/// from 7: a conversion of small halves is as fast as any, a product of small
/// floats is not.
#[inline(always)]
unsafe fn eighths(at: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe {
        let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast()));
        let magnitude = _mm256_set1_epi16(0x007F);
        let is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(words, magnitude), magnitude);
        // The sign was extended to all upper bits; one of them is kept.
        let sign_and_magnitude = _mm256_set1_epi16(!0x407F);
        let halves = _mm256_and_si256(_mm256_slli_epi16::<7>(words), sign_and_magnitude);
        let halves = _mm256_or_si256(halves, is_nan);
        let rebias = _mm256_set1_ps(256.0);
        let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
        [_mm256_mul_ps(low, rebias), _mm256_mul_ps(high, rebias)]
    }
}

/// A block of weights.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    /// Signed bytes, or bytes from 0 to 127 where there is a minimum.
    bytes: __m256i,
    /// The scale in every lane.
    scale: __m256,
    /// The minimum in the first lane.
    minimum: __m256,
}

/// A block of activations.
#[derive(Clone, Copy)]
pub(super) struct Values {
    /// Signed bytes, none of them −128.
    bytes: __m256i,
    /// The scale in every lane.
    scale: __m256,
    /// The sum in every lane.
    sum: __m256,
}

/// A quantised type whose blocks are a scale, maybe a minimum, and bytes or
/// nibbles.
pub(super) trait Blocks {
    const BYTES: usize;
    /// Whether a minimum follows the scale, and the values begin at 0.
    const HAS_MINIMUM: bool = false;
    /// Blocks of the same values that take fewer instructions.
    type Wide: Blocks;

    /// # Safety
    /// The CPU has AVX2 and F16C, and `at` points to a block.
    unsafe fn weights(at: *const u8) -> Weights;
}

/// Blocks that are widened for several activation rows: 32 bytes, then scale and
/// minimum in f32, then nothing up to a length that keeps most loads inside one
/// cache line.
pub(super) struct Wide<const HAS_MINIMUM: bool>;

impl<const HAS_MINIMUM: bool> Blocks for Wide<HAS_MINIMUM> {
    const BYTES: usize = 48;
    const HAS_MINIMUM: bool = HAS_MINIMUM;
    type Wide = Self;

    #[inline(always)]
    unsafe fn weights(at: *const u8) -> Weights {
        // SAFETY: the caller's promise.
        unsafe {
            Weights {
                bytes: _mm256_loadu_si256(at.cast()),
                scale: _mm256_broadcast_ss(&at.add(32).cast::<f32>().read_unaligned()),
                minimum: if HAS_MINIMUM {
                    _mm256_zextps128_ps256(_mm_load_ss(at.add(36).cast()))
                } else {
                    _mm256_setzero_ps()
                },
            }
        }
    }
}

impl<T: Blocks> Dot<Avx2> for T {
    const BLOCK_BYTES: usize = T::BYTES;
    const TILE_BATCH: usize = 1;
    type Weights = (Weights, Option<Weights>);
    type Values = (Values, Values);
    const WIDENS: bool = true;
    type Wide = T::Wide;

    #[inline(always)]
    unsafe fn widen(block: *const u8, out: *mut u8) {
        // SAFETY: the caller's promise: a block, and room for a wide one.
        unsafe {
            let weights = T::weights(block);
            _mm256_storeu_si256(out.cast(), weights.bytes);
            _mm_store_ss(out.add(32).cast(), _mm256_castps256_ps128(weights.scale));
            _mm_store_ss(out.add(36).cast(), _mm256_castps256_ps128(weights.minimum));
        }
    }

    #[inline(always)]
    unsafe fn weights<const BOTH: bool>(at: *const u8) -> (Weights, Option<Weights>) {
        // SAFETY: the caller's promise: a block, and another where there are both.
        unsafe {
            let second = if BOTH {
                Some(T::weights(at.add(T::BYTES)))
            } else {
                None
            };
            (T::weights(at), second)
        }
    }

    #[inline(always)]
    unsafe fn values(values: *const i8, scales: *const f32, sums: *const f32) -> (Values, Values) {
        // SAFETY: the caller's promise: values, scales and sums of two blocks.
        unsafe {
            (
                value_block(values, scales, sums),
                value_block(values.add(32), scales.add(1), sums.add(1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn step(weights: (Weights, Option<Weights>), x: (Values, Values), sum: Two) -> Two {
        // SAFETY: the caller's promise.
        unsafe {
            let low = block_step::<T>(weights.0, x.0, sum.0);
            let high = match weights.1 {
                Some(weights) => block_step::<T>(weights, x.1, sum.1),
                None => sum.1,
            };
            Two(low, high)
        }
    }
}

/// A block's activations.
#[inline(always)]
unsafe fn value_block(values: *const i8, scale: *const f32, sum: *const f32) -> Values {
    // SAFETY: the caller's promise: 32 bytes, a scale and a sum.
    unsafe {
        Values {
            bytes: _mm256_loadu_si256(values.cast()),
            scale: _mm256_broadcast_ss(&*scale),
            sum: _mm256_broadcast_ss(&*sum),
        }
    }
}

/// `sum` plus the products of one block: lane l gets those of values 4l to 4l + 3.
#[inline(always)]
unsafe fn block_step<T: Blocks>(weights: Weights, x: Values, sum: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        // One factor is taken without its sign, which the other gets. Two products
        // are at most 2 · 128 · 127, which 16 bits hold.
        let pairs = if T::HAS_MINIMUM {
            _mm256_maddubs_epi16(weights.bytes, x.bytes)
        } else {
            let magnitudes = _mm256_abs_epi8(weights.bytes);
            _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x.bytes, weights.bytes))
        };
        let products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(products), x.scale);
        let sum = _mm256_fmadd_ps(scaled, weights.scale, sum);
        if T::HAS_MINIMUM {
            _mm256_fmadd_ps(weights.minimum, x.sum, sum)
        } else {
            sum
        }
    }
}

/// Scale and minimum that a block begins with.
#[inline(always)]
unsafe fn head(at: *const u8) -> __m128 {
    // SAFETY: the caller's promise: a block, which is longer than its head.
    unsafe {
        let head = i32::from_le(at.cast::<i32>().read_unaligned());
        _mm_cvtph_ps(_mm_cvtsi32_si128(head))
    }
}

/// 16 bytes as 32 nibbles, low ones before high ones.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> __m256i {
    // SAFETY: the caller's promise: 16 bytes at `at`.
    unsafe {
        let bytes = _mm_loadu_si128(at.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
        _mm256_and_si256(both, _mm256_set1_epi8(0x0F))
    }
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q8_0;

impl Blocks for Q4_0 {
    const BYTES: usize = 18;
    type Wide = Wide<false>;

    #[inline(always)]
    unsafe fn weights(at: *const u8) -> Weights {
        // SAFETY: the caller's promise.
        unsafe {
            Weights {
                bytes: _mm256_sub_epi8(nibbles(at.add(2)), _mm256_set1_epi8(8)),
                scale: _mm256_broadcastss_ps(head(at)),
                minimum: _mm256_setzero_ps(),
            }
        }
    }
}

impl Blocks for Q4_1 {
    const BYTES: usize = 20;
    const HAS_MINIMUM: bool = true;
    type Wide = Wide<true>;

    #[inline(always)]
    unsafe fn weights(at: *const u8) -> Weights {
        // SAFETY: the caller's promise.
        unsafe {
            let head = head(at);
            let minimum = _mm_move_ss(_mm_setzero_ps(), _mm_movehdup_ps(head));
            Weights {
                bytes: nibbles(at.add(4)),
                scale: _mm256_broadcastss_ps(head),
                minimum: _mm256_zextps128_ps256(minimum),
            }
        }
    }
}

impl Blocks for Q8_0 {
    const BYTES: usize = 34;
    type Wide = Wide<false>;

    #[inline(always)]
    unsafe fn weights(at: *const u8) -> Weights {
        // SAFETY: the caller's promise.
        unsafe {
            Weights {
                bytes: _mm256_loadu_si256(at.add(2).cast()),
                scale: _mm256_broadcastss_ps(head(at)),
                minimum: _mm256_setzero_ps(),
            }
        }
    }
}
