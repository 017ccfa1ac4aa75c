//! How ranks talk: the backends of [`Collective`] and what surrounds them.
//!
//! | ranks of the group | backend |
//! |---|---|
//! | one | [`LocalCollective`] |
//! | several, in one pod | [`shm::ShmLink`] |
//! | several pods of several ranks, where the order of sums allows | [`hier::HierLink`] |
//! | several pods | [`tcp::TcpLink`] |
//!
//! [`nccl`] adds sums between CUDA devices to any of them. [`seat::Seat`] chooses. All give bitwise the same sums: those of
//! [`llama_model::order`] over the ranks' parts.

pub mod board;
#[cfg(test)]
mod fixtures;
pub mod hier;
pub mod nccl;
mod patience;
pub mod placement;
pub mod region;
pub mod rendezvous;
pub mod seat;
pub mod shm;
pub mod silence;
mod sum;
pub mod tcp;

use std::time::Duration;

use llama_contract::HANG_TIMEOUT_SECONDS;
use llama_model::{Collective, CollectiveError, LocalCollective};

/// A rank whose heartbeat stands still for this long is taken for dead.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(2);
/// How often a rank gives a sign of life.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_millis(100);
/// How long one rank may keep the others waiting, alive or not, where nothing else is said.
pub const STEP_DEADLINE: Duration = Duration::from_secs(HANG_TIMEOUT_SECONDS as u64);
/// How long ranks wait for the slowest to have loaded its weights.
pub const LOAD_DEADLINE: Duration = Duration::from_hours(1);

/// What [`Link::gather_words`] takes from each rank.
pub type Words = [u64; 3];

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
    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError>;

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

    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError> {
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

/// The error of a rank at the pipeline's end that asks for the stage beyond.
fn no_stage(rank: usize, which: &str) -> CollectiveError {
    CollectiveError::OutOfStep {
        rank,
        reason: format!("it has no {which} stage"),
    }
}

/// `duration` in whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Three words as little-endian bytes.
fn words_to_bytes(words: Words) -> [u8; size_of::<Words>()] {
    let mut bytes = [0; size_of::<Words>()];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Reads [`words_to_bytes`]; `None` when the length differs.
fn bytes_to_words(bytes: &[u8]) -> Option<Words> {
    let mut words = Words::default();
    if bytes.len() != size_of_val(&words) {
        return None;
    }
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(from.try_into().ok()?);
    }
    Some(words)
}
