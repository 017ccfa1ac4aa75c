//! How answers did within a time that slides along, in few numbers.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use llama_contract::{AnswersReport, LONGEST_WINDOW};

/// Answers that end within one such span are counted together.
const SPAN: Duration = Duration::from_secs(15);

/// The answers that ended lately.
#[derive(Debug)]
pub(super) struct Lately {
    since: Instant,
    spans: Mutex<Spans>,
}

impl Default for Lately {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            spans: Mutex::default(),
        }
    }
}

impl Lately {
    /// An answer ended: `count` counts it.
    pub(super) fn note(&self, count: impl FnOnce(&mut AnswersReport)) {
        let at = self.since.elapsed();
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        count(spans.at(at));
    }

    /// Those that ended `within` this time, to the next whole span.
    pub(super) fn within(&self, time: Duration) -> AnswersReport {
        let now = self.since.elapsed();
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans.within(now, time)
    }
}

/// Spans in which answers ended, by their number, the latest last.
#[derive(Debug, Default)]
struct Spans(VecDeque<(u64, AnswersReport)>);

impl Spans {
    /// The span at time `at`. Those that nobody can ask about any more are forgotten.
    fn at(&mut self, at: Duration) -> &mut AnswersReport {
        let number = number(at);
        let oldest = (number + 1).saturating_sub(spans_of(LONGEST_WINDOW));
        while self.0.front().is_some_and(|(first, _)| *first < oldest) {
            self.0.pop_front();
        }
        // Who was held up between the clock and the lock counts in the span that is open.
        if self.0.back().is_none_or(|(last, _)| *last < number) {
            self.0.push_back((number, AnswersReport::default()));
        }
        let last = self.0.len().saturating_sub(1);
        &mut self.0[last].1
    }

    fn within(&self, now: Duration, time: Duration) -> AnswersReport {
        let oldest = (number(now) + 1).saturating_sub(spans_of(time));
        let recent = self.0.iter().rev().take_while(|(at, _)| *at >= oldest);
        recent.fold(AnswersReport::default(), |sum, (_, span)| sum.with(span))
    }
}

fn number(at: Duration) -> u64 {
    at.as_secs() / SPAN.as_secs()
}

fn spans_of(time: Duration) -> u64 {
    time.as_secs().div_ceil(SPAN.as_secs()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_count_as_long_as_they_are_within_the_time() {
        let mut spans = Spans::default();
        let at = Duration::from_secs;
        for second in [0, 1, 20, 100] {
            spans.at(at(second)).finished += 1;
        }
        spans.at(at(100)).failed += 1;
        let told = |now, time| {
            let answers = spans.within(at(now), at(time));
            (answers.finished, answers.failed)
        };
        assert_eq!(told(100, 10), (1, 1));
        assert_eq!(told(100, 90), (2, 1), "whole spans");
        assert_eq!(told(100, 3600), (4, 1));
        assert_eq!(told(130, 15), (0, 0));
        assert_eq!(told(3600, 3600), (2, 1));
        assert_eq!(told(3700, 3600), (0, 0));
    }

    #[test]
    fn no_more_is_remembered_than_can_be_asked_for() {
        let mut spans = Spans::default();
        for second in 0..20_000 {
            spans.at(Duration::from_secs(second)).finished += 1;
        }
        let most = usize::try_from(spans_of(LONGEST_WINDOW)).expect("few");
        assert_eq!(spans.0.len(), most);
        let told = spans.within(Duration::from_secs(19_999), LONGEST_WINDOW);
        assert_eq!(told.finished, 3590);
    }
}
