//! What the users got, and what it cost.

use serde::Serialize;

use crate::count;
use crate::engine::{Config, GroupLife, Outcome, RequestOutcome};
use crate::trace::Trace;

/// The figures of one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Name of the policy.
    pub policy: String,
    /// Its one knob.
    pub target: f64,
    /// Name of the model.
    pub model: String,
    /// Requests of the trace.
    pub requests: u64,
    /// Requests given up: their group went away, none could hold them, or they
    /// were unfinished at the end.
    pub requests_lost: u64,
    /// Share of all requests that got what the SLO asks for, lost ones included.
    pub slo_attainment: f64,
    /// Hours of GPUs from the creation of a group to its deletion.
    pub gpu_hours: f64,
    /// Changes of the wanted number of groups.
    pub scale_actions: u64,
    /// Changes that turn the one before within two cold starts.
    pub reversals: u64,
    /// Most groups that existed at once, starting and draining ones included.
    pub max_groups: u64,
    /// Median seconds to the first token.
    pub p50_ttft_seconds: f64,
    /// Seconds to the first token that 99 % of the requests stay within.
    pub p99_ttft_seconds: f64,
    /// Seconds between tokens that 99 % of the requests stay within.
    pub p99_tpot_seconds: f64,
    /// Sequences that full caches threw out to be calculated again.
    pub preemptions: u64,
    /// Seconds from the start to the end of the last request.
    pub duration_seconds: f64,
}

impl Report {
    /// The report of a run of a policy at a target.
    pub fn new(policy: &str, target: f64, config: &Config, outcome: &Outcome) -> Self {
        let requests = &outcome.requests;
        let lost = requests.iter().filter(|request| request.lost).count();
        let within = requests.iter().filter(|request| request.within_slo).count();
        let seconds: f64 = outcome
            .groups
            .iter()
            .map(|life| life.deleted_seconds - life.created_seconds)
            .sum();
        let ttft = |share| percentile(requests, share, |request| request.ttft_seconds);
        Self {
            policy: policy.to_owned(),
            target,
            model: config.model.name.to_owned(),
            requests: requests.len() as u64,
            requests_lost: lost as u64,
            slo_attainment: within as f64 / requests.len().max(1) as f64,
            gpu_hours: seconds / 3600.0 * f64::from(config.model.gpus),
            scale_actions: outcome.actions.len() as u64,
            reversals: reversals(outcome, 2.0 * config.cold_start_seconds),
            max_groups: max_groups(&outcome.groups),
            p50_ttft_seconds: ttft(0.5),
            p99_ttft_seconds: ttft(0.99),
            p99_tpot_seconds: percentile(requests, 0.99, |request| request.tpot_seconds),
            preemptions: outcome.preemptions,
            duration_seconds: outcome.end_seconds,
        }
    }

    /// The figures as lines for people.
    pub fn to_text(&self) -> String {
        format!(
            "{} at {} with {}\n  SLO attainment  {:.2} % of {} requests, {} lost\n  \
             GPU-hours       {:.0}\n  groups          {} at most, {} changes, {} turned within \
             two cold starts\n  first token     {:.2} s median, {:.2} s p99\n  \
             between tokens  {:.3} s p99\n  preemptions     {}\n",
            self.policy,
            self.target,
            self.model,
            self.slo_attainment * 100.0,
            self.requests,
            self.requests_lost,
            self.gpu_hours,
            self.max_groups,
            self.scale_actions,
            self.reversals,
            self.p50_ttft_seconds,
            self.p99_ttft_seconds,
            self.p99_tpot_seconds,
            self.preemptions,
        )
    }
}

/// The nearest rank; 0 of nothing.
fn percentile(
    requests: &[RequestOutcome],
    share: f64,
    of: fn(&RequestOutcome) -> Option<f64>,
) -> f64 {
    let mut values: Vec<f64> = requests.iter().filter_map(of).collect();
    if values.is_empty() {
        return 0.0;
    }
    let rank = count::ceil(share * values.len() as f64).clamp(1, values.len()) - 1;
    *values.select_nth_unstable_by(rank, f64::total_cmp).1
}

fn reversals(outcome: &Outcome, within_seconds: f64) -> u64 {
    outcome
        .actions
        .windows(2)
        .filter(|pair| {
            (pair[0].to > pair[0].from) != (pair[1].to > pair[1].from)
                && pair[1].at_seconds - pair[0].at_seconds < within_seconds
        })
        .count() as u64
}

fn max_groups(groups: &[GroupLife]) -> u64 {
    let mut changes: Vec<(f64, bool)> = groups
        .iter()
        .flat_map(|life| [(life.created_seconds, true), (life.deleted_seconds, false)])
        .collect();
    // What goes makes place for what comes at the same time.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most) = (0_u64, 0);
    for (_, created) in changes {
        now = if created {
            now + 1
        } else {
            now.saturating_sub(1)
        };
        most = most.max(now);
    }
    most
}

/// What happened in one window of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moment {
    /// Start of the window.
    pub at_seconds: f64,
    /// Groups that take requests, on average over the window.
    pub ready: f64,
    /// Groups that load their model.
    pub starting: f64,
    /// Groups that finish what they have.
    pub draining: f64,
    /// Work that arrived, in groups at their capacity.
    pub demand: f64,
    /// Share of the requests that arrived and got what the SLO asks for; none
    /// if none arrived.
    pub attainment: Option<f64>,
}

