//! How ranks talk: the backends of [`Collective`] and what surrounds them.
//!
//! | ranks of the group | backend |
//! |---|---|
//! | one | [`LocalCollective`] |
//! | several, in one pod | [`shm::ShmLink`] |
//! | several pods | [`tcp::TcpLink`] |

pub mod board;
#[cfg(test)]
mod fixtures;
pub mod region;
pub mod rendezvous;
pub mod shm;
pub mod silence;
pub mod tcp;

use std::time::Duration;

use llama_model::{Collective, CollectiveError, LocalCollective};

/// A rank whose heartbeat stands still for this long is taken for dead.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(2);
/// How often a rank gives a sign of life.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_millis(100);
/// How long one rank may keep the others waiting in a step, alive or not.
pub const STEP_DEADLINE: Duration = Duration::from_mins(1);
/// How long ranks wait for the slowest to have loaded its weights.
pub const LOAD_DEADLINE: Duration = Duration::from_hours(1);

/// What ranks exchange beside the model's sums: step plans and their headers.
///
/// As with [`Collective`], every rank calls the same operations in the same order.
pub trait Link: Collective {
    /// Gives rank 0's `payload` to every rank.
    ///
    /// # Errors
    /// When a peer ended, fell silent, or is out of step.
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// Every rank's `mine`, in rank order.
    ///
    /// # Errors
    /// As [`Link::broadcast`].
    fn gather_words(&mut self, mine: [u64; 3]) -> Result<Vec<[u64; 3]>, CollectiveError>;

    /// How long later operations wait for a peer that is alive but does not come.
    fn set_deadline(&mut self, deadline: Duration);

    /// Announces that peers will close their side after the next operation, so
    /// that a closed connection is no failure.
    fn expect_close(&mut self);
}

impl Link for LocalCollective {
    fn broadcast(&mut self, _payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather_words(&mut self, mine: [u64; 3]) -> Result<Vec<[u64; 3]>, CollectiveError> {
        Ok(vec![mine])
    }

    fn set_deadline(&mut self, _deadline: Duration) {}

    fn expect_close(&mut self) {}
}

/// Checks that `lens` describes one part for each of `world` ranks and that
/// this rank's part and the output have the lengths it says.
fn check_gather(
    rank: usize,
    world: usize,
    part: usize,
    lens: &[usize],
    out: usize,
) -> Result<(), CollectiveError> {
    let sum: usize = lens.iter().sum();
    if lens.len() == world && lens.get(rank) == Some(&part) && sum == out {
        return Ok(());
    }
    Err(CollectiveError::OutOfStep {
        rank,
        reason: format!(
            "a part of {part} values, {out} gathered, lengths {lens:?} over {world} ranks"
        ),
    })
}
