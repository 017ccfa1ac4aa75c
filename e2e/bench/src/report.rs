//! The shape of the report, and the arithmetic in it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::subject::Subject;

const MEGABYTE: f64 = 1e6;

/// Everything that is printed.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) deployments: usize,
    pub(crate) pods_each: usize,
    /// Over which the objects are spread.
    pub(crate) namespaces: usize,
    pub(crate) nodes: usize,
    pub(crate) cores: usize,
    pub(crate) processor: Option<String>,
    /// Of the machine, before anything was started.
    pub(crate) load_average: Option<f64>,
    pub(crate) targets: Figures,
    /// LeaderWorkerSet's figures, not measured in this run.
    pub(crate) published: Published,
    /// In the order in which they were made.
    pub(crate) runs: Vec<Run>,
    /// Medians over the runs of each subject.
    pub(crate) medians: BTreeMap<&'static str, Figures>,
    /// How many times as much each peer takes: more than 1, and the operator is better.
    pub(crate) ratios: BTreeMap<&'static str, Figures>,
    /// Arguments of every program; DIR is the folder of a run.
    pub(crate) flags: BTreeMap<&'static str, Vec<String>>,
}

/// What subjects are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Figures {
    /// From the first creation until all were Ready.
    pub(crate) all_ready_seconds: f64,
    /// Of the controller, user and system.
    pub(crate) cpu_seconds: f64,
    /// Of the controller, after the run.
    pub(crate) rss_megabytes: f64,
}

/// What was aimed at.
pub(crate) const TARGETS: Figures = Figures {
    all_ready_seconds: 60.0,
    cpu_seconds: 10.0,
    rss_megabytes: 30.0,
};

/// Figures that are not of this run.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Published {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    pub(crate) figures: Figures,
    pub(crate) note: &'static str,
}

/// What LeaderWorkerSet is said to take.
pub(crate) const PUBLISHED: Published = Published {
    name: "leader-worker-set 0.10",
    figures: Figures {
        all_ready_seconds: 136.0,
        cpu_seconds: 41.0,
        rss_megabytes: 186.0,
    },
    note: "1,000 sets of two pods on two cores, as the project's design states them; not \
           measured in this run, since the Go module proxy refuses sigs.k8s.io/lws and it \
           cannot be built here",
};

/// One subject on one control plane.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) subject: Subject,
    pub(crate) load_average: Option<f64>,
    pub(crate) burst: Burst,
    pub(crate) controller: ControllerReport,
    pub(crate) rest: Rest,
    pub(crate) one_by_one: OneByOne,
    pub(crate) restart: Restart,
    pub(crate) profile: Profile,
}

impl Run {
    /// What it is compared by.
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            all_ready_seconds: self.burst.all_ready_seconds,
            cpu_seconds: self.controller.cpu_seconds,
            rss_megabytes: self.controller.rss_megabytes,
        }
    }
}

/// All objects at once.
#[derive(Debug, Serialize)]
pub(crate) struct Burst {
    /// Until the API server had answered the last creation.
    pub(crate) created_seconds: f64,
    /// Until the last pod was there.
    pub(crate) all_pods_seconds: f64,
    pub(crate) first_ready_seconds: f64,
    pub(crate) all_ready_seconds: f64,
    /// From an object's creation to its first pod.
    pub(crate) first_pod_milliseconds: Percentiles,
    /// From an object's creation until it was Ready.
    pub(crate) ready_milliseconds: Percentiles,
}

/// What the controller took for the burst and the seconds after it.
#[derive(Debug, Serialize)]
pub(crate) struct ControllerReport {
    pub(crate) idle_rss_megabytes: f64,
    /// After the burst and the rest.
    pub(crate) rss_megabytes: f64,
    pub(crate) peak_rss_megabytes: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) writes: u64,
    pub(crate) writes_each: f64,
    pub(crate) writes_by_kind: BTreeMap<String, u64>,
    pub(crate) rounds: u64,
    pub(crate) rounds_each: f64,
}

/// Some time in which nothing happens.
#[derive(Debug, Serialize)]
pub(crate) struct Rest {
    pub(crate) seconds: f64,
    pub(crate) writes: u64,
    pub(crate) rounds: u64,
    pub(crate) cpu_seconds: f64,
}

