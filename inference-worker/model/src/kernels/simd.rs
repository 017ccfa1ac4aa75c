//! The kernels over any vector type. Everything here is inlined into a function
//! that is built for the instructions of its [`Simd`].

#![allow(
    unsafe_code,
    reason = "vector loads through pointers, for instructions chosen at run time"
)]

use std::ops::Range;

use half::f16;

use super::int8::Int8Rows;
use super::sums::{Sums, TILE_ROWS, Target};
use super::{BLOCK, LANES, Rows};

/// Vectors of [`LANES`] f32 in the instructions of one CPU generation.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Activation rows whose sums against [`TILE_ROWS`] weight rows fit the
    /// registers.
    const TILE_BATCH: usize;

    /// # Safety
    /// The CPU has the instructions (as for every function here).
    unsafe fn zero() -> Self::V;
    /// # Safety
    /// `from` points to [`LANES`] values.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// `from` points to [`LANES`] values.
    unsafe fn load_halves(from: *const f16) -> Self::V;
    /// # Safety
    /// `from` points to [`LANES`] bytes.
    unsafe fn load_bytes(from: *const i8) -> Self::V;
    /// # Safety
    /// `to` has room for [`LANES`] values.
    unsafe fn store(to: *mut f32, value: Self::V);
    /// Asks for the cache line at `at`, which may lie anywhere. Tiles are short, so
    /// the CPU does not foresee the next one by itself.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn prefetch(at: *const u8);
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn splat(value: f32) -> Self::V;
    /// `a · b + c`, rounded once.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sums of four vectors: of each quarter (v0 + v2) + (v1 + v3), and of
    /// the quarters (q0 + q2) + (q1 + q3).
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn sums(vectors: [Self::V; TILE_ROWS]) -> [f32; TILE_ROWS];
}

/// A type of single values that load as a vector of `S`.
pub(super) trait Load<S: Simd>: Copy {
    /// # Safety
    /// The CPU has the instructions, and `from` points to [`LANES`] values.
    unsafe fn load(from: *const Self) -> S::V;
}

impl<S: Simd> Load<S> for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
}

impl<S: Simd> Load<S> for f16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_halves(from) }
    }
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

/// A quantised type in the instructions of `S`, against int8 activations. A step
/// takes two blocks: lane l gets the products of values 4l to 4l + 3.
pub(super) trait Dot<S: Simd> {
    /// Bytes of [`BLOCK`] values.
    const BLOCK_BYTES: usize;
    /// Activation rows whose sums against [`TILE_ROWS`] weight rows fit the
    /// registers.
    const TILE_BATCH: usize;
    /// Weights of a step, widened.
    type Weights: Copy;
    /// Activations of a step.
    type Values: Copy;
    /// Whether weights that meet several activation rows are widened first, once.
    const WIDENS: bool = false;
    /// The type that they become.
    type Wide: Dot<S>;

    /// Writes a block in the wide type.
    /// # Safety
    /// The CPU has the instructions, `block` points to a block, and `out` has room
    /// for a wide one.
    unsafe fn widen(_block: *const u8, _out: *mut u8) {}

    /// The weights of a block and, where there are `BOTH`, of the next.
    /// # Safety
    /// The CPU has the instructions, and `at` points to these blocks.
    unsafe fn weights<const BOTH: bool>(at: *const u8) -> Self::Weights;
    /// The activations of a step.
    /// # Safety
    /// The CPU has the instructions, and the pointers lead to the values, scales
    /// and sums of a step's blocks.
    unsafe fn values(values: *const i8, scales: *const f32, sums: *const f32) -> Self::Values;
    /// `sum` plus the products of a step.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn step(weights: Self::Weights, values: Self::Values, sum: S::V) -> S::V;
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
struct Floats {
    first: *const f32,
    stride: usize,
    batch: usize,
}

/// Four weight rows, or one that makes no tile, over one chunk of columns.
#[derive(Clone, Copy)]
struct Chunk {
    tile: Tile<u8>,
    /// First column, and number of columns.
    start: usize,
    len: usize,
    target: Target,
}

/// Every chunk of every tile, tile by tile.
struct Chunks<'a> {
    rows: &'a Rows<'a>,
    count: usize,
    first: usize,
    start: usize,
    chunk: usize,
}

impl<'a> Chunks<'a> {
    #[inline(always)]
    fn of(rows: &'a Rows<'a>) -> Self {
        Self {
            rows,
            count: rows.count(),
            first: 0,
            start: 0,
            chunk: 0,
        }
    }

