//! Collectives of ranks in several pods, over one TCP connection for every two.

mod frame;
pub(super) mod peers;
#[cfg(test)]
pub(super) mod tests;
mod wire;

use std::net::TcpStream;
use std::time::Duration;

use llama_model::{Collective, CollectiveError, Layout};

use self::peers::Peers;
use super::board::Board;
use super::placement::Placement;
use super::{Link, Words, bytes_to_words, check_gather, no_stage, words_to_bytes};

/// One rank's end of the full mesh of a group.
#[derive(Debug)]
pub struct TcpLink {
    layout: Layout,
    rank: usize,
    peers: Peers,
    all: Vec<usize>,
    stage: Vec<usize>,
}

/// A link could not be built from its connections.
#[derive(Debug, thiserror::Error)]
#[error("set up the connection to rank {rank}")]
pub struct LinkError {
    rank: usize,
    #[source]
    source: std::io::Error,
}

impl TcpLink {
    /// The link of `rank` over `connections`, which holds one stream for every
    /// rank but our own. Failures seen while nobody waits go to `board`.
    ///
    /// # Errors
    /// When a socket refuses its options or a thread cannot start.
    pub fn new(
        placement: Placement,
        rank: usize,
        connections: Vec<Option<TcpStream>>,
        board: Board,
    ) -> Result<Self, LinkError> {
        let layout = placement.layout;
        Ok(Self {
            layout,
            rank,
            peers: Peers::new(rank, placement.local(rank), connections, board)?,
            all: (0..layout.world()).collect(),
            stage: layout.ranks_of(layout.stage(rank)).collect(),
        })
    }
}

impl Collective for TcpLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn layout(&self) -> Layout {
        self.layout
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.peers.sum(&self.stage, data)
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_gather(self.rank, self.layout.world(), part.len(), lens, out.len())?;
        let start: usize = lens[..self.rank].iter().sum();
        out[start..start + part.len()].copy_from_slice(part);
        self.peers.gather(&self.all, lens, out)
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        let peer = self.rank + self.layout.tensor;
        if peer >= self.layout.world() {
            return Err(no_stage(self.rank, "next"));
        }
        self.peers.send_next(peer, data)
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        match self.rank.checked_sub(self.layout.tensor) {
            Some(peer) => self.peers.receive_previous(peer, data),
            None => Err(no_stage(self.rank, "previous")),
        }
    }
}

impl Link for TcpLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.peers.broadcast(&self.all, payload)
    }

    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError> {
        let all = self.peers.gather_bytes(&self.all, &words_to_bytes(mine))?;
        Ok(all
            .chunks(size_of_val(&mine))
            .filter_map(bytes_to_words)
            .collect())
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.peers.set_deadline(deadline);
    }

    fn expect_close(&mut self) {
        self.peers.expect_close();
    }
}
