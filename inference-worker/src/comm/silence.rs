//! How long a peer has shown no sign of life.

use std::time::{Duration, Instant};

/// A gap between two looks counts as at most this much silence. A watcher that
/// was itself stopped (a frozen pod, a starved core) must not blame its peers
/// for the time it did not look.
const LONGEST_GAP: Duration = Duration::from_millis(500);

/// Watches one heartbeat counter.
#[derive(Clone, Copy, Debug, Default)]
pub struct SilenceWatch {
    last: Option<(u64, Instant)>,
    silent: Duration,
}

impl SilenceWatch {
    /// Notes that the counter was `beat` at `now`; returns how long it has
    /// stood still while we looked.
    pub fn observe(&mut self, beat: u64, now: Instant) -> Duration {
        self.silent = match self.last {
            Some((last, seen)) if last == beat => {
                self.silent + now.saturating_duration_since(seen).min(LONGEST_GAP)
            }
            _ => Duration::ZERO,
        };
        self.last = Some((beat, now));
        self.silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_adds_up_and_ends_with_a_beat() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watch = SilenceWatch::default();
        assert_eq!(watch.observe(7, at(0)), Duration::ZERO);
        assert_eq!(watch.observe(7, at(300)), Duration::from_millis(300));
        assert_eq!(watch.observe(7, at(600)), Duration::from_millis(600));
        assert_eq!(watch.observe(8, at(700)), Duration::ZERO);
        assert_eq!(watch.observe(8, at(800)), Duration::from_millis(100));
    }

    #[test]
    fn a_watcher_that_slept_blames_nobody() {
        let start = Instant::now();
        let mut watch = SilenceWatch::default();
        watch.observe(1, start);
        let silent = watch.observe(1, start + Duration::from_mins(1));
        assert_eq!(silent, LONGEST_GAP);
    }
}
