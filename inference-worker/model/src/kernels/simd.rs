//! The kernels over any vector type. Everything here is inlined into a function
//! that is built for the instructions of its [`Simd`].

#![allow(
    unsafe_code,
    reason = "vector loads through pointers, for instructions chosen at run time"
)]

use super::{BLOCK, Rows};

/// Weight rows that are computed together.
const TILE_ROWS: usize = 4;

/// Vectors of f32 in the instructions of one CPU generation.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Values in a vector; divides [`BLOCK`].
    const LANES: usize;
    /// Activation rows whose sums against [`TILE_ROWS`] weight rows fit the
    /// registers.
    const TILE_BATCH: usize;

    /// # Safety
    /// The CPU has the instructions (as for every function here).
    unsafe fn zero() -> Self::V;
    /// # Safety
    /// `from` points to [`Simd::LANES`] values.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// `to` has room for [`Simd::LANES`] values.
    unsafe fn store(to: *mut f32, value: Self::V);
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn splat(value: f32) -> Self::V;
    /// `a · b + c`, rounded once.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sums of four vectors.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn sums(vectors: [Self::V; TILE_ROWS]) -> [f32; TILE_ROWS];
}

/// A storage type in the instructions of `S`.
pub(super) trait Unpack<S: Simd> {
    /// Bytes of [`BLOCK`] values.
    const BLOCK_BYTES: usize;
    /// Whether the bytes are f32 already.
    const IS_F32: bool = false;

    /// `sum` plus the products of a block and 32 values of `x`, vector by vector.
    /// # Safety
    /// `block` points to a block, `x` to [`BLOCK`] values.
    unsafe fn multiply(block: *const u8, x: *const f32, sum: S::V) -> S::V;
    /// Writes a block's values.
    /// # Safety
    /// `block` points to a block, `out` has room for [`BLOCK`] values.
    unsafe fn unpack(block: *const u8, out: *mut f32);
}

/// Weight rows that a kernel takes at once: `stride` apart, counted in `T`. With
/// a stride of 0 all four are the same row, for the rows that make no tile.
#[derive(Clone, Copy)]
struct Tile<T> {
    first: *const T,
    stride: usize,
}

impl<T> Tile<T> {
    /// # Safety
    /// `at` lies inside row `row`.
    #[inline(always)]
    unsafe fn at(self, row: usize, at: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.first.add(row * self.stride + at) }
    }
}

/// Activation rows, `stride` values apart.
#[derive(Clone, Copy)]
struct Activations {
    first: *const f32,
    stride: usize,
    batch: usize,
}

/// Where a tile's sums go.
struct Place<'a> {
    out: &'a mut [f32],
    stride: usize,
    /// First row of the tile.
    first: usize,
    /// Rows of the tile whose sums count.
    width: usize,
    /// Whether this is not the first stretch of the row.
    add: bool,
}

impl Place<'_> {
    #[inline(always)]
    fn put(&mut self, m: usize, sums: [f32; TILE_ROWS]) {
        let start = m * self.stride + self.first;
        let out = &mut self.out[start..start + self.width];
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if self.add { *out + sum } else { sum };
        }
    }
}

/// See [`super::matmul`].
///
/// # Safety
/// The CPU has the instructions, and the sizes passed `Rows::check`.
#[inline(always)]
pub(super) unsafe fn matmul<S: Simd, U: Unpack<S>>(
    rows: &Rows<'_>,
    x: &[f32],
    out: &mut [f32],
    out_stride: usize,
) {
    let count = rows.count();
    let batch = x.len() / rows.columns;
    let row_bytes = rows.columns / BLOCK * U::BLOCK_BYTES;
    let mut panel = if batch > 1 && !U::IS_F32 {
        vec![0.0_f32; TILE_ROWS * rows.stretch]
    } else {
        Vec::new()
    };
    let mut place = Place {
        out,
        stride: out_stride,
        first: 0,
        width: 0,
        add: false,
    };
    while place.first < count {
        let whole = place.first + TILE_ROWS <= count;
        place.width = if whole { TILE_ROWS } else { 1 };
        let mut start = 0;
        while start < rows.columns {
            let len = rows.stretch.min(rows.columns - start);
            place.add = start > 0;
            // SAFETY: each row of the tile and of `x` has `len` columns from
            // `start` on; the panel has room for a stretch of each row.
            unsafe {
                let at = place.first * row_bytes + start / BLOCK * U::BLOCK_BYTES;
                let tile = Tile {
                    first: rows.bytes.as_ptr().add(at),
                    stride: if whole { row_bytes } else { 0 },
                };
                let x = Activations {
                    first: x.as_ptr().add(start),
                    stride: rows.columns,
                    batch,
                };
                if batch == 1 {
                    place.put(0, fused::<S, U>(tile, x.first, len));
                } else {
                    over_batch::<S>(widened::<S, U>(tile, len, &mut panel), len, x, &mut place);
                }
            }
            start += len;
        }
        place.first += place.width;
    }
}

