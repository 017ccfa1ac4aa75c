//! What ranks of one group do together.

use llama_checkpoint::Layout;

use crate::device::TensorCollective;

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
    /// The transport failed and does not say whose fault it is.
    #[error("{operation} failed: {reason}")]
    Transport {
        /// What was being done.
        operation: String,
        /// What the transport said.
        reason: String,
    },
}

/// Collective operations over the ranks of a group.
///
/// Every rank of a stage calls the same operations in the same order with the
/// same lengths, and so do all ranks for those that span the group. Every wait
/// has a deadline.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How the ranks divide the model.
    fn layout(&self) -> Layout;

    /// Replaces `data` by the element-wise sum over the ranks of this stage, taken
    /// in the order of [`crate::order`] in f32 on every rank, so that all hold
    /// bitwise equal results.
    ///
    /// # Errors
    /// When a peer ended, fell silent, or is out of step.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Collects the `part` of every rank of the group into `out`, in rank order.
    /// Parts may differ in length and be empty: `lens[r]` is rank r's, `out.len()`
    /// their sum, the same `lens` on every rank.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Hands `data` to the rank at the same place of the next stage, which calls
    /// [`Collective::receive_previous`] with the same length. Not for the last
    /// stage.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError>;

    /// Fills `data` with what the rank at the same place of the previous stage
    /// sends. Not for the first stage.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// The operations on tensors that stay on their devices, where this backend
    /// has them.
    fn on_device(&mut self) -> Option<&mut dyn TensorCollective> {
        None
    }
}

/// The group of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalCollective;

impl Collective for LocalCollective {
    fn rank(&self) -> usize {
        0
    }

    fn layout(&self) -> Layout {
        Layout::tensor(1)
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

    fn send_next(&mut self, _data: &[f32]) -> Result<(), CollectiveError> {
        Err(no_neighbour("next"))
    }

    fn receive_previous(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Err(no_neighbour("previous"))
    }
}

/// A stage asked for a neighbour that it does not have.
fn no_neighbour(which: &str) -> CollectiveError {
    CollectiveError::OutOfStep {
        rank: 0,
        reason: format!("a group of one stage has no {which} stage"),
    }
}
