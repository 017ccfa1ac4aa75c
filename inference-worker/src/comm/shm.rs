//! Collectives of the ranks of one pod, through shared memory.
#![allow(
    unsafe_code,
    reason = "declaring which types may live in shared memory"
)]

mod lanes;
pub(super) mod pod;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use llama_model::{Collective, CollectiveError, Layout};

use self::pod::PodRank;
use super::board::Board;
use super::placement::Placement;
use super::region::Region;
use super::{Link, Words, check_gather, no_stage};

/// One rank's end of the shared memory of a pod that holds the whole group.
#[derive(Debug)]
pub struct ShmLink {
    layout: Layout,
    rank: usize,
    pod: PodRank,
}

impl ShmLink {
    /// Bytes of the region that `ranks` ranks need, board included.
    pub fn bytes(ranks: usize) -> usize {
        PodRank::bytes(ranks)
    }

    /// Rank `rank`'s end in a group of `layout`. `own_cores` says that every rank's
    /// threads have cores of their own, so that a short spin beats sleeping. `None`
    /// when the region is too small or the board is of another number of ranks.
    pub fn new(
        region: Arc<Region>,
        board: Board,
        layout: Layout,
        rank: usize,
        own_cores: bool,
    ) -> Option<Self> {
        let placement = Placement::new(layout, 1)?;
        Some(Self {
            layout,
            rank,
            pod: PodRank::new(region, board, placement, rank, own_cores)?,
        })
    }
}

impl Collective for ShmLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn layout(&self) -> Layout {
        self.layout
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.pod.reduce(data)
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_gather(self.rank, self.layout.world(), part.len(), lens, out.len())?;
        self.pod.gather(part, lens, out)
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        if !self.pod.has_next() {
            return Err(no_stage(self.rank, "next"));
        }
        self.pod.send_next(data)
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if !self.pod.has_previous() {
            return Err(no_stage(self.rank, "previous"));
        }
        self.pod.receive_previous(data)
    }
}

impl Link for ShmLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.pod.broadcast(payload)
    }

    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError> {
        self.pod.gather_words(mine)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.pod.set_deadline(deadline);
    }

    fn expect_close(&mut self) {}
}
