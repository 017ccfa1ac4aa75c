//! Collectives of the ranks of one pod, through shared memory.
//!
//! Every operation is a series of rounds. In a round each rank writes its part
//! into its own buffer, publishes the round's number, waits until all others
//! have published theirs, and reads their buffers. Two buffers alternate: a
//! rank writes round n+2 where it wrote round n, and by then every peer has
//! published n+1, which it does only after it has read round n.
#![allow(
    unsafe_code,
    reason = "declaring which types may live in shared memory"
)]

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use llama_model::{Collective, CollectiveError};
use rustix::io::Errno;
use rustix::thread::futex;

use super::board::Board;
use super::region::{Region, SharedLayout};
use super::silence::SilenceWatch;
use super::{Link, SILENCE_LIMIT, STEP_DEADLINE, check_gather};

/// Bytes of one buffer. Larger operations take several rounds.
const BUFFER: usize = 512 * 1024;
/// Floats in one buffer.
const BUFFER_FLOATS: usize = BUFFER / size_of::<f32>();
/// Looks at a peer's counter before giving the core away, when every rank has
/// cores of its own: some tens of microseconds.
const SPINS: u32 = 4096;
/// Times that a waiting rank lets others run before it sleeps.
const YIELDS: u32 = 8;
/// Longest sleep before a waiting rank looks for signs of life.
const NAP: Duration = Duration::from_millis(50);

/// What a round is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Reduce = 1,
    Gather = 2,
    Broadcast = 3,
    Words = 4,
}

/// What a rank has published. One cache-line pair each.
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

/// One rank's end of the pod's shared memory.
#[derive(Debug)]
pub struct ShmLink {
    region: Arc<Region>,
    board: Board,
    rank: usize,
    world: usize,
    round: u32,
    spins: u32,
    deadline: Duration,
}

impl ShmLink {
    /// Bytes of the region that `ranks` ranks need, board included.
    pub fn bytes(ranks: usize) -> usize {
        Self::buffers(ranks) + ranks * 2 * BUFFER
    }

    fn slots(ranks: usize) -> usize {
        Board::bytes(ranks).next_multiple_of(align_of::<Slot>())
    }

    fn buffers(ranks: usize) -> usize {
        (Self::slots(ranks) + ranks * size_of::<Slot>()).next_multiple_of(4096)
    }

    /// Rank `rank`'s end. `own_cores` says that every rank's threads have cores
    /// of their own, so that a short spin beats sleeping. `None` when the region
    /// is too small.
    pub fn new(region: Arc<Region>, board: Board, rank: usize, own_cores: bool) -> Option<Self> {
        let world = board.ranks();
        for peer in 0..world {
            region.at::<Slot>(Self::slots(world) + peer * size_of::<Slot>())?;
        }
        region.bytes(0, Self::bytes(world))?;
        Some(Self {
            region,
            board,
            rank,
            world,
            round: 0,
            spins: if own_cores { SPINS } else { 0 },
            deadline: STEP_DEADLINE,
        })
    }

    fn slot(&self, rank: usize) -> Result<&Slot, CollectiveError> {
        let offset = Self::slots(self.world) + rank * size_of::<Slot>();
        self.region
            .at(offset)
            .ok_or_else(|| self.out_of_step(rank, "outside the shared memory"))
    }

    fn buffer(&self, rank: usize) -> usize {
        Self::buffers(self.world) + (rank * 2 + self.parity()) * BUFFER
    }

    fn parity(&self) -> usize {
        usize::from(self.round % 2 == 1)
    }

    fn out_of_step(&self, rank: usize, reason: &str) -> CollectiveError {
        CollectiveError::OutOfStep {
            rank,
            reason: format!("{reason} (told by rank {})", self.rank),
        }
    }