/// One activation row: weights are widened and multiplied at once.
#[inline(always)]
unsafe fn fused<S: Simd, U: Unpack<S>>(
    tile: Tile<u8>,
    x: *const f32,
    len: usize,
) -> [f32; TILE_ROWS] {
    // SAFETY: as the caller says, every row and `x` have `len` columns.
    unsafe {
        let (mut a, mut b, mut c, mut d) = (S::zero(), S::zero(), S::zero(), S::zero());
        for block in 0..len / BLOCK {
            let (x, at) = (x.add(block * BLOCK), block * U::BLOCK_BYTES);
            a = U::multiply(tile.at(0, at), x, a);
            b = U::multiply(tile.at(1, at), x, b);
            c = U::multiply(tile.at(2, at), x, c);
            d = U::multiply(tile.at(3, at), x, d);
        }
        S::sums([a, b, c, d])
    }
}

/// The tile's rows as f32: in place, or widened into `panel`.
#[inline(always)]
unsafe fn widened<S: Simd, U: Unpack<S>>(
    tile: Tile<u8>,
    len: usize,
    panel: &mut [f32],
) -> Tile<f32> {
    if U::IS_F32 {
        #[expect(
            clippy::cast_ptr_alignment,
            reason = "vectors are loaded without regard to alignment"
        )]
        return Tile {
            first: tile.first.cast(),
            stride: tile.stride / size_of::<f32>(),
        };
    }
    let panel = panel.as_mut_ptr();
    for row in 0..TILE_ROWS {
        for block in 0..len / BLOCK {
            // SAFETY: the panel holds `TILE_ROWS` stretches of at least `len`.
            unsafe {
                let from = tile.at(row, block * U::BLOCK_BYTES);
                U::unpack(from, panel.add(row * len + block * BLOCK));
            }
        }
    }
    Tile {
        first: panel.cast_const(),
        stride: len,
    }
}

/// Several activation rows against widened weights, a register tile at a time.
#[inline(always)]
unsafe fn over_batch<S: Simd>(tile: Tile<f32>, len: usize, x: Activations, place: &mut Place<'_>) {
    let mut m = 0;
    // SAFETY: a register tile takes no more activation rows than are left.
    unsafe {
        while S::TILE_BATCH >= 6 && x.batch - m >= 6 {
            multiply_tile::<S, 6>(tile, len, x, (m, place));
            m += 6;
        }
        while x.batch - m >= 2 {
            multiply_tile::<S, 2>(tile, len, x, (m, place));
            m += 2;
        }
        if x.batch > m {
            multiply_tile::<S, 1>(tile, len, x, (m, place));
        }
    }
}

/// The sums of `M` activation rows from `m` on.
#[inline(always)]
unsafe fn multiply_tile<S: Simd, const M: usize>(
    tile: Tile<f32>,
    len: usize,
    x: Activations,
    (m, place): (usize, &mut Place<'_>),
) {
    // SAFETY: as the caller says, all rows have `len` columns, and there are `M`
    // activation rows from `m` on.
    unsafe {
        let mut sums = [[S::zero(); TILE_ROWS]; M];
        let first = x.first.add(m * x.stride);
        let mut k = 0;
        while k < len {
            let w = [
                S::load(tile.at(0, k)),
                S::load(tile.at(1, k)),
                S::load(tile.at(2, k)),
                S::load(tile.at(3, k)),
            ];
            for j in 0..M {
                let x = S::load(first.add(j * x.stride + k));
                for i in 0..TILE_ROWS {
                    sums[j][i] = S::fma(w[i], x, sums[j][i]);
                }
            }
            k += S::LANES;
        }
        for j in 0..M {
            place.put(m + j, S::sums(sums[j]));
        }
    }
}

/// See [`super::weighted_sum`]: `M` rows of `out`, each plus the values weighted
/// by its own weights, value by value in order.
///
/// # Safety
/// The CPU has the instructions; every weight row has `count` weights, `values`
/// holds `count` rows as wide as those of `out`, a multiple of [`BLOCK`].
#[inline(always)]
pub(super) unsafe fn weighted_sum<S: Simd, const M: usize>(
    weights: [&[f32]; M],
    values: &[f32],
    out: &mut [f32],
) {
    const VECTORS: usize = 2;
    let width = out.len() / M;
    let count = values.len() / width;
    let mut from = 0;
    // SAFETY: `from` and the vectors behind it stay below `width`, because the
    // width is a multiple of BLOCK, which is one of LANES · VECTORS.
    unsafe {
        while from < width {
            let mut sums = [[S::zero(); VECTORS]; M];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(out.as_ptr().add(m * width + from + v * S::LANES));
                }
            }
            for t in 0..count {
                let row = values.as_ptr().add(t * width + from);
                let mut value = [S::zero(); VECTORS];
                for (v, value) in value.iter_mut().enumerate() {
                    *value = S::load(row.add(v * S::LANES));
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
                    S::store(out.as_mut_ptr().add(m * width + from + v * S::LANES), sum);
                }
            }
            from += VECTORS * S::LANES;
        }
    }
}
