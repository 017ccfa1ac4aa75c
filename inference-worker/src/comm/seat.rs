//! How a rank comes to its link.

use std::net::TcpStream;
use std::sync::Arc;

use llama_model::LocalCollective;

use super::Link;
use super::board::Board;
use super::hier::HierLink;
use super::placement::{Backend, Placement};
use super::region::Region;
use super::shm::ShmLink;
use super::tcp::{LinkError, TcpLink};

/// A link could not be built.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    /// The region is not what these ranks need.
    #[error("the shared memory is not that of {ranks} ranks")]
    Memory {
        /// Ranks of the pod.
        ranks: usize,
    },
    /// A connection cannot be used.
    #[error(transparent)]
    Connection(#[from] LinkError),
}

/// One rank's place in its group and its pod.
#[derive(Clone, Debug)]
pub struct Seat {
    /// Where all ranks are.
    pub placement: Placement,
    /// This rank.
    pub rank: usize,
    /// The pod's shared memory.
    pub region: Arc<Region>,
    /// The board in it.
    pub board: Board,
    /// Whether every rank's threads have cores of their own.
    pub own_cores: bool,
}

impl Seat {
    /// The link that fits the group's shape. `connections` holds, by rank, one for
    /// every rank that [`Placement::connects`] with this one; none are needed in a
    /// group of one pod.
    ///
    /// # Errors
    /// When the shared memory is too small, a socket refuses its options or a thread
    /// cannot start.
    pub fn link(self, connections: Vec<Option<TcpStream>>) -> Result<Box<dyn Link>, SeatError> {
        let Self {
            placement,
            rank,
            region,
            board,
            own_cores,
        } = self;
        let error = SeatError::Memory {
            ranks: placement.ranks_per_pod,
        };
        Ok(match placement.backend() {
            Backend::Local => Box::new(LocalCollective),
            Backend::SharedMemory => {
                let link = ShmLink::new(region, board, placement.layout, rank, own_cores);
                Box::new(link.ok_or(error)?)
            }
            Backend::Hierarchical => {
                let memory = (region, board);
                let link = HierLink::new(placement, rank, memory, connections, own_cores)?;
                Box::new(link.ok_or(error)?)
            }
            Backend::Tcp => Box::new(TcpLink::new(placement, rank, connections, board)?),
        })
    }
}
