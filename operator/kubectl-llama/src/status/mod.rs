//! `kubectl llama status`: how LlamaDeployments are.

mod memory;
pub mod page;
pub mod table;

use std::io::{IsTerminal as _, Write};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::ListParams;
use llama_crds::v1alpha1::{ConditionType, LlamaDeployment};
use llama_operator::{labels, names};
use serde::Serialize;

pub use memory::memory_lines;

use crate::Health;
use crate::args::StatusFlags;
use crate::cluster::Cluster;
use crate::error::Error;
use crate::output::formed;

/// Pause between two looks of `--watch`.
const PAUSE: Duration = Duration::from_secs(2);
/// Looks in a row that may fail before `--watch` gives up.
const FAILED_LOOKS: u32 = 5;
/// Moves the cursor of a terminal to its upper left corner and clears what follows.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What there is to say of one LlamaDeployment.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// It.
    pub deployment: LlamaDeployment,
    /// The pods of its groups, and the one that inspects its model.
    pub pods: Vec<Pod>,
    /// Warning events about it and its pods.
    pub warnings: Vec<Event>,
}

/// Whether `deployment` is as its spec asks, as far as its status speaks of this spec.
pub fn is_ready(deployment: &LlamaDeployment) -> bool {
    is_current(deployment)
        && condition(deployment, ConditionType::Ready)
            .is_some_and(|condition| condition.status == "True")
}

/// Whether the status speaks of the spec as it is now.
pub fn is_current(deployment: &LlamaDeployment) -> bool {
    let status = deployment.status.as_ref();
    status.is_some_and(|status| status.observed_generation == deployment.metadata.generation)
}

/// The condition of type `type_`, if the operator has set it.
pub fn condition(
    deployment: &LlamaDeployment,
    type_: ConditionType,
) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition> {
    llama_operator::reconcile::status::find(deployment.status.as_ref()?, type_)
}

/// Writes how the LlamaDeployments that `flags` name are.
pub async fn run(
    cluster: &Cluster,
    flags: &StatusFlags,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    if !flags.watch {
        let (text, health) = look(cluster, flags).await?;
        out.write_all(text.as_bytes())?;
        return Ok(health);
    }
    let clears = std::io::stdout().is_terminal();
    let mut failed = 0;
    loop {
        match look(cluster, flags).await {
            Ok((text, _)) => {
                failed = 0;
                let before = if clears { CLEAR } else { "" };
                write!(out, "{before}{text}")?;
                if !clears {
                    writeln!(out)?;
                }
                out.flush()?;
            }
            Err(error) => {
                failed += 1;
                if failed == FAILED_LOOKS || error.is_not_found() || error.is_forbidden() {
                    return Err(error);
                }
                eprintln!("warning: {error}; looking again");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One look.
async fn look(cluster: &Cluster, flags: &StatusFlags) -> Result<(String, Health), Error> {
    if let Some(name) = &flags.name {
        let facts = facts(cluster, name).await?;
        let health = Health::of(is_ready(&facts.deployment));
        let text = match flags.output {
            Some(form) => formed(&facts, form)?,
            None => page::page(&facts, Timestamp::now()),
        };
        return Ok((text, health));
    }
    let all = cluster.deployments(flags.all_namespaces).await?;
    if all.is_empty() {
        let place = if flags.all_namespaces {
            "any namespace".to_owned()
        } else {
            format!("namespace {}", cluster.namespace)
        };
        eprintln!("No LlamaDeployments found in {place}.");
    }
    let text = match flags.output {
        Some(form) => formed(&all, form)?,
        None => table::table(&all, flags.all_namespaces, Timestamp::now()),
    };
    Ok((text, Health::of(all.iter().all(is_ready))))
}

/// Reads what there is to say of the LlamaDeployment `name`.
pub async fn facts(cluster: &Cluster, name: &str) -> Result<Facts, Error> {
    let deployment = cluster.deployment(name).await?;
    let selector = ListParams::default().labels(&labels::of_deployment(name));
    let attempt = format!("list the pods of LlamaDeployment {name}");
    let pods: Vec<Pod> = cluster
        .list(&attempt, &cluster.api(false), &selector)
        .await?;
    let warnings = ListParams::default().fields("type=Warning");
    let events = cluster
        .list("list events", &cluster.api(false), &warnings)
        .await;
    let warnings = match events {
        Ok(events) => about(name, &pods, events),
        Err(error) if error.is_forbidden() => Vec::new(),
        Err(error) => return Err(error),
    };
    Ok(Facts {
        deployment,
        pods,
        warnings,
    })
}

/// Those of `events` that are about the LlamaDeployment `name` or its `pods`.
fn about(name: &str, pods: &[Pod], events: Vec<Event>) -> Vec<Event> {
    let inspection = names::inspection(name);
    let is_ours = |event: &Event| {
        let object = &event.involved_object;
        let about = object.name.as_deref().unwrap_or_default();
        match object.kind.as_deref() {
            Some("LlamaDeployment") => about == name,
            Some("Pod") => {
                about == inspection
                    || pods
                        .iter()
                        .any(|pod| pod.metadata.name.as_deref() == Some(about))
            }
            _ => false,
        }
    };
    events.into_iter().filter(is_ours).collect()
}
