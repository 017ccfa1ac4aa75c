//! Unnormalized probabilities of a row, and draws by them.

use super::row::{BLOCK, LANES, Row, id};

/// Sizes of the head that is sorted in search of the nucleus, before the whole row is
/// searched for its end.
const HEADS: [usize; 2] = [64, 1024];
/// Logits this far below the greatest have no weight: all of a vocabulary together
/// would not be drawn in the age of the universe.
const NEGLIGIBLE: f32 = -87.0;

/// Weights of logits: 1 for the most likely token, `e` to the scaled distance for
/// the others, nothing below `floor`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    most: f32,
    scale: f32,
    floor: f32,
}

impl Weights {
    /// Weights in a row whose greatest logit is `most`.
    pub(super) fn new(most: f32, temperature: f32, floor: f32) -> Self {
        Self {
            most,
            scale: 1.0 / temperature,
            floor,
        }
    }

    /// How far `logit` is below the greatest. Two infinite logits have no
    /// difference; they are equally likely.
    fn below(self, logit: f32) -> f32 {
        if logit < self.most {
            (logit - self.most) * self.scale
        } else {
            0.0
        }
    }

    pub(super) fn of(self, logit: f32) -> f32 {
        let weight = exp(self.below(logit));
        if weight >= self.floor { weight } else { 0.0 }
    }

    fn sum(self, block: &[f32]) -> f64 {
        let mut sums = [0.0_f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for lanes in whole {
            for (sum, logit) in sums.iter_mut().zip(lanes) {
                *sum += self.of(*logit);
            }
        }
        for (sum, logit) in sums.iter_mut().zip(rest) {
            *sum += self.of(*logit);
        }
        sums.into_iter().map(f64::from).sum()
    }

    /// The weight of all of `logits`.
    pub(super) fn total(self, logits: &[f32]) -> f64 {
        logits.chunks(BLOCK).map(|block| self.sum(block)).sum()
    }

    /// The logarithm of the probability of `logit`, where all weigh `total`.
    pub(super) fn ln_probability(self, logit: f32, total: f64) -> f64 {
        f64::from(self.below(logit)) - total.ln()
    }

    /// Draws among all tokens of `row`.
    pub(super) fn draw(self, row: &Row<'_>, uniform: f64) -> Option<u32> {
        let sums: Vec<f64> = row
            .logits
            .chunks(BLOCK)
            .map(|block| self.sum(block))
            .collect();
        let mut left = uniform * sums.iter().sum::<f64>();
        let mut last = 0;
        for (index, sum) in sums.into_iter().enumerate() {
            if sum > 0.0 {
                last = index;
                if left < sum {
                    break;
                }
                left -= sum;
            }
        }
        let start = last * BLOCK;
        let block = &row.logits[start..row.logits.len().min(start + BLOCK)];
        let weighed = block.iter().enumerate();
        let weighed = weighed.map(|(at, logit)| (id(start + at), f64::from(self.of(*logit))));
        pick(weighed, left)
    }

    /// Draws among the `top_k` likeliest tokens of `row`, and of those among the
    /// likeliest that reach `top_p` of their weight.
    pub(super) fn draw_from_head(
        self,
        row: &Row<'_>,
        top_k: usize,
        top_p: f32,
        uniform: f64,
    ) -> Option<u32> {
        let share = f64::from(top_p.clamp(0.0, 1.0));
        if top_k < row.logits.len() {
            let head = self.weigh(row, top_k);
            let total: f64 = head.iter().map(|(_, weight)| weight).sum();
            let (count, reached) = nucleus(&head, total * share).unwrap_or((head.len(), total));
            return pick(head[..count].iter().copied(), uniform * reached);
        }
        let wanted = self.total(row.logits) * share;
        for count in HEADS {
            let head = self.weigh(row, count);
            if let Some((count, reached)) = nucleus(&head, wanted) {
                return pick(head[..count].iter().copied(), uniform * reached);
            }
        }
        let mut all = self.weigh_all(row);
        let (count, reached) = wide_nucleus(&mut all, wanted);
        pick(all[..count].iter().copied(), uniform * reached)
    }

    /// The `count` likeliest tokens with their weights.
    fn weigh(self, row: &Row<'_>, count: usize) -> Vec<(u32, f64)> {
        let head = row.head(count).into_iter();
        head.map(|(id, logit)| (id, f64::from(self.of(logit))))
            .collect()
    }

    fn weigh_all(self, row: &Row<'_>) -> Vec<(u32, f64)> {
        let numbered = row.logits.iter().enumerate();
        numbered
            .map(|(at, logit)| (id(at), f64::from(self.of(*logit))))
            .collect()
    }
}

/// How many of the likeliest tokens reach the weight `wanted`, and their weight.
fn nucleus(head: &[(u32, f64)], wanted: f64) -> Option<(usize, f64)> {
    let mut reached = 0.0;
    for (index, (_, weight)) in head.iter().enumerate() {
        reached += weight;
        if reached >= wanted {
            return Some((index + 1, reached));
        }
    }
    None
}

/// As [`nucleus`] for tokens in any order: brings those of the nucleus to the front,
/// halving the part where it must end instead of sorting.
fn wide_nucleus(tokens: &mut [(u32, f64)], wanted: f64) -> (usize, f64) {
    let (mut inside, mut reached) = (0, 0.0);
    let mut outside = tokens.len();
    while inside < outside {
        let open = &mut tokens[inside..outside];
        let half = open.len().div_ceil(2);
        open.select_nth_unstable_by(half - 1, |a, b| {
            b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0))
        });
        let weight: f64 = open[..half].iter().map(|(_, weight)| weight).sum();
        if reached + weight < wanted {
            inside += half;
            reached += weight;
        } else if half == 1 {
            return (inside + 1, reached + weight);
        } else {
            outside = inside + half;
        }
    }
    // Rounding can keep the whole row below what was wanted.
    (inside, reached)
}

