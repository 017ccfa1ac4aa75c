//! Where time and requests went between two looks.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::machine::Usage;
use crate::prometheus::{Metrics, Sample, count, counts, growth};
use crate::report::{Profile, Requests, megabytes, rounded};
use crate::subject::Counters;

/// Everything at one moment.
pub(crate) struct Snapshot {
    pub(crate) at: Instant,
    /// Of the control plane's programs and this one.
    pub(crate) usage: BTreeMap<&'static str, Usage>,
    pub(crate) controller: Usage,
    pub(crate) counters: Counters,
    /// That the cores have worked for all programs.
    pub(crate) busy_seconds: f64,
    /// Metrics of the API server.
    pub(crate) api: Metrics,
}

impl Snapshot {
    /// What happened since `before`.
    pub(crate) fn since(&self, before: &Self, flow_schema: &'static str) -> Profile {
        let requests = requests(&before.api, &self.api);
        let sums = |name: &str, key: fn(&Sample) -> Option<String>| {
            growth(&before.api.sums(name, key), &self.api.sums(name, key))
        };
        let mut cpu_seconds: BTreeMap<_, _> = self
            .usage
            .iter()
            .map(|(name, usage)| {
                let earlier = before.usage.get(name).copied().unwrap_or_default();
                (*name, rounded(usage.cpu_seconds - earlier.cpu_seconds))
            })
            .collect();
        let controller = self.controller.cpu_seconds - before.controller.cpu_seconds;
        cpu_seconds.insert("controller", rounded(controller));
        let own: f64 = cpu_seconds.values().sum();
        let others = self.busy_seconds - before.busy_seconds - own;
        let rejected = "apiserver_flowcontrol_rejected_requests_total";
        let waits = "apiserver_flowcontrol_request_wait_duration_seconds_sum";
        Profile {
            seconds: rounded((self.at - before.at).as_secs_f64()),
            cpu_seconds,
            others_cpu_seconds: rounded(others.max(0.0)),
            rss_megabytes: self
                .usage
                .iter()
                .map(|(name, usage)| (*name, megabytes(usage.rss_bytes)))
                .collect(),
            requests_total: requests.iter().map(|requests| requests.count).sum(),
            requests,
            refused: counts(&sums("apiserver_request_total", |sample| {
                let code = sample.label("code");
                (!code.starts_with('2') && sample.label("verb") != "WATCH")
                    .then(|| format!("{code} {}", what(sample)))
            })),
            etcd: counts(&sums("etcd_requests_total", |sample| {
                let (operation, kind) = (sample.label("operation"), sample.label("type"));
                Some(format!("{operation} {kind}"))
            })),
            queued_seconds: sums(waits, |sample| Some(sample.label("flow_schema").to_owned()))
                .into_iter()
                .map(|(schema, seconds)| (schema, rounded(seconds)))
                .collect(),
            flow_schema,
            turned_away: count(self.api.total(rejected) - before.api.total(rejected)),
        }
    }
}

/// The verb and resource of a request.
fn what(sample: &Sample) -> String {
    let resource = sample.label("resource");
    let subresource = sample.label("subresource");
    let separator = if subresource.is_empty() { "" } else { "/" };
    format!(
        "{} {resource}{separator}{subresource}",
        sample.label("verb")
    )
}

/// Requests but watches, which last, by verb and resource.
fn requests(before: &Metrics, after: &Metrics) -> Vec<Requests> {
    let key = |sample: &Sample| {
        let counts = sample.label("verb") != "WATCH" && !sample.label("resource").is_empty();
        counts.then(|| what(sample))
    };
    let sums = |name: &str| growth(&before.sums(name, key), &after.sums(name, key));
    let answered = sums("apiserver_request_duration_seconds_count");
    let seconds = sums("apiserver_request_duration_seconds_sum");
    let mut requests: Vec<_> = answered
        .into_iter()
        .map(|(what, answered)| Requests {
            mean_milliseconds: rounded(seconds.get(&what).unwrap_or(&0.0) / answered * 1e3),
            what,
            count: count(answered),
        })
        .collect();
    requests.sort_by_key(|requests| std::cmp::Reverse(requests.count));
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str, cpu_seconds: f64) -> Snapshot {
        let usage = Usage {
            cpu_seconds,
            ..Usage::default()
        };
        Snapshot {
            at: Instant::now(),
            usage: BTreeMap::from([("etcd", usage)]),
            controller: usage,
            counters: Counters::default(),
            busy_seconds: 3.0 * cpu_seconds,
            api: Metrics::parse(text),
        }
    }

    #[test]
    fn a_profile_is_of_what_grew() {
        let line = |name: &str, labels: &str, value: u32| {
            format!("apiserver_request_{name}{{{labels}}} {value}\n")
        };
        let pods = "verb=\"POST\",resource=\"pods\",subresource=\"\"";
        let status = "verb=\"PATCH\",resource=\"pods\",subresource=\"status\"";
        let before = snapshot(&line("duration_seconds_count", pods, 5), 1.0);
        let text = [
            line("duration_seconds_count", pods, 7),
            line("duration_seconds_sum", pods, 1),
            line("duration_seconds_count", status, 40),
            line("total", &format!("{pods},code=\"409\""), 3),
            line("total", &format!("{pods},code=\"201\""), 4),
            "etcd_requests_total{operation=\"get\",type=\"pods\"} 6\n".to_owned(),
        ];
        let profile = snapshot(&text.concat(), 3.5).since(&before, "x");
        let expected = [("PATCH pods/status", 40, 0.0), ("POST pods", 2, 500.0)];
        let expected: Vec<_> = expected
            .map(|(what, count, mean_milliseconds)| Requests {
                what: what.to_owned(),
                count,
                mean_milliseconds,
            })
            .into();
        assert_eq!(profile.requests, expected);
        assert_eq!(
            profile.refused,
            BTreeMap::from([("409 POST pods".to_owned(), 3)])
        );
        assert_eq!(profile.etcd, BTreeMap::from([("get pods".to_owned(), 6)]));
        assert!((profile.others_cpu_seconds - 2.5).abs() < 1e-9);
        assert_eq!(
            profile.cpu_seconds,
            BTreeMap::from([("controller", 2.5), ("etcd", 2.5)])
        );
    }
}
