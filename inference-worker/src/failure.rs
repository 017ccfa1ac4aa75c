//! Why a group is over.

use std::error::Error;

use llama_contract::{FailureCategory, FailureReport};
use llama_model::{CollectiveError, ModelError, ModelErrorCategory, StepError};

/// The cause of a group's end, on its way to the report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{category}: {message}")]
pub struct Failure {
    /// What kind of failure.
    pub category: FailureCategory,
    /// One sentence with names and numbers.
    pub message: String,
    /// The rank that failed first, if one did.
    pub rank: Option<u32>,
    /// The node of that rank, where the teller knows it.
    pub node: Option<String>,
    /// The step that was running.
    pub step: Option<u64>,
}

impl Failure {
    /// A failure that no rank is to blame for.
    pub fn new(category: FailureCategory, message: impl Into<String>) -> Self {
        Self {
            category,
            message: message.into(),
            rank: None,
            node: None,
            step: None,
        }
    }

    /// A failure told by `error` and its sources, in one sentence.
    pub fn from_error(category: FailureCategory, error: &(dyn Error + 'static)) -> Self {
        Self::new(category, chain(error))
    }

    /// The same failure, blamed on `rank`.
    #[must_use]
    pub fn at_rank(mut self, rank: u32) -> Self {
        self.rank = Some(rank);
        self
    }

    /// The same failure, during `step`.
    #[must_use]
    pub fn at_step(mut self, step: u64) -> Self {
        self.step = Some(step);
        self
    }

    /// What rank `rank` tells when `step` failed for it. `None` when the group
    /// was already over and somebody else told why.
    pub fn of_step(rank: u32, step: u64, error: &StepError) -> Option<Self> {
        let failure = match error {
            StepError::Collective(error) => Self::of_collective(error)?,
            StepError::Disagreement { rank } => {
                let rank = u32::try_from(*rank).unwrap_or(u32::MAX);
                Self::new(FailureCategory::SelfTestMismatch, error.to_string()).at_rank(rank)
            }
            StepError::Compute(_) | StepError::Invalid(_) => {
                let message = format!("rank {rank} failed in step {step}: {}", chain(error));
                Self::new(FailureCategory::Internal, message).at_rank(rank)
            }
        };
        Some(failure.at_step(step))
    }

    /// What a failed collective operation says of its peer. `None` for
    /// [`CollectiveError::Aborted`]: who aborted has told why.
    pub fn of_collective(error: &CollectiveError) -> Option<Self> {
        let (category, rank) = match error {
            CollectiveError::Aborted { .. } => return None,
            CollectiveError::Transport { .. } => {
                return Some(Self::new(FailureCategory::PeerLost, error.to_string()));
            }
            CollectiveError::Silent { rank, .. } => (FailureCategory::RankSilent, *rank),
            CollectiveError::PeerLost { rank, .. } => (FailureCategory::PeerLost, *rank),
            CollectiveError::OutOfStep { rank, .. } => (FailureCategory::PlanMismatch, *rank),
        };
        let failure = Self::new(category, error.to_string());
        Some(match u32::try_from(rank) {
            Ok(rank) => failure.at_rank(rank),
            Err(_) => failure,
        })
    }

    /// The report for the termination message and `/state`. `node` is where the
    /// failed rank runs, when the failure itself does not say.
    pub fn report(&self, node: Option<&str>, epoch: u64) -> FailureReport {
        FailureReport {
            category: self.category,
            message: self.message.clone(),
            rank: self.rank,
            node: self.node.clone().or_else(|| node.map(str::to_owned)),
            step: self.step,
            epoch,
        }
    }
}

/// The failure that a model error is.
pub fn of_model(error: &ModelError) -> Failure {
    let category = match error.category() {
        ModelErrorCategory::ModelNotFound => FailureCategory::ModelNotFound,
        ModelErrorCategory::ModelTruncated => FailureCategory::ModelTruncated,
        ModelErrorCategory::ModelInvalid => FailureCategory::ModelInvalid,
        ModelErrorCategory::ModelUnsupported => FailureCategory::ModelUnsupported,
        ModelErrorCategory::InvalidLayout => FailureCategory::InvalidLayout,
        ModelErrorCategory::InsufficientMemory => FailureCategory::InsufficientMemory,
        ModelErrorCategory::OutputFailed => FailureCategory::Internal,
    };
    Failure::from_error(category, error)
}

/// An error and its sources, joined by colons.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // Transparent wrappers repeat their source's words.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aborted_rank_adds_no_cause() {
        let error = StepError::Collective(CollectiveError::Aborted {
            reason: "x".to_owned(),
        });
        assert_eq!(Failure::of_step(1, 2, &error), None);
    }

    #[test]
    fn a_silent_peer_is_blamed_and_not_the_teller() {
        let error = StepError::Collective(CollectiveError::Silent {
            rank: 2,
            silent_ms: 2100,
        });
        let failure = Failure::of_step(0, 7, &error).unwrap();
        assert_eq!(failure.category, FailureCategory::RankSilent);
        assert_eq!((failure.rank, failure.step), (Some(2), Some(7)));
        assert!(failure.message.contains("2100 ms"), "{failure}");
    }

    #[test]
    fn a_failed_computation_names_its_rank() {
        let failure = Failure::of_step(1, 3, &StepError::Invalid("slot 9".to_owned())).unwrap();
        assert_eq!(failure.category, FailureCategory::Internal);
        assert_eq!(failure.rank, Some(1));
        assert!(failure.message.contains("slot 9"), "{failure}");
    }
}
