//! Where the ranks of a pod show each other parts: slots and buffers in the pod's
//! shared memory, and the waits for them.
//!
//! Each rank has several lanes, so that operations among different ranks do not
//! meet. On a lane a rank shows one part a round, in two buffers by turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use llama_model::CollectiveError;
use rustix::io::Errno;
use rustix::thread::futex;

use crate::comm::board::Board;
use crate::comm::patience::Patience;
use crate::comm::region::{Region, SharedLayout};
use crate::comm::silence::SilenceWatch;
use crate::comm::{SILENCE_LIMIT, STEP_DEADLINE, millis};

/// Bytes of one buffer. Larger operations take several rounds.
pub(super) const BUFFER: usize = 512 * 1024;
/// Floats in one buffer.
pub(super) const BUFFER_FLOATS: usize = BUFFER / size_of::<f32>();
/// Looks at a peer's counter before giving the core away, when every rank has
/// cores of its own: some tens of microseconds.
const SPINS: u32 = 4096;
/// Times that a waiting rank lets others run before it sleeps.
const YIELDS: u32 = 8;
/// Longest sleep before a waiting rank looks for signs of life.
const NAP: Duration = Duration::from_millis(50);

/// Among whom a part is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// The ranks of the pod that share layers.
    Stage = 0,
    /// All ranks of the pod.
    Pod = 1,
    /// The next stage's rank at the same place.
    Next = 2,
    /// The previous stage's rank at the same place, which sees here how many of
    /// its parts have been taken. Without buffers.
    Taken = 3,
}

impl Lane {
    const SLOTS: usize = 4;
    const BUFFERED: usize = 3;
}

/// What a round is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Reduce = 1,
    Gather = 2,
    Broadcast = 3,
    Words = 4,
    Next = 5,
    Taken = 6,
    Spread = 7,
}

/// What a rank has published on one lane. One cache-line pair each.
#[repr(C, align(128))]
struct Slot {
    /// Number of the last round whose part is in the buffer, wrapping. Waiters
    /// sleep on this word.
    published: AtomicU32,
    /// Sleepers, so that publishing costs no system call when there are none.
    waiters: AtomicU32,
    /// Operation of the part in each buffer.
    operation: [AtomicU32; 2],
    /// Bytes of the part in each buffer.
    len: [AtomicU64; 2],
}

// SAFETY: atomics only, any bits are valid.
unsafe impl SharedLayout for Slot {}

/// One rank's view of the lanes of its pod. Ranks are counted in the pod, and named
/// over all pods in errors.
#[derive(Debug)]
pub(super) struct Lanes {
    region: Arc<Region>,
    board: Board,
    first_rank: usize,
    local: usize,
    spins: u32,
    pub(super) deadline: Duration,
}

impl Lanes {
    /// Bytes of the region that `ranks` ranks need, board included. Pages that are
    /// never written take no memory.
    pub(super) fn bytes(ranks: usize) -> usize {
        Self::buffers(ranks) + ranks * Lane::BUFFERED * 2 * BUFFER
    }

    fn slots(ranks: usize) -> usize {
        Board::bytes(ranks).next_multiple_of(align_of::<Slot>())
    }

    fn buffers(ranks: usize) -> usize {
        (Self::slots(ranks) + ranks * Lane::SLOTS * size_of::<Slot>()).next_multiple_of(4096)
    }

    /// The view of the pod's `local`-th rank; the pod's first rank is `first_rank`
    /// over all pods. `None` when the region is too small.
    pub(super) fn new(
        region: Arc<Region>,
        board: Board,
        (first_rank, local): (usize, usize),
        own_cores: bool,
    ) -> Option<Self> {
        let ranks = board.ranks();
        for slot in 0..ranks * Lane::SLOTS {
            region.at::<Slot>(Self::slots(ranks) + slot * size_of::<Slot>())?;
        }
        region.bytes(0, Self::bytes(ranks))?;
        Some(Self {
            region,
            board,
            first_rank,
            local,
            spins: if own_cores { SPINS } else { 0 },
            deadline: STEP_DEADLINE,
        })
    }