/// More objects, each created when the one before is Ready.
#[derive(Debug, Serialize)]
pub(crate) struct OneByOne {
    pub(crate) objects: usize,
    pub(crate) first_pod_milliseconds: Percentiles,
    pub(crate) ready_milliseconds: Percentiles,
}

/// The controller ends and starts again.
#[derive(Debug, Serialize)]
pub(crate) struct Restart {
    /// From its start until every object had had a round.
    pub(crate) synced_seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) writes: u64,
    pub(crate) rss_megabytes: f64,
}

/// Where the burst's time went, the seconds after it included.
#[derive(Debug, Serialize)]
pub(crate) struct Profile {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: BTreeMap<&'static str, f64>,
    /// That programs outside the benchmark took of the same cores: with more than a few,
    /// the times mean little.
    pub(crate) others_cpu_seconds: f64,
    pub(crate) rss_megabytes: BTreeMap<&'static str, f64>,
    /// Requests that the API server answered, most first.
    pub(crate) requests: Vec<Requests>,
    pub(crate) requests_total: u64,
    /// Answers by status code where it is not 2xx.
    pub(crate) refused: BTreeMap<String, u64>,
    /// What the API server asked of etcd, by operation and resource.
    pub(crate) etcd: BTreeMap<String, u64>,
    /// Seconds that requests waited in the API server's queues, by the flow schema.
    pub(crate) queued_seconds: BTreeMap<String, f64>,
    /// The flow schema of the controller.
    pub(crate) flow_schema: &'static str,
    /// Requests that the queues turned away.
    pub(crate) turned_away: u64,
}

/// Requests of one verb and resource.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Requests {
    pub(crate) what: String,
    pub(crate) count: u64,
    pub(crate) mean_milliseconds: f64,
}

/// Nearest-rank percentiles of times in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Percentiles {
    /// Of `times`, in any order.
    pub(crate) fn of(times: &[Duration]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort();
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            let time = sorted.get(rank - 1).copied().unwrap_or_default();
            rounded(time.as_secs_f64() * 1e3)
        };
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

/// Three digits behind the point.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Bytes in millions.
pub(crate) fn megabytes(bytes: u64) -> f64 {
    rounded(bytes as f64 / MEGABYTE)
}

/// The median of each figure.
pub(crate) fn median(figures: &[Figures]) -> Option<Figures> {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
        Some(rounded(f64::midpoint(
            *values.get(low)?,
            *values.get(high)?,
        )))
    };
    Some(Figures {
        all_ready_seconds: of(|figures| figures.all_ready_seconds)?,
        cpu_seconds: of(|figures| figures.cpu_seconds)?,
        rss_megabytes: of(|figures| figures.rss_megabytes)?,
    })
}

/// How many times as much `peer` takes as `own`.
pub(crate) fn ratio(peer: &Figures, own: &Figures) -> Figures {
    let of = |peer: f64, own: f64| rounded(peer / own);
    Figures {
        all_ready_seconds: of(peer.all_ready_seconds, own.all_ready_seconds),
        cpu_seconds: of(peer.cpu_seconds, own.cpu_seconds),
        rss_megabytes: of(peer.rss_megabytes, own.rss_megabytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(value: f64) -> Figures {
        Figures {
            all_ready_seconds: value,
            cpu_seconds: value * 2.0,
            rss_megabytes: value * 3.0,
        }
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        let found = Percentiles::of(&times);
        let expected = Percentiles {
            p50: 100.0,
            p99: 198.0,
            max: 200.0,
        };
        assert_eq!(found, expected);
        assert_eq!(Percentiles::of(&[]), Percentiles::default());
    }

    #[test]
    fn medians_are_of_each_figure() {
        let odd = [figures(3.0), figures(1.0), figures(2.0)];
        assert_eq!(median(&odd), Some(figures(2.0)));
        let even = [figures(3.0), figures(1.0)];
        assert_eq!(median(&even), Some(figures(2.0)));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_peer_that_takes_more_has_a_ratio_above_one() {
        let ratio = ratio(&figures(6.0), &figures(2.0));
        assert!((ratio.cpu_seconds - 3.0).abs() < 1e-9);
    }
}
