//! The groups that there are, and how long new ones take to serve.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::snapshot::{Phase, Snapshot, reading};
use crate::time::Time;

/// Starts that the cold start is taken from.
const STARTS: usize = 20;
/// Quantile of these that counts.
const START_QUANTILE: f64 = 0.9;
/// Seconds that pods may wait for nodes until no more groups are asked for.
const PENDING_S: f64 = 120.0;
/// Cold starts that a group may take until no more are asked for.
const OVERDUE: f64 = 1.5;
/// Least share of a cold start that a group that is late still needs.
const LATE_SHARE: f64 = 0.1;

/// Starts that were seen, and those that run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Starts {
    /// Seconds of the last starts, oldest first.
    took_s: VecDeque<f64>,
    running: BTreeMap<String, Start>,
}

/// A group that starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Start {
    since: Time,
    pending_since: Option<Time>,
    /// Whether it waited for nodes for so long that its time tells nothing of starts.
    waited: bool,
}

/// The groups that there are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Supply {
    /// Groups that serve.
    pub ready: u32,
    /// Groups that start.
    pub starting: u32,
    /// Groups that drain.
    pub draining: u32,
    /// Groups of these that start and have waited for nodes, or started, for too long.
    pub stuck: Vec<String>,
    /// Starting groups that need more than half of a cold start yet, the stuck ones among them.
    pub early: u32,
    /// Whether a group that is not stuck began to start within a cold start.
    pub recent: bool,
    /// Seconds until those that start serve, on average; a cold start without any.
    pub eta_s: f64,
    /// Seconds of a cold start (L).
    pub cold_start_s: f64,
    /// When the last of the ready groups began to serve.
    pub ready_since: Option<Time>,
}

impl Supply {
    /// Ready and starting groups.
    pub fn current(&self) -> u32 {
        self.ready + self.starting
    }
}

impl Starts {
    /// Forgets the starts that run, but not how long others took: the clock went back.
    #[must_use]
    pub fn without_times(&self) -> Self {
        Self {
            took_s: self.took_s.clone(),
            running: BTreeMap::new(),
        }
    }

    /// Takes in a snapshot; `prior_s` is the cold start until one was seen.
    pub fn observe(&mut self, snapshot: &Snapshot, prior_s: f64, now: Time) -> Supply {
        let mut supply = Supply::default();
        let mut still = BTreeMap::new();
        for group in &snapshot.groups {
            match group.phase {
                Phase::Starting { since, .. } => {
                    supply.starting += 1;
                    let mut start = self.running.remove(&group.id).unwrap_or(Start {
                        since,
                        pending_since: None,
                        waited: false,
                    });
                    start.pending_since = group.pending.then(|| start.pending_since.unwrap_or(now));
                    start.waited |= start.pends_too_long(now);
                    still.insert(group.id.clone(), start);
                }
                Phase::Ready { since } => {
                    supply.ready += 1;
                    supply.ready_since = supply.ready_since.max(Some(since));
                    let start = self.running.remove(&group.id);
                    if let Some(start) = start.filter(|start| !start.waited) {
                        self.took_s.push_back(since.since(start.since));
                    }
                }
                Phase::Draining => supply.draining += 1,
            }
        }
        self.running = still;
        while self.took_s.len() > STARTS {
            self.took_s.pop_front();
        }
        supply.cold_start_s = self.cold_start_s(prior_s);
        self.estimate(snapshot, now, &mut supply);
        supply
    }

    /// The 90th percentile of the last starts.
    fn cold_start_s(&self, prior_s: f64) -> f64 {
        let mut took: Vec<f64> = self.took_s.iter().copied().filter(|s| *s > 0.0).collect();
        took.sort_by(f64::total_cmp);
        let count = took.len() as f64;
        let above = took
            .iter()
            .enumerate()
            .find(|(index, _)| (*index as f64 + 1.0) >= START_QUANTILE * count);
        above.map_or(prior_s, |(_, seconds)| *seconds)
    }

