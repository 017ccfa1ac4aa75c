//! Sums of ranks' parts, in the order that all backends share.

use std::ops::Range;

use llama_model::order;

/// Values of each part that are summed at a time: few enough for eight parts to
/// stay in the first-level cache.
const BLOCK: usize = 512;

/// Sums parts that lie in different places.
#[derive(Debug, Default)]
pub(super) struct Summer {
    rows: Vec<f32>,
}

impl Summer {
    /// Replaces `out`, which holds part `own`, by the sum of `count` parts in the
    /// order of [`order`]. `copy` copies values of another part.
    pub(super) fn sum(
        &mut self,
        out: &mut [f32],
        (own, count): (usize, usize),
        copy: impl Fn(usize, Range<usize>, &mut [f32]),
    ) {
        let mut start = 0;
        for out in out.chunks_mut(BLOCK) {
            let len = out.len();
            self.rows.resize(count * len, 0.0);
            for (part, row) in self.rows.chunks_exact_mut(len).enumerate() {
                if part == own {
                    row.copy_from_slice(out);
                } else {
                    copy(part, start..start + len, row);
                }
            }
            order::sum_rows(&mut self.rows, len);
            out.copy_from_slice(&self.rows[..len]);
            start += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::fixtures::{sum_in_order, values};

    #[test]
    fn blocks_are_summed_like_the_whole() {
        for count in 1..=9 {
            for len in [0, 1, BLOCK, 2 * BLOCK + 7] {
                let own = count / 2;
                let mut out = values(own, len);
                let copy = |part: usize, range: Range<usize>, row: &mut [f32]| {
                    row.copy_from_slice(&values(part, len)[range]);
                };
                Summer::default().sum(&mut out, (own, count), copy);
                assert_eq!(out, sum_in_order(0..count, len), "{count} parts of {len}");
            }
        }
    }
}
