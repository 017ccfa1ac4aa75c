//! Operations among ranks that reach each other by TCP.
//!
//! Values travel in pieces, of which the next is on its way while one is summed. In
//! each operation every member sends as many pieces as every other, empty ones where
//! it has no more, so that no member is more than two pieces ahead. From a stage to
//! the next pieces go one way; the receiver tells of each that it has taken.

use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use llama_model::CollectiveError;

use super::LinkError;
use super::frame::{Frame, Kind, copy_floats, floats_to_bytes};
use super::wire::{Shared, Wire};
use crate::comm::board::Board;
use crate::comm::patience::Patience;
use crate::comm::sum::Summer;
use crate::comm::{STEP_DEADLINE, millis};

/// Values in one piece.
const PIECE: usize = 256 * 1024;
/// Bytes in one piece.
pub(super) const PIECE_BYTES: usize = PIECE * size_of::<f32>();
/// Pieces by which a stage may run ahead of the next.
pub(super) const AHEAD: usize = 4;
/// How often a waiting rank looks whether the group is over.
const WAIT_SLICE: Duration = Duration::from_millis(50);

/// One rank's connections.
#[derive(Debug)]
pub(in crate::comm) struct Peers {
    rank: usize,
    /// By rank; `None` where there is no connection.
    wires: Vec<Option<Wire>>,
    shared: Shared,
    deadline: Duration,
    /// Pieces of sums so far.
    reduced: u64,
    /// Pieces of operations of all members so far.
    shared_pieces: u64,
    sent: u64,
    received: u64,
    /// Pieces that the next stage has not taken yet.
    untaken: usize,
    summer: Summer,
}

/// The part of `len` values that is piece `index`.
fn piece(index: usize, len: usize) -> Range<usize> {
    (index * PIECE).min(len)..((index + 1) * PIECE).min(len)
}

