//! From what is wanted to what is asked for: at once up, slowly and carefully down.

use std::cmp::Ordering;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::decision::{Actions, BoundBy, Freshness};
use crate::supply::Supply;
use crate::time::Time;

/// Seconds between two steps down.
const STEP_S: f64 = 60.0;
/// One of so many groups is taken away in a step, and at least one.
const STEP_PART: u32 = 10;
/// Groups that may be added within a cold start whatever there is.
const LEAST_SURGE: u32 = 4;

/// The extreme of a number over a window, in as little memory as can be: numbers that a later
/// one makes irrelevant are dropped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Extreme {
    entries: VecDeque<(Time, u32)>,
}

impl Extreme {
    /// Adds a number; `keeps` tells whether an earlier one still matters beside it.
    fn push(&mut self, now: Time, value: u32, window_s: f64, keeps: impl Fn(u32) -> bool) {
        while self.entries.back().is_some_and(|entry| !keeps(entry.1)) {
            self.entries.pop_back();
        }
        self.entries.push_back((now, value));
        let oldest = now.before(window_s);
        while self.entries.front().is_some_and(|entry| entry.0 < oldest) {
            self.entries.pop_front();
        }
    }

    fn value(&self) -> u32 {
        self.entries.front().map_or(0, |entry| entry.1)
    }
}

/// What was asked for before.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Actuation {
    /// Greatest number wanted over the stabilisation window, first in it.
    wants: Extreme,
    /// Least number of groups over a cold start, first in it.
    supplies: Extreme,
    /// Last number asked for.
    desired: Option<u32>,
    /// When more was asked for than before.
    raised: Option<Time>,
    /// When less was asked for than before.
    lowered: Option<Time>,
    /// When something last happened after which nothing goes down for a whole window.
    guarded: Option<Time>,
}

/// What is asked of [`Actuation::step`].
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// What is wanted within `min` and `max`; `None` where nothing is known: what there is.
    pub want: Option<u32>,
    /// What asks for it.
    pub cause: BoundBy,
    /// Least number now.
    pub min: u32,
    /// Greatest number now.
    pub max: u32,
    /// Groups that there is room for.
    pub free: Option<u32>,
    /// Setting of groups added within a cold start.
    pub max_surge: Option<u32>,
    /// Groups that may drain at once.
    pub drain_slots: u32,
    /// Seconds of the stabilisation window.
    pub window_s: f64,
    /// Whether figures are there.
    pub freshness: Freshness,
    /// Whether nothing may go down for a whole window from now: a start of the operator, a jump
    /// of the clock or a burst.
    pub guard: bool,
    /// Demand over 60 s, ρ and sequences in groups, for the check of the groups that remain.
    pub demand: f64,
    /// Share of a group's capacity that is filled.
    pub rho: f64,
    /// Sequences in flight, in groups.
    pub slots: f64,
    /// Whether the last group goes because it is idle.
    pub to_zero: bool,
}

/// What is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How many groups.
    pub desired: u32,
    /// What kept it from being another number.
    pub bound_by: BoundBy,
    /// Where fewer would do: how many, and the rule that holds the others.
    pub held: Option<(u32, String)>,
}

impl Actuation {
    /// What was asked for last.
    pub fn desired(&self) -> Option<u32> {
        self.desired
    }

    /// Forgets when things happened, but not what was asked for: the clock went back.
    #[must_use]
    pub fn without_times(&self) -> Self {
        Self {
            desired: self.desired,
            ..Self::default()
        }
    }

    /// Whether `window_s` seconds have passed since the last guard.
    pub fn settled(&self, window_s: f64, now: Time) -> bool {
        self.guarded
            .is_some_and(|since| now.since(since) >= window_s)
    }

