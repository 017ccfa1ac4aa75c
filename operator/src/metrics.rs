//! Metrics of the operator. Names exist here only.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::http::Method;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureReason {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Deployment {
    namespace: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Write {
    verb: &'static str,
    resource: String,
}

/// Metrics of the operator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rounds: Family<Outcome, Counter>,
    round_seconds: Histogram,
    group_failures: Family<FailureReason, Counter>,
    wanted: Family<Deployment, Gauge>,
    ready: Family<Deployment, Gauge>,
    in_backoff: Gauge,
    leader: Gauge,
    watch_errors: Counter<u64, AtomicU64>,
    api_writes: Family<Write, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        // Rounds take a few calls of a few milliseconds each.
        let buckets = [
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0,
        ];
        let mut metrics = Self {
            registry: Registry::with_prefix("llama_operator"),
            rounds: Family::default(),
            round_seconds: Histogram::new(buckets),
            group_failures: Family::default(),
            wanted: Family::default(),
            ready: Family::default(),
            in_backoff: Gauge::default(),
            leader: Gauge::default(),
            watch_errors: Counter::default(),
            api_writes: Family::default(),
        };
        metrics.register();
        metrics
    }

    /// Counters get `_total` from the encoder.
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "reconcile",
            "Rounds by outcome: success or the step that failed",
            self.rounds.clone(),
        );
        registry.register(
            "reconcile_duration_seconds",
            "Time of a round",
            self.round_seconds.clone(),
        );
        registry.register(
            "group_failures",
            "Groups that failed, by the reason of the first failure",
            self.group_failures.clone(),
        );
        registry.register(
            "groups_wanted",
            "Groups that a LlamaDeployment asks for",
            self.wanted.clone(),
        );
        registry.register(
            "groups_ready",
            "Groups of a LlamaDeployment that serve",
            self.ready.clone(),
        );
        registry.register(
            "objects_in_backoff",
            "LlamaDeployments whose last round failed",
            self.in_backoff.clone(),
        );
        registry.register(
            "leader",
            "1 while this process holds the lease",
            self.leader.clone(),
        );
        registry.register(
            "watch_errors",
            "Watches that had to be opened again",
            self.watch_errors.clone(),
        );
        registry.register(
            "api_writes",
            "Writes sent to the API server, by verb and resource",
            self.api_writes.clone(),
        );
    }

    /// A round ended.
    pub fn reconciled(&self, outcome: &str, took: Duration) {
        let outcome = outcome.to_owned();
        self.rounds.get_or_create(&Outcome { outcome }).inc();
        self.round_seconds.observe(took.as_secs_f64());
    }

    /// A group failed.
    pub fn group_failed(&self, reason: &str) {
        let reason = reason.to_owned();
        self.group_failures
            .get_or_create(&FailureReason { reason })
            .inc();
    }

    /// Groups of the object `namespace/name`.
    pub fn groups(&self, key: &str, wanted: i64, ready: i64) {
        let deployment = Deployment::of(key);
        self.wanted.get_or_create(&deployment).set(wanted);
        self.ready.get_or_create(&deployment).set(ready);
    }

    /// The object `namespace/name` is going away.
    pub fn forget(&self, key: &str) {
        let deployment = Deployment::of(key);
        self.wanted.remove(&deployment);
        self.ready.remove(&deployment);
    }

    /// Whether this process holds the lease.
    pub fn set_leader(&self, leader: bool) {
        self.leader.set(i64::from(leader));
    }

    /// A watch broke.
    pub fn watch_failed(&self) {
        self.watch_errors.inc();
    }

    /// A request is sent to the API server.
    pub fn requested(&self, method: &Method, path: &str) {
        if let (Some(verb), Some(resource)) = (write_verb(method), resource(path)) {
            self.api_writes
                .get_or_create(&Write { verb, resource })
                .inc();
        }
    }

    /// Everything in the `OpenMetrics` text format.
    pub fn text(&self, in_backoff: usize) -> Result<String, std::fmt::Error> {
        self.in_backoff
            .set(i64::try_from(in_backoff).unwrap_or(i64::MAX));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The Kubernetes verb of a request that writes.
fn write_verb(method: &Method) -> Option<&'static str> {
    match method.as_str() {
        "POST" => Some("create"),
        "PUT" => Some("update"),
        "PATCH" => Some("patch"),
        "DELETE" => Some("delete"),
        _ => None,
    }
}

/// The resource and subresource of a path, for example `llamadeployments/status`.
fn resource(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let (["api", _, within @ ..] | ["apis", _, _, within @ ..]) = parts.as_slice() else {
        return None;
    };
    let object = match within {
        ["namespaces", _, object @ ..] if !object.is_empty() => object,
        object => object,
    };
    match object {
        [resource] | [resource, _] => Some((*resource).to_owned()),
        [resource, _, subresource] => Some(format!("{resource}/{subresource}")),
        _ => None,
    }
}

impl Deployment {
    fn of(key: &str) -> Self {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_documented_ones() {
        let metrics = Metrics::new();
        metrics.reconciled("success", Duration::from_millis(7));
        metrics.group_failed("RankDied");
        metrics.groups("team/m", 2, 1);
        metrics.set_leader(true);
        metrics.requested(&Method::POST, "/api/v1/namespaces/team/pods");
        let text = metrics.text(3).expect("encodes");
        for line in [
            "llama_operator_reconcile_total{outcome=\"success\"} 1",
            "llama_operator_group_failures_total{reason=\"RankDied\"} 1",
            "llama_operator_groups_wanted{namespace=\"team\",name=\"m\"} 2",
            "llama_operator_groups_ready{namespace=\"team\",name=\"m\"} 1",
            "llama_operator_objects_in_backoff 3",
            "llama_operator_leader 1",
            "llama_operator_api_writes_total{verb=\"create\",resource=\"pods\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        metrics.forget("team/m");
        assert!(!metrics.text(0).expect("encodes").contains("team"));
    }

    #[test]
    fn resources_are_told_by_their_paths() {
        let status = "/apis/llmops.dev/v1alpha1/namespaces/team/llamadeployments/m/status";
        for (path, expected) in [
            ("/api/v1/namespaces/team/pods", Some("pods")),
            ("/api/v1/namespaces/team/pods/m-0-0", Some("pods")),
            (status, Some("llamadeployments/status")),
            ("/api/v1/namespaces/team", Some("namespaces")),
            ("/apis/g/v1/things/x", Some("things")),
            ("/readyz", None),
            ("/api/v1", None),
        ] {
            assert_eq!(resource(path).as_deref(), expected, "{path}");
        }
        assert_eq!(write_verb(&Method::PATCH), Some("patch"));
        assert_eq!(write_verb(&Method::GET), None);
    }
}