impl Peers {
    /// The connections of `rank`, which is the `local`-th of its pod, by rank.
    /// Failures seen while nobody waits go to `board`.
    ///
    /// # Errors
    /// When a socket refuses its options or a thread cannot start.
    pub(in crate::comm) fn new(
        rank: usize,
        local: usize,
        connections: Vec<Option<TcpStream>>,
        board: Board,
    ) -> Result<Self, LinkError> {
        let shared = Shared {
            board,
            local,
            closing: Arc::default(),
        };
        let wires = connections
            .into_iter()
            .enumerate()
            .map(|(peer, stream)| {
                stream
                    .map(|stream| Wire::start(peer, stream, &shared))
                    .transpose()
                    .map_err(|source| LinkError { rank: peer, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rank,
            wires,
            shared,
            deadline: STEP_DEADLINE,
            reduced: 0,
            shared_pieces: 0,
            sent: 0,
            received: 0,
            untaken: 0,
            summer: Summer::default(),
        })
    }

    pub(in crate::comm) fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    pub(in crate::comm) fn expect_close(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
    }

    fn wire(&self, rank: usize) -> Result<&Wire, CollectiveError> {
        let wire = self.wires.get(rank).and_then(Option::as_ref);
        wire.ok_or_else(|| CollectiveError::PeerLost {
            rank,
            reason: format!("rank {} has no connection to it", self.rank),
        })
    }

    fn send(&self, rank: usize, frame: Arc<Frame>) -> Result<(), CollectiveError> {
        let outgoing = self.wire(rank)?.outgoing.as_ref();
        // Blocks while the writer is busy, which its limit on writes bounds.
        match outgoing.map(|outgoing| outgoing.send(frame)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.broken(rank)),
        }
    }

    /// Sends a piece to all `members` but us.
    fn send_all(
        &self,
        members: &[usize],
        (kind, sequence): (Kind, u64),
        payload: Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let frame = Arc::new(Frame {
            kind,
            sequence,
            payload,
        });
        for rank in members.iter().filter(|rank| **rank != self.rank) {
            self.send(*rank, Arc::clone(&frame))?;
        }
        Ok(())
    }

    /// The next of what the threads of the connection to `rank` put into `queue`.
    fn wait<T>(
        &self,
        rank: usize,
        queue: &Receiver<T>,
        waits: &AtomicBool,
    ) -> Result<T, CollectiveError> {
        let patience = Patience::new(self.deadline);
        let mut waiting = None;
        loop {
            match queue.recv_timeout(WAIT_SLICE) {
                Ok(item) => return Ok(item),
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken(rank)),
                Err(RecvTimeoutError::Timeout) if self.shared.board.is_over() => {
                    return Err(self.broken(rank));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            waiting.get_or_insert_with(|| self.shared.board.wait(self.shared.local));
            if let Some(lasted) = patience.spent(waits.load(Ordering::Relaxed)) {
                return Err(CollectiveError::Silent {
                    rank,
                    silent_ms: millis(lasted),
                });
            }
        }
    }

    /// The next piece from `rank`, which must be this one and have `expected` bytes.
    fn receive(
        &self,
        rank: usize,
        (kind, sequence): (Kind, u64),
        expected: Option<usize>,
    ) -> Result<Vec<u8>, CollectiveError> {
        let wire = self.wire(rank)?;
        let frame = self.wait(rank, &wire.incoming, &wire.waits)?;
        let out_of_step = |reason| Err(CollectiveError::OutOfStep { rank, reason });
        if frame.kind != kind || frame.sequence != sequence {
            return out_of_step(format!(
                "it sent piece {} of kind {:?}, rank {} expected {sequence} of kind {kind:?}",
                frame.sequence, frame.kind, self.rank
            ));
        }
        let found = frame.payload.len();
        if expected.is_some_and(|expected| expected != found) {
            return out_of_step(format!(
                "it sent {found} bytes in piece {sequence} of kind {kind:?}, rank {} expected {}",
                self.rank,
                expected.unwrap_or_default()
            ));
        }
        Ok(frame.payload)
    }

    /// The error for a connection that no longer works.
    fn broken(&self, rank: usize) -> CollectiveError {
        match self.shared.board.cause() {
            Some(cause) => CollectiveError::Aborted {
                reason: cause.message,
            },
            None => CollectiveError::PeerLost {
                rank,
                reason: "it closed the connection".to_owned(),
            },
        }
    }

    /// Our place among `members`.
    fn place(&self, members: &[usize]) -> Result<usize, CollectiveError> {
        let place = members.iter().position(|rank| *rank == self.rank);
        place.ok_or_else(|| CollectiveError::OutOfStep {
            rank: self.rank,
            reason: format!("it is none of the ranks {members:?}"),
        })
    }

    /// Replaces `data` by its sum over `members`.
    pub(in crate::comm) fn sum(
        &mut self,
        members: &[usize],
        data: &mut [f32],
    ) -> Result<(), CollectiveError> {
        if members.len() < 2 {
            return Ok(());
        }
        let own = self.place(members)?;
        let (pieces, len, first) = (data.len().div_ceil(PIECE), data.len(), self.reduced);
        self.reduced += pieces as u64;
        let at = |index: usize| (Kind::Reduce, first + index as u64);
        for index in 0..=pieces {
            if index < pieces {
                let next = floats_to_bytes(&data[piece(index, len)]);
                self.send_all(members, at(index), next)?;
            }
            let Some(index) = index.checked_sub(1) else {
                continue;
            };
            let data = &mut data[piece(index, len)];
            let parts = members
                .iter()
                .map(|rank| match *rank {
                    rank if rank == self.rank => Ok(Vec::new()),
                    rank => self.receive(rank, at(index), Some(size_of_val(data))),
                })
                .collect::<Result<Vec<_>, _>>()?;
            self.summer
                .sum(data, (own, parts.len()), |part, values, row| {
                    let bytes = values.start * size_of::<f32>()..values.end * size_of::<f32>();
                    copy_floats(&parts[part][bytes], row);
                });
        }
        Ok(())
    }

    /// Collects what every member has of `out`, which holds their parts of `lens`
    /// values one after the other, ours in its place.
    pub(in crate::comm) fn gather(
        &mut self,
        members: &[usize],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let own = self.place(members)?;
        let starts: Vec<usize> = lens
            .iter()
            .scan(0, |end, len| {
                *end += len;
                Some(*end - len)
            })
            .collect();
        let part = |member: usize, index: usize| {
            let values = piece(index, lens[member]);
            starts[member] + values.start..starts[member] + values.end
        };
        let longest = lens.iter().copied().max().unwrap_or(0);
        let (pieces, first) = (longest.div_ceil(PIECE), self.shared_pieces);
        self.shared_pieces += pieces as u64;
        let at = |index: usize| (Kind::Gather, first + index as u64);
        for index in 0..=pieces {
            if index < pieces {
                let next = floats_to_bytes(&out[part(own, index)]);
                self.send_all(members, at(index), next)?;
            }
            let Some(index) = index.checked_sub(1) else {
                continue;
            };
            for (member, rank) in members.iter().enumerate() {
                if member != own {
                    let values = &mut out[part(member, index)];
                    let bytes = self.receive(*rank, at(index), Some(size_of_val(values)))?;
                    copy_floats(&bytes, values);
                }
            }
        }
        Ok(())
    }

    /// Gives the first member's `payload` to all.
    pub(in crate::comm) fn broadcast(
        &mut self,
        members: &[usize],
        payload: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let is_first = self.place(members)? == 0;
        let mut rest = is_first.then_some(payload.as_slice());
        let mut read = Vec::new();
        loop {
            let at = (Kind::Broadcast, self.shared_pieces);
            self.shared_pieces += 1;
            let own = rest.map_or(&[][..], |rest| &rest[..rest.len().min(PIECE_BYTES)]);
            rest = rest.map(|rest| &rest[own.len()..]);
            self.send_all(members, at, own.to_vec())?;
            let mut len = own.len();
            for (member, rank) in members.iter().enumerate() {
                if *rank == self.rank {
                    continue;
                }
                let bytes = self.receive(*rank, at, (member != 0).then_some(0))?;
                if member == 0 {
                    len = bytes.len();
                    read.extend_from_slice(&bytes);
                }
            }
            // A full piece says that there is more, if only an empty one.
            if len != PIECE_BYTES {
                break;
            }
        }
        if !is_first {
            *payload = read;
        }
        Ok(())
    }

    /// Every member's `mine`, which are of one length, one after the other.
    pub(in crate::comm) fn gather_bytes(
        &mut self,
        members: &[usize],
        mine: &[u8],
    ) -> Result<Vec<u8>, CollectiveError> {
        let at = (Kind::Words, self.shared_pieces);
        self.shared_pieces += 1;
        self.send_all(members, at, mine.to_vec())?;
        let mut all = Vec::with_capacity(members.len() * mine.len());
        for rank in members {
            if *rank == self.rank {
                all.extend_from_slice(mine);
            } else {
                all.extend(self.receive(*rank, at, Some(mine.len()))?);
            }
        }
        Ok(all)
    }

    /// Hands `data` to `peer`, a rank of the next stage.
    pub(in crate::comm) fn send_next(
        &mut self,
        peer: usize,
        data: &[f32],
    ) -> Result<(), CollectiveError> {
        for values in data.chunks(PIECE) {
            let wire = self.wire(peer)?;
            let mut untaken = self.untaken;
            while wire.taken.try_recv().is_ok() {
                untaken = untaken.saturating_sub(1);
            }
            if untaken >= AHEAD {
                self.wait(peer, &wire.taken, &wire.waits)?;
                untaken -= 1;
            }
            self.send(
                peer,
                Arc::new(Frame {
                    kind: Kind::Next,
                    sequence: self.sent,
                    payload: floats_to_bytes(values),
                }),
            )?;
            self.sent += 1;
            self.untaken = untaken + 1;
        }
        Ok(())
    }

    /// Fills `data` with what `peer`, a rank of the previous stage, sends.
    pub(in crate::comm) fn receive_previous(
        &mut self,
        peer: usize,
        data: &mut [f32],
    ) -> Result<(), CollectiveError> {
        for values in data.chunks_mut(PIECE) {
            let at = (Kind::Next, self.received);
            let bytes = self.receive(peer, at, Some(size_of_val(values)))?;
            copy_floats(&bytes, values);
            self.send(
                peer,
                Arc::new(Frame {
                    kind: Kind::Taken,
                    sequence: self.received,
                    payload: Vec::new(),
                }),
            )?;
            self.received += 1;
        }
        Ok(())
    }
}

impl Drop for Peers {
    /// Lets every writer finish what it was given. A group that is over ends its
    /// readers too; in one that goes on they end when their peers close.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        for wire in self.wires.iter_mut().flatten() {
            wire.outgoing = None;
        }
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        for wire in self.wires.iter_mut().flatten() {
            threads.extend(wire.writer.take());
            if self.shared.board.is_over() {
                // One that waits for its frames to be taken would not end.
                wire.incoming = mpsc::channel().1;
                threads.extend(wire.reader.take());
            }
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::warn!("a thread of a connection panicked");
            }
        }
    }
}
