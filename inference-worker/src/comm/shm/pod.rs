//! Operations among the ranks of one pod.
//!
//! Every operation is a series of rounds on one lane. In a round each rank of the
//! lane writes its part into its own buffer, publishes the round's number, waits
//! until all others have published theirs, and reads their buffers. Two buffers
//! alternate: a rank writes round n+2 where it wrote round n, and by then every
//! peer has published n+1, which it does only after it has read round n.
//!
//! From a stage to the next, parts go one way: the sender runs ahead of the
//! receiver by as many rounds as there are buffers.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use llama_model::CollectiveError;

use super::lanes::{BUFFER, BUFFER_FLOATS, Lane, Lanes, Operation};
use crate::comm::board::Board;
use crate::comm::placement::Placement;
use crate::comm::region::Region;
use crate::comm::sum::Summer;
use crate::comm::{Words, bytes_to_words, words_to_bytes};

/// Rounds by which a stage may run ahead of the next: one for each buffer.
const AHEAD: u32 = 2;

/// One rank among those of its pod.
#[derive(Debug)]
pub(in crate::comm) struct PodRank {
    lanes: Lanes,
    /// The ranks of this pod that share this rank's layers, counted in the pod.
    stage: Range<usize>,
    /// Ranks from one stage to the next.
    stride: usize,
    stage_round: u32,
    pod_round: u32,
    sent: u32,
    received: u32,
    summer: Summer,
}

impl PodRank {
    /// Bytes of the region that `ranks` ranks need, board included.
    pub(in crate::comm) fn bytes(ranks: usize) -> usize {
        Lanes::bytes(ranks)
    }

    /// Rank `rank` of a group. `own_cores` says that every rank's threads have
    /// cores of their own, so that a short spin beats sleeping. `None` when the
    /// region is too small or the board is another pod's.
    pub(in crate::comm) fn new(
        region: Arc<Region>,
        board: Board,
        placement: Placement,
        rank: usize,
        own_cores: bool,
    ) -> Option<Self> {
        if board.ranks() != placement.ranks_per_pod || rank >= placement.world() {
            return None;
        }
        let here = placement.ranks_of(placement.pod(rank));
        let stage = placement.stage_here(rank);
        let place = (here.start, placement.local(rank));
        Some(Self {
            lanes: Lanes::new(region, board, place, own_cores)?,
            stage: stage.start - here.start..stage.end - here.start,
            stride: placement.layout.tensor,
            stage_round: 0,
            pod_round: 0,
            sent: 0,
            received: 0,
            summer: Summer::default(),
        })
    }

    pub(in crate::comm) fn set_deadline(&mut self, deadline: Duration) {
        self.lanes.deadline = deadline;
    }

    /// Whether this is the pod's first rank, which speaks for it.
    pub(in crate::comm) fn speaks(&self) -> bool {
        self.lanes.local() == 0
    }

    /// Whether the rank at the same place of the next stage is in this pod.
    pub(in crate::comm) fn has_next(&self) -> bool {
        self.lanes.local() + self.stride < self.lanes.ranks()
    }

    /// Whether the rank at the same place of the previous stage is in this pod.
    pub(in crate::comm) fn has_previous(&self) -> bool {
        self.lanes.local() >= self.stride
    }

    /// Publishes our part of `round` and waits until `expected(rank)` bytes of
    /// `operation` stand in every buffer of `ranks`, which are counted in the pod.
    fn exchange(
        &self,
        (lane, round): (Lane, u32),
        ranks: Range<usize>,
        (operation, bytes): (Operation, usize),
        expected: impl Fn(usize) -> Option<usize>,
    ) -> Result<(), CollectiveError> {
        self.lanes.publish(lane, round, operation, bytes)?;
        let own = self.lanes.local();
        for peer in ranks.filter(|peer| *peer != own) {
            let expected = expected(peer);
            self.lanes
                .await_part(peer, (lane, round), operation, expected)?;
        }
        Ok(())
    }

