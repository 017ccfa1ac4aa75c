//! The pod's notice board in shared memory: heartbeats, load progress, and the
//! first cause when the group is over.
#![allow(
    unsafe_code,
    reason = "declaring which types may live in shared memory"
)]

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use llama_contract::{FailureCategory, RankPhase};

use super::millis;
use super::region::{Region, SharedLayout};
use crate::failure::Failure;

/// Longest sentence that a first cause can carry, in bytes.
const CAUSE_TEXT: usize = 1024;
/// Longest name of a node, in bytes (a DNS subdomain).
const NODE_TEXT: usize = 253;
/// `CauseCell::rank` when no rank is at fault.
const NO_RANK: u32 = u32::MAX;
/// `CauseCell::step` when no step was running.
const NO_STEP: u64 = u64::MAX;

/// How long a reader waits for a cause that is being written, at a time and how
/// often. Its writer may have died over it.
const CAUSE_WAIT: Duration = Duration::from_micros(200);
const CAUSE_WAITS: u32 = 100;

const CAUSE_NONE: u32 = 0;
const CAUSE_WRITING: u32 = 1;
const CAUSE_SET: u32 = 2;

/// The board's fixed part. 128-byte alignment keeps writers of different cells
/// off each other's cache lines (two lines, because of the adjacent-line
/// prefetcher).
#[repr(C, align(128))]
struct CauseCell {
    state: AtomicU32,
    category: AtomicU32,
    rank: AtomicU32,
    step: AtomicU64,
    message: Text<CAUSE_TEXT>,
    node: Text<NODE_TEXT>,
}

/// A short string. Written once, before `CauseCell::state` becomes `CAUSE_SET`.
#[repr(C)]
struct Text<const LIMIT: usize> {
    len: AtomicU32,
    bytes: [AtomicU8; LIMIT],
}

impl<const LIMIT: usize> Text<LIMIT> {
    fn store(&self, text: &str) {
        let mut end = text.len().min(LIMIT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        for (to, from) in self.bytes.iter().zip(text[..end].bytes()) {
            to.store(from, Ordering::Relaxed);
        }
        self.len
            .store(u32::try_from(end).unwrap_or(0), Ordering::Relaxed);
    }

    fn load(&self) -> String {
        let len = usize::try_from(self.len.load(Ordering::Relaxed)).unwrap_or(0);
        let bytes: Vec<u8> = self
            .bytes
            .iter()
            .take(len)
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[repr(C, align(128))]
struct RankCell {
    heartbeat: AtomicU64,
    step: AtomicU64,
    load_done: AtomicU64,
    load_total: AtomicU64,
    load_millis: AtomicU64,
    phase: AtomicU32,
    /// Whether the rank waits for another.
    waiting: AtomicU32,
    kv_cache_bytes: AtomicU64,
    device_bytes: AtomicU64,
}

// SAFETY: atomics only, any bits are valid.
unsafe impl SharedLayout for CauseCell {}
// SAFETY: atomics only, any bits are valid.
unsafe impl SharedLayout for RankCell {}

/// A rank's wait for another, until this is dropped.
#[must_use]
pub struct Waiting<'a>(Option<&'a RankCell>);

impl std::fmt::Debug for Waiting<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").finish_non_exhaustive()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(cell) = self.0 {
            cell.waiting.store(0, Ordering::Relaxed);
        }
    }
}

/// A view of the board of one pod.
#[derive(Clone, Debug)]
pub struct Board {
    region: Arc<Region>,
    ranks: usize,
    /// Nodes by rank, where this process knows them.
    nodes: Arc<OnceLock<Vec<String>>>,
}

impl Board {
    /// Bytes that the board of `ranks` ranks takes at the start of a region.
    pub fn bytes(ranks: usize) -> usize {
        size_of::<CauseCell>() + ranks * size_of::<RankCell>()
    }

    /// The board at the start of `region`, for `ranks` ranks of this pod;
    /// `None` when the region is too small.
    pub fn new(region: Arc<Region>, ranks: usize) -> Option<Self> {
        region.at::<CauseCell>(0)?;
        for local in 0..ranks {
            region.at::<RankCell>(Self::bytes(local))?;
        }
        Some(Self {
            region,
            ranks,
            nodes: Arc::default(),
        })
    }

    /// Ranks of this pod.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Lets causes that this process tells name the node of their rank. Only the
    /// first call counts.
    pub fn set_nodes(&self, nodes: Vec<String>) {
        if self.nodes.set(nodes).is_err() {
            tracing::warn!("the nodes of the ranks are already known");
        }
    }

    fn node_of(&self, rank: Option<u32>) -> Option<&str> {
        let index = usize::try_from(rank?).ok()?;
        Some(self.nodes.get()?.get(index)?.as_str())
    }

