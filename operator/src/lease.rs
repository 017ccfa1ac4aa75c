//! Leader election over a `Lease`.
//!
//! [`decide`] is pure. As in client-go, another holder's lease counts as over when it
//! was seen unchanged for its whole duration by our own clock, so clocks need not agree.
//! Writes carry the observed `resourceVersion`: of two that try, one wins.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use crate::telemetry::chain;

/// How long a lease lasts without being renewed.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for this long stops, well before others take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(2);
/// Longest single call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a lease could not be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// A call failed.
    #[error("{attempt} Lease {name}")]
    Api {
        /// What was tried.
        attempt: &'static str,
        /// The lease.
        name: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// A call did not return.
    #[error("no answer about Lease {name} within {CALL_TIMEOUT:?}")]
    NoAnswer {
        /// The lease.
        name: String,
    },
    /// Another process has it.
    #[error("Lease {name} is held by {holder}")]
    Lost {
        /// The lease.
        name: String,
        /// Who has it.
        holder: String,
    },
    /// Another process wrote it between our look and our write.
    #[error("Lease {name} was changed by another process at the same moment")]
    Raced {
        /// The lease.
        name: String,
    },
    /// It could not be renewed in time.
    #[error("Lease {name} could not be renewed for {RENEW_DEADLINE:?}")]
    Expired {
        /// The lease.
        name: String,
    },
}

/// What to do about a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nobody made it yet: create it.
    Create,
    /// It is ours: renew it.
    Renew,
    /// Nobody holds it, or its holder is silent: take it.
    Take,
    /// Somebody else holds it.
    Wait {
        /// Who.
        holder: String,
    },
}

/// What `me` should do about `lease`, which was seen unchanged for `unchanged`.
pub fn decide(lease: Option<&LeaseSpec>, me: &str, unchanged: Duration) -> Decision {
    let Some(lease) = lease else {
        return Decision::Create;
    };
    let holder = lease.holder_identity.as_deref().unwrap_or_default();
    if holder == me {
        return Decision::Renew;
    }
    let seconds = lease.lease_duration_seconds.unwrap_or_default();
    let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    if holder.is_empty() || unchanged >= duration {
        return Decision::Take;
    }
    Decision::Wait {
        holder: holder.to_owned(),
    }
}

/// One candidate for one lease.
#[expect(
    missing_debug_implementations,
    reason = "the client has nothing to print"
)]
pub struct Candidate {
    leases: Api<Lease>,
    name: String,
    me: String,
    /// The lease as last seen to change, and when.
    seen: Option<(Option<String>, Instant)>,
}

