//! How many figures are there, and what is done while too few are: nothing is taken for 0.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::decision::{Freshness, Metrics};
use crate::fleet::{should_report, usable};
use crate::snapshot::{Gateway, Phase, Snapshot, reading};
use crate::time::Time;

/// A gateway's counts older than this, in seconds, are not counted with.
pub const GATEWAY_FRESH_S: f64 = 15.0;
/// Share of ready groups that must report for every decision.
const FRESH_SHARE: f64 = 0.8;
/// Share of ready groups that must report for any decision.
const PARTIAL_SHARE: f64 = 0.5;
/// Seconds without figures after which yesterday's numbers count.
pub const STALE_LONG_S: f64 = 300.0;
/// Seconds of an hour.
const HOUR_S: u64 = 3600;
/// Hours of numbers wanted that are remembered: a day and the hour that runs.
const HOURS: u64 = 25;
/// Quantile of yesterday's numbers that is kept in an outage.
const YESTERDAY_QUANTILE: f64 = 0.95;

/// A gateway's counts if they can be counted with.
pub fn live(gateway: Option<&Gateway>) -> Option<&Gateway> {
    let gateway = gateway?;
    reading(Some(gateway.age_s)).filter(|age| *age <= GATEWAY_FRESH_S)?;
    reading(gateway.requests_total)?;
    Some(gateway)
}

/// Since when figures are as they are, and what was wanted in each of the last hours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    last: Option<(Freshness, Time)>,
    /// For each hour since the epoch, how often each number was wanted.
    hours: BTreeMap<u64, BTreeMap<u32, u32>>,
}

impl Watch {
    /// Judges a snapshot. `gateway` is whether there should be one.
    pub fn assess(&mut self, snapshot: &Snapshot, gateway: bool, now: Time) -> Metrics {
        let ready = |group: &&crate::snapshot::Group| matches!(group.phase, Phase::Ready { .. });
        let expected = count(
            snapshot
                .groups
                .iter()
                .filter(ready)
                .filter(|group| should_report(group, now)),
        );
        let fresh = count(
            snapshot
                .groups
                .iter()
                .filter(ready)
                .filter(|group| usable(group).is_some()),
        );
        let answers = live(snapshot.gateway.as_ref()).is_some();
        let state = state(fresh, expected, gateway, answers);
        let since = match self.last {
            Some((last, since)) if last == state => since,
            _ => now,
        };
        self.last = Some((state, since));
        Metrics {
            state,
            since,
            fresh,
            expected,
            gateway: answers,
        }
    }

    /// Remembers what was wanted while all figures were there.
    pub fn record(&mut self, want: u32, now: Time) {
        let hour = hour(now);
        *self.hours.entry(hour).or_default().entry(want).or_default() += 1;
        while self
            .hours
            .first_key_value()
            .is_some_and(|(first, _)| first + HOURS <= hour)
        {
            self.hours.pop_first();
        }
    }

    /// What was wanted in the same hour yesterday (95th percentile), if it is remembered.
    pub fn yesterday(&self, now: Time) -> Option<u32> {
        let wants = self.hours.get(&hour(now).checked_sub(24)?)?;
        let total: u32 = wants.values().sum();
        let mut seen = 0;
        wants.iter().find_map(|(want, times)| {
            seen += times;
            (f64::from(seen) >= YESTERDAY_QUANTILE * f64::from(total)).then_some(*want)
        })
    }
}

fn hour(now: Time) -> u64 {
    now.0 / (HOUR_S * 1000)
}

fn count<T>(items: impl Iterator<Item = T>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

/// Fresh: 80 % of ready groups and the gateway. Partial: half of them. Without ready groups
/// only the gateway can tell anything.
fn state(fresh: u32, expected: u32, gateway: bool, answers: bool) -> Freshness {
    if expected == 0 {
        return match (gateway, answers) {
            (_, true) => Freshness::Fresh,
            (false, false) => Freshness::Partial,
            (true, false) => Freshness::Stale,
        };
    }
    let share = f64::from(fresh) / f64::from(expected);
    if share < PARTIAL_SHARE {
        Freshness::Stale
    } else if share < FRESH_SHARE || (gateway && !answers) {
        Freshness::Partial
    } else {
        Freshness::Fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_of_the_table() {
        for (fresh, expected, gateway, answers, state) in [
            (10, 10, true, true, Freshness::Fresh),
            (8, 10, true, true, Freshness::Fresh),
            (7, 10, true, true, Freshness::Partial),
            (5, 10, true, true, Freshness::Partial),
            (4, 10, true, true, Freshness::Stale),
            (10, 10, true, false, Freshness::Partial),
            (4, 10, true, false, Freshness::Stale),
            (10, 10, false, false, Freshness::Fresh),
            (0, 0, true, true, Freshness::Fresh),
            (0, 0, true, false, Freshness::Stale),
            (0, 0, false, false, Freshness::Partial),
            (0, 1, true, true, Freshness::Stale),
        ] {
            let got = super::state(fresh, expected, gateway, answers);
            assert_eq!(got, state, "{fresh}/{expected}, {gateway}, {answers}");
        }
    }

    #[test]
    fn a_gateway_without_its_counter_does_not_answer() {
        let gateway = |requests, age_s| Gateway {
            age_s,
            requests_total: requests,
            ..Gateway::default()
        };
        assert!(live(Some(&gateway(Some(0.0), 15.0))).is_some());
        assert!(live(Some(&gateway(Some(0.0), 16.0))).is_none());
        assert!(live(Some(&gateway(None, 1.0))).is_none());
        assert!(live(Some(&gateway(Some(f64::NAN), 1.0))).is_none());
        assert!(live(None).is_none());
    }

    #[test]
    fn yesterday_is_the_same_hour_and_memory_is_a_day() {
        let mut watch = Watch::default();
        let noon = Time::from_secs(20_000.0 * 86_400.0 + 12.0 * 3600.0);
        for minute in 0..60 {
            let want = if minute < 54 { 4 } else { 9 };
            watch.record(want, noon.after(f64::from(minute) * 60.0));
        }
        let tomorrow = noon.after(86_400.0 + 600.0);
        assert_eq!(watch.yesterday(tomorrow), Some(9));
        assert_eq!(watch.yesterday(tomorrow.after(3600.0)), None);
        for hour in 0..100 {
            watch.record(1, noon.after(f64::from(hour) * 3600.0));
        }
        assert_eq!(watch.hours.len(), 25);
    }
}
