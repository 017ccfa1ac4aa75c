//! The arithmetic of Knative's pod autoscaler.

use std::collections::VecDeque;

use super::{Decision, Observation, Phase, Policy, ceil_ratio, hpa};
use crate::count;

/// Concurrency over a stable minute and a panic window of six seconds.
#[derive(Clone, Debug)]
pub struct Kpa {
    target: f64,
    scale_down_delay_seconds: f64,
    samples: VecDeque<(f64, f64)>,
    panic_since: Option<f64>,
    panic_groups: usize,
    wanted: VecDeque<(f64, usize)>,
    first: bool,
}

impl Kpa {
    const TICK_SECONDS: f64 = 2.0;
    const STABLE_SECONDS: f64 = 60.0;
    const PANIC_SECONDS: f64 = 6.0;
    const PANIC_THRESHOLD: f64 = 2.0;
    const MAX_UP_RATE: f64 = 1000.0;
    const MAX_DOWN_RATE: f64 = 2.0;

    /// So many requests a group.
    pub fn new(target: f64, scale_down_delay_seconds: f64) -> Self {
        Self {
            target,
            scale_down_delay_seconds,
            samples: VecDeque::new(),
            panic_since: None,
            panic_groups: 0,
            wanted: VecDeque::new(),
            first: true,
        }
    }

    fn mean(&self, since: f64) -> f64 {
        let (mut sum, mut count) = (0.0, 0.0);
        for (_, value) in self.samples.iter().rev().take_while(|(at, _)| *at > since) {
            sum += value;
            count += 1.0;
        }
        if count > 0.0 { sum / count } else { 0.0 }
    }

    /// Groups wanted for totals of the two windows.
    fn scale(&mut self, now: f64, stable: f64, panic: f64, ready: usize) -> usize {
        if std::mem::take(&mut self.first) && ready > 1 {
            // After a restart it takes a while to know enough for going down.
            self.panic_since = Some(now);
            self.panic_groups = ready;
        }
        let ready = ready.max(1) as f64;
        let most = count::ceil(Self::MAX_UP_RATE * ready);
        let least = count::index(ready / Self::MAX_DOWN_RATE);
        let panic_wanted = ceil_ratio(panic, self.target);
        let over = panic_wanted as f64 / ready >= Self::PANIC_THRESHOLD;
        let stable = ceil_ratio(stable, self.target).clamp(least, most);
        let panic = panic_wanted.clamp(least, most);
        if over {
            self.panic_since = Some(now);
        } else if self
            .panic_since
            .is_some_and(|since| now - since >= Self::STABLE_SECONDS)
        {
            self.panic_since = None;
            self.panic_groups = 0;
        }
        let mut desired = stable;
        if self.panic_since.is_some() {
            // Never down in panic.
            self.panic_groups = self.panic_groups.max(stable).max(panic);
            desired = self.panic_groups;
        }
        self.delayed(now, desired)
    }

    /// The greatest of the scale-down delay.
    fn delayed(&mut self, now: f64, desired: usize) -> usize {
        let oldest = now - self.scale_down_delay_seconds;
        while self.wanted.front().is_some_and(|(at, _)| *at < oldest) {
            self.wanted.pop_front();
        }
        self.wanted.push_back((now, desired));
        self.wanted
            .iter()
            .map(|(_, wanted)| *wanted)
            .max()
            .unwrap_or(desired)
    }
}

impl Policy for Kpa {
    fn period_seconds(&self) -> f64 {
        Self::TICK_SECONDS
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        let at = observation.scraped_seconds;
        match hpa::in_flight(observation) {
            Some(value) => self.samples.push_back((at, value)),
            // Without metrics a decision is invalid, and what there is stays.
            None => return Decision::replicas(observation.replicas),
        }
        while self
            .samples
            .front()
            .is_some_and(|(then, _)| *then <= at - Self::STABLE_SECONDS)
        {
            self.samples.pop_front();
        }
        let stable = self.mean(at - Self::STABLE_SECONDS);
        let panic = self.mean(at - Self::PANIC_SECONDS);
        let ready = observation.count(Phase::Ready);
        Decision::replicas(self.scale(observation.now_seconds, stable, panic, ready))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_divided_by_the_target() {
        for (stable, panic, ready, expected) in [
            (100.0, 100.0, 1, 10),
            (95.0, 95.0, 8, 10),
            // Not more than half is given up at once.
            (5.0, 5.0, 8, 4),
            (0.0, 0.0, 1, 0),
            (0.0, 0.0, 0, 0),
            (1.0, 1.0, 0, 1),
        ] {
            let mut kpa = Kpa::new(10.0, 0.0);
            kpa.first = false;
            assert_eq!(
                kpa.scale(0.0, stable, panic, ready),
                expected,
                "{stable} at {ready}"
            );
        }
    }

    #[test]
    fn panic_begins_at_twice_what_is_ready_and_never_goes_down() {
        let mut kpa = Kpa::new(10.0, 0.0);
        kpa.first = false;
        // 19 / 10 of 1 is two, twice the one that is ready.
        assert_eq!(kpa.scale(0.0, 10.0, 19.0, 1), 2);
        // The backlog counts as concurrency while nothing becomes ready.
        assert_eq!(kpa.scale(2.0, 20.0, 640.0, 1), 64);
        assert_eq!(kpa.scale(4.0, 20.0, 10.0, 1), 64);
        assert_eq!(kpa.scale(60.0, 20.0, 10.0, 1), 64);
        // A full stable window after the last panic.
        assert_eq!(kpa.scale(62.0, 20.0, 10.0, 1), 2);
        // 1.9 times is none.
        let mut kpa = Kpa::new(10.0, 0.0);
        kpa.first = false;
        assert_eq!(kpa.scale(0.0, 100.0, 190.0, 10), 10);
    }

    #[test]
    fn it_starts_in_panic_and_keeps_what_there_is() {
        let mut kpa = Kpa::new(10.0, 0.0);
        assert_eq!(kpa.scale(0.0, 10.0, 10.0, 9), 9);
        assert_eq!(kpa.scale(58.0, 10.0, 10.0, 9), 9);
        assert_eq!(kpa.scale(60.0, 10.0, 10.0, 9), 4);
    }

    #[test]
    fn a_delay_keeps_the_greatest() {
        let mut kpa = Kpa::new(10.0, 300.0);
        kpa.first = false;
        assert_eq!(kpa.scale(0.0, 80.0, 80.0, 8), 8);
        assert_eq!(kpa.scale(300.0, 50.0, 50.0, 8), 8);
        assert_eq!(kpa.scale(302.0, 50.0, 50.0, 8), 5);
    }
}