impl Candidate {
    /// A candidate `me`, unique among processes, for the lease `namespace/name`.
    pub fn new(client: Client, namespace: &str, name: &str, me: &str) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            me: me.to_owned(),
            seen: None,
        }
    }

    /// Returns once the lease is ours, with the time from which it lasts. Failed calls are
    /// logged and tried again.
    pub async fn acquire(&mut self) -> Instant {
        let mut told = String::new();
        let acquired = loop {
            let begun = Instant::now();
            match self.step().await {
                Ok(Decision::Wait { holder }) if holder == told => {}
                Ok(Decision::Wait { holder }) => {
                    tracing::info!(lease = %self.name, %holder, "standing by");
                    told = holder;
                }
                Ok(_) => break begun,
                Err(error) => log("cannot take the lease", &error),
            }
            tokio::time::sleep(PERIOD).await;
        };
        tracing::info!(lease = %self.name, me = %self.me, "leading");
        acquired
    }

    /// Renews the lease, ours since `renewed`, until it is lost, and says how it was.
    ///
    /// Time counts from before a write, where others count from after it, and a call that
    /// hangs is cut off: the holder always stops before another may start.
    pub async fn keep(&mut self, mut renewed: Instant) -> LeaseError {
        loop {
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            let attempt = async {
                tokio::time::sleep(PERIOD).await;
                (Instant::now(), self.step().await)
            };
            let Ok((begun, result)) = tokio::time::timeout(left, attempt).await else {
                let name = self.name.clone();
                return LeaseError::Expired { name };
            };
            match result {
                Ok(Decision::Wait { holder }) => {
                    let name = self.name.clone();
                    return LeaseError::Lost { name, holder };
                }
                Ok(_) => renewed = begun,
                Err(error) => log("cannot renew the lease", &error),
            }
        }
    }

    /// Gives the lease back, so that another need not wait for its end.
    pub async fn release(&mut self) {
        let Ok(Some(mut lease)) = self.read().await else {
            return;
        };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(self.me.as_str()) {
            return;
        }
        spec.holder_identity = Some(String::new());
        if let Err(error) = self.replace(&lease).await {
            log("cannot give the lease back", &error);
        }
    }

    /// One look at the lease and what follows from it.
    async fn step(&mut self) -> Result<Decision, LeaseError> {
        let lease = self.read().await?;
        let version = lease
            .as_ref()
            .and_then(|lease| lease.metadata.resource_version.clone());
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => {
                let now = Instant::now();
                self.seen = Some((version, now));
                now
            }
        };
        let spec = lease.as_ref().and_then(|lease| lease.spec.as_ref());
        let decision = decide(spec, &self.me, since.elapsed());
        let written = match (&decision, lease) {
            (Decision::Wait { .. }, _) => return Ok(decision),
            (_, None) => self.create().await,
            (_, Some(mut lease)) => {
                let spec = lease.spec.get_or_insert_default();
                claim(spec, &self.me, Timestamp::now());
                self.replace(&lease).await
            }
        };
        match written {
            Err(LeaseError::Api { name, source, .. }) if is_race(&source) => {
                Err(LeaseError::Raced { name })
            }
            other => other.map(|()| decision),
        }
    }

    async fn read(&self) -> Result<Option<Lease>, LeaseError> {
        self.call("read", self.leases.get_opt(&self.name)).await
    }

    async fn create(&self) -> Result<(), LeaseError> {
        let mut spec = LeaseSpec::default();
        claim(&mut spec, &self.me, Timestamp::now());
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(spec),
        };
        let params = PostParams::default();
        self.call("create", self.leases.create(&params, &lease))
            .await
            .map(|_| ())
    }

    async fn replace(&self, lease: &Lease) -> Result<(), LeaseError> {
        let params = PostParams::default();
        self.call("write", self.leases.replace(&self.name, &params, lease))
            .await
            .map(|_| ())
    }

    async fn call<T>(
        &self,
        attempt: &'static str,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, LeaseError> {
        let name = || self.name.clone();
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Err(_) => Err(LeaseError::NoAnswer { name: name() }),
            Ok(result) => result.map_err(|source| LeaseError::Api {
                attempt,
                name: name(),
                source: Box::new(source),
            }),
        }
    }
}

fn log(what: &'static str, error: &LeaseError) {
    tracing::warn!(error = chain(error), "{what}");
}

fn is_race(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict() || status.is_already_exists())
}

/// Writes `me` into `spec` as the holder at `now`.
fn claim(spec: &mut LeaseSpec, me: &str, now: Timestamp) {
    if spec.holder_identity.as_deref() != Some(me) {
        spec.holder_identity = Some(me.to_owned());
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |count| count + 1));
    }
    spec.renew_time = Some(MicroTime(now));
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        let mut spec = LeaseSpec::default();
        claim(&mut spec, holder, Timestamp::UNIX_EPOCH);
        spec
    }

    #[test]
    fn decisions() {
        let moment = Duration::from_secs(1);
        assert_eq!(decide(None, "me", moment), Decision::Create);
        assert_eq!(decide(Some(&held_by("me")), "me", moment), Decision::Renew);
        assert_eq!(
            decide(Some(&held_by("me")), "me", DURATION * 2),
            Decision::Renew
        );
        assert_eq!(decide(Some(&held_by("")), "me", moment), Decision::Take);
        assert_eq!(
            decide(Some(&held_by("you")), "me", DURATION),
            Decision::Take
        );
        let holder = "you".to_owned();
        assert_eq!(
            decide(Some(&held_by("you")), "me", moment),
            Decision::Wait { holder }
        );
    }

    #[test]
    fn a_new_holder_counts_as_a_transition() {
        let mut spec = held_by("you");
        claim(&mut spec, "you", Timestamp::UNIX_EPOCH);
        assert_eq!(spec.lease_transitions, Some(0));
        claim(&mut spec, "me", Timestamp::UNIX_EPOCH);
        assert_eq!(spec.lease_transitions, Some(1));
        assert_eq!(spec.holder_identity.as_deref(), Some("me"));
    }

    #[test]
    fn a_holder_stops_before_others_may_start() {
        assert!(RENEW_DEADLINE + PERIOD < DURATION);
        assert!(PERIOD * 3 < RENEW_DEADLINE);
    }
}
