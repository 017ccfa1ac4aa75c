//! Where the sums over the chunks of a row meet.

use crate::order;

/// Weight rows that are computed together.
pub(super) const TILE_ROWS: usize = 4;

/// Rows of a tile whose sums go to one place.
#[derive(Clone, Copy)]
pub(super) struct Target {
    /// First row, and number of rows whose sums count: all, or the first.
    pub(super) first: usize,
    pub(super) width: usize,
    /// A factor for each row.
    pub(super) scales: [f32; TILE_ROWS],
    /// Which chunk of the columns, from 0.
    pub(super) chunk: usize,
}

/// Takes the sums of a tile chunk by chunk and adds them in the order of
/// [`order`], without keeping them all.
pub(super) struct Sums<'a> {
    out: &'a mut [f32],
    stride: usize,
    batch: usize,
    /// Parts of a run at each level but the uppermost, whose sum is in `out`; the
    /// lowest first.
    parts: Vec<usize>,
    /// The unfinished run of each of these levels, for each activation row.
    runs: Vec<[f32; TILE_ROWS]>,
}

impl<'a> Sums<'a> {
    /// For `chunks` of `batch` activation rows, to `out`, where they are `stride`
    /// apart.
    pub(super) fn new(chunks: usize, batch: usize, (out, stride): (&'a mut [f32], usize)) -> Self {
        let mut parts = Vec::new();
        let mut run = chunks / order::runs(chunks);
        while run > 1 {
            let cut = order::runs(run);
            parts.push(cut);
            run /= cut;
        }
        parts.reverse();
        Self {
            out,
            stride,
            batch,
            runs: vec![[0.0; TILE_ROWS]; parts.len() * batch],
            parts,
        }
    }

    /// Takes the sums over a chunk for activation row `m`. Each tile's chunks come
    /// in order.
    #[inline(always)]
    pub(super) fn put(&mut self, target: &Target, m: usize, mut sums: [f32; TILE_ROWS]) {
        for row in 0..TILE_ROWS {
            sums[row] *= target.scales[row];
        }
        let mut part = target.chunk;
        for (level, parts) in self.parts.iter().enumerate() {
            let run = &mut self.runs[level * self.batch + m];
            let begins = part.is_multiple_of(*parts);
            for row in 0..TILE_ROWS {
                run[row] = if begins {
                    sums[row]
                } else {
                    run[row] + sums[row]
                };
            }
            if !(part + 1).is_multiple_of(*parts) {
                return;
            }
            sums = *run;
            part /= parts;
        }
        let at = m * self.stride + target.first;
        let out = &mut self.out[at..at + target.width];
        if let Some(out) = out.first_chunk_mut::<TILE_ROWS>() {
            for row in 0..TILE_ROWS {
                out[row] = if part > 0 {
                    out[row] + sums[row]
                } else {
                    sums[row]
                };
            }
        } else {
            out[0] = if part > 0 { out[0] + sums[0] } else { sums[0] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_added_in_the_order_of_all() {
        for chunks in 1..40 {
            let value = |chunk: usize, m: usize, row: usize| {
                ((chunk * 7919 + m * 331 + row) % 1013) as f32 * [1e-3, 1.0, 1e3][chunk % 3]
            };
            let scales = [3.0, 0.1, 1.0, 0.7];
            let mut out = [f32::NAN; 12];
            let mut sums = Sums::new(chunks, 2, (&mut out, 6));
            for (first, width) in [(0, 4), (4, 1)] {
                for chunk in 0..chunks {
                    let target = Target {
                        first,
                        width,
                        scales,
                        chunk,
                    };
                    for m in 0..2 {
                        sums.put(&target, m, [0, 1, 2, 3].map(|row| value(chunk, m, row)));
                    }
                }
            }
            for m in 0..2 {
                for (at, row) in [0, 1, 2, 3, 0].into_iter().enumerate() {
                    let mut all: Vec<f32> = (0..chunks)
                        .map(|chunk| scales[row] * value(chunk, m, row))
                        .collect();
                    order::sum_rows(&mut all, 1);
                    assert_eq!(
                        out[m * 6 + at].to_bits(),
                        all[0].to_bits(),
                        "{chunks} chunks"
                    );
                }
                assert!(out[m * 6 + 5].is_nan(), "behind the rows");
            }
        }
    }
}
