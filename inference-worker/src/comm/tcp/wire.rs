//! The two threads of one connection.
//!
//! The writer sends a beat whenever it has had nothing else to send, so a reader
//! that hears nothing knows its peer is gone, computing or not. When the group is
//! over, writers pass the first cause on before they close: every pod can then
//! name it. Readers read on for a while, since closing with something unread would
//! reset the connection and take from the peer what it has not read yet.

use std::io::{BufWriter, ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, FailureReport};
use llama_model::CollectiveError;

use super::frame::{Frame, HEADER, Kind};
use super::peers::AHEAD;
use crate::comm::board::Board;
use crate::comm::silence::SilenceWatch;
use crate::comm::{HEARTBEAT_PERIOD, SILENCE_LIMIT, millis};
use crate::failure::Failure;

/// Frames that wait between a rank and the threads of one connection. A peer is at
/// most four pieces of operations among several ahead and [`AHEAD`] from stage to
/// stage, so a reader never stops reading beats for want of room.
const FRAMES_IN_FLIGHT: usize = 4 + AHEAD;
/// How long a read blocks before the reader looks around.
const READ_SLICE: Duration = Duration::from_millis(100);
/// How long a write may make no progress.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// How long a reader waits for its peer to close once the group is over.
const LINGER: Duration = Duration::from_millis(500);

/// What the threads of a rank's connections share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// The pod's board.
    pub(super) board: Board,
    /// The rank's place in the pod.
    pub(super) local: usize,
    /// Whether a closed connection is no failure.
    pub(super) closing: Arc<AtomicBool>,
}

/// One connection, as the rank sees it.
#[derive(Debug)]
pub(super) struct Wire {
    /// `None` once the link is dropped.
    pub(super) outgoing: Option<SyncSender<Arc<Frame>>>,
    /// Frames of operations.
    pub(super) incoming: Receiver<Frame>,
    /// One for each piece that the peer has taken.
    pub(super) taken: Receiver<()>,
    /// Whether the peer waits for another rank, as of its last beat.
    pub(super) waits: Arc<AtomicBool>,
    pub(super) writer: Option<JoinHandle<()>>,
    pub(super) reader: Option<JoinHandle<()>>,
}

impl Wire {
    /// Starts the threads of the connection `stream` to `rank`.
    pub(super) fn start(rank: usize, stream: TcpStream, shared: &Shared) -> std::io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_SLICE))?;
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let (outgoing, to_write) = mpsc::sync_channel(FRAMES_IN_FLIGHT);
        let (frames, incoming) = mpsc::sync_channel(FRAMES_IN_FLIGHT);
        let (credit, taken) = mpsc::channel();
        let waits = Arc::new(AtomicBool::new(false));
        let reader = Reader {
            rank,
            stream: stream.try_clone()?,
            shared: shared.clone(),
            watch: SilenceWatch::default(),
            received: 0,
            waits: Arc::clone(&waits),
        };
        let reader = std::thread::Builder::new()
            .name(format!("from-rank-{rank}"))
            .spawn(move || reader.run(frames, credit))?;
        let shared = shared.clone();
        let writer = std::thread::Builder::new()
            .name(format!("to-rank-{rank}"))
            .spawn(move || write_frames(rank, stream, &to_write, &shared))?;
        Ok(Self {
            outgoing: Some(outgoing),
            incoming,
            taken,
            waits,
            writer: Some(writer),
            reader: Some(reader),
        })
    }
}

/// Writes frames, and beats in between, until the link is dropped or broken or
/// the group is over.
fn write_frames(rank: usize, stream: TcpStream, frames: &Receiver<Arc<Frame>>, shared: &Shared) {
    let mut stream = BufWriter::new(stream);
    loop {
        let frame = match frames.recv_timeout(HEARTBEAT_PERIOD) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => {
                Arc::new(Frame::beat(shared.board.is_waiting(shared.local)))
            }
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
    waits: Arc<AtomicBool>,
}

/// Why a reader stops.
enum Stop {
    /// The link was dropped or the group is over: nothing to tell.
    Quiet,
    /// The peer or the connection is at fault.
    Failed(Failure),
}

impl Reader {
    fn run(mut self, frames: SyncSender<Frame>, credit: Sender<()>) {
        let stop = loop {
            let frame = match self.read_frame() {
                Ok(frame) => frame,
                Err(stop) => break stop,
            };
            let is_heard = match frame.kind {
                Kind::Beat => {
                    self.waits.store(frame.sequence != 0, Ordering::Relaxed);
                    true
                }
                Kind::Cause => break self.told(&frame.payload),
                Kind::Taken => credit.send(()).is_ok(),
                _ => frames.send(frame).is_ok(),
            };
            if !is_heard {
                break Stop::Quiet;
            }
        };
        if let Stop::Failed(failure) = stop {
            self.shared.board.fail(&failure);
        }
        // Whoever waits for frames learns that there are no more.
        drop((frames, credit));
        if self.shared.board.is_over() {
            self.read_on();
        }
    }

    /// Reads what nobody needs any more, until the peer closes too.
    fn read_on(&mut self) {
        let until = Instant::now() + LINGER;
        let mut unread = [0; 4096];
        while Instant::now() < until {
            match self.stream.read(&mut unread) {
                Ok(1..) => {}
                Err(error) if is_pause(error.kind()) => {}
                Ok(0) | Err(_) => return,
            }
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
        let (kind, sequence, len) =
            Frame::read_header(header).map_err(|reason| self.lost(reason))?;
        let mut payload = vec![0; len];
        self.fill(&mut payload)?;
        Ok(Frame {
            kind,
            sequence,
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
