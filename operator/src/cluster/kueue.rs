//! What Kueue says: whether the API server serves its objects, and what a Workload waits for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, Condition};
use kube::Client;
use serde::Deserialize;
use tokio::time::timeout;

use crate::telemetry::chain;

/// Its API group.
const GROUP: &str = "kueue.x-k8s.io";
/// The kind whose presence says that it is there.
const LOCAL_QUEUE: &str = "LocalQueue";
const NOT_FOUND: u16 = 404;
/// How long it holds that the API is served, and that it is not.
const SERVED_HOLDS: Duration = Duration::from_secs(30);
const ABSENT_HOLDS: Duration = Duration::from_secs(5);
/// Longest wait for a Workload.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Workloads that one round asks for at most.
const ASKED: usize = 16;

/// What Kueue says.
#[derive(Debug, Default)]
pub struct Kueue {
    /// The version that is served, if any, and when that was looked at.
    version: Mutex<Option<(Instant, Option<String>)>>,
}

#[derive(Deserialize)]
struct Workload {
    #[serde(default)]
    status: WorkloadStatus,
}

#[derive(Default, Deserialize)]
struct WorkloadStatus {
    #[serde(default)]
    conditions: Vec<Condition>,
}

impl Kueue {
    /// The version in which the API server serves `LocalQueues` and Workloads; `None` when
    /// it does not.
    ///
    /// # Errors
    /// It did not answer.
    pub async fn version(&self, client: &Client) -> Result<Option<String>, kube::Error> {
        if let Some((at, version)) = self.known() {
            let holds = version.as_ref().map_or(ABSENT_HOLDS, |_| SERVED_HOLDS);
            if at.elapsed() < holds {
                return Ok(version);
            }
        }
        let found = served(client).await?;
        let mut known = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some((Instant::now(), found.clone()));
        Ok(found)
    }

    /// Conditions of the Workloads `names` of `namespace`, of those that can be read.
    pub async fn workloads(
        &self,
        client: &Client,
        namespace: &str,
        names: &BTreeSet<&str>,
    ) -> BTreeMap<String, Vec<Condition>> {
        let Some((_, Some(version))) = self.known() else {
            return BTreeMap::new();
        };
        let reads = names.iter().take(ASKED).map(async |name| {
            let path = format!("/apis/{version}/namespaces/{namespace}/workloads/{name}");
            let answer = timeout(ANSWER_WITHIN, get::<Workload>(client, &path)).await;
            match answer {
                Ok(Ok(found)) => found.map(|found| ((*name).to_owned(), found.status.conditions)),
                Ok(Err(error)) => {
                    tracing::debug!(workload = name, error = chain(&error), "cannot be read");
                    None
                }
                Err(_) => None,
            }
        });
        join_all(reads).await.into_iter().flatten().collect()
    }

    fn known(&self) -> Option<(Instant, Option<String>)> {
        let known = self.version.lock();
        known.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn served(client: &Client) -> Result<Option<String>, kube::Error> {
    let Some(group) = get::<APIGroup>(client, &format!("/apis/{GROUP}")).await? else {
        return Ok(None);
    };
    let mut versions = group.preferred_version.into_iter().chain(group.versions);
    let preferred = versions.next();
    let Some(version) = preferred.map(|version| version.group_version) else {
        return Ok(None);
    };
    let kinds = client.list_api_group_resources(&version).await?;
    let has_queues = kinds.resources.iter().any(|kind| kind.kind == LOCAL_QUEUE);
    Ok(has_queues.then_some(version))
}

/// What is at `path`, if anything is.
async fn get<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
) -> Result<Option<T>, kube::Error> {
    let request = axum::http::Request::get(path).body(Vec::new());
    let request = request.map_err(kube::Error::HttpError)?;
    match client.request::<T>(request).await {
        Ok(found) => Ok(Some(found)),
        // Of a group that is not served it says so in plain text, with no reason.
        Err(kube::Error::Api(status)) if status.code == NOT_FOUND => Ok(None),
        Err(error) => Err(error),
    }
}
