//! When the golden question is asked again: no clock, no I/O.

use std::time::{Duration, Instant};

/// What a look at the group shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    /// Requests that are not answered yet.
    pub(super) open: usize,
    /// Requests that were handed to the ranks so far.
    pub(super) submitted: u64,
    /// Answers that the ranks could not compute so far.
    pub(super) failed: u64,
    /// The longest time for which a rank shows no sign of life.
    pub(super) silence: Duration,
}

/// Watches for the moment: nothing is under way, and nothing has been for the interval, or
/// something went wrong that the group survived.
#[derive(Debug)]
pub(super) struct IdleWatch {
    /// `None` for never.
    interval: Option<Duration>,
    /// A silence from which on something is wrong.
    long_silence: Duration,
    /// Since when nothing was asked.
    since: Instant,
    submitted: u64,
    failed: u64,
    is_troubled: bool,
}

impl IdleWatch {
    /// A watch that begins now.
    pub(super) fn new(interval: Option<Duration>, long_silence: Duration, now: Instant) -> Self {
        Self {
            interval,
            long_silence,
            since: now,
            submitted: 0,
            failed: 0,
            is_troubled: false,
        }
    }

    /// Takes a look; returns whether the question is to be asked now.
    pub(super) fn is_due(&mut self, sight: Sight, now: Instant) -> bool {
        let Some(interval) = self.interval else {
            return false;
        };
        let is_silent = sight.silence >= self.long_silence;
        self.is_troubled |= is_silent || sight.failed > self.failed;
        self.failed = sight.failed;
        if sight.open > 0 || sight.submitted > self.submitted {
            self.submitted = sight.submitted;
            self.since = now;
        }
        let has_rested = now.duration_since(self.since) >= interval;
        sight.open == 0 && !is_silent && (has_rested || self.is_troubled)
    }

    /// The question is asked, as the request number `submitted`: the time begins anew.
    pub(super) fn note_asked(&mut self, submitted: u64, now: Instant) {
        self.submitted = submitted;
        self.since = now;
        self.is_troubled = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_mins(10);
    const SILENCE: Duration = Duration::from_secs(1);

    const QUIET: Sight = Sight {
        open: 0,
        submitted: 1,
        failed: 0,
        silence: Duration::ZERO,
    };

    fn watch(interval: Option<Duration>) -> (IdleWatch, impl Fn(u64) -> Instant) {
        let start = Instant::now();
        let at = move |seconds| start + Duration::from_secs(seconds);
        let mut watch = IdleWatch::new(interval, SILENCE, start);
        watch.note_asked(1, start);
        (watch, at)
    }

    #[test]
    fn the_question_is_asked_after_each_interval_of_rest() {
        let (mut watch, at) = watch(Some(INTERVAL));
        assert!(!watch.is_due(QUIET, at(599)));
        assert!(watch.is_due(QUIET, at(600)));
        watch.note_asked(2, at(600));
        let asked = Sight {
            submitted: 2,
            ..QUIET
        };
        assert!(!watch.is_due(asked, at(1199)));
        assert!(watch.is_due(asked, at(1200)));
    }

    #[test]
    fn whoever_asks_anything_puts_it_off() {
        let (mut watch, at) = watch(Some(INTERVAL));
        let busy = Sight {
            open: 1,
            submitted: 2,
            ..QUIET
        };
        assert!(!watch.is_due(busy, at(590)));
        assert!(!watch.is_due(busy, at(5000)), "not beside an answer");
        let after = Sight { open: 0, ..busy };
        assert!(!watch.is_due(after, at(5001)));
        // One that came and went between two looks.
        let more = Sight {
            submitted: 3,
            ..after
        };
        assert!(!watch.is_due(more, at(5590)));
        assert!(!watch.is_due(more, at(6189)));
        assert!(watch.is_due(more, at(6190)));
    }

    #[test]
    fn trouble_brings_it_forward_to_the_next_rest() {
        let (mut watch, at) = watch(Some(INTERVAL));
        let failed = Sight {
            open: 1,
            submitted: 2,
            failed: 1,
            ..QUIET
        };
        assert!(!watch.is_due(failed, at(1)));
        let after = Sight { open: 0, ..failed };
        assert!(watch.is_due(after, at(2)));
        watch.note_asked(3, at(2));
        let after = Sight {
            submitted: 3,
            ..after
        };
        assert!(!watch.is_due(after, at(3)), "once is enough");
        let silent = Sight {
            silence: SILENCE,
            ..after
        };
        assert!(!watch.is_due(silent, at(4)), "it would not be answered");
        assert!(watch.is_due(after, at(5)));
    }

    #[test]
    fn without_an_interval_it_is_never_asked() {
        let (mut watch, at) = watch(None);
        let troubled = Sight { failed: 1, ..QUIET };
        assert!(!watch.is_due(troubled, at(100_000)));
    }
}