    /// This rank's place in the pod.
    pub(super) fn local(&self) -> usize {
        self.local
    }

    /// Ranks of the pod.
    pub(super) fn ranks(&self) -> usize {
        self.board.ranks()
    }

    fn slot(&self, local: usize, lane: Lane) -> Result<&Slot, CollectiveError> {
        let offset =
            Self::slots(self.ranks()) + (local * Lane::SLOTS + lane as usize) * size_of::<Slot>();
        self.region
            .at(offset)
            .ok_or_else(|| self.out_of_step(local, "outside the shared memory"))
    }

    fn buffer(&self, local: usize, lane: Lane, round: u32) -> usize {
        let place = local * Lane::BUFFERED + lane as usize;
        Self::buffers(self.ranks()) + (place * 2 + parity(round)) * BUFFER
    }

    /// The error for the pod's `local`-th rank.
    pub(super) fn out_of_step(&self, local: usize, reason: &str) -> CollectiveError {
        CollectiveError::OutOfStep {
            rank: self.first_rank + local,
            reason: format!("{reason} (told by rank {})", self.first_rank + self.local),
        }
    }

    /// Copies our part of `round` to where the others will read it.
    pub(super) fn put_bytes(
        &self,
        lane: Lane,
        round: u32,
        bytes: &[u8],
    ) -> Result<(), CollectiveError> {
        let place = self.buffer(self.local, lane, round);
        if bytes.len() <= BUFFER && self.region.write(place, bytes) {
            return Ok(());
        }
        let reason = format!("{} bytes for a buffer of {BUFFER}", bytes.len());
        Err(self.out_of_step(self.local, &reason))
    }

    /// Likewise for values.
    pub(super) fn put_floats(
        &self,
        lane: Lane,
        round: u32,
        values: &[f32],
    ) -> Result<(), CollectiveError> {
        let place = self.buffer(self.local, lane, round);
        if values.len() <= BUFFER_FLOATS && self.region.write_floats(place, values) {
            return Ok(());
        }
        let reason = format!("{} values for a buffer of {BUFFER_FLOATS}", values.len());
        Err(self.out_of_step(self.local, &reason))
    }

    /// The part of `round` that the pod's `local`-th rank has shown.
    pub(super) fn floats(
        &self,
        local: usize,
        lane: Lane,
        round: u32,
        len: usize,
    ) -> Result<&[f32], CollectiveError> {
        self.region
            .floats(self.buffer(local, lane, round), len)
            .ok_or_else(|| self.out_of_step(local, &format!("{len} values outside the buffer")))
    }

    /// Likewise as bytes.
    pub(super) fn part(
        &self,
        local: usize,
        lane: Lane,
        round: u32,
        len: usize,
    ) -> Result<&[u8], CollectiveError> {
        self.region
            .bytes(self.buffer(local, lane, round), len)
            .ok_or_else(|| self.out_of_step(local, &format!("{len} bytes outside the buffer")))
    }

    /// Shows that our part of `round` is there.
    pub(super) fn publish(
        &self,
        lane: Lane,
        round: u32,
        operation: Operation,
        bytes: usize,
    ) -> Result<(), CollectiveError> {
        let own = self.slot(self.local, lane)?;
        own.operation[parity(round)].store(operation as u32, Ordering::Relaxed);
        own.len[parity(round)].store(bytes as u64, Ordering::Relaxed);
        // Pairs with the increment of `waiters` before the futex call: either
        // we see the sleeper, or the sleeper sees the new number.
        own.published.store(round, Ordering::SeqCst);
        if own.waiters.load(Ordering::SeqCst) > 0 {
            wake_all(&own.published);
        }
        Ok(())
    }

