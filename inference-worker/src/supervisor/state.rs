//! What the pod says of itself while it lives.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use llama_contract::{
    AdapterList, Device, LaunchArgs, LoadProgress, RankMemory, RankPhase, RankReport,
    SelfTestReport, StateReport, WorkerPhase,
};
use tokio::sync::watch;

use super::drain::DrainTime;
use crate::comm::board::Board;
use crate::comm::millis;
use crate::engine::{EngineClient, EngineStats};
use crate::metrics::Metrics;
use crate::server::internal::Inspect;
use crate::server::{AdapterError, AdapterRack, Admission};

use super::memory::PeakMemory;

/// Everything that the internal port shows.
#[derive(Debug)]
pub(super) struct PodState {
    /// What the pod was started with.
    pub(super) launch: LaunchArgs,
    /// Where the ranks write.
    pub(super) board: Board,
    /// The pod's first rank.
    pub(super) first_rank: u32,
    /// Process ids of the ranks.
    pub(super) pids: Vec<u32>,
    /// What they take of memory.
    pub(super) memory: PeakMemory,
    /// Whether requests are taken.
    pub(super) admission: watch::Sender<Admission>,
    /// The way to rank 0, on the first pod.
    pub(super) engine: Option<EngineClient>,
    /// The group's adapters, on the first pod.
    pub(super) rack: Option<AdapterRack>,
    /// The golden answer.
    pub(super) self_test: OnceLock<SelfTestReport>,
    /// How often it was given again.
    pub(super) repeats: AtomicU32,
    /// How long answers get once the pod is asked to end.
    pub(super) drain: DrainTime,
    /// The pod's metrics.
    pub(super) metrics: Arc<Metrics>,
    /// How long each rank's heartbeat has stood still.
    pub(super) silences: Mutex<Vec<Duration>>,
}

impl PodState {
    /// What all ranks of this pod have reached.
    pub(super) fn phase(&self) -> WorkerPhase {
        match &*self.admission.borrow() {
            Admission::Failed(_) => return WorkerPhase::Failed,
            Admission::Draining => return WorkerPhase::Draining,
            Admission::Serving => return WorkerPhase::Ready,
            Admission::Starting => {}
        }
        if self.is_ready() {
            return WorkerPhase::SelfTest;
        }
        let phases: Vec<_> = (0..self.board.ranks())
            .map(|local| self.board.phase(local))
            .collect();
        if phases.contains(&RankPhase::Starting) {
            if self.launch.nodes > 1 {
                WorkerPhase::Rendezvous
            } else {
                WorkerPhase::Starting
            }
        } else {
            WorkerPhase::LoadingWeights
        }
    }

    /// Whether every rank of this pod is ready.
    pub(super) fn is_ready(&self) -> bool {
        (0..self.board.ranks()).all(|local| self.board.phase(local) == RankPhase::Ready)
    }

    fn silence(&self, local: usize) -> Duration {
        let silences = self.silences.lock().unwrap_or_else(PoisonError::into_inner);
        silences.get(local).copied().unwrap_or_default()
    }

    /// What the `local`-th rank has taken, once it is ready.
    fn memory(&self, local: usize) -> Option<RankMemory> {
        if self.board.phase(local) != RankPhase::Ready {
            return None;
        }
        let used_bytes = match self.launch.device {
            Device::Cpu => self.memory.of(&self.pids, local)?,
            Device::Cuda => self.board.device_bytes(local)?,
        };
        Some(RankMemory {
            used_bytes,
            kv_cache_bytes: self.board.kv_cache_bytes(local),
        })
    }

