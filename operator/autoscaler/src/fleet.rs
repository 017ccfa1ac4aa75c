//! What all groups did since the last tick, from the samples of their leaders.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::counters::SAME_S;
use crate::snapshot::{Group, Phase, Sample, Snapshot, reading};
use crate::time::Time;

/// Samples older than this, in seconds, are not counted with.
pub const SAMPLE_FRESH_S: f64 = 20.0;
/// Seconds after which a group that became ready should have a sample.
pub const FIRST_SAMPLE_S: f64 = 30.0;

/// A group's sample, if all that demand needs is in it and it is fresh.
pub fn usable(group: &Group) -> Option<&Sample> {
    let sample = group.sample.as_ref()?;
    reading(Some(sample.age_s)).filter(|age| *age <= SAMPLE_FRESH_S)?;
    reading(sample.prompt_tokens_total)?;
    reading(sample.generation_tokens_total)?;
    reading(sample.running)?;
    reading(sample.waiting)?;
    Some(sample)
}

/// Whether a ready group should have a sample: it had time to give its first.
pub fn should_report(group: &Group, now: Time) -> bool {
    match group.phase {
        Phase::Ready { since } => group.sample.is_some() || now.since(since) > FIRST_SAMPLE_S,
        Phase::Starting { .. } | Phase::Draining => false,
    }
}

/// What one group did between two samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Interval {
    /// The group.
    pub id: String,
    /// When the later sample was made.
    pub end: Time,
    /// Seconds between the samples.
    pub span_s: f64,
    /// When the group began to serve, `None` for one that drains.
    pub ready_since: Option<Time>,
    /// Iterations.
    pub steps: Option<f64>,
    /// Prompt tokens taken up.
    pub prompt: f64,
    /// Prompt tokens of these from the prefix cache.
    pub cached: f64,
    /// Tokens generated.
    pub generation: f64,
    /// Requests finished.
    pub finished: Option<f64>,
    /// Requests finished that kept the SLO.
    pub within_slo: Option<f64>,
    /// Requests thrown out of the batch.
    pub preemptions: Option<f64>,
    /// Requests in the batch at both ends.
    pub running: (f64, f64),
    /// Requests that came: finished, and more in flight than before. May be below 0 by chance.
    pub arrived: Option<f64>,
    /// Prompt tokens that came, counted likewise.
    pub arrived_prompt: f64,
    /// Mean of tokens in the KV cache at both ends.
    pub kv_tokens: Option<f64>,
}

/// The last sample of a group, and what it did per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Track {
    at: Time,
    sample: Sample,
    rates: Option<Rates>,
}

/// What arrives at a group, or at all, per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Requests.
    pub requests: f64,
    /// Prompt tokens.
    pub prompt: f64,
    /// Tokens generated.
    pub generation: f64,
}

/// All groups at one tick.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// What each group with a new sample did.
    pub intervals: Vec<Interval>,
    /// What arrived at all groups per second; `None` while no group has two samples.
    pub rates: Option<Rates>,
    /// Requests running and waiting in ready groups; `None` while no group has a sample.
    pub in_flight: Option<f64>,
    /// Requests that wait in engines.
    pub waiting: f64,
    /// Prompt tokens of these that were told, and how many requests told none.
    pub waiting_tokens: (f64, f64),
    /// Whether any group has a request.
    pub busy: bool,
}

/// Memory of all groups' samples: one for each group that exists.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fleet {
    tracks: BTreeMap<String, Track>,
}

