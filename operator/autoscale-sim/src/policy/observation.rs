//! What a controller would see.

/// Where a group is in its life, as the Kubernetes API says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its pods run, its model is not loaded yet.
    Starting,
    /// It takes requests.
    Ready,
    /// It finishes what it has and takes nothing more.
    Draining,
}

/// Counters and gauges that a group's leader exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupMetrics {
    /// Steps done.
    pub steps_total: u64,
    /// Prompt tokens calculated.
    pub prompt_tokens_total: u64,
    /// Prompt tokens that a prefix cache had.
    pub cached_tokens_total: u64,
    /// Tokens of answers.
    pub generation_tokens_total: u64,
    /// Sequences that run now.
    pub running: u64,
    /// Requests that wait in the group.
    pub waiting: u64,
    /// Prompt tokens of these.
    pub waiting_tokens: u64,
    /// Tokens that the KV cache holds or has reserved.
    pub kv_tokens_used: u64,
    /// Sequences thrown out of a full cache to be calculated again.
    pub preemptions_total: u64,
    /// Requests finished.
    pub finished_total: u64,
    /// Those of them that got what the SLO asks for.
    pub finished_within_slo_total: u64,
}

/// One group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupObservation {
    /// A number that no other group has had.
    pub id: u64,
    /// Its phase now.
    pub phase: Phase,
    /// When its pods were created.
    pub created_seconds: f64,
    /// When it became ready.
    pub ready_seconds: Option<f64>,
    /// Its metrics at the last scrape; none if it answered none.
    pub metrics: Option<GroupMetrics>,
}

/// Counters and gauges of the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GatewayMetrics {
    /// Requests that arrived.
    pub requests_total: u64,
    /// Their prompt tokens.
    pub prompt_tokens_total: u64,
    /// Requests that the gateway holds because no group takes more.
    pub held: u64,
    /// Their prompt tokens.
    pub held_tokens: u64,
    /// Seconds that the first of them has been held.
    pub oldest_held_seconds: Option<f64>,
}

/// All that a policy decides from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    /// Seconds of simulated time.
    pub now_seconds: f64,
    /// When the metrics were scraped; meaningless while there are none.
    pub scraped_seconds: f64,
    /// The groups that exist, oldest first.
    pub groups: Vec<GroupObservation>,
    /// The gateway; none if no scrape of it succeeded.
    pub gateway: Option<GatewayMetrics>,
    /// Groups that are wanted now (`spec.replicas`): starting and ready ones.
    pub replicas: usize,
}

impl Observation {
    /// Groups in this phase.
    pub fn count(&self, phase: Phase) -> usize {
        self.groups
            .iter()
            .filter(|group| group.phase == phase)
            .count()
    }

    /// Metrics of the groups that answered.
    pub fn metrics(&self) -> impl Iterator<Item = &GroupMetrics> {
        self.groups
            .iter()
            .filter_map(|group| group.metrics.as_ref())
    }

    /// Sum over the groups that answered; none if none did.
    pub fn sum(&self, of: impl Fn(&GroupMetrics) -> u64) -> Option<f64> {
        let mut answers = self.metrics().peekable();
        answers.peek()?;
        Some(answers.map(of).sum::<u64>() as f64)
    }
}