    fn cause_cell(&self) -> Option<&CauseCell> {
        self.region.at(0)
    }

    fn cell(&self, local: usize) -> Option<&RankCell> {
        (local < self.ranks)
            .then(|| self.region.at(Self::bytes(local)))
            .flatten()
    }

    /// Adds one to the heartbeat of the pod's `local`-th rank.
    pub fn beat(&self, local: usize) {
        if let Some(cell) = self.cell(local) {
            cell.heartbeat.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The heartbeat counter of the pod's `local`-th rank.
    pub fn heartbeat(&self, local: usize) -> u64 {
        self.cell(local)
            .map_or(0, |cell| cell.heartbeat.load(Ordering::Relaxed))
    }

    /// Notes, for as long as the result lives, that the pod's `local`-th rank waits
    /// for another.
    pub fn wait(&self, local: usize) -> Waiting<'_> {
        let cell = self.cell(local);
        if let Some(cell) = cell {
            cell.waiting.store(1, Ordering::Relaxed);
        }
        Waiting(cell)
    }

    /// Whether the pod's `local`-th rank waits for another.
    pub fn is_waiting(&self, local: usize) -> bool {
        self.cell(local)
            .is_some_and(|cell| cell.waiting.load(Ordering::Relaxed) != 0)
    }

    /// Notes that the pod's `local`-th rank finished `step`.
    pub fn set_step(&self, local: usize, step: u64) {
        if let Some(cell) = self.cell(local) {
            cell.step.store(step, Ordering::Relaxed);
        }
    }

    /// The last step that the pod's `local`-th rank finished.
    pub fn step(&self, local: usize) -> u64 {
        self.cell(local)
            .map_or(0, |cell| cell.step.load(Ordering::Relaxed))
    }

    /// Notes what the pod's `local`-th rank is doing.
    pub fn set_phase(&self, local: usize, phase: RankPhase) {
        if let Some(cell) = self.cell(local) {
            cell.phase.store(phase as u32, Ordering::Release);
        }
    }

    /// What the pod's `local`-th rank is doing.
    pub fn phase(&self, local: usize) -> RankPhase {
        let stored = self
            .cell(local)
            .map_or(0, |cell| cell.phase.load(Ordering::Acquire));
        [
            RankPhase::Starting,
            RankPhase::LoadingWeights,
            RankPhase::Ready,
            RankPhase::Failed,
        ]
        .into_iter()
        .find(|phase| *phase as u32 == stored)
        .unwrap_or_default()
    }

    /// Notes how many bytes of weights the pod's `local`-th rank has read, and for
    /// how long it has been reading. Several threads may tell at once: the furthest
    /// counts.
    pub fn set_load(&self, local: usize, done: u64, total: u64, reading: Duration) {
        if let Some(cell) = self.cell(local) {
            cell.load_done.fetch_max(done, Ordering::Relaxed);
            cell.load_total.store(total, Ordering::Relaxed);
            cell.load_millis
                .fetch_max(millis(reading), Ordering::Relaxed);
        }
    }

    /// Bytes of weights that the pod's `local`-th rank has read, and has to read,
    /// and for how long it has been reading.
    pub fn load(&self, local: usize) -> (u64, u64, Duration) {
        self.cell(local).map_or_else(Default::default, |cell| {
            (
                cell.load_done.load(Ordering::Relaxed),
                cell.load_total.load(Ordering::Relaxed),
                Duration::from_millis(cell.load_millis.load(Ordering::Relaxed)),
            )
        })
    }

    /// Notes how many bytes the KV cache of the pod's `local`-th rank has taken.
    pub fn set_kv_cache_bytes(&self, local: usize, bytes: u64) {
        if let Some(cell) = self.cell(local) {
            cell.kv_cache_bytes.store(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that the KV cache of the pod's `local`-th rank has taken.
    pub fn kv_cache_bytes(&self, local: usize) -> u64 {
        self.cell(local)
            .map_or(0, |cell| cell.kv_cache_bytes.load(Ordering::Relaxed))
    }

    /// Notes how many bytes are used on the device of the pod's `local`-th rank.
    pub fn set_device_bytes(&self, local: usize, bytes: u64) {
        if let Some(cell) = self.cell(local) {
            cell.device_bytes.store(bytes, Ordering::Relaxed);
        }
    }

    /// Bytes that are used on the device of the pod's `local`-th rank, once it has said.
    pub fn device_bytes(&self, local: usize) -> Option<u64> {
        self.cell(local)
            .map(|cell| cell.device_bytes.load(Ordering::Relaxed))
            .filter(|bytes| *bytes > 0)
    }

    /// Ends the group with this cause. Only the first cause stands; later ones
    /// are consequences.
    pub fn fail(&self, failure: &Failure) {
        let Some(cell) = self.cause_cell() else {
            return;
        };
        let first = cell.state.compare_exchange(
            CAUSE_NONE,
            CAUSE_WRITING,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        if first.is_err() {
            return;
        }
        let category = FailureCategory::ALL
            .iter()
            .position(|category| *category == failure.category)
            .and_then(|index| u32::try_from(index).ok())
            .unwrap_or(u32::MAX);
        cell.category.store(category, Ordering::Relaxed);
        cell.rank
            .store(failure.rank.unwrap_or(NO_RANK), Ordering::Relaxed);
        cell.step
            .store(failure.step.unwrap_or(NO_STEP), Ordering::Relaxed);
        cell.message.store(&failure.message);
        let node = failure.node.as_deref();
        let node = node.or_else(|| self.node_of(failure.rank));
        cell.node.store(node.unwrap_or_default());
        cell.state.store(CAUSE_SET, Ordering::Release);
    }

    /// Whether the group is over.
    pub fn is_over(&self) -> bool {
        self.cause_cell()
            .is_some_and(|cell| cell.state.load(Ordering::Acquire) != CAUSE_NONE)
    }

    /// Why the group is over. `None` while it lives, and when the process that
    /// gave the cause died while writing it.
    pub fn cause(&self) -> Option<Failure> {
        let cell = self.cause_cell()?;
        let mut state = cell.state.load(Ordering::Acquire);
        for _ in 0..CAUSE_WAITS {
            if state != CAUSE_WRITING {
                break;
            }
            std::thread::sleep(CAUSE_WAIT);
            state = cell.state.load(Ordering::Acquire);
        }
        if state != CAUSE_SET {
            return None;
        }
        let node = cell.node.load();
        let category = usize::try_from(cell.category.load(Ordering::Relaxed)).ok();
        let rank = cell.rank.load(Ordering::Relaxed);
        let step = cell.step.load(Ordering::Relaxed);
        Some(Failure {
            category: category
                .and_then(|index| FailureCategory::ALL.get(index))
                .copied()
                .unwrap_or(FailureCategory::Internal),
            message: cell.message.load(),
            rank: (rank != NO_RANK).then_some(rank),
            node: (!node.is_empty()).then_some(node),
            step: (step != NO_STEP).then_some(step),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board(ranks: usize) -> Board {
        let region = Arc::new(Region::create(Board::bytes(ranks)).unwrap());
        Board::new(region, ranks).unwrap()
    }

    #[test]
    fn only_the_first_cause_stands() {
        let board = board(2);
        assert!(!board.is_over());
        assert_eq!(board.cause(), None);
        let first = Failure {
            category: FailureCategory::RankDied,
            message: "rank 1 died".to_owned(),
            rank: Some(1),
            node: Some("gpu-07".to_owned()),
            step: Some(12),
        };
        board.fail(&first);
        board.fail(&Failure::new(FailureCategory::Internal, "a consequence"));
        assert!(board.is_over());
        assert_eq!(board.cause(), Some(first));
    }

    #[test]
    fn a_cause_names_the_node_of_its_rank_where_that_is_known() {
        let board = board(1);
        board.set_nodes(vec!["a".to_owned(), "b".to_owned()]);
        board.fail(&Failure::new(FailureCategory::PeerLost, "lost").at_rank(1));
        assert_eq!(board.cause().unwrap().node.as_deref(), Some("b"));
    }

    #[test]
    fn long_causes_are_cut_at_a_character() {
        let board = board(1);
        let message = "é".repeat(CAUSE_TEXT);
        board.fail(&Failure::new(FailureCategory::Internal, &message));
        let cause = board.cause().unwrap();
        assert_eq!(cause.message, "é".repeat(CAUSE_TEXT / 2));
    }

    #[test]
    fn cells_of_ranks_are_apart() {
        let board = board(3);
        board.beat(1);
        board.beat(1);
        board.set_step(2, 9);
        board.set_phase(0, RankPhase::Ready);
        board.set_load(1, 5, 10, Duration::from_millis(7));
        board.set_load(1, 4, 10, Duration::from_millis(6));
        let beats: Vec<_> = (0..4).map(|local| board.heartbeat(local)).collect();
        assert_eq!(beats, [0, 2, 0, 0]);
        assert_eq!(board.step(2), 9);
        assert_eq!(board.step(1), 0);
        assert_eq!(board.phase(0), RankPhase::Ready);
        assert_eq!(board.phase(1), RankPhase::Starting);
        assert_eq!(board.load(1), (5, 10, Duration::from_millis(7)));
        let wait = board.wait(1);
        assert!(board.is_waiting(1) && !board.is_waiting(0));
        drop(wait);
        assert!(!board.is_waiting(1));
    }
}
