//! What ranks of one group do together.

/// A collective operation that did not happen. The group is over: no rank may
/// go on after one of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A peer gave up, or the group was told to stop.
    #[error("the group was aborted: {reason}")]
    Aborted {
        /// Who stopped it and why.
        reason: String,
    },
    /// A peer's process stopped answering.
    #[error("rank {rank} has been silent for {silent_ms} ms")]
    Silent {
        /// The silent peer.
        rank: usize,
        /// Time since its last sign of life.
        silent_ms: u64,
    },
    /// The connection to a peer broke.
    #[error("the connection to rank {rank} broke: {reason}")]
    PeerLost {
        /// The peer at the other end.
        rank: usize,
        /// What the transport said.
        reason: String,
    },
    /// Peers entered different operations or lengths.
    #[error("rank {rank} is out of step: {reason}")]
    OutOfStep {
        /// The peer that differs.
        rank: usize,
        /// What differs.
        reason: String,
    },
}

/// Collective operations over the ranks of a group.
///
/// Every rank calls the same operations in the same order with the same
/// lengths. Sums are taken in rank order 0, 1, …, n−1 in f32 on every rank, so
/// that all ranks hold bitwise equal results. Every wait has a deadline.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world(&self) -> usize;

    /// Replaces `data` by the element-wise sum over all ranks.
    ///
    /// # Errors
    /// When a peer ended, fell silent, or is out of step.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Collects every rank's `part` into `out`, in rank order. Parts may differ
    /// in length: `lens[r]` is rank r's, `out.len()` their sum, the same
    /// `lens` on every rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError>;
}

/// The group of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalCollective;

impl Collective for LocalCollective {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        _lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        out.copy_from_slice(part);
        Ok(())
    }
}
