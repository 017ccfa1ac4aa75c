//! The one order in which partial sums are added, so that a sum does not depend
//! on how its parts are spread over ranks.
//!
//! `n` parts are cut into as many equal runs as the smallest prime factor of `n`
//! says; the sums of the runs, each taken in the same way, are added from left
//! to right. Eight parts are added as `((0+1)+(2+3))+((4+5)+(6+7))`, so one rank
//! that holds all eight, two ranks with four each, four with two and eight with
//! one reach the same bits, each adding its own parts first.

/// Runs that `parts` parts are cut into at the top: their smallest prime factor.
pub fn runs(parts: usize) -> usize {
    (2..=parts)
        .take_while(|factor| factor * factor <= parts)
        .find(|factor| parts.is_multiple_of(*factor))
        .unwrap_or(parts)
}

/// Whether `holders` that each add an equal run of `parts` parts, and then the
/// runs' sums, reach the same bits as one that adds all parts.
pub fn agrees(mut parts: usize, mut holders: usize) -> bool {
    if holders == 0 || !parts.is_multiple_of(holders) {
        return false;
    }
    while holders > 1 {
        let cut = runs(parts);
        if cut != runs(holders) {
            return false;
        }
        parts /= cut;
        holders /= cut;
    }
    true
}

/// Adds the rows of `parts`, each `len` long, into the first row. The other rows
/// are left in an unspecified state.
pub fn sum_rows(parts: &mut [f32], len: usize) {
    let count = parts.len().checked_div(len).unwrap_or(0);
    if count < 2 {
        return;
    }
    let run = count / runs(count) * len;
    for part in parts.chunks_exact_mut(run) {
        sum_rows(part, len);
    }
    let (sum, rest) = parts.split_at_mut(run);
    for part in rest.chunks_exact(run) {
        for (sum, value) in sum[..len].iter_mut().zip(part) {
            *sum += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers whose sum depends on the order of addition.
    fn noise(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| (i * 7919 % 1013) as f32 * [1e-3, 1.0, 1e3, 0.1][i % 4])
            .collect()
    }

    fn sum(parts: &[f32], len: usize) -> Vec<f32> {
        let mut parts = parts.to_vec();
        sum_rows(&mut parts, len);
        parts.truncate(len);
        parts
    }

    #[test]
    fn eight_parts_are_added_in_pairs() {
        let p = noise(8);
        let expected = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
        assert_eq!(sum(&p, 1), [expected]);
        let p = noise(9);
        let expected = (p[0] + p[1] + p[2]) + (p[3] + p[4] + p[5]) + (p[6] + p[7] + p[8]);
        assert_eq!(sum(&p, 1), [expected]);
    }

    #[test]
    fn holders_agree_where_their_number_cuts_like_the_parts() {
        for holders in [1, 2, 4, 8] {
            assert!(agrees(8, holders), "{holders}");
        }
        assert!(agrees(9, 3) && agrees(12, 4) && agrees(5, 5));
        for (parts, holders) in [(12, 3), (12, 6), (8, 3), (8, 16), (8, 0)] {
            assert!(!agrees(parts, holders), "{parts} over {holders}");
        }
    }

    proptest! {
        #[test]
        fn runs_summed_apart_give_the_same_bits(
            holders in 1_usize..17,
            each in 1_usize..9,
            len in 1_usize..5,
        ) {
            let parts = noise(holders * each * len);
            if agrees(holders * each, holders) {
                let sums: Vec<f32> =
                    parts.chunks_exact(each * len).flat_map(|run| sum(run, len)).collect();
                prop_assert_eq!(sum(&parts, len), sum(&sums, len));
            }
        }
    }
}
