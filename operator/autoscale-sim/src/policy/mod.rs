//! Policies: how many groups there shall be.
//!
//! [`Token`] is the project's own. The others are re-implementations of the
//! arithmetic of well-known autoscalers, for comparison: "HPA-like", not the HPA.

mod fixed;
mod hpa;
mod keda;
mod kpa;
mod observation;
mod token;

pub use fixed::{Oracle, Static};
pub use hpa::{Hpa, HpaCore, HpaMetric, PodsMetric, TokenTotals};
pub use keda::Keda;
pub use kpa::Kpa;
pub use observation::{GatewayMetrics, GroupMetrics, GroupObservation, Observation, Phase};
pub use token::Token;

use crate::count;
use crate::engine::Config;
use crate::trace::Trace;

/// What a policy wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Starting and ready groups together.
    pub replicas: usize,
    /// Going up, take draining groups back before starting new ones. What
    /// deletes pods cannot do that.
    pub take_back_draining: bool,
    /// Going down, give up at most so many starting groups and drain ready
    /// ones for the rest. What deletes pods takes all that start first.
    pub cancel_at_most: Option<usize>,
}

impl Decision {
    /// So many groups, as a Deployment or a `LeaderWorkerSet` would have them.
    pub fn replicas(replicas: usize) -> Self {
        Self {
            replicas,
            take_back_draining: false,
            cancel_at_most: None,
        }
    }
}

/// Decides on the number of groups from what it sees.
pub trait Policy {
    /// Seconds between its decisions.
    fn period_seconds(&self) -> f64;

    /// The number of groups from now on.
    fn decide(&mut self, observation: &Observation) -> Decision;
}

/// The policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PolicyName {
    /// The project's own autoscaler; target: share of requests within SLO.
    Token,
    /// HPA-like on tokens a second; target: share of a group's capacity.
    HpaTokens,
    /// HPA-like on the used share of the KV cache; target: that share.
    HpaKv,
    /// HPA-like on waiting requests (`AverageValue`); target: requests a group.
    HpaQueue,
    /// HPA-like on waiting requests (Value); target: requests in all.
    HpaQueueValue,
    /// HPA-like on running and waiting requests; target: share of n*.
    HpaConcurrency,
    /// KEDA-like on running and waiting requests; target: share of n*.
    Keda,
    /// Knative-KPA-like on running and waiting requests; target: share of n*.
    Kpa,
    /// The same with a scale-down delay of 300 s.
    KpaDelay,
    /// Knows the work to come; target: utilisation.
    Oracle,
    /// A fixed number; target: share of the greatest minute's work.
    Static,
}

/// Why a policy cannot be made.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PolicyError {
    /// The target is no number above zero.
    #[error("target: expected a number above 0, got {0}")]
    Target(f64),
    /// The project's autoscaler cannot work with its settings.
    #[error(transparent)]
    Settings(#[from] llama_autoscaler::settings::SettingsError),
    /// The policy has no way back from zero groups.
    #[error("min: {0} cannot start from 0 groups, expected at least 1")]
    NoWayFromZero(&'static str),
}

impl PolicyError {
    /// What went wrong, as a word that metrics may carry.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Target(_) => "target",
            Self::Settings(error) => error.category(),
            Self::NoWayFromZero(_) => "min",
        }
    }
}

impl PolicyName {
    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::HpaTokens => "hpa-tokens",
            Self::HpaKv => "hpa-kv",
            Self::HpaQueue => "hpa-queue",
            Self::HpaQueueValue => "hpa-queue-value",
            Self::HpaConcurrency => "hpa-concurrency",
            Self::Keda => "keda",
            Self::Kpa => "kpa",
            Self::KpaDelay => "kpa-delay",
            Self::Oracle => "oracle",
            Self::Static => "static",
        }
    }

    /// What its documentation or its samples start with.
    pub fn default_target(self) -> f64 {
        match self {
            Self::Token => 0.99,
            Self::HpaTokens => 0.75,
            Self::HpaKv => 0.5,
            Self::HpaQueue => 5.0,
            Self::HpaQueueValue | Self::Static => 1.0,
            Self::HpaConcurrency | Self::Keda | Self::Kpa | Self::KpaDelay => 0.7,
            Self::Oracle => 0.8,
        }
    }

    /// Groups that it has from the start, where that is all there is to it.
    pub fn initial_groups(self, target: f64, trace: &Trace, config: &Config) -> Option<usize> {
        (self == Self::Static).then(|| Static::new(target, trace, config).groups())
    }

    /// The policy for a trace: shares become numbers of its mean request.
    pub fn build(
        self,
        target: f64,
        trace: &Trace,
        config: &Config,
    ) -> Result<Box<dyn Policy>, PolicyError> {
        if !(target.is_finite() && target > 0.0) {
            return Err(PolicyError::Target(target));
        }
        let can_wake = matches!(
            self,
            Self::Token | Self::Keda | Self::Kpa | Self::KpaDelay | Self::Oracle
        );
        if config.min_groups == 0 && !can_wake {
            return Err(PolicyError::NoWayFromZero(self.as_str()));
        }
        let capacity = config.capacity(trace);
        let core = HpaCore::new(config.min_groups.max(1), config.max_groups);
        let hpa = |metric| -> Box<dyn Policy> { Box::new(Hpa::new(core.clone(), metric)) };
        let sequences = target * capacity.sequences;
        Ok(match self {
            Self::Token => Box::new(Token::new(target, config)?),
            Self::HpaTokens => hpa(HpaMetric::tokens(target * capacity.tokens_per_second)),
            Self::HpaKv => hpa(HpaMetric::KvShare {
                target,
                kv_tokens: config.model.kv_tokens,
            }),
            Self::HpaQueue => hpa(HpaMetric::WaitingAverage { target }),
            Self::HpaQueueValue => hpa(HpaMetric::WaitingValue { target }),
            Self::HpaConcurrency => hpa(HpaMetric::InFlightAverage { target: sequences }),
            Self::Keda => Box::new(Keda::new(core.clone(), sequences, config.min_groups)),
            Self::Kpa => Box::new(Kpa::new(sequences, 0.0)),
            Self::KpaDelay => Box::new(Kpa::new(sequences, 300.0)),
            Self::Oracle => Box::new(Oracle::new(target, trace, config)),
            Self::Static => Box::new(Static::new(target, trace, config)),
        })
    }
}

/// Groups for a sum at so much each, none for nothing.
fn ceil_ratio(sum: f64, each: f64) -> usize {
    count::ceil(sum / each)
}
