//! Collectives of ranks in several pods, over one TCP connection per pair.
//!
//! Each connection has a writer and a reader thread. The writer sends a beat
//! whenever it has had nothing else to send, so a reader that hears nothing
//! knows its peer is gone, computing or not. When the group is over, writers
//! pass the first cause on before they close: every pod can then name it.

#[cfg(test)]
mod tests;

use std::io::{BufWriter, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, FailureReport};
use llama_model::{Collective, CollectiveError};

use super::board::Board;
use super::shm::{bytes_to_words, millis, words_to_bytes};
use super::silence::SilenceWatch;
use super::{HEARTBEAT_PERIOD, Link, SILENCE_LIMIT, STEP_DEADLINE, check_gather};
use crate::failure::Failure;

/// Longest payload of one frame; longer ones are taken for garbage.
const FRAME_LIMIT: usize = 1 << 28;
/// Frames that wait between a rank and the threads of one connection. Peers are
/// at most one operation apart.
const FRAMES_IN_FLIGHT: usize = 4;
/// How long a read blocks before the reader looks around.
const READ_SLICE: Duration = Duration::from_millis(100);
/// How long a write may make no progress.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// How often a waiting rank looks whether the group is over.
const WAIT_SLICE: Duration = Duration::from_millis(50);
const HEADER: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Beat = 0,
    Reduce = 1,
    Gather = 2,
    Broadcast = 3,
    Words = 4,
    Cause = 5,
}

impl Kind {
    fn from_u32(value: u32) -> Option<Self> {
        [
            Self::Beat,
            Self::Reduce,
            Self::Gather,
            Self::Broadcast,
            Self::Words,
            Self::Cause,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == value)
    }
}

#[derive(Debug)]
struct Frame {
    kind: Kind,
    sequence: u64,
    payload: Vec<u8>,
}

impl Frame {
    fn beat() -> Self {
        Self {
            kind: Kind::Beat,
            sequence: 0,
            payload: Vec::new(),
        }
    }

    /// Kind, payload length and sequence number, little-endian.
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        header[..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        header[4..8].copy_from_slice(&len.to_le_bytes());
        header[8..].copy_from_slice(&self.sequence.to_le_bytes());
        header
    }

    fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        to.write_all(&self.header())?;
        to.write_all(&self.payload)?;
        to.flush()
    }
}

