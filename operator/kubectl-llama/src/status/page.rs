//! One LlamaDeployment as a page. Pure.

use std::fmt::Write as _;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use llama_crds::v1alpha1::{
    Accelerator, ConditionType, GroupPhase, GroupStatus, LlamaDeployment, LlamaDeploymentStatus,
    ModelSource,
};
use llama_operator::{labels, names};
use serde_json::Value;

use super::{Facts, condition, is_current, memory_lines};
use crate::words::{NONE, Table, age, age_of, count, full_name};

/// Most events that are shown, the latest first.
const WARNINGS: usize = 8;

/// What there is to say at `now`.
pub fn page(facts: &Facts, now: Timestamp) -> String {
    let deployment = &facts.deployment;
    let status = deployment.status.clone().unwrap_or_default();
    let mut page = headline(deployment, now);
    facts_of_spec(&mut page, deployment, &status);
    conditions(&mut page, deployment, now);
    rollout(&mut page, &status, now);
    groups(&mut page, facts, &status, now);
    failures(&mut page, deployment, &status, now);
    self_tests(&mut page, &status, now);
    warnings(&mut page, &facts.warnings, now);
    page
}

fn headline(deployment: &LlamaDeployment, now: Timestamp) -> String {
    let mut text = format!("LlamaDeployment {}: ", full_name(deployment));
    if let Some(since) = &deployment.metadata.deletion_timestamp {
        let _ = writeln!(text, "being deleted since {}", age(since.0, now));
        return text;
    }
    let ready = condition(deployment, ConditionType::Ready);
    let _ = match ready {
        _ if !is_current(deployment) => {
            writeln!(text, "the operator has not looked at this spec yet")
        }
        None => writeln!(text, "the operator has said nothing yet"),
        Some(ready) => {
            let word = match ready.status.as_str() {
                "True" => "ready",
                "False" => "not ready",
                _ => "unknown",
            };
            writeln!(text, "{word} ({})\n  {}", ready.reason, ready.message)
        }
    };
    text
}

fn line(page: &mut String, title: &str, text: &str) {
    let _ = writeln!(page, "{title:<13}{text}");
}

fn facts_of_spec(page: &mut String, deployment: &LlamaDeployment, status: &LlamaDeploymentStatus) {
    let spec = &deployment.spec;
    page.push('\n');
    let served = status
        .served_name
        .clone()
        .unwrap_or_else(|| deployment.name_any());
    let from = source(&spec.model.source);
    line(page, "Model", &format!("{served}, from {from}"));
    line(page, "URL", status.url.as_deref().unwrap_or(NONE));
    let wanted = spec.replicas;
    let suspended = if spec.suspend { ", suspended" } else { "" };
    let text = format!(
        "{}/{wanted} ready, {} of the current revision{suspended}",
        status.ready_replicas, status.updated_replicas
    );
    line(page, "Groups", &text);
    let layout = spec.parallelism;
    let ranks = layout.tensor * layout.pipeline;
    let on = match spec.resources.accelerator {
        Accelerator::Cpu => "on CPU cores",
        Accelerator::Gpu => "each with a GPU",
    };
    let text = format!(
        "{} a group in {} (tensor {}, pipeline {}), {on}",
        count(ranks, "rank"),
        count(layout.nodes, "pod"),
        layout.tensor,
        layout.pipeline
    );
    line(page, "Layout", &text);
    match (&status.plan, &status.inspection) {
        (Some(plan), _) => {
            let [fits, held] = memory_lines(plan, spec.resources.accelerator);
            line(page, "Memory", &fits);
            line(page, "", &held);
        }
        (None, Some(failed)) => line(
            page,
            "Memory",
            &format!("no plan: {}: {}", failed.reason, failed.message),
        ),
        (None, None) => line(page, "Memory", "no plan"),
    }
    let paused = deployment.annotations().get(labels::PAUSE);
    if paused.is_some_and(|value| value == labels::TRUE) {
        let text = format!(
            "the annotation {} keeps the operator from changing anything",
            labels::PAUSE
        );
        line(page, "Paused", &text);
    }
}