    /// How far starting groups are.
    fn estimate(&self, snapshot: &Snapshot, now: Time, supply: &mut Supply) {
        let cold_start_s = supply.cold_start_s;
        let (mut sum_s, mut moving) = (0.0, 0.0);
        for group in &snapshot.groups {
            let Phase::Starting { since, eta_s } = group.phase else {
                continue;
            };
            let elapsed_s = now.since(since);
            let waits = self
                .running
                .get(&group.id)
                .is_some_and(|s| s.pends_too_long(now));
            if waits || elapsed_s > OVERDUE * cold_start_s {
                supply.stuck.push(group.id.clone());
                supply.early += 1;
                continue;
            }
            let left_s = (cold_start_s - elapsed_s).max(LATE_SHARE * cold_start_s);
            let eta_s = reading(eta_s).unwrap_or(left_s);
            supply.early += u32::from(eta_s > 0.5 * cold_start_s);
            supply.recent |= elapsed_s < cold_start_s;
            sum_s += eta_s;
            moving += 1.0;
        }
        supply.eta_s = if moving > 0.0 {
            sum_s / moving
        } else {
            cold_start_s
        };
    }
}

impl Start {
    fn pends_too_long(&self, now: Time) -> bool {
        self.pending_since
            .is_some_and(|since| now.since(since) > PENDING_S)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Group;

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    fn starting(id: &str, since: f64, pending: bool) -> Group {
        let phase = Phase::Starting {
            since: at(since),
            eta_s: None,
        };
        Group {
            id: id.into(),
            phase,
            pending,
            sample: None,
        }
    }

    fn ready(id: &str, since: f64) -> Group {
        let phase = Phase::Ready { since: at(since) };
        Group {
            id: id.into(),
            phase,
            pending: false,
            sample: None,
        }
    }

    fn supply(starts: &mut Starts, t: f64, groups: Vec<Group>) -> Supply {
        starts.observe(
            &Snapshot {
                groups,
                ..Snapshot::default()
            },
            300.0,
            at(t),
        )
    }

    #[test]
    fn the_cold_start_is_learned_from_starts_that_were_seen() {
        let mut starts = Starts::default();
        assert!((supply(&mut starts, 0.0, vec![]).cold_start_s - 300.0).abs() < 1e-9);
        for index in 1..=10 {
            let (id, took) = (format!("g{index}"), f64::from(index) * 10.0);
            supply(&mut starts, 0.0, vec![starting(&id, 0.0, false)]);
            supply(&mut starts, took, vec![ready(&id, took)]);
        }
        let seen = supply(
            &mut starts,
            200.0,
            vec![ready("g10", 100.0), ready("new", 0.0)],
        );
        assert!((seen.cold_start_s - 90.0).abs() < 1e-9, "{seen:?}");
        assert_eq!((seen.ready, seen.current()), (2, 2));
    }

    #[test]
    fn time_to_serve_is_what_is_left_of_a_cold_start() {
        let mut starts = Starts::default();
        let seen = supply(
            &mut starts,
            200.0,
            vec![starting("a", 0.0, false), starting("b", 150.0, false)],
        );
        assert!((seen.eta_s - 175.0).abs() < 1e-9);
        assert_eq!((seen.early, seen.recent, seen.stuck.len()), (1, true, 0));
        let late = supply(&mut starts, 400.0, vec![starting("a", 0.0, false)]);
        assert!((late.eta_s - 30.0).abs() < 1e-9, "{late:?}");
        assert!(!late.recent);
        let overdue = supply(&mut starts, 451.0, vec![starting("a", 0.0, false)]);
        assert_eq!(overdue.stuck, ["a"]);
    }

    #[test]
    fn waiting_for_nodes_is_stuck_after_two_minutes_and_no_measure_of_starts() {
        let mut starts = Starts::default();
        let seen = supply(&mut starts, 0.0, vec![starting("a", 0.0, true)]);
        assert!(seen.stuck.is_empty());
        assert!(
            supply(&mut starts, 120.0, vec![starting("a", 0.0, true)])
                .stuck
                .is_empty()
        );
        assert_eq!(
            supply(&mut starts, 121.0, vec![starting("a", 0.0, true)]).stuck,
            ["a"]
        );
        assert!(
            supply(&mut starts, 140.0, vec![starting("a", 0.0, false)])
                .stuck
                .is_empty()
        );
        let seen = supply(&mut starts, 250.0, vec![ready("a", 250.0)]);
        assert!((seen.cold_start_s - 300.0).abs() < 1e-9, "{seen:?}");
    }
}