/// What the threads of a link share.
#[derive(Clone, Debug)]
struct Shared {
    board: Board,
    closing: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Peer {
    outgoing: Option<SyncSender<Arc<Frame>>>,
    incoming: Receiver<Frame>,
    writer: Option<JoinHandle<()>>,
}

/// One rank's end of the full mesh of a group.
#[derive(Debug)]
pub struct TcpLink {
    rank: usize,
    sequence: u64,
    /// By rank; `None` at our own place.
    peers: Vec<Option<Peer>>,
    shared: Shared,
    deadline: Duration,
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
        rank: usize,
        connections: Vec<Option<TcpStream>>,
        board: Board,
    ) -> Result<Self, LinkError> {
        let shared = Shared {
            board,
            closing: Arc::default(),
        };
        let peers = connections
            .into_iter()
            .enumerate()
            .map(|(peer, stream)| {
                stream
                    .map(|stream| Peer::start(peer, stream, &shared))
                    .transpose()
                    .map_err(|source| LinkError { rank: peer, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rank,
            sequence: 0,
            peers,
            shared,
            deadline: STEP_DEADLINE,
        })
    }

    /// Sends `payload` to every peer and returns theirs, by rank, `None` at our
    /// own place.
    fn exchange(
        &mut self,
        kind: Kind,
        payload: Vec<u8>,
    ) -> Result<Vec<Option<Vec<u8>>>, CollectiveError> {
        self.sequence += 1;
        let frame = Arc::new(Frame {
            kind,
            sequence: self.sequence,
            payload,
        });
        for (rank, peer) in self.peers.iter().enumerate() {
            let Some(outgoing) = peer.as_ref().and_then(|peer| peer.outgoing.as_ref()) else {
                continue;
            };
            // Blocks while the writer is busy, which WRITE_LIMIT bounds.
            if outgoing.send(Arc::clone(&frame)).is_err() {
                return Err(self.broken(rank));
            }
        }
        (0..self.peers.len())
            .map(|rank| self.receive(rank, kind))
            .collect()
    }

    fn receive(&self, rank: usize, kind: Kind) -> Result<Option<Vec<u8>>, CollectiveError> {
        let Some(peer) = &self.peers[rank] else {
            return Ok(None);
        };
        let started = Instant::now();
        let frame = loop {
            match peer.incoming.recv_timeout(WAIT_SLICE) {
                Ok(frame) => break frame,
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken(rank)),
                Err(RecvTimeoutError::Timeout) if self.shared.board.is_over() => {
                    return Err(self.broken(rank));
                }
                Err(RecvTimeoutError::Timeout) if started.elapsed() >= self.deadline => {
                    return Err(CollectiveError::Silent {
                        rank,
                        silent_ms: millis(started.elapsed()),
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        if frame.kind != kind || frame.sequence != self.sequence {
            return Err(CollectiveError::OutOfStep {
                rank,
                reason: format!(
                    "it sent operation {} of kind {:?}, rank {} expected {} of kind {kind:?}",
                    frame.sequence, frame.kind, self.rank, self.sequence
                ),
            });
        }
        Ok(Some(frame.payload))
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

    fn wrong_length(&self, rank: usize, found: usize, expected: usize) -> CollectiveError {
        CollectiveError::OutOfStep {
            rank,
            reason: format!(
                "it sent {found} bytes in operation {}, rank {} expected {expected}",
                self.sequence, self.rank
            ),
        }
    }

    fn check_limit(&self, bytes: usize) -> Result<(), CollectiveError> {
        if bytes <= FRAME_LIMIT {
            return Ok(());
        }
        Err(CollectiveError::OutOfStep {
            rank: self.rank,
            reason: format!("{bytes} bytes in one operation, at most {FRAME_LIMIT} are sent"),
        })
    }
}

impl Peer {
    fn start(rank: usize, stream: TcpStream, shared: &Shared) -> std::io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_SLICE))?;
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let (outgoing, to_write) = mpsc::sync_channel(FRAMES_IN_FLIGHT);
        let (read, incoming) = mpsc::sync_channel(FRAMES_IN_FLIGHT);
        let reader = Reader {
            rank,
            stream: stream.try_clone()?,
            shared: shared.clone(),
            watch: SilenceWatch::default(),
            received: 0,
        };
        std::thread::Builder::new()
            .name(format!("from-rank-{rank}"))
            .spawn(move || reader.run(&read))?;
        let shared = shared.clone();
        let writer = std::thread::Builder::new()
            .name(format!("to-rank-{rank}"))
            .spawn(move || write_frames(rank, stream, &to_write, &shared))?;
        Ok(Self {
            outgoing: Some(outgoing),
            incoming,
            writer: Some(writer),
        })
    }
}

impl Drop for TcpLink {
    /// Lets every writer finish what it was given.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        for peer in self.peers.iter_mut().flatten() {
            peer.outgoing = None;
        }
        for peer in self.peers.iter_mut().flatten() {
            if let Some(writer) = peer.writer.take()
                && writer.join().is_err()
            {
                tracing::warn!("a writer thread panicked");
            }
        }
    }
}

/// Writes frames, and beats in between, until the link is dropped or broken or
/// the group is over.
fn write_frames(rank: usize, stream: TcpStream, frames: &Receiver<Arc<Frame>>, shared: &Shared) {
    let mut stream = BufWriter::new(stream);
    loop {
        let frame = match frames.recv_timeout(HEARTBEAT_PERIOD) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => Arc::new(Frame::beat()),
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if shared.board.is_over() {
            break;
        }
        if let Err(error) = frame.write(&mut stream) {
            if !shared.closing.load(Ordering::Acquire) {
                shared.board.fail(&connection_failure(rank, &error));
            }
            break;
        }
    }
    if let Some(cause) = shared.board.cause() {
        let report = cause.report(None, 0);
        let frame = Frame {
            kind: Kind::Cause,
            sequence: 0,
            payload: report.to_termination_message().into_bytes(),
        };
        if let Err(error) = frame.write(&mut stream) {
            tracing::debug!(rank, %error, "tell a peer why the group is over");
        }
    }
    if let Err(error) = stream.get_ref().shutdown(Shutdown::Write) {
        tracing::debug!(rank, %error, "close a connection");
    }
}

/// What a transport error says of the peer.
fn connection_failure(rank: usize, error: &std::io::Error) -> Failure {
    let lost = if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
        CollectiveError::Silent {
            rank,
            silent_ms: millis(WRITE_LIMIT),
        }
    } else {
        CollectiveError::PeerLost {
            rank,
            reason: error.to_string(),
        }
    };
    Failure::of_collective(&lost)
        .unwrap_or_else(|| Failure::new(FailureCategory::PeerLost, lost.to_string()))
}

struct Reader {
    rank: usize,
    stream: TcpStream,
    shared: Shared,
    watch: SilenceWatch,
    received: u64,
}

/// Why a reader stops.
enum Stop {
    /// The link was dropped or the group is over: nothing to tell.
    Quiet,
    /// The peer or the connection is at fault.
    Failed(Failure),
}

impl Reader {
    fn run(mut self, frames: &SyncSender<Frame>) {
        let stop = loop {
            match self.read_frame() {
                Ok(frame) if frame.kind == Kind::Beat => {}
                Ok(frame) if frame.kind == Kind::Cause => break self.told(&frame.payload),
                Ok(frame) => {
                    if frames.send(frame).is_err() {
                        break Stop::Quiet;
                    }
                }
                Err(stop) => break stop,
            }
        };
        if let Stop::Failed(failure) = stop {
            self.shared.board.fail(&failure);
        }
    }