    /// Sums `data` over the ranks of the stage in this pod.
    pub(in crate::comm) fn reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if self.stage.len() < 2 {
            return Ok(());
        }
        for chunk in data.chunks_mut(BUFFER_FLOATS) {
            self.collect(chunk)?;
            self.sum(chunk)?;
        }
        Ok(())
    }

    /// Sums `data` over the ranks of the stage in this pod, lets the first of them
    /// take `across` what it got, and hands on what that leaves.
    pub(in crate::comm) fn reduce_through(
        &mut self,
        data: &mut [f32],
        across: &mut dyn FnMut(&mut [f32]) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let (speaker, ranks) = (self.stage.start, self.stage.clone());
        for chunk in data.chunks_mut(BUFFER_FLOATS) {
            self.collect(chunk)?;
            let bytes = size_of_val(chunk);
            self.stage_round = self.stage_round.wrapping_add(1);
            let at = (Lane::Stage, self.stage_round);
            let expected = |rank| Some(if rank == speaker { bytes } else { 0 });
            if self.lanes.local() == speaker {
                // The parts are those of the round before.
                self.sum_of(self.stage_round.wrapping_sub(1), chunk)?;
                across(chunk)?;
                self.lanes
                    .put_floats(Lane::Stage, self.stage_round, chunk)?;
                self.exchange(at, ranks.clone(), (Operation::Spread, bytes), expected)?;
            } else {
                self.exchange(at, ranks.clone(), (Operation::Spread, 0), expected)?;
                let sum = self
                    .lanes
                    .floats(speaker, Lane::Stage, self.stage_round, chunk.len())?;
                chunk.copy_from_slice(sum);
            }
        }
        Ok(())
    }

    /// Has every rank of the stage show its `chunk`.
    fn collect(&mut self, chunk: &[f32]) -> Result<(), CollectiveError> {
        self.stage_round = self.stage_round.wrapping_add(1);
        self.lanes
            .put_floats(Lane::Stage, self.stage_round, chunk)?;
        let bytes = size_of_val(chunk);
        self.exchange(
            (Lane::Stage, self.stage_round),
            self.stage.clone(),
            (Operation::Reduce, bytes),
            |_| Some(bytes),
        )
    }

    fn sum(&mut self, chunk: &mut [f32]) -> Result<(), CollectiveError> {
        self.sum_of(self.stage_round, chunk)
    }

    /// Replaces our part of `round` by the sum of all.
    fn sum_of(&mut self, round: u32, chunk: &mut [f32]) -> Result<(), CollectiveError> {
        let parts = self
            .stage
            .clone()
            .map(|rank| self.lanes.floats(rank, Lane::Stage, round, chunk.len()))
            .collect::<Result<Vec<_>, _>>()?;
        let own = self.lanes.local() - self.stage.start;
        self.summer
            .sum(chunk, (own, parts.len()), |part, range, row| {
                row.copy_from_slice(&parts[part][range]);
            });
        Ok(())
    }

    /// Collects the `part` of every rank of the pod into `out`; `lens` are those of
    /// the pod's ranks.
    pub(in crate::comm) fn gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let longest = lens.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(BUFFER_FLOATS) {
            let round = self.next_pod_round();
            let chunk_of = |len: usize| start.min(len)..(start + BUFFER_FLOATS).min(len);
            let own = &part[chunk_of(part.len())];
            self.lanes.put_floats(Lane::Pod, round, own)?;
            self.exchange(
                (Lane::Pod, round),
                0..self.lanes.ranks(),
                (Operation::Gather, size_of_val(own)),
                |rank| Some(chunk_of(lens[rank]).len() * size_of::<f32>()),
            )?;
            let mut base = 0;
            for (rank, len) in lens.iter().enumerate() {
                let chunk = chunk_of(*len);
                let values = self.lanes.floats(rank, Lane::Pod, round, chunk.len())?;
                out[base + chunk.start..base + chunk.end].copy_from_slice(values);
                base += len;
            }
        }
        Ok(())
    }

    /// Gives the `data` of the pod's first rank to the others, which know its length.
    pub(in crate::comm) fn spread(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        for chunk in data.chunks_mut(BUFFER_FLOATS) {
            let round = self.next_pod_round();
            let bytes = size_of_val(chunk);
            let own = if self.speaks() { bytes } else { 0 };
            if self.speaks() {
                self.lanes.put_floats(Lane::Pod, round, chunk)?;
            }
            self.exchange(
                (Lane::Pod, round),
                0..self.lanes.ranks(),
                (Operation::Spread, own),
                |rank| Some(if rank == 0 { bytes } else { 0 }),
            )?;
            if !self.speaks() {
                let values = self.lanes.floats(0, Lane::Pod, round, chunk.len())?;
                chunk.copy_from_slice(values);
            }
        }
        Ok(())
    }

    /// Gives the `payload` of the pod's first rank to the others.
    pub(in crate::comm) fn broadcast(
        &mut self,
        payload: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let mut start = 0;
        loop {
            let round = self.next_pod_round();
            let end = payload.len().min(start + BUFFER);
            let own: &[u8] = if self.speaks() {
                &payload[start..end]
            } else {
                &[]
            };
            self.lanes.put_bytes(Lane::Pod, round, own)?;
            self.exchange(
                (Lane::Pod, round),
                0..self.lanes.ranks(),
                (Operation::Broadcast, own.len()),
                |rank| (rank != 0).then_some(0),
            )?;
            let mut len = own.len();
            if !self.speaks() {
                let at = (Lane::Pod, round);
                len = self.lanes.await_part(0, at, Operation::Broadcast, None)?;
                if start == 0 {
                    payload.clear();
                }
                payload.extend_from_slice(self.lanes.part(0, Lane::Pod, round, len)?);
            }
            // A full buffer says that there is more, if only an empty one.
            if len < BUFFER {
                return Ok(());
            }
            start += len;
        }
    }

    /// The words of every rank of the pod.
    pub(in crate::comm) fn gather_words(
        &mut self,
        mine: Words,
    ) -> Result<Vec<Words>, CollectiveError> {
        let round = self.next_pod_round();
        self.lanes
            .put_bytes(Lane::Pod, round, &words_to_bytes(mine))?;
        let bytes = size_of_val(&mine);
        self.exchange(
            (Lane::Pod, round),
            0..self.lanes.ranks(),
            (Operation::Words, bytes),
            |_| Some(bytes),
        )?;
        (0..self.lanes.ranks())
            .map(|rank| {
                bytes_to_words(self.lanes.part(rank, Lane::Pod, round, bytes)?)
                    .ok_or_else(|| self.lanes.out_of_step(rank, "words outside the buffer"))
            })
            .collect()
    }

    /// Hands `data` to the next stage's rank in this pod.
    pub(in crate::comm) fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        let peer = self.lanes.local() + self.stride;
        for chunk in data.chunks(BUFFER_FLOATS) {
            self.sent = self.sent.wrapping_add(1);
            let round = self.sent;
            self.lanes
                .await_round(peer, Lane::Taken, round.wrapping_sub(AHEAD))?;
            self.lanes.put_floats(Lane::Next, round, chunk)?;
            let bytes = size_of_val(chunk);
            self.lanes
                .publish(Lane::Next, round, Operation::Next, bytes)?;
        }
        Ok(())
    }

    /// Fills `data` with what the previous stage's rank in this pod sends.
    pub(in crate::comm) fn receive_previous(
        &mut self,
        data: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let peer = self.lanes.local() - self.stride;
        for chunk in data.chunks_mut(BUFFER_FLOATS) {
            self.received = self.received.wrapping_add(1);
            let at = (Lane::Next, self.received);
            let bytes = size_of_val(chunk);
            self.lanes
                .await_part(peer, at, Operation::Next, Some(bytes))?;
            let values = self
                .lanes
                .floats(peer, Lane::Next, self.received, chunk.len())?;
            chunk.copy_from_slice(values);
            self.lanes
                .publish(Lane::Taken, self.received, Operation::Taken, 0)?;
        }
        Ok(())
    }

    fn next_pod_round(&mut self) -> u32 {
        self.pod_round = self.pod_round.wrapping_add(1);
        self.pod_round
    }

    /// Starts all counters at `round`, as if that many rounds were over. For tests.
    #[cfg(test)]
    pub(super) fn start_at(&mut self, round: u32) -> Result<(), CollectiveError> {
        for lane in [Lane::Stage, Lane::Pod, Lane::Next, Lane::Taken] {
            self.lanes.publish(lane, round, Operation::Taken, 0)?;
        }
        self.stage_round = round;
        self.pod_round = round;
        self.sent = round;
        self.received = round;
        Ok(())
    }
}