    /// The next one. Not an iterator, whose adaptors would not be inlined.
    #[inline(always)]
    fn take_next(&mut self) -> Option<Chunk> {
        if self.first >= self.count {
            return None;
        }
        let rows = self.rows;
        let whole = self.first + TILE_ROWS <= self.count;
        let width = if whole { TILE_ROWS } else { 1 };
        let (first, start, chunk) = (self.first, self.start, self.chunk);
        let end = rows.ends[chunk];
        let block_bytes = rows.format.block_bytes();
        let row_bytes = rows.columns / BLOCK * block_bytes;
        let at = first * row_bytes + start / BLOCK * block_bytes;
        let scales = match rows.scales {
            None => [1.0; TILE_ROWS],
            Some(scales) if whole => [0, 1, 2, 3].map(|row| scales[first + row]),
            Some(scales) => [scales[first]; TILE_ROWS],
        };
        self.start = end;
        self.chunk += 1;
        if self.chunk == rows.ends.len() {
            self.start = 0;
            self.chunk = 0;
            self.first += width;
        }
        Some(Chunk {
            tile: Tile {
                // SAFETY: the row is below `count`, and the column in the row.
                first: unsafe { rows.bytes.as_ptr().add(at) },
                stride: if whole { row_bytes } else { 0 },
            },
            start,
            len: end - start,
            target: Target {
                first,
                width,
                scales,
                chunk,
            },
        })
    }
}

/// See [`super::matmul`], for weights that are widened to f32.
///
/// # Safety
/// The CPU has the instructions, and the sizes passed `Rows::check`.
#[inline(always)]
pub(super) unsafe fn matmul<S: Simd, U: Unpack<S>>(
    rows: &Rows<'_>,
    x: &[f32],
    out: &mut [f32],
    stride: usize,
) {
    let batch = x.len() / rows.columns;
    let mut panel = if batch > 1 && !U::IS_F32 {
        vec![0.0_f32; TILE_ROWS * longest(rows.ends)]
    } else {
        Vec::new()
    };
    let mut sums = Sums::new(rows.ends.len(), batch, (out, stride));
    let mut chunks = Chunks::of(rows);
    while let Some(chunk) = chunks.take_next() {
        // SAFETY: each row of the tile and of `x` has `len` columns from `start`
        // on; the panel has room for a chunk of each row.
        unsafe {
            let x = Floats {
                first: x.as_ptr().add(chunk.start),
                stride: rows.columns,
                batch,
            };
            if batch == 1 {
                let products = fused::<S, U>(chunk.tile, x.first, chunk.len);
                sums.put(&chunk.target, 0, products);
            } else {
                let tile = widened::<S, U>(chunk.tile, chunk.len, &mut panel);
                over_batch::<S>(tile, x, &chunk, &mut sums);
            }
        }
    }
}

/// Columns of the longest chunk.
fn longest(ends: &[usize]) -> usize {
    let starts = [0].iter().chain(ends);
    let lens = ends.iter().zip(starts).map(|(end, start)| end - start);
    lens.max().unwrap_or_default()
}

/// See [`super::matmul`], for quantised weights.
///
/// # Safety
/// The CPU has the instructions, and the sizes passed `Rows::check`.
#[inline(always)]
pub(super) unsafe fn matmul_int8<S: Simd, D: Dot<S>>(
    rows: &Rows<'_>,
    (x, range): (&Int8Rows, Range<usize>),
    out: &mut [f32],
    stride: usize,
) {
    let widens = D::WIDENS && range.len() > 1;
    let mut panel = if widens {
        vec![0; TILE_ROWS * longest(rows.ends) / BLOCK * D::Wide::BLOCK_BYTES]
    } else {
        Vec::new()
    };
    let mut sums = Sums::new(rows.ends.len(), range.len(), (out, stride));
    let mut chunks = Chunks::of(rows);
    while let Some(mut chunk) = chunks.take_next() {
        // SAFETY: each row of the tile and of `x` has `len` columns from `start`
        // on; the panel has room for a chunk of each row.
        unsafe {
            if widens {
                chunk.tile = wide::<S, D>(&chunk, &mut panel);
                int8_over_batch::<S, D::Wide>(&chunk, (x, range.clone()), &mut sums);
            } else {
                int8_over_batch::<S, D>(&chunk, (x, range.clone()), &mut sums);
            }
        }
    }
}

/// The tile's rows in the wide type, in `panel`.
#[inline(always)]
unsafe fn wide<S: Simd, D: Dot<S>>(chunk: &Chunk, panel: &mut [u8]) -> Tile<u8> {
    let blocks = chunk.len / BLOCK;
    let stride = blocks * D::Wide::BLOCK_BYTES;
    for row in 0..TILE_ROWS {
        for block in 0..blocks {
            // SAFETY: the panel holds `TILE_ROWS` chunks of at least `len`.
            unsafe {
                let from = chunk.tile.at(row, block * D::BLOCK_BYTES);
                S::prefetch(from.wrapping_add(TILE_ROWS * chunk.tile.stride));
                let to = row * stride + block * D::Wide::BLOCK_BYTES;
                D::widen(from, panel.as_mut_ptr().add(to));
            }
        }
    }
    Tile {
        first: panel.as_ptr(),
        stride,
    }
}

/// Activation rows against quantised weights, a register tile at a time.
#[inline(always)]
unsafe fn int8_over_batch<S: Simd, D: Dot<S>>(
    chunk: &Chunk,
    (x, range): (&Int8Rows, Range<usize>),
    out: &mut Sums<'_>,
) {
    let mut m = range.start;
    // SAFETY: a register tile takes no more activation rows than are left.
    unsafe {
        while D::TILE_BATCH >= 4 && range.end - m >= 4 {
            let sums = int8_tile::<S, D, 4>(chunk, x, m);
            for j in 0..4 {
                out.put(&chunk.target, m + j - range.start, sums[j]);
            }
            m += 4;
        }
        while m < range.end {
            let sums = int8_tile::<S, D, 1>(chunk, x, m);
            out.put(&chunk.target, m - range.start, sums[0]);
            m += 1;
        }
    }
}