    /// The cause that a peer passed on.
    fn told(&self, payload: &[u8]) -> Stop {
        let report = std::str::from_utf8(payload)
            .ok()
            .and_then(FailureReport::from_termination_message);
        match report {
            Some(report) => Stop::Failed(Failure {
                category: report.category,
                message: report.message,
                rank: report.rank,
                node: report.node,
                step: report.step,
            }),
            None => self.lost("it ended without a readable reason".to_owned()),
        }
    }

    fn lost(&self, reason: String) -> Stop {
        let error = std::io::Error::other(reason);
        Stop::Failed(connection_failure(self.rank, &error))
    }

    fn read_frame(&mut self) -> Result<Frame, Stop> {
        let mut header = [0; HEADER];
        self.fill(&mut header)?;
        let [k0, k1, k2, k3, l0, l1, l2, l3, sequence @ ..] = header;
        let number = u32::from_le_bytes([k0, k1, k2, k3]);
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let Some(kind) = Kind::from_u32(number).filter(|_| len <= FRAME_LIMIT) else {
            return Err(self.lost(format!("it sent a frame of kind {number} and {len} bytes")));
        };
        let mut payload = vec![0; len];
        self.fill(&mut payload)?;
        Ok(Frame {
            kind,
            sequence: u64::from_le_bytes(sequence),
            payload,
        })
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Stop> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.stream.read(&mut buffer[filled..]) {
                Ok(0) if self.shared.closing.load(Ordering::Acquire) => return Err(Stop::Quiet),
                Ok(0) => return Err(self.lost("it closed the connection".to_owned())),
                Ok(count) => {
                    filled += count;
                    self.received += count as u64;
                    self.watch.observe(self.received, Instant::now());
                }
                Err(error) if is_pause(error.kind()) => {
                    if self.shared.board.is_over() {
                        return Err(Stop::Quiet);
                    }
                    let silent = self.watch.observe(self.received, Instant::now());
                    if silent >= SILENCE_LIMIT && !self.shared.closing.load(Ordering::Acquire) {
                        let error = CollectiveError::Silent {
                            rank: self.rank,
                            silent_ms: millis(silent),
                        };
                        return Err(
                            Failure::of_collective(&error).map_or(Stop::Quiet, Stop::Failed)
                        );
                    }
                }
                Err(_) if self.shared.closing.load(Ordering::Acquire) => return Err(Stop::Quiet),
                Err(error) => return Err(self.lost(error.to_string())),
            }
        }
        Ok(())
    }
}

fn is_pause(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

fn floats_to_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn floats_of(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
}

impl Collective for TcpLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.peers.len()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let bytes = size_of_val(data);
        self.check_limit(bytes)?;
        let own = floats_to_bytes(data);
        let parts = self.exchange(Kind::Reduce, own.clone())?;
        for (rank, part) in parts.iter().enumerate() {
            let part = part.as_deref().unwrap_or(&own);
            if part.len() != bytes {
                return Err(self.wrong_length(rank, part.len(), bytes));
            }
            for (sum, value) in data.iter_mut().zip(floats_of(part)) {
                *sum = if rank == 0 { value } else { *sum + value };
            }
        }
        Ok(())
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_gather(self.rank, self.world(), part.len(), lens, out.len())?;
        self.check_limit(size_of_val(part))?;
        let parts = self.exchange(Kind::Gather, floats_to_bytes(part))?;
        let mut rest = out;
        for (rank, (theirs, len)) in parts.iter().zip(lens).enumerate() {
            let (place, after) = rest.split_at_mut(*len);
            rest = after;
            match theirs {
                None => place.copy_from_slice(part),
                Some(bytes) if bytes.len() == size_of_val(place) => {
                    for (to, value) in place.iter_mut().zip(floats_of(bytes)) {
                        *to = value;
                    }
                }
                Some(bytes) => {
                    return Err(self.wrong_length(rank, bytes.len(), size_of_val(place)));
                }
            }
        }
        Ok(())
    }
}

impl Link for TcpLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.check_limit(payload.len())?;
        let own = if self.rank == 0 {
            payload.clone()
        } else {
            Vec::new()
        };
        let mut parts = self.exchange(Kind::Broadcast, own)?;
        if let Some(first) = parts.first_mut().and_then(Option::take) {
            *payload = first;
        }
        Ok(())
    }

    fn gather_words(&mut self, mine: [u64; 3]) -> Result<Vec<[u64; 3]>, CollectiveError> {
        let parts = self.exchange(Kind::Words, words_to_bytes(mine).to_vec())?;
        let mut words = Vec::with_capacity(parts.len());
        for (rank, part) in parts.iter().enumerate() {
            words.push(match part {
                None => mine,
                Some(bytes) => bytes_to_words(bytes)
                    .ok_or_else(|| self.wrong_length(rank, bytes.len(), size_of_val(&mine)))?,
            });
        }
        Ok(words)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn expect_close(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
    }
}
