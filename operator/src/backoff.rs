//! Pauses of objects whose rounds fail, each by itself.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::reconcile::plan::fnv1a;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_mins(5);

/// How many rounds in a row have failed, by object.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: Mutex<HashMap<String, u32>>,
}

impl Backoff {
    /// Notes a failure and gives the pause before the next try.
    pub fn failed(&self, key: &str) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key.to_owned()).or_default();
        *count = count.saturating_add(1);
        pause(key, *count)
    }

    /// Notes a success.
    pub fn succeeded(&self, key: &str) {
        self.forget(key);
    }

    /// Drops the object.
    pub fn forget(&self, key: &str) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.remove(key);
    }

    /// Objects whose last round failed.
    pub fn len(&self) -> usize {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.len()
    }

    /// Whether every object's last round went well.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `first` after one failure, twice as long after each further one, at most `longest`.
pub(crate) fn doubled(first: Duration, longest: Duration, failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    first.saturating_mul(2_u32.pow(doublings)).min(longest)
}

/// Doubling from half a second to five minutes, moved by up to a fifth in either
/// direction. The move comes from the object's name, so that objects that fail together
/// do not come back together, and the same input gives the same pause.
fn pause(key: &str, failures: u32) -> Duration {
    let pause = doubled(FIRST, LONGEST, failures);
    let draw = u32::try_from(fnv1a(format!("{key}#{failures}").as_bytes()) % 401).unwrap_or(200);
    pause * (800 + draw) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pauses_stay_within_bounds(key in "[a-z]{1,10}", failures in 1_u32..1000) {
            let pause = pause(&key, failures);
            prop_assert!(pause >= FIRST * 4 / 5);
            prop_assert!(pause <= LONGEST * 6 / 5);
        }
    }

    #[test]
    fn a_success_starts_over() {
        let backoff = Backoff::default();
        let first = backoff.failed("a/b");
        assert!(backoff.failed("a/b") > first);
        assert_eq!(backoff.len(), 1);
        backoff.succeeded("a/b");
        assert!(backoff.is_empty());
        assert_eq!(backoff.failed("a/b"), first);
    }
}
