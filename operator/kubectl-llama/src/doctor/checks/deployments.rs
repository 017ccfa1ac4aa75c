//! What the status of a LlamaDeployment says is wrong.

use jiff::Timestamp;
use kube::ResourceExt;
use llama_crds::v1alpha1::{ConditionType, GroupPhase, LlamaDeployment, Reason};
use llama_operator::labels;

use crate::doctor::facts::Subject;
use crate::doctor::finding::Finding;
use crate::status::page::failure_line;
use crate::status::{condition, is_current, is_ready};
use crate::words::{age, full_name};

/// Seconds in which an operator that works has looked at a new spec.
const LOOKED_AT: i64 = 120;
/// Seconds after which a deletion is stuck.
const DELETED: i64 = 600;

/// What there is to say of `subject`.
pub(super) fn check(subject: &Subject, now: Timestamp) -> Vec<Finding> {
    let deployment = &subject.deployment;
    let about = full_name(deployment);
    let mut findings = Vec::new();
    if let Some(since) = &deployment.metadata.deletion_timestamp {
        let ago = now.duration_since(since.0).as_secs();
        findings.extend((ago > DELETED).then(|| stuck(deployment, &about, now)));
        return findings;
    }
    findings.extend(paused(deployment, &about));
    findings.extend(unseen(deployment, &about, now));
    findings.extend(conditions(deployment, &about));
    findings.extend(rollout(deployment, &about));
    findings.extend(groups(deployment, &about, now));
    findings
}

/// What there is to say where nothing is wrong.
pub(super) fn nothing_found(subject: &Subject) -> Finding {
    let deployment = &subject.deployment;
    let about = full_name(deployment);
    if deployment.metadata.deletion_timestamp.is_some() {
        return Finding::ok(&about, "is being deleted");
    }
    let ready = condition(deployment, ConditionType::Ready);
    let message = ready.map_or_else(String::new, |ready| {
        format!("{}: {}", ready.reason, ready.message)
    });
    if is_ready(deployment) || deployment.spec.suspend {
        return Finding::ok(&about, message);
    }
    let next = format!("{} --watch", look(deployment, "status"));
    Finding::warn(&about, format!("not ready yet: {message}"), next)
}

/// The command `kubectl llama WHAT` for `deployment`.
pub(super) fn look(deployment: &LlamaDeployment, what: &str) -> String {
    let space = deployment.namespace().unwrap_or_default();
    format!("kubectl llama -n {space} {what} {}", deployment.name_any())
}

fn stuck(deployment: &LlamaDeployment, about: &str, now: Timestamp) -> Finding {
    let since = &deployment.metadata.deletion_timestamp;
    let ago = since
        .as_ref()
        .map_or_else(String::new, |since| age(since.0, now));
    let held = deployment.finalizers().join(", ");
    let message = format!("is being deleted for {ago}, held by the finalizers {held}");
    let next = "look for what sets these finalizers: the operator sets none; foregroundDeletion \
                waits for pods that are still there";
    Finding::fail(about, message, next)
}

fn paused(deployment: &LlamaDeployment, about: &str) -> Option<Finding> {
    let value = deployment.annotations().get(labels::PAUSE)?;
    (value == labels::TRUE).then(|| {
        let (space, name) = (
            deployment.namespace().unwrap_or_default(),
            deployment.name_any(),
        );
        let message = format!(
            "the annotation {} keeps the operator from changing anything",
            labels::PAUSE
        );
        let next = format!("kubectl -n {space} annotate ld {name} {}-", labels::PAUSE);
        Finding::warn(about, message, next)
    })
}

fn unseen(deployment: &LlamaDeployment, about: &str, now: Timestamp) -> Option<Finding> {
    let created = deployment.metadata.creation_timestamp.as_ref()?;
    let is_old = now.duration_since(created.0).as_secs() > LOOKED_AT;
    let is_paused = paused(deployment, about).is_some();
    (is_old && !is_current(deployment) && !is_paused).then(|| {
        let message = "its status does not speak of its spec: no operator has looked at it";
        let next = "see that an operator runs and watches this namespace, and read its log";
        Finding::fail(about, message, next)
    })
}

/// Whether it can come to be by itself.
fn conditions(deployment: &LlamaDeployment, about: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut said = Vec::new();
    let planned = condition(deployment, ConditionType::Planned);
    if let Some(planned) = planned.filter(|planned| planned.status == "False") {
        let message = format!("{}: {}", planned.reason, planned.message);
        let next = look(deployment, "plan");
        findings.push(if planned.reason == Reason::Planning.as_str() {
            Finding::warn(about, message, next)
        } else {
            Finding::fail(about, message, next)
        });
        said.push(planned.reason.clone());
    }
    let stalled = condition(deployment, ConditionType::Stalled);
    if let Some(stalled) = stalled
        && stalled.status == "True"
        && !said.contains(&stalled.reason)
    {
        let message = format!("{}: {}", stalled.reason, stalled.message);
        findings.push(Finding::fail(about, message, look(deployment, "status")));
    }
    findings
}

fn rollout(deployment: &LlamaDeployment, about: &str) -> Option<Finding> {
    let rollout = deployment.status.as_ref()?.rollout.as_ref()?;
    if let Some(failure) = &rollout.failure {
        let message = format!(
            "revision {} was given up: {}: {}",
            failure.revision, failure.reason, failure.message
        );
        let next = "change the spec: a new revision is tried again";
        return Some(Finding::fail(about, message, next));
    }
    let is_paused = deployment
        .spec
        .rollout
        .as_ref()
        .is_some_and(|rollout| rollout.paused);
    is_paused.then(|| {
        let message = format!("its rollout is paused: {}", rollout.message);
        Finding::warn(about, message, "set spec.rollout.paused to false to go on")
    })
}

fn groups(deployment: &LlamaDeployment, about: &str, now: Timestamp) -> Vec<Finding> {
    let groups = deployment.status.as_ref().map(|status| &*status.groups);
    let finding = |group| {
        let group: &llama_crds::v1alpha1::GroupStatus = group;
        let failure = group.last_failure.as_ref();
        let cause = failure.map_or_else(
            || group.message.clone().unwrap_or_default(),
            |failure| {
                format!(
                    "{}: {}",
                    failure_line(deployment, group, now),
                    failure.message
                )
            },
        );
        let next = match failure.map(|failure| failure.reason.as_str()) {
            Some(reason) if reason == Reason::OOMKilled.as_str() => {
                format!("raise spec.resources.memory; {}", look(deployment, "plan"))
            }
            _ => format!("{} --group {}", look(deployment, "logs"), group.index),
        };
        match group.phase {
            GroupPhase::Failed => {
                let message = format!("failed and is not tried again: {cause}");
                Some(Finding::fail(about, message, next))
            }
            GroupPhase::Restarting => {
                let times = group.restarts;
                let message = format!("failed {times} times in a row and is tried again: {cause}");
                Some(Finding::warn(about, message, next))
            }
            _ => None,
        }
    };
    groups
        .unwrap_or_default()
        .iter()
        .filter_map(finding)
        .collect()
}