/// The source of a model in a few words: its kind and its fields, whatever these are.
pub fn source(source: &ModelSource) -> String {
    let value = serde_json::to_value(source).unwrap_or_default();
    let kind = value.as_object().and_then(|kinds| kinds.iter().next());
    let Some((kind, fields)) = kind else {
        return "no source".to_owned();
    };
    let shown = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name} {text}"),
        Value::Array(items) => format!("{} {name}", items.len()),
        other => match other["name"].as_str() {
            Some(object) => format!("{name} {object}"),
            None => format!("{name} {other}"),
        },
    };
    let fields: Vec<_> = fields
        .as_object()
        .into_iter()
        .flatten()
        .map(shown)
        .collect();
    format!("{kind} ({})", fields.join(", "))
}

/// Conditions that are not as they should be; that of readiness is the headline.
fn conditions(page: &mut String, deployment: &LlamaDeployment, now: Timestamp) {
    let matters = |type_: &ConditionType| {
        let condition = condition(deployment, *type_)?;
        let abnormal = match type_ {
            ConditionType::Ready => return None,
            ConditionType::Reconciling | ConditionType::Stalled => "True",
            ConditionType::Available
            | ConditionType::ModelReady
            | ConditionType::Scheduled
            | ConditionType::Planned => "False",
        };
        (condition.status == abnormal).then_some(condition)
    };
    let all: Vec<&Condition> = ConditionType::ALL.iter().filter_map(matters).collect();
    if all.is_empty() {
        return;
    }
    let said = self::condition(deployment, ConditionType::Ready).map(|ready| &ready.message);
    page.push_str("\nConditions\n");
    for condition in all {
        let _ = writeln!(
            page,
            "  {}={}, {} for {}",
            condition.type_,
            condition.status,
            condition.reason,
            age(condition.last_transition_time.0, now)
        );
        if said != Some(&condition.message) && !condition.message.is_empty() {
            let _ = writeln!(page, "    {}", condition.message);
        }
    }
}

fn rollout(page: &mut String, status: &LlamaDeploymentStatus, now: Timestamp) {
    let Some(rollout) = &status.rollout else {
        return;
    };
    let revision = |name: &Option<String>| name.clone().unwrap_or_else(|| NONE.to_owned());
    let mode = rollout.mode.map_or(NONE, |mode| mode.as_str());
    let _ = writeln!(
        page,
        "\nRollout from {} to {} ({mode})\n  {}\n  groups that serve at the new revision: {}; last progress {} ago",
        revision(&status.current_revision),
        revision(&status.updated_revision),
        rollout.message,
        rollout.updated_ready,
        age_of(rollout.progressed_at.as_ref(), now)
    );
    if let Some(failure) = &rollout.failure {
        let _ = writeln!(
            page,
            "  revision {} was given up: {}: {}",
            failure.revision, failure.reason, failure.message
        );
    }
}

fn groups(page: &mut String, facts: &Facts, status: &LlamaDeploymentStatus, now: Timestamp) {
    if status.groups.is_empty() {
        return;
    }
    page.push_str("\nGroups\n");
    let mut table = Table::new(&[
        "GROUP", "PHASE", "PODS", "RESTARTS", "EPOCH", "REVISION", "NODES",
    ]);
    let name = facts.deployment.name_any();
    for group in &status.groups {
        let index = u32::try_from(group.index).unwrap_or(0);
        let nodes = match group.nodes.as_slice() {
            [] => NONE.to_owned(),
            nodes => nodes.join(","),
        };
        table.row([
            names::group(&name, index),
            group.phase.as_str().to_owned(),
            pods_ready(&facts.pods, index, facts.deployment.spec.parallelism.nodes),
            group.restarts.to_string(),
            group.epoch.to_string(),
            group.revision.clone(),
            nodes,
        ]);
    }
    page.push_str(&table.text("  "));
    for group in &status.groups {
        group_words(page, &name, group, now);
    }
}

fn pods_ready(pods: &[Pod], group: u32, wanted: i32) -> String {
    let text = group.to_string();
    let ready = pods.iter().filter(|pod| {
        let conditions = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref());
        let ready = conditions.unwrap_or_default().iter();
        pod.labels().get(labels::GROUP) == Some(&text)
            && ready
                .into_iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    });
    format!("{}/{wanted}", ready.count())
}