/// A run in windows of equal length.
pub fn timeline(trace: &Trace, config: &Config, outcome: &Outcome, windows: usize) -> Vec<Moment> {
    let windows = windows.max(1);
    let length = (outcome.end_seconds / windows as f64).max(1e-9);
    let window_of = |at: f64| count::index(at / length).min(windows - 1);
    let mut moments: Vec<Moment> = (0..windows)
        .map(|at| Moment {
            at_seconds: at as f64 * length,
            ..Moment::default()
        })
        .collect();
    for life in &outcome.groups {
        let gone = life.deleted_seconds;
        let drained = life.draining_seconds.unwrap_or(gone).min(gone);
        let ready = life.ready_seconds.unwrap_or(drained).min(drained);
        for (from, to, phase) in [
            (life.created_seconds, ready, 0),
            (ready, drained, 1),
            (drained, gone, 2),
        ] {
            if to <= from {
                continue;
            }
            for moment in &mut moments[window_of(from)..=window_of(to)] {
                let end = moment.at_seconds + length;
                let share = (to.min(end) - from.max(moment.at_seconds)).max(0.0) / length;
                match phase {
                    0 => moment.starting += share,
                    1 => moment.ready += share,
                    _ => moment.draining += share,
                }
            }
        }
    }
    let capacity = config.capacity(trace);
    let mut served = vec![(0_u64, 0_u64); windows];
    for (request, outcome) in trace.requests.iter().zip(&outcome.requests) {
        let window = window_of(request.arrival_seconds);
        moments[window].demand += config.model.work_seconds(&request.mix(), &capacity) / length;
        served[window].0 += 1;
        served[window].1 += u64::from(outcome.within_slo);
    }
    for (moment, (arrived, within)) in moments.iter_mut().zip(served) {
        moment.attainment = (arrived > 0).then(|| within as f64 / arrived as f64);
    }
    moments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ScaleAction;
    use crate::model::{ServingModel, SloLevel};
    use crate::trace::Request;

    fn life(created: f64, ready: Option<f64>, draining: Option<f64>, deleted: f64) -> GroupLife {
        GroupLife {
            created_seconds: created,
            ready_seconds: ready,
            draining_seconds: draining,
            deleted_seconds: deleted,
        }
    }

    fn request(ttft: f64, within_slo: bool, lost: bool) -> RequestOutcome {
        RequestOutcome {
            ttft_seconds: (!lost).then_some(ttft),
            tpot_seconds: (!lost).then_some(ttft / 10.0),
            finished_seconds: (!lost).then_some(ttft),
            lost,
            within_slo,
        }
    }

    fn outcome() -> Outcome {
        let mut requests: Vec<RequestOutcome> = (1..=98)
            .map(|at| request(f64::from(at), true, false))
            .collect();
        requests.push(request(1000.0, false, false));
        requests.push(request(0.0, false, true));
        Outcome {
            requests,
            groups: vec![
                life(0.0, Some(0.0), None, 3600.0),
                life(900.0, Some(1200.0), Some(2400.0), 2700.0),
                life(900.0, None, None, 1000.0),
                life(1000.0, None, None, 1100.0),
            ],
            actions: [
                (900.0, 1, 3),
                (1000.0, 3, 2),
                (1601.0, 2, 3),
                (1700.0, 3, 4),
            ]
            .map(|(at_seconds, from, to)| ScaleAction {
                at_seconds,
                from,
                to,
            })
            .to_vec(),
            preemptions: 7,
            steps: 1,
            end_seconds: 3600.0,
        }
    }

    fn config() -> Config {
        let model = ServingModel::llama_405b_tp8();
        let slo = model.slo(SloLevel::Standard);
        Config::new(model, slo)
    }

    #[test]
    fn figures_are_counted_over_all_requests_and_groups() {
        let report = Report::new("made-up", 0.5, &config(), &outcome());
        assert_eq!((report.requests, report.requests_lost), (100, 1));
        assert!((report.slo_attainment - 0.98).abs() < 1e-9);
        // 3600 + 1800 + 100 + 100 seconds of eight GPUs.
        assert!((report.gpu_hours - 5600.0 / 3600.0 * 8.0).abs() < 1e-9);
        assert_eq!(
            (report.scale_actions, report.reversals, report.max_groups),
            (4, 1, 3)
        );
        assert!((report.p50_ttft_seconds - 50.0).abs() < 1e-9);
        assert!((report.p99_ttft_seconds - 1000.0).abs() < 1e-9);
        assert!((report.p99_tpot_seconds - 100.0).abs() < 1e-9);
        let json = serde_json::to_value(&report).unwrap();
        for name in [
            "slo_attainment",
            "gpu_hours",
            "scale_actions",
            "p99_ttft_seconds",
        ] {
            assert!(json[name].is_number(), "{name}");
        }
    }

    #[test]
    fn a_timeline_tells_phases_apart() {
        let requests = (0..100)
            .map(|at| Request {
                arrival_seconds: f64::from(at) * 10.0,
                input: 1155,
                cached: 0,
                output: 211,
            })
            .collect();
        let moments = timeline(&Trace { requests }, &config(), &outcome(), 12);
        // Windows of 300 s; the fourth is from 900 to 1200.
        assert!((moments[0].ready - 1.0).abs() < 1e-9);
        assert!((moments[3].starting - (1.0 + 200.0 / 300.0)).abs() < 1e-9);
        assert!((moments[5].ready - 2.0).abs() < 1e-9);
        assert!((moments[8].draining - 1.0).abs() < 1e-9);
        assert!(
            (moments[0].demand - 0.1 / 5.048).abs() < 1e-4,
            "{:?}",
            moments[0]
        );
        assert_eq!(moments[0].attainment, Some(1.0));
        assert_eq!(moments[3].attainment, Some(0.8));
        assert_eq!(moments[5].attainment, None);
    }
}