    /// Decides the number of groups.
    pub fn step(&mut self, ask: &Ask, supply: &Supply, now: Time) -> Outcome {
        let reference = self.reference(supply, now);
        self.supplies
            .push(now, supply.current(), supply.cold_start_s, |earlier| {
                earlier < supply.current()
            });
        if ask.guard || ask.freshness != Freshness::Fresh {
            self.guarded = Some(now);
            self.want(now, reference, ask.window_s);
        }
        let want = ask.want.unwrap_or(reference);
        self.want(now, want, ask.window_s);
        let mut outcome = match want.cmp(&reference) {
            Ordering::Greater => self.up(ask, want, supply, reference),
            Ordering::Equal => Outcome {
                desired: want,
                bound_by: ask.cause,
                held: None,
            },
            Ordering::Less => self.down(ask, want, supply, reference, now),
        };
        if outcome.desired < ask.min {
            outcome = Outcome {
                desired: ask.min,
                bound_by: BoundBy::Min,
                held: None,
            };
        }
        if outcome.desired > ask.max {
            outcome = Outcome {
                desired: ask.max,
                bound_by: BoundBy::Max,
                held: None,
            };
        }
        if outcome.desired > reference {
            self.raised = Some(now);
        } else if outcome.desired < reference {
            self.lowered = Some(now);
        }
        self.desired = Some(outcome.desired);
        outcome
    }

    /// The number that this step starts from: what was asked for, or what there is where that is
    /// more. Right after a step down the groups that go are still there.
    fn reference(&self, supply: &Supply, now: Time) -> u32 {
        let current = supply.current();
        match self.desired {
            None => current,
            Some(desired) if self.lowered.is_some_and(|at| now.since(at) < STEP_S) => desired,
            Some(desired) => desired.max(current),
        }
    }

    fn want(&mut self, now: Time, value: u32, window_s: f64) {
        self.wants
            .push(now, value, window_s, |earlier| earlier > value);
    }

    /// All at once, up to the limits.
    fn up(&self, ask: &Ask, want: u32, supply: &Supply, reference: u32) -> Outcome {
        let current = supply.current();
        let least = self.supplies.value();
        let surge = ask.max_surge.unwrap_or_else(|| least.max(LEAST_SURGE));
        let limits = [
            // Draining groups come back at once and need no room.
            (
                BoundBy::Quota,
                ask.free.map(|free| current + supply.draining + free),
            ),
            (
                BoundBy::Surge,
                Some(least.saturating_add(surge) + supply.draining),
            ),
            (
                BoundBy::Unschedulable,
                (!supply.stuck.is_empty()).then_some(reference),
            ),
        ];
        let mut outcome = Outcome {
            desired: want,
            bound_by: ask.cause,
            held: None,
        };
        for (bound_by, limit) in limits {
            // A limit stops what would be added; it takes nothing away.
            let limit = limit.map(|limit| limit.max(reference));
            if let Some(desired) = limit.filter(|limit| *limit < outcome.desired) {
                outcome = Outcome {
                    desired,
                    bound_by,
                    held: None,
                };
            }
        }
        outcome
    }

    fn down(&self, ask: &Ask, want: u32, supply: &Supply, reference: u32, now: Time) -> Outcome {
        let hold = |bound_by, rule: String| Outcome {
            desired: reference,
            bound_by,
            held: Some((want, rule)),
        };
        match ask.freshness {
            Freshness::Stale => return hold(BoundBy::Stale, "too few figures are there".into()),
            Freshness::Partial => {
                return hold(BoundBy::Partial, "some figures are missing".into());
            }
            Freshness::Fresh => {}
        }
        if ask.to_zero {
            return Outcome {
                desired: 0,
                bound_by: BoundBy::Idle,
                held: None,
            };
        }
        let stabilised = self.wants.value();
        if stabilised >= reference {
            let rule = format!("{stabilised} was wanted within {:.0} s", ask.window_s);
            return hold(BoundBy::Stabilization, rule);
        }
        let raised = self
            .raised
            .is_some_and(|at| now.since(at) < supply.cold_start_s);
        if raised || supply.recent {
            let rule = format!("a group was started within {:.0} s", supply.cold_start_s);
            return hold(BoundBy::Stabilization, rule);
        }
        if self.lowered.is_some_and(|at| now.since(at) < STEP_S) {
            let rule = format!("the last step down was within {STEP_S:.0} s");
            return hold(BoundBy::Stabilization, rule);
        }
        let slots = ask.drain_slots.saturating_sub(supply.draining);
        if slots == 0 && supply.early == 0 {
            return hold(
                BoundBy::Stabilization,
                format!("{} drain already", supply.draining),
            );
        }
        let tenth = (reference / STEP_PART).max(1);
        let step = tenth
            .min(reference - stabilised)
            .min(slots.max(supply.early));
        let left = reference - step;
        let load = ask.demand / f64::from(left.max(1));
        if load > ask.rho || ask.slots > f64::from(left) {
            let rule = format!(
                "{left} would be {:.0} % full of {:.0} %, with sequences for {:.2} groups",
                100.0 * load,
                100.0 * ask.rho,
                ask.slots
            );
            return hold(BoundBy::Stabilization, rule);
        }
        if left > want {
            let rule = format!("one step each {STEP_S:.0} s, and {stabilised} was wanted");
            return Outcome {
                desired: left,
                ..hold(BoundBy::Stabilization, rule)
            };
        }
        Outcome {
            desired: left,
            bound_by: ask.cause,
            held: None,
        }
    }
}

