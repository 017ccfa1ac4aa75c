//! Pods that do not start, have ended, or do not go.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use llama_crds::v1alpha1::Reason;
use llama_operator::cluster::kinds::WorkerPod;
use llama_operator::reconcile::failure::cause;
use llama_operator::reconcile::observe::Observed;
use llama_operator::reconcile::pods::PodView;
use llama_operator::reconcile::validate::{ValidDeployment, validate};
use llama_operator::reconcile::waiting::{of_containers, of_scheduling};

use super::deployments::look;
use crate::doctor::facts::Subject;
use crate::doctor::finding::{Finding, Level};
use crate::words::{age, full_name};

/// Seconds after its grace within which a pod should be gone.
const GONE: i64 = 120;
/// Pods that a finding names at most.
const NAMED: usize = 4;

/// What there is to say of the pods of `subject`.
pub(super) fn check(subject: &Subject, now: Timestamp) -> Vec<Finding> {
    let deployment = &subject.deployment;
    let about = full_name(deployment);
    let valid = match validate(deployment, &Observed::default()) {
        Ok(valid) => valid,
        Err(problem) => {
            let next = "change the spec";
            return vec![Finding::fail(&about, problem.to_string(), next)];
        }
    };
    // One finding for all pods of which the same is to be said.
    let mut said: BTreeMap<(Level, String, String), Vec<String>> = BTreeMap::new();
    for pod in &subject.pods {
        if let Some(Finding {
            level,
            message,
            next,
            ..
        }) = of_pod(subject, pod, &valid, now)
        {
            let key = (level, message, next.unwrap_or_default());
            said.entry(key).or_default().push(pod.name_any());
        }
    }
    let merged = |((level, message, next), mut names): ((Level, String, String), Vec<String>)| {
        if names.len() > NAMED {
            let more = names.len() - NAMED;
            names.truncate(NAMED);
            names.push(format!("{more} more"));
        }
        let message = format!("pod {}: {message}", names.join(", "));
        Finding {
            level,
            ..Finding::warn(&about, message, next)
        }
    };
    said.into_iter().map(merged).collect()
}

fn of_pod(
    subject: &Subject,
    pod: &Pod,
    valid: &ValidDeployment,
    now: Timestamp,
) -> Option<Finding> {
    let deployment = &subject.deployment;
    let space = deployment.namespace().unwrap_or_default();
    // Read as the operator reads it.
    let value = serde_json::to_value(pod).ok()?;
    let worker: WorkerPod = serde_json::from_value(value).ok()?;
    let view = PodView::read(&worker)?;
    if let Some(deadline) = &pod.metadata.deletion_timestamp {
        let late = now.duration_since(deadline.0).as_secs();
        return (late > GONE).then(|| {
            let node = view.node_name().unwrap_or("none");
            let since = age(deadline.0, now);
            let message = format!("should be gone for {since}, and is not; its node is {node}");
            let next = format!(
                "see whether the node answers: kubectl get node {node}; where it is lost for good, \
                 delete the Node"
            );
            Finding::fail("", message, next)
        });
    }
    if view.has_ended() {
        let cause = cause(&[view], &valid.memory)?;
        let next = if cause.reason == Reason::OOMKilled.as_str() {
            format!("raise spec.resources.memory; {}", look(deployment, "plan"))
        } else {
            format!("{} --group {}", look(deployment, "logs"), view.group)
        };
        let message = format!("{}: {}", cause.reason, cause.message);
        return Some(Finding::fail("", message, next));
    }
    if let Some(obstacle) = of_scheduling(&view) {
        let next = "free or add nodes, or change spec.placement or spec.resources";
        let message = format!("cannot be scheduled: {}", obstacle.message);
        return Some(Finding::fail("", message, next));
    }
    if let Some(obstacle) = of_containers(&view, &valid.source) {
        let next = format!("kubectl -n {space} describe pod {}", view.name);
        return Some(Finding::fail("", obstacle.message, next));
    }
    view.is_gated().then(|| {
        let message = "waits until there are nodes for all pods of its group";
        Finding::warn("", message, look(deployment, "status"))
    })
}
