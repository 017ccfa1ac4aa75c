//! What every round needs.

use std::sync::Arc;
use std::time::Duration;

use kube::Client;

use crate::backoff::Backoff;
use crate::cluster::Cluster;
use crate::metrics::Metrics;
use crate::reconcile::plan::WorkerSettings;

/// Choices made at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What all worker pods share.
    pub worker: WorkerSettings,
    /// Longest round.
    pub reconcile_timeout: Duration,
    /// Name of this process in events and in the lease.
    pub identity: String,
}

/// What every round needs.
#[expect(
    missing_debug_implementations,
    reason = "the client has nothing to print"
)]
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// Metrics of this process.
    pub metrics: Arc<Metrics>,
    /// What this process knows of the cluster.
    pub cluster: Cluster,
    /// Pauses of objects whose rounds fail.
    pub backoff: Backoff,
    /// Choices made at start.
    pub settings: Settings,
}