/// The token that `left` falls on when the weights are laid end to end.
fn pick(weighed: impl Iterator<Item = (u32, f64)>, mut left: f64) -> Option<u32> {
    let mut last = None;
    for (id, weight) in weighed {
        if weight > 0.0 {
            // Rounding can leave a trace over: the last possible token has it.
            last = Some(id);
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

/// `e` to the power of `x`, which is not above 0, within two units in the last
/// place: the power of two beside it, times a polynomial of the rest. Without
/// branches, so that compilers make vector code of it.
fn exp(x: f32) -> f32 {
    /// Adding it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// The logarithm of 2 in two parts; products with the first are exact.
    const LN_2: (f32, f32) = (355.0 / 512.0, -2.121_944_4e-4);
    const EXPONENT_OF_ONE: u32 = 127 << 23;
    let bounded = if x > NEGLIGIBLE { x } else { NEGLIGIBLE };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let twos = shifted - ROUND;
    let rest = (bounded - twos * LN_2.0) - twos * LN_2.1;
    let mut series = 1.0 / 5040.0;
    for factor in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        series = series * rest + factor;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(EXPONENT_OF_ONE));
    if x > NEGLIGIBLE { series * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_distance_weighs_one_and_infinite_distance_nothing() {
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
    }

    proptest! {
        #[test]
        fn a_wide_nucleus_is_the_beginning_of_the_sorted_row(
            weights in proptest::collection::vec(0_u8..9, 1..300),
            share in 0.0_f64..=1.0,
        ) {
            let mut tokens: Vec<(u32, f64)> = (0..).zip(weights.into_iter().map(f64::from)).collect();
            let mut sorted = tokens.clone();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let wanted = share * sorted.iter().map(|(_, weight)| weight).sum::<f64>();
            let (count, reached) = nucleus(&sorted, wanted).expect("whole numbers have exact sums");
            prop_assert_eq!(wide_nucleus(&mut tokens, wanted), (count, reached));
            tokens.truncate(count);
            tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            prop_assert_eq!(tokens.as_slice(), &sorted[..count]);
        }

        #[test]
        fn exp_is_exact_to_the_last_places(x in -86.9_f32..0.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) - exact).abs() <= exact * 2.4e-7, "{x}");
        }
    }
}
