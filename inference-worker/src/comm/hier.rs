//! Collectives of ranks in several pods of several ranks each: shared memory inside
//! a pod, TCP between pods.
//!
//! The first rank of a pod speaks for it. A sum over several pods is taken inside
//! each first and then among their speakers, which hand the result on in their pods.
//! [`Placement::backend`] allows that only where it is the order of sums anyway, so
//! the bits are those of any other backend. Beside speakers, ranks of neighbouring
//! stages in different pods have connections.

#[cfg(test)]
mod tests;

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use llama_model::{Collective, CollectiveError, Layout};

use super::board::Board;
use super::placement::Placement;
use super::region::Region;
use super::shm::pod::PodRank;
use super::tcp::LinkError;
use super::tcp::peers::Peers;
use super::{Link, Words, bytes_to_words, check_gather, no_stage, words_to_bytes};

/// One rank's end of a group of pods.
#[derive(Debug)]
pub struct HierLink {
    placement: Placement,
    rank: usize,
    pod: PodRank,
    peers: Peers,
    speakers: Vec<usize>,
    /// The speakers of the pods that share this rank's layers, if several do.
    across: Vec<usize>,
}

impl HierLink {
    /// The link of `rank` through its pod's `region` and over `connections`, which
    /// holds a stream for every rank that [`Placement::connects`] with this one.
    /// `own_cores` is that of [`super::shm::ShmLink::new`]. `Ok(None)` when the region is too
    /// small or the board is of another number of ranks.
    ///
    /// # Errors
    /// When a socket refuses its options or a thread cannot start.
    pub fn new(
        placement: Placement,
        rank: usize,
        (region, board): (Arc<Region>, Board),
        connections: Vec<Option<TcpStream>>,
        own_cores: bool,
    ) -> Result<Option<Self>, LinkError> {
        let Some(pod) = PodRank::new(region, board.clone(), placement, rank, own_cores) else {
            return Ok(None);
        };
        Ok(Some(Self {
            pod,
            peers: Peers::new(rank, placement.local(rank), connections, board)?,
            speakers: placement.speakers(),
            across: placement.stage_speakers(rank),
            placement,
            rank,
        }))
    }
}

impl Collective for HierLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn layout(&self) -> Layout {
        self.placement.layout
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let (peers, across) = (&mut self.peers, &self.across);
        if across.is_empty() {
            return self.pod.reduce(data);
        }
        self.pod
            .reduce_through(data, &mut |sum| peers.sum(across, sum))
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let placement = self.placement;
        check_gather(self.rank, placement.world(), part.len(), lens, out.len())?;
        let here = placement.ranks_of(placement.pod(self.rank));
        let start: usize = lens[..here.start].iter().sum();
        let end = start + lens[here.clone()].iter().sum::<usize>();
        self.pod.gather(part, &lens[here], &mut out[start..end])?;
        if self.pod.speaks() {
            let by_pod = lens.chunks(placement.ranks_per_pod);
            let lens: Vec<usize> = by_pod.map(|lens| lens.iter().sum()).collect();
            self.peers.gather(&self.speakers, &lens, out)?;
        }
        self.pod.spread(&mut out[..start])?;
        self.pod.spread(&mut out[end..])
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        let peer = self.rank + self.placement.layout.tensor;
        if self.pod.has_next() {
            self.pod.send_next(data)
        } else if peer < self.placement.world() {
            self.peers.send_next(peer, data)
        } else {
            Err(no_stage(self.rank, "next"))
        }
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if self.pod.has_previous() {
            return self.pod.receive_previous(data);
        }
        match self.rank.checked_sub(self.placement.layout.tensor) {
            Some(peer) => self.peers.receive_previous(peer, data),
            None => Err(no_stage(self.rank, "previous")),
        }
    }
}

impl Link for HierLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if self.pod.speaks() {
            self.peers.broadcast(&self.speakers, payload)?;
        }
        self.pod.broadcast(payload)
    }

    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError> {
        let here = self.pod.gather_words(mine)?;
        let mut all: Vec<u8> = here.into_iter().flat_map(words_to_bytes).collect();
        if self.pod.speaks() {
            all = self.peers.gather_bytes(&self.speakers, &all)?;
        }
        self.pod.broadcast(&mut all)?;
        Ok(all
            .chunks(size_of_val(&mine))
            .filter_map(bytes_to_words)
            .collect())
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.pod.set_deadline(deadline);
        self.peers.set_deadline(deadline);
    }

    fn expect_close(&mut self) {
        self.peers.expect_close();
    }
}