impl Fleet {
    /// Takes in a snapshot's samples. A ready group without one is counted with the mean of the
    /// others or its own last figures, whichever is more.
    pub fn observe(&mut self, snapshot: &Snapshot, now: Time) -> Observed {
        self.tracks
            .retain(|id, _| snapshot.groups.iter().any(|group| group.id == *id));
        let mut observed = Observed::default();
        let (mut rates, mut flights) = (Share::default(), Share::default());
        let mut sum = Rates::default();
        let mut silent = Vec::new();
        for group in &snapshot.groups {
            if matches!(group.phase, Phase::Starting { .. }) {
                continue;
            }
            let ready = matches!(group.phase, Phase::Ready { .. });
            let Some(sample) = usable(group) else {
                if should_report(group, now) {
                    silent.push(group.id.as_str());
                }
                continue;
            };
            let (running, waiting) = (value(sample.running), value(sample.waiting));
            observed.busy |= running + waiting > 0.0;
            observed.waiting += waiting;
            match reading(sample.waiting_tokens) {
                Some(tokens) => observed.waiting_tokens.0 += tokens,
                None => observed.waiting_tokens.1 += waiting,
            }
            let at = now.before(sample.age_s);
            let track = self
                .tracks
                .entry(group.id.clone())
                .or_insert_with(|| Track {
                    at,
                    sample: *sample,
                    rates: None,
                });
            observed.intervals.extend(track.advance(group, at, sample));
            if ready {
                flights.add(running + waiting);
            }
            if let Some(own) = track.rates {
                rates.add(0.0);
                sum.add(&own);
            }
        }
        // The sums are what is seen; silent groups come on top.
        let mean = sum.over(rates.count);
        let silent: Vec<_> = silent.iter().map(|id| self.tracks.get(*id)).collect();
        for track in &silent {
            let last = track.and_then(|track| track.rates).unwrap_or_default();
            sum.add(&Rates {
                requests: mean.requests.max(last.requests),
                prompt: mean.prompt.max(last.prompt),
                generation: mean.generation.max(last.generation),
            });
        }
        let mean = if flights.count > 0.0 {
            flights.sum / flights.count
        } else {
            0.0
        };
        let missing = silent.iter().map(|track| {
            let last = |track: &Track| value(track.sample.running) + value(track.sample.waiting);
            track.map_or(0.0, last).max(mean)
        });
        let in_flight = flights.sum + missing.sum::<f64>();
        observed.rates = (rates.count > 0.0).then_some(sum);
        observed.in_flight = (flights.count > 0.0).then_some(in_flight);
        observed
    }
}

/// A sum and of how many.
#[derive(Default)]
struct Share {
    sum: f64,
    count: f64,
}

impl Share {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.0;
    }
}

impl Rates {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.prompt += other.prompt;
        self.generation += other.generation;
    }

    fn over(&self, count: f64) -> Self {
        let count = count.max(1.0);
        Self {
            requests: self.requests / count,
            prompt: self.prompt / count,
            generation: self.generation / count,
        }
    }
}

fn value(series: Option<f64>) -> f64 {
    reading(series).unwrap_or(0.0)
}

/// Growth between two readings of a counter; `None` where one is missing or it started anew.
fn growth(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    let delta = reading(after)? - reading(before)?;
    (delta >= 0.0).then_some(delta)
}

