//! Whole numbers out of calculated ones.

/// The smallest whole number of groups that is at least `value`; 0 for what
/// is negative or no number, the greatest for what is infinite.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast to a whole number saturates, as said above"
)]
pub(crate) fn ceil(value: f64) -> usize {
    // 3.0000000000000004 groups are three: a rounding error buys no group.
    (value - 1e-9).ceil().max(0.0) as usize
}

/// The greatest whole number that is at most `value`, with the same bounds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast to a whole number saturates"
)]
pub(crate) fn floor(value: f64) -> u64 {
    value.max(0.0) as u64
}

/// A number of tokens: rounded, at least one.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast to a whole number saturates"
)]
pub(crate) fn tokens(value: f64) -> u32 {
    value.round().max(1.0) as u32
}

/// A floor for positions in lists.
pub(crate) fn index(value: f64) -> usize {
    usize::try_from(floor(value)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_errors_buy_no_group() {
        assert_eq!(ceil(3.000_000_000_000_4), 3);
        assert_eq!(ceil(3.01), 4);
        assert_eq!(ceil(-2.0), 0);
        assert_eq!(ceil(f64::NAN), 0);
        assert_eq!(floor(2.9), 2);
        assert_eq!(tokens(0.2), 1);
    }
}