/// What a group says beyond its row.
fn group_words(page: &mut String, name: &str, group: &GroupStatus, now: Timestamp) {
    let name = names::group(name, u32::try_from(group.index).unwrap_or(0));
    // What serves has no more to say than its row.
    let words = group.message.as_deref().filter(|text| !text.is_empty());
    if let Some(message) = words.filter(|_| group.phase != GroupPhase::Ready) {
        let _ = writeln!(page, "  {name}: {message}");
    }
    if let Some(drain) = &group.drain {
        let since = age(drain.since.0, now);
        let why = drain.reason.as_str();
        let _ = writeln!(
            page,
            "  {name} ends ({why}): it has taken no new requests for {since}"
        );
    }
}

fn failures(
    page: &mut String,
    deployment: &LlamaDeployment,
    status: &LlamaDeploymentStatus,
    now: Timestamp,
) {
    let mut failed: Vec<_> = status
        .groups
        .iter()
        .filter_map(|group| Some((group, group.last_failure.as_ref()?)))
        .collect();
    if failed.is_empty() {
        return;
    }
    failed.sort_by_key(|(_, failure)| std::cmp::Reverse(failure.time.0));
    page.push_str("\nLast failures\n");
    for (group, failure) in failed {
        let _ = writeln!(page, "  {}", failure_line(deployment, group, now));
        let _ = writeln!(page, "    {}", failure.message);
    }
}

/// The cause of the last failure of `group`: rank, reason, pod and node.
pub fn failure_line(deployment: &LlamaDeployment, group: &GroupStatus, now: Timestamp) -> String {
    let name = deployment.name_any();
    let index = u32::try_from(group.index).unwrap_or(0);
    let Some(failure) = &group.last_failure else {
        return String::new();
    };
    let (who, pod) = match failure.rank {
        None => (String::new(), String::new()),
        Some(rank) => {
            let place = crate::logs::choose::pod_of_rank(deployment, rank);
            let pod = place.map(|node| format!(", pod {}", names::pod(&name, index, node)));
            (format!("rank {rank}: "), pod.unwrap_or_default())
        }
    };
    let node = failure
        .node
        .as_ref()
        .map(|node| format!(", node {node}"))
        .unwrap_or_default();
    format!(
        "group {}: {who}{}{pod}{node}, {} ago",
        names::group(&name, index),
        failure.reason,
        age(failure.time.0, now)
    )
}

fn self_tests(page: &mut String, status: &LlamaDeploymentStatus, now: Timestamp) {
    if status.self_tests.is_empty() {
        return;
    }
    page.push_str("\nSelf-tests\n");
    let mut table = Table::new(&["KEY", "ANSWER", "REVISION", "AGE"]);
    for record in &status.self_tests {
        table.row([
            record.key.clone(),
            record.answer.clone(),
            record.revision.clone(),
            age(record.time.0, now),
        ]);
    }
    page.push_str(&table.text("  "));
}

fn warnings(page: &mut String, events: &[Event], now: Timestamp) {
    if events.is_empty() {
        return;
    }
    let mut latest: Vec<_> = events.iter().map(|event| (time(event), event)).collect();
    latest.sort_by_key(|(time, event)| (std::cmp::Reverse(*time), event.metadata.name.clone()));
    page.push_str("\nWarnings\n");
    for (time, event) in latest.iter().take(WARNINGS) {
        let times = event.series.as_ref().and_then(|series| series.count);
        let times = times
            .or(event.count)
            .filter(|times| *times > 1)
            .map_or_else(String::new, |times| format!(" ({times} times)"));
        let _ = writeln!(
            page,
            "  {} ago, {}{times}: {}",
            time.map_or_else(|| NONE.to_owned(), |time| age(time, now)),
            event.reason.as_deref().unwrap_or(NONE),
            event
                .message
                .as_deref()
                .unwrap_or_default()
                .replace('\n', " ")
        );
    }
    if let Some(more) = latest.len().checked_sub(WARNINGS).filter(|more| *more > 0) {
        let _ = writeln!(page, "  and {more} older ones");
    }
}

/// When `event` happened last.
fn time(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref();
    let last = series.and_then(|series| series.last_observed_time.as_ref());
    last.or(event.event_time.as_ref())
        .map(|time| time.0)
        .or_else(|| event.last_timestamp.as_ref().map(|time| time.0))
        .or_else(|| {
            event
                .metadata
                .creation_timestamp
                .as_ref()
                .map(|time| time.0)
        })
}