impl Track {
    /// Takes a newer sample. `None` for one that was seen, and where the engine started anew.
    fn advance(&mut self, group: &Group, at: Time, sample: &Sample) -> Option<Interval> {
        let span_s = at.since(self.at);
        if span_s < SAME_S {
            return None;
        }
        let before = std::mem::replace(&mut self.sample, *sample);
        self.at = at;
        let lower = |was: Option<f64>, is: Option<f64>| matches!((reading(was), reading(is)), (Some(was), Some(is)) if is < was);
        if lower(before.steps_total, sample.steps_total)
            || lower(before.finished_total, sample.finished_total)
        {
            return None;
        }
        let prompt = growth(before.prompt_tokens_total, sample.prompt_tokens_total)?;
        let generation = growth(
            before.generation_tokens_total,
            sample.generation_tokens_total,
        )?;
        let cached = growth(before.cached_tokens_total, sample.cached_tokens_total);
        let finished = growth(before.finished_total, sample.finished_total);
        let in_flight = |of: &Sample| value(of.running) + value(of.waiting);
        let more = in_flight(sample) - in_flight(&before);
        let interval = Interval {
            id: group.id.clone(),
            end: at,
            span_s,
            ready_since: match group.phase {
                Phase::Ready { since } => Some(since),
                Phase::Starting { .. } | Phase::Draining => None,
            },
            steps: growth(before.steps_total, sample.steps_total),
            prompt,
            cached: cached.unwrap_or(0.0).min(prompt),
            generation,
            finished,
            within_slo: growth(
                before.finished_within_slo_total,
                sample.finished_within_slo_total,
            ),
            preemptions: growth(before.preemptions_total, sample.preemptions_total),
            running: (value(before.running), value(sample.running)),
            arrived: finished.map(|finished| finished + more),
            arrived_prompt: prompt + value(sample.waiting_tokens) - value(before.waiting_tokens),
            kv_tokens: reading(before.kv_tokens_used)
                .zip(reading(sample.kv_tokens_used))
                .map(|(was, is)| f64::midpoint(was, is)),
        };
        self.rates = Some(Rates {
            requests: interval.arrived.unwrap_or(0.0) / span_s,
            prompt: interval.arrived_prompt / span_s,
            generation: generation / span_s,
        });
        Some(interval)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An interval of a group that did nothing.
    pub(crate) fn plain(id: &str, end: Time, span_s: f64) -> Interval {
        Interval {
            id: id.into(),
            end,
            span_s,
            ready_since: None,
            steps: None,
            prompt: 0.0,
            cached: 0.0,
            generation: 0.0,
            finished: None,
            within_slo: None,
            preemptions: None,
            running: (10.0, 10.0),
            arrived: None,
            arrived_prompt: 0.0,
            kv_tokens: None,
        }
    }

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    fn group(id: &str, sample: Option<Sample>) -> Group {
        Group {
            id: id.into(),
            phase: Phase::Ready { since: at(-600.0) },
            pending: false,
            sample,
        }
    }

    /// A group with ten requests a second of 100 and 20 tokens, after `t` seconds.
    fn steady(t: f64) -> Sample {
        Sample {
            age_s: 1.0,
            steps_total: Some(20.0 * t),
            prompt_tokens_total: Some(1000.0 * t),
            generation_tokens_total: Some(200.0 * t),
            running: Some(4.0),
            waiting: Some(1.0),
            finished_total: Some(10.0 * t),
            ..Sample::default()
        }
    }

    fn seen(fleet: &mut Fleet, t: f64, groups: Vec<Group>) -> Observed {
        fleet.observe(
            &Snapshot {
                groups,
                ..Snapshot::default()
            },
            at(t),
        )
    }

    #[test]
    fn rates_are_summed_over_groups() {
        let mut fleet = Fleet::default();
        for t in [0.0, 5.0] {
            let both = vec![group("a", Some(steady(t))), group("b", Some(steady(t)))];
            let observed = seen(&mut fleet, t, both);
            assert_eq!(observed.rates.is_some(), t > 0.0);
            if let Some(rates) = observed.rates {
                let expected = Rates {
                    requests: 20.0,
                    prompt: 2000.0,
                    generation: 400.0,
                };
                assert_eq!(rates, expected);
                assert_eq!(observed.in_flight, Some(10.0));
                assert_eq!(observed.intervals.len(), 2);
            }
        }
    }

    #[test]
    fn a_silent_group_counts_as_the_others_do() {
        let mut fleet = Fleet::default();
        for t in [0.0, 5.0, 10.0, 40.0, 45.0] {
            let silent = (t < 40.0).then(|| steady(t));
            let observed = seen(
                &mut fleet,
                t,
                vec![group("a", Some(steady(t))), group("b", silent)],
            );
            if t > 0.0 {
                assert_eq!(observed.in_flight, Some(10.0), "at {t}");
                let rates = observed.rates.unwrap();
                assert!((rates.requests - 20.0).abs() < 1e-9, "{rates:?} at {t}");
            }
        }
    }

    #[test]
    fn a_restarted_engine_has_no_interval() {
        let mut fleet = Fleet::default();
        for (t, sample) in [
            (100.0, steady(100.0)),
            (105.0, steady(2.0)),
            (110.0, steady(7.0)),
        ] {
            let observed = seen(&mut fleet, t, vec![group("a", Some(sample))]);
            assert_eq!(observed.intervals.len(), usize::from(t > 109.0), "at {t}");
            if let Some(interval) = observed.intervals.first() {
                assert!((interval.prompt - 5000.0).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn what_demand_needs_must_be_there() {
        let with = |change: fn(&mut Sample)| {
            let mut sample = steady(5.0);
            change(&mut sample);
            usable(&group("a", Some(sample))).is_some()
        };
        assert!(with(|_| ()));
        assert!(!with(|s| s.running = None));
        assert!(!with(|s| s.waiting = Some(f64::NAN)));
        assert!(!with(|s| s.generation_tokens_total = Some(-1.0)));
        assert!(!with(|s| s.age_s = 21.0));
        assert!(!with(|s| s.age_s = f64::NAN));
        assert!(with(|s| s.kv_tokens_used = Some(f64::NAN)));
    }
}
