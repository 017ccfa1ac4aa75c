//! How long one rank waits for another.

use std::time::{Duration, Instant};

/// One wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    started: Instant,
    deadline: Duration,
}

impl Patience {
    /// A wait that begins now.
    pub(super) fn new(deadline: Duration) -> Self {
        Self {
            started: Instant::now(),
            deadline,
        }
    }

    /// How long it has lasted, if that is too long. A peer that waits for somebody
    /// itself has twice the time, so that those who wait for the rank that holds
    /// all of them up name it first; but not for ever, since two may wait for each
    /// other.
    pub(super) fn spent(&self, peer_waits: bool) -> Option<Duration> {
        let limit = self.deadline * if peer_waits { 2 } else { 1 };
        let lasted = self.started.elapsed();
        (lasted >= limit).then_some(lasted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_waits_itself_has_twice_the_time() {
        let deadline = Duration::from_mins(1);
        let since = |seconds| Patience {
            started: Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .unwrap(),
            deadline,
        };
        assert_eq!(since(59).spent(false), None);
        assert!(since(61).spent(false).is_some());
        assert_eq!(since(61).spent(true), None);
        assert!(since(121).spent(true).is_some());
    }
}