    fn ranks(&self) -> Vec<RankReport> {
        let failed = match &*self.admission.borrow() {
            Admission::Failed(report) => Some(Arc::clone(report)),
            _ => None,
        };
        (self.first_rank..)
            .zip(0..self.board.ranks())
            .map(|(rank, local)| {
                let error = failed.as_ref().filter(|report| report.rank == Some(rank));
                RankReport {
                    rank,
                    pid: self.pids.get(local).copied().unwrap_or(0),
                    phase: match error {
                        Some(_) => RankPhase::Failed,
                        None => self.board.phase(local),
                    },
                    heartbeat_age_ms: millis(self.silence(local)),
                    step: self.board.step(local),
                    memory: self.memory(local),
                    last_error: error.map(|report| report.message.clone()),
                }
            })
            .collect()
    }
}

impl Inspect for PodState {
    fn state(&self) -> StateReport {
        let stats = self.stats();
        StateReport {
            group: self.launch.group.clone(),
            revision: self.launch.revision.clone(),
            epoch: self.launch.epoch,
            node_index: self.launch.node_index,
            phase: self.phase(),
            load: progress((0..self.board.ranks()).map(|local| self.board.load(local))),
            ranks: self.ranks(),
            running: stats.running,
            waiting: stats.waiting,
            self_test: self.self_test.get().map(|first| SelfTestReport {
                repeats: self.repeats.load(Ordering::Relaxed),
                ..first.clone()
            }),
            adapters: self
                .rack
                .as_ref()
                .map(AdapterRack::reports)
                .unwrap_or_default(),
            answers: None,
            failure: match &*self.admission.borrow() {
                Admission::Failed(report) => Some(report.as_ref().clone()),
                _ => None,
            },
        }
    }

    fn limit_drain(&self, time: Duration) {
        self.drain.limit(time);
    }

    fn admission(&self) -> Admission {
        self.admission.borrow().clone()
    }

    fn stats(&self) -> EngineStats {
        self.engine
            .as_ref()
            .map(EngineClient::stats)
            .unwrap_or_default()
    }

    fn want_adapters(&self, list: AdapterList) -> Result<(), AdapterError> {
        let rack = self.rack.as_ref().ok_or(AdapterError::NotManaged)?;
        rack.want(list.adapters)
    }

    fn metrics(&self) -> Arc<Metrics> {
        for (rank, local) in (self.first_rank..).zip(0..self.board.ranks()) {
            let (age, step) = (self.silence(local), self.board.step(local));
            self.metrics.rank(rank, age, step);
        }
        if let Some(rack) = self.rack.as_ref().filter(|rack| rack.room() > 0) {
            let stats = self.stats();
            let (running, waiting) = (
                rack.names(stats.running_adapters),
                rack.names(stats.waiting_adapters),
            );
            self.metrics.adapters(rack.room(), [&running, &waiting]);
        }
        Arc::clone(&self.metrics)
    }
}

/// How far the ranks are together, from what each has read and has to read, and for
/// how long it has been reading.
fn progress(ranks: impl Iterator<Item = (u64, u64, Duration)>) -> LoadProgress {
    let (done, total, reading) = ranks.fold((0, 0, Duration::ZERO), |sum, rank| {
        (sum.0 + rank.0, sum.1 + rank.1, sum.2.max(rank.2))
    });
    let rate = (done * 1000)
        .checked_div(millis(reading))
        .unwrap_or_default();
    LoadProgress {
        bytes_done: done,
        bytes_total: total,
        bytes_per_second: rate,
        seconds_left: (total - done.min(total))
            .checked_div(rate)
            .filter(|_| total > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_tells_rate_and_what_is_left() {
        let second = Duration::from_secs(1);
        let ranks = [(300, 1000, 2 * second), (100, 1000, second)];
        let expected = LoadProgress {
            bytes_done: 400,
            bytes_total: 2000,
            bytes_per_second: 200,
            seconds_left: Some(8),
        };
        assert_eq!(progress(ranks.into_iter()), expected);
        // Nothing is known before the first byte.
        let none = progress([(0, 0, Duration::ZERO); 2].into_iter());
        assert_eq!((none.bytes_per_second, none.seconds_left), (0, None));
    }
}