    /// Waits until the pod's `peer`-th rank has published `round` and checks that it
    /// is of `operation` and has `expected` bytes, or with `None` any that fit.
    /// Returns the bytes.
    pub(super) fn await_part(
        &self,
        peer: usize,
        (lane, round): (Lane, u32),
        operation: Operation,
        expected: Option<usize>,
    ) -> Result<usize, CollectiveError> {
        self.await_round(peer, lane, round)?;
        let slot = self.slot(peer, lane)?;
        let theirs = slot.operation[parity(round)].load(Ordering::Relaxed);
        let len = slot.len[parity(round)].load(Ordering::Relaxed);
        let bytes = usize::try_from(len).ok().filter(|len| match expected {
            Some(expected) => *len == expected,
            None => *len <= BUFFER,
        });
        match bytes {
            Some(bytes) if theirs == operation as u32 => Ok(bytes),
            _ => {
                let reason = format!(
                    "in round {round} it brought {len} bytes of operation {theirs}, rank {} \
                     expected {expected:?} of {operation:?}",
                    self.first_rank + self.local,
                );
                Err(self.out_of_step(peer, &reason))
            }
        }
    }

    /// Waits until the pod's `peer`-th rank has published `round`.
    pub(super) fn await_round(
        &self,
        peer: usize,
        lane: Lane,
        round: u32,
    ) -> Result<(), CollectiveError> {
        let slot = self.slot(peer, lane)?;
        let arrived = |published: u32| is_at_least(published, round);
        for _ in 0..self.spins {
            if arrived(slot.published.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        for _ in 0..YIELDS {
            if arrived(slot.published.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::thread::yield_now();
        }
        let _waiting = self.board.wait(self.local);
        let patience = Patience::new(self.deadline);
        let mut watch = SilenceWatch::default();
        loop {
            if arrived(slot.published.load(Ordering::Acquire)) {
                return Ok(());
            }
            if self.board.is_over() {
                let cause = self.board.cause();
                let reason =
                    cause.map_or_else(|| "no reason given".to_owned(), |cause| cause.message);
                return Err(CollectiveError::Aborted { reason });
            }
            let silent = watch.observe(self.board.heartbeat(peer), Instant::now());
            let is_silent = (silent >= SILENCE_LIMIT).then_some(silent);
            let spent = || patience.spent(self.board.is_waiting(peer));
            if let Some(lasted) = is_silent.or_else(spent) {
                return Err(CollectiveError::Silent {
                    rank: self.first_rank + peer,
                    silent_ms: millis(lasted),
                });
            }
            self.nap(slot, arrived);
        }
    }

    /// Sleeps until the peer publishes, or for [`NAP`].
    fn nap(&self, slot: &Slot, arrived: impl Fn(u32) -> bool) {
        slot.waiters.fetch_add(1, Ordering::SeqCst);
        let published = slot.published.load(Ordering::SeqCst);
        if !arrived(published) {
            let timeout = futex::Timespec {
                tv_sec: 0,
                tv_nsec: i64::try_from(NAP.as_nanos()).unwrap_or(0),
            };
            let slept = futex::wait(
                &slot.published,
                futex::Flags::empty(),
                published,
                Some(&timeout),
            );
            if let Err(error) = slept
                && !matches!(error, Errno::AGAIN | Errno::TIMEDOUT | Errno::INTR)
            {
                // A sandbox without futexes: fall back to sleeping.
                tracing::warn!(%error, rank = self.first_rank + self.local, "wait on a futex");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        slot.waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

fn parity(round: u32) -> usize {
    usize::from(round % 2 == 1)
}

/// Whether wrapping counter `a` has reached `b`.
pub(super) fn is_at_least(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) < u32::MAX / 2
}

fn wake_all(word: &AtomicU32) {
    let all = i32::MAX.unsigned_abs();
    if let Err(error) = futex::wake(word, futex::Flags::empty(), all) {
        tracing::warn!(%error, "wake ranks on a futex");
    }
}