    /// Opens the next round: the buffer of its parity becomes ours to write.
    fn begin(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    fn put_bytes(&self, bytes: &[u8]) -> Result<(), CollectiveError> {
        if bytes.len() <= BUFFER && self.region.write(self.buffer(self.rank), bytes) {
            return Ok(());
        }
        let reason = format!("{} bytes for a buffer of {BUFFER}", bytes.len());
        Err(self.out_of_step(self.rank, &reason))
    }

    fn put_floats(&self, values: &[f32]) -> Result<(), CollectiveError> {
        if values.len() <= BUFFER_FLOATS && self.region.write_floats(self.buffer(self.rank), values)
        {
            return Ok(());
        }
        let reason = format!("{} values for a buffer of {BUFFER_FLOATS}", values.len());
        Err(self.out_of_step(self.rank, &reason))
    }

    fn floats_of(&self, rank: usize, len: usize) -> Result<&[f32], CollectiveError> {
        self.region
            .floats(self.buffer(rank), len)
            .ok_or_else(|| self.out_of_step(rank, &format!("{len} values outside the buffer")))
    }

    /// Publishes our part of the round and waits until `expected(rank)` bytes of
    /// `operation` stand in every buffer. `None` accepts any length that fits.
    fn exchange(
        &self,
        operation: Operation,
        bytes: usize,
        expected: impl Fn(usize) -> Option<usize>,
    ) -> Result<(), CollectiveError> {
        let parity = self.parity();
        let own = self.slot(self.rank)?;
        own.operation[parity].store(operation as u32, Ordering::Relaxed);
        own.len[parity].store(bytes as u64, Ordering::Relaxed);
        // Pairs with the increment of `waiters` before the futex call: either
        // we see the sleeper, or the sleeper sees the new number.
        own.published.store(self.round, Ordering::SeqCst);
        if own.waiters.load(Ordering::SeqCst) > 0 {
            wake_all(&own.published);
        }
        for peer in (0..self.world).filter(|peer| *peer != self.rank) {
            self.wait_for(peer)?;
            let slot = self.slot(peer)?;
            let theirs = slot.operation[parity].load(Ordering::Relaxed);
            let len = slot.len[parity].load(Ordering::Relaxed);
            let len_fits = match expected(peer) {
                Some(expected) => len == expected as u64,
                None => len <= BUFFER as u64,
            };
            if theirs != operation as u32 || !len_fits {
                let reason = format!(
                    "in round {} it brought {len} bytes of operation {theirs}, \
                     rank {} expected {:?} of {operation:?}",
                    self.round,
                    self.rank,
                    expected(peer),
                );
                return Err(self.out_of_step(peer, &reason));
            }
        }
        Ok(())
    }

    fn wait_for(&self, peer: usize) -> Result<(), CollectiveError> {
        let slot = self.slot(peer)?;
        let arrived = |published: u32| is_at_least(published, self.round);
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
        let started = Instant::now();
        let mut watch = SilenceWatch::default();
        loop {
            if arrived(slot.published.load(Ordering::Acquire)) {
                return Ok(());
            }
            if self.board.is_over() {
                let reason = self
                    .board
                    .cause()
                    .map_or_else(|| "no reason given".to_owned(), |cause| cause.message);
                return Err(CollectiveError::Aborted { reason });
            }
            let now = Instant::now();
            let silent = watch.observe(self.board.heartbeat(peer), now);
            let waited = now.duration_since(started);
            if silent >= SILENCE_LIMIT || waited >= self.deadline {
                return Err(CollectiveError::Silent {
                    rank: peer,
                    silent_ms: millis(if silent >= SILENCE_LIMIT {
                        silent
                    } else {
                        waited
                    }),
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
                tracing::warn!(%error, rank = self.rank, "wait on a futex");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        slot.waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether wrapping counter `a` has reached `b`.
fn is_at_least(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) < u32::MAX / 2
}

/// `duration` in whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn wake_all(word: &AtomicU32) {
    let all = i32::MAX.unsigned_abs();
    if let Err(error) = futex::wake(word, futex::Flags::empty(), all) {
        tracing::warn!(%error, "wake ranks on a futex");
    }
}

impl Collective for ShmLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        for chunk in data.chunks_mut(BUFFER_FLOATS) {
            self.begin();
            self.put_floats(chunk)?;
            let bytes = size_of_val(chunk);
            self.exchange(Operation::Reduce, bytes, |_| Some(bytes))?;
            chunk.copy_from_slice(self.floats_of(0, chunk.len())?);
            for rank in 1..self.world {
                let part = self.floats_of(rank, chunk.len())?;
                for (sum, value) in chunk.iter_mut().zip(part) {
                    *sum += value;
                }
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
        check_gather(self.rank, self.world, part.len(), lens, out.len())?;
        let longest = lens.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(BUFFER_FLOATS) {
            self.begin();
            let chunk_of = |len: usize| start.min(len)..(start + BUFFER_FLOATS).min(len);
            let own = &part[chunk_of(part.len())];
            self.put_floats(own)?;
            self.exchange(Operation::Gather, size_of_val(own), |rank| {
                Some(chunk_of(lens[rank]).len() * size_of::<f32>())
            })?;
            let mut base = 0;
            for (rank, len) in lens.iter().enumerate() {
                let chunk = chunk_of(*len);
                let values = self.floats_of(rank, chunk.len())?;
                out[base + chunk.start..base + chunk.end].copy_from_slice(values);
                base += len;
            }
        }
        Ok(())
    }
}

impl Link for ShmLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.begin();
        let own: &[u8] = if self.rank == 0 { payload } else { &[] };
        self.put_bytes(own)?;
        self.exchange(Operation::Broadcast, own.len(), |rank| {
            (rank != 0).then_some(0)
        })?;
        if self.rank != 0 {
            let len = self.slot(0)?.len[self.parity()].load(Ordering::Relaxed);
            let bytes = usize::try_from(len)
                .ok()
                .and_then(|len| self.region.bytes(self.buffer(0), len))
                .ok_or_else(|| self.out_of_step(0, &format!("{len} bytes outside the buffer")))?;
            payload.clear();
            payload.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn gather_words(&mut self, mine: [u64; 3]) -> Result<Vec<[u64; 3]>, CollectiveError> {
        self.begin();
        self.put_bytes(&words_to_bytes(mine))?;
        let bytes = size_of_val(&mine);
        self.exchange(Operation::Words, bytes, |_| Some(bytes))?;
        (0..self.world)
            .map(|rank| {
                self.region
                    .bytes(self.buffer(rank), bytes)
                    .and_then(bytes_to_words)
                    .ok_or_else(|| self.out_of_step(rank, "words outside the buffer"))
            })
            .collect()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn expect_close(&mut self) {}
}

/// Three words as little-endian bytes.
pub(super) fn words_to_bytes(words: [u64; 3]) -> [u8; 24] {
    let mut bytes = [0; 24];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Reads [`words_to_bytes`]; `None` when the length differs.
pub(super) fn bytes_to_words(bytes: &[u8]) -> Option<[u64; 3]> {
    let mut words = [0; 3];
    if bytes.len() != size_of_val(&words) {
        return None;
    }
    for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(from.try_into().ok()?);
    }
    Some(words)
}
