//! What this process knows of the cluster: caches that its own writes go into as well.

pub mod capacity;
pub mod kinds;
pub mod known;
pub mod kueue;
pub mod object;
pub mod release;
pub mod states;
pub mod store;
pub mod users;
pub mod watch;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llama_crds::v1alpha1::LlamaDeploymentStatus;

use self::capacity::Capacity;
use self::kinds::{OwnBudget, OwnService, StoredRevision, WorkerPod};
use self::kueue::Kueue;
use self::states::States;
use self::store::Store;
use self::users::Users;
use crate::labels;

/// Least time between two writes of a status that tell only how far groups are on their way.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// Counts how often something happened, for those who wait for it.
pub type Bell = tokio::sync::watch::Sender<u64>;

/// What this process knows of the cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Worker pods.
    pub pods: Store<WorkerPod>,
    /// Services of deployments.
    pub services: Store<OwnService>,
    /// `PodDisruptionBudgets` of groups.
    pub budgets: Store<OwnBudget>,
    /// Revisions of deployments.
    pub revisions: Store<StoredRevision>,
    /// Pods that fetch for models.
    pub fetchers: Store<WorkerPod>,
    /// Which deployments use which cached models.
    pub users: Users,
    /// What first pods say.
    pub states: States,
    /// What nodes have free.
    pub capacity: Capacity,
    /// What Kueue says.
    pub kueue: Kueue,
    /// How often a node was closed or opened: each time, groups may have to move.
    pub closings: Bell,
    /// How often something changed about nodes that decides which pods may go there.
    pub node_changes: Bell,
    statuses: Mutex<HashMap<String, WrittenStatus>>,
}

/// A status that we wrote.
#[derive(Clone, Debug)]
struct WrittenStatus {
    version: u64,
    at: Instant,
    /// Until the watch has told of it.
    status: Option<LlamaDeploymentStatus>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            pods: Store::default(),
            services: Store::default(),
            budgets: Store::default(),
            revisions: Store::default(),
            fetchers: Store::by(labels::MODEL),
            users: Users::default(),
            states: States::default(),
            kueue: Kueue::default(),
            capacity: Capacity::default(),
            closings: Bell::default(),
            node_changes: Bell::default(),
            statuses: Mutex::default(),
        }
    }
}

impl Cluster {
    /// Says that `scope` (a namespace, or empty for all) will be watched.
    pub fn expect(&self, scope: &str) {
        self.pods.expect(scope);
        self.services.expect(scope);
        self.budgets.expect(scope);
        self.revisions.expect(scope);
    }

    /// Whether every cache is complete.
    pub fn is_synced(&self) -> bool {
        !self.capacity.is_awaited()
            && self.pods.is_synced()
            && self.services.is_synced()
            && self.budgets.is_synced()
            && self.revisions.is_synced()
    }

    /// Notes the status that we wrote for the object `uid` at `version`.
    pub fn wrote_status(&self, uid: &str, version: u64, status: LlamaDeploymentStatus) {
        let written = WrittenStatus {
            version,
            at: Instant::now(),
            status: Some(status),
        };
        let mut statuses = self.statuses();
        statuses.retain(|_, old| old.status.is_some() || old.at.elapsed() < STATUS_PAUSE);
        statuses.insert(uid.to_owned(), written);
    }

    /// Our latest status of the object `uid`, if the object as of `version` is older.
    pub fn newer_status(&self, uid: &str, version: u64) -> Option<LlamaDeploymentStatus> {
        let mut statuses = self.statuses();
        let written = statuses.get_mut(uid)?;
        if written.version > version {
            return written.status.clone();
        }
        written.status = None;
        None
    }

    /// How long to wait before a status of the object `uid` that can wait is written:
    /// nothing, unless one was just written.
    pub fn status_pause(&self, uid: &str) -> Duration {
        let statuses = self.statuses();
        let since = statuses.get(uid).map(|written| written.at.elapsed());
        since.map_or(Duration::ZERO, |since| STATUS_PAUSE.saturating_sub(since))
    }

    /// Drops what is known of the object `uid`.
    pub fn forget(&self, uid: &str) {
        self.statuses().remove(uid);
    }

    fn statuses(&self) -> MutexGuard<'_, HashMap<String, WrittenStatus>> {
        self.statuses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