/// The sums of `M` activation rows from `m` on over a chunk.
#[inline(always)]
unsafe fn int8_tile<S: Simd, D: Dot<S>, const M: usize>(
    chunk: &Chunk,
    x: &Int8Rows,
    m: usize,
) -> [[f32; TILE_ROWS]; M] {
    let blocks = chunk.len / BLOCK;
    let mut out = [[0.0; TILE_ROWS]; M];
    // SAFETY: as the caller says, all rows have these blocks, and there are `M`
    // activation rows from `m` on; behind their last block lies padding.
    unsafe {
        let mut sums = [[S::zero(); TILE_ROWS]; M];
        let mut block = 0;
        while block + 2 <= blocks {
            int8_step::<S, D, M, true>(chunk, x, (m, block), &mut sums);
            block += 2;
        }
        if block < blocks {
            int8_step::<S, D, M, false>(chunk, x, (m, block), &mut sums);
        }
        for j in 0..M {
            out[j] = S::sums(sums[j]);
        }
    }
    out
}

/// Adds the products of two blocks, or of the last one.
#[inline(always)]
unsafe fn int8_step<S: Simd, D: Dot<S>, const M: usize, const BOTH: bool>(
    chunk: &Chunk,
    x: &Int8Rows,
    (m, block): (usize, usize),
    sums: &mut [[S::V; TILE_ROWS]; M],
) {
    let tile = chunk.tile;
    let at = block * D::BLOCK_BYTES;
    // SAFETY: the caller's promise.
    unsafe {
        for row in 0..TILE_ROWS {
            S::prefetch(tile.at(row, at).wrapping_add(TILE_ROWS * tile.stride));
        }
        let first = m * x.blocks + chunk.start / BLOCK + block;
        if M == 1 {
            // Weights one by one, so that few registers suffice.
            let values = values_at::<S, D>(x, first);
            for i in 0..TILE_ROWS {
                let weights = D::weights::<BOTH>(tile.at(i, at));
                sums[0][i] = D::step(weights, values, sums[0][i]);
            }
            return;
        }
        let weights = [
            D::weights::<BOTH>(tile.at(0, at)),
            D::weights::<BOTH>(tile.at(1, at)),
            D::weights::<BOTH>(tile.at(2, at)),
            D::weights::<BOTH>(tile.at(3, at)),
        ];
        for j in 0..M {
            let values = values_at::<S, D>(x, first + j * x.blocks);
            for i in 0..TILE_ROWS {
                sums[j][i] = D::step(weights[i], values, sums[j][i]);
            }
        }
    }
}

/// The activations of the blocks from `block` on.
#[inline(always)]
unsafe fn values_at<S: Simd, D: Dot<S>>(x: &Int8Rows, block: usize) -> D::Values {
    // SAFETY: the caller's promise: there is such a block, and one behind it.
    unsafe {
        D::values(
            x.values.as_ptr().add(block * BLOCK),
            x.scales.as_ptr().add(block),
            x.sums.as_ptr().add(block),
        )
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
            for row in 0..TILE_ROWS {
                S::prefetch(tile.at(row, at).wrapping_add(TILE_ROWS * tile.stride));
            }
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
        return Tile {
            first: tile.first.cast(),
            stride: tile.stride / size_of::<f32>(),
        };
    }
    let panel = panel.as_mut_ptr();
    for row in 0..TILE_ROWS {
        for block in 0..len / BLOCK {
            // SAFETY: the panel holds `TILE_ROWS` chunks of at least `len`.
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
unsafe fn over_batch<S: Simd>(tile: Tile<f32>, x: Floats, chunk: &Chunk, out: &mut Sums<'_>) {
    let mut m = 0;
    // SAFETY: a register tile takes no more activation rows than are left.
    unsafe {
        while S::TILE_BATCH >= 6 && x.batch - m >= 6 {
            let sums = float_tile::<S, 6>(tile, chunk.len, x, m);
            for j in 0..6 {
                out.put(&chunk.target, m + j, sums[j]);
            }
            m += 6;
        }
        while m < x.batch {
            let sums = float_tile::<S, 1>(tile, chunk.len, x, m);
            out.put(&chunk.target, m, sums[0]);
            m += 1;
        }
    }
}

/// The sums of `M` activation rows from `m` on.
#[inline(always)]
unsafe fn float_tile<S: Simd, const M: usize>(
    tile: Tile<f32>,
    len: usize,
    x: Floats,
    m: usize,
) -> [[f32; TILE_ROWS]; M] {
    let mut out = [[0.0; TILE_ROWS]; M];
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
            k += LANES;
        }
        for j in 0..M {
            out[j] = S::sums(sums[j]);
        }
    }
    out
}