/// What to do to get from the groups that there are to `desired`.
pub fn actions(desired: u32, supply: &Supply) -> Actions {
    let current = supply.current();
    if desired >= current {
        let more = desired - current;
        let undrain = more.min(supply.draining);
        return Actions {
            undrain,
            start: more - undrain,
            ..Actions::default()
        };
    }
    let fewer = current - desired;
    // One that has far to go yet is given up before one that serves.
    let cancel = fewer.min(supply.early);
    let drain = (fewer - cancel).min(supply.ready);
    Actions {
        cancel: fewer - drain,
        drain,
        ..Actions::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    fn supply(ready: u32, starting: u32) -> Supply {
        Supply {
            ready,
            starting,
            eta_s: 300.0,
            cold_start_s: 300.0,
            ..Supply::default()
        }
    }

    fn ask(want: u32) -> Ask {
        Ask {
            want: Some(want),
            cause: BoundBy::Work,
            min: 1,
            max: 64,
            free: None,
            max_surge: None,
            drain_slots: 4,
            window_s: 600.0,
            freshness: Freshness::Fresh,
            guard: false,
            demand: 0.5 * f64::from(want),
            rho: 0.8,
            slots: 0.0,
            to_zero: false,
        }
    }

    /// An actuation that has run at `groups` for so long that everything has settled.
    fn settled(groups: u32) -> Actuation {
        let mut actuation = Actuation::default();
        for tick in 0..200 {
            let now = at(f64::from(tick) * 5.0 - 1000.0);
            actuation.step(&ask(groups), &supply(groups, 0), now);
        }
        actuation
    }

    fn step(ask: &Ask, supply: &Supply) -> (u32, BoundBy) {
        let outcome = settled(supply.ready).step(ask, supply, at(0.0));
        (outcome.desired, outcome.bound_by)
    }

    #[test]
    fn up_is_one_step_within_the_limits() {
        let four = supply(4, 0);
        assert_eq!(step(&ask(7), &four), (7, BoundBy::Work));
        assert_eq!(step(&ask(20), &four), (8, BoundBy::Surge));
        assert_eq!(step(&ask(20), &supply(10, 0)), (20, BoundBy::Work));
        assert_eq!(
            step(
                &Ask {
                    free: Some(2),
                    ..ask(7)
                },
                &four
            ),
            (6, BoundBy::Quota)
        );
        assert_eq!(
            step(
                &Ask {
                    free: Some(0),
                    ..ask(7)
                },
                &four
            ),
            (4, BoundBy::Quota)
        );
        assert_eq!(step(&Ask { max: 5, ..ask(7) }, &four), (5, BoundBy::Max));
        assert_eq!(
            step(
                &Ask {
                    max_surge: Some(1),
                    ..ask(7)
                },
                &four
            ),
            (5, BoundBy::Surge)
        );
        let stuck = Supply {
            stuck: vec!["x".into()],
            ..supply(4, 1)
        };
        assert_eq!(step(&ask(7), &stuck), (5, BoundBy::Unschedulable));
        assert_eq!(
            step(
                &Ask {
                    min: 6,
                    free: Some(0),
                    ..ask(7)
                },
                &four
            ),
            (6, BoundBy::Min)
        );
    }

    #[test]
    fn draining_groups_come_back_before_new_ones_start() {
        let two = Supply {
            draining: 2,
            ..supply(4, 0)
        };
        assert_eq!(
            step(
                &Ask {
                    free: Some(0),
                    ..ask(7)
                },
                &two
            ),
            (6, BoundBy::Quota)
        );
        let back = Actions {
            undrain: 2,
            start: 1,
            ..Actions::default()
        };
        assert_eq!(actions(7, &two), back);
    }

    #[test]
    fn starting_groups_that_have_far_to_go_are_given_up_first() {
        let three = Supply {
            early: 1,
            ..supply(5, 2)
        };
        let fewer = Actions {
            cancel: 1,
            drain: 2,
            ..Actions::default()
        };
        assert_eq!(actions(4, &three), fewer);
        assert_eq!(actions(7, &three), Actions::default());
    }

    #[test]
    fn down_waits_for_its_window_and_goes_in_steps() {
        let mut actuation = settled(20);
        let mut last = 20;
        let mut lowered = Vec::new();
        for tick in 1..=300 {
            let now = at(f64::from(tick) * 5.0);
            let outcome = actuation.step(&ask(14), &supply(last, 0), now);
            if outcome.desired != last {
                lowered.push((tick * 5, outcome.desired));
            }
            last = outcome.desired;
        }
        let expected = [(600, 18), (660, 17), (720, 16), (780, 15), (840, 14)];
        assert_eq!(lowered, expected);
    }

    /// What keeps eight groups from becoming seven after the window, if anything does.
    fn held(change: impl Fn(&mut Ask, &mut Supply)) -> Option<String> {
        let mut actuation = settled(8);
        for tick in 1..=120 {
            let now = at(f64::from(tick) * 5.0);
            let (mut ask, mut supply) = (ask(6), supply(8, 0));
            change(&mut ask, &mut supply);
            let outcome = actuation.step(&ask, &supply, now);
            if tick == 120 {
                return (outcome.desired == 8).then(|| outcome.held.unwrap().1);
            }
            assert_eq!(outcome.desired, 8);
        }
        None
    }

    #[test]
    fn each_rule_can_hold_a_scale_down_and_says_so() {
        assert_eq!(held(|_, _| ()), None);
        let says = |rule: Option<String>, words: &str| assert!(rule.unwrap().contains(words));
        says(
            held(|ask, _| ask.demand = 5.7),
            "7 would be 81 % full of 80 %",
        );
        says(held(|ask, _| ask.slots = 7.1), "sequences for 7.10 groups");
        says(
            held(|_, supply| supply.recent = true),
            "started within 300 s",
        );
        says(held(|_, supply| supply.draining = 4), "4 drain already");
        says(
            held(|ask, _| ask.freshness = Freshness::Partial),
            "some figures",
        );
        says(
            held(|ask, _| ask.freshness = Freshness::Stale),
            "too few figures",
        );
        says(held(|ask, _| ask.guard = true), "8 was wanted within 600 s");
    }

    #[test]
    fn missing_figures_start_the_window_anew() {
        let mut actuation = settled(8);
        let stale = Ask {
            freshness: Freshness::Stale,
            want: None,
            ..ask(6)
        };
        for tick in 1..=300 {
            let now = at(f64::from(tick) * 5.0);
            let ask = if tick == 60 { stale.clone() } else { ask(6) };
            let outcome = actuation.step(&ask, &supply(8, 0), now);
            assert_eq!(outcome.desired < 8, tick > 180, "{} s", tick * 5);
            if tick > 180 {
                return;
            }
        }
    }

    #[test]
    fn a_restart_holds_what_it_found_for_a_window() {
        let mut actuation = Actuation::default();
        for tick in 0..=120 {
            let ask = Ask {
                guard: tick == 0,
                ..ask(2)
            };
            let outcome = actuation.step(&ask, &supply(9, 0), at(f64::from(tick) * 5.0));
            assert_eq!(outcome.desired, if tick <= 120 { 9 } else { 8 });
        }
    }
}
