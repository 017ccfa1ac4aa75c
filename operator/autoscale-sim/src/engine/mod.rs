//! The simulation: a gateway, groups that come and go, and a policy.

mod group;
mod simulation;
#[cfg(test)]
mod tests;
mod workload;

pub use simulation::simulate;
pub use workload::RequestOutcome;

use crate::model::{Capacity, ServingModel, Slo};
use crate::trace::Trace;

/// How much may wait in a group; the rest waits at the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBound {
    /// Requests.
    pub requests: usize,
    /// Their prompt tokens. One request always fits.
    pub tokens: u64,
}

impl QueueBound {
    /// Eight requests, and as many prompt tokens as two steps take.
    pub fn of(model: &ServingModel) -> Self {
        Self {
            requests: 8,
            tokens: 2 * model.chunk_tokens,
        }
    }
}

/// A time in which no metrics are scraped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outage {
    /// Seconds since the start of the trace.
    pub start_seconds: f64,
    /// How long it lasts.
    pub duration_seconds: f64,
}

impl Outage {
    fn covers(&self, at: f64) -> bool {
        (self.start_seconds..self.start_seconds + self.duration_seconds).contains(&at)
    }
}

/// What is simulated besides the trace and the policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The model and its groups.
    pub model: ServingModel,
    /// What requests are measured by.
    pub slo: Slo,
    /// Median seconds from creating a group to its being ready.
    pub cold_start_seconds: f64,
    /// Spread of that time (sigma of a lognormal distribution).
    pub cold_start_sigma: f64,
    /// Fewest groups.
    pub min_groups: usize,
    /// Most groups.
    pub max_groups: usize,
    /// Groups that are ready at the start.
    pub initial_groups: usize,
    /// Seconds that a group may take to finish what it has.
    pub drain_seconds: f64,
    /// Age of the metrics that a policy sees, in seconds.
    pub scrape_lag_seconds: f64,
    /// Bound of a group's queue.
    pub queue: QueueBound,
    /// A time without metrics.
    pub outage: Option<Outage>,
    /// Seconds after the last arrival at which what is unfinished is lost.
    pub tail_seconds: f64,
    /// Do steps that differ by nothing but their context in one go. The same
    /// result without it, slowly.
    pub skip_ahead: bool,
    /// Seed of cold starts.
    pub seed: u64,
}

impl Config {
    /// The defaults for a model: a cold start of 300 s, 1 to 64 groups, 600 s
    /// to drain, metrics that are 15 s old.
    pub fn new(model: ServingModel, slo: Slo) -> Self {
        Self {
            queue: QueueBound::of(&model),
            model,
            slo,
            cold_start_seconds: 300.0,
            cold_start_sigma: 0.3,
            min_groups: 1,
            max_groups: 64,
            initial_groups: 1,
            drain_seconds: 600.0,
            scrape_lag_seconds: 15.0,
            outage: None,
            tail_seconds: 3600.0,
            skip_ahead: true,
            seed: 1,
        }
    }

    /// What one group can do with the mean request of a trace at the SLO.
    pub fn capacity(&self, trace: &Trace) -> Capacity {
        self.model.capacity(&trace.mix(), self.slo.tpot_seconds)
    }

    /// Seconds of group time that arrive in each window of a trace.
    pub fn work_by_window(&self, trace: &Trace, window_seconds: f64) -> Vec<f64> {
        let capacity = self.capacity(trace);
        let mut windows =
            vec![0.0; crate::count::index(trace.duration_seconds() / window_seconds) + 1];
        for request in &trace.requests {
            let window = crate::count::index(request.arrival_seconds / window_seconds);
            windows[window] += self.model.work_seconds(&request.mix(), &capacity);
        }
        windows
    }

    /// Groups for the first ten minutes of a trace at 80 % of their capacity.
    pub fn groups_for_start(&self, trace: &Trace) -> usize {
        const SECONDS: f64 = 600.0;
        let work = self
            .work_by_window(trace, SECONDS)
            .first()
            .copied()
            .unwrap_or(0.0);
        let seconds = trace.duration_seconds().clamp(1.0, SECONDS);
        crate::count::ceil(work / seconds / 0.8).clamp(self.min_groups, self.max_groups)
    }
}

/// The life of a group, in seconds since the start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupLife {
    /// Its pods were created.
    pub created_seconds: f64,
    /// It became ready, if it did.
    pub ready_seconds: Option<f64>,
    /// It began to drain, if it did.
    pub draining_seconds: Option<f64>,
    /// Its pods were deleted, or the simulation ended.
    pub deleted_seconds: f64,
}

/// A change of the wanted number of groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleAction {
    /// When.
    pub at_seconds: f64,
    /// Groups wanted before.
    pub from: usize,
    /// Groups wanted after.
    pub to: usize,
}

/// All that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// By request, in the trace's order.
    pub requests: Vec<RequestOutcome>,
    /// Every group that ever was.
    pub groups: Vec<GroupLife>,
    /// Every change of the wanted number.
    pub actions: Vec<ScaleAction>,
    /// Sequences thrown out of full caches.
    pub preemptions: u64,
    /// Steps of all groups.
    pub steps: u64,
    /// When the last request was done.
    pub end_seconds: f64,
}
